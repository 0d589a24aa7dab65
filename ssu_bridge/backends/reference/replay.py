"""Replay in float64: from a checkpoint through the tokens since to new ones, with nothing rounded on the way."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ssu_bridge.backends.reference.exact import Exact, Step, row_count, stacked
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.replay import ReplayCursor, flushes, phase
from ssu_bridge.core.slots import routes


def from_checkpoint(problem: Problem, arrays: Mapping[str, Any], step: Step) -> Exact:
    """Compute a call with a ReplayState: its outputs, the rows that its rings get, and the checkpoints of a flush."""
    shape = (problem.nheads, problem.headdim, problem.dstate)
    plan = routes(problem, arrays)
    options = problem.options
    cursor = ReplayCursor(
        arrays["replay_start"], arrays["replay_pending"], options.replay_window, options.replay_tokens
    )
    count = row_count(problem)
    out, out_bounds, rows = np.zeros((count, *shape[:2])), np.zeros((count, *shape[:2])), np.zeros(count, bool)
    kept: dict[str, list[Any]] = {"state": [], "replay_x": [], "replay_B": [], "replay_dt": []}
    for slot, first, count in zip(plan.reads.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True):
        start, pending = phase(np, cursor, slot) if slot >= 0 else (0, 0)
        state, bounds = step.initial(slot), np.zeros(shape)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, as everywhere
            for number in range(pending):
                token = _pending(problem, arrays, slot, (start + number) % cursor.length)
                state, bounds = step.advanced(state, bounds, *token)
            if slot >= 0 and flushes(cursor, pending, count):
                kept["state"].append(((slot,), state, bounds, step.words(slot, 0, 0)))
            for number in range(count):
                row = first + number
                rows[row] = True
                out[row], out_bounds[row], state, bounds = step.token(row, state, bounds)
                if slot >= 0:
                    _keep(kept, step, row, (slot, (start + pending + number) % cursor.length))
    shapes = {"replay_x": shape[:2], "replay_B": (problem.ngroups, shape[2]), "replay_dt": shape[:1]}
    stores = {"state": stacked(kept["state"], 1, shape)}
    stores |= {name: stacked(kept[name], 2, of_row) for name, of_row in shapes.items()}
    return Exact(out, out_bounds, rows, stores)


def _pending(problem: Problem, arrays: Mapping[str, Any], slot: int, row: int) -> tuple[np.ndarray, ...]:
    """Return x, B, dt and the bounds of dt of a pending token, as ``Step.advanced`` takes them."""
    x, B, dt = (arrays[name][slot, :, row].astype(np.float64) for name in ("replay_x", "replay_B", "replay_dt"))
    B = np.repeat(B[:, None], problem.nheads // problem.ngroups, axis=0)
    dt = dt[:, None, None]
    return x[..., None], B, dt, np.abs(dt)


def _keep(kept: dict[str, list[Any]], step: Step, row: int, place: tuple[int, int]) -> None:
    """Keep what goes to a row of the rings: x and B as they are, and dt with what may be wrong with it."""
    # One number a head, which a view may repeat along headdim.
    dt, dt_bounds = (array[:, 0, 0] for array in step.step_size(row))
    x, B = step.x[row][..., 0], step.B[row][:: step.problem.nheads // step.problem.ngroups, 0]
    kept["replay_x"].append((place, x, np.zeros_like(x), None))
    kept["replay_B"].append((place, B, np.zeros_like(B), None))
    kept["replay_dt"].append((place, dt, dt_bounds, None))
