import dataclasses

import pytest

from jaxscape.models.architecture import Architecture, LayerKind, Rotary

SLIDING, FULL = LayerKind(window=4, rotary=Rotary((1.0, 0.1))), LayerKind()
SHAPE = dict(
    vocab_size=96, width=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40, norm_eps=1e-5,
    tie_embeddings=True, max_positions=128, kinds=(SLIDING, FULL),
)  # fmt: skip


def test_an_architecture_hashes_so_that_it_can_shape_a_compiled_program():
    arch = Architecture(**SHAPE)
    assert hash(arch) == hash(Architecture(**SHAPE))
    assert arch == Architecture(**SHAPE) != Architecture(**SHAPE, parallel=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.width = 3


def test_all_layers_are_of_the_first_kind_unless_it_says_otherwise():
    assert Architecture(**SHAPE).kind_of_layer == (0, 0, 0, 0)
    assert Architecture(**SHAPE, layer_kinds=(0, 1, 1, 0)).kind_of_layer == (0, 1, 1, 0)


def test_heads_that_do_not_group_are_refused(raises_input_error):
    with raises_input_error("num_heads 4", "num_kv_heads 3"):
        Architecture(**SHAPE | {"num_kv_heads": 3})


@pytest.mark.parametrize("layer_kinds", [(0, 1, 1), (0,) * 5])
def test_kinds_of_some_other_number_of_layers_are_refused(layer_kinds, raises_input_error):
    with raises_input_error(f"layer_kinds names {len(layer_kinds)} layers", "num_layers is 4"):
        Architecture(**SHAPE, layer_kinds=layer_kinds)
