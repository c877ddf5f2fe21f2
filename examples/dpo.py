"""Direct preference optimisation: teach a small model to prefer a captain's answers to its own.

Each pair is an answer of the dataset (chosen) and what the untrained model says to the same question (rejected). The
loss compares both with the untrained model (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

    export LOOPS_BASE_URL=http://127.0.0.1:8000        # as for quickstart.py
    export BASETEN_API_KEY=...
    export HF_ENDPOINT=http://127.0.0.1:8000/hf
    python examples/dpo.py
"""

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData, TrainingClient

DATASET = Path(__file__).parent / "data" / "captain.jsonl"


def with_targets(prompt: list[int], answer: list[int]) -> Datum:
    """Position i predicts token i + 1; the prompt is masked, so that it has no part in the preference."""
    targets = [-100] * (len(prompt) - 1) + answer
    return Datum(
        model_input=ModelInput.from_ints((prompt + answer)[:-1]),
        loss_fn_inputs={"target_tokens": TensorData.from_list(targets, dtype="int64")},
    )


def with_reference(trainer: TrainingClient, rows: list[Datum]) -> list[Datum]:
    """The logprobs of the untrained policy beside the targets; masked positions stay null."""
    outputs = trainer.forward(rows, "cross_entropy").result().loss_fn_outputs
    return [
        row.model_copy(update={"loss_fn_inputs": row.loss_fn_inputs | {"ref_logprobs": output["logprobs"]}})
        for row, output in zip(rows, outputs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a small model to prefer a captain's answers to its own.")
    parser.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    args = parser.parse_args()

    service = ServiceClient()
    trainer = service.create_lora_training_client(args.base_model, rank=args.rank, seed=0)
    base = service.create_sampling_client(base_model=args.base_model)
    tokenizer = trainer.get_tokenizer()
    examples = [json.loads(line) for line in DATASET.read_text(encoding="utf-8").splitlines()][: args.pairs]

    def pair(example: dict[str, str]) -> tuple[Datum, Datum]:
        messages = [{"role": "user", "content": example["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        chosen = tokenizer.encode(example["answer"] + tokenizer.eos_token, add_special_tokens=False)
        params = SamplingParams(max_tokens=len(chosen), temperature=1.0, seed=0)
        rejected = base.sample(ModelInput.from_ints(prompt), sampling_params=params).sequences[0].tokens
        return with_targets(prompt, chosen), with_targets(prompt, rejected)

    print(f"Run {trainer.run_id} on {args.base_model}: asking for {len(examples)} answers to reject", flush=True)
    with ThreadPoolExecutor() as pool:
        rows = [row for both in pool.map(pair, examples) for row in both]
    rows = with_reference(trainer, rows)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))

    shuffle, adam, config = random.Random(0), AdamParams(learning_rate=args.learning_rate), {"beta": args.beta}
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        batch = [row for both in shuffle.sample(pairs, args.batch_size) for row in both]
        forward_backward = trainer.forward_backward(batch, "dpo", loss_fn_config=config)
        trainer.optim_step(adam).result()
        result = forward_backward.result()
        margin, accuracy = result.metrics["margin"], result.metrics["accuracy"]
        took = time.monotonic() - began
        shown = f"loss {result.loss:.3f}   margin {margin:6.2f}   accuracy {accuracy:.2f}"
        print(f"  step {step:>3}/{args.steps}   {shown}   {took:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
