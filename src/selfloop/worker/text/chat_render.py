"""A process that renders chat templates: what takes too much memory or time ends here, and not in the worker.

Reads one JSON object a line, a :class:`Render`, and answers each with ``{"text"}`` or with ``{"error"}``. The system
ends it when it computes for too long in one piece.
"""

import resource
import signal
import sys
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from selfloop.worker.text.cpu_limit import CpuLimitReached, cpu_limit

MAX_TEXT_BYTES = 32 * 2**20
"""Of what is rendered; more than a prompt can be."""

MEMORY_BYTES = 256 * 2**20
"""What rendering may take beside the program itself."""

# Python's own limit is looked at between its operations only.
_GRACE_S = 1.0


class Render(msgspec.Struct):
    """A conversation and its template; the fields as those of transformers' ``render_jinja_template``."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template: str
    continue_final_message: bool
    add_generation_prompt: bool
    variables: dict[str, Any]
    cpu_s: float


def answer(request: Render) -> dict[str, str]:
    # Half a second of imports, for the first conversation only.
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with cpu_limit(request.cpu_s):
            rendered, _ = render_jinja_template(
                # As apply_chat_template does: templates handle a missing key better than one that is null.
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in request.messages]],
                tools=list(request.tools) if request.tools else None,
                chat_template=request.template,
                continue_final_message=request.continue_final_message,
                add_generation_prompt=request.add_generation_prompt,
                **request.variables,
            )
    except CpuLimitReached:
        return {"error": f"a conversation that is rendered within {request.cpu_s:g} s"}
    except MemoryError:
        return {"error": too_much_memory()}
    except jinja2.TemplateError as error:
        return {"error": f"the model's chat template says: {error.message}"}
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # What a template does with messages of a form that it does not expect.
        return {"error": f"the model's chat template cannot render this: {error}"}
    if len(rendered[0]) > MAX_TEXT_BYTES:
        return {"error": too_much_memory()}
    return {"text": rendered[0]}


def too_much_memory() -> str:
    return f"a conversation that is rendered within {MEMORY_BYTES // 2**20} MiB of memory"


def _limit_memory() -> None:
    import transformers.utils.chat_template_utils  # noqa: F401  # pyright: ignore[reportUnusedImport]

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What is mapped by now, which depends on the machine, is not counted.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    _limit_memory()
    for line in sys.stdin.buffer:
        try:
            request = msgspec.json.decode(line, type=Render)
            # The default action of the signal ends the process, also in the midst of compiled code.
            signal.setitimer(signal.ITIMER_PROF, request.cpu_s + _GRACE_S)
            reply = msgspec.json.encode(answer(request))
        except MemoryError:
            reply = msgspec.json.encode({"error": too_much_memory()})
        except UnicodeEncodeError as error:
            reply = msgspec.json.encode({"error": f"text that is Unicode: {error.reason}"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
