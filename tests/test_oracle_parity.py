"""The comparison with torch, and that it can fail: every planted fault is caught, and taken out again."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from jaxattn import llama, rope  # noqa: E402
from oracle import __main__ as command  # noqa: E402
from oracle import checkpoint, faults, parity  # noqa: E402
from oracle import llama as reference  # noqa: E402
from oracle.attention import Verdict  # noqa: E402
from oracle.faults import FAULTS, Fault  # noqa: E402

TOKENS = 80  # two key blocks of `parity.BLOCK`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.make(tmp_path_factory.mktemp("tiny"), shapes=checkpoint.TINY, dtype="float32")


@pytest.fixture(scope="module")
def subject(folder):
    ids = np.random.default_rng(0).integers(0, 64, (1, TOKENS))
    return parity.llama_subject(folder, checkpoint.load_model(folder), ids, name="tiny", layer=1, first_position=50)


@pytest.fixture(scope="module")
def partial():
    return parity.partial_subject()


@pytest.fixture(scope="module")
def cases(subject, partial):
    return {s.name: s.case("float32") for s in (subject, partial)}


@pytest.fixture(scope="module")
def layer_file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("layer") / "attn_layer_1.pt"
    assert command.main(["extract", "--checkpoint", str(folder), "--layer", "1", "--out", str(path)]) == 0
    return path


@pytest.mark.parametrize("implementation", ["naive", "blockwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_equals_hugging_face_s(subject, dtype, implementation):
    rows = parity.compare(subject, subject.case(dtype), dtype, parity.implementation(implementation))
    assert [row.stage for row in rows] == [*reference.STAGES, "vs torch layer"]
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


def test_partial_rotary_equals_stablelm_s(partial, cases):
    rows = parity.compare(partial, cases[partial.name], "float32", "naive")
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


PLANTED = [(fault, name) for fault in FAULTS for name in fault.implementations]


@pytest.mark.parametrize(("fault", "name"), PLANTED, ids=[f"{fault.name}-{name}" for fault, name in PLANTED])
def test_a_planted_fault_is_caught_with_a_margin_of_ten_named_and_taken_out_again(subject, partial, cases, fault, name):
    where = next(s for s in (subject, partial) if fault.applies(s))
    before = faults._patchable()
    caught = faults.catch(fault, where, cases[where.name], parity.implementation(name))
    assert caught.margin >= 10, caught
    assert fault.raises or caught.named == fault.name, caught
    assert bool(caught)
    assert faults._patchable() == before


def test_on_one_token_the_faults_that_can_show_are_planted_and_caught(folder):
    one = parity.llama_subject(folder, checkpoint.load_model(folder), np.array([[5]]), name="one token")
    planted = [fault for fault in FAULTS if fault.applies(one)]
    assert [fault.name for fault in planted] == ["KV heads tiled, not repeated", "wrong scale", "full-MHA shapes"]
    caught = [faults.catch(fault, one, one.case("float32"), "naive") for fault in planted]
    assert all(caught), "\n".join(map(str, caught))


def test_a_fault_that_diff_does_not_name_is_not_called_caught(subject, cases):
    fault = next(fault for fault in FAULTS if fault.name == "wrong scale")
    caught = faults.catch(dataclasses.replace(fault, name="another"), subject, cases[subject.name], "naive")
    assert not caught
    assert caught.margin >= 10
    assert re.search("wrong scale +NOT CAUGHT: diff must give it the fault's name", str(caught))


def test_a_fault_that_stays_behind_is_an_error_also_where_it_raises(subject, cases, monkeypatch):
    fault = next(fault for fault in FAULTS if fault.raises)

    @contextlib.contextmanager
    def stays():
        monkeypatch.setattr(rope, "_llama3", lambda inv_freq, scaling: inv_freq)
        with fault.plant():
            yield

    with pytest.raises(RuntimeError, match="was not taken out again"):
        faults.catch(dataclasses.replace(fault, plant=stays), subject, cases[subject.name], "naive")


def test_an_error_for_another_reason_is_not_taken_for_the_fault_s(subject, cases):
    fault = next(fault for fault in FAULTS if fault.raises)
    with pytest.raises(ValueError, match="misshaped: k_proj"):
        faults.catch(dataclasses.replace(fault, raises="another"), subject, cases[subject.name], "naive")


def test_a_fault_that_changes_nothing_is_not_called_caught(subject, cases):
    nothing = Fault("nothing", contextlib.nullcontext)
    caught = faults.catch(nothing, subject, cases[subject.name], "naive")
    assert not caught
    assert caught.margin < 1
    assert caught.stage is None
    assert not faults.catch(
        Fault("nothing", contextlib.nullcontext, raises="misshaped"), subject, cases[subject.name], "naive"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_device_of_torch_s_is_judged_and_compared(folder, dtype):
    ids = np.random.default_rng(0).integers(0, 64, (1, 12))
    where = parity.llama_subject(folder, checkpoint.load_model(folder), ids, name="tiny", device="cpu")
    case = where.case(dtype)
    assert np.array_equal(case.second.stages["output"], case.plain_output)
    rows = parity.compare_devices(where, case, dtype)
    assert [(row.implementation, row.stage) for row in rows] == [("torch on cpu", stage) for stage in reference.STAGES]
    rows += parity.compare(dataclasses.replace(where, eager=True), case, dtype, "naive")
    assert [row.stage for row in rows[-2:]] == ["vs torch layer", "vs torch on cpu"]
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))
    wrong = 1.02 if dtype == "float32" else 1.2  # products in TF32 err by about as much as the first
    far = {name: stage * np.asarray(wrong, stage.dtype) for name, stage in case.second.stages.items()}
    case = dataclasses.replace(case, second=reference.Second("cpu", far))
    assert not any(row.verdict for row in parity.compare_devices(where, case, dtype))
    rows = parity.compare(dataclasses.replace(where, eager=True), case, dtype, "naive")
    assert [row.stage for row in rows if not row.verdict] == ["vs torch on cpu"]


def test_torch_uses_the_gpu_where_both_have_it_and_says_why_not_elsewhere():
    found = {(cuda, jax): parity.second_device(cuda, jax) for cuda in (True, False) for jax in ("gpu", "cpu")}
    assert {key: device for key, (device, _) in found.items() if device} == {(True, "gpu"): "cuda"}
    assert "this torch sees no CUDA" in found[False, "gpu"][1]
    assert "JAX sees no GPU" in found[True, "cpu"][1]
    assert found[False, "cpu"] == (None, "torch on the CPU")


def test_the_command_compares_on_the_second_device_and_says_so(layer_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "parity.json"
    monkeypatch.setattr(parity, "second_device", lambda *_: ("cpu", "torch on the CPU and on the CPU"))
    assert command.main(["--layer-file", str(layer_file), "--tokens", "8", "--json", str(out)]) == 0
    assert "torch on the CPU and on the CPU" in capsys.readouterr().out.splitlines()[0]
    content = json.loads(out.read_text())
    assert content["torch_on"] == "torch on the CPU and on the CPU"
    assert sum(row["implementation"] == "torch on cpu" for row in content["rows"]) == 2 * len(reference.STAGES)
    assert sum(row["stage"] == "vs torch on cpu" for row in content["rows"]) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_equals_torch_s_on_the_gpu(folder, dtype):
    device, why = command._second_device()
    if device is None:
        pytest.skip(why)
    command._full_float32()
    ids = np.random.default_rng(0).integers(0, 64, (1, TOKENS))
    where = parity.llama_subject(folder, checkpoint.load_model(folder), ids, name="tiny", device=device)
    case = where.case(dtype)
    rows = parity.compare_devices(where, case, dtype)
    for name in ("naive", "blockwise", "triton"):
        rows += parity.compare(where, case, dtype, parity.implementation(name))
    rows += parity.compare_model(folder, "tiny", dtype, "naive", device=device)
    assert all(row.verdict for row in rows), "\n".join(map(str, rows))


def test_hugging_face_s_layer_is_sound_and_an_unsound_one_is_noticed(folder, subject, monkeypatch):
    model = checkpoint.load_model(folder)
    assert reference.hugging_face_is_sound(model, subject.x) == []
    run = reference.run_stages
    monkeypatch.setattr(reference, "run_stages", lambda m, r, x, p, mask, kind=None: run(m, r, x, p, mask | True, kind))
    assert "not causal" in reference.hugging_face_is_sound(model, subject.x)[0]


def test_the_layer_file_holds_the_weights_under_hugging_face_s_names(layer_file, folder, capsys):
    saved = torch.load(layer_file, weights_only=True)
    state = checkpoint.load_model(folder).model.layers[1].self_attn.state_dict()
    assert set(saved) == {*state, "inv_freq", "attention_scaling"}
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    assert saved["inv_freq"].shape == (8,)
    assert command.main(["extract", "--checkpoint", str(folder), "--out", str(layer_file) + "2"]) == 0
    assert "(d_model=32, H=4, H_kv=2, d_head=16)" in capsys.readouterr().out


def test_a_written_out_layer_is_hugging_face_s(layer_file, subject, cases):
    case = reference.file_case(
        checkpoint.read_pickle(layer_file), subject.x, "float32", positions=50 + np.arange(TOKENS)
    )
    for stage, target in cases[subject.name].targets.items():
        np.testing.assert_allclose(case.targets[stage].value, target.value, atol=1e-13)


@pytest.mark.parametrize(
    "change",
    [
        {"inv_freq": np.float32(1)},
        {"inv_freq": np.ones(0, np.float32)},
        {"inv_freq": np.ones(7, np.float32)},
        {"k_proj.weight": np.ones(32, np.float32)},
        {"v_proj.weight": np.ones((16, 32), np.float32)},
        {"o_proj.weight": np.ones((64, 32), np.float32)},
        {"attention_scaling": np.ones(2, np.float32)},
    ],
)
def test_a_layer_file_whose_tensors_do_not_fit_each_other_is_refused(layer_file, tmp_path, capsys, change):
    path = tmp_path / "layer.pt"
    checkpoint.write_pickle(path, {**checkpoint.read_pickle(layer_file), **change})
    assert command.main(["--layer-file", str(path), "--tokens", "8"]) == 2
    assert "error: the layer file's shapes must be q_proj [N H, D]" in capsys.readouterr().err


def test_a_layer_file_is_compared_without_transformers(layer_file):
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from oracle.__main__ import main\n"
        f"sys.exit(main(['--layer-file', {str(layer_file)!r}, '--tokens', '20']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "36 of 36 rows pass" in done.stdout


def test_the_command_fails_while_a_fault_is_in_place_and_writes_json(layer_file, tmp_path, capsys):
    out = tmp_path / "parity.json"
    arguments = ["--layer-file", str(layer_file), "--tokens", "20", "--json", str(out)]
    torch.set_float32_matmul_precision("high")
    with faults.planted(next(fault for fault in FAULTS if fault.name == "wrong scale")):
        assert command.main(arguments) == 1
    assert torch.get_float32_matmul_precision() == "highest"  # as the output says
    printed = capsys.readouterr().out
    assert "TF32 off on both sides" in printed
    assert "FAIL" in printed
    rows = json.loads(out.read_text())["rows"]
    failed = {row["stage"] for row in rows if row["dtype"] == "float32" and not row["passes"]}
    assert failed == {"log_sum_exp", "context", "output", "vs torch layer"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extract", "--layer", "7", "--out", "x.pt"], "--layer 7 must be from 0 to 1"),
        (["--layer-file", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--checkpoint", "no/such/checkpoint"], "neither a folder nor a hub id"),
        (["--checkpoint", "no/such/checkpoint", "diff"], "neither a folder nor a hub id"),
        (["--json", "no/such/folder.json"], "folder.json cannot be written: there is no folder"),
    ],
)
def test_wrong_arguments_give_one_line_and_status_2(folder, arguments, words, capsys):
    if arguments[0] == "extract":
        arguments = [*arguments, "--checkpoint", str(folder)]
    assert command.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_not_written_over_and_known_before_the_work(tmp_path, make, monkeypatch, capsys):
    monkeypatch.setattr(command, "_versions", lambda: pytest.fail("the work has begun"))
    make(tmp_path / "out")
    assert command.main(["--json", str(tmp_path / "out")]) == 2
    assert "out cannot be written: it is no plain file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out").is_file()


def test_numbers_that_json_has_not_are_words_in_it(tmp_path, capsys):
    path, nan, inf = tmp_path / "parity.json", float("nan"), float("inf")
    row = parity.Row("llama", "naive", "float32", "key", Verdict("key", nan, nan, 1e-7, inf, "NaN in the result"))
    fault = faults.Caught(FAULTS[0], "llama", "naive", inf, "key", FAULTS[0].name)
    assert command._finish(argparse.Namespace(json=str(path)), [row], [fault], [], 0.0) == 1
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    verdict = content["rows"][0]["verdict"]
    assert [verdict[name] for name in ("rmse", "max_abs", "bound", "plain_rmse")] == [
        *["not finite"] * 2,
        1e-7,
        "not finite",
    ]
    assert content["faults"][0]["margin"] == "not finite"
    assert content["faults"][0]["named"] == FAULTS[0].name


def test_what_is_said_before_a_subcommand_holds_for_it(folder):
    parse = command._parser().parse_args
    defaults = {"checkpoint": None, "layer": 0, "tokens": 256}

    def read(*arguments):
        args = vars(parse(arguments, argparse.Namespace(**defaults)))
        return {name: args[name] for name in defaults}

    expected = {"checkpoint": "c", "layer": 2, "tokens": 9}
    options = ["--checkpoint", "c", "--layer", "2", "--tokens", "9"]
    assert read(*options, "diff") == read("diff", *options) == read(*options) == expected
    assert read("diff") == read("extract", "--out", "x") == defaults


@pytest.mark.parametrize("number", ["0", "-3", "many"])
def test_numbers_of_tokens_that_are_none_are_refused(number, capsys):
    for arguments in (["--tokens", number], ["diff", "--tokens", number], ["generate", "--new-tokens", number]):
        with pytest.raises(SystemExit) as error:
            command.main(arguments)
        assert error.value.code == 2
        assert "must be a whole number of at least 1" in capsys.readouterr().err


def test_weights_are_read_by_jaxattn_from_the_checkpoint_s_own_files(folder, subject):
    expected = llama.Safetensors(folder)["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(subject.weights["k_proj.weight"], expected)
