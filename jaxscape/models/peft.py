"""Adapters in the format of the PEFT library: adapter_config.json and adapter_model.safetensors.

PEFT has an adapter for each of its modules, [outputs, inputs]; here one for each projection, [inputs, outputs] and
stacked over layers. Where a family fuses projections into one module (GPT-2's c_attn), theirs share its A. The other
way around, adapters of fused projections become one of the module whose A is theirs one after the other and whose B
is block-diagonal: its rank is as many times theirs, and its alpha grows so that the scale stays.
"""

import collections
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - safetensors reads bfloat16 by its dtype
import numpy as np

from jaxscape.errors import InputError
from jaxscape.models import tensor_names
from jaxscape.models.architecture import Architecture
from jaxscape.models.lora import PROJECTIONS, LoraConfig
from jaxscape.models.saving import Tensor, new_folder, write_json, write_safetensors
from jaxscape.models.tensor_names import ParamPath, Row, hub_name, stored_places

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
_LISTED = 20  # problems in one message

# Fields that are read, or that change nothing once an adapter is trained: how it began, which modules it was asked for
# (the tensors say which it has), how PEFT stores and runs it. Any other must be empty.
_KNOWN = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "runtime_config",
})  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others (PiSSA, OLoRA, ...) change the base model


class _Part(NamedTuple):
    """A projection within the module that holds it.

    Attributes:
      name: out of ``PROJECTIONS``.
      path: of its adapter.
      places: int [outputs], where its outputs lie among the module's.
    """

    name: str
    path: ParamPath
    places: np.ndarray


class _Module(NamedTuple):
    """A linear module that may have an adapter.

    Attributes:
      row: its row in the family's table.
      name: what ``target_modules`` calls it.
      parts: the projections it holds.
      inputs: features.
      outputs: features, of all its parts.
    """

    row: Row
    name: str
    parts: tuple[_Part, ...]
    inputs: int
    outputs: int

    def key(self, layer: int, half: str) -> str:
        """Name of a tensor of its adapter."""
        return f"{_PREFIX}{self.path(layer)}.{_NAMES[half]}"

    def path(self, layer: int) -> str:
        """Its name in transformers' model."""
        return hub_name(self.row, layer).removesuffix(".weight")


def _kernel_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Projection -> (inputs, outputs)."""
    width, heads, kv_heads = arch.width, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    mlp = (width, arch.mlp_width)
    return {"q": (width, heads), "k": (width, kv_heads), "v": (width, kv_heads), "o": (heads, width),
            "gate": mlp, "up": mlp, "down": mlp[::-1]}  # fmt: skip


def _modules(arch: Architecture) -> list[_Module]:
    rows = [row for row in tensor_names.HUB[arch.family].rows if row.paths[0][-1] == "kernel"]
    dotted = [re.split(r"\.0\.", hub_name(row, 0).removesuffix(".weight"))[1] for row in rows]
    last = collections.Counter(name.rpartition(".")[2] for name in dotted)
    shapes, found = _kernel_shapes(arch), []
    for row, name in zip(rows, dotted, strict=True):
        parts, start = [], 0
        for number, (*path, _) in enumerate(row.paths):
            inputs, outputs = shapes[path[-1]]
            places = stored_places(np.arange(outputs), row, number, start, arch.head_dim)
            parts.append(_Part(path[-1], (*path, "adapter"), places))
            start += outputs
        short = name.rpartition(".")[2]  # unless another module ends so too (GPT-2's two c_proj)
        found.append(_Module(row, short if last[short] == 1 else name, tuple(parts), inputs, start))
    return found


# Writing


def write_adapter(folder: Path, arch: Architecture, lora: LoraConfig, adapters: Mapping[ParamPath, np.ndarray], *,
                  base: str) -> None:
    """Writes adapters as PEFT would, so that ``PeftModel.from_pretrained`` loads them.

    Args:
      folder: what to make; may hold an adapter that is to be replaced, and nothing else.
      arch: the base model's architecture.
      lora: the adapters' configuration.
      adapters: path (..., "adapter", "a", "b" or "m") -> [L, r, inputs], [L, r, outputs], [L, outputs].
      base: name or path of the base model, for ``base_model_name_or_path``.

    Raises:
      InputError: the folder holds something else; or the magnitudes of DoRA on some of the projections of a fused
        module, which PEFT cannot have.
    """
    tensors, ranks, alphas, targets = [], {}, {}, []
    for module in _modules(arch):
        held = [part for part in module.parts if part.name in lora.targets]
        if not held:
            continue
        if lora.dora and len(held) < len(module.parts):
            whole = ", ".join(part.name for part in module.parts)
            raise InputError(f"{folder}: PEFT has no DoRA on {held[0].name} without all of {whole}, which are one "
                             f"module of {arch.family}; make all or none of them targets, or switch DoRA off")
        targets.append(module.name)
        if (times := len(held)) > 1:
            ranks[module.name] = times * lora.rank
            alphas[module.name] = _plain(lora.alpha * (times**0.5 if lora.rslora else times))
        tensors += _tensors(module, held, lora, adapters, arch.num_layers)
    config = _config(lora, base, targets) | {"rank_pattern": ranks, "alpha_pattern": alphas}
    config["fan_in_fan_out"] = not all(module.row.transposed for module in _modules(arch))  # GPT-2's Conv1D
    with new_folder(folder, replaces=(CONFIG, WEIGHTS)) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        write_json(partial / CONFIG, config)


def _plain(value: float) -> float | int:
    """An integer where the value is one: PEFT's alphas are."""
    return int(value) if float(value).is_integer() else float(value)


def _config(lora: LoraConfig, base: str, targets: Sequence[str]) -> dict[str, Any]:
    return {
        "auto_mapping": None, "base_model_name_or_path": base, "bias": "none", "exclude_modules": None,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": _plain(lora.alpha), "lora_bias": False, "lora_dropout": lora.dropout, "modules_to_save": None,
        "peft_type": "LORA", "r": lora.rank, "revision": None, "target_modules": list(targets),
        "task_type": "CAUSAL_LM", "use_dora": lora.dora, "use_rslora": lora.rslora,
    }  # fmt: skip


def _tensors(module: _Module, held: Sequence[_Part], lora: LoraConfig, adapters: Mapping[ParamPath, np.ndarray],
             layers: int) -> Iterator[Tensor]:
    """A module's adapter, layer by layer; of several projections A's lie one after the other, B's in blocks."""
    rank = lora.rank * len(held)
    a = np.concatenate([np.asarray(adapters[(*part.path, "a")], np.float32) for part in held], axis=1)
    b = np.zeros((layers, module.outputs, rank), np.float32)
    m = np.zeros((layers, module.outputs), np.float32)
    for block, part in enumerate(held):
        columns = slice(block * lora.rank, (block + 1) * lora.rank)
        b[:, part.places, columns] = np.swapaxes(np.asarray(adapters[(*part.path, "b")]), 1, 2)
        if lora.dora:
            m[:, part.places] = np.asarray(adapters[(*part.path, "m")])
    stacked = {"a": a, "b": b} | ({"m": m} if lora.dora else {})
    for layer in range(layers):
        for half, values in stacked.items():
            one = values[layer]
            yield Tensor(module.key(layer, half), one.shape, one.dtype, lambda one=one: one)


# Reading


def read_adapter(folder: Path, arch: Architecture) -> tuple[LoraConfig, dict[ParamPath, np.ndarray]]:
    """Reads what PEFT's ``save_pretrained`` wrote for a LoRA or DoRA adapter.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      arch: the architecture of the model that the adapter is for.

    Returns:
      Configuration, its targets those that have an adapter; and path (..., "adapter", "a", "b" or "m") ->
      float32 [L, r, inputs], [L, r, outputs], [L, outputs].

    Raises:
      InputError: a file is missing or unreadable, the adapter is of a kind that is not implemented, or it doesn't fit.
    """
    config, tensors = _read_config(folder / CONFIG), _read_tensors(folder)
    where, dora, rslora = str(folder), bool(config.get("use_dora")), bool(config.get("use_rslora"))
    stacked = _stack(tensors, config, arch, where, dora)
    adapters, kinds = {}, {}
    for module, halves in stacked:
        times, parts = _unfuse(module, halves["b"], config["r"])
        rank = halves["a"].shape[1] // times
        alpha = _alpha(module, config, arch.num_layers, where) / (times**0.5 if rslora else times)
        for part, block in parts:
            columns = slice(block * rank, (block + 1) * rank)
            adapters[(*part.path, "a")] = np.ascontiguousarray(halves["a"][:, columns])
            adapters[(*part.path, "b")] = np.ascontiguousarray(
                np.swapaxes(halves["b"][:, part.places, columns], 1, 2))
            if dora:
                adapters[(*part.path, "m")] = halves["m"][:, part.places]
            kinds[part.name] = (rank, round(alpha, 9))
    if len(set(kinds.values())) > 1:
        found = "; ".join(f"{name}: rank {rank}, alpha {alpha:g}" for name, (rank, alpha) in kinds.items())
        raise InputError(f"{where}: rank_pattern or alpha_pattern that differ between projections ({found}) are not "
                         "implemented; train with one rank and one alpha")
    rank, alpha = next(iter(kinds.values()))
    targets = tuple(name for name in PROJECTIONS if name in kinds)
    return LoraConfig(rank, alpha, config["lora_dropout"], targets, rslora, dora), adapters


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); give the folder of a PEFT adapter") from None
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a configuration (no JSON object); save the adapter again")
    config = {"bias": "none", "init_lora_weights": True, "lora_dropout": 0.0, "lora_alpha": 8, "r": 8} | config
    if (kind := config.get("peft_type")) != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not implemented; implemented: 'LORA'")
    for name, implemented in (("bias", ("none",)), ("init_lora_weights", _STARTS)):
        if config[name] not in implemented:
            why = " (it changes the base model; convert the adapter with PEFT)" * (name == "init_lora_weights")
            raise InputError(f"{path}: {name} = {config[name]!r} is not implemented{why}; "
                             f"implemented: {', '.join(map(repr, implemented))}")
    for name, value in config.items():
        if name not in _KNOWN and value not in (None, False, [], {}, ""):
            raise InputError(f"{path}: {name} = {value!r} is not implemented; train or save the adapter without it")
    for name, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        if not isinstance(config[name], kinds) or isinstance(config[name], bool):
            raise InputError(f"{path}: {name} = {config[name]!r} is not a number; save the adapter again")
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = _pattern(config.get(name) or {}, f"{path}: {name}")
    return config


def _pattern(pattern: Any, what: str) -> dict[re.Pattern, float]:
    """Modules' names (a regular expression of their end) -> rank or alpha."""
    try:
        found = {re.compile(rf"(.*\.)?({name})$"): value for name, value in pattern.items()}
    except (AttributeError, re.error) as error:
        raise InputError(f"{what} = {pattern!r} is not readable ({error}); save the adapter again") from None
    if bad := [value for value in found.values() if not isinstance(value, int | float) or not value > 0]:
        raise InputError(f"{what}: {bad[0]!r} is not a positive number; save the adapter again")
    return found


def _of_module(pattern: Mapping[re.Pattern, float], default: float, module: _Module, layers: int) -> list[float]:
    """The module's rank or alpha in each layer: that of the first pattern that matches."""
    paths = (module.path(layer) for layer in range(layers))
    return [next((value for name, value in pattern.items() if name.match(path)), default) for path in paths]


def _alpha(module: _Module, config: Mapping[str, Any], layers: int, where: str) -> float:
    alphas = set(_of_module(config["alpha_pattern"], config["lora_alpha"], module, layers))
    if len(alphas) > 1:
        raise InputError(f"{where}: alpha_pattern gives layers of {module.name} different alphas, "
                         "which is not implemented; train with one")
    return float(alphas.pop())


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(f"{folder}: only adapter_model.bin, a pickle, which is never read; load it with PEFT and "
                             "save it again with safe_serialization=True")
        raise InputError(f"{folder}: no {WEIGHTS}; give the folder of a PEFT adapter")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); save the adapter again") from None


def _stack(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], arch: Architecture, where: str,
           dora: bool) -> list[tuple[_Module, dict[str, np.ndarray]]]:
    """The modules that have adapters, each with these stacked over layers: half -> float32 [L, ...]."""
    by_row = {module.row: module for module in _modules(arch)}
    places, problems = _place(tensors, by_row, arch)
    found = []
    for module in by_row.values():
        wanted = ("a", "b", "m") if dora else ("a", "b")
        if not any((module.row, layer, half) in places for layer in range(arch.num_layers) for half in "abm"):
            continue
        ranks = _of_module(config["rank_pattern"], config["r"], module, arch.num_layers)
        if len(set(ranks)) > 1:
            problems.append(f"rank_pattern gives layers of {module.name} different ranks, which is not implemented")
            continue
        shapes = {"a": (ranks[0], module.inputs), "b": (module.outputs, ranks[0]), "m": (module.outputs,)}
        halves = {half: [places.get((module.row, layer, half)) for layer in range(arch.num_layers)] for half in "abm"}
        for half, layers in halves.items():
            problems += _misfits(module, half, layers, shapes[half], half in wanted)
        if not problems:
            found.append((module, {half: np.stack(halves[half]).astype(np.float32) for half in wanted}))
    if not found and not problems:
        problems.append(f"no adapter of any projection of {arch.family} in {WEIGHTS}")
    if problems:
        shown = "; ".join(problems[:_LISTED])
        shown += f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        only = config.get("layers_to_transform")
        if only is not None:
            shown = f"layers_to_transform = {only}, but adapters of all layers are needed; {shown}"
        raise InputError(f"{where}: the adapter does not fit the model ({arch.family}, {arch.num_layers} layers, width "
                         f"{arch.width}): {shown}")
    return found


def _place(tensors: Mapping[str, np.ndarray], by_row: Mapping[Row, _Module], arch: Architecture):
    """((row, layer, half) -> tensor, problems): which module each tensor belongs to, by its name."""
    places, problems = {}, []
    ends = {name: half for half, name in _NAMES.items()} | {"lora_magnitude_vector.weight": "m"}
    for name, value in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(_PREFIX)})?(.+?)\.({'|'.join(map(re.escape, ends))})", name)
        target = match and tensor_names.find_target(f"{match[1]}.weight", tensor_names.HUB[arch.family])
        if not target or target.row not in by_row:
            problems.append(f"{name}: no projection of {arch.family} takes it")
        elif target.layer >= arch.num_layers:
            problems.append(f"{name}: the model has {arch.num_layers} layers")
        else:
            places[(target.row, target.layer, ends[match[2]])] = value
    return places, problems


def _misfits(module: _Module, half: str, layers: Sequence[np.ndarray | None], shape: tuple[int, ...],
             wanted: bool) -> Iterator[str]:
    """What is wrong with a module's tensors of one kind, layer by layer."""
    for layer, value in enumerate(layers):
        if value is None:
            if wanted:
                yield f"{module.key(layer, half)}: missing"
        elif not wanted:
            yield f"{module.key(layer, half)}: use_dora is not set"
        elif value.shape != shape:
            yield f"{module.key(layer, half)}: shape {value.shape}, expected {shape}"


def _unfuse(module: _Module, b: np.ndarray, rank: int) -> tuple[int, list[tuple[_Part, int]]]:
    """Which projections a module's adapter is of, and which block of its rank each one uses.

    Args:
      module: the module.
      b: [L, outputs, the module's rank].
      rank: of modules that no pattern names.

    Returns:
      (blocks the rank is cut into, (projection, number of its block)). One block that all share, unless B is
      block-diagonal as ``write_adapter`` leaves it; then projections without a block are left out.
    """
    uses = [np.any(b[:, part.places] != 0, axis=(0, 1)) for part in module.parts]  # of columns
    used = [number for number, columns in enumerate(uses) if columns.any()]
    times = len(used)
    if not used and b.shape[-1] == rank * len(module.parts):  # not trained yet
        return len(module.parts), [(part, block) for block, part in enumerate(module.parts)]
    if len(module.parts) > 1 and times and b.shape[-1] % times == 0:
        blocks = [uses[number].reshape(times, -1).any(axis=1) for number in used]
        if np.array_equal(blocks, np.eye(times, dtype=bool)):
            return times, [(module.parts[number], block) for block, number in enumerate(used)]
    return 1, [(part, 0) for part in module.parts]
