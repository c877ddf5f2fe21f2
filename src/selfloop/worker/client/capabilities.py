"""What a command needs of the worker that it is for."""

from selfloop.types.errors import OperationFailed
from selfloop.types.sampling import SampleRequest
from selfloop.worker.protocol import Capabilities, Command, Execute, ModelInfo, OpenRun, Sample, Snapshot


def refusal(command: Command, info: ModelInfo) -> OperationFailed | None:
    """Why this worker cannot do what a command asks; None where it can."""
    match command:
        case OpenRun() | Execute() | Snapshot() if not info.can.trains:
            return OperationFailed("the worker that serves this base model does not train", "Unsupported")
        case Sample() if not info.can.samples:
            return OperationFailed("the worker that serves this base model does not sample", "Unsupported")
        case Sample(request, stream):
            return _refusal_of_sample(request, info.can, stream=stream)
        case _:
            return None


def _refusal_of_sample(request: SampleRequest, can: Capabilities, *, stream: bool) -> OperationFailed | None:
    """As a worker refuses a field: its name, and what was expected."""
    if stream and not can.streams:
        return OperationFailed("stream: false, as this base model's worker does not stream", "BadRequest")
    if request.params.structured is not None and not can.structured_output:
        return OperationFailed("structured_outputs: none, as this base model's worker has no grammars", "BadRequest")
    if request.asks_about_prompt and not can.prompt_logprobs:
        return OperationFailed("prompt_logprobs: none, as this base model's worker scores no prompts", "BadRequest")
    return None
