"""Representations on disk: a zarr array [layer, question, feature], with the answers beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorstore as ts

from jaxscape.errors import InputError, disk_is_full
from jaxscape.models.answers import free_answers
from jaxscape.workspace import read_json, write_json

DTYPES = ("float32", "bfloat16", "float16")

_STATES, _LOGITS, _FREE, _TEXTS = "states.zarr", "logits.zarr", "free.zarr", "free.json"
_CHUNK_BYTES = 8 << 20
_NO_TOKEN = -1


def _spec(path: Path) -> dict:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}


def _create(path: Path, shape: Sequence[int], chunk: Sequence[int], dtype: str, **attributes) -> ts.TensorStore:
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # not compressed: states don't; with a checksum: a flipped bit must not pass for a state
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": _NO_TOKEN if dtype == "int32" else "NaN",  # so that a chunk that is gone shows
        "attributes": attributes,
    }
    return ts.open({**_spec(path), "metadata": metadata}, create=True, open=True).result()


class Answers(NamedTuple):
    """What the model answered to each question.

    Attributes:
      logits: float32 [question, answer], see ``answers.letter_logits``.
      free: int32 [question] token of the highest logit.
    """

    logits: np.ndarray
    free: np.ndarray


class Pending:
    """A write that has begun; ``result`` waits until it is on disk."""

    def __init__(self, futures: Sequence):
        self._futures = futures

    def result(self) -> None:
        """Waits."""
        for future in self._futures:
            future.result()


class Store:
    """The arrays of one condition, written piece by piece.

    Attributes:
      folder: where they lie.
      states: [layer, question, feature] in the dtype given to ``create``.
      logits: float32 [question, answer].
      free: int32 [question].
      layers: number of each layer of ``states``, from 1.
    """

    def __init__(self, folder: Path, states: ts.TensorStore, logits: ts.TensorStore, free: ts.TensorStore):
        self.folder, self.states, self.logits, self.free = folder, states, logits, free
        found = states.spec(retain_context=False).to_json()["metadata"].get("attributes", {})
        self.layers = tuple(found.get("layers", range(1, states.shape[0] + 1)))

    @classmethod
    def create(
        cls, folder: Path, layers: Sequence[int], questions: int, features: int, answers: int, dtype: str
    ) -> "Store":
        """Opens the arrays in ``folder``, making what is not there yet.

        Args:
          folder: where they lie.
          layers: number of each layer, from 1.
          questions: how many.
          features: of a state.
          answers: how many.
          dtype: of the states, one of ``DTYPES``.

        Raises:
          InputError: what is there is unreadable or of other shapes.
        """
        rows = max(1, min(questions, _CHUNK_BYTES // (features * np.dtype(dtype).itemsize)))
        shape = (len(layers), questions, features)
        try:
            return cls(
                folder,
                _create(folder / _STATES, shape, (1, rows, features), dtype, layers=list(map(int, layers))),
                _create(folder / _LOGITS, (questions, answers), (questions, answers), "float32"),
                _create(folder / _FREE, (questions,), (questions,), "int32"),
            )
        except ValueError as error:
            if disk_is_full(error):  # nothing is wrong with what is there
                raise
            raise _unreadable(folder, error) from None

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Opens a finished condition for reading.

        Raises:
          InputError: the arrays are missing or unreadable.
        """
        try:
            opened = [ts.open(_spec(folder / name), open=True) for name in (_STATES, _LOGITS, _FREE)]
            return cls(folder, *(array.result() for array in opened))
        except ValueError as error:
            raise _unreadable(folder, error) from None

    def write(self, questions: Sequence[int], states: np.ndarray, answers: Answers) -> Pending:
        """Begins to store some questions' states [layer, len(questions), feature] and answers."""
        index = np.asarray(questions)
        return Pending([
            self.states[:, index, :].write(states),
            self.logits[index, :].write(answers.logits),
            self.free[index].write(answers.free),
        ])  # fmt: skip

    def write_texts(self, decode) -> None:
        """Keeps the text of every token in ``free``, once all are there; ``decode`` makes a text of token ids."""
        found = np.unique(self.free_tokens())
        write_json(self.folder / _TEXTS, {str(token): decode([int(token)]) for token in found})

    def layer(self, place: int) -> np.ndarray:
        """States [question, feature] of one layer, by its place (from 0) in ``layers``.

        Raises:
          InputError: they are unreadable or incomplete.
        """
        return self._read(self.states[place], f"states of layer {self.layers[place]}")

    def answer_logits(self) -> np.ndarray:
        """Logits [question, answer].

        Raises:
          InputError: they are unreadable or incomplete.
        """
        return self._read(self.logits, "logits")

    def free_tokens(self) -> np.ndarray:
        """Token of the highest logit, int32 [question].

        Raises:
          InputError: they are unreadable or incomplete.
        """
        return self._read(self.free, "free answers")

    def free_answers(self) -> np.ndarray:
        """The answer that the likeliest token is, decoded and stripped: int [question]; -1 where it is none.

        Raises:
          InputError: they are unreadable or incomplete.
        """
        tokens = self.free_tokens()
        try:
            texts = {int(token): text for token, text in (read_json(self.folder / _TEXTS) or {}).items()}
            return free_answers(tokens, texts)
        except (InputError, KeyError, AttributeError, ValueError):
            raise _unreadable(self.folder, f"{_TEXTS} does not say what every token is") from None

    def _read(self, array: ts.TensorStore, what: str) -> np.ndarray:
        try:
            values = np.asarray(array.read().result())
        except ValueError as error:
            raise _unreadable(self.folder, error) from None
        if (values == _NO_TOKEN).any() if values.dtype == np.int32 else np.isnan(values).any():
            raise _unreadable(self.folder, f"{what}: some are missing")
        return values


def _unreadable(folder: Path, why: object) -> InputError:
    first = str(why).strip().splitlines()[0]
    return InputError(f"{folder}: unreadable arrays ({first}); delete {folder} and run again")
