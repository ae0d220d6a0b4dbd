"""The mask algebra: what may be attended, as data.

A mask is a small frozen dataclass with one formula, `allows(t, s)`: may query t attend key s? Masks combine with
`&`, `|`, `~` and move with `shift`. Python numbers in them are static (equal masks share one compilation), arrays are
pytree leaves (traced, and free to differ per batch element). The same formula serves every implementation: index
arrays may be NumPy's, JAX's, or a kernel's own, and arrays that a mask holds are read through `take`, which a kernel
replaces by its own loads.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EMPTY, PARTIAL, FULL = 0, 1, 2
_LARGEST = 2**30  # of a number in a mask: indices are int32, and their sum with it must be one too


class Span(NamedTuple):
    """Half-open index ranges [start, stop), one per tile row or column; none is longer than `size`."""

    start: Any
    stop: Any
    size: int


def gather(array, t=None, s=None):
    """Reads a mask's array at query indices t and key indices s.

    Args:
      array: shape [*lead, *indexed]; `lead` is (), [B] or [B, N], `indexed` one axis for each of t, s that is given.
      t, s: integer arrays broadcastable to [B, N, T, S]; indices outside the array are clipped.

    Returns:
      The entries, broadcastable to [B, N, T, S].
    """
    indices = [i for i in (t, s) if i is not None]
    lead = array.ndim - len(indices)
    if not indices:
        return array.reshape(array.shape + (1,) * (4 - lead)) if lead else array
    xp = _module(array, *indices)
    clipped = [xp.clip(i, 0, n - 1) for i, n in zip(indices, array.shape[lead:], strict=True)]
    if (t is None or t.shape[1:] == (1,)) and (s is None or s.shape[:-1] == (1,)):  # [T, 1] and [1, S]
        # An axis at a time leaves the leading ones as they are: on the devices that hold them.
        for axis, i in zip(range(-len(indices), 0), clipped, strict=True):
            array = xp.take(array, i.ravel(), axis=axis)
        if len(indices) == 1:
            array = xp.expand_dims(array, -1 if s is None else -2)
        return array.reshape(*array.shape[:lead], *(1,) * (2 - lead), *array.shape[-2:]) if lead else array
    leading = [
        xp.arange(n).reshape((1,) * axis + (n,) + (1,) * (3 - axis)) for axis, n in enumerate(array.shape[:lead])
    ]
    return array[tuple(leading + clipped)]


def _module(*arrays):
    """NumPy where every array is NumPy's, else jax.numpy."""
    return np if all(isinstance(x, (np.ndarray, np.generic)) for x in arrays) else jnp


def _indices(start: int, stop: int, S: int):
    return np.arange(start, stop, dtype=np.int32)[:, None], np.arange(S, dtype=np.int32)[None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """What may be attended. A subclass is a frozen dataclass (`eq=False`) that defines `allows`, and `tile` too where
    it can tell which tiles are empty or full; every implementation then computes it.

    Example:
      >>> from jaxattn import Causal, Window
      >>> print((Causal() & Window(1, None)).show(4, 4))
      #...
      ##..
      .##.
      ..##
    """

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_node(cls, _flatten, lambda aux, leaves: _unflatten(cls, aux, leaves))

    def allows(self, t, s, take: Callable = gather):
        """May query t attend key s? Boolean, broadcastable to [B, N, T, S].

        Args:
          t, s: integer arrays broadcastable to [B, N, T, S], usually [T, 1] and [1, S].
          take: how the arrays that the mask holds are read; see `gather`.
        """
        raise NotImplementedError

    def tile(self, t: Span, s: Span):
        """int8 codes, 0 empty, 1 partial, 2 full, of the tiles t x s, broadcastable to [B, N, q tiles, k tiles].

        NumPy where the spans and the mask's arrays are, so that the plan is known when tracing; else jnp. Exact for a
        single mask without arrays. Combinations take the minimum and maximum, which may call an empty or a full tile
        partial, never otherwise; combinations of masks that depend on t - s alone are exact too. A mask that does not
        say calls every tile partial.
        """
        return np.full((1, 1), PARTIAL, np.int8)

    def shift(self, offset) -> Mask:
        """The mask that treats query t as query t + offset: an int, or an int array of shape [] or [B]."""
        return Shifted(self, _number(offset, "offset"))

    def check(self, B: int, N: int, T: int | None, S: int) -> None:
        """Raises ValueError where an array of the mask does not fit [B, N, T, S]; T is None below a shift."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mask):
                value.check(B, N, *self._inner_lengths(T, S))
            elif isinstance(value, (np.ndarray, jax.Array)):
                fitting = self._fitting_shape(field.name, value.ndim, {"B": B, "N": N, "T": T, "S": S})
                if any(n not in sizes for n, (_, sizes) in zip(value.shape, fitting, strict=True)):
                    wanted = ", ".join(f"{letter}={sizes[-1]}" for letter, sizes in fitting)
                    raise ValueError(
                        f"{type(self).__name__} {field.name} has shape {list(value.shape)}, but must fit [{wanted}]"
                    )

    def _inner_lengths(self, T: int | None, S: int) -> tuple[int | None, int]:
        """The numbers of queries and keys that a mask inside this one sees."""
        return T, S

    def _fitting_shape(self, field: str, ndim: int, size: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
        """For each axis of an array field, its letter and the lengths it may have; numbers are [] or [B]."""
        return [("B", (size["B"],))][:ndim]

    def axes(self):
        """The mask's pytree with a string for each array, one letter an axis: b batch, n query heads, `.` others."""
        values, (names, static) = _flatten(self)
        letters = []
        for name, value in zip(names, values, strict=True):
            if isinstance(value, Mask):
                letters.append(value.axes())
            else:
                fitting = self._fitting_shape(name, value.ndim, dict.fromkeys("BNTS"))
                letters.append("".join({"B": "b", "N": "n"}.get(letter, ".") for letter, _ in fitting))
        return _unflatten(type(self), (names, static), letters)

    @property
    def is_static(self) -> bool:
        """Whether the mask holds no arrays, so that it hashes by value and its tiles are known when tracing."""
        return not jax.tree_util.tree_leaves(self)

    def to_array(self, T: int, S: int):
        """The mask as a boolean array [T, S], or [B, N, T, S] where its arrays differ per batch element or head."""
        allowed = self.allows(*_indices(0, T, S))
        return _module(allowed).broadcast_to(allowed, np.broadcast_shapes(allowed.shape, (T, S)))

    def show(self, T: int, S: int) -> str:
        """The mask drawn as text, one line per query, `#` where it may attend; the first batch element and head."""
        allowed = np.asarray(self.to_array(T, S))
        allowed = allowed.reshape(-1, T, S)[0]
        return "\n".join("".join("#" if x else "." for x in row) for row in allowed)

    def stats(self, T: int, S: int, block: int | tuple[int, int] = 128) -> dict[str, Any]:
        """Counts of tiles and of allowed pairs for block (or (block_q, block_k)) tiles.

        Returns:
          A dict: `empty`, `partial`, `full` (tiles), `density` (allowed pairs / pairs), `visited` (share of tiles),
          `flops_saved` (1 - visited, the share of matrix-product work that skipping empty tiles saves).
        """
        from jaxattn.tiles import tile_codes

        block_q, block_k = (block, block) if isinstance(block, int) else block
        codes = np.asarray(tile_codes(self, T, S, block_q, block_k))
        empty, partial, full = (int((codes == code).sum()) for code in (EMPTY, PARTIAL, FULL))
        visited = (partial + full) / codes.size
        allowed = 0.0
        for start in range(0, T, 1024):  # the whole array may not fit
            stop = min(start + 1024, T)
            allowed += float(np.mean(self.allows(*_indices(start, stop, S)))) * (stop - start)
        return {
            "empty": empty,
            "partial": partial,
            "full": full,
            "density": allowed / T,
            "visited": visited,
            "flops_saved": 1 - visited,
        }

    def __and__(self, other: Mask) -> Mask:
        return And(self, _mask(other))

    def __or__(self, other: Mask) -> Mask:
        return Or(self, _mask(other))

    def __invert__(self) -> Mask:
        return Not(self)

    __array_ufunc__ = None  # array & mask is an error here, not an array of objects

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; combine masks with & | ~ instead of and, or, not")

    def __eq__(self, other) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or not (self.is_static and other.is_static):
            return False
        return _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((type(self), _values(self))) if self.is_static else id(self)


def _mask(value) -> Mask:
    if not isinstance(value, Mask):
        raise TypeError(f"a mask combines with a mask, not with {type(value).__name__}; wrap a boolean array in Dense")
    return value


def _values(mask: Mask) -> tuple:
    return tuple(getattr(mask, f.name) for f in dataclasses.fields(mask))


def _flatten(mask: Mask):
    fields = [f.name for f in dataclasses.fields(mask)]
    children = getattr(mask, "_children", None)  # while JAX transforms the tree, values tell nothing
    if children is None:
        children = tuple(f for f in fields if isinstance(getattr(mask, f), (Mask, np.ndarray, jax.Array)))
    static = tuple((f, getattr(mask, f)) for f in fields if f not in children)
    return [getattr(mask, f) for f in children], (children, static)


def _unflatten(cls, aux, values):
    children, static = aux
    mask = object.__new__(cls)
    for name, value in (*static, *zip(children, values, strict=True), ("_children", children)):
        object.__setattr__(mask, name, value)
    return mask


def _number(value, name: str):
    """An int stays static, an integer array of shape [] or [B] is a leaf; anything else is an error."""
    if isinstance(value, (np.ndarray, jax.Array)):
        if value.ndim > 1 or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} must be an int or an integer array of shape [] or [B], got {value.dtype}{list(value.shape)}"
            )
        return value
    try:
        return integer(value, name)
    except ValueError as error:
        raise ValueError(f"{error}, or an integer array of shape [] or [B]") from None


def integer(value, name: str, least: int = -_LARGEST) -> int:
    """The value as an int; ValueError with its name where it is none from `least` to 2**30."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= _LARGEST:
        at_least = "-2**30" if least == -_LARGEST else least
        raise ValueError(f"{name}={value!r} must be an int from {at_least} to 2**30")
    return number


def _read(value, take):
    return take(value) if isinstance(value, (np.ndarray, jax.Array)) or hasattr(value, "ndim") else value


def _code(some, every):
    return some.astype(np.int8) + every.astype(np.int8)


def _broadcast_true(t, s):
    return (t == t) & (s == s)


@dataclasses.dataclass(frozen=True, eq=False)
class Full(Mask):
    """Everything: true."""

    def allows(self, t, s, take=gather):
        return _broadcast_true(t, s)

    def tile(self, t, s):
        every = _broadcast_true(t.start, s.start)
        return _code(every, every)


@dataclasses.dataclass(frozen=True, eq=False)
class Causal(Mask):
    """s <= t + offset. With offset = S - T the last query sees the last key (bottom-right alignment).

    Args:
      offset: an int, or an int array of shape [] or [B] (decoding: the number of keys already in the cache).

    Example:
      >>> print(Causal(offset=2).show(2, 4))
      ###.
      ####
    """

    offset: Any = 0

    def __post_init__(self):
        object.__setattr__(self, "offset", _number(self.offset, "offset"))

    def allows(self, t, s, take=gather):
        return s <= t + _read(self.offset, take)

    def tile(self, t, s):
        offset = _read(self.offset, gather)
        return _code(s.start <= t.stop - 1 + offset, s.stop - 1 <= t.start + offset)


@dataclasses.dataclass(frozen=True, eq=False)
class Window(Mask):
    """t - left <= s <= t + right, both ends included; None leaves that side open.

    Args:
      left, right: an int, or an int array of shape [] or [B].

    Source: Beltagy et al., Longformer (2020), section 3.1, sliding window.

    Example:
      >>> print(Window(1, 0).show(3, 3))
      #..
      ##.
      .##
    """

    left: Any
    right: Any

    def __post_init__(self):
        for name in ("left", "right"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _number(value, f"Window {name}"))

    def allows(self, t, s, take=gather):
        allowed = _broadcast_true(t, s)
        if self.left is not None:
            allowed = allowed & (s >= t - _read(self.left, take))
        if self.right is not None:
            allowed = allowed & (s <= t + _read(self.right, take))
        return allowed

    def tile(self, t, s):
        left, right = (None if x is None else _read(x, gather) for x in (self.left, self.right))
        some = every = _broadcast_true(t.start, s.start)
        if left is not None:
            some, every = some & (s.stop - 1 >= t.start - left), every & (s.start >= t.stop - 1 - left)
        if right is not None:
            some, every = some & (s.start <= t.stop - 1 + right), every & (s.stop - 1 <= t.start + right)
        if left is not None and right is not None:
            some = some & (right >= -left)  # else no key is on both sides
        return _code(some, every)


@dataclasses.dataclass(frozen=True, eq=False)
class Dilated(Mask):
    """(t - s) mod stride == 0.

    Source: Child et al., Sparse Transformers (2019), section 4.3, strided attention's second head.

    Example:
      >>> print(Dilated(2).show(3, 5))
      #.#.#
      .#.#.
      #.#.#
    """

    stride: int

    def __post_init__(self):
        object.__setattr__(self, "stride", integer(self.stride, "Dilated stride", least=1))

    def allows(self, t, s, take=gather):
        return (t - s) % self.stride == 0

    def tile(self, t, s):
        low, high = t.start - (s.stop - 1), t.stop - 1 - s.start  # t - s takes every value between
        some = high // self.stride * self.stride >= low
        return _code(some, some & ((low == high) | (self.stride == 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Global(Mask):
    """t in tokens or s in tokens: tokens that attend everything and that everything attends.

    Args:
      tokens: token positions, or an int n for the first n.

    Source: Beltagy et al., Longformer (2020), section 3.1, global attention.

    Example:
      >>> print(Global([1]).show(3, 3))
      .#.
      ###
      .#.
    """

    tokens: int | tuple[int, ...]

    def __post_init__(self):
        tokens = self.tokens
        if not hasattr(tokens, "__iter__"):
            tokens = range(integer(tokens, "Global tokens", least=0))
        object.__setattr__(self, "tokens", tuple(sorted({integer(x, "Global token", least=0) for x in tokens})))

    def _runs(self):
        cuts = [i for i in range(1, len(self.tokens)) if self.tokens[i] != self.tokens[i - 1] + 1]
        edges = zip([0, *cuts], [*cuts, len(self.tokens)], strict=True)
        return [(self.tokens[a], self.tokens[b - 1] + 1) for a, b in edges if b > a]

    def allows(self, t, s, take=gather):
        allowed = ~_broadcast_true(t, s)
        for start, stop in self._runs():
            allowed = allowed | ((t >= start) & (t < stop)) | ((s >= start) & (s < stop))
        return allowed

    def tile(self, t, s):
        xp = _module(t.start, s.start)
        tokens = np.asarray(self.tokens, np.int32)
        count = [xp.searchsorted(tokens, x.stop) - xp.searchsorted(tokens, x.start) for x in (t, s)]
        some = (count[0] > 0) | (count[1] > 0)
        return _code(some, (count[0] == t.stop - t.start) | (count[1] == s.stop - s.start))


@dataclasses.dataclass(frozen=True, eq=False)
class RandomBlocks(Mask):
    """s // block == hash(seed, t // block, r) mod num_blocks for some r < count: random blocks for each query block.

    The draw is a counter-based hash of (seed, query block, r), so any t, s can be asked without a table.

    Args:
      block: tokens a block.
      count: draws a query block (two may coincide).
      num_blocks: the number of key blocks, ceil(S / block).
      seed: an int.

    Source: Zaheer et al., Big Bird (2020), section 2, random attention; the hash is Wellons' lowbias32 (2018).

    Example:
      >>> print(RandomBlocks(block=2, count=1, num_blocks=3).show(4, 6))
      ##....
      ##....
      ##....
      ##....
    """

    block: int
    count: int
    num_blocks: int
    seed: int = 0

    def __post_init__(self):
        for name, least in (("block", 1), ("count", 0), ("num_blocks", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(getattr(self, name), f"RandomBlocks {name}", least))

    def _drawn(self, query_block, key_block):
        drawn = ~_broadcast_true(query_block, key_block)
        for r in range(self.count):
            x = query_block.astype(np.uint32) * np.uint32(0x9E3779B9) + np.uint32((self.seed * 0x85EBCA6B + r) % 2**32)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            x = x ^ (x >> np.uint32(16))
            drawn |= (x % np.uint32(self.num_blocks)).astype(key_block.dtype) == key_block
        return drawn

    def allows(self, t, s, take=gather):
        return self._drawn(t // self.block, s // self.block)

    def tile(self, t, s):
        if _module(t.start, s.start) is jnp or t.start.ndim > 2:
            return super().tile(t, s)
        (top, bottom), (left, right) = [(x.start // self.block, (x.stop - 1) // self.block + 1) for x in (t, s)]
        key_blocks = np.arange(right.max())[None, :]
        count = np.zeros(np.broadcast_shapes(top.shape, left.shape), np.int64)
        for row in range(len(top)):
            drawn = self._drawn(np.arange(top[row, 0], bottom[row, 0])[:, None], key_blocks).sum(0)
            before = np.concatenate([[0], np.cumsum(drawn)])
            count[row] = before[right[0]] - before[left[0]]
        return _code(count > 0, count == (bottom - top) * (right - left))


@dataclasses.dataclass(frozen=True, eq=False)
class SegmentIds(Mask):
    """query[t] == key[s]: attention stays inside a segment (packed documents).

    Args:
      query: integer array [T] or [B, T].
      key: integer array [S] or [B, S]; the query's where it is absent (self-attention).

    Example:
      >>> print(SegmentIds([0, 0, 1]).show(3, 3))
      ##.
      ##.
      ..#
    """

    query: Any
    key: Any = None

    def __post_init__(self):
        for name in ("query", "key"):
            value = getattr(self, name)
            value = self.query if value is None else value
            value = value if isinstance(value, jax.Array) else np.asarray(value)
            if value.ndim not in (1, 2) or not jnp.issubdtype(value.dtype, jnp.integer):
                raise ValueError(
                    f"SegmentIds {name} must be an integer array of shape [length] or [B, length], "
                    f"got {value.dtype}{list(value.shape)}"
                )
            object.__setattr__(self, name, value)

    def _fitting_shape(self, field, ndim, size):
        letter = "T" if field == "query" else "S"
        length = _any_length if size[letter] is None else (size[letter],)
        return [("B", (1, size["B"])), (letter, length)][-ndim:]

    def allows(self, t, s, take=gather):
        inside = _inside(t, self.query.shape[-1]) & _inside(s, self.key.shape[-1])
        return (take(self.query, t=t) == take(self.key, s=s)) & inside

    def tile(self, t, s):
        if max(t.start.ndim, s.start.ndim) > 2:  # shifted by an array: a bound, not a verdict
            return super().tile(t, s)
        q_low, q_high = _range_of(self.query, t)
        k_low, k_high = _range_of(self.key, s)
        (q_low, q_high), (k_low, k_high) = (
            [x[..., None, :, None] for x in (q_low, q_high)],
            [x[..., None, None, :] for x in (k_low, k_high)],
        )
        inside = [(x.start >= 0) & (x.stop <= n.shape[-1]) for x, n in ((t, self.query), (s, self.key))]
        same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
        return _code((q_low <= k_high) & (k_low <= q_high), same & inside[0] & inside[1])


class _AnyLength:
    def __contains__(self, length) -> bool:
        return True

    def __getitem__(self, index) -> str:
        return "any"


_any_length = _AnyLength()


def _inside(index, length: int):
    return (index >= 0) & (index < length)


def _range_of(ids, span: Span):
    """Smallest and largest id in each range of `span` (one axis of tiles, whichever of its two it is on)."""
    xp = _module(ids, span.start)
    start, stop = xp.ravel(span.start), xp.ravel(span.stop)
    index = xp.minimum(start[:, None] + np.arange(span.size), stop[:, None] - 1)
    values = xp.take(ids, xp.clip(index, 0, ids.shape[-1] - 1), axis=-1)
    return values.min(-1), values.max(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths(Mask):
    """t < query and s < key: padding at the end. None leaves that side open.

    Args:
      query, key: an int, or an int array of shape [] or [B].

    Example:
      >>> print(Lengths(query=2, key=1).show(3, 3))
      #..
      #..
      ...
    """

    query: Any = None
    key: Any = None

    def __post_init__(self):
        for name in ("query", "key"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _number(value, f"Lengths {name}"))

    def allows(self, t, s, take=gather):
        allowed = _broadcast_true(t, s)
        if self.query is not None:
            allowed = allowed & (t < _read(self.query, take))
        if self.key is not None:
            allowed = allowed & (s < _read(self.key, take))
        return allowed

    def tile(self, t, s):
        some = every = _broadcast_true(t.start, s.start)
        for span, length in ((t, self.query), (s, self.key)):
            if length is not None:
                length = _read(length, gather)
                some, every = some & (span.start < length), every & (span.stop <= length)
        return _code(some, every)


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mask):
    """array[..., t, s]: any boolean array of 2 to 4 dimensions that broadcasts to [B, N, T, S].

    Example:
      >>> print(Dense([[True, False]]).show(2, 2))
      #.
      #.
    """

    array: Any

    def __post_init__(self):
        array = self.array if isinstance(self.array, jax.Array) else np.asarray(self.array)
        if array.dtype != bool or not 2 <= array.ndim <= 4:
            raise ValueError(
                f"Dense array must be boolean with 2 to 4 dimensions that broadcast to [B, N, T, S], "
                f"got {array.dtype}{list(array.shape)}"
            )
        if array.ndim == 3:  # [N, T, S], as NumPy broadcasts it
            array = array[None]
        object.__setattr__(self, "array", array)

    def _fitting_shape(self, field, ndim, size):
        return [(x, _any_length if size[x] is None else (1, size[x])) for x in "BNTS"][-ndim:]

    def allows(self, t, s, take=gather):
        T, S = self.array.shape[-2:]
        allowed = take(self.array, t=t, s=s)
        for index, length in ((t, T), (s, S)):
            if length > 1:  # an axis of length 1 is broadcast
                allowed = allowed & (_inside(index, length))
        return allowed

    def tile(self, t, s):
        if not (_is_grid(t, self.array.shape[-2]) and _is_grid(s, self.array.shape[-1])):  # shifted
            return super().tile(t, s)
        sizes = [1 if n == 1 else span.size for n, span in zip(self.array.shape[-2:], (t, s), strict=True)]
        some, every = (_reduce_blocks(self.array, sizes, reduce) for reduce in ("any", "all"))
        return _code(some, every)


def _is_grid(span: Span, length: int) -> bool:
    """Whether the span is the blocks of [0, length), or the axis has length 1 and is broadcast."""
    if length == 1:
        return True
    if not isinstance(span.start, np.ndarray):
        return False
    return np.array_equal(np.ravel(span.start), np.arange(0, length, span.size)) and np.max(span.stop) == length


def _reduce_blocks(array, sizes, reduce: str):
    """`any` or `all` of each block of the last two axes; the last ones may be cut. Nothing is padded or copied."""
    if isinstance(array, np.ndarray):
        ufunc = {"any": np.logical_or, "all": np.logical_and}[reduce]
        for axis, size in zip((-2, -1), sizes, strict=True):
            array = ufunc.reduceat(array, np.arange(0, array.shape[axis], size), axis)
        return array
    start, combine = {"any": (False, lax.max), "all": (True, lax.min)}[reduce]
    window = (1,) * (array.ndim - 2) + tuple(sizes)
    cut = [(0, -n % size) for n, size in zip(array.shape[-2:], sizes, strict=True)]
    return lax.reduce_window(array, start, combine, window, window, [(0, 0)] * (array.ndim - 2) + cut)


@dataclasses.dataclass(frozen=True, eq=False)
class Shifted(Mask):
    """mask.allows(t + offset, s): what `mask.shift(offset)` makes."""

    mask: Mask
    offset: Any

    def _inner_lengths(self, T, S):
        return None, S

    def allows(self, t, s, take=gather):
        return self.mask.allows(t + _read(self.offset, take), s, take)

    def tile(self, t, s):
        offset = _read(self.offset, gather)
        return self.mask.tile(Span(t.start + offset, t.stop + offset, t.size), s)


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """mask.allows(t // size, s // size): the mask on blocks of tokens instead of tokens.

    Args:
      mask: what blocks may attend: `Window(0, 0)` keeps attention inside a block, `Causal()` is block-causal.
      size: tokens a block.

    Source: Zaheer et al., Big Bird (2020), appendix D, blocked attention.

    Example:
      >>> print(Blocks(Causal(), 2).show(4, 4))
      ##..
      ##..
      ####
      ####
    """

    mask: Mask
    size: int

    def __post_init__(self):
        _mask(self.mask)
        object.__setattr__(self, "size", integer(self.size, "Blocks size", least=1))

    def _inner_lengths(self, T, S):
        return None if T is None else -(-T // self.size), -(-S // self.size)

    def allows(self, t, s, take=gather):
        return self.mask.allows(t // self.size, s // self.size, take)

    def tile(self, t, s):
        blocks = [Span(x.start // self.size, (x.stop - 1) // self.size + 1, x.size // self.size + 2) for x in (t, s)]
        return self.mask.tile(*blocks)


class _Combination(Mask):
    """Two masks; tiles of combinations that depend on t - s alone are exact, others bounds."""

    def tile(self, t, s):
        if _depends_on_difference(self) and _module(t.start, s.start) is np:
            return _difference_tile(self, t, s)
        return self._bound(t, s)


@dataclasses.dataclass(frozen=True, eq=False)
class And(_Combination):
    """a and b."""

    a: Mask
    b: Mask

    def allows(self, t, s, take=gather):
        return self.a.allows(t, s, take) & self.b.allows(t, s, take)

    def _bound(self, t, s):
        a, b = self.a.tile(t, s), self.b.tile(t, s)
        return _module(a, b).minimum(a, b)


@dataclasses.dataclass(frozen=True, eq=False)
class Or(_Combination):
    """a or b."""

    a: Mask
    b: Mask

    def allows(self, t, s, take=gather):
        return self.a.allows(t, s, take) | self.b.allows(t, s, take)

    def _bound(self, t, s):
        a, b = self.a.tile(t, s), self.b.tile(t, s)
        return _module(a, b).maximum(a, b)


@dataclasses.dataclass(frozen=True, eq=False)
class Not(Mask):
    """not mask."""

    mask: Mask

    def allows(self, t, s, take=gather):
        return ~self.mask.allows(t, s, take)

    def tile(self, t, s):
        return np.int8(FULL) - self.mask.tile(t, s)


def _depends_on_difference(mask: Mask) -> bool:
    if not mask.is_static:
        return False
    if isinstance(mask, (And, Or, Not, Shifted)):
        return all(_depends_on_difference(value) for value in _values(mask) if isinstance(value, Mask))
    return isinstance(mask, (Full, Causal, Window, Dilated))


def _difference_tile(mask: Mask, t: Span, s: Span):
    """Exact codes of a mask of t - s: a tile takes every difference of an interval, so one prefix sum decides."""
    low, high = t.start - (s.stop - 1), t.stop - 1 - s.start
    first = int(low.min())
    allowed = mask.allows(np.arange(first, int(high.max()) + 1), np.zeros(1, np.int64))
    before = np.concatenate([[0], np.cumsum(allowed)])
    count = before[high + 1 - first] - before[low - first]
    return _code(count > 0, count == high - low + 1)
