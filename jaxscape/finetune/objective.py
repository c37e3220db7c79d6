"""The loss of fine-tuning and one optimiser step, as pure functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxscape.data.batches import TokenBatch


class TrainingBatch(NamedTuple):
    """Questions with the answer that should follow, in G parts that run one after the other on W lanes each.

    Attributes:
      batch: B rows of tokens, each ending where the answer is asked for; every array with leading axes [G, W].
      targets: int32 [G, W, B] token that should follow each row.
      weights: float32 [G, W, B] share of each row in the step's loss; 0 for empty rows. Their sum is 1.
    """

    batch: TokenBatch
    targets: jax.Array
    weights: jax.Array


class Metrics(NamedTuple):
    """What a step says of itself, float32 scalars but for the last.

    Attributes:
      loss: weighted mean cross-entropy of the answers, in nats, before the update.
      accuracy: weighted share of rows whose likeliest token is the target.
      gradient_norm: global norm of the gradient, before it is clipped.
      finite: bool, whether loss, gradient and every updated parameter are numbers.
    """

    loss: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array


def answer_loss(model, batch: TokenBatch, targets, weights, dropout_key=None, *, remat: str = "none", dtype=None):
    """Weighted sum of the cross-entropies of the answer tokens over the whole vocabulary, in nats.

    Args:
      model: a ``Decoder``.
      batch: B rows.
      targets: int32 [B].
      weights: float32 [B].
      dropout_key: PRNG key of the adapters' dropout; None turns it off.
      remat: see ``Decoder.__call__``.
      dtype: of the computation, see ``Decoder.__call__``.

    Returns:
      Loss (float32 scalar) and the sum of the weights of rows whose most likely token is the target.
    """
    out = model(batch, dropout_key=dropout_key, remat=remat, dtype=dtype)
    logits = model.logits(out.hidden).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(hits * weights)


def gradients(graphdef, trainable, frozen, data: TrainingBatch, dropout_key=None, *, remat: str = "none", dtype=None):
    """Loss, accuracy, and the gradient of the trainable parameters alone.

    Args:
      graphdef: of a ``Decoder``.
      trainable: state of the parameters that change.
      frozen: state of all the others.
      data: the step's batch.
      dropout_key: PRNG key of this step's dropout, or None.
      remat: see ``Decoder.__call__``.
      dtype: likewise.

    Returns:
      Loss and accuracy (float32 scalars), and the gradient, a state like ``trainable``, float32.
    """
    parts, lanes = data.targets.shape[:2]
    keys = None if dropout_key is None else jax.random.split(dropout_key, (parts, lanes))

    def loss_of(params, part, keys):
        def lane(batch, targets, weights, key):
            model = nnx.merge(graphdef, params, frozen)
            return answer_loss(model, batch, targets, weights, key, remat=remat, dtype=dtype)

        if lanes == 1:  # a program without the axis: XLA's is the faster for it
            return lane(*jax.tree.map(lambda x: x[0], (*part, keys)))
        return jax.tree.map(jnp.sum, jax.vmap(lane)(*part, keys))

    def of_part(part, keys):
        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable, part, keys)
        return loss, accuracy, gradient

    if parts == 1:
        return of_part(*jax.tree.map(lambda x: x[0], (data, keys)))
    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], (data, keys))))

    def add(total, part):
        return jax.tree.map(jnp.add, total, of_part(*part)), None

    return jax.lax.scan(add, zero, (data, keys))[0]


def train_step(graphdef, optimizer, trainable, frozen, opt_state, data: TrainingBatch, dropout_key, *, remat: str,
               dtype=None):
    """One step: gradients of the trainable parameters alone, and their update.

    Args:
      graphdef: of a ``Decoder``.
      optimizer: an optax transformation.
      trainable: state of the parameters that change, float32.
      frozen: state of all the others.
      opt_state: the optimiser's.
      data: the step's batch.
      dropout_key: PRNG key of this step's dropout, or None.
      remat: see ``Decoder.__call__``.
      dtype: likewise.

    Returns:
      trainable, opt_state, ``Metrics``.
    """
    loss, accuracy, gradient = gradients(graphdef, trainable, frozen, data, dropout_key, remat=remat, dtype=dtype)
    updates, opt_state = optimizer.update(gradient, opt_state, trainable)
    trainable, norm = optax.apply_updates(trainable, updates), optax.global_norm(gradient)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in (loss, norm, *jax.tree.leaves(trainable))]))
    return trainable, opt_state, Metrics(loss, accuracy, norm, finite)
