"""Tables from a results file: `report.md`, and `report.html` with the pictures inside.

Design fact: reads the results file and nothing else, so that a report can be made again from what was
committed; both forms come from one list of headings, paragraphs, tables and pictures.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
from pathlib import Path

from bench import plot, results

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows of text; all columns but the first `left` are numbers, aligned right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    path: Path
    text: str


def blocks(data: dict, pictures: list[Path]) -> list:
    """The report's contents in order."""
    found = data["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
    parts = [
        Heading("Attention, side by side", 1),
        Paragraph(
            f"{found['device_name']} ({found['device']}), {found['cores']} cores, "
            f"{(found.get('memory_bytes') or 0) / 1e9:.1f} GB available at the start. {data['date']}, "
            f"commit {data['commit'] or 'unknown'}."
        ),
        Paragraph(f"Command: `{data['command']}`. Python {found.get('python', 'unknown')}; {packages}."),
        *(Paragraph(f"Note: {note}") for note in found.get("notes", ())),
    ]
    many = plot.groups(data)
    left = list(pictures)
    for key, rows in many.items():
        parts.append(Heading(plot.caption(key, rows), 2))
        parts.append(Paragraph(f"Case `{key[0]}`."))
        parts.append(Paragraph(findings(rows)))
        stem = plot.name_of(key, many)
        for path in [path for kind in plot.KINDS for path in left if path.stem == f"{stem}-{kind}"]:
            parts.append(Picture(path, f"{path.stem.removeprefix(stem + '-')}: {plot.caption(key, rows)}"))
            left.remove(path)
        measured = tuple(cells(row) for row in rows if results.measured(row))
        if measured:
            parts.append(Table(COLUMNS, measured))
        if said := disturbed(rows):
            parts.append(Paragraph(said))
        moved = tuple(traffic_cells(row) for row in rows if row.get("traffic"))
        if moved:
            parts.append(Paragraph("Bytes moved by the JAX rows, modelled by the profiler, not measured:"))
            parts.append(Table(TRAFFIC_COLUMNS, moved))
        lost: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            if not results.measured(row):
                lost.setdefault((row["label"], row["status"], row["reason"]), []).append(str(row["keys"]))
        if lost:
            cells_lost = tuple((label, ", ".join(keys), *why) for (label, *why), keys in lost.items())
            parts.append(Paragraph("Not measured, and why:"))
            parts.append(Table(("implementation", "length", "status", "reason"), cells_lost, left=4))
    parts += [Picture(path, path.stem) for path in left]
    parts += [Heading("How these figures were taken"), Bullets(tuple(data.get("method", ())))]
    return parts


COLUMNS = (
    "implementation",
    "length",
    "ms (median)",
    "fastest to slowest",
    "repeats",
    "device ms",
    "TFLOP/s",
    "compile s",
    "first call s",
    "temporaries MiB",
    "peak MiB",
    "predicted MiB",
    "RMSE",
    "allowed",
)


def cells(row: dict) -> tuple[str, ...]:
    """One row of the table of measurements; empty where a thing was not measured."""
    short = results.summary(row)
    error = row["error"] or {}
    return (
        row["label"],
        str(row["keys"]),
        number(short.time_ms),
        f"{number(short.low_ms)} to {number(short.high_ms)}" if short.repeats > 1 else "",
        str(short.repeats),
        number(short.device_ms),
        number(short.tflops),
        number(row.get("compile_s")),
        number(row.get("first_s")),
        number(row.get("temporaries_bytes"), MIB),
        number(row.get("peak_bytes"), MIB),
        "" if row["tiled"] or row["direction"] != "forward" else number(row.get("predicted_bytes"), MIB),
        f"{error['rmse']:.2e}" if error else "unchecked",
        f"{error['bound']:.2e}" if error else "",
    )


def disturbed(rows: list[dict]) -> str:
    """Which rows had disturbed repeats and whether these count, in sentences; empty where none had."""
    sentences = []
    for left_out, text in (
        (True, "Not in the figures, for the control beside them was slow"),
        (False, f"In the figures though disturbed, for fewer than {results.FEWEST} repeats were not"),
    ):
        found = [
            row for row in rows if row["disturbed"] and bool(row["left_out"]) == left_out and results.measured(row)
        ]
        each = (
            f"{row['label']} at {row['keys']}, {row['disturbed']} of {len(row['times_s']) + row['left_out']} repeats"
            for row in found
        )
        if found:
            sentences.append(f"{text}: {'; '.join(each)}.")
    return " ".join(sentences)


TRAFFIC_COLUMNS = (
    "implementation",
    "length",
    "compulsory MB",
    "requested MB",
    "DRAM (model, cold) MB",
    "not counted",
)


def traffic_cells(row: dict) -> tuple[str, ...]:
    """One row of the table of bytes; the reason where the profiler could not say."""
    found = row["traffic"]
    if "reason" in found:
        return (row["label"], str(row["keys"]), "", "", "", found["reason"])
    low, high = number(found["dram_low_bytes"], 1e6), number(found["dram_high_bytes"], 1e6)
    return (
        row["label"],
        str(row["keys"]),
        number(found["compulsory_bytes"], 1e6),
        number(found["requested_bytes"], 1e6),
        low if low == high else f"{low} to {high}",
        "; ".join(found["unknown"]),
    )


def number(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits without an exponent.

    >>> number(1234.5), number(0.01234), number(None)
    ('1234', '0.0123', '')
    """
    if value is None:
        return ""
    value /= unit
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def findings(rows: list[dict]) -> str:
    """What the rows of one group say, in sentences: fastest at each length, speedup and memory of tiling."""
    sentences = []
    alone = [row for row in rows if not row["layer"]]
    length = plot.crossover(alone)
    if length == plot.NEVER:
        sentences.append(
            "Flash (a tile of scores at a time) is at no measured length more than 2x faster than standard."
        )
    elif length is not None:
        sentences.append(
            f"Flash (a tile of scores at a time) is more than 2x faster than standard first at length {length}."
        )
    both = speedup(alone)
    if both:
        sentences.append(both)
    for length in sorted({row["keys"] for row in alone}):
        timed = [row for row in alone if row["keys"] == length and results.measured(row)]
        if timed:
            best = min(timed, key=lambda row: results.summary(row).time_ms)
            sentences.append(f"Fastest at {length}: {best['label']}, {number(results.summary(best).time_ms)} ms.")
    return " ".join(sentences)


def speedup(rows: list[dict]) -> str | None:
    """Fastest tiled against fastest standard row, and their peaks, at the longest length that has both."""
    for length in sorted({row["keys"] for row in rows}, reverse=True):
        timed = [row for row in rows if row["keys"] == length and results.measured(row)]
        tiled = [row for row in timed if row["tiled"]]
        standard = [row for row in timed if row["tiled"] is False]
        if not tiled or not standard:
            continue
        fast, slow = (min(part, key=lambda row: results.summary(row).time_ms) for part in (tiled, standard))
        ratio = results.summary(slow).time_ms / results.summary(fast).time_ms
        text = f"Speedup at n={length}: {ratio:.2f}x ({fast['label']} over {slow['label']})"
        if fast["case"] == "speedup":
            text += "; on GPUs 2 to 4x is expected"
        peaks = [min((row.get("peak_bytes") or 0 for row in part), default=0) for part in (tiled, standard)]
        if all(peaks):
            least, most = (number(peak, MIB) for peak in peaks)
            text += f"; least peak memory {least} MiB against {most} MiB, {peaks[1] / peaks[0]:.1f}x"
            if fast["case"] == "speedup":
                text += " (5 to 20x is expected)"
        return text + "."
    return None


def markdown(parts: list) -> str:
    """The blocks as Markdown."""
    lines = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Paragraph):
            lines.append(part.text)
        elif isinstance(part, Bullets):
            lines += ["\n".join(f"- {item}" for item in part.items)]
        elif isinstance(part, Picture):
            lines.append(f"![{part.text}]({part.path.name})")
        else:
            rule = ["---" if index < part.left else "---:" for index in range(len(part.columns))]
            body = [part.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in part.rows)]
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in body))
    return "\n\n".join(lines) + "\n"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Attention, side by side</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
.left {{ text-align: left; white-space: normal }}
img {{ max-width: 100%; height: auto }}
</style>
{body}
</html>
"""


def page(parts: list) -> str:
    """The blocks as one HTML file that needs no other."""
    lines = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"<h{part.level}>{html.escape(part.text)}</h{part.level}>")
        elif isinstance(part, Paragraph):
            lines.append(f"<p>{html.escape(part.text)}</p>")
        elif isinstance(part, Bullets):
            lines.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in part.items) + "</ul>")
        elif isinstance(part, Picture):
            data = base64.b64encode(part.path.read_bytes()).decode()
            lines.append(f'<img alt="{html.escape(part.text)}" src="data:image/png;base64,{data}">')
        else:

            def row(tag: str, row: tuple[str, ...], left: int = part.left) -> str:
                cells = (
                    f"<{tag}{' class=left' if index < left else ''}>{html.escape(cell)}</{tag}>"
                    for index, cell in enumerate(row)
                )
                return f"<tr>{''.join(cells)}</tr>"

            body = "\n".join([row("th", part.columns), *(row("td", cells) for cells in part.rows)])
            lines.append(f"<table>\n{body}\n</table>")
    return PAGE.format(body="\n".join(lines))


def write(data: dict, folder: Path, pictures: list[Path]) -> list[Path]:
    """Write both reports beside the results; returns their paths."""
    parts = blocks(data, pictures)
    paths = [folder / "report.md", folder / "report.html"]
    results.write_text(paths[0], markdown(parts))
    results.write_text(paths[1], page(parts))
    return paths


def main(argv: list[str]) -> int:
    """Draw a results file again and write its reports, with every picture beside it."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="a run's folder")
    arguments = parser.parse_args(argv)
    try:
        data = results.load(arguments.folder)
    except ValueError as error:
        parser.error(str(error))
    try:
        plot.draw(data, arguments.folder)
    except ImportError as error:
        print(f"Nothing was drawn again: {error}. Install with pip install -e '.[all]'")
    for path in write(data, arguments.folder, sorted(arguments.folder.glob("*.png"))):
        print(path)
    return 0
