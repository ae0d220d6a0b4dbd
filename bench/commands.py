"""The table of subcommands: name -> module with `main(argv) -> int`, imported when asked for.

Design fact: a command is listed where its module is there, and nowhere else; nothing is imported to list it.
"""

from __future__ import annotations

import dataclasses
import importlib.util

# The exit code of a command that needs a tool which is not on this machine; argparse and files that cannot be
# written end with 2.
MISSING = 3


@dataclasses.dataclass(frozen=True)
class Command:
    module: str
    text: str


COMMANDS = {
    "gpu": Command("bench.gpu", "everything for a machine with a GPU, each part saved when it is done"),
    "cpu": Command("bench.cpu", "blockwise against torch on a CPU, in pairs"),
    "conformance": Command("bench.conformance", "the meaning of every argument, tried on peers"),
    "masks": Command("bench.masks", "a picture of every attention pattern, and what its empty tiles save"),
    "traffic": Command("bench.traffic", "bytes moved against length, naive against tiled"),
    "counters": Command("bench.counters", "hardware counters beside the model, on a GPU"),
    "tune": Command("bench.tune", "block sizes for the kernels"),
    "lab": Command("bench.labs", "labs that show each trade-off in seconds"),
    "calculate": Command("bench.calculators", "memory, FLOPs, longest sequence, KV cache, by formula"),
    "compare": Command("bench.compare", "ratios of two results files, and what is within noise"),
    "plot": Command("bench.plot", "draw a run again"),
    "readme": Command("bench.readme", "make the README's tables again from the published results"),
    "report": Command("bench.report", "write a run's reports again"),
}


def available() -> dict[str, str]:
    """Name -> what it does, of the commands whose module is there."""
    return {
        name: command.text for name, command in COMMANDS.items() if importlib.util.find_spec(command.module) is not None
    }
