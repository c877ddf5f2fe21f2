"""Runs in the official client's own Python: every ``check_*`` beside it, against the server in the environment.

Prints one JSON object: the name of each check and its traceback, or null when it passed.
"""

import json
import traceback

import around
import checkpoints
import losses
import refusals
import sampling
import training


def main() -> None:
    report: dict[str, str | None] = {}
    for module in (training, losses, checkpoints, sampling, around, refusals):
        for name, check in list(vars(module).items()):
            if name.startswith("check_"):
                try:
                    check()
                    report[name] = None
                except Exception:
                    report[name] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
