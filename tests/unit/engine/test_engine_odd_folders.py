"""Which weights a model folder means: what transformers takes, or a refusal that names the files."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.models.weights import check_model
from selfloop.types.errors import OperationFailed

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = tiny_models.random_ids(20, seed=4)

Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, name: str = "model.safetensors") -> None:
    safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})


def store_shards(folder: Path, shards: dict[str, Tensors], **named: str) -> None:
    """Shards with an index; ``named`` are further entries, by the first part of the tensor's name."""
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    for file, tensors in shards.items():
        store(folder, tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | named}))


def halves(tensors: Tensors) -> dict[str, Tensors]:
    names = sorted(tensors)
    cut = len(names) // 2
    return {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:cut]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[cut:]},
    }


def configured(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))


def expected_logprobs(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        scores = model(torch.tensor([IDS[:-1]])).logits[0].log_softmax(-1)
    return scores.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def logprobs(folder: Path) -> torch.Tensor:
    engine = Engine.load(folder, device="cpu", dtype="float32")
    engine.init_run("run", rank=4, seed=0)
    result = engine.forward("run", [tiny_models.next_token_datum(IDS)], "cross_entropy", {})
    return torch.tensor(result.logprobs[0].values())


def other_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    store(folder, tensors | {HEAD: torch.randn_like(tensors[EMBEDDING]) * 0.1})


def equal_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING].clone()})


def last_bit_of_the_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 1.0
    store(folder, tensors | {HEAD: head})


def head_of_another_dtype(folder: Path) -> None:
    tensors = tensors_of(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDING].to(torch.bfloat16)})


def only_the_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    store(folder, {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()})


def other_head_in_shards(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    store_shards(folder, halves(tensors | {HEAD: torch.randn_like(tensors[EMBEDDING]) * 0.1}))


def only_the_head_in_shards(folder: Path) -> None:
    only_the_head(folder)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    store_shards(folder, halves(tensors))


def files_that_transformers_ignores(folder: Path) -> None:
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
    store(folder, adapter, "adapter_model.safetensors")
    store(folder, {"norm.weight": torch.zeros(32)}, "consolidated.safetensors")
    store(folder, {name: tensor * 2 for name, tensor in tensors_of(folder).items()}, "model.fp16.safetensors")


def ignored_files_beside_shards(folder: Path) -> None:
    files_that_transformers_ignores(folder)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    store_shards(folder, halves(tensors))


def index_that_names_the_file_itself(folder: Path) -> None:
    store_shards(folder, {"model.safetensors": tensors_of(folder)})


def index_with_an_entry_that_nobody_needs(folder: Path) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    shards = halves(tensors)
    store_shards(folder, shards, **{HEAD: next(iter(shards))})


def index_that_mixes_up_its_files(folder: Path) -> None:
    """transformers reads all that is in the files that are named."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    first, second = halves(tensors)
    store_shards(folder, halves(tensors), **{EMBEDDING: second, "model.norm.weight": first})


def mixed_dtypes(folder: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    tensors = sorted(tensors_of(folder).items())
    store(folder, {name: tensor.to(kinds[at % 4]) for at, (name, tensor) in enumerate(tensors)})


def old_buffers(folder: Path) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    store(folder, tensors_of(folder) | buffers)


ACCEPTED = {
    "llama-tied": [
        other_head, equal_head, last_bit_of_the_head, head_of_another_dtype, only_the_head, other_head_in_shards,
        only_the_head_in_shards, files_that_transformers_ignores, ignored_files_beside_shards,
        index_that_names_the_file_itself, index_with_an_entry_that_nobody_needs, index_that_mixes_up_its_files,
        mixed_dtypes, old_buffers,
    ],
    "llama": [files_that_transformers_ignores, index_that_names_the_file_itself, mixed_dtypes],
    "qwen2-tied": [other_head, only_the_head],
    "qwen3-tied": [other_head, only_the_head],
    "mistral-tied": [other_head, only_the_head],
}  # fmt: skip


def made(family: str, folder: Path) -> Path:
    base, _, tied = family.partition("-")
    if tied and base != "llama":
        # Saved untied, and then said to be tied, it would have two layers; so its own is dropped.
        tiny_models.save(base, folder)
        tensors = tensors_of(folder)
        tensors.pop(HEAD, None)
        store(folder, tensors)
        configured(folder, tie_word_embeddings=True)
        return folder
    return tiny_models.save(family, folder)


@pytest.mark.parametrize(
    ("family", "change"), [(family, change) for family, changes in ACCEPTED.items() for change in changes]
)
def test_what_is_served_is_what_transformers_loads(family: str, change: Callable[[Path], None], tmp_path: Path):
    folder = made(family, tmp_path / "model")
    change(folder)
    check_model(folder)
    assert (logprobs(folder) - expected_logprobs(folder)).abs().max() < 1e-4


def test_a_head_of_its_own_counts(tmp_path: Path):
    """Not only the numbers: its size is that of two layers, and it is laid out as one of its own."""
    folder = tiny_models.save("llama-tied", tmp_path / "model")
    before = Engine.load(folder, device="cpu", dtype="float32").info.num_parameters
    other_head(folder)
    engine = Engine.load(folder, device="cpu", dtype="float32")
    assert engine.info.num_parameters == before + tensors_of(folder)[HEAD].numel()
    assert not engine._model.spec.tied


@pytest.mark.parametrize("absent", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_keys_that_the_config_leaves_out_are_those_of_transformers(family: str, absent: str, tmp_path: Path):
    folder = tiny_models.save(family, tmp_path / "model")
    configured(folder, **{absent: "absent"})
    try:
        theirs = expected_logprobs(folder)
    except (RuntimeError, ValueError):
        with pytest.raises(OperationFailed, match=r"shape|multiple"):
            check_model(folder)
    else:
        assert (logprobs(folder) - theirs).abs().max() < 1e-4


def shards_beside_the_file(folder: Path) -> None:
    store_shards(folder, halves({name: tensor * 0.5 for name, tensor in tensors_of(folder).items()}))


def index_of_a_file_that_is_gone(folder: Path) -> None:
    shards_beside_the_file(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


def tensor_that_is_in_no_file(folder: Path) -> None:
    shards = halves(tensors_of(folder))
    (folder / "model.safetensors").unlink()
    first, second = shards
    store_shards(folder, {first: shards[first], second: {n: t for n, t in shards[second].items() if "norm" not in n}})


def tensor_in_two_files(folder: Path) -> None:
    shards = halves(tensors_of(folder))
    (folder / "model.safetensors").unlink()
    first, second = shards
    again = {"model.norm.weight": shards[second]["model.norm.weight"] * 2}
    store_shards(folder, {first: shards[first] | again, second: shards[second]})


def shards_without_an_index(folder: Path) -> None:
    shards_beside_the_file(folder)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).unlink()


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_prefix(folder: Path) -> None:
    store(folder, {name.removeprefix("model."): tensor for name, tensor in tensors_of(folder).items()})


def value_head(folder: Path) -> None:
    store(
        folder,
        tensors_of(folder) | {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)},
    )


def no_head(folder: Path) -> None:
    store(folder, {name: tensor for name, tensor in tensors_of(folder).items() if name != HEAD})


def integers(folder: Path) -> None:
    store(folder, tensors_of(folder) | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})


def eight_bits(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    store(folder, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})


def another_shape(folder: Path) -> None:
    store(folder, tensors_of(folder) | {"model.norm.weight": torch.ones(33)})


def rows_and_columns(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    store(folder, tensors | {name: tensors[name].T.contiguous()})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def too_many_layers(folder: Path) -> None:
    configured(folder, num_hidden_layers=2**31)


def bias_that_the_config_denies(folder: Path) -> None:
    store(folder, tensors_of(folder) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})


REFUSED = [
    (shards_beside_the_file, r"both model\.safetensors and model\.safetensors\.index\.json, which names model-00001"),
    (index_of_a_file_that_is_gone, r"index\.json names 'model-00002-of-00002\.safetensors', which is not in"),
    (tensor_that_is_in_no_file, r"lacks \d tensors.*norm"),
    (tensor_in_two_files, r"model\.norm\.weight is in both .*model-00001.* and .*model-00002"),
    (shards_without_an_index, r"neither model\.safetensors or .*model-00001-of-00002\.safetensors"),
    (only_pickled, r"only pickled weights \(pytorch_model\.bin\)"),
    (no_prefix, r"lack the prefix 'model\.'"),
    (value_head, r"2 unexpected tensors.*v_head.*model\.safetensors"),
    (no_head, r"lacks 1 tensors.*lm_head\.weight.*tie_word_embeddings is false"),
    (integers, r"model\.norm\.weight is I8"),
    (eight_bits, r"up_proj\.weight is F8_E4M3"),
    (another_shape, r"model\.norm\.weight has shape \[33\], expected \[32\]"),
    (rows_and_columns, r"up_proj\.weight has shape \[32, 48\], expected \[48, 32\]"),
    (cut_short, r"cut short"),
    (too_many_layers, r"num_hidden_layers must be at most 65536, is 2147483648"),
    (bias_that_the_config_denies, r"unexpected tensors.*q_proj\.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_loaded_is_refused_by_the_loader_and_before(
    change: Callable[[Path], None], message: str, model_dir: Path, tmp_path: Path
):
    folder = tiny_models.save("llama", tmp_path / "model")
    change(folder)
    with pytest.raises(OperationFailed, match=message) as before:
        check_model(folder)
    with pytest.raises(OperationFailed) as loading:
        Engine.load(folder)
    assert str(loading.value) == str(before.value)
    assert before.value.error_class == "ModelInvalid"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, is True"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"hidden_size": -32}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "heads of 7 dimensions"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"rope_parameters": [1]}, "rope parameters cannot be read"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4x"}}, "rope parameters cannot be read"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ],
)
def test_a_config_that_is_no_config_is_refused_by_name(changes: dict, message: str, model_dir: Path, tmp_path: Path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    configured(folder, **changes)
    with pytest.raises(OperationFailed, match=message):
        check_model(folder)
