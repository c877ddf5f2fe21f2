"""Runs in the SDK's own Python: every ``check_*`` of the modules named, against the server in the environment.

Prints one JSON object: the name of each check and its traceback, or null when it passed.
"""

import importlib
import json
import sys
import traceback
import warnings


def main() -> None:
    warnings.simplefilter("ignore")
    report: dict[str, str | None] = {}
    for module in map(importlib.import_module, sys.argv[1:]):
        for name, check in list(vars(module).items()):
            if name.startswith("check_"):
                try:
                    check()
                    report[f"{module.__name__}.{name}"] = None
                except Exception:
                    report[f"{module.__name__}.{name}"] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
