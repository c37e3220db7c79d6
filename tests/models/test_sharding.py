"""The tables, and every family on 1 and on 8 devices: the same states, and the communication that was meant."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscape.models.decoder import abstract_decoder
from jaxscape.models.lora import LoraConfig
from jaxscape.models.sharding import AXES, MeshShape, make_mesh, partition_spec, place, prefix_sharding
from tests.models.on_meshes import BASE, FAMILIES, SHAPE, architecture, meshes

BLOCKS, ATTENTION, MLP = ("blocks",), ("blocks", "attention"), ("blocks", "mlp")
MESH = SimpleNamespace(shape={"data": 3, "fsdp": 2, "tensor": 4})  # partition_spec asks a mesh for its sizes only


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (("embedding",), (384, 32), P("tensor", "fsdp")),
        (("head",), (384, 32), P("tensor", "fsdp")),
        (("positions",), (64, 32), P(None, "fsdp")),
        (("final_norm", "scale"), (32,), P(None)),
        (("final_norm", "bias"), (32,), P(None)),
        ((*BLOCKS, "input_norm", "scale"), (4, 32), P(None, None)),
        ((*BLOCKS, "mlp_norm", "bias"), (4, 32), P(None, None)),
        ((*BLOCKS, "attention_out_norm", "scale"), (4, 32), P(None, None)),
        ((*BLOCKS, "mlp_out_norm", "bias"), (4, 32), P(None, None)),
        ((*ATTENTION, "q_norm", "scale"), (4, 32), P(None, None)),
        ((*ATTENTION, "k_norm", "scale"), (4, 16), P(None, None)),
        ((*ATTENTION, "q", "kernel"), (4, 32, 32), P(None, "fsdp", "tensor")),
        ((*ATTENTION, "k", "kernel"), (4, 32, 16), P(None, "fsdp", "tensor")),
        ((*ATTENTION, "v", "kernel"), (4, 32, 16), P(None, "fsdp", "tensor")),
        ((*ATTENTION, "o", "kernel"), (4, 32, 32), P(None, "tensor", "fsdp")),
        ((*ATTENTION, "q", "bias"), (4, 32), P(None, "tensor")),
        ((*ATTENTION, "k", "bias"), (4, 16), P(None, "tensor")),
        ((*ATTENTION, "v", "bias"), (4, 16), P(None, "tensor")),
        ((*ATTENTION, "o", "bias"), (4, 32), P(None, None)),
        ((*MLP, "gate", "kernel"), (4, 32, 64), P(None, "fsdp", "tensor")),
        ((*MLP, "up", "kernel"), (4, 32, 64), P(None, "fsdp", "tensor")),
        ((*MLP, "down", "kernel"), (4, 64, 32), P(None, "tensor", "fsdp")),
        ((*MLP, "up", "bias"), (4, 64), P(None, "tensor")),
        ((*MLP, "down", "bias"), (4, 32), P(None, None)),
        ((*ATTENTION, "q", "adapter", "a"), (4, 8, 32), P(None, None, "fsdp")),
        ((*ATTENTION, "v", "adapter", "b"), (4, 8, 16), P(None, None, "tensor")),
        ((*MLP, "down", "adapter", "a"), (4, 8, 64), P(None, None, "tensor")),
        ((*MLP, "down", "adapter", "b"), (4, 8, 32), P(None, None, "fsdp")),
        ((*MLP, "up", "adapter", "m"), (4, 64), P(None, "tensor")),
        ((*MLP, "down", "adapter", "m"), (4, 32), P(None, "fsdp")),
    ],
)
def test_each_parameter_is_cut_as_the_tables_say(path, shape, expected):
    assert partition_spec(path, shape, MESH) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((383, 32), P(None, "fsdp")), ((384, 33), P("tensor", None)), ((383, 33), P(None, None))],
)
def test_a_dimension_that_does_not_divide_stays_whole(shape, expected):
    assert partition_spec(("embedding",), shape, MESH) == expected


@pytest.mark.parametrize("path", [("mystery",), (*MLP, "mystery", "kernel"), (*MLP, "up", "mystery")])
def test_a_parameter_that_the_tables_lack_is_an_error(path):
    with pytest.raises(KeyError):
        partition_spec(path, (4, 32, 64), MESH)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_is_in_the_tables(family):
    _, abstract = abstract_decoder(architecture(family), lora=LoraConfig(2, 1.0))
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 1})
    for path, leaf in abstract.flat_state():
        value = leaf.get_value()
        cut = [axis for axis in partition_spec(path, value.shape, mesh) if axis]
        kernel = path[-1] in ("kernel", "embedding", "head", "positions")
        assert len(cut) == 2 if kernel and path[-1] != "positions" else len(cut) <= 1, path


def test_mesh_of_more_devices_than_there_are_is_refused(raises_input_error):
    count = len(jax.devices())
    with raises_input_error("config.mesh", f"data 1 x fsdp {count + 1} x tensor 1", f"{count} device(s)"):
        make_mesh(fsdp=count + 1)
    with raises_input_error("config.mesh", "tensor 0"):
        make_mesh(1, 1, 0)


def test_place_puts_the_values_unchanged():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    np.testing.assert_array_equal(place(("embedding",), values, mesh), values)


@pytest.mark.parametrize(("kv_heads", "heads"), [(8, "tensor"), (4, "tensor"), (3, None), (2, None)])
def test_prefixes_lie_with_the_heads_that_read_them(kv_heads, heads):
    mesh = jax.sharding.AbstractMesh((1, 2, 4), AXES)
    assert prefix_sharding(mesh, kv_heads).spec == P(("data", "fsdp"), None, None, heads, None)


@pytest.fixture(scope="module")
def on_meshes(on_eight_devices):
    """What a process of eight host devices reports, by family and mesh."""
    return on_eight_devices("-m", "tests.models.on_meshes")


CASES = [(family, mesh) for family in FAMILIES for mesh in meshes(architecture(family))]
each_case = pytest.mark.parametrize(("family", "mesh"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))


def of(on_meshes, family: str, mesh: MeshShape) -> dict:
    return on_meshes[family][",".join(map(str, mesh))]


@each_case
def test_states_and_logits_on_a_mesh_are_those_of_one_device(family, mesh, on_meshes):
    found = of(on_meshes, family, mesh)
    assert found["error"] < 1e-5
    assert found["spread"] > 1  # of the logits: these are no zeros


@each_case
def test_weights_are_gathered_a_layer_at_a_time(family, mesh, on_meshes):
    arch = architecture(family)
    shapes = [leaf.get_value().shape for _, leaf in abstract_decoder(arch)[1].flat_state()]
    kernels = [shape[1] * shape[2] for shape in shapes if len(shape) == 3]
    table = arch.vocab_size * arch.width
    assert table < arch.num_layers * min(kernels)  # what may be gathered at once is less than any stack
    gathers = [c for c in of(on_meshes, family, mesh)["collectives"] if c["kind"] == "all-gather"]
    # heads that "tensor" cuts through are put together before attention
    queries = 0 if arch.num_heads % mesh.tensor == 0 else SHAPE.tokens * arch.num_heads * arch.head_dim
    assert max((c["size"] for c in gathers if c["looped"]), default=0) <= max(*kernels, queries)
    assert max((c["size"] for c in gathers if not c["looped"]), default=0) <= table


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_gathers_each_kernel_of_a_layer_once_and_sums_nothing(family, on_meshes):
    looped = [c["kind"] for c in of(on_meshes, family, MeshShape(1, 8, 1))["collectives"] if c["looped"]]
    kernels = 7 if (BASE | FAMILIES[family]).get("gated", True) else 6
    assert looped == ["all-gather"] * 2 * kernels  # in the pass of the prefix and in that of the rows


@pytest.mark.parametrize("family", [family for family, mesh in CASES if mesh == (1, 1, 8)])
def test_tensor_parallelism_is_two_sums_a_layer(family, on_meshes):
    looped = [c["kind"] for c in of(on_meshes, family, MeshShape(1, 1, 8))["collectives"] if c["looped"]]
    sums = 1 if architecture(family).parallel else 2  # what a parallel block adds to the stream is added first
    assert looped == ["all-reduce"] * 2 * sums
