"""The Loops quickstart with its own model name: train, save, sample, list, end. Prints one JSON object."""

import json
import os

import httpx
from baseten.loops import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient, TensorData

BASE_MODEL = "Qwen/Qwen3.5-2B"
STEPS = 12

training_client = ServiceClient().create_lora_training_client(base_model=BASE_MODEL, rank=16)
tokenizer = training_client.get_tokenizer()

conversation = [{"role": "user", "content": "What is the capital of France?"}]
prompt_text = tokenizer.apply_chat_template(
    conversation, tokenize=False, add_generation_prompt=True, enable_thinking=False
)
prompt = tokenizer.encode(prompt_text, add_special_tokens=False)
answer = tokenizer.encode("Paris.<|im_end|>", add_special_tokens=False)
targets = [-100] * (len(prompt) - 1) + answer
datum = Datum(
    model_input=ModelInput.from_ints((prompt + answer)[:-1]),
    loss_fn_inputs={"target_tokens": TensorData(data=targets, dtype="int64", shape=[len(targets)])},
)

losses = []
for _ in range(STEPS):
    forward_backward = training_client.forward_backward(data=[datum])
    optim_step = training_client.optim_step(AdamParams(learning_rate=1e-2))
    losses.append(forward_backward.result(timeout=600.0).loss)
    optim_step.result(timeout=600.0)

saved = training_client.save_state(name="step-1").result(timeout=600.0)
sampling_client = training_client.save_weights_and_get_sampling_client(name="quickstart")
response = sampling_client.sample(
    ModelInput.from_ints(prompt), sampling_params=SamplingParams(max_tokens=16, temperature=0.0)
)

headers = {"Authorization": f"Bearer {os.environ['BASETEN_API_KEY']}"}
with httpx.Client(base_url=os.environ["LOOPS_BASE_URL"], headers=headers) as http:
    run_id = training_client.run_id
    over_http = http.get("/v1/loops/checkpoints", params={"run_id": run_id}).raise_for_status().json()
    http.post(f"/v1/loops/runs/{run_id}/deactivate").raise_for_status()
    ended = http.get(f"/v1/loops/runs/{run_id}").raise_for_status().json()["run"]

report = {
    "prompt": prompt_text,
    "specials": tokenizer.convert_tokens_to_ids(["<|im_start|>", "<think>", "</think>", "<tool_call>"]),
    "losses": losses,
    "saved": saved.path,
    "text": response.sequences[0].text,
    "checkpoints": sorted(checkpoint.checkpoint_id for checkpoint in training_client.list_checkpoints()),
    "over_http": sorted(checkpoint["checkpoint_id"] for checkpoint in over_http["checkpoints"]),
    "base_models": sorted({checkpoint["base_model"] for checkpoint in over_http["checkpoints"]}),
    "status": ended["status"]["name"],
}
print(json.dumps(report))
