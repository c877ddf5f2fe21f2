"""A model folder that brings code of its own: it is served, or refused, and the code never runs."""

import json
import shutil
from pathlib import Path

import pytest

from selfloop.convert import prepare
from selfloop.engine.models.registry import read_spec
from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.worker.text.chat import ChatTemplate

CODE = "custom.py"
TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}{{ messages[0]['content'] }}"


@pytest.fixture
def hostile(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model, with ``auto_map`` wherever transformers looks for one, to a module that leaves a mark."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "hostile"))
    mark = f"import pathlib; pathlib.Path({str(tmp_path / 'MARKER')!r}).touch()\n"
    (folder / CODE).write_text(mark + "class Custom:\n    pass\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        fields = json.loads(file.read_text()) if file.exists() else {}
        fields["auto_map"] = {
            "AutoConfig": "custom.Custom",
            "AutoTokenizer": ["custom.Custom", "custom.Custom"],
            "AutoModelForCausalLM": "custom.Custom",
        }
        fields["trust_remote_code"] = True
        file.write_text(json.dumps(fields))
    (folder / "sitecustomize.py").write_text(mark)
    (folder / "transformers.py").write_text(mark)
    return folder


def test_code_in_a_model_folder_does_not_run(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    prepare.prepare_folder(hostile, tmp_path / "converted", lambda stage, fraction: None)
    read_spec(hostile)
    tokenizer = ModelTokenizer.load(hostile)
    ChatTemplate.load(hostile, tokenizer)
    assert not (tmp_path / "MARKER").exists()


def test_nor_when_its_tokenizer_needs_it(hostile: Path, tmp_path: Path):
    (hostile / "tokenizer.json").unlink()
    with pytest.raises(BadRequest, match="tokenizer"):
        prepare.prepare_folder(hostile, tmp_path / "converted", lambda stage, fraction: None)
    assert not (tmp_path / "MARKER").exists()


def test_nor_from_a_chat_template(hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from selfloop.worker.protocol import RenderChat

    monkeypatch.chdir(tmp_path)
    (hostile / "chat_template.jinja").write_text(TEMPLATE)
    chat = ChatTemplate.load(hostile, ModelTokenizer.load(hostile))
    with pytest.raises(BadRequest, match="template"):
        chat.tokens(RenderChat(b'[{"role": "user", "content": "x"}]'))
    assert not (tmp_path / "MARKER").exists()
