"""Compiled kernels on disk: found again as they were, by another process too, and never a wrong one."""

import logging
import subprocess
import sys

import pytest

from ssu_bridge.backends.triton import disk_cache
from ssu_bridge.backends.triton.compile import Argument, Compiled, Grid, Kind
from ssu_bridge.backends.triton.disk_cache import cached, directory

COMPILED = Compiled(
    cubin=bytes(range(256)),
    name="kernel",
    shared_bytes=1024,
    warps=4,
    grid=Grid(24, 1, 0),
    in_place=(0,),
    tensors=5,
    arguments=(Argument(Kind.ADDRESS, 0, 0, 16), Argument(Kind.STRIDE, 3, 1, 8)),
    scratch_pointers=2,
    overlaps=True,
    text={"ptx": "..."},
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSU_BRIDGE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def refuse():
    raise AssertionError("compiled again")


def test_a_kernel_is_found_again():
    assert cached("target", lambda: COMPILED) is COMPILED
    assert cached("target", refuse) == COMPILED._replace(text={})


def test_other_targets_and_other_settings_of_triton_are_other_kernels(monkeypatch):
    cached("target", lambda: COMPILED)
    other = COMPILED._replace(cubin=b"other")
    assert cached("another target", lambda: other).cubin == b"other"
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert cached("target", lambda: other).cubin == b"other"
    monkeypatch.setattr(disk_cache, "_source_hash", lambda: "of another kernel")
    assert cached("target", lambda: COMPILED).cubin == COMPILED.cubin


@pytest.mark.parametrize(
    "text", ("", "{", "[]", "{}", "null", "3", '{"cubin": "?", "arguments": []}', '{"cubin": "", "arguments": []}')
)
def test_a_file_that_is_no_kernel_is_replaced(folder, caplog, text):
    cached("target", lambda: COMPILED)
    (file,) = folder.iterdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cached("target", lambda: COMPILED) is COMPILED
    assert "compiled anew" in caplog.text
    assert cached("target", refuse).cubin == COMPILED.cubin


def test_a_folder_that_cannot_be_written_is_said(folder, caplog):
    folder.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert cached("target", lambda: COMPILED) is COMPILED
    assert "cannot be kept" in caplog.text


def test_a_user_without_a_home_compiles_each_time(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("no home directory")

    monkeypatch.delenv("SSU_BRIDGE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(disk_cache.Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        assert cached("target", lambda: COMPILED) is COMPILED
    assert "SSU_BRIDGE_CACHE_DIR" in caplog.text


def test_the_default_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("SSU_BRIDGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory() == tmp_path / "ssu_bridge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert directory() == tmp_path / ".cache" / "ssu_bridge"


def test_a_kernel_that_is_kept_needs_no_triton():
    program = """
import sys
from ssu_bridge.backends.triton import _kernel
from ssu_bridge.backends.triton.compile import specialise
from ssu_bridge.backends.triton.tiles import tile
from ssu_bridge.cases import CASES
from ssu_bridge.update import explain
problem = explain(**CASES[0].arrays(seed=0)).choices[0].problem.on("cuda", (9, 0))
print(_kernel(specialise(problem, tile(problem))).target)
print("triton" in sys.modules)
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    (target, compiled), (again, found) = (run.stdout.split("\n")[:2] for run in runs)
    assert target == again
    assert (compiled, found) == ("True", "False")
