"""The pure parts of the benchmarks: statistics, costs, work, tables."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from bench.harness import work
from bench.harness.measure import alternate, percentile, ratios, seconds, use_clock, wall_clock
from bench.harness.report import Figure, Report, number, table
from bench.harness.roof import ModelCost, Roof

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}


def test_alternation_warms_up_and_takes_turns():
    called: list[str] = []

    def call(name: str) -> float:
        called.append(name)
        return float(len(called))

    values = alternate({"ours": lambda: call("ours"), "theirs": lambda: call("theirs")}, 2)
    assert called == ["ours", "theirs"] * 3
    assert values == {"ours": [3.0, 5.0], "theirs": [4.0, 6.0]}
    assert ratios(values["ours"], values["theirs"]) == [3 / 4, 5 / 6]


def test_the_cpu_clock_does_not_count_waiting():
    use_clock("cpu")
    try:
        assert seconds(lambda: time.sleep(0.05)) < 0.04
        with wall_clock():
            assert seconds(lambda: time.sleep(0.05)) >= 0.05
        assert seconds(lambda: time.sleep(0.05)) < 0.04
    finally:
        use_clock("wall")


def test_ratios_need_as_many_of_each():
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles(share: float, expected: int):
    assert percentile([float(v) for v in reversed(range(1, 101))], share) == expected


def test_the_cost_of_smollm2():
    cost = ModelCost.of(SMOLLM2)
    assert cost.block_weights + cost.head_weights == 134_479_872
    assert cost.forward_gflop() == pytest.approx(0.269, abs=5e-4)
    assert cost.train_gflop() == pytest.approx(0.538, abs=5e-4)
    assert cost.train_gflop(head_share=0.25) == pytest.approx(4 * (106_168_320 + 28_311_552 / 4) / 1e9)
    assert cost.adapter_weights(32) == 9_768_960
    assert cost.step_gb(torch.bfloat16) == pytest.approx(0.269, abs=5e-4)


def test_heads_may_have_a_size_of_their_own():
    config = {**SMOLLM2, "head_dim": 128}
    more = 30 * 576 * (128 - 64) * (9 + 9 + 3 + 3)
    assert ModelCost.of(config).block_weights - ModelCost.of(SMOLLM2).block_weights == more


def test_a_roof_counts_what_it_did():
    roof = Roof(torch.float32, torch.device("cpu"), seconds=0.01)
    assert 0.1 < roof.gflops() < 1e6
    assert 0.1 < roof.gb_per_s() < 1e5


def test_lengths_cover_their_range():
    for make in (work.even_lengths, work.long_tailed_lengths):
        lengths = make(16, 16, 512)
        assert (min(lengths), max(lengths), len(lengths)) == (16, 512, 16)
        assert lengths == make(16, 16, 512) != sorted(lengths)
    assert sum(work.long_tailed_lengths(16, 16, 512)) < sum(work.even_lengths(16, 16, 512)) == 16 * 264


def test_a_quarter_supervised_is_the_last_quarter():
    assert work.labels_of([5, 6, 7, 8, 9]) == [6, 7, 8, 9]
    assert work.labels_of([5, 6, 7, 8, 9], 0.25) == [-100, -100, -100, 9]
    datum = work.datum([5, 6, 7, 8, 9], 0.25)
    assert datum.tokens.values().tolist() == [5, 6, 7, 8]
    assert datum.loss_inputs["target_tokens"].values().tolist() == [-100, -100, -100, 9]


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (99.96, "100"), (12.34, "12.3"), (1.5, "1.50"), (0.01234, "0.0123")]
)
def test_numbers(value: float, text: str):
    assert number(value) == text


def test_verdicts_are_the_medians():
    least = Figure("a", "ratio", "x", (1.0, 1.6, 1.7), at_least=1.5)
    assert (least.median, least.met, least.target) == (1.6, True, ">= 1.50")
    assert Figure("a", "ratio", "x", (1.0, 1.4, 1.7), at_least=1.5).met is False
    assert Figure("a", "gap", "nats", (0.02,), at_most=0.01).met is False
    assert Figure("a", "rate", "tokens/s", (3.0,)).met is None


def test_the_table_names_a_case_once_and_aligns():
    figures = [
        Figure("first", "rate", "tokens/s", (100.0, 300.0, 200.0)),
        Figure("first", "ratio", "x", (1.0,), at_least=1.5),
        Figure("second", "ratio", "x", (2.0,), at_least=1.5),
    ]
    lines = table(figures).splitlines()
    assert [line.split() for line in lines] == [
        ["median", "lowest", "to", "highest", "unit", "target", "verdict"],
        ["first"],
        ["rate", "200", "100", "to", "300", "tokens/s"],
        ["ratio", "1.00", "x", ">=", "1.50", "MISSED"],
        ["second"],
        ["ratio", "2.00", "x", ">=", "1.50", "met"],
    ]
    assert lines[3].index("1.00") == lines[5].index("2.00")


def test_a_report_as_json(tmp_path: Path):
    report = Report("train", {"cores": 2})
    report.add("case", "ratio", "x", [1.0, 3.0, 2.0], at_least=1.5)
    report.note("nothing else")
    report.write(tmp_path / "figures.json")
    read = json.loads((tmp_path / "figures.json").read_text())
    assert (read["program"], read["about"], read["notes"]) == ("train", {"cores": 2}, ["nothing else"])
    (figure,) = read["figures"]
    assert (figure["median"], figure["low"], figure["high"], figure["met"]) == (2.0, 1.0, 3.0, True)
    assert "nothing else" in report.render()


def test_quick_figures_are_not_judged():
    report = Report("train", judged=False)
    assert report.add("case", "ratio", "x", math.pi, at_least=4.0).met is None
