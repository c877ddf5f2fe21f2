"""Tiny models in float32 and engines over them; built once, as nothing changes the base weights."""

import shutil
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.peft import write_peft


class Zoo:
    """Folders, reference models and engines by family name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = cache(self._folder)

    def _folder(self, family: str) -> Path:
        return tiny_models.save(family, self._root / family)

    def reference(self, family: str) -> PreTrainedModel:
        return tiny_models.build(family)

    def engine(self, family: str, **settings: object) -> Engine:
        return Engine.load(self.folder(family), device="cpu", dtype="float32", **settings)

    def peft_of_file(self, family: str, engine: Engine, run_id: str) -> PeftModel:
        """A PEFT model that reads the run's adapter as it is exported, and goes on training it."""
        run = engine._runs[run_id]
        folder = self._root / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        writer = DirectoryWriter(folder)
        write_peft(writer, run.shape, run.theta_P, run.alpha)
        writer.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(self.reference(family), folder, is_trainable=True)

    def peft(self, family: str, engine: Engine, run_id: str) -> PeftModel:
        """A PEFT model that starts from the run's own weights."""
        run = engine._runs[run_id]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = LoraConfig(r=run.shape.rank, lora_alpha=int(run.alpha), target_modules=run.shape.module_names)
            model = get_peft_model(self.reference(family), settings)
        with torch.no_grad():
            for parameter in run.shape.named(run.theta_P):
                name = f"base_model.model.model.{parameter.name}.default.weight"
                model.get_parameter(name).copy_(parameter.view)
        return model


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("models"))
