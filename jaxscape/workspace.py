"""What lies where on disk: one folder an experiment, stages that commit by one rename, a lock."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxscape.errors import InputError

MANIFEST = "manifest.json"
_INPUTS = "inputs.json"
_FORMAT = 2  # raised when what a stage computes or how it lies on disk changes: older folders are made again
# Sections of the configuration that nothing kept on disk was made from: every run makes its tables and figures anew.
_FREE = ("conditions", "compare", "report")
FREE_OF_TRAINING = ("save_every", "keep", "trackers", "export_merged")  # likewise, of its section "finetune"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it there, so that nobody meets half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """``write_bytes`` of a value as JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file; None where there is none.

    Raises:
      InputError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path}: not readable ({error}); delete it and run again") from None


class Stage:
    """One finished-or-not piece of an experiment: a folder made from named inputs.

    Work happens in a hidden folder beside it, which outlives interruptions; ``commit`` renames it into place.

    Attributes:
      folder: where the stage lies once it is finished.
      partial: where it is made.
      resumed: whether ``begin`` found the work of an interrupted run.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]):
        self.folder = folder
        self.partial = folder.with_name(f".{folder.name}.partial")
        self.resumed = False
        self._inputs = json.loads(json.dumps(inputs))  # as it will be read back

    def manifest(self) -> dict | None:
        """What the finished stage says of itself; None when it is not finished or was made from other inputs."""
        found = read_json(self.folder / MANIFEST)
        return found if found is not None and found["inputs"] == self._inputs else None

    def fingerprint(self) -> str:
        """SHA-256 of the inputs: what later stages name as theirs."""
        return digest(self._inputs)

    def begin(self) -> Path:
        """The folder to work in: what an interrupted run left there if it had the same inputs, else an empty one."""
        finished = read_json(self.folder / MANIFEST)
        if finished is not None:
            changed = "; ".join(_differences(finished["inputs"], self._inputs, "inputs"))
            print(f"{self.folder}: made again, its inputs changed ({changed})", flush=True)
        self.resumed = read_json(self.partial / _INPUTS) == self._inputs
        if not self.resumed:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            write_json(self.partial / _INPUTS, self._inputs)
        return self.partial

    def commit(self, **facts: Any) -> None:
        """Puts the stage in place, with a manifest of its inputs and of ``facts``."""
        write_json(self.partial / MANIFEST, {"inputs": self._inputs, "resumed": self.resumed, **facts})
        if self.folder.exists():  # made from other inputs
            (self.folder / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look finished
            shutil.rmtree(self.folder)
        os.replace(self.partial, self.folder)
        (self.folder / _INPUTS).unlink()  # only now: until the rename it says whose work the hidden folder holds


class Workspace:
    """The folder of one experiment, made from one configuration; touched only while it is ``locked``."""

    def __init__(self, root: Path, config: Mapping[str, Any]):
        self.root = root
        self._config = json.loads(json.dumps(config))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process and checks that it belongs to this configuration.

        Raises:
          InputError: it cannot be made, another process holds it, or it was made from another configuration.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("a+")
        except OSError as error:
            raise InputError(f"--workdir={self.root}: cannot write there ({error.strerror}); give another") from None
        with lock as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                handle.seek(0)
                raise InputError(
                    f"{self.root}: in use by another run (process {handle.read().strip() or 'unknown'}); wait for it, "
                    "or give another --workdir"
                ) from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            self._claim()
            yield

    def _claim(self) -> None:
        path = self.root / "config.json"
        found = read_json(path)
        changed = [] if found is None else _differences(_bound(found), _bound(self._config))
        if changed:
            raise InputError(
                f"{self.root}: made from another configuration ({'; '.join(changed)}); give another --workdir, or "
                "delete this one"
            )
        if found != self._config:
            write_json(path, self._config)

    def stage(self, kind: str, name: str, inputs: Mapping[str, Any]) -> Stage:
        """The stage ``kind/name``, made from ``inputs``."""
        folder = self.root / kind / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Stage(folder, {"format": _FORMAT, **inputs})


def _bound(config: Mapping[str, Any]) -> dict[str, Any]:
    bound = {name: section for name, section in config.items() if name not in _FREE}
    if "finetune" in bound:
        bound["finetune"] = {name: v for name, v in bound["finetune"].items() if name not in FREE_OF_TRAINING}
    return bound


def _differences(old: Any, new: Any, path: str = "config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(dict.fromkeys([*old, *new]))
        return [line for n in names for line in _differences(old.get(n), new.get(n), f"{path}.{n}")]
    return [] if old == new else [f"{path} was {old!r}, now {new!r}"]
