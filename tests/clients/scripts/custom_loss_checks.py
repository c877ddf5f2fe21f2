"""Runs in the official client's own Python, with PyTorch: ``forward_backward_custom`` as it is.

Prints one JSON object: ``grad_norms`` of one step by hand and through the client, and the ``losses``
of a short training.
"""

import asyncio
import json

import torch
from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData

MODEL = "tiny/llama"
GOAL = -2.0


def datum(seed: int, length: int) -> Datum:
    tokens = [3 + (seed * 37 + i * i * 11 + i * 5) % 250 for i in range(length + 1)]
    targets = [-100, *tokens[2:]]
    inputs = {"target_tokens": TensorData.from_list(targets, dtype="int64")}
    return Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def squared_margin(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Length-normalised; the client gives 0 where a target is masked."""
    means = torch.stack([row[1:].mean() for row in logprobs])
    loss = torch.relu(GOAL - means).square().mean()
    return loss, {"custom_loss": loss.item()}


def check_any_torch_loss_trains() -> dict[str, list[float]]:
    client = ServiceClient().create_lora_training_client(MODEL, rank=8, seed=1)
    data = [datum(1, 16), datum(2, 9)]
    # By hand: the same gradient as weights of cross entropy.
    config = {"skip_token_normalization": True}
    outputs = client.forward(data, "cross_entropy", loss_fn_config=config).result().loss_fn_outputs
    rows = [torch.nan_to_num(output["logprobs"].to_torch(), nan=0.0).requires_grad_() for output in outputs]
    squared_margin(data, rows)[0].backward()
    weighted = [
        one.model_copy(
            update={"loss_fn_inputs": one.loss_fn_inputs | {"weights": TensorData.from_list((-row.grad).tolist())}}
        )
        for one, row in zip(data, rows, strict=True)
    ]
    still = AdamParams(learning_rate=0.0)
    norms: list[float] = []
    client.forward_backward(weighted, "cross_entropy", loss_fn_config=config).result()
    norms.append(client.optim_step(still).result().metrics["grad_norm"])
    client.forward_backward_custom(data, squared_margin).result()
    norms.append(client.optim_step(still).result().metrics["grad_norm"])
    losses: list[float] = []
    for _ in range(20):
        losses.append(client.forward_backward_custom(data, squared_margin).result().metrics["custom_loss"])
        client.optim_step(AdamParams(learning_rate=1e-2)).result()

    async def once_more() -> float:
        result = await (await client.forward_backward_custom_async(data, squared_margin)).result_async()
        return result.metrics["custom_loss"]

    losses.append(asyncio.run(once_more()))
    return {"grad_norms": norms, "losses": losses}


if __name__ == "__main__":
    print(json.dumps(check_any_torch_loss_trains()))
