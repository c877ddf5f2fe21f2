"""Qwen3.5 through the cookbook's own renderer: conversations and a tool call are taught, sampled and read back.

Prints one JSON object.
"""

import json

import tinker
from tinker_cookbook.model_info import get_recommended_renderer_name
from tinker_cookbook.renderers import ToolCall, TrainOnWhat, get_renderer
from tinker_cookbook.supervised.data import conversation_to_datum

BASE_MODEL = "Qwen/Qwen3.5-4B"
STEPS = 40
LOOK_UP = {
    "name": "look_up",
    "description": "Looks up the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}


training_client = tinker.ServiceClient().create_lora_training_client(base_model=BASE_MODEL, rank=16)
tokenizer = training_client.get_tokenizer()
renderer_name = get_recommended_renderer_name(BASE_MODEL)
renderer = get_renderer(renderer_name, tokenizer)

call = ToolCall(
    function=ToolCall.FunctionBody(name="look_up", arguments=json.dumps({"city": "Paris", "days": 2})), id="1"
)
thought = {"type": "thinking", "thinking": "One and one."}
asked = [{"role": "user", "content": "1 + 1?"}]
with_tools = [
    *renderer.create_conversation_prefix_with_tools([LOOK_UP], "Be brief."),
    {"role": "user", "content": "Weather?"},
]
answered = [*asked, {"role": "assistant", "content": [thought, {"type": "text", "text": "Two."}]}]
called = [*with_tools, {"role": "assistant", "content": "", "tool_calls": [call]}]

data = [
    conversation_to_datum(conversation, renderer, max_length=2048, train_on_what=TrainOnWhat.LAST_ASSISTANT_MESSAGE)
    for conversation in (answered, called)
]
losses = []
for _ in range(STEPS):
    forward_backward = training_client.forward_backward(data, "cross_entropy")
    optim_step = training_client.optim_step(tinker.AdamParams(learning_rate=5e-3))
    outputs = forward_backward.result().loss_fn_outputs
    optim_step.result()
    weights = [datum.loss_fn_inputs["weights"].tolist() for datum in data]
    logprobs = [output["logprobs"].tolist() for output in outputs]
    products = [w * x for ws, xs in zip(weights, logprobs, strict=True) for w, x in zip(ws, xs, strict=True)]
    losses.append(-sum(products) / sum(map(sum, weights)))

sampling_client = training_client.save_weights_and_get_sampling_client(name="renderer")
params = tinker.SamplingParams(max_tokens=80, temperature=0.0, stop=renderer.get_stop_sequences())
read = []
for conversation in (asked, with_tools):
    prompt = renderer.build_generation_prompt(conversation)
    (sequence,) = sampling_client.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences
    message, termination = renderer.parse_response(sequence.tokens)
    calls = [[c.function.name, json.loads(c.function.arguments)] for c in message.get("tool_calls", [])]
    read.append({"content": message["content"], "calls": calls, "clean": termination.is_clean})

report = {
    "renderer": renderer_name,
    "losses": losses,
    "read": read,
    "ours": tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False),
    "theirs": renderer.build_generation_prompt(asked).to_ints(),
}
print(json.dumps(report))
