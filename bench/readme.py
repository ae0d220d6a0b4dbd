"""`python -m bench readme`: the README's tables and pictures, made from the published results.

Design fact: a table stands in the README between two comments that name its source,
`<!-- bench: cpu/cases llama-3.2-1b -->` and `<!-- /bench -->`; everything between them is made from
`bench/results/cpu/cases/results.json`, so a test can say whether the README and the results agree. The case `pairs`
is the table of `python -m bench cpu`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench import pairs, plot, report, results

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def table(data: dict, case: str, folder: str) -> str:
    """One case as Markdown: implementations down, lengths across, milliseconds and peak memory in the cells."""
    many = plot.groups(data)
    parts = []
    for key, rows in many.items():
        if key[0] != case or not any(results.measured(row) for row in rows):
            continue
        lengths = sorted({row["keys"] for row in rows})
        lines = [["implementation", *(f"{length}" for length in lengths)]]
        lines.append(["---", *("---:" for _ in lengths)])
        for own in plot.by_implementation(rows).values():
            if any(results.measured(row) for row in own):
                found = {row["keys"]: cell(row) for row in own}
                lines.append([own[0]["label"], *(found.get(length, "") for length in lengths)])
        load = data["environment"]["load_average"]
        busy = f", beside other work (load average {load:.0f})" if load > 0.75 * data["environment"]["cores"] else ""
        cores = "" if data["environment"]["device"] == "cuda" else f", {data['settings']['threads']} cores"
        parts.append(
            f"{plot.caption(key, rows)}; {data['environment']['device_name']}{cores}, {data['date'][:10]}{busy}. "
            'Milliseconds of one call (the median of several; "once": a single one), and its peak memory:\n'
        )
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts.append(f"![time against length]({folder}/{plot.name_of(key, many)}-time.png)\n")
    if not parts:
        raise ValueError(f"{folder} has no measurement of case {case!r}")
    return "\n".join(parts)


def cell(row: dict) -> str:
    """Time and memory; for a row that was not measured the first words of its reason."""
    short = results.summary(row)
    if short.time_ms is None:
        return f"({row['reason'].split(':')[0].split(',')[0]})" if row["status"] == "skipped" else f"({row['status']})"
    peak = f", {report.number(row['peak_bytes'], report.MIB)} MiB" if row.get("peak_bytes") else ""
    return f"{report.number(short.time_ms)} ms{' once' if short.repeats == 1 else ''}{peak}"


def updated(text: str, root: Path) -> tuple[str, int]:
    """The README's text with every block made again from the results under `root`, and how many there are.

    Raises: ValueError for a block whose results are not there.
    """

    def make(match: re.Match) -> str:
        folder, case = f"bench/results/{match.group(2)}", match.group(3)
        data = results.load(root / folder)
        made = pairs.markdown(data, folder) if case == "pairs" else table(data, case, folder)
        return match.group(1) + made + match.group(4)

    return BLOCK.subn(make, text)


def main(argv: list[str]) -> int:
    """Make the tables again; with --check only say whether they agree."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where they differ")
    arguments = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text()
    try:
        new, count = updated(old, ROOT)
    except ValueError as error:
        parser.error(str(error))
    if arguments.check:
        print(f"{count} tables; " + ("they agree" if new == old else "they differ from the results"))
        return int(new != old)
    results.write_text(path, new)
    print(f"{count} tables made from the published results")
    return 0
