"""Causal attention of packed rows, after an optional prefix that they share: one meaning, three ways to compute it.

"blocked" is plain XLA, exact, in blocks that stay small: CPUs, float32, soft caps on GPUs. "cudnn" is the kernel of
NVIDIA GPUs, "splash" that of TPUs. Each attends twice, to the row itself and to the prefix, and joins the two
softmaxes by their log normalisers, so that the prefix is never copied to the rows.

Letters in shape comments: N tokens of a batch, laid end to end; B rows; T longest row; P prefix tokens; H query
heads; K key/value heads; G = H / K; F features a head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.data.batches import TokenBatch

QUERY_BLOCK = 128  # queries of a row at a time: what they can't see of the row is skipped, blockwise
MOST_BLOCKS = 8  # of a row; longer rows have longer blocks
SCORE_BYTES = {"cpu": 16 << 20, "other": 256 << 20}  # scores against the prefix that live at once
_SPLASH_BLOCK = 128  # lanes of a TPU: every axis of the splash kernel is a multiple


class Attended(NamedTuple):
    """Values under a softmax, and what it was normalised by.

    Attributes:
      mean: [N, H, F].
      log_total: float32 [N, H], the log of the softmax's denominator; -inf where nothing could be seen. None where no
        prefix has to be joined: the fused kernels have no gradient when they return it.
    """

    mean: jax.Array
    log_total: jax.Array | None


class Scores(NamedTuple):
    """How scores q . k become a softmax.

    Attributes:
      softcap: they become cap * tanh(scores / cap); None: left as they are.
      window: a token sees itself and the ``window - 1`` before it; None: all before it.
    """

    softcap: float | None = None
    window: int | None = None


def choose(dtype, scores: Scores, features: int, packed: bool = False) -> str:
    """The fastest way that computes this on the default device: "blocked", "cudnn" or "splash"."""
    device, *others = jax.devices()
    if device.platform == "tpu":
        return "blocked" if others else "splash"  # JAX doesn't partition the kernel over a mesh
    sixteen_bits = jnp.dtype(dtype).itemsize == 2
    fits = sixteen_bits and scores.softcap is None and features % 8 == 0 and features <= 128 and not packed
    if device.platform == "gpu" and fits:
        capability = getattr(device, "compute_capability", "0")  # AMD's devices report an architecture's name
        if capability.replace(".", "").isdigit() and float(capability) >= 8.0:
            return "cudnn"
    return "blocked"


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, batch: TokenBatch, prefix, scores: Scores, way: str = ""
) -> jax.Array:
    """Causal attention of every token to its row and to the prefix before it.

    Args:
      q: [N, H, F] queries, scaled and rotated.
      k: [N, K, F] keys, rotated.
      v: [N, K, F] values.
      batch: the layout of the rows.
      prefix: keys [P, K, F], values [P, K, F] and the number of valid ones, at least 1; None for no prefix.
      scores: soft cap and window.
      way: "blocked", "cudnn" or "splash"; "" chooses.

    Returns:
      [N, H, F] mean values under the softmax.
    """
    way = way or choose(q.dtype, scores, q.shape[-1], batch.segments is not None)
    rows = {"blocked": rows_blocked, "cudnn": rows_cudnn, "splash": rows_splash}[way]
    own = rows(q, k, v, batch, scores, joined=prefix is not None)
    if prefix is None:
        return own.mean
    # neither fused kernel has windows over a prefix whose length is only known when it runs
    way = "blocked" if scores.window else way
    positions = batch.positions + prefix[2]
    before = {"blocked": prefix_blocked, "cudnn": prefix_cudnn, "splash": prefix_splash}[way](
        q, *prefix, positions, scores)
    share = jax.nn.sigmoid(before.log_total - own.log_total)[..., None].astype(q.dtype)
    return own.mean + share * (before.mean - own.mean)


# -- plain XLA ---------------------------------------------------------------------------------------------------------


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index], where ``inverse`` undoes ``index``; indices out of range give zeros.

    Because the map is one to one, its transpose is a gather too: XLA's scatter-add is far slower on CPU.
    """
    return _gather(x, index)


def _move_forward(x, index, inverse):
    return _gather(x, index), (inverse, index.shape, x.shape)


def _move_backward(residuals, gradient):
    inverse, index_shape, x_shape = residuals
    flat = gradient.reshape((-1,) + gradient.shape[len(index_shape) :])
    return _gather(flat, inverse).reshape(x_shape), None, None


_move.defvjp(_move_forward, _move_backward)


def _soft_mean(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, softcap: float | None,
               sees_some: bool = True) -> tuple[jax.Array, jax.Array]:
    """Mean of the values v [..., S, F] under the softmax of q k^T (q [..., Q, F], k [..., S, F]) where allowed, and its
    log normaliser [..., Q] in float32. ``sees_some``: every query is allowed at least one key.

    Dividing after the product leaves F numbers a query to divide, not S.
    """
    scores = jnp.matmul(q, jnp.swapaxes(k, -1, -2), preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    if not sees_some:
        top = jnp.maximum(top, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    positive = total if sees_some else jnp.where(total > 0, total, 1)
    mean = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / positive
    log_total = jnp.log(positive) + top
    return mean.astype(v.dtype), (log_total if sees_some else jnp.where(total > 0, log_total, -jnp.inf))[..., 0]


def rows_blocked(
    q: jax.Array, k: jax.Array, v: jax.Array, batch: TokenBatch, scores: Scores, joined: bool = True
) -> Attended:
    """Each row to itself, a block of queries at a time against the keys that block can see."""
    (_, heads, features), kv_heads = q.shape, k.shape[1]
    rows, longest = batch.slots.shape
    groups = heads // kv_heads
    q, k, v = (_move(a, batch.slots, batch.cells) for a in (q, k, v))  # [B, T, heads, F]
    q = q.reshape(rows, longest, kv_heads, groups, features).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, F]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    prompt = None if batch.segments is None else _gather(batch.segments, batch.slots)  # [B, T]
    block = max(QUERY_BLOCK, -(-longest // MOST_BLOCKS))
    means, logs = [], []
    for start in range(0, longest, block):
        stop = min(start + block, longest)
        seen = slice(0 if scores.window is None else max(0, start - scores.window + 1), stop)
        behind = np.arange(start, stop)[:, None] - np.arange(seen.start, stop)
        allowed = np.tile((behind >= 0) & (behind < (scores.window or longest)), (groups, 1))
        if prompt is not None:
            same = prompt[:, start:stop, None] == prompt[:, None, seen]
            allowed = allowed & jnp.tile(same, (1, groups, 1))[:, None]
        # queries of a key head side by side: larger products
        queries = q[:, :, :, start:stop].reshape(rows, kv_heads, -1, features)
        mean, log_total = _soft_mean(queries, k[:, :, seen], v[:, :, seen], allowed, scores.softcap)
        means.append(mean.reshape(rows, kv_heads, groups, -1, features))
        logs.append(log_total.reshape(rows, kv_heads, groups, -1))
    mean = jnp.concatenate(means, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows * longest, heads, features)
    mean = _move(mean, batch.cells, batch.slots)
    if not joined:
        return Attended(mean, None)
    log_total = jnp.concatenate(logs, axis=3).transpose(0, 3, 1, 2).reshape(rows * longest, heads)
    return Attended(mean, _move(log_total, batch.cells, batch.slots))


def prefix_blocked(q: jax.Array, keys: jax.Array, values: jax.Array, length: jax.Array, positions: jax.Array,
                   scores: Scores) -> Attended:
    """Every token to the shared prefix: matrix products of all tokens at once, in pieces whose scores stay small.

    Args:
      q: [N, H, F] queries, scaled and rotated.
      keys: [P, K, F].
      values: [P, K, F].
      length: valid prefix tokens.
      positions: int32 [N] of the queries, counted from the prefix's first token.
      scores: soft cap and window.
    """
    (n, heads, features), (room, kv_heads, _) = q.shape, keys.shape
    k, v = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
    place = jnp.arange(room)

    def piece(queries, positions):
        tokens = queries.shape[0]
        grouped = queries.reshape(tokens, kv_heads, -1, features).transpose(1, 0, 2, 3).reshape(kv_heads, -1, features)
        allowed = place < length
        if scores.window is not None:
            near = allowed & (positions[:, None] - place < scores.window)
            allowed = jnp.repeat(near, heads // kv_heads, axis=0)
        mean, log_total = _soft_mean(grouped, k, v, allowed, scores.softcap, sees_some=scores.window is None)
        mean = mean.reshape(kv_heads, tokens, -1, features).transpose(1, 0, 2, 3).reshape(tokens, heads, features)
        return Attended(mean, log_total.reshape(kv_heads, tokens, -1).transpose(1, 0, 2).reshape(tokens, heads))

    budget = SCORE_BYTES["cpu" if jax.default_backend() == "cpu" else "other"]
    count = min(n, -(-n * heads * room * 4 // budget))
    if count == 1:
        return piece(q, positions)
    size = -(-n // count)
    padding = count * size - n
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0))).reshape(count, size, heads, features)
    positions = jnp.pad(positions, (0, padding)).reshape(count, size)
    found = jax.lax.map(lambda part: piece(*part), (q, positions))
    return Attended(*(a.reshape((count * size,) + a.shape[2:])[:n] for a in found))


# -- NVIDIA GPUs -------------------------------------------------------------------------------------------------------


def rows_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, batch: TokenBatch, scores: Scores, joined: bool = True
) -> Attended:
    """Each row to itself by cuDNN's fused kernel (Dao 2023), on the padded view."""
    (_, heads, features), (rows, longest) = q.shape, batch.slots.shape
    lengths = jnp.sum(batch.slots < q.shape[0], axis=1).astype(jnp.int32)
    found = jax.nn.dot_product_attention(
        *(_move(a, batch.slots, batch.cells) for a in (q, k, v)), scale=1.0, is_causal=True, implementation="cudnn",
        query_seq_lengths=lengths, key_value_seq_lengths=lengths, return_residual=joined,
        local_window_size=None if scores.window is None else (scores.window - 1, 0))
    mean, log_total = found if joined else (found, None)
    mean = _move(mean.reshape(rows * longest, heads, features), batch.cells, batch.slots)
    if not joined:
        return Attended(mean, None)
    log_total = log_total.astype(jnp.float32).reshape(rows * longest, heads)
    return Attended(mean, _move(log_total, batch.cells, batch.slots))


def prefix_cudnn(q, keys, values, length, positions, scores: Scores) -> Attended:
    """Every token to the shared prefix by cuDNN's fused kernel: the batch is one long row of queries."""
    mean, log_total = jax.nn.dot_product_attention(
        q[None], keys[None], values[None], scale=1.0, implementation="cudnn", return_residual=True,
        query_seq_lengths=jnp.full((1,), q.shape[0], jnp.int32),
        key_value_seq_lengths=jnp.reshape(length, (1,)).astype(jnp.int32))
    return Attended(mean[0], log_total[0].astype(jnp.float32))


# -- TPUs --------------------------------------------------------------------------------------------------------------


def _splash(q, k, v, rows_q, rows_k, mask, softcap: float | None, joined: bool) -> Attended:
    """The splash kernel over tokens laid end to end; a query sees keys with the same number in ``rows``.

    Args:
      q: [N, H, F].
      k: [S, K, F].
      v: [S, K, F].
      rows_q: int32 [N].
      rows_k: int32 [S].
      mask: (the module of masks, shape) -> the mask of a head.
      softcap: of the scores.
      joined: return the log normaliser.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (n, heads, features), kv_heads = q.shape, k.shape[1]

    def padded(x, axis, fill=0):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % _SPLASH_BLOCK)
        return jnp.pad(x, widths, constant_values=fill)

    groups = heads // kv_heads
    q = padded(padded(q, 0), 2)
    q = q.reshape(q.shape[0], kv_heads, groups, q.shape[2]).transpose(1, 2, 0, 3)
    k, v = (padded(padded(a, 0), 2).transpose(1, 0, 2) for a in (k, v))
    shape = (q.shape[2], k.shape[1])
    size = _SPLASH_BLOCK
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask(masks, shape)] * groups),
        block_sizes=splash.BlockSizes(block_q=size, block_kv=size, block_kv_compute=size),
        attn_logits_soft_cap=softcap, save_residuals=joined, interpret=jax.default_backend() != "tpu")
    segments = splash.SegmentIds(padded(rows_q, 0, -1), padded(rows_k, 0, -2))
    found = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    mean, log_total = (found[0], found[1][0]) if joined else (found, None)
    mean = mean.transpose(2, 0, 1, 3).reshape(-1, heads, mean.shape[-1])[:n, :, :features].astype(v.dtype)
    if not joined:
        return Attended(mean, None)
    return Attended(mean, log_total.transpose(2, 0, 1).reshape(-1, heads)[:n].astype(jnp.float32))


def rows_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, batch: TokenBatch, scores: Scores, joined: bool = True
) -> Attended:
    """Each row to itself by the splash kernel: it needs no padded view."""
    rows = batch.cells // batch.slots.shape[1] if batch.segments is None else batch.segments

    def mask(masks, shape):
        if scores.window is None:
            return masks.CausalMask(shape)
        return masks.LocalMask(shape, (scores.window - 1, 0), 0)

    return _splash(q, k, v, rows, rows, mask, scores.softcap, joined)


def prefix_splash(q, keys, values, length, positions, scores: Scores) -> Attended:
    """Every token to the shared prefix by the splash kernel."""
    return _splash(q, keys, values, jnp.zeros(q.shape[0], jnp.int32),
                   jnp.where(jnp.arange(keys.shape[0]) < length, 0, -2).astype(jnp.int32),
                   lambda masks, shape: masks.FullMask(shape), scores.softcap, joined=True)
