"""How to fine-tune: every number of it, checked, and the steps at which something happens."""

import dataclasses
import math

import numpy as np

from jaxscape.errors import InputError
from jaxscape.models.decoder import REMAT
from jaxscape.models.lora import LoraConfig

METHODS = ("lora", "full")
DTYPES = ("float32", "bfloat16")
_MOST_STEPS = 10**8


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune; the defaults are the study's (arXiv 2409.03662).

    Attributes:
      steps: optimiser steps.
      method: "lora" or "full" (all weights).
      lora: the adapters, for method "lora".
      dtype: of the computation, a name in ``DTYPES``; what is trained, and its optimiser's state, stay float32.
      optimizer: an optax optimiser's name and options, "adamw" or "adamw(b2=0.95, weight_decay=0.01)".
      learning_rate: at the peak of the schedule.
      batch_size: questions a step.
      accumulation: parts that a step is computed in, one after the other, to save memory; the gradient is the same,
        but for the places that dropout zeroes, which depend on the parts and on the devices.
      warmup_ratio: share of the steps in which the rate rises from 0.
      final_ratio: rate at the end of the cosine, as a share of the peak.
      clip_norm: largest global norm of a step's gradient; 0: not clipped.
      remat: what the backward pass recomputes to save memory, a name in ``decoder.REMAT``.
      packing: put several questions in one row of attention's padded view.
      evaluations: how often the validation questions are asked after the first time, at evenly spaced steps.
      checkpoints: how many steps are kept, logarithmically spaced, the last one among them.
      save_every: steps between two states to resume from.
      keep: how many of those states stay on disk.
      seed: of data order, adapters and dropout.
    """

    steps: int
    method: str = "lora"
    lora: LoraConfig = LoraConfig(64, 16.0, 0.1)
    dtype: str = "float32"
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    batch_size: int = 16
    accumulation: int = 1
    warmup_ratio: float = 0.05
    final_ratio: float = 0.01
    clip_norm: float = 1.0
    remat: str = "elementwise"
    packing: bool = False
    evaluations: int = 0
    checkpoints: int = 10
    save_every: int = 100
    keep: int = 1
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (("method", METHODS), ("remat", REMAT), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"config.finetune.{name} {getattr(self, name)!r}: choose from {', '.join(allowed)}")
        for name in ("steps", "batch_size", "accumulation", "checkpoints", "save_every", "keep", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"config.finetune.{name} = {getattr(self, name)}: must be greater than 0")
        for name in ("evaluations", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"config.finetune.{name} = {getattr(self, name)}: must be 0 or more")
        for name in ("warmup_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"config.finetune.{name} = {getattr(self, name)}: must be in [0, 1]")
        if self.steps > _MOST_STEPS:
            raise InputError(f"config.finetune.steps (or epochs): {self.steps:,} steps; at most {_MOST_STEPS:,}")
        if self.accumulation > self.batch_size:
            raise InputError(
                f"config.finetune.accumulation = {self.accumulation}: must be at most batch_size = {self.batch_size}"
            )

    def kept_steps(self) -> tuple[int, ...]:
        """Steps whose parameters are kept: ``checkpoints`` of them, fewer where rounding makes two the same.

        The first is the first that changes anything: a warm-up begins at a rate of 0.
        """
        first = min(2 if self.warmup_ratio > 0 else 1, self.steps)
        return log_spaced(first, self.steps, self.checkpoints)

    def evaluated_steps(self) -> tuple[int, ...]:
        """Steps after which the validation questions are asked: 0 (before training), ..., the last; () for none."""
        if not self.evaluations:
            return ()
        return tuple(np.unique(np.linspace(0, self.steps, self.evaluations + 1).round().astype(int)).tolist())


def log_spaced(first: int, last: int, count: int) -> tuple[int, ...]:
    """At most ``count`` whole numbers from ``first`` to ``last``, evenly spaced in their logarithm; one is the last."""
    if count == 1:
        return (last,)
    return tuple(np.unique(np.geomspace(first, last, count).round().astype(int)).tolist())
