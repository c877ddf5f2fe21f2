"""The openai client: a chat whose answer is a number, by a JSON schema, and the same text as it comes.

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is: `selfloop exec` sets them.
"""

import json
import sys

import openai

model = sys.argv[1]
client = openai.OpenAI()
schema = {
    "type": "object",
    "properties": {"legs": {"type": "integer"}},
    "required": ["legs"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "How many legs has a spider?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "legs", "schema": schema, "strict": True}},
    max_completion_tokens=64,
    seed=1,
)
print("legs:", json.loads(answer.choices[0].message.content or "")["legs"])

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=12, seed=1, stream=True
)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
print(len(pieces), "pieces")
