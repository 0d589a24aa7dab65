"""Any backend against the float64 reference, and the one place where tolerances are set."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends import reference
from ssu_bridge.frontends import frontend_of, named
from ssu_bridge.update import bind, explain, update

# A float32 sum of n products differs from the exact one by about sqrt(n) roundings when they are of either sign, and by
# n at worst; the exponential, softplus and sigmoid add a few. In units of 2**-24 of the sum of absolute values.
_ROUNDINGS = 16
# Half a unit in the last place of each storage dtype, relative; and absolute where numbers are subnormal, which XLA may
# take for zero in float32, and so in bfloat16.
_HALF_ULP = {"float32": (2.0**-24, 2.0**-126), "bfloat16": (2.0**-8, 2.0**-126), "float16": (2.0**-11, 2.0**-25)}


class Row(NamedTuple):
    """How one result compares with the reference.

    Attributes:
        name: "out", "state" (the slots that were to be written) or "untouched" (all others, compared bit for bit).
        absolute, relative: the worst errors.
        where: the index of the worst error in units of what is allowed there.
        used: that error over what is allowed; above 1 it is too much.
        tolerance: what is allowed, in words.
    """

    name: str
    absolute: float
    relative: float
    where: tuple[int, ...]
    used: float
    tolerance: str

    @property
    def passed(self) -> bool:
        """Whether every element is within its tolerance; a NaN is not."""
        return self.used <= 1


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`check` found. It is true if every row passed, and prints as a table."""

    backend: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [
            f"backend {self.backend} against the float64 reference",
            f"{'':<11}{'abs. error':>11}{'rel. error':>12}{'of allowed':>12}  {'':<6}{'worst at':<20} allowed",
        ]
        for row in self.rows:
            where = ", ".join(map(str, row.where))
            lines.append(
                f"{row.name:<11}{row.absolute:>11.2e}{row.relative:>12.2e}{row.used:>11.0%}   "
                f"{'pass' if row.passed else 'FAIL':<6}[{where}]{'':<{max(0, 18 - len(where))}} {row.tolerance}"
            )
        return "\n".join(lines)


def check(*args: Any, **kwargs: Any) -> Report:
    """Run :func:`ssu_bridge.update` on copies of the arguments and compare it with the float64 reference.

    Args:
        *args, **kwargs: those of ``update``, with concrete arrays; ``backend="..."`` names the one to check. None of
            them is changed or donated.

    Returns:
        The worst absolute and relative error of output and state, where they are, what the dtypes allow, pass or fail,
        and whether the slots that the call does not name kept every bit.

    Raises:
        As ``update``; but tensors that require grad are checked too, as copies that do not.
        ValueError: JAX is tracing the arguments.
    """
    arrays, out, options = bind(*args, **kwargs)
    side = frontend_of(arrays, out)
    explanation = explain(*args, **kwargs)
    problem = explanation.choices[0].problem
    if problem.traced:
        raise ValueError("check: expected concrete arrays, got some that JAX is tracing; call it outside of jit")
    if explanation.backend is None:
        raise explanation.choices[0].error()
    before = {name: side.to_host(array) for name, array in named(arrays).items()}
    exact = reference.compute(problem, before)
    copies = {name: side.from_host(before[name], array) for name, array in named(arrays).items()}
    if problem.framework != "jax":  # an output that is not written must not look right by chance
        poison = np.full(before["x"].shape, np.nan, before["x"].dtype)
        copies["out"] = side.from_host(poison, copies["x"])
    # The backend that was chosen for the arguments as they are: the copies may be laid out differently.
    backend = explanation.backend
    softplus, pad = options.dt_softplus, options.pad_slot_id
    out, state = update(**copies, dt_softplus=softplus, pad_slot_id=pad, backend=backend)
    return Report(str(explanation.backend), compare(exact, side.to_host(out), before["state"], side.to_host(state)))


def compare(exact: reference.Exact, out: np.ndarray, before: np.ndarray, after: np.ndarray) -> tuple[Row, ...]:
    """Compare an output and the states before and after the step with the exact step."""
    stored = exact.slots >= 0
    slots = exact.slots[stored]
    shape = (len(slots), *exact.states.shape[1:])
    untouched = np.setdiff1d(np.arange(len(after)), slots)
    same = _bits(before[untouched]) == _bits(after[untouched])
    changed = (int(untouched[np.argwhere(~same)[0][0]]),) if not same.all() else ()
    return (
        _row("out", out.reshape(exact.out.shape), exact.out, exact.out_scale, str(out.dtype)),
        _row("state", after[slots].reshape(shape), exact.states[stored], exact.states_scale[stored], str(after.dtype)),
        Row("untouched", 0.0, 0.0, changed, 0.0 if same.all() else np.inf, f"no bit of {len(untouched)} slots"),
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def _row(name: str, got: np.ndarray, exact: np.ndarray, scale: np.ndarray, dtype: str) -> Row:
    relative, absolute = _HALF_ULP[dtype]
    allowed = relative * np.abs(exact) + _ROUNDINGS * 2.0**-24 * scale + absolute
    tolerance = f"{relative:.1e} |ref| + {_ROUNDINGS} * 2**-24 * sum of |terms|"
    if not exact.size:
        return Row(name, 0.0, 0.0, (), 0.0, tolerance)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float32).astype(got.dtype)
        # What is right to the bit is right, infinite or not: a value beyond the dtype's range, the caller's own NaN.
        same = (got == rounded) | (np.isnan(got) & np.isnan(exact))
        error = np.where(same, 0, np.abs(got.astype(np.float64) - exact))
        used = np.where(same, 0, np.where(np.isnan(error), np.inf, error / allowed))
    nonzero = (np.abs(exact) > absolute) & np.isfinite(exact)
    worst = np.unravel_index(int(np.argmax(used)), used.shape)
    return Row(
        name,
        float(np.max(error)),
        float(np.max(error[nonzero] / np.abs(exact[nonzero]), initial=0)),
        tuple(int(i) for i in worst),
        float(used[worst]),
        tolerance,
    )
