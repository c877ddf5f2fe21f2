"""A list of accelerators allows this machine, or refuses new capacity by name."""

from pathlib import Path

import pytest

from fake_house import FakeHouse
from selfloop.control.capacity.hardware import Hardware
from selfloop.control.resources.user_config import UserConfig, UserConfigs, checked_accelerators
from selfloop.types.errors import BadRequest


async def test_what_is_asked_for_is_what_counts(tmp_path: Path) -> None:
    house = await FakeHouse.open(tmp_path)

    def on(accelerator: str) -> UserConfigs:
        configs = UserConfigs(house.context, "cpu")
        configs.accelerator = accelerator
        return configs

    config = UserConfig(trainer_accelerators=["H200", "h100"], sampler_accelerators=["L4"])
    assert on("H100").excludes(config, trainer=True, sampler=False) is None
    excluded = on("H100").excludes(config, trainer=True, sampler=True)
    assert excluded is not None
    assert "sampler_accelerator_priority is L4" in excluded
    assert "this server has H100" in excluded
    assert on("CPU").excludes(UserConfig(), trainer=True, sampler=True) is None
    await house.crash()


@pytest.mark.parametrize("wrong", [[], [" "], ["H100", "h100"], ["x" * 65], ["a"] * 33])
def test_lists_that_say_nothing_are_refused(wrong: list[str]) -> None:
    with pytest.raises(BadRequest, match="field:"):
        checked_accelerators("field", wrong)


@pytest.mark.parametrize(
    ("driver", "short"),
    [
        (None, "CPU"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
    ],
)
def test_accelerators_by_their_short_names(driver: str | None, short: str) -> None:
    assert Hardware(1, 1, 0 if driver is None else 1, driver).accelerator == short
