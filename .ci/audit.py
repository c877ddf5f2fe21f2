"""Look the pinned packages up among the known vulnerabilities, with pip-audit; run by ``make audit``.

Exit status 1 for a vulnerability that is not in ``audit-ignored.toml`` beside this file. Where the database of
vulnerabilities cannot be reached that is said, loudly, and is no failure: a machine without it must be able to build.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IGNORED = HERE / "audit-ignored.toml"
LISTS = ["torch.txt", "dev.txt"]


@dataclass
class Verdict:
    """What an audit found; ``failures`` are for the exit status, ``notices`` for people."""

    failures: list[str] = field(default_factory=list[str])
    notices: list[str] = field(default_factory=list[str])


def judge(dependencies: Sequence[Mapping[str, Any]], ignored: Mapping[str, str]) -> Verdict:
    """Weigh pip-audit's list of packages. ``ignored`` has the reason for each id that is known and accepted."""
    verdict = Verdict()
    unseen = [str(package["name"]) for package in dependencies if "skip_reason" in package]
    found: set[str] = set()
    for package in dependencies:
        for vulnerability in package.get("vulns", []):
            ids = {vulnerability["id"], *vulnerability.get("aliases", [])}
            found |= ids
            fixed = ", ".join(vulnerability.get("fix_versions", [])) or "no version"
            told = f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}"
            if reason := next((ignored[id] for id in sorted(ids) if id in ignored), None):
                verdict.notices.append(f"accepted: {told} ({reason})")
            else:
                verdict.failures.append(told)
    if unseen and len(unseen) == len(dependencies):
        verdict.notices.append("NOT AUDITED: the database of vulnerabilities knows none of the packages from here")
    elif unseen:
        verdict.notices.append(f"not audited, {len(unseen)} of {len(dependencies)}: {', '.join(sorted(unseen))}")
    elif stale := sorted(set(ignored) - found):
        verdict.notices.append(f"no longer found, take out of {IGNORED.name}: {', '.join(stale)}")
    return verdict


def main(pip_audit: str) -> int:
    requirements = HERE.parent / "requirements"
    command = [pip_audit, "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    for name in LISTS:
        command += ["-r", str(requirements / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"NOT AUDITED: the database of vulnerabilities cannot be reached ({last[:300]})")
        return 0
    verdict = judge(dependencies, tomllib.loads(IGNORED.read_text(encoding="utf-8"))["ignored"])
    for line in [*verdict.notices, *(f"VULNERABLE {failure}" for failure in verdict.failures)]:
        print(line)
    print(f"{len(dependencies)} packages, {len(verdict.failures)} with a known vulnerability")
    return 1 if verdict.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
