"""Compiled kernels on disk: found again as they were, by another process too, and never a wrong or foreign one."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ssu_bridge.api import explain
from ssu_bridge.backends.triton import disk_cache, forms, launch, replay, specialisation
from ssu_bridge.backends.triton.compile import Compiled
from ssu_bridge.backends.triton.disk_cache import cached, directory
from ssu_bridge.backends.triton.specialisation import specialise
from ssu_bridge.backends.triton.tiles import tile
from ssu_bridge.backends.triton.triton_cache import PLACES, with_files
from ssu_bridge.cases import CASES
from ssu_bridge.testing.cases import Case, arguments

PROBLEM = explain(**CASES[0].arrays(seed=0)).choices[0].problem.on("cuda", (9, 0))
KERNEL = specialise(PROBLEM, tile(PROBLEM))
COMPILED = Compiled(
    cubin=b"\x7fELF" + bytes(range(256)),
    name="kernel",
    shared_bytes=1024,
    warps=4,
    passed=("state", "x", "state_stride"),
    scratch_pointers=2,
    text={"ptx": "..."},
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SSU_BRIDGE_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def refuse():
    raise AssertionError("compiled again")


def spoil(folder, change):
    """Change the text of the one kernel in the cache, its digest included."""
    (file,) = folder.iterdir()
    text = change(file.read_text().partition("\n")[2])
    file.write_text(f"{disk_cache._digest(text)}\n{text}")


def with_field(**fields):
    return lambda text: json.dumps({**json.loads(text), **fields})


def test_a_kernel_is_found_again(folder):
    assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert cached(KERNEL, refuse) == COMPILED._replace(text={})
    assert os.stat(folder).st_mode & 0o777 == 0o700


def test_another_specialisation_is_another_kernel():
    cached(KERNEL, lambda: COMPILED)
    for field, value in {"pad_slot_id": 3, "unaligned": ("x",), "capability": (8, 0)}.items():
        other = COMPILED._replace(name=field)
        assert cached(dataclasses.replace(KERNEL, **{field: value}), lambda other=other: other).name == field


# What the order and the meaning of a kernel's arguments come from, each changed as a later version could.
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (launch, "VECTOR_BYTES", 32),
        (specialisation, "_OVERLAPPING", (12, 0)),
        (launch, "ARGUMENTS", {"dt": None}),
        (launch, "SEED_BYTES", 4),
        (disk_cache, "_source_hash", lambda: "of other files"),
    ],
)
def test_what_the_launch_depends_on_is_in_the_key(monkeypatch, module, name, value):
    seeded = dataclasses.replace(KERNEL, dtypes=(*KERNEL.dtypes, ("rand_seed", "int64")))
    before = disk_cache._key(seeded)
    if name == "ARGUMENTS":
        x = module.ARGUMENTS["x"]._replace(free="")
        value = {**module.ARGUMENTS, "x": x}
    monkeypatch.setattr(module, name, value)
    assert disk_cache._key(seeded) != before


def test_a_limit_of_registers_is_in_the_key(monkeypatch):
    dtypes = {"*": "bfloat16", "A": "float32", "state": "bfloat16"}
    case = Case("replay", headdim=64, dstate=128, dtypes=dtypes, window=8, most=1, starts=(0,) * 6, pending=(0,) * 6)
    given = arguments(case.arrays(seed=0), "numpy", lambda array: array, case.window)
    problem = explain(**given, **case.flags).choices[0].problem.on("cuda", (9, 0))
    kernel = specialise(problem, forms.tile(problem))
    before = disk_cache._key(kernel)
    monkeypatch.setattr(replay, "_REGISTERS", {})
    assert disk_cache._key(kernel) != before


def test_what_the_user_tells_triton_is_in_the_key(monkeypatch):
    before = disk_cache._key(KERNEL)
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert disk_cache._key(KERNEL) == before
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert disk_cache._key(KERNEL) != before


def test_the_source_of_every_kernel_is_hashed(monkeypatch, tmp_path):
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    files = ("compile.py", "kernels/a.py", "kernels/b.py", "arguments.py")
    for file in files:
        (package / file).write_text("pass\n")
    monkeypatch.setattr(disk_cache.resources, "files", lambda _: package)
    hashes = {disk_cache._source_hash.__wrapped__()}
    for file in files:
        (package / file).write_text("changed\n")
        hashes.add(disk_cache._source_hash.__wrapped__())
    assert len(hashes) == 5


@pytest.mark.parametrize("text", ("", "{", "[]", "{}", "null", "3", "[" * 100_000, '{"cubin": "?"}'))
def test_a_file_that_is_no_kernel_is_replaced(folder, caplog, text):
    cached(KERNEL, lambda: COMPILED)
    spoil(folder, lambda _: text)
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "compiled anew" in caplog.text
    assert cached(KERNEL, refuse).cubin == COMPILED.cubin


@pytest.mark.parametrize(
    "change",
    [
        {"cubin": ""},
        {"cubin": "AAAA"},
        {"cubin": 3},
        {"name": None},
        {"shared_bytes": "0"},
        {"warps": 4.0},
        {"warps": True},
        {"passed": "state"},
        {"passed": ["nothing of this call"]},
        {"scratch_pointers": [2]},
        {"more": 1},
    ],
)
def test_every_field_is_checked(folder, caplog, change):
    cached(KERNEL, lambda: COMPILED)
    spoil(folder, with_field(**change))
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "compiled anew" in caplog.text


@pytest.mark.parametrize("change", (lambda t: t[:-1], lambda t: t[: len(t) // 2], lambda t: t.replace("1024", "2048")))
def test_a_shortened_or_changed_file_is_replaced(folder, caplog, change):
    cached(KERNEL, lambda: COMPILED)
    (file,) = folder.iterdir()
    assert change(file.read_text()) != file.read_text()
    file.write_text(change(file.read_text()))
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "compiled anew" in caplog.text
    assert cached(KERNEL, refuse).cubin == COMPILED.cubin


def test_a_folder_that_cannot_be_written_is_said(folder, caplog):
    folder.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "cannot be kept" in caplog.text


def test_nothing_is_left_behind_where_a_file_cannot_be_put(folder, caplog):
    folder.mkdir(mode=0o700)
    (folder / f"{disk_cache._key(KERNEL)}.json").mkdir()
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "cannot be kept" in caplog.text
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_ctrl_c_when_a_file_is_in_its_place(folder, monkeypatch):
    """It comes through, and the kernel is kept."""
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk_cache.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached(KERNEL, lambda: COMPILED)
    assert cached(KERNEL, refuse).cubin == COMPILED.cubin


# Where it comes between two lines of Python's own, a file is closed by its collection alone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_line(folder, caplog):
    """What is in the cache after it is whole, and is found or made again."""
    from interrupts import Interrupt  # programs import this file without the helpers

    line = 0
    while True:
        line += 1
        with Interrupt(line) as interrupt, contextlib.suppress(KeyboardInterrupt):
            cached(KERNEL, lambda: COMPILED)
        with caplog.at_level(logging.WARNING):
            assert cached(KERNEL, lambda: COMPILED).cubin == COMPILED.cubin
        assert cached(KERNEL, refuse).cubin == COMPILED.cubin
        if interrupt.seen < line:
            break
        shutil.rmtree(folder)
    assert line > 50
    assert not caplog.text  # no file was found that is not whole


# Programs that fill the cache with one kernel, large enough that it is written in several pieces.
FILL = """
import logging, os, resource, sys
sys.path.insert(0, {folder!r})
from test_triton_cache import COMPILED, KERNEL, cached, directory, disk_cache
LARGE = COMPILED._replace(cubin=COMPILED.cubin * 4000)
def fill():
    path = directory() / f"{{disk_cache._key(KERNEL)}}.json"
    disk_cache._write(path, LARGE)
    assert cached(KERNEL, None).cubin == LARGE.cubin  # whole, whoever wrote it
"""
FOREVER = (
    FILL
    + """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
fill()
print("ready", flush=True)
try:
    while True:
        fill()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
)
FULL = (
    FILL
    + """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # as a disk that has no room for more
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logging.basicConfig()
assert cached(KERNEL, lambda: LARGE) is LARGE
"""
)


def started(program):
    source = program.format(folder=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_fill_the_cache_at_once(folder):
    processes = [started(FILL + "for _ in range(25): fill()") for _ in range(3)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 3
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_ctrl_c_while_files_are_written_leaves_them_whole(folder):
    for number in range(3):
        process = started(FOREVER)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * number)
        process.send_signal(signal.SIGINT)
        try:
            said, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (said, process.returncode) == ("interrupted\n", 0), errors
        assert [path.suffix for path in folder.iterdir()] == [".json"]
        assert cached(KERNEL, refuse).cubin[:4] == b"\x7fELF"


def test_a_full_disk_is_said_and_nothing_is_left_behind(folder):
    process = started(FULL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert "cannot be kept" in errors
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("mode", (0o720, 0o702, 0o777))
def test_a_folder_that_another_user_can_write_is_not_used(folder, caplog, mode):
    cached(KERNEL, lambda: COMPILED)
    folder.chmod(mode)
    other = COMPILED._replace(name="compiled anew")
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: other) is other
    assert "nobody else can write" in caplog.text
    folder.chmod(0o755)
    assert cached(KERNEL, refuse).name == COMPILED.name


def test_a_folder_of_another_user_is_not_used(folder, caplog, monkeypatch):
    cached(KERNEL, lambda: COMPILED)
    monkeypatch.setattr(disk_cache.os, "getuid", lambda: os.stat(folder).st_uid + 1)
    other = COMPILED._replace(name="compiled anew")
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: other) is other
    assert "nobody else can write" in caplog.text


def test_a_user_without_a_home_compiles_each_time(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("no home directory")

    monkeypatch.delenv("SSU_BRIDGE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(disk_cache.Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        assert cached(KERNEL, lambda: COMPILED) is COMPILED
    assert "SSU_BRIDGE_CACHE_DIR" in caplog.text


# Triton has a cache of its own, in the home too.
COMPILE = """
import logging, os
{before}
logging.basicConfig()
from test_triton_cache import KERNEL, cached
from ssu_bridge.backends.triton.compile import compile_step
assert cached(KERNEL, lambda: compile_step(KERNEL)).cubin[:4] == b"\\x7fELF"
print("compiled in", os.listdir())
"""
NO_HOME = """
import pwd
def unknown(number):
    raise KeyError(number)
pwd.getpwuid = unknown
"""


# Nobody, an administrator neither, can make files in /proc.
@pytest.mark.parametrize(("home", "before"), [("/proc", ""), (None, NO_HOME)], ids=["read-only", "none"])
def test_a_home_that_cannot_be_written_is_no_obstacle(home, before, tmp_path):
    told = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", *PLACES)}
    del told["SSU_BRIDGE_CACHE_DIR"]
    told |= {"PYTHONPATH": os.path.dirname(__file__)} | ({"HOME": home} if home else {})
    command = [sys.executable, "-c", COMPILE.format(before=before)]
    result = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("compiled in []\n", 0), result.stderr
    assert "the next process compiles it too" in result.stderr or "SSU_BRIDGE_CACHE_DIR" in result.stderr


def test_a_full_home_is_no_obstacle(caplog):
    """Triton compiles in a temporary folder, of which nothing is left, and in its own one the next time."""
    knobs = pytest.importorskip("triton").knobs
    folders, before, told = [], knobs.cache.dir, dict(os.environ)

    def compile_it():
        folders.append(knobs.cache.dir)
        if len(folders) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.path.isdir(folders[-1])

    with caplog.at_level(logging.WARNING):
        assert with_files(compile_it)
    assert "No space left" in caplog.text
    assert folders[0] == before != folders[1]
    assert not os.path.exists(folders[1])
    assert (knobs.cache.dir, dict(os.environ)) == (before, told)


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSU_BRIDGE_CACHE_DIR", "~/kernels")
    assert directory() == tmp_path / "kernels"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSU_BRIDGE_CACHE_DIR", "here")
    assert directory() == tmp_path / "here"
    monkeypatch.delenv("SSU_BRIDGE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert directory() == tmp_path / "xdg" / "ssu_bridge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert directory() == tmp_path / ".cache" / "ssu_bridge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert directory() == tmp_path / ".cache" / "ssu_bridge"


def test_a_kernel_that_is_kept_needs_no_triton():
    program = """
import sys
from ssu_bridge.api import explain
from ssu_bridge.backends.triton.backend import _kernel
from ssu_bridge.backends.triton.specialisation import specialise
from ssu_bridge.backends.triton.tiles import tile
from ssu_bridge.cases import CASES
problem = explain(**CASES[0].arrays(seed=0)).choices[0].problem.on("cuda", (9, 0))
print(_kernel(specialise(problem, tile(problem))).target)
print("triton" in sys.modules)
"""
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    (target, compiled), (again, found) = (run.stdout.split("\n")[:2] for run in runs)
    assert target == again
    assert (compiled, found) == ("True", "False")
