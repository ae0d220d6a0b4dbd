"""The diagnosis names what was planted, and does not name what was not."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from oracle import __main__ as command
from oracle import checkpoint, diff, parity
from oracle import llama as reference

TOKENS = 130  # three key blocks
THETA = 500000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.make(tmp_path_factory.mktemp("tiny"), shapes=checkpoint.TINY, dtype="float32")


@pytest.fixture(scope="module")
def subject(folder):
    ids = np.random.default_rng(0).integers(0, 64, (1, TOKENS))
    return parity.llama_subject(folder, checkpoint.load_model(folder), ids, name="tiny", first_position=3)


@pytest.fixture(scope="module")
def case(subject):
    return subject.case("float32")


@pytest.fixture(scope="module")
def right(case):
    return {name: target.value for name, target in case.targets.items()}


def test_a_layer_without_fault_agrees(subject, case):
    ours = parity.our_stages(subject, case, "naive")
    assert str(diff.diagnose(case, ours, theta=THETA)) == "every stage agrees"


def rotated(case, name, **changes):
    changed = dataclasses.replace(case, **changes)
    return diff._rotate(
        changed.targets[name].value, changed.positions, changed.inv_freq, changed.attention_scaling, False
    )


def usual_mistakes(case, right):
    """name, the stages that other code would give, the stage that differs first."""
    q, k, v, mask = (
        right["rotated_query"],
        np.repeat(right["rotated_key"], 2, 2),
        np.repeat(right["value"], 2, 2),
        case.mask,
    )

    def attention(mask=mask, scale=case.scale, values=v):
        context, lse = diff._attend(q, k, values, np.broadcast_to(mask, (1, 1, TOKENS, TOKENS)), scale)
        return {"log_sum_exp": lse, "context": context}

    weight = case.weights["o_proj.weight"].astype(np.float64)
    wrong_order = right["context"].swapaxes(2, 3).reshape(1, TOKENS, -1) @ weight.T
    strict = mask & ~np.eye(TOKENS, dtype=bool)
    return {
        "q and k rows in Meta's order": (
            {"query": right["query"].reshape(1, TOKENS, 4, 2, 8).swapaxes(3, 4).reshape(right["query"].shape)},
            "query",
        ),
        "not rotated": ({"rotated_key": right["key"]}, "rotated_key"),
        "rotated backwards": ({"rotated_query": rotated(case, "query", inv_freq=-case.inv_freq)}, "rotated_query"),
        "positions off by one": ({"rotated_key": rotated(case, "key", positions=case.positions + 1)}, "rotated_key"),
        "positions start at 0": ({"rotated_key": rotated(case, "key", positions=case.positions - 3)}, "rotated_key"),
        "no causal mask": (attention(mask=np.ones_like(mask)), "log_sum_exp"),
        "mask off by one": (attention(mask=strict), "log_sum_exp"),
        "KV heads tiled, not repeated": (attention(values=np.tile(right["value"], (1, 1, 2, 1))), "context"),
        "heads flattened in the wrong order": ({"output": wrong_order}, "output"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "q and k rows in Meta's order",
        "not rotated",
        "rotated backwards",
        "positions off by one",
        "positions start at 0",
        "no causal mask",
        "mask off by one",
        "KV heads tiled, not repeated",
        "heads flattened in the wrong order",
    ],
)
def test_usual_mistakes_of_other_code_are_named(case, right, name):
    changed, stage = usual_mistakes(case, right)[name]
    found = diff.diagnose(case, right | changed, theta=THETA)
    assert (found.stage, found.cause) == (stage, name), str(found)


def test_a_mistake_that_is_not_usual_gets_no_name(case, right):
    noise = np.random.default_rng(0).normal(size=right["key"].shape)
    found = diff.diagnose(case, right | {"rotated_key": right["rotated_key"] + noise}, theta=THETA)
    assert (found.stage, found.cause) == ("rotated_key", None)
    assert "none of the usual mistakes" in str(found)


def test_the_position_where_it_begins_is_named(case, right):
    changed = right["rotated_key"].copy()
    changed[:, 20:] += 1
    assert "from position 23 on" in str(diff.diagnose(case, right | {"rotated_key": changed}, theta=THETA))
    changed = right["context"].copy()
    changed[:, [4, 9]] += 1
    assert "at 2 positions, the first is 7" in str(diff.diagnose(case, right | {"context": changed}, theta=THETA))


def test_rotated_keys_begin_to_differ_at_position_1_when_the_layout_is_wrong(subject, case, right):
    case = dataclasses.replace(case, positions=case.positions - 3)
    # Rotated by our own table from position 0: there the angle is 0 and every layout agrees.
    targets = {
        name: dataclasses.replace(case.targets[name], value=rotated(case, name.removeprefix("rotated_")))
        for name in ("rotated_query", "rotated_key")
    }
    case = dataclasses.replace(case, targets=case.targets | targets)
    key = right["key"]
    wrong = diff._rotate(key, case.positions, case.inv_freq, case.attention_scaling, True)
    text = str(diff.diagnose(case, {"key": key, "rotated_key": wrong}, theta=THETA))
    assert "rotated_key differs from position 1 on" in text
    assert "it agrees with: RoPE layout swapped" in text
    assert "permute the q and k rows" in text


def test_stages_that_are_none_are_refused(case, right):
    with pytest.raises(ValueError, match="got keys"):
        diff.diagnose(case, {"keys": right["key"]}, theta=1e4)
    with pytest.raises(ValueError, match="got none"):
        diff.diagnose(case, {}, theta=1e4)


def test_the_command_compares_a_dump_of_other_code(folder, tmp_path, capsys):
    saved, ours = tmp_path / "torch.npz", tmp_path / "ours.npz"
    common = ["diff", "--checkpoint", str(folder), "--tokens", "20"]
    assert command.main([*common, "--save", str(saved)]) == 0
    assert "every stage agrees" in capsys.readouterr().out
    stages = dict(np.load(saved))
    np.savez(ours, **{name: stages[name] for name in ("query", "key")}, rotated_key=stages["key"])
    assert command.main([*common, "--ours", str(ours)]) == 1
    assert "rotated_key differs from position 1 on" in capsys.readouterr().out
    np.savez(ours, key=stages["key"], x=stages["x"], positions=stages["positions"])
    assert command.main([*common, "--ours", str(ours)]) == 0
    printed = capsys.readouterr().out
    assert "compared: key\n" in printed
    assert "every stage agrees" not in printed
    assert "key agree; not compared: query, value, rotated_query," in printed
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert command.main([*common, "--ours", str(tmp_path / "objects.npy")]) == 2


def test_a_dump_of_another_input_is_refused(case, right, tmp_path):
    path = tmp_path / "ours.npz"
    for wrong in ({"x": case.x + 1}, {"x": case.x[:, :9]}, {"positions": case.positions - 3}):
        np.savez(path, key=right["key"], **wrong)
        with pytest.raises(ValueError, match=r"is not the layer's input .* same --checkpoint, --layer and --tokens"):
            diff.read_dump(path, case)
    diff.write_dump(path, case)
    assert set(diff.read_dump(path, case)) == set(right)


def layouts(right):
    """Right numbers in another order or shape: (stages, cause, words of the advice)."""
    query, key, lse = right["rotated_query"], right["rotated_key"], right["log_sum_exp"]
    return {
        "BNTH": (dict(query=right["query"].swapaxes(1, 2)), "axes in another order", "It is [B, N, T, H]"),
        "TNH": (dict(rotated_query=query[0]), "axes in another order", "It is [T, N, H]"),
        "NTH": (dict(rotated_query=query[0].swapaxes(0, 1)), "axes in another order", "It is [N, T, H]"),
        "BNT": (dict(log_sum_exp=lse.swapaxes(1, 2)), "axes in another order", "should be [B, T, N] = (1, 130, 4)"),
        "BTD": (dict(value=right["value"].reshape(1, TOKENS, 32)), "heads not split", "It is [B, T, K * H]"),
        "repeated": (dict(rotated_key=np.repeat(key, 2, 2)), "KV heads repeated already", "It is [B, T, N, H]"),
        "repeated, BNTH": (
            dict(rotated_key=np.repeat(key, 2, 2).swapaxes(1, 2)),
            "KV heads repeated already",
            "It is [B, N, T, H]",
        ),
        "tiled": (dict(rotated_key=np.tile(key, (1, 1, 2, 1))), "KV heads tiled, not repeated", "not n % K"),
    }


@pytest.mark.parametrize("name", ["BNTH", "TNH", "NTH", "BNT", "BTD", "repeated", "repeated, BNTH", "tiled"])
def test_right_numbers_in_another_layout_are_named_with_the_right_one(case, right, name):
    changed, cause, words = layouts(right)[name]
    found = diff.diagnose(case, right | changed, theta=THETA)
    assert (found.stage, found.where, found.cause) == (*changed, "in shape", cause), str(found)
    assert words in str(found)


def test_other_layouts_are_named_where_their_shape_is_the_right_one_too(case, right):
    """As many tokens as heads: only the numbers tell."""
    short = {name: dataclasses.replace(target, value=target.value[:, :4]) for name, target in case.targets.items()}
    case = dataclasses.replace(
        case, x=case.x[:, :4], positions=case.positions[:, :4], mask=case.mask[..., :4, :4], targets=short
    )
    found = diff.diagnose(case, {"rotated_query": short["rotated_query"].value.swapaxes(1, 2)}, theta=THETA)
    assert found.cause == "axes in another order"
    assert "It is [B, N, T, H]" in found.advice


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"attention_scaling": 1.0}, "no attention factor"),
        ({"inv_freq": 1e4 ** -np.arange(0, 1, 1 / 8)}, "no RoPE scaling"),
        ({"inv_freq": 1e4 ** -np.arange(0, 1, 1 / 8), "attention_scaling": 1.0}, "no RoPE scaling"),
    ],
)
def test_what_is_missing_of_yarn_is_named(case, changes, name):
    case = dataclasses.replace(case, attention_scaling=1.25)
    value = rotated(case, "key")
    case = dataclasses.replace(
        case, targets=case.targets | {"rotated_key": dataclasses.replace(case.targets["rotated_key"], value=value)}
    )
    found = diff.diagnose(case, {"rotated_key": rotated(case, "key", **changes)}, theta=1e4)
    assert (found.stage, found.cause) == ("rotated_key", name), str(found)


@pytest.mark.parametrize("shape", [(1, 50, 2, 16), (1, 0, 2, 16), (1, 130, 2, 3), ()])
def test_a_shape_of_no_layout_gets_the_right_one_and_no_name(case, shape):
    """Zeros, which every dtype can hold and every spread is less than."""
    found = diff.diagnose(case, {"key": np.zeros(shape)}, theta=THETA)
    assert str(found).startswith(f"key differs in shape (shape {shape}, should be (1, 130, 2, 16)); none of the usual")


def test_nan_is_named_with_its_positions_and_infinities_get_no_name(case, right):
    changed = right["value"].copy()
    changed[0, 7, 1, 3] = np.nan
    assert diff.diagnose(case, {"key": np.full_like(right["key"], np.inf)}, theta=THETA).cause is None
    text = str(diff.diagnose(case, right | {"value": changed}, theta=THETA))
    assert (
        text
        == "value differs at 1 positions, the first is 10 (NaN in the result); none of the usual mistakes explains it"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stages_computed_in_fewer_digits_are_named(subject, case, dtype):
    """By the real layer in that dtype, beside which the float32 rule is broken everywhere."""
    low = subject.case(dtype)
    ours = {name: np.asarray(value, np.float32) for name, value in parity.our_stages(subject, low, "naive").items()}
    found = diff.diagnose(case, ours, theta=THETA)
    assert (found.stage, found.cause) == ("query", f"computed in {dtype}"), str(found)


@pytest.mark.parametrize(("bits", "name"), [(13, "products in TF32"), (16, "products in bfloat16")])
@pytest.mark.parametrize("rounded", [True, False])
def test_products_that_drop_digits_are_named(case, bits, name, rounded):
    def cut(x):
        scale = np.float32(2.0) ** (np.floor(np.log2(np.abs(x))) - (23 - bits))
        return ((np.rint if rounded else np.trunc)(x / scale) * scale).astype(np.float32)

    value = (cut(case.x) @ cut(case.weights["v_proj.weight"]).T).reshape(1, TOKENS, 2, 16)
    found = diff.diagnose(case, {"value": value}, theta=THETA)
    assert (found.stage, found.cause) == ("value", name), str(found)


def test_a_projection_without_its_bias_or_transposed_is_named(tmp_path):
    shapes = dataclasses.replace(checkpoint.TINY, heads=2, kv_heads=2, attention_bias=True)  # D = N * H: square
    model = checkpoint.load_model(checkpoint.make(tmp_path, shapes=shapes, dtype="float32"))
    case = reference.layer_case(model, np.random.default_rng(0).normal(size=(1, 9, 32)), "float32")
    weights = {name: np.asarray(array, np.float64) for name, array in case.weights.items()}
    x, bias = np.asarray(case.x, np.float64), weights["k_proj.bias"]
    mistakes = {
        "no bias": x @ weights["k_proj.weight"].T,
        "projection transposed": x @ weights["k_proj.weight"] + bias,
    }
    for name, key in mistakes.items():
        found = diff.diagnose(case, {"key": key.reshape(1, 9, 2, 16)}, theta=THETA)
        assert (found.stage, found.cause) == ("key", name), str(found)


def test_a_name_that_is_no_stage_is_refused_and_the_right_ones_are_listed(case, tmp_path):
    path = tmp_path / "ours.npz"
    np.savez(path, rotated_keys=np.ones(3), key=np.ones(3))
    with pytest.raises(ValueError, match=r"holds rotated_keys; the stages are called query, key, .*output"):
        diff.read_dump(path, case)
    np.savez(path, key=np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(ValueError, match=r"key has dtype .*; save it as float32"):
        diff.read_dump(path, case)


@pytest.mark.parametrize("keep", [0, 20, 300, -30])
def test_a_file_that_is_not_whole_is_no_npz(case, tmp_path, keep):
    path = tmp_path / "ours.npz"
    np.savez(path, key=np.random.default_rng(0).normal(size=100))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"ours\.npz is no \.npz of plain arrays"):
        diff.read_dump(path, case)
