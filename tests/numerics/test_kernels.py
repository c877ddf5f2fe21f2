"""The CPU kernels beside PyTorch's operators in float32, and beside themselves: a row's bits are its own."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backend_counts
import tiny_models
from selfloop.engine.backends.base import Model, Row, Varlen
from selfloop.engine.backends.cpu_native import build
from selfloop.engine.backends.cpu_native.draw import draw
from selfloop.engine.backends.cpu_native.instructions import best_body
from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.backends.cpu_native.model import NativeModel
from selfloop.engine.backends.torch.backend import TorchBackend
from selfloop.engine.backends.torch.weights import load_weights
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import Adapter, AdapterShape
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, ForwardBackward
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams
from selfloop.types.settings import EngineLimits

# Every CPU runs one of the bodies, whether or not a model would be computed by it.
_FOUND = build.built(best_body())
assert isinstance(_FOUND, Kernels), f"no kernels: {_FOUND}"
KERNELS: Kernels = _FOUND

CPU = torch.device("cpu")
FAMILIES = ["llama-wide", "llama-wide-biased", "qwen2-wide", "qwen3"]
LENGTHS = [1, 17, 64, 130, 33]
# What rows and base weights may be, on every CPU: one that multiplies bfloat16 has both in it.
MODES = {
    "bfloat16 rows": Kernels(KERNELS.library, KERNELS.body, torch.bfloat16, low_rows=True),
    "bfloat16 weights": Kernels(KERNELS.library, KERNELS.body, torch.bfloat16, low_rows=False),
    "float32": KERNELS.of(torch.float32),
}
_DECODERS: dict[str, Model] = {}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> None:
    record_property(backend_counts.PROPERTY, f"cpu_native on {KERNELS.body.name}")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def by_kernels(folder: Path, family: str, mode: str) -> Model:
    spec = saved(folder, family)
    kernels = MODES[mode]
    weights = load_weights(spec, SafetensorsSource(folder / family, spec), CPU, kernels.weights)
    return NativeModel(kernels, spec, weights)


def by_operators(folder: Path, family: str, dtype: torch.dtype) -> Model:
    spec = saved(folder, family)
    return TorchBackend("plain").load(spec, SafetensorsSource(folder / family, spec), CPU, dtype)


def saved(folder: Path, family: str) -> ModelSpec:
    """All of a family's decoders have the weights rounded to bfloat16."""
    path = folder / family
    if not path.exists():
        model = tiny_models.build(family).bfloat16()
        tiny_models.save_quietly(model, path)
    return read_spec(path)


class Run:
    """Parameters of an adapter that is not the identity."""

    def __init__(self, model: Model, rank: int, seed: int, targets: LoraTargets = LoraTargets()) -> None:
        self.shape = AdapterShape(model.spec, rank, targets)
        noise = torch.randn(self.shape.num_parameters, generator=torch.Generator().manual_seed(seed))
        self.flat_P = (self.shape.initial(seed) + 0.05 * noise).bfloat16()

    def leaf(self, dtype: torch.dtype) -> tuple[torch.Tensor, Adapter]:
        leaf_P = self.flat_P.to(dtype, copy=True).requires_grad_()
        return leaf_P, self.shape.adapter(leaf_P, alpha=16.0)


def passed(
    model: Model, lengths: list[int], runs: list[tuple[int, Run | None]], *, seed: int = 0, recompute: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states, and the gradient of each run of a sum that weighs them at random."""
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(3, 90, (sum(lengths),), generator=generator)
    weights_TD = torch.randn(sum(lengths), model.spec.hidden_size, generator=generator)
    leaves = [None if run is None else run.leaf(model.dtype) for _, run in runs]
    rows = [(num, None if leaf is None else leaf[1]) for (num, _), leaf in zip(runs, leaves, strict=True)]
    h_TD = model.forward(Varlen.whole(tokens_T, lengths), AdapterBatch.of(rows), recompute=recompute)
    grads = torch.autograd.grad((h_TD.float() * weights_TD).sum(), [leaf[0] for leaf in leaves if leaf is not None])
    return h_TD.detach(), list(grads)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rows_are_no_farther_from_float32_than_the_operators(folder: Path, family: str):
    exact, operators = (by_operators(folder, family, dtype) for dtype in (torch.float32, torch.bfloat16))
    kernels = by_kernels(folder, family, "bfloat16 rows")
    runs = [
        (82, Run(exact, 20, 1)),
        (30, None),
        (100, Run(exact, 4, 2, LoraTargets(mlp=False))),
        (33, Run(exact, 32, 3, LoraTargets(attn=False))),
    ]
    h_TD, grads = passed(exact, LENGTHS, runs)
    of_operators, of_kernels = passed(operators, LENGTHS, runs), passed(kernels, LENGTHS, runs)
    assert distance(of_kernels[0], h_TD) < min(0.02, 1.5 * distance(of_operators[0], h_TD))
    for ours, theirs, right in zip(of_kernels[1], of_operators[1], grads, strict=True):
        assert distance(ours, right) < min(0.05, 1.5 * distance(theirs, right))


@pytest.mark.parametrize("mode", ["bfloat16 weights", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_rows_are_those_of_float32(folder: Path, family: str, mode: str):
    """Base weights are bfloat16 numbers in each: what is computed with them is as exact as in float32."""
    exact, kernels = by_operators(folder, family, torch.float32), by_kernels(folder, family, mode)
    assert (kernels.dtype, kernels.embedding_VD.dtype) == (torch.float32, MODES[mode].weights)
    runs = [(82, Run(exact, 20, 1)), (30, None), (133, Run(exact, 4, 2))]
    (h_TD, grads), (ours_TD, ours) = passed(exact, LENGTHS, runs), passed(kernels, LENGTHS, runs)
    assert distance(ours_TD, h_TD) < 2e-6
    assert all(distance(found, right) < 1e-5 for found, right in zip(ours, grads, strict=True))


@pytest.mark.parametrize("family", ["llama-wide", "qwen3"])
def test_each_parameter_has_its_own_gradient(folder: Path, family: str, mode: str):
    exact, kernels = by_operators(folder, family, torch.float32), by_kernels(folder, family, mode)
    run = Run(exact, 8, 5)
    (right,), (ours,) = (passed(model, [70, 9], [(79, run)])[1] for model in (exact, kernels))
    for found, expected in zip(run.shape.named(ours.float()), run.shape.named(right), strict=True):
        assert distance(found.view, expected.view) < (0.1 if mode == "bfloat16 rows" else 1e-5), found.name


@pytest.mark.parametrize("family", FAMILIES)
def test_computing_layers_again_changes_no_bit(folder: Path, family: str, mode: str):
    model = by_kernels(folder, family, mode)
    runs = [(100, Run(model, 8, 1)), (145, Run(model, 16, 2))]
    kept, again = (passed(model, LENGTHS, runs, recompute=recompute) for recompute in (False, True))
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


@settings(max_examples=40)
@given(
    st.sampled_from(list(MODES)),
    st.lists(st.tuples(st.integers(1, 140), st.sampled_from([1, 8, 16, 24])), min_size=2, max_size=4),
    st.integers(1, 4),
)
def test_a_run_has_the_same_bits_alone_and_among_others(tmp_path_factory, of, parts, num_threads):
    if of not in _DECODERS:
        _DECODERS[of] = by_kernels(tmp_path_factory.mktemp("bits"), "llama-wide", of)
    model, before = _DECODERS[of], torch.get_num_threads()
    generator = torch.Generator().manual_seed(7)
    runs = [Run(model, rank, seed) for seed, (_, rank) in enumerate(parts)]
    tokens = [torch.randint(3, 90, (length,), generator=generator) for length, _ in parts]
    weights = [torch.randn(length, model.spec.hidden_size, generator=generator) for length, _ in parts]

    def computed(chosen: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        leaves = [runs[i].leaf(model.dtype) for i in chosen]
        lengths = [len(tokens[i]) for i in chosen]
        batch = AdapterBatch.of([(length, adapter) for length, (_, adapter) in zip(lengths, leaves, strict=True)])
        h_TD = model.forward(Varlen.whole(torch.cat([tokens[i] for i in chosen]), lengths), batch)
        loss = (h_TD.float() * torch.cat([weights[i] for i in chosen])).sum()
        grads = torch.autograd.grad(loss, [leaf for leaf, _ in leaves])
        return list(zip(h_TD.detach().split(lengths), grads, strict=True))

    try:
        torch.set_num_threads(num_threads)
        together = computed(list(range(len(parts))))
        torch.set_num_threads(1)
        for i, (h_ND, grad_P) in enumerate(together):
            ((alone_ND, alone_P),) = computed([i])
            assert torch.equal(h_ND, alone_ND)
            assert torch.equal(grad_P, alone_P)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_run(folder: Path, mode: str):
    model = by_kernels(folder, "llama-wide", mode)
    good, bad = Run(model, 8, 1), Run(model, 8, 2)
    _, (right, _) = passed(model, [40, 40], [(40, good), (40, Run(model, 8, 3))])
    bad.flat_P.fill_(torch.nan)
    h_TD, (grad, nan) = passed(model, [40, 40], [(40, good), (40, bad)])
    assert torch.equal(grad, right)
    assert h_TD[:40].isfinite().all()
    assert not nan.isfinite().any()
    # And leaves nothing behind.
    assert torch.equal(passed(model, [40, 40], [(40, good), (40, Run(model, 8, 3))])[1][0], right)


def engine(folder: Path, mode: str, family: str = "llama-wide-tied", **settings: object) -> Engine:
    return Engine(by_kernels(folder, family, mode), **settings)


def sampled(
    on: Engine, prompts: list[list[int]], num_samples: int, adapters: list[AdapterRef | None], num_new: int = 40
) -> list[list[tuple[list[int], list[float]]]]:
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=num_new, seed=index, use_end_tokens=False)
        on.submit_sample(SampleRequest(str(index), prompt, num_samples, params, adapters[index % len(adapters)]))
    results = {}
    while on.num_sampling:
        results.update({r.request_id: r.sequences for r in on.sample_step()})
    return [[(s.tokens, s.logprobs) for s in results[str(i)]] for i in range(len(prompts))]


@pytest.mark.parametrize("family", ["llama-wide-tied", "qwen3"])
def test_the_trainer_gives_sampled_tokens_the_sampler_s_logprobs(folder: Path, family: str, mode: str):
    on = engine(folder, mode, family)
    on.init_run("run", rank=8, seed=1)
    on._runs["run"].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    on.publish("run", "it")
    prompts = [tiny_models.random_ids(length, seed=length) for length in (1, 15, 16, 70)]
    for prompt, sequences in zip(prompts, sampled(on, prompts, 2, [AdapterRef("it")]), strict=True):
        for tokens, logprobs in sequences:
            datum = tiny_models.next_token_datum([*prompt, *tokens])
            (scored,) = on.forward("run", [datum], "cross_entropy", {}).logprobs
            assert max(abs(a - b) for a, b in zip(logprobs, scored.values()[len(prompt) - 1 :], strict=True)) < 1e-5


def test_a_sample_has_the_same_bits_alone_and_among_others(folder: Path, mode: str):
    on = engine(folder, mode)
    for name, seed in (("a", 1), ("b", 2)):
        on.init_run(name, rank=8, seed=seed)
        on._runs[name].theta_P.normal_(std=0.05, generator=torch.Generator().manual_seed(seed))
        on.publish(name, name)
    prompts = [tiny_models.random_ids(length, seed=length) for length in (5, 33, 64, 20, 7)]
    adapters = [None, AdapterRef("a"), AdapterRef("b"), AdapterRef("a")]
    together = sampled(on, prompts, 3, adapters)
    small = engine(folder, mode, limits=EngineLimits(train_token_budget=12, max_kv_tokens=16 * 40))
    for name in ("a", "b"):
        small._runs[name] = on._runs[name]
        small.publish(name, name)
    assert sampled(small, prompts, 3, adapters) == together
    for index, prompt in enumerate(prompts):
        on._scheduler._prefixes.clear()
        params = SamplingParams(max_tokens=40, seed=index, use_end_tokens=False)
        on.submit_sample(SampleRequest("alone", prompt, 3, params, adapters[index % len(adapters)]))
        done = []
        while on.num_sampling:
            done += on.sample_step()
        assert [(s.tokens, s.logprobs) for s in done[0].sequences] == together[index]


def test_many_runs_in_one_operation_have_the_bits_of_each_alone(folder: Path, mode: str):
    def trained(*, together: bool) -> list[torch.Tensor]:
        on = engine(folder, mode)
        data = {
            name: [tiny_models.next_token_datum(tiny_models.random_ids(n, seed=n))]
            for name, n in zip("abc", (9, 40, 65), strict=True)
        }
        for name in data:
            on.init_run(name, rank=8, seed=ord(name))
        for _ in range(3):
            asked = [(name, ForwardBackward(datums, "cross_entropy", {})) for name, datums in data.items()]
            for some in [asked] if together else [[one] for one in asked]:
                on.compute(some)
            for name in data:
                on.optim_step(name, AdamParams(learning_rate=1e-2))
        return [on._runs[name].theta_P for name in data]

    assert all(torch.equal(a, b) for a, b in zip(trained(together=True), trained(together=False), strict=True))


def test_without_a_compiler_the_operators_do_the_work(monkeypatch: pytest.MonkeyPatch, caplog, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert build.kernels.__wrapped__() is None
    assert "no C++ compiler" in caplog.text


def test_a_folder_that_others_may_write_to_is_not_loaded_from(monkeypatch: pytest.MonkeyPatch, caplog, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "selfloop").mkdir()
    (tmp_path / "selfloop").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert build.kernels.__wrapped__() is None
    assert "others may write" in caplog.text


def test_a_compiler_s_message_is_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog, tmp_path: Path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho no such flag >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert build.kernels.__wrapped__() is None
    assert "no such flag" in caplog.text
    assert not list((tmp_path / "selfloop").glob("*.so"))


@settings(max_examples=40)
@given(st.integers(1, 700), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 10))
def test_draws_are_where_the_uniform_number_says(num_tokens, temperature, seed):
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(seed)) * 3
    uniforms = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    tokens, logprobs, _ = (found.tolist() for found in KERNELS.draw(logits, num_tokens, [temperature] * 3, uniforms))
    for row, token, logprob, uniform in zip(logits, tokens, logprobs, uniforms, strict=True):
        assert abs(float(row.log_softmax(-1)[token]) - logprob) < 1e-5
        real = row[:num_tokens].double()
        if temperature == 0:
            assert token == int(real.argmax())
        else:
            cdf = (real / temperature).softmax(-1).cumsum(-1)
            before = 0.0 if token == 0 else float(cdf[token - 1])
            assert before - 1e-6 <= uniform <= float(cdf[token]) + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_what_has_no_probability_is_never_drawn(uniform: float):
    logits = torch.full((1, 300), -1e9)
    logits[0, 100] = 0.0
    assert KERNELS.draw(logits, 300, [1e-30], [uniform])[0].tolist() == [100]
    assert KERNELS.draw(logits, 300, [1.0], [uniform])[0].tolist() == [100]


def test_a_draw_does_not_depend_on_what_its_neighbours_ask_for():
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(1)) * 2
    mask = torch.zeros(500, dtype=torch.bool)
    mask[::7] = True
    settings = [{}, {"temperature": 0}, {"top_p": 0.7}, {"top_k": 5}, {"temperature": 0.5}, {}]
    rows = [
        Row(SamplingParams(max_tokens=1, **given), 0.1 + 0.15 * at, mask if at == 5 else None, 3 * (at % 2))
        for at, given in enumerate(settings)
    ]
    together = draw(logits, rows, 490)
    for at, row in enumerate(rows):
        alone = draw(logits[at : at + 1], [row], 490)
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[at], together.logprobs[at])
        plain = draw(logits[at : at + 1], [row._replace(num_top=0)], 490)
        assert (plain.tokens, plain.logprobs) == (alone.tokens, alone.logprobs)
    assert mask[together.tokens[5]]
