"""Constrained decoding with llguidance: the engine's grammars."""

import json
from collections import OrderedDict

import llguidance
from tokenizers import Tokenizer

from selfloop.engine.sample.grammar import GrammarState
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.sampling import StructuredOutput
from selfloop.worker.text.grammar_check import CPU_LIMIT_S, limits
from selfloop.worker.text.helper_process import Helper, HelperEnded

_FIELD = "structured_outputs"
_MAX_SPEC_CHARS = 256 * 1024
_MAX_KEPT = 32
_CHECK_TIMEOUT_S = 30.0


class GrammarCompiler:
    """Turns what a request asks for into a grammar over one model's tokens; keeps the last ones.

    Every specification is tried in a process of its own first, so that none can hang or break this one.
    """

    def __init__(self, tokenizer: ModelTokenizer, vocab_size: int, end_tokens: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._tokens: llguidance.LLTokenizer | None = None
        self._checker = Helper("selfloop.worker.text.grammar_check", _CHECK_TIMEOUT_S)
        self._kept: OrderedDict[StructuredOutput, CompiledGrammar] = OrderedDict()

    def __call__(self, structured: StructuredOutput) -> "CompiledGrammar":
        """Raises BadRequest with the library's own words."""
        if structured in self._kept:
            self._kept.move_to_end(structured)
            return self._kept[structured]
        if len(structured.spec) > _MAX_SPEC_CHARS:
            raise BadRequest(_FIELD, f"at most {_MAX_SPEC_CHARS} characters")
        grammar = self._check(structured)
        matcher = llguidance.LLMatcher(self._llguidance_tokens(), grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise BadRequest(_FIELD, _message(matcher.get_error()))
        compiled = self._kept[structured] = CompiledGrammar(matcher)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return compiled

    def close(self) -> None:
        """End the process that checks."""
        self._checker.close()

    def _check(self, structured: StructuredOutput) -> str:
        request = {"kind": structured.kind, "spec": structured.spec}
        try:
            reply = json.loads(self._checker.ask(json.dumps(request).encode()))
        except HelperEnded as ended:
            if ended.status >= 0:
                raise OperationFailed(f"the process that checks grammars {ended}") from None
            simpler = f"something simpler: compiling it takes more than {CPU_LIMIT_S:g} s or 1 GiB"
            raise BadRequest(_FIELD, simpler) from None
        if "error" in reply:
            raise BadRequest(_FIELD, _message(reply["error"]))
        return reply["grammar"]

    def _llguidance_tokens(self) -> llguidance.LLTokenizer:
        # Made for the first such request: it takes tens of megabytes.
        if self._tokens is None:
            tokens = _Tokens(self._tokenizer, self._vocab_size, self._end_tokens)
            self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))
        return self._tokens


class _Tokens:
    """A model's tokens in the form that llguidance reads, its names included.

    By itself it takes every added token that is written ``<...>`` for one that is no text. Models write their calls
    and thoughts with tokens like that, so it is given here which are none.
    """

    bos_token_id = None

    def __init__(self, tokenizer: ModelTokenizer, vocab_size: int, end_tokens: list[int]) -> None:
        ends = set(end_tokens)
        raws = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.tokens = raws
        self.eos_token_id = end_tokens[0] if end_tokens else None
        self.special_token_ids = [i for i, raw in enumerate(raws) if i in ends or tokenizer.text_bytes(i) != raw]
        self._within = _within_a_text(tokenizer.text)

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._within.encode(text.decode(), add_special_tokens=False).ids
        return ids


def _within_a_text(tokenizer_json: str) -> Tokenizer:
    """The tokenizer for what stands within a text: no space comes before it, and no name of a token stands for it."""
    parts = json.loads(tokenizer_json)
    normalizer = parts.get("normalizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    left = [step for step in steps if step.get("type") not in (None, "Prepend")]
    parts["normalizer"] = {"type": "Sequence", "normalizers": left} if left else None
    before = parts.get("pre_tokenizer") or {}
    for step in before["pretokenizers"] if before.get("type") == "Sequence" else [before]:
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


class CompiledGrammar:
    """Where every sample starts."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        return MatcherState(self._matcher.deep_copy())


class MatcherState:
    """One sample's place in a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def is_accepting(self) -> bool:
        return self._matcher.is_accepting()

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OperationFailed(f"{_FIELD}: {_message(self._matcher.get_error())}", "BadRequest")


def _message(error: str) -> str:
    """The library's own words, without the mark it leaves where details are turned off."""
    return error.removesuffix("<non-verbose/>").strip()
