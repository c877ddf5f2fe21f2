"""GGUF exports, read back with transformers' own reader; llama.cpp itself is in ``tests/clients``."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from test_adapters import IDS, load, load_adapter, logits, make_checkpoint, quiet, run_subprocess, untied
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import gguf_models
import tiny_models
from selfloop.convert import adapters, export_adapters
from selfloop.convert.gguf import tokenizer
from selfloop.convert.gguf.names import gguf_name, halved, interleaved, layers_of
from selfloop.convert.gguf.read import GgufSource
from selfloop.engine.models.registry import read_spec
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fields_of(folder: Path) -> dict:
    reader = GGUFReader(folder / "model.gguf")
    return {key: field.contents() for key, field in reader.fields.items()}


def exported(model_dir: Path, tmp_path: Path, dtype: str | None = None, name: str = "out") -> tuple[Path, dict]:
    checkpoint = tmp_path / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(model_dir, checkpoint)
    return tmp_path / name, export_adapters.export_gguf(
        checkpoint, model_dir, tmp_path / name, "org/base", quiet, dtype
    )


def qwen3(folder: Path) -> Path:
    """With heads of 128: transformers' reader knows no others of this family."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**tiny_models._SIZES, head_dim=128))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tiny_models.save_quietly(model, folder)
    gguf_models.add_tokenizer(folder, gguf_models.byte_level())
    return folder


@pytest.mark.filterwarnings("ignore")  # transformers' own, of the reader of GGUF
@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_merged_model(family: str, tmp_path: Path):
    model_dir = qwen3(tmp_path / "model") if family == "qwen3" else gguf_models.save(family, tmp_path / "model")
    out, facts = exported(model_dir, tmp_path)
    merged = load_adapter(load(model_dir), tmp_path / "checkpoint").merge_and_unload()
    ours = load(out, gguf_file="model.gguf")
    assert (logits(ours, IDS) - logits(merged, IDS)).abs().max() < 1e-4
    assert (logits(ours, IDS) - logits(load(model_dir), IDS)).abs().max() > 0.1
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    assert {path.name for path in out.iterdir()} == {"README.md", "model.gguf"}
    assert facts["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    expected = Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(gguf_models.TEXT).ids
    assert tokenizer.encode(gguf_models.TEXT, add_special_tokens=False) == expected


@pytest.mark.filterwarnings("ignore")  # transformers' own, of the reader of GGUF
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapted_output_layer_is_a_tensor_of_its_own(family: str, tmp_path: Path):
    model_dir = gguf_models.save(family, tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint", targets=LoraTargets(unembed=True))
    out, facts = exported(model_dir, tmp_path)
    assert "output.weight" in {tensor.name for tensor in GGUFReader(out / "model.gguf").tensors}
    expected = logits(load_adapter(untied(model_dir), checkpoint), IDS)
    assert (logits(load(out, gguf_file="model.gguf"), IDS) - expected).abs().max() < 1e-4
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]


WRITTEN = (
    "llama",
    "llama-tied",
    "llama-biased",
    "llama3-rope",
    "llama-yarn",
    "llama-linear",
    "qwen2",
    "qwen3",
    "mistral",
)


@pytest.mark.parametrize("family", sorted({*tiny_models.FAMILIES, *tiny_models.MOE_FAMILIES} - set(WRITTEN)))
def test_a_family_that_gguf_is_not_written_of_is_refused_in_words(family: str, tmp_path: Path):
    model_dir = gguf_models.save(family, tmp_path / "model")
    with pytest.raises(OperationFailed, match=r"cannot be written as GGUF(: this model has|; known: \['llama')"):
        exported(model_dir, tmp_path)


@pytest.mark.parametrize("family", WRITTEN)
def test_every_family_reads_back_to_its_own_shape_and_logits(family: str, tmp_path: Path):
    model_dir = gguf_models.save(family, tmp_path / "model")
    out, facts = exported(model_dir, tmp_path)
    spec = read_spec(model_dir)
    read = GgufSource(out / "model.gguf").spec
    assert (read.tensors(), read.rope, read.tied) == (spec.tensors(), spec.rope, spec.tied)
    attention, _, eps = layers_of(read)
    assert (read.num_layers, attention.num_heads, attention.num_kv_heads) == (2, 4, 2)
    assert eps == pytest.approx(spec.final_norm_eps)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_matrices_are_rounded_once_and_the_rest_is_kept(dtype: str, torch_dtype: torch.dtype, tmp_path: Path):
    model_dir = gguf_models.save("qwen2", tmp_path / "model")
    merged = load_adapter(load(model_dir), make_checkpoint(model_dir, tmp_path / "checkpoint")).merge_and_unload()
    out, facts = exported(model_dir, tmp_path, dtype)
    assert facts["dtype"] == str(torch_dtype).removeprefix("torch.")
    assert facts["difference"] <= facts["tolerance"]
    config = read_spec(model_dir)
    stored = {tensor.name: tensor for tensor in GGUFReader(out / "model.gguf").tensors}
    state = merged.state_dict()
    assert {gguf_name(name, config) for name in state} == stored.keys()
    for name, weight in state.items():
        tensor = stored[gguf_name(name, config) or name]
        kept = weight if weight.dim() == 1 else weight.to(torch_dtype).float()
        # Summed in another order than PEFT does, a value may fall on the other side of a rounding.
        torch.testing.assert_close(
            torch.tensor(np.array(dequantize(tensor.data, tensor.tensor_type))), kept, rtol=1e-2, atol=1e-6
        )
        assert (tensor.tensor_type == gguf.GGMLQuantizationType.F32) == (weight.dim() == 1)


def test_the_dtype_is_that_of_the_base(tmp_path: Path):
    model_dir = tmp_path / "model"
    tiny_models.save_quietly(tiny_models.build("llama").to(torch.bfloat16), model_dir)
    gguf_models.add_tokenizer(model_dir, gguf_models.byte_level())
    _, facts = exported(model_dir, tmp_path)
    _, wide = exported(model_dir, tmp_path, "f32", "wide")
    assert (facts["dtype"], wide["dtype"]) == ("bfloat16", "float32")
    assert wide["difference"] < facts["difference"]
    make_checkpoint(model_dir, tmp_path / "large", alpha=1e9)
    with pytest.raises(OperationFailed, match="do not fit float16"):
        export_adapters.export_gguf(tmp_path / "large", model_dir, tmp_path / "not", "org/base", quiet, "f16")


def test_pairs_and_halves():
    weight = torch.arange(16.0).reshape(8, 2)
    paired = interleaved(weight, 2)
    assert paired[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert torch.equal(halved(paired, 2), weight)
    assert torch.equal(halved(interleaved(weight[:, 0], 2), 2), weight[:, 0])


# -- the tokenizer ----------------------------------------------------------------------------------------------


def test_tokens_their_kinds_and_the_template(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    out, _ = exported(model_dir, tmp_path)
    fields = fields_of(out)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == tiny_models.VOCAB_SIZE
    known = tokenizer.get_vocab_size()
    assert tokens[:known] == [tokenizer.id_to_token(i) for i in range(known)]
    assert tokens[-1] == f"[PAD{tiny_models.VOCAB_SIZE - 1}]"
    named = dict(zip(tokens, kinds, strict=True))
    assert named["<eos>"] == gguf.TokenType.CONTROL
    assert named["<mine>"] == gguf.TokenType.USER_DEFINED
    assert named[tokens[-1]] == gguf.TokenType.UNUSED
    assert named["t"] == gguf.TokenType.NORMAL
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 7)
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == gguf_models.TEMPLATE
    merges = json.loads((model_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


@pytest.mark.parametrize(("pattern", "name"), [(QWEN2, "qwen2"), (LLAMA3, "llama-bpe"), (TEKKEN, "tekken")])
def test_a_splitting_by_pattern_is_named(pattern: str, name: str):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    raw = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]}}
    assert tokenizer._splitting(raw) == name
    split["pattern"]["Regex"] += "|x"
    with pytest.raises(OperationFailed, match=r"none of llama\.cpp's gpt-2, smollm, llama-bpe"):
        tokenizer._splitting(raw)


def test_a_splitting_is_named_by_its_parts(tmp_path: Path):
    for make, name in ((gguf_models.byte_level, "gpt-2"), (gguf_models.digits_apart, "smollm")):
        assert tokenizer._splitting(json.loads(make().to_str())) == name
    grouped = pre_tokenizers.Digits(individual_digits=False)
    parts = pre_tokenizers.Sequence([grouped, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.raises(OperationFailed, match="splits text"):
        tokenizer._splitting(json.loads(gguf_models.byte_level(parts).to_str()))


def test_a_tokenizer_of_sentence_piece(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model", gguf_models.sentence_piece)
    out, _ = exported(model_dir, tmp_path)
    fields = fields_of(out)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    named = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert named["<0x0A>"] == gguf.TokenType.BYTE
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    merges = json.loads((model_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert scores["".join(merges[5])] > scores["".join(merges[20])]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "no tokenizer of type 'WordLevel'"),
        (Tokenizer(models.BPE({"a": 0}, [])), "no tokenizer of type 'BPE' without merges"),
        (Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 99}, [("a", "b")])), "beyond the model's 96"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tokenizer: Tokenizer, message: str, tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model", lambda: tokenizer)
    with pytest.raises(OperationFailed, match=message):
        exported(model_dir, tmp_path)


def test_a_model_without_tokenizer_json_is_refused(tmp_path: Path):
    with pytest.raises(OperationFailed, match=r"no tokenizer\.json"):
        exported(tiny_models.save("llama", tmp_path / "model"), tmp_path)


# -- the program ------------------------------------------------------------------------------------------------


def test_the_program_writes_checks_and_reports(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint")
    arguments = ["gguf", checkpoint, model_dir, tmp_path / "out", "--base-model", "org/base", "--dtype", "f16"]
    code, lines = run_subprocess(*arguments)
    assert code == 0, lines
    assert [line["fraction"] for line in lines] == sorted(line["fraction"] for line in lines)
    assert lines[-1]["facts"]["dtype"] == "float16"
    assert fields_of(tmp_path / "out")["general.name"] == "base-merged"


@pytest.mark.parametrize("damage", ["rows of q and k", "another adapter", "rope"])
def test_a_gguf_of_another_model_is_not_given_out(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint")
    other = make_checkpoint(model_dir, tmp_path / "other", seed=2)
    if damage == "another adapter":
        genuine = export_adapters.write_gguf

        def write_another(path, model_dir, loaded, *rest):
            genuine(path, model_dir, export_adapters.read_peft(other, export_adapters.read_spec(model_dir)), *rest)

        monkeypatch.setattr(export_adapters, "write_gguf", write_another)
    elif damage == "rope":
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_rope_freq_base",
            lambda self, value: self.add_float32(gguf.Keys.Rope.FREQ_BASE.format(arch=self.arch), value * 2),
        )
    else:
        monkeypatch.setattr("selfloop.convert.gguf.write.interleaved", lambda weight, heads: weight)
    with pytest.raises(SystemExit) as ended:
        adapters.main(["gguf", str(checkpoint), str(model_dir), str(tmp_path / "out"), "--base-model", "org/base"])
    assert ended.value.code == 1
    assert "is not base plus adapter" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
