"""Training steps in the engine itself, on demand: the other half of bench/overhead.py.

python bench/steps_engine.py MODEL_DIR
"""

import json
import random
import sys
import time
from pathlib import Path

from selfloop.engine.engine import Engine
from selfloop.types.datum import Datum, Tensor
from selfloop.types.operation import AdamParams

BATCH, LENGTH, RANK, VOCAB_SIZE = 8, 256, 32, 49152


def batch() -> list[Datum]:
    """The same tokens as bench/steps_client.py."""
    draw = random.Random(0)
    sequences = [[draw.randrange(VOCAB_SIZE) for _ in range(LENGTH + 1)] for _ in range(BATCH)]
    return [Datum(Tensor.of(s[:-1], "int64"), {"target_tokens": Tensor.of(s[1:], "int64")}) for s in sequences]


engine = Engine.load(Path(sys.argv[1]))
engine.init_run("bench", rank=RANK, seed=0)
data = batch()
for line in sys.stdin:
    what, num = line.split()
    assert what == "steps", what
    started = time.perf_counter()
    for _ in range(int(num)):
        engine.forward_backward("bench", data, "cross_entropy", {})
        engine.optim_step("bench", AdamParams())
    seconds = time.perf_counter() - started
    print(json.dumps({"num_tokens": int(num) * BATCH * LENGTH, "seconds": seconds}), flush=True)
