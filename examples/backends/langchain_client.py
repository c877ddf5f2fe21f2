"""LangChain: a chat model of langchain-openai, and a structured answer, which the server's grammar keeps valid."""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Animal(BaseModel):
    legs: Literal[2, 4, 6, 8]
    can_fly: bool


chat = ChatOpenAI(model=sys.argv[1], max_completion_tokens=200, seed=1)
print(chat.invoke("Hello").response_metadata["finish_reason"])
print(chat.with_structured_output(Animal, method="json_schema").invoke("A spider"))
