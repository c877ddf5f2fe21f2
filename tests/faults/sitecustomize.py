"""Faults for a real worker: with this folder in PYTHONPATH, some learning rates make an optimizer step go wrong.

Those that go wrong once leave a file in the folder named by FAULTS_DONE, and are plain learning rates from then on.
"""

import importlib.util
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

HANGS_ONCE, DEVICE_FAILS_ONCE, HALF_CHANGES, KILLS = 0.00501, 0.00502, 0.00503, 0.00504
_TARGET = "selfloop.worker.serving.operations"


def _first_time(fault: float) -> bool:
    marker = Path(os.environ["FAULTS_DONE"]) / str(fault)
    if marker.exists():
        return False
    marker.touch()
    return True


def _go_wrong(engine: Any, run_id: str, fault: float) -> None:
    if fault == HANGS_ONCE and _first_time(fault):
        time.sleep(3600)
    elif fault == DEVICE_FAILS_ONCE and _first_time(fault):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif fault == HALF_CHANGES:
        engine._runs[run_id].theta_P.add_(1.0)
        raise MemoryError("no memory for the second moment")
    elif fault == KILLS:
        os.kill(os.getpid(), signal.SIGKILL)


def _spoil(operations: ModuleType) -> None:
    carry_out = operations.carry_out

    def spoiled(engine: Any, staging: Any, context: Any, operation: Any) -> Any:
        adam = getattr(operation, "adam", None)
        if adam is not None:
            _go_wrong(engine, context.run_id, adam.learning_rate)
        return carry_out(engine, staging, context, operation)

    operations.carry_out = spoiled  # type: ignore[attr-defined]


class _Finder:
    """Finds the one module, and spoils it once it is loaded."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _spoil(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "FAULTS_DONE" in os.environ:
    sys.meta_path.insert(0, _Finder())
