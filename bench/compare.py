"""`python -m bench compare A.json B.json`: ratios of two runs, and which of them are within noise.

Design fact: the noise of a ratio is the sum of what both rows showed themselves, over their own repeats: how one
repeat varies, or how well so many of them know their median, whichever is more, each row towards the other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.results import compare, differences, key, least_control_s, load, machine_ratio, measured

WIDTHS = (14, 28, 17, 7, 22, 11, 11, 8, 7)


def main(argv: list[str]) -> int:
    """Print the ratios of two results files: `python -m bench compare A.json B.json`."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=main.__doc__)
    parser.add_argument("a", type=Path, help="results.json, or the folder that holds it")
    parser.add_argument("b", type=Path)
    arguments = parser.parse_args(argv)
    try:
        a, b = load(arguments.a), load(arguments.b)
    except ValueError as error:
        parser.error(str(error))
    for name, file in (("A", a), ("B", b)):
        print(f"{name}: {file['environment']['device_name']}, {file['date']}, commit {file.get('commit')}")
    unlike = differences(a, b)
    if unlike:
        print("The runs differ in more than their times:")
        print("\n".join(f"  {name}: {one} in A, {other} in B" for name, one, other in unlike))
    if (machine := machine_ratio(a, b)) is not None:
        least_ms = [f"{least_control_s(file) * 1e3:.1f} ms in {name}" for name, file in (("A", a), ("B", b))]
        print(f"The machine differed: its control took at least {' and '.join(least_ms)}, a ratio of {machine:.2f}.")
    ratios = compare(a, b)
    if ratios:
        show("case", "mask", "dtype", "length", "implementation", "A ms", "B ms", "B/A", "noise", "verdict")
    for ratio in ratios:
        row = ratio.row
        dtype = row["dtype"] + ("" if row["direction"] == "forward" else " and back") + (" cold" if row["cold"] else "")
        noise = "?" if ratio.noise is None else f"{ratio.noise:.0%}"
        times = (f"{ratio.a_ms:.3f}", f"{ratio.b_ms:.3f}", f"{ratio.ratio:.3f}")
        show(row["case"], row["mask"], dtype, row["keys"], row["implementation"], *times, noise, ratio.verdict)
    shared = {key(ratio.row) for ratio in ratios}
    for name, file in (("A", a), ("B", b)):
        alone = [row for row in file["rows"] if measured(row) and key(row) not in shared]
        if alone:
            print(f"Only in {name}: {len(alone)} measurements of {', '.join(sorted({row['case'] for row in alone}))}.")
    if not ratios:
        print("The two files have no measurement in common.")
    return 0 if ratios else 1


def show(*cells) -> None:
    """Print one line: words left, figures right, the verdict at the end."""
    *columns, verdict = cells
    aligned = (
        f"{cell!s:<{width}}" if index in (0, 1, 2, 4) else f"{cell!s:>{width}}"
        for index, (cell, width) in enumerate(zip(columns, WIDTHS, strict=True))
    )
    print("  ".join([*aligned, verdict]))
