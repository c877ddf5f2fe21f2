"""The engine's front door: one base model, many training runs, sampling from any of them.

Not thread-safe: one thread calls it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from selfloop.engine.backends.base import Model
from selfloop.engine.backends.device import (
    give_back_freed_memory,
    has_memory_for,
    pick_device,
)
from selfloop.engine.backends.select import compute_dtype, load_model, open_sight
from selfloop.engine.files import checkpoint
from selfloop.engine.files.peft import read_peft
from selfloop.engine.lora.adapter import DEFAULT_ALPHA, AdapterShape
from selfloop.engine.memory_share import MemoryShare
from selfloop.engine.models.registry import read_spec
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import SafetensorsSource
from selfloop.engine.routing import Mixtures
from selfloop.engine.sample.adapter_cache import AdapterCache
from selfloop.engine.sample.grammar import CompileGrammar
from selfloop.engine.sample.model_runner import ModelRunner
from selfloop.engine.sample.scheduler import SamplingScheduler
from selfloop.engine.sample.text import Vocabulary
from selfloop.engine.train.forward_cache import ForwardCache
from selfloop.engine.train.memory import PassMemory
from selfloop.engine.train.optim import optim_step
from selfloop.engine.train.probe import probe
from selfloop.engine.train.request import LossRequest, Workshop
from selfloop.engine.train.run import ComputedIn, Run
from selfloop.engine.train.step import advance, fitting
from selfloop.engine.vision.sight import ReadPixels, Sight
from selfloop.types.custom_loss import CustomLoss
from selfloop.types.datum import Datum, Tensor
from selfloop.types.digests import check_folder
from selfloop.types.errors import BadRequest, NotFound, OperationFailed, SelfloopError
from selfloop.types.lora import LoraTargets
from selfloop.types.model_weights import ModelWeights
from selfloop.types.operation import AdamParams, Forward, ForwardBackward
from selfloop.types.result import InitResult, LoadResult, LossResult, Probe, StepResult
from selfloop.types.sampling import SampleDelta, SampleRequest, SampleResult
from selfloop.types.settings import BaseDtype, EngineLimits
from selfloop.types.vision import VisionFacts, read_vision

log = logging.getLogger("selfloop.engine")

_MAX_BATCH = 256
# For the choice of the token budget.
_USUAL_RANK, _LEAST_BUDGET = 32, 64
_WARM_UP_RUN, _WARM_UP_TOKENS = "warm-up", 64


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The base model as it is held here; ``dtype`` and ``device`` by name, e.g. "bfloat16", "cpu".

    ``computed_by`` says what multiplies by its weights, ``computed_in`` what a run's numbers depend on;
    ``run_bytes`` is what training runs may take; ``exact_replay``: the same operations give the same bits, whatever is
    computed beside them; ``routes``: it records and replays which experts tokens go to.
    """

    vocab_size: int
    max_position_embeddings: int
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    computed_by: str
    computed_in: ComputedIn
    run_bytes: int
    exact_replay: bool
    routes: bool


class SavedState(NamedTuple):
    """A checkpoint as written."""

    step: int
    lora_rank: int
    lora_alpha: float
    size_bytes: int


def _info_of(model: Model, run_bytes: int, deterministic: bool) -> ModelInfo:
    spec, dtype = model.spec, str(model.dtype).removeprefix("torch.")
    return ModelInfo(
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.context,
        num_parameters=spec.num_parameters,
        eos_token_ids=spec.eos_token_ids,
        device=str(model.device),
        dtype=dtype,
        computed_by=model.computed_by,
        computed_in=ComputedIn(dtype, model.kept_as),
        run_bytes=run_bytes,
        exact_replay=deterministic or model.contracts.batch_invariant,
        routes=model.contracts.routes,
    )


class Engine:
    """Trains and samples LoRA adapters of one frozen base model. Use :meth:`load`."""

    def __init__(
        self,
        model: Model,
        *,
        limits: EngineLimits = EngineLimits(),
        vocabulary: Vocabulary | None = None,
        compile_grammar: CompileGrammar | None = None,
        sight: Sight | None = None,
        deterministic: bool = False,
    ) -> None:
        """The arguments are those of :meth:`load`; ``sight`` is of a model that sees."""
        spec, device = model.spec, model.device
        self._model = model
        self._deterministic = deterministic
        share = MemoryShare.of(model, limits, beside_bytes=0 if sight is None else sight.num_bytes)
        memory = PassMemory.of(model, share.activation_bytes)
        usual = AdapterShape(spec, _USUAL_RANK)
        train_token_budget = limits.train_token_budget
        if train_token_budget is None:
            # As many tokens as are fast, if they fit without computing anything twice.
            fitting = memory.longest(usual, with_gradient=True, recompute=False)
            train_token_budget = min(model.costs().train_tokens, max(_LEAST_BUDGET, fitting))
        self.train_token_budget = train_token_budget
        self._forward_cache = ForwardCache(share.forward_cache_bytes)
        mixtures = Mixtures.of(spec) if model.contracts.routes else None
        self._workshop = Workshop(spec, device, train_token_budget, memory, self._forward_cache, mixtures, sight)
        runner = ModelRunner(model, limits.max_kv_tokens)
        self._runs: dict[str, Run] = {}
        self._adapter_cache = AdapterCache(limits.max_adapters)
        self._scheduler = SamplingScheduler(
            runner,
            prefill_budget=train_token_budget,
            max_batch=_MAX_BATCH,
            vocabulary=vocabulary,
            compile_grammar=compile_grammar,
        )
        self.info = _info_of(model, share.left_for_runs(model, runner.cache.num_bytes), deterministic)
        log.info(
            "passes of up to %d tokens; sequences of up to %d at rank %d fit %d MiB of activations, "
            "from %d on layers are computed twice",
            train_token_budget,
            memory.longest(usual, with_gradient=True),
            usual.rank,
            memory.limit_bytes // 2**20,
            memory.longest(usual, with_gradient=True, recompute=False) + 1,
        )

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        base_dtype: BaseDtype = "auto",
        limits: EngineLimits = EngineLimits(),
        vocabulary: Vocabulary | None = None,
        compile_grammar: CompileGrammar | None = None,
        read_pixels: ReadPixels | None = None,
        deterministic: bool = False,
    ) -> "Engine":
        """Load a Hugging Face model folder (``config.json``, ``*.safetensors``).

        Args:
            device: "auto" is CUDA where there is one, else the CPU.
            dtype: "bfloat16", "float32"; "auto" is bfloat16 where the device computes in it, or loses nothing by it.
            base_dtype: what the matrices of the layers are kept in; "auto" is the compute type.
            limits: what it may take of the device.
            vocabulary: what tokens stand for; without it texts are empty and stop strings are refused.
            compile_grammar: reads what samples must match; without it such requests are refused.
            read_pixels: decodes images, for a model that sees; without it they are refused.
            deterministic: a run's training gives the same bits whatever is computed together with it.

        Raises:
            OperationFailed: the folder holds no model that this engine computes, or the memory is too small for it.
        """
        spec = read_spec(model_dir)
        on = pick_device(device)
        source = SafetensorsSource(model_dir, spec)
        kept_as = None if base_dtype == "auto" else base_dtype
        computed_in = compute_dtype(dtype, spec, on, source.weights.dtypes, kept_as)
        model = load_model(spec, source, on, computed_in, kept_as)
        if source.weights.quantization is not None or model.kept_as is not None:
            _say_kept(source.weights, model)
        facts = read_vision(model_dir)
        sight = None
        if isinstance(facts, VisionFacts) and read_pixels is not None and model.contracts.images:
            sight = open_sight(model_dir, facts, read_pixels, model)
        return cls(
            model,
            sight=sight,
            limits=limits,
            vocabulary=vocabulary,
            compile_grammar=compile_grammar,
            deterministic=deterministic,
        )

    # Training runs

    def init_run(
        self,
        run_id: str,
        *,
        rank: int,
        seed: int,
        initial: Path | None = None,
        with_optimizer: bool = False,
        targets: LoraTargets = LoraTargets(),
    ) -> InitResult:
        """Create a run, or reset it, without gradients.

        Args:
            rank: LoRA rank; a checkpoint's own rank wins over it.
            seed: of the fresh adapter.
            initial: a checkpoint directory to take the weights from instead.
            with_optimizer: take moments and step from there, too; otherwise there are none, and the step is 0.
            targets: what the fresh adapter changes; a checkpoint's own targets win.
        """
        if initial is not None:
            read = checkpoint.read_trainer if with_optimizer else checkpoint.read_weights
            run = read(initial, self._spec, self._model.device)
        else:
            shape = AdapterShape(self._spec, rank, targets)
            if shape.num_parameters == 0:
                raise BadRequest("targets", f"a part of the model that takes adapters; {targets} of this one has none")
            run = Run(shape, DEFAULT_ALPHA, shape.initial(seed).to(self._model.device))
        self._set(run_id, run)
        return InitResult(step=run.step, lora_rank=run.shape.rank)

    def has_run(self, run_id: str) -> bool:
        return run_id in self._runs

    def remove_run(self, run_id: str) -> None:
        """Forget a run; unknown ids are fine."""
        self._runs.pop(run_id, None)
        self._forward_cache.forget(run_id)

    def forward(
        self,
        run_id: str,
        data: list[Datum],
        loss_fn: str,
        config: Mapping[str, float | bool],
        top_k_logprobs: int = 0,
        *,
        summed: bool = False,
        custom: CustomLoss | None = None,
    ) -> LossResult:
        """Loss, logprobs and each position's ``top_k_logprobs`` likeliest tokens; the run is only read.

        ``summed`` leaves the loss, and in :meth:`forward_backward` the gradient, a plain sum whatever the loss.
        ``custom`` is an uploaded loss to compute; ``loss_fn`` is then ``custom``, without configuration.

        Raises:
            BadRequest: a datum does not fit the loss or the model.
            OperationFailed: the loss is not finite.
        """
        operation = Forward(data, loss_fn, dict(config), top_k_logprobs, summed, custom)
        return _only(self.compute([(run_id, operation)]))

    def forward_backward(
        self,
        run_id: str,
        data: list[Datum],
        loss_fn: str,
        config: Mapping[str, float | bool],
        top_k_logprobs: int = 0,
        *,
        summed: bool = False,
        custom: CustomLoss | None = None,
    ) -> LossResult:
        """Like :meth:`forward`, and adds the gradient of the loss sum to the run's; all or nothing.

        Raises:
            BadRequest: as :meth:`forward`; or gradients that are divided by different things would share a step.
            OperationFailed: loss or gradient is not finite.
        """
        operation = ForwardBackward(data, loss_fn, dict(config), top_k_logprobs, summed, custom)
        return _only(self.compute([(run_id, operation)]))

    def compute(self, asked: Sequence[tuple[str, Forward | ForwardBackward]]) -> list[LossResult | SelfloopError]:
        """Operations of many runs together, in few passes of the model; each with its own outcome, in their order.

        Losses, configurations, ranks, targets and lengths mix freely. What fails, fails alone. Of one run the
        operations come in order, and gradients add up as if each had come by itself.
        """
        outcomes: dict[int, LossResult | SelfloopError] = {}
        requests: dict[int, LossRequest] = {}
        for place, (run_id, operation) in enumerate(asked):
            try:
                requests[place] = self.begin(run_id, operation)
            except SelfloopError as error:
                outcomes[place] = error
        while left := [request for request in requests.values() if not request.job.is_done]:
            self.advance(self.together(left))
        for place, request in requests.items():
            try:
                outcomes[place] = request.result()
            except SelfloopError as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(asked))]

    def begin(self, run_id: str, operation: Forward | ForwardBackward) -> LossRequest:
        """Check an operation and lay out its work, which :meth:`advance` does; when its job is done, take its result.

        Until then nothing else may be asked of the run.

        Raises:
            NotFound: no such run.
            BadRequest: as :meth:`forward_backward`.
        """
        return LossRequest(run_id, self._run(run_id), operation, self._workshop)

    def together(self, requests: Sequence[LossRequest]) -> list[LossRequest]:
        """The first of these requests and those after it whose next micro-batches fit one pass."""
        chosen = fitting([request.job for request in requests], self.train_token_budget)
        return [request for request in requests if request.job in chosen]

    def advance(self, requests: Sequence[LossRequest]) -> None:
        """One pass, forward and backward, for the next micro-batch of each of these requests."""
        jobs = [request.job for request in requests]
        advance(self._model, jobs, self._workshop.memory, deterministic=self._deterministic)

    def optim_step(self, run_id: str, adam: AdamParams) -> StepResult:
        """Divide the accumulated gradient by its trained tokens or pairs (unless unnormalised), clip, apply, clear."""
        run = self._run(run_id)
        num_tokens = 0 if run.accumulated is None else run.accumulated.num_tokens
        had_moments = run.moments is not None
        grad_norm = optim_step(run, adam)
        self._forward_cache.drop(run_id)
        if run.moments is not None and not had_moments:
            # The moments lie between what the first gradient freed.
            give_back_freed_memory()
        return StepResult(
            {
                "step": float(run.step),
                "learning_rate": adam.learning_rate,
                "lr": adam.learning_rate,
                "grad_norm": grad_norm,
                "num_trained_tokens": float(num_tokens),
            }
        )

    # Files. A directory must not exist yet; it is whole and on disk when the call returns.

    def save_sampler_checkpoint(self, run_id: str, directory: Path) -> SavedState:
        """The adapter in PEFT's format."""
        run = self._run(run_id)
        return _saved(run, checkpoint.write_sampler(directory, run))

    def save_external_weights(self, run_id: str, directory: Path, base_model: str) -> SavedState:
        """The adapter in PEFT's format and nothing else, for other programs."""
        run = self._run(run_id)
        return _saved(run, checkpoint.write_external(directory, run, base_model))

    def save_trainer_checkpoint(self, run_id: str, directory: Path) -> SavedState:
        """Adapter, moments and step."""
        run = self._run(run_id)
        return _saved(run, checkpoint.write_trainer(directory, run))

    def load_checkpoint(self, run_id: str, directory: Path, *, with_optimizer: bool) -> LoadResult:
        """Replace an existing run's state. Weights only: step 0, no moments. Gradients are dropped either way."""
        self._run(run_id)
        read = checkpoint.read_trainer if with_optimizer else checkpoint.read_weights
        run = read(directory, self._spec, self._model.device)
        self._set(run_id, run)
        return LoadResult(run.step, run.shape.rank)

    def snapshot(self, run_id: str, directory: Path) -> SavedState:
        """The whole state, accumulated gradients included, bit for bit."""
        run = self._run(run_id)
        return _saved(run, checkpoint.write_snapshot(directory, run))

    def begin_snapshot(self, run_id: str, directory: Path) -> Callable[[], int]:
        """Copy the whole state; the function returned writes the copy, in any thread, and returns the bytes."""
        run = self._run(run_id).copy()
        return partial(checkpoint.write_snapshot, directory, run)

    def restore(self, run_id: str, directory: Path) -> LoadResult:
        """Make ``run_id`` what it was at :meth:`snapshot`; creates it if need be."""
        run = checkpoint.read_snapshot(directory, self._spec, self._model.device)
        self._set(run_id, run)
        return LoadResult(run.step, run.shape.rank)

    def warm_up(self) -> None:
        """Train a little and forget it: what is laid out at the first use is there, if there is plenty of room for it.

        For a process that workers are forked from: they share what was laid out before.
        """
        if not has_memory_for(self.info.num_parameters * self._model.dtype.itemsize):
            return
        length = min(_WARM_UP_TOKENS, self.info.max_position_embeddings)
        tokens = Tensor.of([0] * length, "int64")
        self.init_run(_WARM_UP_RUN, rank=1, seed=0)
        self.forward_backward(_WARM_UP_RUN, [Datum(tokens, {"target_tokens": tokens})], "cross_entropy", {})
        self.remove_run(_WARM_UP_RUN)
        give_back_freed_memory()

    # Sampling

    def publish(self, run_id: str, checkpoint_id: str) -> None:
        """Freeze a copy of the run's adapter for sampling under ``checkpoint_id``."""
        run = self._run(run_id)
        if run.shape.changes_nothing(run.theta_P):
            log.warning(
                "the weights published as %s equal the base model: the adapter's B is zero, as before the first step",
                checkpoint_id,
            )
        adapter = run.frozen_adapter(self._model.dtype)
        self._adapter_cache.put(checkpoint_id, adapter, self._scheduler.adapters_in_use())

    def probe(self, run_id: str) -> Probe:
        """What the trainer makes of a short text now, to compare a sampler with; the run is only read."""
        return probe(run_id, self._run(run_id), self._workshop, self.advance, self.info.dtype)

    def load_adapter(self, checkpoint_id: str, directory: Path) -> None:
        """Read an adapter in PEFT's format for sampling under ``checkpoint_id``."""
        check_folder(directory)
        loaded = read_peft(directory, self._spec)
        trained_in = checkpoint.computed_in(directory)
        if trained_in not in (None, self.info.computed_in):
            _say_other_numbers(f"checkpoint {checkpoint_id}", trained_in, self.info.computed_in)
        if loaded.shape.changes_nothing(loaded.theta_P):
            log.warning("checkpoint %s samples as the base model: its adapter changes nothing", checkpoint_id)
        theta_P = loaded.theta_P.to(self._model.device, self._model.dtype)
        adapter = loaded.shape.adapter(theta_P, loaded.alpha)
        self._adapter_cache.put(checkpoint_id, adapter, self._scheduler.adapters_in_use())

    def has_adapter(self, checkpoint_id: str) -> bool:
        return checkpoint_id in self._adapter_cache

    def drop_adapter(self, checkpoint_id: str) -> None:
        """Forget an adapter; requests under way keep it to their end."""
        self._adapter_cache.drop(checkpoint_id)

    def submit_sample(self, request: SampleRequest, *, stream: bool = False) -> None:
        """Queue a request; its adapter must be published or loaded.

        Args:
            stream: report its samples as they grow, by :meth:`take_sample_deltas`.

        Raises:
            NotFound: there is no such adapter.
            BadRequest: the request exceeds the context or the KV cache, needs a vocabulary that is not there,
                or asks for outputs of a form that cannot be compiled.
        """
        if max(request.prompt) >= self.info.vocab_size or min(request.prompt) < 0:
            raise BadRequest("prompt", f"token ids must be in 0..{self.info.vocab_size - 1}")
        adapter = None if request.adapter is None else self._adapter_cache.get(request.adapter.checkpoint_id)
        images = self._workshop.see(request.images, len(request.prompt))
        self._scheduler.submit(request, adapter, stream=stream, images=images)

    @torch.inference_mode()
    def cancel_sample(self, request_id: str) -> None:
        """Forget a request; no result will come."""
        self._scheduler.cancel(request_id)

    @torch.inference_mode()
    def sample_step(self) -> list[SampleResult]:
        """One step of continuous batching; returns the requests that finished in it."""
        return self._scheduler.step()

    def take_sample_deltas(self) -> dict[str, list[SampleDelta]]:
        """What the samples of streaming requests grew by in :meth:`sample_step`, by request; ask after each.

        The deltas of a sample add up to the sequence that the result has, whose last one carries its stop reason.
        """
        return self._scheduler.take_deltas()

    def take_failed_samples(self) -> list[tuple[str, OperationFailed]]:
        """Requests that ended in an error during :meth:`sample_step`; to be asked after each."""
        return self._scheduler.take_failures()

    @property
    def num_sampling(self) -> int:
        """Requests active or waiting."""
        return self._scheduler.num_requests

    @property
    def _spec(self) -> ModelSpec:
        return self._model.spec

    def _set(self, run_id: str, run: Run) -> None:
        self._forward_cache.drop(run_id)
        if run.computed_in not in (None, self.info.computed_in):
            _say_other_numbers(f"run {run_id}", run.computed_in, self.info.computed_in)
        run.computed_in = self.info.computed_in
        self._runs[run_id] = run

    def _run(self, run_id: str) -> Run:
        if run_id not in self._runs:
            raise NotFound("run", run_id)
        return self._runs[run_id]


def _say_kept(stored: ModelWeights, model: Model) -> None:
    log.info(
        "base weights are stored %s and %s: %d MiB stored, %d MiB in memory",
        "plain" if stored.quantization is None else f"as {stored.quantization.words}",
        "dequantised" if model.kept_as is None else f"kept in {model.kept_as}",
        stored.size_bytes // 2**20,
        model.costs().base_weights // 2**20,
    )


def _say_other_numbers(what: str, before: ComputedIn | None, now: ComputedIn) -> None:
    log.warning("%s was computed in %s and is now in %s: it goes on, with numbers of its own", what, before, now)


def _saved(run: Run, size_bytes: int) -> SavedState:
    return SavedState(run.step, run.shape.rank, run.alpha, size_bytes)


def _only(outcomes: list[LossResult | SelfloopError]) -> LossResult:
    (outcome,) = outcomes
    if isinstance(outcome, SelfloopError):
        raise outcome
    return outcome
