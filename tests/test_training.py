"""An experiment that follows its training: checkpoints asked and mapped, and what is exported of the last one."""

import json
import shutil

import numpy as np
import pytest

from jaxscape.collect.store import Store
from jaxscape.experiment import Experiment
from jaxscape.finetune import trainer
from jaxscape.models import export
from jaxscape.models.saving import new_folder
from jaxscape.report import tables
from tests.launching import run_here, small_config, unbroken

FOLLOWED = {
    "conditions": ("0shot", "sft@all"),
    "finetune__splits": ("dev", "train"),
    "finetune__per_subject": 20,
    "finetune__validation": "held_out",
    "finetune__validation_share": 0.25,
    "finetune__evaluations": 2,
    "finetune__epochs": 1.0,  # of 45 questions, 4 a step
    "finetune__learning_rate": 3e-2,
    "finetune__warmup_ratio": 0.0,  # else the first step changes nothing
    "finetune__export_merged": True,
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """An experiment that follows its training, and how often prompts were planned and checkpoints compiled."""
    unbroken(tmp_path_factory)
    root, planned = tmp_path_factory.mktemp("followed") / "workdir", []
    plan = Experiment._plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "_plan", lambda self, *rest: planned.append(1) or plan(self, *rest))
        run_here(small_config(**FOLLOWED), root)
    return root, len(planned)


def test_every_checkpoint_is_asked_and_mapped(followed):
    root, planned = followed
    names = ["0shot", "sft", "sft@1", "sft@3"]
    for kind in ("representations", "landscape"):
        assert sorted(path.name for path in (root / kind).iterdir()) == names
    assert planned == 2  # the pretrained model's prompts, and once those of all checkpoints
    states = {name: Store.open(root / "representations" / name).layer(3) for name in names}
    assert len({layer.tobytes() for layer in states.values()}) == 4
    distance = [np.linalg.norm(states[name] - states["0shot"]) for name in ("sft@1", "sft@3", "sft")]
    assert distance == sorted(distance)
    manifests = {name: json.loads((root / "representations" / name / "manifest.json").read_text()) for name in names}
    assert [manifests[name]["inputs"]["step"] for name in names[1:]] == [12, 1, 3]
    assert not (root / "checkpoints/sft/state").exists()


def test_training_is_written_down_as_the_configuration_says(followed):
    folder = followed[0] / "checkpoints/sft"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(tables.read_table(folder / "log.csv")) == 12  # 20 a subject, a quarter held out: 45 questions
    assert [row["step"] for row in tables.read_table(folder / "validation.csv")] == [0, 6, 12]
    subjects = [row["subject"] for row in tables.read_table(folder / "validation_by_subject.csv")]
    assert subjects == ["animals", "cities", "writers"] * 3
    assert manifest["kept_steps"] == [1, 3, 12]


def test_training_is_told_in_words(followed, tmp_path):
    page = (followed[0] / "report/index.html").read_text()
    manifest = json.loads((followed[0] / "checkpoints/sft/manifest.json").read_text())
    for words in ("LoRA of rank 4 on ", "peak rate 0.03, 12 steps of 4 questions (dev, train)",
                  f"validation accuracy {manifest['validation_accuracy_micro']:.3f}"):  # fmt: skip
        assert words in page
    adapter = str(followed[0] / "checkpoints/sft/adapter")
    run_here(small_config(conditions=("sft",), finetune__adapter=adapter), tmp_path / "a")
    page = (tmp_path / "a/report/index.html").read_text()
    assert adapter in page and "adapter, SHA-256" in page and "mean loss" not in page


def test_training_is_not_lost_when_its_export_fails(tmp_path, monkeypatch, raises_input_error):
    steps, config = [], small_config(conditions=("sft",), finetune__export_merged=True, finetune__validation="",
                                     finetune__evaluations=0)  # fmt: skip
    take, write = trainer.TrainingRun.step, export.write_merged
    monkeypatch.setattr(trainer.TrainingRun, "step", lambda self, number: steps.append(number) or take(self, number))

    def full(folder, *_):
        with new_folder(folder):
            raise OSError(122, "Disk quota exceeded")

    for stop, expected in ((full, raises_input_error("cannot write", "merged", "quota exceeded", "make room")),
                           (_stop, pytest.raises(KeyboardInterrupt))):  # fmt: skip
        monkeypatch.setattr(export, "write_merged", stop)
        with expected:
            run_here(config, tmp_path)
        assert steps == list(range(config.finetune.steps))
        assert not (tmp_path / "checkpoints/sft/merged").exists()
    monkeypatch.setattr(export, "write_merged", write)
    run_here(config, tmp_path)
    assert steps == list(range(config.finetune.steps)) and (tmp_path / "checkpoints/sft/merged/config.json").is_file()


def _stop(*_):
    raise KeyboardInterrupt


def test_checkpoints_that_are_not_asked_any_more_leave_the_results(followed, tmp_path):
    root = shutil.copytree(followed[0], tmp_path / "workdir")
    shown = [root / "results/training.csv", root / "results/training.parquet", root / "report/figures/training.svg"]
    shown[-1].parent.mkdir(parents=True)
    shown[-1].touch()  # the figures of others are not drawn here
    assert all(file.is_file() for file in shown)
    run_here(small_config(**FOLLOWED | {"conditions": ("0shot",)}), root, figures=True)
    assert not any(file.exists() for file in shown) and (root / "results/layers.csv").is_file()


def test_table_of_checkpoints_says_what_layers_and_accuracy_say(followed):
    results = followed[0] / "results"
    rows, layers, accuracy = (tables.read_table(results / f"{n}.parquet") for n in ("training", "layers", "accuracy"))
    assert [(row["condition"], row["step"]) for row in rows] == [("0shot", 0), ("sft@1", 1), ("sft@3", 3), ("sft", 12)]
    for row in rows:
        own = [r for r in layers if r["condition"] == row["condition"]]
        (overall,) = (r for r in accuracy if r["condition"] == row["condition"])
        assert (row["accuracy_micro"], row["accuracy_macro"]) == (overall["accuracy_micro"], overall["accuracy_macro"])
        for label in ("answer", "subject"):
            assert row[f"best_ari_{label}"] == max(r[f"ari_{label}"] for r in own)
            assert own[row[f"ari_{label}_layer"] - 1][f"ari_{label}"] == row[f"best_ari_{label}"]
            for name in (f"ari_{label}", f"neighbors_same_{label}"):  # of four layers the last two
                assert row[f"late_{name}"] == pytest.approx(np.mean([r[name] for r in own[2:]]))


def test_what_is_exported_says_the_same_when_it_is_asked(followed, tmp_path):
    """The adapter as 'sft', and the merged model as a pretrained one, beside the checkpoint they were made of."""
    sft = followed[0] / "checkpoints/sft"
    adapter = small_config(conditions=("sft",), finetune__adapter=str(sft / "adapter"))
    merged = small_config(conditions=("0shot",), model__source=str(sft / "merged"))
    run_here(adapter, tmp_path / "adapter", ["finetune", "collect"])
    run_here(merged, tmp_path / "merged", ["collect"])
    assert not (tmp_path / "adapter" / "checkpoints" / "sft").exists()
    expected = Store.open(followed[0] / "representations/sft")
    for name in ("adapter/representations/sft", "merged/representations/0shot"):
        found = Store.open(tmp_path / name)
        for layer in range(4):
            np.testing.assert_allclose(found.layer(layer), expected.layer(layer), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.answer_logits(), expected.answer_logits(), rtol=1e-4, atol=1e-4)
