"""The anthropic client: a message, whole and as it comes.

ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY say where the server is: `selfloop exec` sets them.
"""

import sys

import anthropic

model = sys.argv[1]
client = anthropic.Anthropic()
answer = client.messages.create(model=model, max_tokens=12, messages=[{"role": "user", "content": "Hello"}])
print(answer.usage.output_tokens, "tokens,", answer.stop_reason)
with client.messages.stream(model=model, max_tokens=12, messages=[{"role": "user", "content": "Hello"}]) as stream:
    print(sum(1 for _ in stream.text_stream), "pieces")
