"""Any tokens in, states out: collection from Python, in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from jaxscape.collect.collector import lanes_of, plan_for, run_plan
from jaxscape.collect.planning import Plan
from jaxscape.collect.recipe import Recipe, layer_numbers
from jaxscape.errors import InputError
from jaxscape.models.answers import letter_table
from jaxscape.models.decoder import check_sites
from jaxscape.models.pretrained import Pretrained

_LOGITS = (False, "answers", "vocabulary")


@dataclass(frozen=True, repr=False)
class Collected:
    """States of prompts; of one site it indexes and converts (``np.asarray``) as the array [layer, prompt, feature].

    Attributes:
      states: site -> float32 [layer, prompt, feature]; "final_norm" has the last layer only.
      layers: number of each layer, from 1.
      prompts: name of each prompt: its text, or "prompt 3".
      logits: float32 [prompt, answer] or [prompt, vocabulary]; None unless asked for.
      plan: how they ran; ``planning.plan_facts`` counts its tokens.
      last: number of the model's last layer, after which the final norm stands.
    """

    states: dict[str, np.ndarray]
    layers: tuple[int, ...]
    prompts: tuple[str, ...]
    logits: np.ndarray | None
    plan: Plan
    last: int

    def layer(self, number: int, site: str | None = None) -> np.ndarray:
        """States [prompt, feature] of one layer, by its number from 1.

        Raises:
          KeyError: that layer or site was not collected.
          ValueError: several sites were, and none is named.
        """
        site = self._site() if site is None else site
        if site not in self.states:
            raise KeyError(f"site {site!r} was not collected; these were: {', '.join(self.states)}")
        layers = (self.last,) if site == "final_norm" else self.layers
        if number not in layers:
            raise KeyError(f"layer {number} of {site} was not collected; these were: {', '.join(map(str, layers))}")
        return self.states[site][layers.index(number)]

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, prompts, features) of the one site."""
        return self._one().shape

    def _site(self) -> str:
        if len(self.states) > 1:
            raise ValueError(f"several sites were collected: take one, as in collected[{next(iter(self.states))!r}]")
        return next(iter(self.states))

    def _one(self) -> np.ndarray:
        return self.states[self._site()]

    def __array__(self, dtype=None, copy=None):
        return np.array(self._one(), dtype, copy=copy)

    def __getitem__(self, key):
        return self.states[key] if isinstance(key, str) else self._one()[key]

    def __len__(self):
        return len(self._one())

    def __iter__(self):
        return iter(self._one())

    def __repr__(self):
        sites = ", ".join(f"{site} {list(x.shape)}" for site, x in self.states.items())
        layers = f"{self.layers[0]} to {self.layers[-1]}" if len(self.layers) > 8 else ", ".join(map(str, self.layers))
        first = self.prompts[0] if len(self.prompts[0]) <= 40 else self.prompts[0][:37] + "..."
        logits = "" if self.logits is None else f"; logits {list(self.logits.shape)}"
        return (f"Collected({sites} [layer, prompt, feature]; layers {layers}; {len(self.prompts)} prompts, "
                f"first {first!r}{logits})")  # fmt: skip


def collect(
    model: Pretrained,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    sites: Sequence[str] | str = ("residual",),
    *,
    layers: str | Sequence[int] | None = None,
    pool: str | Sequence[int] = "last",
    token_budget: int | None = None,
    logits: bool | str = False,
    progress: bool = True,
) -> Collected:
    """States of every prompt's last token at every layer; shared prefixes are found and run once.

        model = jaxscape.models.load_model("smollm2-135m-instruct")
        states = jaxscape.collect.collect(model, ["The capital of France is", "The capital of Italy is"])

    Args:
      model: from ``models.load_model``.
      prompts: texts, or token ids.
      sites: "residual" (after each block), "input_norm" (what its attention reads), "post_attention_norm" (what its
        MLP reads: in Gemma 2 and 3 that is pre_feedforward_layernorm), "final_norm"; one or several.
      layers: numbers of the blocks from 1, which come back in rising order; "every 4"; or None for all.
      pool: "last" token, "mean" over the prompt's tokens, or for each prompt the token from which on to average.
      token_budget: tokens of a batch; None: 2048 on CPUs, 8192 elsewhere.
      logits: "answers" for those of A to D (each letter's likelier spelling), "vocabulary" for all; False for none.
      progress: show a bar.

    Raises:
      InputError: there is no prompt, one is empty or longer than the model takes, or an argument is not among its
        choices.
    """
    if not isinstance(model, Pretrained):
        raise InputError(f"model {model!r}: give what models.load_model returns")
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    if not sites:
        raise InputError("sites: name one at least")
    check_sites(model.arch, sites)
    if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
        raise InputError(f"token_budget {token_budget!r}: must be an integer of at least 1")
    tokens, names = _tokenized(model, prompts)
    if logits not in _LOGITS:
        raise InputError(f"logits {logits!r}: choose from {', '.join(map(repr, _LOGITS))}")
    recipe = Recipe(
        sites,
        layer_numbers(layers, model.arch.num_layers),
        _pool_from(pool, tokens),
        letter_table(model.tokenizer.letter_ids()) if logits == "answers" else None,
        logits == "vocabulary",
    )
    budget = token_budget or (2048 if jax.default_backend() == "cpu" else 8192)
    plan = plan_for(model.arch, tokens, budget, lanes_of(model), recipe.pool_from)
    states, found = {}, None
    with jax.default_matmul_precision("float32"), tqdm(total=len(tokens), unit="prompt", disable=not progress) as bar:
        for part in run_plan(model, plan, recipe):
            for site, values in part.states.items():
                shape = (len(values), len(tokens), model.arch.width)
                states.setdefault(site, np.empty(shape, np.float32))[:, part.rows] = values
            of_part = part.letters if logits == "answers" else part.logits
            if of_part is not None:
                found = np.empty((len(tokens), of_part.shape[1]), np.float32) if found is None else found
                found[part.rows] = of_part
            bar.update(len(part.rows))
    last = model.arch.num_layers
    named = (last,) if sites == ("final_norm",) else recipe.layers
    return Collected({site: states[site] for site in sites}, named, names, found, plan, last)


def _tokenized(model: Pretrained, prompts) -> tuple[list[list[int]], tuple[str, ...]]:
    """Token ids and name of each prompt."""
    prompts = [] if prompts is None or isinstance(prompts, str | bytes) else list(prompts)
    if not prompts:
        raise InputError("prompts: give a list of texts or of lists of token ids, with one at least")
    if all(isinstance(prompt, str) for prompt in prompts):
        for number, text in enumerate(prompts):
            if not text.isascii() and text.encode(errors="replace").decode() != text:
                raise InputError(f"prompts[{number}]: not valid text (a lone surrogate)")
        tokens, names = model.tokenizer.encode(prompts), tuple(prompts)
    else:
        tokens = [_ids(prompt, number) for number, prompt in enumerate(prompts)]
        names = tuple(f"prompt {number}" for number in range(len(prompts)))
    for number, row in enumerate(tokens):
        if not 0 < len(row) <= model.arch.max_positions:
            raise InputError(
                f"prompts[{number}] has {len(row)} tokens; the model takes 1 to {model.arch.max_positions}"
            )
        if min(row) < 0 or max(row) >= model.arch.vocab_size:
            raise InputError(f"prompts[{number}]: token ids must be from 0 to {model.arch.vocab_size - 1}")
    return tokens, names


def _ids(prompt, number: int) -> list[int]:
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or ids.size == 0):
        raise InputError(f"prompts[{number}]: give texts, or lists of token ids (integers) for all of them")
    return ids.tolist()


def _pool_from(pool: str | Sequence[int], tokens) -> list[int] | None:
    if isinstance(pool, str) and pool in ("last", "mean"):
        return None if pool == "last" else [0] * len(tokens)
    try:
        starts = None if isinstance(pool, str) else [int(start) for start in pool]
    except (TypeError, ValueError):
        starts = None
    if starts is None:
        raise InputError(f"pool {pool!r}: choose 'last', 'mean', or give a token number for each prompt")
    if len(starts) != len(tokens) or any(not 0 <= s < len(row) for s, row in zip(starts, tokens, strict=False)):
        raise InputError("pool: give for each prompt the number of one of its tokens, from 0")
    return starts
