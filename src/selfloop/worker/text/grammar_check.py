"""A process that tries grammars before the worker does: what runs away here is ended by the system.

Reads one JSON object a line, ``{"kind", "spec"}``, and answers each with ``{"grammar"}``, the same in
llguidance's own form, or ``{"error"}``. It dies of a specification that takes too much time or memory.
"""

import json
import resource
import signal
import sys

import llguidance

CPU_LIMIT_S = 2.0
_MAX_MEMORY_BYTES = 2**30
_TRIAL_TOKENS = 3
_WHITE_SPACE = r"[ \n]{1,40}"
# A sampler keeps many of these: about 2 kB a state.
_MAX_LEXER_STATES = 50_000


def limits() -> llguidance.LLParserLimits:
    """Of compiling and of each step; about a second at worst."""
    return llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def to_grammar(kind: str, spec: str) -> str:
    """A specification in llguidance's own form. Raises ValueError."""
    if kind == "choice":
        choices = json.loads(spec)
        if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
            raise ValueError("a list of strings that are not empty")
        quoted = [json.dumps(choice, ensure_ascii=False) for choice in choices]
        return llguidance.grammar_from("lark", "start: " + " | ".join(quoted))
    if kind == "json_schema":
        # Bounded, as endless white space is what weak models get lost in.
        return llguidance.LLMatcher.grammar_from_json_schema(spec, defaults={"whitespace_pattern": _WHITE_SPACE})
    return llguidance.grammar_from("grammar" if kind == "grammar" else "regex", spec)


def answer(tokenizer: llguidance.LLTokenizer, request: dict[str, str]) -> dict[str, str]:
    try:
        grammar = to_grammar(request["kind"], request["spec"])
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory"}
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    for _ in range(_TRIAL_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        # The first token that may come; end tokens are the last ones.
        token = (bits & -bits).bit_length() - 1
        if token < 0 or token >= 256:
            break
        matcher.consume_token(token)
    return {"error": matcher.get_error()} if matcher.is_error() else {"grammar": grammar}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Only bytes: what a grammar costs hardly depends on the vocabulary.
    tokenizer = llguidance.LLTokenizer("byte")
    for line in sys.stdin:
        # The default action of the signal ends the process, also in the midst of compiled code.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        reply = answer(tokenizer, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
