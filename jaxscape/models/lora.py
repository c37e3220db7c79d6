"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W + scale dropout(x) A^T B."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxscape.errors import InputError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter, and of what kind.

    Attributes:
      rank: rows of A and of B.
      alpha: see ``scale``.
      dropout: share of the adapter's inputs that are zeroed in training. Projections that read the same input (q, k
        and v; gate and up) have it zeroed in the same places.
      targets: names out of ``PROJECTIONS``.
      rslora: scale by the rank's square root, see ``scale``.
      dora: train the lengths of the kernels' columns apart from their directions (Liu et al. 2024, arXiv 2402.09353).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"LoRA rank {self.rank}: must be at least 1")
        if not self.alpha > 0:
            raise InputError(f"LoRA alpha {self.alpha}: must be greater than 0")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"LoRA dropout {self.dropout}: must be in [0, 1)")
        unknown = sorted(set(self.targets) - set(PROJECTIONS))
        if unknown or not self.targets:
            raise InputError(f"LoRA targets {unknown or 'none'}: choose from {', '.join(PROJECTIONS)}")

    @property
    def scale(self) -> float:
        """Of the update: alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def only(self, name: str) -> "LoraConfig | None":
        """This configuration where ``name`` is a target, else None."""
        return self if name in self.targets else None


class LoraParam(nnx.Param):
    """A parameter of an adapter: what LoRA training changes. Always float32."""


def init_adapter(part: str, shape: tuple[int, ...], key: jax.Array, kernel: jax.Array) -> jax.Array:
    """First values of a part of an adapter, float32: the function stays what it was.

    Args:
      part: "a" ([L, rank, inputs]: uniform, as PEFT's), "b" ([L, rank, outputs]: zeros) or "m" ([L, outputs]: the
        lengths of the kernel's columns).
      shape: of the part.
      key: PRNG key.
      kernel: [L, inputs, outputs] that it is added to.
    """
    if part == "b":
        return jnp.zeros(shape)
    if part == "m":
        return _float32_column_lengths(kernel)
    bound = shape[2] ** -0.5  # kaiming_uniform with a = sqrt(5)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def column_lengths(kernel: jax.Array) -> jax.Array:
    """Euclidean length of each output's column: [..., inputs, outputs] -> [..., outputs]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=-2))


@jax.jit
def _float32_column_lengths(kernel: jax.Array) -> jax.Array:
    """Compiled, so that no float32 copy of the kernel is held."""
    return column_lengths(kernel.astype(jnp.float32))


def low_ranks(x: jax.Array, adapters: Sequence["Adapter"]) -> list[jax.Array]:
    """x A^T of adapters that read the same x [N, inputs]: a [N, rank] each.

    They are one product, and so are the gradients of their A and what they give x's: narrow products are the slowest.
    A lies as [rank, inputs] because its gradient then is a product whose longer side is its output's columns: on
    CPUs two to three times as fast as the other way around.
    """
    a = jnp.concatenate([adapter.a[...].astype(x.dtype) for adapter in adapters])
    halves = checkpoint_name(jax.lax.dot_general(x, a, (((1,), (1,)), ((), ()))), "low_rank")
    return jnp.split(halves, len(adapters), axis=1)


def zeroed(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout of x [N, inputs]: a share ``rate`` of it becomes 0, the rest grows by 1 / (1 - rate).

    What is kept is decided by a hash of the key and the place, which XLA computes on the way. JAX's own generator,
    whose bits have to be written down, would take a fifth of a training step on CPUs with the study's adapters.
    """
    of_row = jax.lax.broadcasted_iota(jnp.uint32, (x.shape[0], 1), 0)
    for word in jax.random.key_data(key):
        of_row = _hash(of_row ^ word)
    column = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 1)
    kept = _hash(of_row + column * jnp.uint32(0x9E3779B9)) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))


def _hash(words: jax.Array) -> jax.Array:
    """Wellons' "lowbias32": a bijection of uint32 of which every bit depends on every other."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)


class Adapter(nnx.Module):
    """The low-rank update of one projection, stacked over layers; B starts at zero, so it starts as no change.

    Attributes:
      a: [L, rank, inputs].
      b: [L, rank, outputs].
      m: [L, outputs], of DoRA; else None.
    """

    def __init__(self, stack: int, inputs: int, outputs: int, config: LoraConfig):
        self.config = config
        self.a = LoraParam(jnp.zeros((stack, config.rank, inputs)))
        self.b = LoraParam(jnp.zeros((stack, config.rank, outputs)))
        self.m = nnx.data(LoraParam(jnp.zeros((stack, outputs))) if config.dora else None)

    def __call__(self, half: jax.Array, y: jax.Array, kernel: jax.Array, dropped: jax.Array | None) -> jax.Array:
        """The adapted product, in the layer that the scan is at.

        Args:
          half: [N, rank], of ``low_ranks``: of x after dropout.
          y: [N, outputs], x W.
          kernel: W [inputs, outputs].
          dropped: [N, inputs], x after dropout; None without it.

        Returns:
          [N, outputs].
        """
        update = (half * jnp.asarray(self.config.scale, half.dtype)) @ self.b[...].astype(half.dtype)
        if self.m is None:
            return y + update
        # Liu et al. 2024, equation 5 and section 4.3: the length is a constant in the gradient
        changed = kernel.astype(jnp.float32) + self.config.scale * (self.a[...].T @ self.b[...])
        ratio = (self.m[...] / jax.lax.stop_gradient(column_lengths(changed))).astype(half.dtype)
        if dropped is None:
            return ratio * (y + update)
        return y + (ratio - 1) * (dropped @ kernel) + ratio * update  # as PEFT has it


def merge_adapter(kernel: jax.Array, adapter: Mapping[str, jax.Array], scale: float, *, donate: bool) -> jax.Array:
    """Adds an adapter's update to its kernel, layer by layer, in float32.

    Args:
      kernel: [L, inputs, outputs], of any dtype.
      adapter: "a", "b" and, of DoRA, "m".
      scale: of the update.
      donate: give up ``kernel``: the result takes its place, and no more than a layer is held beside it.

    Returns:
      [L, inputs, outputs], of the kernel's dtype, where the kernel lies.
    """
    return _merging(donate, kernel.sharding)(kernel, dict(adapter), scale)


@functools.lru_cache(maxsize=32)
def _merging(donate: bool, sharding: jax.sharding.Sharding) -> Callable:
    def merge(kernel, adapter, scale):
        def layer(number, merged):
            part = {name: value[number] for name, value in adapter.items()}
            changed = merged[number].astype(jnp.float32) + scale * (part["a"].T @ part["b"])
            if "m" in part:
                changed *= part["m"] / column_lengths(changed)
            return merged.at[number].set(changed.astype(merged.dtype))

        return jax.lax.fori_loop(0, len(kernel), layer, kernel)

    return jax.jit(merge, donate_argnums=0 if donate else (), out_shardings=sharding)
