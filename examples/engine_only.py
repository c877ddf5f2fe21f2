"""The engine alone, without a server: train three question-answer pairs and sample from the result.

    python examples/engine_only.py MODEL_DIR

MODEL_DIR is a Hugging Face folder: config.json, *.safetensors, tokenizer.json.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer

from selfloop.engine import Engine
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams

PAIRS = [
    ("Q: Who keeps the lighthouse?\nA:", " Captain Mara."),
    ("Q: What colour is the door?\nA:", " Green."),
    ("Q: Where is the key?\nA:", " Under the third stone."),
]

model_dir = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
engine = Engine.load(model_dir)
end_token = engine.info.eos_token_ids[0]


def datum(question: str, answer: str) -> Datum:
    """Learn the answer and the end token; the question is masked."""
    prompt = tokenizer.encode(question).ids
    ids = [*prompt, *tokenizer.encode(answer, add_special_tokens=False).ids, end_token]
    targets = [IGNORED_TARGET] * (len(prompt) - 1) + ids[len(prompt) :]
    return Datum(Tensor.of(ids[:-1], "int64"), {"target_tokens": Tensor.of(targets, "int64")})


engine.init_run("run", rank=16, seed=0)
data = [datum(question, answer) for question, answer in PAIRS]
for step in range(15):
    loss = engine.forward_backward("run", data, "cross_entropy", {}).loss
    engine.optim_step("run", AdamParams(learning_rate=1e-3))
    print(f"step {step:2}  loss {loss:.4f}")

engine.publish("run", "trained")
params = SamplingParams(max_tokens=16, temperature=0)
for question, _ in PAIRS:
    prompt = tokenizer.encode(question).ids
    engine.submit_sample(SampleRequest(question, prompt, 1, params, AdapterRef("trained", "")))
while engine.num_sampling:
    for result in engine.sample_step():
        print(result.request_id, tokenizer.decode(result.sequences[0].tokens))
