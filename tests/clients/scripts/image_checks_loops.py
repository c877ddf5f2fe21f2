"""Runs in the official Loops client's own Python: trains on a picture and asks about it. Prints null or the trouble.

Arguments: the model, a PNG file, the number of its tokens.
"""

import json
import sys
import traceback
from pathlib import Path

from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData
from baseten.loops.models import EncodedTextChunk, ImageChunk

QUESTION, ANSWER = [40, 41, 42], [50, 51, 2]


def main() -> None:
    model, data, num = sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
    client = ServiceClient().create_lora_training_client(base_model=model, rank=8, seed=1)
    prompt = [
        EncodedTextChunk(tokens=QUESTION),
        ImageChunk.from_bytes(data, "png", expected_tokens=num),
        EncodedTextChunk(tokens=[45]),
    ]

    def datum(answer: list[int]) -> Datum:
        rest = len(QUESTION) + num
        return Datum(
            model_input=ModelInput(chunks=[*prompt, EncodedTextChunk(tokens=answer[:-1])]),
            loss_fn_inputs={"target_tokens": TensorData.from_list([-100] * rest + answer, dtype="int64")},
        )

    losses = []
    for _ in range(15):
        result = client.forward_backward([datum(ANSWER)], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=2e-2)).result()
        losses.append(result.result().metrics["loss"])
    assert losses[-1] < 0.5 * losses[0], losses
    sampler = client.save_weights_and_get_sampling_client("asked")
    params = SamplingParams(max_tokens=3, temperature=1.0, seed=1)
    (sequence,) = sampler.sample(ModelInput(chunks=prompt), 1, params).sequences
    trained = client.forward([datum(list(sequence.tokens))], "cross_entropy").result()
    expected = trained.loss_fn_outputs[0]["logprobs"].data[-len(sequence.tokens) :]
    assert all(abs(a - b) < 1e-3 for a, b in zip(sequence.logprobs, expected, strict=True)), (sequence, expected)


if __name__ == "__main__":
    try:
        main()
        print(json.dumps(None))
    except Exception:
        print(json.dumps(traceback.format_exc()))
