import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxscape.data.batches import BatchShape, pack
from jaxscape.finetune import objective
from jaxscape.finetune.config import FinetuneConfig
from jaxscape.finetune.objective import TrainingBatch, answer_loss
from jaxscape.finetune.optimizers import optimizer, schedule
from jaxscape.models.decoder import REMAT
from jaxscape.models.lora import LoraConfig, LoraParam
from jaxscape.models.peft import read_adapter
from jaxscape.models.pretrained import attach_adapters, values_of, with_values

ROWS = [[5, 9, 200, 31, 7], [8, 44, 301], [12, 13, 14, 15, 16, 17, 18]]
TARGETS = [33, 34, 35]


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


SHAPE = BatchShape(24, 5, 9)  # with room: 15 tokens in three rows of 7 at most come in


def batch(rows=ROWS, targets=TARGETS, weights=None, shape=None):
    """A step's batch of one part on one lane."""
    shape = shape or BatchShape(sum(map(len, rows)), len(rows), max(map(len, rows)))
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights)
    fill = [0] * (shape.rows - len(rows))
    one = TrainingBatch(pack(rows, shape), np.array([*targets, *fill], np.int32),
                        np.array([*weights / weights.sum(), *fill], np.float32))  # fmt: skip
    return jax.tree.map(lambda x: x[None, None], one)


def loss_of(graphdef, data, remat="none", key=None):
    one = jax.tree.map(lambda x: x[0, 0], data)
    return lambda params: answer_loss(nnx.merge(graphdef, params), *one, key, remat=remat)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(graphdef, params, data):
    return loss_of(graphdef, data)(params)


def evaluate(model, params, data):
    return _evaluate(model.graphdef, params, data)


def gradients(model, data, remat="none", key=None):
    (loss, accuracy), found = jax.jit(
        jax.value_and_grad(loss_of(model.graphdef, data, remat, key), has_aux=True)
    )(model.params)  # fmt: skip
    return float(loss), float(accuracy), {path: np.asarray(v) for path, v in values_of(found).items()}


@pytest.fixture(scope="module")
def reference(tiny_model):
    with jax.default_matmul_precision("float32"):
        return gradients(tiny_model, batch())


def test_loss_and_gradients_are_those_of_torch(tiny_model, tiny_llama, reference):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    losses = []
    for row, target in zip(ROWS, TARGETS, strict=True):
        logits = model(torch.tensor([row])).logits[0, -1]
        losses.append(torch.nn.functional.cross_entropy(logits[None], torch.tensor([target])))
    total = torch.stack(losses).mean()
    total.backward()
    loss, _, found = reference
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    named = {name: p.grad.numpy() for name, p in model.named_parameters()}
    pairs = {("embedding",): named["model.embed_tokens.weight"], ("final_norm", "scale"): named["model.norm.weight"]}
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        norms = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        pairs |= {("blocks", ours, "scale", layer): named[f"{prefix}{theirs}.weight"] for ours, theirs in norms.items()}
        for part, module, kernels in (("attention", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down"))):
            for kernel in kernels:
                theirs = named[f"{prefix}{module}.{kernel}_proj.weight"].T
                pairs[("blocks", part, kernel, "kernel", layer)] = theirs
    assert len(pairs) == 2 + 4 * 9
    for path, theirs in pairs.items():
        ours = found[path[:-1]][path[-1]] if isinstance(path[-1], int) else found[path]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=str(path))


def test_uniform_logits_cost_log_v(tiny_model):
    values = values_of(tiny_model.params)
    params = with_values(tiny_model.params, {**values, ("embedding",): jnp.zeros_like(values["embedding",])})
    loss, accuracy = evaluate(tiny_model, params, batch())
    assert float(loss) == pytest.approx(np.log(384), rel=1e-6)
    assert float(accuracy) == 0.0  # the most likely of equals is token 0


def test_loss_is_the_mean_of_the_rows(tiny_model):
    def loss(**changes):
        return float(evaluate(tiny_model, tiny_model.params, batch(shape=SHAPE, **changes))[0])

    alone = [loss(rows=[row], targets=[target]) for row, target in zip(ROWS, TARGETS, strict=True)]
    assert loss() == pytest.approx(np.mean(alone), rel=1e-5)
    assert loss(weights=[1, 0, 3]) == pytest.approx((alone[0] + 3 * alone[2]) / 4, rel=1e-5)


def test_accuracy_counts_the_most_likely_token(tiny_model):
    model = nnx.merge(tiny_model.graphdef, tiny_model.params)
    logits = np.asarray(model.logits(model(jax.tree.map(lambda x: x[0, 0], batch().batch)).hidden))
    likely = logits.argmax(axis=1).tolist()
    assert float(evaluate(tiny_model, tiny_model.params, batch(targets=likely))[1]) == 1.0
    assert float(evaluate(tiny_model, tiny_model.params, batch(targets=[likely[0], 1, 2]))[1]) == pytest.approx(1 / 3)


def test_empty_rows_change_nothing(tiny_model, reference):
    loss, accuracy, found = gradients(tiny_model, batch(shape=SHAPE))
    assert loss == pytest.approx(reference[0], rel=1e-6) and accuracy == reference[1]
    for path, value in found.items():
        np.testing.assert_allclose(value, reference[2][path], rtol=1e-4, atol=1e-6, err_msg=str(path))


def test_gradients_are_the_slope_of_the_loss(tiny_model, reference):
    values = {path: np.asarray(v) for path, v in values_of(tiny_model.params).items()}
    loss = jax.jit(lambda v: loss_of(tiny_model.graphdef, batch())(with_values(tiny_model.params, v))[0])
    draw = np.random.default_rng(0)
    for _ in range(3):
        direction = {p: (draw.normal(size=v.shape) * np.abs(v).mean()).astype(np.float32) for p, v in values.items()}
        h = 5e-3  # four points: the loss is a float32, so that a small step would show its rounding
        at = {m: float(loss({p: v + m * h * direction[p] for p, v in values.items()})) for m in (-2, -1, 1, 2)}
        slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        expected = sum(float(np.sum(direction[path] * reference[2][path])) for path in values)
        assert slope == pytest.approx(expected, rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_recomputing_changes_no_gradient(remat, tiny_model, reference):
    loss, _, found = gradients(tiny_model, batch(), remat)
    assert loss == pytest.approx(reference[0], rel=1e-6)
    for path, value in found.items():
        scale = np.abs(reference[2][path]).max()
        np.testing.assert_allclose(value, reference[2][path], rtol=1e-5, atol=1e-5 * scale, err_msg=str(path))


def test_recomputing_draws_the_same_dropout(tiny_model):
    graphdef, state = attach_adapters(tiny_model, LoraConfig(4, 8.0, 0.5, ("q",)), seed=0)
    draw = np.random.default_rng(0)
    values = {path: jnp.asarray(0.1 * draw.normal(size=v.shape), v.dtype) if path[-1] == "b" else v
              for path, v in values_of(state).items()}  # fmt: skip
    model = tiny_model._replace(graphdef=graphdef, params=with_values(state, values))
    found = {remat: gradients(model, batch(), remat, jax.random.key(3)) for remat in ("none", "blocks")}
    assert found["none"][0] == pytest.approx(found["blocks"][0], rel=1e-6)
    for path, value in found["none"][2].items():
        np.testing.assert_allclose(found["blocks"][2][path], value, rtol=1e-4, atol=1e-5, err_msg=str(path))
    assert found["none"][0] != pytest.approx(float(evaluate(model, model.params, batch())[0]), rel=1e-4)  # no dropout


# -- parts and lanes ---------------------------------------------------------------------------------------------------


def split(parts, lanes, shape):
    """ROWS with the weights of one batch, dealt to parts and lanes; some bins stay empty."""
    bins = [([], [], []) for _ in range(parts * lanes)]
    for number, (row, target, weight) in enumerate(zip(ROWS, TARGETS, (0.2, 0.5, 0.3), strict=True)):
        for held, value in zip(bins[number % len(bins)], (row, target, weight), strict=True):
            held.append(value)
    made = []
    for rows, targets, weights in bins:
        fill = [0] * (shape.rows - len(rows))
        made.append(TrainingBatch(pack(rows, shape), np.array([*targets, *fill], np.int32),
                                  np.array([*weights, *fill], np.float32)))  # fmt: skip
    stacked = jax.tree.map(lambda *x: np.stack(x), *made)
    return jax.tree.map(lambda x: x.reshape(parts, lanes, *x.shape[1:]), stacked)


@pytest.mark.parametrize(("parts", "lanes"), [(3, 1), (2, 2)])
def test_parts_and_lanes_add_up_to_the_whole(parts, lanes, tiny_model):
    def found(data):
        step = jax.jit(objective.gradients, static_argnames=("graphdef", "remat"))
        return step(tiny_model.graphdef, tiny_model.params, nnx.State({}), data, remat="blocks")

    loss, accuracy, whole = found(batch(weights=[0.2, 0.5, 0.3]))
    parted = found(split(parts, lanes, SHAPE))
    assert float(parted[0]) == pytest.approx(float(loss), rel=1e-6) and float(parted[1]) == float(accuracy)
    theirs = values_of(parted[2])
    for path, value in values_of(whole).items():
        scale = float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(theirs[path], value, rtol=1e-4, atol=2e-6 * scale, err_msg=str(path))


def test_bfloat16_computes_near_float32_and_keeps_float32_masters(tiny_model, reference):
    data = batch()
    step = jax.jit(objective.gradients, static_argnames=("graphdef", "dtype"))
    loss, _, found = step(tiny_model.graphdef, tiny_model.params, nnx.State({}), data, dtype=jnp.bfloat16)
    assert float(loss) == pytest.approx(reference[0], rel=2e-2) and float(loss) != pytest.approx(reference[0], rel=1e-6)
    for path, value in values_of(found).items():
        expected = reference[2][path]
        assert value.dtype == jnp.float32
        assert np.linalg.norm(value - expected) < 0.1 * np.linalg.norm(expected) + 1e-6, path


# -- ten steps of transformers and PEFT --------------------------------------------------------------------------------

TRAINING = Path(__file__).parent.parent / "fixtures" / "training"
TEN = FinetuneConfig(
    method="lora", lora=LoraConfig(4, 8.0), dtype="float32", optimizer="adamw(b2=0.98, weight_decay=0.02)",
    learning_rate=5e-3, steps=10, batch_size=4, accumulation=1, warmup_ratio=0.2, final_ratio=0.01, clip_norm=1.0,
    remat="elementwise", packing=False, evaluations=0, checkpoints=1, save_every=10, keep=1, seed=0,
)  # fmt: skip


def shown():
    """What tests/fixtures/make_training.py shows, step by step; it draws in this order."""
    rng = np.random.default_rng(0)
    tokens = [[rng.integers(0, 384, rng.integers(3, 9)).tolist() for _ in range(4)] for _ in range(10)]
    targets, weights = rng.integers(30, 34, (10, 4)), rng.uniform(0.5, 2, (10, 4)).astype(np.float32)
    return [batch(rows, to, weight, BatchShape(32, 4, 8)) for rows, to, weight in zip(tokens, targets, weights,
                                                                                      strict=True)]  # fmt: skip


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "full"])
def test_ten_steps_are_those_of_transformers_and_peft(case, tiny_model):
    model, folder = tiny_model, TRAINING / case
    if case == "full":
        graphdef, trainable, frozen = nnx.split(nnx.merge(model.graphdef, model.params), nnx.Param, ...)
        trainable = jax.tree.map(jnp.copy, trainable)  # the fixture's arrays are given to the step
    else:
        lora, first = read_adapter(folder / "start", model.arch)
        graphdef, state = attach_adapters(model, lora, 0)
        state = with_values(state, {**values_of(state), **{path: jnp.asarray(v) for path, v in first.items()}})
        graphdef, trainable, frozen = nnx.split(nnx.merge(graphdef, state), LoraParam, ...)
    step = jax.jit(objective.train_step, static_argnames=("graphdef", "optimizer", "remat"))
    update = optimizer(TEN)
    opt_state, log = update.init(trainable), []
    for data in shown():
        trainable, opt_state, metrics = step(
            graphdef, update, trainable, frozen, opt_state, data, None, remat=TEN.remat)
        log.append(metrics)
    theirs = np.load(folder / "log.npz")
    np.testing.assert_allclose([schedule(TEN)(number) for number in range(10)], theirs["learning_rate"], rtol=1e-6)
    np.testing.assert_allclose([m.loss for m in log], theirs["loss"], rtol=2e-5)
    np.testing.assert_allclose([m.gradient_norm for m in log], theirs["gradient_norm"], rtol=2e-4)
    ours = values_of(trainable)
    if case == "full":
        end = load_file(folder / "end.safetensors")
        q = end["model.layers.1.self_attn.q_proj.weight"].astype(np.float32).T
        np.testing.assert_allclose(ours["blocks", "attention", "q", "kernel"][1], q, rtol=2e-3, atol=2e-4)
        return
    _, last = read_adapter(folder / "end", model.arch)
    for path, value in last.items():
        # Adam divides by the gradient's own size: where that is all rounding, a step may point anywhere
        off = np.abs(ours[path] - value)
        assert np.linalg.norm(off) < 1e-3 * np.linalg.norm(value - first[path]) + 1e-6, path
