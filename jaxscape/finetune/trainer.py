"""The training run: its compiled step, its loop, what is followed, and how it goes on after an interruption.

Everything random is a function of the seed and the step, every batch one of data and configuration, so that a run that
was killed and goes on equals an unbroken one to the bit.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxscape.errors import InputError
from jaxscape.finetune.batching import Batches
from jaxscape.finetune.checkpoints import KEPT, STATE, Checkpoints, abstract, apart, named, steps_in, unnamed
from jaxscape.finetune.checkpoints import discard_states as discard_states
from jaxscape.finetune.checkpoints import load_trained as load_trained
from jaxscape.finetune.config import FinetuneConfig
from jaxscape.finetune.dataset import TrainingSet, ValidationSet
from jaxscape.finetune.evaluation import Evaluator
from jaxscape.finetune.interruption import Interruption
from jaxscape.finetune.log import Log, read_rows
from jaxscape.finetune.objective import Metrics, train_step
from jaxscape.finetune.optimizers import optimizer, schedule, state_shardings
from jaxscape.finetune.progress import Progress, memory_lines
from jaxscape.finetune.trackers import Trackers, check_trackers
from jaxscape.models.answers import letter_table
from jaxscape.models.lora import LoraParam
from jaxscape.models.pretrained import DTYPES, Pretrained, attach_adapters, fold_adapters, values_of, with_values
from jaxscape.models.sharding import LANES, MeshShape
from jaxscape.workspace import digest, read_json, write_json

_RUN = "run.json"  # whose folder it is
_FREE = ("save_every", "keep")  # change nothing that is computed
LOG, VALIDATION, BY_SUBJECT = "log.csv", "validation.csv", "validation_by_subject.csv"
_COLUMNS = {"step": int, "loss": float, "accuracy": float, "gradient_norm": float, "learning_rate": float,
            "tokens": int}  # fmt: skip
_VALIDATION_COLUMNS = {"step": int, "accuracy_micro": float, "accuracy_macro": float, "letters_loss": float}
_SUBJECT_COLUMNS = {"step": int, "subject": str, "accuracy": float}
# Steps that may be on their way while the metrics of the one before are fetched; CPUs gain nothing by it.
_AHEAD = {"cpu": 0}
_FINAL = 20  # steps that the final loss is the mean of
_NAMED = 3  # questions of a batch that a message names


@functools.lru_cache(maxsize=4)
def _compiled_step(leaves: Sequence[NamedSharding], tree):
    """``train_step`` that leaves every array where it was: one program a shape, for steps after a restart too."""
    return jax.jit(
        train_step,
        static_argnames=("graphdef", "optimizer", "remat", "dtype"),
        donate_argnames=("trainable", "opt_state"),
        out_shardings=(*jax.tree.unflatten(tree, leaves), None),
    )


def _split(model: Pretrained, config: FinetuneConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, what is trained: float32, what is not)."""
    if config.method == "lora":
        graphdef, state = attach_adapters(model, config.lora, config.seed)
        return nnx.split(nnx.merge(graphdef, state), LoraParam, ...)
    masters = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    return nnx.split(nnx.merge(model.graphdef, masters), nnx.Param, ...)


class TrainingRun:
    """A training run between two steps: everything a state holds, and what makes the next step.

    Attributes:
      config: how.
      batches: what each step shows.
      mesh: where.
      graphdef: of the decoder, with adapters where those are trained.
      trainable: parameters that change, float32.
      frozen: all the others.
      opt_state: the optimiser's, beside them.
    """

    def __init__(self, model: Pretrained, config: FinetuneConfig, data: TrainingSet):
        self.config = config
        self.graphdef, self.trainable, self.frozen = _split(model, config)
        self.mesh = jax.tree.leaves(self.trainable)[0].sharding.mesh
        self.lanes = math.prod(self.mesh.shape[axis] for axis in LANES)
        self.batches = Batches(
            data, steps=config.steps, batch_size=config.batch_size, parts=config.accumulation, lanes=self.lanes,
            packing=config.packing, seed=config.seed,
        )  # fmt: skip
        self._shapes = set()
        self.dtype = DTYPES[config.dtype]
        self._optimizer = optimizer(config)
        beside = jax.tree.map(lambda leaf: leaf.sharding, self.trainable)
        places = beside, state_shardings(self._optimizer, self.trainable)
        self.opt_state = jax.jit(self._optimizer.init, out_shardings=places[1])(self.trainable)
        leaves, tree = jax.tree.flatten(places)
        self._train_step = _compiled_step(tuple(leaves), tree)
        self._lanes_sharding = NamedSharding(self.mesh, PartitionSpec(None, LANES))
        self.dropout_key = jax.random.key(config.seed + 1) if config.method == "lora" and config.lora.dropout else None

    def step(self, step: int) -> Metrics:
        """Takes step ``step`` (from 0) and returns its metrics, which may still be on their way."""
        arguments, options = self._arguments(step)
        self._shapes.add(self.batches.shape(step))
        self.trainable, self.opt_state, metrics = self._train_step(*arguments, **options)
        return metrics

    def is_new(self, step: int) -> bool:
        """Whether no step of its shape was taken yet: its program may have to be compiled."""
        return self.batches.shape(step) not in self._shapes

    def temporary_bytes(self, step: int) -> int | None:
        """Bytes on a device that a step needs beside its arguments; None where the backend does not tell."""
        arguments, options = self._arguments(step)
        # compiled here, and not again when the step is taken
        analysis = self._train_step.lower(*arguments, **options).compile().memory_analysis()
        return getattr(analysis, "temp_size_in_bytes", None)

    def _arguments(self, step: int) -> tuple[tuple, dict]:
        batch = jax.device_put(self.batches.step(step), self._lanes_sharding)
        key = None if self.dropout_key is None else jax.random.fold_in(self.dropout_key, step)
        state = self.graphdef, self._optimizer, self.trainable, self.frozen, self.opt_state
        return (*state, batch, key), {"remat": self.config.remat, "dtype": self.dtype}

    def tree(self) -> dict:
        """What a state holds; the optimiser's leaves are numbered, so that no class of its makes it to disk."""
        leaves = {f"{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(self.opt_state))}
        return {"trainable": named(values_of(self.trainable)), "opt_state": leaves}

    def restore(self, read: Callable[[Mapping], Mapping]) -> None:
        """Takes a state's place: ``read`` makes one from its shapes, dtypes and shardings.

        What is here goes first, as a device that trains need not have room for both.
        """
        like = abstract(self.tree())
        for leaf in jax.tree.leaves((self.trainable, self.opt_state)):
            leaf.delete()
        tree = read(like)
        self.trainable = with_values(self.trainable, unnamed(tree["trainable"]))
        leaves = [tree["opt_state"][name] for name in sorted(tree["opt_state"])]
        self.opt_state = jax.tree.unflatten(jax.tree.structure(self.opt_state), leaves)


class _Loop:
    """A run with what it leaves on disk and shows to the user."""

    def __init__(
        self, run: TrainingRun, checkpoints: Checkpoints, evaluate: Evaluator | None, trackers: Trackers, start: int,
        label: str,
    ):  # fmt: skip
        self.run, self.config, self.checkpoints, self.evaluate = run, run.config, checkpoints, evaluate
        self.trackers, self.start, self.folder = trackers, start, checkpoints.folder
        self.schedule = schedule(self.config)
        self.log = Log(self.folder / LOG, _COLUMNS, start)
        self.validation = Log(self.folder / VALIDATION, _VALIDATION_COLUMNS, start)
        evaluated = max((row["step"] for row in self.validation.rows), default=-1)
        self.by_subject = Log(self.folder / BY_SUBJECT, _SUBJECT_COLUMNS, evaluated)
        self.kept = set(checkpoints.kept())
        self._check_whole()
        self.pending: deque[tuple[int, Metrics, bool]] = deque()
        self.ahead = _AHEAD.get(run.mesh.devices.flat[0].platform, 1)
        self.progress = Progress(label, start, self.config.steps, self.config.batch_size)

    def _check_whole(self) -> None:
        """Refuses a folder out of which somebody took what the state builds on."""
        lost = [f"the parameters of step {step}" for step in self.config.kept_steps()
                if step < self.start and step not in self.kept]  # fmt: skip
        if len(self.log.rows) < self.start:
            lost.append(f"rows of {LOG} after step {len(self.log.rows)}")
        lost += [f"rows of {VALIDATION} of step {step}" for step in self.config.evaluated_steps()
                 if step < self.start and self._asks(step)]  # fmt: skip
        if lost:
            raise InputError(f"{self.folder}: {lost[0]} are missing, though the state is of step {self.start}; delete "
                             "this folder and run again")  # fmt: skip

    def go(self, interruption: Interruption) -> None:
        """Takes all steps that are left.

        Raises:
          InputError: loss, gradient or parameters are not finite, or something cannot be written.
          KeyboardInterrupt: a signal came; the state is saved.
        """
        with self.progress:
            for step in range(self.start, self.config.steps + 1):
                self._stop_if(interruption, step)
                self._settle(step)
                self._stop_if(interruption, step)
                if step < self.config.steps:
                    if compiles := self.run.is_new(step):
                        self._record(0)  # its time is not that of the steps before it
                    self.pending.append((step, self.run.step(step), compiles))
                    self._record(0 if compiles else self.ahead)
            self.checkpoints.wait()
            self._stop_if(interruption, self.config.steps)

    def close(self) -> None:
        """Closes the files."""
        for log in (self.log, self.validation, self.by_subject):
            log.close()

    def _stop_if(self, interruption: Interruption, step: int) -> None:
        if interruption.received is None:
            return
        self._record(0)
        done = step == self.config.steps and step in self.kept and not self._asks(step)
        if step and not done and not self.checkpoints.has_state(step):
            self._save(step)
        self.checkpoints.wait()
        raise interruption.error()

    def _settle(self, step: int) -> None:
        """Does what is to be done with the parameters that ``step`` steps have left."""
        keeps = step in self.config.kept_steps() and step not in self.kept
        saves = step % self.config.save_every == 0 and self.start < step < self.config.steps
        asks = self._asks(step)
        if not (keeps or saves or asks):
            return
        self._record(0)
        if keeps:
            self.checkpoints.keep(step, apart(named(values_of(self.run.trainable))))
            self.kept.add(step)
        if saves:
            self._save(step)
        if asks:
            self._ask(step)
        self.progress.go()

    def _save(self, step: int) -> None:
        with self._writing(LOG):
            self.log.sync()
            self.validation.sync()
            self.by_subject.sync()
        self.checkpoints.save(step, apart(self.run.tree()))

    def _asks(self, step: int) -> bool:
        """Whether the validation questions are still to be asked after ``step`` steps."""
        wanted = bool(self.evaluate) and step in self.config.evaluated_steps()
        return wanted and all(row["step"] != step for row in self.validation.rows)

    def _ask(self, step: int) -> None:
        found = self.evaluate(self.run.trainable, self.run.frozen)
        row = {"step": step, "accuracy_micro": float(found.micro), "accuracy_macro": float(found.macro),
               "letters_loss": float(found.loss)}  # fmt: skip
        with self._writing(VALIDATION):
            for subject, accuracy in found.by_subject.items():
                self.by_subject.append({"step": step, "subject": subject, "accuracy": float(accuracy)})
            self.validation.append(row)  # last: an evaluation is done when its row is here
        self.trackers.log(step, {f"validation/{name}": value for name, value in row.items() if name != "step"})

    def _record(self, ahead: int) -> None:
        """Writes down the steps that were taken, but for the last ``ahead``."""
        while len(self.pending) > ahead:
            step, metrics, compiled = self.pending.popleft()
            found = jax.device_get(metrics)
            values = {name: float(getattr(found, name)) for name in ("loss", "accuracy", "gradient_norm")}
            if not found.finite:  # before anything is made of the parameters
                raise self._diverged(step, values)
            tokens = int(self.run.batches.tokens(step))
            row = {"step": step + 1, **values, "learning_rate": float(self.schedule(step)), "tokens": tokens}
            with self._writing(LOG):
                self.log.append(row)
            rate = self.progress.step(row["loss"], tokens, compiled)
            curves = {name: row[name] for name in ("loss", "accuracy", "gradient_norm", "learning_rate")}
            curves |= {} if rate is None else {"tokens_per_second": rate}
            self.trackers.log(step + 1, {f"train/{name}": value for name, value in curves.items()})

    def _diverged(self, step: int, values: Mapping[str, float]) -> InputError:
        """What to say of step ``step`` (from 0)."""
        self.checkpoints.settle()
        loss, norm = values["loss"], values["gradient_norm"]
        what = f"loss {loss}, gradient norm {norm} at step {step + 1}"
        if math.isfinite(loss) and math.isfinite(norm):
            what = f"parameters are not finite after step {step + 1}"
        names = list(self.run.batches.names(step))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        state, kept = self.checkpoints.newest(), self.checkpoints.kept()
        good = f"the last good state is of step {state}" if state else "there is no state before it"
        clip = "" if self.config.clip_norm else ", or set clip_norm,"
        good += f", the last parameters kept are in {self.folder / 'kept' / str(kept[-1])}" if kept else ""
        return InputError(
            f"fine-tuning diverged: {what} (questions {', '.join(names[:_NAMED])}{more}); {good}; the same command "
            f"would end the same way: lower config.finetune.learning_rate{clip} and give another --workdir"
        )

    @contextlib.contextmanager
    def _writing(self, name: str):
        try:
            yield
        except OSError as error:
            raise self.checkpoints.cannot_write(str(self.folder / name), error) from error

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        rows = self.log.rows[-_FINAL:]
        found = {
            "parameters_trained": int(sum(leaf.size for leaf in jax.tree.leaves(self.run.trainable))),
            "tokens": sum(row["tokens"] for row in self.log.rows),
            "final_loss": sum(row["loss"] for row in rows) / len(rows),
            "final_training_accuracy": sum(row["accuracy"] for row in rows) / len(rows),
            "kept_steps": list(self.config.kept_steps()),
            "tokens_per_second": self.progress.tokens_per_second(),
        }
        if self.validation.rows:
            last = self.validation.rows[-1]
            found |= {f"validation_{name}": last[name] for name in ("accuracy_micro", "accuracy_macro")}
        return found


def finetune(
    model: Pretrained,
    config: FinetuneConfig,
    data: TrainingSet,
    folder: Path | str,
    *,
    validation: ValidationSet | None = None,
    trackers: Sequence[str] = (),
    label: str,
) -> dict[str, Any]:
    """Fine-tunes, going on from the newest state in ``folder``; leaves there the parameters that are kept, and logs.

    While it runs, the first SIGINT or SIGTERM ends it after the step it is at, with the state saved.

    With method "full" the arrays of ``model`` are given up to the optimiser and must not be used afterwards. That a run
    goes on with the model it began with is the caller's to see to.

    Args:
      model: what to start from.
      config: how.
      data: on what.
      folder: of the run; it exists.
      validation: what is asked while it trains; None: nothing.
      trackers: names out of ``trackers.TRACKERS``.
      label: name on the progress bar.

    Returns:
      Facts for the manifest.

    Raises:
      InputError: the training diverged: says at which step, on which questions, and what the last good checkpoint is.
        Or the folder is another run's, a checkpoint is unreadable or cannot be written, or a tracker is not there.
      KeyboardInterrupt: SIGINT; its subclass ``Terminated``: SIGTERM.
    """
    check_trackers(trackers)
    folder = Path(folder)
    _claim(folder, config, data, validation, jax.tree.leaves(model.params)[0].sharding.mesh)
    finished = _is_finished(folder, config, validation)
    run = TrainingRun(model, config, data)
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(Checkpoints(folder, config.keep, run.tree()))
        start = config.steps if finished else checkpoints.newest()
        if start and not finished:
            run.restore(checkpoints.restore)
        fields = dataclasses.asdict(config)
        following = stack.enter_context(Trackers(trackers, folder, label=label, config=fields, start=start))
        if start < config.steps:
            parts = {"trained": run.trainable, "frozen": run.frozen, "of the optimizer's": run.opt_state}
            told = (*memory_lines(parts, run.temporary_bytes(start)), f"log: {folder / LOG}, as it goes")
            print(*told, sep="\n", flush=True)
        loop = _Loop(run, checkpoints, _evaluator(run, model, validation), following, start, label)
        stack.callback(loop.close)
        loop.go(interruption)
        loop.log.write_parquet()
        return loop.facts()


def _claim(folder: Path, config: FinetuneConfig, data: TrainingSet, validation: ValidationSet | None, mesh) -> None:
    """Refuses a folder in which another run began: two would be mixed. Of another mesh it only tells."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    rows = [[list(map(int, row)) for row in part.tokens] for part in (data, validation) if part is not None]
    asked = [data.targets, data.weights] + ([] if validation is None else [validation.answers, validation.subjects])
    own = {"config": json.loads(json.dumps(fields)), "data": digest([rows, [np.asarray(v).tolist() for v in asked]]),
           "mesh": str(MeshShape(**mesh.shape))}  # fmt: skip
    found = read_json(folder / _RUN)
    if found is None and not (folder / STATE).exists():
        write_json(folder / _RUN, own)
        return
    found = found or {}
    was = found.get("config", {})
    changed = [name for name in own["config"] if was.get(name) != own["config"][name]]
    changed += ["the questions"] if found.get("data") != own["data"] else []
    if changed:
        raise InputError(f"{folder}: holds another run ({', '.join(changed)} changed); give another folder, or delete "
                         "this one")  # fmt: skip
    if found.get("mesh") != own["mesh"]:
        places = " and for the places that dropout zeroes" if config.lora.dropout and config.method == "lora" else ""
        print(f"began on a mesh of {found.get('mesh')}, goes on on {own['mesh']}: the same training but for rounding"
              f"{places}, not to the bit", flush=True)  # fmt: skip


def _is_finished(folder: Path, config: FinetuneConfig, validation: ValidationSet | None) -> bool:
    """Whether everything that a run leaves is there: it may have ended just before it could tell."""
    asked = config.evaluated_steps() if validation is not None else ()
    answered = {row["step"] for row in read_rows(folder / VALIDATION, _VALIDATION_COLUMNS)}
    logged = len(read_rows(folder / LOG, _COLUMNS))
    return config.steps in steps_in(folder / KEPT) and logged == config.steps and answered.issuperset(asked)


def _evaluator(run: TrainingRun, model: Pretrained, validation: ValidationSet | None) -> Evaluator | None:
    if validation is None or not run.config.evaluated_steps():
        return None
    table = letter_table(model.tokenizer.letter_ids())
    return Evaluator(run.graphdef, validation, table, run.lanes, run.dtype, packing=run.config.packing)


def load_finetuned(
    model: Pretrained, config: FinetuneConfig, folder: Path, step: int | None = None, *, donate: bool = False
) -> Pretrained:
    """The model with parameters that ``finetune`` kept in ``folder``; adapters are folded into the kernels.

    Args:
      model: what was fine-tuned.
      config: how.
      folder: where.
      step: one of those that were kept; None: the last.
      donate: give up the arrays of ``model`` that are replaced, instead of holding both.

    Raises:
      InputError: the checkpoint is missing or unreadable.
    """
    trained = load_trained(folder, step)
    if config.method == "lora":
        return fold_adapters(model, config.lora, trained, donate=donate)
    before = values_of(model.params)
    placed = dict(before)
    for path, value in trained.items():
        place, dtype = before[path].sharding, before[path].dtype
        if donate:
            before[path].delete()
        placed[path] = jax.device_put(np.asarray(value, dtype), place)
    return model._replace(params=with_values(model.params, placed))
