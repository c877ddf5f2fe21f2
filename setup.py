"""What pyproject.toml cannot say: files of the clone that the wheel carries, so that ``selfloop demo`` needs no clone.

The clone keeps them where people look for them; a copy is made when a wheel is built, never in the source tree.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARRIED = ("examples/quickstart.py", "examples/data/captain.jsonl", "requirements/client.txt")
INTO = Path("selfloop/cli/data")


class BuildWithCarried(build_py):
    """The package, and below ``selfloop/cli/data`` the files of the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in CARRIED:
            target = Path(self.build_lib) / INTO / name
            self.mkpath(str(target.parent))
            self.copy_file(name, str(target))


setup(cmdclass={"build_py": BuildWithCarried})
