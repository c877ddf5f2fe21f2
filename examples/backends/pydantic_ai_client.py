"""Pydantic AI: an agent whose output is a type, by the JSON schema that the server's grammar obeys."""

import sys
from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.settings import ModelSettings


class Animal(BaseModel):
    legs: Literal[2, 4, 6, 8]
    can_fly: bool


agent = Agent(
    OpenAIChatModel(sys.argv[1]),
    output_type=NativeOutput(Animal),
    model_settings=ModelSettings(max_tokens=200, seed=1),
)
print(agent.run_sync("A spider").output)
