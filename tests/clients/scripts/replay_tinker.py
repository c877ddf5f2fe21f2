"""Router replay by the official Tinker SDK, in its own Python, against the server in the environment.

Prints one JSON object of what it saw.
"""

import json
from typing import Any

import numpy as np
import tinker
from tinker import types

PROMPT = [3 + (i * i * 11 + i * 5) % 250 for i in range(20)]


def datum(tokens: list[int], id: str | None = None) -> types.Datum:
    targets = types.TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64))
    made = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})
    if id is None:
        return made
    num_prompt, num_sampled = len(PROMPT), len(tokens) - len(PROMPT)
    prompt, sampled = types.PromptProvenanceSpan, types.SampledProvenanceSpan
    return made.with_provenance(
        model_input=[prompt(sequence_id=id, length=num_prompt), sampled(sequence_id=id, length=num_sampled - 1)],
        loss_fn_inputs=[
            prompt(sequence_id=id, offset=1, length=num_prompt - 1),
            sampled(sequence_id=id, length=num_sampled),
        ],
    )


def logprobs(trainer: Any, data: types.Datum) -> list[float]:
    output = trainer.forward([data], "cross_entropy").result().loss_fn_outputs[0]
    return [float(value) for value in output["logprobs"].tolist()]


def main() -> None:
    trainer = tinker.ServiceClient().create_lora_training_client(base_model="tiny/experts", rank=8, seed=1)
    sampler = trainer.save_weights_and_get_sampling_client(record_stability_info=True)
    params = types.SamplingParams(max_tokens=10, seed=4, stop=[])
    (sequence,) = sampler.sample(types.ModelInput.from_ints(PROMPT), 1, params).result().sequences
    whole = PROMPT + list(sequence.tokens)
    before = logprobs(trainer, datum(whole, sequence.sequence_id))
    for _ in range(6):
        backward = trainer.forward_backward([datum(PROMPT[::-1])], "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=0.1)).result()
        backward.result()
    report = {
        "sampled": [float(value) for value in sequence.logprobs],
        "before": before[len(PROMPT) - 1 :],
        "after": logprobs(trainer, datum(whole)),
        "again": logprobs(trainer, datum(whole, sequence.sequence_id)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
