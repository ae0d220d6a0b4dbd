"""Bytes that a Pallas kernel loads, stores and copies, from its own jaxpr and grid.

The kernel's index arithmetic is evaluated with NumPy for all grid points at once: a value is an array whose
leading axes are the grid's, of length 1 where it does not depend on them. Loops run as long as any grid point
is in them; what only the data flow needs is not evaluated at all.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxattn.profiler import private_jax
from jaxattn.profiler.program import inner_jaxprs, is_triton
from jaxattn.profiler.trips import Cut, called, is_var, opened

_LARGEST = 1 << 26  # elements of one evaluated value; larger masks are modelled as all true
_MEMORY = frozenset(["get", "swap", "addupdate", "masked_load", "masked_swap", "atomic_rmw", "atomic_cas", "load",
                     "copy_gmem_to_smem", "copy_smem_to_gmem"])  # fmt: skip
_IN_MEMORY = ("gmem", "hbm", "any", "host")  # memory spaces; the others are a core's own


@dataclasses.dataclass(frozen=True)
class Touch:
    """What one load or store in the kernel's code does at each grid point, in launch order.

    `start` and `stop` are bytes of the operand, laid out so that what one grid point touches lies together;
    `bytes` may be less than their distance, or more where it is read repeatedly.
    """

    operand: int
    is_write: bool
    bytes: np.ndarray
    start: np.ndarray
    stop: np.ndarray


@dataclasses.dataclass(frozen=True)
class KernelTraffic:
    """Bytes read and written by operand number; outputs are numbered after the inputs.

    `confidence` is `exact`, `modelled` (a mask that no index decides) or `unknown` (a loop whose bounds are
    data that was not given, or a use of memory that is not understood); `reasons` say what and where.
    """

    read: dict[int, int]
    written: dict[int, int]
    flops: int
    confidence: str
    reasons: tuple[str, ...]
    touches: tuple[Touch, ...]


class _Unknown(Exception):
    """What the kernel moves cannot be told."""


def body(equation) -> core.Jaxpr:
    """The code of a kernel."""
    params = equation.params
    return opened(params["jaxpr"] if "jaxpr" in params else params["jaxprs"][0])


def source(equation) -> str:
    """`file:line` that asked for the kernel; of one that JAX's own code asked for, the first line of its body."""
    inside = list(body(equation).eqns)
    line = private_jax.user_line(equation.source_info)
    while not line and inside:
        first = inside.pop(0)
        line = private_jax.user_line(first.source_info)
        inside = [e for j in inner_jaxprs(first) for e in opened(j).eqns] + inside
    return line


def control_operands(equation) -> tuple[int, ...]:
    """The inputs of a kernel whose values its loop bounds, branches, masks or indices depend on."""
    jaxpr, mapping = body(equation), equation.params.get("grid_mapping")
    used = [False] * len(jaxpr.invars)
    if mapping is None or not all(_is_on_chip(equation, block) for block in mapping.block_mappings):
        used = _KernelCut(frozenset(), {}).inputs(jaxpr, [False] * len(jaxpr.outvars))
    prefetched = 0 if mapping is None else mapping.num_index_operands
    return tuple(i for i in range(len(equation.invars)) if used[i] or i < prefetched)


def _is_on_chip(equation, block) -> bool:
    """Whether a pipeline brings an operand's blocks to the core; else the body works on the operand in memory."""
    space = str(getattr(block.transformed_block_aval, "memory_space", "")).lower().rpartition(".")[2]
    return not is_triton(equation) and space not in _IN_MEMORY


def traffic(equation, operands: dict[int, np.ndarray]) -> KernelTraffic:
    """What a kernel moves.

    With Triton's compiler parameters, what the body loads and stores; otherwise (Mosaic) the copies of its
    blocks, fetched again only where their index changes from one grid point to the next, and what the body itself
    copies, loads and stores of operands that stay in memory.

    Args:
        equation: the `pallas_call` or `mpmd_map` equation.
        operands: values of inputs, by number, where they are known.
    """
    return _Kernel(equation, operands).traffic()


@dataclasses.dataclass(frozen=True)
class _Launch:
    """How often a kernel's code runs: a grid, the axes that `program_id` numbers, and those that have names."""

    grid: tuple[int, ...]
    own_axes: tuple[int, ...]
    vmapped: tuple[int, ...] = ()
    names: dict[Any, int] = dataclasses.field(default_factory=dict)


def _launch(equation) -> _Launch:
    mapping = equation.params.get("grid_mapping")
    if mapping is not None:
        grid, vmapped = tuple(int(n) for n in mapping.grid), tuple(mapping.vmapped_dims)
        # vmap adds grid axes that the kernel itself does not number
        return _Launch(grid, tuple(i for i in range(len(grid)) if i not in vmapped), vmapped)
    meshes = equation.params["meshes"]
    if len(meshes) != 1 or not hasattr(meshes[0], "cluster"):
        raise _Unknown(f"a kernel over {', '.join(type(m).__name__ for m in meshes)} is not understood")
    (mesh,) = meshes
    threads = [] if mesh.thread_name is None else [(mesh.thread_name, mesh.num_threads)]
    axes = [
        *threads,
        *zip(mesh.cluster_names, mesh.cluster, strict=True),
        *zip(mesh.grid_names, mesh.grid, strict=True),
    ]
    return _Launch(
        tuple(int(n) for _, n in axes), tuple(range(len(axes))), names={name: i for i, (name, _) in enumerate(axes)}
    )


class _KernelCut(Cut):
    """The part of a kernel that decides what is loaded and stored, and where."""

    def counts(self, equation) -> bool:
        if equation.primitive.name in _MEMORY or any(_is_reference(v) for v in equation.invars):
            return True
        return any(self.counts(e) for j in inner_jaxprs(equation) for e in opened(j).eqns)

    def equation_inputs(self, equation, asked):
        if equation.primitive.name in _MEMORY:
            memory = _memory(equation)
            where = [v for v in (*_leaves(memory.transforms), memory.mask, memory.other) if v is not None]
            used = [any(v is w for w in where) for v in equation.invars]
            used[0] = any(asked) and memory.reads  # the reference's data
            return used
        if equation.primitive.name == "run_scoped":
            return self.inputs(_scoped(equation), asked)[: len(equation.invars)]
        if not inner_jaxprs(equation) and any(_is_reference(v) for v in equation.invars):
            return [False] * len(equation.invars)
        return super().equation_inputs(equation, asked)


def _is_reference(atom) -> bool:
    return private_jax.is_reference(atom.aval)


def _scoped(equation) -> core.Jaxpr:
    """What a `run_scoped` runs: a function of the values around it, then of the references that it makes."""
    jaxpr = opened(equation.params["jaxpr"])
    names = jaxpr.debug_info.with_unknown_names()
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=names)


@dataclasses.dataclass(frozen=True)
class _Memory:
    """A load, a store, or both, of the reference that is the equation's input `number`.

    `shared_by` names the axes of a cluster for whose blocks one copy serves.
    """

    transforms: Any
    mask: Any
    other: Any
    reads: bool
    writes: bool
    number: int = 0
    shared_by: tuple = ()


def _memory(equation) -> _Memory:
    kind, params, atoms = equation.primitive.name, equation.params, equation.invars
    if kind == "get":
        return _Memory(params["tree"].unflatten(atoms[1:]), None, None, True, False)
    if kind == "load":
        return _Memory(params["tree"].unflatten(atoms[1:]), None, None, True, False)
    if kind in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
        return _copy(equation)
    if kind in ("swap", "addupdate"):
        return _Memory(params["tree"].unflatten(atoms[2:]), None, None, kind == "addupdate", True)
    if kind == "masked_load":
        _, transforms, mask, other = params["args_tree"].unflatten(atoms)
        return _Memory(transforms, mask, other, True, False)
    if kind in ("masked_swap", "atomic_rmw"):
        _, transforms, _, mask = params["args_tree"].unflatten(atoms)
        return _Memory(transforms, mask, None, kind == "atomic_rmw", True)
    return _Memory((), None, None, True, True)


def _copy(equation) -> _Memory:
    """An asynchronous copy between memory and a core's own: references first, then their transforms, a predicate."""
    params, atoms = equation.params, equation.invars
    first = next((i for i, v in enumerate(atoms) if not _is_reference(v)), len(atoms))
    number = 0 if equation.primitive.name == "copy_gmem_to_smem" else 1
    before = params["src_transforms_treedef"].num_leaves if number else 0
    tree = params["dst_transforms_treedef"] if number else params["src_transforms_treedef"]
    transforms = tree.unflatten(atoms[first + before : first + before + tree.num_leaves])
    mask = atoms[-1] if params.get("has_user_predicate") else None
    reads = number == 0 or params.get("reduction_op") is not None
    shared_by = tuple(params.get("collective_axes") or ())
    return _Memory(transforms, mask, None, reads, number == 1, number, shared_by)


def _leaves(tree) -> list:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, (core.Var, core.Literal)))


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A kernel's reference: its operand (None for scratch), and per axis of the operand where its block starts.

    Of one that is `on_chip` the body reads a copy.
    """

    operand: int | None
    shape: tuple[int, ...] = ()
    itemsize: int = 1
    starts: tuple[Any, ...] = ()
    kept: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def is_memory(self) -> bool:
        return self.operand is not None and not self.on_chip


@dataclasses.dataclass(frozen=True)
class _Box:
    """The smallest and largest index that a load or store touches, per axis; arrays broadcast to the grid.

    `extents` are those of the first execution, where a loop makes the whole box larger; `latest` are the
    smallest indices of the last one.
    """

    reference: _Reference
    is_write: bool
    low: list[np.ndarray]
    high: list[np.ndarray]
    extents: list[int]
    bytes: np.ndarray
    latest: list[np.ndarray]

    def ranges(self, grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bytes, start, stop) in a layout where the boxes of different grid points do not interleave.

        One axis slides: that along which a loop moves the box, else the longest of which a box is a part. Of the
        others whole boxes are numbered.
        """
        shape, extents = self.reference.shape, list(self.extents)
        joined = [max(int((h - lo).max()) + 1, 1) for lo, h in zip(self.low, self.high, strict=True)]
        moved = [d for d, (e, j) in enumerate(zip(extents, joined, strict=True)) if j > e]
        partial = [d for d, (e, n) in enumerate(zip(extents, shape, strict=True)) if e < n]
        sliding = moved or [d for d in partial if extents[d] > 1] or partial or [0]
        slide = max(sliding, key=lambda d: shape[d]) if shape else 0
        for d in moved:
            extents[d] = joined[d]
        outer, unit = np.zeros((1,) * len(grid), np.int64), self.reference.itemsize
        for d, (e, n) in enumerate(zip(extents, shape, strict=True)):
            if d != slide:
                outer = outer * -(-n // e) + self.low[d] // e
                unit *= e
        rows = shape[slide] if shape else 1
        low, high = (self.low[slide], self.high[slide]) if shape else (0, 0)
        return self.bytes, (outer * rows + low) * unit, (outer * rows + high + 1) * unit


class _Kernel:
    """One evaluation of a kernel over its whole grid."""

    def __init__(self, equation, operands):
        self.equation = equation
        self.launch = _Launch((), ())
        self.operands = operands
        self.cut = _KernelCut(frozenset(), {})
        self.plans: dict = {}
        self.scopes: dict[int, core.Jaxpr] = {}
        self.read: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.flops = 0
        self.reasons: list[str] = []
        self.touched: dict[tuple[int, bool], _Box] = {}
        # The last inputs and result of each equation: in a loop most are the same objects again.
        self.last: dict[tuple, tuple[list, Any]] = {}
        self.literals: dict[int, Any] = {}

    @property
    def grid(self) -> tuple[int, ...]:
        return self.launch.grid

    @property
    def points(self) -> int:
        return math.prod(self.grid)

    def result(self, unknown: str = "") -> KernelTraffic:
        confidence = "unknown" if unknown else ("modelled" if self.reasons else "exact")
        touches = tuple(
            Touch(box.reference.operand, box.is_write, *map(self.launch_order, box.ranges(self.grid)))
            for box in self.touched.values()
        )
        reasons = ((unknown,) if unknown else ()) + tuple(dict.fromkeys(self.reasons))
        return KernelTraffic(self.read, self.written, self.flops, confidence, reasons, touches)

    def launch_order(self, values: np.ndarray) -> np.ndarray:
        """One value per grid point, the first grid axis fastest, axes added by vmap slowest, as launched."""
        values = np.broadcast_to(values, self.grid)
        order = [*self.launch.own_axes, *reversed(self.launch.vmapped)]
        return np.ascontiguousarray(np.transpose(values, order[::-1])).ravel()

    # --- the ways in which a kernel moves bytes

    def traffic(self) -> KernelTraffic:
        """Block copies, where its backend makes them, and what the body itself moves."""
        jaxpr = body(self.equation)
        references = [_Reference(None)] * len(jaxpr.invars)
        try:
            self.launch = _launch(self.equation)
            mapping = self.equation.params.get("grid_mapping")
            if mapping is None:
                shapes = [v.aval for v in (*self.equation.invars, *self.equation.outvars)]
                references[: len(shapes)] = [self.whole(i, aval) for i, aval in enumerate(shapes)]
            else:
                skip = mapping.num_index_operands
                for i in range(skip):
                    references[i] = dataclasses.replace(self.whole(i, self.equation.invars[i].aval), on_chip=True)
                for i, block in enumerate(mapping.block_mappings):
                    references[skip + i] = self.reference(skip + i, block, references[:skip])
                for i in range(skip, skip + len(mapping.block_mappings)):
                    if references[i].on_chip:
                        self.block_copies(i, references[i])
            if any(reference.is_memory for reference in references):
                self.run(jaxpr, references, [False] * len(jaxpr.outvars), None)
            else:
                self.flops = self.points * _flops(jaxpr)
        except _Unknown as unknown:
            self.read, self.written, self.flops, self.touched = {}, {}, 0, {}
            return self.result(str(unknown))
        return self.result()

    def block_copies(self, number: int, reference: _Reference) -> None:
        """The copies that a pipeline makes of an operand's blocks: one whenever the index changes."""
        if any(s is None for s in reference.starts):
            raise _Unknown(f"the block of operand {number} follows an index that is data")
        is_write = number >= len(self.equation.invars)
        where = np.stack([np.broadcast_to(s, self.grid) for s in reference.starts] or [np.zeros(self.grid)])
        steps = where.reshape(len(where), -1)  # the last grid axis fastest
        changed = np.concatenate([[True], (steps[:, 1:] != steps[:, :-1]).any(0)]).reshape(self.grid)
        size = math.prod(reference.block) * reference.itemsize
        totals = self.written if is_write else self.read
        totals[number] = totals.get(number, 0) + int(changed.sum()) * size
        low = [np.broadcast_to(s, self.grid) for s in reference.starts]
        high = [s + b - 1 for s, b in zip(low, reference.block, strict=True)]
        self.touch(number, reference, is_write, low, high, changed * size)

    def whole(self, number: int, aval) -> _Reference:
        """An operand as a whole, in memory."""
        shape = tuple(int(n) for n in aval.shape)
        zeros = tuple(self.constant(0) for _ in shape)
        axes = tuple(range(len(shape)))
        return _Reference(number, shape, np.dtype(aval.dtype).itemsize, zeros, axes, shape)

    def reference(self, number: int, block, prefetched: list[_Reference]) -> _Reference:
        """Where the block of an operand lies at each grid point."""
        sizes = [getattr(d, "block_size", d if isinstance(d, int) else 1) or 1 for d in block.block_shape]
        squeezed = [d is None or type(d).__name__ == "Squeezed" for d in block.block_shape]
        by_element = [type(d).__name__ in ("Element", "BoundedSlice") for d in block.block_shape]
        ids = [self.program_id(axis) for axis in range(len(self.grid))]
        index_map = block.index_map_jaxpr
        asked = [True] * len(opened(index_map).outvars)
        starts = self.run(index_map, [*ids, *prefetched], asked, None, planned=False)
        shape = tuple(int(n) for n in block.array_aval.shape)
        return _Reference(
            operand=number,
            shape=shape,
            itemsize=np.dtype(block.array_aval.dtype).itemsize,
            starts=tuple(
                None if s is None else (s if e else s * n) for s, n, e in zip(starts, sizes, by_element, strict=True)
            ),
            kept=tuple(i for i, gone in enumerate(squeezed) if not gone),
            block=tuple(sizes),
            on_chip=_is_on_chip(self.equation, block),
        )

    def program_id(self, axis: int) -> np.ndarray:
        shape = [1] * len(self.grid)
        shape[axis] = self.grid[axis]
        return np.arange(self.grid[axis]).reshape(shape)

    # --- evaluation

    def run(self, jaxpr, arguments: list, asked: list[bool], active, planned: bool = True) -> list:
        """Evaluates what decides loads and stores; `active` says which grid points are here (None: all)."""
        inner = opened(jaxpr)
        key = (id(inner), tuple(asked), planned)
        if key not in self.plans:
            if planned:
                plan = self.cut.plan(inner, asked)[0]
            else:
                plan = [(e, [True] * len(e.outvars)) for e in inner.eqns]
            read = {v for e in inner.eqns for v in e.invars if is_var(v)}
            read |= {v for v in inner.outvars if is_var(v)}
            self.plans[key] = (inner, plan, _flops(inner, nested=False), read)
        _, plan, flops, read_later = self.plans[key]
        self.flops += flops * self.count(active)
        values: dict[Any, Any] = {}
        for v, const in zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=False):
            values[v] = self.constant(const)
        values |= zip(inner.invars, arguments, strict=True)

        def look(atom):
            if is_var(atom):
                return values.get(atom)
            if id(atom) not in self.literals:
                self.literals[id(atom)] = self.constant(atom.val)
            return self.literals[id(atom)]

        for equation, wanted in plan:
            results = self.step(equation, look, wanted, active, read_later)
            values |= zip(equation.outvars, results, strict=True)
        return [look(v) if a else None for v, a in zip(inner.outvars, asked, strict=True)]

    def constant(self, value) -> np.ndarray | None:
        array = np.asarray(value)
        return array.reshape((1,) * len(self.grid) + array.shape) if array.dtype.kind in "biuf" else None

    def count(self, active) -> int:
        return self.points if active is None else int(active.sum()) * (self.points // active.size)

    def step(self, equation, look, asked, active, read_later) -> list:
        kind, params = equation.primitive.name, equation.params
        if kind in _MEMORY:
            return [self.access(equation, look, asked, active, read_later)][: len(equation.outvars)]
        if kind == "program_id":
            return [self.program_id(self.launch.own_axes[params["axis"]])]
        if kind == "num_programs":
            return [self.constant(self.grid[self.launch.own_axes[params["axis"]]])]
        if kind == "axis_index" and params["axis_name"] in self.launch.names:
            return [self.program_id(self.launch.names[params["axis_name"]])]
        arguments = [look(v) for v in equation.invars]
        if kind == "while":
            return self.run_while(equation, arguments, asked, active)
        if kind == "scan":
            return self.run_scan(equation, arguments, asked, active)
        if kind == "cond":
            return self.run_cond(equation, arguments, asked, active)
        key = (id(equation), *asked)
        before = self.last.get(key)
        if before and all(a is b for a, b in zip(arguments, before[0], strict=True)):
            return before[1]
        if kind == "run_scoped":
            if id(equation) not in self.scopes:
                self.scopes[id(equation)] = _scoped(equation)
            inner = self.scopes[id(equation)]
            made = [_Reference(None)] * (len(inner.invars) - len(arguments))
            return self.run(inner, [*arguments, *made], asked, active)
        inner = called(equation)
        if inner is not None:
            flops = self.flops
            results = self.run(inner, arguments, asked, active)
            if self.flops == flops and not self.cut.counts(equation):
                self.last[key] = (arguments, results)
            return results
        if any(isinstance(a, _Reference) and a.is_memory for a in arguments):
            raise _Unknown(f"{kind} at {_where(equation)} uses an array in memory in a way that is not understood")
        rule = _RULES.get(kind)
        if rule is None or any(a is None or isinstance(a, _Reference) for a in arguments):
            return [None] * len(equation.outvars)
        shapes = [v.aval.shape for v in equation.invars]
        result = rule(len(self.grid), params, shapes, equation.outvars[0].aval, *arguments)
        results = [None if result is None or result.size > _LARGEST else result]
        self.last[key] = (arguments, results)
        return results

    def run_while(self, equation, arguments, asked, active):
        params = equation.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        needed, _, _ = self.cut.while_inputs(equation, asked)
        cond_consts, body_consts = arguments[:n_cond], arguments[n_cond : n_cond + n_body]
        carry = [v if n else None for v, n in zip(arguments[n_cond + n_body :], needed, strict=True)]
        while True:
            (go_on,) = self.run(params["cond_jaxpr"], [*cond_consts, *carry], [True], active)
            if go_on is None:
                raise _Unknown(f"a loop of the kernel at {_where(equation)} has bounds that are data")
            running = go_on.astype(bool) if active is None else active & go_on.astype(bool)
            if not running.any():
                return carry
            inside = None if running.all() and active is None else running
            results = self.run(params["body_jaxpr"], [*body_consts, *carry], needed, inside)
            carry = [self.where(running, n, o) for n, o in zip(results, carry, strict=True)]
            active = inside

    def where(self, here: np.ndarray, new, old):
        if new is None or old is None or isinstance(new, _Reference):
            return new if isinstance(new, _Reference) else None
        return np.where(here.reshape(here.shape + (1,) * (new.ndim - here.ndim)), new, old)

    def run_scan(self, equation, arguments, asked, active):
        params = equation.params
        n_const, n_carry = private_jax.scan_arity(params, len(equation.invars))
        consts, carry = arguments[:n_const], arguments[n_const : n_const + n_carry]
        needed, _, _ = self.cut.scan_inputs(equation, asked)
        carry = [v if n else None for v, n in zip(carry, needed, strict=True)]
        xs = arguments[n_const + n_carry :]
        axis = len(self.grid)
        steps = range(params["length"])
        for i in reversed(steps) if params["reverse"] else steps:
            x = [None if v is None else np.take(v, i if v.shape[axis] > 1 else 0, axis) for v in xs]
            results = self.run(
                params["jaxpr"], [*consts, *carry, *x], [*needed, *[False] * (len(asked) - n_carry)], active
            )
            carry = results[:n_carry]
        return [*carry, *[None] * (len(asked) - n_carry)]

    def run_cond(self, equation, arguments, asked, active):
        index, *operands = arguments
        branches = equation.params["branches"]
        if index is None:
            raise _Unknown(f"a branch of the kernel at {_where(equation)} is chosen by data")
        index = np.clip(index.astype(np.int64), 0, len(branches) - 1)
        out: list = [None] * len(asked)
        for i, branch in enumerate(branches):
            here = index == i if active is None else active & (index == i)
            if not here.any():
                continue
            results = self.run(branch, operands, asked, None if here.all() and active is None else here)
            out = results if all(o is None for o in out) else [
                self.where(here, n, o) for n, o in zip(results, out, strict=True)
            ]  # fmt: skip
        return out

    # --- loads and stores

    def access(self, equation, look, asked, active, read_later):
        memory = _memory(equation)
        reference = look(equation.invars[memory.number])
        index = self.index(equation, memory.transforms, look, reference)
        if equation.primitive.name in ("swap", "addupdate"):
            value = equation.invars[1].aval
            shape, itemsize = value.shape, np.dtype(value.dtype).itemsize
        elif equation.outvars:
            value = equation.outvars[0].aval
            shape, itemsize = value.shape, np.dtype(value.dtype).itemsize
        else:
            shape, itemsize = self.copied(equation, index), getattr(reference, "itemsize", 0)
        mask = None if memory.mask is None else look(memory.mask)
        if isinstance(reference, _Reference) and reference.is_memory:
            size = math.prod(shape) * itemsize
            per_point, total = self.lanes(memory, mask, shape, size, active, equation)
            low, high = self.bounds(equation, reference, index)
            reads = memory.reads or (memory.writes and any(v in read_later for v in equation.outvars))
            for wanted, is_write in ((reads, False), (memory.writes, True)):
                if not wanted:
                    continue
                totals = self.written if is_write else self.read
                totals[reference.operand] = totals.get(reference.operand, 0) + total
                self.touch(id(equation), reference, is_write, low, high, per_point)
        if not any(asked) or not isinstance(reference, _Reference):
            return None
        return self.loaded(reference, index, mask, memory, look, shape)

    def copied(self, equation, index) -> tuple[int, ...]:
        """The shape of what a copy moves: of the part of memory that it names, wherever that lies."""
        if index is None or sum(entry[0] == "at" and entry[2] != () for entry in index) > 1:
            raise _Unknown(f"{equation.primitive.name} at {_where(equation)} copies what cannot be told")
        return tuple(n for entry in index for n in ((entry[2],) if entry[0] == "slice" else entry[2]))

    def lanes(self, memory, mask, shape, size, active, equation):
        """Bytes at each grid point (an array that broadcasts to the grid), and their sum over the grid."""
        n = len(self.grid)
        here = np.ones((1,) * n, bool) if active is None else active
        if memory.shared_by:  # one copy for the blocks of a cluster
            unnamed = [axis for axis in memory.shared_by if axis not in self.launch.names]
            if unnamed:
                raise _Unknown(
                    f"the copy at {_where(equation)} serves blocks along {unnamed[0]!r}, no axis of the grid"
                )
            size //= math.prod(self.grid[self.launch.names[axis]] for axis in memory.shared_by)
            self.reasons.append(f"the copy at {_where(equation)} serves a cluster: counted once for its blocks")
        if memory.mask is None:
            per_point = here * size
        elif mask is None:
            self.reasons.append(f"a mask at {_where(equation)} depends on data: counted as all true")
            per_point = here * size
        else:
            axes = tuple(range(n, mask.ndim))
            lanes = math.prod(shape) // max(math.prod(mask.shape[n:]), 1)
            per_point = here * (mask.sum(axes) * lanes * (size // max(math.prod(shape), 1)))
        return per_point, int(per_point.sum()) * (self.points // per_point.size)

    def index(self, equation, transforms, look, reference):
        """Per kept axis: ('slice', start, size, stride) or ('at', indices, their shape), or None if it cannot be told.

        Of a start or of indices that are data that was not given there is None.
        """
        transforms = [t for t in (transforms if isinstance(transforms, (tuple, list)) else [transforms])]
        if not isinstance(reference, _Reference):
            return None
        if not transforms:
            return [("slice", self.constant(0), reference.block[d], 1) for d in reference.kept]
        if not all(hasattr(t, "indices") for t in transforms):
            return None
        out = [self.entry(i, look) for i in transforms[0].indices]
        for transform in transforms[1:]:  # a part of the part before, whose axes are the slices where no array indexes
            if any(entry[0] == "at" and entry[2] != () for entry in out):
                if not reference.is_memory:
                    return None
                raise _Unknown(f"{equation.primitive.name} at {_where(equation)} uses a part of what an array indexed")
            axes = [axis for axis, entry in enumerate(out) if entry[0] == "slice"]
            for axis, i in zip(axes, transform.indices, strict=True):
                out[axis] = self.part(out[axis], self.entry(i, look))
        return out

    def entry(self, index, look):
        """One axis of an index."""
        if hasattr(index, "size") and hasattr(index, "start"):
            start = index.start
            start = look(start) if isinstance(start, (core.Var, core.Literal)) else self.constant(start)
            return ("slice", start, index.size, getattr(index, "stride", 1) or 1)
        if isinstance(index, (core.Var, core.Literal)):
            return ("at", look(index), tuple(index.aval.shape))
        return ("at", self.constant(index), np.shape(index))

    def part(self, outer, inner):
        """The entry `inner` counted from the slice `outer`."""
        _, first, _, step = outer
        start = None if first is None or inner[1] is None else first + inner[1] * step
        return ("slice", start, inner[2], inner[3] * step) if inner[0] == "slice" else ("at", start, inner[2])

    def bounds(self, equation, reference, index):
        """Smallest and largest index touched, per axis of the operand, each broadcasting to the grid."""
        n = len(self.grid)
        if index is None or any(entry[1] is None for entry in index):
            zero = self.constant(0)
            index = [("slice", zero, reference.block[d], 1) for d in reference.kept]
        before = self.last.get((id(equation), "bounds"))
        low, high = ([0 if s is None else s for s in reference.starts] for _ in range(2))
        for i, (axis, entry) in enumerate(zip(reference.kept, index, strict=True)):
            if before and before[0][i] is entry[1]:
                low[axis], high[axis] = before[1][0][axis], before[1][1][axis]
                continue
            if entry[0] == "slice":
                first, last = entry[1], entry[1] + (entry[2] - 1) * entry[3]
            else:
                axes = tuple(range(n, entry[1].ndim))
                first, last = entry[1].min(axes), entry[1].max(axes)
            top = reference.shape[axis] - 1
            low[axis] = np.minimum(np.maximum(low[axis] + first, 0), top)
            high[axis] = np.minimum(np.maximum(high[axis] + last, 0), top)
        low, high = ([v if isinstance(v, np.ndarray) else self.constant(v) for v in side] for side in (low, high))
        self.last[id(equation), "bounds"] = ([entry[1] for entry in index], (low, high))
        return low, high

    def touch(self, key, reference, is_write, low, high, per_point):
        """Notes which box of the operand is touched; boxes of one load in a loop are joined."""
        known = self.touched.get((key, is_write))
        if known is None:
            extents = [int((h - lo).max()) + 1 for lo, h in zip(low, high, strict=True)]
            here = per_point > 0
            joined = [
                (np.where(here, lo, n), np.where(here, h, -1))
                for lo, h, n in zip(low, high, reference.shape, strict=True)
            ]
        else:
            per_point = per_point + known.bytes
            extents, joined = known.extents, [*zip(known.low, known.high, strict=True)]
            here = known.bytes < per_point
            new_points = bool((here & (known.bytes == 0)).any())
            for d, (lo, h) in enumerate(zip(low, high, strict=True)):
                if lo is known.latest[d] and not new_points:
                    continue
                joined[d] = (
                    np.minimum(joined[d][0], np.where(here, lo, reference.shape[d])),
                    np.maximum(joined[d][1], np.where(here, h, -1)),
                )
        lows, highs = [j[0] for j in joined], [j[1] for j in joined]
        self.touched[key, is_write] = _Box(reference, is_write, lows, highs, extents, per_point, low)

    def loaded(self, reference, index, mask, memory, look, shape):
        """The value of a load from an operand that is known; None otherwise."""
        array = self.operands.get(reference.operand)
        if array is None or index is None or any(e[1] is None for e in index):
            return None
        if any(s is None for s in reference.starts):
            return None
        n, rank = len(self.grid), len(shape)
        sliced = [e[0] == "slice" for e in index]
        gathered = [not s and e[1].ndim > n for s, e in zip(sliced, index, strict=True)]
        if any(sliced) and any(gathered):
            return None
        where = [s.reshape(s.shape + (1,) * rank) for s in reference.starts]
        tile_axis = 0
        for axis, entry in zip(reference.kept, index, strict=True):
            local = entry[1]
            if entry[0] == "slice":
                local = local.reshape(local.shape[:n] + (1,) * rank)
                steps = np.arange(entry[2]) * entry[3]
                local = local + steps.reshape((1,) * (n + tile_axis) + (-1,) + (1,) * (rank - tile_axis - 1))
                tile_axis += 1
            else:
                local = local.reshape(local.shape[:n] + (1,) * (rank - (local.ndim - n)) + local.shape[n:])
            where[axis] = where[axis] + local
        if math.prod(np.broadcast_shapes(*(w.shape for w in where))) > _LARGEST:
            return None
        out = array[tuple(np.clip(w, 0, s - 1) for w, s in zip(where, array.shape, strict=True))]
        other = None if memory.other is None else look(memory.other)
        return out if mask is None or other is None else np.where(mask, out, other)


def _where(equation) -> str:
    frame = private_jax.user_line(equation.source_info)
    return frame or equation.primitive.name


# --- index arithmetic; a rule takes (grid rank, params, input shapes, output aval, *values) ------------------


def _elementwise(function):
    def rule(n, params, shapes, out, *values):
        rank = n + len(out.shape)  # a jaxpr may leave scalars among arrays
        return function(*(v.reshape(v.shape[:n] + (1,) * (rank - v.ndim) + v.shape[n:]) for v in values))

    return rule


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _convert(n, params, shapes, out, value):
    kind = np.dtype(out.dtype).kind if out.dtype != "bfloat16" else "f"
    return value.astype({"b": bool, "i": np.int64, "u": np.int64, "f": np.float64}.get(kind, np.float64))


def _broadcast(n, params, shapes, out, value, *_):
    shape = [1] * len(out.shape)
    for source, target in enumerate(params["broadcast_dimensions"]):
        shape[target] = value.shape[n + source]
    return value.reshape(value.shape[:n] + tuple(shape))


def _broadcast_to(n, params, shapes, out, value):
    """NumPy's rule: new axes in front; the stored ones stay of length 1."""
    return value.reshape(value.shape[:n] + (1,) * (len(out.shape) - (value.ndim - n)) + value.shape[n:])


def _reshape(n, params, shapes, out, value, *_):
    if math.prod(value.shape[n:]) == 1:
        return value.reshape(value.shape[:n] + (1,) * len(out.shape))
    full = np.broadcast_to(value, value.shape[:n] + tuple(shapes[0]))
    return full.reshape(value.shape[:n] + tuple(out.shape))


def _iota(n, params, shapes, out, *_):
    shape = [1] * (n + len(params["shape"]))
    shape[n + params["dimension"]] = params["shape"][params["dimension"]]
    return np.arange(params["shape"][params["dimension"]]).reshape(shape)


def _reduction(function):
    def rule(n, params, shapes, out, value):
        axes = tuple(n + a for a in params["axes"])
        repeat = math.prod(shapes[0][a] for a in params["axes"] if value.shape[n + a] == 1)
        result = function(value, axis=axes)
        return result * repeat if function is np.sum else result

    return rule


def _transpose(n, params, shapes, out, value):
    return np.transpose(value, (*range(n), *(n + a for a in params["permutation"])))


def _clamp(low, value, high):
    return np.minimum(np.maximum(value, low), high)


def _select(which, *cases):
    out = cases[0]
    for i, case in enumerate(cases[1:], 1):
        out = np.where(which.astype(np.int64) == i, case, out)
    return out


_SAME = _elementwise(lambda value, *_: value)
_RULES = {
    name: _elementwise(function)
    for name, function in {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "max": np.maximum,
        "rem": lambda a, b: a - b * _divide(a, b) if a.dtype.kind != "f" else np.fmod(a, b),
        "min": np.minimum, "neg": np.negative, "abs": np.abs, "sign": np.sign, "eq": np.equal,
        "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
        "clamp": _clamp, "select_n": _select, "floor": np.floor, "ceil": np.ceil, "round": np.round,
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
        "not": lambda a: ~a, "shift_left": lambda a, b: a << b,
        "shift_right_arithmetic": lambda a, b: a >> b, "shift_right_logical": lambda a, b: a >> b,
    }.items()
} | {
    "convert_element_type": _convert, "broadcast_in_dim": _broadcast, "broadcast_to": _broadcast_to,
    "reshape": _reshape, "squeeze": _reshape, "expand_dims": _reshape, "iota": _iota, "transpose": _transpose,
    "reduce_max": _reduction(np.max), "reduce_min": _reduction(np.min), "reduce_sum": _reduction(np.sum),
    "reduce_or": _reduction(np.any), "reduce_and": _reduction(np.all), "integer_pow": (
        lambda n, params, shapes, out, value: value ** params["y"]),
    "stop_gradient": _SAME, "copy": _SAME, "multiple_of": _SAME, "max_contiguous": _SAME,
    "optimization_barrier": _SAME,
}  # fmt: skip


_NO_FLOPS = frozenset(["broadcast_in_dim", "reshape", "squeeze", "iota", "convert_element_type", "transpose",
                       "program_id", "num_programs", "concatenate", "slice", "copy", *_MEMORY])  # fmt: skip


def _flops(jaxpr: core.Jaxpr, nested: bool = True) -> int:
    """Floating-point operations of one run of straight-line code; loops and branches inside count once.

    With `nested` false, what is inside other jaxprs is left out.
    """
    total = 0
    for equation in jaxpr.eqns:
        inner = inner_jaxprs(equation)
        if inner:
            total += sum(_flops(opened(j)) for j in inner) if nested else 0
            continue
        out = equation.outvars[0].aval if equation.outvars else None
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[d] for d in contracting)
            total += 2 * math.prod(out.shape) * depth
        elif equation.primitive.name.startswith("reduce_"):
            total += math.prod(equation.invars[0].aval.shape) - math.prod(out.shape)
        elif out is not None and equation.primitive.name not in _NO_FLOPS and "float" in str(out.dtype):
            total += math.prod(out.shape)
    return total
