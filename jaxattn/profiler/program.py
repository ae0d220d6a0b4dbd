"""A traced program whose loops, branches and Pallas kernels carry labels that survive compilation.

Each such equation gets a scope `#<n>` in its name stack. Scopes change no computation, and XLA hands them
on as `op_name`, so an instruction of the compiled module is joined to the equation that asked for it.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxattn.profiler.targets import Target

_LOOPS = ("while", "scan")
KERNELS = ("pallas_call", "mpmd_map")  # the second is what Mosaic GPU's `kernel` makes
_JAXPRS = (core.ClosedJaxpr, core.Jaxpr)
_LABEL = re.compile(r"#(\d+)(?=[/)]|$)")


@dataclasses.dataclass(frozen=True)
class Site:
    """A labelled equation; `in_loop` says that it may run more than once."""

    label: int
    kind: str
    equation: Any
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """`fn` traced on its arguments, flat: one array per input of `jaxpr`, None where only its shape is known."""

    name: str
    jaxpr: core.ClosedJaxpr
    sites: dict[int, Site]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]

    def lower_here(self) -> jax.stages.Lowered:
        """Lowered for the default device; where that is no GPU, Pallas kernels as opaque calls."""
        native = jax.default_backend() in ("gpu", "cuda")
        return self._jitted(_compiled_kernel if native else _opaque_kernel).lower(*self._shapes())

    def lower_for_cuda(self, target: Target) -> jax.stages.Lowered:
        """Lowered for a GPU, without it; Triton kernels compiled, also those that ask to be interpreted."""
        with _as_if_on(target):
            traced = self._jitted(_kernel_for_absent_gpu).trace(*self._shapes())
            return traced.lower(lowering_platforms=("cuda",))

    def _shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in self.jaxpr.in_avals]

    def _jitted(self, kernel: Callable) -> Any:
        def change(equation, _, descend):
            if _kind(equation) in KERNELS:
                return kernel(equation)
            equation = descend(equation)
            return _unpartitioned(equation) if _kind(equation) == "custom_partitioning" else equation

        run = core.jaxpr_as_fun(rewrite(self.jaxpr, change))

        def fn(*flat):
            return run(*flat)

        fn.__name__ = self.name
        return jax.jit(fn, donate_argnums=self.donated)


def _as_if_on(target: Target | None):
    """Pallas asks the abstract mesh for the GPU's kind, where there is no GPU to ask (jax >= 0.11)."""
    if target is None:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(target.name, target.cores, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


def trace(fn: Callable, args: tuple, target: Target | None = None) -> Program:
    """Traces `fn` on arrays or shapes and labels what may run any number of times.

    Args:
        fn: a jittable function, jitted or not.
        args: pytrees of arrays or `jax.ShapeDtypeStruct`.
        target: the GPU that is not there, or None for the default device.

    Raises:
        ValueError: for an argument that is neither an array nor a `ShapeDtypeStruct`.
    """
    flat = jax.tree.leaves(args)
    for leaf in flat:
        if not isinstance(leaf, (jax.ShapeDtypeStruct, jax.Array, np.ndarray, np.generic, int, float, complex)):
            raise ValueError(f"argument {leaf!r} is neither an array nor a jax.ShapeDtypeStruct")
    with _as_if_on(target):
        traced = fn.trace(*args) if hasattr(fn, "trace") else None
        if not hasattr(traced, "jaxpr"):  # `nnx.jit`'s own stages do not show theirs
            traced = jax.jit(fn).trace(*args)
    if len(flat) != len(traced.jaxpr.in_avals):
        raise ValueError(
            f"fn takes {len(traced.jaxpr.in_avals)} arrays, {len(flat)} were given: "
            "bind static arguments with functools.partial"
        )
    donated = [leaf.donated for leaf in jax.tree.leaves(traced.args_info)]
    jaxpr, sites = _label(traced.jaxpr)
    return Program(
        name=getattr(fn, "__name__", "fn").strip("<>") or "fn",
        jaxpr=jaxpr,
        sites=sites,
        arguments=tuple(None if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in flat),
        donated=tuple(i for i, given in enumerate(donated) if given),
    )


def labels(op_name: str) -> list[int]:
    """The labels in an instruction's `op_name`, outermost first."""
    return [int(n) for n in _LABEL.findall(op_name)]


def without_labels(op_name: str) -> str:
    """`op_name` as it would be without the labels."""
    return re.sub(r"#\d+/|/?#\d+(?=\)|$)", "", op_name)


def label_of(equation) -> int | None:
    """The label of a labelled equation."""
    stack = equation.source_info.name_stack.stack
    name = getattr(stack[-1], "name", "") if stack else ""
    return int(name[1:]) if name.startswith("#") and name[1:].isdigit() else None


def _kind(equation) -> str:
    return equation.primitive.name


def inner_jaxprs(equation) -> list:
    """The jaxprs that an equation runs; of a Pallas kernel none, for that is not XLA's."""
    if _kind(equation) in KERNELS:
        return []
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, _JAXPRS):
                found.append(item)
    return found


def rewrite(jaxpr, change: Callable, in_loop: bool = False):
    """The same jaxpr with each equation replaced by `change(equation, in_loop, descend)`.

    `descend(equation)` gives the equation with the jaxprs inside it rewritten.
    """
    if getattr(jaxpr, "jaxpr", jaxpr) is not jaxpr:  # closed over constants, a class of its own before 0.12
        return jaxpr.replace(jaxpr=rewrite(jaxpr.jaxpr, change, in_loop))

    def descend(equation):
        if not inner_jaxprs(equation):
            return equation
        repeated = in_loop or _kind(equation) in _LOOPS

        def inside(value):
            if type(value) in (tuple, list):
                return type(value)(inside(v) for v in value)
            return rewrite(value, change, repeated) if isinstance(value, _JAXPRS) else value

        return equation.replace(params={k: inside(v) for k, v in equation.params.items()})

    return jaxpr.replace(eqns=[change(equation, in_loop, descend) for equation in jaxpr.eqns])


def _label(jaxpr: core.ClosedJaxpr) -> tuple[core.ClosedJaxpr, dict[int, Site]]:
    sites: dict[int, Site] = {}

    def change(equation, in_loop, descend):
        if _kind(equation) not in (*_LOOPS, "cond", *KERNELS):
            return descend(equation)
        label = len(sites)
        sites[label] = Site(label, _kind(equation), equation, in_loop)
        info = equation.source_info
        info = info.replace(name_stack=info.name_stack.extend(f"#{label}"))
        equation = descend(equation.replace(source_info=info))
        sites[label] = dataclasses.replace(sites[label], equation=equation)
        return equation

    return rewrite(jaxpr, change), sites


def is_triton(equation) -> bool:
    """Whether a kernel is meant for the Triton backend: its compiler parameters say so."""
    return "triton" in type(equation.params.get("compiler_params")).__module__


def _compiled_kernel(equation):
    """The kernel itself; without Triton's parameters, what asks to be interpreted may be no kernel of a GPU."""
    if not is_triton(equation):
        return _opaque_kernel(equation, for_gpu=True) if equation.params["interpret"] else equation
    return equation.replace(params={**equation.params, "interpret": False})


def _kernel_for_absent_gpu(equation):
    """Triton's kernels are compiled; Mosaic's compiler needs the GPU's own library, and its kernels stay opaque."""
    return _compiled_kernel(equation) if is_triton(equation) else _opaque_kernel(equation, for_gpu=True)


def _opaque_kernel(equation, for_gpu: bool = False):
    """A call of the same arguments and results that XLA cannot see into and that nobody ever runs."""
    results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.outvars]

    def call(*operands):
        if for_gpu:  # the callback's own handler, since the compiler wants one and `pure_callback` wants the GPU
            return jax.ffi.ffi_call("xla_ffi_python_gpu_callback", results)(*operands, index=np.uint64(0))
        return jax.pure_callback(_never_run, results, *operands)

    return _calling(call, equation)


def _unpartitioned(equation):
    """What there is to partition, on the one device that is profiled; to be asked for needs devices."""
    return _calling(core.jaxpr_as_fun(equation.params["call"]), equation)


def _calling(fn: Callable, equation):
    """An equation of the same inputs and outputs that calls `fn`."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in equation.invars]
    (call,) = jax.make_jaxpr(jax.jit(fn))(*shapes).eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info)


def _never_run(*_):
    raise RuntimeError("the profiler compiles this program; it does not run it")
