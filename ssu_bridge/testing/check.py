"""``check``: any backend compared with the float64 reference."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssu_bridge.api import bind, update
from ssu_bridge.backends import reference
from ssu_bridge.config import Backend, using
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.quantized import SCALES, paired, unpaired
from ssu_bridge.dispatch import load
from ssu_bridge.frontends.base import frontend_of, named
from ssu_bridge.testing.tolerances import Row, compare


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of ``check``. It is true if every row passed, and prints as a table."""

    backend: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"backend {self.backend} against the float64 reference",
            f"{'':<{width}}{'abs. error':>11}{'rel. error':>12}{'of allowed':>12}  {'':<6}{'worst at':<20} allowed",
        ]
        for row in self.rows:
            where = ", ".join(map(str, row.where))
            lines.append(
                f"{row.name:<{width}}{row.absolute:>11.2e}{row.relative:>12.2e}{row.used:>11.0%}   "
                f"{'pass' if row.passed else 'FAIL':<6}[{where}]{'':<{max(0, 18 - len(where))}} {row.tolerance}"
            )
        return "\n".join(lines)


def check(*args: Any, **kwargs: Any) -> Report:
    """Run ``update`` on copies of the arguments and compare the results with the float64 reference.

    Args:
        *args, **kwargs: those of ``update``, with concrete arrays; ``backend="..."`` names the one to check. None of
            them is changed or donated.

    Returns:
        A ``Report``: for each result its worst absolute and relative error, the place, the allowed error, pass or fail;
        and whether everything that the call does not store to kept its bits.

    Raises:
        ValueError, TypeError, UnsupportedError, BackendNotAvailableError: as ``update``. Tensors that require grad are
            accepted, and checked as copies that do not.
        ValueError: JAX is tracing the arguments.
    """
    arrays, out, options = bind(*args, **kwargs)
    side = frontend_of(arrays, out)
    choice = side.consider(arrays, out, options)[0]
    problem, backend = choice.problem, choice.backend
    if problem.traced:
        raise ValueError("check: expected concrete arrays, got some that JAX is tracing; call it outside of jit")
    if backend is None:
        raise choice.error()
    load(problem)
    arrays = side.seeded(arrays, options)
    before = {name: side.to_host(array) for name, array in named(arrays).items()}
    copies = {name: side.from_host(before[name], array) for name, array in named(arrays).items()}
    if problem.framework != "jax":  # an output that is not written must not look right by chance
        before["out"] = np.full(before["x"].shape, np.nan, before["x"].dtype)
        copies["out"] = side.from_host(before["out"], copies["x"])
    # The backend that was chosen for the arguments as they are: the copies may be laid out differently.
    with using(options.config, backend=backend):
        given = paired(copies, options.replay_window)
        results = update(**given, **{name: getattr(options, name) for name in _FLAGS})
    after = {name: side.to_host(array) for name, array in results_by_name(results).items()}
    return Report(str(backend), judge(problem, backend, before, after))


_FLAGS = ("dt_softplus", "pad_slot_id", "disable_state_update", "intermediate_stride")


def results_by_name(results: tuple[Any, ...]) -> dict[str, Any]:
    """Return what ``update`` returned by the names of kernels' arrays."""
    return unpaired(dict(zip(("out", *SCALES), results, strict=False)))


def judge(
    problem: Problem, backend: Backend, before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> tuple[Row, ...]:
    """Compare the results of a call with the exact ones, by the rules for its backend.

    FlashInfer computes softplus as log(1 + exp(d)); it rounds stochastically by random numbers of its own, and to zero
    what float16 has no normal number for. With a ReplayState it multiplies in bfloat16: docs/flashinfer.md.

    Args:
        problem: the description of the call.
        backend: the one that ran it.
        before: the call's arrays by name; "out" only if it was given.
        after: its results by name.
    """
    exempt = backend is Backend.FLASHINFER
    exact = reference.compute(problem, before, coarse_softplus=exempt)
    return compare(exact, before, after, coarse_rounding=exempt, coarse_products=exempt and problem.replays)
