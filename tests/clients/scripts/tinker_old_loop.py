"""Runs with an older SDK: the basic loop, against the server in the environment. Prints its version and what it saw."""

import json
import warnings

import numpy as np
import tinker
from tinker import types

TOKENS = [5, 90, 40, 33, 77, 12, 60]


def main() -> None:
    warnings.simplefilter("ignore")
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client("tiny/llama", rank=8)
    inputs = {
        "target_tokens": types.TensorData.from_numpy(np.array(TOKENS[1:], dtype=np.int64)),
        "weights": types.TensorData.from_numpy(np.ones(6, dtype=np.float32)),
    }
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=inputs)
    losses: list[float] = []
    for _ in range(8):
        loss = trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(loss.result().metrics["loss:sum"])
    state = trainer.save_state("old").result().path
    sampler = trainer.save_weights_and_get_sampling_client("old")
    prompt = types.ModelInput.from_ints(TOKENS[:1])
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0)
    (sequence,) = sampler.sample(prompt, 1, greedy).result().sequences
    again = service.create_training_client_from_state(state).forward([datum], "cross_entropy").result()
    report = {
        "version": tinker.__version__,
        "model": trainer.get_info().model_data.model_name,
        "losses": losses,
        "state": state,
        "named": trainer.save_weights_for_sampler("named").result().path,
        "tokens": list(sequence.tokens),
        "sampled": list(sequence.logprobs or []),
        "loaded": again.loss_fn_outputs[0]["logprobs"].data,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
