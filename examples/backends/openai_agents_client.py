"""The OpenAI Agents SDK over chat completions. Its traces go to OpenAI unless they are switched off."""

import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)
agent = Agent(
    name="helper",
    instructions="Answer in one sentence.",
    model=OpenAIChatCompletionsModel(model=sys.argv[1], openai_client=AsyncOpenAI()),
    model_settings=ModelSettings(max_tokens=12),
)
result = Runner.run_sync(agent, "Hello", max_turns=1)
print(len(result.raw_responses), "answer,", result.raw_responses[0].usage.output_tokens, "tokens")
