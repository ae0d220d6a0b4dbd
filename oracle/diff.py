"""The first stage that differs from torch, and which of the usual mistakes explains it.

Design fact: a mistake is recognised, not guessed. For each usual mistake the stage that it would give is
computed in NumPy from torch's stages before it; the mistake is named only where that lies ten times nearer
to what was observed than the right result does. So the diagnosis works on anybody's stages, whatever code
made them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from oracle.attention import Verdict, judge, rmse, unit_roundoff
from oracle.checkpoint import whole_file
from oracle.llama import STAGES, Case

_NEARER = 10.0
_INPUT = ("x", "positions")
_AXES = {
    "query": "BTNH",
    "key": "BTKH",
    "value": "BTKH",
    "rotated_query": "BTNH",
    "rotated_key": "BTKH",
    "log_sum_exp": "BTN",
    "context": "BTNH",
    "output": "BTD",
}
_BLOCKS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Cause:
    """A usual mistake: its name (that of the planted fault), what would put it right, and what it makes of a
    stage."""

    name: str
    advice: str
    stage: np.ndarray


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What differs first, from which position on, and why; `stage` is None where all that was compared
    agrees."""

    stage: str | None
    compared: tuple[str, ...]
    verdict: Verdict | None = None
    where: str = ""
    cause: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        rest = [stage for stage in STAGES if stage not in self.compared]
        if self.stage is None and not rest:
            return "every stage agrees"
        if self.stage is None:
            return f"{', '.join(self.compared)} agree; not compared: {', '.join(rest)}"
        why = f"it agrees with: {self.cause}. {self.advice}" if self.cause else "none of the usual mistakes explains it"
        return f"{self.stage} differs {self.where} ({self.verdict.reason}); {why}"


def diagnose(case: Case, ours: Mapping[str, np.ndarray], *, theta: float) -> Diagnosis:
    """Find the first stage that differs from torch beyond the accuracy rule, and the mistake that explains
    it.

    Args:
      case: torch's stages, of `oracle.llama`.
      ours: stage -> array, heads as [B, T, N, H]; stages may be missing.
      theta: base of the rotation's frequencies without scaling.

    Returns: a `Diagnosis`.
    Raises: ValueError where no stage is given, or a name is none of `oracle.llama.STAGES`.
    """
    unknown = sorted(set(ours) - set(STAGES))
    if unknown or not ours:
        raise ValueError(f"stages must be some of {', '.join(STAGES)}; got {', '.join(unknown) or 'none'}")
    compared = tuple(stage for stage in STAGES if stage in ours)
    for stage in compared:
        verdict = judge(stage, ours[stage], case.targets[stage])
        if not verdict:
            observed = np.asarray(ours[stage], np.float64)
            cause = _explain(case, stage, observed, theta)
            fits = observed.shape == case.targets[stage].value.shape
            where = _where(observed, case, stage) if fits else "in shape"
            return Diagnosis(stage, compared, verdict, where, cause and cause.name, cause.advice if cause else "")
    return Diagnosis(None, compared)


def read_dump(path: str | Path, case: Case) -> dict[str, np.ndarray]:
    """Stages from an `.npz` file, which may hold the layer's input (x, positions) too, as `write_dump` writes it.

    Args: path. case: what the stages are to be compared with.
    Raises: FileNotFoundError; ValueError where the file is no whole npz of plain arrays (pickled objects are
    refused), where a name is none of `oracle.llama.STAGES`, an array holds no numbers, or the input is another
    than the case's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = dict(content)
    except Exception as error:  # zip, zlib and NumPy each have errors of their own for a file that is not whole
        raise ValueError(f"{path} is no .npz of plain arrays: {error}") from error
    unknown = sorted(set(arrays) - {*STAGES, *_INPUT})
    if unknown:
        raise ValueError(
            f"{path} holds {', '.join(unknown)}; the stages are called {', '.join(STAGES)}, "
            f"the layer's input {' and '.join(_INPUT)}"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} has dtype {array.dtype}; save it as float32 or float64")
    for name, expected in (("x", case.x), ("positions", case.positions)):
        given = arrays.pop(name, expected)
        if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-6, atol=0):
            raise ValueError(
                f"{path}: {name} {given.shape} is not the layer's input {expected.shape}: run your code on what --save "
                f"writes, and give the same --checkpoint, --layer and --tokens as there"
            )
    return arrays


def write_dump(path: str | Path, case: Case) -> None:
    """The layer's input (x, positions) and torch's stages as an `.npz`, for code that is to be compared."""
    stages = {name: target.value.astype(np.float32) for name, target in case.targets.items()}
    with whole_file(path) as file:
        np.savez(file, x=np.asarray(case.x, np.float32), positions=case.positions, **stages)


def _where(observed: np.ndarray, case: Case, stage: str) -> str:
    target = case.targets[stage]
    axes = tuple(i for i in range(observed.ndim) if i != 1)
    with np.errstate(invalid="ignore"):
        errors = np.sqrt(np.mean((observed - target.value) ** 2, axis=axes))
    wrong = ~(errors <= 5 * target.bound)
    if not wrong.any():
        return "slightly, everywhere"
    first = int(np.argmax(wrong))
    position = int(case.positions[0, first])
    count = int(wrong.sum())
    return f"from position {position} on" if wrong[first:].all() else f"at {count} positions, the first is {position}"


def _explain(case: Case, stage: str, observed: np.ndarray, theta: float) -> Cause | None:
    target = case.targets[stage].value
    right = rmse(observed, target) if observed.shape == target.shape else np.inf
    if not np.isfinite(right):  # infinities in the wrong place, other shapes: judge by the spread of the finite entries
        finite = observed[np.isfinite(observed)]
        right = float(finite.std()) if finite.size else 0.0
    found, nearest = None, right / _NEARER
    for cause in itertools.chain(_CAUSES[stage](case, stage, theta), _layout_causes(case, stage)):
        error = rmse(observed, cause.stage) if cause.stage.shape == observed.shape else np.inf
        if error <= nearest:
            found, nearest = cause, error
    return found or (_few_digits(observed, target, right) if observed.shape == target.shape else None)


def _few_digits(observed: np.ndarray, target: np.ndarray, error: float) -> Cause | None:
    """The dtype of fewer digits in which the numbers were rounded, where that explains an error of this size."""
    for dtype in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            rounded = observed.astype(dtype).astype(np.float64)
        small = error <= 16 * unit_roundoff(dtype) * float(np.sqrt(np.mean(target**2)))
        if small and np.isfinite(observed).all() and np.array_equal(rounded, observed):
            advice = f"Every number is one of {dtype}'s: compute in float32, with which this is compared."
            return Cause(f"computed in {dtype}", advice, rounded)
    return None


def _layout_causes(case: Case, stage: str) -> Iterator[Cause]:
    """Right numbers in another order or shape."""
    value, letters = case.targets[stage].value, _AXES[stage]
    wanted = f"it should be {_brackets(letters)} = {value.shape}"
    forms = {letters: value} | ({letters[1:]: value[0]} if value.shape[0] == 1 else {})
    for axes, form in forms.items():
        for order in itertools.permutations(range(form.ndim)):
            there = "".join(axes[i] for i in order)
            if there != letters:
                yield Cause(
                    "axes in another order", f"It is {_brackets(there)}; {wanted}: transpose it.", form.transpose(order)
                )
    if len(letters) < 4:
        return
    B, T, heads, H = value.shape
    yield Cause("heads not split", f"It is [B, T, {letters[2]} * H]; {wanted}.", value.reshape(B, T, heads * H))
    G = case.targets["query"].value.shape[2] // heads
    if G == 1:
        return
    for name, repeated in (
        ("KV heads repeated already", np.repeat(value, G, 2)),
        ("KV heads tiled, not repeated", np.tile(value, (1, 1, G, 1))),
    ):
        for there, form in (("BTNH", repeated), ("BNTH", repeated.swapaxes(1, 2))):
            advice = f"It is {_brackets(there)}; {wanted}, as it is before each head serves its {G} query heads"
            more = ", which read KV head n // G (repeat), not n % K (tile)." if "tiled" in name else "."
            yield Cause(name, advice + more, form)


def _brackets(letters: str) -> str:
    return f"[{', '.join(letters)}]"


def _projection_causes(case: Case, stage: str, _theta: float) -> Iterator[Cause]:
    value = case.targets[stage].value
    for name, advice, cut in _PRODUCTS:
        yield Cause(name, advice, _project(case, stage, cut))
    weight = f"{stage[0]}_proj.weight"
    if len(set(case.weights[weight].shape)) == 1:
        yield Cause(
            "projection transposed",
            "torch's Linear keeps [out, in]: multiply by its transpose.",
            _project(case, stage, transposed=True),
        )
    if f"{stage[0]}_proj.bias" in case.weights:
        yield Cause("no bias", "The projection has a bias: add it.", _project(case, stage, biased=False))
    R = 2 * len(case.inv_freq)
    order = np.arange(R).reshape(2, R // 2).T.ravel()
    yield Cause(
        "q and k rows in Meta's order",
        "The rows of each head are interleaved: permute them (jaxattn.rope.to_half), or rotate interleaved pairs.",
        np.concatenate([value[..., order], value[..., R:]], -1),
    )
    B, T, N, H = value.shape
    yield Cause(
        "head and dimension axes swapped",
        "Reshape the projection to (heads, head_dim), not (head_dim, heads).",
        value.reshape(B, T, H, N).swapaxes(2, 3),
    )


def _project(
    case: Case, stage: str, cut: Callable[[np.ndarray], np.ndarray] = np.asarray, *, transposed=False, biased=True
) -> np.ndarray:
    """A projection [B, T, N, H] of x in float64, `cut` applied to both factors first."""
    weight = cut(np.asarray(case.weights[f"{stage[0]}_proj.weight"], np.float32)).astype(np.float64)
    bias = case.weights.get(f"{stage[0]}_proj.bias") if biased else None
    y = cut(np.asarray(case.x, np.float32)).astype(np.float64) @ (weight if transposed else weight.T)
    return (y if bias is None else y + np.asarray(bias, np.float64)).reshape(case.targets[stage].value.shape)


def _cut_bits(x: np.ndarray, bits: int, rounded: bool) -> np.ndarray:
    """float32 without its last bits: cut off, or rounded to the nearest (ties away from zero)."""
    integers = x.view(np.uint32) + np.uint32(rounded << (bits - 1))
    return (integers & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


_PRODUCTS = tuple(
    (name, advice, lambda x, bits=bits, rounded=rounded: _cut_bits(x, bits, rounded))
    for name, bits, advice in (
        ("products in TF32", 13, "float32 was multiplied in TF32, a GPU's way to save time: ask for full precision "
         "(jax.default_matmul_precision('highest'), torch.set_float32_matmul_precision('highest'))."),
        ("products in bfloat16", 16, "float32 was multiplied in bfloat16, a TPU's default: ask for full precision "
         "(jax.default_matmul_precision('highest'))."),
    )
    for rounded in (False, True)
)  # fmt: skip


def _rotation_causes(case: Case, stage: str, theta: float) -> Iterator[Cause]:
    x = case.targets[stage.removeprefix("rotated_")].value
    H, R, positions = x.shape[-1], 2 * len(case.inv_freq), case.positions
    unscaled = theta ** (-np.arange(0, R, 2) / R)

    def rotated(inv_freq=case.inv_freq, positions=positions, interleaved=False, factor=case.attention_scaling):
        return _rotate(x, positions, inv_freq, factor, interleaved)

    yield Cause(
        "RoPE layout swapped",
        "Pairs are interleaved (2i, 2i + 1) where they should be split (i, i + R/2): permute the q and k rows "
        "(jaxattn.rope.to_half), or rotate in the other layout.",
        rotated(interleaved=True),
    )
    for factor in {1.0, case.attention_scaling}:
        yield Cause(
            "no RoPE scaling",
            "The frequencies are theta ** (-2i/R) without the configuration's scaling rule: apply rope_scaling.",
            rotated(inv_freq=unscaled, factor=factor),
        )
    yield Cause(
        "no attention factor",
        f"YaRN multiplies cos and sin by {case.attention_scaling:.6g} here.",
        rotated(factor=1.0),
    )
    yield Cause("not rotated", "RoPE is missing here.", x)
    yield Cause("rotated backwards", "The sine has the wrong sign.", rotated(inv_freq=-case.inv_freq))
    yield Cause("positions off by one", "Positions start one too late.", rotated(positions=positions + 1))
    yield Cause("positions off by one", "Positions start one too early.", rotated(positions=positions - 1))
    yield Cause(
        "positions start at 0",
        "Add the offset: positions must go on where the earlier tokens end.",
        rotated(positions=positions - positions[:, :1]),
    )
    if R < H:
        yield Cause(
            "whole head rotated, not a part",
            f"Only the first {R} of {H} dimensions are rotated (partial_rotary_factor).",
            rotated(inv_freq=theta ** (-np.arange(0, H, 2) / H)),
        )


def _attention_causes(case: Case, stage: str, _theta: float) -> Iterator[Cause]:
    """Mistakes that show in the log-sum-exp already, and, after them, those that show in the context
    alone."""
    q, k, v = (case.targets[name].value for name in ("rotated_query", "rotated_key", "value"))
    G, H, T = q.shape[2] // k.shape[2], q.shape[3], q.shape[1]
    part = 1 if stage == "log_sum_exp" else 0
    mask = np.broadcast_to(case.mask, (q.shape[0], 1, T, T))
    one_more = mask | np.eye(T, k=1, dtype=bool)
    repeated, tiled = (lambda y: np.repeat(y, G, 2)), (lambda y: np.tile(y, (1, 1, G, 1)))

    def attend(keys=repeated, values=repeated, mask=mask, scale=case.scale):
        return _attend(q, keys(k), values(v), mask, scale)[part]

    tiling = "Query head n reads KV head n // (N / K): repeat each KV head N / K times, do not tile them."
    yield Cause("KV heads tiled, not repeated", tiling, attend(keys=tiled, values=tiled))
    yield Cause("mask off by one", "A query sees the key after itself: allow s <= t.", attend(mask=one_more))
    strict = mask & ~np.eye(T, dtype=bool)
    yield Cause("mask off by one", "A query does not see itself: allow s <= t.", attend(mask=strict))
    yield Cause("no causal mask", "Every query sees every key.", attend(mask=np.ones_like(mask)))
    right = f"Logits are multiplied by 1 / sqrt(H) = {case.scale:.4g}"
    for wrong, text in ((1.0 / H, "1 / H"), (1.0, "1"), (case.x.shape[-1] ** -0.5, "1 / sqrt(D)")):
        yield Cause("wrong scale", f"{right}, not by {text}.", attend(scale=wrong))
    if stage == "context":
        yield Cause("KV heads tiled, not repeated", f"The values are: {tiling}", attend(values=tiled))
        for block in (b for b in _BLOCKS if b < T):
            for partial_first in (False, True):
                yield Cause(
                    "accumulator not rescaled",
                    "When the running maximum grows, multiply the accumulator by exp(old - new), as the sum.",
                    _not_rescaled(q, repeated(k), repeated(v), mask, case.scale, block, partial_first),
                )


def _output_causes(case: Case, _stage: str, _theta: float) -> Iterator[Cause]:
    context, weight = case.targets["context"].value, np.asarray(case.weights["o_proj.weight"], np.float64)
    bias = np.asarray(case.weights.get("o_proj.bias", 0.0), np.float64)
    B, T, N, H = context.shape
    if weight.shape[0] == weight.shape[1]:
        transposed = context.reshape(B, T, -1) @ weight + bias
        yield Cause(
            "output projection transposed", "torch's Linear keeps [out, in]: multiply by its transpose.", transposed
        )
    by_dimension = context.swapaxes(2, 3).reshape(B, T, -1) @ weight.T + bias
    yield Cause(
        "heads flattened in the wrong order", "Flatten [N, H], head first, before the projection.", by_dimension
    )


_CAUSES: dict[str, Callable[[Case, str, float], Iterator[Cause]]] = {
    "query": _projection_causes,
    "key": _projection_causes,
    "value": _projection_causes,
    "rotated_query": _rotation_causes,
    "rotated_key": _rotation_causes,
    "log_sum_exp": _attention_causes,
    "context": _attention_causes,
    "output": _output_causes,
}


def _rotate(x, positions, inv_freq, factor: float, interleaved: bool) -> np.ndarray:
    R = 2 * len(inv_freq)
    angles = (positions[..., None] * inv_freq)[:, :, None]
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    at = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    a, b = x[..., at[0]], x[..., at[1]]
    turned = x.copy()
    turned[..., at[0]], turned[..., at[1]] = a * cos - b * sin, b * cos + a * sin
    return turned


def _logits(q, k, mask, scale: float) -> np.ndarray:
    return np.where(mask, q.swapaxes(1, 2) @ k.transpose(0, 2, 3, 1) * scale, -np.inf)


def _attend(q, k, v, mask, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(context [B, T, N, H], log-sum-exp [B, T, N]); rows that see nothing give 0 and -inf."""
    logits_BNTS = _logits(q, k, mask, scale)
    top = logits_BNTS.max(-1, keepdims=True)
    top = np.where(np.isinf(top), 0, top)
    terms_BNTS = np.exp(logits_BNTS - top)
    total = terms_BNTS.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0].swapaxes(1, 2)
    return (terms_BNTS / np.where(total == 0, 1, total) @ v.swapaxes(1, 2)).swapaxes(1, 2), lse


def _not_rescaled(q, k, v, mask, scale: float, block: int, partial_first: bool) -> np.ndarray:
    """Online softmax over blocks of keys whose accumulator keeps what it gathered under old maxima."""
    logits_BNTS = _logits(q, k, mask, scale)
    T = q.shape[1]
    full = np.broadcast_to(mask, logits_BNTS.shape)
    out = np.empty(v.shape)
    for start in range(0, T, block):
        rows = slice(start, start + block)
        tiles = [slice(s, s + block) for s in range(0, T, block) if full[:, :, rows, s : s + block].any()]
        if partial_first:
            tiles.sort(key=lambda tile: bool(full[:, :, rows, tile].all()))
        m = np.full((*logits_BNTS.shape[:2], len(range(T)[rows])), -np.inf)
        l, o = np.zeros(m.shape), np.zeros((*m.shape, v.shape[-1]))
        for tile in tiles:
            new = np.maximum(m, logits_BNTS[:, :, rows, tile].max(-1))
            finite = np.where(np.isinf(new), 0, new)
            p = np.exp(logits_BNTS[:, :, rows, tile] - finite[..., None])
            l = l * np.exp(m - finite) + p.sum(-1)
            o = o + p @ v[:, tile].swapaxes(1, 2)
            m = new
        out[:, rows] = (o / l[..., None]).swapaxes(1, 2)
    return out
