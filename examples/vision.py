"""Teach a model to name colours: train on pictures with the official Loops client, then ask with the ``openai`` client.

    pip install baseten-loops openai jinja2
    export LOOPS_BASE_URL=http://127.0.0.1:8000        # as for quickstart.py
    export BASETEN_API_KEY=...
    export HF_ENDPOINT=http://127.0.0.1:8000/hf
    python examples/vision.py --base-model google/gemma-3-4b-it        # or Qwen/Qwen3.5-2B

The server writes each conversation by the model's own chat template and says which tokens it is (``/tokenize``). So a
picture is trained on at exactly the place where a chat will have it.
"""

import argparse
import base64
import os
import random
import struct
import zlib

import httpx
from baseten.loops import AdamParams, Datum, ModelInput, ServiceClient, TensorData
from baseten.loops.models import EncodedTextChunk, ImageChunk
from openai import OpenAI

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 210), "yellow": (230, 210, 40)}
QUESTION = "Which colour is this? Answer with one word."
# What stands for an image among the tokens of Qwen3.5 and of Gemma 3.
PLACEHOLDERS = ("<|image_pad|>", "<image_soft_token>")
SERVER, KEY = os.environ["LOOPS_BASE_URL"].rstrip("/"), os.environ["BASETEN_API_KEY"]


def png(colour: tuple[int, ...], side: int = 64) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(colour) * side) * side)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def shade(name: str, chance: random.Random) -> bytes:
    """A picture of a colour that is nearly the one of this name."""
    return png(tuple(min(255, max(0, part + chance.randint(-30, 30))) for part in COLOURS[name]))


def messages(picture: bytes) -> list[dict]:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def to_datum(base_model: str, tokenizer, picture: bytes, name: str) -> Datum:
    """Position i predicts token i + 1; -100 leaves the prompt out of the loss."""
    body = {"model": base_model, "messages": messages(picture)}
    reply = httpx.post(f"{SERVER}/tokenize", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
    prompt = reply.raise_for_status().json()["tokens"]
    ids = [tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS if token in tokenizer.get_vocab()]
    start = next(at for at, token in enumerate(prompt) if token in ids)
    num = prompt.count(prompt[start])
    answer = tokenizer.encode(name + tokenizer.eos_token, add_special_tokens=False)
    chunks = [
        EncodedTextChunk(tokens=prompt[:start]),
        ImageChunk.from_bytes(picture, "png", expected_tokens=num),
        EncodedTextChunk(tokens=(prompt[start + num :] + answer)[:-1]),
    ]
    targets = [-100] * (len(prompt) - 1) + answer
    return Datum(
        model_input=ModelInput(chunks=chunks),
        loss_fn_inputs={"target_tokens": TensorData.from_list(targets, dtype="int64")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a model to name colours.")
    parser.add_argument("--base-model", default="google/gemma-3-4b-it")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--shades", type=int, default=4, help="pictures of each colour")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()

    trainer = ServiceClient().create_lora_training_client(base_model=args.base_model, rank=args.rank, seed=0)
    tokenizer, chance = trainer.get_tokenizer(), random.Random(0)
    names = [name for name in COLOURS for _ in range(args.shades)]
    data = [to_datum(args.base_model, tokenizer, shade(name, chance), name) for name in names]
    print(f"Run {trainer.run_id} on {args.base_model}: {len(data)} pictures", flush=True)
    adam = AdamParams(learning_rate=args.learning_rate)
    for step in range(1, args.steps + 1):
        forward_backward = trainer.forward_backward(data, loss_fn="cross_entropy")
        trainer.optim_step(adam).result()
        print(f"  step {step:>3}/{args.steps}   loss {forward_backward.result().loss:6.3f}", flush=True)
    trainer.save_weights_for_sampler("colours").result()

    chat = OpenAI(base_url=f"{SERVER}/oai/api/v1", api_key=KEY)
    model, right = f"bt://loops:{trainer.run_id}/sampler_weights/colours", 0
    for name in COLOURS:
        # A shade that was not trained on.
        asked = messages(shade(name, chance))
        answer = chat.chat.completions.create(model=model, messages=asked, max_tokens=8, temperature=0.0)
        said = answer.choices[0].message.content.strip().lower()
        right += said == name
        print(f"  {name:<8} {said}")
    print(f"{right} of {len(COLOURS)} right")


if __name__ == "__main__":
    main()
