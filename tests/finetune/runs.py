"""Small training runs on the tiny model, and what they leave on disk.

    python -m tests.finetune.runs FOLDER

is a run that meets one mishap after the other: asked to end, a file system that takes no large files, killed while it
saves. What it says is a line each.
"""

import contextlib
import dataclasses
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxscape.errors import InputError, Terminated
from jaxscape.finetune import trainer
from jaxscape.finetune.checkpoints import steps_in
from jaxscape.finetune.config import FinetuneConfig
from jaxscape.finetune.dataset import TrainingSet, ValidationSet
from jaxscape.models.lora import LoraConfig
from jaxscape.models.pretrained import load_pretrained
from jaxscape.models.sharding import make_mesh

CONFIG = FinetuneConfig(
    method="lora", lora=LoraConfig(4, 8.0, 0.1), dtype="float32", optimizer="adamw(b2=0.99, weight_decay=0.01)",
    learning_rate=1e-2, steps=7, batch_size=4, accumulation=1, warmup_ratio=0.2, final_ratio=0.1, clip_norm=1.0,
    remat="none", packing=False, evaluations=2, checkpoints=3, save_every=2, keep=1, seed=0,
)  # fmt: skip
FULL = dataclasses.replace(CONFIG, method="full", learning_rate=1e-3, evaluations=0)
TINY = Path(__file__).parents[1] / "fixtures" / "tiny_llama"


def tiny(dtype: str = "float32"):
    """The tiny model, its arrays its own: full fine-tuning gives them up."""
    return load_pretrained(TINY, make_mesh(), dtype)


def training_set(count: int = 10) -> TrainingSet:
    draw = np.random.default_rng(0)
    rows = [draw.integers(1, 380, draw.integers(3, 12)).tolist() for _ in range(count)]
    names = [f"bank/animals/{number}" for number in range(count)]
    return TrainingSet(rows, draw.integers(1, 5, count).tolist(), np.ones(count, np.float32), names)


def validation_set() -> ValidationSet:
    draw = np.random.default_rng(1)
    rows = [draw.integers(1, 380, draw.integers(3, 12)).tolist() for _ in range(6)]
    return ValidationSet(rows, draw.integers(0, 4, 6), np.arange(6) % 2, ["animals", "cities, towns"])


def train(config: FinetuneConfig, folder: Path, model=None, **options) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    options = {"validation": validation_set(), "label": "test"} | options
    with jax.default_matmul_precision("float32"):
        return trainer.finetune(model or tiny(), config, options.pop("data", training_set()), folder, **options)


def left_by(folder: Path) -> dict[str, bytes]:
    """Everything that a finished run leaves, by name: every kept parameter, and every table."""
    found = {file.name: file.read_bytes() for pattern in ("*.csv", "*.parquet") for file in folder.glob(pattern)}
    for step in steps_in(folder / "kept"):
        values = trainer.load_trained(folder, step)
        found |= {f"{step} {'.'.join(path)} {v.dtype} {v.shape}": v.tobytes() for path, v in values.items()}
    return found


@contextlib.contextmanager
def before_step(number: int, act: Callable[[], object]):
    """Calls ``act`` just before a step (from 0) is taken."""
    take = trainer.TrainingRun.step

    def stepping(self, step):
        if step == number:
            act()
        return take(self, step)

    trainer.TrainingRun.step = stepping
    try:
        yield
    finally:
        trainer.TrainingRun.step = take


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A file system that refuses to let a file grow further."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores the signal that would come with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill_at_rename_to(end: str) -> None:
    """Kills this process just before anything is renamed to a path that ends so."""

    def audit(event, arguments):
        if event == "os.rename" and str(arguments[1]).rstrip("/").endswith(end):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def mishaps(folder: Path) -> None:
    """See the module."""
    try:
        with before_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            train(CONFIG, folder)
    except Terminated as end:
        print("terminated", end.exit_code, steps_in(folder / "state"), flush=True)
    try:
        with files_of_at_most(20_000):
            train(CONFIG, folder)
    except InputError as error:
        print(error, steps_in(folder / "state"), flush=True)
    kill_at_rename_to("state/6")
    train(CONFIG, folder)


if __name__ == "__main__":
    mishaps(Path(sys.argv[1]))
