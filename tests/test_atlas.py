import numpy as np
import pytest

from jaxscape import atlas, landscape
from jaxscape.collect.store import Answers, Store

CONFIG = {"k": 8, "z": 0.5, "max_rank": 16}  # and the shapes of tests/launching.py: compiled once


@pytest.fixture
def representations(tmp_path):
    """Three layers of 36 points: two of noise, one where all points coincide."""
    folder = tmp_path / "representations"
    folder.mkdir()
    states = np.random.default_rng(0).normal(size=(3, 36, 32)).astype(np.float32)
    states[1] = states[1, :1]
    answers = Answers(np.zeros((36, 4), np.float32), np.zeros(36, np.int32))
    Store.create(folder, (1, 2, 3), 36, 32, 4, "float32").write(range(36), states, answers).result()
    return folder, states


@pytest.fixture
def mapped(representations, tmp_path):
    folder = tmp_path / "landscape"
    folder.mkdir()
    atlas.survey_condition(representations[0], folder, CONFIG, label="x")
    return folder


def test_every_layer_has_its_landscape_on_disk(mapped, representations):
    found = atlas.read_layer(mapped, 3)
    expected = landscape.survey(representations[1][2], **CONFIG)
    assert int(found["n_points"]) == 36 and found["kept"].tolist() == list(range(36))
    np.testing.assert_array_equal(found["neighbors"], expected.neighbors.indices)
    np.testing.assert_array_equal(found["log_density"], expected.density.log_density)
    np.testing.assert_array_equal(found["log_density_error"], expected.density.log_density_error)
    np.testing.assert_array_equal(found["intrinsic_dim"], expected.intrinsic_dim)
    for name in landscape.Peaks._fields:
        np.testing.assert_array_equal(found[f"peaks_{name}"], getattr(expected.peaks, name))
    for name in expected.gride._fields:
        np.testing.assert_array_equal(found[f"gride_{name}"], getattr(expected.gride, name))
    assert sorted(path.name for path in mapped.iterdir()) == [f"layer-00{n}.npz" for n in (1, 2, 3)]


def test_layer_of_coinciding_points_has_no_landscape(mapped):
    found = atlas.read_layer(mapped, 2)
    assert set(found) == {"n_points", "kept"} and len(found["kept"]) == 1


def test_layers_that_are_there_are_not_mapped_again(mapped, representations, monkeypatch):
    before = atlas.layer_file(mapped, 1).read_bytes()
    atlas.layer_file(mapped, 3).unlink()
    asked, survey = [], atlas.survey_arrays
    monkeypatch.setattr(atlas, "survey_arrays", lambda states, config: asked.append(states) or survey(states, config))
    atlas.survey_condition(representations[0], mapped, CONFIG, label="x")
    assert len(asked) == 1 and asked[0].tobytes() == representations[1][2].tobytes()
    assert atlas.layer_file(mapped, 1).read_bytes() == before


def test_same_states_give_the_same_bytes(mapped, representations):
    before = atlas.layer_file(mapped, 1).read_bytes()
    atlas.layer_file(mapped, 1).unlink()
    atlas.survey_condition(representations[0], mapped, CONFIG, label="x")
    assert atlas.layer_file(mapped, 1).read_bytes() == before


@pytest.mark.parametrize("damage", ["gone", "empty", "no zip", "short", "flipped", "pickle"])
def test_damaged_layer_is_named(damage, mapped, raises_input_error):
    file = atlas.layer_file(mapped, 1)
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "pickle":
        np.savez(file, n_points=np.array([{}], dtype=object))
    else:
        at = data.index(b"log_density") + 400
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        file.write_bytes({"empty": b"", "no zip": b"PK\x03\x04", "short": data[:-50], "flipped": flipped}[damage])
    with raises_input_error(str(file), f"delete {mapped} and run again"):
        atlas.read_layer(mapped, 1)
