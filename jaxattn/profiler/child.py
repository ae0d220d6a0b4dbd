"""The child process: compiles one program for a GPU that is not there.

Run by path, with the compile wheels on PYTHONPATH and nothing of the library imported; it reads its request
from a folder and leaves its results there: `stats.json`, `name.txt`, and what XLA dumps.
"""

import json
import sys
from pathlib import Path

import private_jax


def main(folder: Path) -> None:
    """Compiles `folder/program.mlirbc` as `folder/request.json` asks."""
    request = json.loads((folder / "request.json").read_text())
    dump = folder / "dump"
    options = {
        "xla_dump_to": str(dump),
        "xla_dump_emitter_re": "ptx",
        "xla_dump_hlo_as_proto": True,
        "xla_dump_hlo_as_text": True,
        **request["options"],
    }
    program = (folder / "program.mlirbc").read_bytes()
    executable = private_jax.compile_bytecode(program, request["target_config"], options)
    stats = executable.get_compiled_memory_stats()
    names = ("argument", "output", "temp", "alias")
    (folder / "stats.json").write_text(json.dumps({name: getattr(stats, f"{name}_size_in_bytes") for name in names}))
    (folder / "name.txt").write_text(executable.hlo_modules()[0].name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
