"""How often loops and branches run, where the compiled module does not say.

The traced program is cut down to what its loop bounds and branch choices depend on, a counter is added to
each loop and branch, and that is run once. What depends on arguments of which only the shape is known is
not run: it stays unknown.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxattn.profiler import private_jax
from jaxattn.profiler.program import KERNELS, Program, inner_jaxprs, label_of

_CALLS = frozenset(["jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "remat2",
                    "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "custom_partitioning",
                    "custom_lin", "eval_jaxpr", "jaxattn_kernel_call"])  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of the counting run, by label.

    `loops`: (times entered, times the body ran). `branches`: times each branch ran. `operands`: values that
    a Pallas kernel's control flow reads, by operand number. What is in none of them is unknown: for the labels in
    `missing` since they depend on values that were not given.
    """

    loops: dict[int, tuple[int, int]]
    branches: dict[int, tuple[int, ...]]
    operands: dict[int, dict[int, np.ndarray]]
    missing: frozenset[int]
    was_run: bool


def measure(program: Program, wanted: Iterable[int], operands: dict[int, tuple[int, ...]]) -> Measured:
    """Runs the program's control flow once.

    Args:
        program: the traced program with the arguments that are known.
        wanted: labels of loops and conditionals.
        operands: label of a Pallas kernel -> numbers of the operands whose values are wanted.
    """
    known = [a is not None for a in program.arguments]
    jaxpr = program.jaxpr

    def needs_only_what_is_known(label, taps) -> bool:
        cut = Cut(frozenset([label]), taps)
        used = cut.inputs(jaxpr, [False] * len(jaxpr.outvars))
        return all(k or not u for k, u in zip(known, used, strict=True))

    wanted = frozenset(label for label in wanted if Cut(frozenset([label]), {}).reaches(jaxpr))
    labels = frozenset(label for label in wanted if needs_only_what_is_known(label, {}))
    taps = {
        label: numbers
        for label, numbers in operands.items()
        if numbers and not program.sites[label].in_loop and needs_only_what_is_known(label, {label: numbers})
    }
    if not labels and not taps:
        return Measured({}, {}, {}, wanted, was_run=False)
    cut = Cut(labels | frozenset(taps), taps)

    def count(*arguments):
        _, counters = cut.run(jaxpr, list(arguments), [False] * len(jaxpr.outvars), {})
        return counters

    used = cut.inputs(jaxpr, [False] * len(jaxpr.outvars))
    arguments = [a if u else None for a, u in zip(program.arguments, used, strict=True)]
    counters = jax.tree.map(np.asarray, jax.jit(count)(*arguments))
    loops, branches, values = {}, {}, {}
    for label, counter in counters.items():
        kind = program.sites[label].kind
        if kind in KERNELS:
            values[label] = dict(zip(taps[label], counter, strict=True))
        elif label in labels and kind == "cond":
            branches[label] = tuple(int(c) for c in counter)
        elif label in labels:
            loops[label] = (int(counter[0]), int(counter[1]))
    return Measured(loops, branches, values, wanted - labels, was_run=True)


def opened(jaxpr) -> core.Jaxpr:
    """The jaxpr inside one that is closed over constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _consts(jaxpr) -> list:
    return list(getattr(jaxpr, "consts", ()))


@dataclasses.dataclass(frozen=True)
class Cut:
    """A program reduced to its control flow.

    `labels` are the sites to count, `taps` the operands of Pallas kernels to hand out.
    """

    labels: frozenset[int]
    taps: dict[int, tuple[int, ...]]

    # --- what is needed: backwards

    def counts(self, equation) -> bool:
        """Whether a site to be counted is this equation or inside it."""
        return label_of(equation) in self.labels or any(self.reaches(j) for j in _followed(equation))

    def reaches(self, jaxpr) -> bool:
        """Whether a site to be counted lies where the run gets to."""
        return any(self.counts(equation) for equation in opened(jaxpr).eqns)

    def plan(self, jaxpr: core.Jaxpr, outputs: list[bool]) -> tuple[list, list[bool]]:
        """The equations to run, each with the outputs asked of it; and the inputs that they need."""
        live = {v for v, needed in zip(jaxpr.outvars, outputs, strict=True) if needed and is_var(v)}
        plan = []
        for equation in reversed(jaxpr.eqns):
            asked = [v in live for v in equation.outvars]
            if not any(asked) and not self.counts(equation):
                continue
            plan.append((equation, asked))
            used = self.equation_inputs(equation, asked)
            live |= {v for v, u in zip(equation.invars, used, strict=True) if u and is_var(v)}
        return plan[::-1], [v in live for v in jaxpr.invars]

    def inputs(self, jaxpr, outputs: list[bool]) -> list[bool]:
        """Which inputs are needed for these outputs and for the counts."""
        return self.plan(opened(jaxpr), outputs)[1]

    def equation_inputs(self, equation, asked: list[bool]) -> list[bool]:
        kind, params = equation.primitive.name, equation.params
        if kind == "while":
            used, conditions, bodies = self.while_inputs(equation, asked)
            return [*conditions, *bodies, *used]
        if kind == "scan":
            carry, consts, xs = self.scan_inputs(equation, asked)
            return [*consts, *carry, *xs]
        if kind == "cond":
            used = [self.inputs(b, asked) for b in params["branches"]]
            return [True, *(any(u) for u in zip(*used, strict=True))]
        if kind in KERNELS and label_of(equation) in self.taps and not any(asked):
            return [i in self.taps[label_of(equation)] for i in range(len(equation.invars))]
        inner = called(equation)
        if inner is not None:
            return self.inputs(inner, asked)
        return [True] * len(equation.invars)

    def while_inputs(self, equation, asked):
        """(carry, condition constants, body constants) that are needed: a fixed point."""
        n_cond, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        condition = self.inputs(equation.params["cond_jaxpr"], [True])
        carry = [a or c for a, c in zip(asked, condition[n_cond:], strict=True)]
        while True:
            body = self.inputs(equation.params["body_jaxpr"], carry)
            grown = [a or b for a, b in zip(carry, body[n_body:], strict=True)]
            if grown == carry:
                return carry, condition[:n_cond], body[:n_body]
            carry = grown

    def scan_inputs(self, equation, asked):
        """(carry, constants, xs) that are needed: a fixed point."""
        n_const, n_carry = private_jax.scan_arity(equation.params, len(equation.invars))
        carry, ys = asked[:n_carry], asked[n_carry:]
        while True:
            body = self.inputs(equation.params["jaxpr"], [*carry, *ys])
            grown = [a or b for a, b in zip(carry, body[n_const : n_const + n_carry], strict=True)]
            if grown == carry:
                return carry, body[:n_const], body[n_const + n_carry :]
            carry = grown

    # --- the run: forwards; a value that nobody needs is None

    def run(self, jaxpr, arguments: list, asked: list[bool], counters: dict) -> tuple[list, dict]:
        """Evaluates the plan; returns the outputs asked for, and the counters."""
        inner = opened(jaxpr)
        plan, _ = self.plan(inner, asked)
        values: dict[Any, Any] = dict(zip(inner.constvars, _consts(jaxpr), strict=True))
        values |= zip(inner.invars, arguments, strict=True)

        def read(v):
            return values.get(v) if is_var(v) else v.val

        for equation, wanted in plan:
            results, counters = self.run_equation(equation, [read(v) for v in equation.invars], wanted, counters)
            values |= zip(equation.outvars, results, strict=True)
        return [read(v) if a else None for v, a in zip(inner.outvars, asked, strict=True)], counters

    def run_equation(self, equation, arguments, asked, counters):
        kind = equation.primitive.name
        label = label_of(equation)
        if kind == "while":
            return self.run_while(equation, label, arguments, asked, counters)
        if kind == "scan":
            return self.run_scan(equation, label, arguments, asked, counters)
        if kind == "cond":
            return self.run_cond(equation, label, arguments, asked, counters)
        if kind in KERNELS:
            if label in self.taps:
                counters = {**counters, label: tuple(jnp.asarray(arguments[i]) for i in self.taps[label])}
            if not any(asked):
                return [None] * len(asked), counters
        if kind == "pallas_call":
            equation = equation.replace(params={**equation.params, "interpret": True})
        inner = called(equation)
        if inner is not None:
            return self.run(inner, arguments, asked, counters)
        results = equation.primitive.bind(*arguments, **equation.primitive.get_bind_params(equation.params))
        return (results if equation.primitive.multiple_results else [results]), counters

    def inner_counters(self, jaxprs, counters: dict) -> dict:
        """The counters with a zero for each site inside, since a loop's state has a fixed form."""
        out = dict(counters)
        for jaxpr in jaxprs:
            for equation in opened(jaxpr).eqns:
                label = label_of(equation)
                if label is not None and equation.primitive.name in ("while", "scan", "cond"):
                    size = len(equation.params["branches"]) if equation.primitive.name == "cond" else 2
                    out.setdefault(label, jnp.zeros(size, jnp.int32))
                out = self.inner_counters(_followed(equation), out)
        return out

    def run_while(self, equation, label, arguments, asked, counters):
        params = equation.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts = arguments[:n_cond], arguments[n_cond : n_cond + n_body]
        needed, _, _ = self.while_inputs(equation, asked)
        counters = self.inner_counters([params["cond_jaxpr"], params["body_jaxpr"]], counters)
        counters.setdefault(label, jnp.zeros(2, jnp.int32))
        counters[label] = counters[label].at[0].add(1)

        def go_on(carry, counters):
            inputs = [*cond_consts, *_spread(carry, needed)]
            (running,), counters = self.run(params["cond_jaxpr"], inputs, [True], counters)
            return jnp.asarray(running), counters

        def body(state):
            running, counters, carry = state
            counters = {**counters, label: counters[label].at[1].add(1)}
            inputs = [*body_consts, *_spread(carry, needed)]
            results, counters = self.run(params["body_jaxpr"], inputs, needed, counters)
            carry = [  # under vmap one truth value per element: the finished ones stand still
                jnp.where(running.reshape(running.shape + (1,) * (jnp.ndim(old) - running.ndim)), new, old)
                for new, old in zip(_keep(results, needed), carry, strict=True)
            ]
            return *go_on(carry, counters), carry

        start = _keep(arguments[n_cond + n_body :], needed)
        state = (*go_on(start, counters), start)
        _, counters, carry = lax.while_loop(lambda state: state[0].any(), body, state)
        return _spread(carry, needed), counters

    def run_scan(self, equation, label, arguments, asked, counters):
        params = equation.params
        n_const, n_carry = private_jax.scan_arity(params, len(equation.invars))
        consts, start, xs = arguments[:n_const], arguments[n_const : n_const + n_carry], arguments[n_const + n_carry :]
        needed, _, needed_xs = self.scan_inputs(equation, asked)
        asked_ys = asked[n_carry:]
        counters = self.inner_counters([params["jaxpr"]], counters)
        counters.setdefault(label, jnp.zeros(2, jnp.int32))
        counters[label] = counters[label] + jnp.array([1, params["length"]], jnp.int32)

        def body(state, x):
            counters, carry = state
            results, counters = self.run(
                params["jaxpr"],
                [*consts, *_spread(carry, needed), *_spread(x, needed_xs)],
                [*needed, *asked_ys],
                counters,
            )
            return (counters, _keep(results[:n_carry], needed)), _keep(results[n_carry:], asked_ys)

        (counters, carry), ys = lax.scan(
            body,
            (counters, _keep(start, needed)),
            _keep(xs, needed_xs),
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*_spread(carry, needed), *_spread(ys, asked_ys)], counters

    def run_cond(self, equation, label, arguments, asked, counters):
        branches = equation.params["branches"]
        index, *operands = arguments
        counters = self.inner_counters(branches, counters)
        counters.setdefault(label, jnp.zeros(len(branches), jnp.int32))
        index = lax.clamp(0, jnp.asarray(index, jnp.int32), len(branches) - 1)

        def branch(i):
            def run(counters):
                counters = {**counters, label: counters[label].at[i].add(1)}
                results, counters = self.run(branches[i], operands, asked, counters)
                return counters, _keep(results, asked)

            return run

        counters, results = lax.switch(index, [branch(i) for i in range(len(branches))], counters)
        return _spread(results, asked), counters


def is_var(atom) -> bool:
    """Whether an equation's input is a variable, not a literal."""
    return not isinstance(atom, core.Literal)


def called(equation):
    """The jaxpr that an equation merely calls, with its own inputs and outputs; None if it does more."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = [
        j
        for j in inner_jaxprs(equation)
        if len(opened(j).invars) == len(equation.invars) and len(opened(j).outvars) == len(equation.outvars)
    ]
    return inner[0] if inner else None


def _followed(equation) -> list:
    """The jaxprs inside an equation that the counting run goes through itself, not as one operation of JAX's."""
    kind, params = equation.primitive.name, equation.params
    if kind == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    if kind == "scan":
        return [params["jaxpr"]]
    if kind == "cond":
        return list(params["branches"])
    inner = called(equation)
    return [] if inner is None else [inner]


def _keep(values: Iterable, needed: list[bool]) -> list:
    return [v for v, n in zip(values, needed, strict=True) if n]


def _spread(values: Iterable, needed: list[bool]) -> list:
    rest = iter(values)
    return [next(rest) if n else None for n in needed]
