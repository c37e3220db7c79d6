"""The learning rate by step, and any optimiser of optax by its name."""

import ast
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import NamedSharding, PartitionSpec

from jaxscape.errors import InputError
from jaxscape.finetune.config import FinetuneConfig

_FIELD = "config.finetune.optimizer"
_HOUSES = {"": optax, "contrib.": optax.contrib}  # what stands before a name -> where it is looked up
# These want more than gradients (the loss or its function, single questions' gradients), keep the weights that count
# in their own state, take no schedule, or (galore) see no matrices in the stacked kernels.
_UNFIT = frozenset((
    "lbfgs", "momo", "momo_adam", "sophia", "dpsgd", "schedule_free_adamw", "schedule_free_sgd", "optimistic_adam",
    "rprop", "sm3", "galore",
))  # fmt: skip


def schedule(config: FinetuneConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then a cosine to ``final_ratio`` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(math.ceil(config.warmup_ratio * config.steps), config.steps - 1),
        decay_steps=config.steps,
        end_value=config.final_ratio * config.learning_rate,
    )


@functools.lru_cache(maxsize=4)
def optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """The optimiser that ``config.optimizer`` names, on the schedule, behind a clip of the global norm.

    One object a configuration: it is part of the compiled step's key. A parameter of all layers is one array, so that
    rules which take a norm of each parameter (adafactor's scale, lamb, lars) take it over the layers; muon, whose rule
    is of matrices, is told where they are.

    Raises:
      InputError: the name or an option is not one of optax's, or it can't train this way.
    """
    name, options = _parsed(config.optimizer)
    factory = _factory(name)
    _check_options(name, factory, options)
    try:
        found = factory(schedule(config), **(_defaults(factory) | options))
        jax.eval_shape(functools.partial(_try, found))
    except Exception as error:  # whatever optax makes of an option's value
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{_FIELD} {config.optimizer!r}: optax's {name} can't train this way ({reason[:200]}); "
            "correct its options, or choose another"
        ) from None
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, found)


def state_shardings(transformation: optax.GradientTransformation, params):
    """Where an optimiser's state lives: what has a parameter's shape beside that parameter, the rest everywhere.

    Goes by the parameters' paths, with which those of their moments end, so that it holds for every optimiser of optax:
    adafactor's rows and columns are small, and of what muon trains AdamW has nothing.

    Args:
      transformation: made by ``optimizer``.
      params: the parameters, placed.

    Returns:
      A tree of shardings like ``transformation.init(params)``.
    """
    placed = dict(jax.tree_util.tree_leaves_with_path(params))
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())

    def place(path, leaf):
        own = next((placed[path[start:]] for start in range(len(path)) if path[start:] in placed), None)
        return own.sharding if own is not None and own.shape == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(transformation.init, params))


def _parsed(text: str) -> tuple[str, dict]:
    """Name and options of "name" or "name(option=literal, ...)"; nothing is ever evaluated.

    Raises:
      InputError: it is written otherwise.
    """
    refused = InputError(
        f"{_FIELD} {text!r}: write a name of optax, or a name with options by name, such as "
        "'adamw(b2=0.95, weight_decay=0.01)'"
    )
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise refused from None
    keywords = []
    if isinstance(node, ast.Call):
        names = [keyword.arg for keyword in node.keywords]
        if node.args or None in names or len(set(names)) < len(names):
            raise refused
        node, keywords = node.func, node.keywords
    if not isinstance(node, ast.Name | ast.Attribute):
        raise refused
    options = {}
    for keyword in keywords:
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise InputError(
                f"{_FIELD} {text!r}: option {keyword.arg} must be a plain value, such as 0.9, True, None or 'bfloat16'"
            ) from None
    return ast.unparse(node), options


@functools.cache
def _choices() -> dict[str, Callable]:
    """Every optimiser by its name, those of optax itself first: functions whose first argument is the learning rate."""
    found = {}
    for before, house in _HOUSES.items():
        for name, made_by in sorted(vars(house).items()):
            if not isinstance(made_by, types.FunctionType | functools.partial):
                continue
            first = next(iter(inspect.signature(made_by).parameters), "")
            if first == "learning_rate" and not name.startswith(("_", "scale_by_")) and name not in _UNFIT:
                found[before + name] = made_by
    return found


def _factory(name: str) -> Callable:
    choices = _choices()
    if name not in choices:
        raise InputError(
            f"{_FIELD} {name!r}: optax has no such optimiser that a schedule and gradients are enough for; "
            f"choose from {', '.join(choices)}"
        )
    return choices[name]


def _check_options(name: str, factory: Callable, options: Mapping) -> None:
    allowed = [option for option in inspect.signature(factory).parameters if option != "learning_rate"]
    for option in options:
        if option not in allowed:
            raise InputError(
                f"{_FIELD}: {name} has no option {option!r}; it has {', '.join(allowed) or 'none'}"
                + (" (the rate is config.finetune.learning_rate)" if option == "learning_rate" else "")
            )


def _defaults(factory: Callable) -> dict:
    """What is not as optax has it: no weight decay unless it is asked for, as in the reference study."""
    options = inspect.signature(factory).parameters
    found = {"weight_decay": 0.0} if "weight_decay" in options else {}
    if "muon_weight_dimension_numbers" in options:
        found["muon_weight_dimension_numbers"] = _matrices
    return found


def _matrices(params):
    """Which axes of each parameter make matrices, for muon; None for what its AdamW trains.

    Those of the blocks, [layer, inputs, outputs]; an embedding [V, D] is a table, norms and biases are vectors.
    """
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, params)


def _try(found: optax.GradientTransformation):
    """A step with nothing but gradients, as training takes it."""
    params = {"matrix": jnp.ones((4, 8)), "stack": jnp.ones((2, 4, 8))}
    return found.update(params, found.init(params), params)
