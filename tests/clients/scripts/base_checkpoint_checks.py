"""Runs in the official client's own Python: a run on the base checkpoint of the first argument.

Prints one JSON object with what the client saw.
"""

import json
import sys

from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData

MODEL = "tiny/llama"
TOKENS = [3 + (i * i * 11 + i * 5) % 250 for i in range(12)]


def datum() -> Datum:
    targets = TensorData.from_list(TOKENS[1:], dtype="int64")
    return Datum(model_input=ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": targets})


def refusal(service: ServiceClient) -> str:
    try:
        service.create_lora_training_client(base_model=MODEL, rank=8, base_checkpoint="hf://org/tiny@unknown")
    except Exception as error:
        return str(error)
    raise AssertionError("an unknown base checkpoint was taken")


def main() -> None:
    service = ServiceClient()
    trainer = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1, base_checkpoint=sys.argv[1])
    tokenizer = trainer.get_tokenizer()
    trainer.forward_backward([datum()], "cross_entropy").result()
    trainer.optim_step(AdamParams(learning_rate=1e-2)).result()
    trained = trainer.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    sampler = trainer.save_weights_and_get_sampling_client("live")
    said = {
        "base_checkpoint": trainer.base_checkpoint,
        "text": tokenizer.decode(tokenizer.encode("Ahoy!")),
        "trained": trained,
        "sampled": sampler.compute_logprobs(ModelInput.from_ints(TOKENS))[1:],
        "refusal": refusal(service),
    }
    print(json.dumps(said))


main()
