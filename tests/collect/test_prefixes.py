import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.collect.prefixes import find_families

trees = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=8), min_size=1, max_size=12)
costs = st.integers(0, 6)


def limits_of(rows):
    return [len(row) - 1 for row in rows]


def cost(rows, families, pass_cost):
    """Tokens that run, and what every cache and every further group of prompts costs."""
    points = [point for family in families for point in family.points]
    run = sum(len(rows[row]) - point.depth for point in points for row in point.rows)
    return run + sum(f.length for f in families) + pass_cost * sum(point.depth > 0 for point in points)


@settings(deadline=None)
@given(trees, costs, st.integers(0, 3))
def test_every_prompt_runs_once_after_tokens_that_are_its_own(rows, pass_cost, kept):
    limits = [max(0, len(row) - 1 - kept) for row in rows]
    families = find_families(rows, limits, pass_cost)
    attached = [row for family in families for point in family.points for row in point.rows]
    assert sorted(attached) == list(range(len(rows)))
    for family in families:
        cached = rows[family.source][: family.length]
        assert len(cached) == family.length <= limits[family.source]
        depths = [point.depth for point in family.points]
        assert depths == sorted(set(depths), reverse=True) and depths[0] == family.length
        for point in family.points:
            assert (point.depth > 0) == (family.length > 0)
            assert all(rows[row][: point.depth] == cached[: point.depth] for row in point.rows)
            assert all(point.depth <= limits[row] for row in point.rows)


@settings(deadline=None)
@given(trees, costs)
def test_sharing_is_never_dearer_than_running_whole(rows, pass_cost):
    assert cost(rows, find_families(rows, limits_of(rows), pass_cost), pass_cost) <= sum(map(len, rows))


def cheapest(rows, pass_cost):
    """By trying every set of prefixes: each prompt runs after its longest; a prefix of another rides on its cache."""
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row))}
    prefixes = [p for p in prefixes if sum(row[: len(p)] == list(p) and len(row) > len(p) for row in rows) > 1]
    best = sum(map(len, rows))
    for count in range(1, len(prefixes) + 1):
        for chosen in itertools.combinations(prefixes, count):
            used, run = set(), 0
            for row in rows:
                fitting = [p for p in chosen if len(p) < len(row) and tuple(row[: len(p)]) == p]
                longest = max(fitting, key=len, default=())
                used.add(longest)
                run += len(row) - len(longest)
            used -= {()}
            caches = [p for p in used if not any(q != p and q[: len(p)] == p for q in used)]
            best = min(best, run + sum(map(len, caches)) + pass_cost * len(used))
    return best


def test_is_near_the_cheapest_of_all_ways():
    draw, found, least = np.random.default_rng(0), 0, 0
    for _ in range(60):
        rows = [draw.integers(1, 3, draw.integers(2, 6)).tolist() for _ in range(6)]
        mine = cost(rows, find_families(rows, limits_of(rows), 1), 1)
        best = cheapest(rows, 1)
        assert best <= mine <= best + 4
        found, least = found + mine, least + best
    assert found < 1.05 * least


def study(subjects=3, questions=30, conditions=(0, 1, 2, 5), seed=0):
    """Prompts of a study in miniature: header and shots of a subject, then a question."""
    draw = np.random.default_rng(seed)
    rows, shots_of = [], []
    headers = [[1, 2, 3, 10 + s] for s in range(subjects)]
    shots = [[draw.integers(100, 900, 20).tolist() for _ in range(5)] for _ in range(subjects)]
    asked = [[draw.integers(1000, 9000, draw.integers(5, 15)).tolist() for _ in range(questions)]
             for _ in range(subjects)]  # fmt: skip
    for count in conditions:
        for s in range(subjects):
            for question in asked[s]:
                rows.append(headers[s] + sum(shots[s][:count], []) + question)
                shots_of.append(count)
    return rows, shots_of


def test_one_cache_a_subject_serves_every_number_of_shots():
    rows, shots = study()
    families = find_families(rows, limits_of(rows), 10)
    assert [family.length for family in families] == [104, 104, 104]
    for family in families:
        assert [point.depth for point in family.points] == [104, 44, 24, 4]
        assert [{shots[row] for row in point.rows} for point in family.points] == [{5}, {2}, {1}, {0}]
        assert [len(point.rows) for point in family.points] == [30, 30, 30, 30]


def test_shots_in_another_order_before_each_question_share_the_header_at_most():
    draw = np.random.default_rng(0)
    shots = [draw.integers(100, 900, 20).tolist() for _ in range(5)]
    rows = [list(range(1, 31)) + sum((shots[i] for i in order), []) + [1000 + n]
            for n, order in enumerate(list(itertools.permutations(range(5)))[::9])]  # fmt: skip
    (family,) = find_families(rows, limits_of(rows), 200)
    assert family.length == 30 and len(family.points[0].rows) == len(rows)
    (family,) = find_families(rows, limits_of(rows), 2000)
    assert family.length == 0


def test_prompts_on_two_sides_share_nothing():
    rows = [[1] * 20 + [n] for n in range(2, 12)]
    sides = [n % 2 == 0 for n in range(10)]
    families = find_families(rows, limits_of(rows), 1, sides)
    assert sorted(tuple(point.rows) for f in families for point in f.points) == [(0, 2, 4, 6, 8), (1, 3, 5, 7, 9)]


@pytest.mark.parametrize("rows", [[[5]], [[5], [5]], [[5, 6], [5, 6]]])
def test_few_and_equal_prompts_run_whole_where_nothing_is_saved(rows):
    (family,) = find_families(rows, limits_of(rows), 1)
    assert family.length == 0 and family.points[0].rows == tuple(range(len(rows)))


def test_groups_are_found_without_labels_in_any_order():
    draw = np.random.default_rng(1)
    shared = [draw.integers(1, 50_000, n).tolist() for n in (300, 40, 700)]
    rows = [shared[n % 3] + draw.integers(1, 50_000, 30).tolist() for n in draw.permutation(90)]
    families = find_families(rows, limits_of(rows), 100)
    assert sorted(family.length for family in families) == [40, 300, 700]
    assert all(len(family.points[0].rows) == 30 for family in families)
