import jax
import numpy as np
import pytest
from flax import nnx

from jaxscape.data.batches import BatchShape, pack
from jaxscape.models.lora import PROJECTIONS, Adapter, LoraConfig, LoraParam, init_adapter, low_ranks, zeroed
from jaxscape.models.pretrained import attach_adapters, fold_adapters, values_of, with_values

ROWS = ([3, 17, 250, 99, 41, 8, 3], [120, 9])


def trained(state, seed=5):
    """Adapters as training might leave them: both halves off zero. Path -> array."""
    rng = np.random.default_rng(seed)
    return {path: rng.normal(scale=0.1, size=value.shape).astype(np.float32)
            for path, value in values_of(state).items() if "adapter" in path}  # fmt: skip


@pytest.mark.parametrize(("targets", "dora"), [(PROJECTIONS, False), (PROJECTIONS, True), (("q", "v"), False)])
def test_merged_adapters_act_as_attached_ones(targets, dora, tiny_model, run_rows):
    lora = LoraConfig(rank=4, alpha=12.0, targets=targets, dora=dora)
    graphdef, state = attach_adapters(tiny_model, lora, seed=0)
    adapters = trained(state)
    assert {path[-3] for path in adapters} == set(targets)
    attached = tiny_model._replace(graphdef=graphdef, params=with_values(state, values_of(state) | adapters))
    shape = BatchShape(16, 3, 8)
    expected, expected_logits = run_rows(attached, ROWS, shape=shape)
    found, logits = run_rows(fold_adapters(tiny_model, lora, adapters), ROWS, shape=shape)
    plain, _ = run_rows(tiny_model, ROWS, shape=shape)

    def relative(a, b):
        return np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1))

    assert relative(found, expected) < 2e-6  # roundings only: x W + s (x A) B against x (W + s A B)
    assert relative(logits, expected_logits) < 2e-6
    assert relative(plain, expected) > 1e-2


def test_merging_adds_alpha_over_rank_times_a_b(tiny_model):
    lora = LoraConfig(rank=4, alpha=12.0, targets=("gate",))
    _, state = attach_adapters(tiny_model, lora, seed=0)
    adapters = trained(state)
    merged, before = values_of(fold_adapters(tiny_model, lora, adapters).params), values_of(tiny_model.params)
    gate = ("blocks", "mlp", "gate")
    a, b = (adapters[(*gate, "adapter", half)].astype(np.float64) for half in "ab")
    expected = np.asarray(before[(*gate, "kernel")], np.float64) + 3.0 * a.swapaxes(1, 2) @ b
    np.testing.assert_allclose(merged[(*gate, "kernel")], expected, rtol=1e-6, atol=1e-6)
    unchanged = set(before) - {(*gate, "kernel")}
    assert all(merged[path] is before[path] for path in unchanged)


def test_fresh_adapters_have_pefts_distribution():
    """kaiming_uniform(a=sqrt(5)): uniform within 1 / sqrt(inputs), so a variance of 1 / (3 inputs); B is zero."""
    inputs = 400
    a = np.asarray(init_adapter("a", (3, 16, inputs), jax.random.key(0), None))
    bound = inputs**-0.5
    assert -bound <= a.min() < -0.99 * bound and 0.99 * bound < a.max() <= bound
    assert abs(a.mean()) < 4 * bound / np.sqrt(3 * a.size)
    assert abs(a.var() * 3 * inputs - 1) < 0.03
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.05  # layers differ
    assert not np.asarray(init_adapter("b", (3, 16, 7), jax.random.key(0), None)).any()


def test_adapters_follow_the_seed_and_differ_from_each_other(tiny_model):
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q", "k"))
    first, again, other = (values_of(attach_adapters(tiny_model, lora, seed)[1]) for seed in (0, 0, 1))
    q, k = (("blocks", "attention", name, "adapter", "a") for name in "qk")
    np.testing.assert_array_equal(first[q], again[q])
    assert not np.array_equal(first[q], other[q])
    assert not np.array_equal(first[q], first[k])
    assert first["embedding",] is values_of(tiny_model.params)["embedding",]  # shared, not copied


def test_only_adapters_are_lora_params(tiny_model):
    _, state = attach_adapters(tiny_model, LoraConfig(rank=2, alpha=2.0, targets=("o",)), seed=0)
    adapters, rest = state.split(LoraParam, ...)
    assert sorted(path[-1] for path in values_of(adapters)) == ["a", "b"]
    assert set(values_of(rest)) == set(values_of(tiny_model.params))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = np.random.default_rng(0).uniform(1, 2, (301, 77)).astype(np.float32)
    kept = np.stack([np.asarray(jax.jit(lambda key: zeroed(x, 0.25, key))(key)) for key in
                     jax.random.split(jax.random.key(0), 40)])  # fmt: skip
    share = (kept == 0).mean(axis=0)
    assert abs(share.mean() - 0.25) < 4 * (0.25 * 0.75 / kept.size) ** 0.5
    assert share.std() == pytest.approx((0.25 * 0.75 / 40) ** 0.5, rel=0.03)  # every place alike
    assert abs(np.corrcoef((kept[:, :, 0::2] == 0)[..., :38].ravel(), (kept[:, :, 1::2] == 0).ravel())[0, 1]) < 0.01
    np.testing.assert_allclose(kept[kept != 0], np.broadcast_to(x / 0.75, kept.shape)[kept != 0], rtol=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_dora_is_the_paper(dropout):
    """Liu et al. 2024, equation 5: m times the direction of W + scale A B; with dropout as PEFT has it."""
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.5 * dropout, dora=True)
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 64), (64, 8), (4, 64), (4, 8)))
    m = rng.uniform(1, 2, 8).astype(np.float32)
    graphdef, state = nnx.split(Adapter(1, 64, 8, lora))
    adapter = nnx.merge(graphdef, with_values(state, {("a",): a, ("b",): b, ("m",): m}))
    dropped = np.where(rng.random(x.shape) < 0.5, 0, 2 * x).astype(np.float32) if dropout else x
    (half,) = low_ranks(dropped, [adapter])
    found = adapter(half, x @ w, w, dropped if dropout else None)
    x, dropped, w, a, b, m = (value.astype(np.float64) for value in (x, dropped, w, a, b, m))
    changed = w + 1.5 * a.T @ b
    ratio = m / np.linalg.norm(changed, axis=0)
    expected = x @ w + (ratio - 1) * (dropped @ w) + ratio * 1.5 * (dropped @ a.T @ b)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    if not dropout:
        np.testing.assert_allclose(expected, x @ (changed * ratio), rtol=1e-10)


@pytest.mark.parametrize("dora", [False, True])
def test_fresh_adapters_change_nothing(dora, tiny_model, run_rows):
    lora = LoraConfig(rank=2, alpha=4.0, dora=dora)
    graphdef, state = attach_adapters(tiny_model, lora, seed=0)
    shape = BatchShape(16, 3, 8)
    found, _ = run_rows(tiny_model._replace(graphdef=graphdef, params=state), ROWS, shape=shape)
    plain, _ = run_rows(tiny_model, ROWS, shape=shape)
    np.testing.assert_allclose(found, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, ("LoRA rank 0", "at least 1")),
        ({"dropout": 1.0}, ("LoRA dropout 1.0", "[0, 1)")),
        ({"dropout": -0.1}, ("LoRA dropout -0.1",)),
        ({"targets": ("q", "query", "w2")}, ("'query', 'w2'", "choose from q, k, v, o, gate, up, down")),
        ({"targets": ()}, ("LoRA targets none",)),
    ],
)
def test_impossible_configurations_are_refused(fields, words, raises_input_error):
    with raises_input_error(*words):
        LoraConfig(**{"rank": 4, "alpha": 8.0} | fields)


def test_scale_is_alpha_over_rank_or_its_root():
    assert LoraConfig(rank=8, alpha=4.0, targets=("q",)).scale == 0.5
    assert LoraConfig(rank=64, alpha=16.0, rslora=True).scale == 2.0
    lora = LoraConfig(rank=8, alpha=4.0, targets=("q",))
    assert lora.only("q") is lora and lora.only("k") is None


def test_an_adapted_row_is_packed_like_any_other(tiny_model):
    """Dropout's mask is drawn for the batch; without it a row's states do not depend on its neighbours."""
    graphdef, state = attach_adapters(tiny_model, LoraConfig(rank=2, alpha=2.0, targets=("v",)), seed=0)
    model = nnx.merge(graphdef, with_values(state, values_of(state) | trained(state)))
    both = model(pack(ROWS, BatchShape(16, 3, 8)), sites=("residual",)).states["residual"][:, 1]
    alone = model(pack(ROWS[1:], BatchShape(16, 3, 8)), sites=("residual",)).states["residual"][:, 0]
    np.testing.assert_allclose(both, alone, rtol=1e-5, atol=1e-5)
