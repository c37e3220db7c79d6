import numpy as np
import pytest

from jaxscape.models.sharding import MeshShape
from tests.finetune.on_meshes import MESHES, STEPS


@pytest.fixture(scope="module")
def found(on_eight_devices):
    return on_eight_devices("-m", "tests.finetune.on_meshes")


@pytest.mark.parametrize("method", list(MESHES))
def test_eight_devices_take_the_steps_of_one(method, found):
    alone, *spread = (found[f"{method} {shape}"] for shape in MESHES[method])
    assert len(alone["loss"]) == STEPS and alone["loss"][0] != alone["loss"][-1]
    for other in spread:
        np.testing.assert_allclose(other["loss"], alone["loss"], rtol=3e-6)
        np.testing.assert_allclose(other["gradient_norm"], alone["gradient_norm"], rtol=3e-5)


def test_folded_kernels_lie_where_the_kernels_do(found):
    alone, *spread = (found[f"lora {shape}"] for shape in MESHES["lora"])
    for other in spread:
        np.testing.assert_allclose(other["folded"], alone["folded"], rtol=1e-5)
        assert len(other["folded"]) == 7 and other["moved"] == []


def test_parameters_and_moments_are_spread(found):
    alone, spread = (found[f"full {shape}"]["on_a_device"] for shape in (MeshShape(), MeshShape(1, 8, 1)))
    for part in ("trained", "optimizer"):
        assert spread[part] < alone[part] / 6  # norms and biases stay whole


def test_memory_is_told_for_each_device(found):
    (line,) = found[f"full {MeshShape(1, 8, 1)}"]["memory"]
    assert line.startswith("memory: each of 8 cpu devices holds ")
