"""Folders in the hub's format: written beside their place and renamed there, their tensors one at a time."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxscape.errors import InputError

_DTYPES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16"}  # by safetensors' names


class Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
      name: its name in the file.
      shape: of what ``read`` returns.
      dtype: likewise; float32 or bfloat16.
      read: its values, on the host.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(folder: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """``with new_folder(folder) as partial:`` a hidden folder beside it, renamed into place once all is written.

    Args:
      folder: may be there, but empty or with nothing in it but ``replaces``.
      replaces: names of files that may be lost.

    Raises:
      InputError: the folder holds other files, or the disk doesn't take what is written.
    """
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - set(replaces)):
            raise InputError(f"{folder}: exists and is not empty; delete it, or give another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error}); make room there, or give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Writes a safetensors file (its README has the format); no more than one tensor is in memory at once."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers wants to know whose axes these are
    for tensor in tensors:
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [offset, offset + tensor.nbytes]}  # fmt: skip
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = np.ascontiguousarray(tensor.read(), tensor.dtype)
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: shape {values.shape}, announced as {tensor.shape}")
            file.write(values.reshape(-1).view(np.uint8))


def write_json(path: Path, value: dict) -> None:
    """Writes a JSON file as transformers does: indented, ended by a line break."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
