"""`python -m jaxattn.profiler wheels [--to FOLDER]`: installs what compiles for a GPU that is not there."""

import argparse
import sys
from pathlib import Path

from jaxattn.profiler.compile import install_wheels, wheels_folder


def main(argv: list[str]) -> int:
    """Parses the command line and runs it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxattn.profiler", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    wheels = commands.add_parser("wheels", help="install the compile wheels into their own folder")
    wheels.add_argument("--to", type=Path, default=None, help=f"default: {wheels_folder()}")
    arguments = parser.parse_args(argv)
    try:
        folder = install_wheels(arguments.to)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"the compile wheels are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
