"""How much memory a computation takes at its most."""

import gc
import itertools
from collections.abc import Callable

import torch


def peak_bytes(act: Callable[[], object]) -> int:
    """The most that tensors took at a time beyond what they took before, as PyTorch's own profiler counts it."""
    gc.collect()  # what belongs to nobody is not to go meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))
