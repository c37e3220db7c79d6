"""Rotary frequencies, plain or stretched for contexts longer than those of the first training.

The arithmetic is that of transformers' ``modeling_rope_utils`` (float32, in its order), so that the angles at far
positions agree too. R: features of a head that turn.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxscape.errors import InputError
from jaxscape.models.architecture import Rotary

_ORIGINAL = "original_max_position_embeddings"


class _Scaling(NamedTuple):
    """What a function of ``_TYPES`` is given.

    Attributes:
      powers: float32 [R/2]; theta ** (2i / R), the wavelengths over 2 pi.
      theta: base of the powers.
      features: R.
      parameters: the fields of the scaling.
      max_positions: longest sequence the checkpoint was made for, in tokens.
      where: how to call the parameters in errors.
    """

    powers: np.ndarray
    theta: float
    features: int
    parameters: Mapping[str, Any]
    max_positions: int
    where: str

    def number(self, name: str, default: float | None = None) -> float:
        """A positive parameter; null counts as missing.

        Raises:
          InputError: it is missing and has no default, or is not a positive number.
        """
        value = self.parameters.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: {name!r} is missing; check the checkpoint's configuration")
        return positive(value, f"{self.where}: {name}")

    def original(self) -> float:
        """Tokens the checkpoint was first trained on."""
        tokens = self.number(_ORIGINAL, self.max_positions)
        if tokens < 2:
            raise InputError(f"{self.where}: {_ORIGINAL} = {tokens} is no length; check the checkpoint's configuration")
        return tokens

    def factors(self, name: str) -> np.ndarray:
        """A list of R/2 positive factors, float32."""
        values, wanted = self.parameters.get(name), len(self.powers)
        if not isinstance(values, list | tuple) or len(values) != wanted:
            raise InputError(f"{self.where}: {name} is not a list of {wanted} numbers, one for each pair of features "
                             "that turn; check the checkpoint's configuration")
        return np.array([positive(value, f"{self.where}: {name}") for value in values], np.float32)


def positive(value: Any, what: str) -> float:
    """The value, if it is a positive number.

    Raises:
      InputError: it is not; ``what`` names it.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise InputError(f"{what} = {value!r} is not a positive number; check the checkpoint's configuration")
    return value


def _default(s: _Scaling) -> Rotary:
    return _rotary(1 / s.powers)


def _linear(s: _Scaling) -> Rotary:
    """All positions are divided by a factor (position interpolation, Chen et al. 2023)."""
    return _rotary(1 / s.powers / np.float32(s.number("factor")))


def _llama3(s: _Scaling) -> Rotary:
    """Long wavelengths are divided by a factor, short ones left alone, those between interpolated (Llama 3.1)."""
    factor, low, high, original = (
        s.number("factor"), s.number("low_freq_factor"), s.number("high_freq_factor"), s.original()
    )  # fmt: skip
    if high <= low:
        raise InputError(f"{s.where}: high_freq_factor {high} is not above low_freq_factor {low}; "
                         "check the checkpoint's configuration")
    plain = 1 / s.powers
    wavelengths = np.float32(2 * math.pi) / plain
    long, short = wavelengths > np.float32(original / low), wavelengths < np.float32(original / high)
    share = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - share) * plain / np.float32(factor) + share * plain
    return _rotary(np.where(long, plain / np.float32(factor), np.where(short, plain, between)))


def _yarn(s: _Scaling) -> Rotary:
    """Features that turn often are left alone, those that turn seldom interpolated, with a ramp (Peng et al. 2023)."""
    original = s.original()
    factor = s.number("factor", s.max_positions / original)

    def turning(rotations: float) -> float:
        """Which feature turns this many times over the first training's length."""
        return s.features * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(s.theta))

    low, high = turning(s.number("beta_fast", 32)), turning(s.number("beta_slow", 1))
    truncate = s.parameters.get("truncate", True)
    if truncate not in (True, False):
        raise InputError(f"{s.where}: truncate = {truncate!r} is neither true nor false")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, s.features - 1)
    if low == high:
        high += 0.001  # a step, but no division by zero
    places = np.arange(s.features // 2, dtype=np.float32)
    kept = 1 - np.clip((places - np.float32(low)) / np.float32(high - low), 0, 1)
    stretched = 1 / (np.float32(factor) * s.powers)
    return _rotary(stretched * (1 - kept) + 1 / s.powers * kept, _yarn_magnitude(s, factor))


def _yarn_magnitude(s: _Scaling, factor: float) -> float:
    """``attention_factor``, or 0.1 log(factor) + 1, or a ratio of two such where both scales are given."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if s.parameters.get("attention_factor") is not None:
        return s.number("attention_factor")
    if s.parameters.get("mscale") and s.parameters.get("mscale_all_dim"):
        return magnitude(s.number("mscale")) / magnitude(s.number("mscale_all_dim"))
    return magnitude(1)


def _longrope(s: _Scaling) -> Rotary:
    """A factor for each frequency; other ones beyond the length of the first training (Ding et al. 2024)."""
    original = s.original()
    factor = s.number("factor", s.max_positions / original)
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rotary(
        _angles(1 / (s.factors("short_factor") * s.powers)),
        s.number("attention_factor", magnitude),
        _angles(1 / (s.factors("long_factor") * s.powers)),
        int(original),
    )


class _Type(NamedTuple):
    read: Callable[[_Scaling], Rotary]
    parameters: frozenset[str]


_TYPES = {
    "default": _Type(_default, frozenset()),
    "linear": _Type(_linear, frozenset({"factor"})),
    "llama3": _Type(_llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor"})),
    "yarn": _Type(_yarn, frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
                                    "truncate"})),
    "longrope": _Type(_longrope, frozenset({"factor", "attention_factor", "short_factor", "long_factor"})),
}  # fmt: skip


def frequencies(
    rope_type: str,
    theta: float,
    features: int,
    parameters: Mapping[str, Any],
    max_positions: int,
    where: str = "rope_parameters",
) -> Rotary:
    """Rotary embedding of a scaling.

    Args:
      rope_type: "default", "linear", "llama3", "yarn" or "longrope".
      theta: base of the frequencies.
      features: R, how many of a head's features turn; an odd number is rounded up to whole pairs.
      parameters: the scaling's own fields, by transformers' names; ``original_max_position_embeddings`` is taken as
        ``max_positions`` where it is missing, and has no effect on "default" and "linear".
      max_positions: longest sequence the checkpoint was made for, in tokens.
      where: how to call the parameters in errors.

    Raises:
      InputError: the type or a parameter is not implemented, or a parameter is missing or no positive number.
    """
    if rope_type not in _TYPES:
        raise InputError(f"{where}: rope_type {rope_type!r} is not implemented; implemented: {', '.join(_TYPES)}")
    unknown = sorted(set(parameters) - _TYPES[rope_type].parameters - {_ORIGINAL})
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)} of rope_type {rope_type!r} is not implemented; "
                         "remove it if it changes nothing")
    if positive(theta, f"{where}: rope_theta") == 1:
        raise InputError(f"{where}: rope_theta = 1 turns all features alike; check the checkpoint's configuration")
    exponents = np.arange(0, features, 2, dtype=np.float32) / np.float32(features)
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)  # rounded once, as PyTorch's are
    return _TYPES[rope_type].read(_Scaling(powers, theta, features, parameters, max_positions, where))


def _angles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _rotary(values: np.ndarray, magnitude: float = 1.0) -> Rotary:
    return Rotary(_angles(values), magnitude)
