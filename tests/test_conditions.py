"""Conditions by name, and the questions of a data set that is trained on."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxscape.conditions import expand_conditions, parse_condition
from jaxscape.errors import InputError
from jaxscape.experiment import Experiment
from jaxscape.workspace import Workspace
from tests.launching import small_config


@pytest.mark.parametrize(
    ("name", "shots", "finetuned", "step"),
    [("0shot", 0, False, None), ("12shot", 12, False, None), ("sft", 0, True, None), ("sft@40", 0, True, 40)],
)
def test_condition_names(name, shots, finetuned, step):
    assert parse_condition(name) == (name, shots, finetuned, False, step)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (["0shot", "sft"], [("0shot", None), ("sft", 8)]),
        (["sft@all", "0shot"], [("sft@1", 1), ("sft@3", 3), ("sft", 8), ("0shot", None)]),
        (["sft@8", "sft@1"], [("sft", 8), ("sft@1", 1)]),  # the last one has one name only
    ],
)
def test_checkpoints_are_named_by_their_steps(named, found):
    expanded = expand_conditions(map(parse_condition, named), (1, 3, 8))
    assert [(condition.name, condition.step) for condition in expanded] == found


@pytest.mark.parametrize("name", ["", "shot", "-1shot", "2 shot", "SFT", "sft2", "sft@", "sft@-1", "sft@last", None])
def test_other_condition_names_are_refused(name):
    with pytest.raises(InputError, match="is not a condition"):
        parse_condition(name)


def mmlu_folder(folder: Path, splits=("dev", "validation", "test")) -> Path:
    """MMLU's files with 40 questions of one subject in each split."""
    (folder / "all").mkdir(parents=True)
    for split in splits:
        rows = [{"question": f"{split} {i}?", "subject": "law", "choices": list("abcd"), "answer": i % 4}
                for i in range(40)]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows), folder / "all" / f"{split}-0.parquet")
    return folder


def test_mmlu_is_trained_on_dev_and_validation_as_the_study_does(tmp_path, raises_input_error):
    source, workspace = f"mmlu:{mmlu_folder(tmp_path / 'mmlu')}", Workspace(tmp_path / "workdir", {})
    fields = {"data__source": source, "data__subjects": (), "data__test_per_subject": 0}
    fields["finetune__splits"] = ("dev", "validation")
    asked = Experiment(small_config(**fields, finetune__per_subject=50), workspace).questions
    assert len(asked.train) == 50 and {q.split for q in asked.train} == {"dev", "validation"}
    with raises_input_error("config.finetune.splits", "'train'", "validation"):
        Experiment(small_config(**fields | {"finetune__splits": ("train", "validation")}), workspace)
    (tmp_path / "mmlu/all/validation-0.parquet").unlink()
    with raises_input_error("no validation-*.parquet"):
        Experiment(small_config(**fields), workspace)
    del fields["finetune__splits"]  # nothing is trained: the file need not be there
    assert Experiment(small_config(**fields, conditions=("0shot",)), workspace).questions.train == []
