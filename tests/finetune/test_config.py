import pytest

from jaxscape.finetune.config import FinetuneConfig, log_spaced


def test_steps_are_logarithmically_spaced():
    assert log_spaced(1, 1000, 4) == (1, 10, 100, 1000)
    assert log_spaced(1, 8, 10) == (1, 2, 3, 4, 5, 6, 8)  # two that are the same are one
    assert log_spaced(1, 500, 1) == (500,)


def test_first_kept_step_is_the_first_that_changes_anything():
    """A warm-up begins at a rate of 0."""
    assert FinetuneConfig(100, warmup_ratio=0.0, checkpoints=3).kept_steps() == (1, 10, 100)
    assert FinetuneConfig(200, warmup_ratio=0.1, checkpoints=3).kept_steps() == (2, 20, 200)
    assert FinetuneConfig(1, checkpoints=5).kept_steps() == (1,)
    assert FinetuneConfig(7, checkpoints=1).kept_steps() == (7,)


def test_evaluated_steps_are_even_and_begin_before_training():
    assert FinetuneConfig(100, evaluations=4).evaluated_steps() == (0, 25, 50, 75, 100)
    assert FinetuneConfig(2, evaluations=4).evaluated_steps() == (0, 1, 2)
    assert FinetuneConfig(100).evaluated_steps() == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, ("config.finetune.steps = 0",)),
        ({"steps": 10**9}, ("config.finetune.steps", "1,000,000,000")),
        ({"method": "qlora"}, ("config.finetune.method 'qlora'", "lora, full")),
        ({"remat": "all"}, ("config.finetune.remat", "none, elementwise, blocks")),
        ({"learning_rate": float("nan")}, ("config.finetune.learning_rate = nan",)),
        ({"warmup_ratio": 1.5}, ("config.finetune.warmup_ratio = 1.5", "[0, 1]")),
        ({"clip_norm": -1.0}, ("clip_norm = -1.0",)),
        ({"batch_size": 2, "accumulation": 3}, ("accumulation = 3", "batch_size = 2")),
    ],
)
def test_wrong_values_are_named(fields, words, raises_input_error):
    with raises_input_error(*words):
        FinetuneConfig(**{"steps": 10} | fields)
