import numpy as np
import pytest

from jaxscape.report import style
from jaxscape.report.training import smoothed, training, training_layers

LOG = [{"step": step, "loss": 2.0 / step, "accuracy": step / 40} for step in range(1, 41)]
ASKED = [{"step": step, "accuracy_micro": 0.3 + step / 100} for step in (0, 20, 40)]
STEPS = {"0shot": 0, "sft@3": 3, "sft": 40}


def checkpoints():
    rng = np.random.default_rng(0)
    scores = [f"{name}_{label}" for label in ("answer", "subject")
              for name in ("best_ari", "late_ari", "late_neighbors_same")]  # fmt: skip
    return [{"condition": c, "step": step, "accuracy_micro": float(rng.random())}
            | {name: float(rng.random()) for name in scores} for c, step in STEPS.items()]  # fmt: skip


def drawn(axes) -> dict:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_smoothing_is_the_mean_of_neighbouring_steps():
    steps, values = np.arange(3.0, 60.0), np.random.default_rng(1).random(57)
    expected = [values[(steps >= s / 1.25) & (steps <= s * 1.25)].mean() for s in steps]
    np.testing.assert_allclose(smoothed(steps, values), expected)


def test_panels_hold_the_log_the_evaluations_and_the_checkpoints():
    rows = checkpoints()
    loss, accuracy, answers, subjects = training(LOG, ASKED, rows).axes
    assert [[step, value] for step, value in loss.lines[0].get_xydata()] == [[r["step"], r["loss"]] for r in LOG]
    assert drawn(accuracy)["validation questions"] == [[r["step"], r["accuracy_micro"]] for r in ASKED]
    assert drawn(accuracy)["test questions"] == [[r["step"], r["accuracy_micro"]] for r in rows]
    for axes, label in ((answers, "answer"), (subjects, "subject")):
        for line, name in zip(axes.lines, ("best_ari", "late_ari", "late_neighbors_same"), strict=True):
            assert line.get_xydata().tolist() == [[r["step"], r[f"{name}_{label}"]] for r in rows]
        assert axes.get_xlim()[0] < 0 and axes.get_xscale() == "symlog"  # step 0 has its place
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "5", "10", "20"]


@pytest.mark.parametrize("rows", [[], checkpoints()[:1]])
def test_loss_and_accuracy_alone_where_no_checkpoint_was_asked(rows, tmp_path):
    fig = training(LOG, [], rows)
    assert len(fig.axes) == 2
    style.save(fig, tmp_path, "f")
    with pytest.raises(ValueError, match="log is empty"):
        training([], [], rows)


def test_maps_hold_the_layers_table():
    rng = np.random.default_rng(2)
    rows = [{"condition": c, "layer": layer, "ari_answer": rng.random(), "neighbors_same_answer": rng.random()}
            for c in ("5shot", *STEPS) for layer in (4, 2, 1)]  # fmt: skip
    rows[3]["ari_answer"] = None
    fig = training_layers(rows, checkpoints())
    for axes, quantity in zip(fig.axes[:2], ("ari_answer", "neighbors_same_answer"), strict=True):
        found = {(r["condition"], r["layer"]): r[quantity] for r in rows}
        expected = np.array([[found[c, layer] for c in STEPS] for layer in (1, 2, 4)], float)
        (mesh,) = axes.collections
        np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan).reshape(3, 3), expected)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "3", "40"]
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == ["1", "2", "4"]
    with pytest.raises(ValueError, match="sft@3"):
        training_layers([r for r in rows if r["condition"] != "sft@3"], checkpoints())
