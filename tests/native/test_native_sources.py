"""The C++ sources: headers that stand by themselves, and code for one instruction set that cannot get into another's."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tvm_ffi.libinfo import find_include_path

from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE

NATIVE = Path(__file__).parents[2] / "ssu_bridge" / "native"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}
HEADERS = sorted(path.relative_to(NATIVE) for path in NATIVE.rglob("*.h"))
# What has a source of its own is included first there, so the build shows that it stands by itself.
ALONE = [header for header in HEADERS if not (NATIVE / header).with_suffix(".cc").exists()]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for another processor")


def compile_(*arguments, isa):
    command = [COMPILER, "-std=c++17", f"-I{NATIVE}", *FLAGS[isa], *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("header", sorted(set(HEADERS) - set(ALONE)), ids=str)
def test_a_source_includes_its_own_header_first(header):
    includes = re.findall(r'^#include [<"](.+)[>"]$', (NATIVE / header).with_suffix(".cc").read_text(), re.MULTILINE)
    assert includes[0] == str(header)


@needs_compiler
@pytest.mark.parametrize("header", ALONE, ids=str)
def test_a_header_compiles_alone(header):
    isa = next((isa for isa in FLAGS if header.stem.endswith(isa)), "portable")
    if isa != "portable" and platform.machine() != "x86_64":
        pytest.skip("for another processor")
    result = compile_("-fsyntax-only", f"-I{find_include_path()}", "-x", "c++", NATIVE / header, isa=isa)
    assert result.returncode == 0, result.stderr


@needs_compiler
@needs_x86
@pytest.mark.parametrize("isa", FLAGS)
def test_a_step_shares_no_function_with_the_rest_of_the_library(isa, tmp_path):
    """The linker would keep one of several copies, perhaps the one that needs the wider instructions."""
    compiled = tmp_path / "step.o"
    result = compile_("-O0", "-c", NATIVE / "cpu" / f"step_{isa}.cc", "-o", compiled, isa=isa)
    assert result.returncode == 0, result.stderr
    symbols = subprocess.run(["nm", "--demangle", compiled], check=True, capture_output=True, text=True).stdout
    functions = [line.split(" ", 2)[2] for line in symbols.splitlines() if re.match(r"[0-9a-f]+ [TW] ", line)]
    assert [symbol.split("(")[0] for symbol in functions] == [f"ssu_bridge::step_{isa}"]


def test_the_most_tokens_of_a_tree_are_those_of_the_table():
    assert f"kMaxTreeTokens = {MOST_TOKENS_OF_A_TREE};" in (NATIVE / "cpu" / "step_arguments.h").read_text()
