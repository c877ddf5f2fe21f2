"""Runs in the official client's own Python, against a server that has both kinds of capacity.

``BASETEN_LOOPS_SCOPE`` is set to serverless. Prints one JSON object with what the client saw.
"""

import json

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from baseten.loops.sampling_client import BasetenDeployment, ServerlessDeployment
from baseten.loops.trainer_deployment import DedicatedTrainerDeployment, ServerlessTrainerDeployment

MODEL = "tiny/llama"
TOKENS = [3 + (i * i * 11 + i * 5) % 250 for i in range(12)]
PARAMS = SamplingParams(max_tokens=6, temperature=0)


def trained(scope: str | None) -> list[object]:
    """The kinds of capacity that the client saw, and what it sampled from what it had trained."""
    trainer = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1, scope=scope)
    targets = TensorData.from_list(TOKENS[1:], dtype="int64")
    datum = Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": targets})
    trainer.forward_backward([datum], "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    sampler = trainer.save_weights_and_get_sampling_client("scoped")
    sampled = sampler.sample(ModelInput.from_ints(TOKENS), 1, PARAMS).sequences[0].tokens
    return [type(trainer._deployment).__name__, type(sampler._deployment).__name__, sampled]


def refusal() -> str:
    try:
        service.create_lora_training_client(base_model=MODEL, rank=16, scope="serverless")
    except Exception as error:  # whatever the client makes of it is what its user sees
        return str(error)
    return "none"


service = ServiceClient()
by_variable, by_argument, dedicated = trained(None), trained("serverless"), trained("deployment")
expected = [ServerlessTrainerDeployment.__name__, ServerlessDeployment.__name__]
assert by_variable[:2] == by_argument[:2] == expected, (by_variable, by_argument)
assert dedicated[:2] == [DedicatedTrainerDeployment.__name__, BasetenDeployment.__name__], dedicated
samplers = [
    service.create_sampling_client(base_model=MODEL, scope=scope) for scope in (None, "serverless", "deployment")
]
print(
    json.dumps(
        {
            "sampled": [by_variable[2], by_argument[2], dedicated[2]],
            "samplers": [type(sampler._deployment).__name__ for sampler in samplers],
            "base": [s.sample(ModelInput.from_ints(TOKENS), 1, PARAMS).sequences[0].tokens for s in samplers],
            "refusal": refusal(),
        }
    )
)
