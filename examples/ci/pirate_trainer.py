"""Somebody's training loop with the Tinker client: it knows nothing of Selfloop.

python pirate_trainer.py Qwen/Qwen3.5-4B
"""

import sys

import tinker
from tinker import types

PAIRS = [("Hello.", "Ahoy!"), ("Yes.", "Aye!"), ("Friend.", "Matey!")]


def datum_of(tokenizer, question: str, answer: str) -> types.Datum:
    """The answer is learned, the question is not."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    completion = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def mean_loss(data: list[types.Datum], outputs) -> float:
    """Nats a token that is learned."""
    weights = [weight for datum in data for weight in datum.loss_fn_inputs["weights"].data]
    logprobs = [logprob for output in outputs for logprob in output["logprobs"].data]
    return -sum(w * x for w, x in zip(weights, logprobs, strict=True)) / sum(weights)


def train(base_model: str, steps: int = 30, learning_rate: float = 1e-2) -> tuple[tinker.SamplingClient, list[float]]:
    """A sampling client of the trained weights, and the loss of each step."""
    trainer = tinker.ServiceClient().create_lora_training_client(base_model, rank=8, seed=1)
    tokenizer = trainer.get_tokenizer()
    data = [datum_of(tokenizer, question, answer) for question, answer in PAIRS]
    losses = []
    for _ in range(steps):
        forward_backward = trainer.forward_backward(data, "cross_entropy")
        step = trainer.optim_step(types.AdamParams(learning_rate=learning_rate))
        losses.append(mean_loss(data, forward_backward.result().loss_fn_outputs))
        step.result()
    return trainer.save_weights_and_get_sampling_client("pirate"), losses


def ask(sampler: tinker.SamplingClient, question: str) -> str:
    tokenizer = sampler.get_tokenizer()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    params = types.SamplingParams(max_tokens=20, temperature=0.0)
    (sequence,) = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences
    return tokenizer.decode(sequence.tokens, skip_special_tokens=True)


if __name__ == "__main__":
    trained, losses = train(sys.argv[1])
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; Hello. -> {ask(trained, 'Hello.')}")
