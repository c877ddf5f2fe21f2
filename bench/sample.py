"""Sampling throughput beside transformers' ``generate`` and the roofs of memory and arithmetic.

    python -m bench.sample [MODEL_DIR] [--cases decode1 decode8 decode32 ...] [--rounds 3] [--json FILE]

Decode rates count the tokens after the first one, over the time after the first one, on both sides; all samples run
to their full length. Prefill is measured on its own, where it is shared or repeated.
"""

import functools
from collections.abc import Sequence

import torch

from bench.harness import ours, program, theirs, work
from bench.harness.measure import alternate, ratios, scaled
from bench.harness.program import Bench, Case
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor

PROMPT, NEW_TOKENS, RANK = 16, 48, 32
NUM_ADAPTERS = 16


def decode(bench: Bench, batch: int, *, adapter: bool = False) -> None:
    """``batch`` streams of the base model, or of one adapter that neither side has merged."""
    num_new = bench.size(NEW_TOKENS, 4)
    prompts = [work.random_ids(PROMPT, bench.vocab_size, i) for i in range(batch)]
    prompts_BN = torch.tensor(prompts, device=bench.device)
    adapters: list[str | None] = [None]
    if adapter:
        adapters = [_publish(bench, "decode", RANK)]
    asked = ours.requests(prompts, num_new, adapters=adapters)
    model = bench.peft(RANK).model.eval() if adapter else bench.base
    num_tokens = batch * (num_new - 1)
    roof = bench.roof.gb_per_s if batch == 1 else bench.roof.gflops
    values = alternate(
        {
            "roof": roof,
            "ours": lambda: num_tokens / ours.sample(bench.engine, asked).rest_s,
            "theirs": lambda: num_tokens / theirs.generate(model, prompts_BN, num_new).rest_s,
        },
        bench.rounds,
    )
    weights = f"an adapter of rank {RANK}" if adapter else "base model"
    case, add = f"decode, batch {batch}, {weights}", bench.report.add
    add(case, "selfloop", "tokens/s", values["ours"])
    add(case, "generate", "tokens/s", values["theirs"])
    add(case, "ratio", "x", ratios(values["ours"], values["theirs"]), at_least=4.0)
    if batch == 1:
        read = scaled(values["ours"], bench.cost.step_gb(bench.dtype))
        add(
            case, "of the memory roof", "%", scaled(ratios(read, values["roof"]), 100), at_least=None if adapter else 55
        )
    else:
        done = scaled(values["ours"], bench.cost.forward_gflop())
        target = 45 if batch == 32 and not adapter else None
        add(case, "of the arithmetic roof", "%", scaled(ratios(done, values["roof"]), 100), at_least=target)


def adapters(bench: Bench) -> None:
    """A batch of 32 in which 16 adapters are mixed, beside the same batch with one adapter."""
    num_new = bench.size(NEW_TOKENS, 4)
    prompts = [work.random_ids(PROMPT, bench.vocab_size, i) for i in range(32)]
    names: list[str | None] = [_publish(bench, f"adapter-{i}", RANK, seed=i) for i in range(NUM_ADAPTERS)]
    mixed = ours.requests(prompts, num_new, adapters=names)
    single = ours.requests(prompts, num_new, adapters=names[:1])
    num_tokens = 32 * (num_new - 1)
    values = alternate(
        {
            "mixed": lambda: num_tokens / ours.sample(bench.engine, mixed).rest_s,
            "single": lambda: num_tokens / ours.sample(bench.engine, single).rest_s,
        },
        bench.rounds,
    )
    case, add = f"decode, batch 32, {NUM_ADAPTERS} adapters of rank {RANK}", bench.report.add
    add(case, "mixed", "tokens/s", values["mixed"])
    add(case, "one adapter", "tokens/s", values["single"])
    add(case, "of the one adapter's rate", "%", scaled(ratios(values["mixed"], values["single"]), 100), at_least=70)
    for name in names:
        assert name is not None
        bench.engine.drop_adapter(name)


def sharing(bench: Bench) -> None:
    """16 samples of one 512-token prompt up to their first tokens, in units of the prefill of one."""
    length = bench.size(512, 16)
    fresh = _FreshPrompts(bench, length)

    def first_tokens(num_requests: int, num_samples: int, *, same: bool) -> float:
        prompt = fresh.next()
        prompts = [prompt] * num_requests if same else [fresh.next() for _ in range(num_requests)]
        return ours.sample(bench.engine, ours.requests(prompts, 1, num_samples=num_samples)).total_s

    values = alternate(
        {
            "one": lambda: first_tokens(1, 1, same=True),
            "shared": lambda: first_tokens(1, 16, same=True),
            "requests": lambda: first_tokens(16, 1, same=True),
            "apart": lambda: first_tokens(16, 1, same=False),
        },
        bench.rounds,
    )
    case, add = f"16 samples of one {length}-token prompt, to their first tokens", bench.report.add
    add(case, "prefill of one prompt", "ms", scaled(values["one"], 1e3))
    add(case, "16 samples in one request", "prefills", ratios(values["shared"], values["one"]), at_most=1.5)
    add(case, "16 requests at once", "prefills", ratios(values["requests"], values["one"]))
    add(case, "16 different prompts", "prefills", ratios(values["apart"], values["one"]))


def prefix(bench: Bench) -> None:
    """A prompt whose first 1,024 tokens have been seen, beside one that is new; both to the first token."""
    length, ending = bench.size(1024, 48), 8
    fresh = _FreshPrompts(bench, length)
    fractions: list[float] = []
    first_ms: list[float] = []
    again_ms: list[float] = []
    for number in range(bench.rounds + 1):
        shared = fresh.next()
        took = [
            ours.sample(bench.engine, ours.requests([shared + work.random_ids(ending, bench.vocab_size, i)], 1)).total_s
            for i in range(2)
        ]
        if number > 0:  # the first one warms up
            first_ms.append(took[0] * 1e3)
            again_ms.append(took[1] * 1e3)
            fractions.append(100 * took[1] / took[0])
    case, add = f"a repeated {length}-token prefix, {ending} more tokens, to the first token", bench.report.add
    add(case, "new", "ms", first_ms)
    add(case, "repeated", "ms", again_ms)
    add(case, "of the new one", "%", fractions, at_most=5)


def gap(bench: Bench) -> None:
    """How far the sampler's logprobs of its own tokens are from the trainer's, beside ``generate`` and ``forward``."""
    num_new, run = bench.size(64, 4), bench.fresh_run("gap", RANK)
    prompts = work.text_prompts(bench.model_dir, bench.vocab_size, 8)
    for seed in range(3):  # so that the adapter is not the identity
        data = [work.datum(work.random_ids(bench.size(64), bench.vocab_size, seed * 8 + i)) for i in range(8)]
        ours.train_step(bench.engine, run, data)
    bench.engine.publish(run, "gap")
    sampled = ours.sample(bench.engine, ours.requests(prompts, num_new, adapters=["gap"]))
    scored: list[Datum] = []
    for prompt, (sequence,) in zip(prompts, sampled.sequences, strict=True):
        targets = [IGNORED_TARGET] * (len(prompt) - 1) + sequence.tokens
        tokens = [*prompt, *sequence.tokens[:-1]]
        scored.append(Datum(Tensor.of(tokens, "int64"), {"target_tokens": Tensor.of(targets, "int64")}))
    trainer = bench.engine.forward(run, scored, "cross_entropy", {}).logprobs
    gaps = [
        abs(sampled - trained)
        for prompt, (sequence,), logprobs in zip(prompts, sampled.sequences, trainer, strict=True)
        for sampled, trained in zip(sequence.logprobs, logprobs.values()[len(prompt) - 1 :], strict=True)
    ]
    bench.engine.drop_adapter("gap")
    bench.engine.remove_run(run)
    case, add = f"logprobs of sampled tokens, sampler against trainer, {bench.engine.info.dtype}", bench.report.add
    add(case, "selfloop, mean gap", "nats", sum(gaps) / len(gaps), at_most=0.01)
    add(case, "selfloop, largest", "nats", max(gaps))
    theirs_gaps = [value for prompt in prompts for value in _their_gaps(bench, prompt, num_new)]
    add(case, "transformers, mean gap", "nats", sum(theirs_gaps) / len(theirs_gaps))
    add(case, "transformers, largest", "nats", max(theirs_gaps))


@torch.inference_mode()
def _their_gaps(bench: Bench, prompt: Sequence[int], num_new: int) -> list[float]:
    made = theirs.generate(bench.base, torch.tensor([prompt], device=bench.device), num_new, with_logits=True)
    assert made.logits is not None
    tokens_N = made.tokens_BN[0]
    sampled_N = torch.stack(made.logits, 1)[0].float().log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    ids = torch.cat([torch.tensor(prompt, device=bench.device), tokens_N[:-1]])
    logits_TV = bench.base(input_ids=ids[None], logits_to_keep=num_new).logits[0].float()
    forward_N = logits_TV.log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    return (sampled_N - forward_N).abs().tolist()


class _FreshPrompts:
    """Prompts that nothing has seen before."""

    def __init__(self, bench: Bench, length: int) -> None:
        self._bench, self._length, self._num = bench, length, 0

    def next(self) -> list[int]:
        self._num += 1
        return work.random_ids(self._length, self._bench.vocab_size, 10**6 + self._num)


def _publish(bench: Bench, name: str, rank: int, seed: int = 0) -> str:
    """A fresh adapter, in the bank for sampling."""
    bench.engine.init_run(name, rank=rank, seed=seed)
    bench.engine.publish(name, name)
    bench.engine.remove_run(name)
    return name


CASES: dict[str, Case] = {
    **{f"decode{batch}": functools.partial(decode, batch=batch) for batch in (1, 8, 32)},
    **{f"adapter{batch}": functools.partial(decode, batch=batch, adapter=True) for batch in (1, 32)},
    "adapters": adapters,
    "sharing": sharing,
    "prefix": prefix,
    "gap": gap,
}


def main(arguments: Sequence[str] | None = None) -> None:
    program.run("sample", __doc__, CASES, arguments)


if __name__ == "__main__":
    main()
