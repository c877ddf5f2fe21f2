"""Models that see, against transformers' own: pixels, features, logits, gradients and samples."""

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image as Pictures
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import seeing_models
from seeing_models import AFTER, BEFORE, IMAGE_TOKEN
from selfloop.engine.backends.base import Varlen
from selfloop.engine.engine import Engine
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.vision.pixels import pixel_values
from selfloop.engine.vision.rows import Part, layout
from selfloop.types import datum as types
from selfloop.types.datum import Datum
from selfloop.types.images import Image, read_size
from selfloop.types.lora import LoraTargets
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits
from selfloop.types.vision import VisionFacts
from selfloop.worker.images.pixels import PixelReader

BOUND = 2e-5
# As without images: two delta rules in float32.
GRADIENT_BOUNDS = {"gemma3": 2e-5, "qwen3_5": 2e-4, "qwen3_5_moe": 2e-4}


class Sequence(NamedTuple):
    """Tokens with images among them; ``pictures`` are the same as transformers takes them."""

    tokens: list[int]
    images: list[Image]
    pictures: list[Pictures.Image]


class Seeing(NamedTuple):
    family: str
    folder: Path
    engine: Engine
    facts: VisionFacts
    reference: PreTrainedModel


@pytest.fixture(scope="module", params=[*seeing_models.FAMILIES, seeing_models.MIXTURE])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    family = request.param
    folder = seeing_models.save(family, tmp_path_factory.mktemp(family) / "model")
    reference = seeing_models.build(family)
    return Seeing(family, folder, load(folder), seeing_models.facts(folder), reference)


def load(folder: Path, **options: Any) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32", read_pixels=PixelReader(), **options)


def sequence(facts: VisionFacts, *parts: int | Pictures.Image, seed: int = 0, between: bool = True) -> Sequence:
    """Numbers are of random text tokens; an image stands between marks, unless it is not to."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    images: list[Image] = []
    for part in parts:
        if isinstance(part, int):
            tokens += torch.randint(3, 100, (part,), generator=generator).tolist()
            continue
        tokens += [BEFORE] * between
        images.append(seeing_models.image_at(len(tokens), seeing_models.encoded(part), facts))
        tokens += [IMAGE_TOKEN] * images[-1].num_tokens + [AFTER] * between
    return Sequence(tokens, images, [part for part in parts if not isinstance(part, int)])


def sequences(facts: VisionFacts) -> list[Sequence]:
    """With one image, two of other shapes, one at the beginning, and none."""
    wide, tall, small = (seeing_models.picture(i, *size) for i, size in enumerate([(70, 40), (30, 61), (20, 20)]))
    return [
        sequence(facts, 5, wide, 7, seed=1),
        sequence(facts, 3, tall, 2, small, 6, seed=2),
        sequence(facts, small, 9, seed=3, between=False),
        sequence(facts, 11, seed=4),
    ]


def inputs_of(seeing: Seeing, of: Sequence) -> dict[str, Tensor]:
    """As transformers' processors make them."""
    ids = torch.tensor([of.tokens])
    if not of.pictures:
        return {"input_ids": ids}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = seeing_models.processor(seeing.family)(of.pictures, return_tensors="pt")
    kinds = (ids == IMAGE_TOKEN).long()
    if seeing.family == "gemma3":
        return {"input_ids": ids, "pixel_values": made["pixel_values"], "token_type_ids": kinds}
    return {
        "input_ids": ids,
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "mm_token_type_ids": kinds,
    }


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def logits(engine: Engine, asked: list[Sequence]) -> Tensor:
    """Of the base model, in one call."""
    model, lengths = engine._model, [len(of.tokens) for of in asked]
    seen = [engine._workshop.see(of.images, len(of.tokens)) for of in asked]
    parts = [Part(0, length, images) for length, images in zip(lengths, seen, strict=True)]
    lora = AdapterBatch.of([(sum(lengths), None)])
    tokens_T = torch.tensor([token for of in asked for token in of.tokens])
    return model.logits(model.forward(Varlen.whole(tokens_T, lengths, None, *layout(parts, model.device)), lora), lora)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pixels_are_those_of_transformers(seeing: Seeing, mode: str):
    """Also of what is transparent, of palettes and of sixteen bits."""
    picture = seeing_models.picture(7, 75, 42, "RGBA")
    made = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
    check_pixels(seeing, seeing_models.encoded(made), "png")


def test_pixels_of_a_jpeg_are_those_of_transformers(seeing: Seeing):
    check_pixels(seeing, seeing_models.encoded(seeing_models.picture(8, 81, 50), "jpeg", quality=80), "jpeg")
    grey = seeing_models.encoded(seeing_models.picture(8, 81, 50, "L"), "jpeg", progressive=True)
    check_pixels(seeing, grey, "jpeg")


def check_pixels(seeing: Seeing, data: bytes, format: str) -> None:
    size, facts = read_size(data, format, "image"), seeing.facts
    resized = facts.sizing.resized(size)
    image = seeing_models.image_at(0, data, facts, format)
    found = pixel_values(PixelReader()(image, resized, facts.resample), resized, facts)
    expected = seeing_models.processor(seeing.family)([Pictures.open(io.BytesIO(data))], return_tensors="pt")
    assert torch.equal(found, expected["pixel_values"])


@torch.no_grad()
def test_features_are_those_of_transformers(seeing: Seeing):
    for of in sequences(seeing.facts)[:3]:
        inputs = inputs_of(seeing, of)
        grid = {"image_grid_thw": inputs["image_grid_thw"]} if seeing.family != "gemma3" else {}
        pooled = seeing.reference.get_image_features(inputs["pixel_values"], **grid).pooler_output
        expected = torch.cat(list(pooled))
        seen = seeing.engine._workshop.see(of.images, len(of.tokens))
        assert difference(torch.cat([image.features_MD for image in seen]), expected) <= BOUND


@torch.no_grad()
def test_logits_are_those_of_transformers(seeing: Seeing):
    """Of several sequences in one call here, and of each alone there."""
    asked = sequences(seeing.facts)
    expected = torch.cat([seeing.reference(**inputs_of(seeing, of)).logits[0] for of in asked])
    assert difference(logits(seeing.engine, asked), expected) <= BOUND


def test_packed_is_alone(seeing: Seeing):
    asked = sequences(seeing.facts)
    alone = torch.cat([logits(seeing.engine, [of]) for of in asked])
    assert difference(logits(seeing.engine, asked), alone) <= BOUND


def test_other_images_are_other_logits(seeing: Seeing):
    one, other = (sequence(seeing.facts, 5, seeing_models.picture(i, 40, 40), 6) for i in (1, 2))
    assert one.tokens == other.tokens
    assert difference(logits(seeing.engine, [one])[-6:], logits(seeing.engine, [other])[-6:]) > 1e-3


def disturbed(engine: Engine, run_id: str) -> None:
    engine.init_run(run_id, rank=4, seed=1, targets=LoraTargets())
    run = engine._runs[run_id]
    generator = torch.Generator().manual_seed(5)
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            parameter.view.normal_(0, 0.1, generator=generator)


def with_peft(seeing: Seeing, engine: Engine, run_id: str) -> Any:
    run = engine._runs[run_id]
    parameters = list(run.shape.named(run.theta_P))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = sorted({f"model.language_model.{p.name.rpartition('.lora_')[0]}" for p in parameters})
        settings = LoraConfig(r=run.shape.rank, lora_alpha=int(run.alpha), target_modules=modules)
        model = get_peft_model(seeing_models.build(seeing.family), settings)
    with torch.no_grad():
        for p in parameters:
            peft_parameter(model, p.name).copy_(p.view)
    return model


def peft_parameter(model: Any, name: str) -> Tensor:
    module = name.rpartition(".lora_")[0]
    return model.get_parameter(
        f"base_model.model.model.language_model.{module}.{name[len(module) + 1 :]}.default.weight"
    )


def datum(of: Sequence) -> Datum:
    targets = types.Tensor.of(of.tokens[1:], "int64")
    return Datum(types.Tensor.of(of.tokens[:-1], "int64"), {"target_tokens": targets}, images=of.images)


def is_trained(of: Sequence) -> Tensor:
    """Where the next token is one that counts: neither is the token an image's, nor the next."""
    is_image = torch.tensor(of.tokens) == IMAGE_TOKEN
    return ~(is_image[:-1] | is_image[1:])


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_peft(seeing: Seeing, recompute: bool):
    """Without weights, the tokens of images are no targets."""
    engine = seeing.engine
    disturbed(engine, "one")
    peft, asked = with_peft(seeing, engine, "one"), sequences(seeing.facts)
    memory = engine._workshop.memory
    with pytest.MonkeyPatch.context() as patch:
        if recompute:
            patch.setattr(type(memory), "recomputes", lambda *_args, **_named: True)
        result = engine.forward_backward("one", [datum(of) for of in asked], "cross_entropy", {})
    num = sum(int(is_trained(of).sum()) for of in asked)
    assert result.metrics["num_trained_tokens"] == num
    loss = torch.zeros(())
    for of in asked:
        trained = is_trained(of)
        found = peft(**inputs_of(seeing, of)).logits[0, :-1][trained]
        loss = loss + F.cross_entropy(found, torch.tensor(of.tokens[1:])[trained], reduction="sum") / num
    loss.backward()
    assert abs(result.loss - loss.item()) / loss.item() <= BOUND
    run = engine._runs["one"]
    assert run.accumulated is not None
    expected = {p.name: peft_parameter(peft, p.name).grad for p in run.shape.named(run.accumulated.grad_P)}
    least = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    for p in run.shape.named(run.accumulated.grad_P):
        largest = max(float(expected[p.name].abs().max()), least)
        assert float((p.view / num - expected[p.name]).abs().max()) / largest <= GRADIENT_BOUNDS[seeing.family], p.name
    engine.remove_run("one")


def test_weights_may_count_an_images_places(seeing: Seeing):
    of = sequences(seeing.facts)[0]
    weights = types.Tensor.of([1.0] * (len(of.tokens) - 1), "float32")
    plain = datum(of)
    counted = Datum(plain.tokens, {**plain.loss_inputs, "weights": weights}, images=plain.images)
    seeing.engine.init_run("weighted", rank=2, seed=0)
    result = seeing.engine.forward("weighted", [counted], "cross_entropy", {})
    assert result.metrics["num_trained_tokens"] == len(of.tokens) - 1


@pytest.mark.parametrize("budget", [512, 7])
def test_greedy_tokens_are_those_of_generate(seeing: Seeing, budget: int):
    """Prompts that are sampled together, read whole or a few tokens at a time, and once more out of the cache."""
    engine = load(seeing.folder, limits=EngineLimits(train_token_budget=budget))
    disturbed(engine, "one")
    engine.publish("one", "one")
    peft, asked = with_peft(seeing, engine, "one"), sequences(seeing.facts)
    expected: list[list[int]] = []
    for of in asked:
        made = peft.generate(
            **inputs_of(seeing, of),
            attention_mask=torch.ones(1, len(of.tokens), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        expected.append(made[0, len(of.tokens) :].tolist())
    for _ in range(2):
        assert sampled(engine, asked) == expected


def sampled(engine: Engine, asked: list[Sequence]) -> list[list[int]]:
    params = SamplingParams(max_tokens=12, temperature=0)
    for index, of in enumerate(asked):
        engine.submit_sample(SampleRequest(str(index), of.tokens, 1, params, AdapterRef("one", None), images=of.images))
    found: dict[str, list[int]] = {}
    while engine.num_sampling:
        found |= {result.request_id: result.sequences[0].tokens for result in engine.sample_step()}
    return [found[str(index)] for index in range(len(asked))]


def test_the_prefix_cache_tells_images_apart(seeing: Seeing):
    """Two prompts of the same tokens, whose images are of one size and of other content."""
    engine = load(seeing.folder)
    disturbed(engine, "one")
    engine.publish("one", "one")
    one, other = (sequence(seeing.facts, 20, seeing_models.picture(i, 40, 40), 100) for i in (1, 2))
    assert one.tokens == other.tokens
    alone = []
    for of in (one, other):
        fresh = load(seeing.folder)
        disturbed(fresh, "one")
        fresh.publish("one", "one")
        alone.append(sampled(fresh, [of])[0])
    assert [sampled(engine, [of])[0] for of in (one, other, one)] == [*alone, alone[0]]


def test_logprobs_of_samples_are_the_trainers(seeing: Seeing):
    """What is sampled after an image has the logprobs that training gives it."""
    engine = seeing.engine
    disturbed(engine, "both")
    engine.publish("both", "both")
    of = sequences(seeing.facts)[1]
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3, use_end_tokens=False)
    engine.submit_sample(SampleRequest("s", of.tokens, 1, params, AdapterRef("both", None), images=of.images))
    results = []
    while engine.num_sampling:
        results += engine.sample_step()
    (drawn,) = results[0].sequences
    whole = Sequence(of.tokens + drawn.tokens, of.images, of.pictures)
    result = engine.forward("both", [datum(whole)], "cross_entropy", {})
    found = list(result.logprobs[0].values())[-len(drawn.tokens) :]
    assert found == pytest.approx(drawn.logprobs, abs=2e-5)
