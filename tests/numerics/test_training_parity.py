"""Loss, gradients, optimizer trajectory and exported files against transformers + PEFT + torch.optim.AdamW."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import tiny_models
from peft_experts import of_each_expert
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.digests import MANIFEST_FILE
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams
from selfloop.types.settings import EngineLimits

SEQUENCES = [tiny_models.random_ids(n, seed=n) for n in (12, 30, 7)]


def disturb(engine, run_id="run"):
    """Give B values: at B = 0 the gradient of A is zero and would prove nothing."""
    run = engine._runs[run_id]
    generator = torch.Generator().manual_seed(9)
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            parameter.view.normal_(0, 0.05, generator=generator)


def reference_loss_sum(model, weights=None):
    total = torch.zeros(())
    for index, ids in enumerate(SEQUENCES):
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total = total + (nll if weights is None else nll * torch.tensor(weights[index])).sum()
    return total


def data(weights=None):
    return [
        tiny_models.next_token_datum(ids, None if weights is None else weights[i]) for i, ids in enumerate(SEQUENCES)
    ]


def named_gradients(model):
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "llama-tied",
        "llama-biased",
        "llama3-rope",
        "qwen2",
        "qwen3",
        "mistral",
        "smollm3",
        "gemma2-own",
        "gemma3-own",
        "glm4",
        "phi3",
        "olmo2",
        "granite-own",
        "qwen3_5-own",
        *tiny_models.MOE_FAMILIES,
    ],
)
@pytest.mark.parametrize("budget", [16, 1024])
def test_loss_and_gradients_equal_peft(zoo, family, budget):
    engine = zoo.engine(family, limits=EngineLimits(train_token_budget=budget))
    routed = family in tiny_models.MOE_FAMILIES
    engine.init_run("run", rank=4, seed=3, targets=LoraTargets(experts=routed))
    disturb(engine)
    reference = zoo.peft_of_file(family, engine, "run") if routed else zoo.peft(family, engine, "run")
    weights = [[0.5 + 0.1 * (i % 7) for i in range(len(ids) - 1)] for ids in SEQUENCES]

    result = engine.forward_backward("run", data(weights), "cross_entropy", {})
    expected = reference_loss_sum(reference, weights)
    expected.backward()

    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    assert result.metrics["num_trained_tokens"] == num_tokens
    assert result.loss == pytest.approx(float(expected.detach()) / num_tokens, abs=1e-4)
    run = engine._runs["run"]
    gradients = named_gradients(reference)
    if routed:
        gradients = of_each_expert(gradients, *tiny_models.MOE_FAMILIES[family])
    ours = {p.name: p.view for p in run.shape.named(run.accumulated.grad_P)}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Per trained token, as the optimizer uses it.
        torch.testing.assert_close(ours[name] / num_tokens, gradient / num_tokens, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(learning_rate=5e-3, grad_clip_norm=0.0),
        AdamParams(learning_rate=5e-3, beta2=0.99, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.05),
    ],
)
def test_five_steps_equal_torch_adamw(zoo, adam):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft("llama", engine, "run")
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    for step in range(5):
        ours = engine.forward_backward("run", data(), "cross_entropy", {})
        metrics = engine.optim_step("run", adam).metrics
        loss = reference_loss_sum(reference) / num_tokens
        loss.backward()
        max_norm = adam.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert ours.loss == pytest.approx(float(loss.detach()), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert metrics["step"] == step + 1
    run = engine._runs["run"]
    for parameter in run.shape.named(run.theta_P):
        expected = reference.get_parameter(f"base_model.model.model.{parameter.name}.default.weight")
        torch.testing.assert_close(parameter.view, expected.detach(), atol=1e-4, rtol=1e-4)


def test_fresh_adapter_has_pefts_distribution(zoo):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=16, seed=0)
    run = engine._runs["run"]
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            assert not parameter.view.any()
        else:
            bound = parameter.view.shape[1] ** -0.5
            assert parameter.view.abs().max() <= bound
            assert parameter.view.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3", "mistral"])
def test_exported_adapter_gives_the_same_logits_in_peft(zoo, family, tmp_path):
    engine = zoo.engine(family)
    engine.init_run("run", rank=4, seed=3)
    for _ in range(3):
        engine.forward_backward("run", data(), "cross_entropy", {})
        engine.optim_step("run", AdamParams(learning_rate=1e-2))
    saved = engine.save_sampler_checkpoint("run", tmp_path / "adapter")
    files = {p.name: p.stat().st_size for p in (tmp_path / "adapter").iterdir()}
    assert files.pop(MANIFEST_FILE) > 0
    assert saved.size_bytes == sum(files.values())

    with warnings.catch_warnings():
        # PEFT warns of keys that it misses or does not know: those must fail.
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(zoo.reference(family), tmp_path / "adapter").eval()
    result = engine.forward("run", data(), "cross_entropy", {})
    for ids, logprobs in zip(SEQUENCES, result.logprobs, strict=True):
        with torch.no_grad():
            log_softmax = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        expected = log_softmax[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(torch.tensor(logprobs.values()), expected, atol=1e-4, rtol=1e-4)


def test_adapter_written_by_peft_is_read_with_its_alpha(zoo, tmp_path):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    engine._runs["run"].alpha = 7.0
    reference = zoo.peft("llama", engine, "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(tmp_path / "adapter")
    engine.init_run("other", rank=2, seed=0, initial=tmp_path / "adapter")
    assert engine._runs["other"].alpha == 7.0
    expected = engine.forward("run", data(), "cross_entropy", {})
    assert engine.forward("other", data(), "cross_entropy", {}).loss == expected.loss


def test_masked_targets_have_no_part_in_loss_or_gradient(zoo):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    ids = SEQUENCES[0]
    keep = 4
    datum = tiny_models.next_token_datum(ids)
    masked = [*ids[1 : keep + 1], *([IGNORED_TARGET] * (len(ids) - 1 - keep))]
    masked_datum = type(datum)(datum.tokens, {"target_tokens": type(datum.tokens).of(masked, "int64")})
    short = tiny_models.next_token_datum(ids[: keep + 1])
    engine.forward_backward("run", [masked_datum], "cross_entropy", {})
    ours = engine._runs["run"].accumulated
    engine.init_run("other", rank=4, seed=3)
    disturb(engine, "other")
    engine.forward_backward("other", [short], "cross_entropy", {})
    theirs = engine._runs["other"].accumulated
    assert ours.num_tokens == theirs.num_tokens == keep
    torch.testing.assert_close(ours.grad_P, theirs.grad_P, atol=1e-5, rtol=1e-5)


def log_softmax(model, ids):
    return model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)


def assert_gradients_equal(engine, reference, divisor):
    """The engine's accumulated sum against the reference's, as the optimizer uses them."""
    run = engine._runs["run"]
    gradients = named_gradients(reference)
    ours = {p.name: p.view for p in run.shape.named(run.accumulated.grad_P)}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name] / divisor, gradient / divisor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("budget", [16, 1024])
def test_a_mixture_of_targets_equals_peft(zoo, budget):
    """Three targets a position, some of them masked, some of weight zero, one position without any."""
    engine = zoo.engine("llama", limits=EngineLimits(train_token_budget=budget))
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft("llama", engine, "run")
    examples, total, num_trained, shown = [], torch.zeros(()), 0, []
    for seed, ids in enumerate(SEQUENCES):
        num = len(ids) - 1
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(3, tiny_models.VOCAB_SIZE, (num, 3), generator=generator)
        targets[torch.rand(num, 3, generator=generator) < 0.2] = IGNORED_TARGET
        targets[2] = IGNORED_TARGET
        weights = torch.rand(num, 3, generator=generator)
        weights[4] = 0
        active = targets != IGNORED_TARGET
        inputs = {
            "target_tokens": Tensor.of(targets.flatten().tolist(), "int64", (num, 3)),
            "weights": Tensor.of(weights.flatten().tolist(), "float32", (num, 3)),
        }
        examples.append(Datum(Tensor.of(ids[:-1], "int64"), inputs))
        logprobs = log_softmax(reference, ids).gather(1, targets.clamp(min=0))
        total = total - (logprobs * weights)[active].sum()
        num_trained += int((active & (weights != 0)).any(1).sum())
        shown.append(logprobs.detach().masked_fill(~active, float("nan")))
    total.backward()

    result = engine.forward_backward("run", examples, "cross_entropy", {})
    assert result.metrics["num_trained_tokens"] == num_trained
    assert result.loss == pytest.approx(float(total.detach()) / num_trained, abs=1e-4)
    for ours, expected in zip(result.logprobs, shown, strict=True):
        assert ours.shape == tuple(expected.shape)
        values = torch.tensor(ours.values()).reshape(ours.shape)
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert_gradients_equal(engine, reference, num_trained)


@pytest.mark.parametrize("budget", [16, 1024])
def test_dpo_equals_peft(zoo, budget):
    """Two pairs; the reference is the base model, the prompt is masked by targets in one row, by weights elsewhere."""
    engine = zoo.engine("llama", limits=EngineLimits(train_token_budget=budget))
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    policy, base = zoo.peft("llama", engine, "run"), zoo.reference("llama")
    rows = [*SEQUENCES, tiny_models.random_ids(9, seed=77)]
    examples, sums = [], []
    for index, ids in enumerate(rows):
        targets, mask = torch.tensor(ids[1:]), torch.arange(len(ids) - 1) >= 3
        with torch.no_grad():
            ref = log_softmax(base, ids).gather(1, targets[:, None])[:, 0]
        now = log_softmax(policy, ids).gather(1, targets[:, None])[:, 0]
        sums.append(((now - ref) * mask).sum())
        name = "ref_logprobs" if index % 2 else "logprobs"
        inputs = {name: Tensor.of(ref.tolist(), "float32")}
        if index == 2:
            targets = targets.masked_fill(~mask, IGNORED_TARGET)
        else:
            inputs["weights"] = Tensor.of(mask.float().tolist(), "float32")
        inputs["target_tokens"] = Tensor.of(targets.tolist(), "int64")
        examples.append(Datum(Tensor.of(ids[:-1], "int64"), inputs))
    deltas = 0.3 * torch.stack([sums[0] - sums[1], sums[2] - sums[3]])
    expected = -(0.9 * F.logsigmoid(deltas) + 0.1 * F.logsigmoid(-deltas)).sum()
    expected.backward()

    result = engine.forward_backward("run", examples, "dpo", {"beta": 0.3, "label_smoothing": 0.1})
    assert result.loss == pytest.approx(float(expected.detach()) / 2, abs=1e-4)
    assert result.metrics["num_trained_pairs"] == 2
    assert result.metrics["num_trained_tokens"] == sum(len(ids) - 4 for ids in rows)
    assert result.metrics["accuracy"] == float((deltas > 0).float().mean())
    assert result.metrics["margin"] == pytest.approx(float(deltas.detach().mean()), abs=1e-4)
    assert_gradients_equal(engine, policy, 2)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    metrics = engine.optim_step("run", AdamParams(learning_rate=0.0)).metrics
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()) / 2, rel=1e-4)


def test_the_likeliest_tokens_equal_peft(zoo):
    engine = zoo.engine("llama", limits=EngineLimits(train_token_budget=16))
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft("llama", engine, "run")
    targets = [*SEQUENCES[0][1:5], *([IGNORED_TARGET] * 3), *SEQUENCES[0][8:]]
    first = Datum(Tensor.of(SEQUENCES[0][:-1], "int64"), {"target_tokens": Tensor.of(targets, "int64")})
    result = engine.forward("run", [first, *data()[1:]], "cross_entropy", {}, 5)
    again = engine.forward_backward("run", [first, *data()[1:]], "cross_entropy", {}, 5)
    assert [t.data for t in (*result.topk_tokens, *result.topk_logprobs)] == [
        t.data for t in (*again.topk_tokens, *again.topk_logprobs)
    ]
    for index, ids in enumerate(SEQUENCES):
        with torch.no_grad():
            top = log_softmax(reference, ids).topk(5, dim=1)
        tokens, logprobs = top.indices, top.values
        if index == 0:
            tokens[4:7], logprobs[4:7] = -1, float("nan")
        ours = result.topk_logprobs[index]
        assert ours.shape == result.topk_tokens[index].shape == (len(ids) - 1, 5)
        assert list(result.topk_tokens[index].values()) == tokens.flatten().tolist()
        values = torch.tensor(ours.values()).reshape(ours.shape)
        torch.testing.assert_close(values, logprobs, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_custom_loss_in_two_calls_has_the_gradient_of_autograd_in_one(zoo):
    """As the client does it: logprobs out, dC/dlogprob computed there, sent back as the weights -dC/dlogprob."""
    skip = {"skip_token_normalization": True}
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft("llama", engine, "run")

    def custom(logprobs):
        return sum((lp.exp() * lp - 0.3 * lp.square()).sum() for lp in logprobs)

    zeros = [[0.0] * (len(ids) - 1) for ids in SEQUENCES]
    asked = engine.forward("run", data(zeros), "cross_entropy", skip)
    leaves = [torch.tensor(t.values()).requires_grad_() for t in asked.logprobs]
    custom(leaves).backward()
    engine.forward_backward("run", data([(-leaf.grad).tolist() for leaf in leaves]), "cross_entropy", skip)

    logits = [reference(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1) for ids in SEQUENCES]
    targets = [torch.tensor(ids[1:])[:, None] for ids in SEQUENCES]
    custom([row.gather(1, target)[:, 0] for row, target in zip(logits, targets, strict=True)]).backward()
    run = engine._runs["run"]
    ours = {p.name: p.view for p in run.shape.named(run.accumulated.grad_P)}
    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    for name, gradient in named_gradients(reference).items():
        torch.testing.assert_close(ours[name] / num_tokens, gradient / num_tokens, atol=1e-4, rtol=1e-4, msg=name)
