"""`python -m oracle` as a whole: 0 for sound checkpoints of every shape, 1 where a fault is not caught."""

import contextlib
import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from oracle import __main__ as command
from oracle import checkpoint, faults, parity
from oracle.faults import FAULTS, Fault

MHA = checkpoint.Shapes(
    layers=1, vocabulary=32, d_model=32, heads=2, kv_heads=2, head_dim=16, mlp=16, rope="default"
)  # no fewer key/value heads than query heads, no Llama-3 scaling


def run(shapes, folder, *arguments):
    """The exit status, and the JSON."""
    out, source = folder / "parity.json", checkpoint.make(folder / "in", shapes=shapes, dtype="float32")
    status = command.main(["--checkpoint", str(source), "--json", str(out), *arguments])
    return status, json.loads(out.read_text())


def without_the_table(monkeypatch):
    """The faults alone: the rows have tests of their own."""
    monkeypatch.setattr(parity, "compare_model", lambda *args, **options: [])
    monkeypatch.setattr(command, "_compare", lambda *args: [])


@pytest.mark.slow
def test_faults_that_cannot_show_in_a_checkpoint_are_planted_in_another_layer(tmp_path, monkeypatch):
    without_the_table(monkeypatch)
    status, content = run(MHA, tmp_path, "--tokens", "20")
    assert status == 0
    assert all(item["caught"] for item in content["faults"])
    places = {item["fault"]: item["subject"] for item in content["faults"]}
    assert places == {
        "KV heads tiled, not repeated": "tiny llama",
        "accumulator not rescaled": "tiny llama, 80 tokens",
        "no RoPE scaling": "tiny llama",
        "RoPE layout swapped": "llama",
        "whole head rotated, not a part": "stablelm (partial)",
        "mask off by one": "llama",
        "wrong scale": "llama",
        "full-MHA shapes": "tiny llama",
    }


def test_a_fault_that_passes_gives_status_1(tmp_path, monkeypatch, capsys):
    without_the_table(monkeypatch)
    monkeypatch.setattr(faults, "FAULTS", (Fault("nothing", contextlib.nullcontext),))
    status, content = run(checkpoint.TINY, tmp_path, "--tokens", "80")
    assert status == 1
    assert [item["caught"] for item in content["faults"]] == [False]
    assert "NOT CAUGHT" in capsys.readouterr().out


@pytest.mark.slow  # half a minute: every row, every fault
def test_the_whole_command_passes_on_a_sound_checkpoint(tmp_path, capsys):
    status, content = run(checkpoint.TINY, tmp_path, "--tokens", "80")
    assert status == 0
    assert all(row["passes"] for row in content["rows"])
    assert {row["stage"] for row in content["rows"]} >= {"output", "vs torch layer", "logits", "greedy tokens"}
    assert {item["fault"] for item in content["faults"]} == {fault.name for fault in FAULTS}
    assert all(item["caught"] for item in content["faults"])
    assert content["problems"] == []
    assert f"{len(content['faults'])} of {len(content['faults'])} faults caught" in capsys.readouterr().out
