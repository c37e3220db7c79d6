"""TensorBoard and Weights & Biases, where the user asks for them; both are optional extras.

Curves lie over the step. A point that an interrupted run had drawn beyond the state it goes on from is drawn again,
with the same value.
"""

import contextlib
import importlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxscape.errors import InputError
from jaxscape.workspace import write_bytes

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # as imported; the extras are called as the trackers
TRACKERS = tuple(_PACKAGES)
_RUN_ID = "wandb_run_id"


class TensorBoard:
    """Event files in ``folder/tensorboard``."""

    def __init__(self, folder: Path, label: str, config: Mapping[str, Any], start: int):
        """Opens them; the points of an interrupted run after step ``start`` are hidden."""
        writer = importlib.import_module("tensorboardX").SummaryWriter
        self._writer = writer(
            str(folder / "tensorboard"),
            purge_step=start + 1 if start else None,
            filename_suffix=f".{start}",  # else two runs that begin in the same second write to the same file
        )
        if not start:
            self._writer.add_text("config", "\n\n".join(f"{name}: {value}" for name, value in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class Wandb:
    """One run of the project "jaxscape", the same after an interruption; WANDB_MODE says whether it is sent."""

    def __init__(self, folder: Path, label: str, config: Mapping[str, Any], start: int):
        """Starts it, or goes on with it.

        Raises:
          InputError: it cannot be started, say as nobody is logged in.
        """
        wandb = importlib.import_module("wandb")
        file = folder / _RUN_ID
        if not file.is_file():
            write_bytes(file, uuid.uuid4().hex[:8].encode())
        same_run = {"id": file.read_text(), "resume": "allow"}
        try:
            self._run = wandb.init(project="jaxscape", name=label, dir=str(folder), config=dict(config), **same_run)
        except Exception as error:  # of many kinds, none of which is the program's
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"config.finetune.trackers: wandb does not start ({said}); run 'wandb login', or set "
                "WANDB_MODE=offline"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # its own step may not go back, ours does after a kill

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Ends the run's process; the run itself may go on later."""
        self._run.finish()


_KINDS = {"tensorboard": TensorBoard, "wandb": Wandb}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that there are not.

    Raises:
      InputError: no such tracker, or its package is not installed.
    """
    for name in names:
        if name not in _PACKAGES:
            raise InputError(f"config.finetune.trackers {name!r}: choose from {', '.join(TRACKERS)}")
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            raise InputError(
                f"config.finetune.trackers {name!r} needs {_PACKAGES[name]} ({error}): pip install {_PACKAGES[name]}, "
                f"or in the clone pip install -e '.[{name}]'"
            ) from None


class Trackers:
    """Those that the user asked for, as one; a context that closes them."""

    def __init__(self, names: Sequence[str], folder: Path, *, label: str, config: Mapping[str, Any], start: int):
        """Opens them.

        Args:
          names: out of ``TRACKERS``.
          folder: of the run.
          label: of the run.
          config: what the run is told by.
          start: step that the run goes on from.

        Raises:
          InputError: one is not installed or cannot start.
        """
        check_trackers(names)
        self._all = []
        with contextlib.ExitStack() as opened:  # those before one that does not start are closed
            for name in dict.fromkeys(names):
                self._all.append(_KINDS[name](folder, label, config, start))
                opened.callback(self._all[-1].close)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_) -> None:
        self._opened.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve of each."""
        for tracker in self._all:
            tracker.log(step, values)
