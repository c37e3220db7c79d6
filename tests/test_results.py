import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxscape import atlas, results
from jaxscape.collect.store import Store
from jaxscape.compare.scores import LayerScores
from jaxscape.report import tables
from jaxscape.results import Finished
from tests.launching import run_here, small_config, unbroken

CONDITIONS = ["0shot", "2shot", "sft"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return unbroken(tmp_path_factory)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_layers_table_has_every_column_and_layer(suffix, root):
    rows = tables.read_table(root / "results" / f"layers.{suffix}")
    assert [(r["condition"], r["layer"]) for r in rows] == [(c, n) for c in CONDITIONS for n in (1, 2, 3, 4)]
    for row in rows:
        assert list(row) == ["condition", "layer", *LayerScores._fields]
        assert row["n_points"] == 36 and row["n_peaks"] >= 1 and row["intrinsic_dim"] > 0
        assert 0 <= row["neighbors_same_subject"] <= 1 and 0 < row["core_fraction"] <= 1


def test_layers_table_says_what_the_landscapes_say(root):
    for row in tables.read_table(root / "results" / "layers.parquet"):
        found = atlas.read_layer(root / "landscape" / row["condition"], row["layer"])
        assert row["n_peaks"] == len(found["peaks_centers"])
        assert row["intrinsic_dim"] == found["intrinsic_dim"]
        assert row["core_fraction"] == np.mean(found["peaks_core"])


def test_accuracy_tables_count_the_answers(root):
    overall = tables.read_table(root / "results" / "accuracy.csv")
    by_subject = tables.read_table(root / "results" / "accuracy_by_subject.csv")
    kinds = [f"{kind}accuracy_{over}" for kind in ("", "free_") for over in ("micro", "macro")]
    assert [list(r) for r in overall] == [["condition", "n_questions", *kinds]] * 3
    assert [(r["condition"], r["subject"], r["n_questions"]) for r in by_subject] == [
        (c, s, 12) for c in CONDITIONS for s in ("animals", "cities", "writers")
    ]
    for row in overall:
        assert row["n_questions"] == 36
        for kind in ("", "free_"):
            of_condition = [r[f"{kind}accuracy"] for r in by_subject if r["condition"] == row["condition"]]
            assert row[f"{kind}accuracy_macro"] == pytest.approx(np.mean(of_condition))
            assert row[f"{kind}accuracy_micro"] == pytest.approx(row[f"{kind}accuracy_macro"])


def test_predictions_are_the_highest_logits(root):
    folder = root / "representations" / "sft"
    logits = Store.open(folder).answer_logits()
    assert results.predictions(folder).tolist() == logits.argmax(axis=1).tolist()
    assert set(results.predictions(folder)) <= {0, 1, 2, 3}


def test_free_accuracy_counts_the_tokens_that_are_the_right_letter(tmp_path, root):
    folder = shutil.copytree(root / "representations" / "sft", tmp_path / "sft")
    answers = np.arange(36) % 4
    (folder / "free.json").write_text(json.dumps({str(t): " B" for t in Store.open(folder).free_tokens().tolist()}))
    overall, by_subject = results.accuracy_rows(
        [Finished("sft", folder, folder)], np.repeat([0, 1, 2], 12), answers, ["a", "b", "c"]
    )
    assert overall[0]["free_accuracy_micro"] == overall[0]["free_accuracy_macro"] == 0.25
    assert [row["free_accuracy"] for row in by_subject] == [0.25] * 3


def test_page_is_there_and_self_contained(root):
    page = (root / "report" / "index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!['\"]?data:)", page)
    assert page.count("<img") >= 10
    wanted = ("tiny_llama", "animals", "36 of 3 subjects", "model, SHA-256", "collect 0shot, 2shot, seconds", "devices")
    for text in wanted:
        assert text in page


def test_figures_lie_beside_the_page(root):
    names = {path.stem for path in (root / "report" / "figures").glob("*.svg")}
    assert {"overview", "dendrogram", "training", "intrinsic_dim", "n_peaks", "ari_subject", "ari_answer"} <= names
    for path in (root / "report" / "figures").iterdir():
        assert path.stat().st_size > 1000


def test_manifests_name_what_they_were_made_from(root):
    for kind in ("representations", "landscape"):
        for name in CONDITIONS:
            manifest = json.loads((root / kind / name / "manifest.json").read_text())
            assert manifest["inputs"] and manifest["versions"]["jax"] and manifest["seconds"] >= 0
    manifest = json.loads((root / "checkpoints" / "sft" / "manifest.json").read_text())
    assert manifest["parameters_trained"] > 0 and manifest["final_loss"] > 0
    assert manifest["tokens"] > 0 and 0 <= manifest["final_training_accuracy"] <= 1


def row(condition, layer, subject, answer):
    return {"condition": condition, "layer": layer, "ari_subject": subject, "ari_answer": answer}


def test_best_layers_skip_missing_scores_and_take_the_lower_of_ties():
    nan = float("nan")
    rows = [row("a", 1, nan, 0.5), row("a", 2, 0.3, 0.5), row("a", 3, 0.2, 0.1), row("b", 1, nan, nan)]
    assert results.best_layers(rows) == [
        {"condition": "a", "best_ari_subject": 0.3, "ari_subject_layer": 2, "best_ari_answer": 0.5,
         "ari_answer_layer": 1},
        {"condition": "b", "best_ari_subject": None, "ari_subject_layer": None, "best_ari_answer": None,
         "ari_answer_layer": None},
    ]  # fmt: skip


def followed_rows(condition, answers):
    return [row(condition, layer, 0.1 * layer, answer) | {"neighbors_same_answer": 0.5, "neighbors_same_subject": 0.25}
            for layer, answer in enumerate(answers, start=1)]  # fmt: skip


def test_checkpoints_are_told_by_their_best_and_their_late_layers():
    nan, nowhere = float("nan"), Path()
    conditions = [Finished("sft", nowhere, nowhere, 9), Finished("5shot", nowhere, nowhere),
                  Finished("0shot", nowhere, nowhere, 0)]  # fmt: skip
    rows = followed_rows("sft", [0.9, 0.0, 0.0, 0.5, 0.3]) + followed_rows("0shot", [0.2, 0.1, 0.0, nan, nan])
    overall = [{"condition": name, "accuracy_micro": 0.5, "accuracy_macro": 0.75} for name in ("0shot", "5shot", "sft")]
    first, last = results.training_rows(conditions, rows, overall)
    assert (first["condition"], first["step"], last["condition"], last["step"]) == ("0shot", 0, "sft", 9)
    assert (last["best_ari_answer"], last["ari_answer_layer"], last["late_ari_answer"]) == (0.9, 1, pytest.approx(0.4))
    assert (first["best_ari_answer"], first["late_ari_answer"]) == (0.2, None)
    assert last["late_ari_subject"] == pytest.approx(0.45) and last["late_neighbors_same_subject"] == 0.25
    assert last["accuracy_macro"] == 0.75


def test_what_needs_two_checkpoints_is_not_drawn_of_one(root):
    one = [{"step": 0}, {"step": 8}]
    assert [name for name, _, _ in results.training_figures(root / "checkpoints/sft", [], one)] == ["training"]
    two = results.training_figures(root / "checkpoints/sft", [], [*one, {"step": 9}])
    assert [name for name, _, _ in two] == ["training", "training_layers"]
    assert "before training" in two[0][2]


def test_tree_of_peaks_counts_subjects(root):
    condition = Finished("2shot", root / "representations" / "2shot", root / "landscape" / "2shot")
    subjects = np.repeat([0, 1, 2], 12)
    linkage, composition = results.peak_tree(condition, 4, subjects, 3)
    assert composition.sum(axis=0).tolist() == [12, 12, 12]
    assert linkage.shape == (len(composition) - 1, 4)


@pytest.fixture(scope="module")
def input_norm(tmp_path_factory):
    """An experiment whose first layer is degenerate: the last token is the same in every prompt."""
    folder = tmp_path_factory.mktemp("input_norm") / "workdir"
    run_here(small_config(collect__site="input_norm", conditions=("2shot",)), folder, figures=True)
    return folder


def test_degenerate_layer_gives_missing_scores_and_the_report_goes_on(input_norm):
    first, second, *_ = tables.read_table(input_norm / "results" / "layers.parquet")
    assert first["n_points"] == 36 and first["n_duplicates"] == 35
    assert all(np.isnan(first[name]) for name in LayerScores._fields[2:])
    assert second["n_duplicates"] == 0 and second["n_peaks"] >= 1
    assert (input_norm / "report" / "index.html").is_file()


def test_dendrogram_of_the_degenerate_layer_is_refused(input_norm, tmp_path, raises_input_error):
    folder = shutil.copytree(input_norm, tmp_path / "workdir")
    (folder / "config.json").unlink()
    config = small_config(collect__site="input_norm", conditions=("2shot",), report__dendrogram_layer=1)
    with raises_input_error("config.report.dendrogram_layer = 1", "2, 3, 4"):
        run_here(config, folder, ["report"], figures=True)
