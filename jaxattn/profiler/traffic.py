"""Bytes that one kernel of a compiled module reads and writes, and how often each kernel runs.

A kernel is one instruction of the scheduled module: what fusion left. Its bytes are those of one run; loops
and branches enter only as how often it runs.
"""

import dataclasses
from collections.abc import Callable, Iterator

from jaxattn.profiler import wire
from jaxattn.profiler.hlo import Computation, Instruction, Module, Shape

# No kernel: they name, group or reinterpret memory.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "domain",
        "add-dependency",
        "tuple",
        "opt-barrier",
        "async-done",
        "async-update",
        "copy-done",
        "partition-id",
        "replica-id",
    ]
)
_CONTROL = frozenset(["while", "conditional", "call", "async-start"])
_MOVES = frozenset(
    [
        "copy",
        "copy-start",
        "slice",
        "dynamic-slice",
        "dynamic-update-slice",
        "broadcast",
        "transpose",
        "reshape",
        "concatenate",
        "pad",
        "reverse",
        "iota",
        "gather",
    ]
)
_ARITHMETIC = frozenset(
    [
        "abs",
        "add",
        "and",
        "atan2",
        "cbrt",
        "ceil",
        "clamp",
        "clz",
        "compare",
        "complex",
        "convert",
        "cosine",
        "divide",
        "erf",
        "exponential",
        "exponential-minus-one",
        "floor",
        "imag",
        "is-finite",
        "log",
        "log-plus-one",
        "logistic",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "popcnt",
        "power",
        "real",
        "reduce-precision",
        "remainder",
        "round-nearest-afz",
        "round-nearest-even",
        "rsqrt",
        "select",
        "shift-left",
        "shift-right-arithmetic",
        "shift-right-logical",
        "sign",
        "sine",
        "sqrt",
        "subtract",
        "tan",
        "tanh",
        "xor",
        "bitcast-convert",
        "stochastic-convert",
    ]
)
_EXACT = _MOVES | _ARITHMETIC | {"dot", "reduce", "fusion"}
# Users that read an element of their operand only where an element of their result is asked for.
_LAZY = _ARITHMETIC | {"bitcast", "reshape", "transpose", "copy"}


@dataclasses.dataclass(frozen=True)
class Access:
    """Bytes of one value that one run of a kernel reads or writes.

    `slicer` is the dynamic slice or update that picks the part, where one does.
    """

    value: Instruction
    index: tuple[int, ...]
    bytes: int
    is_write: bool
    slicer: Instruction | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run of one kernel."""

    accesses: tuple[Access, ...]
    flops: int
    confidence: str

    @property
    def read(self) -> int:
        return sum(a.bytes for a in self.accesses if not a.is_write)

    @property
    def written(self) -> int:
        return sum(a.bytes for a in self.accesses if a.is_write)


def is_kernel(instruction: Instruction) -> bool:
    """Whether the instruction does work of its own, rather than name memory or run other computations."""
    return instruction.opcode not in _FREE and instruction.opcode not in _CONTROL


def cost(instruction: Instruction) -> Cost:
    """What one run of a kernel moves.

    Operands and outputs whole, except: slices and gathers read what they touch, in-place updates write the
    update, and a fusion reads of each operand what its slices ask for. `confidence` is `exact`, or `modelled`
    where the operation may do more (sort, scatter, library calls).
    """
    kind = "exact" if instruction.opcode in _EXACT else "modelled"
    if instruction.opcode == "fusion" and any(
        i.opcode not in _EXACT and i.opcode not in _FREE for i in instruction.called[0].instructions
    ):
        kind = "modelled"
    return Cost(tuple(_accesses(instruction)), flops(instruction), kind)


def _accesses(instruction: Instruction) -> Iterator[Access]:
    op, operands = instruction.opcode, instruction.operands
    reads: dict[int, int] = {}
    writes = slicer = None
    if op in ("slice", "gather"):
        reads[0] = instruction.shape.bytes
    elif op == "dynamic-slice":
        reads = {i: 0 for i in range(2, len(operands))} | {0: instruction.shape.bytes}
        slicer = instruction
    elif op == "dynamic-update-slice":
        reads = {i: 0 for i in (0, *range(3, len(operands)))}
        writes, slicer = operands[1].shape.bytes, instruction
    elif op == "scatter":
        n = len(operands) // 2
        reads = {i: operands[n + 1 + i].shape.bytes for i in range(n)}
        writes = reads[0] if n == 1 else None
    elif op == "fusion":
        yield from _fusion_accesses(instruction)
        return
    for i, operand in enumerate(operands):
        for index, leaf in operand.shape.leaves():
            size = reads.get(i, leaf.bytes)
            if size:
                yield Access(operand, index, size, False, slicer if i == 0 else None)
    for index, leaf in _outputs(instruction):
        size = leaf.bytes if writes is None else writes
        if size:
            yield Access(instruction, index, size, True, None if writes is None else slicer)


def _outputs(instruction: Instruction) -> list[tuple[tuple[int, ...], Shape]]:
    leaves = instruction.shape.leaves()
    if instruction.opcode == "copy-start":  # (destination, source, context): only the first is written
        return leaves[:1]
    if instruction.opcode == "custom-call" and instruction.custom_call_target.startswith("__cu"):
        return leaves[:-1] if len(leaves) > 1 else leaves  # the last is the library's scratch space
    return leaves


def _fusion_accesses(fusion: Instruction) -> Iterator[Access]:
    body = fusion.called[0]
    for parameter in body.parameters:
        operand = fusion.operands[parameter.parameter_number]
        if parameter.shape.is_tuple:
            for index, leaf in parameter.shape.leaves():
                yield Access(operand, index, leaf.bytes, False)
            continue
        size, slicer = _touched(parameter, body.root)
        if size:
            yield Access(operand, (), size, False, slicer)
    for constant in body.instructions:
        if constant.opcode == "constant" and constant.shape.elements > 8:
            yield Access(constant, (), constant.shape.bytes, False)
    for index, leaf in fusion.shape.leaves():
        made = body.root.operands[index[0]] if body.root.opcode == "tuple" and len(index) == 1 else body.root
        update = _unwrapped(made)
        if not _is_in_place(update, body.root):
            yield Access(fusion, index, leaf.bytes, True)
        else:
            size = update.operands[1 if update.opcode == "dynamic-update-slice" else 2].shape.bytes
            yield Access(fusion, index, size, True, update if update.opcode == "dynamic-update-slice" else None)


def _unwrapped(value: Instruction) -> Instruction:
    while value.opcode == "bitcast":
        value = value.operands[0]
    return value


def _is_in_place(update: Instruction, root: Instruction) -> bool:
    """Whether a fusion with this root only writes the updated part: what is updated is a parameter, and the result
    is an output of its own, so that XLA gives both the same memory. Any other update makes a new array."""
    single_scatter = update.opcode == "scatter" and len(update.operands) == 3
    if update.opcode != "dynamic-update-slice" and not single_scatter:
        return False
    outputs = root.operands if root.opcode == "tuple" else [root]
    return any(_unwrapped(o) is update for o in outputs) and _unwrapped(update.operands[0]).opcode == "parameter"


def _touched(value: Instruction, root: Instruction) -> tuple[int, Instruction | None]:
    """Bytes of `value` (inside a fusion) that its users ask for, and the slice that picks them, if one does."""
    size, whole, slicer = 0, value is root, None
    for user in value.users:
        sliced = value is user.operands[0]
        if user.opcode == "slice" or (user.opcode == "dynamic-slice" and sliced):
            share, _ = _asked(user, root)
            size += round(share * user.shape.elements * value.shape.bytes / max(value.shape.elements, 1))
            slicer = user if user.opcode == "dynamic-slice" else slicer
        elif user.opcode == "gather" and sliced:
            size += user.shape.bytes
        elif user.opcode == "dynamic-update-slice" and sliced and _is_in_place(user, root):
            continue  # its other elements stay where they are
        elif user.opcode == "scatter" and sliced and _is_in_place(user, root):
            size += user.operands[-1].shape.bytes  # what the updates are combined with
        elif user.opcode in ("broadcast", "reshape") and value.opcode == "parameter":
            size += value.shape.bytes
        elif (
            (user.opcode in _LAZY or (user.opcode == "dynamic-update-slice" and sliced))
            and user is not root
            and user.shape.elements == value.shape.elements
        ):
            share, deeper = _asked(user, root)
            if share < 1:
                size += round(share * value.shape.bytes)
                slicer = deeper or slicer
            else:
                whole = True
        elif user.opcode == "fusion":
            inner = user.called[0]
            for i, operand in enumerate(user.operands):
                if operand is value:
                    size += _touched(inner.parameters[i], inner.root)[0]
        else:
            whole = True
    return size + (value.shape.bytes if whole else 0), None if whole else slicer


def _asked(value: Instruction, root: Instruction) -> tuple[float, Instruction | None]:
    """The share of `value` (inside a fusion) that is asked for, at most 1."""
    if value is root or not value.shape.bytes:
        return 1.0, None
    size, slicer = _touched(value, root)
    return min(size / value.shape.bytes, 1.0), slicer


def flops(instruction: Instruction) -> int:
    """Operations of one run: 2 per multiply-add of a product, 1 per element of arithmetic, none to move."""
    op, shape = instruction.opcode, instruction.shape
    if op == "fusion":
        return sum(flops(i) for i in instruction.called[0].instructions)
    if op == "dot":
        dims = wire.message(instruction.fields[30][-1]) if 30 in instruction.fields else {}
        return _dot_flops(instruction, wire.integers(dims.get(1, [])))
    if op == "custom-call":
        numbers = instruction.backend_config.get("gemm_backend_config", instruction.backend_config)
        numbers = numbers.get("dot_dimension_numbers")
        if not numbers:
            return 0
        return _dot_flops(instruction, [int(d) for d in numbers.get("lhs_contracting_dimensions", [])])
    if op == "convolution":
        kernel = instruction.operands[1].shape
        numbers = wire.message(instruction.fields[16][-1])
        return 2 * shape.elements * kernel.elements // kernel.dims[wire.integer(numbers, 4)]
    if op == "reduce":
        outputs = [leaf.elements for _, leaf in shape.leaves()]
        return sum(max(o.shape.elements - n, 0) for o, n in zip(instruction.operands, outputs, strict=False))
    return shape.elements if op in _ARITHMETIC and not shape.is_tuple else 0


def _dot_flops(instruction: Instruction, contracting: list[int]) -> int:
    depth = 1
    for d in contracting:
        depth *= instruction.operands[0].shape.dims[d]
    output = instruction.shape.leaves()[0][1]
    return 2 * output.elements * depth


@dataclasses.dataclass(frozen=True)
class LoopRuns:
    """Runs of a loop, over the whole program: times entered, times its body ran."""

    entered: int
    body: int


Runs = int | None


def runs(
    module: Module,
    loop: Callable[[Instruction], LoopRuns | None],
    branches: Callable[[Instruction], tuple[int, ...] | None],
) -> tuple[dict[Computation, Runs], list[Instruction]]:
    """How often each computation runs in one call of the module.

    Args:
        module: the compiled module.
        loop: measured runs of a `while` whose trip count XLA does not know, or None.
        branches: measured runs of each branch of a `conditional`, or None.

    Returns:
        computation -> times run, None where unknown; and the instructions that could not be counted.
    """
    total: dict[Computation, Runs] = {}
    unknown: list[Instruction] = []
    measured_once: set[Instruction] = set()

    def measured(instruction: Instruction, counts: Callable):
        """What was measured of the whole program, for the first that asks: to whom else it belongs cannot be told."""
        if instruction in measured_once:
            return None
        measured_once.add(instruction)
        return counts(instruction)

    def visit(computation: Computation, times: Runs) -> None:
        before = total.get(computation, 0)
        total[computation] = None if times is None or before is None else before + times
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                condition, body = while_parts(instruction)
                count = instruction.trip_count
                if times == 0:
                    visit(body, 0)
                    visit(condition, 0)
                elif count is not None:
                    visit(body, None if times is None else times * count)
                    visit(condition, None if times is None else times * (count + 1))
                elif (found := measured(instruction, loop)) is not None:
                    visit(body, found.body)
                    visit(condition, found.body + found.entered)
                else:
                    unknown.append(instruction)
                    visit(body, None)
                    visit(condition, None)
            elif instruction.opcode == "conditional":
                taken = (0,) * len(instruction.called) if times == 0 else measured(instruction, branches)
                if taken is None or len(taken) != len(instruction.called):
                    unknown.append(instruction)
                    taken = (None,) * len(instruction.called)
                for branch, count in zip(instruction.called, taken, strict=True):
                    visit(branch, count)
            elif instruction.opcode in ("call", "async-start"):
                visit(instruction.called[0], times)

    visit(module.entry, 1)
    return total, unknown


def while_parts(instruction: Instruction) -> tuple[Computation, Computation]:
    """(condition, body) of a while: the condition is the one that returns a single truth value."""
    first, second = instruction.called
    return (first, second) if not first.root.shape.is_tuple else (second, first)
