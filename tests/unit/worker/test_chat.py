"""Conversations in the model's own template, against transformers."""

import json
import resource
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

import served_model
from selfloop.convert import prepare
from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.tool_templates import template_with_tools
from selfloop.worker.protocol import RenderChat
from selfloop.worker.text import chat
from selfloop.worker.text.chat import ChatTemplate

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}},
]
CHATS = [
    [{"role": "user", "content": "Hi <|im_end|> é"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2"}],
    [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"},
    ],
]
# Uses what templates in the wild use: special tokens, tools as JSON, namespaces, loop controls, a variable.
RICH = """{{ bos_token }}{% set ns = namespace(count=0) %}
{%- if tools %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'stop' %}{% break %}{% endif %}
    {%- if message.role == 'refused' %}{{ raise_exception('Only user and assistant, please') }}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is defined %}{{ message.content }}{% else %}{{ message.tool_calls | tojson }}{% endif %}
    {{- eos_token }}
{%- endfor %}{{ ns.count }}{{ mood | default('calm') }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return served_model.save(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """The tiny model's tokenizer, without a template of its own."""
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((plain / name).read_bytes())
    return tmp_path


def configure(folder: Path, **settings: object) -> None:
    special = {
        "bos_token": {"__type": "AddedToken", "content": served_model.SPECIAL[0], "special": True},
        "eos_token": served_model.SPECIAL[2],
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def load(folder: Path) -> ChatTemplate:
    return ChatTemplate.load(folder, ModelTokenizer.load(folder))


def render(folder: Path, messages, tools=None, options=None, **settings) -> list[int]:
    encoded = [None if part is None else json.dumps(part).encode() for part in (tools, options)]
    return (
        load(folder)
        .tokens(RenderChat(json.dumps(messages).encode(), tools=encoded[0], options=encoded[1], **settings))
        .tokens
    )


def reference(folder: Path, messages, tools=None, options=None, **settings) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=False,
        **{"add_generation_prompt": True, **settings},
        **(options or {}),
    )


def assert_agrees(folder: Path, messages, **settings) -> None:
    assert render(folder, messages, **settings) == reference(folder, messages, **settings)


@pytest.mark.parametrize("messages", CHATS[:2])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_tiny_models_own_template(plain, messages, prompt):
    assert_agrees(plain, messages, add_generation_prompt=prompt)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_rich_template(folder, messages, tools):
    configure(folder, chat_template=RICH)
    assert_agrees(folder, messages, tools=tools)
    assert_agrees(folder, messages, tools=tools, options={"mood": "merry", "eos_token": "!"})


@pytest.mark.parametrize("content", ["One", "Two  ", [{"type": "text", "text": "Three"}]])
def test_the_final_message_is_continued(folder, content):
    configure(folder, chat_template=RICH)
    messages = [*CHATS[0], {"role": "assistant", "content": content}]
    settings = {"add_generation_prompt": False, "continue_final_message": True}
    if isinstance(content, str):
        assert_agrees(folder, messages, **settings)
    else:
        assert render(folder, messages, **settings) == reference(folder, messages, **settings)
    with pytest.raises(BadRequest, match="continue_final_message"):
        render(folder, messages, continue_final_message=True)


def test_named_templates(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    configure(folder, chat_template=named)
    for tools in (None, [], TOOLS):
        assert_agrees(folder, CHATS[0], tools=tools or None)
    configure(folder, chat_template=named[1:])
    assert_agrees(folder, CHATS[0], tools=TOOLS)
    with pytest.raises(BadRequest, match=r"messages: .* only tool_use"):
        render(folder, CHATS[0])


def test_a_file_of_its_own_wins(folder):
    configure(folder, chat_template="from the config")
    (folder / "chat_template.jinja").write_text("from the file")
    assert_agrees(folder, CHATS[0])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    assert_agrees(folder, CHATS[0])
    assert_agrees(folder, CHATS[0], tools=TOOLS)


def test_special_tokens_of_the_older_file(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": served_model.SPECIAL[2]}}))
    (folder / "chat_template.jinja").write_text("{{ bos_token is defined }}{{ eos_token }}")
    assert_agrees(folder, CHATS[0])


def test_a_template_that_refuses_speaks_for_itself(folder):
    configure(folder, chat_template=RICH)
    with pytest.raises(BadRequest, match=r"messages: .*Only user and assistant, please"):
        render(folder, [{"role": "refused", "content": "x"}])


def test_a_model_without_a_template(folder):
    configure(folder)
    with pytest.raises(BadRequest, match=r"messages: .*template"):
        render(folder, CHATS[0])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": b"[]"}, "messages"),
        ({"messages": b"{}"}, "messages"),
        ({"messages": b"[1]"}, "messages"),
        ({"messages": b"[" * 100_000}, "messages"),
        ({"messages": b'[{"role": "user", "content": ' + b"[" * 100_000}, "messages"),
        ({"messages": b'[{"role": 1}]'}, "messages"),
        ({"messages": b'[{"role": "user", "content": {"a": 1}}]', "tools": b"{}"}, "tools"),
        ({"messages": b'[{"role": "user"}]', "options": b"[]"}, "chat_template_kwargs"),
        ({"messages": b'[{"role": "user"}]', "options": b'{"chat_template": "{{ 1 }}"}'}, "chat_template_kwargs"),
        ({"messages": b'[{"role": "user", "content": "%b"}]' % (b"a" * 5_000_000)}, "messages"),
        ({"messages": b'[{"role": "user", "content": "%b"}]' % (b"a" * 3_000_000)}, "messages"),
    ],
)
def test_bad_conversations_name_their_field(folder, body, field):
    configure(folder, chat_template=RICH)
    with pytest.raises(BadRequest) as caught:
        load(folder).tokens(RenderChat(**body))
    assert caught.value.field == field


def test_a_template_cannot_leave_its_sandbox(folder):
    for template in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ messages.append(1) }}"):
        configure(folder, chat_template=template + "{{ x.y.z }}")
        with pytest.raises(BadRequest):
            render(folder, CHATS[0])


def test_conversations_that_take_too_long_are_broken_off(folder, monkeypatch):
    monkeypatch.setattr(chat, "_CPU_LIMIT_S", 0.2)
    loops = "{% for a in messages %}{% for b in messages %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
    configure(folder, chat_template=loops)
    with pytest.raises(BadRequest, match="messages"):
        render(folder, CHATS[0] * 3_000)
    assert render(folder, CHATS[0]) == []


HUNGRY = [
    "{{ 'a' * 20000000000 }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{% set ns = namespace(text='ab') %}{% for i in range(60) %}{% set ns.text = ns.text + ns.text %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
    "{{ ('a' * 1000000) | list | map('upper') | list | join('b' * 1000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ [0] * 2000000000 }}",
    "{{ 'a' | replace('', 'b' * 900000000) }}",
    "{{ ('a' * 100000000) | tojson | tojson | tojson }}",
]


@pytest.mark.parametrize("template", HUNGRY)
def test_a_templates_memory_is_bounded(template, folder):
    configure(folder, chat_template=template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRequest, match=r"messages: .* within (256 MiB|2 s)"):
        render(folder, CHATS[0])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    configure(folder, chat_template="fine")
    assert_agrees(folder, CHATS[0])


def test_a_template_that_computes_in_one_piece_is_ended(folder, monkeypatch):
    monkeypatch.setattr(chat, "_CPU_LIMIT_S", 0.2)
    configure(folder, chat_template="{{ (7 ** 3000000) % 10 + (7 ** 30000000) % 10 + (7 ** 300000000) % 10 }}")
    with pytest.raises(BadRequest, match=r"messages: .* within"):
        render(folder, CHATS[0])
    configure(folder, chat_template="fine")
    assert_agrees(folder, CHATS[0])


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b <|PAD|> c"}], None, "messages[1].content"),
        ([{"role": "user", "content": "a", "tool_calls": [{"x": {"y": "<|PAD|>"}}]}], None, "messages[0].tool_calls"),
        ([{"role": "<|PAD|>", "content": "a"}], None, "messages[0].role"),
        ([{"role": "user", "content": "a"}], [{"name": "<|PAD|>"}], "tools"),
    ],
)
def test_a_token_that_the_model_has_not_is_named_with_its_field(messages, tools, field, folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 259, "content": "<|PAD|>"})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    configure(folder, chat_template="{{ messages }}{{ tools }}")
    tokenizer = ModelTokenizer.load(folder, served_model.NUM_TOKENS)
    command = RenderChat(json.dumps(messages).encode(), tools=None if tools is None else json.dumps(tools).encode())
    with pytest.raises(
        BadRequest, match=r"'<\|PAD\|>': that is token 259, and the model has tokens 0 to 258"
    ) as caught:
        ChatTemplate.load(folder, tokenizer).tokens(command)
    assert caught.value.field == field


@pytest.fixture(scope="module")
def smollm2_dir(tmp_path_factory) -> Path:
    return prepare.prepare_embedded(tmp_path_factory.mktemp("models") / "smollm2", lambda stage, fraction: None).path


@pytest.mark.smollm2
@pytest.mark.parametrize("messages", CHATS[:2])
def test_the_embedded_model(smollm2_dir, messages):
    assert_agrees(smollm2_dir, messages)


@pytest.mark.smollm2
@pytest.mark.parametrize("messages", CHATS)
def test_the_embedded_model_with_tools(smollm2_dir, messages):
    """Its folder has no template for them; ours is rendered as if it had."""
    ours = template_with_tools((smollm2_dir / "chat_template.jinja").read_text())
    expected = reference(smollm2_dir, messages, tools=TOOLS, options={"chat_template": ours})
    assert render(smollm2_dir, messages, tools=TOOLS) == expected
