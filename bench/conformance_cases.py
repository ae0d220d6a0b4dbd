"""The conformance cases as data: which calls every implementation of attention must get right.

Design fact: the axes are lists, and `cover` picks few cases in which every two values of different axes meet; most
faults need one value or two to show. The tests and `python -m bench conformance` run the same cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import jaxattn
from jaxattn import Blocks, Causal, Dilated, Global, Lengths, Mask, SegmentIds, Window

DTYPES = ("float32", "bfloat16", "float16", "float64")
LENGTHS = (
    (1, 1),
    (1, 97),
    (53, 1),
    (2, 3),
    (31, 31),
    (17, 64),
    (64, 17),
    (97, 61),
    (5, 256),
    (128, 128),
    (113, 203),
    (203, 113),
    (1023, 1024),
    (1024, 1023),
)
HEADS = ((1, 1), (2, 1), (4, 4), (6, 2), (5, 1))
HEAD_DIMS = (32, 40, 59, 64, 96, 111, 128, 256)
VALUE_DIMS = (None, 24, 80)  # None: the key's
LOGITS = ("plain", "scale", "soft cap", "bias", "bias of keys", "bias of heads, soft cap")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `implementation` is the caller's name for what runs it; the other fields are values of the axes."""

    implementation: str
    mask: str
    dtype: str
    lengths: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    value_dim: int | None
    logits: str

    def __str__(self) -> str:
        T, S = self.lengths
        N, K = self.heads
        Hv = self.value_dim or self.head_dim
        shape = f"T{T} S{S} N{N} K{K} H{self.head_dim} Hv{Hv}"
        return f"{self.implementation}: {self.mask}, {self.dtype}, {shape}, {self.logits}"

    @property
    def batch(self) -> int:
        return 1 if max(self.lengths) > 512 else 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mask may depend on."""

    B: int
    T: int
    S: int
    N: int
    rng: np.random.Generator

    def lengths(self, least: int, most: int, always: int | None = None) -> np.ndarray:
        """Random int32 [B] from least to most, the first one `always`."""
        drawn = self.rng.integers(least, most + 1, self.B).astype(np.int32)
        if always is not None:
            drawn[0] = always
        return drawn


def _segments(x: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Packed documents, [B, T] and [B, S]; the last keys belong to a document that has no queries."""
    query, key = (np.sort(x.rng.integers(0, 4, (x.B, n)), -1).astype(np.int32) for n in (x.T, x.S))
    key[:, x.S - x.S // 8 :] = 9
    return query, key


def _dense(x: Sizes, *shape: int, density: float = 0.5) -> np.ndarray:
    """Random boolean, its last queries attending nothing."""
    allowed = x.rng.random(shape) < density
    if shape[-2] > 1:
        allowed[..., shape[-2] - shape[-2] // 8 :, :] = False
    return allowed


# name: (what it is, the arguments of dot_product_attention that spell it)
MASKS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "none": lambda x: {},
    "is_causal": lambda x: {"is_causal": True},
    "causal, bottom right": lambda x: {"mask": Causal(x.S - x.T)},
    "causal, offset per batch element": lambda x: {"mask": Causal(x.lengths(-2, x.S, always=-1))},
    "not causal": lambda x: {"mask": ~Causal()},
    "window": lambda x: {"mask": Window(x.S // 4, x.S // 8)},
    "local_window_size": lambda x: {"local_window_size": (x.S // 8, 3), "is_causal": x.T % 2 == 1},
    "sliding_window": lambda x: {"mask": jaxattn.sliding_window(x.S // 3 + 1)},
    "attention_sinks": lambda x: {"mask": jaxattn.attention_sinks(x.S // 5 + 1, sinks=2)},
    "dilated": lambda x: {"mask": Dilated(3)},
    "strided": lambda x: {"mask": jaxattn.strided(math.isqrt(x.S) + 1)},
    "longformer": lambda x: {"mask": jaxattn.longformer(x.S // 6, tokens=(0, x.S // 2), dilation=2)},
    "bigbird": lambda x: {"mask": jaxattn.bigbird(x.S, block=x.S // 16 + 1, global_blocks=1, random_blocks=2)},
    "prefix_lm": lambda x: {"mask": jaxattn.prefix_lm(x.lengths(0, x.S))},
    "documents": lambda x: {"mask": Causal(x.S - x.T) & SegmentIds(*_segments(x))},
    "chunked": lambda x: {"mask": jaxattn.chunked(x.S // 5 + 1)},
    "key lengths": lambda x: {"key_value_seq_lengths": x.lengths(1, x.S, always=x.S - x.S // 3)},
    "both lengths": lambda x: {
        "query_seq_lengths": x.lengths(1, x.T),
        "key_value_seq_lengths": x.lengths(0, x.S, always=0),
        "is_causal": True,
    },
    "array of queries and keys": lambda x: {"mask": _dense(x, x.T, x.S)},
    "array of heads": lambda x: {"mask": _dense(x, 1, x.N, x.T, x.S, density=0.1), "is_causal": True},
    "array of batch elements": lambda x: {
        "mask": _dense(x, x.B, 1, 1, x.S, density=0.7),
        "local_window_size": x.S // 2,
    },
    "expression": lambda x: {
        "mask": (Window(x.S // 3, 0) & ~Dilated(4) | Global([1])).shift(1) & ~Blocks(Dilated(2), 5)
        | Lengths(x.T // 2, 2)
    },
}

# Axes that a case draws from; the implementations come from whoever runs them.
AXES = {
    "mask": tuple(MASKS),
    "dtype": DTYPES,
    "lengths": LENGTHS,
    "heads": HEADS,
    "head_dim": HEAD_DIMS,
    "value_dim": VALUE_DIMS,
    "logits": LOGITS,
}


def possible(case: dict[str, Any]) -> bool:
    """Whether the values go together: at a thousand tokens one head, for the time that float64 takes."""
    lengths, heads = case.get("lengths"), case.get("heads")
    return lengths is None or heads is None or max(lengths) <= 512 or heads == (1, 1)


def grid(implementations: tuple[str, ...]):
    """Every case there is."""
    axes = {"implementation": implementations, **AXES}
    for values in itertools.product(*axes.values()):
        if possible(case := dict(zip(axes, values, strict=True))):
            yield Case(**case)


def cover(implementations: tuple[str, ...], seed: int = 0) -> list[Case]:
    """Few cases in which every two possible values of different axes meet; the same ones for the same seed.

    Greedy: each case starts from a pair that has not met, and takes for each other axis the value that meets most.
    Source: Cohen et al., The AETG System (1997), section 4.

    >>> len(cover(("naive",)))  # 22 masks with each of 14 pairs of lengths
    308
    """
    axes = {"implementation": implementations, **AXES}
    rng = random.Random(seed)
    waiting = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if possible({a: x, b: y})
    }
    order = list(axes)

    def met(case: dict[str, Any], axis: str, value) -> int:
        found = {axis: value} | case
        ordered = [(name, found[name]) for name in order if name in found]
        return sum(pair in waiting for pair in itertools.combinations(ordered, 2) if (axis, value) in pair)

    cases = []
    while waiting:
        case = dict(next(iter(waiting)))
        for axis in sorted(order, key=lambda name: -len(axes[name])):
            if axis not in case:
                values = [x for x in rng.sample(axes[axis], len(axes[axis])) if possible({**case, axis: x})]
                case[axis] = max(values, key=lambda x: met(case, axis, x))
        for pair in itertools.combinations(((axis, case[axis]) for axis in order), 2):
            waiting.pop(pair, None)
        cases.append(Case(**case))
    return cases


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case, NumPy, and the mask as one boolean array.

    q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], bias None or [B|1, N|1, T|1, S]; cotangents of the output and of
    the log-sum-exp; arguments: what spells the mask; allowed: bool [B, N, T, S]; scale, soft_cap: None or float.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    bias: np.ndarray | None
    arguments: dict[str, Any]
    allowed: np.ndarray
    scale: float | None
    soft_cap: float | None
    d_out: np.ndarray
    d_lse: np.ndarray

    @property
    def attended(self) -> np.ndarray:
        """bool [B, S]: keys that some query of the batch element may attend."""
        return self.allowed.any((1, 2))

    @property
    def empty(self) -> np.ndarray:
        """bool [B, T, N]: rows that may attend nothing, by the mask."""
        return ~self.allowed.any(-1).swapaxes(1, 2)


def inputs(case: Case) -> Inputs:
    """The arrays of a case; they depend on the case alone, and not on its implementation."""
    (T, S), (N, K), B, H = case.lengths, case.heads, case.batch, case.head_dim
    rng = np.random.default_rng(seed_of(case))
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    Hv = case.value_dim or H

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    q, k, v = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, Hv)
    bias_shapes = {
        "bias": (B, N, T, S),
        "bias of keys": (1, 1, 1, S),
        "bias of heads, soft cap": (1, N, T, S),
    }
    bias = normal(*bias_shapes[case.logits]) if case.logits in bias_shapes else None
    if case.logits == "bias" and S > 4:
        bias[..., S // 2] = -np.inf  # masks as the mask does
    arguments = MASKS[case.mask](Sizes(B, T, S, N, rng))
    return Inputs(
        q, k, v, bias, arguments,
        np.broadcast_to(allowed_pairs(arguments, T, S), (B, N, T, S)),
        0.3 if case.logits == "scale" else None,
        2.0 if "soft cap" in case.logits else None,
        normal(B, T, N, Hv),
        rng.standard_normal((B, T, N)).astype(np.promote_types(dtype, np.float32) if dtype.kind == "f" else np.float32),
    )  # fmt: skip


def seed_of(case: Case) -> int:
    """A seed from the case's values, the same in every process."""
    return zlib.crc32(repr(dataclasses.replace(case, implementation="")).encode())


def allowed_pairs(arguments: dict[str, Any], T: int, S: int) -> np.ndarray:
    """What arguments of `dot_product_attention` allow, by their definitions; broadcastable to [B, N, T, S]."""
    t, s = np.arange(T)[:, None], np.arange(S)[None, :]
    mask = arguments.get("mask", True)
    allowed = np.asarray(mask.to_array(T, S) if isinstance(mask, Mask) else mask)
    if arguments.get("is_causal"):
        allowed = allowed & (s <= t)
    if (window := arguments.get("local_window_size")) is not None:
        left, right = (window, window) if isinstance(window, int) else window
        allowed = allowed & (s >= t - left) & (s <= t + right)
    for name, index in (("query_seq_lengths", t), ("key_value_seq_lengths", s)):
        if (lengths := arguments.get(name)) is not None:
            allowed = allowed & (index < lengths[:, None, None, None])
    return allowed
