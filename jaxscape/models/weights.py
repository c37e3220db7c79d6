"""Checkpoints on disk -> parameters on the mesh, read by the table of the family's tensor names."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxscape.errors import InputError
from jaxscape.models import sharding, tensor_names
from jaxscape.models.architecture import Architecture
from jaxscape.models.tensor_names import Names, ParamPath, Row, Target

# safetensors' names; an integer or float8 is no weight without its scale
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_CHUNK = 1 << 19  # values read at once: few enough to be transposed within the processor's caches
_ALIGNMENT = 64  # bytes; XLA takes host memory as it is where its start is a multiple of this
_LISTED = 20  # problems in one message

Bounds = Sequence[tuple[int, int]]  # (first, last + 1) along every axis


class TensorFile(Protocol):
    """Named tensors, all or some rows of which can be read."""

    where: str
    tables: Mapping[str, Names]  # family -> how its tensors are named and stored here

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name, without reading any."""

    def problem(self, name: str) -> str | None:
        """Why a tensor cannot be read; None where it can."""

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor's first axis, as float32 or as stored."""


class Part(NamedTuple):
    """Where one layer of a parameter (or the whole of one outside the blocks) is found.

    Attributes:
      name: of the tensor.
      row: how that is stored.
      number: of the parameter among those the tensor holds.
      start: outputs of the parameters before it in the tensor.
    """

    name: str
    row: Row
    number: int
    start: int


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """uint8 [count] of a file; read, not mapped, so that no more of the file is kept in memory than is asked for.

    Raises:
      InputError: the file ends before.
    """
    raw, done = np.empty(count, np.uint8), 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < count:
            if not (got := file.readinto(memoryview(raw)[done:])):
                raise InputError(f"{path}: ends at byte {offset + done} of a tensor; get it again")
            done += got
    return raw


class _Stored(NamedTuple):
    """A tensor in a safetensors file: dtype by safetensors' name, offset from the start of the file in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """A hub-format folder: ``model.safetensors``, or shards listed by ``model.safetensors.index.json``."""

    tables = tensor_names.HUB

    def __init__(self, folder: Path):
        self.where = str(folder)
        index = folder / "model.safetensors.index.json"
        files = shard_names(index) if index.is_file() else ["model.safetensors"]
        self._tensors: dict[str, _Stored] = {}
        for file in files:
            self._tensors.update(_read_header(folder / file))

    def shapes(self):
        """Shape of every tensor, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def problem(self, name: str) -> str | None:
        """Why a tensor cannot be read; None where it can."""
        dtype = self._tensors[name].dtype
        return None if dtype in _STORED else f"stored as {dtype}; implemented: {', '.join(_STORED)}"

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor, as stored."""
        tensor = self._tensors[name]
        dtype = np.dtype(_STORED[tensor.dtype])
        row = dtype.itemsize * math.prod(tensor.shape[1:])
        raw = read_bytes(tensor.file, tensor.offset + first * row, (last - first) * row)
        return raw.view(dtype).reshape(last - first, *tensor.shape[1:])


def shard_names(index: Path) -> list[str]:
    """The files that a ``model.safetensors.index.json`` lists.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not a readable index of shards (no weight_map); fetch it again") from None


def _read_header(path: Path) -> dict[str, _Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks the header against the size of the file
            pass
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the folder needs the model's safetensors") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); get it again") from None
    length = int(read_bytes(path, 0, 8).view("<u8")[0])
    header = json.loads(read_bytes(path, 8, length).tobytes())
    return {
        name: _Stored(path, found["dtype"], tuple(found["shape"]), 8 + length + found["data_offsets"][0])
        for name, found in header.items()
        if name != "__metadata__"
    }


def _stored_shape(row: Row, wanted: Mapping[ParamPath, tuple[int, ...]]) -> tuple[int, ...]:
    """What a row's tensor looks like, by the parameters it holds."""
    shape = wanted[row.paths[0]][1 if row.paths[0][0] == "blocks" else 0 :]
    shape = (*shape[:-1], sum(wanted[path][-1] for path in row.paths))
    return shape[::-1] if row.transposed else shape


def _check(file: TensorFile, targets: Mapping[str, Target | None], wanted: Mapping[ParamPath, tuple[int, ...]]) -> None:
    """Raises an InputError with every missing, extra, misshapen or unreadable tensor."""
    holder: dict[tuple[ParamPath, int | None], str] = {}
    problems, shapes = [], file.shapes()
    for name, target in targets.items():
        if target is None or any(path not in wanted for path in target.row.paths):
            problems.append(f"{name}: no parameter takes it")
            continue
        if target.layer is not None and target.layer >= wanted[target.row.paths[0]][0]:
            problems.append(f"{name}: no parameter takes it (the model has {wanted[target.row.paths[0]][0]} layers)")
            continue
        for path in target.row.paths:
            if (other := holder.setdefault((path, target.layer), name)) != name:
                problems.append(f"{name}: {other} holds the same parameter")
        if tuple(shapes[name]) != (expected := _stored_shape(target.row, wanted)):
            problems.append(f"{name}: shape {tuple(shapes[name])}, expected {expected}")
        if problem := file.problem(name):
            problems.append(f"{name}: {problem}")
    for path, shape in wanted.items():
        for layer in range(shape[0]) if path[0] == "blocks" else [None]:
            if (path, layer) not in holder:
                problems.append(f"{'.'.join(path)}{'' if layer is None else f' (layer {layer})'}: missing")
    if problems:
        shown = "; ".join(problems[:_LISTED])
        shown += f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise InputError(f"{file.where}: the tensors do not fit the configuration: {shown}")


def find_parts(file: TensorFile, arch: Architecture, wanted: Mapping[ParamPath, tuple[int, ...]]):
    """Where every parameter is found.

    Args:
      file: the checkpoint.
      arch: the decoder's architecture; its ``family`` says which table holds.
      wanted: parameter path -> shape.

    Returns:
      Parameter path -> parts, one a layer (one in all outside the blocks).

    Raises:
      InputError: the family has no table for this format; or listing every tensor that is missing, extra, misshapen
        or stored in a way that is not implemented.
    """
    if (names := file.tables.get(arch.family)) is None:
        raise InputError(f"{file.where}: tensors of family {arch.family!r} are not implemented in this format; "
                         f"implemented: {', '.join(file.tables)}")
    targets = {name: tensor_names.find_target(name, names) for name in file.shapes()}
    targets = {n: t for n, t in targets.items() if t is not None or not names.ignored.fullmatch(n)}
    if arch.tie_embeddings:  # some exporters write the tied head out; it is the embedding again
        targets = {n: t for n, t in targets.items() if t is None or t.row.paths != (("head",),)}
    _check(file, targets, wanted)
    parts: dict[ParamPath, list[Part]] = {path: [None] * (shape[0] if path[0] == "blocks" else 1)
                                          for path, shape in wanted.items()}  # fmt: skip
    for name, (row, layer) in targets.items():
        start = 0
        for number, path in enumerate(row.paths):
            parts[path][layer or 0] = Part(name, row, number, start)
            start += wanted[path][-1]
    return parts


def read_part(file: TensorFile, part: Part, bounds: Bounds, head_dim: int, out: np.ndarray) -> None:
    """Reads a region of one layer of a parameter, a few rows of its tensor at a time.

    Args:
      file: the checkpoint.
      part: where the layer is found.
      bounds: the region, along the parameter's axes (without that of layers).
      head_dim: features of a head.
      out: filled; of the region's shape, in the dtype wanted.
    """
    if part.row.transposed:
        bounds, out = bounds[::-1], out.T
    (first, last), *rest = bounds

    def places(begin, end, of_outputs):
        """Where the tensor has its rows or columns [begin, end) of the region: first, last + 1, order (None: as is)."""
        if not of_outputs or part.row.order == "concatenated":
            start = part.start if of_outputs else 0
            return start + begin, start + end, None
        found = tensor_names.stored_places(np.arange(begin, end), part.row, part.number, part.start, head_dim)
        return found.min(), found.max() + 1, found - found.min()

    rows_are_outputs = part.row.transposed or not rest
    step = max(1, _CHUNK // math.prod(file.shapes()[part.name][1:]))
    for at in range(first, last, step):
        low, high, order = places(at, min(at + step, last), rows_are_outputs)
        block = file.read(part.name, low, high)
        block = block if order is None else block[order]
        if rest:
            low, high, order = places(*rest[0], not rows_are_outputs)
            block = block[:, low:high] if order is None else block[:, low:high][:, order]
        if part.row.offset:
            block = block - np.float32(part.row.offset)
        out[at - first : at - first + len(block)] = block.astype(out.dtype, copy=False)


def _aligned(shape: Sequence[int], dtype) -> np.ndarray:
    """Uninitialised host memory that XLA on the CPU uses without a copy of its own."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
    return [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]


def _from_host(shape, dtype, place: NamedSharding, fill: Callable[[Bounds, np.ndarray], None]) -> jax.Array:
    """An array each of whose shards is filled on the host by itself."""

    def shard(index):
        bounds = _bounds(index, shape)
        host = _aligned([last - first for first, last in bounds], dtype)
        fill(bounds, host)
        return host

    return jax.make_array_from_callback(shape, place, shard)


def _layer_by_layer(shape, dtype, place: NamedSharding, fill: Callable[[int, Bounds, np.ndarray], None]) -> jax.Array:
    """A stacked array put together on the devices: the host reads a layer once, whatever its shards, and drops it."""
    stacked = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()
    one = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    put = jax.jit(
        lambda stacked, layer, value: jax.lax.dynamic_update_index_in_dim(stacked, value, layer, 0),
        donate_argnums=0, out_shardings=place,
    )  # fmt: skip
    spans = [_bounds(index, shape[1:]) for index in one.addressable_devices_indices_map(shape[1:]).values()]
    bounds = [(min(axis)[0], max(last for _, last in axis)) for axis in zip(*spans, strict=True)]
    for layer in range(shape[0]):
        host = np.empty([last - first for first, last in bounds], dtype)
        fill(layer, bounds, host)

        def shard(index, host=host):
            offsets = zip(_bounds(index, shape[1:]), bounds, strict=True)
            return host[tuple(slice(first - start, last - start) for (first, last), (start, _) in offsets)]

        value = jax.make_array_from_callback(shape[1:], one, shard)
        stacked = put(stacked, layer, value)
        value.block_until_ready()  # the host's memory is free again
    return stacked


def is_host_memory(mesh: Mesh) -> bool:
    """Whether the devices compute in the host's own memory."""
    return all(device.platform == "cpu" for device in mesh.devices.flat)


def load_params(file: TensorFile, arch: Architecture, abstract: Mapping[ParamPath, jax.ShapeDtypeStruct],
                mesh: Mesh) -> dict[ParamPath, jax.Array]:
    """Reads every parameter of a decoder to its place on the mesh, each device its shard.

    Beside the parameters themselves the host holds what of one layer goes to its devices, and on CPUs, whose
    parameters are built where they stay, a few megabytes.

    Args:
      file: a ``SafetensorsFolder`` or ``gguf.GgufFile``.
      arch: the decoder's architecture.
      abstract: parameter path -> shape and dtype.
      mesh: the devices; ``sharding`` says which holds what.

    Returns:
      Parameter path -> array.

    Raises:
      InputError: listing every missing, extra, misshapen or unreadable tensor.
    """
    parts = find_parts(file, arch, {path: leaf.shape for path, leaf in abstract.items()})
    sizes = {path: math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in abstract.items()}
    params = {}
    with tqdm(total=sum(sizes.values()), desc="load model", unit="B", unit_scale=True, leave=False) as bar:
        for path, leaf in abstract.items():
            place = NamedSharding(mesh, sharding.partition_spec(path, leaf.shape, mesh))
            params[path] = _load_parameter(file, arch, path, parts[path], leaf, place)
            bar.update(sizes[path])
    return params


def _load_parameter(file, arch, path: ParamPath, parts: Sequence[Part], leaf, place: NamedSharding) -> jax.Array:
    def fill_layer(layer: int, bounds: Bounds, out: np.ndarray):
        read_part(file, parts[layer], bounds, arch.head_dim, out)

    def fill(bounds: Bounds, out: np.ndarray):
        for layer in range(*bounds[0]):
            fill_layer(layer, bounds[1:], out[layer - bounds[0][0]])

    if path[0] != "blocks":
        return _from_host(leaf.shape, leaf.dtype, place, functools.partial(fill_layer, 0))
    if is_host_memory(place.mesh):
        return _from_host(leaf.shape, leaf.dtype, place, fill)
    return _layer_by_layer(leaf.shape, leaf.dtype, place, fill_layer)
