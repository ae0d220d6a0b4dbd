"""Rotary position embedding: frequencies for every scaling rule, and the rotation itself.

A pair of head dimensions (a, b) at position p is turned by the angle p * inv_freq:

    a' = a cos - b sin,   b' = a sin + b cos        (RoFormer, arXiv:2104.09864, eq. 15)

so that the product of a rotated query and a rotated key depends on the distance of their positions alone.
The pairs are (i, i + R/2) in the "half" layout (Hugging Face) and (2i, 2i + 1) in the "interleaved" layout
(Meta), R being the number of rotated dimensions; `to_half` and `to_interleaved` convert between the two.

Design fact: frequencies are NumPy numbers computed once, outside of jit, with the float32 operations of
transformers in the same order; everything about them is hashable data, so they are constants of the compiled
program, and there is no cache to go stale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["half", "interleaved"]
# Entries of Hugging Face's configurations that are used.
_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicNtk:
    """Dynamic NTK scaling: theta grows with the length L of the sequence once it exceeds `max_position`.

    theta' = theta * (factor * L / max_position - (factor - 1)) ** (R / (R - 2)). Keys that were rotated at a
    shorter length are not the keys of a longer one, so the length is an argument of `frequencies`.
    """

    factor: float
    max_position: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071, section 3.2): interpolate slow dimensions, keep fast ones, ramp between.

    A dimension that turns more than `beta_fast` times within `original_length` is kept, one that turns less
    than `beta_slow` times is divided by `factor`. cos and sin are multiplied by `attention_factor`; None
    means 0.1 ln(factor) + 1, or the quotient m(mscale) / m(mscale_all_dim) with m(x) = 0.1 x ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's rule: wavelengths above original_length / low_freq_factor are stretched by `factor`, those
    below original_length / high_freq_factor are kept, and between them the frequency is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


Scaling = Linear | DynamicNtk | Yarn | Llama3


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How queries and keys of `head_dim` dimensions are rotated.

    Args:
      head_dim: dimensions of one head, H.
      theta: base of the frequencies, theta ** (-2i / R).
      rotary_dim: dimensions that are rotated, R, the first of each head; None means all.
      scaling: one of the rules above, or None.
      layout: which dimensions form a pair.

    Raises:
      ValueError: where rotary_dim is odd, not positive or larger than head_dim, or the layout is unknown.

    >>> RopeConfig(64, theta=500000.0).rotary_dim
    64
    """

    head_dim: int
    theta: float = 10000.0
    rotary_dim: int | None = None
    scaling: Scaling | None = None
    layout: Layout = "half"

    def __post_init__(self):
        if self.rotary_dim is None:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even, positive and at most head_dim={self.head_dim}"
            )
        _check_layout(self.layout)


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """What a rotation needs, as hashable data: float32 radians per position for each pair, the factor on cos
    and sin, and the layout of the pairs. `2 * len(inv_freq)` dimensions of a head are rotated.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    layout: Layout = "half"

    def __post_init__(self):
        _check_layout(self.layout)


def frequencies(config: RopeConfig, length: int | None = None) -> Frequencies:
    """The frequency of each pair: theta ** (-2i / R), then the scaling rule.

    Args:
      config: theta, dimensions and scaling rule.
      length: number of positions in use, which only `DynamicNtk` depends on; None means its `max_position`.

    Returns: `Frequencies` with R / 2 float32 values, equal to transformers' but for 1 ulp where its power
    function is not correctly rounded (2 ulps after the reciprocal).
    Raises: TypeError for a scaling rule that is not one of this module's; ValueError where its numbers give no
    finite frequency (YaRN with theta 1, dynamic NTK with 2 dimensions, ...).

    >>> frequencies(RopeConfig(4, theta=100.0)).inv_freq == (1.0, float(np.float32(0.1)))
    True
    """
    try:
        with np.errstate(all="ignore"):
            inv_freq, attention_scaling = _scaled(config, length)
    except ArithmeticError:
        inv_freq = np.array([np.nan])
    if not np.isfinite(inv_freq).all():
        raise ValueError(f"{config} gives frequencies that are not finite")
    return Frequencies(tuple(float(x) for x in inv_freq), attention_scaling, config.layout)


def _scaled(config: RopeConfig, length: int | None) -> tuple[np.ndarray, float]:
    """Frequencies and the factor on cos and sin."""
    scaling = config.scaling
    if scaling is None:
        return _inverse_powers(config.theta, config.rotary_dim), 1.0
    if isinstance(scaling, Linear):
        return _inverse_powers(config.theta, config.rotary_dim) / np.float32(scaling.factor), 1.0
    if isinstance(scaling, DynamicNtk):
        return _inverse_powers(_dynamic_theta(config, scaling, length), config.rotary_dim), 1.0
    if isinstance(scaling, Yarn):
        return _yarn(config, scaling), yarn_attention_factor(scaling)
    if isinstance(scaling, Llama3):
        return _llama3(_inverse_powers(config.theta, config.rotary_dim), scaling), 1.0
    raise TypeError(f"scaling={scaling!r} must be None or one of Linear, DynamicNtk, Yarn, Llama3")


def tables(freqs: Frequencies, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * inv_freq, times the attention scaling.

    Args:
      freqs: R / 2 frequencies.
      positions: [..., T] integers, any values in any order (packed, offset, per batch element).

    Returns: (cos, sin), each float32 [..., T, R / 2].

    >>> cos, sin = tables(Frequencies((1.0,)), jnp.array([0])); float(cos[0, 0]), float(sin[0, 0])
    (1.0, 0.0)
    """
    angles = jnp.asarray(positions, jnp.float32)[..., None] * jnp.asarray(freqs.inv_freq, jnp.float32)
    return jnp.cos(angles) * freqs.attention_scaling, jnp.sin(angles) * freqs.attention_scaling


def apply(x: jax.Array, cos: jax.Array, sin: jax.Array, layout: Layout = "half") -> jax.Array:
    """Rotate the first R dimensions of every head, and pass the others through.

    Args:
      x: [..., T, N, H] queries or keys.
      cos, sin: [..., T, R / 2] from `tables`, R <= H.
      layout: "half" pairs (i, i + R/2), "interleaved" pairs (2i, 2i + 1).

    Returns: the shape and dtype of x; the arithmetic is float32 (float64 for float64), rounded once.
    Raises: ValueError where R exceeds H, or the layout is unknown.

    >>> cos, sin = tables(frequencies(RopeConfig(8)), jnp.arange(3))
    >>> apply(jnp.ones((3, 2, 8)), cos, sin).shape
    (3, 2, 8)
    """
    _check_layout(layout)
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        raise ValueError(f"cos rotates {2 * pairs} dimensions, but x has only H={x.shape[-1]}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    turned, kept = x[..., : 2 * pairs].astype(wide), x[..., 2 * pairs :]
    a, b = _split_pairs(turned, layout)
    cos, sin = (table[..., None, :].astype(wide) for table in (cos, sin))
    turned = _join_pairs(a * cos - b * sin, a * sin + b * cos, layout).astype(x.dtype)
    return jnp.concatenate([turned, kept], axis=-1)


def rotate(x: jax.Array, positions: jax.Array, freqs: Frequencies) -> jax.Array:
    """`apply` with the `tables` of these positions: x [..., T, N, H], positions [..., T] -> as x.

    >>> rotate(jnp.ones((1, 3, 2, 8)), jnp.arange(3), frequencies(RopeConfig(8))).shape
    (1, 3, 2, 8)
    """
    cos, sin = tables(freqs, positions)
    return apply(x, cos, sin, freqs.layout)


def to_half(x, rotary_dim: int | None = None, axis: int = -1):
    """Reorder interleaved pairs (2i, 2i + 1) to half-split pairs (i, i + R/2), along `axis` of length H.

    For activations the axis is the head dimension; for a projection's weight reshape its rows to [N, H, D]
    first.

    Args: x: a NumPy or JAX array. rotary_dim: R, the leading entries that are reordered; None means all.
    Returns: an array of the same kind, shape and dtype. Inverse: `to_interleaved`.

    >>> to_half(np.array([0, 1, 2, 3])).tolist()
    [0, 2, 1, 3]
    """
    R = x.shape[axis] if rotary_dim is None else rotary_dim
    return _reorder(x, np.arange(R).reshape(R // 2, 2).T.reshape(R), axis)


def to_interleaved(x, rotary_dim: int | None = None, axis: int = -1):
    """Reorder half-split pairs (i, i + R/2) to interleaved pairs (2i, 2i + 1): the inverse of `to_half`.

    >>> to_interleaved(np.array([0, 2, 1, 3])).tolist()
    [0, 1, 2, 3]
    """
    R = x.shape[axis] if rotary_dim is None else rotary_dim
    return _reorder(x, np.arange(R).reshape(2, R // 2).T.reshape(R), axis)


def from_hf(config: Mapping) -> RopeConfig:
    """The RoPE of a Hugging Face `config.json`, in either of its shapes.

    New: `rope_parameters = {"rope_type", "rope_theta", ...}`. Old: `rope_theta` beside
    `rope_scaling = {"type" or "rope_type", ...}` or null. `partial_rotary_factor` may stand in either place;
    transformers' Llama ignores it, so a caller that follows transformers drops it for that model.

    Args: config: the parsed JSON.
    Returns: a `RopeConfig` in the half-split layout.
    Raises: ValueError for an unknown rule, a rule that lacks a number or has none where it should, naming it, or
    one whose frequencies are not finite.

    >>> from_hf({"head_dim": 8, "rope_theta": 5e5, "rope_scaling": None}).theta
    500000.0
    """
    if config.get("rope_scaling") and config.get("rope_parameters"):
        raise ValueError("the config has both rope_parameters and rope_scaling; keep the one that is meant")
    rules = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rules, Mapping):
        raise ValueError(f"rope_parameters or rope_scaling must be an object, not {rules!r}")
    wrong = [
        f"{name}={place[name]!r}"
        for place in (config, rules)
        for name in _NUMBERS
        if not _is_number(place.get(name)) and not (place[name] == 0 and name.startswith("mscale"))
    ]
    if wrong:
        raise ValueError(f"these entries of the RoPE configuration must be positive numbers: {', '.join(wrong)}")
    kind = rules.get("rope_type", rules.get("type", "default"))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = _first(rules.get("rope_theta"), config.get("rope_theta"), 10000.0)
    part = _first(rules.get("partial_rotary_factor"), config.get("partial_rotary_factor"), 1.0)
    longest = config.get("max_position_embeddings")
    original = _first(
        config.get("original_max_position_embeddings"), rules.get("original_max_position_embeddings"), longest
    )

    def number(name, default=None):
        value = _first(rules.get(name), default)
        if value is None:
            raise ValueError(f"rope_type {kind!r} needs the number {name!r}; got {sorted(rules)}")
        return value

    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = Linear(float(number("factor")))
    elif kind == "dynamic":
        scaling = DynamicNtk(float(number("factor")), number("max_position_embeddings", longest))
    elif kind == "yarn":
        original = number("original_max_position_embeddings", original)
        scaling = Yarn(
            factor=float(number("factor", longest and longest / original)),
            original_length=original,
            beta_fast=rules.get("beta_fast") or 32.0,
            beta_slow=rules.get("beta_slow") or 1.0,
            attention_factor=rules.get("attention_factor"),
            mscale=rules.get("mscale"),
            mscale_all_dim=rules.get("mscale_all_dim"),
            truncate=rules.get("truncate", True),
        )
    elif kind == "llama3":
        scaling = Llama3(
            factor=float(number("factor")),
            low_freq_factor=float(number("low_freq_factor")),
            high_freq_factor=float(number("high_freq_factor")),
            original_length=number("original_max_position_embeddings", original),
        )
    else:
        raise ValueError(f"rope_type {kind!r} is not one of default, linear, dynamic, yarn, llama3")
    rotation = RopeConfig(head_dim, float(theta), int(head_dim * part), scaling)
    frequencies(rotation)  # raises where the numbers do not go together
    return rotation


def yarn_attention_factor(scaling: Yarn) -> float:
    """The factor that YaRN puts on cos and sin (arXiv:2309.00071, section 3.4; 1 where factor <= 1).

    >>> yarn_attention_factor(Yarn(factor=1.0, original_length=2048))
    1.0
    """

    def magnitude(mscale):
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


def _inverse_powers(theta: float, rotary_dim: int) -> np.ndarray:
    return np.float32(1) / _powers(theta, rotary_dim)


def _powers(theta: float, rotary_dim: int) -> np.ndarray:
    # The exponents are float32 as in transformers: rounding them moves the result by several ulps.
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _dynamic_theta(config: RopeConfig, scaling: DynamicNtk, length: int | None) -> float:
    R, longest = config.rotary_dim, scaling.max_position
    length = max(longest, longest if length is None else length)
    return config.theta * (scaling.factor * length / longest - (scaling.factor - 1)) ** (R / (R - 2))


def _yarn(config: RopeConfig, scaling: Yarn) -> np.ndarray:
    R, one = config.rotary_dim, np.float32(1)

    def dimension(turns):
        """The dimension whose pair turns so many times within the original length."""
        return R * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(R // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = one - np.clip(ramp, 0, 1)
    powers = _powers(config.theta, R)
    return (one / (np.float32(scaling.factor) * powers)) * (one - keep) + (one / powers) * keep


def _llama3(inv_freq: np.ndarray, scaling: Llama3) -> np.ndarray:
    one, factor, low = np.float32(1), np.float32(scaling.factor), np.float32(scaling.low_freq_factor)
    # torch divides a number by a tensor as number * (1 / tensor), which rounds twice.
    wavelength = np.float32(2 * math.pi) * (one / inv_freq)
    turns = np.float32(scaling.original_length) * (one / wavelength)
    smooth = (turns - low) / np.float32(scaling.high_freq_factor - scaling.low_freq_factor)
    between = (one - smooth) * inv_freq / factor + smooth * inv_freq
    slow = wavelength > np.float32(scaling.original_length / scaling.low_freq_factor)
    fast = wavelength < np.float32(scaling.original_length / scaling.high_freq_factor)
    return np.where(slow, inv_freq / factor, np.where(fast, inv_freq, between))


def _split_pairs(x: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    if layout == "half":
        return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x[..., 0::2], x[..., 1::2]


def _join_pairs(a: jax.Array, b: jax.Array, layout: Layout) -> jax.Array:
    if layout == "half":
        return jnp.concatenate([a, b], axis=-1)
    return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)


def _reorder(x, order: np.ndarray, axis: int):
    rest = np.arange(len(order), x.shape[axis])
    return x.take(np.concatenate([order, rest]), axis=axis)


def _check_layout(layout: str) -> None:
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout={layout!r} must be 'half' or 'interleaved'")


def _is_number(value) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


def _first(*values):
    return next((value for value in values if value is not None), None)
