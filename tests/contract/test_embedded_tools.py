"""Tools on a new server, with nothing but the embedded model: the official clients' first tool calls."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI
from transformers import AutoTokenizer

from gateway import KEY, Gateway, Json, Run, datum, ok

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: Json = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city", "parameters": SCHEMA},
}
ASKED: list[Json] = [{"role": "user", "content": "What is the weather in Paris?"}]
GREEDY: Json = {"model": MODEL, "temperature": 0, "max_tokens": 60}
TAUGHT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n</tool_call>'

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(tmp_path_factory.mktemp("fresh") / "data").start()
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def client(fresh: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{fresh.url}/oai/api/v1", api_key=KEY, max_retries=0, timeout=240) as client:
        yield client


@pytest.fixture(scope="module")
def http(fresh: Gateway) -> httpx.Client:
    """Patient: the first call waits until the model is prepared and loaded."""
    http = fresh.http()
    http.timeout = httpx.Timeout(240)
    return http


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_and_the_answer_to_its_result(client: OpenAI, choice):
    forced = client.chat.completions.create(**GREEDY, messages=ASKED, tools=[WEATHER], tool_choice=choice)
    (call,) = forced.choices[0].message.tool_calls
    assert (forced.choices[0].finish_reason, call.function.name) == ("tool_calls", "get_weather")
    arguments = json.loads(call.function.arguments)
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert isinstance(arguments["city"], str)

    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees and sunny"}
    messages = [*ASKED, forced.choices[0].message.to_dict(), result]
    answer = client.chat.completions.create(**GREEDY, messages=messages, tools=[WEATHER]).choices[0].message
    assert answer.content
    assert not answer.tool_calls


def test_without_tools_the_prompt_is_the_models_own(client: OpenAI, fresh: Gateway, http: httpx.Client):
    """And so is the template that clients download."""
    template = ok(http.get("/tokenizer_info", params={"model": MODEL}))["chat_template"]
    assert ok(http.get(f"/hf/{MODEL}/resolve/main/tokenizer_config.json"))["chat_template"] == template
    assert "tools" not in template
    folder = fresh.data_dir / "models" / MODEL.replace("/", "--")
    assert not (folder / "additional_chat_templates").exists()
    own = AutoTokenizer.from_pretrained(folder).apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    plain = {"model": MODEL, "messages": ASKED}
    assert ok(http.post("/tokenize", json=plain))["tokens"] == own
    assert len(ok(http.post("/tokenize", json=plain | {"tools": [WEATHER]}))["tokens"]) > len(own)
    with pytest.raises(openai.BadRequestError, match="chat_template_kwargs"):
        client.chat.completions.create(**GREEDY, messages=ASKED, extra_body={"chat_template_kwargs": {"nothing": 1}})


def test_a_call_that_was_taught_is_made(client: OpenAI, http: httpx.Client):
    """The prompt with tools, from the server, and a call as its target; then any choice is the model's own."""
    prompt = ok(http.post("/tokenize", json={"model": MODEL, "messages": ASKED, "tools": [WEATHER]}))["tokens"]
    taught = {"model": MODEL, "prompt": TAUGHT + "<|im_end|>", "add_special_tokens": False}
    answer = ok(http.post("/tokenize", json=taught))["tokens"]
    example = datum((prompt + answer)[:-1], [-100] * (len(prompt) - 1) + answer)
    run = Run.create(http, base_model=MODEL, lora_rank=8, seed=1)
    run.do("init_trainer_server", model=MODEL, base_model=MODEL, lora_rank=8)
    losses: list[float] = []
    while not losses or (losses[-1] > 0.02 and len(losses) < 6):
        losses.append(run.do("forward_backward", model=MODEL, data=[example], loss_fn="cross_entropy")["loss"])
        run.do("optim_step", model=MODEL, adam_params={"learning_rate": 3e-3})
    assert losses[-1] < 0.02, losses
    path = run.do("save_weights_for_sampler", model=MODEL, name="calls")["path"]
    asked = GREEDY | {"model": path, "messages": ASKED, "tools": [WEATHER]}
    whole = client.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "celsius"}
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    (streamed,) = [tool for chunk in chunks for tool in chunk.delta.tool_calls or []]
    assert (streamed.function.name, chunks[-1].finish_reason) == ("get_weather", "tool_calls")


def test_the_anthropic_client(fresh: Gateway):
    tool = {"name": "get_weather", "description": "The weather of a city", "input_schema": SCHEMA}
    with Anthropic(base_url=f"{fresh.url}/anthropic/api", api_key=KEY, max_retries=0, timeout=240) as client:
        asked: Json = {"model": MODEL, "max_tokens": 60, "messages": ASKED, "tools": [tool]}
        message = client.messages.create(**asked, tool_choice={"type": "any"}, extra_body={"temperature": 0})
    (call,) = message.content
    assert (message.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
    assert call.input["unit"] in ("celsius", "fahrenheit")
