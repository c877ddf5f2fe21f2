"""Settings from the command line, the environment and a file: one parser, one order, and errors that name the place."""

import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.types.errors import BadRequest
from selfloop.types.option_sources import load, to_toml
from selfloop.types.option_values import PATH, SWITCH, TEXT, WHOLE, text_of
from selfloop.types.options import Leaf, leaves
from selfloop.types.settings import EngineLimits, Settings

OPTIONS = leaves(Settings)
EXAMPLE = Path(__file__).parents[3] / "deploy" / "selfloop.toml"


def values_of(leaf: Leaf) -> st.SearchStrategy[Any]:
    """Values that an option may have, in the field's own unit."""
    unit = leaf.kind.unit[1]
    least = leaf.option.minimum or 0.0
    most = leaf.option.maximum or 1e6
    if leaf.kind is SWITCH:
        return st.booleans()
    if leaf.kind.choices:
        return st.sampled_from(leaf.kind.choices)
    if leaf.kind in (TEXT, PATH):
        text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)
        return text.map(Path) if leaf.kind is PATH else text
    if leaf.kind is WHOLE:
        return st.integers(int(least), int(most))
    if leaf.kind.word == "SIZE":
        return st.integers(int(least * unit) + 1, int(most * unit))
    return st.floats(least, most).map(lambda amount: amount * unit)


SOME = st.sampled_from(OPTIONS).flatmap(lambda leaf: st.tuples(st.just(leaf), values_of(leaf)))


@given(st.lists(SOME, unique_by=lambda pair: pair[0].key))
def test_a_value_is_read_alike_from_every_source(tmp_path_factory: pytest.TempPathFactory, chosen: list[Any]):
    texts = {leaf.key: text_of(leaf.kind.write(value)) for leaf, value in chosen}
    settings = load(Settings, texts, {}, None)
    for leaf, value in chosen:
        assert leaf.value(settings.settings) == value
    variables = {leaf.env: texts[leaf.key] for leaf, _ in chosen}
    assert load(Settings, {}, variables, None).settings == settings.settings
    file = tmp_path_factory.mktemp("settings") / "selfloop.toml"
    secret = {leaf.path: value for leaf, value in chosen if leaf.option.secret}
    # What is printed is such a file, but for the secrets.
    printed = to_toml(settings)
    file.write_text(printed, encoding="utf-8")
    again = load(Settings, {leaf.key: texts[leaf.key] for leaf in OPTIONS if leaf.path in secret}, {}, file)
    assert again.settings == settings.settings


@pytest.mark.parametrize("leaf", [leaf for leaf in OPTIONS if leaf.former is not None], ids=lambda leaf: leaf.name)
def test_a_former_name_is_still_taken(leaf: Leaf, tmp_path: Path):
    former = leaf.former
    assert former is not None
    file = tmp_path / "selfloop.toml"
    for table in ("", f"[{leaf.group.table}]\n"):
        file.write_text(f'{table}{former.key} = "2GiB"\n', encoding="utf-8")
        found = load(Settings, {}, {}, file)
        assert leaf.value(found.settings) == 2 * 2**30
        assert found.origin(leaf.key).endswith(former.key)
        assert leaf.value(load(Settings, {}, {former.env: "1GiB"}, file).settings) == 2**30
    both = {former.env: "1GiB", leaf.env: "3GiB"}
    assert leaf.value(load(Settings, {}, both, None).settings) == 3 * 2**30
    file.write_text(f'{leaf.key} = "1GiB"\n{former.key} = "2GiB"\n', encoding="utf-8")
    with pytest.raises(BadRequest, match="given once"):
        load(Settings, {}, {}, file)


def test_every_field_is_an_option_or_says_why_not():
    """A field that nobody can set from outside is one that its class explains."""

    def names(kind: type[Any]) -> list[str]:
        found: list[str] = []
        for field in fields(kind):
            made = field.default_factory
            found += names(made) if is_dataclass(made) else [f"{kind.__name__}.{field.name}"]  # type: ignore[arg-type]
        return found

    assert set(names(Settings)) - {"QueueSettings.gap_grace_s", "EngineLimits.memory_parts"} == {
        f"{kind_at(leaf.path)}.{leaf.path[-1]}" for leaf in OPTIONS
    }


def kind_at(path: tuple[str, ...]) -> str:
    holder: Any = Settings()
    for name in path[:-1]:
        holder = getattr(holder, name)
    return type(holder).__name__


def test_defaults_keep_to_their_own_limits():
    for leaf in OPTIONS:
        if leaf.default is not None:
            assert leaf.parse(text_of(leaf.kind.write(leaf.default))) == leaf.default, leaf.name


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(tmp_path: Path):
    file = tmp_path / "selfloop.toml"
    file.write_text('port = 1\nhost = "file"\nlog_format = "json"\n[engine]\ndevice = "cpu"\n')
    environment = {"SELFLOOP_HTTP_PORT": "2", "SELFLOOP_HOST": "variable", "SELFLOOP_DEVICE": ""}
    loaded = load(Settings, {"port": "3"}, environment, file)
    settings = loaded.settings
    assert (settings.port, settings.host, settings.log_format) == (3, "variable", "json")
    assert settings.control.worker.engine.device == "cpu", "an empty variable is none"
    assert settings.control.worker.engine.dtype == "auto"
    origins = {key: loaded.origin(key) for key in ("port", "host", "log_format", "device", "dtype")}
    assert origins == {
        "port": "--port",
        "host": "$SELFLOOP_HOST",
        "log_format": f"{file}: log_format",
        "device": f"{file}: engine.device",
        "dtype": "default",
    }


def test_a_table_may_be_left_out(tmp_path: Path):
    file = tmp_path / "selfloop.toml"
    file.write_text('memory = "900MiB"\nkey_mib_per_second = 1.5\nactivation_memory = 2\nstop_grace = "2m"\n')
    settings = load(Settings, {}, {}, file).settings
    limits = settings.control.worker.engine.limits
    assert limits == EngineLimits(memory_bytes=900 * 2**20, activation_bytes=2 * 2**30)
    assert settings.key_limits.body_bytes_per_s == 1.5 * 2**20
    assert settings.control.stop_grace_s == 120.0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot = 1", "prot: no such option; did you mean port?"),
        ("[engine]\nmax-adapters = 3", "engine.max-adapters: no such option; did you mean max_adapters?"),
        ("[engin]\ndevice = 'cpu'", "[engin]: no such table; did you mean engine?"),
        ("[worker]\ndevice = 'cpu'", "worker.device: an option of [worker]; device belongs in [engine]"),
        ("[worker]\nport = 1", "worker.port: an option of [worker]; port belongs in no table"),
        ("port = 0", "port: a whole number from 1 to 65535, got 0"),
        ("port = '80'", "port: a whole number from 1 to 65535, got 80"),
        ("port = 80.0", "port: a whole number from 1 to 65535, got 80.0"),
        ("port = true", "port: a whole number from 1 to 65535, got true"),
        ("prepare = 1", "prepare: on or off, got 1"),
        ("host = 1", "host: some text, got 1"),
        ("host = ''", "host: some text, got ''"),
        ("[worker]\ntraining_share = nan", "worker.training_share: a number from 0.01 to 0.99, got nan"),
        ("[engine]\nmemory = 'much'", "engine.memory: a size such as 2.6GiB or 900MiB of at least 0.001GiB, got much"),
        ("[engine]\ndevice = 'tpu'", "engine.device: one of auto, cpu, cuda, got tpu"),
        ("[engine]\ndevice = ['cpu']", "engine.device: one of auto, cpu, cuda, got ['cpu']"),
        ("[engine.device]\nname = 'cpu'", "engine.device: one of auto, cpu, cuda, got {'name': 'cpu'}"),
        ("[port]\nnumber = 1", "port: a whole number from 1 to 65535, got {'number': 1}"),
        ("device = 'cpu'\n[engine]\ndevice = 'cpu'", "engine.device: given once, not with its table and without"),
        ("[control]\ndatabase_url = 12345", "control.database_url: some text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(tmp_path: Path, content: str, says: str):
    file = tmp_path / "selfloop.toml"
    file.write_text(content)
    with pytest.raises(BadRequest) as caught:
        load(Settings, {}, {}, file)
    assert str(caught.value) == f"{file}: {says}"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a file that can be read (No such file or directory)"),
        (b"port = =", "a TOML file (Invalid value (at line 1, column 8))"),
        (b"host = '\xff'", "text in UTF-8"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, says: str):
    file = tmp_path / "selfloop.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadRequest) as caught:
        load(Settings, {}, {}, file)
    assert str(caught.value) == f"{file}: {says}"


def test_a_variable_is_named_in_its_error():
    with pytest.raises(BadRequest, match=r"^\$SELFLOOP_DTYPE: one of auto, float32, bfloat16, got int4$"):
        load(Settings, {}, {"SELFLOOP_DTYPE": "int4"}, None)


def test_the_variables_of_earlier_versions_keep_their_names():
    names = {leaf.key: leaf.env for leaf in OPTIONS}
    for key in ("database_url", "store", "data_dir", "hub_url", "capacity", "stable_reinforce", "api_key"):
        assert names[key] == f"SELFLOOP_{key.upper()}"
    # Kubernetes sets SELFLOOP_PORT to the address of a service called selfloop.
    assert "SELFLOOP_PORT" not in names.values()


def test_secrets_are_not_shown():
    secrets = [leaf for leaf in OPTIONS if leaf.option.secret]
    assert {leaf.key for leaf in secrets} == {"api_key", "database_url"}
    loaded = load(Settings, {}, {leaf.env: "hunter2" for leaf in secrets}, None)
    assert "hunter2" not in to_toml(loaded) + repr(loaded.settings) + repr(loaded)
    assert [leaf.value(loaded.settings) for leaf in secrets] == ["hunter2", "hunter2"]


def test_the_example_file_is_of_the_defaults():
    assert load(Settings, {}, {}, EXAMPLE).settings == Settings()
    # With every line uncommented it names every option.
    said = {line.removeprefix("# ").split(" =")[0] for line in EXAMPLE.read_text().splitlines() if " =" in line}
    assert {leaf.key for leaf in OPTIONS} <= said
    assert tomllib.loads(EXAMPLE.read_text())["engine"]["device"] == "auto"
