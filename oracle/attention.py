"""Attention in float64, attention in plain torch, and the rule that says when a result is accurate enough.

Everything takes and returns NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`); the arguments mean what they
mean in `jaxattn.dot_product_attention`, except that every mask is one boolean array:

    targets = accuracy_bound(q, k, v, bias, mask, scale=..., cotangent=do)    # once per case
    verdicts = check({"out": out, "lse": lse, "dq": dq}, targets)             # once per implementation
    assert all(verdicts.values()), "\\n".join(map(str, verdicts.values()))

    reference(q, k, v, bias, mask, ...) -> Outputs    float64 throughout, gradients by torch's autograd
    plain(q, k, v, bias, mask, ...) -> Outputs        eager torch in the inputs' dtype, as HF does it
    absolute(q, k, v, bias, mask, ...) -> Outputs     the same formulas with every term in absolute value

Shapes: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], bias and mask of 2 to 4 dimensions that broadcast to
[B, N, T, S], cotangent (of out) [B, T, N, Hv], lse_cotangent [B, T, N]; the batch axis may be absent
everywhere. `Outputs` has out [B, T, N, Hv], lse [B, T, N] and, where a cotangent is given, dq, dk, dv, dbias
of the shapes of q, k, v, bias. A row that may attend nothing gives out 0, lse -inf, gradients 0.

Design fact: one KV head's group of query heads and a slice of query rows are computed at a time, so that
memory does not grow with T * S; rows are independent, so the slicing changes no forward result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import torch

_NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
_ELEMENTS_PER_SLICE = 1 << 23


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What one computation of attention gives; the gradients are None where no cotangent was given."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray | None = None
    dk: np.ndarray | None = None
    dv: np.ndarray | None = None
    dbias: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """What one output should be, and how far from it a result may lie.

    value: float64 array. plain_rmse: the error of plain torch in the inputs' dtype. bound: the largest RMSE
    that the accuracy rule allows.
    """

    value: np.ndarray
    plain_rmse: float
    bound: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One output judged by the accuracy rule; true where it passes."""

    name: str
    rmse: float
    max_abs: float
    bound: float
    plain_rmse: float
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        text = (
            f"{self.name}: rmse {self.rmse:.3g} (allowed {self.bound:.3g}, "
            f"plain torch {self.plain_rmse:.3g}), max abs {self.max_abs:.3g}"
        )
        return f"{text}: ok" if self else f"{text}: FAIL, {self.reason}"


def unit_roundoff(dtype) -> float:
    """Half the distance from 1 to the next number of `dtype`: 2**-8 for bfloat16, 2**-24 for float32.

    >>> unit_roundoff("float16") == 2**-11
    True
    """
    return float(ml_dtypes.finfo(np.dtype(dtype)).eps) / 2


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A torch tensor with the array's values and dtype (a copy); bfloat16 arrays are ml_dtypes'.

    >>> to_torch(np.ones(2, ml_dtypes.bfloat16)).dtype
    torch.bfloat16
    """
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A NumPy array with the tensor's values and dtype; bfloat16 becomes ml_dtypes'.

    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype(bfloat16)
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def reference(
    q,
    k,
    v,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    cotangent=None,
    lse_cotangent=None,
) -> Outputs:
    """Attention in float64: softmax(soft_cap(scale * q k^T) + bias, over the allowed keys) v, and its
    gradients.

    Args: shapes as in the module's docstring; any float dtype, converted to float64 exactly.
    Returns: float64 `Outputs`; gradients by autograd where `cotangent` or `lse_cotangent` is given.
    Raises: ValueError for shapes that do not fit together.

    >>> q = np.ones((1, 2, 1, 4)); reference(q, q, q).out.shape
    (1, 2, 1, 4)
    """
    return _run(_exact, np.float64, q, k, v, bias, mask, scale, logits_soft_cap, cotangent, lse_cotangent)


def plain(
    q,
    k,
    v,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    cotangent=None,
    lse_cotangent=None,
) -> Outputs:
    """Attention as eager torch computes it in the inputs' dtype: what an ordinary implementation achieves.

    The operations of Hugging Face's `eager_attention_forward`: logits in the dtype, softmax in float32,
    cast, and a product with v in the dtype; gradients by autograd through the same graph.

    Args: shapes as in the module's docstring. Returns: `Outputs` in the dtype of q.
    Raises: ValueError for shapes that do not fit together.

    >>> q = np.ones((1, 2, 1, 4), np.float16); plain(q, q, q).out.dtype
    dtype('float16')
    """
    dtype = np.asarray(q).dtype
    return _run(_eager, dtype, q, k, v, bias, mask, scale, logits_soft_cap, cotangent, lse_cotangent)


def absolute(
    q,
    k,
    v,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    cotangent=None,
    lse_cotangent=None,
) -> Outputs:
    """The formulas of attention with every term of every sum in absolute value: the scale of rounding errors.

    out: p |v|. lse: |lse| + p (|scale| |q| |k| + |bias|). dv: p^T |do|.
    dbias: ds = p (|do| |v| + |do| (p |v|) + |dlse|). dq: |scale| ds |k|. dk: |scale| ds^T |q|.
    p is the softmax itself (its terms are positive already), ds carries the soft cap's derivative for dq and
    dk.

    Args: shapes as in the module's docstring. Returns: float64 `Outputs`.
    Raises: ValueError for shapes that do not fit together.

    >>> q = np.ones((1, 2, 1, 4)); bool(np.allclose(absolute(q, q, -q).out, 1))
    True
    """
    return _run(_absolute, np.float64, q, k, v, bias, mask, scale, logits_soft_cap, cotangent, lse_cotangent)


def accuracy_bound(
    q,
    k,
    v,
    bias=None,
    mask=None,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    cotangent=None,
    lse_cotangent=None,
) -> dict[str, Target]:
    """What each output should be and the largest RMSE that the accuracy rule allows it, for the dtype of q.

    bound = 2 * RMSE(plain torch in the same dtype, float64 result) + u * RMS(the formula in absolute values).

    For float64 inputs plain torch's error cannot be seen against a float64 result; it is measured in float32
    on the rounded inputs and scaled by the ratio of the unit roundoffs, since rounding errors scale with it.

    Args: shapes as in the module's docstring.
    Returns: a `Target` for "out", "lse" and, where a cotangent is given, "dq", "dk", "dv" and (with a bias)
    "dbias".
    Raises: ValueError for shapes that do not fit together.

    >>> q = np.random.default_rng(0).normal(size=(1, 8, 2, 4)).astype(np.float32)
    >>> sorted(accuracy_bound(q, q, q))
    ['lse', 'out']
    """
    options = dict(scale=scale, logits_soft_cap=logits_soft_cap)
    arrays = [None if x is None else np.asarray(x) for x in (q, k, v, bias, mask, cotangent, lse_cotangent)]
    dtype = arrays[0].dtype
    exact = _with(reference, arrays, options)
    size = _with(absolute, arrays, options)
    if dtype == np.float64:
        arrays = [x if x is None or x.dtype == bool else _finite_cast(x, np.float32) for x in arrays]
        ratio = unit_roundoff(np.float64) / unit_roundoff(np.float32)
        coarse, target = _with(plain, arrays, options), _with(reference, arrays, options)
    else:
        ratio, coarse, target = 1.0, _with(plain, arrays, options), exact
    targets = {}
    for name in _NAMES:
        value = getattr(exact, name)
        if value is not None:
            plain_rmse = ratio * rmse(getattr(coarse, name), getattr(target, name))
            targets[name] = Target(value, plain_rmse, allowed(plain_rmse, getattr(size, name), dtype))
    return targets


def allowed(plain_rmse: float, absolute_values: np.ndarray, dtype) -> float:
    """The accuracy rule: 2 * plain_rmse + unit_roundoff(dtype) * RMS(absolute_values).

    >>> allowed(0.0, np.ones(3), "bfloat16") == 2**-8
    True
    """
    values = np.asarray(absolute_values, np.float64)
    values = values[np.isfinite(values)]
    rms = math.sqrt(float(np.mean(values**2))) if values.size else 0.0
    return 2 * plain_rmse + unit_roundoff(dtype) * rms


def rmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, over the entries that are not the same infinity on both sides.

    >>> rmse(np.array([1.0, -np.inf]), np.array([4.0, -np.inf]))
    3.0
    """
    difference = _difference(actual, expected)
    return math.sqrt(float(np.mean(difference**2))) if difference.size else 0.0


def check(actual: Mapping[str, np.ndarray], targets: Mapping[str, Target]) -> dict[str, Verdict]:
    """Judge results by name ("out", "lse", "dq", ...) against `accuracy_bound`'s targets.

    Args: actual: any subset of the targets' names, each array of the target's shape (any float dtype).
    Returns: a `Verdict` per name, true where RMSE <= bound; NaN and a misplaced infinity fail.
    Raises: ValueError for a name without a target, and for no name at all, since a check of nothing proves
    nothing.

    >>> q = np.random.default_rng(0).normal(size=(1, 8, 2, 4)).astype(np.float32)
    >>> bool(check({"out": plain(q, q, q).out}, accuracy_bound(q, q, q))["out"])
    True
    """
    if not actual:
        raise ValueError(f"nothing to check: `actual` is empty; targets are {sorted(targets)}")
    unknown = sorted(set(actual) - set(targets))
    if unknown:
        raise ValueError(f"no target for {unknown}; targets are {sorted(targets)}")
    return {name: judge(name, value, targets[name]) for name, value in actual.items()}


def judge(name: str, actual: np.ndarray, target: Target) -> Verdict:
    """Judge one array against one target.

    >>> bool(judge("out", np.zeros(2), Target(np.zeros(2), 0.0, 0.0)))
    True
    """
    actual = np.asarray(actual)
    if actual.shape != target.value.shape:
        reason = f"shape {actual.shape}, should be {target.value.shape}"
        return Verdict(name, math.inf, math.inf, target.bound, target.plain_rmse, reason)
    error = rmse(actual, target.value)
    difference = _difference(actual, target.value)
    max_abs = float(np.max(np.abs(difference))) if difference.size else 0.0
    if math.isnan(error):
        reason = "NaN in the result"
    elif math.isinf(error):
        reason = "an infinity where there should be none, or none where there should be one"
    elif error > target.bound:
        reason = f"{error / target.bound:.3g} times the allowed error" if target.bound else "must be exact"
    else:
        reason = ""
    return Verdict(name, error, max_abs, target.bound, target.plain_rmse, reason)


def _difference(actual, expected) -> np.ndarray:
    """actual - expected, flat, without the entries where both are the same infinity."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    differs = ~(np.isinf(expected) & (actual == expected))
    with np.errstate(invalid="ignore"):  # opposite infinities differ by NaN
        return actual[differs] - expected[differs]


def _with(function, arrays, options) -> Outputs:
    *inputs, cotangent, lse_cotangent = arrays
    return function(*inputs, cotangent=cotangent, lse_cotangent=lse_cotangent, **options)


def _finite_cast(array: np.ndarray, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """One KV head's group, one range of query rows: what the formulas below are written for.

    q [G, T, H], k [S, H], v [S, Hv], bias and mask [G|1, T|1, S|1] or None, do [G, T, Hv], dlse [G, T] or
    None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor | None
    do: torch.Tensor | None
    dlse: torch.Tensor | None
    scale: float
    cap: float | None

    def allowed(self, logits_GTS: torch.Tensor) -> torch.Tensor:
        allowed = torch.ones_like(logits_GTS, dtype=torch.bool)
        if self.mask is not None:
            allowed = allowed & self.mask
        if self.bias is not None:
            allowed = allowed & (self.bias != -torch.inf)
        return allowed

    def differentiate(self, function) -> tuple[torch.Tensor, ...]:
        """(out, lse), then where a cotangent is given (dq, dk, dv, dbias or None), by autograd."""
        if self.do is None and self.dlse is None:
            with torch.no_grad():
                return function(self)
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        leaves += [] if bias is None else [bias]
        out, lse = function(dataclasses.replace(self, q=leaves[0], k=leaves[1], v=leaves[2], bias=bias))
        pairs = [(out, self.do)]
        if self.dlse is not None:
            # An empty row's log-sum-exp is the constant -inf.
            pairs.append((torch.where(torch.isinf(lse), 0, lse), self.dlse))
        pairs = [(y, dy) for y, dy in pairs if dy is not None]
        grads = torch.autograd.grad(
            [y for y, _ in pairs], leaves, [dy.to(y.dtype) for y, dy in pairs], allow_unused=True
        )
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        grads = [
            torch.where(torch.isneginf(bias), 0, g) if x is bias else g for g, x in zip(grads, leaves, strict=True)
        ]
        return (out, lse, *grads, *([None] if bias is None else []))


def _logits(s: _Slice) -> torch.Tensor:
    logits_GTS = (s.q @ s.k.T) * s.scale
    return logits_GTS if s.cap is None else s.cap * torch.tanh(logits_GTS / s.cap)


def _softmax(s: _Slice, logits_GTS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [G, T, S] (0 in rows that attend nothing) and log-sum-exp [G, T]."""
    if s.bias is not None:
        logits_GTS = logits_GTS + s.bias
    logits_GTS = torch.where(s.allowed(logits_GTS), logits_GTS, -torch.inf)
    peak = logits_GTS.detach().amax(-1, keepdim=True)
    peak = torch.where(torch.isinf(peak), 0, peak)
    terms_GTS = torch.exp(logits_GTS - peak)
    total = terms_GTS.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse_GT = torch.where(empty, -torch.inf, peak + torch.log(total)).squeeze(-1)
    return terms_GTS / total, lse_GT


def _exact(s: _Slice) -> tuple:
    def forward(s):
        weights_GTS, lse_GT = _softmax(s, _logits(s))
        return weights_GTS @ s.v, lse_GT

    return s.differentiate(forward)


def _eager(s: _Slice) -> tuple:
    def forward(s):
        logits_GTS = _logits(s)
        if s.bias is not None:
            logits_GTS = logits_GTS + s.bias
        allowed = s.allowed(logits_GTS)
        logits_GTS = torch.where(allowed, logits_GTS, torch.finfo(logits_GTS.dtype).min)
        wide = torch.promote_types(logits_GTS.dtype, torch.float32)
        weights_GTS = torch.softmax(logits_GTS, -1, dtype=wide).to(logits_GTS.dtype)
        some = allowed.any(-1, keepdim=True)
        out = torch.where(some, weights_GTS, 0) @ s.v
        lse = torch.where(some[..., 0], torch.logsumexp(logits_GTS.to(wide), -1), -torch.inf)
        return out, lse

    return s.differentiate(forward)


def _absolute(s: _Slice) -> tuple:
    raw_GTS = (s.q @ s.k.T) * s.scale
    slope_GTS = 1.0 if s.cap is None else 1 - torch.tanh(raw_GTS / s.cap) ** 2
    weights_GTS, lse_GT = _softmax(s, _logits(s))
    out = weights_GTS @ s.v.abs()
    terms_GTS = abs(s.scale) * (s.q.abs() @ s.k.abs().T)
    if s.bias is not None:
        terms_GTS = terms_GTS + torch.where(torch.isneginf(s.bias), 0, s.bias.abs())
    lse = lse_GT.abs() + (weights_GTS * terms_GTS).sum(-1)
    if s.do is None and s.dlse is None:
        return out, lse
    do = torch.zeros_like(out) if s.do is None else s.do.abs()
    dlse = torch.zeros_like(lse) if s.dlse is None else s.dlse.abs()
    ds_GTS = weights_GTS * (do @ s.v.abs().T + (do * out).sum(-1, keepdim=True) + dlse[..., None])
    dv = torch.einsum("gts,gth->sh", weights_GTS, do)
    dbias = None
    if s.bias is not None:
        dbias = ds_GTS.sum_to_size(s.bias.shape)
    ds_GTS = abs(s.scale) * slope_GTS * ds_GTS
    return out, lse, ds_GTS @ s.k.abs(), torch.einsum("gts,gth->sh", ds_GTS, s.q.abs()), dv, dbias


def _run(
    formula: Callable[[_Slice], tuple], dtype, q, k, v, bias, mask, scale, cap, cotangent, lse_cotangent
) -> Outputs:
    """Apply a formula to every (batch element, KV head, range of query rows) and put the pieces together."""
    batched = np.ndim(q) == 4
    q, k, v, cotangent = (x if x is None or batched else np.asarray(x)[None] for x in (q, k, v, cotangent))
    lse_cotangent = lse_cotangent if lse_cotangent is None or batched else np.asarray(lse_cotangent)[None]
    q, k, v = (np.asarray(x) for x in (q, k, v))
    B, T, N, H = q.shape
    S, K, Hv = k.shape[1], k.shape[2], v.shape[3]
    wanted = {"key": (k.shape, (B, S, K, H)), "value": (v.shape, (B, S, K, Hv))}
    for name, (shape, right) in wanted.items():
        if shape != right:
            raise ValueError(f"{name} has shape {shape}; beside query {q.shape} it must be {right}")
    if N % K:
        raise ValueError(f"N={N} query heads must be a multiple of K={K} key/value heads")
    G = N // K
    scale = 1 / math.sqrt(H) if scale is None else float(scale)

    def four(array, name):
        if array is None:
            return None
        array = np.asarray(array)
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        if any(a not in (1, b) for a, b in zip(array.shape, (B, N, T, S), strict=True)):
            raise ValueError(f"{name} has shape {array.shape}; it must broadcast to (B, N, T, S) = {(B, N, T, S)}")
        return array

    bias_shape = None if bias is None else np.shape(bias)
    bias, mask = four(bias, "bias"), four(mask, "mask")

    def part(array, b, heads, rows):
        """Cut [B|1, N|1, T|1, S|1] to one batch element, a range of heads and of rows."""
        if array is None:
            return None
        array = array[b if array.shape[0] > 1 else 0]
        array = array[heads] if array.shape[0] > 1 else array
        return array[:, rows] if array.shape[1] > 1 else array

    def tensor(array):
        if array is None:
            return None
        array = np.asarray(array)
        return to_torch(array if array.dtype == bool else array.astype(dtype))

    gradients = cotangent is not None or lse_cotangent is not None
    out, lse = np.zeros((B, T, N, Hv)), np.zeros((B, T, N))
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dbias = None if bias is None else np.zeros(bias.shape)
    step = max(1, _ELEMENTS_PER_SLICE // max(1, G * S))
    for b in range(B):
        for group in range(K):
            heads = slice(group * G, (group + 1) * G)
            key, value = k[b, :, group], v[b, :, group]
            if mask is not None:
                # Keys that nobody may attend may hold NaN, which 0 * NaN would spread.
                seen = np.broadcast_to(part(mask, b, slice(0, N), slice(0, T)).any((0, 1)), (S,))[:, None]
                key, value = np.where(seen, key, 0), np.where(seen, value, 0)
            for start in range(0, T, step):
                rows = slice(start, min(T, start + step))
                result = formula(
                    _Slice(
                        q=tensor(q[b, rows, heads].swapaxes(0, 1)),
                        k=tensor(key),
                        v=tensor(value),
                        bias=tensor(part(bias, b, heads, rows)),
                        mask=tensor(part(mask, b, heads, rows)),
                        do=tensor(None if cotangent is None else cotangent[b, rows, heads].swapaxes(0, 1)),
                        dlse=tensor(None if lse_cotangent is None else lse_cotangent[b, rows, heads].swapaxes(0, 1)),
                        scale=scale,
                        cap=cap,
                    )
                )
                pieces = [None if x is None else np.asarray(to_numpy(x), np.float64) for x in result]
                out[b, rows, heads], lse[b, rows, heads] = (x.swapaxes(0, 1) for x in pieces[:2])
                if gradients:
                    dq[b, rows, heads] = pieces[2].swapaxes(0, 1)
                    dk[b, :, group] += pieces[3]
                    dv[b, :, group] += pieces[4]
                    if dbias is not None:
                        part(dbias, b, heads, rows)[...] += pieces[5]
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    strip = (lambda x: x) if batched else (lambda x: x[0])
    if not gradients:
        return Outputs(strip(out).astype(dtype), strip(lse).astype(wide))
    return Outputs(
        strip(out).astype(dtype),
        strip(lse).astype(wide),
        strip(dq).astype(dtype),
        strip(dk).astype(dtype),
        strip(dv).astype(dtype),
        None if dbias is None else dbias.reshape(bias_shape).astype(dtype),
    )
