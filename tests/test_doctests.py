"""The examples in docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("jaxattn", "oracle", "bench")
    for path in sorted((ROOT / package).rglob("*.py"))
    if any(">>>" in line and "+SKIP" not in line for line in path.read_text().splitlines())
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    module = importlib.import_module(name) if name.startswith("jaxattn") else pytest.importorskip(name)
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
