"""A training run through the official client, on demand: the other side of bench/served.py.

Runs in an environment with ``baseten-loops``; knows nothing of Selfloop. Each line of its input is a JSON object whose
``do`` names a function of this file and whose other fields are its arguments; each is answered by a line.
"""

import asyncio
import json
import sys
import time

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

model = sys.argv[1]
service = ServiceClient()
trainer = service.create_lora_training_client(base_model=model, rank=32, seed=0)
samplers = {}
data = []
num_saves = 0


def batch(sequences: list[list[int]]) -> dict:
    """Train on these from now on, every next token supervised."""
    data[:] = [
        Datum(
            model_input=ModelInput.from_ints(s[:-1]),
            loss_fn_inputs={"target_tokens": TensorData.from_list(s[1:], dtype="int64")},
        )
        for s in sequences
    ]
    return {}


def step() -> int:
    """Both submitted before either is awaited, as users do; returns the tokens."""
    forward_backward, optim_step = trainer.forward_backward(data), trainer.optim_step(AdamParams())
    forward_backward.result()
    optim_step.result()
    return sum(len(datum.model_input.to_ints()) for datum in data)


def steps(num: int) -> dict:
    started = time.perf_counter()
    num_tokens = sum(step() for _ in range(num))
    return {"num_tokens": num_tokens, "seconds": time.perf_counter() - started}


def train(seconds: float) -> dict:
    """Steps until ``seconds`` are over, one at least."""
    started, num_tokens = time.perf_counter(), step()
    while time.perf_counter() - started < seconds:
        num_tokens += step()
    return {"num_tokens": num_tokens, "seconds": time.perf_counter() - started}


def sampler():
    """Of the weights as they are at the first call."""
    if not samplers:
        samplers["present"] = trainer.save_weights_and_get_sampling_client("bench-sampler")
    return samplers["present"]


def sample(prompts: list[list[int]], max_tokens: int, seconds: float) -> dict:
    """All prompts at once, again and again until ``seconds`` are over, once at least; ``took`` is each call's time."""
    client, took = sampler(), []

    async def one(seed: int, prompt: list[int]) -> int:
        called = time.perf_counter()
        params = SamplingParams(max_tokens=max_tokens, seed=seed)
        answer = await client.sample_async(ModelInput.from_ints(prompt), sampling_params=params)
        took.append(time.perf_counter() - called)
        return sum(len(sequence.tokens) for sequence in answer.sequences)

    async def repeat() -> dict:
        started, num_tokens, passed = time.perf_counter(), 0, 0.0
        while num_tokens == 0 or passed < seconds:
            num_tokens += sum(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))
            passed = time.perf_counter() - started
        return {"num_tokens": num_tokens, "seconds": passed, "took": took}

    return asyncio.run(repeat())


def empty(num: int) -> dict:
    """Optimizer steps without gradients, from the call to its result."""
    seconds = []
    for _ in range(num):
        started = time.perf_counter()
        trainer.optim_step(AdamParams()).result()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


def first_token(num: int) -> dict:
    """From asking for a sampling client of the present weights to its first token."""
    global num_saves
    seconds = []
    for _ in range(num):
        step()
        num_saves += 1
        started = time.perf_counter()
        fresh = trainer.save_weights_and_get_sampling_client(f"bench-{num_saves}")
        fresh.sample(ModelInput.from_ints([5, 6, 7, 8]), sampling_params=SamplingParams(max_tokens=1, temperature=0.0))
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


answers = sys.stdout
sys.stdout = sys.stderr  # whatever the client prints is not an answer
for line in sys.stdin:
    how = json.loads(line)
    do = {f.__name__: f for f in (batch, steps, train, sample, empty, first_token)}[how.pop("do")]
    print(json.dumps(do(**how)), file=answers, flush=True)
