"""Replayed routes against transformers + PEFT with routers that are forced to the same experts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny_models
from peft_experts import of_each_expert
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.routing import ANEW, Mixtures
from selfloop.types.datum import Datum
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import ForwardBackward
from selfloop.types.routes import Routes
from selfloop.types.settings import EngineLimits

SEQUENCES = [tiny_models.random_ids(n, seed=n) for n in (12, 30, 7)]
# Of each sequence: the first token and the number of tokens whose experts are given.
GIVEN = [[(0, 11)], [(0, 4), (9, 15)], []]


class Forced:
    """Makes each router of a transformers model take the experts that are given for the sequence at hand."""

    def __init__(self, model: torch.nn.Module, *, normalised: bool) -> None:
        self.experts_NLK: Tensor | None = None
        self._normalised = normalised
        routers = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
        for place, router in enumerate(routers):
            router.register_forward_hook(lambda _module, _args, routed, place=place: self._forced(place, routed))
        self.num_routers = len(routers)

    def _forced(self, place: int, routed: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE, weights_NK, chosen_NK = routed
        assert self.experts_NLK is not None
        given_NK = self.experts_NLK[:, place].long()
        is_given_NK = given_NK != ANEW
        experts_NK = torch.where(is_given_NK, given_NK, chosen_NK)
        forced_NK = F.softmax(logits_NE.float(), dim=-1).gather(1, experts_NK)
        if self._normalised:
            forced_NK = forced_NK / forced_NK.sum(-1, keepdim=True)
        return logits_NE, torch.where(is_given_NK, forced_NK, weights_NK), experts_NK


def experts(mixtures: Mixtures, num: int, spans: list[tuple[int, int]], seed: int) -> Tensor:
    """Other experts for each token and layer than a router would choose, as a random choice nearly always is."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num, mixtures.shape.num_layers, mixtures.num_experts, generator=generator)
    chosen_NLK = noise.topk(mixtures.shape.top_k, dim=-1).indices
    given_N = torch.zeros(num, dtype=torch.bool)
    for start, length in spans:
        given_N[start : start + length] = True
    return torch.where(given_N[:, None, None], chosen_NLK, ANEW)


@pytest.mark.parametrize("family", tiny_models.MOE_FAMILIES)
@pytest.mark.parametrize("budget", [16, 1024])
def test_loss_and_gradients_equal_peft_with_the_same_experts(zoo, family, budget):
    engine = zoo.engine(family, limits=EngineLimits(train_token_budget=budget))
    engine.init_run("run", rank=4, seed=3, targets=LoraTargets(experts=True))
    run = engine._runs["run"]
    generator = torch.Generator().manual_seed(9)
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            parameter.view.normal_(0, 0.05, generator=generator)
    reference = zoo.peft_of_file(family, engine, "run")
    mixtures = Mixtures.of(engine._model.spec)
    assert mixtures is not None
    forced = Forced(reference, normalised=family == "qwen3-moe")
    assert forced.num_routers == mixtures.shape.num_layers

    data, natural, total = [], [], torch.zeros(())
    for index, (ids, spans) in enumerate(zip(SEQUENCES, GIVEN, strict=True)):
        experts_NLK = experts(mixtures, len(ids) - 1, spans, index)
        given = experts_NLK[experts_NLK[:, 0, 0] != ANEW]
        datum = tiny_models.next_token_datum(ids)
        natural.append(datum)
        data.append(Datum(datum.tokens, datum.loss_inputs, Routes(mixtures.shape, spans, mixtures.packed(given))))
        forced.experts_NLK = experts_NLK
        logits = reference(input_ids=torch.tensor([ids[:-1]])).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    total.backward()
    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)

    anew = engine.forward("run", natural, "cross_entropy", {})
    result = engine.forward_backward("run", data, "cross_entropy", {})
    assert result.loss == pytest.approx(float(total.detach()) / num_tokens, abs=1e-4)
    assert abs(result.loss - anew.loss) > 1e-2
    gradients = of_each_expert(
        {
            name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): p.grad
            for name, p in reference.named_parameters()
            if p.grad is not None
        },
        *tiny_models.MOE_FAMILIES[family],
    )
    ours = {p.name: p.view for p in run.shape.named(run.accumulated.grad_P)}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name] / num_tokens, gradient / num_tokens, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("deterministic", [False, True])
def test_routes_hold_where_layers_are_computed_twice_and_runs_share_a_pass(zoo, deterministic):
    roomy = zoo.engine("qwen3-moe", limits=EngineLimits(train_token_budget=64))
    mixtures, memory = Mixtures.of(roomy._model.spec), roomy._workshop.memory
    targets, ids = LoraTargets(experts=True), SEQUENCES[1]
    shape = AdapterShape(roomy._model.spec, 4, targets)
    least = memory.needed(64, shape, with_gradient=True, recompute=True, num_runs=2)
    limits = EngineLimits(train_token_budget=64, activation_bytes=least)
    tight = zoo.engine("qwen3-moe", limits=limits, deterministic=deterministic)
    assert tight._workshop.memory.recomputes(58, shape, num_runs=2)
    assert not memory.recomputes(58, shape, num_runs=2)
    plain = tiny_models.next_token_datum(ids)
    data = mixtures.packed(experts(mixtures, len(ids) - 1, [(0, len(ids) - 1)], 0))
    routed = Datum(plain.tokens, plain.loss_inputs, Routes(mixtures.shape, [(0, len(ids) - 1)], data))

    def gradients(engine):
        asked = []
        for run_id, datum in (("plain", plain), ("routed", routed)):
            engine.init_run(run_id, rank=4, seed=3, targets=targets)
            asked.append((run_id, ForwardBackward([datum], "cross_entropy", {})))
        engine.compute(asked)
        return [engine._runs[run_id].accumulated.grad_P for run_id, _ in asked]

    expected, found = gradients(roomy), gradients(tight)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
