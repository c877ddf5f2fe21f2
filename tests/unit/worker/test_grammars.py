"""Constrained decoding: what a tiny random model says under a schema, an expression, a choice or a grammar."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import served_model
from selfloop.engine.engine import Engine
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.sampling import SampleRequest, SamplingParams, StructuredOutput
from selfloop.worker.text import grammars
from selfloop.worker.text.grammars import GrammarCompiler

PROMPT = [72 + 3, 105 + 3]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Mara", "Jón 日", 'a "quote"\n']},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
EXPRESSION = r"(red|gr[ae]y|日本)-[0-9]{2,4}!"
CHOICES = ["yes", "yes indeed", "日本 😀", 'a "b"\n', "\\n"]
LARK = 'start: "<" NAME ">" | start ";" start\nNAME: /[a-c]{1,3}/'
GBNF = 'root ::= pair ("," pair){0,2}\npair ::= [a-c] "=" [0-9]+'


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model.save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(ModelTokenizer.load(model_dir), served_model.VOCAB_SIZE, [served_model.EOS])
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(model_dir: Path, compiler: GrammarCompiler) -> Iterator[Engine]:
    # The model is so small that a second thread only costs.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = ModelTokenizer.load(model_dir)
    yield Engine.load(model_dir, device="cpu", dtype="float32", vocabulary=tokenizer, compile_grammar=compiler)
    torch.set_num_threads(num_threads)


def request(request_id, structured, *, num_samples=1, **params):
    settings = SamplingParams(**{"max_tokens": 200, "seed": 1, "structured": structured, **params})
    return SampleRequest(request_id, PROMPT, num_samples, settings)


def run_all(engine, *requests):
    for item in requests:
        engine.submit_sample(item, stream=True)
    results, texts = {}, {}
    while engine.num_sampling:
        results |= {r.request_id: r.sequences for r in engine.sample_step()}
        for request_id, deltas in engine.take_sample_deltas().items():
            for delta in deltas:
                texts[request_id, delta.index] = texts.get((request_id, delta.index), "") + delta.text
    assert engine.take_failed_samples() == []
    for (request_id, index), text in texts.items():
        assert results[request_id][index].text == text
    return results


def is_json(text):
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


VALID = {
    "json": (StructuredOutput("json_schema", json.dumps(SCHEMA)), is_json),
    "regex": (StructuredOutput("regex", EXPRESSION), lambda text: re.fullmatch(EXPRESSION, text)),
    "choice": (StructuredOutput("choice", json.dumps(CHOICES)), lambda text: text in CHOICES),
    "lark": (StructuredOutput("grammar", LARK), lambda text: re.fullmatch("<[a-c]{1,3}>(;<[a-c]{1,3}>)*", text)),
    "gbnf": (
        StructuredOutput("grammar", GBNF),
        lambda text: re.fullmatch("[a-c]=[0-9]+(,[a-c]=[0-9]+){0,2}", text),
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_finished_sample_is_valid(engine, temperature):
    requests = [
        request(f"{name}-{seed}", structured, num_samples=3, temperature=temperature, seed=seed)
        for name, (structured, _) in VALID.items()
        for seed in range(3)
    ]
    free = request("free", None, max_tokens=40)
    alone = run_all(engine, free)["free"]
    results = run_all(engine, *requests, free)
    assert [s.tokens for s in results["free"]] == [s.tokens for s in alone]
    for name, (_, valid) in VALID.items():
        sequences = [s for seed in range(3) for s in results[f"{name}-{seed}"]]
        finished = [s.text for s in sequences if s.stop_reason == "stop"]
        assert all(valid(text) for text in finished), finished
        # A model may go on in white space or digits for ever; most do not.
        assert len(finished) >= (1 if temperature > 0 or name in ("regex", "choice") else 0), name
        if temperature > 0:
            assert len({s.text for s in sequences}) > 1, name


def test_a_seed_reproduces(engine):
    structured = VALID["json"][0]
    first, again = (run_all(engine, request("q", structured, num_samples=2))["q"] for _ in range(2))
    assert [s.tokens for s in first] == [s.tokens for s in again]
    assert first[0].tokens != first[1].tokens


def test_where_only_the_end_can_follow_the_sample_stops_without_it(engine):
    (sequence,) = run_all(engine, request("q", StructuredOutput("choice", '["日本"]')))["q"]
    assert sequence.text == "日本"
    assert sequence.stop_reason == "stop"
    assert served_model.EOS not in sequence.tokens


def test_the_end_token_waits_until_the_text_is_whole(engine):
    results = run_all(engine, request("q", StructuredOutput("regex", "[ab]{3,}"), num_samples=30))["q"]
    ended = [s for s in results if s.stop_reason == "stop"]
    assert ended
    assert all(s.tokens[-1] == served_model.EOS and len(s.text) >= 3 for s in ended)


def test_a_token_of_the_requests_own_may_end_a_whole_text(engine):
    settings = {"stop_token_ids": [0], "use_end_tokens": False, "num_samples": 30}
    results = run_all(engine, request("q", StructuredOutput("regex", "[ab]{3,}"), **settings))["q"]
    assert all(s.tokens[-1] == 0 and len(s.text) >= 3 for s in results if s.stop_reason == "stop")
    assert all(served_model.EOS not in s.tokens for s in results)
    assert any(s.stop_reason == "stop" for s in results)


def test_too_few_tokens_end_by_length(engine):
    (sequence,) = run_all(engine, request("q", VALID["json"][0], max_tokens=4))["q"]
    assert sequence.stop_reason == "length"
    assert sequence.text.startswith("{")


def test_any_json(engine):
    results = run_all(engine, request("q", StructuredOutput("json_schema", "{}"), num_samples=20, max_tokens=100))["q"]
    finished = [s.text for s in results if s.stop_reason == "stop"]
    assert finished
    for text in finished:
        json.loads(text)


@pytest.mark.parametrize(
    ("kind", "spec", "words"),
    [
        ("regex", "a(", "unclosed group"),
        ("regex", "", "empty"),
        ("json_schema", '{"type": "nope"}', "nope"),
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"type": "string", "not": {}}', "not"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x"}', "not"),
        ("grammar", "start: foo", "foo"),
        ("grammar", "root ::= foo", "foo"),
        ("grammar", "", "root"),
        ("choice", "[]", "list of strings"),
        ("choice", "[1]", "list of strings"),
        ("choice", '["", "a"]', "list of strings"),
        ("choice", "yes", "Expecting value"),
        ("regex", "a" * 300_000, "characters"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
        ("grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000, "nested"),
        ("grammar", "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, "recursion"),
    ],
)
def test_what_is_no_grammar_is_refused_in_the_librarys_words(engine, kind, spec, words):
    with pytest.raises(BadRequest, match=re.escape(words)) as caught:
        engine.submit_sample(request("q", StructuredOutput(kind, spec)))
    assert caught.value.field == "structured_outputs"
    assert engine.num_sampling == 0


def test_what_takes_too_long_is_broken_off_and_the_next_is_served(engine):
    with pytest.raises(BadRequest, match="simpler"):
        engine.submit_sample(request("q", StructuredOutput("json_schema", '{"type":"integer","multipleOf":9999991}')))
    assert run_all(engine, request("q", StructuredOutput("choice", '["a"]')))["q"][0].text == "a"


def test_a_checker_that_was_killed_is_replaced(compiler):
    compiler(StructuredOutput("regex", "before"))
    compiler._checker._process.kill()
    compiler._checker._process.wait()
    compiler(StructuredOutput("regex", "after"))


def test_what_fails_at_its_first_tokens_is_refused_at_once(engine):
    with pytest.raises(BadRequest, match="structured_outputs"):
        engine.submit_sample(request("q", StructuredOutput("regex", "((a{1000}){1000}){1000}")))


def test_a_checker_that_cannot_run_is_not_the_callers_fault(compiler, monkeypatch):
    compiler.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OperationFailed):
        compiler(StructuredOutput("regex", "never seen before"))
    assert compiler._checker._process is None


def test_only_the_last_grammars_are_kept(compiler, monkeypatch):
    monkeypatch.setattr(grammars, "_MAX_KEPT", 2)
    first, second = (compiler(StructuredOutput("regex", text)) for text in "xy")
    compiler(StructuredOutput("regex", "x"))
    compiler(StructuredOutput("regex", "z"))
    assert compiler(StructuredOutput("regex", "x")) is first
    assert compiler(StructuredOutput("regex", "y")) is not second
