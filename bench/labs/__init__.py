"""`python -m bench lab NAME`: labs that show each trade-off of attention in seconds.

Design fact: labs are small programs over the library; each is one module, imported only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time

LABS = {
    "flash": "tiled attention against the dense definition: time, memory, error, tiles skipped",
    "gqa": "fewer key/value heads: time, memory, cache, traffic, quality",
    "checkpoint": "what to keep for the backward pass: memory against time",
    "toy": "tiny transformers learn copy, reverse, recall, sort",
    "complexity": "time and memory against length, fitted exponents",
    "linear": "linear attention: forms, random features, cost against length",
    "sparse": "window, dilated, BigBird, Longformer, linear against full attention",
    "anatomy": "attention step by step, every mask as a picture",
    "heads": "what the heads of a trained model look at",
}


def main(argv: list[str]) -> int:
    """List the labs, or run one: table, JSON, picture and two lines of what to see. Returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print("python -m bench lab NAME [--help]")
        for name, text in LABS.items():
            print(f"  {name:<12}{text}")
        return 0
    name, *rest = argv
    if name not in LABS:
        print(f"python -m bench lab: no lab {name!r}; labs: {', '.join(LABS)}", file=sys.stderr)
        return 2
    try:
        from bench.labs import lab
    except ImportError as error:
        print(f"{error}: labs need pip install -e '.[bench]'", file=sys.stderr)
        return 2
    one = importlib.import_module(f"bench.labs.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m bench lab {name}", description=LABS[name])
    one.arguments(parser)
    lab.shared_arguments(parser)
    options = parser.parse_args(rest)
    try:
        one.check(options)
    except ValueError as error:
        parser.error(str(error))
    return perform(name, one, options, shlex.join(["python", "-m", "bench", "lab", *argv]))


def perform(name: str, one, options: argparse.Namespace, command: str) -> int:
    """Run a lab whose arguments are right; returns 1 where a claim that it checks is false."""
    from rich.console import Console

    from bench.labs import lab

    console, start = Console(width=None if sys.stdout.isatty() else 120), time.monotonic()
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "publish")}
    data = lab.record(name, command, settings, one.run(options))
    folder = options.out or lab.folder_for(name)
    paths = [lab.save(data, folder / f"{name}.json")]
    for table in one.tables(data):
        console.print(table)
    try:
        paths.append(one.draw(data, folder / f"{name}.png"))
    except ImportError as error:
        console.print(f"No picture: {error}. Install with pip install -e '.[bench]'", markup=False)
    for text in one.see(data):
        console.print(f"See: {text}", markup=False, highlight=False)
    for claim in data.get("claims", []):
        if not claim["holds"]:
            console.print(f"NOT SEEN HERE: {claim['text']} ({claim['found']})", markup=False, highlight=False)
    if options.publish:
        lab.publish(paths)
    console.print(f"{', '.join(map(str, paths))} ({time.monotonic() - start:.0f} s)", soft_wrap=True, markup=False)
    return 0 if all(claim["holds"] for claim in data.get("claims", [])) else 1
