"""Models that only transformers computes, through the engine: against transformers, PEFT and each other."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F

import family_models
import tiny_models
from memory_peaks import peak_bytes
from selfloop.convert.adapters import export_merged
from selfloop.engine.backends.base import Varlen
from selfloop.engine.backends.transformers.passes import PackedRows, packed_rows
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models import registry
from selfloop.types.datum import Datum, Tensor
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, ForwardBackward
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

FAMILIES = tiny_models.OTHER_FAMILIES
SEQUENCES = [tiny_models.random_ids(n, seed=n) for n in (12, 30, 7)]
DATA = [tiny_models.next_token_datum(ids) for ids in SEQUENCES]
NUM_TOKENS = sum(len(ids) - 1 for ids in SEQUENCES)


@pytest.fixture(scope="module", autouse=True)
def no_family_describes_them():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "SUPPORTED_MODEL_TYPES", frozenset())
        yield


@pytest.fixture(scope="module")
def engines(zoo, no_family_describes_them):
    """One a family; runs of other tests are overwritten."""
    return {family: zoo.engine(family) for family in FAMILIES}


def disturb(engine, run_id, seed=9):
    run = engine._runs[run_id]
    generator = torch.Generator().manual_seed(seed)
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            parameter.view.normal_(0, 0.1, generator=generator)


def peft(zoo, family, engine, run_id) -> PeftModel:
    """The reference with the run's adapter, on exactly the modules that the run has."""
    run = engine._runs[run_id]
    parameters = list(run.shape.named(run.theta_P))
    names = {p.name.rpartition(".lora_")[0] for p in parameters}
    modules = [name if name == "lm_head" else f"model.{name}" for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = LoraConfig(r=run.shape.rank, lora_alpha=int(run.alpha), target_modules=modules)
        model = get_peft_model(zoo.reference(family), settings)
    with torch.no_grad():
        for p in parameters:
            prefix = "base_model.model." if p.name.startswith("lm_head") else "base_model.model.model."
            model.get_parameter(f"{prefix}{p.name}.default.weight").copy_(p.view)
    return model


def loss_sum(model, sequences=SEQUENCES):
    total = torch.zeros(())
    for ids in sequences:
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    return total


def run_all(engine, *requests):
    for request in requests:
        engine.submit_sample(request)
    results = {}
    while engine.num_sampling:
        results.update({r.request_id: r for r in engine.sample_step()})
    pool = engine._scheduler._pool
    pool.check_integrity()
    assert pool.num_available == pool.num_pages
    return results


def greedy(model, prompt, num):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def test_the_self_test_decides_the_layout_and_the_log_says_why(zoo, caplog):
    with caplog.at_level(logging.INFO, "selfloop.engine"):
        found = {family: zoo.engine(family).info.computed_by for family in FAMILIES}
    assert "(Gemma3ForCausalLM, sdpa), packed" in found["gemma3"]
    assert "(Gemma2ForCausalLM, eager), packed" in found["gemma2"]
    assert "(GraniteForCausalLM, sdpa), packed" in found["granite"]
    assert "(Qwen3_5ForCausalLM, sdpa), padded" in found["qwen3_5"]
    assert "self-test of gemma3_text: packed: three sequences equal each alone" in caplog.text
    assert "self-test of qwen3_5_text: padded: packed they differ from each alone by" in caplog.text
    assert "backend torch does not compute gemma3_text" in caplog.text


@pytest.mark.parametrize("targets", [LoraTargets(), LoraTargets(attn=False, mlp=True, unembed=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_peft(zoo, engines, family, targets):
    engine = engines[family]
    engine.init_run("run", rank=4, seed=3, targets=targets)
    disturb(engine, "run")
    reference = peft(zoo, family, engine, "run")
    result = engine.forward_backward("run", DATA, "cross_entropy", {})
    expected = loss_sum(reference)
    expected.backward()
    assert result.loss == pytest.approx(float(expected.detach()) / NUM_TOKENS, abs=1e-5)
    run = engine._runs["run"]
    for parameter in run.shape.named(run.accumulated.grad_P):
        prefix = "base_model.model." if parameter.name.startswith("lm_head") else "base_model.model.model."
        gradient = reference.get_parameter(f"{prefix}{parameter.name}.default.weight").grad
        torch.testing.assert_close(
            parameter.view / NUM_TOKENS, gradient / NUM_TOKENS, atol=1e-4, rtol=1e-4, msg=parameter.name
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_computed_again_give_the_same_gradient(engines, family):
    model, lengths = engines[family]._model, [len(ids) for ids in SEQUENCES]
    shape = AdapterShape(model.spec, 4)
    flat_P = 0.1 * torch.randn(shape.num_parameters, generator=torch.Generator().manual_seed(0))
    tokens_T = torch.tensor([token for ids in SEQUENCES for token in ids])
    gradients, kept = [], []
    for recompute in (False, True):
        leaf_P, sizes = flat_P.clone().requires_grad_(), []
        lora = AdapterBatch.of([(sum(lengths), shape.adapter(leaf_P, alpha=8.0))])

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            h_TD = model.forward(Varlen.whole(tokens_T, lengths), lora, recompute=recompute)
        kept.append(sum(sizes))
        gradients += torch.autograd.grad(h_TD.square().sum(), leaf_P)
    assert kept[1] < kept[0] / 3
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "kept", "recomputed"])
@pytest.mark.parametrize("family", ["granite", "gemma2", "qwen3_5"])
def test_no_pass_takes_more_than_is_estimated(zoo, family, kind):
    """Never more, and with a gradient at least a tenth of it: of code that is not ours the estimate has margins."""
    with_gradient, recompute = kind != "forward", kind == "recomputed"

    def loaded(limit):
        limits = EngineLimits(train_token_budget=1024, forward_cache_bytes=0, activation_bytes=limit)
        engine = zoo.engine(family, limits=limits)
        engine.init_run("run", rank=8, seed=1)
        disturb(engine, "run")
        return engine

    engine = loaded(None)
    memory, shape = engine._workshop.memory, engine._runs["run"].shape
    # The second is padded the most, or fills a packed row.
    for lengths in ([255], [200, 101, 101, 101]):
        num_tokens = sum(lengths)
        if recompute:
            engine = loaded(memory.needed(num_tokens, shape, with_gradient=True) - 1)
        assert engine._workshop.memory.recomputes(num_tokens, shape) is recompute
        act = engine.forward_backward if with_gradient else engine.forward
        data = [tiny_models.next_token_datum(tiny_models.random_ids(n + 1, n)) for n in lengths]
        act("run", data[:1], "cross_entropy", {})  # what is laid out once
        measured = peak_bytes(lambda data=data, act=act: act("run", data, "cross_entropy", {}))
        needed = memory.needed(num_tokens, shape, with_gradient=with_gradient, recompute=recompute)
        assert (0.1 if with_gradient else 0) * needed <= measured <= needed


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_together_equal_each_alone(zoo, engines, family, deterministic):
    engine = zoo.engine(family, deterministic=True) if deterministic else engines[family]
    ranks = {"one": (3, LoraTargets()), "two": (8, LoraTargets(attn=True, mlp=False, unembed=True))}
    operations = {"one": DATA, "two": DATA[1:]}
    gradients = []
    for together in (True, False):
        for run_id, (rank, targets) in ranks.items():
            engine.init_run(run_id, rank=rank, seed=rank, targets=targets)
            disturb(engine, run_id)
        asked = [(run_id, ForwardBackward(data, "cross_entropy", {})) for run_id, data in operations.items()]
        for part in [asked] if together else [[each] for each in asked]:
            assert all(result.loss > 0 for result in engine.compute(part))
        gradients.append([engine._runs[run_id].accumulated.grad_P for run_id in ranks])
    for together, alone in zip(*gradients, strict=True):
        if deterministic:
            assert torch.equal(together, alone)
        else:
            torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefill_budget", [8, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate_with_and_without_adapters(zoo, family, prefill_budget):
    engine = zoo.engine(family, limits=EngineLimits(train_token_budget=prefill_budget))
    references = {None: zoo.reference(family)}
    for run_id, rank in (("one", 2), ("two", 4)):
        engine.init_run(run_id, rank=rank, seed=rank)
        disturb(engine, run_id, seed=rank)
        engine.publish(run_id, run_id)
        references[run_id] = peft(zoo, family, engine, run_id)
    prompts = [tiny_models.random_ids(n, seed=n) for n in (1, 5, 21, 40)]
    params = SamplingParams(max_tokens=20, temperature=0)
    results = run_all(
        engine,
        *[
            SampleRequest(f"{i} {name}", prompt, 2, params, None if name is None else AdapterRef(name, ""))
            for name in references
            for i, prompt in enumerate(prompts)
        ],
    )
    for name, model in references.items():
        for i, prompt in enumerate(prompts):
            first, second = results[f"{i} {name}"].sequences
            assert first.tokens == second.tokens == greedy(model, prompt, 20)


@pytest.mark.parametrize("prefill_budget", [8, 512])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_equal_the_trainers(zoo, family, prefill_budget):
    engine = zoo.engine(family, limits=EngineLimits(train_token_budget=prefill_budget))
    engine.init_run("run", rank=4, seed=1, targets=LoraTargets(unembed=True))
    disturb(engine, "run")
    engine.publish("run", "final")
    prompt = tiny_models.random_ids(21, seed=5)
    params = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.95, seed=11)
    request = SampleRequest("q", prompt, 3, params, AdapterRef("final", ""), prompt_logprobs=0, top_logprobs=3)
    result = run_all(engine, request)["q"]
    for sequence in result.sequences:
        whole = tiny_models.next_token_datum(prompt + sequence.tokens)
        forward = engine.forward("run", [whole], "cross_entropy", {}, top_k_logprobs=3)
        trainer = list(forward.logprobs[0].values())
        assert sequence.logprobs == pytest.approx(trainer[len(prompt) - 1 :], abs=1e-4)
        shown = [position[0].logprob for position in result.prompt_logprobs[1:]]
        assert shown == pytest.approx(trainer[: len(prompt) - 1], abs=1e-4)
        tops = [top.logprob for position in sequence.top_logprobs for top in position]
        assert tops == pytest.approx(list(forward.topk_logprobs[0].values())[3 * (len(prompt) - 1) :], abs=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_several_targets_a_position_go_through_the_models_own_logits(zoo, engines, family):
    engine = engines[family]
    engine.init_run("run", rank=4, seed=3, targets=LoraTargets(unembed=True))
    disturb(engine, "run")
    reference = peft(zoo, family, engine, "run")
    ids = SEQUENCES[0]
    targets = torch.tensor([[token, (token + 7) % 90] for token in ids[1:]])
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0))
    inputs = {
        "target_tokens": Tensor("int64", tuple(targets.shape), targets.numpy().tobytes()),
        "weights": Tensor("float32", tuple(weights.shape), weights.numpy().tobytes()),
    }
    result = engine.forward_backward("run", [Datum(Tensor.of(ids[:-1], "int64"), inputs)], "cross_entropy", {})
    logprobs = reference(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1).gather(1, targets)
    (-(weights * logprobs).sum()).backward()
    assert list(result.logprobs[0].values()) == pytest.approx(logprobs.flatten().tolist(), abs=1e-5)
    run = engine._runs["run"]
    for parameter in run.shape.named(run.accumulated.grad_P):
        prefix = "base_model.model." if parameter.name.startswith("lm_head") else "base_model.model.model."
        gradient = reference.get_parameter(f"{prefix}{parameter.name}.default.weight").grad
        torch.testing.assert_close(parameter.view, gradient, atol=1e-4, rtol=1e-4, msg=parameter.name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_learns_is_saved_and_goes_on_where_it_was(zoo, engines, family, tmp_path):
    engine, adam = engines[family], AdamParams(learning_rate=1e-2)
    engine.init_run("run", rank=4, seed=3)

    def step(run_id):
        loss = engine.forward_backward(run_id, DATA, "cross_entropy", {}).loss
        engine.optim_step(run_id, adam)
        return loss

    losses = [step("run") for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    engine.save_trainer_checkpoint("run", tmp_path / "state")
    expected = [step("run") for _ in range(2)]
    engine.init_run("again", rank=1, seed=0, initial=tmp_path / "state", with_optimizer=True)
    assert [step("again") for _ in range(2)] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_adapter_opens_in_peft(zoo, engines, family, tmp_path):
    engine = engines[family]
    engine.init_run("run", rank=4, seed=3)
    disturb(engine, "run")
    engine.save_external_weights("run", tmp_path / "adapter", str(zoo.folder(family)))
    with warnings.catch_warnings():
        # PEFT warns of every key that it misses or does not expect.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(zoo.reference(family), tmp_path / "adapter")
    with torch.no_grad():
        expected = float(loss_sum(model)) / NUM_TOKENS
    assert engine.forward("run", DATA, "cross_entropy", {}).loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_a_merged_export_is_what_was_served(zoo, engines, family, tmp_path):
    """With an adapter of the output layer, which a tied model then has of its own."""
    engine = engines[family]
    engine.init_run("run", rank=4, seed=3, targets=LoraTargets(unembed=True))
    disturb(engine, "run")
    engine.save_sampler_checkpoint("run", tmp_path / "saved")
    facts = export_merged(tmp_path / "saved", zoo.folder(family), tmp_path / "merged", "a/base", lambda *_: None)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
@pytest.mark.parametrize("findings", [{"layout": "alone"}, {"continues": False}], ids=str)
def test_what_a_model_cannot_do_is_done_without(zoo, engines, family, findings):
    """One sequence a pass, and prompts whose parts are read again from the start: slower, with the same numbers."""
    model = zoo.engine(family)._model
    lacking = type(model)(
        model.spec, model.passes, model.head, model.findings._replace(**findings), "a test", model.dtype
    )
    engine = Engine(lacking, limits=EngineLimits(train_token_budget=8))
    assert lacking.contracts.packed is ("layout" not in findings)
    prompt = tiny_models.random_ids(21, seed=5)
    result = run_all(engine, SampleRequest("q", prompt, 2, SamplingParams(max_tokens=12, temperature=0)))["q"]
    assert result.sequences[0].tokens == greedy(zoo.reference(family), prompt, 12)
    losses = []
    for each in (engine, engines[family]):
        each.init_run("run", rank=4, seed=3)
        losses.append(each.forward_backward("run", DATA, "cross_entropy", {}).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_masks_of_other_models_stay_as_they_are(zoo):
    """What makes packed masks is in force during a pass of ours only."""
    reference, ids = zoo.reference("gemma3"), torch.tensor([SEQUENCES[1]])
    with torch.no_grad():
        before = reference(ids).logits
        with packed_rows(PackedRows(torch.arange(30) // 15, torch.arange(30) % 15)):
            inside = reference(ids).logits
        assert torch.equal(reference(ids).logits, before)
    assert not torch.equal(inside, before)


def test_loading_leaves_no_thread_behind(tmp_path: Path):
    """A fork server loads the model, and what it forks has its threads no more, but whatever they had locked."""
    folder = tmp_path / "model"
    tiny_models.save_quietly(family_models.build("cohere2"), folder)
    script = (
        "import sys, threading; from pathlib import Path; from selfloop.engine.engine import Engine; "
        "Engine.load(Path(sys.argv[1]), device='cpu', dtype='float32'); "
        "print([each.name for each in threading.enumerate()])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['MainThread']"
