"""The jitted passes of collection: pure functions of (graphdef, params, tokens).

Both run one batch, or as many as the mesh has lanes: every array of the batch then has a leading lane axis.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxscape.data.batches import TokenBatch
from jaxscape.models.answers import letter_logits
from jaxscape.models.decoder import Prefix


class Collectable(NamedTuple):
    """What leaves the device.

    Attributes:
      states: site -> [L, B, D] in the parameters' dtype, of the layers asked for.
      letters: float32 [B, C], see ``answers.letter_logits``; None unless asked for.
      free: int32 [B], the token of the highest logit; None unless letters are.
      logits: float32 [B, V]; None unless asked for.
    """

    states: dict[str, jax.Array]
    letters: jax.Array | None
    free: jax.Array | None
    logits: jax.Array | None


@functools.partial(jax.jit, static_argnames=("graphdef", "placed"))
def run_prefix(graphdef, params, batch: TokenBatch, serves, *, placed=None) -> Prefix:
    """Runs the tokens that prompts share, once.

    Args:
      graphdef: of a ``Decoder``.
      params: its state.
      batch: one row; its padding, at the end, becomes the padding of the prefix.
      serves: int32 [1] tokens of the longest prompt that will run after it, see ``Decoder.__call__``'s row_lengths.
      placed: sharding of the keys and of the values, for lanes.

    Returns:
      Keys and values [L, N, K, F] with the row's length.
    """

    def one(batch, serves):
        out = nnx.merge(graphdef, params)(batch, keep_keys=True, row_lengths=serves)
        return Prefix(out.keys, out.values, batch.last[0] + 1)

    if batch.tokens.ndim == 1:
        return one(batch, serves)
    keys, values, length = jax.vmap(one)(batch, serves)
    return Prefix(*(jax.lax.with_sharding_constraint(x, placed) for x in (keys, values)), length)


@functools.partial(jax.jit, static_argnames=("graphdef", "sites", "layers", "vocabulary"))
def run_prompts(
    graphdef,
    params,
    batch: TokenBatch,
    prefix: Prefix | None,
    pool_from: jax.Array | None = None,
    letters: jax.Array | None = None,
    *,
    sites: tuple[str, ...] = ("residual",),
    layers: tuple[int, ...] | None = None,
    vocabulary: bool = False,
) -> Collectable:
    """Runs a batch of prompts, each a row, after the prefix they share.

    Args:
      graphdef: of a ``Decoder``.
      params: its state.
      batch: B rows of tokens.
      prefix: what stands before every row; None for nothing.
      pool_from: int32 [B], see ``Decoder.__call__``; None for the last token's states.
      letters: int32 [C, W] tokens of each answer's spellings; None for no answers.
      sites: see ``Decoder.__call__``.
      layers: places of those whose states leave the device; None: all.
      vocabulary: keep the logits of every token.
    """

    def one(batch, prefix, pool_from):
        model = nnx.merge(graphdef, params)
        out = model(batch, prefix, sites=sites, pool_from=pool_from)
        states = {site: x if layers is None or site == "final_norm" else x[np.asarray(layers)]
                  for site, x in out.states.items()}  # fmt: skip
        if letters is None and not vocabulary:
            return Collectable(states, None, None, None)
        logits = model.logits(out.hidden).astype(jnp.float32)  # of the rows' last tokens
        if letters is None:
            return Collectable(states, None, None, logits)
        free = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Collectable(states, letter_logits(logits, letters), free, logits if vocabulary else None)

    return (one if batch.tokens.ndim == 1 else jax.vmap(one))(batch, prefix, pool_from)


@functools.partial(jax.jit, static_argnames="room")
def resize(prefix: Prefix, room: int) -> Prefix:
    """The same prefix with other room for padding; what does not fit is cut off."""

    def fitted(x):
        x = jax.lax.slice_in_dim(x, 0, min(room, x.shape[-3]), axis=x.ndim - 3)
        return jnp.pad(x, [(0, room - x.shape[-3] if axis == x.ndim - 3 else 0) for axis in range(x.ndim)])

    return Prefix(fitted(prefix.keys), fitted(prefix.values), prefix.length)
