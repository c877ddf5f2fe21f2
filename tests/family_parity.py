"""How far a family's numbers are from those of transformers and PEFT, and from themselves computed another way.

``python tests/family_parity.py`` measures every family that is served, or those that are named, and writes what
docs/models.md shows.
"""

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import family_models
import tiny_models
from selfloop.engine.backends.base import CacheSlot, Model, Varlen
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, ForwardBackward
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams

MEASURED = Path(__file__).parents[1] / "docs" / "family_parity.json"
SEQUENCES = [tiny_models.random_ids(n, seed=n) for n in (12, 30, 7)]
DATA = [tiny_models.next_token_datum(ids) for ids in SEQUENCES]
NUM_TOKENS = sum(len(ids) - 1 for ids in SEQUENCES)
NUM_STEPS = 5
ADAM = AdamParams(learning_rate=1e-3)
PROMPTS, NUM_SAMPLED = (9, 21), 12
PAGE = 16


class Served(NamedTuple):
    """A family's engine with two disturbed runs, ``one`` and ``two``, and what it is compared with."""

    name: str
    engine: Engine
    reference: PreTrainedModel
    peft: PeftModel


def save(model_type: str, folder: Path) -> None:
    tiny_models.save_quietly(family_models.build(model_type), folder)


def load(model_type: str, folder: Path) -> Engine:
    """As a server would; the folder is made where it is not there."""
    if not folder.exists():
        save(model_type, folder)
    return Engine.load(folder, device="cpu", dtype="float32")


def serve(model_type: str, folder: Path) -> Served:
    """By the backend that is chosen for it, with two runs whose adapters are not zero."""
    engine = load(model_type, folder)
    engine.init_run("one", rank=4, seed=1, targets=LoraTargets(unembed=True))
    engine.init_run("two", rank=3, seed=2, targets=LoraTargets(mlp=False))
    for seed, run_id in enumerate(("one", "two")):
        run = engine._runs[run_id]
        generator = torch.Generator().manual_seed(seed)
        for parameter in run.shape.named(run.theta_P):
            if parameter.kind == "lora_B":
                parameter.view.normal_(0, 0.1, generator=generator)
        engine.publish(run_id, run_id)
    return Served(model_type, engine, family_models.build(model_type), with_peft(engine, model_type))


def with_peft(engine: Engine, model_type: str) -> PeftModel:
    """The reference with the adapter of run ``one`` on exactly the modules that the run has."""
    run = engine._runs["one"]
    parameters, reference = list(run.shape.named(run.theta_P)), family_models.build(model_type)
    # By the name of some mixtures PEFT takes every gate_proj for a part of the experts, those of shared ones, too.
    reference.config.model_type = "llama"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = sorted({module_of(p.name) for p in parameters})
        settings = LoraConfig(r=run.shape.rank, lora_alpha=int(run.alpha), target_modules=modules)
        model = get_peft_model(reference, settings)
    reference.config.model_type = model_type
    with torch.no_grad():
        for p in parameters:
            peft_parameter(model, p.name).copy_(p.view)
    return model


def module_of(name: str) -> str:
    module = name.rpartition(".lora_")[0]
    return module if module == "lm_head" else f"model.{module}"


def peft_parameter(model: PeftModel, name: str) -> Tensor:
    kind = name[len(name.rpartition(".lora_")[0]) + 1 :]
    return model.get_parameter(f"base_model.model.{module_of(name)}.{kind}.default.weight")


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, as a part of the largest that is expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def adapter(engine: Engine, run_id: str) -> Adapter:
    run = engine._runs[run_id]
    return run.shape.adapter(run.theta_P, alpha=run.alpha)


@torch.no_grad()
def whole(model: Model, ids: list[int], through: Adapter) -> Tensor:
    lora = AdapterBatch.of([(len(ids), through)])
    return model.logits(model.forward(Varlen.whole(torch.tensor(ids), [len(ids)]), lora), lora)


@torch.no_grad()
def logits_difference(served: Served) -> float:
    """Of the base model's logits to transformers', each sequence alone there and all in one call here."""
    model, lengths = served.engine._model, [len(ids) for ids in SEQUENCES]
    lora = AdapterBatch.of([(sum(lengths), None)])
    tokens_T = torch.tensor([token for ids in SEQUENCES for token in ids])
    found = model.logits(model.forward(Varlen.whole(tokens_T, lengths), lora), lora)
    expected = torch.cat([served.reference(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    return difference(found, expected)


def gradients_difference(served: Served) -> tuple[float, float]:
    """Of the loss, and of the gradient of an adapter on every place, to PEFT's."""
    result = served.engine.forward_backward("one", DATA, "cross_entropy", {})
    loss = peft_backward(served.peft)
    run = served.engine._runs["one"]
    found, expected = dict[str, Tensor](), dict[str, Tensor]()
    for parameter in run.shape.named(run.accumulated.grad_P):
        gradient = peft_parameter(served.peft, parameter.name).grad
        assert gradient is not None, f"nothing comes through {parameter.name}"
        found[parameter.name], expected[parameter.name] = parameter.view / NUM_TOKENS, gradient
    # Each by its own largest; what is next to nothing beside the others is rounding.
    least = 0.01 * max(float(gradient.abs().max()) for gradient in expected.values())
    gradients = max(
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
        for name, gradient in expected.items()
    )
    return abs(result.loss - loss) / loss, gradients


def peft_backward(model: PeftModel) -> float:
    """The mean loss of ``DATA``, each sequence alone; its gradient is left on the adapter."""
    model.zero_grad()
    loss = torch.zeros(())
    for ids in SEQUENCES:
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        loss = loss + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum") / NUM_TOKENS
    loss.backward()
    return loss.item()


def steps_difference(served: Served) -> float:
    """Of the losses before, between and after ``NUM_STEPS`` steps of AdamW, to those of PEFT's model.

    It trains copies: run ``one`` and PEFT's adapter are what they were when it returns.
    """
    engine, run_id = served.engine, "steps"
    engine._set(run_id, engine._runs["one"].copy())
    engine._runs[run_id].accumulated = None
    trained = [parameter for parameter in served.peft.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(
        trained, lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay
    )
    found, expected = [], []
    for _ in range(NUM_STEPS):
        found.append(engine.forward_backward(run_id, DATA, "cross_entropy", {}).loss)
        expected.append(peft_backward(served.peft))
        engine.optim_step(run_id, ADAM)
        torch.nn.utils.clip_grad_norm_(trained, ADAM.grad_clip_norm)
        optimizer.step()
    found.append(engine.forward(run_id, DATA, "cross_entropy", {}).loss)
    expected.append(peft_backward(served.peft))
    assert expected[-1] < expected[0], "five steps did not train"
    engine.remove_run(run_id)
    with torch.no_grad():
        for parameter, was in zip(trained, before, strict=True):
            parameter.copy_(was)
    return difference(torch.tensor(found), torch.tensor(expected))


def replayed_equally(served: Served, snapshot: Path) -> bool:
    """Whether a snapshot between a gradient and its step, and the same operations after it, give the same bits."""
    engine, run_id = served.engine, "replayed"
    engine._set(run_id, engine._runs["one"].copy())
    engine._runs[run_id].accumulated = None
    engine.forward_backward(run_id, DATA[:2], "cross_entropy", {})
    engine.snapshot(run_id, snapshot)
    states: list[Tensor] = []
    for _ in range(2):
        engine.restore(run_id, snapshot)
        engine.optim_step(run_id, ADAM)
        engine.forward_backward(run_id, DATA, "cross_entropy", {})
        engine.optim_step(run_id, ADAM)
        run = engine._runs[run_id]
        assert run.moments is not None
        states.append(torch.cat([run.theta_P, run.moments.mean_P, run.moments.square_P]))
    engine.remove_run(run_id)
    return torch.equal(*states) and not torch.equal(states[0][: run.theta_P.numel()], engine._runs["one"].theta_P)


@torch.no_grad()
def cached_difference(served: Served) -> float:
    """Of two sequences of two runs, read in parts and then grown together, to each as a whole."""
    model = served.engine._model
    cache = model.make_cache(64 * PAGE)
    adapters = [adapter(served.engine, run_id) for run_id in ("one", "two")]
    sequences, reads = [tiny_models.random_ids(n, n) for n in (40, 29)], [30, 19]
    slots = [CacheSlot(cache.pool.allocate(4)) for _ in sequences]
    found: list[list[Tensor]] = [[], []]
    for first, last in ((0, 11), (11, 12), (12, None)):
        stops = [last or stop for stop in reads]
        lengths = [stop - first for stop in stops]
        tokens_T = torch.tensor([t for ids, stop in zip(sequences, stops, strict=True) for t in ids[first:stop]])
        lora = AdapterBatch.of(list(zip(lengths, adapters, strict=True)))
        h_TD = model.forward_cached(Varlen(tokens_T, lengths, [first] * 2, slots), cache, lora)
        for place, logits in enumerate(model.logits(h_TD, lora).split(lengths)):
            found[place].append(logits)
    growing = [CacheSlot(slot.pages, grows=True, num_in_pages=n) for slot, n in zip(slots, reads, strict=True)]
    for slot, into in zip(slots, growing, strict=True):
        cache.fork(slot, into)
    lora = AdapterBatch.of([(1, each) for each in adapters])
    for step in range(10):
        starts = [stop + step for stop in reads]
        tokens_B = torch.tensor([ids[at] for ids, at in zip(sequences, starts, strict=True)])
        h_BD = model.forward_cached(Varlen(tokens_B, [1, 1], starts, growing), cache, lora)
        for place, logits in enumerate(model.logits(h_BD, lora).split(1)):
            found[place].append(logits)
    whole_ones = [whole(model, ids, each) for ids, each in zip(sequences, adapters, strict=True)]
    return max(difference(torch.cat(parts), one) for parts, one in zip(found, whole_ones, strict=True))


def together_difference(served: Served) -> float:
    """Of the gradients of two runs in one pass, several sequences each, to each run's alone."""
    engine, gradients = served.engine, list[list[Tensor]]()
    asked = [
        ("one", ForwardBackward(DATA, "cross_entropy", {})),
        ("two", ForwardBackward(DATA[1:], "cross_entropy", {})),
    ]
    for parts in ([asked], [[each] for each in asked]):
        for run_id in ("one", "two"):
            engine._runs[run_id].accumulated = None
        for part in parts:
            assert all(result.loss > 0 for result in engine.compute(part))
        gradients.append([engine._runs[run_id].accumulated.grad_P.clone() for run_id in ("one", "two")])
    return max(difference(found, expected) for found, expected in zip(*gradients, strict=True))


def sampled(served: Served) -> list[tuple[list[int], list[int]]]:
    """Greedy tokens of run ``one``, of prompts that are sampled together, and those of PEFT's ``generate``."""
    prompts = {str(n): tiny_models.random_ids(n, seed=n) for n in PROMPTS}
    params = SamplingParams(max_tokens=NUM_SAMPLED, temperature=0)
    for name, prompt in prompts.items():
        served.engine.submit_sample(SampleRequest(name, prompt, 1, params, AdapterRef("one", "")))
    found: dict[str, list[int]] = {}
    while served.engine.num_sampling:
        found |= {result.request_id: result.sequences[0].tokens for result in served.engine.sample_step()}
    pairs: list[tuple[list[int], list[int]]] = []
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        expected = served.peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_SAMPLED,
            do_sample=False,
            pad_token_id=0,
        )
        pairs.append((found[name], expected[0, len(prompt) :].tolist()))
    return pairs


def computed_by(served: Served) -> str:
    """What the log says, without a version."""
    return re.sub(r"transformers [0-9.]+", "transformers", served.engine.info.computed_by)


def measure(model_type: str, folder: Path) -> dict[str, object]:
    """What docs/models.md shows of a family; only ``refused`` where it is not served."""
    try:
        served = serve(model_type, folder)
    except OperationFailed as error:
        return {"refused": str(error).replace(str(folder), "the folder")}
    loss, gradients = gradients_difference(served)
    differences = {
        "logits": logits_difference(served),
        "loss": loss,
        "gradients": gradients,
        "steps": steps_difference(served),
        "cached": cached_difference(served),
        "together": together_difference(served),
    }
    rounded = {name: float(f"{value:.1e}") for name, value in differences.items()}
    greedy = all(found == expected for found, expected in sampled(served))
    replayed = replayed_equally(served, folder / "snapshot")
    return {"computed_by": computed_by(served), **rounded, "replayed": replayed, "greedy": greedy}


def main() -> None:
    """Of every family, or of those that are named; what is known of the others is kept."""
    torch.set_num_threads(1)
    known = json.loads(MEASURED.read_text(encoding="utf-8")) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or family_models.OVERRIDES:
            known[name] = measure(name, Path(folder) / name)
    measured = {name: known[name] for name in family_models.OVERRIDES}
    MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
