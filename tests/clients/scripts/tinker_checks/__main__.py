"""Runs in the SDK's own Python: every ``check_*`` beside it, against the server in the environment.

Prints one JSON object: the name of each check and its traceback, or null when it passed.
"""

import json
import traceback
import warnings

import checkpoints
import custom_losses
import losses
import refusals
import rest
import sampling
import training


def main() -> None:
    warnings.simplefilter("ignore")
    report: dict[str, str | None] = {}
    for module in (training, losses, custom_losses, checkpoints, sampling, rest, refusals):
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
