import sys
import types

import pytest

from jaxscape.finetune.trackers import TRACKERS, Trackers, check_trackers


class Run:
    """What a tracker was told."""

    def __init__(self, **options):
        self.options, self.points, self.closed = options, [], False

    def add_text(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.points.append((step, name, value))

    def log(self, values):
        self.points += [(values["step"], name, value) for name, value in values.items() if name != "step"]

    def define_metric(self, name, step_metric=None):
        self.options |= {name: step_metric}

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def runs(monkeypatch):
    """Stands in for both packages; every run they begin."""
    made = []

    def begin(logdir=None, **options):
        made.append(Run(logdir=logdir, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=begin))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=begin))
    return made


def follow(folder, start=0, names=TRACKERS):
    with Trackers(names, folder, label="sft", config={"steps": 3}, start=start) as trackers:
        trackers.log(start + 1, {"train/loss": 1.5, "train/accuracy": 0.5})


def test_both_are_told_the_same_and_closed(runs, tmp_path):
    follow(tmp_path)
    assert [run.points for run in runs] == [[(1, "train/loss", 1.5), (1, "train/accuracy", 0.5)]] * 2
    assert all(run.closed for run in runs)
    assert runs[0].options["logdir"] == str(tmp_path / "tensorboard")
    assert runs[1].options["project"] == "jaxscape" and runs[1].options["config"] == {"steps": 3}
    assert runs[1].options["*"] == "step"


def test_resumed_run_is_the_same_run(runs, tmp_path):
    for start in (0, 2):
        follow(tmp_path, start)
    board, wandb = runs[::2], runs[1::2]
    assert [run.options["purge_step"] for run in board] == [None, 3]
    assert len({run.options["id"] for run in wandb}) == 1 and wandb[1].options["resume"] == "allow"
    (tmp_path / "other").mkdir()
    follow(tmp_path / "other")
    assert runs[-1].options["id"] != wandb[0].options["id"]


def test_trackers_are_closed_when_the_run_fails(runs, tmp_path):
    with pytest.raises(ZeroDivisionError), Trackers(TRACKERS, tmp_path, label="sft", config={}, start=0):
        raise ZeroDivisionError
    assert all(run.closed for run in runs)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_is_named_with_what_installs_it(name, package, monkeypatch, raises_input_error):
    monkeypatch.setitem(sys.modules, package, None)
    with raises_input_error("config.finetune.trackers", f"'{name}'", f"pip install -e '.[{name}]'", package):
        check_trackers([name])


def test_unknown_tracker_is_refused_with_the_choices(raises_input_error):
    with raises_input_error("config.finetune.trackers 'mlflow'", *TRACKERS):
        check_trackers(["mlflow"])


def test_wandb_that_does_not_start_says_what_to_do(runs, monkeypatch, tmp_path, raises_input_error):
    def init(**_):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with raises_input_error("api_key not configured (no-tty)", "wandb login", "WANDB_MODE=offline"):
        follow(tmp_path, names=["tensorboard", "wandb"])
    assert [run.closed for run in runs] == [True]


def test_tensorboard_reads_the_curves_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboardX")
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, end in ((0, 4), (2, 5)):
        with Trackers(["tensorboard"], tmp_path, label="sft", config={}, start=start) as trackers:
            for step in range(start + 1, end + 1):
                trackers.log(step, {"train/loss": 1 / step})
    found = reading.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    points = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert points == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
