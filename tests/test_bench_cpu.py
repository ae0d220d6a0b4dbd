"""`python -m bench cpu`: the pairs' ratios, their table and picture, and the question that tile sizes answer."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from bench import cpu, pairs, readme, results
from jaxattn import Causal
from jaxattn.impl.blockwise import default_blocks


def row(case, name, queries, keys, times_s, mask="causal", dtype="float32", direction="forward"):
    return {
        "case": case,
        "mask": mask,
        "batch": 1,
        "queries": queries,
        "keys": keys,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "dtype": dtype,
        "direction": direction,
        "cold": False,
        "layer": False,
        "implementation": name,
        "label": name,
        "framework": "torch" if name == pairs.TORCH else "jax",
        "tiled": True,
        "status": "ok",
        "reason": "",
        "flops": 1e9,
        "peak_bytes": None,
        "error": None,
        "times_s": times_s,
        "device_times_s": [],
    }


@pytest.fixture
def example():
    return {
        "schema": results.SCHEMA,
        "date": "2000-01-01T00:00:00+00:00",
        "command": "made up for a test",
        "commit": None,
        "settings": {"threads": 2},
        "environment": {"device": "cpu", "device_name": "Test CPU", "cores": 2, "load_average": 0.1},
        "product_flops_per_s": 1e11,
        "rows": [
            row("mha", pairs.OURS, 4096, 4096, [0.1, 0.2, 0.1]),
            row("mha", pairs.TORCH, 4096, 4096, [0.15, 0.2, 0.3]),
            row("decode-1", pairs.OURS, 1, 1024, [0.001], "full"),
            row("decode-1", pairs.TORCH, 1, 1024, [0.0005], "full"),
            row("window", pairs.OURS, 16384, 16384, [0.05], "window(255, 0)"),
            row("window", pairs.OURS, 65536, 65536, [0.2], "window(255, 0)"),
            row("causal", pairs.OURS, 16384, 16384, [1.0]),
            row("causal", pairs.TORCH, 16384, 16384, [0.5]),
            row("mha", pairs.OURS, 16384, 16384, [2.0]),
        ],
    }


def test_a_ratio_is_the_median_over_pairs_of_torch_time_over_ours(example):
    found = {(pair.row["case"], pair.row["keys"]): pair for pair in pairs.pairs(example)}
    assert found["mha", 4096].ratios == pytest.approx((1.5, 1.0, 3.0))
    assert found["mha", 4096].ratio == pytest.approx(1.5)
    assert found["mha", 4096].share == pytest.approx(1e9 / 0.1 / 1e11)
    assert found["decode-1", 1024].ratio == pytest.approx(0.5)
    assert found["window", 65536].ratio is None


def test_a_pair_counts_where_neither_half_was_disturbed(example):
    ours, torch = example["rows"][:2]
    ours |= {"times_s": [0.1, 0.2, 0.1, 0.1, 0.1], "control_s": [1.0, 2.0, 1.0, 1.0, 1.0]}
    torch |= {"times_s": [0.15, 0.2, 0.3, 0.4, 0.25], "control_s": [1.0, 1.0, 1.0, 2.0, 1.0]}
    (pair, *_) = pairs.pairs(example)
    assert pair.ratios == pytest.approx((1.5, 3.0, 2.5))
    assert "| 100 | 2.50 (1.50 to 3.00) | 3 | 0.10 |" in pairs.table(example)
    torch["control_s"][0] = 2.0  # two pairs are too few
    (pair, *_) = pairs.pairs(example)
    assert pair.ratios == pytest.approx((1.5, 1.0, 3.0, 4.0, 2.5))


def test_the_time_of_a_window_is_that_of_its_undisturbed_repeats(example):
    (short,) = [one for one in example["rows"] if one["case"] == "window" and one["keys"] == 16384]
    short |= {"times_s": [0.05] * 3 + [0.5] * 4, "control_s": [1.0] * 3 + [2.0] * 4}
    assert "20 times as fast" in pairs.findings(example)[0]


def test_the_window_is_compared_with_the_causal_mask_and_with_itself(example):
    assert pairs.findings(example) == [
        "At 16384 tokens the window of 256 is 20 times as fast as the causal mask.",
        "From 16384 to 65536 tokens its time grows 4.00-fold.",
    ]


def test_the_picture_draws_each_ratio_in_the_panel_of_its_kind(example, tmp_path, monkeypatch):
    drawn, low, high = {}, None, None

    def keep(figure, path):
        nonlocal low, high
        low, high = figure.axes[0].get_ylim()
        for ax in figure.axes:
            drawn[ax.get_title()] = [
                (float(x), float(y)) for line in ax.containers for x, y in zip(*line[0].get_data(), strict=True)
            ]
        return path

    monkeypatch.setattr(pairs.plot, "save", keep)
    pairs.draw(example, tmp_path / "pairs.png")
    assert list(drawn) == ["float32, forward", "float32, decoding"]
    forward, decoding = drawn.values()
    assert np.allclose(sorted(forward), [(4096, 1.5), (16384, 0.5)])
    assert np.allclose(decoding, [(1024, 0.5)])
    assert low < 0.5
    assert high > 1.5


def test_the_readme_block_of_pairs_is_made_from_their_results(example, tmp_path):
    results.save(example, tmp_path / "bench/results/cpu/pairs")
    begin, end = "<!-- bench: cpu/pairs pairs -->\n", "<!-- /bench -->"
    new, count = readme.updated(f"{begin}old{end}", tmp_path)
    assert count == 1
    assert "| 8, 8, 64 | causal | float32, forward | 4096 x 4096 | 100 | 1.50 (1.00 to 3.00) | 3 | 0.10 |" in new
    assert "](bench/results/cpu/pairs/pairs.png)" in new


def test_the_sweep_times_the_sizes_of_the_rule_beside_others(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "SWEEP", ((64, 64, 2, 1, 8, Causal(), "float32", True),))
    monkeypatch.setattr(cpu, "BLOCKS", ((32, 16), (64, 64)))
    cpu.sweep(1)
    lines = capsys.readouterr().out.splitlines()[1:]
    sizes = {tuple(int(part) for part in line.split("ms")[0].split()[:3:2]) for line in lines}
    assert sizes == {(16, 16), (32, 64), default_blocks(Causal(), 64, 64, 2)}
    assert [line for line in lines if "the rule's" in line]


def test_the_parts_cover_every_question_about_a_cpu():
    forward = {(case.heads, case.kv_heads, case.head_dim) for case in cpu.PARTS["forward"].cases}
    assert forward == {(8, 8, 64), (32, 8, 64), (16, 4, 128)}
    lengths = {n for case in cpu.PARTS["forward"].cases for n in case.lengths}
    assert lengths == {4096, 8192, 16384}
    assert {case.queries for case in cpu.PARTS["decode"].cases} == {1, 8}


def test_bfloat16_outputs_are_saved_so_that_they_can_be_judged(tmp_path):
    jax = pytest.importorskip("jax")
    from bench import adapters, child
    from bench.cases import Problem

    problem = Problem("c", "jaxattn-blockwise", 1, 32, 32, 2, 2, 8, "causal", "bfloat16", "cpu")
    session = child.Jax(problem, adapters.ADAPTERS["jaxattn-blockwise"])
    out = jax.numpy.full((1, 32, 2, 8), 1 / 3, "bfloat16")
    np.savez(tmp_path / "rows.npz", **session.judged((out,)))
    saved = np.load(tmp_path / "rows.npz")["out"]
    assert np.array_equal(saved.astype(np.float64), np.asarray(out).astype(np.float64))


def test_the_whole_command_measures_draws_and_leaves_one_file(monkeypatch, tmp_path):
    parts = {
        name: cpu.Part(name, (cpu._case(name, 2, 1, 8, (64,), ("causal",)),), dtype, direction)
        for name, dtype, direction in (("one", "float32", "forward"), ("two", "bfloat16", "both"))
    }
    monkeypatch.setattr(cpu, "PARTS", parts)
    monkeypatch.setattr(cpu, "product_flops_per_s", lambda threads: 1e11)
    arguments = ["--part", "one", "--part", "two", "--pairs", "2", "--out", str(tmp_path / "run")]
    assert cpu.main(arguments) == 0
    data = results.load(tmp_path / "run")
    assert data["settings"]["dtype"] == "float32, bfloat16"
    assert data["settings"]["direction"] == "forward, both"
    assert not data.get("resumed")
    assert {(row["case"], row["implementation"], row["status"]) for row in data["rows"]} == {
        (case, name, "ok") for case in parts for name in (pairs.OURS, pairs.TORCH)
    }
    assert all(len(pair.ratios) >= 2 for pair in pairs.pairs(data))
    assert (tmp_path / "run/pairs.png").stat().st_size > 10_000
    assert (tmp_path / "run/report.md").exists()


def test_a_length_that_no_part_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--seq", "5000"])
    assert "--seq [5000]: no part that is asked for has such a length" in capsys.readouterr().err
