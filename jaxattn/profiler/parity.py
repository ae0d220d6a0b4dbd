"""XLA's own count of `bytes accessed`, reproduced: the check that modules are read right.

The rules are those of XLA's `HloCostAnalysis`: a loop body counts once, of a conditional the larger branch,
a custom call as -1, a tuple as its table of pointers. Where they equal `compiled.cost_analysis()`, the
parser has seen every instruction, shape and fusion that XLA has.
"""

import dataclasses

from jaxattn.profiler.hlo import Computation, Instruction, Module, Shape

_NOTHING = frozenset(["parameter", "constant", "get-tuple-element", "bitcast", "after-all", "domain", "add-dependency"])
# Constants of more elements than this are read from memory by a fusion; smaller ones sit in its code.
_IMMEDIATE_ELEMENTS = 8


@dataclasses.dataclass(frozen=True)
class _Count:
    pointer_bytes: int

    def size(self, shape: Shape) -> int:
        return self.pointer_bytes * len(shape.parts) if shape.is_tuple else shape.bytes

    def sizes(self, instructions: list[Instruction]) -> int:
        return sum(self.size(i.shape) for i in instructions)

    def computation(self, computation: Computation) -> int:
        return sum(self.instruction(i) for i in computation.instructions)

    def instruction(self, instruction: Instruction) -> int:
        operands, size = instruction.operands, self.size(instruction.shape)
        match instruction.opcode:
            case op if op in _NOTHING:
                return 0
            case "tuple":
                return size
            case "custom-call":
                return -1
            case "while":
                return sum(self.computation(c) for c in instruction.called)
            case "conditional":
                return max(self.computation(c) for c in instruction.called)
            case "call" | "async-start":
                return self.computation(instruction.called[0])
            case "slice":
                return 2 * size
            case "dynamic-slice" | "gather":
                return 2 * size + self.size(operands[1].shape)
            case "dynamic-update-slice":
                return 2 * self.size(operands[1].shape) + self.size(operands[2].shape)
            case "scatter":
                n = len(operands) // 2
                return 3 * self.sizes(operands[n + 1 :]) + self.size(operands[n].shape)
            case "triangular-solve":
                return size + self.size(operands[0].shape) // 2 + self.size(operands[1].shape)
            case "cholesky":
                return self.size(operands[0].shape)
            case "fusion":
                return self.fusion(instruction)
            case "sort":
                return instruction.shape.bytes + self.sizes(operands)
        return size + self.sizes(operands)

    def fusion(self, fusion: Instruction) -> int:
        body = fusion.called[0]
        if fusion.fusion_kind == "kCustom":
            for instruction in body.instructions:
                if instruction.opcode in ("gather", "scatter"):
                    return self.instruction(instruction)
        total = sum(self.parameter(p) for p in body.parameters)
        for instruction in body.instructions:
            if instruction.opcode == "constant" and instruction.shape.elements > _IMMEDIATE_ELEMENTS:
                total += self.size(instruction.shape)
        for index, leaf in fusion.shape.leaves():
            root = body.root
            if root.opcode == "tuple" and len(index) == 1:
                root = root.operands[index[0]]
            total += self.size(root.operands[1].shape if root.opcode == "dynamic-update-slice" else leaf)
        return total

    def parameter(self, parameter: Instruction) -> int:
        if parameter.shape.is_tuple:
            return sum(self.parameter(u) for u in parameter.users if u.opcode == "get-tuple-element")
        size, read_whole = 0, False
        for user in parameter.users:
            sliced = parameter is user.operands[0]
            if user.opcode == "slice" or (user.opcode == "dynamic-slice" and sliced):
                size += self.size(user.shape)
            elif user.opcode == "dynamic-update-slice" and sliced:
                continue
            elif user.opcode == "fusion":
                inner = user.called[0].parameters
                size += sum(self.parameter(inner[i]) for i, o in enumerate(user.operands) if o is parameter)
            elif user.opcode in ("broadcast", "reshape"):
                size += self.size(parameter.shape)
            elif not read_whole:
                read_whole = True
                size += self.size(parameter.shape)
        return size


def xla_bytes_accessed(module: Module, pointer_bytes: int = 8) -> int:
    """`bytes accessed` of XLA's cost analysis, exactly; XLA itself sums in float32.

    Args:
        module: the compiled module.
        pointer_bytes: size of one entry of a tuple's table: 8 in jaxlib 0.10, 4 in 0.12.

    Returns:
        Bytes, loops counted once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxattn.profiler import hlo
        >>> compiled = jax.jit(jnp.sin).lower(jnp.ones(100)).compile()
        >>> raw = compiled.runtime_executable().hlo_modules()[0]
        >>> xla_bytes_accessed(hlo.parse(raw.as_serialized_hlo_module_proto(), raw.to_string()))
        800
    """
    return _Count(pointer_bytes).computation(module.entry)
