"""Each lab at its smallest size: its files, its claim, its errors. Claims of memory and time at full size are slow."""

import argparse
import itertools
import json

import numpy as np
import pytest

from bench import labs
from bench.labs import anatomy, checkpoint, complexity, flash, gqa, heads, lab, sparse, tasks, toy
from bench.labs.measure import measure, measure_here


@pytest.fixture
def in_this_process(monkeypatch):
    """Small sizes need no process each: what is asserted here is no memory of processes."""

    def here(function, cases, *, repeats=1, profile="all", save=None, enough_s=0):
        for index, case in enumerate(cases):
            counted = profile == "all" or index == len(cases) - 1
            yield measure_here(function, case, 1, counted, save and f"{save}/{index}.npz")

    for module in (anatomy, complexity, flash, gqa, heads, toy, labs.measure):
        monkeypatch.setattr(module, "measure", here)


def run(folder, name, *argv, code=0):
    """The JSON of a lab that ran to the given exit code, after a look at its files."""
    assert labs.main([name, *map(str, argv), "--out", str(folder)]) == code
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / f"{name}.json").read_text())
    assert data["lab"] == name
    assert data["settings"]["seed"] == 0
    return data


def test_labs_are_listed_and_a_wrong_name_is_refused(capsys):
    assert labs.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in labs.LABS)
    assert labs.main(["flesh"]) == 2
    assert "no lab 'flesh'; labs: flash, gqa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["flash", "--seq", "64", "--block", "128"], "--block 128 must be at most --seq 64"),
        (["flash", "--heads", "0"], "0 must be at least 1"),
        (["gqa", "--heads", "8", "--gqa-groups", "3"], "--heads 8 must be a multiple of --gqa-groups 3"),
        (["gqa", "--steps", "-1"], "-1 must be at least 0"),
        (["anatomy", "--seed", "-1"], "-1 must be at least 0"),
        (["checkpoint", "--d", "20"], "--d 20 must be a multiple of 8"),
        (["toy", "--length", "9"], "--length 9 must be at most 8"),
        (["toy", "--task", "add"], "invalid choice: 'add'"),
        (["complexity", "--seq", "100"], "--seq 100 must be a multiple of 8 and at least 128"),
        (["linear", "--seq", "510"], "--seq 510 must be a multiple of 4 and at least 512"),
        (["linear", "--seq", "256"], "--seq 256 must be a multiple of 4 and at least 512"),
        (["sparse", "--seq", "64"], "--seq 64 must be at least 256"),
        (["anatomy", "--seq", "x"], "'x' must be a whole number"),
        (["heads", "--checkpoint", "nowhere"], "no config.json"),
        (["heads", "--tokens", "1"], "--tokens goes with --checkpoint"),
    ],
)
def test_wrong_arguments_are_named(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        labs.main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 64}))
    for token in ("64", "-1"):
        with pytest.raises(SystemExit) as ended:
            labs.main(["heads", "--checkpoint", str(tmp_path), "--tokens", "3", token])
        assert ended.value.code == 2
        assert f"--tokens {token} must be from 0 to 63" in capsys.readouterr().err


def test_a_process_of_its_own_measures_and_a_failing_one_says_why():
    case = {"name": "naive", "seq": 512, "heads": 4, "d": 8, "causal": True, "block": 64, "seed": 0}
    [row] = measure("bench.labs.flash:program", [case], repeats=1)
    scores = 4 * 4 * 512**2
    assert scores <= row["temporaries_bytes"] <= row["rss_bytes"] * 1.2
    assert row["rss_bytes"] < 6 * scores
    assert row["requested_bytes"] > row["compulsory_bytes"] == 4 * 4 * 512 * 4 * 8
    assert row["time_s"] > 0
    with pytest.raises(RuntimeError, match=r"ValueError: .*nothing"):
        list(measure("bench.labs.flash:program", [case | {"name": "nothing"}]))


@pytest.mark.slow
def test_flash_equals_the_baseline_and_computes_only_the_tiles_it_visits(in_this_process, tmp_path):
    data = run(tmp_path, "flash", "--seq", 64, "--block", 32, "--d", 16, "--heads", 2)
    assert data["errors"][0]["difference"] <= 1e-5
    float32, bfloat16, float16 = (row["blockwise"] for row in data["errors"])
    assert float32 < float16 < bfloat16
    for tiles, blocks in zip(data["tiles"], (2, 4, 8), strict=True):
        assert (tiles["visited"], tiles["tiles"]) == (blocks * (blocks + 1) / 2, blocks**2)
    ours = [row for row in data["rows"] if row["name"] == "blockwise"]
    products = 4 * 32 * 32 * 16 * 2  # both products of a tile, two heads
    for row, tiles in zip(ours, data["tiles"], strict=True):
        assert tiles["visited"] * products <= row["flops"] < 1.5 * tiles["visited"] * products


@pytest.mark.slow
def test_checkpointing_changes_memory_and_work_and_no_gradient(in_this_process, tmp_path):
    data = run(tmp_path, "checkpoint", "--layers", 3, "--seq", 64, "--d", 16, "--batch", 2)
    everything, products, output, nothing = data["rows"]
    assert max(row["gradient_difference"] for row in data["rows"]) <= 2e-6
    assert nothing["temporaries_bytes"] < output["temporaries_bytes"] <= products["temporaries_bytes"]
    assert products["temporaries_bytes"] < everything["temporaries_bytes"]
    again = [row["recomputed"]["flops"] for row in data["rows"]]
    assert again[0] == 0 < again[1] < again[3]
    assert again[2] < 0.9 * again[3]  # attention's output and log-sum-exp are there: its forward pass is not run again
    assert nothing["flops"] - everything["flops"] == pytest.approx(again[3], rel=0.3)


def test_checkpoint_s_gradients_are_compared_each_by_its_largest_value():
    small, large = np.array([1e-3, 2e-3]), np.array([5.0])
    assert checkpoint.difference([small + 1e-5, large], [small, large]) == pytest.approx(5e-3)
    zero = np.zeros(2)
    assert checkpoint.difference([zero, large], [zero, large]) == 0
    assert checkpoint.difference([zero + 1e-20, large], [zero, large]) > 1


@pytest.mark.slow
def test_fewer_key_value_heads_keep_and_read_less(in_this_process, tmp_path):
    data = run(tmp_path, "gqa", "--seq", 64, "--d", 16, "--heads", 4, "--gqa-groups", 2, "--steps", 0)
    assert [row["kv_heads"] for row in data["rows"]] == [4, 2, 1]
    assert [row["cache_bytes"] for row in data["rows"]] == [2 * 64 * K * 16 * 4 for K in (4, 2, 1)]
    read = [row["decode"]["compulsory_bytes"] for row in data["rows"]]
    assert [a - b for a, b in itertools.pairwise(read)] == [2 * 64 * 2 * 16 * 4, 2 * 64 * 16 * 4]


@pytest.mark.slow
def test_exponents_are_those_of_the_definitions(in_this_process, tmp_path):
    data = run(tmp_path, "complexity", "--seq", 512, "--d", 8)
    memory = {kind: fitted["memory"] for kind, fitted in data["exponents"].items()}
    assert memory["naive"] == pytest.approx(2, abs=0.15)
    assert memory["linear"] == pytest.approx(1, abs=0.15)
    assert memory["window"] < 1.2
    assert [claim["holds"] for claim in data["claims"]] == [True, True]
    assert [row["seq"] for row in data["rows"] if row["name"] == "loops"] == [32, 64, 128, 256]


@pytest.mark.slow
def test_sparse_patterns_are_counted_and_their_error_is_from_full_attention(in_this_process, tmp_path):
    data = run(tmp_path, "sparse", "--seq", 256, "--heads", 1, "--d", 16)
    rows = {row["name"]: row for row in data["rows"] if row["seq"] == 256}
    assert rows["full"]["error"] == 0
    assert rows["naive"]["error"] < 1e-5
    window = sum(min(255, t + 32) - max(0, t - 32) + 1 for t in range(256)) / 256**2
    assert rows["window"]["density"] == window
    assert rows["window"]["theory_flops"] == pytest.approx(window * rows["full"]["theory_flops"])
    assert all(0.01 < rows[name]["error"] < 2 for name in rows if name not in ("full", "naive"))
    assert not any(row["unknown"] for row in rows.values())


def test_memory_that_is_too_little_to_grow_is_not_fitted():
    rows = [
        {"name": kind, "seq": seq, "density": 1 / len(kind), "temporaries_bytes": 0}
        for kind in sparse.KINDS
        for seq in (128, 256)
    ]
    (claim,) = sparse.claims(rows)
    assert "fewer pairs" in claim["text"]


@pytest.mark.slow
def test_linear_forms_agree_and_random_features_converge(in_this_process, tmp_path):
    data = run(tmp_path, "linear", "--seq", 1024, "--d", 8, "--heads", 1)
    assert max(row["difference"] for row in data["rows"]) <= 1e-4
    assert -0.65 < data["rate"] < -0.4
    state, longer = data["cache"][0], data["cache"][-1]
    assert state["state"] == longer["state"] == 4 * (8 * 8 + 8)
    assert longer["kv"] == 4 * state["kv"]


def test_anatomy_masks_the_first_token_s_logits_to_itself(in_this_process, tmp_path, capsys):
    data = run(tmp_path, "anatomy")
    assert data["cost"]["compulsory_bytes"] == 4 * 4 * 4 * 2 * 8  # q, k, v and output, once
    assert_costs_are_shown([data["cost"]], capsys.readouterr().out)
    assert data["first_row"]["logits"] == [2.1, 3.5, 1.8, 2.9]
    assert data["first_row"]["masked"] == [1, 0, 0, 0]
    assert sum(data["first_row"]["unmasked"]) == pytest.approx(1)
    assert all(claim["holds"] for claim in data["claims"])
    assert len(data["patterns"]) >= 12


def assert_costs_are_shown(costs, printed):
    for row in costs:
        shown = next(line for line in printed.splitlines() if line.strip().startswith(row["name"]) and " ms " in line)
        assert lab.mebibytes(row["requested_bytes"]) in shown
        assert lab.mebibytes(row["rss_bytes"]) in shown
        assert lab.milliseconds(row["time_s"]) in shown
        assert row["requested_bytes"] >= row["compulsory_bytes"] > 0
        assert row["unknown"] == []


def test_toy_measures_a_step_and_trains_for_as_little_as_one(in_this_process, tmp_path, capsys):
    data = run(tmp_path, "toy", "--task", "sort", "--steps", 1, "--length", 2, "--variant", "window")
    printed = capsys.readouterr().out
    [row] = data["rows"]
    assert (row["task"], row["variant"], len(row["losses"])) == ("sort", "window", 1)
    assert_costs_are_shown([data["cost"]], printed)
    assert "worse" not in printed  # nothing lies outside the window


def toy_loss(task, variant, loss):
    return {"task": task, "variant": variant, "losses": [9.0] + [loss] * 10, "parameters": 5, "accuracy": 1.0}


def test_toy_tells_one_head_from_eight_by_the_task_where_eight_win_most():
    rows = [toy_loss("copy", "1 head", 0.1), toy_loss("copy", "MHA", 0.2)]
    assert "which one wide head finds well; see --task reverse --steps 300" in toy.heads_told(rows)
    assert not [claim for claim in toy.claims(rows, []) if "8 heads" in claim["text"]]
    rows += [toy_loss("reverse", "1 head", 0.5), toy_loss("reverse", "MHA", 0.01)]
    assert "at equal width and equal parameters 8 heads end at loss 0.01, 1 head at 0.5 (reverse)" in toy.heads_told(
        rows
    )
    assert [claim["holds"] for claim in toy.claims(rows, []) if "8 heads" in claim["text"]] == [True]
    rows[-1]["losses"] = rows[-2]["losses"]
    assert [claim["holds"] for claim in toy.claims(rows, []) if "8 heads" in claim["text"]] == [False]
    assert "add --variant" in toy.heads_told(rows[:1])


def test_toy_s_curves_are_means_of_the_last_steps():
    for losses, steps, means in (([4, 2, 6, 0], [3, 4], [4, 8 / 3]), ([4, 2], [2], [3])):
        for found, expected in zip(toy.smooth(losses, 3), (steps, means), strict=True):
            np.testing.assert_allclose(found, expected)
    assert toy.reached({"losses": [1.0] * 5 + [0.0] * 20}) == 15


def test_toy_names_who_does_not_learn_each_task():
    copy, recall = [row | {"by_distance": {}} for row in (toy_loss("copy", "MHA", 1), toy_loss("recall", "MHA", 1))]
    window = recall | {"variant": "window", "accuracy": 0.5}
    assert toy.see({"rows": [copy, recall, window]})[0] == (
        "copy: all at least 0.98; recall: window 0.50, the others at least 0.98."
    )
    assert toy.told("recall", [window]) == "recall: window 0.50"


def toy_row(variant, near, far):
    by_distance = {"3": near, "14": near, "15": far, "17": far}  # two layers of a window of 8 reach 14 back
    return toy_loss("recall", variant, 1) | {"accuracy": (near + far) / 2, "by_distance": by_distance}


@pytest.mark.parametrize(
    ("window", "mha", "holds", "lost"),
    [((0.9, 0.4), (1, 1), True, True), ((0.4, 0.4), (1, 1), False, False), ((0.9, 0.4), (1, 0.5), False, True)],
)
def test_toy_says_that_a_window_loses_where_far_answers_are_worse_than_near_ones(window, mha, holds, lost):
    rows = [toy_row("MHA", *mha), toy_row("window", *window)]
    [claim] = [claim for claim in toy.claims(rows, []) if "a window answers worse" in claim["text"]]
    assert claim["holds"] == holds
    assert ("window from 15 tokens back on" in toy.see({"rows": rows})[0]) == lost


def test_gqa_says_that_the_task_is_learnt_only_where_it_is():
    def row(accuracy, quality=True):
        costs = {"cache_bytes": 1, "prefill": {"time_s": 1}, "decode": {"compulsory_bytes": 1}}
        return {"name": "MHA", "kv_heads": 1, **costs} | ({"quality": {"accuracy": accuracy}} if quality else {})

    for rows, words in (
        ([row(1.0)] * 3, "learnt with any"),
        ([row(0.5)] * 3, "accuracy on the toy task: MHA 0.500"),
        ([row(0, quality=False)] * 3, None),
    ):
        said = gqa.see({"rows": rows})[1]
        assert words is None or words in said
        assert ("learnt" in said) == (words == "learnt with any")
        claims = [claim["holds"] for claim in gqa.claims(rows, [1] * 3) if "learn to copy" in claim["text"]]
        assert claims == ([] if words is None else ["learnt" in words])


def test_complexity_claims_the_exponents_and_a_wrong_one_is_false():
    options = argparse.Namespace(seq=4096, d=64)
    right = {"naive": {"memory": 1.98}, "window": {"memory": 0.88}, "linear": {"memory": 1.0}}
    assert [claim["holds"] for claim in complexity.claims(right, options)] == [True, True]
    wrong = right | {"naive": {"memory": 1.5}, "linear": {"memory": 1.4}}
    assert [claim["holds"] for claim in complexity.claims(wrong, options)] == [False, False]
    assert complexity.claims(wrong, argparse.Namespace(seq=128, d=64)) == []


def test_a_false_claim_gives_exit_code_1(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(anatomy, "first_row", lambda: np.full(4, 0.25))
    run(tmp_path, "anatomy", code=1)
    assert "NOT SEEN HERE: the first of four tokens" in capsys.readouterr().out


@pytest.mark.parametrize("task", tasks.TASKS)
def test_examples_are_answered_by_what_their_distance_points_at(task):
    data = tasks.examples(task, 20, 6, seed=1)
    assert data.asked.sum() == 20 * 6
    for row, asked, distance in zip(data.tokens, data.asked, data.distance, strict=True):
        for at in np.flatnonzero(asked):
            source = row[at - 1 - distance[at]]
            if task == "recall":
                fact = source - tasks.SYMBOLS - 1
                assert (fact // tasks.KEYS, tasks.KEYS + fact % tasks.KEYS) == (row[at - 1], row[at])
            else:
                assert source == row[at]
    if task != "recall":
        given, answer = data.tokens[0, :6].tolist(), data.tokens[0, 7:].tolist()
        assert answer == {"copy": given, "reverse": given[::-1], "sort": sorted(given)}[task]


def test_losses_are_equal_between_implementations_and_with_checkpointing():
    sizes = {"steps": 50, "length": 3, "d": 16, "layers": 1, "batch": 8, "seed": 0}
    variants = (
        tasks.Variant("naive", heads=2, kv_heads=1),
        tasks.Variant("blockwise", heads=2, kv_heads=1, implementation="blockwise", remat=True),
    )
    losses = [tasks.train("copy", variant, **sizes).losses for variant in variants]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.slow
def test_heads_learns_its_task_and_hotter_softmax_has_more_entropy(in_this_process, tmp_path, capsys):
    data = run(tmp_path, "heads", "--length", 4, "--steps", 120)
    assert_costs_are_shown([data["cost"]], capsys.readouterr().out)
    assert data["accuracy"] >= 0.98
    assert len(data["heads"]) == 16
    assert list(data["temperatures"].values()) == sorted(data["temperatures"].values())


def test_heads_are_told_apart_by_distance_and_entropy():
    T = 16
    causal = np.tri(T) / np.arange(1, T + 1)[:, None]
    previous = np.eye(T, k=-1)
    previous[0, 0] = 1
    first = np.zeros((T, T))
    first[:, 0] = 1
    kinds = [heads.measures(weights)["kind"] for weights in (causal, previous, np.eye(T), first)]
    assert kinds == ["global", "previous token", "local", "content"]
    uniform = heads.measures(causal)
    assert uniform["entropy_bits"] == pytest.approx(np.log2(np.arange(1, T + 1)).mean())
    assert uniform["distance"] == pytest.approx((T - 1) / 4)
    strays = np.eye(T)
    strays[-3:] = first[-3:]
    assert heads.measures(strays)["kind"] == "local"  # a few queries that look far back do not hide the others
    assert heads.measures(first)["top"] == {"1": 1, "2": 1, "4": 1, "8": 1}


def test_exponent_is_the_slope_of_a_power_law():
    assert lab.exponent([128, 256, 1024], [3 * n**1.5 for n in (128, 256, 1024)]) == pytest.approx(1.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash", "checkpoint", "complexity", "linear", "sparse"])
def test_memory_and_time_at_the_default_size(name, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    data = run(tmp_path, name)
    assert any("memory" in claim["text"] for claim in data["claims"])
    assert all(claim["holds"] for claim in data["claims"])
    if name == "flash":
        naive, ours = ([r for r in data["rows"] if r["name"] == n and r["seq"] >= 4096] for n in flash.TIMED)
        for a, b in zip(naive, ours, strict=True):
            assert b["rss_bytes"] < a["rss_bytes"]
            assert b["time_s"] <= a["time_s"]
    elif name == "checkpoint":
        everything, nothing = data["rows"][0], data["rows"][-1]
        assert nothing["temporaries_bytes"] < everything["temporaries_bytes"] / 3
        assert nothing["rss_bytes"] < everything["rss_bytes"] / 2
    elif name == "sparse":
        longest = {row["name"]: row["rss_bytes"] for row in data["rows"] if row["seq"] == 2048}
        dense = longest.pop("naive")
        assert all(bytes_ < dense / 4 for bytes_ in longest.values())


@pytest.mark.slow
def test_eight_heads_learn_to_reverse_and_one_as_wide_does_not(tmp_path):
    data = run(tmp_path, "toy", "--task", "reverse", "--steps", 300, "--variant", "MHA", "--variant", "1 head")
    eight, one = data["rows"]
    assert eight["parameters"] == one["parameters"]
    assert eight["accuracy"] >= 0.98
    assert one["accuracy"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("task", ["copy", "recall"])
def test_toy_tasks_are_learnt_with_fewer_key_value_heads_and_not_beyond_a_window(task, tmp_path):
    variants = ["MHA", "GQA", "MQA", "window"]
    argv = [word for name in variants for word in ("--variant", name)]
    data = run(tmp_path, "toy", "--task", task, *argv)
    rows = {row["variant"]: row for row in data["rows"]}
    assert all(rows[name]["accuracy"] >= 0.98 for name in ("MHA", "GQA", "MQA"))
    assert (rows["window"]["accuracy"] >= 0.98) == (task == "copy")
