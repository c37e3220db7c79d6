"""An experiment: conditions -> stages, in order; what is already done is skipped."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxscape import runtime
from jaxscape.data import bank
from jaxscape.data.mmlu import load_mmlu
from jaxscape.data.prompts import Prompt, build_prompts, training_text
from jaxscape.data.questions import Question, select
from jaxscape.errors import InputError
from jaxscape.workspace import Stage, Workspace, digest

_POOLED = {"last": "last token", "question_mean": "mean over the question tokens"}
STAGES = ("collect", "finetune", "landscape", "report")


class Condition(NamedTuple):
    """One way of asking the questions.

    Attributes:
      name: "0shot", "5shot", "5shot_permuted", ..., "sft".
      shots: solved examples before the question.
      finetuned: asked of the fine-tuned model.
      permuted: the shots stand in another order before each question.
    """

    name: str
    shots: int
    finetuned: bool
    permuted: bool = False


def parse_condition(name: str) -> Condition:
    """Reads a condition's name.

    Raises:
      InputError: it is neither "<k>shot", "<k>shot_permuted" nor "sft".
    """
    if name == "sft":
        return Condition(name, 0, True)
    if match := re.fullmatch(r"(\d+)shot(_permuted)?", str(name)):
        return Condition(name, int(match[1]), False, bool(match[2]))
    raise InputError(f"config.conditions: {name!r} is not a condition; write '<k>shot', '<k>shot_permuted' or 'sft'")


class Questions(NamedTuple):
    """The questions of an experiment.

    Attributes:
      test: asked under every condition.
      dev: solved examples.
      train: for fine-tuning.
      subjects: names; the number of a subject is its place here.
    """

    test: Sequence[Question]
    dev: Sequence[Question]
    train: Sequence[Question]
    subjects: Sequence[str]

    def subject_numbers(self) -> np.ndarray:
        """int [N] subject of each test question."""
        number = {name: i for i, name in enumerate(self.subjects)}
        return np.array([number[q.subject] for q in self.test])

    def answers(self) -> np.ndarray:
        """int [N] right answer of each test question."""
        return np.array([q.answer for q in self.test])

    def fingerprint(self) -> str:
        """SHA-256 of every question."""
        return digest([[q.key, q.question, q.choices, q.answer] for part in self[:3] for q in part])


def load_questions(data) -> Questions:
    """Loads what ``config.data`` names.

    Raises:
      InputError: the source or a subject is unknown, or a file is wrong.
    """
    kind, _, folder = data.source.partition(":")
    if data.mask and kind != "mmlu":
        raise InputError(f"config.data.mask {data.mask!r}: only mmlu:FOLDER takes a mask")
    if kind == "bank":
        everything = bank.load_bank(folder or None)
    elif kind == "mmlu" and folder:
        everything = load_mmlu(folder, mask=data.mask or None)
    else:
        raise InputError(f"config.data.source {data.source!r}: write 'bank', 'bank:FOLDER' or 'mmlu:FOLDER'")
    chosen = select(everything, subjects=tuple(map(str, data.subjects)) or None)
    test = select(chosen, split="test", per_subject=data.test_per_subject or None)
    subjects = list(dict.fromkeys(q.subject for q in test))
    parts = {split: [q for q in chosen if q.split == split] for split in ("dev", "train")}
    return Questions(test, parts["dev"], parts["train"], subjects)


class Experiment:
    """One configuration in one folder.

    Raises:
      InputError: the configuration names something that does not exist.
    """

    def __init__(self, config: Mapping[str, Any], workspace: Workspace):
        self.config, self.workspace = config, workspace
        self.conditions = [parse_condition(name) for name in config.conditions]
        if not self.conditions or len(set(config.conditions)) < len(self.conditions):
            raise InputError(f"config.conditions {tuple(config.conditions)}: name at least one, each once")
        self.questions = load_questions(config.data)
        _check_values(config, len(self.questions.test))  # a wrong field ends the run here, not after an hour
        self.prompts = {c.name: self._ask(c) for c in self.conditions}
        if any(c.finetuned for c in self.conditions):
            if not self.questions.train:
                raise InputError(f"config.data.source {config.data.source!r} has no training questions for 'sft'")
            self.finetuning = finetune_config(config)
        self._stages: Sequence[str] = STAGES
        self._model = None
        self._shape = None
        self._checkpoint = None
        self.seconds: dict[str, float] = {}

    def _ask(self, condition: Condition) -> list[Prompt]:
        seed = self.config.seed if condition.permuted else None
        return build_prompts(self.questions.test, self.questions.dev, condition.shots, permute_shots_seed=seed)

    # -- models ------------------------------------------------------------------------------------------------------

    def checkpoint(self) -> tuple[Path, str]:
        """The pretrained checkpoint on disk and its SHA-256."""
        if self._checkpoint is None:
            from jaxscape.models import sources

            path = sources.resolve(self.config.model.source)
            self._checkpoint = path, sources.fingerprint(path)
        return self._checkpoint

    def model(self, finetuned: bool = False):
        """The pretrained or the fine-tuned model, on its mesh; the other one is let go."""
        from jaxscape.finetune.trainer import load_finetuned
        from jaxscape.models import pretrained

        if self._model is None or self._model[0] != finetuned:
            self._model = None
            model = pretrained.load_pretrained(self.checkpoint()[0], self._mesh(), self.config.model.dtype)
            if finetuned:
                model = load_finetuned(model, self.finetuning, self.finetune_stage().folder)
            self._model = finetuned, model
        return self._model[1]

    def _mesh(self):
        """The mesh that the models run on; says so when it is chosen."""
        from jaxscape.collect.recipe import layer_numbers
        from jaxscape.models import pretrained, sharding
        from jaxscape.models.decoder import check_sites

        if self._shape is None:
            arch = pretrained.read_architecture(self.checkpoint()[0])
            check_sites(arch, (self.config.collect.site,))  # before its weights are read
            layer_numbers(self.config.collect.layers, arch.num_layers, "config.collect.layers")
            choice = runtime.choose_mesh(arch, self.config, self.prompts, self.training_texts())
            print(choice, flush=True)
            self._shape = choice.shape
        return sharding.make_mesh(*self._shape)

    def training_texts(self) -> list[str]:
        """What fine-tuning shows; [] where there is none to be done."""
        if "finetune" not in self._stages or not any(condition.finetuned for condition in self.conditions):
            return []
        return [training_text(q, header=self.config.finetune.header)[0] for q in self.questions.train]

    # -- stages ------------------------------------------------------------------------------------------------------

    def finetune_stage(self) -> Stage:
        """checkpoints/sft."""
        inputs = {
            "checkpoint": self.checkpoint()[1],
            "questions": self.questions.fingerprint(),
            "finetune": self.config.finetune.to_dict(),
            "dtype": self.config.model.dtype,
            "seed": self.config.seed,
        }
        return self.workspace.stage("checkpoints", "sft", inputs)

    def collect_stage(self, condition: Condition) -> Stage:
        """representations/<condition>."""
        inputs = {
            "checkpoint": self.finetune_stage().fingerprint() if condition.finetuned else self.checkpoint()[1],
            "prompts": digest([prompt.text for prompt in self.prompts[condition.name]]),
            "dtype": self.config.model.dtype,
            "collect": self.config.collect.to_dict(),
        }
        return self.workspace.stage("representations", condition.name, inputs)

    def landscape_stage(self, condition: Condition) -> Stage:
        """landscape/<condition>."""
        inputs = {
            "representations": self.collect_stage(condition).fingerprint(),
            "landscape": self.config.landscape.to_dict(),
        }
        return self.workspace.stage("landscape", condition.name, inputs)

    def limit(self, stages: Sequence[str]) -> None:
        """Only these stages are to be run.

        Raises:
          InputError: a stage's name is unknown.
        """
        unknown = [name for name in stages if name not in STAGES]
        if unknown:
            raise InputError(f"--stages: {', '.join(unknown)} unknown; choose from {','.join(STAGES)}")
        self._stages = tuple(stages)

    def run(self, stages: Sequence[str]) -> None:
        """Runs the stages asked for, in order, skipping what is done.

        Raises:
          InputError: a stage's name is unknown, or one needs another that has not been run.
        """
        self.limit(stages)
        for finetuned in (False, True):
            of_model = [c for c in self.conditions if c.finetuned == finetuned]
            if finetuned and of_model and "finetune" in stages:
                self._finetune()
            if of_model and "collect" in stages:
                self._collect(of_model)
        self._model = None
        if "landscape" in stages:
            for condition in self.conditions:
                self._landscape(condition)
        if "report" in stages:
            self._report()

    def _finetune(self) -> None:
        from jaxscape.finetune.trainer import TrainingSet, discard_steps, finetune

        stage = self.finetune_stage()
        if stage.manifest() is not None:
            discard_steps(stage.folder)  # where the run was stopped just before it did
            return
        model = self.model()
        with self._timed("finetune"):
            texts = self.training_texts()
            answer_ids = model.tokenizer.answer_ids()
            data = TrainingSet(model.tokenizer.encode(texts), [answer_ids[q.answer] for q in self.questions.train])
            _check_lengths("fine-tuning", self.questions.train, data.tokens, model.arch.max_positions)
            facts = finetune(model, self.finetuning, data, stage.begin(), label="sft")
        self._model = None  # its arrays may have gone to the optimiser
        stage.commit(**facts, seconds=self.seconds["finetune"], versions=runtime.describe())
        discard_steps(stage.folder)

    def _collect(self, conditions: Sequence[Condition]) -> None:
        """Collects conditions of one model by one plan, in which they share what their prompts share.

        The plan covers all of them, even where some are finished: what it computes must not depend on that.
        """
        from jaxscape.collect import collector

        stages = [self.collect_stage(condition) for condition in conditions]
        if all(stage.manifest() is not None for stage in stages):
            return
        finetuned = conditions[0].finetuned
        if finetuned and self.finetune_stage().manifest() is None:
            raise InputError("--stages: condition 'sft' needs the stage 'finetune' first")
        early = _tokenizer_of_folder(self.checkpoint()[0])
        with ThreadPoolExecutor(1) as pool:  # texts become tokens while the weights are read
            encoding = early and pool.submit(self._encode, early, conditions)
            model = self.model(finetuned)
            tokens, starts = encoding.result() if early else self._encode(model.tokenizer, conditions)
        count, names = len(self.questions.test), [condition.name for condition in conditions]
        label = names[0] if len(names) == 1 else "pretrained"
        for number, name in enumerate(names):
            own = tokens[number * count : (number + 1) * count]
            _check_lengths(f"condition {name}", self.questions.test, own, model.arch.max_positions)
        targets = [collector.Target(name, stage.begin(), number * count, (number + 1) * count)
                   for number, (name, stage) in enumerate(zip(names, stages, strict=True)) if stage.manifest() is None]
        with self._timed(f"collect {label}"):
            plan, recipe = self._plan(model, tokens, starts)
            facts = collector.collect_conditions(
                model, plan, recipe, targets, dtype=self.config.collect.dtype, label=label
            )
        for target, found in zip(targets, facts, strict=True):
            stages[names.index(target.label)].commit(
                **found, together=names, seconds=self.seconds[f"collect {label}"], versions=runtime.describe()
            )

    def _encode(self, tokenizer, conditions: Sequence[Condition]) -> tuple[list[list[int]], list[int] | None]:
        """Token ids of all prompts, condition after condition, and the first token of each one's question.

        The latter is None where last tokens are kept.
        """
        from jaxscape.collect.recipe import question_starts

        prompts = [prompt for condition in conditions for prompt in self.prompts[condition.name]]
        tokens = tokenizer.encode([prompt.text for prompt in prompts])
        if self.config.collect.tokens == "last":
            return tokens, None
        prefixes = list(dict.fromkeys(prompt.prefix for prompt in prompts))
        before = dict(zip(prefixes, tokenizer.encode(prefixes), strict=True))
        return tokens, question_starts(tokens, [before[prompt.prefix] for prompt in prompts])

    def _plan(self, model, tokens: Sequence[Sequence[int]], starts: Sequence[int] | None):
        """The plan of the prompts, and what is kept of each."""
        from jaxscape.collect import answers, collector, recipe

        config = self.config.collect
        plan = collector.plan_for(model.arch, tokens, config.token_budget, collector.lanes_of(model), starts)
        layers = recipe.layer_numbers(config.layers, model.arch.num_layers, "config.collect.layers")
        letters = answers.letter_table(model.tokenizer.letter_ids())
        return plan, recipe.Recipe((config.site,), layers, starts, letters)

    def _landscape(self, condition: Condition) -> None:
        from jaxscape.atlas import survey_condition

        stage, collected = self.landscape_stage(condition), self.collect_stage(condition)
        if stage.manifest() is not None:
            return
        if collected.manifest() is None:
            raise InputError(f"--stages: 'landscape' of condition {condition.name!r} needs the stage 'collect' first")
        with self._timed(f"landscape {condition.name}"):
            survey_condition(collected.folder, stage.begin(), self.config.landscape, label=condition.name)
        stage.commit(seconds=self.seconds[f"landscape {condition.name}"], versions=runtime.describe())

    def _report(self) -> None:
        from jaxscape.results import Finished, write_results

        finished = []
        for condition in self.conditions:
            mapped = self.landscape_stage(condition)
            if mapped.manifest() is None:
                raise InputError(f"--stages: 'report' needs the stage 'landscape' of {condition.name!r} first")
            finished.append(Finished(condition.name, self.collect_stage(condition).folder, mapped.folder))
        root, config = self.workspace.root, self.config
        with self._timed("report"):
            summary = write_results(
                finished,
                subjects=self.questions.subject_numbers(),
                answers=self.questions.answers(),
                names=self.questions.subjects,
                config=config,
                tree_of=config.report.dendrogram_condition or max(self.conditions, key=lambda c: c.shots).name,
                facts=self._facts(),
                provenance=self._provenance(),
                results=root / "results",
                report=root / "report",
            )
        print(f"\n{summary}\n")
        print(self._times())
        print(f"report: {root / 'report' / 'index.html'}")

    def _facts(self) -> dict[str, Any]:
        config, questions = self.config, self.questions
        return {
            "Model": config.model.source,
            "Questions": f"{len(questions.test)} of {len(questions.subjects)} subjects ({config.data.source})",
            "Conditions": ", ".join(c.name for c in self.conditions),
            "States": f"{config.collect.site}, {_POOLED[config.collect.tokens]}, "
                      f"layers: {config.collect.layers}",
            "Density": f"k = {config.landscape.k} neighbours, peaks at Z = {config.landscape.z}",
        }

    def _manifests(self) -> dict[str, dict]:
        """Manifest of every finished stage, by what it did."""
        found = {}
        for condition in self.conditions:
            if (manifest := self.collect_stage(condition).manifest()) is not None:
                found[f"collect {', '.join(manifest['together'])}"] = manifest
            if condition.finetuned and (manifest := self.finetune_stage().manifest()) is not None:
                found["finetune"] = manifest
        stages = {f"landscape {c.name}": self.landscape_stage(c) for c in self.conditions}
        return found | {name: m for name, stage in stages.items() if (m := stage.manifest()) is not None}

    def _provenance(self) -> dict[str, Any]:
        from jaxscape.models.sources import commit_of

        manifests, (path, sha256) = self._manifests(), self.checkpoint()
        facts = {"model, SHA-256": sha256, "questions, SHA-256": self.questions.fingerprint()}
        if commit := commit_of(path):
            facts["model, commit"] = commit
        facts |= {f"{name}, seconds": _seconds(m) for name, m in manifests.items()}
        return facts | next(iter(manifests.values()))["versions"]

    def _times(self) -> str:
        times = {name: _seconds(manifest) for name, manifest in self._manifests().items()}
        times["report"] = f"{self.seconds['report']:.0f}"
        return "seconds: " + ", ".join(f"{name} {value}" for name, value in times.items())

    def _timed(self, name: str):
        return _Stopwatch(self.seconds, name)


class _Stopwatch:
    def __init__(self, seconds: dict[str, float], name: str):
        self._seconds, self._name = seconds, name

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *_):
        self._seconds[self._name] = time.perf_counter() - self._start


def _seconds(manifest: Mapping[str, Any]) -> str:
    """How long a stage took; where it was interrupted only its last part was timed."""
    return f"{manifest['seconds']:.0f}" + (" (since it was resumed)" if manifest["resumed"] else "")


def _tokenizer_of_folder(path: Path):
    """The tokenizer of a hub-format folder; None of a GGUF file, which takes too long to open twice."""
    from jaxscape.models import pretrained, tokenizer

    if not path.is_dir():
        return None
    pretrained.read_architecture(path)  # a configuration that can't be read says so itself
    return tokenizer.from_folder(path)


def _check_lengths(what: str, questions: Sequence[Question], tokens: Sequence[Sequence[int]], limit: int) -> None:
    longest = max(range(len(tokens)), key=lambda row: len(tokens[row]))
    if len(tokens[longest]) > limit:
        raise InputError(
            f"{what}: question {questions[longest].key} makes a prompt of {len(tokens[longest])} tokens, the model "
            f"takes {limit}; leave it out or ask with fewer shots"
        )


def _check_values(config, questions: int) -> None:
    from jaxscape.collect.recipe import POOLS, parse_layers
    from jaxscape.collect.store import DTYPES
    from jaxscape.models.decoder import SITES

    for name, value, allowed in (
        ("collect.site", config.collect.site, SITES),
        ("collect.tokens", config.collect.tokens, POOLS),
        ("collect.dtype", config.collect.dtype, DTYPES),
    ):
        if value not in allowed:
            raise InputError(f"config.{name} {value!r}: choose from {', '.join(allowed)}")
    if parse_layers(config.collect.layers, "config.collect.layers") and config.collect.site == "final_norm":
        raise InputError("config.collect.layers: there is one final norm, after the last layer; write 'all'")
    k, z, shown = config.landscape.k, config.landscape.z, config.report.dendrogram_condition
    if not 0 <= z < math.inf:
        raise InputError(f"config.landscape.z = {z}: must be 0 or more")
    if shown and shown not in config.conditions:
        raise InputError(f"config.report.dendrogram_condition {shown!r}: name a condition, or '' for most shots")
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


def finetune_config(config):
    """``config.finetune`` as a ``FinetuneConfig``.

    Raises:
      InputError: a value is out of range.
    """
    from jaxscape.finetune.trainer import FinetuneConfig
    from jaxscape.models.lora import LoraConfig

    fields = config.finetune.to_dict()
    fields.pop("header")
    lora = LoraConfig(*(fields.pop(name) for name in ("rank", "alpha", "dropout")), tuple(fields.pop("targets")))
    return FinetuneConfig(lora=lora, seed=config.seed, **fields)
