"""What a run needs of each device's memory: formulas, no arrays.

Letters: N tokens, B rows, T longest row of a batch; P prefix tokens; L layers; D width; H query heads; K key/value
heads; F features a head. Bytes throughout; GB are 10^9 of them.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from jaxscape.models.architecture import Architecture
from jaxscape.models.attention import MOST_BLOCKS, QUERY_BLOCK, SCORE_BYTES
from jaxscape.models.decoder import abstract_decoder
from jaxscape.models.lora import LoraConfig
from jaxscape.models.sharding import AXES, MeshShape, partition_spec

_BYTES_A_TOKEN, _MOST_BYTES_A_TOKEN = 3, 6  # of prompts; English has about four


class Work(NamedTuple):
    """The most that a run asks of one batch.

    Attributes:
      tokens: N.
      rows: B.
      longest: T.
      prefix: P; 0 where there is none.
      sites: states kept a layer.
      logits: tokens whose logits are wanted.
      cells: of the padded view of the rows; 0: rows times the longest.
    """

    tokens: int
    rows: int
    longest: int
    prefix: int = 0
    sites: int = 1
    logits: int = 4
    cells: int = 0


class Training(NamedTuple):
    """What a step of fine-tuning asks for.

    Attributes:
      tokens: N of one of its parts, over all lanes.
      rows: B, likewise.
      longest: T.
      adapters: what is trained; None: all parameters.
      remat: see ``decoder.REMAT``.
      parts: that run one after the other, their gradients added up.
      state: numbers that the optimiser keeps for each one that is trained: AdamW two moments.
    """

    tokens: int
    rows: int
    longest: int
    adapters: LoraConfig | None
    remat: str
    parts: int = 1
    state: float = 2.0


class DeviceMemory(NamedTuple):
    """Bytes that a run needs of one device.

    Attributes:
      parameters: the device's part of them.
      copies: of kernels gathered from the other devices of "fsdp", or converted to what the device multiplies.
      prefix: keys and values of the prefix that is read and of the next one.
      activations: of the layer that needs most.
      states: what leaves the passes, of the batch that runs and the one that is fetched.
      logits: the head's part, the logits and their float32.
      optimizer: gradients and moments, in training; float32, as what is trained is.
    """

    parameters: int
    copies: int
    prefix: int
    activations: int
    states: int
    logits: int
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def readable(size: float) -> str:
    """Bytes in GB, or in MB (10^6) where those are few."""
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB" if size < 100e9 else f"{size / 1e9:.0f} GB"


def parameter_shapes(arch: Architecture, dtype=jnp.float32) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Parameter path -> shape and dtype, without making any array."""
    return {path: leaf.get_value() for path, leaf in abstract_decoder(arch, dtype=dtype)[1].flat_state()}


def trained_shapes(arch: Architecture, adapters: LoraConfig | None) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Parameter path -> shape and dtype of what fine-tuning changes: adapters, or everything; float32."""
    if adapters is None:
        return parameter_shapes(arch)
    state = abstract_decoder(arch, dtype=jnp.float32, lora=adapters)[1].flat_state()
    return {path: leaf.get_value() for path, leaf in state if path[-2:-1] == ("adapter",)}


def parameter_count(arch: Architecture) -> int:
    """Parameters of a decoder; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in parameter_shapes(arch).values())


def bytes_on_device(leaf: jax.Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    """Bytes of the part of an array that one device holds."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _parts(leaves, shape: MeshShape) -> dict[tuple[str, ...], int]:
    """Bytes of each parameter on one device."""
    mesh = AbstractMesh(shape, AXES)
    return {
        path: bytes_on_device(leaf, NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)))
        for path, leaf in leaves.items()
    }


def device_memory(arch: Architecture, dtype, shape: MeshShape, work: Work, platform: str = "other") -> DeviceMemory:
    """Bytes that a run needs of each device.

    Args:
      arch: the model.
      dtype: of parameters and activations.
      shape: of the mesh; every lane runs a batch as large as ``work`` says.
      work: the largest batch.
      platform: "cpu" or "other"; attention works in smaller pieces on CPUs.
    """
    size, piece = jnp.dtype(dtype).itemsize, SCORE_BYTES["cpu" if platform == "cpu" else "other"]
    parameters, copies = _kernels(arch, dtype, shape, platform)
    prefix = 2 * arch.num_layers * work.prefix * _part(arch.num_kv_heads, shape.tensor) * arch.head_dim * size
    wanted = min(work.logits, _part(arch.vocab_size, shape.tensor))
    before = work._replace(tokens=work.prefix, rows=1, longest=work.prefix, prefix=0, cells=0)  # the prefix's own pass
    return DeviceMemory(
        parameters=parameters,
        copies=copies,
        prefix=2 * prefix,
        activations=max(_activations(arch, size, shape.tensor, w, piece) for w in (work, before)),
        states=2 * arch.num_layers * work.sites * work.rows * arch.width * size,
        logits=work.rows * wanted * (size + 4) + wanted * arch.width * size,
    )


def training_memory(
    arch: Architecture, dtype, shape: MeshShape, step: Training, platform: str = "other"
) -> DeviceMemory:
    """Likewise for fine-tuning, whose lanes share the rows of a step; ``dtype`` is of the computation.

    What the forward pass keeps for the backward one: each block's input; with "elementwise" the results of its
    products too; with "none" about three times as much, and the scores.
    """
    size, tensor = jnp.dtype(dtype).itemsize, shape.tensor
    rows = -(-step.rows // shape.lanes)
    tokens = min(step.tokens, -(-step.tokens * rows // step.rows))
    trained = sum(_parts(trained_shapes(arch, step.adapters), shape).values())
    if step.adapters is None:
        parameters, copies = _kernels(arch, jnp.float32, shape, platform)
        copies += _cast(arch, dtype, shape) if size < 4 else 0
    else:
        parameters, copies = _kernels(arch, dtype, shape, platform)
        parameters += trained
    heads, kv_heads = _part(arch.num_heads, tensor), _part(arch.num_kv_heads, tensor)
    products = ((heads + 2 * kv_heads) * arch.head_dim + 2 * arch.width
                + (2 if arch.gated else 1) * _part(arch.mlp_width, tensor))  # fmt: skip
    products += step.adapters.rank * len(step.adapters.targets) if step.adapters else 0
    kept = {"blocks": arch.width, "elementwise": arch.width + products, "none": 3 * (arch.width + products)}[step.remat]
    scores = 2 * rows * step.longest**2 * heads * 4 if step.remat == "none" else 0
    layer = _activations(arch, size, tensor, Work(tokens, rows, step.longest), 0)
    return DeviceMemory(
        parameters, copies, 0,
        activations=arch.num_layers * (tokens * kept * size + scores) + 2 * layer,
        states=0,
        logits=rows * _part(arch.vocab_size, tensor) * (size + 3 * 4),
        optimizer=round((1 + step.state + (step.parts > 1)) * trained),
    )  # fmt: skip


def _cast(arch: Architecture, dtype, shape: MeshShape) -> int:
    """Bytes of what is cast to the dtype of the computation at once: two layers' kernels, or the head."""
    whole = _parts(parameter_shapes(arch, dtype), shape._replace(fsdp=1))
    layers = sum(part for path, part in whole.items() if path[0] == "blocks")
    return max(2 * layers // arch.num_layers, whole[_head(arch)])


def _kernels(arch: Architecture, dtype, shape: MeshShape, platform: str) -> tuple[int, int]:
    """Bytes of parameters on a device, and of the copies that products are made from."""
    leaves, size = parameter_shapes(arch, dtype), jnp.dtype(dtype).itemsize
    here, unsplit = _parts(leaves, shape), _parts(leaves, shape._replace(fsdp=1))
    layer = sum(unsplit[p] - here[p] for p in leaves if p[0] == "blocks") // arch.num_layers
    head = _head(arch)
    # the next layer's kernels may be on their way while a layer runs; XLA's CPU products of half floats are float32's
    converted = 4 // size * sum(here.values()) if platform == "cpu" and size < 4 else 0
    return sum(here.values()), max(2 * layer, unsplit[head] - here[head]) + converted


def _head(arch: Architecture) -> tuple[str, ...]:
    """Path of the head's parameter."""
    return ("embedding",) if arch.tie_embeddings else ("head",)


def _part(count: int, devices: int) -> int:
    """A device's part of ``count`` things, which stay whole where they cannot be dealt evenly."""
    return count if count % devices else count // devices


def _activations(arch: Architecture, size: int, tensor: int, work: Work, piece: int) -> int:
    """Bytes alive on a device in the layer's attention or its MLP, whichever needs more.

    Args:
      arch: the model.
      size: bytes of a number.
      tensor: devices that share heads and MLP features.
      work: the batch.
      piece: bytes of scores against the prefix that live at once.
    """
    tokens, cells = work.tokens, work.cells or work.rows * work.longest
    heads, kv_heads = _part(arch.num_heads, tensor), _part(arch.num_kv_heads, tensor)
    stream = 2 * tokens * arch.width * size  # and what is added to it
    qkv = (tokens + cells) * (heads + 2 * kv_heads) * arch.head_dim * size
    means = (tokens + cells) * heads * arch.head_dim * (size + 4)
    # blocks of queries against what they see, all of them alive in the worst order; float32
    own = cells * heads * (work.longest + max(QUERY_BLOCK, work.longest // MOST_BLOCKS)) // 2 * 4
    prefix = 2 * min(piece, tokens * heads * work.prefix * 4)
    mlp = (3 if arch.gated else 2) * tokens * _part(arch.mlp_width, tensor) * size
    return stream + max(qkv + means + max(own, prefix), mlp)


def rough_work(texts: Sequence[str], prefixes: Sequence[str], token_budget: int, arch: Architecture) -> Work:
    """About the largest batch of prompts that are not tokenised yet.

    Args:
      texts: the prompts whole, one at least.
      prefixes: what each begins with; those that several prompts begin with run once.
      token_budget: tokens of a batch.
      arch: its longest sequence bounds theirs.
    """
    counts = collections.Counter(prefixes)
    cached = {prefix for prefix, count in counts.items() if count > 1}
    rows = [text[len(prefix) :] if prefix in cached else text for text, prefix in zip(texts, prefixes, strict=True)]
    longest = max(1, rough_tokens(rows, arch))
    most = max(token_budget, longest)
    shortest = max(1, min(map(len, rows)) // _MOST_BYTES_A_TOKEN)
    cells = 2 * most  # plans leave less than half of the padded view empty
    return Work(most, max(1, most // shortest), longest, rough_tokens(cached, arch), 1, arch.vocab_size, cells)


def rough_tokens(texts: Iterable[str], arch: Architecture) -> int:
    """About the most tokens that one of some texts has; never fewer, in English."""
    longest = max((len(text.encode()) for text in texts), default=0)
    return min(-(-longest // _BYTES_A_TOKEN), arch.max_positions)
