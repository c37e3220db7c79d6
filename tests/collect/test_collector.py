"""Plans run through the tiny model into stores: the same states whatever is shared, wherever it was cut short."""

from collections import Counter

import jax
import numpy as np
import pytest

from jaxscape.collect import collector, planning
from jaxscape.collect.collector import Target, collect_conditions, run_plan
from jaxscape.collect.planning import plan_collection
from jaxscape.collect.recipe import Recipe
from jaxscape.collect.store import Pending, Store
from jaxscape.models.answers import letter_table
from jaxscape.workspace import read_json, write_json

LETTERS = letter_table([[5, 15], [6], [7, 17], [8]])
LAYERS = (1, 2, 3, 4)
GROUPS = "abcabzcaabbczc"
RESIDUAL = Recipe(("residual",), LAYERS, None, LETTERS)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


def prompts(groups: str = GROUPS, seed=0):
    """One prompt for each letter; those of one letter begin alike, except z's."""
    draw = np.random.default_rng(seed)
    shared = {name: draw.integers(1, 380, 10 + 3 * i).tolist() for i, name in enumerate(sorted(set(groups)))}
    shared["z"] = []
    return [shared[name] + [20 + i, *draw.integers(1, 380, draw.integers(1, 12)).tolist()]
            for i, name in enumerate(groups)]  # fmt: skip


def plan_of(tokens, pass_cost=0, **kinds):
    return plan_collection(tokens, 128, pass_cost=pass_cost, **kinds)


def collect(model, tokens, folders, plan=None, recipe=RESIDUAL, dtype="float32"):
    """States, letters' logits and free tokens of each folder, whose prompts are equal parts of all; and the facts."""
    count = len(tokens) // len(folders)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    targets = [Target(folder.name, folder, i * count, (i + 1) * count) for i, folder in enumerate(folders)]
    facts = collect_conditions(model, plan or plan_of(tokens), recipe, targets, dtype=dtype, label="test")
    stores = [Store.open(folder) for folder in folders]
    return [(np.stack([s.layer(n) for n in range(len(s.layers))]), s.answer_logits(), s.free_tokens())
            for s in stores], facts  # fmt: skip


def assert_same(left, right):
    for a, b in zip(left[:2], right[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    np.testing.assert_array_equal(left[2], right[2])


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """Without any shared prefix."""
    with jax.default_matmul_precision("float32"):
        found, facts = collect(tiny_model, prompts(), [tmp_path_factory.mktemp("whole")], plan_of(prompts(), 10**6))
    assert facts[0]["plan"]["tokens_run"] == facts[0]["prompt_tokens"]
    return found[0]


def test_shared_prefixes_change_nothing(whole, tiny_model, tmp_path):
    (found,), (facts,) = collect(tiny_model, prompts(), [tmp_path])
    assert_same(found, whole)
    assert facts["plan"]["tokens_run"] < facts["prompt_tokens"] == sum(map(len, prompts()))
    assert facts["shape"] == [4, len(GROUPS), 32] and facts["layers"] == [1, 2, 3, 4]


def test_rows_stand_in_the_order_of_the_questions(whole, tiny_model, tmp_path):
    order = np.random.default_rng(1).permutation(len(GROUPS))
    tokens = prompts()
    (found,), _ = collect(tiny_model, [tokens[i] for i in order], [tmp_path])
    assert_same(found, (whole[0][:, order], whole[1][order], whole[2][order]))


def chain():
    """Two conditions of the same questions: 0-shot and one whose shots continue the header."""
    draw = np.random.default_rng(3)
    header, shots = draw.integers(1, 380, 12).tolist(), draw.integers(1, 380, 30).tolist()
    questions = [[20 + i, *draw.integers(1, 380, draw.integers(2, 14)).tolist()] for i in range(10)]
    return [header + q for q in questions] + [header + shots + q for q in questions]


def test_conditions_of_one_plan_share_a_cache_and_keep_their_own_stores(tiny_model, tmp_path):
    tokens, plan = chain(), plan_of(chain())
    assert [job.lengths for job in plan.jobs] == [(42,)]  # one cache, which serves 12 of its tokens too
    assert {wave.depths for piece in plan.jobs[0].pieces for wave in piece} == {(42,), (12,)}
    together, facts = collect(tiny_model, tokens, [tmp_path / "0shot", tmp_path / "1shot"])
    for part, found in zip((tokens[:10], tokens[10:]), together, strict=True):
        (alone,), _ = collect(tiny_model, part, [tmp_path / f"alone{len(part[0])}"], plan_of(part, 10**6))
        assert_same(found, alone)
    assert [f["prompt_tokens"] for f in facts] == [sum(map(len, tokens[:10])), sum(map(len, tokens[10:]))]


def test_finished_condition_is_not_written_and_the_other_is_the_same_to_the_bit(tiny_model, tmp_path):
    tokens = chain()
    together, _ = collect(tiny_model, tokens, [tmp_path / "0shot", tmp_path / "1shot"])
    (tmp_path / "again").mkdir()
    target = Target("again", tmp_path / "again", 10, 20)
    collect_conditions(tiny_model, plan_of(tokens), RESIDUAL, [target], dtype="float32", label="test")
    store = Store.open(tmp_path / "again")
    assert np.stack([store.layer(n) for n in range(4)]).tobytes() == together[1][0].tobytes()


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(planning, "_PIECE_WAVES", 1)


def cut_writes(monkeypatch, at):
    """Interrupts right after the writes of these numbers have begun; returns the count of all."""
    write, taken = Store.write, Counter()

    def cut(store, *arguments):
        taken["pieces"] += 1
        pending = write(store, *arguments)
        if taken["pieces"] in at:
            raise KeyboardInterrupt
        return pending

    monkeypatch.setattr(Store, "write", cut)
    return taken


def test_collection_that_was_cut_short_goes_on_to_the_same_bits(tiny_model, tmp_path, monkeypatch, small_pieces):
    tokens = [row + [n] for n in range(9, 13) for row in prompts()]
    plan = plan_of(tokens)
    pieces = len(list(plan.pieces()))
    assert pieces > 4
    ((states, logits, free),), facts = collect(tiny_model, tokens, [tmp_path / "unbroken"])
    taken = cut_writes(monkeypatch, (2, 4))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_model, tokens, [tmp_path / "broken"])
    ((again, again_logits, again_free),), again_facts = collect(tiny_model, tokens, [tmp_path / "broken"])
    assert taken["pieces"] > pieces  # what was not yet recorded ran again
    assert again.tobytes() == states.tobytes() and again_logits.tobytes() == logits.tobytes()
    assert again_free.tobytes() == free.tobytes() and again_facts == facts


def test_two_conditions_cut_between_their_writes_go_on_to_the_same_bits(tiny_model, tmp_path, monkeypatch):
    unbroken, _ = collect(tiny_model, chain(), [tmp_path / "a", tmp_path / "b"])
    cut_writes(monkeypatch, (1, 2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_model, chain(), [tmp_path / "c", tmp_path / "d"])
    again, _ = collect(tiny_model, chain(), [tmp_path / "c", tmp_path / "d"])
    for left, right in zip(unbroken, again, strict=True):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


def pieces_run(model, tokens, folder, monkeypatch):
    run, dispatched = [], collector._dispatched

    def watched(*arguments):
        for found in dispatched(*arguments):
            run.append(found[0])
            yield found

    monkeypatch.setattr(collector, "_dispatched", watched)
    collect(model, tokens, [folder])
    return run


def test_pieces_that_are_recorded_are_not_run_again(tiny_model, tmp_path, monkeypatch, small_pieces):
    tokens = prompts()
    collect(tiny_model, tokens, [tmp_path])
    progress = read_json(tmp_path / "progress.json")
    every = [number for number, _, _ in plan_of(tokens).pieces()]
    assert progress["pieces"] == every and len(every) > 2
    write_json(tmp_path / "progress.json", {**progress, "pieces": every[1:]})
    assert pieces_run(tiny_model, tokens, tmp_path, monkeypatch) == every[:1]


def test_progress_of_another_plan_does_not_count(tiny_model, tmp_path, monkeypatch):
    tokens = prompts()
    collect(tiny_model, tokens, [tmp_path])
    write_json(tmp_path / "progress.json", {**read_json(tmp_path / "progress.json"), "plan": "another"})
    assert set(pieces_run(tiny_model, tokens, tmp_path, monkeypatch)) == {n for n, _, _ in plan_of(tokens).pieces()}


def test_a_piece_is_recorded_only_once_it_is_on_disk(tiny_model, tmp_path, monkeypatch, small_pieces):
    recorded = []

    def result(pending):
        found = read_json(tmp_path / "progress.json") or {"pieces": []}
        recorded.append(len(found["pieces"]))
        for future in pending._futures:
            future.result()

    monkeypatch.setattr(Pending, "result", result)
    collect(tiny_model, prompts(), [tmp_path])
    assert recorded == list(range(len(list(plan_of(prompts()).pieces()))))


def test_one_cache_lives_at_a_time_and_none_at_the_end(tiny_model, monkeypatch):
    made, alive, run_prefix = [], [], collector.run_prefix

    def counted(*arguments, **names):
        found = run_prefix(*arguments, **names)
        made.append(found.keys)
        alive.append(sum(not keys.is_deleted() for keys in made))
        return found

    monkeypatch.setattr(collector, "run_prefix", counted)
    for _ in run_plan(tiny_model, plan_of(prompts()), RESIDUAL):
        pass
    assert len(made) == 3 and max(alive) == 1  # the one before is given back as soon as its last pass is on its way
    assert all(keys.is_deleted() for keys in made)


def test_next_pass_is_on_its_way_before_the_last_is_fetched(tiny_model, monkeypatch):
    events = []
    for name in ("run_prompts", "_fetch"):
        original = getattr(collector, name)
        monkeypatch.setattr(collector, name, lambda *a, o=original, n=name, **k: events.append(n) or o(*a, **k))
    parts = list(run_plan(tiny_model, plan_of(prompts()), Recipe(("residual",), LAYERS)))
    assert events == ["run_prompts"] + ["run_prompts", "_fetch"] * (len(parts) - 1) + ["_fetch"]


def test_states_that_overflow_are_refused(tiny_model, tmp_path, raises_input_error, monkeypatch):
    huge = collector.Part(0, True, [0, 1], {"residual": np.full((2, 2, 32), 1e5, np.float32)},
                          np.zeros((2, 4), np.float32), np.zeros(2, np.int32), None)  # fmt: skip
    monkeypatch.setattr(collector, "run_plan", lambda *_: iter([huge]))
    with raises_input_error(f"condition {tmp_path.name}", "layer 2", "float16", "float32"):
        collect(tiny_model, [[1, 2], [1, 3]], [tmp_path], dtype="float16",
                recipe=Recipe(("residual",), (2, 4), None, LETTERS))  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_are_rounded_to_the_dtype_on_disk(dtype, tiny_model, tmp_path):
    ((exact, logits, _),), _ = collect(tiny_model, prompts(), [tmp_path / "exact"])
    ((rounded, same, _),), (facts,) = collect(tiny_model, prompts(), [tmp_path / "rounded"], dtype=dtype)
    assert rounded.tobytes() == exact.astype(dtype).tobytes() and same.tobytes() == logits.tobytes()
    assert facts["dtype"] == dtype


def test_layers_and_sites_are_those_asked_for(whole, tiny_model, tmp_path):
    recipe = Recipe(("residual",), (2, 4), None, LETTERS)
    ((states, logits, _),), (facts,) = collect(tiny_model, prompts(), [tmp_path / "some"], recipe=recipe)
    assert facts["layers"] == [2, 4] and Store.open(tmp_path / "some").layers == (2, 4)
    np.testing.assert_allclose(states, whole[0][[1, 3]], rtol=0, atol=1e-5 * np.abs(whole[0]).max())
    recipe = Recipe(("final_norm",), LAYERS, None, LETTERS)
    ((last, same, _),), (facts,) = collect(tiny_model, prompts(), [tmp_path / "last"], recipe=recipe)
    assert last.shape == (1, len(GROUPS), 32) and facts["layers"] == [4] == list(Store.open(tmp_path / "last").layers)
    np.testing.assert_allclose(same, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_means_are_over_the_questions_tokens(tiny_model, tmp_path):
    """Against the last-token states of every beginning of a prompt: causal, so the same states."""
    tokens = [row[:14] + [50 + n] * 6 for n, row in enumerate(prompts("aaaaabbbbb"))]
    starts = [len(row) - 4 - n % 3 for n, row in enumerate(tokens)]
    recipe = Recipe(("residual",), LAYERS, starts, LETTERS)
    plan = plan_of(tokens, limits=starts)
    assert any(job.room for job in plan.jobs)
    ((means, _, _),), _ = collect(tiny_model, tokens, [tmp_path / "means"], plan, recipe)
    beginnings = [row[: n + 1] for row, start in zip(tokens, starts, strict=True) for n in range(start, len(row))]
    ((each, _, _),), _ = collect(tiny_model, beginnings, [tmp_path / "each"], plan_of(beginnings, 10**6))
    place = 0
    for number, (row, start) in enumerate(zip(tokens, starts, strict=True)):
        expected = each[:, place : place + len(row) - start].mean(axis=1)
        np.testing.assert_allclose(means[:, number], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        place += len(row) - start


def test_condition_that_was_finished_early_is_not_run_again(tiny_model, tmp_path, monkeypatch, small_pieces):
    """The first condition's prompts stand in the first pieces only; the run is stopped long after."""
    draw = np.random.default_rng(5)
    early, late = ([[first, *draw.integers(9, 380, 20).tolist()] for _ in range(14)] for first in (1, 2))
    folders = [tmp_path / "early", tmp_path / "late"]
    plan = plan_of(early + late)
    owners = [{row >= 14 for wave in waves for lane in wave.rows for row in lane} for _, _, waves in plan.pieces()]
    ends = max(number for number, own in enumerate(owners) if False in own)
    assert ends < len(owners) - 2
    fetch, taken = collector._fetch, Counter()

    def stopped(number, *rest):
        taken["parts"] += number == ends + 2
        if taken["parts"]:
            raise KeyboardInterrupt
        return fetch(number, *rest)

    monkeypatch.setattr(collector, "_fetch", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_model, early + late, folders, plan)
    recorded = [read_json(folder / "progress.json")["pieces"] for folder in folders]
    assert recorded == [[n for n in range(ends + 2) if own in owners[n]] for own in (False, True)]
