"""The plan of an experiment, without loading weights: what each device holds, what runs, about how long it takes.

Only config.json and the tokenizer are read, so that a run on hardware that is not at hand, of a model that is not on
disk, can be planned anywhere. The batches are those the run would make; memory is by ``models.memory``'s formulas;
time is arithmetic by a stated rate, and nothing that is not arithmetic (reading weights, compiling) is in it.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape import runtime
from jaxscape.collect.collector import plan_for
from jaxscape.collect.planning import Plan, plan_facts
from jaxscape.collect.recipe import layer_numbers, question_starts
from jaxscape.data.prompts import Prompt
from jaxscape.errors import InputError
from jaxscape.finetune.batching import data_order
from jaxscape.models import memory, sources, tokenizer
from jaxscape.models.architecture import Architecture
from jaxscape.models.decoder import check_sites
from jaxscape.models.gguf import GgufFile
from jaxscape.models.memory import Work, readable
from jaxscape.models.mesh import Devices
from jaxscape.models.pretrained import DTYPES, read_architecture
from jaxscape.models.sharding import MeshShape


class Peak(NamedTuple):
    """What a device does at best: dense products in 10^12 operations a second, and memory in GB."""

    bfloat16: float
    float32: float
    memory: float


# By what JAX's name of the device contains, the first that fits; from the makers' data sheets, without sparsity.
# TPUs multiply float32 in six passes of bfloat16.
PEAKS: Mapping[str, Peak] = {
    "b200": Peak(2250, 75, 180),
    "h200": Peak(989, 67, 141),
    "h100": Peak(989, 67, 80),
    "a100": Peak(312, 19.5, 80),
    "a10": Peak(125, 31.2, 24),
    "l40s": Peak(362, 91.6, 48),
    "l40": Peak(181, 90.5, 48),
    "l4": Peak(121, 30.3, 24),
    "rtx 4090": Peak(165, 82.6, 24),
    "rtx 3090": Peak(71, 35.6, 24),
    "tpu v6 lite": Peak(918, 153, 32),
    "tpu v6e": Peak(918, 153, 32),
    "tpu v5 lite": Peak(197, 33, 16),
    "tpu v5e": Peak(197, 33, 16),
    "tpu v5": Peak(459, 76, 95),
    "tpu v4": Peak(275, 46, 32),
}
UTILISATION = 0.5  # of an accelerator's peak that a run is taken to reach
CPU_UTILISATION = 0.8  # of what a large product reaches on this machine


class Rate(NamedTuple):
    """Operations a second of one device, and where the number is from."""

    flops: float
    why: str


class Pass(NamedTuple):
    """A kind of pass: its shape, the cached tokens before each row (0: none; -1: it makes the cache), how often."""

    tokens: int
    rows: int
    longest: int
    room: int
    count: int


def assumed_devices(kind: str, count: int, memory_gb: float) -> Devices:
    """Devices that are not here, at most eight a host.

    Args:
      kind: as in ``PEAKS``.
      count: how many.
      memory_gb: of each; 0: what ``PEAKS`` says.

    Raises:
      InputError: there must be one device at least, of a known kind or of a stated memory.
    """
    peak = _peak(kind)
    if count < 1 or memory_gb < 0:
        raise InputError(f"--assume_devices={count}, --assume_memory_gb={memory_gb}: must be positive")
    if not memory_gb and peak is None:
        raise InputError(f"--assume_kind={kind}: give --assume_memory_gb too, or one of {', '.join(PEAKS)}")
    return Devices(count, min(count, 8), int((memory_gb or peak.memory) * 1e9), kind)


def _peak(kind: str) -> Peak | None:
    return next((peak for name, peak in PEAKS.items() if name in kind.lower()), None)


def rate_of(devices: Devices, dtype: str, tflops: float = 0.0) -> Rate:
    """Operations a second that one device is taken to do.

    Args:
      devices: of what kind.
      dtype: of the products.
      tflops: a stated rate, in 10^12; 0: from the table, or measured where the devices are this machine's CPUs.

    Raises:
      InputError: the kind is not in the table.
    """
    if tflops:
        return Rate(tflops * 1e12, "--device_tflops")
    if devices.kind == "cpu":
        measured = _measure(DTYPES[dtype]) / devices.per_host
        return Rate(CPU_UTILISATION * measured, f"{CPU_UTILISATION:.0%} of a product measured now")
    if (peak := _peak(devices.kind)) is None:
        raise InputError(f"no peak is known of a {devices.kind}; state --device_tflops (what it reaches in {dtype})")
    at_best = getattr(peak, dtype)
    return Rate(UTILISATION * at_best * 1e12, f"{UTILISATION:.0%} of the {at_best:g} TFLOP/s of a {devices.kind}")


def _measure(dtype, size: int = 1024) -> float:
    """Operations a second of a square product on the default device; the best of a few."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# -- operations --------------------------------------------------------------------------------------------------------


def pairs(depth: int, length: int, window: int | None = None) -> int:
    """(query, key) pairs of a row of ``length`` tokens after ``depth`` others, each seeing a window at most."""

    def up_to(n):
        full = n if window is None else min(n, window)
        return full * (full + 1) // 2 + (n - full) * full

    return up_to(depth + length) - up_to(depth)


def linear_flops(arch: Architecture) -> int:
    """Operations of one token in all kernels of the blocks."""
    leaves = memory.parameter_shapes(arch)
    return 2 * sum(leaf.size for path, leaf in leaves.items() if path[-1] == "kernel")


def collection_flops(arch: Architecture, plan: Plan) -> int:
    """Operations of a plan: kernels for every token computed, padding included; attention; the head."""
    seen: dict[int, int] = {}  # pairs, by kind of layer
    for number, kind in enumerate(arch.kinds):
        seen[number] = sum(
            pairs(depth, len(plan.tokens[row]) - depth, kind.window)
            for job in plan.jobs for piece in job.pieces for wave in piece
            for depth, rows in zip(wave.depths, wave.rows, strict=True) for row in rows
        ) + sum(pairs(0, length, kind.window) for job in plan.jobs for length in job.lengths)  # fmt: skip
    attention = 4 * arch.num_heads * arch.head_dim * sum(seen[kind] for kind in arch.kind_of_layer)
    head = 2 * arch.width * arch.vocab_size * len(plan.tokens)
    return linear_flops(arch) * plan_facts(plan)["tokens_computed"] + attention + head


def training_flops(arch: Architecture, lengths: Sequence[int], finetuning) -> float:
    """Operations of fine-tuning, attention aside: the backward pass costs two forward ones, of which one is the
    gradient of the kernels, that LoRA doesn't need; "blocks" runs the forward pass again."""
    passes = (3 if finetuning.method == "full" else 2) + (finetuning.remat == "blocks")
    mean = sum(lengths) / len(lengths)
    return passes * forward_flops(arch, mean, 1) * finetuning.steps * finetuning.batch_size


def forward_flops(arch: Architecture, tokens: float, rows: int) -> float:
    """Operations of rows of so many tokens in all, attention aside."""
    return linear_flops(arch) * tokens + 2 * arch.width * arch.vocab_size * rows


# -- the plan ----------------------------------------------------------------------------------------------------------


def passes_of(plan: Plan) -> list[Pass]:
    """The kinds of passes of a plan, those that make caches first."""
    counts: dict[tuple[int, int, int, int], int] = {}
    for job in plan.jobs:
        shapes = [(job.room, 1, job.room, -1)] if job.room else []
        shapes += [(*wave.shape, wave.room) for piece in job.pieces for wave in piece]
        for shape in shapes:
            counts[shape] = counts.get(shape, 0) + 1
    return [Pass(*shape, counts[shape]) for shape in sorted(counts, key=lambda shape: (shape[3], shape))]


def largest_work(plans: Sequence[Plan], arch: Architecture) -> Work:
    """What holds every pass of some plans."""
    kinds = [kind for plan in plans for kind in passes_of(plan)]
    rows = [kind for kind in kinds if kind.room >= 0]
    tokens, most, longest = (max(kind[place] for kind in rows) for place in range(3))
    caches = max((kind.tokens for kind in kinds if kind.room < 0), default=0)
    cells = max(kind.rows * kind.longest for kind in rows)
    return Work(tokens, most, longest, caches, logits=arch.vocab_size, cells=cells)


def describe(experiment, devices: Devices, tflops: float = 0.0) -> str:
    """The plan as text.

    Args:
      experiment: an ``Experiment``; of it only the configuration, the questions and the prompts are looked at.
      devices: to run on.
      tflops: see ``rate_of``.

    Raises:
      InputError: the model or an adapter cannot be read or doesn't fit, or a prompt is longer than the model takes.
    """
    config, dtype = experiment.config, experiment.config.model.dtype
    experiment.check_adapter()
    path = sources.resolve(config.model.source, weights=False)
    arch = read_architecture(path)
    check_sites(arch, (config.collect.site,))
    tokens_of = tokenizer.from_folder(path) if path.is_dir() else tokenizer.from_gguf(GgufFile(path))
    training, finetuning = experiment.training_texts(), experiment.finetuning
    choice = runtime.choose_mesh(arch, config, experiment.prompts, training, finetuning, devices)
    rate = rate_of(devices, dtype, tflops)
    asked = _asked(experiment, arch, tokens_of, choice.shape.lanes)
    work = largest_work([plan for plan, _ in asked.values()], arch)
    held = memory.device_memory(arch, DTYPES[dtype], choice.shape, work, devices.kind)
    at_once = rate.flops * choice.shape.size
    parts = [*_model(path, arch, dtype), f"mesh: {choice.shape} on {devices.count} x {devices.kind} ({choice.why})",
             f"memory of a device: {_memory(held, devices)}"]  # fmt: skip
    for name, (plan, models) in asked.items():
        parts += _condition(name, plan, models, arch, at_once, config.collect)
    seconds = sum(models * collection_flops(arch, plan) for plan, models in asked.values()) / at_once
    if training:
        lengths = list(map(len, tokens_of.encode(training)))
        texts = experiment.validation_texts()
        followed = list(map(len, tokens_of.encode(texts))) if texts else []
        lines, more = _finetuning(arch, finetuning, (lengths, followed), choice.shape, devices, rate)
        parts += lines
        seconds += more
    return "\n".join([*parts, *_estimate(seconds, rate, choice.shape)])


def _asked(experiment, arch: Architecture, tokens_of, lanes: int) -> dict[str, tuple[Plan, int]]:
    """What is asked together -> its plan, and of how many models: checkpoints are asked the same one after another."""
    found = {}
    pretrained = [c.name for c in experiment.conditions if not c.finetuned]
    finetuned = [c.name for c in experiment.conditions if c.finetuned]
    for label, names, models in (
        (" + ".join(pretrained), pretrained, 1),
        (", ".join(finetuned), finetuned[:1], len(finetuned)),
    ):
        if names:
            prompts = [prompt for name in names for prompt in experiment.prompts[name]]
            found[label] = _plan(arch, tokens_of, prompts, experiment.config.collect, lanes), models
    return found


def _plan(arch: Architecture, tokens_of, prompts: Sequence[Prompt], collect, lanes: int) -> Plan:
    """The plan that the run makes."""
    tokens = tokens_of.encode([prompt.text for prompt in prompts])
    if (longest := max(map(len, tokens))) > arch.max_positions:
        raise InputError(f"a prompt has {longest} tokens, the model takes {arch.max_positions}; leave its question out "
                         "or ask with fewer shots")
    limits = None
    if collect.tokens != "last":
        limits = question_starts(tokens, tokens_of.encode([prompt.prefix for prompt in prompts]))
    return plan_for(arch, tokens, collect.token_budget, lanes, limits)


def _model(path: Path, arch: Architecture, dtype: str) -> list[str]:
    count = memory.parameter_count(arch)
    size = count * jnp.dtype(DTYPES[dtype]).itemsize
    return [
        "a plan: no weights were loaded, nothing ran",
        f"model: {path.name} ({arch.family}), {arch.num_layers} layers of width {arch.width}, {arch.num_heads} heads "
        f"({arch.num_kv_heads} of keys and values), {count:,} parameters, {readable(size)} in {dtype}",
    ]


def _memory(held: memory.DeviceMemory, devices: Devices) -> str:
    """What a device holds, part by part."""
    parts = ", ".join(f"{name} {readable(size)}" for name, size in held._asdict().items() if size)
    return f"{parts}; in all {readable(held.total)} of {readable(devices.bytes)} ({held.total / devices.bytes:.0%})"


def _layers(collect, arch: Architecture) -> tuple[int, ...]:
    return layer_numbers(collect.layers, arch.num_layers, "config.collect.layers")


def _condition(name: str, plan: Plan, models: int, arch: Architecture, at_once: float, collect) -> list[str]:
    facts, spent = plan_facts(plan), models * collection_flops(arch, plan)
    layers = 1 if collect.site == "final_norm" else len(_layers(collect, arch))
    disk = models * layers * len(plan.tokens) * arch.width * jnp.dtype(collect.dtype).itemsize
    each = f"{models} x " if models > 1 else ""
    lines = [
        f"collect {name}: {each}{len(plan.tokens):,} prompts of {facts['prompt_tokens']:,} tokens, of which "
        f"{facts['tokens_run']:,} run (shared ones once), {facts['padding']:.0%} padding beside them; "
        f"{facts['passes']:,} passes in {facts['programs']} shapes; {spent / 1e12:,.0f} TFLOP, "
        f"{duration(spent / at_once)}; {readable(disk)} of states on disk"
    ]
    lanes = f" on each of {plan.lanes} lanes" if plan.lanes > 1 else ""
    for kind in passes_of(plan):
        if kind.room < 0:
            lines.append(f"  {kind.count:,} x a cache of {kind.tokens:,} tokens{lanes}")
        else:
            after = f", after {kind.room:,} cached" if kind.room else ""
            lines.append(f"  {kind.count:,} x {kind.tokens:,} tokens{lanes}: {kind.rows} rows of up to "
                         f"{kind.longest:,}{after}")
    return lines


def _finetuning(
    arch: Architecture, finetuning, lengths: tuple[Sequence[int], Sequence[int]], shape: MeshShape, devices: Devices,
    rate: Rate,
) -> tuple[list[str], float]:  # fmt: skip
    """What fine-tuning does, line by line, and its seconds.

    Args:
      arch: the model.
      finetuning: ``FinetuneConfig``.
      lengths: tokens of each question trained on, and of each that follows the training.
      shape: of the mesh, whose lanes share the rows of a step.
      devices: to run on.
      rate: of one.
    """
    trained, followed = lengths
    fullest = max(sum(trained) / len(trained), *_step_means(trained, finetuning))
    step = runtime.training_step(arch, finetuning, max(trained), fullest)
    held = memory.training_memory(arch, DTYPES[finetuning.dtype], shape, step, devices.kind)
    evaluations = len(finetuning.evaluated_steps()) if followed else 0
    spent = training_flops(arch, trained, finetuning)
    asked = evaluations * forward_flops(arch, sum(followed), len(followed))
    idle = shape.lanes * -(-step.rows // shape.lanes) / step.rows  # lanes without a row of their own wait
    seconds = (spent * idle + asked) / (rate.flops * shape.size)
    numbers = sum(math.prod(leaf.shape) for leaf in memory.trained_shapes(arch, step.adapters).values())
    kept, size = finetuning.kept_steps(), 4 * numbers
    shown = finetuning.steps * finetuning.batch_size / len(trained)
    parts = f" in {finetuning.accumulation} parts" if finetuning.accumulation > 1 else ""
    of_questions = f" of {len(followed):,} questions" if evaluations else ""
    return [
        f"fine-tuning ({finetuning.method}): {numbers:,} parameters, {len(trained):,} questions shown {shown:.1f} "
        f"times, {finetuning.steps} steps of {finetuning.batch_size} questions{parts}, {evaluations} evaluations"
        f"{of_questions}; {(spent + asked) / 1e12:,.0f} TFLOP, {duration(seconds)}",
        f"  memory of a device: {_memory(held, devices)}",
        f"  kept after steps {', '.join(map(str, kept))}: {readable(len(kept) * size)} on disk; states to resume from: "
        f"{readable((finetuning.keep + 1) * size * (1 + step.state))} while it runs",
    ], seconds


def _step_means(lengths: Sequence[int], finetuning) -> list[float]:
    """Tokens of a question in each step, on average."""
    order = data_order(len(lengths), finetuning.steps, finetuning.batch_size, finetuning.seed)
    return np.asarray(lengths)[order].mean(axis=1).tolist()


def _estimate(seconds: float, rate: Rate, shape: MeshShape) -> list[str]:
    return [f"estimate: {duration(seconds)} at {rate.flops / 1e12:.3g} TFLOP/s a device ({rate.why}) on {shape.size} "
            "device(s); reading weights, compiling and the landscapes come on top"]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
