"""Where everything lives: one table from parameters to logical axes, one from logical axes to mesh axes.

The mesh has three axes. "data" and "fsdp" hold different batches ("lanes"): the same program runs under ``jax.vmap``
over a leading lane axis. "tensor" holds different heads and MLP features of one batch (Shoeybi et al. 2019,
arXiv 1909.08053): two sums over devices a layer. "fsdp" also cuts the other side of every kernel (Zhao et al. 2023,
arXiv 2304.11277). No constraint inside the decoder is needed for this: from where parameters and batches lie, XLA finds
the two sums a layer, and gathers a layer's kernels within the scan's loop, never a whole stack before it.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscape.errors import InputError

AXES = ("data", "fsdp", "tensor")
LANES = ("data", "fsdp")  # the mesh axes of the leading axis of batches and of prefixes

# Logical axis -> mesh axis. What is not named here is whole everywhere.
MESH_AXES: Mapping[str, str] = {
    "vocabulary": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "width": "fsdp",
}

# Last names of a parameter's path -> logical axis of each dimension. Kernels are [layer, inputs, outputs]; the layer
# axis is scanned over, and biases and norms of the residual stream are too small to cut.
PARAMETERS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("embedding",): ("vocabulary", "width"),
    ("head",): ("vocabulary", "width"),
    ("positions",): ("position", "width"),
    ("final_norm", "scale"): ("stream",),
    ("final_norm", "bias"): ("stream",),
    **{(norm, part): ("layer", "stream")
       for norm in ("input_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm") for part in ("scale", "bias")},
    ("q_norm", "scale"): ("layer", "feature"),
    ("k_norm", "scale"): ("layer", "feature"),
}  # fmt: skip
# Projection -> logical axes of its inputs and its outputs.
PROJECTIONS: Mapping[str, tuple[str, str]] = {
    "q": ("width", "heads"),
    "k": ("width", "kv_heads"),
    "v": ("width", "kv_heads"),
    "o": ("heads", "width"),
    "gate": ("width", "mlp"),
    "up": ("width", "mlp"),
    "down": ("mlp", "width"),
}


class MeshShape(NamedTuple):
    """Devices along each axis of a mesh."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.fsdp * self.tensor

    @property
    def lanes(self) -> int:
        """Batches that run at once."""
        return self.data * self.fsdp

    def __str__(self):
        return f"data {self.data} x fsdp {self.fsdp} x tensor {self.tensor}"


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first ``data * fsdp * tensor`` devices.

    Devices along "tensor" are neighbours: they talk most, so they should share a host.

    Raises:
      InputError: there are fewer devices.
    """
    devices, shape = jax.devices(), MeshShape(data, fsdp, tensor)
    if min(shape) < 1 or shape.size > len(devices):
        raise InputError(f"config.mesh: {shape} does not fit {len(devices)} device(s)")
    return Mesh(np.asarray(devices[: shape.size]).reshape(shape), AXES)


def logical_axes(path: tuple[str, ...]) -> tuple[str, ...]:
    """Logical axis of each dimension of a parameter.

    Raises:
      KeyError: the tables don't have it.
    """
    if (axes := PARAMETERS.get(path[-1:]) or PARAMETERS.get(path[-2:])) is not None:
        return axes
    adapter, part = path[-2:-1] == ("adapter",), path[-1]
    inputs, outputs = PROJECTIONS[path[-3] if adapter else "".join(path[-2:-1])]
    if adapter:  # its rank is small: only the projection's own side is cut
        return {"a": ("layer", "rank", inputs), "b": ("layer", "rank", outputs), "m": ("layer", outputs)}[part]
    bias = ("layer", "stream" if outputs == "width" else outputs)
    return {"kernel": ("layer", inputs, outputs), "bias": bias}[part]


def partition_spec(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The tables' row for a parameter; a dimension that its mesh axis does not divide stays whole.

    Raises:
      KeyError: the tables don't have it.
    """
    axes = [MESH_AXES.get(axis) for axis in logical_axes(path)]
    return PartitionSpec(*(a if a and size % mesh.shape[a] == 0 else None for a, size in zip(axes, shape, strict=True)))


def place(path: tuple[str, ...], value: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts a host array where the tables say it lives."""
    return jax.device_put(value, NamedSharding(mesh, partition_spec(path, value.shape, mesh)))


@functools.cache
def lanes_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: its leading axis over ``LANES``, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(LANES))


@functools.cache
def prefix_sharding(mesh: Mesh, kv_heads: int) -> NamedSharding:
    """Of a prefix's keys or values [lane, L, P, K, F]; heads that "tensor" does not divide stay whole."""
    heads = MESH_AXES["kv_heads"] if kv_heads % mesh.shape[MESH_AXES["kv_heads"]] == 0 else None
    return NamedSharding(mesh, PartitionSpec(LANES, None, None, heads, None))
