"""Group-relative policy optimisation: teach a small model to answer in ten words, with a reward that a program checks.

Every step asks the model some questions several times, scores each answer, and raises the probability of those that
score above the average of their group (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1).

    export LOOPS_BASE_URL=http://127.0.0.1:8000        # as for quickstart.py
    export BASETEN_API_KEY=...
    export HF_ENDPOINT=http://127.0.0.1:8000/hf
    python examples/grpo.py --loss ppo                 # or cispo, importance_sampling, dppo, dro
"""

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from baseten.loops import (
    AdamParams,
    Datum,
    ModelInput,
    SampledSequence,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
)

DATASET = Path(__file__).parent / "data" / "captain.jsonl"
NUM_WORDS = 10


class Rollout(NamedTuple):
    prompt: list[int]
    answer: SampledSequence
    reward: float
    advantage: float


def reward_of(answer: SampledSequence) -> float:
    """1 for ten words, less with every word more or fewer; nothing for an answer that was cut off."""
    if answer.stop_reason != "stop":
        return 0.0
    return max(0.0, 1.0 - abs(len(answer.text.split()) - NUM_WORDS) / NUM_WORDS)


def advantages_of(rewards: list[float]) -> list[float]:
    """How far each is above the mean of its group, in standard deviations."""
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def roll_out(sampler: SamplingClient, prompts: list[list[int]], args: argparse.Namespace) -> list[Rollout]:
    """A group of answers to each prompt; all prompts at once, so that the server can batch them."""
    params = SamplingParams(max_tokens=args.max_tokens, temperature=1.0)

    def ask(prompt: list[int]) -> list[Rollout]:
        answers = sampler.sample(ModelInput.from_ints(prompt), args.group_size, params).sequences
        rewards = [reward_of(answer) for answer in answers]
        scored = zip(answers, rewards, advantages_of(rewards), strict=True)
        return [Rollout(prompt, *row) for row in scored]

    with ThreadPoolExecutor() as pool:
        return [rollout for group in pool.map(ask, prompts) for rollout in group]


def to_datum(rollout: Rollout) -> Datum:
    """Only the answer is trained: the prompt's targets are masked, and what is given for them does not count."""
    prompt, answer = rollout.prompt, rollout.answer
    assert answer.logprobs is not None
    before = [0.0] * (len(prompt) - 1)
    return Datum(
        model_input=ModelInput.from_ints((prompt + answer.tokens)[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_list([-100] * len(before) + answer.tokens, dtype="int64"),
            "logprobs": TensorData.from_list(before + answer.logprobs),
            "advantages": TensorData.from_list(before + [rollout.advantage] * len(answer.tokens)),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a small model to answer in ten words.")
    parser.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--loss", default="ppo", choices=["ppo", "cispo", "importance_sampling", "dppo", "dro"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=4, help="questions a step")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each")
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps on the answers of one step")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    trainer = ServiceClient().create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed)
    tokenizer = trainer.get_tokenizer()
    questions = [json.loads(line)["prompt"] for line in DATASET.read_text(encoding="utf-8").splitlines()]

    def prompt_of(question: str) -> list[int]:
        messages = [{"role": "user", "content": f"{question} Answer in one short sentence."}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    print(f"Run {trainer.run_id} on {args.base_model}, {args.loss}", flush=True)
    choose = random.Random(args.seed)
    adam = AdamParams(learning_rate=args.learning_rate)
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        sampler = trainer.save_weights_and_get_sampling_client("grpo")
        prompts = [prompt_of(question) for question in choose.sample(questions, args.prompts)]
        rollouts = roll_out(sampler, prompts, args)
        # A group of equal rewards has nothing to teach.
        data = [to_datum(rollout) for rollout in rollouts if rollout.advantage != 0]
        choose.shuffle(data)
        parts = [part for i in range(args.updates) if (part := data[i :: args.updates])]
        pending = [(trainer.forward_backward(part, args.loss), trainer.optim_step(adam)) for part in parts]
        for forward_backward, optim_step in pending:
            forward_backward.result()
            optim_step.result()
        reward = statistics.fmean(rollout.reward for rollout in rollouts)
        words = statistics.fmean(len(rollout.answer.text.split()) for rollout in rollouts)
        took = time.monotonic() - began
        print(f"  step {step:>3}/{args.steps}   reward {reward:.3f}   words {words:4.1f}   {took:5.0f} s", flush=True)

    best = max(rollouts, key=lambda rollout: rollout.reward)
    print(f"\n  {best.answer.text.strip()}")


if __name__ == "__main__":
    main()
