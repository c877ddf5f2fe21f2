"""Writes ``plans.json``: what the models of ``shapes.json`` take of a GPU, as the engine and control plan it.

Run it after a change of what passes, runs or caches take: ``python docs/model_sizes/plan.py``. Bytes are plain numbers;
a gigabyte is 10^9 of them.
"""

import json
from pathlib import Path
from typing import Any

from selfloop.control.queue.run_memory import bytes_open, needed
from selfloop.engine.backends.device import pick_device, pick_dtype
from selfloop.engine.backends.select import plan
from selfloop.engine.fit import Asked, pass_plan
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.registry import parse_spec
from selfloop.types.settings import EngineLimits

HERE = Path(__file__).parent
GIGABYTES = (8, 16, 24, 48, 80, 141)
RANK = 32


def planned(config: dict[str, Any]) -> dict[str, Any]:
    """A model in bfloat16 on GPUs of several sizes: the longest sequence that trains beside the base weights and one
    run, with all that these leave for the pass; and the longest that is sampled beside the base weights."""
    spec, device = parse_spec(config, {}), pick_device("cuda")
    dtype = pick_dtype("auto", device)
    choice, model = plan(spec, device, dtype)
    assert model is not None
    shape = AdapterShape(spec, RANK)
    run_bytes = needed([bytes_open(shape.num_parameters)])
    longest: dict[str, list[int]] = {}
    for gigabytes in GIGABYTES:
        memory_bytes = gigabytes * 10**9
        left = max(0, memory_bytes - model.costs().weights - run_bytes)
        limits = EngineLimits(activation_bytes=left, forward_cache_bytes=0)
        found = pass_plan(model, shape, memory_bytes, Asked(rank=RANK, limits=limits))
        longest[str(gigabytes)] = [found.longest_trained, found.longest_sampled]
    return {
        "backend": choice.backend.name,
        "num_parameters": spec.num_parameters,
        "adapted": shape.module_names,
        "weights_bytes": model.costs().weights,
        "run_bytes": run_bytes,
        "longest": longest,
    }


def main() -> None:
    shapes: dict[str, dict[str, Any]] = json.loads((HERE / "shapes.json").read_text(encoding="utf-8"))
    lines = [f"  {json.dumps(name)}: {json.dumps(planned(config))}" for name, config in shapes.items()]
    (HERE / "plans.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
