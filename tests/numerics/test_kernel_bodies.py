"""The bodies of the CPU kernels beside each other: what one computes, the others compute to rounding."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from selfloop.engine.backends.cpu_native import build
from selfloop.engine.backends.cpu_native.instructions import (
    AVX2,
    AVX512,
    AVX512_BF16,
    GENERIC,
    NEON,
    Body,
    has_avx512_bfloat16,
)

HERE = Path(__file__).parent
# Where a product of bfloat16 numbers is rounded once more before it is rounded to bfloat16, that may go the other way.
BOUNDS = {"float32": 2e-6, "of bfloat16": 1e-2}
Outputs = dict[str, list[float]]


def outputs(compiler: str, body: Body, folder: Path, *, runner: str | None = None, runs: bool = True) -> Outputs:
    """What the program says that is compiled for a body; nothing where this machine cannot run it."""
    program = folder / body.name
    command = [compiler, *build.FLAGS, *body.flags, "-I", str(build.SOURCES), str(HERE / "kernel_bodies.cpp")]
    static = [] if runner is None else ["-static"]
    subprocess.run([*command, *static, "-o", str(program)], check=True, capture_output=True, text=True)
    if not runs:
        return {}
    started = [str(program)] if runner is None else [runner, str(program)]
    lines = subprocess.run(started, check=True, capture_output=True, text=True).stdout.splitlines()
    found: Outputs = {}
    for line in lines:
        words = line.split(" ")
        first = next(i for i, word in enumerate(words) if "0x" in word or word.endswith(("inf", "nan")))
        found[" ".join(words[:first])] = [float.fromhex(word) for word in words[first:]]
    return found


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """What every compiler makes, of no instruction that must be there."""
    return outputs("g++", GENERIC, tmp_path_factory.mktemp("generic"))


def assert_equal(found: Outputs, expected: Outputs) -> None:
    assert found.keys() == expected.keys()
    for name, numbers in found.items():
        if name.startswith("exact"):
            assert numbers == expected[name], name
            continue
        bound = next((bound for kind, bound in BOUNDS.items() if kind in name), 2e-6)
        largest = max(abs(x) for x in expected[name])
        assert largest > 0, name
        assert max(abs(a - b) for a, b in zip(numbers, expected[name], strict=True)) <= bound * largest, name


def has(body: Body) -> bool:
    if body == AVX512_BF16:
        return has_avx512_bfloat16()
    known = torch.cpu.get_capabilities()
    names = ("avx2", "fma3") if body == AVX2 else ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
    return all(known.get(name) for name in names)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")
@pytest.mark.parametrize("body", [AVX2, AVX512, AVX512_BF16], ids=lambda body: body.name)
def test_a_body_of_x86_computes_what_every_compiler_makes(body: Body, generic: Outputs, tmp_path: Path):
    found = outputs("g++", body, tmp_path, runs=has(body))
    if not has(body):
        pytest.skip(f"the {body.name} body was compiled, but this CPU has not the instructions to run it")
    assert_equal(found, generic)


def test_neon_computes_what_every_compiler_makes(generic: Outputs, tmp_path: Path):
    own = platform.machine() == "aarch64"
    compiler, emulator = ("g++", None) if own else map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
    if compiler is None or (emulator is None and not own):
        pytest.skip("the NEON body was not run: that takes g++-aarch64-linux-gnu and qemu-user-static (Debian)")
    assert_equal(outputs(compiler, NEON, tmp_path, runner=emulator), generic)
