"""A reinforcement-learning loop: sample groups, score them by a program, take one step; in steps a minute.

    python -m bench.rl_loop [MODEL_DIR] [--cases grpo] [--rounds 3] [--json FILE]

A step is 8 prompts of 64 tokens, 4 samples of 32 tokens each, advantages within each group, then importance-weighted
policy gradient on the 32 sequences and AdamW; the next step samples from the new weights. The other side is the
same loop in transformers + PEFT: ``generate`` with its logits for the old logprobs, and a forward that
computes logits for the sampled tokens alone. Rank 32, temperature 1.
"""

import statistics
from collections.abc import Sequence

import torch

from bench.harness import ours, program, theirs, work
from bench.harness.measure import alternate, ratios, seconds
from bench.harness.program import Bench, Case
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.sampling import SampledSequence

PROMPTS, SAMPLES, PROMPT, NEW_TOKENS, RANK = 8, 4, 64, 32, 32


def reward(tokens: Sequence[int]) -> float:
    """The share of even ids: cheap, and never the same for all samples of a prompt for long."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def advantages(samples: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of one prompt's samples, less their mean, over their spread."""
    rewards = [reward(tokens) for tokens in samples]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(r - mean) / (spread + 1e-6) for r in rewards]


class Ours:
    def __init__(self, bench: Bench, prompts: list[list[int]], num_new: int) -> None:
        self._engine, self._prompts, self._num_new = bench.engine, prompts, num_new
        self._run = bench.fresh_run("grpo", RANK)

    def step(self) -> None:
        self._engine.publish(self._run, "grpo")
        asked = ours.requests(self._prompts, self._num_new, adapters=["grpo"], num_samples=SAMPLES)
        sampled = ours.sample(self._engine, asked).sequences
        data = [
            policy_datum(prompt, sample, advantage)
            for prompt, samples in zip(self._prompts, sampled, strict=True)
            for sample, advantage in zip(samples, advantages([s.tokens for s in samples]), strict=True)
        ]
        self._engine.forward_backward(self._run, data, "importance_sampling", {})
        self._engine.optim_step(self._run, ours.ADAM)

    def close(self) -> None:
        self._engine.drop_adapter("grpo")
        self._engine.remove_run(self._run)


def policy_datum(prompt: Sequence[int], sample: SampledSequence, advantage: float) -> Datum:
    """The prompt is context alone; every sampled token has the sample's advantage."""
    context = len(prompt) - 1
    return Datum(
        Tensor.of([*prompt, *sample.tokens[:-1]], "int64"),
        {
            "target_tokens": Tensor.of([IGNORED_TARGET] * context + sample.tokens, "int64"),
            "logprobs": Tensor.of([0.0] * context + sample.logprobs, "float32"),
            "advantages": Tensor.of([0.0] * context + [advantage] * len(sample.tokens), "float32"),
        },
    )


class Theirs:
    def __init__(self, bench: Bench, prompts: list[list[int]], num_new: int) -> None:
        self._peft, self._num_new = bench.peft(RANK), num_new
        self._prompts_BN = torch.tensor(prompts, device=bench.device)

    def step(self) -> None:
        model, num_new = self._peft.model, self._num_new
        model.eval()
        made = theirs.generate(model, self._prompts_BN, num_new, num_samples=SAMPLES, with_logits=True)
        assert made.logits is not None
        tokens_BN = made.tokens_BN.clone()
        old_BN = torch.stack([_logprobs(made.logits[i], tokens_BN[:, i]) for i in range(num_new)], 1)
        groups = [tokens_BN[i : i + SAMPLES].tolist() for i in range(0, len(tokens_BN), SAMPLES)]
        advantage_B = torch.tensor([a for group in groups for a in advantages(group)], device=tokens_BN.device)
        model.train()
        prompts_BN = self._prompts_BN.repeat_interleave(SAMPLES, 0)
        ids = torch.cat([prompts_BN, tokens_BN[:, :-1]], 1)
        logits_BNV = model(input_ids=ids, logits_to_keep=num_new).logits
        ratio_BN = (_logprobs(logits_BNV, tokens_BN) - old_BN.clone()).exp()
        (-(ratio_BN * advantage_B[:, None]).mean()).backward()
        self._peft.apply()


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 logprobs of ``tokens`` (...) under ``logits`` (..., V), as the usual selective log-softmax has it."""
    wide = logits.float()
    return wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)


def grpo(bench: Bench) -> None:
    num_new, prompt = bench.size(NEW_TOKENS, 4), bench.size(PROMPT)
    prompts = [work.random_ids(prompt, bench.vocab_size, i) for i in range(PROMPTS)]
    mine, other = Ours(bench, prompts, num_new), Theirs(bench, prompts, num_new)
    values = alternate(
        {"ours": lambda: 60 / seconds(mine.step), "theirs": lambda: 60 / seconds(other.step)}, bench.rounds
    )
    mine.close()
    case, add = f"{PROMPTS} prompts x {SAMPLES} samples x {num_new} tokens, then a step", bench.report.add
    add(case, "selfloop", "steps/min", values["ours"])
    add(case, "transformers + PEFT", "steps/min", values["theirs"])
    add(case, "ratio", "x", ratios(values["ours"], values["theirs"]), at_least=2.5)


CASES: dict[str, Case] = {"grpo": grpo}


def main(arguments: Sequence[str] | None = None) -> None:
    program.run("rl_loop", __doc__, CASES, arguments)


if __name__ == "__main__":
    main()
