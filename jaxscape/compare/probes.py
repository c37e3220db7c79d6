"""Linear probes: how well a label can be read off the representations of each layer by a linear classifier."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MEMORY = 10  # pairs kept by L-BFGS; more of them buys few iterations on representations of language models
_TRIALS = 20  # trial steps of one line search; one or two are the rule
_SLOPE_LEFT = 0.2  # share of the slope that a line search may leave
_INTERCEPT_SHARE = 0.2  # of the intercept's feature in the norm of the others


class Probe(NamedTuple):
    """Cross-validated linear probes of L layers, F folds, N points and C classes.

    Without the leading [L] when one layer was given.

    accuracy: [L] share of the points whose class is predicted by the probe that was fitted without them.
    accuracy_error: [L] standard error of the mean of the folds' accuracies, as if folds were independent. They share
        training points, so it is a rule of thumb (Y. Bengio, Y. Grandvalet, J. Mach. Learn. Res. 5, 1089 (2004)).
    fold_accuracy: [L, F] share of each held-out fold.
    predictions: [L, N] int32, held-out predictions, as positions in the sorted distinct labels; ties: the lowest.
    log_probabilities: [L, N, C] held-out log probabilities of the classes; -inf where the fold's training points
        have none of the class.
    folds: [N] int32, the fold each point is held out in; the same for all layers.
    iterations: [L, F] int32, L-BFGS iterations.
    converged: [L, F] bool, whether the gradient's norm fell below the tolerance, or steps below the rounding of the
        weights, before `max_iter`.
    """

    accuracy: jax.Array
    accuracy_error: jax.Array
    fold_accuracy: jax.Array
    predictions: jax.Array
    log_probabilities: jax.Array
    folds: jax.Array
    iterations: jax.Array
    converged: jax.Array


def linear_probe(
    x,
    labels,
    *,
    l2: float = 1.0,
    folds: int = 5,
    seed: int = 0,
    standardize: bool = True,
    tolerance: float | None = None,
    max_iter: int = 2000,
    layers_at_once: int = 1,
) -> Probe:
    """Classify points by multinomial logistic regression on each layer, in stratified cross-validation.

    A linear classifier probe (G. Alain, Y. Bengio, "Understanding intermediate layers using linear classifier probes",
    arXiv 1610.01644) of every layer and fold in one compiled program. Each minimises
    sum_i -log p(label_i | x_i) + l2/2 |W|^2 over its training points, p = softmax(W x + b), with b not penalised:
    scikit-learn's LogisticRegression(C=1/l2). As there, two classes have one weight vector between them.

    Features are centred, and with `standardize` scaled to unit variance, by the training points of each fold; a feature
    whose values there are all equal is left out. Neither an offset nor the scale costs digits that the features have:
    `standardize` takes any scale of floats. Without it the scale counts, as the penalty doesn't follow it: features
    that hardly differ beside 1 leave the intercepts only, and those that differ by 2^48 or more (float32; 2^384 in
    float64) would lose the penalty to underflow and are refused.

    Minimised by L-BFGS (D. C. Liu, J. Nocedal, Math. Program. 45, 503 (1989)) to the single optimum of this convex
    function; see `_minimize`. With more than twice as many features as points, it is first rewritten, exactly, in the
    span of the points, where the optimum lies.

    Layers are taken in turn and folds together. All folds share one copy of the layer's points, so that beside x memory
    grows with N D + F (2 memory D C + N C); in the span of the points, with F (D N + N^2) instead of N D.

    Args:
        x: representations [L, N, D] of the same N points in L layers, or [N, D]. Integers and half-precision floats
            become float32. Traceable by jit.
        labels: labels [N] of any type that sorts; C distinct ones. They can't be traced.
        l2: strength of the penalty, positive. Traced: no recompilation for another one.
        folds: how many, static; see `stratified_folds`. A class with fewer members than folds is tested in some folds
            only, and one with a single member is always misclassified: its probe never met it.
        seed: of the folds.
        standardize: whether features are scaled, static.
        tolerance: the norm of the gradient, relative to that at W = b = 0, at which a fit has converged; by default
            2e-7 in float32, about what its rounding allows, and 1e-11 in float64.
        max_iter: most iterations of a fit.
        layers_at_once: layers solved side by side, static; more may fill an accelerator better, and needs more memory.

    Returns:
        Probe.

    Raises:
        ValueError: x that isn't [L, N, D] or [N, D], has no layers or features, or isn't finite (not checked while it
            is traced); without `standardize`, features that differ between points by 2^48 or more (2^384 in float64;
            not checked while x is traced, and hardly penalised there); labels of another length than N or of fewer
            than two classes; folds < 2 or more than points; l2 or tolerance not positive and finite; max_iter < 1 or
            layers_at_once < 1.
    """
    layers = _as_layers(x)
    codes = _codes(labels)
    if codes.shape[0] != layers.shape[1]:
        raise ValueError(f"labels must have one label for each of the {layers.shape[1]} points, got {codes.shape[0]}")
    classes = int(codes.max()) + 1
    if classes < 2:
        raise ValueError(f"labels must have at least 2 classes, got {classes}: {np.asarray(labels).ravel()[0]!r}")
    if not standardize:
        _check_differences(layers)
    fold_of = stratified_folds(labels, folds, seed)
    tolerance = (2e-7 if layers.dtype == jnp.float32 else 1e-11) if tolerance is None else tolerance
    for name, value in {"l2": l2, "tolerance": tolerance}.items():
        if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {name}={value}")
    for name, value in {"max_iter": max_iter, "layers_at_once": layers_at_once}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    found = _probe_layers(layers, codes, fold_of, l2, tolerance, max_iter, classes, folds, standardize, layers_at_once)
    if jnp.ndim(x) == 2:
        found = jax.tree.map(lambda a: a[0], found._replace(folds=found.folds[None]))
    return found


def stratified_folds(labels, folds: int, seed: int = 0) -> np.ndarray:
    """Deal the points to `folds` folds at random, such that every class is spread evenly.

    The points, shuffled and sorted by class, are dealt in turn: the sizes of two folds differ by one at most, and so
    do their counts of a class. A class with fewer members than folds is absent from some.

    Args:
        labels: labels [N].
        folds: at least 2, at most N.
        seed: of NumPy's default generator.

    Returns:
        int32 [N], the fold of each point, from 0.

    Raises:
        ValueError: folds out of range.
    """
    codes = _codes(labels)
    if not 2 <= folds <= len(codes):
        raise ValueError(f"folds must lie between 2 and the {len(codes)} points, got folds={folds}")
    shuffled = np.random.default_rng(seed).permutation(len(codes))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    fold_of = np.empty(len(codes), np.int32)
    fold_of[by_class] = np.arange(len(codes)) % folds
    return fold_of


def _codes(labels) -> np.ndarray:
    """Return labels [N] as positions int32 in their sorted distinct values; on the host, even while x is traced."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.shape[0] == 0:
        raise ValueError(f"labels must have shape [points] with at least one point, got {labels.shape}")
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def _as_layers(x) -> jax.Array:
    """Return `x` as finite float32 or float64 [L, N, D]."""
    layers = jnp.asarray(x)
    if layers.ndim not in (2, 3) or 0 in layers.shape:
        raise ValueError(f"x must have shape [layers, points, features] or [points, features], got {layers.shape}")
    if jnp.issubdtype(layers.dtype, jnp.complexfloating):
        raise ValueError(f"x must be real, got dtype {layers.dtype}")
    if layers.dtype not in (jnp.float32, jnp.float64):
        layers = layers.astype(jnp.float32)
    finite = _all_finite(layers)  # traced also where a concrete x is met while something else is traced
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        where = tuple(np.argwhere(~np.isfinite(np.asarray(layers)))[0].tolist())
        raise ValueError(f"x must be finite, got x[{', '.join(map(str, where))}] = {layers[where]}")
    return layers if layers.ndim == 3 else layers[None]


@jax.jit
def _all_finite(x):
    return jnp.all(jnp.isfinite(x))


def _check_differences(layers) -> None:
    limit = 2.0 ** (3 * jnp.finfo(layers.dtype).maxexp // 8)
    largest = _largest_difference(layers)
    if not isinstance(largest, jax.core.Tracer) and not float(largest) < limit:
        raise ValueError(
            f"x must differ between points by less than {limit:.3g} with standardize=False, got {float(largest):.3g}"
        )


@jax.jit
def _largest_difference(layers):
    return jnp.max(jnp.abs(layers - jax.vmap(_some_value)(layers)[:, None]))


@partial(jax.jit, static_argnames=("classes", "folds", "standardize", "layers_at_once"))
def _probe_layers(
    layers, codes, fold_of, l2, tolerance, max_iter, classes: int, folds: int, standardize: bool, layers_at_once: int
) -> Probe:
    dtype = layers.dtype
    held_out = fold_of == jnp.arange(folds)[:, None]  # [F, N]
    task = _task(codes, ~held_out, jnp.asarray(l2, dtype), classes, dtype)

    def probe(x):
        design = _design(x, task.train, standardize)
        scaled = task._replace(l2=task.l2 / design.unit**2)
        params, iterations, converged = _minimize(design, scaled, jnp.asarray(tolerance, dtype), max_iter)
        logits = _logits(design, params) + task.absent[:, None]
        own = jnp.take_along_axis(logits, fold_of[None, :, None], axis=0)[0]  # [N, C]
        log_probabilities = jax.nn.log_softmax(own)
        predictions = jnp.argmax(own, axis=1).astype(jnp.int32)
        right = predictions == codes
        by_fold = jnp.sum(held_out & right, axis=1) / jnp.sum(held_out, axis=1).astype(dtype)
        error = jnp.std(by_fold, ddof=1) / jnp.sqrt(jnp.asarray(folds, dtype))
        accuracy = jnp.sum(right) / jnp.asarray(codes.shape[0], dtype)
        return accuracy, error, by_fold, predictions, log_probabilities, iterations, converged

    batch = None if layers_at_once == 1 else layers_at_once
    *scores, iterations, converged = lax.map(probe, layers, batch_size=batch)
    return Probe(*scores, fold_of, iterations, converged)


class _Task(NamedTuple):
    """What is to be fitted. train: [F, N] 1 for training points. target: [N, C] one-hot. absent: [F, C] -inf for
    classes that training points lack, so that they have no probability, else 0. l2: [F] penalty of each fold."""

    train: jax.Array
    target: jax.Array
    absent: jax.Array
    l2: jax.Array


def _task(codes, train, l2, classes: int, dtype) -> _Task:
    target = jax.nn.one_hot(codes, classes, dtype=dtype)
    present = jnp.einsum("fn,nc->fc", train.astype(dtype), target) > 0
    # One vector w for two classes is W = (-w/2, w/2), with half of its |w|^2.
    penalty = jnp.where(jnp.sum(present, axis=1) == 2, 2 * l2, l2)
    return _Task(train.astype(dtype), target, jnp.where(present, 0, -jnp.inf).astype(dtype), penalty)


class _Design(NamedTuple):
    """Features of each fold, not formed: (points - center) / scale; points [N, D], or [F, N, D] if folds have their
    own; center, scale: [F, D]. constant: [F] the feature that multiplies the intercept. unit: scalar, what one is in x,
    if features keep their scale: the weights are as many times larger than the user's."""

    points: jax.Array
    center: jax.Array
    scale: jax.Array
    constant: jax.Array
    unit: jax.Array


def _design(x, train, standardize: bool) -> _Design:
    """Return the features of `x` [N, D], in the span of the points where that has far fewer dimensions."""
    n, dimension = x.shape
    unit = jnp.ones((), x.dtype)
    # Over all points first: nothing but rounding depends on it, as each fold's own moments then undo it. Differences
    # of near floats are exact, and a power of two changes no digit.
    if standardize:
        x = x / _power_of_two(jnp.max(jnp.abs(x), axis=0))
        x = x - _some_value(x)
        x = x / _power_of_two(jnp.max(jnp.abs(x), axis=0))
    else:
        x = x - _some_value(x)
        # Not below 1: weights of tiny features would be bound by a huge penalty, next to intercepts with none.
        unit = jnp.maximum(_power_of_two(jnp.max(jnp.abs(x))), 1)
        x = x / unit
    center, deviation, varies = _moments(x, train)
    # Infinite where all training points agree: that feature is left out.
    scale = jnp.where(varies, deviation if standardize else 1, jnp.inf)
    # The intercept's feature is as large as a few percent of the others together: that of 1, next to hundreds, leaves
    # the problem ill-conditioned and takes up to five times the iterations. The optimum is the same: no penalty on it.
    constant = _INTERCEPT_SHARE * jnp.sqrt(jnp.sum((deviation / scale) ** 2, axis=1))
    constant = jnp.where(constant > 0, constant, 1)
    if dimension < 2 * n:
        return _Design(x, center, scale, constant, unit)

    def coordinates(moments):
        # Z^T = Q R, so row i of R^T has z_i's coordinates in the orthonormal basis Q of the span, and |W| is the same.
        return jnp.linalg.qr(((x - moments[0]) / moments[1]).T, mode="r").T

    points = lax.map(coordinates, (center, scale))
    return _Design(points, jnp.zeros(points.shape[::2], x.dtype), jnp.ones(points.shape[::2], x.dtype), constant, unit)


def _moments(x, train):
    """Return the mean, the standard deviation and whether it varies of each feature, [F, D], over training points."""
    size = jnp.sum(train, axis=1)
    center = _matmul("fn,nd->fd", train, x) / size[:, None]

    def around(fold):
        inside, center, size = fold
        inside = inside[:, None] > 0
        low = jnp.min(jnp.where(inside, x, jnp.inf), axis=0)
        high = jnp.max(jnp.where(inside, x, -jnp.inf), axis=0)
        # In units of the largest difference: next to an outlier that is held out, the squares of others may underflow.
        peak = _nonzero(jnp.maximum(high - center, center - low))
        squares = jnp.where(inside, ((x - center) / peak) ** 2, 0)
        deviation = peak * jnp.sqrt(jnp.sum(squares, axis=0) / size)
        return deviation, (high > low) & (deviation > 0)

    return center, *lax.map(around, (train, center, size))  # fold by fold: F copies of the points would be many


def _some_value(x):
    """Return of each feature of `x` [N, D] a value it has, [D], which isn't that of a lone outlier: the middle one of
    three points'."""
    return jnp.sort(x[np.array([0, len(x) // 2, len(x) - 1])], axis=0)[1]


def _power_of_two(sizes):
    """Return powers of two by which to divide, such that `sizes` become about one, or at least have squares."""
    most = jnp.finfo(sizes.dtype).maxexp - 28
    return jnp.ldexp(jnp.ones_like(sizes), jnp.clip(jnp.frexp(sizes)[1], -most, most))


def _nonzero(values):
    return jnp.where(values > 0, values, 1)


def _matmul(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, precision=lax.Precision.HIGHEST)


def _logits(design: _Design, params):
    """Return logits [F, N, C] of parameters [F, D + 1, C]: weights, and last the intercepts over `constant`."""
    weights = params[:, :-1] / design.scale[..., None]
    points = "nd" if design.points.ndim == 2 else "fnd"
    shift = params[:, -1] * design.constant[:, None] - _matmul("fd,fdc->fc", design.center, weights)
    return _matmul(f"{points},fdc->fnc", design.points, weights) + shift[:, None]


def _gradient(design: _Design, task: _Task, params, logits):
    """Return the gradient [F, D + 1, C] from the parameters and their logits [F, N, C]."""
    residuals = (_probabilities(logits, task) - task.target) * task.train[..., None]
    total = jnp.sum(residuals, axis=1)
    points = "nd" if design.points.ndim == 2 else "fnd"
    slopes = _matmul(f"{points},fnc->fdc", design.points, residuals) - design.center[..., None] * total[:, None]
    slopes = slopes / design.scale[..., None] + task.l2[:, None, None] * params[:, :-1]
    return jnp.concatenate([slopes, (total * design.constant[:, None])[:, None]], axis=1)


def _probabilities(logits, task: _Task):
    return jax.nn.softmax(logits + task.absent[:, None])


def _dot(a, b):
    """Return the inner products [F] of parameters [F, D + 1, C]."""
    return jnp.sum(a * b, axis=(-2, -1))


class _State(NamedTuple):
    """L-BFGS after `step` iterations. params, gradient: [F, D + 1, C]. logits: [F, N, C]. moves, turns: the last
    changes [M, F, D + 1, C] of the parameters and of the gradient, in a ring; curvature: [M, F] one over their inner
    products, 0 if there is none. active: [F]. iterations: [F]."""

    params: jax.Array
    logits: jax.Array
    gradient: jax.Array
    moves: jax.Array
    turns: jax.Array
    curvature: jax.Array
    active: jax.Array
    iterations: jax.Array
    step: jax.Array


def _minimize(design: _Design, task: _Task, tolerance, max_iter):
    """Minimise the penalised loss of all folds by L-BFGS with a line search close to exact.

    Logits are linear in the parameters, so those along a direction are known from two matrix products' results: a
    line search costs N C per trial, not N D C, and an iteration two products in all.

    Returns:
        parameters [F, D + 1, C], iterations [F], converged [F].
    """
    folds, n, classes = task.train.shape + task.target.shape[1:]
    dtype = design.points.dtype
    params = jnp.zeros((folds, design.center.shape[1] + 1, classes), dtype)
    logits = jnp.zeros((folds, n, classes), dtype)
    gradient = _gradient(design, task, params, logits)
    first = jnp.sqrt(_dot(gradient, gradient))
    pairs = jnp.zeros((_MEMORY, *params.shape), dtype)
    start = _State(
        params, logits, gradient, pairs, pairs, jnp.zeros((_MEMORY, folds), dtype), first > 0,
        jnp.zeros(folds, jnp.int32), jnp.int32(0),
    )  # fmt: skip
    end = lax.while_loop(
        lambda s: (s.step < max_iter) & jnp.any(s.active),
        lambda s: _iterate(s, design, task, tolerance * first),
        start,
    )
    return end.params, end.iterations, ~end.active


def _iterate(s: _State, design: _Design, task: _Task, goal) -> _State:
    # A fold that is done stands still: its direction is zero.
    direction = jnp.where(s.active[:, None, None], -_inverse_hessian_times(s, s.gradient), 0)
    change = _logits(design, direction)
    length = _line_search(s, direction, change, task)[:, None, None]
    move = length * direction
    params, logits = s.params + move, s.logits + length * change
    gradient = _gradient(design, task, params, logits)
    turn = gradient - s.gradient
    bend = _dot(move, turn)
    slot = s.step % _MEMORY
    norm = jnp.sqrt(_dot(gradient, gradient))
    eps = jnp.finfo(params.dtype).eps
    moved = jnp.max(jnp.abs(move), axis=(1, 2)) > eps * jnp.max(jnp.abs(params), axis=(1, 2))
    return _State(
        params,
        logits,
        gradient,
        s.moves.at[slot].set(move),
        s.turns.at[slot].set(turn),
        s.curvature.at[slot].set(jnp.where(bend > 0, 1 / jnp.where(bend > 0, bend, 1), 0)),
        s.active & (norm > goal) & moved,
        s.iterations + s.active,
        s.step + 1,
    )


def _inverse_hessian_times(s: _State, vector):
    """Multiply by L-BFGS's inverse Hessian: the two-loop recursion of J. Nocedal, Math. Comput. 35, 773 (1980)."""
    # Newest first; slots not yet filled change nothing. Loops rather than unrolled, which compiles faster.

    def slot(i):
        return (s.step - 1 - i) % _MEMORY

    def forth(i, carry):
        vector, shares = carry
        share = s.curvature[slot(i)] * _dot(s.moves[slot(i)], vector)
        return vector - share[:, None, None] * s.turns[slot(i)], shares.at[i].set(share)

    def back(j, vector):
        i = _MEMORY - 1 - j
        rest = shares[i] - s.curvature[slot(i)] * _dot(s.turns[slot(i)], vector)
        return vector + rest[:, None, None] * s.moves[slot(i)]

    vector, shares = lax.fori_loop(0, _MEMORY, forth, (vector, jnp.zeros_like(s.curvature)))
    newest = s.turns[slot(0)]
    vector = vector / _nonzero(s.curvature[slot(0)] * _dot(newest, newest))[:, None, None]
    return lax.fori_loop(0, _MEMORY, back, vector)


def _line_search(s: _State, direction, change, task: _Task):
    """Return the step lengths [F] at which the loss, convex along `direction`, is flat: safeguarded Newton's method.

    Only slopes are compared: near the optimum the loss itself no longer changes within rounding.
    """
    own = jnp.sum(task.target * change, axis=-1)
    bend = task.l2 * _dot(direction[:, :-1], direction[:, :-1])
    pull = task.l2 * _dot(s.params[:, :-1], direction[:, :-1])

    def derivatives(length):
        p = _probabilities(s.logits + length[:, None, None] * change, task)
        mean = jnp.sum(p * change, axis=-1)
        variance = jnp.sum(p * (change - mean[..., None]) ** 2, axis=-1)
        slope = jnp.sum(task.train * (mean - own), axis=1) + pull + length * bend
        return slope, jnp.sum(task.train * variance, axis=1) + bend

    def unfinished(carry):
        *_, slope, _, trial = carry
        return (trial < _TRIALS) & jnp.any(jnp.abs(slope) > allowed)

    def improve(carry):
        length, low, high, slope, curvature, trial = carry
        low, high = jnp.where(slope < 0, length, low), jnp.where(slope < 0, high, length)
        newton = length - slope / curvature
        halfway = jnp.where(jnp.isinf(high), 2 * length + 1, (low + high) / 2)
        new = jnp.where((newton > low) & (newton < high), newton, halfway)
        length = jnp.where(jnp.abs(slope) > allowed, new, length)
        return length, low, high, *derivatives(length), trial + 1

    zero = jnp.zeros_like(bend)
    slope, curvature = derivatives(zero)
    allowed = _SLOPE_LEFT * jnp.abs(slope)
    return lax.while_loop(unfinished, improve, (zero, zero, zero + jnp.inf, slope, curvature, 0))[0]
