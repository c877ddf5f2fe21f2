"""A loss of your own: any PyTorch function of the logprobs, computed in this process and trained on the server.

Here it is a squared margin: every answer's mean logprob is pushed up until it reaches a goal, and no further, so that a
model takes up a style without learning its examples by heart.

    pip install 'baseten-loops[torch]'
    export LOOPS_BASE_URL=http://127.0.0.1:8000        # as for quickstart.py
    export BASETEN_API_KEY=...
    export HF_ENDPOINT=http://127.0.0.1:8000/hf
    python examples/custom_loss.py
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData

DATASET = Path(__file__).parent / "data" / "captain.jsonl"
GOAL = -1.0


def squared_margin(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """(goal - mean logprob)^2 of each answer that has not reached the goal; their mean."""
    means = []
    for datum, row in zip(data, logprobs, strict=True):
        active = torch.tensor(datum.loss_fn_inputs["target_tokens"].data) != -100
        means.append(row[active].mean())
    mean = torch.stack(means)
    loss = torch.relu(GOAL - mean).square().mean()
    return loss, {"mean_logprob": mean.mean().item(), "reached": (mean >= GOAL).float().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with a loss that is computed here.")
    parser.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    args = parser.parse_args()

    trainer = ServiceClient().create_lora_training_client(args.base_model, rank=args.rank, seed=0)
    tokenizer = trainer.get_tokenizer()

    def to_datum(example: dict[str, str]) -> Datum:
        messages = [{"role": "user", "content": example["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(example["answer"] + tokenizer.eos_token, add_special_tokens=False)
        targets = [-100] * (len(prompt) - 1) + answer
        return Datum(
            model_input=ModelInput.from_ints((prompt + answer)[:-1]),
            loss_fn_inputs={"target_tokens": TensorData.from_list(targets, dtype="int64")},
        )

    data = [to_datum(json.loads(line)) for line in DATASET.read_text(encoding="utf-8").splitlines()]
    shuffle, adam = random.Random(0), AdamParams(learning_rate=args.learning_rate)
    print(f"Run {trainer.run_id} on {args.base_model}", flush=True)
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        batch = shuffle.sample(data, args.batch_size)
        result = trainer.forward_backward_custom(batch, squared_margin).result()
        trainer.optim_step(adam).result()
        mean, reached = result.metrics["mean_logprob"], result.metrics["reached"]
        took = time.monotonic() - began
        shown = f"mean logprob {mean:6.2f}   reached {reached:.2f}"
        print(f"  step {step:>3}/{args.steps}   {shown}   {took:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
