"""Hears of every operation and sample, and reports it to the log, the metrics, the counters and the trace."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from selfloop.control.observe import instruments, tracing
from selfloop.control.observe.measurements import measured_by, values_of
from selfloop.control.observe.meter import Meter
from selfloop.control.observe.usage import Counts, Usage
from selfloop.storage.db.tables import OperationRow, RunRow
from selfloop.types.logline import current
from selfloop.types.resources import Sampler
from selfloop.types.result import Result, SaveResult
from selfloop.types.sampling import SampleResult
from selfloop.types.status import OperationState

log = logging.getLogger("selfloop.events")
"""Its records below WARNING go to the log file only."""


@dataclass(slots=True)
class _Open:
    """An operation without an outcome: since when, and where its client's trace goes on."""

    deployment_id: str
    team_id: str
    accepted_at: float
    trace: tracing.Context | None
    trace_id: str


Sampled = Callable[[Sampler, str | None, int, SampleResult], None]
"""Hears of a request's end: its sampler, the run that trained the weights, the prompt's tokens, what was sampled."""


class Observer:
    def __init__(self, usage: Usage) -> None:
        self.meter = Meter()
        self.usage = usage
        self._open: dict[tuple[str, str], _Open] = {}

    @property
    def num_queued(self) -> int:
        return len(self._open)

    def accepted(self, run: RunRow, row: OperationRow) -> None:
        """An operation was made durable just now, or was found in the queue after a restart."""
        self._open[row.run_id, row.id] = _Open(
            run.deployment_id, run.team_id, row.created_at, tracing.context(), tracing.trace_id()
        )
        self.meter.begin(run.deployment_id)
        instruments.ACCEPTED.labels(row.kind).inc()
        log.debug("%s accepted (seq_id %d)", row.kind, row.seq, extra=self._extra(row, seq_id=row.seq))

    def begun(self, row: OperationRow) -> None:
        """An operation was given to the worker."""
        log.debug("%s (seq_id %d) handed to the worker", row.kind, row.seq, extra=self._extra(row, seq_id=row.seq))

    def finished(self, run: RunRow, row: OperationRow, result: Result, counts: Counts) -> None:
        """An operation's result is durable."""
        now = time.time()
        spent = result.spent
        seconds = now - row.created_at
        details: dict[str, str | int | float] = {
            "seq_id": row.seq,
            "seconds": round(seconds, 6),
            "compute_seconds": round(spent.device_s, 6),
            "tokens": spent.num_tokens,
        }
        text = f"{row.kind} (seq_id {row.seq}) finished in {seconds:.3f} s, {spent.device_s:.3f} s of it computing"
        if spent.num_tokens:
            text += f", {spent.num_tokens} tokens"
        if isinstance(result, SaveResult):
            details |= {"checkpoint": result.name, "size_bytes": result.size_bytes}
            text += f": checkpoint {result.name!r} of step {result.step}, {result.size_bytes} bytes"
        log.info(text, extra=self._extra(row, **details))
        self._close(row, 200, now, seconds, now - spent.device_s)
        instruments.FINISHED.labels(row.kind).inc()
        instruments.OPERATION_SECONDS.labels(row.kind).observe(seconds)
        instruments.COMPUTE_SECONDS.labels("training").inc(spent.device_s)
        instruments.TOKENS.labels("forwarded").inc(counts.tokens_forwarded)
        instruments.TOKENS.labels("trained").inc(counts.tokens_trained)
        if (measured := measured_by(run, row, result, now)) is not None:
            for name, value in values_of(measured).items():
                if name in instruments.LAST_QUANTITIES:
                    instruments.LAST_VALUE.labels(run.model_name, name).set(value)

    def failed(self, row: OperationRow, error: str, error_class: str, state: OperationState) -> None:
        """An operation's error is durable; a cancellation is one, too."""
        now = time.time()
        seconds = now - row.created_at
        was_cancelled = state == OperationState.CANCELLED
        details: dict[str, str | int | float] = {"seq_id": row.seq, "seconds": seconds, "error_class": error_class}
        log.log(
            logging.INFO if was_cancelled else logging.WARNING,
            "run %s: %s (seq_id %d) %s after %.3f s: %s",
            row.run_id,
            row.kind,
            row.seq,
            "was cancelled" if was_cancelled else "failed",
            seconds,
            error,
            extra=self._extra(row, **details),
        )
        self._close(row, 400 if was_cancelled else 500, now, seconds, now, error_class)
        instruments.FAILED.labels(row.kind, "cancelled" if was_cancelled else "error").inc()

    @contextmanager
    def sampling(self, deployment_id: str | None) -> Generator[Sampled]:
        """A sampling request in progress on a trainer's deployment (or on none); gives what to call with its result."""
        started = time.monotonic()
        status: int | None = None

        def sampled(sampler: Sampler, run_id: str | None, num_prompt_tokens: int, result: SampleResult) -> None:
            nonlocal status
            status = 200
            counts = self.usage.sampled(sampler, run_id, num_prompt_tokens, result)
            self._sampled(sampler, counts, result, time.monotonic() - started)

        if deployment_id is not None:
            self.meter.begin(deployment_id)
        try:
            with tracing.loose_span("sampling"):
                yield sampled
        finally:
            if deployment_id is not None:
                # A refusal is counted where its answer is seen.
                self.meter.end(deployment_id, status, time.monotonic() - started)

    def _sampled(self, sampler: Sampler, counts: Counts, result: SampleResult, seconds: float) -> None:
        num_stopped = sum(s.stop_reason == "stop" for s in result.sequences)
        details: dict[str, str | int | float] = {
            "num_samples": len(result.sequences),
            "prompt_tokens": counts.tokens_prefilled,
            "cached_tokens": result.num_cached,
            "tokens": counts.tokens_sampled,
            "seconds": round(seconds, 6),
            "compute_seconds": round(counts.compute_s, 6),
        }
        log.info(
            "sampled %d sequences, %d tokens after a prompt of %d, in %.3f s (%d stopped, %d at their length)",
            len(result.sequences),
            counts.tokens_sampled,
            counts.tokens_prefilled,
            seconds,
            num_stopped,
            len(result.sequences) - num_stopped,
            extra={
                "sampler_id": sampler.id,
                "team_id": sampler.team_id,
                "operation_id": current().operation_id or result.request_id,
                "details": details,
            },
        )
        instruments.SAMPLE_REQUESTS.inc()
        instruments.COMPUTE_SECONDS.labels("sampling").inc(counts.compute_s)
        instruments.TOKENS.labels("prefilled").inc(counts.tokens_prefilled)
        instruments.TOKENS.labels("cached").inc(result.num_cached)
        instruments.TOKENS.labels("sampled").inc(counts.tokens_sampled)

    def _close(
        self, row: OperationRow, status: int, now: float, seconds: float, began_at: float, error: str = ""
    ) -> None:
        known = self._open.pop((row.run_id, row.id), None)
        if known is None:
            return
        self.meter.end(known.deployment_id, status, seconds)
        if known.trace is None:
            return
        ids = {"operation_id": row.id, "run_id": row.run_id, "kind": row.kind}
        began_at = max(began_at, known.accepted_at)
        tracing.past_span("queue wait", known.trace, known.accepted_at, began_at, **ids)
        tracing.past_span(f"execute {row.kind}", known.trace, began_at, now, error, **ids)

    def _extra(self, row: OperationRow, **details: str | int | float) -> dict[str, object]:
        known = self._open.get((row.run_id, row.id))
        ids: dict[str, object] = {"run_id": row.run_id, "operation_id": row.id}
        if known is not None:
            ids |= {"deployment_id": known.deployment_id, "team_id": known.team_id, "trace_id": known.trace_id}
        return ids | {"details": {"kind": row.kind, **details}}


def status_extra(kind: str, id: str, status: str) -> dict[str, object]:
    """The ids of a status change's log line."""
    return {f"{kind}_id": id, "details": {"status": status}}
