"""`python -m bench compare A.json B.json`: ratios of two runs, and which of them are within noise.

Design fact: the noise of a ratio is the sum of what both rows showed themselves, over their own repeats.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.results import compare, load


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
    ratios = compare(a, b)
    for name, file in (("A", a), ("B", b)):
        found = file["environment"]
        print(f"{name}: {found['device_name']}, {file['date']}, commit {file['commit']}")
    if not ratios:
        print("The two files have no measurement in common.")
        return 1
    print(f"{'case':<16}{'length':>8}  {'implementation':<22}{'A ms':>12}{'B ms':>12}{'B/A':>8}{'noise':>8}  verdict")
    for ratio in ratios:
        row = ratio.row
        noise = "?" if ratio.noise is None else f"{ratio.noise:.0%}"
        print(
            f"{row['case']:<16}{row['keys']:>8}  {row['implementation']:<22}{ratio.a_ms:>12.3f}"
            f"{ratio.b_ms:>12.3f}{ratio.ratio:>8.3f}{noise:>8}  {ratio.verdict}"
        )
    return 0
