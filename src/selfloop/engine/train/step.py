"""One pass of the model, forward and backward, for the micro-batches of one run or of many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfloop.engine.backends.base import Model, Scores, Varlen
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.routing import Mixtures, replayed
from selfloop.engine.train.job import LossJob, LossPart
from selfloop.engine.train.memory import PassMemory
from selfloop.engine.vision.rows import Part, layout

# A forward that is to be kept has a pass of its own if it fills so much of one, or if it is alone in it anyway: a
# graph that several runs share would serve none of them alone.
_FILLS_A_PASS = 0.25


def fitting(jobs: Sequence[LossJob], token_budget: int) -> list[LossJob]:
    """The first job, and those after it whose next micro-batch fits the same pass."""
    if _goes_alone(jobs[0], token_budget):
        return [jobs[0]]
    chosen: list[LossJob] = []
    room = token_budget
    for job in jobs:
        fits = job.num_next_tokens <= room and job.with_gradient == jobs[0].with_gradient
        if not chosen or (fits and not _goes_alone(job, token_budget)):
            chosen.append(job)
            room -= job.num_next_tokens
    return chosen


def _goes_alone(job: LossJob, token_budget: int) -> bool:
    return job.next_is_kept or (job.num_next_tokens >= _FILLS_A_PASS * token_budget and job.next_wants_keeping)


def advance(model: Model, jobs: Sequence[LossJob], memory: PassMemory, *, deterministic: bool) -> None:
    """Take the next micro-batch of each job through the model, all in one pass.

    Every row meets the adapter of its own run only, and every loss its own rows: what is not finite stays in its job.
    With ``deterministic`` every product and every attention is of one job's rows only, so that nothing of a job's
    numbers, not even their rounding, depends on the others. A job whose forward was kept comes alone.
    """
    with_gradient = jobs[0].with_gradient
    assert all(not job.is_done and job.with_gradient == with_gradient for job in jobs)
    if len(jobs) == 1 and jobs[0].next_is_kept:
        scored = [jobs[0].take_kept()]
    else:
        scored = _forward(model, jobs, memory, deterministic=deterministic)
    with torch.set_grad_enabled(with_gradient):
        losses = [(part.job.loss(part, scores), part) for part, scores in scored]
    trained = [(loss, part) for loss, part in losses if loss is not None]
    if trained:
        grads = torch.autograd.grad([loss for loss, _ in trained], [part.leaf_P for _, part in trained])
        for grad_P, (_, part) in zip(grads, trained, strict=True):
            part.job.add_gradient(part, grad_P)
    for job in jobs:
        job.finish()


def _forward(
    model: Model, jobs: Sequence[LossJob], memory: PassMemory, *, deterministic: bool
) -> list[tuple[LossPart, Scores]]:
    """The parts with their targets' scores, which carry a graph where there is a backward, now or later."""
    keeps = len(jobs) == 1 and jobs[0].next_wants_keeping
    with_graph = jobs[0].with_gradient or keeps
    parts = [job.take(model.dtype, with_graph=with_graph) for job in jobs]
    lengths = [length for part in parts for length in part.batch.lengths]
    sizes = [part.batch.tokens_T.shape[0] for part in parts]
    rows = [(size, part.adapter) for size, part in zip(sizes, parts, strict=True)]
    widest = max((job.run.shape for job in jobs), key=lambda shape: shape.rank)
    with torch.set_grad_enabled(with_graph):
        sequences = zip(lengths, (images for part in parts for images in part.batch.images), strict=True)
        laid_out = layout([Part(0, length, images) for length, images in sequences], model.device)
        mixed = [(size, part.batch.experts_TLK) for size, part in zip(sizes, parts, strict=True)]
        routing = replayed(Mixtures.of(model.spec), mixed, model.device)
        batch = Varlen.whole(torch.cat([part.batch.tokens_T for part in parts]), lengths, routing, *laid_out)
        lora = AdapterBatch.batch_invariant(rows) if deterministic else AdapterBatch.of(rows)
        recompute = with_graph and memory.recomputes(sum(sizes), widest, num_runs=len(jobs))
        h_TD = _hidden_states(model, batch, lora, recompute=recompute)
        each = zip(parts, h_TD.split(sizes), strict=True)
        scored = [(part, part.job.scores(part, h_ND, model)) for part, h_ND in each]
    if keeps:
        jobs[0].keep(*scored[0])
    return scored


def _hidden_states(model: Model, batch: Varlen, lora: AdapterBatch, *, recompute: bool) -> Tensor:
    """h_TD of whole sequences; one at a time where the model cannot keep them apart in a batch."""
    assert batch.routing is None or model.contracts.packed, "what goes by a routing tells packed rows apart"
    if model.contracts.packed:
        return model.forward(batch, lora, recompute=recompute)
    adapters = lora.of_rows(sum(batch.lengths))
    alone: list[Tensor] = []
    start = 0
    for length, tokens_N in zip(batch.lengths, batch.tokens_T.split(batch.lengths), strict=True):
        own = AdapterBatch.of([(length, adapters[start])])
        alone.append(model.forward(Varlen.whole(tokens_N, [length]), own, recompute=recompute))
        start += length
    return torch.cat(alone)
