"""`python -m bench`: dispatch to a subcommand, or the main job.

Design fact: the first argument names a subcommand or it is an option of the main job; a subcommand's module
is imported only when it runs.
"""

from __future__ import annotations

import importlib
import sys

from bench import commands, results


def main(argv: list[str]) -> int:
    """Run a subcommand's `main(argv)`, or the main job; returns the exit code, 2 where a file cannot be written."""
    try:
        return dispatch(argv)
    except results.WriteError as error:
        print(f"{error}; what was written before is whole", file=sys.stderr)
        return 2


def dispatch(argv: list[str]) -> int:
    """The exit code of the command that the arguments name."""
    if argv and not argv[0].startswith("-"):
        name, *rest = argv
        available = commands.available()
        if name not in available:
            print(f"python -m bench: no command {name!r}; commands: {', '.join(available)}", file=sys.stderr)
            return 2
        return importlib.import_module(commands.COMMANDS[name].module).main(rest)
    return importlib.import_module("bench.measure").main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
