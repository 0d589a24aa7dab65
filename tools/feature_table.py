"""Which backend does what, by asking them: the table of docs/how-to/choosing-a-backend.md."""

import functools
from collections.abc import Iterator

from ssu_bridge.backends.base import Feature, features
from ssu_bridge.config import Backend, SSUConfig
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Problem, options_of
from ssu_bridge.core.validate import describe
from ssu_bridge.dispatch import BACKENDS, module
from ssu_bridge.testing.cases import CASES, Case

# FlashInfer supports some of each, depending on sizes and other arguments: docs/flashinfer.md.
COLUMNS = tuple(backend for backend in BACKENDS if backend is not Backend.FLASHINFER)

# Where a backend runs, if not on the CPU. Refusals look at the description of a call alone: no GPU is needed.
_PLATFORMS = {Backend.TRITON: ("cuda", (9, 0))}


def problem_of(case: Case, backend: Backend, framework: str = "jax") -> Problem:
    """Return the description of a case's call in a framework, on the device that a backend is for."""
    flags = {"disable_state_update": False, "intermediate_stride": 1, "round_each_token": None, **case.flags}
    flags |= {"donate": True, "check_indices": False}
    replay = {"replay_window": case.window, "replay_tokens": case.most if case.window else 0}
    options = options_of(**flags, **replay, backend=None, algorithm=None, config=SSUConfig())
    infos = dict(_infos()[case.name])
    if framework == "jax" and "rand_seed" in infos:
        infos["rand_seed"] = ArrayInfo((2,), "uint32")
    platform, capability = _PLATFORMS.get(backend, ("cpu", None))
    return describe(infos, options, framework=framework, platform=platform, capability=capability)


@functools.cache
def _infos() -> dict[str, dict[str, ArrayInfo]]:
    """Return shapes and dtypes of the arrays of each case."""
    return {
        case.name: {name: ArrayInfo(array.shape, array.dtype.name) for name, array in case.arrays(seed=0).items()}
        for case in CASES
    }


def supports(backend: Backend) -> Iterator[tuple[Feature, bool]]:
    """Yield each feature that some case has, and whether a backend takes a call that asks for little else."""
    problems = [problem_of(case, backend) for case in CASES]
    for feature in Feature:
        having = [problem for problem in problems if feature in features(problem)]
        if having:
            plainest = min(having, key=lambda problem: len(features(problem)))
            yield feature, module(backend).refusal(plainest) is None


def table() -> str:
    """Return the table of features by backends, in Markdown."""
    columns = {backend: dict(supports(backend)) for backend in COLUMNS}
    lines = ["| | " + " | ".join(f"`{backend}`" for backend in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for feature in next(iter(columns.values())):
        answers = ("yes" if columns[backend][feature] else "no" for backend in COLUMNS)
        lines.append(f"| {feature} | {' | '.join(answers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
