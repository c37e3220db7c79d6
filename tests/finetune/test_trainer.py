import csv
import dataclasses
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from jaxscape.data.batches import BatchShape, pack
from jaxscape.errors import Terminated
from jaxscape.finetune import trainer
from jaxscape.finetune.batching import data_order
from jaxscape.finetune.checkpoints import KEPT, STATE, Checkpoints, steps_in
from jaxscape.finetune.evaluation import Evaluator
from jaxscape.finetune.log import Log
from jaxscape.finetune.objective import Metrics
from jaxscape.finetune.optimizers import schedule
from jaxscape.finetune.trainer import TrainingRun, load_finetuned, load_trained
from jaxscape.models.lora import LoraConfig
from jaxscape.models.pretrained import values_of
from tests.finetune import runs
from tests.finetune.runs import CONFIG, FULL, before_step, left_by, tiny, train, training_set


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Method -> (folder of a run that nothing interrupted, its facts)."""
    found = {}
    for config in (CONFIG, FULL):
        folder = tmp_path_factory.mktemp(config.method)
        found[config.method] = folder, train(config, folder)
    return found


@pytest.fixture
def taken(monkeypatch):
    """The steps that are taken, from 0."""
    steps, take = [], TrainingRun.step
    monkeypatch.setattr(TrainingRun, "step", lambda self, number: steps.append(number) or take(self, number))
    return steps


def rows_of(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def steps_of(run, count):
    return [float(run.step(step).gradient_norm) for step in range(count)]


def stop():
    raise KeyboardInterrupt


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=lambda c: c.method)
def test_training_changes_what_it_should_and_nothing_else(config, unbroken):
    folder, facts = unbroken[config.method]
    trained, before = load_trained(folder), values_of(tiny().params)
    assert facts["parameters_trained"] == sum(value.size for value in trained.values())
    assert {value.dtype for value in trained.values()} == {np.dtype(np.float32)}
    if config.method == "lora":
        assert {path[-1] for path in trained} == {"a", "b"} and len(trained) == 14
        assert all(np.abs(value).max() > 0 for path, value in trained.items() if path[-1] == "b")
    else:
        assert trained.keys() == before.keys()
        assert all((trained[path] != np.asarray(value)).any() for path, value in before.items())


def test_model_keeps_its_arrays_when_adapters_are_trained(tmp_path):
    model = tiny()
    before = {path: np.array(value) for path, value in values_of(model.params).items()}
    train(CONFIG, tmp_path, model)
    for path, value in values_of(model.params).items():
        np.testing.assert_array_equal(np.asarray(value), before[path])


def test_adapters_are_trained_on_their_targets_alone():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(2, 4.0, 0.0, ("q", "down")))
    assert sorted(TrainingRun(tiny(), config, training_set()).tree()["trainable"]) == [
        f"blocks.{name}.adapter.{half}" for name in ("attention.q", "mlp.down") for half in "ab"
    ]


def test_every_kept_step_is_what_its_steps_left(unbroken):
    run, model = TrainingRun(tiny(), FULL, training_set()), tiny()
    assert steps_in(unbroken["full"][0] / KEPT) == list(FULL.kept_steps()) == [2, 4, 7]
    for step in range(7):
        run.step(step)
        if step + 1 in FULL.kept_steps():
            loaded = values_of(load_finetuned(model, FULL, unbroken["full"][0], step + 1).params)
            for path, value in values_of(run.trainable).items():
                np.testing.assert_array_equal(np.asarray(loaded[path]), np.asarray(value))
    last = values_of(load_finetuned(model, FULL, unbroken["full"][0]).params)
    assert all((np.asarray(last[path]) == np.asarray(v)).all() for path, v in values_of(run.trainable).items())


def test_folded_adapters_give_the_trained_function(unbroken, tiny_model):
    run = TrainingRun(tiny(), CONFIG, training_set())
    steps_of(run, CONFIG.steps)
    batch = pack(training_set().tokens[:4], BatchShape(64, 4, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def hidden(graphdef, *states):
        return nnx.merge(graphdef, *states)(batch).hidden

    adapted = hidden(run.graphdef, run.trainable, run.frozen)
    folded = load_finetuned(tiny_model, CONFIG, unbroken["lora"][0])
    found = hidden(folded.graphdef, folded.params)
    np.testing.assert_allclose(found, adapted, rtol=0, atol=1e-4)
    plain = hidden(tiny_model.graphdef, tiny_model.params)
    assert np.abs(np.asarray(found) - np.asarray(plain)).max() > 1e-2


def test_half_precision_model_is_trained_in_float32_and_loaded_as_it_was(unbroken):
    run = TrainingRun(tiny("bfloat16"), dataclasses.replace(FULL, dtype="bfloat16"), training_set())
    assert {leaf.dtype for leaf in jax.tree.leaves(run.trainable)} == {jnp.dtype(jnp.float32)}
    assert run.dtype == jnp.bfloat16
    loaded = values_of(load_finetuned(tiny("bfloat16"), FULL, unbroken["full"][0]).params)
    trained = load_trained(unbroken["full"][0])
    assert {value.dtype for value in loaded.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(np.asarray(loaded["embedding",]), trained["embedding",].astype(jnp.bfloat16))


def test_one_program_serves_every_step_of_a_shape():
    run = TrainingRun(tiny(), FULL, training_set())
    sizes, new = [], []
    for step in range(3):
        new.append(run.is_new(step))
        run.step(step)
        sizes.append(run._train_step._cache_size())
    assert len(set(sizes)) == 1 and new == [True, False, False] and len(run.batches.shapes) == 1


def test_log_has_every_step(unbroken):
    folder, facts = unbroken["lora"]
    rows = rows_of(folder / trainer.LOG)
    assert list(rows[0]) == ["step", "loss", "accuracy", "gradient_norm", "learning_rate", "tokens"]
    assert [int(row["step"]) for row in rows] == list(range(1, 8))
    assert [float(r["learning_rate"]) for r in rows] == [float(schedule(CONFIG)(step)) for step in range(7)]
    lengths = np.array([len(row) for row in training_set().tokens])[data_order(10, 7, 4, 0)]
    assert [int(row["tokens"]) for row in rows] == lengths.sum(axis=1).tolist()
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    assert facts["final_loss"] == pytest.approx(np.mean([float(row["loss"]) for row in rows]))
    assert facts["tokens"] == lengths.sum() and facts["tokens_per_second"] > 0
    assert facts["kept_steps"] == [2, 4, 7]
    parquet = pq.read_table(folder / "log.parquet").to_pylist()
    assert [{name: repr(value) for name, value in row.items()} for row in parquet] == rows


def test_validation_is_asked_at_even_steps_of_the_parameters_of_that_step(unbroken):
    folder, facts = unbroken["lora"]
    rows = rows_of(folder / trainer.VALIDATION)
    assert [int(row["step"]) for row in rows] == [0, 4, 7]
    run, data, model = TrainingRun(tiny(), CONFIG, training_set()), runs.validation_set(), tiny()
    table = trainer.letter_table(model.tokenizer.letter_ids())
    steps_of(run, 4)
    found = Evaluator(run.graphdef, data, table, 1, run.dtype)(run.trainable, run.frozen)
    expected = {"step": 4, "accuracy_micro": found.micro, "accuracy_macro": found.macro, "letters_loss": found.loss}
    assert rows[1] == {name: repr(value) for name, value in expected.items()}
    subjects = [row for row in rows_of(folder / trainer.BY_SUBJECT) if row["step"] == "4"]
    assert {row["subject"]: float(row["accuracy"]) for row in subjects} == dict(found.by_subject)
    assert facts["validation_accuracy_micro"] == float(rows[-1]["accuracy_micro"])
    assert facts["validation_accuracy_macro"] == float(rows[-1]["accuracy_macro"])


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=lambda c: c.method)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_broken_run_goes_on_to_the_same_bits(config, step, tmp_path, unbroken, taken):
    with before_step(step, stop), pytest.raises(KeyboardInterrupt):
        train(config, tmp_path)
    taken.clear()
    train(config, tmp_path)
    assert taken == list(range(step // 2 * 2, 7))  # from the last state
    assert left_by(tmp_path) == left_by(unbroken[config.method][0])


@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_signal_ends_the_run_after_its_step_with_the_state_saved(number, error, at, tmp_path, unbroken, taken, capfd):
    before = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with before_step(at, lambda: os.kill(os.getpid(), number)), pytest.raises(KeyboardInterrupt) as caught:
        train(CONFIG, tmp_path)
    assert caught.type is error and getattr(caught.value, "exit_code", 130) == (130 if number == signal.SIGINT else 143)
    assert "once more to stop at once" in capfd.readouterr().err
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == before
    assert taken == list(range(at + 1)) and steps_in(tmp_path / STATE) == [at + 1]
    train(CONFIG, tmp_path)
    assert taken == list(range(7))  # no step twice
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


@pytest.mark.parametrize("moment", ["the last parameters are written", "the last files are"])
def test_signal_after_the_last_step_ends_the_program_and_costs_no_step(moment, tmp_path, monkeypatch, unbroken, taken):
    held, name = (Log, "write_parquet") if moment == "the last files are" else (Checkpoints, "wait")
    done, sent = getattr(held, name), []

    def signalled(self):
        if not sent:  # a second one would end it at once
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        done(self)

    with monkeypatch.context() as patch:
        patch.setattr(held, name, signalled)
        with pytest.raises(Terminated):
            train(CONFIG, tmp_path)
    assert taken == list(range(7)) and max(steps_in(tmp_path / STATE)) == 6  # what is kept is enough
    train(CONFIG, tmp_path)
    assert taken == list(range(7))
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


@pytest.mark.parametrize("lost", ["", "kept/7", "a row of log.csv", "a row of validation.csv"])
def test_finished_run_is_taken_again_only_from_where_it_lacks_something(lost, tmp_path, unbroken, taken):
    expected = train(CONFIG, tmp_path)
    if lost.startswith("a row"):
        file = tmp_path / lost.split()[-1]
        file.write_bytes(file.read_bytes()[:-5])
    elif lost:
        shutil.rmtree(tmp_path / lost)
    taken.clear()
    facts = train(CONFIG, tmp_path)
    assert taken == ([6] if lost else [])
    assert {**facts, "tokens_per_second": 0} == {**expected, "tokens_per_second": 0}
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


def test_nothing_of_before_is_held_while_a_state_is_read(unbroken):
    run = TrainingRun(tiny(), FULL, training_set())
    before, expected = jax.tree.leaves((run.trainable, run.opt_state)), jax.device_get(run.tree())

    def read(like):
        assert all(leaf.is_deleted() for leaf in before)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, like, expected))
        return jax.tree.map(lambda leaf, value: jax.device_put(value, leaf.sharding), like, expected)

    run.restore(read)
    assert jax.tree.all(jax.tree.map(np.array_equal, run.tree(), expected))
    assert math.isfinite(run.step(0).loss)


def test_run_that_goes_on_on_another_mesh_says_so(tmp_path, capsys):
    with before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Terminated):
        train(CONFIG, tmp_path)
    assert "began on" not in capsys.readouterr().out
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace("data 1", "data 2"))
    train(CONFIG, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("began on")]
    assert "data 2 x fsdp 1 x tensor 1, goes on on data 1" in line and "dropout" in line and "not to the bit" in line


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=lambda c: c.method)
def test_model_that_is_given_up_is_not_held_beside_the_loaded_one(config, unbroken):
    kept, given = tiny(), tiny()
    expected = values_of(load_finetuned(kept, config, unbroken[config.method][0]).params)
    found = values_of(load_finetuned(given, config, unbroken[config.method][0], donate=True).params)
    assert all(np.array_equal(found[path], value) for path, value in expected.items())
    assert not any(value.is_deleted() for value in values_of(kept.params).values())
    changed = {path for path, value in values_of(given.params).items() if value.is_deleted()}
    assert changed == {path for path in expected if path[-1] == "kernel" or config.method == "full"}


def test_second_signal_interrupts_at_once(tmp_path, taken):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with before_step(3, twice), pytest.raises(KeyboardInterrupt) as caught:
        train(CONFIG, tmp_path)
    assert caught.type is KeyboardInterrupt and taken == [0, 1, 2]


def test_ignored_signals_stay_ignored(tmp_path, taken):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with before_step(1, lambda: os.kill(os.getpid(), signal.SIGINT)):
            train(CONFIG, tmp_path)
        assert taken == list(range(7)) and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_run_that_meets_every_mishap_ends_as_one_that_met_none(tmp_path, unbroken):
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "tests.finetune.runs", str(folder)], capture_output=True, text=True,
                          check=False, cwd=Path(__file__).parents[2], timeout=200,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    terminated, full = [line for line in done.stdout.splitlines() if not line.startswith(("memory: ", "log: "))]
    assert terminated == "terminated 143 [3]"
    for words in ("could not be written", "File too large", "last good state is of step 3", "same command again"):
        assert words in full
    assert full.endswith("[3]") and "Traceback" not in done.stderr
    assert (folder / STATE / "6.orbax-checkpoint-tmp").is_dir() and max(steps_in(folder / STATE)) == 4
    train(CONFIG, folder)
    assert left_by(folder) == left_by(unbroken["lora"][0])


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("bad", ["loss", "gradient_norm"])
def test_divergence_stops_before_it_is_saved(bad, ahead, tmp_path, monkeypatch, raises_input_error):
    take = TrainingRun.step

    def diverging(self, number):
        found = take(self, number)
        return found._replace(**{bad: jnp.float32(math.nan)}, finite=jnp.bool_(False)) if number == 5 else found

    monkeypatch.setattr(TrainingRun, "step", diverging)
    monkeypatch.setattr(trainer, "_AHEAD", {"cpu": ahead})
    data, order = training_set(), data_order(10, 7, 4, 0)[5]
    words = ("diverged", "nan", "at step 6", *(data.names[question] for question in order[:3]), "and 1 more",
             "last good state is of step 4", str(tmp_path / KEPT / "4"), "config.finetune.learning_rate")  # fmt: skip
    with raises_input_error(*words):
        train(CONFIG, tmp_path)
    assert steps_in(tmp_path / STATE) == [4] and steps_in(tmp_path / KEPT) == [2, 4]
    assert [int(row["step"]) for row in rows_of(tmp_path / trainer.LOG)] == [1, 2, 3, 4, 5]


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, raises_input_error):
    """The update overflows, not the gradient: the step that spoilt them is named, and nothing is made of them."""
    config = dataclasses.replace(CONFIG, optimizer="sgd", learning_rate=1e39, warmup_ratio=0.0, final_ratio=1.0,
                                 evaluations=7, clip_norm=1e3)  # fmt: skip
    names = [training_set().names[question] for question in data_order(10, 7, 4, 0)[0]]
    with raises_input_error("diverged", "parameters are not finite after step 1", names[0], "no state before it"):
        train(config, tmp_path)
    assert steps_in(tmp_path / KEPT) == steps_in(tmp_path / STATE) == []
    assert [int(row["step"]) for row in rows_of(tmp_path / trainer.VALIDATION)] == [0]


def test_folder_of_another_run_is_refused(tmp_path, raises_input_error, unbroken):
    with before_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Terminated):
        train(CONFIG, tmp_path)
    with raises_input_error(str(tmp_path), "another run", "learning_rate, seed changed"):
        train(dataclasses.replace(CONFIG, learning_rate=1.0, seed=3), tmp_path)
    other = training_set()
    with raises_input_error(str(tmp_path), "another run", "the questions changed"):
        train(CONFIG, tmp_path, data=other._replace(targets=other.targets[::-1]))
    asked = runs.validation_set()
    with raises_input_error(str(tmp_path), "another run", "the questions changed"):
        train(CONFIG, tmp_path, validation=asked._replace(answers=asked.answers[::-1]))
    train(dataclasses.replace(CONFIG, save_every=1, keep=2), tmp_path)
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


def test_metrics_fetched_a_step_later_are_the_same(tmp_path, monkeypatch, unbroken):
    monkeypatch.setattr(trainer, "_AHEAD", {"cpu": 1})
    train(CONFIG, tmp_path)
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


def test_full_disk_under_the_log_is_reported(tmp_path, monkeypatch, raises_input_error, unbroken):
    with monkeypatch.context() as patch:
        append = Log.append

        def full(self, row):
            if self.path.name == trainer.LOG and row["step"] == 6:
                self._file.write(b"6,1.")
                raise OSError(28, "No space left on device")
            append(self, row)

        patch.setattr(Log, "append", full)
        with raises_input_error("the disk is full", str(tmp_path / trainer.LOG), "state is of step 4", "make room"):
            train(CONFIG, tmp_path)
    train(CONFIG, tmp_path)
    assert left_by(tmp_path) == left_by(unbroken["lora"][0])


@pytest.mark.parametrize(("lost", "words"), [
    ("kept/4", ["parameters of step 4"]), ("log.csv", ["log.csv", "after step 0"]),
    ("validation.csv", ["validation.csv", "of step 0"]),
])  # fmt: skip
def test_folder_that_lost_something_is_refused(lost, words, tmp_path, raises_input_error):
    with before_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Terminated):
        train(CONFIG, tmp_path)
    (tmp_path / lost).rename(tmp_path / "elsewhere")
    with raises_input_error(str(tmp_path), *words, "state is of step 5", "delete"):
        train(CONFIG, tmp_path)


def test_trackers_follow_the_steps_and_the_validation(tmp_path, monkeypatch):
    points = []

    class Run(types.SimpleNamespace):
        def add_scalar(self, name, value, step):
            points.append((step, name, value))

    def begin(*_, **__):
        return Run(add_text=lambda *_: None, close=lambda: None)

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=begin))
    train(CONFIG, tmp_path, trackers=["tensorboard"])
    for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
        expected = [(int(row["step"]), float(row[name])) for row in rows_of(tmp_path / trainer.LOG)]
        assert [(step, value) for step, found, value in points if found == f"train/{name}"] == expected
    assert {step for step, name, value in points if name == "train/tokens_per_second" and value > 0} >= {3, 4, 5}
    expected = [(int(row["step"]), float(row["accuracy_macro"])) for row in rows_of(tmp_path / trainer.VALIDATION)]
    assert [(step, value) for step, name, value in points if name == "validation/accuracy_macro"] == expected


def test_missing_tracker_is_found_before_anything_is_computed(tmp_path, monkeypatch, raises_input_error, taken):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with raises_input_error("pip install -e '.[wandb]'"):
        train(CONFIG, tmp_path, trackers=["wandb"])
    assert not taken and not list(tmp_path.iterdir())


def test_eight_questions_are_learnt_by_heart(tmp_path):
    config = dataclasses.replace(FULL, steps=40, batch_size=8, learning_rate=1e-2, save_every=40)
    facts = train(config, tmp_path, data=training_set(8))
    rows = rows_of(tmp_path / trainer.LOG)
    assert float(rows[0]["accuracy"]) < 1 and float(rows[0]["loss"]) > 1
    assert [float(row["accuracy"]) for row in rows[-5:]] == [1.0] * 5 and float(rows[-1]["loss"]) < 0.05
    assert "validation_accuracy_micro" not in facts


def test_dropout_follows_the_seed_and_the_step():
    runs = [TrainingRun(tiny(), CONFIG, training_set()) for _ in "ab"]
    first, second = (steps_of(run, 3) for run in runs)
    assert first == second
    keys = [jax.random.fold_in(runs[0].dropout_key, step) for step in range(3)]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 3
    without = dataclasses.replace(CONFIG, lora=LoraConfig(4, 8.0, 0.0))
    assert TrainingRun(tiny(), without, training_set()).dropout_key is None


def test_memory_is_told_once(tmp_path, capsys):
    run = TrainingRun(tiny(), CONFIG, training_set())
    train(CONFIG, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(run.trainable))
    assert f"holds {trained / 1e6:.1f} MB trained" in line and "a step needs" in line
    assert isinstance(run.step(0), Metrics)


@pytest.mark.parametrize(
    ("optimizer", "moments"), [("adamw", 2), ("adafactor", 1), ("sgd(momentum=0.9)", 1), ("lion", 1)]
)
def test_optimizer_state_lies_beside_its_parameters(optimizer, moments):
    run = TrainingRun(tiny(), dataclasses.replace(CONFIG, optimizer=optimizer), training_set())
    parameters = Counter((leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(run.trainable))
    state = Counter((leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(run.opt_state) if leaf.size > 1)
    assert state == Counter({place: moments * count for place, count in parameters.items()})
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(run.opt_state)} == {run.mesh}
