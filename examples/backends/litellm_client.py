"""LiteLLM: the server is an OpenAI-compatible provider, so its models are named `openai/<model>`."""

import os
import sys

# Its table of prices would be fetched from elsewhere at import.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm

model = f"openai/{sys.argv[1]}"
messages = [{"role": "user", "content": "Hello"}]
answer = litellm.completion(model=model, messages=messages, max_tokens=12, seed=1)
print(answer.usage.completion_tokens, "tokens,", answer.choices[0].finish_reason)
pieces = list(litellm.completion(model=model, messages=messages, max_tokens=12, seed=1, stream=True))
print(len(pieces), "pieces")
