"""One tiny model in float32 and fresh engines over it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny_models
from selfloop.engine.engine import Engine


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama-tied", tmp_path_factory.mktemp("model"))


class Letters:
    """Each id as one letter, so that texts and tokens have the same length."""

    num_tokens = tiny_models.VOCAB_SIZE
    drops_first_space = False

    def token_bytes(self, token: int) -> bytes:
        return chr(0x4E00 + token).encode()

    text_bytes = token_bytes


@pytest.fixture
def load(model_dir: Path) -> Callable[..., Engine]:
    def build(**settings: object) -> Engine:
        return Engine.load(model_dir, device="cpu", dtype="float32", **{"vocabulary": Letters(), **settings})

    return build


@pytest.fixture
def engine(load: Callable[..., Engine]) -> Engine:
    return load()
