"""Bytes against closed forms, and against what XLA says of compiled programs."""


import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxscape.data.batches import BatchShape, pack
from jaxscape.finetune.objective import TrainingBatch, train_step
from jaxscape.models import memory
from jaxscape.models.decoder import REMAT, Decoder, Prefix, abstract_decoder
from jaxscape.models.families import from_hf_config
from jaxscape.models.lora import LoraConfig, LoraParam
from jaxscape.models.memory import Training, Work, device_memory, parameter_count, training_memory
from jaxscape.models.sharding import MeshShape
from tests.models.on_meshes import FAMILIES, architecture
from tests.published import LLAMA_3_8B, LLAMA_3_70B

EIGHT_B, SEVENTY_B = from_hf_config(LLAMA_3_8B), from_hf_config(LLAMA_3_70B)
WORK = Work(tokens=16_384, rows=128, longest=600, prefix=3000, logits=128_256)  # 5-shot, 16k tokens a batch


@pytest.mark.parametrize(("arch", "count"), [(EIGHT_B, 8_030_261_248), (SEVENTY_B, 70_553_706_496)])
def test_parameters_of_published_models(arch, count):
    assert parameter_count(arch) == count
    alone = device_memory(arch, jnp.bfloat16, MeshShape(1, 1, 1), WORK)
    assert alone.parameters == 2 * count
    assert alone.copies == 0
    # two caches, keys and values, of every layer and token: 8 heads of 128 features, in 2 bytes
    assert alone.prefix == 2 * 2 * arch.num_layers * 3000 * 8 * 128 * 2
    assert alone.states == 2 * arch.num_layers * 128 * arch.width * 2
    assert alone.logits == 128 * 128_256 * (2 + 4) + 128_256 * arch.width * 2
    # the MLP's gate, up and product, beside the stream and its update
    assert alone.activations >= 16_384 * (2 * arch.width + 3 * arch.mlp_width) * 2


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 8, 1), (2, 2, 2), (8, 1, 1)])
def test_parameters_on_a_mesh_are_the_kernels_parts_and_the_small_ones_whole(shape):
    shape = MeshShape(*shape)
    norms = (2 * 80 + 1) * 8192
    part = (70_553_706_496 - norms) // (shape.fsdp * shape.tensor) + norms
    found = device_memory(SEVENTY_B, jnp.bfloat16, shape, WORK)
    assert found.parameters == 2 * part
    layer = 2 * (70_553_706_496 - norms - 2 * 128_256 * 8192) // 80  # bytes
    gathered = 2 * (layer // shape.tensor - layer // shape.tensor // shape.fsdp)
    assert found.copies == pytest.approx(gathered, rel=1e-3)
    assert found.prefix == device_memory(SEVENTY_B, jnp.bfloat16, MeshShape(), WORK).prefix // shape.tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_every_family_are_those_of_the_arrays(family):
    arch = architecture(family)
    _, state = nnx.split(nnx.eval_shape(lambda: Decoder(arch, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert device_memory(arch, jnp.bfloat16, MeshShape(), WORK).parameters == size


LORA = LoraConfig(16, 32.0)

# -- against XLA -------------------------------------------------------------------------------------------------------

MEDIUM = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
          "num_key_value_heads": 4, "intermediate_size": 2048}  # fmt: skip


def temporary(arch, dtype, work: Work, cache: bool) -> tuple[int, int]:
    """Bytes of arguments and of temporaries of the pass of rows, or of the one that makes the cache."""
    graphdef, abstract = abstract_decoder(arch, dtype=dtype)
    shape = BatchShape(work.prefix, 1, work.prefix) if cache else BatchShape(work.tokens, work.rows, work.longest)
    batch = pack([[1] * (shape.tokens // shape.rows)] * shape.rows, shape)
    if cache:
        compiled = jax.jit(lambda s, b: nnx.merge(graphdef, s)(b, keep_keys=True)[2:]).lower(abstract, batch).compile()
    else:
        cached = jax.ShapeDtypeStruct((arch.num_layers, work.prefix, arch.num_kv_heads, arch.head_dim), dtype)
        prefix = Prefix(cached, cached, jax.ShapeDtypeStruct((), jnp.int32)) if work.prefix else None

        def run(state, batch, prefix):
            model = nnx.merge(graphdef, state)
            out = model(batch, prefix, sites=("residual",))
            return out.states, model.logits(out.hidden).astype(jnp.float32)

        compiled = jax.jit(run).lower(abstract, batch, prefix).compile()
    found = compiled.memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is alive at once depends on the device")
@pytest.mark.parametrize(
    ("dtype", "work", "cache"),
    [
        (jnp.float32, Work(2048, 16, 128, logits=4096), False),
        (jnp.float32, Work(2048, 4, 512, logits=4096), False),
        (jnp.float32, Work(1024, 16, 64, 1024, logits=4096), False),
        (jnp.float32, Work(8, 1, 8, 1536, logits=4096), True),
        (jnp.bfloat16, Work(2048, 16, 128, logits=4096), False),
    ],
)
def test_memory_is_within_a_factor_of_two_of_what_xla_allocates(dtype, work, cache):
    arch = from_hf_config(LLAMA_3_8B | MEDIUM)
    expected = device_memory(arch, dtype, MeshShape(), work, "cpu")
    arguments, temporaries = temporary(arch, dtype, work, cache)
    unused = arch.vocab_size * arch.width * jnp.dtype(dtype).itemsize if cache else 0  # the head
    assert arguments == pytest.approx(expected.parameters - unused + (0 if cache else expected.prefix / 2), rel=0.01)
    counted = expected.activations + expected.copies + (0 if cache else expected.logits)
    assert counted / 2 < temporaries < 1.5 * counted


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is alive at once depends on the device")
@pytest.mark.parametrize(("adapters", "remat"), [(None, remat) for remat in REMAT] + [(LORA, "elementwise")])
def test_memory_of_a_training_step_is_within_a_factor_of_two_of_what_xla_allocates(adapters, remat):
    arch, step = from_hf_config(LLAMA_3_8B | MEDIUM), Training(1024, 8, 128, adapters, remat)
    graphdef, params = abstract_decoder(arch, lora=adapters)
    trainable, frozen = params, nnx.State({})
    if adapters:
        graphdef, trainable, frozen = nnx.split(nnx.merge(graphdef, params), LoraParam, ...)
    optimizer = optax.adamw(1e-3)
    batch = jax.tree.map(lambda x: x[None, None], pack([[1] * 128] * 8, BatchShape(1024, 8, 128)))
    data = TrainingBatch(batch, np.zeros((1, 1, 8), np.int32), np.ones((1, 1, 8), np.float32))

    def run(trainable, opt_state, frozen, data):
        return train_step(graphdef, optimizer, trainable, frozen, opt_state, data, None, remat=remat)

    opt_state = jax.eval_shape(optimizer.init, trainable)
    found = jax.jit(run, donate_argnums=(0, 1)).lower(trainable, opt_state, frozen, data).compile().memory_analysis()
    expected = training_memory(arch, jnp.float32, MeshShape(), step, "cpu")
    # gradients are temporaries, moments are arguments
    gradients = expected.optimizer // 3
    if adapters is None:
        assert gradients == expected.parameters
    assert found.argument_size_in_bytes == pytest.approx(expected.parameters + 2 * gradients, rel=0.01)
    counted = gradients + expected.activations + expected.logits
    assert counted / 2 < found.temp_size_in_bytes < 1.5 * counted


@pytest.mark.parametrize("rank", [8, 64])
def test_adapters_have_masters_gradients_and_moments_in_float32(rank):
    lora = LoraConfig(rank, 16.0, targets=("q", "down"))
    step = Training(1536, 12, 128, lora, "blocks")
    numbers = 32 * rank * ((4096 + 4096) + (14336 + 4096))
    alone = device_memory(EIGHT_B, jnp.bfloat16, MeshShape(), WORK)
    found = training_memory(EIGHT_B, jnp.bfloat16, MeshShape(), step)
    assert found.parameters == alone.parameters + 4 * numbers
    assert found.optimizer == 3 * 4 * numbers
    in_parts = training_memory(EIGHT_B, jnp.bfloat16, MeshShape(), step._replace(parts=4, state=1.0))
    assert in_parts.optimizer == 3 * 4 * numbers  # one moment less, but gradients are added up


def test_all_weights_in_training_are_float32_whatever_is_computed_in():
    step = Training(1536, 12, 128, None, "blocks")
    half, whole = (training_memory(EIGHT_B, dtype, MeshShape(), step) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.parameters == whole.parameters == 4 * 8_030_261_248
    assert half.optimizer == whole.optimizer == 3 * half.parameters
    assert half.copies >= 128_256 * 4096 * 2 and whole.copies == 0  # the head in bfloat16
    assert half.activations < whole.activations


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (2, 2, 1)])
def test_lanes_share_the_rows_of_a_step_and_fsdp_the_rest(shape):
    step = Training(2048, 16, 128, None, "elementwise")
    alone = training_memory(EIGHT_B, jnp.float32, MeshShape(), step)
    found = training_memory(EIGHT_B, jnp.float32, MeshShape(*shape), step)
    assert found.activations == alone.activations // 4 and found.logits == alone.logits // 4
    assert found.optimizer == pytest.approx(alone.optimizer / shape[1], rel=1e-3)
    uneven = training_memory(EIGHT_B, jnp.float32, MeshShape(*shape), step._replace(rows=17))
    assert uneven.logits == alone.logits // 16 * 5


def test_rough_work_bounds_prompts_that_are_not_tokenised_yet():
    # tokens of English: a word each
    shared, own = "shot " * 200, "word " * 300
    work = memory.rough_work([shared + own, shared + "word " * 40, "alone " * 250], [shared, shared, ""], 1024, EIGHT_B)
    assert 300 <= work.longest < 600  # what two prompts begin with runs once,
    assert 200 <= work.prefix < 400
    assert work.tokens == 1024 and 1024 // 300 < work.rows < 1024
    permuted = memory.rough_work([shared + own, own + shared], [shared, own], 1024, EIGHT_B)
    assert permuted.longest >= 500 and permuted.prefix == 0  # what one does isn't shared
    assert memory.rough_work([own], [""], 16, EIGHT_B).tokens >= 300  # the longest prompt runs, whatever the budget
    assert memory.rough_work(["word " * 10**5], [""], 16, EIGHT_B).longest == EIGHT_B.max_positions


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 MB"), (5e6, "5.0 MB"), (2.5e8, "0.2 GB"), (1.6e10, "16.0 GB"), (1.41e11, "141 GB")]
)
def test_readable(size, text):
    assert memory.readable(size) == text


def test_larger_batches_need_more():
    for field in ("tokens", "rows", "longest", "prefix", "sites"):
        more = WORK._replace(**{field: 2 * getattr(WORK, field)})
        assert device_memory(EIGHT_B, jnp.bfloat16, MeshShape(), more).total > np.sum(
            device_memory(EIGHT_B, jnp.bfloat16, MeshShape(), WORK)), field
