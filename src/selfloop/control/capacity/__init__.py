"""Capacity and its statuses: workers, what the hardware has, which capacity a run or sampler gets."""
