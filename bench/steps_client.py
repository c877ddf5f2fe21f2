"""Training steps through the official client, on demand: one half of bench/overhead.py.

Runs in an environment with ``baseten-loops``; knows nothing of Selfloop.
"""

import json
import random
import sys
import time

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

BATCH, LENGTH, RANK, VOCAB_SIZE = 8, 256, 32, 49152
PROMPT = ModelInput.from_ints([1, 2, 3, 4, 5, 6, 7, 8])


def batch() -> list[Datum]:
    """The same tokens as bench/steps_engine.py."""
    draw = random.Random(0)
    sequences = [[draw.randrange(VOCAB_SIZE) for _ in range(LENGTH + 1)] for _ in range(BATCH)]
    return [
        Datum(
            model_input=ModelInput.from_ints(s[:-1]),
            loss_fn_inputs={"target_tokens": TensorData.from_list(s[1:], dtype="int64")},
        )
        for s in sequences
    ]


trainer = ServiceClient().create_lora_training_client(
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct", rank=RANK, seed=0
)
data = batch()
num_saves = 0


def step() -> None:
    forward_backward, optim_step = trainer.forward_backward(data), trainer.optim_step(AdamParams())
    forward_backward.result()
    optim_step.result()


def steps(num: int) -> dict:
    started = time.perf_counter()
    for _ in range(num):
        step()
    return {"num_tokens": num * BATCH * LENGTH, "seconds": time.perf_counter() - started}


def empty(num: int) -> dict:
    """A step without gradients, from the call to its result."""
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
        sampler = trainer.save_weights_and_get_sampling_client(f"bench-{num_saves}")
        sampler.sample(PROMPT, sampling_params=SamplingParams(max_tokens=1, temperature=0.0))
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds}


answers = sys.stdout
sys.stdout = sys.stderr  # whatever the client prints is not an answer
for line in sys.stdin:
    what, num = line.split()
    print(
        json.dumps({"steps": steps, "empty": empty, "first_token": first_token}[what](int(num))),
        file=answers,
        flush=True,
    )
