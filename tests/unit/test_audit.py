"""The audit of dependencies: what fails it, what is only reported."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its own module up.
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


def package(*vulnerabilities: str, **more: object) -> dict[str, Any]:
    vulns = [{"id": id, "aliases": [f"alias-{id}"], "fix_versions": ["2"]} for id in vulnerabilities]
    return {"name": "pack", "version": "1", "vulns": vulns} | more


def test_a_known_vulnerability_fails(audit: ModuleType):
    verdict = audit.judge([package("X-1"), package()], {})
    assert verdict.failures == ["pack 1: X-1, fixed in 2"]


@pytest.mark.parametrize("id", ["X-1", "alias-X-1"])
def test_an_accepted_one_is_reported_with_its_reason(audit: ModuleType, id: str):
    verdict = audit.judge([package("X-1")], {id: "not reached"})
    assert verdict.failures == []
    assert "not reached" in verdict.notices[0]
    assert audit.judge([package("X-2")], {id: "not reached"}).failures


def test_what_could_not_be_looked_up_is_reported(audit: ModuleType):
    skipped = {"name": "pack", "skip_reason": "not found"}
    assert "NOT AUDITED" in audit.judge([skipped, skipped], {}).notices[0]
    assert "1 of 2" in audit.judge([skipped, package()], {}).notices[0]
    assert audit.judge([skipped, package("X-1")], {}).failures


def test_an_entry_that_is_not_needed_any_more_is_told(audit: ModuleType):
    assert "X-9" in audit.judge([package()], {"X-9": "old"}).notices[0]


@pytest.mark.parametrize(
    ("output", "status", "says"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X"}]}]}', 1, "VULNERABLE a 1: X"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "0 with a known"),
        ("cannot connect", 0, "NOT AUDITED"),
    ],
)
def test_the_step_of_ci(tmp_path: Path, output: str, status: int, says: str):
    tool = tmp_path / "pip-audit"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    tool.chmod(0o755)
    script = [sys.executable, str(ROOT / ".ci" / "audit.py"), str(tool)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, says in done.stdout) == (status, True), done.stdout + done.stderr
