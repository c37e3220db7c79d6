"""The landscapes of a condition on disk: one .npz a layer."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxscape import landscape
from jaxscape.collect.store import Store
from jaxscape.errors import InputError
from jaxscape.workspace import write_bytes

_ARRAYS = ("intrinsic_dim", "intrinsic_dim_error")


def layer_file(folder: Path, layer: int) -> Path:
    """Where the landscape of a layer (from 1) lies."""
    return folder / f"layer-{layer:03d}.npz"


def survey_condition(representations: Path, folder: Path, config: Mapping[str, Any], *, label: str) -> None:
    """Maps every layer of a condition, skipping layers whose file is there.

    Args:
      representations: folder of the condition's ``Store``.
      folder: where the layers' files go.
      config: k, z and max_rank of ``landscape.survey``.
      label: name on the progress bar.
    """
    store = Store.open(representations)
    for place, layer in enumerate(tqdm(store.layers, desc=f"landscape {label}", unit="layer")):
        file = layer_file(folder, layer)
        if not file.is_file():
            write_bytes(file, _npz(survey_arrays(store.layer(place), config)))


def survey_arrays(states: np.ndarray, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The landscape of one layer as named arrays; ``n_points`` and ``kept`` alone where too few points are distinct.

    Args:
      states: [N, D].
      config: k, z and max_rank of ``landscape.survey``.
    """
    kept = landscape.drop_duplicates(states)
    if len(kept) < 2 * config["k"] + 1:
        return {"n_points": np.array(len(states)), "kept": kept}
    found = landscape.survey(states, k=config["k"], z=config["z"], max_rank=config["max_rank"])
    fields = {"n_points": found.n_points, "kept": found.kept, "neighbors": found.neighbors.indices}
    fields |= {name: getattr(found, name) for name in _ARRAYS}
    fields |= {f"gride_{name}": value for name, value in found.gride._asdict().items()}
    fields |= {name: getattr(found.density, name) for name in ("log_density", "log_density_error")}
    fields |= {f"peaks_{name}": value for name, value in found.peaks._asdict().items()}
    return {name: np.asarray(value) for name, value in fields.items()}


def read_layer(folder: Path, layer: int) -> dict[str, np.ndarray]:
    """The arrays that ``survey_arrays`` made of a layer (from 1).

    Raises:
      InputError: the file is missing or unreadable.
    """
    file = layer_file(folder, layer)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: not readable ({error}); delete {folder} and run again") from None


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
