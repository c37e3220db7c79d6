"""What a configuration says, checked before anything runs: a wrong field must not end a run after an hour."""

import dataclasses
import math
from collections.abc import Sequence

from jaxscape.data.questions import Question
from jaxscape.errors import InputError


def check_values(config, questions: int) -> None:
    """Refuses values that are unknown or out of range.

    Args:
      config: the experiment's.
      questions: how many are asked.

    Raises:
      InputError: names the first field that is wrong.
    """
    from jaxscape.collect.recipe import POOLS, parse_layers
    from jaxscape.collect.store import DTYPES
    from jaxscape.finetune.config import DTYPES as COMPUTED
    from jaxscape.models.decoder import SITES

    for name, value, allowed in (
        ("model.dtype", config.model.dtype, COMPUTED),
        ("collect.site", config.collect.site, SITES),
        ("collect.tokens", config.collect.tokens, POOLS),
        ("collect.dtype", config.collect.dtype, DTYPES),
    ):
        if value not in allowed:
            raise InputError(f"config.{name} {value!r}: choose from {', '.join(allowed)}")
    if parse_layers(config.collect.layers, "config.collect.layers") and config.collect.site == "final_norm":
        raise InputError("config.collect.layers: there is one final norm, after the last layer; write 'all'")
    k, z = config.landscape.k, config.landscape.z
    if not 0 <= z < math.inf:
        raise InputError(f"config.landscape.z = {z}: must be 0 or more")
    for name, value, least, most, why in (
        ("seed", config.seed, 0, None, ""),
        ("collect.token_budget", config.collect.token_budget, 1, None, ""),
        ("landscape.k", k, 1, (questions - 1) // 2, f": {questions} questions, and 2k + 1 are needed"),
        ("landscape.max_rank", config.landscape.max_rank, 2, None, ""),
        ("compare.neighbors", config.compare.neighbors, 1, 2 * k, ": 2k neighbours are known"),
        ("report.dendrogram_layer", config.report.dendrogram_layer, 0, None, ""),
    ):
        if value < least or (most is not None and value > most):
            upper = "" if most is None else f" and at most {most}{why}"
            raise InputError(f"config.{name} = {value}: must be at least {least}{upper}")


def check_shown(config, names: Sequence[str]) -> None:
    """Refuses a dendrogram of a condition that is none of ``names``."""
    shown = config.report.dendrogram_condition
    if shown and shown not in names:
        raise InputError(f"config.report.dendrogram_condition {shown!r}: name a condition ({', '.join(names)}), or '' "
                         "for most shots")


def check_training_data(finetune) -> None:
    """Refuses questions that cannot be trained on or followed, before they are loaded.

    Args:
      finetune: ``config.finetune``.

    Raises:
      InputError: names the field.
    """
    splits, followed = tuple(finetune.splits), finetune.validation
    if "test" in splits:
        raise InputError("config.finetune.splits: 'test' is asked under every condition and can't be trained on; "
                         "leave it out")
    if followed and not finetune.evaluations:
        raise InputError(f"config.finetune.validation {followed!r} with evaluations = 0: nothing would be asked; set "
                         "config.finetune.evaluations, or config.finetune.validation='' to train without")
    if not 0 <= finetune.epochs < math.inf:
        raise InputError(f"config.finetune.epochs = {finetune.epochs}: must be 0 (steps count) or more")


def finetune_config(config, questions: int = 0):
    """``config.finetune`` as a ``FinetuneConfig``.

    Args:
      config: the experiment's.
      questions: how many are trained on; needed where ``config.finetune.epochs`` counts the steps.

    Raises:
      InputError: a value is out of range.
    """
    from jaxscape.finetune.config import FinetuneConfig
    from jaxscape.models.lora import LoraConfig

    section = config.finetune
    lora = LoraConfig(rank=section.rank, alpha=section.alpha, dropout=section.dropout, targets=tuple(section.targets),
                      rslora=section.rslora, dora=section.dora)  # fmt: skip
    steps = section.steps
    if section.epochs:
        steps = max(1, math.ceil(section.epochs * questions / max(section.batch_size, 1)))
    given = {"lora": lora, "steps": steps, "dtype": config.model.dtype, "seed": config.seed}
    given["evaluations"] = section.evaluations if section.validation else 0
    names = [field.name for field in dataclasses.fields(FinetuneConfig) if field.name not in given]
    return FinetuneConfig(**given, **{name: section[name] for name in names})


def check_lengths(what: str, questions: Sequence[Question], tokens: Sequence[Sequence[int]], limit: int) -> None:
    """Refuses prompts longer than the model takes; ``questions`` are what they ask, in the same order."""
    longest = max(range(len(tokens)), key=lambda row: len(tokens[row]))
    if len(tokens[longest]) > limit:
        raise InputError(
            f"{what}: question {questions[longest].key} makes a prompt of {len(tokens[longest])} tokens, the model "
            f"takes {limit}; leave it out or ask with fewer shots"
        )
