"""Meshes against what they must satisfy: they hold the model, and use what there is."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.errors import InputError
from jaxscape.models.families import from_hf_config
from jaxscape.models.lora import LoraConfig
from jaxscape.models.memory import Training, Work, device_memory, training_memory
from jaxscape.models.mesh import USABLE, Devices, Needs, choose_shape, local_devices
from jaxscape.models.sharding import MeshShape
from tests.published import LLAMA_3_8B, LLAMA_3_70B

EIGHT_B, SEVENTY_B = from_hf_config(LLAMA_3_8B), from_hf_config(LLAMA_3_70B)
WORK = Work(tokens=16_384, rows=128, longest=600, prefix=3000, logits=128_256)  # 5-shot, 16k tokens a batch


def devices(count: int, gigabytes: float = 80, per_host: int = 8) -> Devices:
    return Devices(count, min(count, per_host), int(gigabytes * 1e9), "H100")


@pytest.mark.parametrize(
    ("arch", "dtype", "there", "expected"),
    [
        (EIGHT_B, jnp.bfloat16, devices(1), (1, 1, 1)),
        (EIGHT_B, jnp.float32, devices(1), (1, 1, 1)),
        (EIGHT_B, jnp.bfloat16, devices(8), (8, 1, 1)),  # a copy on each
        (EIGHT_B, jnp.bfloat16, devices(8, 16), (4, 1, 2)),
        (SEVENTY_B, jnp.bfloat16, devices(8), (2, 1, 4)),  # 35 GB of weights a device: two copies run at once
        (SEVENTY_B, jnp.bfloat16, devices(8, 40), (1, 1, 8)),
        (SEVENTY_B, jnp.float32, devices(8), (1, 1, 8)),
        (SEVENTY_B, jnp.float32, devices(16, 40), (1, 2, 8)),  # 8 devices a host, 8 key heads
        (SEVENTY_B, jnp.bfloat16, devices(16, 40, per_host=4), (2, 2, 4)),
    ],
)
def test_the_fewest_parts_that_fit(arch, dtype, there, expected):
    choice = choose_shape(Needs(arch, dtype, WORK), there)
    assert choice.shape == expected
    assert choice.memory == device_memory(arch, dtype, choice.shape, WORK)
    assert choice.memory.total <= USABLE * there.bytes
    line = str(choice)
    assert "\n" not in line and str(choice.shape) in line and f"{there.count} x H100" in line


def test_heads_that_two_does_not_divide_are_left_to_fsdp():
    arch = from_hf_config(LLAMA_3_8B | {"num_attention_heads": 33, "num_key_value_heads": 3, "head_dim": 128})
    needs = Needs(arch, jnp.bfloat16, WORK._replace(tokens=2048, rows=16))
    assert choose_shape(needs, devices(8, 16)).shape.tensor == 1


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((0, 0, 8), (1, 1, 8)),
        ((0, 8, 0), (1, 8, 1)),
        ((0, 0, 2), (2, 2, 2)),  # two parts are too large
        ((1, 0, 0), (1, 1, 4)),
        ((1, 1, 8), (1, 1, 8)),
        ((1, 1, 1), (1, 1, 1)),  # too large, but as asked
    ],
)
def test_axes_that_are_set_stay(wanted, expected):
    # 70B in bfloat16 with little else: 2 parts need 71 GB
    small = Work(2048, 16, 128, 512)
    found = choose_shape(Needs(SEVENTY_B, jnp.bfloat16, small), devices(8, 70), MeshShape(*wanted))
    assert found.shape == expected
    assert "config.mesh" in found.why


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((-1, 0, 0), ("config.mesh", "data -1", "8 device(s)")),
        ((3, 3, 0), ("config.mesh", "fsdp 3", "8 device(s)")),
        ((0, 0, 16), ("config.mesh", "tensor 16")),
        ((0, 3, 0), ("config.mesh", "fsdp 3", "0 chooses")),
    ],
)
def test_axes_that_do_not_fit_are_refused(wanted, words, raises_input_error):
    with raises_input_error(*words):
        choose_shape(Needs(EIGHT_B, jnp.bfloat16, WORK), devices(8), MeshShape(*wanted))


@pytest.mark.parametrize(
    ("arch", "dtype", "there", "work", "words"),
    [
        (SEVENTY_B, jnp.float32, devices(4), WORK, ("4 x H100", "bfloat16", "use 8 such devices")),
        (SEVENTY_B, jnp.bfloat16, devices(1), WORK, ("141 GB of parameters", "80.0 GB", "use 4 such devices")),
        (EIGHT_B, jnp.bfloat16, devices(1, 26), WORK, ("config.collect.token_budget to 8192", "use 2 such devices")),
        (EIGHT_B, jnp.bfloat16, devices(1, 0.1), WORK, ("larger devices", "tries anyway")),
    ],
)
def test_what_does_not_fit_says_how_much_is_needed_and_what_helps(arch, dtype, there, work, words, raises_input_error):
    with raises_input_error("the model does not fit", *words):
        choose_shape(Needs(arch, dtype, work), there)


def test_fine_tuning_counts_too(raises_input_error):
    step = Training(1536, 12, 128, None, "blocks")
    needs = Needs(EIGHT_B, jnp.bfloat16, WORK, step)
    choice = choose_shape(needs, devices(8, 70))
    # parameters, gradients and two moments are 128 GB in float32: two parts of 64 don't fit 63
    assert choice.shape == (2, 1, 4)
    assert choice.memory == training_memory(EIGHT_B, jnp.bfloat16, MeshShape(2, 1, 4), step)
    adapters = step._replace(adapters=LoraConfig(16, 32.0))
    assert choose_shape(needs._replace(step=adapters), devices(8, 70)).shape == (8, 1, 1)
    with raises_input_error("config.finetune.method=lora", "of gradients and moments", "use 4 such devices"):
        choose_shape(needs, devices(1, 70))
    large = adapters._replace(tokens=600_000, rows=600, longest=1000)
    with raises_input_error("raise config.finetune.accumulation"):
        choose_shape(needs._replace(step=large), devices(1, 80))


def test_the_advice_holds():
    assert choose_shape(Needs(SEVENTY_B, jnp.float32, WORK), devices(8))
    assert choose_shape(Needs(SEVENTY_B, jnp.bfloat16, WORK), devices(4))
    assert choose_shape(Needs(EIGHT_B, jnp.bfloat16, WORK._replace(tokens=8192, rows=64)), devices(1, 26))
    with pytest.raises(InputError):
        choose_shape(Needs(SEVENTY_B, jnp.bfloat16, WORK), devices(2))


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 24),
    per_host=st.sampled_from([1, 2, 4, 8]),
    gigabytes=st.sampled_from([8, 16, 24, 48, 80]),
    kv_heads=st.sampled_from([1, 2, 3, 8]),
)
def test_a_chosen_mesh_fits_and_uses_every_device(count, per_host, gigabytes, kv_heads):
    arch = from_hf_config(LLAMA_3_8B | {"num_attention_heads": 24, "num_key_value_heads": kv_heads, "head_dim": 128})
    there, work = devices(count, gigabytes, per_host), Work(2048, 16, 128, 512)
    try:
        shape, found, *_ = choose_shape(Needs(arch, jnp.bfloat16, work), there)
    except InputError:
        smallest = min(device_memory(arch, jnp.bfloat16, MeshShape(1, n, 1), work).total for n in divisors(count))
        assert smallest > USABLE * there.bytes
        return
    assert math.prod(shape) == count
    assert shape.tensor <= there.per_host and kv_heads % shape.tensor == 0
    assert found.total <= USABLE * there.bytes
    if shape.fsdp * shape.tensor > 1:
        assert device_memory(arch, jnp.bfloat16, MeshShape(), work).total > USABLE * there.bytes


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def test_devices_of_this_process():
    found = local_devices()
    assert found.count == jax.device_count() and found.kind == jax.devices()[0].device_kind
    assert 2**28 < found.bytes < 2**45
