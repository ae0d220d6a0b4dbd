"""The result of a profile: what moved, where it came from, how far each number can be trusted.

A report holds plain numbers and text only: it prints, groups, compares, saves and loads without the program.
"""

import dataclasses
import json
from pathlib import Path

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes read and written."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Read + written."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Interval:
    """A modelled number of bytes: `low` with the whole cache, `high` with half of it (or the reverse)."""

    low: int
    high: int

    def __str__(self) -> str:
        low, high = format_bytes(self.low), format_bytes(self.high)
        return low if low == high else f"{low} to {high}"


@dataclasses.dataclass(frozen=True)
class DramTraffic:
    """Modelled bytes between the last cache and memory."""

    read: Interval
    written: Interval

    @property
    def total(self) -> Interval:
        """Read + written."""
        return Interval(self.read.low + self.written.low, self.read.high + self.written.high)


@dataclasses.dataclass(frozen=True)
class Dram:
    """Cold: from an empty cache until all is written back. Warm: the same call right after one."""

    cold: DramTraffic
    warm: DramTraffic


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel of the compiled program.

    Attributes:
        name: XLA's name of the instruction.
        opcode: XLA's opcode; for a Pallas kernel, `pallas_call`.
        calls: how often it runs; None where that is unknown.
        read, written: bytes over all calls; 0 where the calls are unknown.
        share: of all requested bytes.
        confidence: `exact`, `modelled` or `unknown`.
        source: `file:line` that asked for it (of a fusion, for its root).
        scope: JAX's name stack.
        other_sources: of what was fused into it.
        flops: floating-point operations over all calls.
    """

    name: str
    opcode: str
    calls: int | None
    read: int
    written: int
    share: float
    confidence: str
    source: str
    scope: str
    other_sources: tuple[str, ...] = ()
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read + written."""
        return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share a key."""

    key: str
    kernels: int
    calls: int
    read: int
    written: int
    share: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What one call of a program moves; see `profile`.

    Attributes:
        name, target: the program, and the device that it was compiled for.
        compulsory: live inputs and outputs, each whole, once.
        requested: what the executed kernels read and write, after fusion, each time they run.
        dram: modelled, from requested, through the device's last cache.
        peak_bytes: arguments + outputs + temporaries - what outputs share with arguments.
        flops: floating-point operations.
        rows: one per kernel, the largest first.
        unknown: loops and kernels that could not be counted; their bytes are in no total.
        notes: how the numbers came about.
    """

    name: str
    target: str
    compulsory: Traffic
    requested: Traffic
    dram: Dram
    peak_bytes: int
    flops: int
    peak_flops: float
    bytes_per_s: float
    rows: tuple[Row, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def launches(self) -> int:
        """Kernels run, of those that could be counted; copies by the device's copy engine are none."""
        return sum(row.calls or 0 for row in self.rows if row.opcode not in ("copy", "copy-start"))

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte of cold memory traffic (model, the lower end)."""
        low = min(self.dram.cold.total.low, self.dram.cold.total.high)
        return self.flops / low if low else float("inf")

    @property
    def bound_us(self) -> float | None:
        """Roofline: microseconds that the device needs at least, for the operations or for the cold memory traffic.

        None where the device's rates are not known.
        """
        if not self.peak_flops or not self.bytes_per_s:
            return None
        low = min(self.dram.cold.total.low, self.dram.cold.total.high)
        return 1e6 * max(self.flops / self.peak_flops, low / self.bytes_per_s)

    def group(self, by: str = "source") -> list[Group]:
        """The rows summed by `kernel`, `source` or `scope`, the largest first."""
        if by not in ("kernel", "source", "scope"):
            raise ValueError(f"by={by!r} must be 'kernel', 'source' or 'scope'")
        sums: dict[str, list] = {}
        for row in self.rows:
            key = row.name if by == "kernel" else getattr(row, by) or "(none)"
            entry = sums.setdefault(key, [0, 0, 0, 0])
            for i, value in enumerate((1, row.calls or 0, row.read, row.written)):
                entry[i] += value
        total = max(self.requested.total, 1)
        groups = [Group(key, *entry, share=(entry[2] + entry[3]) / total) for key, entry in sums.items()]
        return sorted(groups, key=lambda g: -(g.read + g.written))

    def compare(self, after: "Report") -> str:
        """A table of this report against another: each number before, after, and after / before."""

        def line(label, before, now, show=None):
            show = show or format_bytes
            ratio = f"{now / before:.3g}x" if before else "-"
            return [label, show(before), show(now), ratio]

        lines = [["", self.name, after.name, "after / before"]]
        for label in ("compulsory", "requested"):
            lines.append(line(label, getattr(self, label).total, getattr(after, label).total))
        for state in ("cold", "warm"):
            before, now = (getattr(r.dram, state).total for r in (self, after))
            lines.append(line(f"DRAM {state} (model)", before.low, now.low))
        lines.append(line("peak", self.peak_bytes, after.peak_bytes))
        lines.append(line("flops", self.flops, after.flops, lambda n: f"{n:.4g}"))
        lines.append(line("launches", self.launches, after.launches, str))
        text = _table(lines)
        flags = [f"UNKNOWN in {r.name}: {u}" for r in (self, after) for u in r.unknown]
        return "\n".join([*flags, text])

    def save(self, path: Path | str) -> None:
        """Writes the report as JSON."""
        data = {"format": FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "Report":
        """Reads what `save` wrote.

        Raises:
            ValueError: if the file is no report of this format.
        """
        data = json.loads(Path(path).read_text())
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no profiler report of format {FORMAT}")

        def dram(part):
            return DramTraffic(**{k: Interval(**v) for k, v in part.items()})

        data["compulsory"], data["requested"] = Traffic(**data["compulsory"]), Traffic(**data["requested"])
        data["dram"] = Dram(**{k: dram(v) for k, v in data["dram"].items()})
        data["rows"] = tuple(Row(**{**r, "other_sources": tuple(r["other_sources"])}) for r in data["rows"])
        return cls(**{**data, "unknown": tuple(data["unknown"]), "notes": tuple(data["notes"])})

    def __str__(self) -> str:
        return self.table()

    def table(self, rows: int = 20) -> str:
        """The report as text, with its largest rows."""
        out = [f"UNKNOWN: {u}" for u in self.unknown]
        if self.unknown:
            out.append("The totals leave these out: they are lower bounds.")
        bound = self.bound_us
        out += [
            f"{self.name}, compiled for {self.target}",
            _table(
                [
                    ["", "read", "written", "total"],
                    ["compulsory", *_three(self.compulsory)],
                    ["requested", *_three(self.requested)],
                    ["DRAM cold (model)", *map(str, _parts(self.dram.cold))],
                    ["DRAM warm (model)", *map(str, _parts(self.dram.warm))],
                ]
            ),
            f"peak memory {format_bytes(self.peak_bytes)}, {self.launches} kernel launches, {self.flops:.4g} flop, "
            f"{self.intensity:.3g} flop/byte, at least {'unknown' if bound is None else f'{bound:.4g} us'} (roofline)",
        ]
        shown = [["kernel", "opcode", "calls", "read", "written", "share", "confidence", "source"]]
        for row in self.rows[:rows]:
            calls = "?" if row.calls is None else str(row.calls)
            source = "/".join(row.source.rsplit("/", 2)[-2:])
            amounts = [format_bytes(row.read), format_bytes(row.written), f"{row.share:.1%}"]
            shown.append([row.name, row.opcode, calls, *amounts, row.confidence, source])
        out.append(_table(shown))
        if len(self.rows) > rows:
            out.append(f"and {len(self.rows) - rows} more rows")
        return "\n".join([*out, *self.notes])

    def plot(self, path: Path | str, kernels: int = 12) -> None:
        """Saves a figure: requested bytes of the largest kernels, and the program in the device's roofline."""
        import matplotlib.pyplot as plt
        import numpy as np

        figure, (bars, roof) = plt.subplots(1, 2, figsize=(13, 4.8), width_ratios=(3, 2), layout="constrained")
        shown = self.rows[:kernels][::-1]
        names = [f"{row.name} ({'?' if row.calls is None else row.calls}x)" for row in shown]
        read = np.array([row.read for row in shown]) / 1e6
        written = np.array([row.written for row in shown]) / 1e6
        bars.barh(names, read, color="#9ecae1", label="read")
        bars.barh(names, written, left=read, color="#08519c", label="written")
        bars.set_xlabel("requested, MB per call of the program")
        bars.legend(loc="lower right")
        bars.set_title(f"{self.name} on {self.target}: {format_bytes(self.requested.total)} requested")
        if self.bound_us is None:
            roof.text(0.5, 0.5, f"no peak rates known\nfor {self.target}", ha="center", va="center")
            roof.set_axis_off()
        else:
            ridge = self.peak_flops / self.bytes_per_s
            x = np.geomspace(min(self.intensity, ridge) / 20, max(self.intensity, ridge) * 20, 100)
            roof.loglog(x, np.minimum(self.peak_flops, x * self.bytes_per_s) / 1e12, color="black", label="roofline")
            at = min(self.peak_flops, self.intensity * self.bytes_per_s) / 1e12
            roof.loglog([self.intensity], [at], "o", color="#08519c", label=f"{self.name}, at best (model)")
            roof.axvline(ridge, color="0.6", linestyle=":", label=f"ridge, {ridge:.0f} flop/byte")
            roof.set_xlabel("flop per byte of cold DRAM traffic (model)")
            roof.set_ylabel("TFLOP/s")
            roof.legend(loc="lower right")
            roof.set_title(f"at least {self.bound_us:.4g} us")
        figure.savefig(path, dpi=130)
        plt.close(figure)


def format_bytes(n: float) -> str:
    """Decimal units, four digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n:.0f} B"


def _three(traffic: Traffic) -> list[str]:
    return [format_bytes(n) for n in (traffic.read, traffic.written, traffic.total)]


def _parts(dram: DramTraffic) -> tuple[Interval, Interval, Interval]:
    return dram.read, dram.written, dram.total


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = []
    for line in lines:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)
