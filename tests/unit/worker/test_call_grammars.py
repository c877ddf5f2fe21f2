"""What a random model says when it may call: whatever opens a call becomes one that keeps its function's schema."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import AddedToken, Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

import served_model
from selfloop.engine.engine import Engine
from selfloop.server.shared.tools import CallReader, Choice, Function, ToolUse, tool_use
from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.sampling import SampledSequence, SampleRequest, SamplingParams
from selfloop.worker.text.grammars import GrammarCompiler

TAGS = 'tools <tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call>'
WHOLE = 'tools {"name": function name, "parameters": dictionary of argument name and its value}.'
# So that a random model opens calls: whole tags, and tokens that reach over the places where something begins or ends.
TOKENS = ("<tool_call>", '<tool_call>\n{"', "</tool_call>", ' <tool_call>{"name', "}</tool_call>\nx")
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/Place"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"Place": {"enum": ["Rome", "Oslo", "<tool_call>", 'a "b"</tool_call>\n']}},
    },
    # The same name of a definition means another thing here; no type is given, and the reference is to the whole.
    "move": {
        "properties": {"to": {"$ref": "#/$defs/Place"}, "then": {"$ref": "#"}},
        "required": ["to"],
        "additionalProperties": False,
        "$defs": {"Place": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
    },
}
NUM_SAMPLES = 250


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = served_model.save(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    known = ModelTokenizer.load(folder)
    compiler = GrammarCompiler(known, served_model.VOCAB_SIZE, [served_model.EOS])
    yield Engine.load(folder, device="cpu", dtype="float32", vocabulary=known, compile_grammar=compiler)
    compiler.close()
    torch.set_num_threads(num_threads)


def functions(*, loose: bool) -> list[Function]:
    strict = [Function(name, schema, True, f"tools[{name}]", "parameters") for name, schema in SCHEMAS.items()]
    return [*strict, Function("anything", {"type": "object", "not": {}}, False, "tools[2]", "parameters")][: 2 + loose]


def sample(engine: Engine, use: ToolUse, num: int = NUM_SAMPLES, **params: Any) -> list[SampledSequence]:
    settings = SamplingParams(
        **{"max_tokens": 200, "seed": 3, "temperature": 3.0, "structured": use.structured} | params
    )
    engine.submit_sample(SampleRequest("q", [75, 108], num, settings))
    results = []
    while engine.num_sampling:
        results += engine.sample_step()
    assert engine.take_failed_samples() == []
    return results[0].sequences


def read(use: ToolUse, text: str) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(use)
    pieces = [*map(reader.feed, text), reader.finish()]
    calls = [(call.name, json.loads(call.arguments)) for piece in pieces for call in piece.calls]
    return "".join(piece.text for piece in pieces), calls


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        assert isinstance(arguments, dict)
        if name in SCHEMAS:
            jsonschema.validate(arguments, SCHEMAS[name])


@pytest.mark.parametrize("at_most_one", [False, True])
@pytest.mark.parametrize("loose", [False, True])
def test_between_tags(engine: Engine, at_most_one: bool, loose: bool):
    use = tool_use(functions(loose=loose), Choice("auto", None, at_most_one, "", ""), TAGS)
    assert not use.own_stop
    called, num_several, num_without = set[str](), 0, 0
    for sequence in sample(engine, use):
        text, calls = read(use, sequence.text)
        check(calls)
        # Only the end of the room leaves a call that is none.
        assert sequence.stop_reason == "length" or "<tool_call>" not in text
        called |= {name for name, _ in calls}
        num_several += len(calls) > 1
        num_without += not calls
        if calls and at_most_one:
            assert len(calls) == 1
            assert sequence.text.endswith("</tool_call>")
    assert called == {*SCHEMAS, *(["anything"] if loose else [])}
    assert num_without > 20
    assert (num_several > 20) is not at_most_one


def test_as_the_whole_text(engine: Engine):
    """A text that begins with a brace is a call; the grammar gives the model no other way on."""
    use = tool_use(functions(loose=False), Choice("auto", None, False, "", ""), WHOLE)
    sequences = sample(engine, use, num=800, max_tokens=100)
    opened = [s for s in sequences if s.text.lstrip().startswith("{")]
    assert 0 < len(opened) < len(sequences)
    for sequence in opened:
        text, calls = read(use, sequence.text)
        check(calls)
        assert bool(calls) is (sequence.stop_reason == "stop")
        assert text == ("" if calls else sequence.text)


def test_calls_or_an_answer_that_matches(engine: Engine):
    answer = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    use = tool_use(functions(loose=True), Choice("auto", None, False, "", ""), TAGS, answer)
    num_calls = num_answers = 0
    for sequence in sample(engine, use):
        text, calls = read(use, sequence.text)
        check(calls)
        num_calls += bool(calls)
        if sequence.stop_reason == "stop" and not calls:
            jsonschema.validate(json.loads(text), answer)
            num_answers += 1
    assert num_calls > 20
    assert num_answers > 20


@pytest.mark.parametrize("name", [None, "move"])
def test_a_forced_call(engine: Engine, name: str | None):
    use = tool_use(functions(loose=False), Choice("forced", name, False, "tool_choice", ""), TAGS)
    called = set[str]()
    for sequence in sample(engine, use, num=100):
        text, calls = read(use, sequence.text)
        check(calls)
        assert bool(calls) is (sequence.stop_reason == "stop")
        assert not (text and calls)
        called |= {name for name, _ in calls}
    assert called == ({*SCHEMAS} if name is None else {name})


@pytest.mark.parametrize("kind", ["auto", "forced"])
def test_arguments_are_an_object(kind: Any):
    for schema in ({"type": "string"}, {"type": ["array", "null"]}):
        with pytest.raises(BadRequest, match=r"tools\[0\].parameters.type: object"):
            tool_use([Function("f", schema, True, "tools[0]", "parameters")], Choice(kind, None, False, "", ""), TAGS)
    maybe = {"type": ["object", "null"], "properties": {}}
    tool_use([Function("f", maybe, True, "tools[0]", "parameters")], Choice(kind, None, False, "", ""), TAGS)
