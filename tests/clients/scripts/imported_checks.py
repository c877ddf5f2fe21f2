"""Runs in the official client's own Python: goes on from the imported checkpoint whose URI is the argument.

Prints one JSON object: the logprobs at the start, the losses of two steps, and how loading the optimizer failed.
"""

import json
import sys

from baseten.loops import AdamParams, Datum, ModelInput, RemoteOpError, ServiceClient, TensorData


def main(uri: str, tokens: list[int]) -> None:
    client = ServiceClient().create_training_client_from_state(uri)
    datum = Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": TensorData.from_list(tokens[1:], dtype="int64")},
    )
    start = client.forward([datum], loss_fn="cross_entropy").result()
    losses: list[float] = []
    for _ in range(2):
        losses.append(client.forward_backward([datum], loss_fn="cross_entropy").result().loss)
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
    try:
        client.load_state_with_optimizer(uri).result()
        refusal = ""
    except RemoteOpError as error:
        refusal = str(error)
    logprobs = start.loss_fn_outputs[0]["logprobs"].data
    print(json.dumps({"logprobs": list(logprobs), "losses": losses, "refusal": refusal}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
