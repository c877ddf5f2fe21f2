"""Instructor: a pydantic model back from a chat, by JSON schema."""

import sys
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Animal(BaseModel):
    legs: Literal[2, 4, 6, 8]
    can_fly: bool


client = instructor.from_openai(OpenAI(), mode=instructor.Mode.JSON_SCHEMA)
print(
    client.chat.completions.create(
        model=sys.argv[1],
        messages=[{"role": "user", "content": "A spider"}],
        response_model=Animal,
        max_tokens=200,
        max_retries=0,
        seed=1,
    )
)
