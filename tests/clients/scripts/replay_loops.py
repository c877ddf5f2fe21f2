"""Router replay by the official Loops client, in its own Python, against the server in the environment.

Prints one JSON object of what it saw.
"""

import json
from typing import Any

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from baseten.loops.models import ExternalRef

PROMPT = [3 + (i * i * 11 + i * 5) % 250 for i in range(20)]


def logprobs(trainer: Any, *data: Datum) -> list[list[float]]:
    outputs = trainer.forward(list(data), "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].tolist() for output in outputs]


def datum(tokens: list[int], routes: ExternalRef | None = None) -> Datum:
    targets = TensorData.from_list(tokens[1:], dtype="int64")
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets},
        routed_experts_ref=routes,
    )


def main() -> None:
    trainer = ServiceClient().create_lora_training_client(base_model="tiny/experts", rank=8, seed=1)
    sampler = trainer.save_weights_and_get_sampling_client("before")
    params = SamplingParams(max_tokens=10, seed=4)
    answer = sampler.sample(ModelInput.from_ints(PROMPT), 2, params, include_routed_experts=True)
    plain = sampler.sample(ModelInput.from_ints(PROMPT), 1, params)
    wholes = [PROMPT + sequence.tokens for sequence in answer.sequences]
    natural = [datum(whole) for whole in wholes]
    replayed = [datum(whole, s.routed_experts) for whole, s in zip(wholes, answer.sequences, strict=True)]
    before = logprobs(trainer, *replayed)
    for _ in range(6):
        backward = trainer.forward_backward([datum(PROMPT[::-1])], "cross_entropy")
        trainer.optim_step(AdamParams(learning_rate=0.1)).result()
        backward.result()
    after, again = logprobs(trainer, *natural), logprobs(trainer, *replayed)
    trained = trainer.forward_backward(replayed, "cross_entropy").result()
    norm = trainer.optim_step(AdamParams()).result().metrics["grad_norm"]
    try:
        trainer.forward(
            [datum(wholes[0], ExternalRef(uri="bt://loops:aaaaaaa/sequences/a/b/0", version=1))], "cross_entropy"
        ).result()
        refused = ""
    except Exception as error:
        refused = str(error)
    report = {
        "refs": [s.routed_experts.uri for s in answer.sequences],
        "plain": plain.sequences[0].routed_experts is None,
        "sampled": [s.logprobs for s in answer.sequences],
        "before": [row[len(PROMPT) - 1 :] for row in before],
        "after": after,
        "again": again,
        "metrics": trained.metrics,
        "norm": norm,
        "refused": refused,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
