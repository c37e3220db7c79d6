"""An experiment: conditions -> stages, in order; what is already done is skipped."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxscape import runtime, training
from jaxscape.checking import check_lengths, check_shown, check_training_data, check_values, finetune_config
from jaxscape.conditions import Condition, expand_conditions, load_questions, parse_condition
from jaxscape.data.prompts import Prompt, build_prompts
from jaxscape.errors import InputError
from jaxscape.workspace import FREE_OF_TRAINING, Stage, Workspace, digest

_POOLED = {"last": "last token", "question_mean": "mean over the question tokens"}
STAGES = ("collect", "finetune", "landscape", "report")


class Experiment:
    """One configuration in one folder.

    Raises:
      InputError: the configuration names something that does not exist.
    """

    def __init__(self, config: Mapping[str, Any], workspace: Workspace):
        self.config, self.workspace = config, workspace
        named = [parse_condition(name) for name in config.conditions]
        self.trains = any(condition.finetuned for condition in named) and not config.finetune.adapter
        if self.trains:
            check_training_data(config.finetune)
        self.questions = load_questions(config.data, config.finetune if self.trains else None, config.seed)
        check_values(config, len(self.questions.test))  # a wrong field ends the run here, not after an hour
        self.finetuning = self._finetune_config() if self.trains else None
        self.conditions = expand_conditions(named, self.finetuning.kept_steps() if self.trains else ())
        check_shown(config, [condition.name for condition in self.conditions])
        asked = {c[1:4]: c for c in self.conditions}  # checkpoints are asked the same
        asked = {how: self._ask(c) for how, c in asked.items()}
        self.prompts = {c.name: asked[c[1:4]] for c in self.conditions}
        self._stages: Sequence[str] = STAGES
        self._model = None
        self._shape = None
        self._checkpoint = None
        self._adapter = None
        self._planned: dict[bool, tuple] = {}
        self.seconds: dict[str, float] = {}

    def _ask(self, condition: Condition) -> list[Prompt]:
        seed = self.config.seed if condition.permuted else None
        return build_prompts(self.questions.test, self.questions.dev, condition.shots, permute_shots_seed=seed)

    def _finetune_config(self):
        from jaxscape.finetune.optimizers import optimizer
        from jaxscape.finetune.trackers import check_trackers

        check_trackers(tuple(self.config.finetune.trackers))
        found = finetune_config(self.config, len(self.questions.train))
        optimizer(found)  # says what is wrong with its name or options
        return found

    # -- models ------------------------------------------------------------------------------------------------------

    def checkpoint(self) -> tuple[Path, str]:
        """The pretrained checkpoint on disk and its SHA-256."""
        if self._checkpoint is None:
            from jaxscape.models import sources

            path = sources.resolve(self.config.model.source)
            self._checkpoint = path, sources.fingerprint(path)
        return self._checkpoint

    def adapter(self) -> tuple[Path, str]:
        """The folder that ``config.finetune.adapter`` names and its SHA-256.

        Raises:
          InputError: there is no adapter.
        """
        if self._adapter is None:
            from jaxscape.models import sources

            path = Path(self.config.finetune.adapter).expanduser()
            if not (path / "adapter_config.json").is_file():
                raise InputError(f"config.finetune.adapter {str(path)!r}: no adapter_config.json there; give a folder "
                                 "in PEFT's format, or '' to train")
            self._adapter = path, sources.fingerprint(path)
        return self._adapter

    def check_adapter(self) -> None:
        """Refuses an adapter that is not there, before anything runs.

        Raises:
          InputError: there is none, though a condition is asked of it.
        """
        if self._adapted():
            self.adapter()

    def _adapted(self) -> bool:
        """Whether 'sft' is an adapter from elsewhere."""
        return any(condition.finetuned for condition in self.conditions) and not self.trains

    def model(self, condition: Condition | None = None):
        """The model that a condition is asked of (None: the pretrained one), on its mesh; the one before is let go."""
        wanted = condition.name if condition is not None and condition.finetuned else ""
        if self._model is None or self._model[0] != wanted:
            self._model = None
            model = self._load()
            self._model = wanted, self._finetuned(model, condition.step) if wanted else model
        return self._model[1]

    def _load(self, dtype: str = ""):
        from jaxscape.models import pretrained

        return pretrained.load_pretrained(self.checkpoint()[0], self._mesh(), dtype or self.config.model.dtype)

    def _finetuned(self, model, step: int | None):
        """The pretrained model as training left it after a step, or with the adapter from elsewhere."""
        from jaxscape.finetune.trainer import load_finetuned
        from jaxscape.models import peft, pretrained

        if self.trains:
            return load_finetuned(model, self.finetuning, self.finetune_stage().folder, step, donate=True)
        lora, adapters = peft.read_adapter(self.adapter()[0], model.arch)
        return pretrained.fold_adapters(model, lora, adapters, donate=True)

    def _mesh(self):
        """The mesh that the models run on; says so when it is chosen."""
        from jaxscape.collect.recipe import layer_numbers
        from jaxscape.models import peft, pretrained, sharding
        from jaxscape.models.decoder import check_sites

        if self._shape is None:
            arch = pretrained.read_architecture(self.checkpoint()[0])
            check_sites(arch, (self.config.collect.site,))  # before its weights are read
            layer_numbers(self.config.collect.layers, arch.num_layers, "config.collect.layers")
            if self._adapted():
                peft.read_adapter(self.adapter()[0], arch)  # likewise
            choice = runtime.choose_mesh(arch, self.config, self.prompts, self.training_texts(), self.finetuning)
            print(choice, flush=True)
            self._shape = choice.shape
        return sharding.make_mesh(*self._shape)

    def training_texts(self) -> list[str]:
        """What fine-tuning shows; [] where there is none to be done."""
        if "finetune" not in self._stages or not self.trains:
            return []
        return training.training_texts(self.questions.train, self.config.finetune.header)

    def validation_texts(self) -> list[str]:
        """How the questions are asked that follow the training."""
        return training.validation_texts(self.questions.validation)

    # -- stages ------------------------------------------------------------------------------------------------------

    def finetune_stage(self) -> Stage:
        """checkpoints/sft."""
        inputs = {
            "checkpoint": self.checkpoint()[1],
            "questions": self.questions.fingerprint(),
            "finetune": {n: v for n, v in self.config.finetune.to_dict().items() if n not in FREE_OF_TRAINING},
            "dtype": self.config.model.dtype,
            "seed": self.config.seed,
        }
        return self.workspace.stage("checkpoints", "sft", inputs)

    def collect_stage(self, condition: Condition) -> Stage:
        """representations/<condition>."""
        inputs = {
            **self._asked_of(condition),
            "prompts": digest([prompt.text for prompt in self.prompts[condition.name]]),
            "dtype": self.config.model.dtype,
            "collect": self.config.collect.to_dict(),
        }
        return self.workspace.stage("representations", condition.name, inputs)

    def _asked_of(self, condition: Condition) -> dict[str, Any]:
        """What names the model that a condition is asked of."""
        if not condition.finetuned:
            return {"checkpoint": self.checkpoint()[1]}
        if self.trains:
            return {"checkpoint": self.finetune_stage().fingerprint(), "step": condition.step}
        return {"checkpoint": self.checkpoint()[1], "adapter": self.adapter()[1]}

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
        self.check_adapter()
        pretrained = [condition for condition in self.conditions if not condition.finetuned]
        if pretrained and "collect" in stages:
            self._collect(pretrained)
        if self.trains and "finetune" in stages:
            self._finetune()
        for condition in self.conditions:
            if condition.finetuned and "collect" in stages:
                self._collect([condition])
        self._model = None
        if "landscape" in stages:
            for condition in self.conditions:
                self._landscape(condition)
        if "report" in stages:
            self._report()

    def _finetune(self) -> None:
        from jaxscape.finetune import trainer

        stage, config = self.finetune_stage(), self.config.finetune
        if stage.manifest() is not None:
            self._leave(stage.folder)  # where the run was stopped just before it did
            return
        if config.method == "full" and self.config.model.dtype != "float32":
            self._model = None
            model = self._load("float32")  # what changes by little is kept in float32
        else:
            model = self.model()
        self._model = None  # its arrays may go to the optimiser
        tokenizer, questions, limit = model.tokenizer, self.questions, model.arch.max_positions
        with self._timed("finetune"):
            data = training.training_set(tokenizer, questions.train, config, limit)
            followed = training.validation_set(tokenizer, questions.validation, limit)
            folder = stage.begin()
            facts = trainer.finetune(model, self.finetuning, data, folder, validation=followed,
                                     trackers=tuple(config.trackers), label="sft")  # fmt: skip
        del model
        stage.commit(**facts, seconds=self.seconds["finetune"], versions=runtime.describe())
        print(f"{stage.folder}: {training.outcome(facts)}", flush=True)
        self._leave(stage.folder)

    def _leave(self, folder: Path) -> None:
        """Leaves of a finished training what others read, and nothing that only training needs."""
        from jaxscape.finetune import trainer

        trainer.discard_states(folder)
        self._model = None  # exporting may load one
        training.export(folder, self.config, self.finetuning, self.checkpoint()[0], self._load)

    def _collect(self, conditions: Sequence[Condition]) -> None:
        """Collects conditions of one model by one plan, in which they share what their prompts share.

        The plan covers all of them, even where some are finished: what it computes must not depend on that.
        """
        from jaxscape.collect import collector

        stages = [self.collect_stage(condition) for condition in conditions]
        if all(stage.manifest() is not None for stage in stages):
            return
        if conditions[0].finetuned and self.trains and self.finetune_stage().manifest() is None:
            raise InputError(f"--stages: condition {conditions[0].name!r} needs the stage 'finetune' first")
        model, tokens, plan, recipe = self._planned_model(conditions)
        count, names = len(self.questions.test), [condition.name for condition in conditions]
        label = names[0] if len(names) == 1 else "pretrained"
        for number, name in enumerate(names):
            own = tokens[number * count : (number + 1) * count]
            check_lengths(f"condition {name}", self.questions.test, own, model.arch.max_positions)
        targets = [collector.Target(name, stage.begin(), number * count, (number + 1) * count)
                   for number, (name, stage) in enumerate(zip(names, stages, strict=True)) if stage.manifest() is None]
        with self._timed(f"collect {label}"):
            facts = collector.collect_conditions(
                model, plan, recipe, targets, dtype=self.config.collect.dtype, label=label
            )
        for target, found in zip(targets, facts, strict=True):
            stages[names.index(target.label)].commit(
                **found, together=names, seconds=self.seconds[f"collect {label}"], versions=runtime.describe()
            )

    def _planned_model(self, conditions: Sequence[Condition]):
        """The model that the conditions are asked of, their prompts as tokens, the plan and what is kept.

        Checkpoints are asked the same, so that their prompts are tokenised and planned once.
        """
        finetuned = conditions[0].finetuned
        early = None if finetuned in self._planned else _tokenizer_of_folder(self.checkpoint()[0])
        with ThreadPoolExecutor(1) as pool:  # texts become tokens while the weights are read
            encoding = early and pool.submit(self._encode, early, conditions)
            model = self.model(conditions[0])
            if finetuned not in self._planned:
                tokens, starts = encoding.result() if early else self._encode(model.tokenizer, conditions)
                self._planned[finetuned] = tokens, *self._plan(model, tokens, starts)
        return model, *self._planned[finetuned]

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
        from jaxscape.collect import collector, recipe
        from jaxscape.models import answers

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
            step = 0 if condition.name == "0shot" else condition.step
            finished.append(Finished(condition.name, self.collect_stage(condition).folder, mapped.folder, step))
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
                training=self.finetune_stage().folder if self.trains else None,
                results=root / "results",
                report=root / "report",
            )
        print(f"\n{summary}\n")
        print(self._times())
        print(f"report: {root / 'report' / 'index.html'}")

    def _facts(self) -> dict[str, Any]:
        config, questions = self.config, self.questions
        facts = {
            "Model": config.model.source,
            "Questions": f"{len(questions.test)} of {len(questions.subjects)} subjects ({config.data.source})",
            "Conditions": ", ".join(c.name for c in self.conditions),
            "States": f"{config.collect.site}, {_POOLED[config.collect.tokens]}, "
                      f"layers: {config.collect.layers}",
            "Density": f"k = {config.landscape.k} neighbours, peaks at Z = {config.landscape.z}",
        }
        if self.trains:
            trained = self.finetune_stage().manifest()
            facts["Fine-tuning"] = training.described(self.finetuning, config.finetune.splits)
            facts["Fine-tuning"] += f": {training.outcome(trained)}" if trained else ""
        elif self._adapted():
            facts["Fine-tuning"] = f"the adapter in {config.finetune.adapter}"
        return facts

    def _manifests(self) -> dict[str, dict]:
        """Manifest of every finished stage, by what it did."""
        found = {}
        for condition in sorted(self.conditions, key=lambda c: c.finetuned):
            if condition.finetuned and self.trains and (manifest := self.finetune_stage().manifest()) is not None:
                found["finetune"] = manifest
            if (manifest := self.collect_stage(condition).manifest()) is not None:
                found[f"collect {', '.join(manifest['together'])}"] = manifest
        stages = {f"landscape {c.name}": self.landscape_stage(c) for c in self.conditions}
        return found | {name: m for name, stage in stages.items() if (m := stage.manifest()) is not None}

    def _provenance(self) -> dict[str, Any]:
        from jaxscape.models.sources import commit_of

        manifests, (path, sha256) = self._manifests(), self.checkpoint()
        facts = {"model, SHA-256": sha256, "questions, SHA-256": self.questions.fingerprint()}
        if self._adapted():
            facts["adapter, SHA-256"] = self.adapter()[1]
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
