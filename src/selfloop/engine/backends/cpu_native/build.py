"""The CPU kernels' shared library: compiled once on the machine where it runs, then kept.

They are compiled for the instructions that this CPU has. Where a C++ compiler or anything else is missing,
:func:`kernels` is None, the log says why, and PyTorch's own operators do the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from selfloop.engine.backends.base import Lacking
from selfloop.engine.backends.cpu_native.instructions import GENERIC, Body, best_body, has_bfloat16_tiles
from selfloop.engine.backends.cpu_native.library import VERSION, Kernels

log = logging.getLogger("selfloop.engine")

SOURCES = Path(__file__).parent / "csrc"
_FILES = (
    *("kernels.cpp", "layers.h", "pass.h", "attention.h", "vocabulary.h", "gemm.h"),
    *("simd.h", "simd_avx512.h", "simd_parts.h"),
)
# Products are added with one rounding where the code says it, never where the compiler happens to see a chance: the
# same sum in two places has the same bits.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=default", "-ffp-contract=off")
# GNU, as PyTorch brings the library that their OpenMP calls.
_COMPILERS = ("g++", "c++")
_TIMEOUT_S = 300


@functools.cache
def kernels() -> Kernels | None:
    """The library, compiled if it is not yet; None where it cannot be had."""
    found = look()
    if isinstance(found, Kernels):
        return found
    level = logging.WARNING if found.remedy else logging.INFO
    log.log(level, "no CPU kernels, PyTorch's own operators do the work: %s%s", found.reason, found.remedy)
    return None


def look() -> Kernels | Lacking:
    """The library, or why it cannot be had."""
    if sys.platform != "linux":
        return Lacking("they are compiled on Linux only")
    if has_bfloat16_tiles():
        return Lacking("this CPU multiplies tiles (AMX), which they do not use")
    body = best_body()
    if body == GENERIC:
        return Lacking("this CPU has neither AVX2 nor NEON, and without them PyTorch's operators are faster")
    return built(body)


def built(body: Body) -> Kernels | Lacking:
    """The library for a body, which this CPU need not be able to run."""
    try:
        path = _built(body)
        loaded = Kernels(ctypes.CDLL(str(path)), body)
    except _NoCompiler:
        return Lacking("there is no C++ compiler", "; install g++, or name it in CXX")
    except (OSError, subprocess.SubprocessError) as error:
        return Lacking(str(error), "; correct that, or name another compiler in CXX")
    if loaded.version != VERSION:
        return Lacking(f"{path} is of another version", "; remove it")
    return loaded


class _NoCompiler(Exception):
    """There is no C++ compiler."""


def _built(body: Body) -> Path:
    compiler = os.environ.get("CXX") or next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise _NoCompiler
    digest = hashlib.sha256(" ".join((compiler, *FLAGS, *body.flags)).encode())
    for name in _FILES:
        digest.update((SOURCES / name).read_bytes())
    path = _cache() / f"kernels-{body.name}-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        log.info("compiling the CPU kernels for %s with %s into %s", body.name, compiler, path)
        _compile(compiler, body, SOURCES / "kernels.cpp", path)
    return path


def _cache() -> Path:
    """A folder of this user's own: what lies there is loaded into the process."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "selfloop"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to someone else, or others may write to it")
    return folder


def _compile(compiler: str, body: Body, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([compiler, *FLAGS, *body.flags, "-c", str(source), "-o", str(compiled)])
        # Without OpenMP's library: the one that PyTorch has loaded serves, and threads are not there twice.
        _run([compiler, "-shared", str(compiled), "-o", str(linked)])
        linked.replace(path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise OSError(f"{command[0]} failed: {done.stderr[:500]}")
