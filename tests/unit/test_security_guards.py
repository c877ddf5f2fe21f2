"""What no line of the source may do: load pickles, run code from data, unpack archives blindly, skip TLS."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "selfloop"

_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "xmlrpc"}
# By the last parts of the called name.
_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "__import__": "imports what a text names",
    "compile": "makes code of text",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "torch.hub.load": "runs remote code",
    "yaml.load": "makes objects of text",
    "yaml.unsafe_load": "makes objects of text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "shutil.unpack_archive": "unpacks what it is given",
    "extractall": "unpacks what it is given",
    "tempfile.mktemp": "names a file that somebody else may make",
    "ssl._create_unverified_context": "skips the check of certificates",
}
_ALLOWED = {"re.compile", "grammar.compile", "self._compiler.compile"}
_KEYWORDS = {
    "trust_remote_code": "runs a model folder's code",
    "allow_pickle": "unpickles",
    "shell": "runs a shell",
}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"imports {name.name}" for name in names if name.name.split(".")[0] in _MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in _MODULES:
                    yield f"imports from {module}"
                yield from (f"imports {module}.{n.name}" for n in names if f"{module}.{n.name}" in _CALLS)
            case ast.Call(func=function, keywords=keywords):
                name = ast.unparse(function)
                for bad, why in _CALLS.items():
                    if name == bad or (("." in bad or bad == "extractall") and name.endswith(f".{bad}")):
                        yield f"{name}: {why}"
                for keyword in keywords:
                    if keyword.arg in _KEYWORDS and ast.unparse(keyword.value) != "False":
                        yield f"{name}({keyword.arg}=...): {_KEYWORDS[keyword.arg]}"
                    if keyword.arg == "verify" and ast.unparse(keyword.value) == "False":
                        yield f"{name}(verify=False): skips the check of certificates"
                is_auto = name.endswith(".from_pretrained") and name.startswith("Auto")
                if is_auto and "trust_remote_code" not in {keyword.arg for keyword in keywords}:
                    yield f"{name}: does not say that no code of the folder runs"
            case _:
                pass


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_no_line_of_the_source_loads_or_runs_what_it_is_given(path: Path):
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(path)",
        "from torch import load; torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=flag)",
        "archive.extractall(path)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "httpx.get(url, verify=False)",
        "import tarfile",
    ],
)
def test_the_guard_sees(line: str):
    assert list(offences(line))
