import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscape.finetune.config import FinetuneConfig
from jaxscape.finetune.optimizers import optimizer, schedule, state_shardings
from jaxscape.models.lora import LoraConfig

CONFIG = FinetuneConfig(
    method="lora", lora=LoraConfig(2, 4.0), dtype="float32", optimizer="adamw", learning_rate=1e-2, steps=20,
    batch_size=4, accumulation=1, warmup_ratio=0.0, final_ratio=0.1, clip_norm=0.0, remat="none", packing=False,
    evaluations=0, checkpoints=1, save_every=10, keep=1, seed=0,
)  # fmt: skip


def changed(**changes) -> FinetuneConfig:
    return dataclasses.replace(CONFIG, **changes)


def rate(config: FinetuneConfig, step: int) -> float:
    """The schedule in closed form."""
    warm = min(math.ceil(config.warmup_ratio * config.steps), config.steps - 1)
    if step < warm:
        return config.learning_rate * step / warm
    turned = min((step - warm) / (config.steps - warm), 1.0)
    share = config.final_ratio + (1 - config.final_ratio) * (1 + math.cos(math.pi * turned)) / 2
    return config.learning_rate * share


def steps_of(config: FinetuneConfig, start: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """The parameter after each gradient."""
    made, found = optimizer(config), []
    params, update = {"w": jnp.asarray(start)}, jax.jit(made.update)
    state = made.init(params)
    for gradient in gradients:
        change, state = update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, change)
        found.append(np.asarray(params["w"]))
    return found


@pytest.fixture(scope="module")
def problem():
    draw = np.random.default_rng(0)
    return draw.normal(size=(3, 4)).astype(np.float32), list(draw.normal(size=(12, 3, 4)).astype(np.float32))


@pytest.mark.parametrize("steps", [1, 2, 20, 97])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.3, 1.0])
def test_schedule_is_the_closed_form(steps, warmup_ratio):
    config = changed(steps=steps, warmup_ratio=warmup_ratio, final_ratio=0.01)
    found = [float(schedule(config)(step)) for step in range(steps + 3)]
    assert found == pytest.approx([rate(config, step) for step in range(steps + 3)], rel=1e-5, abs=1e-9)
    assert found[-1] == pytest.approx(1e-4, rel=1e-5)


def test_adamw_is_the_closed_form_and_has_no_decay(problem):
    start, gradients = problem
    found = steps_of(CONFIG, start, gradients)
    first, second, w = np.zeros_like(start), np.zeros_like(start), start.astype(np.float64)
    for number, (gradient, here) in enumerate(zip(gradients, found, strict=True)):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9 ** (number + 1)), second / (1 - 0.999 ** (number + 1))
        w = w - rate(CONFIG, number) * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(here, w, rtol=1e-5, atol=1e-6)


def test_adamw_with_options_is_torchs(problem):
    torch = pytest.importorskip("torch")
    start, gradients = problem
    config = changed(optimizer="adamw(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1)", warmup_ratio=0.2)
    w = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([w], lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for number, (gradient, here) in enumerate(zip(gradients, steps_of(config, start, gradients), strict=True)):
        theirs.param_groups[0]["lr"] = rate(config, number)
        w.grad = torch.tensor(gradient)
        theirs.step()
        np.testing.assert_allclose(here, w.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_sgd_with_momentum_is_the_closed_form(problem):
    start, gradients = problem
    trace, w = np.zeros_like(start), start.astype(np.float64)
    found = steps_of(changed(optimizer="sgd(momentum=0.9, nesterov=False)"), start, gradients)
    for number, (gradient, here) in enumerate(zip(gradients, found, strict=True)):
        trace = 0.9 * trace + gradient
        w = w - rate(CONFIG, number) * trace
        np.testing.assert_allclose(here, w, rtol=1e-5, atol=1e-6)


def test_lion_is_the_closed_form_and_has_no_decay(problem):
    start, gradients = problem
    trace, w = np.zeros_like(start), start.astype(np.float64)
    for number, (gradient, here) in enumerate(zip(gradients, steps_of(changed(optimizer="lion"), start, gradients),
                                                  strict=True)):  # fmt: skip
        w = w - rate(CONFIG, number) * np.sign(0.9 * trace + 0.1 * gradient)
        trace = 0.99 * trace + 0.01 * gradient
        np.testing.assert_allclose(here, w, rtol=1e-5, atol=1e-6)


def test_adafactor_follows_the_schedule_and_its_options():
    """Its first step of a small parameter: the gradient's signs, times the parameter's root mean square or not."""
    start, gradient = np.full((2, 3), 0.5, np.float32), np.array([[3, -1, 2], [-5, 1, 1]], np.float32)
    scaled = steps_of(changed(optimizer="adafactor"), start, [gradient])[0] - start
    plain = steps_of(changed(optimizer="adafactor(multiply_by_parameter_scale=False)"), start, [gradient])[0] - start
    np.testing.assert_allclose(plain, -1e-2 * np.sign(gradient), rtol=1e-4)
    np.testing.assert_allclose(scaled, 0.5 * plain, rtol=1e-4)
    late = steps_of(changed(optimizer="adafactor(multiply_by_parameter_scale=False)"), start, [gradient] * 21)
    np.testing.assert_allclose(late[20] - late[19], -1e-3 * np.sign(gradient), rtol=1e-2)


def test_adafactor_factors_the_kernels_of_each_layer():
    params = {"kernel": jnp.zeros((2, 128, 256))}
    state = optimizer(changed(optimizer="adafactor")).init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(2, 128), (2, 256)} <= shapes and (2, 128, 256) not in shapes


def test_muon_makes_each_layers_kernel_orthogonal_and_leaves_the_rest_to_adam():
    draw = np.random.default_rng(0)
    gradient = {"kernel": draw.normal(size=(2, 6, 6)), "embedding": draw.normal(size=(5, 6)), "norm": np.ones((2, 6))}
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    made = optimizer(changed(optimizer="contrib.muon(nesterov=False)"))
    change, _ = made.update(gradient, made.init(gradient), gradient)
    for layer, of_gradient in zip(np.asarray(change["kernel"]) / -1e-2, np.asarray(gradient["kernel"]), strict=True):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2.5  # five iterations bring them near 1
        assert np.linalg.cond(of_gradient) > 5
    np.testing.assert_allclose(change["embedding"], -1e-2 * np.sign(gradient["embedding"]), rtol=1e-4)
    np.testing.assert_allclose(change["norm"], -1e-2, rtol=1e-4)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 100.0])
def test_clip_is_of_the_global_norm(clip_norm):
    gradient = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([[40.0]])}  # norm 50
    made = optimizer(changed(optimizer="sgd", clip_norm=clip_norm))
    change, _ = made.update(gradient, made.init(gradient), gradient)
    share = 1 / 50 if clip_norm == 1.0 else 1
    np.testing.assert_allclose(change["a"], [-0.3 * share, 0], rtol=1e-6)
    np.testing.assert_allclose(change["b"], [[-0.4 * share]], rtol=1e-6)


@pytest.mark.parametrize(("name", "beside"), [
    ("adamw", {"kernel": 2, "norm": 2}), ("adafactor", {"norm": 1}), ("contrib.muon", {"kernel": 1, "norm": 2}),
    ("novograd", {"kernel": 1, "norm": 1}), ("sgd", {}),
])  # fmt: skip
def test_moments_live_beside_their_parameters(name, beside):
    mesh = jax.make_mesh((1,), ("data",))
    specs = {"kernel": PartitionSpec(None, "data"), "norm": PartitionSpec("data")}
    params = {"kernel": jnp.ones((2, 128, 256)), "norm": jnp.ones((2, 64))}
    params = {key: jax.device_put(value, NamedSharding(mesh, specs[key])) for key, value in params.items()}
    made = optimizer(changed(optimizer=name, clip_norm=1.0))
    found = state_shardings(made, params)
    state = jax.jit(made.init, out_shardings=found)(params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    there = {key: [leaf.shape for leaf in jax.tree.leaves(state) if leaf.sharding.spec == spec]
             for key, spec in specs.items()}  # fmt: skip
    assert {key: len(shapes) for key, shapes in there.items() if shapes} == beside
    assert all(shape == params[key].shape for key, shapes in there.items() for shape in shapes)


def test_equal_configurations_share_their_optimizer():
    assert optimizer(changed()) is optimizer(changed())
    assert optimizer(changed(optimizer="sgd")) is not optimizer(changed())


@pytest.mark.parametrize("name", ["nadamw", "lamb", "adan", " adam ( b1 = 0.5 ) ", "contrib.prodigy",
                                  "adamw(mu_dtype='bfloat16')", "rmsprop(momentum=None)"])  # fmt: skip
def test_others_of_optax_are_found(name, problem):
    start, gradients = problem
    assert (steps_of(changed(optimizer=name), start, gradients[:2])[-1] != start).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adamv", ["'adamv'", "choose from", "adamw", "contrib.muon"]),
        ("chain", ["'chain'", "choose from"]),
        ("scale_by_learning_rate", ["choose from"]),
        ("scale_by_adam", ["choose from"]),
        ("apply_updates", ["choose from"]),
        ("lbfgs", ["'lbfgs'", "choose from"]),
        ("contrib.schedule_free_adamw", ["choose from"]),
        ("contrib", ["choose from"]),
        ("numpy.array", ["'numpy.array'", "choose from"]),
        ("adamw(beta2=0.9)", ["adamw has no option 'beta2'", "b2", "weight_decay"]),
        ("adamw(learning_rate=1.0)", ["no option 'learning_rate'", "config.finetune.learning_rate"]),
        ("adamw(0.9)", ["options by name"]),
        ("adamw(**{'b1': 0.5})", ["options by name"]),
        ("adamw(b1=0.5, b1=0.6)", ["write a name"]),
        ("adamw(", ["write a name"]),
        ("", ["write a name"]),
        ("adamw; adam", ["write a name"]),
        ("(lambda: 1)()", ["write a name"]),
        ("adamw(b1=__import__('os'))", ["option b1", "plain value"]),
        ("adamw(b1='x')", ["can't train this way", "correct its options"]),
        ("contrib.ademamix(b1='x')", ["can't train this way"]),
    ],
)
def test_wrong_names_and_options_are_refused(name, words, raises_input_error):
    with raises_input_error("config.finetune.optimizer", *words):
        optimizer(changed(optimizer=name))
