"""Tinker's first tutorials with their own model name: look, sample, train, sample. Prints one JSON object."""

import json

import tinker
from tinker import types

BASE_MODEL = "Qwen/Qwen3.5-4B"
EXAMPLES = [("ship", "ip-shay"), ("lamp", "amp-lay"), ("winter", "inter-way"), ("keeper", "eeper-kay")]
STEPS = 12

service_client = tinker.ServiceClient()
models = [model.model_name for model in service_client.get_server_capabilities().supported_models]

sampling_client = service_client.create_sampling_client(base_model=BASE_MODEL)
tokenizer = sampling_client.get_tokenizer()
opening = types.ModelInput.from_ints(tokenizer.encode("The captain sails"))
params = types.SamplingParams(max_tokens=10, temperature=0.9, stop=["\n"])
before = sampling_client.sample(prompt=opening, sampling_params=params, num_samples=3).result()

training_client = service_client.create_lora_training_client(base_model=BASE_MODEL, rank=16)
tokenizer = training_client.get_tokenizer()


def datum_of(word: str, answer: str) -> types.Datum:
    prompt = tokenizer.encode(f"English: {word}\nPig Latin:", add_special_tokens=True)
    completion = tokenizer.encode(f" {answer}\n\n", add_special_tokens=False)
    tokens = prompt + completion
    weights = [0] * len(prompt) + [1] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"weights": weights[1:], "target_tokens": tokens[1:]},
    )


data = [datum_of(word, answer) for word, answer in EXAMPLES]
losses = []
for _ in range(STEPS):
    forward_backward = training_client.forward_backward(data, "cross_entropy")
    optim_step = training_client.optim_step(types.AdamParams(learning_rate=1e-2))
    outputs = forward_backward.result().loss_fn_outputs
    optim_step.result()
    total = num = 0.0
    for datum, output in zip(data, outputs, strict=True):
        weights = datum.loss_fn_inputs["weights"].data
        total -= sum(w * logprob for w, logprob in zip(weights, output["logprobs"].data, strict=True))
        num += sum(weights)
    losses.append(total / num)

trained = training_client.save_weights_and_get_sampling_client(name="pig-latin")
prompt = types.ModelInput.from_ints(tokenizer.encode(f"English: {EXAMPLES[0][0]}\nPig Latin:"))
params = types.SamplingParams(max_tokens=20, temperature=0.0, stop=["\n"])
after = trained.sample(prompt=prompt, num_samples=2, sampling_params=params).result()

report = {
    "models": models,
    "before": [[len(sequence.tokens), len(sequence.logprobs or [])] for sequence in before.sequences],
    "losses": losses,
    "after": [tokenizer.decode(sequence.tokens) for sequence in after.sequences],
}
print(json.dumps(report))
