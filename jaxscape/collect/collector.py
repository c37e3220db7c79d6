"""Runs a plan: caches made, used and freed as it says; packing and storing while the device computes."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxscape.collect.forward import resize, run_prefix, run_prompts
from jaxscape.collect.planning import Job, Plan, Wave, plan_collection, plan_facts
from jaxscape.collect.recipe import Recipe
from jaxscape.collect.store import Answers, Store
from jaxscape.data.batches import BatchShape, TokenBatch, pack
from jaxscape.errors import InputError
from jaxscape.models.decoder import Prefix
from jaxscape.models.pretrained import Pretrained, values_of
from jaxscape.models.sharding import LANES, lanes_sharding, prefix_sharding
from jaxscape.workspace import read_json, write_json

_PROGRESS = "progress.json"


class Part(NamedTuple):
    """What one pass found, on the host.

    Attributes:
      piece: number of the piece of the plan that it belongs to.
      ends: it is the piece's last.
      rows: prompts.
      states: site -> [layer, prompt, feature].
      letters: float32 [prompt, C], or None.
      free: int32 [prompt], or None.
      logits: float32 [prompt, V], or None.
    """

    piece: int
    ends: bool
    rows: list[int]
    states: dict[str, np.ndarray]
    letters: np.ndarray | None
    free: np.ndarray | None
    logits: np.ndarray | None


class Target(NamedTuple):
    """Where the prompts of one condition go.

    Attributes:
      label: name of the condition.
      folder: where its arrays lie.
      start: first of its prompts in the plan.
      stop: one past the last.
    """

    label: str
    folder: Path
    start: int
    stop: int


def lanes_of(model: Pretrained) -> int:
    """Batches that the model's mesh runs side by side."""
    return int(np.prod([_mesh(model).shape[axis] for axis in LANES]))


def pair_cost(arch) -> float:
    """What a query meeting a key costs, in tokens through a block's matrices."""
    heads, kv_heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    weights = 2 * arch.width * (heads + kv_heads) + (3 if arch.gated else 2) * arch.width * arch.mlp_width
    return 2 * heads / weights


def long_from(arch) -> int | None:
    """Tokens beyond which prompts run with other frequencies (LongRoPE); None where they don't."""
    borders = {kind.rotary.long_from for kind in arch.kinds if kind.rotary and kind.rotary.long_frequencies}
    return min(borders, default=None)


def plan_for(arch, tokens: Sequence[Sequence[int]], token_budget: int, lanes: int, limits=None) -> Plan:
    """The plan of prompts for a model of this architecture; see ``planning.plan_collection``."""
    return plan_collection(
        tokens, token_budget, lanes=lanes, limits=limits, long_from=long_from(arch), pair_cost=pair_cost(arch)
    )


def _mesh(model: Pretrained):
    return values_of(model.params)[("embedding",)].sharding.mesh


# -- passes ------------------------------------------------------------------------------------------------------------


def run_plan(model: Pretrained, plan: Plan, recipe: Recipe, skip: Collection[int] = ()) -> Iterator[Part]:
    """Runs the pieces of a plan, in order, but for those in ``skip``.

    Each pass is on its way before the results of the one before are fetched: the host packs the next batch, and
    whoever consumes this stores the last one, while the device computes.
    """
    waiting = None
    for running in _dispatched(model, plan, recipe, skip):
        if waiting is not None:
            yield _fetch(*waiting)
        waiting = running
    if waiting is not None:
        yield _fetch(*waiting)


def _dispatched(model: Pretrained, plan: Plan, recipe: Recipe, skip) -> Iterator[tuple]:
    job = cache = None
    places = tuple(number - 1 for number in recipe.layers)
    layers = None if len(places) == model.arch.num_layers else places
    for number, own, waves in plan.pieces():
        if number in skip:
            continue
        if own is not job:
            if cache is not None:
                cache.free()
            job, cache = own, _Cache(model, plan, own)
        for wave in waves:
            batch, pool_from = _packed(model, plan, recipe, wave)
            running = run_prompts(
                model.graphdef, model.params, batch, cache.before(wave), pool_from, recipe.letters,
                sites=recipe.sites, layers=layers, vocabulary=recipe.vocabulary,
            )  # fmt: skip
            yield number, wave is waves[-1], wave, running
    if cache is not None:
        cache.free()


def _packed(model: Pretrained, plan: Plan, recipe: Recipe, wave: Wave) -> tuple[TokenBatch, np.ndarray | None]:
    """The wave's batch, and the places from which states are averaged."""
    lanes = [pack([plan.tokens[row][depth:] for row in rows], wave.shape)
             for rows, depth in zip(wave.rows, wave.depths, strict=True)]  # fmt: skip
    pool_from = None
    if recipe.pool_from is not None:
        pool_from = np.zeros((plan.lanes, wave.shape.rows), np.int32)
        for lane, (rows, depth) in enumerate(zip(wave.rows, wave.depths, strict=True)):
            pool_from[lane, : len(rows)] = [recipe.pool_from[row] - depth for row in rows]
    return _side_by_side(model, lanes), None if pool_from is None else _side_by_side(model, list(pool_from))


def _side_by_side(model: Pretrained, lanes: Sequence):
    """One lane's arrays as they are, several stacked and each put on its devices."""
    if len(lanes) == 1:
        return lanes[0]
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *lanes), lanes_sharding(_mesh(model)))


def _fetch(piece: int, ends: bool, wave: Wave, running) -> Part:
    found = jax.device_get(running)
    lanes = [jax.tree.map(lambda x, lane=lane: x[lane], found) for lane in range(len(wave.rows))]
    lanes = [found] if len(wave.rows) == 1 else lanes
    counts = [len(rows) for rows in wave.rows]

    def joined(pick, axis: int):
        kept = [pick(lane) for lane in lanes]
        if kept[0] is None:
            return None
        return np.concatenate([x[:n] if axis == 0 else x[:, :n] for x, n in zip(kept, counts, strict=True)], axis)

    states = {site: joined(lambda lane, site=site: lane.states[site], 1) for site in found.states}
    rest = [joined(lambda lane, name=name: getattr(lane, name), 0) for name in ("letters", "free", "logits")]
    return Part(piece, ends, [row for rows in wave.rows for row in rows], states, *rest)


class _Cache:
    """Keys and values of the tokens that a job's prompts share."""

    def __init__(self, model: Pretrained, plan: Plan, job: Job):
        self._model, self._full, self._cut = model, None, None
        if job.room:
            shape = BatchShape(job.room, 1, job.room)
            lanes = [pack([plan.tokens[source][:length]], shape)
                     for source, length in zip(job.sources, job.lengths, strict=True)]  # fmt: skip
            serves = [np.array([length], np.int32) for length in job.serves]
            placed = None if plan.lanes == 1 else prefix_sharding(_mesh(model), model.arch.num_kv_heads)
            self._full = run_prefix(model.graphdef, model.params, _side_by_side(model, lanes),
                                    _side_by_side(model, serves), placed=placed)  # fmt: skip
            self._cut = self._full

    def before(self, wave: Wave) -> Prefix | None:
        """What stands before the rows of a wave; shorter prefixes are the beginning of the cache."""
        if not wave.room:
            return None
        if self._cut.keys.shape[-3] != wave.room:
            if self._cut is not self._full:
                _delete(self._cut)
            self._cut = self._full if self._full.keys.shape[-3] == wave.room else resize(self._full, wave.room)
        lengths = [np.int32(depth) for depth in wave.depths]
        return self._cut._replace(length=_side_by_side(self._model, lengths))

    def free(self) -> None:
        """Gives the memory back once the passes that are on their way have read it."""
        if self._full is not None:
            _delete(self._full)
            if self._cut is not self._full:
                _delete(self._cut)


def _delete(prefix: Prefix) -> None:
    prefix.keys.delete()
    prefix.values.delete()


# -- onto disk ---------------------------------------------------------------------------------------------------------


class _Writer:
    """One condition's store and how far it has come; a piece is recorded once the next one is on its way."""

    def __init__(self, target: Target, store: Store, digest: str, dtype: str):
        self.target, self._store, self._dtype = target, store, dtype
        self._digest, self._pending = digest, None
        found = read_json(target.folder / _PROGRESS) or {}
        self.finished = set(found["pieces"]) if found.get("plan") == digest else set()

    def write(self, piece: int, parts: Sequence[Part], site: str) -> None:
        rows = np.array([row for part in parts for row in part.rows])
        own = (rows >= self.target.start) & (rows < self.target.stop)
        if piece in self.finished or not own.any():
            self.settle()  # other conditions' pieces may follow for long
            return
        states = np.concatenate([part.states[site] for part in parts], axis=1)[:, own]
        logits, free = (np.concatenate([getattr(part, name) for part in parts])[own] for name in ("letters", "free"))
        stored = _stored(states, self._dtype, self.target.label, self._store.layers)
        pending = self._store.write(rows[own] - self.target.start, stored, Answers(logits, free))
        self.settle()
        self._pending = piece, pending

    def settle(self) -> None:
        """Records the last piece, once it is on disk."""
        if self._pending is None:
            return
        piece, pending = self._pending
        pending.result()
        self.finished.add(piece)
        write_json(self.target.folder / _PROGRESS, {"plan": self._digest, "pieces": sorted(self.finished)})
        self._pending = None


def collect_conditions(
    model: Pretrained, plan: Plan, recipe: Recipe, targets: Sequence[Target], *, dtype: str, label: str
) -> list[dict]:
    """Collects the prompts of several conditions, going on from what an interrupted run left in their folders.

    Args:
      model: the model.
      plan: of the prompts of all conditions; those of conditions that are no target any more run only where they
        share a piece with others.
      recipe: one site, and letters.
      targets: conditions to be stored.
      dtype: that states are stored in.
      label: name on the progress bar.

    Returns:
      Facts for the manifest of each target: shapes and token counts.

    Raises:
      InputError: a state is NaN or infinite, or what an interrupted run left is unreadable.
    """
    (site,), answers, digest = recipe.sites, len(recipe.letters), plan.digest()
    layers = (model.arch.num_layers,) if site == "final_norm" else recipe.layers
    stores = [Store.create(t.folder, layers, t.stop - t.start, model.arch.width, answers, dtype) for t in targets]
    writers = [_Writer(t, store, digest, dtype) for t, store in zip(targets, stores, strict=True)]
    sizes = _sizes(plan, writers)
    skip = {piece for piece, size in sizes.items() if not size}
    with tqdm(total=sum(t.stop - t.start for t in targets), desc=f"collect {label}", unit="prompt",
              smoothing=0.05) as bar:  # fmt: skip
        bar.update(bar.total - sum(sizes.values()))
        parts = []
        try:
            for part in run_plan(model, plan, recipe, skip):
                parts.append(part)
                if part.ends:
                    for writer in writers:
                        writer.write(part.piece, parts, site)
                    parts = []
                    bar.update(sizes[part.piece])
        finally:  # what an interruption finds on its way to disk counts too
            for writer in writers:
                writer.settle()
    for store in stores:
        store.write_texts(model.tokenizer.decode)
    facts = {"dtype": dtype, "site": site, "layers": list(layers), "plan": plan_facts(plan)}
    return [{"shape": list(store.states.shape), **facts,
             "prompt_tokens": sum(map(len, plan.tokens[t.start : t.stop]))}
            for t, store in zip(targets, stores, strict=True)]  # fmt: skip


def _sizes(plan: Plan, writers: Sequence[_Writer]) -> dict[int, int]:
    """Piece -> prompts of it that are still to be stored."""
    sizes = {}
    for piece, _, waves in plan.pieces():
        rows = [row for wave in waves for lane in wave.rows for row in lane]
        sizes[piece] = sum(w.target.start <= row < w.target.stop for w in writers if piece not in w.finished
                           for row in rows)  # fmt: skip
    return sizes


def _stored(states: np.ndarray, dtype: str, label: str, layers: Sequence[int]) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = states.astype(dtype)
    if not np.isfinite(stored).all():
        layer = layers[int(np.argmin(np.isfinite(stored).all(axis=(1, 2))))]
        raise InputError(
            f"condition {label}: states of layer {layer} are not finite in {dtype}; set config.model.dtype and "
            "config.collect.dtype to float32, or check the model, and give another --workdir"
        )
    return stored
