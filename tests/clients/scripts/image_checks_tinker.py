"""Runs in the Tinker SDK's own Python: trains on a picture and asks about it. Prints null or the trouble.

Arguments: the model, a PNG file, the number of its tokens.
"""

import json
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import tinker
from tinker import types

QUESTION, ANSWER = [40, 41, 42], [50, 51, 2]


def main() -> None:
    model, data, num = sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
    client = tinker.ServiceClient().create_lora_training_client(base_model=model, rank=8, seed=1).result()
    prompt = [
        types.EncodedTextChunk(tokens=QUESTION),
        types.ImageChunk(data=data, format="png", expected_tokens=num),
        types.EncodedTextChunk(tokens=[45]),
    ]

    def datum(answer: list[int]) -> types.Datum:
        rest = len(QUESTION) + num
        targets = np.array([0] * rest + answer, dtype=np.int64)
        weights = np.array([0] * rest + [1] * len(answer), dtype=np.float32)
        return types.Datum(
            model_input=types.ModelInput(chunks=[*prompt, types.EncodedTextChunk(tokens=answer[:-1])]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(targets),
                "weights": types.TensorData.from_numpy(weights),
            },
        )

    losses = []
    for _ in range(15):
        result = client.forward_backward([datum(ANSWER)], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=2e-2)).result()
        losses.append(-sum(result.loss_fn_outputs[0]["logprobs"].data[-len(ANSWER) :]))
    assert losses[-1] < 0.5 * losses[0], losses
    sampler = client.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=3, temperature=1.0, seed=1)
    (sequence,) = sampler.sample(types.ModelInput(chunks=prompt), 1, params).result().sequences
    trained = client.forward([datum(list(sequence.tokens))], "cross_entropy").result()
    expected = trained.loss_fn_outputs[0]["logprobs"].data[-len(sequence.tokens) :]
    assert all(abs(a - b) < 1e-3 for a, b in zip(sequence.logprobs, expected, strict=True)), (sequence, expected)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        main()
        print(json.dumps(None))
    except Exception:
        print(json.dumps(traceback.format_exc()))
