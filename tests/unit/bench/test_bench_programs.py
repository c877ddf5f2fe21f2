"""Every benchmark runs, tiny and without judgement, so that none has rotted when it is needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import served_model
from bench import api_load, multirun, rl_loop, sample, served, train
from selfloop.cli.client_env import find_client_python


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model.save(tmp_path_factory.mktemp("bench") / "model")


def figures_of(main: Callable[[list[str]], object], file: Path, *arguments: str) -> list[dict[str, object]]:
    main(["--quick", "--json", str(file), *arguments])
    figures = json.loads(file.read_text())["figures"]
    assert not any(figure["met"] for figure in figures)
    return figures


@pytest.mark.parametrize(
    ("main", "cases"),
    [
        (train.main, ["full", "quarter", "mixed", "custom"]),
        (sample.main, ["decode1", "adapter32", "adapters", "sharing", "prefix", "gap"]),
        (multirun.main, ["together", "ranks", "memory"]),
        (rl_loop.main, ["grpo"]),
    ],
    ids=["train", "sample", "multirun", "rl_loop"],
)
def test_programs_run(main: Callable[[list[str]], object], cases: list[str], model_dir: Path, tmp_path: Path):
    figures = figures_of(main, tmp_path / "figures.json", str(model_dir), "--cases", *cases)
    assert len({figure["case"] for figure in figures}) >= len(cases)
    # A gap may be zero, and so may what a tiny run takes; rates, times and ratios are not.
    assert all(figure["median"] > 0 for figure in figures if figure["unit"] in ("tokens/s", "steps/min", "ms", "x"))
    assert all(figure["median"] < 0.1 for figure in figures if figure["unit"] == "nats")


@pytest.mark.clients
def test_the_served_program_runs(model_dir: Path, tmp_path: Path):
    if find_client_python() is None:
        pytest.skip("no environment with the official client")
    figures = figures_of(served.main, tmp_path / "figures.json", str(model_dir), "--cases", "sample")
    assert [figure["unit"] for figure in figures] == ["tokens/s", "tokens/s", "%"]
    assert all(figure["median"] > 0 for figure in figures)


def test_the_load_program_runs(tmp_path: Path):
    arguments = ["--cases", "waiting", "--waiting", "30", "--rate", "20", "--seconds", "0.5"]
    figures = {figure["what"]: figure for figure in figures_of(api_load.main, tmp_path / "figures.json", *arguments)}
    assert figures["heartbeat: median"]["median"] <= figures["heartbeat: p99"]["median"]
    assert figures["operations accepted, as many as it takes"]["median"] > 0
