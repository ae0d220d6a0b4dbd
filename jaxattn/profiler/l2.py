"""From requested bytes to DRAM: the module replayed, kernel by kernel, through a write-back LRU cache.

Buffers are XLA's own allocations, so values that share memory share lines. Loop indices are followed, so a
loop that reads a slice per step reads the next one each time. A model: one cache, least recently used first,
lines written whole; real L2s hash, split and prefetch. Half the capacity is replayed too, and the two results
bound what is reported.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from jaxattn.profiler import traffic, wire
from jaxattn.profiler.hlo import Buffer, Computation, Instruction, Module
from jaxattn.profiler.traffic import Access, LoopRuns

_CHUNKS = 128  # pieces of the cache that are replaced as one
_BUDGET = 60_000  # kernel accesses replayed one by one; loops beyond are extrapolated from their second or third step
_WAVES = 1024  # of one launch that are replayed at most; larger grids run in larger waves
_SECTOR = 32  # bytes: less than that, in a loop, is a counter or a bound
_LARGEST_TABLE, _LARGEST_VALUE = 1 << 20, 1 << 12  # elements: constants that are read, arrays that are computed


@dataclasses.dataclass(frozen=True)
class Wave:
    """Ranges of bytes that the thread blocks running together touch: (operand, start, stop, is a write)."""

    ranges: tuple[tuple[int, int, int, bool], ...]


@dataclasses.dataclass(slots=True)
class _Line:
    """A piece of the cache: the ranges that are here, those not yet written back, and when it was used."""

    here: list[tuple[int, int]]
    dirty: list[tuple[int, int]]
    touched: int
    missed: int  # when something was not here that was asked for


class Cache:
    """A write-back LRU cache over ranges of bytes; counts what misses and what is written back."""

    def __init__(self, capacity: int, chunk: int):
        self.capacity, self.chunk = capacity, chunk
        self.lines: OrderedDict[tuple, _Line] = OrderedDict()  # (allocation, chunk) -> its line
        self.used = self.read = self.written = 0
        self.filled = self.dirtied = self.time = 0  # bytes that came in, bytes that became dirty, touches

    def touch(self, allocation: int, start: int, stop: int, is_write: bool) -> None:
        """One piece of a chunk is read or written."""
        key = (allocation, start // self.chunk)
        self.time += 1
        line = self.lines.get(key)
        if line is None:
            self.lines[key] = line = _Line([(start, stop)], [], self.time, self.time)
            missing = stop - start
        else:
            self.lines.move_to_end(key)
            line.touched = self.time
            missing = _cover(line.here, start, stop)
        if is_write:
            self.dirtied += _cover(line.dirty, start, stop)
        else:
            self.read += missing
        if missing:
            line.missed = self.time
            self.filled += missing
            self.used += missing
            self.make_room()

    def make_room(self) -> None:
        """Writes back and forgets the lines that were not used for longest."""
        while self.used > self.capacity and len(self.lines) > 1:
            _, line = self.lines.popitem(last=False)
            self.used -= _size(line.here)
            self.written += _size(line.dirty)

    def mark(self) -> tuple[int, int, int, int]:
        """Where the counts stand, for `repeat`."""
        return self.read, self.filled, self.dirtied, self.time

    def repeat(self, mark: tuple[int, int, int, int], times: int, name: object) -> None:
        """What was touched since the mark is touched as often again, each time at other places.

        What came in each time pushes out what is older; what was here and is asked for each time stays.
        """
        read, filled, dirtied, time = mark
        self.read += (self.read - read) * times
        filled, dirtied = (self.filled - filled) * times, (self.dirtied - dirtied) * times
        self.filled, self.dirtied = self.filled + filled, self.dirtied + dirtied
        hot = [key for key, line in self.lines.items() if line.missed <= time < line.touched]
        kept = {key: self.lines.pop(key) for key in hot}
        pieces = max(-(-filled // self.chunk), 1 if dirtied else 0)
        fits = min(pieces, self.capacity // self.chunk + 1)
        self.written += dirtied * (pieces - fits) // max(pieces, 1)
        for i in range(pieces - fits, pieces):
            size = filled * (i + 1) // pieces - filled * i // pieces
            dirty = min(size, dirtied * (i + 1) // pieces - dirtied * i // pieces)
            self.lines[name, i] = _Line([(0, size)], [(0, dirty)], self.time, self.time)
            self.used += size
            self.make_room()
        self.lines |= kept

    def stream(self, accesses: list[tuple[int, int, int, bool]]) -> None:
        """A kernel reads and writes ranges side by side, none of them empty: (allocation, start, stop, is a write)."""
        chunk = self.chunk
        counts = [(stop - 1) // chunk - start // chunk + 1 for _, start, stop, _ in accesses]
        longest = max(counts)
        if longest == 1:
            for access in accesses:
                self.touch(*access)
            return
        total = sum(stop - start for _, start, stop, _ in accesses)
        edge = longest
        if total > 8 * self.capacity:  # what lies between finds nothing and leaves nothing
            edge = max(1, round(2 * self.capacity / total * longest))
        touched = [0] * len(accesses)
        for step in range(longest) if 2 * edge >= longest else [*range(edge), *range(longest - edge, longest)]:
            for i, (allocation, start, stop, is_write) in enumerate(accesses):
                for piece in range(step * counts[i] // longest, (step + 1) * counts[i] // longest):
                    first = (start // chunk + piece) * chunk
                    last = first + chunk
                    first, last = (start if first < start else first), (stop if last > stop else last)
                    self.touch(allocation, first, last, is_write)
                    touched[i] += last - first
        for done, (_, start, stop, is_write) in zip(touched, accesses, strict=True):
            self.filled += stop - start - done
            if is_write:
                self.written += stop - start - done
                self.dirtied += stop - start - done
            else:
                self.read += stop - start - done

    @property
    def dirty(self) -> int:
        """Bytes that are still to be written back."""
        return sum(_size(line.dirty) for line in self.lines.values())


def _size(ranges: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in ranges)


def _cover(ranges: list[tuple[int, int]], start: int, stop: int) -> int:
    """Adds a range to disjoint ranges; returns how many bytes are new."""
    for first, last in ranges:
        if first <= start and stop <= last:
            return 0
    new = stop - start
    low, high, apart = start, stop, []
    for first, last in ranges:
        if last < start or first > stop:
            apart.append((first, last))
        else:
            new -= min(last, stop) - max(first, start)
            low, high = min(low, first), max(high, last)
    ranges[:] = [*apart, (low, high)]
    return new


@dataclasses.dataclass(frozen=True)
class Dram:
    """Bytes read from and written to memory."""

    read: int
    written: int


class Replay:
    """The module's kernels in the order in which they run."""

    def __init__(
        self,
        module: Module,
        loop: Callable[[Instruction], LoopRuns | None],
        branches: Callable[[Instruction], tuple[int, ...] | None],
        waves: dict[Instruction, tuple[Wave, ...]],
    ):
        self.module, self.loop, self.branches, self.waves = module, loop, branches, waves
        # parameter of a loop body, branch or called computation -> (who runs it, which of its computations)
        self.callers: dict[Instruction, tuple[Instruction, int]] = {}
        for computation in module.computations:
            for instruction in [] if computation.is_fusion else computation.instructions:
                for i, inner in enumerate(instruction.called):
                    for parameter in inner.parameters:
                        self.callers.setdefault(parameter, (instruction, i))
        self.outside_loops = set(module.entry.instructions)
        self.homes: dict[tuple[Instruction, tuple[int, ...]], Buffer] = {}
        self.costs: dict[Instruction, list[Access]] = {}
        self.weights: dict[Computation, float] = {}
        self.entered: dict[Instruction, int] = {}
        self.literals: dict[Instruction, object] = {}
        self.events: list = []
        self.started: dict[Instruction, list[tuple[int, int, int, int]]] = {}
        self.repeated = 0
        self.extrapolated = False
        self.guessed: set[str] = set()

    def dram(self, capacity: int) -> tuple[tuple[Dram, Dram], tuple[Dram, Dram]]:
        """(cold, warm) with the whole capacity, and the same with half of it.

        Cold: from an empty cache until all is written back. Warm: the same call right after one.
        """
        chunk = max(capacity // _CHUNKS, 4096)
        self.caches = [Cache(capacity, chunk), Cache(capacity // 2, chunk)]
        self.run(self.module.entry, {}, 0)
        first = [(cache.read, cache.written) for cache in self.caches]
        cold = [Dram(cache.read, cache.written + cache.dirty) for cache in self.caches]
        for event in self.events:
            self.apply(event)
        warm = [Dram(c.read - read, c.written - written) for c, (read, written) in zip(self.caches, first, strict=True)]
        return (cold[0], warm[0]), (cold[1], warm[1])

    def emit(self, event) -> None:
        """Notes and applies an event: the second call of the program repeats those of the first.

        Of a kernel's ranges those that are empty are left out.
        """
        if isinstance(event, list):
            event = [access for access in event if access[2] > access[1]]
            if not event:
                return
        self.events.append(event)
        self.apply(event)

    def apply(self, event) -> None:
        """A kernel's ranges; or the start of a loop's step; or that the last such step is repeated, how often."""
        if isinstance(event, list):
            for cache in self.caches:
                cache.stream(event)
            return
        loop, repeats = event
        if not repeats:
            self.started[loop] = [cache.mark() for cache in self.caches]
            return
        self.repeated += 1
        for cache, mark in zip(self.caches, self.started[loop], strict=True):
            cache.repeat(mark, repeats, self.repeated)

    # --- where values live

    def home(self, value: Instruction, index: tuple[int, ...]) -> Buffer | None:
        """The memory of a value: where it was made, through tuples, bitcasts and loop parameters."""
        key = (value, index)
        if key not in self.homes:
            self.homes[key] = self._home(value, index)
        return self.homes[key]

    def _home(self, value, index):
        made = self.module.buffers.get((value.id, index))
        if made is not None:
            return made
        if value.opcode == "get-tuple-element":
            return self.home(value.operands[0], (value.tuple_index, *index))
        if value.opcode == "tuple":
            return self.home(value.operands[index[0]], index[1:])
        if value.opcode in ("bitcast", "copy-done", "opt-barrier", "async-done", "while"):
            return self.home(value.operands[0], index)
        if value.opcode == "call":
            return self.home(value.called[0].root, index)
        if value in self.callers:
            caller, branch = self.callers[value]
            number = {"while": 0, "conditional": 1 + branch}.get(caller.opcode, value.parameter_number)
            return self.home(caller.operands[number], index)
        shape = value.shape
        for i in index:
            shape = shape.parts[i]
        return Buffer(-value.id - 1, 0, shape.bytes)  # where XLA gives no assignment: a place of its own

    # --- running

    def run(self, computation: Computation, parameters: dict[int, object], step: int) -> "_Scalars":
        """One run of a computation; `step` numbers the runs of a loop body."""
        scalars = _Scalars(parameters, self.literals)
        for instruction in computation.instructions:
            if instruction.opcode == "while":
                self.run_while(instruction, scalars)
            elif instruction.opcode == "conditional":
                self.run_conditional(instruction, scalars, step)
            elif instruction.opcode in ("call", "async-start"):
                values = {i: scalars.value(o) for i, o in enumerate(instruction.operands)}
                inner = self.run(instruction.called[0], values, step)
                scalars.values[instruction] = inner.value(instruction.called[0].root)
            elif traffic.is_kernel(instruction):
                self.kernel(instruction, scalars, step)
        return scalars

    def run_while(self, instruction, scalars):
        condition, body = traffic.while_parts(instruction)
        state = scalars.value(instruction.operands[0])
        trips = self.trips(instruction)
        step = 0
        heavy = trips is not None and trips > 4 and self.weight(body) * trips > _BUDGET
        while True:
            if trips is None or instruction.trip_count is None:
                go_on = _Scalars({0: state}, self.literals).value(condition.root)
                if go_on is None:
                    if trips is None or step >= trips:
                        break
                elif not go_on:
                    break
            elif step >= trips:
                break
            if heavy and step == (2 if self.weight(body) > _BUDGET / 4 else 3):
                self.extrapolated = True
                self.emit((instruction, trips - step))
                break
            if heavy:
                self.emit((instruction, 0))
            state = self.run(body, {0: state}, step).value(body.root)
            step += 1
        scalars.values[instruction] = state

    def trips(self, instruction) -> int | None:
        """Steps of this entry into the loop: XLA's count, or the measured ones spread over the entries."""
        if instruction.trip_count is not None:
            return instruction.trip_count
        measured = self.loop(instruction)
        if measured is None:
            return None
        entry = self.entered.get(instruction, 0)
        self.entered[instruction] = entry + 1
        if not measured.entered:
            return 0
        return (entry + 1) * measured.body // measured.entered - entry * measured.body // measured.entered

    def run_conditional(self, instruction, scalars, step):
        which = scalars.value(instruction.operands[0])
        count = len(instruction.called)
        if which is None:
            taken = self.branches(instruction)
            if not taken or not sum(taken):
                return
            entry = self.entered.get(instruction, 0)
            self.entered[instruction] = entry + 1
            which = int(np.searchsorted(np.cumsum(taken), entry % sum(taken), side="right"))
        elif instruction.operands[0].shape.element_type == 1:  # a truth value: true is the first branch
            which = 0 if which else 1
        which = which if 0 <= which < count else count - 1
        branch = instruction.called[which]
        self.run(branch, {0: scalars.value(instruction.operands[1 + which])}, step)

    def weight(self, computation: Computation) -> float:
        """About how many accesses one run of a computation makes, loops included."""
        if computation not in self.weights:
            self.weights[computation] = 0.0
            total = 0.0
            for instruction in computation.instructions:
                if instruction.opcode == "while":
                    measured = self.loop(instruction)
                    trips = instruction.trip_count
                    if trips is None:
                        trips = measured.body / max(measured.entered, 1) if measured else 1
                    total += trips * sum(self.weight(c) for c in instruction.called)
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    total += max(self.weight(c) for c in instruction.called)
                elif traffic.is_kernel(instruction):
                    total += 2 * len(self.accesses(instruction))
            self.weights[computation] = total
        return self.weights[computation]

    def accesses(self, instruction) -> list[Access]:
        if instruction not in self.costs:
            least = 0 if instruction in self.outside_loops else _SECTOR
            self.costs[instruction] = [a for a in traffic.cost(instruction).accesses if a.bytes >= least]
        return self.costs[instruction]

    def kernel(self, instruction, scalars, step):
        if instruction in self.waves:
            n = len(instruction.operands)
            leaves = [index for index, _ in instruction.shape.leaves()]
            for wave in self.waves[instruction]:
                ranges = []
                for number, start, stop, is_write in wave.ranges:
                    home = (
                        self.home(instruction.operands[number], ())
                        if number < n
                        else self.home(instruction, leaves[number - n])
                    )
                    ranges.append((home.allocation, home.offset + start, home.offset + stop, is_write))
                self.emit(ranges)
            return
        ranges = []
        for access in self.accesses(instruction):
            home = self.home(access.value, access.index)
            size = min(access.bytes, home.size)
            start = 0
            if access.slicer is not None:
                start = self.offset(access, instruction, scalars, step, home.size)
            if size:
                ranges.append((home.allocation, home.offset + start, home.offset + start + size, access.is_write))
        self.emit(ranges)

    def offset(self, access, instruction, scalars, step, size) -> int:
        """Where a slice starts: by its indices where they can be followed, else the step's next one."""
        slicer = access.slicer
        inside = scalars
        if instruction.opcode == "fusion":
            values = {i: scalars.value(o) for i, o in enumerate(instruction.operands)}
            inside = _Scalars(values, self.literals)
        update = slicer.opcode == "dynamic-update-slice"
        part = slicer.operands[1].shape if update else slicer.shape
        whole = slicer.operands[0].shape
        indices = [inside.value(o) for o in slicer.operands[2 if update else 1 :]]
        last = max(size - access.bytes, 0)
        if any(i is None for i in indices):
            self.guessed.add(slicer.name)
            return min(step * access.bytes % size, last) if size else 0
        number = 0
        for i, n, extent in zip(indices, part.dims, whole.dims, strict=True):
            number = number * -(-extent // n) + min(max(int(i), 0), extent - n) // n
        return min(number * access.bytes, last)


class _Scalars:
    """Values of small integers in one run of a computation, found when asked for; None where they are data."""

    def __init__(self, parameters: dict[int, object], literals: dict[Instruction, object]):
        self.parameters, self.literals = parameters, literals
        self.values: dict[Instruction, object] = {}

    def value(self, instruction: Instruction):
        if instruction not in self.values:
            self.values[instruction] = None
            self.values[instruction] = self._value(instruction)
        return self.values[instruction]

    def _value(self, instruction):
        op, operands = instruction.opcode, instruction.operands
        if op == "parameter":
            return self.parameters.get(instruction.parameter_number)
        if op == "tuple":
            return tuple(self.value(o) for o in operands)
        if op == "get-tuple-element":
            whole = self.value(operands[0])
            return whole[instruction.tuple_index] if isinstance(whole, tuple) else None
        if op == "constant":
            if instruction not in self.literals:
                self.literals[instruction] = _literal(instruction)
            return self.literals[instruction]
        if op in ("copy", "opt-barrier"):
            return self.value(operands[0])
        shape = instruction.shape
        if shape.is_tuple and op == "fusion" and all(p.elements <= _LARGEST_VALUE for p in shape.parts):
            return self.fused(instruction)
        if shape.is_tuple or shape.elements > _LARGEST_VALUE:
            return None
        if op in ("bitcast", "reshape"):
            value = self.value(operands[0])
            return None if value is None or isinstance(value, tuple) else _shaped(value, shape.dims)
        if shape.dtype not in _INTEGER_TYPES:
            return None
        if op == "fusion":
            return self.fused(instruction)
        dimensions = wire.integers(instruction.fields.get(14, []))
        if op == "iota":
            steps = np.arange(shape.dims[dimensions[0]])
            return np.broadcast_to(_along(steps, dimensions, len(shape.dims)), shape.dims)
        values = [self.value(o) for o in operands]
        if any(v is None or isinstance(v, tuple) for v in values):
            return None
        if op == "broadcast":
            return np.broadcast_to(_along(np.asarray(values[0]), dimensions, len(shape.dims)), shape.dims)
        if op == "slice":
            cuts = [wire.message(raw) for raw in instruction.fields.get(17, [])]
            cuts = [slice(wire.integer(c, 1), wire.integer(c, 2), wire.integer(c, 3, 1)) for c in cuts]
            return values[0][tuple(cuts)]
        if op == "dynamic-slice":
            starts = [
                min(max(int(i), 0), n - s)
                for i, n, s in zip(values[1:], operands[0].shape.dims, shape.dims, strict=True)
            ]
            return values[0][tuple(slice(i, i + s) for i, s in zip(starts, shape.dims, strict=True))]
        rule = _INTEGERS.get(op)
        if op == "compare":
            rule = _COMPARE.get(wire.text(instruction.fields, 63))
        if op == "convert":
            rule = bool if shape.dtype == "bool" else int
        if rule is None:
            return None
        if any(isinstance(v, np.ndarray) for v in values):
            typed = [np.asarray(v).astype(o.shape.dtype) for v, o in zip(values, operands, strict=True)]
            if op == "convert":
                return typed[0].astype(shape.dtype)
            rule = _ARRAYS.get(op, rule)
            return rule(*typed).astype(shape.dtype)
        return _wrapped(rule(*values), shape.dtype)

    def fused(self, fusion: Instruction):
        """The value of a fusion's root."""
        values = {i: self.value(o) for i, o in enumerate(fusion.operands)}
        return _Scalars(values, self.literals).value(fusion.called[0].root)


def _shaped(value, dims):
    """The value with these dimensions: an int if there are none."""
    return int(np.asarray(value).item()) if not dims else np.asarray(value).reshape(dims)


def _along(values: np.ndarray, dimensions: list[int], rank: int) -> np.ndarray:
    """The array with its axes at these dimensions of a larger rank."""
    shape = [1] * rank
    for axis, dimension in enumerate(dimensions):
        shape[dimension] = values.shape[axis]
    return values.reshape(shape)


def _wrapped(value: int, dtype: str) -> int:
    """The value as an integer type holds it: hashes multiply modulo 2**32."""
    bits = 1 if dtype == "bool" else int(dtype.lstrip("uint"))
    value = int(value) & ((1 << bits) - 1)
    return value - (1 << bits) if dtype.startswith("int") and value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    return 0 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


_INTEGERS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": _quotient,
    "remainder": lambda a, b: a - b * _quotient(a, b),
    "maximum": max,
    "minimum": min,
    "negate": lambda a: -a,
    "clamp": lambda low, a, high: min(max(a, low), high),
    "select": lambda which, a, b: a if which else b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "xor": lambda a, b: a ^ b,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "shift-right-logical": lambda a, b: a >> b,
    "shift-right-arithmetic": lambda a, b: a >> b,
    "shift-left": lambda a, b: a << b,
}
# Where arrays need another function than numbers do.
_ARRAYS = {
    "divide": np.vectorize(_quotient, otypes=[np.int64]),
    "remainder": np.vectorize(_INTEGERS["remainder"], otypes=[np.int64]),
    "maximum": np.maximum,
    "minimum": np.minimum,
    "clamp": lambda low, a, high: np.minimum(np.maximum(a, low), high),
    "select": np.where,
    "sign": np.sign,
}
_COMPARE = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}
_INTEGER_TYPES = frozenset(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"])
# LiteralProto's field of each element type
_LITERAL_FIELDS = {"bool": 2, "int32": 4, "int64": 5, "uint32": 6}


def _literal(constant: Instruction):
    shape = constant.shape
    field = _LITERAL_FIELDS.get(shape.dtype)
    if field is None or shape.elements > _LARGEST_TABLE or 8 not in constant.fields:
        return None
    values = wire.integers(wire.message(constant.fields[8][-1]).get(field, []))
    if len(values) != shape.elements:
        return None
    if shape.dtype == "int32":
        values = [v - (1 << 32) if (1 << 31) <= v < (1 << 32) else v for v in values]
    return values[0] if not shape.dims else np.array(values).reshape(shape.dims)


def waves(touches, cores: int) -> tuple[Wave, ...]:
    """The touches of a Pallas kernel's grid, in groups of at least as many thread blocks as there are cores."""
    if not touches:
        return ()
    points = len(touches[0].bytes)
    together = max(cores, -(-points // _WAVES))
    out = []
    for first in range(0, points, together):
        ranges = []
        for touch in touches:
            part = slice(first, first + together)
            here = touch.bytes[part] > 0
            if not here.any():
                continue
            order = np.argsort(touch.start[part][here], kind="stable")
            starts, stops = touch.start[part][here][order], touch.stop[part][here][order]
            sizes = touch.bytes[part][here][order]
            reach = np.maximum.accumulate(stops)
            cuts = np.flatnonzero(starts[1:] > reach[:-1]) + 1
            for group in np.split(np.arange(len(starts)), cuts):
                start, stop = int(starts[group[0]]), int(reach[group[-1]])
                stop = min(stop, start + int(sizes[group].sum()))
                ranges.append((touch.operand, start, stop, touch.is_write))
        out.append(Wave(tuple(ranges)))
    return tuple(out)
