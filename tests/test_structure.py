"""The directions of imports, and that `import jaxattn` stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FRAMEWORKS = {"torch", "transformers", "oracle", "bench"}
# module prefix -> what it may import from jaxattn
ALLOWED = {
    "jaxattn.api": {"jaxattn.impl", "jaxattn.masks"},
    "jaxattn.impl": {
        "jaxattn.tiles",
        "jaxattn.masks",
        "jaxattn.online_softmax",
        "jaxattn.impl.base",
        "jaxattn.impl.partition",
    },
    "jaxattn.tiles": {"jaxattn.masks"},
    "jaxattn.patterns": {"jaxattn.masks"},
    "jaxattn.masks": {"jaxattn.tiles"},
    "jaxattn.online_softmax": set(),
    "jaxattn.rope": set(),
    "jaxattn.linear": set(),
    "jaxattn.nn": {
        "jaxattn",
        "jaxattn.api",
        "jaxattn.masks",
        "jaxattn.patterns",
        "jaxattn.rope",
        "jaxattn.linear",
        "jaxattn.impl.base",
    },
    "jaxattn.llama": {"jaxattn.nn", "jaxattn.rope"},
    "jaxattn.profiler": {"jaxattn.profiler"},
}


def modules(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path, package):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: 1 - node.level or None]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            if module == "jaxattn":
                # `from jaxattn import rope` imports the module where there is one, else a public name
                for alias in node.names:
                    is_module = (ROOT / "jaxattn" / f"{alias.name}.py").exists() or (
                        ROOT / "jaxattn" / alias.name
                    ).is_dir()
                    yield f"jaxattn.{alias.name}" if is_module else "jaxattn"
            else:
                yield module


def within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


LIBRARY = list(modules("jaxattn"))


@pytest.mark.parametrize(("module", "path"), LIBRARY, ids=[m for m, _ in LIBRARY])
def test_library_modules_import_only_what_the_layout_allows(module, path):
    found = set(imports(path, module))
    assert not {name for name in found if name.split(".")[0] in FRAMEWORKS}
    if module == "jaxattn":
        return
    key = max((k for k in ALLOWED if within(module, k)), key=len, default=None)
    assert key is not None, f"{module} has no place in the layout"
    inner = {name for name in found if within(name, "jaxattn")}
    allowed = ALLOWED[key]
    assert not {name for name in inner if not any(within(name, a) if a != "jaxattn" else name == a for a in allowed)}


def test_nothing_in_the_library_imports_the_profiler():
    assert not [
        module for module, path in LIBRARY
        if not within(module, "jaxattn.profiler") and any(within(x, "jaxattn.profiler") for x in imports(path, module))
    ]  # fmt: skip


def test_oracle_references_import_neither_jax_nor_jaxattn():
    for name in ("attention", "llama", "checkpoint"):
        path = ROOT / "oracle" / f"{name}.py"
        found = {x.split(".")[0] for x in imports(path, f"oracle.{name}")}
        assert not found & {"jax", "jaxattn", "flax", "bench"}, name


def test_importing_jaxattn_loads_no_torch_and_no_kernel_backend():
    code = (
        "import sys, jaxattn\n"
        "loaded = [m for m in ('torch', 'transformers', 'oracle', 'bench', 'jaxattn.profiler', "
        "'jax.experimental.pallas.triton') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_public_names_are_what_all_says():
    import jaxattn

    assert sorted(jaxattn.__all__) == jaxattn.__all__
    assert all(hasattr(jaxattn, name) for name in jaxattn.__all__)
