"""A gateway that serves a tiny model of each family that sees."""

from pathlib import Path

import seeing_models
from gateway import KEY, Gateway, selfloop
from selfloop.types.vision import VisionFacts


class SeeingGateway:
    """``tiny/<family>`` is the model of the folder ``folder / family``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, VisionFacts] = {}
        for family in seeing_models.FAMILIES:
            path = seeing_models.save(family, folder / family)
            self.facts[family] = seeing_models.facts(path)
            selfloop("models", "add", str(path), "--name", f"tiny/{family}", "--data-dir", str(folder / "data"))
        self.gateway = Gateway(folder / "data").start(KEY)
        self.http = self.gateway.http()
