import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.data.batches import BatchShape, pack
from jaxscape.models import attention
from jaxscape.models.attention import Scores, attend, choose

HEADS, KV_HEADS, FEATURES, ROOM = 4, 2, 8, 24
SHAPE = BatchShape(tokens=56, rows=5, longest=20)


def by_hand(q, k, v, rows, prefix, scores):
    """Float64, a query at a time. ``rows``: lengths; ``prefix``: keys, values, length, or None."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    before = 0 if prefix is None else int(prefix[2])
    out, start = np.zeros_like(q), 0
    for length in rows:
        for place in range(length):
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                keys, values = (a[start : start + place + 1, group] for a in (k, v))
                if prefix is not None:
                    keys, values = (np.concatenate([np.asarray(a, np.float64)[:before, group], own])
                                    for a, own in zip(prefix[:2], (keys, values), strict=True))  # fmt: skip
                if scores.window:
                    keys, values = keys[-scores.window :], values[-scores.window :]
                found = keys @ q[start + place, head]
                if scores.softcap:
                    found = scores.softcap * np.tanh(found / scores.softcap)
                weights = np.exp(found - found.max())
                out[start + place, head] = weights @ values / weights.sum()
        start += length
    return out


@functools.lru_cache
def arrays(seed=0):
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(SHAPE.tokens, HEADS, FEATURES)).astype(np.float32)
    k, v = (draw.normal(size=(SHAPE.tokens, KV_HEADS, FEATURES)).astype(np.float32) for _ in range(2))
    keys, values = (draw.normal(size=(ROOM, KV_HEADS, FEATURES)).astype(np.float32) for _ in range(2))
    return q, k, v, keys, values


@functools.partial(jax.jit, static_argnames=("scores", "way"))
def run(q, k, v, batch, prefix, scores, way="blocked"):
    with jax.default_matmul_precision("float32"):
        return attend(q, k, v, batch, prefix, scores, way)


def check(rows, shared, scores, way="blocked"):
    q, k, v, keys, values = arrays()
    prefix = (keys, values, np.int32(shared)) if shared else None
    found = run(q, k, v, pack([[0] * n for n in rows], SHAPE), prefix, scores, way)
    expected = by_hand(q, k, v, rows, prefix, scores)
    assert np.isfinite(found).all()  # padding too
    np.testing.assert_allclose(found[: sum(rows)], expected[: sum(rows)], rtol=0, atol=2e-6)


SCORES = (Scores(), Scores(softcap=1.5), Scores(window=3), Scores(softcap=2.0, window=7))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, SHAPE.longest), min_size=1, max_size=SHAPE.rows).filter(lambda rows: sum(rows) <= 56),
       st.integers(0, ROOM), st.sampled_from(SCORES))  # fmt: skip
def test_attention_is_the_softmax_over_row_and_prefix(rows, shared, scores):
    check(rows, shared, scores)


@pytest.mark.parametrize("scores", SCORES)
def test_blocks_and_pieces_change_nothing(scores, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 6)
    monkeypatch.setattr(attention, "SCORE_BYTES", {"cpu": 2000, "other": 2000})  # some ten pieces
    run.clear_cache()
    check((20, 1, 13, 20), 11, scores)
    run.clear_cache()


@pytest.mark.parametrize("scores", [Scores(), Scores(softcap=1.5), Scores(window=3)])
@pytest.mark.parametrize("shared", [0, 11])
def test_splash_kernel_agrees(scores, shared):
    """On a TPU the compiled kernel, elsewhere the same kernel interpreted."""
    check((20, 1, 13, 20), shared, scores, "splash")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN's attention needs an NVIDIA GPU")
@pytest.mark.parametrize("scores", [Scores(), Scores(window=3)])
@pytest.mark.parametrize("shared", [0, 11])
def test_cudnn_kernel_agrees(scores, shared):
    rows = (20, 1, 13, 20)
    q, k, v, keys, values = (jnp.asarray(a, jnp.bfloat16) for a in arrays())
    prefix = (keys, values, np.int32(shared)) if shared else None
    found = run(q, k, v, pack([[0] * n for n in rows], SHAPE), prefix, scores, "cudnn")
    expected = by_hand(q, k, v, rows, prefix, scores)
    np.testing.assert_allclose(found.astype(np.float32)[:54], expected[:54], rtol=0, atol=2**-6)


def test_prefix_that_is_out_of_every_window_counts_for_nothing():
    q, k, v, keys, values = arrays()
    batch, scores = pack([[0] * 20], SHAPE), Scores(window=3)
    alone = run(q, k, v, batch, None, scores)
    after = run(q, k, v, batch, (keys, values, np.int32(ROOM)), scores)
    np.testing.assert_allclose(after[2:20], alone[2:20], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(after - alone))[:2].max() > 1e-2  # the first two still see the prefix's end


@pytest.mark.parametrize("scores", [Scores(), Scores(softcap=1.5, window=3)])
def test_gradient_is_that_of_the_plain_formula(scores):
    q, k, v, keys, values = arrays()
    rows, shared = (9, 4), 5
    batch, direction = pack([[0] * n for n in rows], SHAPE), np.random.default_rng(3).normal(size=q.shape)
    direction[sum(rows) :] = 0

    def plain(q, k, v, keys, values):
        total, start = 0.0, 0
        for length in rows:
            own = slice(start, start + length)
            far = np.arange(shared, shared + length)[:, None] - np.arange(shared + length)
            allowed = (far >= 0) & (far < (scores.window or 99))
            all_keys, all_values = (jnp.repeat(jnp.concatenate([a[:shared], b[own]]), HEADS // KV_HEADS, axis=1)
                                    for a, b in ((keys, k), (values, v)))  # fmt: skip
            found = jnp.einsum("thf,shf->hts", q[own], all_keys)
            if scores.softcap:
                found = scores.softcap * jnp.tanh(found / scores.softcap)
            weights = jax.nn.softmax(jnp.where(allowed, found, -1e30), axis=-1)
            total += jnp.sum(jnp.einsum("hts,shf->thf", weights, all_values) * direction[own])
            start += length
        return total

    def ours(q, k, v, keys, values):
        return jnp.sum(attend(q, k, v, batch, (keys, values, shared), scores, "blocked") * direction)

    found, expected = (jax.jit(jax.grad(f, argnums=tuple(range(5))))(q, k, v, keys, values) for f in (ours, plain))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_lanes_of_batches_run_as_one_by_one():
    q, k, v, keys, values = arrays()
    batches = [pack([[0] * n for n in rows], SHAPE) for rows in ((20, 3), (1, 1, 18, 7))]
    lengths = np.array([4, 19], np.int32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    lanes = jax.vmap(lambda batch, length: attend(q, k, v, batch, (keys, values, length), Scores(), "blocked"))
    found = jax.jit(lanes)(stacked, lengths)
    for lane, batch in enumerate(batches):
        alone = run(q, k, v, batch, (keys, values, lengths[lane]), Scores())
        np.testing.assert_allclose(found[lane], alone, rtol=0, atol=1e-6)


def test_on_cpus_attention_is_blocked():
    if jax.default_backend() == "cpu":
        assert choose(jnp.bfloat16, Scores(), 64) == choose(jnp.float32, Scores(), 64) == "blocked"


class FakeDevice:
    def __init__(self, platform, capability="9.0"):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    ("device", "dtype", "scores", "features", "way"),
    [
        (FakeDevice("gpu"), "bfloat16", Scores(), 128, "cudnn"),
        (FakeDevice("gpu"), "float16", Scores(window=9), 64, "cudnn"),
        (FakeDevice("gpu"), "float32", Scores(), 128, "blocked"),
        (FakeDevice("gpu"), "bfloat16", Scores(softcap=50.0), 128, "blocked"),
        (FakeDevice("gpu"), "bfloat16", Scores(), 256, "blocked"),
        (FakeDevice("gpu", "7.5"), "bfloat16", Scores(), 128, "blocked"),
        (FakeDevice("gpu", "gfx90a"), "bfloat16", Scores(), 128, "blocked"),
        (FakeDevice("tpu", ""), "float32", Scores(softcap=50.0), 256, "splash"),
    ],
)
def test_fused_kernels_are_chosen_where_they_compute_the_same(device, dtype, scores, features, way, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert choose(dtype, scores, features) == way


def test_several_tpus_do_not_run_the_kernel_that_jax_cannot_partition(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [FakeDevice("tpu", "")] * 4)
    assert choose("bfloat16", Scores(), 128) == "blocked"
