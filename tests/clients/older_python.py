"""Lets Python 3.11 read the official Loops client: type parameters in brackets (PEP 695) came with 3.12.

python older_python.py ENVIRONMENT

They serve annotations, which this client never evaluates (``from __future__ import annotations``): without the brackets
its functions do what they did.
"""

import re
import sys
from pathlib import Path

_TYPE_PARAMETERS = re.compile(r"^(\s*def \w+)\[[^\]\n]*\]\(", re.MULTILINE)


def rewrite(folder: Path) -> int:
    """How many functions of ``folder`` had type parameters; now none has."""
    found = 0
    for path in folder.rglob("*.py"):
        text, number = _TYPE_PARAMETERS.subn(r"\1(", path.read_text())
        if number:
            assert "from __future__ import annotations" in text, path
            path.write_text(text)
            found += number
    return found


if __name__ == "__main__":
    (packages,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
    rewrite(packages / "baseten" / "loops")
