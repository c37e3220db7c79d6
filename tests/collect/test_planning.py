import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.collect import planning
from jaxscape.collect.planning import MOST_PADDING, MOST_SHAPES, plan_collection, plan_facts
from jaxscape.collect.shapes import Need, choose_shapes
from jaxscape.data.bank import load_bank
from jaxscape.data.prompts import build_prompts
from tests.collect.test_prefixes import study

rows_of_tokens = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=40)
lanes_of = st.sampled_from([1, 1, 2, 8])


@settings(deadline=None, max_examples=60)
@given(rows_of_tokens, st.integers(1, 120), lanes_of, st.integers(0, 3), st.sampled_from([0, 1, None]))
def test_every_prompt_runs_once_in_a_shape_that_holds_it(rows, budget, lanes, kept, pass_cost):
    limits = [max(0, len(row) - 1 - kept) for row in rows]
    plan = plan_collection(rows, budget, lanes=lanes, limits=limits, pass_cost=pass_cost)
    run = []
    for job in plan.jobs:
        assert len(job.sources) == len(job.lengths) == len(job.serves) == lanes
        assert (job.room > 0) == (min(job.lengths) > 0) and max(job.lengths) <= job.room
        for wave in (wave for piece in job.pieces for wave in piece):
            assert (wave.room > 0) == (job.room > 0) and max(wave.depths) <= wave.room
            assert len(wave.rows) == len(wave.depths) == lanes
            for lane, (members, depth) in enumerate(zip(wave.rows, wave.depths, strict=True)):
                own = [len(rows[row]) - depth for row in members]
                assert depth <= job.lengths[lane] and (depth > 0) == (job.room > 0)
                cached = rows[job.sources[lane]][: job.lengths[lane]]
                assert all(rows[row][:depth] == cached[:depth] and depth <= limits[row] for row in members)
                assert all(len(rows[row]) <= job.serves[lane] for row in members)
                assert sum(own) <= wave.shape.tokens and len(own) <= wave.shape.rows
                assert max(own, default=0) <= wave.shape.longest
                assert sum(own) <= max(budget, *map(len, rows))
                run += members
    assert sorted(run) == list(range(len(rows)))


@settings(deadline=None, max_examples=60)
@given(rows_of_tokens, st.integers(1, 120), lanes_of)
def test_shapes_stay_few_whatever_the_prompts(rows, budget, lanes):
    facts = plan_facts(plan_collection(rows, budget, lanes=lanes, pass_cost=0))
    assert facts["programs"] <= MOST_SHAPES
    assert facts["tokens_computed"] >= facts["tokens_run"]


@st.composite
def collections(draw):
    """Prompts of several groups, lengths and group sizes spread as benchmarks' are, of 25,000 tokens at least."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**31)))
    median, spread = draw(st.integers(20, 200)), draw(st.floats(0.1, 0.9))
    shared = draw(st.sampled_from([0, 15, 300]))
    rows, total = [], 0
    while total < 25_000:
        header = numbers.integers(1, 50_000, numbers.integers(shared // 2, shared + 1)).tolist()
        lengths = np.exp(numbers.normal(np.log(median), spread, numbers.integers(30, 200))).clip(4, 1500).astype(int)
        rows += [header + numbers.integers(1, 50_000, length).tolist() for length in lengths]
        total += lengths.sum()
    return rows, draw(st.sampled_from([512, 1024, 2048]))


@settings(deadline=None, max_examples=25)
@given(collections())
def test_a_benchmark_is_padded_by_less_than_a_tenth_in_a_dozen_shapes(collection):
    facts = plan_facts(plan_collection(*collection))
    assert facts["padding"] < MOST_PADDING and facts["programs"] <= MOST_SHAPES


@pytest.mark.parametrize("shots", [(0,), (2,), (5,), (0, 5), (0, 1, 2, 5)])
def test_prompts_of_the_bank_are_padded_by_less_than_a_tenth(shots):
    """Words and marks as tokens."""
    questions = load_bank()
    dev, asked = ([q for q in questions if q.split == s] for s in ("dev", "test"))
    numbers = {}
    rows = [[numbers.setdefault(word, len(numbers)) for word in prompt.text.split()]
            for count in shots for prompt in build_prompts(asked, dev, count)]  # fmt: skip
    facts = plan_facts(plan_collection(rows, 1024))
    assert facts["padding"] < MOST_PADDING and facts["programs"] <= MOST_SHAPES and facts["cells_per_token"] < 4
    assert facts["tokens_run"] < (1 if min(shots) == 0 and len(shots) == 1 else 0.7) * facts["prompt_tokens"]


def test_facts_are_those_of_the_plan_by_hand():
    rows = [[1] * 50 + [2, 3], [1] * 50 + [4], [1] * 50 + [5, 6, 7]]
    plan = plan_collection(rows, 64, pass_cost=0)
    (job,) = plan.jobs
    ((wave,),) = job.pieces
    assert job.lengths == (50,) and job.room == 56 and wave.room == 56 and wave.depths == (50,)
    assert wave.rows == ((2, 0, 1),) and wave.shape == (8, 3, 8)
    assert plan_facts(plan) == {"prompt_tokens": 156, "tokens_run": 56, "tokens_computed": 64, "padding": 0.125,
                                "cells_per_token": 4.0, "programs": 2, "passes": 2}  # fmt: skip


def test_one_cache_a_job_serves_all_conditions_of_a_subject():
    rows, _ = study(questions=60)
    plan = plan_collection(rows, 256)
    cached = [job for job in plan.jobs if job.room]
    assert [job.lengths for job in cached] == [(104,), (104,), (104,)]
    for job in cached:
        depths = [wave.depths[0] for piece in job.pieces for wave in piece]
        assert depths == sorted(depths, reverse=True) and set(depths) >= {104, 44, 24}


def test_prompts_longer_than_the_border_share_nothing_with_shorter_ones():
    shared = list(range(1, 301))
    rows = [shared + [400 + n] * (5 + 20 * (n % 2)) for n in range(40)]
    plan = plan_collection(rows, 256, long_from=310)
    assert len(plan.jobs) == 2
    for job in plan.jobs:
        sides = {len(rows[row]) > 310 for piece in job.pieces for wave in piece for row in wave.rows[0]}
        assert sides == {job.serves[0] > 310}


def test_large_families_are_shared_out_so_that_lanes_finish_together():
    draw = np.random.default_rng(0)
    shared = [draw.integers(1, 9000, n).tolist() for n in (60, 80)]
    rows = [shared[n % 10 == 0] + draw.integers(1, 9000, draw.integers(20, 120)).tolist() for n in range(2000)]
    one, eight = plan_facts(plan_collection(rows, 512)), plan_facts(plan_collection(rows, 512, lanes=8))
    assert eight["passes"] < one["passes"] / 6
    assert eight["tokens_computed"] < 1.2 * one["tokens_computed"]


def test_a_piece_is_what_is_lost_at_most(monkeypatch):
    rows = [[1] * 30 + [i] for i in range(2, 1102)]
    pieces = [piece for _, _, piece in plan_collection(rows, 256).pieces()]
    sizes = [sum(len(wave.rows[0]) for wave in piece) for piece in pieces]
    assert sum(sizes) == 1100 and max(sizes) <= 512 and len(sizes) == 3
    monkeypatch.setattr(planning, "_PIECE_WAVES", 1)
    assert all(len(piece) == 1 for _, _, piece in plan_collection(rows, 256).pieces())


def test_digest_tells_plans_apart():
    rows = [[1, 2, 3], [4, 5]]
    digests = {plan_collection(other, 64).digest() for other in (rows, [[1, 2, 3], [4, 6]], [[1, 2, 3, 4], [5]])}
    assert len(digests) == 3 and plan_collection(rows, 64).digest() in digests
    assert plan_collection(rows, 64, lanes=2).digest() not in digests


needs = st.lists(
    st.builds(lambda n, b, t, p: Need(n, b, min(t, n), p) if p >= 0 else Need(n, 1, n, -1), st.integers(1, 4000),
              st.integers(1, 60), st.integers(1, 900), st.integers(-1, 900)), min_size=1, max_size=60)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(needs, st.integers(3, 12))
def test_chosen_shapes_hold_what_they_are_chosen_for(needs, limit):
    shapes = choose_shapes(needs, limit)
    assert len(set(shapes)) <= limit
    for need, shape in zip(needs, shapes, strict=True):
        assert np.sign(need.prefix) == np.sign(shape.prefix)
        assert all(small <= large for small, large in zip(need, shape, strict=True))


def test_a_dozen_lengths_in_a_dozen_shapes_leave_next_to_no_padding():
    needs = [Need(1000 * (1 + i % 12), 1, 80, 0) for i in range(600)]
    shapes = choose_shapes(needs, 12)
    assert sum(s.tokens for s in shapes) < 1.02 * sum(n.tokens for n in needs)
    assert {shape.tokens for shape in choose_shapes(needs, 3)} <= set(range(1000, 13000, 1000))


def test_a_shape_more_is_not_worth_it_for_a_few_tokens():
    assert len(set(choose_shapes([Need(100, 2, 60, 0), Need(300, 4, 80, 0)], 12))) == 1
