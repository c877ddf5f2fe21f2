"""A training script for the official Loops client, as a user would write one: what bench/chaos.py disturbs.

    python chaos_loops.py MODEL STEPS VOCAB_SIZE LENGTH

Prints a line of JSON for each outcome. Knows nothing of Selfloop, nor of the disturbances.
"""

import json
import random
import sys

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

MODEL, STEPS, VOCAB_SIZE, LENGTH = sys.argv[1], *map(int, sys.argv[2:5])
SAMPLE_EVERY, SAVE_EVERY, NUM_PARTS = 10, 25, 2


def report(what: str, **values: object) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def batch(seed: int) -> list[Datum]:
    rng = random.Random(seed)
    made = []
    for _ in range(2):
        tokens = [rng.randrange(3, VOCAB_SIZE) for _ in range(LENGTH + 1)]
        targets = TensorData.from_list(tokens[1:], dtype="int64")
        made.append(Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets}))
    return made


trainer = ServiceClient().create_lora_training_client(base_model=MODEL, rank=8, seed=1)
report("attached")
for step in range(STEPS):
    losses = [trainer.forward_backward(batch(NUM_PARTS * step + part)) for part in range(NUM_PARTS)]
    optim = trainer.optim_step(AdamParams(learning_rate=1e-3))
    for loss in losses:
        report("forward_backward", loss=loss.result().loss)
    report("optim_step", metrics=optim.result().metrics)
    if step % SAMPLE_EVERY == SAMPLE_EVERY - 1:
        sampler = trainer.save_weights_and_get_sampling_client(f"at-{step}")
        report("save_weights_for_sampler", step=step)
        params = SamplingParams(max_tokens=8, temperature=1.0, seed=step)
        sampled = sampler.sample(ModelInput.from_ints([5, 6, 7, 8]), sampling_params=params)
        report("sample", tokens=list(sampled.sequences[0].tokens))
    if step % SAVE_EVERY == SAVE_EVERY - 1:
        trainer.save_state(f"state-{step}").result()
        report("save_state", step=step)
trainer.save_state("end").result()
report("save_state", step=STEPS)
