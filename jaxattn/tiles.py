"""The tile plan: which key tiles each block of queries visits, from the mask alone.

One plan serves every implementation, and a new mask needs no change in any of them. PARTIAL tiles come before FULL
ones: online softmax does not care about the order, and a compiled kernel overlaps its matrix products only when the
masked loop runs first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.masks import EMPTY, FULL, PARTIAL, Mask, Span


def tile_codes(mask: Mask, T: int, S: int, block_q: int, block_k: int):
    """int8 tile codes [B|1, N|1, ceil(T / block_q), ceil(S / block_k)]; NumPy where the mask's arrays are, else jnp."""
    start_q, start_k = [np.arange(0, n, block, dtype=np.int32) for n, block in ((T, block_q), (S, block_k))]
    t = Span(start_q[:, None], np.minimum(start_q + block_q, T)[:, None], block_q)
    s = Span(start_k[None, :], np.minimum(start_k + block_k, S)[None, :], block_k)
    codes = mask.tile(t, s)
    shape = (1,) * (4 - codes.ndim) + codes.shape[:-2] + (len(start_q), len(start_k))  # B may be symbolic
    return (np if isinstance(codes, np.ndarray) else jnp).broadcast_to(codes, shape)


def reads_every_key(mask: Mask, T: int, S: int) -> bool:
    """Whether it is known that some query attends each key: for a mask without arrays, seen on four lines of queries.

    The lines are t = s, t = s + T - S, the first query and the last. False says nothing.
    """
    if jax.tree.leaves(mask) or not T:
        return False
    s = np.arange(S, dtype=np.int32)[None, :]
    t = np.stack([s[0], s[0] + T - S, np.zeros_like(s[0]), np.full_like(s[0], T - 1)]).clip(0, T - 1)
    allowed = mask.allows(t, s)
    return bool(np.broadcast_to(allowed, np.broadcast_shapes(allowed.shape, t.shape)).any(-2).all())


@dataclasses.dataclass(frozen=True)
class Visits:
    """For each row of tiles, the columns of one kind (PARTIAL or FULL) in rising order.

    Attributes:
      count: int32 [B|1, K|1, rows].
      index: int32 [B|1, K|1, rows, most], the first `count` entries of a row are columns, the rest repeat the last.
      runs: None, or int32 [B|1, K|1, rows, R, 2], the same columns as R half-open ranges (some empty); only for
        masks without arrays, and only where R is at most 2. Kernels walk ranges faster than lists.
    """

    count: Any
    index: Any
    runs: Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """What each row of tiles visits: `partial` first, then `full`. `codes` are the group's, after clipping."""

    partial: Visits
    full: Visits
    codes: Any
    block_q: int
    block_k: int

    @property
    def visited(self) -> int:
        """The number of tiles visited, for a mask without arrays."""
        return int((self.codes != EMPTY).sum())

    def transpose(self) -> Plan:
        """The plan by key block: which query blocks each block of keys visits (for dk and dv)."""
        codes = self.codes.swapaxes(-1, -2)
        return Plan(_visits(codes, PARTIAL), _visits(codes, FULL), codes, self.block_q, self.block_k)


def plan(mask: Mask, T: int, S: int, block_q: int, block_k: int, num_groups: int | None = None) -> Plan:
    """The tiles that each block of queries visits.

    Args:
      mask: what may be attended.
      T, S: numbers of queries and keys.
      block_q, block_k: tile sizes in tokens. A FULL tile that S cuts counts as PARTIAL, for its keys past S must be
        cut; rows past T need not be, their results are dropped.
      num_groups: K. The G = N / K query heads of a group share one list, the union of theirs. None keeps heads.

    Returns:
      A Plan; NumPy where the mask holds no arrays, or only NumPy's; else jnp.
    """
    codes = tile_codes(mask, T, S, block_q, block_k)
    xp = np if isinstance(codes, np.ndarray) else jnp
    if num_groups is not None and codes.shape[1] > 1:
        grouped = codes.reshape(codes.shape[0], num_groups, -1, *codes.shape[2:])
        low, high = grouped.min(2), grouped.max(2)
        codes = xp.where(low == high, low, PARTIAL).astype(np.int8)
    if S % block_k:
        cut = xp.arange(codes.shape[-1]) == codes.shape[-1] - 1
        codes = xp.where(cut, xp.minimum(codes, PARTIAL), codes).astype(np.int8)
    return Plan(_visits(codes, PARTIAL), _visits(codes, FULL), codes, block_q, block_k)


def _visits(codes, kind: int) -> Visits:
    chosen = codes == kind
    xp = np if isinstance(codes, np.ndarray) else jnp
    count = chosen.sum(-1).astype(np.int32)
    most = max(int(count.max()), 1) if xp is np else codes.shape[-1]
    order = xp.argsort(~chosen, axis=-1, stable=True).astype(np.int32)[..., :most]
    slot = xp.minimum(xp.arange(most), xp.maximum(count[..., None] - 1, 0)).astype(np.int32)
    index = xp.take_along_axis(order, slot, axis=-1)
    return Visits(count, index, _runs(chosen) if xp is np else None)


def _runs(chosen: np.ndarray) -> np.ndarray | None:
    edge = np.diff(np.pad(chosen, [(0, 0)] * (chosen.ndim - 1) + [(1, 1)]).astype(np.int8), axis=-1)
    most = max(int((edge == 1).sum(-1).max()), 1)
    if most > 2:
        return None
    runs = np.zeros((*chosen.shape[:-1], most, 2), np.int32)
    for side, sign in enumerate((1, -1)):
        where = np.nonzero(edge == sign)
        rank = (np.cumsum(edge == sign, axis=-1) - 1)[where]
        runs[(*where[:-1], rank, side)] = where[-1]
    return runs
