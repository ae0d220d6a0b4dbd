"""The whole model: logits and greedy tokens equal to Hugging Face's, and a comparison that fails when they
are not."""

import io
import json
import re
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from jaxattn import nn, rope
from oracle import __main__ as command
from oracle import checkpoint, parity
from oracle import llama as reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.make(tmp_path_factory.mktemp("tiny"), shapes=checkpoint.TINY)


@pytest.mark.parametrize("name", ["naive", "blockwise"])
def test_logits_and_64_greedy_tokens_of_a_left_padded_batch_are_hugging_face_s(folder, name):
    rows = parity.compare_model(folder, "tiny", "float32", parity.implementation(name))
    assert [row.stage for row in rows] == ["logits", "greedy tokens"]
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


@pytest.mark.parametrize("name", ["triton", "loops"])
def test_slow_implementations_give_the_same_64_greedy_tokens(tmp_path, name):
    folder = checkpoint.make(tmp_path, shapes=checkpoint.TINIEST)
    rows = parity.compare_model(folder, "tiny", "float32", parity.implementation(name), tokens=4)
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


def test_bfloat16_logits_follow_the_accuracy_rule_and_clear_choices_are_hugging_face_s(folder, monkeypatch):
    taken = []
    monkeypatch.setattr(
        parity, "_choices", lambda *args, choose=parity._choices: taken.append(choose(*args)) or taken[-1]
    )
    rows = parity.compare_model(folder, "tiny", "bfloat16", "naive")
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))
    assert taken[0].shape == (2, 64)
    monkeypatch.setattr(parity, "_choices", lambda *args: (taken[0] + 1) % 64)
    logits, tokens = parity.compare_model(folder, "tiny", "bfloat16", "naive")
    assert logits.verdict
    right = re.fullmatch(r"(\d+) tokens differ of (\d+) clear choices", tokens.verdict.reason)
    assert right[1] == right[2]
    assert int(right[2]) >= 64  # of 128


def test_generation_settings_of_a_checkpoint_do_not_reach_the_comparison(folder):
    model, ids = checkpoint.load_model(folder), np.arange(5)[None]
    expected = reference.greedy(model, ids, 12)
    settings = dict(
        do_sample=True, eos_token_id=expected[0, :2].tolist(), repetition_penalty=9.0, no_repeat_ngram_size=1
    )
    model.generation_config.update(**settings, max_length=7, num_beams=2)
    np.testing.assert_array_equal(reference.greedy(model, ids, 12), expected)
    assert model.generation_config.repetition_penalty == 9.0


def test_logits_are_compared_on_a_second_device_too(folder):
    rows = parity.compare_model(folder, "tiny", "float32", "naive", tokens=8, new_tokens=2, device="cpu")
    assert [row.stage for row in rows] == ["logits", "vs torch on cpu", "greedy tokens"]
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))
    assert rows[0].verdict.max_abs == rows[1].verdict.max_abs


def test_untied_embeddings_and_biases_agree(tmp_path):
    shapes = checkpoint.Shapes(
        layers=1, vocabulary=40, d_model=32, heads=4, kv_heads=1, head_dim=8, mlp=24, rope="default", tied=False,
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    checkpoint.make(tmp_path, shapes=shapes, dtype="float32")
    rows = parity.compare_model(tmp_path, "biased", "float32", "naive", tokens=8, new_tokens=4)
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


def test_a_wrong_rotation_fails_the_comparison(folder, monkeypatch):
    monkeypatch.setattr(rope, "_llama3", lambda inv_freq, scaling: inv_freq * 0.9)
    logits, _ = parity.compare_model(folder, "tiny", "float32", "naive", tokens=8, new_tokens=2)
    assert not logits.verdict


def test_one_wrong_token_fails_the_comparison(folder, monkeypatch):
    generate = nn.generate
    monkeypatch.setattr(nn, "generate", lambda *args, **options: generate(*args, **options).at[1, 2].add(1))
    logits, tokens = parity.compare_model(folder, "tiny", "float32", "naive", tokens=8, new_tokens=4)
    assert logits.verdict
    assert not tokens.verdict
    assert tokens.verdict.reason == "1 tokens differ; the first at step 2"


def test_generate_prints_both_and_fails_where_they_differ(folder, capsys, monkeypatch):
    arguments = ["generate", "--checkpoint", str(folder), "--new-tokens", "5"]
    assert command.main(arguments) == 0
    assert "5 of 5 tokens equal" in capsys.readouterr().out
    generate = nn.generate
    monkeypatch.setattr(nn, "generate", lambda *args: generate(*args).at[0, 3].add(1))
    assert command.main(arguments) == 1
    assert "3 of 5 tokens equal before the first that differs" in capsys.readouterr().out
    assert command.main([*arguments, "--prompt", "hello"]) == 2
    assert "needs a tokenizer" in capsys.readouterr().err


def test_code_that_a_tokenizer_names_is_not_run_and_a_broken_one_is_not_called_absent(tmp_path, monkeypatch, capsys):
    source, witness = checkpoint.make(tmp_path / "in", shapes=checkpoint.TINIEST), tmp_path / "run"
    arguments = ["generate", "--checkpoint", str(source), "--prompt", "hello", "--new-tokens", "1"]
    (source / "theirs.py").write_text(f"open({str(witness)!r}, 'w')")
    about = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(about))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    capsys.readouterr()
    assert command.main(arguments) == 2
    assert not witness.exists()
    assert re.search("^error: --prompt needs a tokenizer, .*ValueError: .*custom code", capsys.readouterr().err, re.M)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (source / "tokenizer.json").write_text("{")
    assert command.main(arguments) == 2
    assert re.search(r"^error: --prompt needs a tokenizer, .* leave --prompt out: \w+: ", capsys.readouterr().err, re.M)
