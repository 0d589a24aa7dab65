"""The table of backends, and the choice of one for a Problem before anything is launched."""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from ssu_bridge.backends.base import BackendModule, Feature, Kernel, features
from ssu_bridge.backends.measured import measured
from ssu_bridge.config import FORMS, Backend, SSUConfig
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.errors import BackendNotAvailableError, UnsupportedError

# The order in which auto queries backends, unless measurements override it. It never selects the reference, a checker.
AUTOMATIC = (Backend.TRITON, Backend.FLASHINFER, Backend.CPU, Backend.XLA)
BACKENDS = (*AUTOMATIC, Backend.REFERENCE)

_log = logging.getLogger("ssu_bridge")
# The backends that were passed over, each with the one that was selected: no more pairs than backends squared.
_logged: set[tuple[Backend, Backend]] = set()


class Answer(NamedTuple):
    """A backend's answer for a Problem: ``refusal`` is the reason why it does not support it, None if it does.

    ``settings`` describes how the backend would run the Problem, "" where it has no choice.
    """

    backend: Backend
    refusal: str | None
    settings: str = ""


class Choice(NamedTuple):
    """The backend selected for a Problem (None: all refuse), and the answers of the backends that were queried."""

    problem: Problem
    backend: Backend | None
    answers: tuple[Answer, ...]

    def error(self) -> UnsupportedError | BackendNotAvailableError:
        """Return the error to raise when no backend was selected."""
        requested = self.problem.options.config.backend
        reasons = "; ".join(f"{answer.backend}: {answer.refusal}" for answer in self.answers if answer.refusal)
        if requested is Backend.AUTO:
            return UnsupportedError(f"no backend supports this call. {reasons}")
        if missing := module(requested).missing(self.problem.framework):
            return BackendNotAvailableError(f"backend {requested!s}: {missing}")
        able = [str(name) for name in BACKENDS if name is not requested and answer(name, self.problem).refusal is None]
        instead = (
            f"supported by backend={' or '.join(map(repr, able))}" if able else "no other backend supports it either"
        )
        return UnsupportedError(f"backend {reasons}; {instead}")


class Explanation(NamedTuple):
    """What `ssu_bridge.explain` returns: a choice for each platform that the call could run on."""

    choices: tuple[Choice, ...]

    @property
    def backend(self) -> Backend | None:
        """The backend selected on the first platform: the arrays', or while JAX traces the process's default."""
        return self.choices[0].backend

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            lines.append(f"on {choice.problem.platform}, requested {choice.problem.options.config.backend}:")
            for backend, refusal, settings in choice.answers:
                able = "selected, the first that supports the call" if backend is choice.backend else "also supports it"
                verdict = able + (settings and f" ({settings})") if refusal is None else f"not supported: {refusal}"
                lines.append(f"  {backend:<12}{verdict}")
        return "\n".join(lines)


def module(backend: Backend) -> BackendModule:
    """Return the module of a backend. Importing one imports no framework."""
    return importlib.import_module(f"ssu_bridge.backends.{backend}")


def answer(backend: Backend, problem: Problem) -> Answer:
    """Return the answer of one backend to a Problem."""
    queried = module(backend)
    refusal = queried.missing(problem.framework) or queried.refusal(problem)
    return Answer(backend, refusal, "" if refusal else queried.settings(problem))


def consider_problem(problem: Problem) -> Choice:
    """Query the backends that the configuration allows and select the first that supports the Problem."""
    requested = problem.options.config.backend
    names = _automatic(problem) if requested is Backend.AUTO else (requested,)
    answers = tuple(answer(name, problem) for name in names)
    return Choice(problem, next((a.backend for a in answers if a.refusal is None), None), answers)


def _automatic(problem: Problem) -> tuple[Backend, ...]:
    """Return the order in which auto queries backends: on a GPU, first the one that was measured to be the fastest."""
    if problem.platform != "cuda" or {*features(problem)} - {Feature.TOKENS, Feature.PACKED}:
        return AUTOMATIC
    tables = measured("auto_order", problem.capability)
    faster = [name for name, rows in tables.items() if any(_row_matches(row, problem) for row in rows)]
    return tuple(sorted(AUTOMATIC, key=lambda backend: backend not in faster))


def _row_matches(row: dict[str, Any], problem: Problem) -> bool:
    """Return whether a row of the measurements is about calls like this one."""
    tokens = -(-problem.tokens // max(problem.sequences, 1)) if problem.layout == "packed" else problem.tokens
    elements = problem.sequences * problem.nheads * problem.headdim * problem.dstate
    ranges = ((tokens, row["tokens"]), (elements, row["elements"]))
    same = row["layout"] == problem.layout and row["state"] == dict(problem.dtypes)["state"]
    return same and all(least <= value <= most for value, (least, most) in ranges)


def choose(problem: Problem) -> Choice:
    """Return the choice for a Problem, of a backend that supports it.

    The choice is cached: JAX needs it when it traces a call and again when it lowers it. A refusal is not cached,
    because what is missing may be installed.

    Raises:
        UnsupportedError, BackendNotAvailableError: as :func:`load`.
    """
    sizes = (problem.sequences, problem.tokens, problem.slots, problem.columns, problem.entries)
    # Symbolic sizes of jax.export cannot be compared with those of another program.
    return (_chosen if all(type(size) is int for size in sizes) else _chosen.__wrapped__)(problem)


@functools.lru_cache(maxsize=256)
def _chosen(problem: Problem) -> Choice:
    choice = consider_problem(problem)
    if choice.backend is None:
        raise choice.error()
    return choice


def load(problem: Problem) -> Kernel:
    """Return the kernel of the backend that is selected for a Problem, ready to be launched.

    Raises:
        UnsupportedError: the requested backend refuses it, or under ``auto`` every backend does.
        BackendNotAvailableError: the requested backend is not installed.
    """
    choice = choose(problem)
    assert choice.backend is not None
    for passed in choice.answers:
        if passed.backend is choice.backend:
            break
        _log_passed(passed, choice.backend)
    return module(choice.backend).load(problem)


def program_options(options: Options, platforms: Iterable[str], *, seeded: bool) -> Options:
    """Return the options of a call with those fields at their defaults that a program for these platforms ignores.

    Calls that differ only in these fields share a program.

    Args:
        options: of a call.
        platforms: those that the program can run on.
        seeded: whether the call has a seed, without which nothing is rounded stochastically.
    """
    requested = options.config.backend
    names = AUTOMATIC if requested is Backend.AUTO else (requested,)
    selectable = [module(name) for name in names if module(name).PLATFORM in (None, *platforms)]
    fields = {field for backend in selectable for field in backend.CONFIG_FIELDS}
    if not seeded:  # configured stochastic rounding then has an error, that a seed is missing
        fields = fields - {"philox_rounds"} | {"stochastic_rounding"}
    if options.config.algorithm in FORMS:  # for which a backend with one form may refuse the call
        fields = fields | {"algorithm"}
    if options.config.round_each_token:  # which a backend may lack
        fields = fields | {"round_each_token"}
    config = SSUConfig(requested, **{field: getattr(options.config, field) for field in fields})
    return dataclasses.replace(options, donate=True, check_indices=False, config=config)


def _log_passed(passed: Answer, selected: Backend) -> None:
    """Log why a backend was passed over: to users once for each pair of backends, not for each size of a call."""
    pair = (passed.backend, selected)
    level = logging.DEBUG if pair in _logged else logging.INFO
    _logged.add(pair)
    _log.log(level, "backend %s passed over for %s: %s", passed.backend, selected, passed.refusal)
