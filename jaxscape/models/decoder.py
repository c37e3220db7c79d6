"""The decoder: blocks of attention and MLP in Flax NNX, shaped by an ``Architecture`` into any of its families.

Letters in shape comments: N tokens of a batch, laid end to end; B rows (prompts); P prefix tokens; L layers; D width;
H query heads; K key/value heads; F features a head; R features of a head that turn.

Tokens of different prompts are laid end to end, so that the matrix products (nine tenths of the work) run on no
padding; only the attention of a prompt to itself sees a padded view (see ``TokenBatch``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxscape.data.batches import TokenBatch
from jaxscape.errors import InputError
from jaxscape.models.architecture import Architecture, Rotary
from jaxscape.models.attention import Scores, attend
from jaxscape.models.lora import Adapter, LoraConfig, low_ranks, zeroed

SITES = ("residual", "input_norm", "post_attention_norm", "final_norm")

# What the backward pass recomputes: nothing; all but the projections' products; whole blocks.
_PRODUCTS = jax.checkpoint_policies.save_only_these_names("projection", "low_rank")
REMAT = {
    "none": lambda body: body,
    "elementwise": lambda body: jax.checkpoint(body, policy=_PRODUCTS, prevent_cse=False),
    "blocks": lambda body: jax.checkpoint(body, prevent_cse=False),
}

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Prefix(NamedTuple):
    """Keys and values of the tokens that every row of a batch shares.

    Attributes:
      keys: [L, P, K, F], rotated.
      values: [L, P, K, F].
      length: int32 scalar; entries from here on are padding.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array


class DecoderOutput(NamedTuple):
    """What one pass leaves.

    Attributes:
      hidden: [B, D] last token's state after the final norm.
      states: site -> [L, B, D], and "final_norm" -> [1, B, D]: the last token's states, or their means.
      keys: [L, N, K, F] rotated keys of every token; None unless asked for.
      values: [L, N, K, F]; None unless asked for.
    """

    hidden: jax.Array
    states: dict[str, jax.Array]
    keys: jax.Array | None
    values: jax.Array | None


def check_sites(arch: Architecture, sites: Sequence[str]) -> None:
    """Raises an InputError for a site that there is not, or not in this family."""
    for site in sites:
        if site not in SITES:
            raise InputError(f"site {site!r}: choose from {', '.join(SITES)}")
        if site in ("input_norm", "post_attention_norm") and not arch.pre_norms:
            raise InputError(f"site {site!r}: {arch.family} has no norm before its attention and MLP; "
                             "choose 'residual' or 'final_norm'")


def rotary_angles(rotary: Rotary, positions: jax.Array, long: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [N, R/2], float32, at integer positions [N]; ``long`` [N]: by the long frequencies."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(rotary.frequencies, jnp.float32)
    if rotary.long_frequencies is not None:
        far = positions.astype(jnp.float32)[:, None] * jnp.asarray(rotary.long_frequencies, jnp.float32)
        angles = jnp.where(long[:, None], far, angles)
    return jnp.cos(angles) * rotary.magnitude, jnp.sin(angles) * rotary.magnitude


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Turns x [N, heads, F] by the angles [N, R/2]; feature i is paired with i + R/2, those from R on stay."""
    if angles is None:
        return x
    half = angles[0].shape[-1]
    cos, sin = (a[:, None, :].astype(x.dtype) for a in angles)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class Norm(nnx.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016) over the last axis, computed in float32."""

    def __init__(self, arch: Architecture, shape: Sequence[int], dtype, kind: str = ""):
        self.kind, self.eps, self.offset = kind or arch.norm, arch.norm_eps, arch.norm_offset
        self.scale = nnx.Param(jnp.full(shape, 1 - arch.norm_offset, dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros(shape, dtype)) if self.kind == "layer" else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = x32 * inverse * (self.scale[...].astype(jnp.float32) + self.offset)
        return (y if self.bias is None else y + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """x @ kernel (+ bias), with a low-rank update where an adapter is attached."""

    def __init__(self, arch: Architecture, inputs: int, outputs: int, dtype, *, bias: bool, lora: LoraConfig | None,
                 rngs: nnx.Rngs):
        stack = arch.num_layers
        self.kernel = nnx.Param(inputs**-0.5 * jax.random.normal(rngs.params(), (stack, inputs, outputs), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((stack, outputs), dtype)) if bias else None)
        self.adapter = nnx.data(None if lora is None else Adapter(stack, inputs, outputs, lora))

    def __call__(self, x: jax.Array, half: jax.Array | None, dropped: jax.Array | None) -> jax.Array:
        """[N, inputs] -> [N, outputs], in the layer that the scan is at.

        Args:
          x: [N, inputs].
          half: [N, rank], what the adapter makes of x; None where there is none.
          dropped: [N, inputs], x after dropout; None where it is off.
        """
        kernel = self.kernel[...].astype(x.dtype)
        y = x @ kernel
        if self.adapter is not None:
            y = self.adapter(half, y, kernel, dropped)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return checkpoint_name(y, "projection")


def project(projections: Sequence[Projection], x: jax.Array, dropout_key: jax.Array | None) -> list[jax.Array]:
    """Projections of the same states [N, inputs]; they share the dropout of their adapters' inputs."""
    adapters = {number: p.adapter for number, p in enumerate(projections) if p.adapter is not None}
    dropped, halves = None, {}
    if adapters:
        (rate,) = {adapter.config.dropout for adapter in adapters.values()}
        dropped = zeroed(x, rate, dropout_key) if dropout_key is not None and rate > 0 else None
        found = low_ranks(x if dropped is None else dropped, list(adapters.values()))
        halves = dict(zip(adapters, found, strict=True))
    return [p(x, halves.get(number), dropped) for number, p in enumerate(projections)]


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, arch: Architecture, dtype, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        def projection(name: str, inputs: int, outputs: int, bias: bool) -> Projection:
            return Projection(arch, inputs, outputs, dtype, bias=bias, lora=lora and lora.only(name), rngs=rngs)

        def qk_norm(features: int) -> Norm | None:
            shape = (arch.num_layers, arch.head_dim if arch.qk_norm == "head" else features)
            return Norm(arch, shape, dtype, "rms") if arch.qk_norm else None

        self.arch = arch
        heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q = projection("q", arch.width, heads, arch.qkv_bias)
        self.k = projection("k", arch.width, kv_heads, arch.qkv_bias)
        self.v = projection("v", arch.width, kv_heads, arch.qkv_bias)
        self.o = projection("o", heads, arch.width, arch.out_bias)
        self.q_norm, self.k_norm = nnx.data(qk_norm(heads)), nnx.data(qk_norm(kv_heads))

    def _heads(self, y: jax.Array, norm: Norm | None = None) -> jax.Array:
        if norm is not None and self.arch.qk_norm == "width":
            y = norm(y)
        y = y.reshape(y.shape[0], -1, self.arch.head_dim)
        return norm(y) if norm is not None and self.arch.qk_norm == "head" else y

    def __call__(self, x, batch: TokenBatch, angles, kind, prefix: Prefix | None, dropout_keys):
        """Normed states [N, D] -> update [N, D], rotated keys and values [N, K, F].

        Args:
          x: states.
          batch: the layout of the rows.
          angles: of each kind of layer.
          kind: which kind this layer is, an int32 scalar; None where there is only one.
          prefix: of this layer.
          dropout_keys: two PRNG keys, or None each.
        """
        arch = self.arch
        q, k, v = project((self.q, self.k, self.v), x, dropout_keys[0])
        q, k, v = self._heads(q, self.q_norm), self._heads(k, self.k_norm), self._heads(v)
        scale = arch.head_dim**-0.5 if arch.attention_scale is None else arch.attention_scale

        def attend_as(number: int):
            def attend_here(q, k, v):
                q, k = rotate(q, angles[number]) * scale, rotate(k, angles[number])
                return attend(q, k, v, batch, prefix, Scores(arch.attention_softcap, arch.kinds[number].window)), k

            return attend_here

        ways = [attend_as(number) for number in range(len(arch.kinds))]
        out, k = ways[0](q, k, v) if kind is None else jax.lax.switch(kind, ways, q, k, v)
        return project([self.o], out.reshape(x.shape[0], -1), dropout_keys[1])[0], k, v


class Mlp(nnx.Module):
    """down(act(gate x) * up x) (Shazeer 2020), or down(act(up x))."""

    def __init__(self, arch: Architecture, dtype, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        def projection(name: str, inputs: int, outputs: int) -> Projection:
            adapter = lora and lora.only(name)
            return Projection(arch, inputs, outputs, dtype, bias=arch.mlp_bias, lora=adapter, rngs=rngs)

        self.activation = arch.activation
        self.gate = nnx.data(projection("gate", arch.width, arch.mlp_width) if arch.gated else None)
        self.up = projection("up", arch.width, arch.mlp_width)
        self.down = projection("down", arch.mlp_width, arch.width)

    def __call__(self, x, dropout_keys):
        """Normed states [N, D] -> update [N, D]."""
        act = _ACTIVATIONS[self.activation]
        if self.gate is None:
            (up,) = project([self.up], x, dropout_keys[0])
            hidden = act(up)
        else:
            gate, up = project((self.gate, self.up), x, dropout_keys[0])
            hidden = act(gate) * up
        return project([self.down], hidden, dropout_keys[1])[0]


class Blocks(nnx.Module):
    """All blocks at once: every parameter has the layer as its first axis; a scan takes one layer at a time."""

    def __init__(self, arch: Architecture, dtype, lora: LoraConfig | None, *, rngs: nnx.Rngs):
        def norm(present: bool):
            return nnx.data(Norm(arch, (arch.num_layers, arch.width), dtype) if present else None)

        self.arch = arch
        self.input_norm, self.mlp_norm = norm(arch.pre_norms), norm(arch.pre_norms)
        self.attention_out_norm, self.mlp_out_norm = norm(arch.post_norms), norm(arch.post_norms)
        self.attention = Attention(arch, dtype, lora, rngs=rngs)
        self.mlp = Mlp(arch, dtype, lora, rngs=rngs)

    def __call__(self, x, batch: TokenBatch, angles, kind, prefix: Prefix | None, dropout_key):
        """States [N, D] -> states at each site of the block [N, D], keys and values [N, K, F]."""
        keys = [None] * 4 if dropout_key is None else jax.random.split(dropout_key, 4)

        def normed(norm, x):
            return x if norm is None else norm(x)

        read = normed(self.input_norm, x)
        update, k, v = self.attention(read, batch, angles, kind, prefix, keys[:2])
        after = x + normed(self.attention_out_norm, update)
        read_again = normed(self.mlp_norm, x if self.arch.parallel else after)
        out = after + normed(self.mlp_out_norm, self.mlp(read_again, keys[2:]))
        return {"residual": out, "input_norm": read, "post_attention_norm": read_again}, k, v


def _last(batch: TokenBatch):
    """Takes each row's last token's state: [N, D] -> [B, D]."""
    return lambda x: x[batch.last]


def _means(batch: TokenBatch, pool_from: jax.Array):
    """Takes the mean of each row's states from a place in the row on: [N, D] -> [B, D], summed in float32."""
    rows, longest = batch.slots.shape
    row = batch.cells // longest
    wanted = (row == jnp.arange(rows)[:, None]) & (batch.positions >= pool_from[:, None])
    weights = wanted / jnp.maximum(jnp.sum(wanted, axis=1, keepdims=True), 1)
    return lambda x: (weights.astype(jnp.float32) @ x.astype(jnp.float32)).astype(x.dtype)


class Decoder(nnx.Module):
    """A causal language model; ``nnx.split`` it once and call it through pure functions.

    Attributes:
      embedding: [V, D].
      positions: [learned_positions, D]; None without them.
      blocks: stacked blocks.
      final_norm: a ``Norm`` of [D].
      head: [V, D]; None when tied to the embedding.
    """

    def __init__(self, arch: Architecture, *, dtype=jnp.float32, lora: LoraConfig | None = None, rngs: nnx.Rngs):
        def table(rows: int):
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, arch.width), dtype))

        self.arch = arch
        self.embedding = table(arch.vocab_size)
        self.positions = nnx.data(table(arch.learned_positions) if arch.learned_positions else None)
        self.blocks = Blocks(arch, dtype, lora, rngs=rngs)
        self.final_norm = Norm(arch, (arch.width,), dtype)
        self.head = nnx.data(None if arch.tie_embeddings else table(arch.vocab_size))

    def __call__(
        self,
        batch: TokenBatch,
        prefix: Prefix | None = None,
        *,
        sites: Sequence[str] = (),
        pool_from: jax.Array | None = None,
        row_lengths: jax.Array | None = None,
        keep_keys: bool = False,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
        dtype=None,
    ) -> DecoderOutput:
        """Runs the blocks.

        Args:
          batch: the tokens and their layout.
          prefix: keys and values of the tokens before every row.
          sites: which states to keep: "residual" (after each block), "input_norm" (what its attention reads),
            "post_attention_norm" (what its MLP reads), "final_norm" (after the last block's residual is normed).
          pool_from: int32 [B]: keep the mean over each row's tokens from this place in the row on; None: the last
            token's state.
          row_lengths: int32 [B] whole length of each row's prompt in tokens, which decides between the two sets of
            frequencies of LongRoPE; None: prefix and row.
          keep_keys: return the keys and values of every token, to build a ``Prefix``.
          dropout_key: PRNG key of the adapters' dropout; None turns it off.
          remat: what the backward pass recomputes instead of keeping it, a name in ``REMAT``.
          dtype: of the computation; parameters of another are cast where they are used. None: the parameters'.
        """
        arch = self.arch
        start = 0 if prefix is None else prefix.length
        positions = batch.positions + start
        angles = self._angles(batch, positions, start, row_lengths)
        take = _last(batch) if pool_from is None else _means(batch, pool_from)
        in_blocks = [site for site in sites if site != "final_norm"]
        graphdef, stacked = nnx.split(self.blocks)

        def body(x, layer):
            state, kind, keys_and_values, key = layer
            here = None if prefix is None else Prefix(*keys_and_values, prefix.length)
            at, k, v = nnx.merge(graphdef, state)(x, batch, angles, kind, here, key)
            kept = {site: take(at[site]) for site in in_blocks}
            return at["residual"], (kept, k if keep_keys else None, v if keep_keys else None)

        layers = (
            stacked,
            None if len(arch.kinds) == 1 else jnp.asarray(arch.kind_of_layer, jnp.int32),
            None if prefix is None else (prefix.keys, prefix.values),
            None if dropout_key is None else jax.random.split(dropout_key, arch.num_layers),
        )
        x = self._embed(batch.tokens, positions, dtype)
        x, (states, keys, values) = jax.lax.scan(REMAT[remat](body), x, layers)
        if "final_norm" in sites:
            states["final_norm"] = take(self.final_norm(x))[None]
        return DecoderOutput(self.final_norm(x[batch.last]), states, keys, values)

    def _embed(self, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
        x = self.embedding[...][tokens]
        x = x if dtype is None else x.astype(dtype)
        if self.arch.embedding_scale != 1.0:  # rounded to the weights' precision, as in training
            x = x * jnp.asarray(self.arch.embedding_scale, x.dtype)
        return x if self.positions is None else x + self.positions[...][positions].astype(x.dtype)

    def _angles(self, batch: TokenBatch, positions, start, row_lengths) -> list:
        """Cosines and sines of each kind of layer; None where its queries and keys don't turn."""
        long = None
        for rotary in (kind.rotary for kind in self.arch.kinds if kind.rotary and kind.rotary.long_frequencies):
            longest = batch.slots.shape[1]
            own = jnp.asarray(batch.positions)[batch.last] + 1 + start
            lengths = own if row_lengths is None else jnp.asarray(row_lengths)
            row = batch.cells // longest if batch.segments is None else batch.segments
            long = lengths[jnp.minimum(row, len(lengths) - 1)] > rotary.long_from
        return [kind.rotary and rotary_angles(kind.rotary, positions, long) for kind in self.arch.kinds]

    def logits(self, hidden: jax.Array, token_ids: jax.Array | None = None) -> jax.Array:
        """Logits [B, V] of states after the final norm [B, D], or [B, C] of the tokens ``token_ids`` [C] alone."""
        head = (self.embedding if self.head is None else self.head)[...].astype(hidden.dtype)
        logits = hidden @ (head if token_ids is None else head[token_ids]).T
        cap = self.arch.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def abstract_decoder(arch: Architecture, *, dtype=jnp.float32, lora: LoraConfig | None = None):
    """(graphdef, state of ShapeDtypeStructs) of a decoder, without making any array."""
    model = nnx.eval_shape(lambda: Decoder(arch, dtype=dtype, lora=lora, rngs=nnx.Rngs(0)))
    return nnx.split(model)
