"""One pass of the model, forward and backward, for the micro-batches of one run or of many."""

from collections.abc import Sequence

import torch

from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.attention import ApartAttention, Attention, PackedCausalAttention
from selfloop.engine.models.decoder import Decoder, positions_of
from selfloop.engine.train.job import LossJob


def fitting(jobs: Sequence[LossJob], token_budget: int) -> list[LossJob]:
    """The first job, and those after it whose next micro-batch fits the same pass."""
    chosen: list[LossJob] = []
    room = token_budget
    for job in jobs:
        if not chosen or (job.num_next_tokens <= room and job.with_gradient == chosen[0].with_gradient):
            chosen.append(job)
            room -= job.num_next_tokens
    return chosen


def advance(decoder: Decoder, jobs: Sequence[LossJob], *, deterministic: bool) -> None:
    """Take the next micro-batch of each job through the model, all in one pass.

    Every row meets the adapter of its own run only, and every loss its own rows: what is not finite stays in its job.
    With ``deterministic`` every product and every attention is of one job's rows only, so that nothing of a job's
    numbers, not even their rounding, depends on the others.
    """
    with_gradient = jobs[0].with_gradient
    assert all(not job.is_done and job.with_gradient == with_gradient for job in jobs)
    parts = [job.take(decoder.dtype) for job in jobs]
    lengths = [length for part in parts for length in part.batch.lengths]
    sizes = [part.batch.tokens_T.shape[0] for part in parts]
    rows = [(size, part.adapter) for size, part in zip(sizes, parts, strict=True)]
    attention: Attention = PackedCausalAttention(lengths)
    if deterministic:
        each = [PackedCausalAttention(part.batch.lengths) for part in parts]
        attention = ApartAttention(list(zip(sizes, each, strict=True)))
    with torch.set_grad_enabled(with_gradient):
        h_TD = decoder.forward(
            torch.cat([part.batch.tokens_T for part in parts]),
            positions_of(lengths, decoder.device),
            attention,
            AdapterBatch.apart(rows) if deterministic else AdapterBatch.of(rows),
        )
        head = decoder.weights.head
        losses = [part.job.loss(part, h_ND, head) for part, h_ND in zip(parts, h_TD.split(sizes), strict=True)]
    trained = [(loss, part) for loss, part in zip(losses, parts, strict=True) if loss is not None]
    if trained:
        grads = torch.autograd.grad([loss for loss, _ in trained], [part.leaf_P for _, part in trained])
        for grad_P, (_, part) in zip(grads, trained, strict=True):
            part.job.add_gradient(part, grad_P)
    for job in jobs:
        job.settle()
