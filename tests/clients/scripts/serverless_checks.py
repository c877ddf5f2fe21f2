"""Runs in the official client's own Python, against a server that answers as serverless capacity.

Prints one JSON object with what the client saw.
"""

import asyncio
import json

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from baseten.loops.sampling_client import ServerlessDeployment
from baseten.loops.trainer_deployment import ServerlessTrainerDeployment

MODEL = "tiny/llama"
TOKENS = [3 + (i * i * 11 + i * 5) % 250 for i in range(12)]


def datum() -> Datum:
    targets = TensorData.from_list(TOKENS[1:], dtype="int64")
    return Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": targets})


def main() -> None:
    service = ServiceClient()
    trainer = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1)
    assert isinstance(trainer._deployment, ServerlessTrainerDeployment)
    for _ in range(2):
        trainer.forward_backward([datum()], "cross_entropy").result()
        trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    trained = trainer.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    sampler = trainer.save_weights_and_get_sampling_client("live")
    assert isinstance(sampler._deployment, ServerlessDeployment)
    assert sampler.checkpoint_path is not None
    params = SamplingParams(max_tokens=8, seed=3, temperature=0.8)
    prompt = ModelInput.from_ints(TOKENS)
    first, again = (sampler.sample(prompt, 2, params, affinity_key="group") for _ in range(2))
    logprobs = sampler.compute_logprobs(prompt)
    base = service.create_sampling_client(base_model=MODEL)
    assert isinstance(base._deployment, ServerlessDeployment)

    async def many() -> list[int]:
        answers = await asyncio.gather(*(sampler.sample_async(prompt, 1, params) for _ in range(30)))
        return [len(answer.sequences[0].tokens) for answer in answers]

    print(
        json.dumps(
            {
                "trained": trained,
                "sampled": logprobs[1:],
                "base": base.compute_logprobs(prompt)[1:],
                "tokens": [[sequence.tokens for sequence in answer.sequences] for answer in (first, again)],
                "many": asyncio.run(many()),
                "adapter": sampler.discover_adapter_name(),
                "path": sampler.checkpoint_path,
            }
        )
    )


main()
