"""GGUF files as base models: every family's logits, every format's numbers, and what is refused."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from safetensors.torch import load_file
from test_adapters import IDS, load, logits, make_checkpoint, quiet
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import gguf_models
import gguf_written
import tiny_models
from selfloop.convert import export_adapters, prepare
from selfloop.convert.gguf import read, splittings
from selfloop.convert.gguf.read import READ_TYPES, GgufSource
from selfloop.types.errors import BadRequest
from selfloop.types.model_folder import ModelFacts, read_chat_template
from selfloop.types.model_tokenizer import ModelTokenizer

SIZES = tiny_models._SIZES
FAMILIES = {
    "llama": "llama",
    "llama-tied": "llama",
    "llama-biased": "llama",
    "mistral": "llama",
    "mistral-window": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2-own": "gemma2",
    "gemma3-own": "gemma3_text",
    "phi3": "phi3",
    "phi3-longrope": "phi3",
    "olmo2": "olmo2",
    "granite-own": "granite",
    "glm4": "glm4",
    "smollm3": "smollm3",
}
_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4}
_GEMMA = {"pad_token_id": 0, "head_dim": 256}
# With what transformers' reader of GGUF takes for granted: experts in every layer, heads of 256 and the usual caps.
USUAL = {
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **_EXPERTS)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **_EXPERTS, head_dim=16, norm_topk_prob=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **_GEMMA, sliding_window=11)),
    "gemma3_text": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, **_GEMMA, sliding_window=11)
    ),
}
READ_BY_TRANSFORMERS = {"llama", "llama-tied", "mistral", "qwen2", "phi3", *USUAL}
# llama.cpp has in its code, and a file does not say, what these tiny models have of their own.
IN_CODE = {
    "gemma2-own": {"query_pre_attn_scalar": 8},
    "gemma3-own": {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention"] * 2, "sliding_window_pattern": 6},
    "smollm3": {"no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2},
}


def save(family: str, folder: Path) -> Path:
    if family in USUAL:
        torch.manual_seed(0)
        model = USUAL[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        tiny_models.save_quietly(model, folder)
        gguf_models.add_tokenizer(folder, gguf_models.byte_level())
        return folder
    model_dir = gguf_models.save(family, folder)
    config = json.loads((model_dir / "config.json").read_text()) | IN_CODE.get(family, {})
    (model_dir / "config.json").write_text(json.dumps(config))
    return model_dir


def added(path: Path, tmp_path: Path) -> ModelFacts:
    return prepare.prepare_folder(path, tmp_path / "models", quiet)


@pytest.mark.filterwarnings("ignore")  # transformers' own, of its reader of GGUF
@pytest.mark.parametrize("family", [*FAMILIES, *USUAL])
def test_a_gguf_has_the_logits_of_its_model(family: str, tmp_path: Path):
    model_dir = save(family, tmp_path / "model")
    more = {"attention.sliding_window": 11} if family == "mistral-window" else {}
    file = gguf_written.write(model_dir, tmp_path / "tiny.gguf", more=more)
    facts = added(file, tmp_path)
    assert facts.model_type == FAMILIES.get(family, family)
    expected = logits(load(model_dir), IDS)
    assert (logits(load(facts.path), IDS) - expected).abs().max() < 2e-5
    if family in READ_BY_TRANSFORMERS:
        theirs = load(tmp_path, gguf_file=file.name)
        assert (logits(theirs, IDS) - logits(load(facts.path), IDS)).abs().max() < 2e-5


def test_the_folder_is_whole(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    (tmp_path / "in").mkdir()
    facts = added(gguf_written.write(model_dir, tmp_path / "in" / "tiny-F32.gguf").parent, tmp_path)
    assert facts.path.parent == tmp_path / "models"
    assert (facts.vocab_size, facts.max_position_embeddings, facts.eos_token_ids) == (96, 256, (2,))
    config = json.loads((facts.path / "config.json").read_text())
    assert (config["architectures"], config["torch_dtype"]) == (["LlamaForCausalLM"], "float32")
    assert config["rms_norm_eps"] == 1e-6
    assert read_chat_template(facts.path) == gguf_models.TEMPLATE
    own, ours = Tokenizer.from_file(str(model_dir / "tokenizer.json")), ModelTokenizer.load(facts.path)
    for text in (gguf_models.TEXT, "crew<eos>said <mine>", "12 ahoy\n"):
        assert ours.encode(text, add_special_tokens=True) == own.encode(text).ids
        assert AutoTokenizer.from_pretrained(facts.path).encode(text) == own.encode(text).ids
    # The same file again is the same folder; another state of it is another.
    assert added(tmp_path / "in", tmp_path) == facts
    gguf_written.write(model_dir, tmp_path / "in" / "tiny-F32.gguf", Kind.BF16)
    assert added(tmp_path / "in", tmp_path).path != facts.path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "float16"), (Kind.Q4_0, "float16")],
)
def test_what_a_file_has_is_kept_or_dequantised(kind: Kind, dtype: str, tmp_path: Path):
    model_dir = gguf_models.save("qwen2", tmp_path / "model")
    file = gguf_written.write(model_dir, tmp_path / "tiny.gguf", kind)
    facts = added(file, tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = load_file(facts.path / "model.safetensors")
    for name, own in (
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        plain = torch.tensor(np.array(dequantize(stored[own].data, stored[own].tensor_type)))
        torch.testing.assert_close(found[name].float(), plain, rtol=2**-11, atol=6e-8)
    assert str(found["model.layers.1.mlp.up_proj.weight"].dtype) == f"torch.{dtype}"
    assert found["model.norm.weight"].dtype == torch.float32
    assert json.loads((facts.path / "config.json").read_text())["torch_dtype"] == dtype


def test_some_rows_are_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    source = GgufSource(gguf_written.write(model_dir, tmp_path / "tiny.gguf", Kind.Q8_0))
    whole = dict(source.read(source.names()))
    monkeypatch.setattr(read, "_PART_BYTES", 5 * 4 * 32)
    parts = list(source.parts("model.embed_tokens.weight"))
    assert {len(part) for part in parts} == {5, 1}
    assert torch.equal(torch.cat(parts), whole["model.embed_tokens.weight"])
    # Heads are put in order as a whole.
    assert len(list(source.parts("model.layers.0.self_attn.q_proj.weight"))) == 1


def test_frequency_factors_of_no_known_scaling_are_written_out(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    config = json.loads((model_dir / "config.json").read_text())
    factors = [1.0, 1.5, 3.0, 7.0]
    scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    config["rope_parameters"] = {"rope_theta": 10000.0, **scaling, "original_max_position_embeddings": 256}
    (model_dir / "config.json").write_text(json.dumps(config))
    stored = {"rope_freqs.weight": (np.array(factors, dtype=np.float32), Kind.F32)}
    file = gguf_written.write(model_dir, tmp_path / "tiny.gguf", stored=stored)
    facts = added(file, tmp_path)
    assert (logits(load(facts.path), IDS) - logits(load(model_dir), IDS)).abs().max() < 2e-5


# -- numbers, against the layouts of ggml's blocks in float64 ------------------------------------------------------


def f16(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def nibbles(data: bytes) -> list[int]:
    """Of each byte the lower half, and behind them the upper halves."""
    return [byte & 15 for byte in data] + [byte >> 4 for byte in data]


def q4_0(b: bytes) -> list[float]:
    return [f16(b, 0) * (n - 8) for n in nibbles(b[2:18])]


def q4_1(b: bytes) -> list[float]:
    return [f16(b, 0) * n + f16(b, 2) for n in nibbles(b[4:20])]


def q5_0(b: bytes) -> list[float]:
    high = int.from_bytes(b[2:6], "little")
    return [f16(b, 0) * ((n | (high >> j & 1) << 4) - 16) for j, n in enumerate(nibbles(b[6:22]))]


def q5_1(b: bytes) -> list[float]:
    high = int.from_bytes(b[4:8], "little")
    return [f16(b, 0) * (n | (high >> j & 1) << 4) + f16(b, 2) for j, n in enumerate(nibbles(b[8:24]))]


def q8_0(b: bytes) -> list[float]:
    return [f16(b, 0) * n for n in struct.unpack_from("<32b", b, 2)]


def two_bits(q: bytes) -> list[int]:
    """256 numbers; each half has four in every byte, 32 apart."""
    return [q[j // 128 * 32 + j % 32] >> 2 * (j % 128 // 32) & 3 for j in range(256)]


def each_16(scales) -> list[int]:
    return [scale for scale in scales for _ in range(16)]


def q2_k(b: bytes) -> list[float]:
    scales, q, d, least = b[:16], b[16:80], f16(b, 80), f16(b, 82)
    return [
        d * (scales[j // 16] & 15) * (q[j // 128 * 32 + j % 32] >> 2 * (j % 128 // 32) & 3)
        - least * (scales[j // 16] >> 4)
        for j in range(256)
    ]


def q3_k(b: bytes) -> list[float]:
    high, q, s, d = b[:32], b[32:96], b[96:108], f16(b, 108)
    scales = [((s[j % 8] >> 4 * (j // 8) & 15) | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 for j in range(16)]
    return [
        d
        * scales[j // 16]
        * ((q[j // 128 * 32 + j % 32] >> 2 * (j % 128 // 32) & 3) - (0 if high[j % 32] >> j // 32 & 1 else 4))
        for j in range(256)
    ]


def six_bits(s: bytes, j: int) -> tuple[int, int]:
    """A scale and a minimum, in twelve bytes of eight of each."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def q4_k(b: bytes) -> list[float]:
    d, least, s, q = f16(b, 0), f16(b, 2), b[4:16], b[16:144]
    made = []
    for j in range(256):
        scale, minimum = six_bits(s, j // 32)
        made.append(d * scale * (q[j // 64 * 32 + j % 32] >> 4 * (j % 64 // 32) & 15) - least * minimum)
    return made


def q5_k(b: bytes) -> list[float]:
    d, least, s, high, q = f16(b, 0), f16(b, 2), b[4:16], b[16:48], b[48:176]
    made = []
    for j in range(256):
        scale, minimum = six_bits(s, j // 32)
        low = q[j // 64 * 32 + j % 32] >> 4 * (j % 64 // 32) & 15
        made.append(d * scale * (low | (high[j % 32] >> j // 32 & 1) << 4) - least * minimum)
    return made


def q6_k(b: bytes) -> list[float]:
    low, high, scales, d = b[:128], b[128:192], struct.unpack_from("<16b", b, 192), f16(b, 208)
    made = []
    for j in range(256):
        half, quarter, place = j // 128, j % 128 // 32, j % 32
        four = low[half * 64 + quarter % 2 * 32 + place] >> 4 * (quarter // 2) & 15
        two = high[half * 32 + place] >> 2 * quarter & 3
        made.append(d * scales[j // 16] * ((four | two << 4) - 32))
    return made


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_nl(b: bytes) -> list[float]:
    return [f16(b, 0) * IQ4[n] for n in nibbles(b[2:18])]


def iq4_xs(b: bytes) -> list[float]:
    d, high, low, q = f16(b, 0), int.from_bytes(b[2:4], "little"), b[4:8], b[8:136]
    made = []
    for block in range(8):
        scale = (low[block // 2] >> 4 * (block % 2) & 15 | (high >> 2 * block & 3) << 4) - 32
        made += [d * scale * IQ4[n] for n in nibbles(q[block * 16 : block * 16 + 16])]
    return made


# Of each format where its float16 numbers are, and its formula.
FORMULAS = {
    Kind.Q4_0: ((0,), q4_0),
    Kind.Q4_1: ((0, 2), q4_1),
    Kind.Q5_0: ((0,), q5_0),
    Kind.Q5_1: ((0, 2), q5_1),
    Kind.Q8_0: ((0,), q8_0),
    Kind.Q2_K: ((80, 82), q2_k),
    Kind.Q3_K: ((108,), q3_k),
    Kind.Q4_K: ((0, 2), q4_k),
    Kind.Q5_K: ((0, 2), q5_k),
    Kind.Q6_K: ((208,), q6_k),
    Kind.IQ4_NL: ((0,), iq4_nl),
    Kind.IQ4_XS: ((0,), iq4_xs),
}


def random_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Blocks of any bits, with scales that a model might have."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    blocks = generator.integers(0, 256, (rows, columns // size, num_bytes), dtype=np.uint8)
    for at in FORMULAS[kind][0]:
        scales = generator.normal(0, 1e-3, (rows, columns // size)).astype("<f2")
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", sorted(FORMULAS))
def test_the_numbers_of_a_format(kind: Kind, tmp_path: Path):
    """Through a whole file, one matrix of which has rows of 256."""
    blocks = random_blocks(kind, 32, 256)
    expected = [[x for block in row for x in FORMULAS[kind][1](block.tobytes())] for row in blocks]
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 256}))
    tiny_models.save_quietly(model, tmp_path / "model")
    gguf_models.add_tokenizer(tmp_path / "model", gguf_models.byte_level())
    stored = {"blk.0.ffn_down.weight": (blocks.reshape(32, -1), kind)}
    file = gguf_written.write(tmp_path / "model", tmp_path / "tiny.gguf", stored=stored)
    ((_, found),) = GgufSource(file).read(["model.layers.0.mlp.down_proj.weight"])
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=3e-7, atol=1e-9)


def test_every_type_that_is_read_has_its_formula_here():
    assert {Kind.F32, Kind.F16, Kind.BF16} | set(FORMULAS) == READ_TYPES


# -- what is refused, by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"arch": "gptneox"}, "architecture 'gptneox', which is not read from GGUF; known: gemma2, "),
        ({"more": {"attention.clamp_kqv": 8.0}}, r"says llama\.attention\.clamp_kqv, which is not known of llama"),
        ({"more": {"expert_count": 4}}, "a Mixtral"),
        ({"more": {"block_count": 3}}, r"has no blk\.2\."),
        ({"more": {"block_count": 1}}, r"unexpected tensors, e\.g\. \['blk\.1\."),
        ({"more": {"feed_forward_length": 40}}, r"shape \[48, 32\], expected \[40, 32\]"),
        ({"more": {"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}}, "rope.scaling.type 'ntk'"),
        ({"pre": "viking"}, "splits texts as 'viking'.*known: chatglm-bpe, .*beside the GGUF file"),
    ],
)
def test_what_is_not_known_is_refused_by_name(how: dict, message: str, tmp_path: Path):
    file = gguf_written.write(gguf_models.save("llama", tmp_path / "model"), tmp_path / "tiny.gguf", **how)
    with pytest.raises(BadRequest, match=message):
        added(file, tmp_path)
    assert not list((tmp_path / "models").glob("[!.]*"))


def test_a_type_that_is_not_dequantised_is_refused_by_name(tmp_path: Path):
    stored = {"blk.0.attn_norm.weight": (np.ones(32, dtype=np.float64), Kind.F64)}
    file = gguf_written.write(gguf_models.save("llama", tmp_path / "model"), tmp_path / "tiny.gguf", stored=stored)
    with pytest.raises(
        BadRequest, match=r"blk\.0\.attn_norm\.weight is F64, which is not dequantised here; known: BF16"
    ):
        added(file, tmp_path)


def test_values_that_do_not_fit_are_refused(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    embedding = np.full((96, 32), np.inf, dtype=np.float32)
    file = gguf_written.write(model_dir, tmp_path / "a.gguf", stored={"token_embd.weight": (embedding, Kind.F32)})
    with pytest.raises(BadRequest, match=r"model\.embed_tokens\.weight of .* not finite in F32"):
        added(file, tmp_path)


def test_a_file_that_is_no_gguf(tmp_path: Path):
    (tmp_path / "no.gguf").write_bytes(b"GG" * 50)
    with pytest.raises(BadRequest, match="cannot be read as GGUF"):
        added(tmp_path / "no.gguf", tmp_path)


def test_a_folder_of_several_models_and_one_of_parts(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    folder = tmp_path / "in"
    folder.mkdir()
    whole = gguf_written.write(model_dir, folder / "a-00001-of-00002.gguf")
    with pytest.raises(BadRequest, match=r"one part of 2; a-00002-of-00002\.gguf is not beside it"):
        added(whole, tmp_path)
    shutil.copyfile(whole, folder / "b.gguf")
    with pytest.raises(BadRequest, match=r"has 2 models in GGUF \(a-00001-of-00002\.gguf, b\.gguf\): name the file"):
        added(folder, tmp_path)
    # A projector of pictures is no model.
    writer = gguf.GGUFWriter(folder / "mmproj.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole.unlink()
    assert added(folder, tmp_path).model_type == "llama"


def test_a_file_in_parts(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    expected = added(gguf_written.write(model_dir, tmp_path / "whole.gguf"), tmp_path)
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    first, *others = reader.tensors
    gguf_written.write(model_dir, tmp_path / "a-00001-of-00002.gguf", only={first.name})
    writer = gguf.GGUFWriter(tmp_path / "a-00002-of-00002.gguf", "llama")
    for tensor in others:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = added(tmp_path / "a-00001-of-00002.gguf", tmp_path)
    assert (facts.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()


# -- the tokenizer -------------------------------------------------------------------------------------------------

TEXTS = (gguf_models.TEXT, "  two  spaces\n\nahoy<eos>\tthe crew", "don't 12345 ÄÖ \u65e5\u672c \U0001f99c", "")


@pytest.mark.parametrize("make", [gguf_models.byte_level, gguf_models.digits_apart, gguf_models.sentence_piece])
def test_what_is_exported_comes_back_with_its_tokenizer(make, tmp_path: Path):
    """Of our own export: tokens as before, whatever the tokenizer is."""
    model_dir = gguf_models.save("llama", tmp_path / "model", make)
    make_checkpoint(model_dir, tmp_path / "checkpoint")
    export_adapters.export_gguf(tmp_path / "checkpoint", model_dir, tmp_path / "out", "org/base", quiet)
    facts = added(tmp_path / "out" / "model.gguf", tmp_path)
    own, ours = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (model_dir, facts.path))
    assert ours.decode(ours.encode(TEXTS[0]).ids) == TEXTS[0]
    for text in TEXTS[:2] if make is gguf_models.sentence_piece else TEXTS:
        assert ours.encode(text).ids == own.encode(text).ids, text


def test_a_tokenizer_beside_the_file_is_taken(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    folder = tmp_path / "in"
    folder.mkdir()
    file = gguf_written.write(model_dir, folder / "tiny.gguf", pre="viking")
    shutil.copyfile(model_dir / "tokenizer.json", folder / "tokenizer.json")
    facts = added(file, tmp_path)
    assert (facts.path / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    assert read_chat_template(facts.path) == gguf_models.TEMPLATE


@pytest.mark.parametrize("name", splittings.KNOWN)
def test_every_known_splitting_is_one_that_tokenizers_takes(name: str):
    raw = json.loads(gguf_models.byte_level().to_str())
    raw["pre_tokenizer"], raw["normalizer"] = splittings.pre_tokenizer(name), splittings.normalizer(name)
    made = Tokenizer.from_str(json.dumps(raw))
    parts = [part for part, _ in made.pre_tokenizer.pre_tokenize_str("I'LL sail 12345 miles\n\n to\tsea's end")]
    assert "".join(parts) == "I'LL\u0120sail\u012012345\u0120miles\u010a\u010a\u0120to\u0109sea's\u0120end"
    digits = [part for part in parts if any(char.isdigit() for char in part)]
    longest = max(len(part.strip("\u0120")) for part in digits)
    three = {
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "dbrx",
        "smaug-bpe",
        "chatglm-bpe",
        "glm4",
        "gpt-4o",
        "llama4",
    }
    assert longest == (3 if name in three else 5 if name in {"gpt-2", "mpt", "olmo", "phi-2"} else 1)


def test_texts_begin_as_the_file_says(tmp_path: Path):
    model_dir = gguf_models.save("llama", tmp_path / "model")
    for says, begins in ((True, True), (False, False), (None, False)):
        facts = added(gguf_written.write(model_dir, tmp_path / f"{says}.gguf", add_bos=says), tmp_path)
        ids = ModelTokenizer.load(facts.path).encode("ahoy", add_special_tokens=True)
        assert (ids[0] == 1) == begins
    facts = added(gguf_written.write(model_dir, tmp_path / "llama3.gguf", add_bos=None, pre="llama-bpe"), tmp_path)
    assert ModelTokenizer.load(facts.path).encode("ahoy", add_special_tokens=True)[0] == 1
