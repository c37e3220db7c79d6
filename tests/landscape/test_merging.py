"""Merging against the same rule written as a plain loop over all saddles, on random graphs with many ties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.landscape.merging import merge_peaks
from jaxscape.landscape.topography import Saddles


def plain_merge(peak, peak_error, saddles, z):
    """One merge after the other, all saddles looked at for each; returns absorbed_by and the saddles left, by pair."""
    left = {(a, b): (h, e) for a, b, h, e in zip(*(v.tolist() for v in saddles[:2]), *saddles[2:4], strict=True)}
    absorbed_by = np.arange(len(peak))
    with np.errstate(all="ignore"):
        while True:
            weak = [p for p, (h, e) in left.items() if any(peak[c] - h < z * (peak_error[c] + e) for c in p)]
            if not weak:
                return absorbed_by, left
            pair = min(weak, key=lambda p: (-left[p][0], p))
            height, error = left.pop(pair)
            one, two = ((peak[c] - height) / (peak_error[c] + error) for c in pair)
            keep, drop = pair[::-1] if one < two else pair
            absorbed_by[absorbed_by == drop] = keep
            for old in [p for p in left if drop in p]:
                moved, new = left.pop(old), tuple(sorted((keep, *set(old) - {drop})))
                if new not in left or moved[0] > left[new][0]:
                    left[new] = moved


def assert_plain(peak, peak_error, saddles, z):
    absorbed_by, left = plain_merge(peak, peak_error, saddles, peak.dtype.type(z))
    merged = merge_peaks(peak, peak_error, saddles, z)
    np.testing.assert_array_equal(merged.absorbed_by, absorbed_by)
    pairs = list(zip(merged.saddles.low.tolist(), merged.saddles.high.tolist(), strict=True))
    assert pairs == sorted(left) and merged.saddles.count == len(left)
    np.testing.assert_array_equal(merged.saddles.height, np.array([left[p][0] for p in pairs], peak.dtype))
    np.testing.assert_array_equal(merged.saddles.error, np.array([left[p][1] for p in pairs], peak.dtype))
    assert merged.saddles.height.dtype == peak.dtype
    return merged


def graph(pairs, height, error):
    pairs = np.array(sorted(set(pairs)), int).reshape(-1, 2)
    return Saddles(pairs[:, 0], pairs[:, 1], height(len(pairs)), error(len(pairs)), len(pairs))


def edges(shape, count, rng):
    if shape == "chain":
        return [(i, i + 1) for i in range(count - 1)]
    if shape == "star":
        hub = int(rng.integers(count))
        return [(min(i, hub), max(i, hub)) for i in range(count) if i != hub]
    ends = np.sort(rng.integers(0, count, (3 * count, 2)), axis=1)
    return [tuple(p) for p in ends[ends[:, 0] < ends[:, 1]].tolist()]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(["chain", "star", "random"]),
    values=st.sampled_from([3, 12, None]),
    errors=st.sampled_from(["equal", "few", "any", "zero"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_plain_order(seed, shape, values, errors, dtype):
    """`values`: how many heights there are, few making ties; peaks may be lower than their saddles."""
    rng = np.random.default_rng(seed)

    def draw(count):
        drawn = rng.normal(size=count) if values is None else rng.integers(0, values, count) / 3
        return drawn.astype(dtype)

    def error(count):
        drawn = {
            "equal": np.full(count, 0.25),
            "few": rng.choice([0.05, 0.25, 1.0], count),
            "any": rng.exponential(0.4, count),
            "zero": rng.choice([0.0, 0.3], count),
        }[errors]
        return drawn.astype(dtype)

    for count in (1, 2, 7, 40):
        peak, saddles = draw(count) + dtype(1), graph(edges(shape, count, rng), draw, error)
        for z in (0.0, 0.6, 1.6, 4.0):
            assert_plain(peak, error(count), saddles, z)


def test_a_saddle_that_a_merge_makes_insignificant_goes_next_though_higher():
    """Peak 1, of little error, joins 0, of much, at 4: the saddle at 4.2 that it had with 2 isn't significant to 0."""
    peak, peak_error = np.array([14.0, 5.0, 20.0, 3.95]), np.array([9.75, 0.1, 0.1, 0.1])
    ends, height, error = ([0, 1, 2], [1, 2, 3]), [4.0, 4.2, 3.9], [1.0, 0.1, 0.0]
    saddles = Saddles(*map(np.array, (*ends, height, error)), 3)
    alone = Saddles(*(a[1:2] for a in map(np.array, (*ends, height, error))), 1)
    assert merge_peaks(peak, peak_error, alone, 1.0).absorbed_by.tolist() == [0, 1, 2, 3]
    assert assert_plain(peak, peak_error, saddles, 1.0).absorbed_by.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("height", "expected"), [([1.0, 2.0], [0.2]), ([2.0, 1.0], [0.1]), ([2.0, 2.0], [0.1])])
def test_of_two_saddles_of_a_pair_the_higher_stays_or_the_one_it_had(height, expected):
    """Peak 2 joins 0 at 5; both have a saddle with 1."""
    peak, peak_error = np.array([9.0, 8.0, 5.1]), np.full(3, 0.5)
    saddles = Saddles(
        np.array([0, 0, 1]), np.array([1, 2, 2]), np.array([height[0], 5.0, height[1]]), np.array([0.1, 0.3, 0.2]), 3
    )
    merged = assert_plain(peak, peak_error, saddles, 1.0)
    assert merged.absorbed_by.tolist() == [0, 1, 0]
    assert merged.saddles.error.tolist() == expected


def test_leaves_its_arguments_alone_and_reads_no_more_than_count():
    rng = np.random.default_rng(0)
    saddles = graph(edges("random", 30, rng), lambda n: rng.normal(size=n), lambda n: np.full(n, 0.2))
    peak, peak_error = 2 + rng.random(30), np.full(30, 0.2)
    padded = Saddles(*(np.concatenate([a, a[:5]]) for a in saddles[:4]), saddles.count)
    before = [a.copy() for a in (peak, peak_error, *padded[:4])]
    found = merge_peaks(peak, peak_error, padded, 1.0)
    for a, b in zip((peak, peak_error, *padded[:4]), before, strict=True):
        np.testing.assert_array_equal(a, b)
    expected = merge_peaks(peak, peak_error, saddles, 1.0)
    np.testing.assert_array_equal(found.absorbed_by, expected.absorbed_by)
    np.testing.assert_array_equal(found.saddles.height, expected.saddles.height)


def test_a_hundred_thousand_peaks():
    """The lower of every pair of neighbours on a ring goes: its peaks are few steps apart, its saddles many."""
    n = 100_000
    peak = np.where(np.arange(n) % 2 == 0, 5.0, 1.0).astype(np.float32)
    low, high = np.arange(n - 1), np.arange(1, n)
    error = np.full(n, 0.1, np.float32)
    merged = merge_peaks(peak, error, Saddles(low, high, np.full(n - 1, 0.9, np.float32), error[1:], n - 1), 1.0)
    assert np.all(merged.absorbed_by % 2 == 0) and np.all(merged.absorbed_by[::2] == np.arange(0, n, 2))
    assert merged.saddles.count == n // 2 - 1
