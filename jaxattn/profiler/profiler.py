"""`profile`: from a function to its report. Compile, count, read each kernel, replay the cache."""

import re
from collections import Counter
from pathlib import Path

import jax

from jaxattn.profiler import l2, pallas, program, resources, targets, traffic, trips
from jaxattn.profiler.compile import Compiled, compile_for, compile_here, find_wheels
from jaxattn.profiler.hlo import Instruction
from jaxattn.profiler.report import Dram, DramTraffic, Interval, Report, Row, Traffic


def profile(fn, *args, target: str | None = None, wheels: Path | str | None = None) -> Report:
    """Memory traffic of one call of a jittable function: per kernel, loops as often as they run.

    Requested bytes = sum over executed kernels of (bytes read + bytes written) x calls, after XLA's fusion.
    DRAM bytes are modelled from them. The function itself is not run, except, cut down to its loop bounds,
    where the compiled program does not say how often a loop runs; the notes then say so.

    Args:
        fn: a jittable function, jitted or not.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`. Loops whose bounds depend on values need arrays.
        target: a GPU that need not be there (`h200`, `h100`, `a100`, `l4`, `t4`, `b200`); None for the
            default device.
        wheels: folder of the compile wheels, for a target (`python -m jaxattn.profiler wheels`).

    Returns:
        A `Report`; sizes in bytes.

    Raises:
        ValueError: for an unknown target, or arguments that are no arrays.
        FileNotFoundError: for a target without compile wheels, with the command that installs them.
        RuntimeError: if the compiler fails.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> profile(lambda x: jnp.tanh(x), jax.ShapeDtypeStruct((256, 256), jnp.float32)).requested
        Traffic(read=262144, written=262144)
    """
    if target is None:
        device = jax.devices()[0]
        facts = targets.here(device.platform, device.device_kind)
        traced = program.trace(fn, args)
        compiled = compile_here(traced.lower_here())
    else:
        facts = targets.get(target)
        find_wheels(wheels)
        traced = program.trace(fn, args, facts)
        compiled = compile_for(traced.lower_for_cuda(facts), facts, wheels)
    found = _Profile(traced, compiled, facts)
    taken = resources.resources_of(compiled, facts, wheels, found.kernel_names()) if target else ()
    return found.report(tuple(f"Pallas kernel {kernel}" for kernel in taken))


# Custom calls that run code of a kernel's own; a callback is one of ours where it stands for a kernel.
_KERNEL_CODE = re.compile("triton|mosaic")
_CALLBACK = re.compile("python_[a-z]*_?callback")


class _Profile:
    def __init__(self, traced: program.Program, compiled: Compiled, facts: targets.Target):
        self.traced, self.compiled, self.facts = traced, compiled, facts
        self.module = compiled.module
        self.instructions = [i for c in self.module.computations if not c.is_fusion for i in c.instructions]
        self.labels = {i: self.label(i) for i in self.instructions if i.opcode in ("while", "conditional")}
        self.kernels = self.pallas_kernels()
        written = {label for label, site in traced.sites.items() if site.kind in program.KERNELS}
        self.is_kernel_missing = not written <= set(self.kernels.values())
        wanted = [
            label
            for i, label in self.labels.items()
            if label is not None and (i.opcode == "conditional" or i.trip_count is None)
        ]
        taps = {label: pallas.control_operands(traced.sites[label].equation) for label in set(self.kernels.values())}
        self.measured = trips.measure(traced, wanted, taps)
        self.shared = Counter(label for label in self.labels.values() if label is not None)
        self.kernel_traffic = {
            label: pallas.traffic(traced.sites[label].equation, self.measured.operands.get(label, {}))
            for label in set(self.kernels.values())
        }

    # --- joining the module to the traced program

    def label(self, instruction: Instruction) -> int | None:
        """The equation that a loop or conditional of the module came from."""
        is_branch = instruction.opcode == "conditional"
        kinds, primitive = (("cond",), "cond") if is_branch else (("while", "scan"), "while")
        if instruction.op_name:  # what XLA makes inside a loop (a scatter's, a random number's) has a longer name
            named = re.search(rf"#(\d+)\)*/{primitive}$", instruction.op_name)
            label = int(named[1]) if named else None
        else:  # some passes rebuild a loop without its name; what it runs still has it
            part = rf"#(\d+)\)*/{primitive}/{'branch' if is_branch else '(?:body|cond)'}"
            inside = (i.op_name for computation in instruction.called for i in computation.instructions)
            found = [names for names in (re.findall(part, name) for name in inside) if names]
            own = min(found, key=len, default=[])
            label = int(own[-1]) if own and all(names[: len(own)] == own for names in found) else None
        return label if label in self.traced.sites and self.traced.sites[label].kind in kinds else None

    def pallas_kernels(self) -> dict[Instruction, int]:
        """Custom calls that stand for Pallas kernels, with their labels."""
        out = {}
        for instruction in self.instructions:
            if instruction.opcode == "custom-call":
                for label in reversed(program.labels(instruction.op_name)):
                    if label in self.traced.sites and self.traced.sites[label].kind in program.KERNELS:
                        out[instruction] = label
                        break
        return out

    def loop(self, instruction: Instruction) -> traffic.LoopRuns | None:
        """Measured runs of a loop; None where they are unknown, or where two loops came of one equation."""
        label = self.labels.get(instruction)
        if label not in self.measured.loops or self.shared[label] > 1:
            return None
        return traffic.LoopRuns(*self.measured.loops[label])

    def branches(self, instruction: Instruction) -> tuple[int, ...] | None:
        """Measured runs of each branch of a conditional, in the module's order."""
        label = self.labels.get(instruction)
        if label not in self.measured.branches or self.shared[label] > 1:
            return None
        taken = self.measured.branches[label]
        by_truth = instruction.operands[0].shape.element_type == 1  # then the first branch is that of true
        return taken[::-1] if by_truth else taken

    # --- the report

    def report(self, more_notes: tuple[str, ...] = ()) -> Report:
        times, uncounted = traffic.runs(self.module, self.loop, self.branches)
        unknown = [self.describe(i) for i in uncounted]
        rows = []
        for computation, calls in times.items():
            for instruction in computation.instructions:
                if traffic.is_kernel(instruction) and calls != 0:
                    rows.append(self.row(instruction, calls, unknown))
        rows = [r for r in rows if r.bytes or r.confidence == "unknown"]
        read, written = sum(r.read for r in rows), sum(r.written for r in rows)
        total = max(read + written, 1)
        rows = [Row(**{**vars(r), "share": r.bytes / total}) for r in rows]
        dram, notes = self.dram(times)
        if self.measured.was_run:
            notes.insert(0, "The program was run once, cut down to its control flow, to count loops and branches.")
        if self.compiled.devices > 1:
            notes.insert(0, f"The program is partitioned over {self.compiled.devices} devices: figures are of one.")
        for label, kernel in self.kernel_traffic.items():
            notes += [f"Pallas kernel {self.kernel_name(label)}: {reason}" for reason in kernel.reasons]
        notes += more_notes
        return Report(
            name=self.traced.name,
            target=self.facts.name,
            compulsory=self.compulsory(),
            requested=Traffic(read, written),
            dram=dram,
            peak_bytes=self.compiled.peak_bytes,
            flops=sum(r.flops for r in rows),
            peak_flops=self.facts.peak_flops,
            bytes_per_s=self.facts.bytes_per_s,
            rows=tuple(sorted(rows, key=lambda r: -r.bytes)),
            unknown=tuple(dict.fromkeys(unknown)),
            notes=tuple(dict.fromkeys(notes)),
        )

    def row(self, instruction: Instruction, calls: int | None, unknown: list[str]) -> Row:
        source = self.module.source(instruction)
        others = ()
        if instruction.opcode == "fusion":
            inner = (self.module.source(i) for i in instruction.called[0].instructions)
            others = tuple(dict.fromkeys(s for s in inner if s and s != source))
        label = self.kernels.get(instruction)
        if label is not None:
            kernel = self.kernel_traffic[label]
            read, written, flops = sum(kernel.read.values()), sum(kernel.written.values()), kernel.flops
            name, opcode, confidence = self.kernel_name(label), "pallas_call", kernel.confidence
            source = pallas.source(self.traced.sites[label].equation)
            if confidence == "unknown":
                unknown.append(f"Pallas kernel {name}: {kernel.reasons[0]}")
        else:
            cost = traffic.cost(instruction)
            read, written, flops, confidence = cost.read, cost.written, cost.flops, cost.confidence
            name, opcode = instruction.name, instruction.opcode
            if self.is_strange_kernel(instruction):
                read, written, flops, confidence = 0, 0, 0, "unknown"
                what = f"kernel {name} ({instruction.custom_call_target})"
                unknown.append(f"{what}: it could not be joined to a Pallas kernel of the program")
        if calls is None:
            confidence = "unknown"
        return Row(
            name=name,
            opcode=opcode,
            calls=calls,
            read=read * (calls or 0),
            written=written * (calls or 0),
            share=0.0,
            confidence=confidence,
            source=source,
            scope=program.without_labels(instruction.op_name),
            other_sources=others,
            flops=flops * (calls or 0),
        )

    def is_strange_kernel(self, instruction: Instruction) -> bool:
        """Whether a custom call runs a kernel that there is no code of: its operands say little of its bytes.

        A callback is the user's own where every kernel of the program was found elsewhere.
        """
        if instruction.opcode != "custom-call" or instruction in self.kernels:
            return False
        if _CALLBACK.search(instruction.custom_call_target):
            return not instruction.op_name or self.is_kernel_missing
        return bool(_KERNEL_CODE.search(instruction.custom_call_target))

    def kernel_names(self) -> set[str]:
        """Names under which the module's Pallas kernels were compiled."""
        return {self.kernel_name(label) for label in self.kernel_traffic}

    def kernel_name(self, label: int) -> str:
        equation = self.traced.sites[label].equation
        return str(equation.params.get("name") or pallas.body(equation).debug_info.func_name)

    def describe(self, instruction: Instruction) -> str:
        where = self.module.source(instruction) or program.without_labels(instruction.op_name)
        what = "loop" if instruction.opcode == "while" else "branch"
        missing = self.labels.get(instruction) in self.measured.missing
        why = "depends on values that were not given" if missing else "could not be counted"
        return f"{what} {instruction.name} at {where}: how often it runs {why}"

    def compulsory(self) -> Traffic:
        """Live inputs and outputs, each whole, once."""
        entry = self.module.entry
        read = sum(p.shape.bytes for p in entry.parameters if p.users or p is entry.root)
        return Traffic(read, entry.root.shape.bytes)

    def dram(self, times) -> tuple[Dram, list[str]]:
        waves = {
            instruction: l2.waves(self.kernel_traffic[label].touches, self.facts.cores)
            for instruction, label in self.kernels.items()
            if self.kernel_traffic[label].confidence != "unknown"
        }
        replay = l2.Replay(self.module, self.loop, self.branches, waves)
        capacity = self.facts.l2_bytes
        notes = []
        if not capacity:
            notes.append("The size of the last cache is not known: DRAM is modelled without one.")
        whole, half = replay.dram(max(capacity, 1 << 16))

        def interval(state: int, field: str) -> Interval:
            ends = sorted(getattr(capacity[state], field) for capacity in (whole, half))
            return Interval(*ends)

        if replay.extrapolated:
            notes.append("DRAM (model): long loops were replayed for two or three steps and extrapolated.")
        if replay.guessed:
            notes.append(f"DRAM (model): {len(replay.guessed)} slices at positions that are data were taken in turn.")
        cold, warm = (DramTraffic(interval(s, "read"), interval(s, "written")) for s in (0, 1))
        return Dram(cold, warm), notes
