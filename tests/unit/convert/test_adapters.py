"""Adapters out of checkpoints and into them: the program, against PEFT and Transformers."""

import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import served_model
import tiny_models
from selfloop.convert import adapters, export_adapters, import_adapters
from selfloop.engine.engine import Engine
from selfloop.engine.files import compare
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.types.digests import MANIFEST_FILE
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.settings import EngineLimits

Report = Callable[[str, float], None]


def quiet(_stage: str, _fraction: float) -> None:
    pass


def make_checkpoint(
    model_dir: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 32.0,
    seed: int = 1,
    targets: LoraTargets = LoraTargets(),
) -> Path:
    """A sampler checkpoint of an adapter that matters."""
    engine = Engine.load(model_dir, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))
    engine.init_run("run", rank=rank, seed=1, targets=targets)
    run = engine._runs["run"]
    run.alpha, run.step = alpha, 7
    run.theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
    engine.save_sampler_checkpoint("run", folder)
    return folder


def sharded(model_dir: Path, target: Path, *, tokenizer: bool = True) -> Path:
    """The model in several files, with an index."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
        model.save_pretrained(target, max_shard_size="40KB")
        if tokenizer:
            AutoTokenizer.from_pretrained(model_dir).save_pretrained(target)
    assert (target / "model.safetensors.index.json").is_file()
    return target


def load(folder: Path, **settings: object) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | settings)).eval()


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].float()


IDS = tiny_models.random_ids(20, seed=3)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_merged_model_is_what_peft_merges(family: str, tmp_path: Path):
    model_dir = tiny_models.save(family, tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint")
    facts = export_adapters.export_merged(checkpoint, model_dir, tmp_path / "out", "org/base", quiet)
    merged = load_adapter(load(model_dir), checkpoint).merge_and_unload()
    ours = load(tmp_path / "out")
    assert (logits(ours, IDS) - logits(merged, IDS)).abs().max() < 1e-4
    assert (logits(ours, IDS) - logits(load(model_dir), IDS)).abs().max() > 0.1
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    assert facts["dtype"] == "float32"
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == tiny_models.build(family).config.tie_word_embeddings


def test_a_merged_model_is_whole(tiny_model_folder: Path, tmp_path: Path):
    """Shards, tokenizer, chat template and dtype are those of the base."""
    model_dir = sharded(tiny_model_folder, tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint")
    out = tmp_path / "out"
    facts = export_adapters.export_merged(checkpoint, model_dir, out, "tiny/llama", quiet)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in model_dir.iterdir()} | {"README.md"}
    assert facts["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    for path in model_dir.glob("*.safetensors"):
        assert path.stat().st_size == (out / path.name).stat().st_size
    messages = [{"role": "user", "content": "Ahoy"}]
    ours, base = (AutoTokenizer.from_pretrained(folder) for folder in (out, model_dir))
    assert ours.apply_chat_template(messages) == base.apply_chat_template(messages)
    expected = logits(load_adapter(load(model_dir), checkpoint), IDS)
    assert (logits(load(out), IDS) - expected).abs().max() < 1e-4
    card = (out / "README.md").read_text()
    assert "tiny/llama" in card
    assert "| LoRA rank | 4 |" in card
    assert "| training steps | 7 |" in card


def untied(model_dir: Path) -> PreTrainedModel:
    """The base model with an output layer of its own, so that PEFT can merge into it alone."""
    model = load(model_dir)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapted_output_layer_is_merged(family: str, in_shards: bool, tmp_path: Path):
    """A tied model gets an output layer of its own; its embedding stays as it is."""
    model_dir = tiny_models.save(family, tmp_path / "model")
    if in_shards:
        model_dir = sharded(model_dir, tmp_path / "sharded", tokenizer=False)
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint", targets=LoraTargets(unembed=True))
    out = tmp_path / "out"
    facts = export_adapters.export_merged(checkpoint, model_dir, out, "org/base", quiet)
    ours = load(out)
    assert not ours.config.tie_word_embeddings
    expected = logits(load_adapter(untied(model_dir), checkpoint), IDS)
    assert (logits(ours, IDS) - expected).abs().max() < 1e-4
    assert torch.equal(ours.get_input_embeddings().weight, load(model_dir).get_input_embeddings().weight)
    assert not torch.equal(ours.get_input_embeddings().weight, ours.get_output_embeddings().weight)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    assert facts["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    stored = {name for path in out.glob("*.safetensors") for name in safetensors.torch.load_file(path)}
    assert "lm_head.weight" in stored
    if in_shards:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == stored
        files = [safetensors.torch.load_file(path) for path in out.glob("*.safetensors")]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in file.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once_to_the_dtype_of_the_base(dtype: torch.dtype, tmp_path: Path):
    model_dir = tmp_path / "model"
    tiny_models.save_quietly(tiny_models.build("llama-tied").to(dtype), model_dir)
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint")
    facts = export_adapters.export_merged(checkpoint, model_dir, tmp_path / "out", "org/base", quiet)
    assert facts["dtype"] == str(dtype).removeprefix("torch.")
    base = safetensors.torch.load_file(model_dir / "model.safetensors")
    ours = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    lora = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    assert base.keys() == ours.keys()
    for name, weight in base.items():
        assert ours[name].dtype == dtype
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in lora:
            a, b = (lora[f"{module}.lora_{kind}.weight"] for kind in "AB")
            torch.testing.assert_close(ours[name], (weight.float() + 8.0 * (b @ a)).to(dtype))
        else:
            assert torch.equal(ours[name], weight)


def test_an_exported_adapter_loads_in_peft(tiny_model_folder: Path, tmp_path: Path):
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint", alpha=12.0)
    out = tmp_path / "out"
    export_adapters.export_peft(checkpoint, tiny_model_folder, out, "tiny/llama", quiet)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("tiny/llama", 4, 12)
    assert "base_model: tiny/llama" in (out / "README.md").read_text()
    model = load_adapter(load(tiny_model_folder), out)
    engine = Engine.load(tiny_model_folder, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))
    engine.init_run("run", rank=4, seed=0, initial=checkpoint)
    result = engine.forward("run", [tiny_models.next_token_datum(IDS)], "cross_entropy", {})
    ours = torch.tensor(result.logprobs[0].values())
    expected = logits(model, IDS[:-1]).log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (ours - expected).abs().max() < 1e-4


def run_subprocess(*arguments: object) -> tuple[int, list[dict]]:
    command = [sys.executable, "-m", "selfloop.convert.adapters", *map(str, arguments)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_program_reports_how_far_it_is(tiny_model_folder: Path, tmp_path: Path):
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint")
    code, lines = run_subprocess(
        "merged", checkpoint, tiny_model_folder, tmp_path / "out", "--base-model", "tiny/llama"
    )
    assert code == 0
    fractions = [line["fraction"] for line in lines]
    assert fractions == sorted(fractions)
    assert {line["stage"] for line in lines} == {"read", "merge", "check", "done"}
    assert lines[-1]["facts"]["difference"] <= lines[-1]["facts"]["tolerance"]


def test_a_failure_is_one_json_line_and_leaves_nothing(tiny_model_folder: Path, tmp_path: Path):
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint")
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    out = tmp_path / "out"
    code, lines = run_subprocess("merged", checkpoint, tiny_model_folder, out, "--base-model", "tiny/llama")
    assert code == 1
    assert "checkpoint/adapter_model.safetensors is damaged" in lines[-1]["error"]
    assert not out.exists()


def test_an_export_that_nobody_waits_for_leaves_nothing(tiny_model_folder: Path, tmp_path: Path):
    """The command line was killed: the pipe is closed."""
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint")
    out = tmp_path / "out"
    arguments = ["peft", str(checkpoint), str(tiny_model_folder), str(out), "--base-model", "tiny/llama"]
    command = [sys.executable, "-m", "selfloop.convert.adapters", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(60) != 0
    assert not out.exists()


def test_an_existing_folder_is_left_alone(tiny_model_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    code, lines = run_subprocess("peft", tmp_path, tiny_model_folder, out, "--base-model", "tiny/llama")
    assert code == 1
    assert "exists already" in lines[-1]["error"]
    assert (out / "mine").read_text() == "mine"


def fail_to_merge(checkpoint: Path, model_dir: Path, out: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        adapters.main(["merged", str(checkpoint), str(model_dir), str(out), "--base-model", "tiny/llama"])
    assert ended.value.code == 1


def test_a_merged_model_that_is_another_is_not_given_out(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint")
    other = make_checkpoint(tiny_model_folder, tmp_path / "other", seed=2)
    genuine = export_adapters.write_merged

    def write_another(writer, model_dir, loaded, on_bytes):
        genuine(writer, model_dir, export_adapters.read_peft(other, export_adapters.read_spec(model_dir)), on_bytes)

    monkeypatch.setattr(export_adapters, "write_merged", write_another)
    fail_to_merge(checkpoint, tiny_model_folder, tmp_path / "out")
    assert "is not base plus adapter" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["tied", "head", "shard"])
def test_what_transformers_would_open_as_another_model_is_not_given_out(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Our own reader is not asked whether the folder is right."""
    model_dir = tiny_models.save("llama-tied", tmp_path / "model")
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint", targets=LoraTargets(unembed=True))
    genuine = export_adapters.write_merged

    def write_then_damage(writer, *rest):
        genuine(writer, *rest)
        file = writer.file("model.safetensors")
        tensors = safetensors.torch.load_file(file)
        if damage == "tied":
            tensors.pop("lm_head.weight")
            config = json.loads(writer.file("config.json").read_text()) | {"tie_word_embeddings": True}
            writer.file("config.json").write_text(json.dumps(config))
        elif damage == "head":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        else:
            writer.file("model.safetensors.index.json").write_text("{}")
            writer.file("model.safetensors").rename(writer.file("weights.safetensors"))
            return
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(export_adapters, "write_merged", write_then_damage)
    fail_to_merge(checkpoint, model_dir, tmp_path / "out")
    said = capsys.readouterr().out
    assert "is not base plus adapter" in said or "transformers does not open" in said or "No such file" in said
    assert not (tmp_path / "out").exists()


ODD_BASES = ["other head", "only the head", "head in the file that the config does not tie"]


@pytest.mark.parametrize("unembed", [False, True])
@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("odd", ODD_BASES)
def test_an_odd_base_is_merged_as_it_was_served(odd: str, in_shards: bool, unembed: bool, tmp_path: Path):
    model_dir = tiny_models.save("llama-tied", tmp_path / "model")
    tensors = safetensors.torch.load_file(model_dir / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if odd == "only the head":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors["lm_head.weight"] = torch.randn_like(embedding) * 0.1
    if odd == ODD_BASES[2]:
        config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
        (model_dir / "config.json").write_text(json.dumps(config))
    file = model_dir / "model.safetensors"
    if in_shards:
        file.unlink()
        names = sorted(tensors)
        shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
        for name, part in shards.items():
            safetensors.torch.save_file({n: tensors[n] for n in part}, model_dir / name, metadata={"format": "pt"})
        weight_map = {name: shard for shard, part in shards.items() for name in part}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint", targets=LoraTargets(unembed=unembed))
    served = scored(checkpoint, model_dir)
    out = tmp_path / "out"
    facts = export_adapters.export_merged(checkpoint, model_dir, out, "org/base", quiet)
    ours = load(out)
    scores = logits(ours, IDS[:-1]).log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (scores - served).abs().max() < 1e-4
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert ours.config.tie_word_embeddings == tied == (odd == "only the head" and not unembed)


def test_a_full_disk_leaves_nothing(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checkpoint = make_checkpoint(tiny_model_folder, tmp_path / "checkpoint")

    def torn(writer, model_dir, loaded, on_bytes):
        writer.file("model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_adapters, "write_merged", torn)
    fail_to_merge(checkpoint, tiny_model_folder, tmp_path / "out")
    assert "No space left" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_values_that_are_no_numbers_are_no_match():
    assert compare._largest(torch.tensor([1.0, float("nan")])) == float("inf")
    assert compare._largest(torch.tensor([1.0, -3.0])) == 3.0


def test_merged_values_that_do_not_fit_the_dtype_are_refused(tmp_path: Path):
    model_dir = tmp_path / "model"
    tiny_models.save_quietly(tiny_models.build("llama").to(torch.float16), model_dir)
    checkpoint = make_checkpoint(model_dir, tmp_path / "checkpoint", alpha=1e9)
    with pytest.raises(OperationFailed, match="do not fit float16"):
        export_adapters.export_merged(checkpoint, model_dir, tmp_path / "out", "org/base", quiet)


# -- import ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_peft_is_imported(tiny_model_folder: Path, tmp_path: Path):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    out = tmp_path / "checkpoint"
    facts = import_adapters.import_peft(folder, tiny_model_folder, out, quiet)
    size_bytes = sum(p.stat().st_size for p in out.iterdir() if p.name != MANIFEST_FILE)
    expected = {"lora_rank": 4, "lora_alpha": 16.0, "targets": "attn,mlp", "changes_nothing": False}
    assert facts == {"size_bytes": size_bytes, **expected}
    engine = Engine.load(tiny_model_folder, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))
    engine.init_run("run", rank=64, seed=0)
    engine.load_checkpoint("run", out, with_optimizer=False)
    assert engine._runs["run"].alpha == 16.0
    with pytest.raises(OperationFailed, match="load its weights alone"):
        engine.load_checkpoint("run", out, with_optimizer=True)
    # Alpha outlives a save and a snapshot.
    assert engine.save_trainer_checkpoint("run", tmp_path / "saved").lora_alpha == 16.0
    engine.snapshot("run", tmp_path / "snapshot")
    engine.restore("run", tmp_path / "snapshot")
    assert engine._runs["run"].alpha == 16.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"target_modules": ["embed_tokens"]}, "no place for"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(
    settings: dict, message: str, tiny_model_folder: Path, tmp_path: Path
):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter", **settings)
    with pytest.raises(OperationFailed, match=message):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)


def scored(checkpoint: Path, model_dir: Path) -> torch.Tensor:
    """Logprobs of what was imported."""
    engine = Engine.load(model_dir, device="cpu", dtype="float32", limits=EngineLimits(max_kv_tokens=512))
    engine.init_run("run", rank=4, seed=0, initial=checkpoint)
    result = engine.forward("run", [tiny_models.next_token_datum(IDS)], "cross_entropy", {})
    return torch.tensor(result.logprobs[0].values())


def scored_by_peft(folder: Path, model_dir: Path) -> torch.Tensor:
    scores = logits(load_adapter(load(model_dir), folder), IDS[:-1]).log_softmax(-1)
    return scores.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


WITH_COPIES = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["embed_tokens", "norm"]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", WITH_COPIES)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_copies_of_the_bases_weights_are_left(family: str, settings: dict, dtype: torch.dtype, tmp_path: Path):
    """The PEFT library writes them beside an adapter of the output layer, and for what ``modules_to_save`` names."""
    model_dir = tmp_path / "model"
    tiny_models.save_quietly(tiny_models.build(family).to(dtype), model_dir)
    folder = served_model.save_adapter(model_dir, tmp_path / "adapter", **settings)
    stored = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert any("lora" not in name for name in stored)
    out = tmp_path / "checkpoint"
    import_adapters.import_peft(folder, model_dir, out, quiet)
    assert (scored(out, model_dir) - scored_by_peft(folder, model_dir)).abs().max() < 1e-4
    name = next(name for name in stored if "lora" not in name)
    stored[name][-1] += 0.5
    safetensors.torch.save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(OperationFailed, match=f"{name} is not the base model's .*modules_to_save"):
        import_adapters.import_peft(folder, model_dir, tmp_path / "another", quiet)
    stored[name] = stored[name][:-1].clone()
    safetensors.torch.save_file(stored, folder / "adapter_model.safetensors")
    with pytest.raises(OperationFailed, match=f"{name} is F32 .*, where the base model has"):
        import_adapters.import_peft(folder, model_dir, tmp_path / "another", quiet)


def test_a_copy_beside_a_tied_base_with_a_head_of_its_own(tmp_path: Path):
    model_dir = tiny_models.save("llama-tied", tmp_path / "model")
    tensors = safetensors.torch.load_file(model_dir / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) * 0.1
    safetensors.torch.save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    folder = served_model.save_adapter(model_dir, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    out = tmp_path / "checkpoint"
    import_adapters.import_peft(folder, model_dir, out, quiet)
    assert (scored(out, model_dir) - scored_by_peft(folder, model_dir)).abs().max() < 1e-4


def hostile(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    text = json.dumps(json.loads(file.read_text()) | changes)
    file.write_text(text.replace('"1e999"', "1e999").replace('"-1e999"', "-1e999"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 1_000_000}, "r must be from 1 to 512, is 1000000"),
        ({"r": True}, "r must be a positive integer, is True"),
        ({"r": 2**70}, "r must be"),
        ({"r": 10**12}, "r must be"),
        ({"r": -4}, "r must be a positive integer, is -4"),
        ({"r": 0}, "r must be"),
        ({"r": 4.0}, "r must be"),
        ({"r": 5}, "has shape .*, expected"),
        ({"lora_alpha": 1e300}, "lora_alpha must be more than 0 and at most"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"lora_alpha": "1e999"}, "lora_alpha must be a number, is inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, is nan"),
        ({"lora_alpha": True}, "lora_alpha must be a number, is True"),
        ({"lora_alpha": -16}, "lora_alpha must be more than 0"),
        ({"target_modules": 7}, "target_modules must be a list of names"),
        ({"target_modules": ["q_proj"]}, "target_modules does not name"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ],
)
def test_what_an_adapter_says_of_itself_is_checked_before_memory_is_taken(
    changes: dict, message: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    hostile(folder, **changes)
    monkeypatch.setattr(AdapterShape, "initial", None)
    with pytest.raises(OperationFailed, match=message):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)


def with_header(folder: Path, change: Callable[[dict], None], length: int | None = None) -> None:
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + content[8 + size :])


def entry(header: dict, at: int = 0) -> dict:
    return header[sorted(name for name in header if "lora" in name)[at]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: entry(h).update(shape=[-4, -64]), "has the shape"),
        (lambda h: entry(h).update(shape=[2**62, 2**62]), "does not fit"),
        (lambda h: entry(h).update(shape=[2**70]), "has the shape"),
        (lambda h: entry(h).update(shape=[True, 64]), "broken header"),
        (lambda h: entry(h).update(shape=[4.5, 64]), "broken header"),
        (lambda h: entry(h).update(dtype="Q4"), "unknown dtype"),
        (lambda h: entry(h).update(dtype="I32"), "is I32; adapters are"),
        (lambda h: entry(h).update(data_offsets=[-8, 1016]), "does not fit"),
        (lambda h: entry(h).update(data_offsets=entry(h, 2)["data_offsets"]), "overlaps|does not fit|no tensor"),
        (lambda h: h.update(more={"dtype": "F32", "shape": [2**28], "data_offsets": [0, 2**30]}), "overlaps"),
        (lambda h: h.pop(sorted(h)[1]), "no tensor"),
        (lambda h: h.update(more=[1]), "broken header"),
    ],
)
def test_headers_that_lie_are_refused(
    change: Callable[[dict], None],
    message: str,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    with_header(folder, change)
    monkeypatch.setattr(AdapterShape, "initial", None)
    with pytest.raises(OperationFailed, match=message):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 3])
def test_lengths_of_headers_that_lie_are_refused(length: int, tiny_model_folder: Path, tmp_path: Path):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    with_header(folder, lambda header: None, length)
    with pytest.raises(OperationFailed, match=r"adapter_model\.safetensors cannot be read"):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", "[" * 100_000, " " * 2**21]
)
def test_an_adapter_config_that_is_none_is_refused(content: str, tiny_model_folder: Path, tmp_path: Path):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(OperationFailed, match=r"adapter_config\.json cannot be read"):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)


def test_an_adapter_of_another_model_is_refused(tiny_model_folder: Path, tmp_path: Path):
    other = tiny_models.save("qwen2", tmp_path / "other")
    folder = served_model.save_adapter(other, tmp_path / "adapter")
    code, lines = run_subprocess("import", folder, tiny_model_folder, tmp_path / "checkpoint")
    assert code == 1
    assert "has shape" in lines[-1]["error"]
    assert not (tmp_path / "checkpoint").exists()


def test_pickled_weights_are_refused(tiny_model_folder: Path, tmp_path: Path):
    folder = served_model.save_adapter(tiny_model_folder, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(OperationFailed, match="pickled"):
        import_adapters.import_peft(folder, tiny_model_folder, tmp_path / "checkpoint", quiet)
