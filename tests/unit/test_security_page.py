"""The threat model: each line names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("<!-- threats -->")[2].partition("<!-- end threats -->")[0]
LINES = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line][1:]


def test_there_is_a_table():
    assert len(LINES) > 20


@pytest.mark.parametrize("line", LINES, ids=[line.split("|")[1].strip() for line in LINES])
def test_the_tests_of_a_threat_exist(line: str):
    threat, answer, proof = (cell.strip() for cell in line.strip("| ").split(" | "))
    assert threat
    assert answer
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", proof)
    assert named, threat
    assert len(named) == proof.count("`") // 2, proof
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert name in found, f"{file} has no {name}"
