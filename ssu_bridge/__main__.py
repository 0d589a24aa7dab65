"""``python -m ssu_bridge info | check | bench``."""

import argparse
import sys
from pathlib import Path

import ssu_bridge
from ssu_bridge.commands import bench, check, info
from ssu_bridge.config import get_config
from ssu_bridge.dispatch import BACKENDS
from ssu_bridge.native import library
from ssu_bridge.testing.cases import CASES

PROGRAM = "python -m ssu_bridge"


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the process's exit status, 2 for a mistake of the user's."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "bench" or arguments.device == "cpu"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        get_config()
        library().cpu_num_threads()
    except ValueError as error:  # of an environment variable
        return _mistake(error)
    if arguments.command == "info":
        return info.main(as_json=arguments.json)
    if arguments.command == "check":
        return _check(arguments)
    if wrong := bench.wrong_files(arguments):
        return _mistake(wrong)
    if not arguments.read:
        return bench.main(arguments, rest)
    try:
        return bench.main(arguments, rest)
    except (OSError, ValueError) as error:
        return _mistake(f"--read: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="inspect, check and measure ssu_bridge")
    parser.add_argument("--version", action="version", version=f"ssu_bridge {ssu_bridge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    informing = commands.add_parser("info", help="versions, devices, and what each backend says")
    checking = commands.add_parser("check", help="run all cases on all backends against the float64 reference")
    checking.add_argument("--list", action="store_true", help="print the names of the cases and run none")
    checking.add_argument("--case", default="", help="only cases with this in their name")
    checking.add_argument("--backend", choices=[name.value for name in BACKENDS], help="only this backend")
    checking.add_argument("-v", "--verbose", action="store_true", help="print every report")
    more = "The GPU benchmark has flags of its own: python -m ssu_bridge.bench.cuda --help"
    measuring = commands.add_parser("bench", help="measure", epilog=more)
    measuring.add_argument("--device", choices=["cpu", "cuda"], help="cpu, unless flags of the GPU benchmark are given")
    measuring.add_argument("--save", type=Path, metavar="CSV", help="keep the times of a step over the batch")
    measuring.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    measuring.add_argument("--read", type=Path, metavar="CSV", help="draw recorded times instead of measuring")
    for command in (informing, checking, measuring):
        command.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    cases = [case for case in CASES if arguments.case in case.name]
    if not cases:
        return _mistake(
            f"--case: expected a part of a case's name, got {arguments.case!r}; "
            f"there are: {'; '.join(case.name for case in CASES)}"
        )
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    return check.main(cases, arguments.backend, verbose=arguments.verbose, as_json=arguments.json)


def _mistake(message: object) -> int:
    """Say in one line what is wrong with a flag, a file or an environment variable."""
    print(f"{PROGRAM}: error: {str(message).splitlines()[0]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
