"""Engine speed on one model folder, beside transformers + PEFT in the same process.

    python bench/engine.py MODEL_DIR [--dtype auto] [--skip-reference]

Prints train tokens/s (8 sequences of 256 tokens, rank 32, forward + backward + AdamW) and decode tokens/s at
batch 1 and 32 (64-token prompts, 32 new tokens each), the reference's figures and the ratio.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from selfloop.engine.engine import Engine
from selfloop.types.datum import Datum, Tensor
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams

BATCH, LENGTH, RANK = 8, 256, 32
PROMPT, NEW_TOKENS = 64, 32


def random_ids(num: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (num,), generator=generator).tolist()


def best_rate(tokens: int, call: Callable[[], object], repeats: int) -> float:
    """Tokens per second of the fastest of ``repeats`` calls, after one to warm up."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return tokens / min(times)


def bench_engine(engine: Engine, repeats: int) -> dict[str, float]:
    vocab_size = engine.info.vocab_size
    data: list[Datum] = []
    for i in range(BATCH):
        ids = random_ids(LENGTH + 1, vocab_size, i)
        targets = Tensor.of(ids[1:], "int64")
        data.append(Datum(Tensor.of(ids[:-1], "int64"), {"target_tokens": targets}))
    engine.init_run("bench", rank=RANK, seed=0)

    def train() -> None:
        engine.forward_backward("bench", data, "cross_entropy", {})
        engine.optim_step("bench", AdamParams())

    rates = {"train 8x256": best_rate(BATCH * LENGTH, train, repeats)}
    engine.publish("bench", "bench")

    def sample(batch: int) -> None:
        for i in range(batch):
            params = SamplingParams(max_tokens=NEW_TOKENS, seed=i)
            prompt = random_ids(PROMPT, vocab_size, i)
            engine.submit_sample(SampleRequest(str(i), prompt, 1, params, AdapterRef("bench", "")))
        while engine.num_sampling:
            engine.sample_step()

    for batch in (1, 32):
        rates[f"decode batch {batch}"] = best_rate(batch * NEW_TOKENS, lambda b=batch: sample(b), repeats)
    return rates


def bench_reference(model_dir: Path, engine: Engine, repeats: int) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, engine.info.dtype)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(engine.info.device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=32, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vocab_size = engine.info.vocab_size
    ids = torch.tensor([random_ids(LENGTH, vocab_size, i) for i in range(BATCH)], device=engine.info.device)

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    rates = {"train 8x256": best_rate(BATCH * LENGTH, train, repeats)}
    model.eval()
    for batch in (1, 32):
        prompts = torch.tensor([random_ids(PROMPT, vocab_size, i) for i in range(batch)])

        def generate(prompts: torch.Tensor = prompts.to(engine.info.device)) -> None:
            with torch.no_grad():
                model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=True,
                    top_k=0,
                )

        rates[f"decode batch {batch}"] = best_rate(batch * NEW_TOKENS, generate, repeats)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget", type=int, default=None, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-reference", action="store_true")
    args = parser.parse_args()
    engine = Engine.load(args.model_dir, dtype=args.dtype, train_token_budget=args.budget)
    print(engine.info)
    ours = bench_engine(engine, args.repeats)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    theirs = {} if args.skip_reference else bench_reference(args.model_dir, engine, args.repeats)
    print(f"{'tokens/s':<18}{'selfloop':>10}{'reference':>12}{'ratio':>8}")
    for name, rate in ours.items():
        other = theirs.get(name)
        print(f"{name:<18}{rate:>10.1f}" + (f"{other:>12.1f}{rate / other:>8.2f}" if other else ""))
    print(f"peak memory of the engine: {peak_mb:.0f} MB")


if __name__ == "__main__":
    main()
