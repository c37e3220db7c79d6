"""What fine-tuning keeps on disk: states to go on from, and parameters of the steps that are followed.

    state/<step>/   parameters and optimiser, the newest few: what only an unfinished run needs
    kept/<step>/    parameters alone, float32

Orbax writes a step in a folder of another name, and renames it once it is whole.
"""

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxscape.errors import InputError, disk_is_full
from jaxscape.models.memory import bytes_on_device
from jaxscape.models.tensor_names import ParamPath

STATE, KEPT = "state", "kept"
_ITEM = "default"  # what Orbax's manager calls the one thing that a step holds
_METADATA = "_CHECKPOINT_METADATA"
_GB = 10**9  # as Orbax counts


def named(values: Mapping[ParamPath, jax.Array]) -> dict[str, jax.Array]:
    """Parameter paths joined by dots, as checkpoints name them."""
    return {".".join(path): value for path, value in values.items()}


def unnamed(values: Mapping[str, jax.Array]) -> dict[ParamPath, jax.Array]:
    """The inverse of ``named``."""
    return {tuple(name.split(".")): value for name, value in values.items()}


def steps_in(folder: Path) -> list[int]:
    """The steps that are whole in a folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / _METADATA).is_file())


class Checkpoints:
    """Both kinds of a run's checkpoints, written by other threads while training goes on.

    A state is whole only after everything that was kept at earlier steps is: a run that goes on from it need never
    come back to them. What was kept at its own step can be made from it.

    Attributes:
      folder: of the run.
    """

    def __init__(self, folder: Path, keep: int, like: Mapping):
        """Opens the checkpoints of a run, and removes what was left half-written.

        Args:
          folder: of the run.
          keep: how many states stay; an old one goes after a new one is whole.
          like: a tree of arrays like those that will be saved.
        """
        self.folder = folder
        largest = max(bytes_on_device(leaf, leaf.sharding) for leaf in jax.tree.leaves(like))  # written at once
        self._managers = {kind: _manager(folder / kind, most, largest) for kind, most in ((STATE, keep), (KEPT, None))}
        self._writing = {STATE: 0, KEPT: 0}
        self._quiet, self._failed = contextlib.ExitStack(), False

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(_quiet_orbax())
        return self

    def __exit__(self, kind, *_) -> None:
        """Waits for what is being written, after an error or an interruption too: it may be whole in a moment."""
        try:
            if kind is None:
                self.wait()
            for manager in self._managers.values():
                with contextlib.suppress(Exception):  # has been reported, or is not what the run fails from
                    manager.close()
        finally:
            if not self._failed:
                self._quiet.close()

    def newest(self) -> int:
        """The newest step with a whole state; 0 where there is none."""
        return max(steps_in(self.folder / STATE), default=0)

    def kept(self) -> list[int]:
        """The steps whose parameters are whole on disk, ascending."""
        return steps_in(self.folder / KEPT)

    def has_state(self, step: int) -> bool:
        """Whether the state of a step is whole, or on its way."""
        return step in self._managers[STATE].all_steps()

    def restore(self, like: Mapping) -> Mapping:
        """The newest state.

        Args:
          like: a tree of its shapes, dtypes and shardings, as of ``abstract``.

        Raises:
          InputError: it is damaged; says which older one is whole.
        """
        newest, *older = reversed(steps_in(self.folder / STATE))
        try:
            return self._restore(newest, like)
        except Exception as error:  # of many kinds, down to Exception itself
            self._failed, damage = True, _cause(error)
        whole = next((step for step in older if self._is_whole(step, like)), 0)
        then = f"it goes on from step {whole}" if whole else "it begins anew"
        raise InputError(
            f"{self.folder / STATE / str(newest)}: unreadable state ({damage}); delete it and run the same command "
            f"again: {then}"
        )

    def _is_whole(self, step: int, like: Mapping) -> bool:
        try:
            self._restore(step, like)
        except Exception:
            return False
        return True

    def _restore(self, step: int, like: Mapping) -> Mapping:
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        return self._managers[STATE].restore(step, args=ocp.args.PyTreeRestore(like, restore_args=restore_args))

    def keep(self, step: int, trainable: Mapping[str, jax.Array]) -> None:
        """Starts to write parameters that stay; they must not be reused before ``wait``.

        Raises:
          InputError: they cannot be written, or what was being written before could not.
        """
        self._save(KEPT, step, trainable)

    def save(self, step: int, tree: Mapping) -> None:
        """Starts to write a state; its arrays must not be reused before ``wait``.

        Raises:
          InputError: it cannot be written, or what was being written before could not.
        """
        if self._writing[KEPT] < step:
            self._wait(KEPT)
        self._save(STATE, step, tree)

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
          InputError: something could not be.
        """
        for kind in self._managers:
            self._wait(kind)

    def settle(self) -> None:
        """Waits until nothing is being written, whether it came to a good end or not."""
        for manager in self._managers.values():
            with contextlib.suppress(Exception):  # has been reported
                manager.wait_until_finished()

    def cannot_write(self, what: str, error: Exception) -> InputError:
        """What to say of something that could not be written."""
        self.settle()
        self._failed = True
        full = "the disk is full: " if disk_is_full(error) else ""
        newest = self.newest()
        left = f"the last good state is of step {newest}" if newest else "there is no state yet"
        return InputError(
            f"{full}{what} could not be written ({_cause(error)}); {left}; make room and run the same command "
            "again to go on"
        )

    def _save(self, kind: str, step: int, tree: Mapping) -> None:
        self._wait(kind)
        self._writing[kind] = step
        self._reported(kind, lambda: self._managers[kind].save(step, args=ocp.args.PyTreeSave(tree), force=True))

    def _wait(self, kind: str) -> None:
        self._reported(kind, self._managers[kind].wait_until_finished)

    def _reported(self, kind: str, write: Callable[[], object]) -> None:
        try:
            write()
            return
        except Exception as error:  # Orbax's, TensorStore's or the system's, from whatever thread
            found = self.cannot_write(str(self.folder / kind / str(self._writing[kind])), error)
        raise found  # without the other as its context, which holds on to all that failed


def abstract(tree):
    """Shapes, dtypes and shardings of a tree of arrays, which need not live on."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def apart(tree):
    """Arrays that may be written while the next step reuses those of ``tree``.

    From accelerators Orbax fetches its own copy before training goes on; on CPUs it reads the arrays themselves. JAX
    happens not to reuse an array that NumPy looks at, at the cost of as much memory as this copy; it promises no such
    thing.
    """
    on_cpu = next(iter(jax.tree.leaves(tree)[0].devices())).platform == "cpu"
    return jax.tree.map(jnp.copy, tree) if on_cpu else tree


def load_trained(folder: Path, step: int | None = None) -> dict[ParamPath, np.ndarray]:
    """Parameters that a run kept, by path: float32, on the host.

    Args:
      folder: of the run.
      step: which; None: the last.

    Raises:
      InputError: they are missing or unreadable.
    """
    steps = steps_in(folder / KEPT)
    if not steps or (step is not None and step not in steps):
        found = f"has steps {', '.join(map(str, steps))}" if steps else "has none"
        wanted = "parameters" if step is None else f"parameters of step {step}"
        raise InputError(f"{folder / KEPT}: no trained {wanted} ({found}); delete {folder} and run again")
    path = (folder / KEPT / str(steps[-1] if step is None else step) / _ITEM).resolve()
    try:
        with _quiet_orbax(), ocp.Checkpointer(_handler()) as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise FileNotFoundError("no metadata")
            on_host = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in metadata}
            return unnamed(checkpointer.restore(path, restore_args=on_host))
    except Exception as error:
        raise InputError(
            f"{path.parent}: unreadable checkpoint ({_cause(error)}); delete {folder} and run again"
        ) from None


def discard_states(folder: Path) -> None:
    """Removes the states that only an unfinished run needs: three times the size of what was trained, each."""
    shutil.rmtree(folder / STATE, ignore_errors=True)


def _handler(largest: int = 0) -> ocp.PyTreeCheckpointHandler:
    """Writes arrays as they are: float32 weights don't compress, and trying costs a copy of them in memory.

    What is being written at once is copied too: as little as the largest piece allows.
    """
    return ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=1 + largest // _GB)


def _manager(folder: Path, keep: int | None, largest: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=_handler(largest))


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from telling of errors that are reported here: it does so with their tracebacks, some twice.

    After an error it stays so: what failed beside it complains when it is collected, whenever that is.
    """

    def not_orbax(record: logging.LogRecord) -> bool:
        told = "exception was never retrieved" in record.getMessage()  # asyncio's, of what failed beside the first
        return not told and f"{os.sep}orbax{os.sep}" not in record.pathname

    def unraisable(ignored) -> None:
        # of several writes that fail, the first one ends the loop that the others report to
        if not (isinstance(ignored.exc_value, RuntimeError) and str(ignored.exc_value) == "Event loop is closed"):
            before(ignored)

    loggers, before = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    for logger in loggers:
        logger.addFilter(not_orbax)
    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize.* was never awaited", RuntimeWarning)
    yield
    sys.unraisablehook = before
    for logger in loggers:
        logger.removeFilter(not_orbax)


def _cause(error: Exception) -> str:
    """The heart of an error's first line: TensorStore's begin with the path, layer after layer, and end with a dump."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].split(" [")[0]
    return ": ".join(first.split(": ")[-2:])
