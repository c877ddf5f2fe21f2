"""Runs in a Python that has ``llama-cpp-python``: what llama.cpp makes of GGUF files.

    python llama_cpp_checks.py < REQUESTS

Stdin is a JSON list of ``{"path", "ids", "text"}``; stdout a JSON list of what each gives: ``logits`` of every position
of ``ids``, ``tokens`` of ``text``, ``greedy`` continuation of ``ids`` by eight tokens, and ``chat_template``.
"""

import json
import sys

from llama_cpp import Llama

F32 = 0


def read(path: str, ids: list[int], text: str) -> dict[str, object]:
    model = Llama(path, n_ctx=128, logits_all=True, verbose=False, type_k=F32, type_v=F32, n_threads=1)
    model.eval(ids)
    logits = model.scores[: len(ids)].tolist()
    greedy: list[int] = []
    for _ in range(8):
        greedy.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(greedy[-1:])
    return {
        "logits": logits,
        "tokens": model.tokenize(text.encode()),
        "greedy": greedy,
        "chat_template": model.metadata.get("tokenizer.chat_template"),
    }


if __name__ == "__main__":
    print(json.dumps([read(**request) for request in json.load(sys.stdin)]))
