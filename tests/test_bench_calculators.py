"""The calculators give the figures that are quoted in papers, courses and blog posts."""

import pytest

from bench import calculators
from bench.calculators import DEVICES, MODELS

A100, LLAMA_2 = DEVICES["a100"], MODELS["llama-2-7b"]


@pytest.mark.parametrize(
    ("n", "shown"), [(2048, "0.268 GB"), (8192, "4.29 GB"), (32768, "68.7 GB"), (131072, "1099.5 GB")]
)
def test_scores_of_32_heads_in_float16(n, shown):
    assert calculators.show_bytes(calculators.score_bytes(n, heads=32)).startswith(shown)


def test_one_head_of_4096_tokens_in_float32():
    assert calculators.score_bytes(4096, item_bytes=4) == 64 * 2**20
    assert calculators.multiply_adds(4096, 128) == 2_147_483_648
    assert calculators.attention_flops(4096, 128) == 8_589_934_592
    assert calculators.attention_flops(4096, 128, causal=True) == 4_294_967_296


@pytest.mark.parametrize(("n", "expected"), [(128, 64 << 10), (512, 1 << 20), (1024, 4 << 20), (2048, 16 << 20)])
def test_one_head_in_float32_by_length(n, expected):
    assert calculators.score_bytes(n, item_bytes=4) == expected


def test_96_layers_at_2048():
    assert calculators.score_bytes(2048, layers=96, item_bytes=4) == 1.5 * 2**30
    assert calculators.score_bytes(2048, heads=96, layers=96, item_bytes=4) == 144 * 2**30


def test_65_terabytes_at_128k_imply_so_many_heads_times_layers():
    assert calculators.heads_times_layers(65e12, 131072) == pytest.approx(1891.7, abs=0.1)
    assert calculators.heads_times_layers(65e12, 131072, item_bytes=4) == pytest.approx(945.9, abs=0.1)


def test_longest_sequence_on_an_a100_without_weights():
    standard = calculators.longest_standard
    assert standard(A100, LLAMA_2, every_layer=True, weights=False) == 6250
    assert standard(A100, LLAMA_2, weights=False) == 35355
    assert calculators.longest_flash(A100, LLAMA_2, weights=False) == 152587


def test_longest_sequence_on_an_a100_beside_the_weights():
    assert LLAMA_2.weights_bytes == 13_476_831_232
    assert calculators.longest_standard(A100, LLAMA_2, every_layer=True) == 5699
    assert calculators.longest_standard(A100, LLAMA_2) == 32240
    assert calculators.longest_flash(A100, LLAMA_2) == 126882


def test_the_longest_sequence_fits_and_the_next_does_not():
    for device in DEVICES.values():
        for model in MODELS.values():
            n, free = calculators.longest_standard(device, model), device - model.weights_bytes
            assert calculators.score_bytes(n, heads=model.heads) <= free
            assert calculators.score_bytes(n + 1, heads=model.heads) > free
            assert calculators.flash_needed_from(device, model) == n + 1
            for weights, room in ((True, free), (False, device)):
                n = calculators.longest_flash(device, model, weights=weights)
                assert calculators.kv_cache_bytes(n, model) <= room < calculators.kv_cache_bytes(n + 1, model)
                n = calculators.longest_standard(device, model, every_layer=True, weights=weights)
                sizes = [calculators.score_bytes(m, heads=model.heads, layers=model.layers) for m in (n, n + 1)]
                assert sizes[0] <= room < sizes[1]


def test_longest_sequences_of_llama_3_2_1b_on_other_gpus():
    model, longest = MODELS["llama-3.2-1b"], calculators.longest_standard
    found = {
        name: (longest(size, model, every_layer=True), longest(size, model), calculators.longest_flash(size, model))
        for name, size in DEVICES.items()
    }
    # 16, 80 and 141 GB less 2,471,628,800 bytes of weights; 1,024 or 64 bytes for n^2; 32,768 bytes a cached token
    of_80_gb = (8_701, 34_804, 2_365_978)
    expected = {"t4": (3_634, 14_538, 412_853), "a100": of_80_gb, "h100": of_80_gb}
    assert found == expected | {"h200": (11_631, 46_524, 4_227_550)}


def test_llama_3_2_1b_weights_from_its_shapes():
    D, F, V, K, H, layers = 2048, 8192, 128256, 8, 64, 16
    layer = 2 * D * D + 2 * D * K * H + 3 * D * F + 2 * D
    assert MODELS["llama-3.2-1b"].weights_bytes == 2 * (V * D + layers * layer + D)


def test_a_model_larger_than_the_device_leaves_no_sequence():
    assert calculators.longest_standard(10**9, LLAMA_2) == 0
    assert calculators.longest_flash(10**9, LLAMA_2) == 0


def test_kv_cache_shrinks_with_the_key_heads():
    sizes = [calculators.kv_cache_bytes(1000, LLAMA_2, kv_heads=K) for K in (32, 8, 1)]
    assert sizes == [524_288_000, 131_072_000, 16_384_000]
    assert calculators.kv_cache_bytes(1, MODELS["llama-3.2-1b"]) == 2 * 16 * 8 * 64 * 2


def test_every_table_prints_its_figures(capsys):
    assert calculators.main([]) == 0
    printed = capsys.readouterr().out
    for figure in ("1099.5 GB", "8.59 GFLOP", "1892 heads x layers", "35,355", "126,882", "MQA: 33.55 MB"):
        assert figure in printed


def test_options_change_the_table(capsys):
    assert calculators.main(["scores", "--n", "2048", "--layers", "96", "--heads", "1", "--dtype", "float32"]) == 0
    assert "(1.5 GiB)" in capsys.readouterr().out
    assert calculators.main(["longest", "--device-name", "a100", "--model", "llama-2-7b", "--layers-alive", "all"]) == 0
    assert "5,700" in capsys.readouterr().out


def test_a_length_of_zero_is_refused(capsys):
    with pytest.raises(SystemExit):
        calculators.main(["scores", "--n", "0"])
    assert "at least 1" in capsys.readouterr().err
