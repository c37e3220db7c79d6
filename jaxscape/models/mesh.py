"""The mesh that holds a run: chosen by memory, unless the configuration says which.

GB are 10^9 bytes.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscape.errors import InputError
from jaxscape.models.architecture import Architecture
from jaxscape.models.lora import LoraConfig
from jaxscape.models.memory import DeviceMemory, Training, Work, device_memory, readable, training_memory
from jaxscape.models.sharding import MeshShape

USABLE = 0.9  # of a device's memory: the rest is fragmentation, the driver's, the compiled programs'
_HOST = 8  # devices that a host has at most, where more than there are are thought of
_FREE = MeshShape(0, 0, 0)


class Devices(NamedTuple):
    """The devices a run has.

    Attributes:
      count: how many.
      per_host: of them on one host.
      bytes: memory of one.
      kind: as JAX names it.
    """

    count: int
    per_host: int
    bytes: int
    kind: str


class Needs(NamedTuple):
    """What the devices must hold, by mesh: of collection, and of fine-tuning where there is any."""

    arch: Architecture
    dtype: jnp.dtype
    work: Work
    step: Training | None = None

    def on(self, shape: MeshShape, platform: str) -> DeviceMemory:
        """The larger of the two: they run one after the other."""
        held = device_memory(self.arch, self.dtype, shape, self.work, platform)
        if self.step is None:
            return held
        return max(held, training_memory(self.arch, self.dtype, shape, self.step, platform), key=lambda m: m.total)


class MeshChoice(NamedTuple):
    """A mesh, what it needs of each device, why it was chosen (half a sentence), and of which devices."""

    shape: MeshShape
    memory: DeviceMemory
    why: str
    devices: Devices

    def __str__(self):
        """The choice in one line."""
        used = f"{readable(self.memory.total)} of {readable(self.devices.bytes)} a device, estimated"
        return f"mesh: {self.shape} on {self.devices.count} x {self.devices.kind} ({self.why}; {used})"


def local_devices() -> Devices:
    """What this process's JAX runs on; the memory of CPU devices is the host's, in equal parts."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    size = stats.get("bytes_limit") or _host_bytes() // jax.local_device_count()
    return Devices(jax.device_count(), jax.local_device_count(), size, device.device_kind)


def _host_bytes() -> int:
    """Memory of this machine, or what a container may use of it."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or no limit: "max"
            continue
    return min(sizes)


def choose_shape(needs: Needs, devices: Devices, wanted: MeshShape = _FREE) -> MeshChoice:
    """The mesh that a run takes.

    Collection is limited by throughput, not by how long one batch takes. So: a copy of the model on every device
    where one fits, as copies don't talk to each other. Else the smallest split that fits, because a sum over fewer
    devices of smaller parts of the tokens moves fewer bytes. It is a split by "tensor" within a host, as two sums of
    activations a layer cost less there than moving all weights for every batch; what "tensor" can't split (heads it
    doesn't divide, more devices than a host has) is left to "fsdp". What remains of the devices holds copies.

    Args:
      needs: what is to be held.
      devices: what there is.
      wanted: axes that are set; 0 where they are to be chosen.

    Raises:
      InputError: the axes that are set don't fit the devices, or no mesh holds the model.
    """
    wanted = MeshShape(*wanted)
    if min(wanted) < 0 or math.prod(n or 1 for n in wanted) > devices.count:
        raise InputError(f"config.mesh: {wanted} does not fit {devices.count} device(s); 0 chooses an axis")
    tried = []
    for shape in _shapes(needs.arch, devices, wanted):
        memory = needs.on(shape, devices.kind)
        if all(wanted):
            return MeshChoice(shape, memory, "as config.mesh has it", devices)
        if _fits(memory, devices):
            return MeshChoice(shape, memory, _why(shape, wanted), devices)
        tried.append((memory.total, memory, shape))
    if not tried:
        raise InputError(f"config.mesh: no mesh of {devices.count} device(s) has {wanted}; 0 chooses an axis")
    _, memory, shape = min(tried)
    raise InputError(_does_not_fit(needs, devices, memory, shape))


def _shapes(arch: Architecture, devices: Devices, wanted: MeshShape) -> Iterator[MeshShape]:
    """Meshes that have the axes wanted, the fewest parts of the model first."""
    splits = (arch.num_kv_heads, arch.num_heads, arch.mlp_width)
    tensors = [2**n for n in range(devices.per_host.bit_length()) if all(size % 2**n == 0 for size in splits)]
    tensors = [wanted.tensor] if wanted.tensor else [n for n in reversed(tensors) if n <= devices.per_host]
    most = devices.count // (wanted.data or 1)
    for parts in range(1, most + 1):
        for tensor in tensors:
            fsdp, rest = divmod(parts, tensor)
            split_is_set = wanted.fsdp and wanted.tensor
            if rest or (wanted.fsdp and fsdp != wanted.fsdp) or (not split_is_set and most % parts):
                continue
            yield MeshShape(wanted.data or most // parts, fsdp, tensor)
            break


def _fits(memory: DeviceMemory, devices: Devices) -> bool:
    return memory.total <= USABLE * devices.bytes


def _why(shape: MeshShape, wanted: MeshShape) -> str:
    among = " with the axes that config.mesh sets" if any(wanted) else ""
    if shape.fsdp * shape.tensor > 1:
        return f"the fewest parts that fit{among}"
    return f"a copy on each{among}" if shape.data > 1 else f"it fits one{among}"


def _does_not_fit(needs: Needs, devices: Devices, memory: DeviceMemory, shape: MeshShape) -> str:
    parts = f"{readable(memory.parameters)} of parameters, {readable(memory.activations)} of activations"
    parts += f", {readable(memory.optimizer)} of gradients and moments" if memory.optimizer else ""
    what = "the model" if needs.step is None else "fine-tuning the model"
    return (
        f"{what} does not fit {devices.count} x {devices.kind}: {shape} needs {readable(memory.total)} a device "
        f"({parts}), of whose {readable(devices.bytes)} {USABLE:.0%} can be counted on; "
        f"{', or '.join(_advice(needs, devices)) or 'use more and larger devices'}; setting all of "
        "config.mesh.data, fsdp and tensor tries anyway"
    )


def _advice(needs: Needs, devices: Devices) -> Iterator[str]:
    """Each single change that would help."""

    def helps(needs, devices):
        return any(_fits(needs.on(shape, devices.kind), devices) for shape in _shapes(needs.arch, devices, _FREE))

    if jnp.dtype(needs.dtype).itemsize > 2 and helps(needs._replace(dtype=jnp.bfloat16), devices):
        yield "set config.model.dtype=bfloat16"
    if needs.step is not None:
        lighter = needs.step._replace(adapters=needs.step.adapters or LoraConfig(16, 32.0), remat="blocks")
        if helps(needs._replace(step=lighter), devices):
            yield "set config.finetune.method=lora and config.finetune.remat=blocks"
        one_by_one = lighter._replace(tokens=-(-lighter.tokens // lighter.rows), rows=1, parts=lighter.rows)
        if lighter.rows > 1 and helps(needs._replace(step=one_by_one), devices):
            yield "raise config.finetune.accumulation"
    if needs.step is not None and helps(needs._replace(step=None), devices):
        yield "leave 'sft' out of config.conditions, as collecting fits"
    work = needs.work
    for part in (2**n for n in range(1, 16)):
        less = work._replace(tokens=work.tokens // part, rows=-(-work.rows // part), cells=work.cells // part)
        if less.tokens >= work.longest and helps(needs._replace(work=less), devices):
            yield f"lower config.collect.token_budget to {less.tokens}"
            break
    for count in (2**n for n in range(12) if 2**n != devices.count):  # sizes of models divide by powers of two
        more = devices._replace(count=count, per_host=max(devices.per_host, min(count, _HOST)))
        if helps(needs, more):
            yield f"use {count} such devices"
            break
