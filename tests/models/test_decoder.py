import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.data.batches import BatchShape, pack
from jaxscape.models import decoder
from jaxscape.models.decoder import SITES, check_sites
from jaxscape.models.lora import LoraConfig
from jaxscape.models.pretrained import attach_adapters, load_pretrained, values_of, with_values
from jaxscape.models.sharding import make_mesh


def relative(found, expected) -> float:
    """Largest relative norm of the difference over the last axis."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)))


def matches(golden, states, logits, site) -> bool:
    worst = max(relative(states[:, i], g.states[site]) for i, g in enumerate(golden))
    return worst < 1e-4 and relative(logits, [g.logits for g in golden]) < 1e-4


# What PyTorch computed


@pytest.mark.parametrize("site", ["residual", "input_norm"])
def test_packed_batch_equals_pytorch_at_every_layer(tiny_model, golden, run_rows, site):
    states, logits = run_rows(tiny_model, [g.tokens for g in golden], site=site)
    assert states.shape == (4, len(golden), 32)
    assert matches(golden, states, logits, site)


def test_prompt_alone_equals_pytorch(tiny_model, golden, run_rows):
    assert matches(golden[:1], *run_rows(tiny_model, [golden[0].tokens]), "residual")


def test_padded_batch_equals_pytorch(tiny_model, golden, run_rows):
    n, longest = sum(len(g.tokens) for g in golden), max(len(g.tokens) for g in golden)
    shape = BatchShape(n + 37, len(golden) + 3, longest + 11)
    assert matches(golden, *run_rows(tiny_model, [g.tokens for g in golden], shape=shape), "residual")


@pytest.mark.parametrize(
    ("site", "shared", "room"), [("residual", 1, 1), ("input_norm", 20, 24), ("residual", None, 512)]
)
def test_shared_prefix_equals_pytorch(tiny_model, golden, run_rows, site, shared, room):
    g = golden[0]
    shared = len(g.tokens) - 1 if shared is None else shared
    states, logits = run_rows(tiny_model, [g.tokens], shared=shared, room=room, site=site)
    assert matches([g], states, logits, site)


def test_rows_of_different_lengths_after_one_prefix_equal_pytorch(tiny_model, golden, run_rows):
    first, other = golden[0], golden[3]  # both begin with the header about animals
    shared = next(i for i, (a, b) in enumerate(zip(first.tokens, other.tokens, strict=False)) if a != b)
    assert shared > 10
    states, logits = run_rows(tiny_model, [first.tokens, other.tokens], shared=shared, room=shared + 5)
    assert matches([first, other], states, logits, "residual")


def test_logits_of_some_tokens_are_those_of_all(tiny_model, golden, run_rows):
    some = np.array([5, 300, 0], np.int32)
    model = nnx.merge(tiny_model.graphdef, tiny_model.params)
    hidden = run_rows(tiny_model, [golden[0].tokens], site="final_norm")[0][0]
    np.testing.assert_allclose(model.logits(hidden, some)[0], golden[0].logits[some], rtol=1e-4, atol=1e-4)


# Sites and pooling


def test_sites_fit_together(tiny_model, golden, run_rows):
    """Each block's norms read the stream that the blocks before it left."""
    states, _ = run_rows(tiny_model, [golden[0].tokens], site=SITES)
    values = values_of(tiny_model.params)

    def normed(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + tiny_model.arch.norm_eps) * np.asarray(scale)

    assert {site: value.shape for site, value in states.items()} == {
        "residual": (4, 1, 32), "input_norm": (4, 1, 32), "post_attention_norm": (4, 1, 32), "final_norm": (1, 1, 32)
    }  # fmt: skip
    scales = values["blocks", "input_norm", "scale"]
    for layer in range(3):
        assert relative(normed(states["residual"][layer], scales[layer + 1]), states["input_norm"][layer + 1]) < 1e-5
    assert relative(normed(states["residual"][3], values["final_norm", "scale"]), states["final_norm"][0]) < 1e-5
    size = np.linalg.norm(states["post_attention_norm"][:, 0] / values["blocks", "mlp_norm", "scale"], axis=-1)
    np.testing.assert_allclose(size, np.sqrt(32), rtol=1e-3)  # it is a normed state, before its scale


@pytest.mark.parametrize("shared", [0, 5])
def test_mean_over_the_end_of_each_row_is_that_of_its_tokens(shared, tiny_model, golden, run_rows):
    head = golden[0].tokens[:5]
    rows = [head + golden[i].tokens[7:30] for i in (0, 1)] + [head + [9]]
    starts = [6, 12, 5]
    shape = BatchShape(96, 4, 40)
    found, _ = run_rows(tiny_model, rows, shared=shared, shape=shape, pool_from=[start - shared for start in starts])
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ends = [run_rows(tiny_model, [row[:stop]], shape=BatchShape(32, 1, 32))[0][:, 0]
                for stop in range(start + 1, len(row) + 1)]  # fmt: skip
        assert relative(found[:, i], np.mean(ends, axis=0)) < 1e-5


@pytest.mark.parametrize("site", ["logits", "input_norm"])
def test_site_that_is_not_there_is_refused(site, tiny_model, raises_input_error):
    check_sites(tiny_model.arch, SITES)
    with raises_input_error("site", site, "residual"):
        check_sites(dataclasses.replace(tiny_model.arch, pre_norms=False, post_norms=True), (site,))


# Packing

SHAPES = (BatchShape(64, 4, 16), BatchShape(96, 6, 40), BatchShape(48, 8, 48))
LONGEST = 16


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_states_do_not_depend_on_order_or_shape_of_the_batch(data, tiny_model, run_rows):
    shape = data.draw(st.sampled_from(SHAPES))
    rows = data.draw(st.lists(
        st.lists(st.integers(0, 383), min_size=1, max_size=LONGEST), min_size=1, max_size=min(shape.rows, 3)
    ))
    rows = data.draw(st.permutations(rows))
    states, logits = run_rows(tiny_model, rows, shape=shape)
    for i, row in enumerate(rows):
        expected = run_rows(tiny_model, [row], shape=BatchShape(LONGEST, 1, LONGEST))
        assert relative(states[:, i], expected[0][:, 0]) < 1e-5
        assert relative(logits[i], expected[1][0]) < 1e-5


def test_tokens_in_the_padding_change_nothing(tiny_model, golden, run_rows):
    rows = [golden[0].tokens[:30], golden[1].tokens[:20]]
    batch = pack(rows, BatchShape(64, 4, 32))
    filled = batch._replace(tokens=np.where(np.arange(64) < 50, batch.tokens, 77))
    model = nnx.merge(tiny_model.graphdef, tiny_model.params)
    states, refilled = (np.asarray(model(b, sites=("residual",)).states["residual"][:, :2]) for b in (batch, filled))
    np.testing.assert_array_equal(states, refilled)


def test_a_later_row_changes_no_earlier_one(tiny_model, golden, run_rows):
    rows = [golden[0].tokens[:30], golden[1].tokens[:20]]
    states, _ = run_rows(tiny_model, rows)
    changed, _ = run_rows(tiny_model, [rows[0], golden[2].tokens[:20]])
    assert relative(changed[:, 0], states[:, 0]) < 1e-5
    assert relative(changed[:, 1], states[:, 1]) > 1e-2


# Gradients


def plain_forward(values, arch, row):
    """One row, written down from the equations: no batch, a [T, T] mask. Returns the last normed state."""
    x = values[("embedding",)][row]
    length, features = len(row), arch.head_dim
    turn = jnp.arange(length)[:, None] / 10_000.0 ** (jnp.arange(0, features, 2) / features)  # the tiny model's base
    turn = jnp.exp(1j * turn)[:, None, :]

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + arch.norm_eps) * scale

    def rotary(x):
        z = (x[..., : features // 2] + 1j * x[..., features // 2 :]) * turn
        return jnp.concatenate([z.real, z.imag], -1)

    def block(x, weights):
        y = norm(x, weights["input_norm", "scale"])
        q, k, v = ((y @ weights["attention", p, "kernel"]).reshape(length, -1, features) for p in "qkv")
        groups = arch.num_heads // arch.num_kv_heads
        k, v = (jnp.repeat(a, groups, axis=1) for a in (rotary(k), v))
        scores = jnp.einsum("thf,shf->hts", rotary(q), k) / features**0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e30)
        mixed = jnp.einsum("hts,shf->thf", jax.nn.softmax(scores, -1), v).reshape(length, -1)
        x = x + mixed @ weights["attention", "o", "kernel"]
        y = norm(x, weights["mlp_norm", "scale"])
        gate, up = (y @ weights["mlp", name, "kernel"] for name in ("gate", "up"))
        return x + (gate / (1 + jnp.exp(-gate)) * up) @ weights["mlp", "down", "kernel"]

    stacked = {path[1:]: value for path, value in values.items() if path[0] == "blocks"}
    x, _ = jax.lax.scan(lambda x, weights: (block(x, weights), None), x, stacked)
    return norm(x[-1], values["final_norm", "scale"])


SHARED = [3, 17, 250]  # tokens that all rows begin with
GRADIENT_ROWS = ([*SHARED, 66], [*SHARED, 99, 41, 8, 3])


@pytest.fixture(scope="module")
def packed_gradient(tiny_model):
    """Gradient, by parameter, of a fixed function of the rows' last states; ``shared`` runs SHARED as a prefix."""
    weights = jax.random.normal(jax.random.key(1), (len(GRADIENT_ROWS), 32))

    @functools.lru_cache
    def gradient(shared=False, remat="none"):
        start = len(SHARED) if shared else 0
        batch = pack([row[start:] for row in GRADIENT_ROWS], BatchShape(16, 2, 7 - start))  # the last cell is filled

        def loss(values):
            model = nnx.merge(tiny_model.graphdef, with_values(tiny_model.params, values))
            prefix = None
            if shared:
                out = model(pack([SHARED], BatchShape(8, 1, 8)), keep_keys=True)
                prefix = decoder.Prefix(out.keys, out.values, jnp.int32(start))
            return jnp.sum(weights * model(batch, prefix, remat=remat).hidden[: len(GRADIENT_ROWS)])

        return jax.jit(jax.grad(loss))(values_of(tiny_model.params))

    gradient.weights = weights
    return gradient


def assert_same_gradient(found, expected, bound):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert relative(found[path].reshape(-1), value.reshape(-1)) < bound, path


def test_gradient_of_the_packed_rows_is_that_of_rows_one_by_one(tiny_model, packed_gradient):
    def loss(values, row, weights):
        return weights @ plain_forward(values, tiny_model.arch, row)

    gradient, values = jax.jit(jax.grad(loss)), values_of(tiny_model.params)
    rows = [gradient(values, np.array(row), w) for row, w in zip(GRADIENT_ROWS, packed_gradient.weights, strict=True)]
    assert_same_gradient(packed_gradient(), jax.tree.map(lambda *leaves: sum(leaves), *rows), 1e-4)


def test_padding_tokens_get_no_gradient(packed_gradient):
    table = np.asarray(packed_gradient()[("embedding",)])
    seen = sorted({t for row in GRADIENT_ROWS for t in row})
    assert np.abs(table[seen]).max(axis=1).min() > 0
    assert not np.delete(table, seen, axis=0).any()  # token 0, the padding, among them


@pytest.mark.parametrize("remat", sorted(set(decoder.REMAT) - {"none"}))
def test_recomputing_in_the_backward_pass_changes_no_gradient(packed_gradient, remat):
    assert_same_gradient(packed_gradient(remat=remat), packed_gradient(), 1e-5)


def test_gradient_through_a_shared_prefix_is_that_of_whole_rows(packed_gradient):
    assert_same_gradient(packed_gradient(shared=True), packed_gradient(), 1e-4)


# Adapters and dropout

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.5, targets=("q", "o", "down"))


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """States after adapters: ``adapted(fill, key)`` with every B filled with noise of that size."""
    graphdef, state = attach_adapters(tiny_model, LORA, seed=0)
    batch = pack(GRADIENT_ROWS, BatchShape(16, 3, 9))

    @jax.jit
    def forward(state, key):
        return nnx.merge(graphdef, state)(batch, sites=("residual",), dropout_key=key).states["residual"][:, :2]

    def run(fill, key):
        values = values_of(state)
        for number, (path, value) in enumerate(sorted(values.items())):
            if path[-2:] == ("adapter", "b"):
                values[path] = fill * jax.random.normal(jax.random.key(number), value.shape)
        return np.asarray(forward(with_values(state, values), key))

    return run


def test_fresh_adapters_change_nothing_even_under_dropout(tiny_model, adapted, run_rows):
    expected, _ = run_rows(tiny_model, GRADIENT_ROWS)
    assert relative(adapted(0.0, None), expected) < 1e-6
    assert relative(adapted(0.0, jax.random.key(3)), expected) < 1e-6


def test_dropout_acts_only_with_a_key(adapted):
    still = adapted(0.1, None)
    np.testing.assert_array_equal(adapted(0.1, None), still)
    dropped = adapted(0.1, jax.random.key(3))
    np.testing.assert_array_equal(adapted(0.1, jax.random.key(3)), dropped)
    assert relative(dropped, still) > 1e-3
    assert relative(adapted(0.1, jax.random.key(4)), dropped) > 1e-3


# bfloat16


def test_bfloat16_stays_near_float32(tiny_llama, tiny_model, golden, run_rows):
    """Eight bits of mantissa: one rounding is at most 2^-9, and four layers of ten or so add up to some 2^-5."""
    model = load_pretrained(tiny_llama, make_mesh(), "bfloat16")
    assert {value.dtype for value in values_of(model.params).values()} == {jnp.dtype("bfloat16")}
    rows = [g.tokens for g in golden]
    expected, _ = run_rows(tiny_model, rows)
    states, logits = run_rows(model, rows)
    assert states.dtype == jnp.bfloat16 and logits.dtype == np.float32
    by_layer = [relative(found, value) for found, value in zip(states.astype(np.float32), expected, strict=True)]
    assert max(by_layer) < 2**-4, by_layer
    assert by_layer[0] < 2**-5, by_layer
    prefixed, _ = run_rows(model, [rows[0]], shared=20, room=24)
    assert relative(prefixed.astype(np.float32), expected[:, :1]) < 2**-4
