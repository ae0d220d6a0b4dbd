"""Planted faults: the mistakes of people who port attention, put into jaxattn's real code path, to be caught.

Design fact: every fault is a context manager that replaces something the code looks up when it runs (a
module's function, a class's method), clears jit's caches on the way in and out, and puts everything back.
Nothing is planted in a copy, so a parity run that passes with a fault in place has a hole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxattn import api, llama, masks, online_softmax, rope
from jaxattn.impl import base
from oracle import diff, parity
from oracle.attention import judge
from oracle.llama import STAGES, Case

LEAST_MARGIN = 10.0


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake that can be planted.

    name: also what `oracle.diff` should call it. plant: the context manager. applies: whether the mistake
    changes a subject at all; to tile the key/value heads of a layer with as many as query heads is right.
    implementations: those it is run with; what lies before attention is shared by all. raises: where the mistake
    must raise an error instead of differing, what that error must say.
    """

    name: str
    plant: Callable[[], contextlib.AbstractContextManager]
    implementations: tuple[str, ...] = ("naive",)
    applies: Callable[[parity.Subject], bool] = lambda subject: True
    raises: str = ""


@dataclasses.dataclass(frozen=True)
class Caught:
    """What parity said with a fault in place; margin is error / allowed error, infinite for NaN and where it
    raised as it must.

    subject: the name of the layer it was planted in. stage: the first stage that fails, "load" where it raised,
    None where none does. named: what `oracle.diff` calls the mistake, None where it has no name for it.
    """

    fault: Fault
    subject: str
    implementation: str
    margin: float
    stage: str | None
    named: str | None = None

    def __bool__(self) -> bool:
        return not self._reason

    @property
    def _reason(self) -> str:
        if not self.margin >= LEAST_MARGIN:
            return f"the margin must be at least {LEAST_MARGIN:g}"
        return "" if self.raised or self.named == self.fault.name else "diff must give it the fault's name"

    @property
    def raised(self) -> bool:
        return self.stage == "load"

    def __str__(self) -> str:
        margin = "raised" if self.raised else f"{self.margin:.3g}"
        return (
            f"{self.fault.name:<34} {self.subject:<22} {self.implementation:<14} {margin:>9} {self.stage or '-':<14} "
            f"{self.named or '-':<31} {'caught' if self else f'NOT CAUGHT: {self._reason}'}"
        )


_COLUMNS = ("planted fault", "subject", "implementation", "margin", "first stage", "diff says")
HEADER = "{:<34} {:<22} {:<14} {:>9} {:<14} {:<31} verdict".format(*_COLUMNS)


def catch(fault: Fault, subject: parity.Subject, case: Case, implementation: Any) -> Caught:
    """Run parity with the fault planted and say by how much it was caught, and how `diff` names it.

    Args: fault. subject, case: float32; a subject to which the fault applies. implementation: an object or
    name.
    Returns: `Caught`; its margin is the largest over the stages.
    Raises: RuntimeError where the fault left something behind, so that later results would be worth nothing.
    """
    label = implementation if isinstance(implementation, str) else implementation.name
    before = _patchable()
    with planted(fault):
        try:
            ours = parity.our_stages(subject, case, implementation)
        except ValueError as error:
            if not fault.raises or fault.raises not in str(error):
                raise
            ours = None
    if _patchable() != before:
        raise RuntimeError(f"the fault {fault.name!r} was not taken out again")
    if ours is None:
        return Caught(fault, subject.name, label, math.inf, "load")
    if fault.raises:
        return Caught(fault, subject.name, label, 0.0, None)
    verdicts = {stage: judge(stage, ours[stage], case.targets[stage]) for stage in STAGES}
    margin = max(_margin(verdict.rmse, verdict.bound) for verdict in verdicts.values())
    first = next((stage for stage, verdict in verdicts.items() if not verdict), None)
    named = diff.diagnose(case, ours, theta=subject.config.rope.theta).cause
    return Caught(fault, subject.name, label, margin, first, named)


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The fault in place, and compiled programs from before and after thrown away."""
    jax.clear_caches()
    try:
        with fault.plant():
            yield
    finally:
        jax.clear_caches()


def _margin(rmse: float, bound: float) -> float:
    return math.inf if math.isnan(rmse) or math.isinf(rmse) else rmse / bound


def _patchable() -> tuple:
    return (
        api._choose,
        api._check,
        llama.load_attention,
        masks.Causal.allows,
        masks.Causal.tile,
        online_softmax.rescale,
        rope.frequencies,
        rope._llama3,
        rope._split_pairs,
        rope._join_pairs,
    )


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def tiled_kv_heads():
    """Query head n reads key/value head n % K instead of n // G."""
    choose = api._choose

    @dataclasses.dataclass(frozen=True)
    class Tiled(base.Implementation):
        inner: base.Implementation

        def attend(self, problem):
            _, _, _, N, K, G = problem.sizes
            # Ours gives head i the KV head i // G; the mistaken head n = g * K + k stands at i = k * G + g.
            order = np.arange(N).reshape(G, K).T.ravel()
            out, lse = self.inner.attend(dataclasses.replace(problem, query=problem.query[:, :, order]))
            return out[:, :, np.argsort(order)], lse[:, :, np.argsort(order)]

    return _replaced(api, "_choose", lambda implementation, problem: Tiled(choose(implementation, problem)))


def accumulator_not_rescaled():
    """The accumulator keeps what it gathered under an old maximum."""
    return _replaced(online_softmax, "rescale", lambda accumulator, factor: accumulator)


def no_llama3_scaling():
    """The frequencies of Llama 3's rule are those without it."""
    return _replaced(rope, "_llama3", lambda inv_freq, scaling: inv_freq)


@contextlib.contextmanager
def swapped_rope_layout() -> Iterator[None]:
    """Interleaved pairs are rotated where half-split ones should be, and the other way round."""
    split, join = rope._split_pairs, rope._join_pairs
    other = {"half": "interleaved", "interleaved": "half"}
    with (
        _replaced(rope, "_split_pairs", lambda x, layout: split(x, other[layout])),
        _replaced(rope, "_join_pairs", lambda a, b, layout: join(a, b, other[layout])),
    ):
        yield


def whole_head_rotated():
    """All of each head is rotated where only a part should be."""
    frequencies = rope.frequencies

    def whole(config, length=None):
        return frequencies(dataclasses.replace(config, rotary_dim=config.head_dim), length)

    return _replaced(rope, "frequencies", whole)


@contextlib.contextmanager
def mask_off_by_one() -> Iterator[None]:
    """The causal mask lets every query see the next key too."""
    allows, tile = masks.Causal.allows, masks.Causal.tile

    def one_more(causal):
        return masks.Causal(causal.offset + 1)

    with (
        _replaced(masks.Causal, "allows", lambda self, t, s, take=masks.gather: allows(one_more(self), t, s, take)),
        _replaced(masks.Causal, "tile", lambda self, t, s: tile(one_more(self), t, s)),
    ):
        yield


def wrong_scale():
    """Logits are divided by H instead of its root."""
    check = api._check

    def checked(*args):
        problem, batched = check(*args)
        return dataclasses.replace(problem, scale=1.0 / problem.query.shape[-1]), batched

    return _replaced(api, "_check", checked)


def full_mha_shapes():
    """The configuration forgets that there are fewer key/value heads than query heads."""
    load = llama.load_attention

    def forgetful(config, *args, **options):
        return load(dataclasses.replace(config, n_kv_heads=config.n_heads), *args, **options)

    return _replaced(llama, "load_attention", forgetful)


def _shares_kv_heads(subject: parity.Subject) -> bool:
    return subject.config.n_kv_heads < subject.config.n_heads


def _several_tokens(subject: parity.Subject) -> bool:
    """The first token sees itself alone, and from position 0 it is not rotated."""
    return subject.x.shape[1] > 1


FAULTS = (
    Fault(
        "KV heads tiled, not repeated",
        tiled_kv_heads,
        implementations=("naive", "blockwise"),
        applies=lambda subject: _shares_kv_heads(subject) and subject.config.n_kv_heads > 1,
    ),
    Fault(
        "accumulator not rescaled",
        accumulator_not_rescaled,
        implementations=("blockwise",),
        applies=lambda subject: subject.x.shape[1] > parity.BLOCK,  # with one block of keys nothing is rescaled
    ),
    Fault(
        "no RoPE scaling",
        no_llama3_scaling,
        applies=lambda subject: isinstance(subject.config.rope.scaling, rope.Llama3) and _several_tokens(subject),
    ),
    Fault(
        "RoPE layout swapped",
        swapped_rope_layout,
        applies=lambda subject: subject.config.rope.rotary_dim > 2 and _several_tokens(subject),
    ),
    Fault(
        "whole head rotated, not a part",
        whole_head_rotated,
        applies=lambda subject: subject.config.rope.rotary_dim < subject.config.head_dim and _several_tokens(subject),
    ),
    Fault(
        "mask off by one",
        mask_off_by_one,
        implementations=("naive", "blockwise"),
        applies=_several_tokens,
    ),
    Fault("wrong scale", wrong_scale),
    Fault("full-MHA shapes", full_mha_shapes, applies=_shares_kv_heads, raises="misshaped: k_proj.weight"),
)
