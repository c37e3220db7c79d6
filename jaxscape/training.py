"""The stage of fine-tuning: questions -> what is trained on and followed; and what it leaves for other programs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.checking import check_lengths
from jaxscape.data.prompts import build_prompts, training_text
from jaxscape.data.questions import Question
from jaxscape.errors import InputError
from jaxscape.finetune.dataset import TrainingSet, ValidationSet, subject_weights

ADAPTER, MERGED = "adapter", "merged"


def training_texts(questions: Sequence[Question], header: bool) -> list[str]:
    """What fine-tuning shows of each question."""
    return [training_text(question, header=header)[0] for question in questions]


def validation_texts(questions: Sequence[Question]) -> list[str]:
    """How the questions are asked that follow the training: as 'sft' is asked, with the header, without shots."""
    return [prompt.text for prompt in build_prompts(questions, [], 0)]


def training_set(tokenizer, questions: Sequence[Question], finetune, limit: int) -> TrainingSet:
    """The questions as tokens.

    Args:
      tokenizer: the model's.
      questions: to train on.
      finetune: ``config.finetune``.
      limit: tokens that the model takes.

    Raises:
      InputError: a question is longer than the model takes.
    """
    tokens = tokenizer.encode(training_texts(questions, finetune.header))
    check_lengths("fine-tuning", questions, tokens, limit)
    answers = tokenizer.answer_ids()
    weights = subject_weights(questions) if finetune.class_weights else np.ones(len(questions), np.float32)
    return TrainingSet(tokens, [answers[q.answer] for q in questions], weights, [q.key for q in questions])


def validation_set(tokenizer, questions: Sequence[Question], limit: int) -> ValidationSet | None:
    """Likewise the questions that follow the training; None where there are none."""
    if not questions:
        return None
    tokens = tokenizer.encode(validation_texts(questions))
    check_lengths("validation", questions, tokens, limit)
    names = list(dict.fromkeys(q.subject for q in questions))
    places = np.array([names.index(q.subject) for q in questions])
    return ValidationSet(tokens, np.array([q.answer for q in questions]), places, names)


def described(finetuning, splits: Sequence[str]) -> str:
    """How the model is fine-tuned, in words.

    Args:
      finetuning: ``FinetuneConfig``.
      splits: trained on.
    """
    lora, how = finetuning.lora, "all weights"
    if finetuning.method == "lora":
        kind = "DoRA" if lora.dora else "LoRA"
        how = f"{kind} of rank {lora.rank} on {', '.join(lora.targets)}, scale {lora.scale:g}, dropout {lora.dropout:g}"
    return (f"{how}; {finetuning.optimizer}, peak rate {finetuning.learning_rate:g}, {finetuning.steps} steps of "
            f"{finetuning.batch_size} questions ({', '.join(splits)})")  # fmt: skip


def outcome(facts: Mapping[str, Any]) -> str:
    """How the training ended, in words; ``facts`` are those of ``trainer.finetune``."""
    said = f"mean loss of the last steps {facts['final_loss']:.3f}"
    if (accuracy := facts.get("validation_accuracy_micro")) is not None:
        said += f", validation accuracy {accuracy:.3f}"
    return said


def base_name(source: str, path: Path) -> str:
    """What PEFT calls the model that an adapter is for: its name on the hub, or else where it lies.

    Args:
      source: ``config.model.source``.
      path: where that is on disk.
    """
    if source.startswith("hub:"):
        return "/".join(source.removeprefix("hub:").split("@")[0].split("/")[:2])  # without a file's name
    return str(path.resolve())


def export(folder: Path, config, finetuning, source: Path, load: Callable) -> None:
    """Writes what other programs read, where it isn't yet: the adapter in PEFT's format, and the merged model.

    A family that a format has no place for doesn't end the run: the checkpoints are kept, and a line says so.

    Args:
      folder: of the stage.
      config: the experiment's.
      finetuning: ``FinetuneConfig``.
      source: the pretrained checkpoint.
      load: loads the pretrained model.

    Raises:
      InputError: the disk does not take it; the same command tries again.
    """
    from jaxscape.finetune import trainer
    from jaxscape.models import export as merged
    from jaxscape.models import peft
    from jaxscape.models.pretrained import read_architecture

    def write_adapter():
        trained = trainer.load_trained(folder)
        base = base_name(config.model.source, source)
        peft.write_adapter(folder / ADAPTER, read_architecture(source), finetuning.lora, trained, base=base)

    def write_merged():
        merged.write_merged(folder / MERGED, source, trainer.load_finetuned(load(), finetuning, folder, donate=True))

    for name, wanted, write in (
        (ADAPTER, finetuning.method == "lora", write_adapter),
        (MERGED, config.finetune.export_merged, write_merged),
    ):
        if wanted and not (folder / name).exists():  # whole, as it came there by a rename
            try:
                write()
            except InputError as error:
                if isinstance(error.__context__, OSError):  # a full disk, not a format
                    raise
                print(f"checkpoints/sft/{name}: not written ({error})", flush=True)
