"""Which of the catalogue's models a base checkpoint names."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import stores
from selfloop.control.resources import base_checkpoints
from selfloop.control.resources.catalogue import Catalogue
from selfloop.storage.db.database import Database
from selfloop.storage.db.tables import ModelRow
from selfloop.types.errors import BadRequest

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 264,
}
MODELS = (
    ("org/base", "hub:org/base", None, LLAMA),
    ("org/first", "hub:org/merged", "a" * 40, LLAMA | {"vocab_size": 300}),
    ("org/twin", "hub:org/merged", "a" * 40, LLAMA),
    ("org/branch", "hub:org/merged", "refs/pr/1", {"model_type": "sees", "text_config": LLAMA}),
    ("org/wide", "hub:org/merged", "wide", LLAMA | {"hidden_size": 96}),
    ("org/broken", "hub:org/merged", "broken", None),
    ("scope/tiny", "modelscope:org/scope", "v1", LLAMA),
    ("mine", "folder", None, LLAMA),
)
KNOWN = {
    "org/first": f"hf://org/merged@{'a' * 40}",
    "org/twin": f"hf://org/merged@{'a' * 40}",
    "org/branch": "hf://org/merged@refs/pr/1",
    "org/wide": "hf://org/merged@wide",
    "org/broken": "hf://org/merged@broken",
}


@pytest.fixture
async def catalogue(tmp_path: Path) -> AsyncIterator[Catalogue]:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    db = Database(stores.database_url(data_dir))
    async with db.write() as session:
        for number, (name, source, revision, config) in enumerate(MODELS):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "config.json").write_text("{" if config is None else json.dumps(config))
            row = ModelRow(name=name, source=source, revision=revision, path=str(folder), created_at=float(number))
            session.add(row)
        session.add(ModelRow(name="later", source="embedded", path=None, created_at=99.0))
    yield Catalogue(db, data_dir)
    await db.close()


async def test_revisions_of_a_hub_are_the_pinned_ones(catalogue: Catalogue):
    assert await base_checkpoints.by_model(catalogue) == KNOWN


@pytest.mark.parametrize(
    ("revision", "base_model", "name"),
    [
        ("a" * 40, "org/base", "org/first"),
        ("a" * 40, "org/base:peft:32", "org/first:peft:32"),
        ("refs/pr/1", "mine", "org/branch"),
        ("wide", "org/wide", "org/wide"),
    ],
)
async def test_it_is_served_as_the_model_of_that_revision(
    catalogue: Catalogue, revision: str, base_model: str, name: str
):
    assert await base_checkpoints.served_as(catalogue, f"hf://org/merged@{revision}", base_model) == name


@pytest.mark.parametrize(
    "asked",
    [
        "hf://org/base",
        "hf://org/merged",
        "hf://org/merged@",
        "hf://org/merged@" + "a" * 39,
        "hf://org/scope@v1",
        "org/merged@wide",
        "hf://merged@wide",
        "hf://org/merged@wide\n",
    ],
)
async def test_what_is_not_pinned_here_is_refused(catalogue: Catalogue, asked: str):
    with pytest.raises(BadRequest, match="hf://org/merged@refs/pr/1") as refused:
        await base_checkpoints.served_as(catalogue, asked, "org/base")
    assert refused.value.field == "base_checkpoint"


async def test_another_architecture_is_refused(catalogue: Catalogue):
    with pytest.raises(BadRequest, match="has hidden_size 96 for 64") as refused:
        await base_checkpoints.served_as(catalogue, "hf://org/merged@wide", "org/base")
    assert refused.value.field == "base_checkpoint"
    with pytest.raises(BadRequest, match=r"that of org/broken"):
        await base_checkpoints.served_as(catalogue, "hf://org/merged@broken", "org/base")
    with pytest.raises(BadRequest, match="later is not prepared yet"):
        await base_checkpoints.served_as(catalogue, "hf://org/merged@wide", "later")


async def test_the_folder_of_a_revision(catalogue: Catalogue, tmp_path: Path):
    assert await base_checkpoints.folder(catalogue, "org/merged", "wide") == tmp_path / "4"
    assert await base_checkpoints.folder(catalogue, "org/merged", "main") is None
