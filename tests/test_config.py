"""The configuration: parsing, what is in force, command-line arguments and environment variables."""

import argparse
import asyncio
import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import threading

import pytest

import ssu_bridge
from ssu_bridge import Backend, SSUConfig, config, get_config, set_config, using
from ssu_bridge.testing.cases import Case

CASE = Case("config", headdim=4, dstate=8)


def backend_taken(**arguments):
    choice = ssu_bridge.explain(**CASE.arrays(seed=0), **arguments).choices[0]
    return choice.problem.options.config.backend


def test_names_are_parsed_whatever_their_case():
    assert SSUConfig(backend="CPU").backend is Backend.CPU
    assert SSUConfig(backend=Backend.XLA).backend is Backend.XLA
    assert SSUConfig(algorithm="Simple").algorithm == "simple"
    assert SSUConfig(philox_rounds=0) == SSUConfig()
    assert hash(SSUConfig(philox_rounds=0)) == hash(SSUConfig())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"backend": "gpu"}, ValueError, "backend: expected one of auto, .*reference; got 'gpu'"),
        ({"backend": 1}, TypeError, "backend: expected a string or a Backend, got int"),
        (
            {"algorithm": "fast"},
            ValueError,
            "algorithm: expected one of auto, loop, matrix, simple, vertical, horizontal; got 'fast'",
        ),
        ({"algorithm": None}, ValueError, "algorithm: .*got None"),
        ({"philox_rounds": True}, ValueError, "philox_rounds: expected an int >= 0"),
        ({"philox_rounds": -1}, ValueError, "philox_rounds: expected an int >= 0"),
        ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding: expected a bool, got 1"),
        ({"strict_in_place": "yes"}, TypeError, "strict_in_place: expected a bool, got 'yes'"),
    ],
)
def test_wrong_fields(fields, error, message):
    with pytest.raises(error, match=message):
        SSUConfig(**fields)
    with pytest.raises(error, match=message), using(**fields):
        pass


def test_the_argument_comes_before_using_before_set_config():
    assert backend_taken() is Backend.AUTO
    set_config(SSUConfig(backend="xla"))
    assert backend_taken() is Backend.XLA
    with using(backend="cpu") as config:
        assert get_config() is config
        assert backend_taken() is Backend.CPU
        with using(SSUConfig(backend="reference"), algorithm="simple"):
            assert backend_taken() is Backend.REFERENCE
            assert get_config().algorithm == "simple"
            assert backend_taken(backend="cpu") is Backend.CPU
        assert backend_taken() is Backend.CPU
    assert backend_taken() is Backend.XLA


def test_update_follows_a_change_of_configuration():
    arrays = CASE.arrays(seed=0)
    ssu_bridge.update(**arrays)
    set_config(SSUConfig(backend="xla"))
    with pytest.raises(ssu_bridge.UnsupportedError, match="xla"):
        ssu_bridge.update(**arrays)
    with using(backend="cpu"):
        ssu_bridge.update(**arrays)


def test_using_ends_with_an_error_too():
    def fail():
        with using(backend="cpu"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert get_config().backend is Backend.AUTO


def test_using_is_for_its_thread_and_task_only():
    seen = []
    with using(backend="xla"):
        thread = threading.Thread(target=lambda: seen.append(get_config().backend))
        thread.start()
        thread.join()
    assert seen == [Backend.AUTO]

    async def task(name):
        with using(backend=name):
            await asyncio.sleep(0)
            return get_config().backend

    async def both():
        return await asyncio.gather(task("cpu"), task("xla"))

    assert asyncio.run(both()) == [Backend.CPU, Backend.XLA]


def test_set_config_is_for_all_threads():
    seen = []
    set_config(SSUConfig(backend="cpu"))
    thread = threading.Thread(target=lambda: seen.append(get_config().backend))
    thread.start()
    thread.join()
    assert seen == [Backend.CPU]


@pytest.mark.parametrize("function", [set_config, lambda config: using(config).__enter__()])
def test_only_a_configuration_is_one(function):
    with pytest.raises(TypeError, match="config: expected an SSUConfig, got str"):
        function("cpu")


def test_command_line_arguments():
    parser = argparse.ArgumentParser()
    ssu_bridge.add_cli_args(parser)
    assert SSUConfig.from_args(parser.parse_args([])) == get_config()
    words = "--mamba-backend XLA --mamba-ssu-algorithm vertical --mamba-cache-philox-rounds 7"
    given = parser.parse_args([*words.split(), "--enable-mamba-cache-stochastic-rounding", "--mamba-round-each-token"])
    expected = SSUConfig("xla", "vertical", round_each_token=True, stochastic_rounding=True, philox_rounds=7)
    assert SSUConfig.from_args(given) == expected


def test_command_line_defaults_are_those_in_force():
    with using(backend="cpu", stochastic_rounding=True):
        parser = argparse.ArgumentParser()
        ssu_bridge.add_cli_args(parser)
        assert SSUConfig.from_args(parser.parse_args([])) == get_config()
        with using(strict_in_place=True):
            assert SSUConfig.from_args(parser.parse_args([])) == get_config()
        off = parser.parse_args(["--no-enable-mamba-cache-stochastic-rounding"])
        assert not SSUConfig.from_args(off).stochastic_rounding


def test_a_parser_without_the_flag_that_serving_engines_lack():
    parser = argparse.ArgumentParser()
    ssu_bridge.add_cli_args(parser)
    given = parser.parse_args([])
    del given.mamba_round_each_token
    with using(round_each_token=True):
        assert SSUConfig.from_args(given) == dataclasses.replace(get_config(), round_each_token=True)


def test_an_unknown_name_on_the_command_line_lists_the_valid_ones(capsys):
    parser = argparse.ArgumentParser()
    ssu_bridge.add_cli_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--mamba-backend", "cuda"])
    assert "(choose from 'auto', 'triton', 'flashinfer', 'cpu', 'xla', 'reference')" in capsys.readouterr().err


def test_a_wrong_environment_variable_ends_a_program_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(config, "_process_config", None)
    monkeypatch.setenv("SSU_BRIDGE_ALGORITHM", "nope")
    with pytest.raises(SystemExit) as ended:
        ssu_bridge.add_cli_args(argparse.ArgumentParser("server"))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "server: error: environment variable SSU_BRIDGE_ALGORITHM: algorithm: expected one of auto, "
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("rounds", ["-1", "ten", "1.5"])
def test_rounds_on_the_command_line_are_a_number(capsys, rounds):
    parser = argparse.ArgumentParser()
    ssu_bridge.add_cli_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--mamba-cache-philox-rounds={rounds}"])
    assert f"expected a number of at least 0 (0 means 10), got {rounds!r}" in capsys.readouterr().err


def test_a_configuration_goes_to_another_process():
    pickled = pickle.dumps(SSUConfig("cpu", "simple", strict_in_place=True))
    code = f"""import pickle, ssu_bridge as s; c = pickle.loads({pickled!r})
print(c == s.SSUConfig("cpu", "simple", strict_in_place=True), hash(c) == hash(s.SSUConfig("cpu", "simple", strict_in_place=True)))"""
    assert run_with(code, PYTHONHASHSEED="7").stdout == "True True\n"


def run_with(code, **variables):
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variables():
    code = "import ssu_bridge as s; c = s.get_config(); print(c.backend, c.algorithm)"
    result = run_with(code, SSU_BRIDGE_BACKEND="Reference", SSU_BRIDGE_ALGORITHM="simple")
    assert result.stdout == "reference simple\n"
    result = run_with(f"import ssu_bridge as s; s.set_config(s.SSUConfig()); {code}", SSU_BRIDGE_BACKEND="xla")
    assert result.stdout == "auto auto\n"
    result = run_with(code, SSU_BRIDGE_BACKEND="fast")
    assert "ValueError: environment variable SSU_BRIDGE_BACKEND: backend: expected one of auto" in result.stderr


def test_the_hash_is_no_field():
    config = SSUConfig("cpu", philox_rounds=7, triton_tile=[8, 4])
    expected = {
        "backend": Backend.CPU,
        "algorithm": "auto",
        "round_each_token": False,
        "stochastic_rounding": False,
        "philox_rounds": 7,
        "strict_in_place": False,
        "triton_tile": (8, 4),
    }
    assert dataclasses.asdict(config) == expected
    assert SSUConfig(**expected) == config
    assert "_hash" not in repr(config)
    for other in (SSUConfig(**expected), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert hash(other) == hash(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backend = "xla"
