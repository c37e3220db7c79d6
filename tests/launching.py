"""Small experiments on the tiny model, in this process and through launch.py, and what they leave on disk."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import quickstart
from jaxscape import atlas, results, runtime
from jaxscape.collect.store import Store
from jaxscape.experiment import STAGES, Experiment
from jaxscape.finetune import trainer
from jaxscape.report import tables
from jaxscape.workspace import Workspace

ROOT = Path(__file__).parent.parent
SMALL = {
    "model.source": str(ROOT / "tests" / "fixtures" / "tiny_llama"),
    "data.subjects": ("animals", "cities", "writers"),
    "data.test_per_subject": 12,
    "conditions": ("0shot", "2shot", "sft"),
    "finetune.method": "lora",
    "finetune.steps": 8,
    "finetune.batch_size": 4,
    "finetune.rank": 4,
    "finetune.alpha": 32.0,
    "finetune.rslora": False,
    "finetune.learning_rate": 3e-4,
    "finetune.validation": "",
    "finetune.evaluations": 0,
    "finetune.validation_questions": 0,
    "finetune.dropout": 0.1,
    "finetune.save_every": 2,
    "finetune.checkpoints": 3,
    "landscape.k": 8,
    "landscape.z": 0.5,
    "landscape.max_rank": 16,
    "compare.neighbors": 8,
}


def small_config(**changes) -> ConfigDict:
    """The quickstart on the tiny model; ``changes`` by field, with __ for dots."""
    config = quickstart.get_config()
    named = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**SMALL, **named})
    return config


def run_here(config: ConfigDict, root: Path, stages=STAGES, figures: bool = False) -> Experiment:
    """Runs stages in this process, as launch.py does; by default without drawing figures, which takes the longest."""
    workspace = Workspace(root, config.to_dict())
    with jax.default_matmul_precision("float32"), pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(results, "_save_figures", lambda *_: [])
        experiment = Experiment(config, workspace)
        with workspace.locked():
            experiment.run(stages)
    return experiment


def shared_cache(factory: pytest.TempPathFactory) -> Path:
    """A cache that holds what this process compiled, so that others need not compile it again."""
    return factory.getbasetemp() / "cache"


_unbroken: dict[str, Path] = {}


def unbroken(factory: pytest.TempPathFactory, method: str = "lora") -> Path:
    """Folder of a small experiment that nothing interrupted, with its report; made once a session."""
    if method not in _unbroken:
        runtime.configure(shared_cache(factory) / "compiled")
        compilation_cache.reset_cache()  # else a cache that was off when JAX first looked stays off
        root = factory.mktemp(f"unbroken_{method}") / "workdir"
        run_here(small_config(finetune__method=method), root, figures=True)
        _unbroken[method] = root
    return _unbroken[method]


def command(workdir: Path, *flags: str, config: ConfigDict | None = None) -> list[str]:
    """launch.py with the small configuration."""
    config = small_config() if config is None else config
    values = [f"--config.{name}={config_value(config, name)}" for name in SMALL]
    return [sys.executable, str(ROOT / "launch.py"), f"--workdir={workdir}", *values, *flags]


def config_value(config: ConfigDict, name: str):
    """The value of a field by its dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """The environment of a run: its own cache, nothing else of the caller's."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "JAXSCAPE_CACHE": str(cache), "JAX_PLATFORMS": "cpu", **changes}


def launch(arguments, cache: Path, **changes: str) -> subprocess.CompletedProcess:
    """Runs a command to its end."""
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=environment(cache, **changes), timeout=300
    )


def without_bars(stderr: str) -> list[str]:
    """Lines of stderr that are not progress bars."""
    bar = re.compile(r"(load model|figures|(collect|finetune|landscape) [\w@]+): +\d+%")
    return [line for line in re.split(r"[\r\n]", stderr) if line.strip() and not bar.match(line)]


def contents(root: Path, conditions=("0shot", "2shot", "sft")) -> dict[str, np.ndarray | bytes | list]:
    """Everything an experiment has found, by name: arrays, tables and the training log."""
    found = {}
    for name in conditions:
        store = Store.open(root / "representations" / name)
        layers = store.states.shape[0]
        found[f"{name} states"] = np.stack([store.layer(layer) for layer in range(layers)])
        found[f"{name} logits"] = store.answer_logits()
        for layer in range(1, layers + 1):
            arrays = atlas.read_layer(root / "landscape" / name, layer)
            found |= {f"{name} layer {layer} {field}": value for field, value in arrays.items()}
    checkpoints = root / "checkpoints" / "sft"
    if checkpoints.is_dir():
        for name in ("log.csv", "validation.csv", "adapter/adapter_model.safetensors"):
            if (checkpoints / name).is_file():
                found[name] = (checkpoints / name).read_bytes()
        for step in sorted(int(folder.name) for folder in (checkpoints / "kept").iterdir()):
            arrays = trainer.load_trained(checkpoints, step)
            found |= {f"step {step} {'.'.join(path)}": value for path, value in arrays.items()}
    for file in sorted((root / "results").glob("[!.]*")):
        found[file.name] = file.read_bytes()
        assert tables.read_table(file)
    return found


def differences(left: Mapping, right: Mapping) -> list[str]:
    """Names of what is not the same to the bit."""

    def same(a, b):
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        return a == b

    return [name for name in sorted({*left, *right})
            if name not in left or name not in right or not same(left[name], right[name])]


def files_of(root: Path) -> dict[str, int]:
    """Every file under a folder and when it was last written."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


_watchers = []


def _audit(event: str, arguments: tuple) -> None:
    for watcher in _watchers:
        watcher(event, arguments)


sys.addaudithook(_audit)  # cannot be taken off again, so there is one


@contextmanager
def watching(callback) -> Iterator[None]:
    """Calls ``callback(event, arguments)`` at every audit event: before each rename, removal and open of a file."""
    _watchers.append(callback)
    try:
        yield
    finally:
        _watchers.remove(callback)
