"""A compiled XLA module as plain data: computations, instructions, buffers.

The module is read from XLA's serialized form, not from its text, so nothing depends on how XLA prints;
`parse` then compares its counts with the text and raises where they differ, rather than undercounting.
"""

import dataclasses
import functools
import json
import math
import re

from jaxattn.profiler import wire

# PrimitiveType of xla_data.proto -> bits per element. Packed types state their own size in the layout.
_BITS = {
    1: 8, 2: 8, 3: 16, 4: 32, 5: 64, 6: 8, 7: 16, 8: 32, 9: 64, 10: 16, 11: 32, 12: 64, 15: 64, 16: 16, 18: 128,
    19: 8, 20: 8, 23: 8, 24: 8, 25: 8, 28: 8, 29: 8, 32: 4, 33: 8, 21: 4, 22: 4, 26: 2, 27: 2, 30: 1, 31: 1,
}  # fmt: skip
_TUPLE, _OPAQUE, _TOKEN = 13, 14, 17
_DTYPE = {1: "bool", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "uint8", 7: "uint16", 8: "uint32",
          9: "uint64", 10: "float16", 11: "float32", 12: "float64", 16: "bfloat16"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array, a tuple of shapes, or a token."""

    element_type: int
    dims: tuple[int, ...] = ()
    parts: tuple["Shape", ...] = ()
    element_bits: int = 0

    @property
    def is_tuple(self) -> bool:
        return self.element_type == _TUPLE

    @functools.cached_property
    def elements(self) -> int:
        return math.prod(self.dims)

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of the data: of all leaves for a tuple, nothing for a token."""
        if self.is_tuple:
            return sum(part.bytes for part in self.parts)
        if self.element_type in (_TOKEN, _OPAQUE):
            return 0
        if self.element_type not in _BITS:
            raise ValueError(f"unknown XLA element type {self.element_type}: its size is not known")
        return -(-self.elements * (self.element_bits or _BITS[self.element_type]) // 8)

    @functools.cached_property
    def dtype(self) -> str:
        return _DTYPE.get(self.element_type, str(self.element_type))

    def leaves(self, index: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], "Shape"]]:
        """(shape index, array shape) of every array in this shape."""
        if self.is_tuple:
            return [leaf for i, part in enumerate(self.parts) for leaf in part.leaves((*index, i))]
        return [] if self.element_type in (_TOKEN, _OPAQUE) else [(index, self)]


@dataclasses.dataclass(eq=False)
class Instruction:
    """One HLO instruction. `users` and `operands` link within its computation."""

    id: int
    name: str
    opcode: str
    shape: Shape
    op_name: str
    frame: int
    fields: dict[int, list] = dataclasses.field(repr=False)
    operand_ids: list[int] = dataclasses.field(default_factory=list)
    called_ids: list[int] = dataclasses.field(default_factory=list)
    operands: list["Instruction"] = dataclasses.field(default_factory=list, repr=False)
    users: list["Instruction"] = dataclasses.field(default_factory=list, repr=False)
    called: list["Computation"] = dataclasses.field(default_factory=list, repr=False)

    @functools.cached_property
    def parameter_number(self) -> int:
        return wire.integer(self.fields, 9)

    @functools.cached_property
    def tuple_index(self) -> int:
        return wire.integer(self.fields, 13)

    @functools.cached_property
    def custom_call_target(self) -> str:
        return wire.text(self.fields, 28)

    @functools.cached_property
    def fusion_kind(self) -> str:
        return wire.text(self.fields, 11)

    @functools.cached_property
    def backend_config(self) -> dict:
        """The backend's JSON, or {} where it is in another format."""
        try:
            config = json.loads(wire.text(self.fields, 43) or "{}")
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}

    @functools.cached_property
    def trip_count(self) -> int | None:
        """How often a while loop runs its body, where XLA itself could tell."""
        count = self.backend_config.get("known_trip_count", {}).get("n")
        return None if count is None else int(count)


@dataclasses.dataclass(eq=False)
class Computation:
    """A list of instructions in the order in which they run."""

    id: int
    name: str
    instructions: list[Instruction]
    root: Instruction
    is_fusion: bool

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, by number."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: i.parameter_number)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Where a value lives: an allocation, and a range of bytes in it."""

    allocation: int
    offset: int
    size: int


@dataclasses.dataclass(eq=False)
class Module:
    """A compiled module; `buffers` maps (instruction id, shape index) to the memory of the value made there."""

    name: str
    entry: Computation
    computations: list[Computation]
    buffers: dict[tuple[int, tuple[int, ...]], Buffer]
    _frames: dict[int, list] = dataclasses.field(repr=False, default_factory=dict)

    def source(self, instruction: Instruction) -> str:
        """`file:line` of the code that asked for this instruction, or ''."""
        metadata = wire.message(instruction.fields[7][-1]) if 7 in instruction.fields else {}
        if 3 in metadata:
            return f"{wire.text(metadata, 3)}:{wire.integer(metadata, 4)}"
        frames, locations, files = (self._frames.get(n, []) for n in (4, 3, 1))
        if not 0 < instruction.frame <= len(frames):
            return ""
        frame = wire.message(frames[instruction.frame - 1])
        location = wire.message(locations[wire.integer(frame, 1) - 1])
        return f"{files[wire.integer(location, 1) - 1].decode()}:{wire.integer(location, 3)}"


def _shape(data: bytes) -> Shape:
    fields = wire.message(data)
    layout = wire.message(fields[5][-1]) if 5 in fields else {}
    return Shape(
        element_type=wire.integer(fields, 2),
        dims=tuple(wire.integers(fields.get(3, []))),
        parts=tuple(_shape(part) for part in fields.get(4, [])),
        element_bits=wire.integer(layout, 7),
    )


def _instruction(data: bytes, shapes: dict[bytes, Shape]) -> Instruction:
    fields = wire.message(data)
    metadata = wire.message(fields[7][-1]) if fields.get(7, [b""])[-1] else {}
    raw_shape = fields[3][-1]
    if raw_shape not in shapes:
        shapes[raw_shape] = _shape(raw_shape)
    return Instruction(
        id=wire.integer(fields, 35),
        name=wire.text(fields, 1),
        opcode=wire.text(fields, 2),
        shape=shapes[raw_shape],
        op_name=wire.text(metadata, 2),
        frame=wire.integer(metadata, 15),
        fields=fields,
        operand_ids=wire.integers(fields.get(36, [])),
        called_ids=wire.integers(fields.get(38, [])),
    )


def _buffers(data: bytes) -> dict[tuple[int, tuple[int, ...]], Buffer]:
    fields = wire.message(data)
    defined = {}
    for raw in fields.get(1, []):
        logical = wire.message(raw)
        place = wire.message(logical[3][-1])
        defined[wire.integer(logical, 1)] = (wire.integer(place, 4), tuple(wire.integers(place.get(3, []))))
    out = {}
    for raw in fields.get(3, []):
        allocation = wire.message(raw)
        index = wire.integer(allocation, 1)
        for raw_assigned in allocation.get(9, []):
            assigned = wire.message(raw_assigned)
            place = defined[wire.integer(assigned, 1)]
            out[place] = Buffer(index, wire.integer(assigned, 2), wire.integer(assigned, 3))
    return out


def parse(module: bytes, text: str, buffer_assignment: bytes = b"") -> Module:
    """Reads a serialized, scheduled HLO module.

    Args:
        module: the serialized `HloModuleProto`.
        text: the same module as XLA prints it, for the check alone.
        buffer_assignment: the serialized `BufferAssignmentProto`, or nothing.

    Raises:
        ValueError: if the module is damaged, or if fewer (or more) instructions, or instructions with less
            metadata, are found than the text has: a profile of such a module would be short.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
        >>> raw = compiled.runtime_executable().hlo_modules()[0]
        >>> parse(raw.as_serialized_hlo_module_proto(), raw.to_string()).name
        'jit__lambda'
    """
    try:
        found = _module(wire.message(module), buffer_assignment)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the serialized module lacks a part that it refers to: {error!r}") from error
    _check_against_text(found.computations, text)
    return found


def _module(fields: dict[int, list], buffer_assignment: bytes) -> Module:
    shapes: dict[bytes, Shape] = {}
    computations: dict[int, Computation] = {}
    schedule = {}
    for raw in wire.message(fields[7][-1]).get(1, []) if 7 in fields else []:
        entry = wire.message(raw)
        sequence = wire.message(entry[2][-1]) if 2 in entry else {}
        schedule[wire.integer(entry, 1)] = wire.integers(sequence.get(1, []))
    for raw in fields.get(3, []):
        computation = wire.message(raw)
        instructions = [_instruction(data, shapes) for data in computation.get(2, [])]
        by_id = {i.id: i for i in instructions}
        for instruction in instructions:
            instruction.operands = [by_id[i] for i in instruction.operand_ids]
            for operand in dict.fromkeys(instruction.operands):
                operand.users.append(instruction)
        identity = wire.integer(computation, 5)
        order = schedule.get(identity)
        if order is not None:
            if sorted(order) != sorted(by_id):
                raise ValueError(f"the schedule of {wire.text(computation, 1)} is not one of its instructions")
            instructions = [by_id[i] for i in order]
        computations[identity] = Computation(
            id=identity,
            name=wire.text(computation, 1),
            instructions=instructions,
            root=by_id[wire.integer(computation, 6)],
            is_fusion=bool(wire.integer(computation, 7)),
        )
    for computation in computations.values():
        for instruction in computation.instructions:
            instruction.called = [computations[i] for i in instruction.called_ids]
    entry = computations[wire.integer(fields, 6)]
    if entry.id not in schedule:
        raise ValueError(f"the serialized module has no schedule of {entry.name}")
    return Module(
        name=wire.text(fields, 1),
        entry=entry,
        computations=list(computations.values()),
        buffers=_buffers(buffer_assignment),
        _frames=wire.message(fields[17][-1]) if 17 in fields else {},
    )


def _check_against_text(computations: list[Computation], text: str) -> None:
    """Compares counts with the text; elements of tuples, which newer XLA prints inline, are left out."""
    lines = re.findall(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*$", text, re.MULTILINE)
    printed = [line for line in lines if " get-tuple-element(" not in line]
    ours = [i for c in computations for i in c.instructions if i.opcode != "get-tuple-element"]
    if len(ours) != len(printed):
        raise ValueError(f"read {len(ours)} instructions where the module's text has {len(printed)}")
    named = sum('op_name="' in line for line in printed)
    ours_named = sum(bool(i.op_name) for i in ours)
    if ours_named < named:
        raise ValueError(f"read op_name of {ours_named} instructions where the module's text has {named}")
