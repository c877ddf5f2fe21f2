"""Every benchmark runs, tiny and without judgement, so that none has rotted when it is needed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_models
from bench import sample, train


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("bench") / "model")


@pytest.mark.parametrize(
    ("main", "cases"),
    [
        (train.main, ["full", "quarter", "mixed"]),
        (sample.main, ["decode1", "adapter32", "adapters", "sharing", "prefix", "gap"]),
    ],
    ids=["train", "sample"],
)
def test_programs_run(main: Callable[[list[str]], None], cases: list[str], model_dir: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    main([str(model_dir), "--quick", "--json", str(file), "--cases", *cases])
    figures = json.loads(file.read_text())["figures"]
    assert len({figure["case"] for figure in figures}) == len(cases)
    # A gap may be zero; rates, times and ratios are not.
    assert all(figure["median"] > 0 for figure in figures if figure["unit"] != "nats")
    assert all(figure["median"] < 0.1 for figure in figures if figure["unit"] == "nats")
