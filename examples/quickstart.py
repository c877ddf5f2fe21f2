"""Teach a small model to answer like a ship's captain, with the official Loops client and nothing else.

    pip install baseten-loops jinja2                   # jinja2 renders the chat template

The client reads where to go from the environment:

    export LOOPS_BASE_URL=http://127.0.0.1:8000        # the Selfloop server
    export BASETEN_API_KEY=...                         # a key of that server
    export HF_ENDPOINT=http://127.0.0.1:8000/hf        # tokenizers come from it, too
    python examples/quickstart.py
"""

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baseten.loops import (
    AdamParams,
    Datum,
    ModelInput,
    SamplingClient,
    SamplingParams,
    ServiceClient,
    TensorData,
)

DATASET = Path(__file__).parent / "data" / "captain.jsonl"

# None of these is in the dataset.
QUESTIONS = [
    "What is the capital of Spain?",
    "How do I make a sandwich?",
    "What is a black hole?",
    "I am nervous about my speech.",
    "Give me a tip for staying focused.",
]


def prompt_tokens(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def to_datum(tokenizer, example: dict) -> Datum:
    """Position i predicts token i + 1; -100 leaves the prompt out of the loss."""
    prompt = prompt_tokens(tokenizer, example["prompt"])
    answer = tokenizer.encode(example["answer"] + tokenizer.eos_token, add_special_tokens=False)
    targets = [-100] * (len(prompt) - 1) + answer
    return Datum(
        model_input=ModelInput.from_ints((prompt + answer)[:-1]),
        loss_fn_inputs={"target_tokens": TensorData.from_list(targets, dtype="int64")},
    )


def ask_all(client: SamplingClient, tokenizer) -> list[str]:
    """Answers to the held-out questions, asked at the same time so that the server can batch them."""
    params = SamplingParams(max_tokens=40, temperature=0.0)

    def ask(question: str) -> str:
        prompt = ModelInput.from_ints(prompt_tokens(tokenizer, question))
        response = client.sample(prompt, sampling_params=params)
        return tokenizer.decode(response.sequences[0].tokens, skip_special_tokens=True).strip()

    with ThreadPoolExecutor() as pool:
        return list(pool.map(ask, QUESTIONS))


def train(training_client, data: list[Datum], args: argparse.Namespace) -> list[float]:
    adam = AdamParams(learning_rate=args.learning_rate)
    shuffle = random.Random(0)
    losses: list[float] = []
    for step in range(1, args.steps + 1):
        started = time.monotonic()
        batch = shuffle.sample(data, args.batch_size)
        # Both are on their way before either is waited for: the server never idles in between.
        forward_backward = training_client.forward_backward(batch, loss_fn="cross_entropy")
        optim_step = training_client.optim_step(adam)
        losses.append(forward_backward.result().loss)
        optim_step.result()
        took = time.monotonic() - started
        print(f"  step {step:>3}/{args.steps}   loss {losses[-1]:6.3f}   {took:5.2f} s", flush=True)
    return losses


def draw(losses: list[float], height: int = 8) -> None:
    """The loss curve, in plain characters."""
    low, high = min(losses), max(losses)
    rows = [round((loss - low) / ((high - low) or 1.0) * (height - 1)) for loss in losses]
    for row in reversed(range(height)):
        label = low + (high - low) * row / (height - 1)
        print(f"  {label:6.2f} ┤" + "".join("●" if at == row else " " for at in rows))
    print("         └" + "─" * len(losses) + " steps")


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a small model to answer like a ship's captain.")
    parser.add_argument("--base-model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("captain-adapter"), help="where the adapter goes")
    args = parser.parse_args()

    service_client = ServiceClient()
    training_client = service_client.create_lora_training_client(base_model=args.base_model, rank=args.rank)
    tokenizer = training_client.get_tokenizer()
    examples = [json.loads(line) for line in DATASET.read_text(encoding="utf-8").splitlines()]
    data = [to_datum(tokenizer, example) for example in examples]

    print(f"Run {training_client.run_id} on {args.base_model}", flush=True)
    print("Asking the untrained model ...", flush=True)
    before = ask_all(service_client.create_sampling_client(base_model=args.base_model), tokenizer)

    print(f"Training: {args.steps} steps of {args.batch_size} of {len(data)} examples", flush=True)
    losses = train(training_client, data, args)
    draw(losses)

    print("Asking again, from the weights just trained ...", flush=True)
    after = ask_all(training_client.save_weights_and_get_sampling_client("captain"), tokenizer)
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"\n  {question}\n    before: {' '.join(old.split())}\n    after:  {' '.join(new.split())}")

    training_client.save_state("captain-resumable").result()
    print("\nCheckpoints of this run:")
    checkpoints = training_client.list_checkpoints()
    for checkpoint in checkpoints:
        size = f"{checkpoint.size_bytes:>11,} B"
        print(f"  {checkpoint.id}  {checkpoint.checkpoint_id:<20} {checkpoint.target:<8} {size}")

    newest = max((c for c in checkpoints if c.target == "sampler"), key=lambda c: c.created_at)
    folder = training_client.download_checkpoint(newest.id, dest_dir=str(args.out / newest.id)).dest_dir
    print(f"Downloaded the PEFT adapter to {folder}:")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {file.relative_to(folder)!s:<32} {file.stat().st_size:>11,} B")


if __name__ == "__main__":
    main()
