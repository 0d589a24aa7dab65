"""The loop: one token after another, with everything that a call requests for each."""

from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.backends.xla import arithmetic, storage
from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE, TOKENWISE
from ssu_bridge.core.problem import Problem


def run(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """Return a call's arrays as they are after it, and its output."""
    run = {"single": _single, "multi": _multi, "packed": _packed}[problem.layout]
    return run(problem, arrays, read)


def _single(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    new, out = _token(problem, arrays, storage.load(problem, arrays, read))
    places = storage.places(problem, arrays, read, jnp.arange(problem.sequences), 0, True)
    written = {
        n: storage.store(array, places[n], new) for n, array in storage.stored_each_token(problem, arrays).items()
    }
    return storage.results(problem, arrays, read, written, new, out)


def _multi(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """All sequences side by side, one token after another."""

    def body(carry: Any, token: Any) -> tuple[Any, Any]:
        kept, written = carry
        rows, places, number = token
        states, out = _token(problem, arrays | rows, _continued(kept, start, rows.get("parent_tokens"), number))
        written = {name: storage.store(array, places[name], states) for name, array in written.items()}
        return (_keep(kept, states, number), written), out

    rows = {name: jnp.moveaxis(arrays[name], 1, 0) for name in TOKENWISE if name in arrays}
    sequences, tokens = jnp.arange(problem.sequences)[None], jnp.arange(problem.tokens)[:, None]
    places = storage.places(problem, arrays, read, sequences, tokens, True)
    start = storage.load(problem, arrays, read)
    # XLA takes nothing from an axis without entries, also in a loop that never runs.
    kept = _kept(problem, arrays, start, max(problem.tokens, 1)), storage.stored_each_token(problem, arrays)
    (kept, written), outs = jax.lax.scan(body, kept, (rows, places, tokens[:, 0]))
    return storage.results(problem, arrays, read, written, kept, jnp.moveaxis(outs, 0, 1))


def _packed(problem: Problem, arrays: dict[str, Any], read: Any) -> dict[str, Any]:
    """One row after another; a row of no sequence has zeros for its output.

    Of sequences that share rows, results are undefined: a row is computed for the first of its sequences alone.
    """
    if not problem.sequences:
        return arrays | {"out": jnp.zeros_like(arrays["x"])}
    owners = storage.row_owners(problem, arrays)
    arrays = storage.owned_rows(arrays, owners)
    sequence, is_owned = owners.sequence[:, None], owners.is_owned[:, None]
    token = owners.token[:, None]
    places = storage.places(problem, arrays, read, sequence, token, is_owned)
    written = storage.stored_each_token(problem, arrays)
    if "state" in problem.results and "state" not in written:
        final = storage.final_slots(problem, arrays, read)
        final = sequence if final is None else final[sequence]
        written["state"] = arrays["state"]
        places["state"] = jnp.where(is_owned & (token + 1 == owners.lengths[sequence]), final, -1)
    # Loaded before the first store: row by row, XLA would copy the state.
    start = storage.load(problem, arrays, read)

    def body(carry: Any, row: Any) -> tuple[Any, Any]:
        kept, written = carry
        own, places, sequence, token, is_owned = row
        own = {name: value[None] for name, value in own.items()}
        old = _continued(kept, start[sequence], own.get("parent_tokens"), token)
        new, out = _token(problem, arrays | own, jnp.where(token == 0, start[sequence], old))
        written = {name: storage.store(array, places[name], new) for name, array in written.items()}
        return (_keep(kept, new, token[0]), written), jnp.where(is_owned, out[0], 0)

    own = {name: arrays[name] for name in TOKENWISE if name in arrays}
    kept = _kept(problem, arrays, jnp.zeros_like(start[:1]), MOST_TOKENS_OF_A_TREE)
    (_, written), out = jax.lax.scan(body, (kept, written), (own, places, sequence, token, is_owned[:, 0]))
    return storage.results(problem, arrays, read, written, None, out)


# --- The states that tokens continue ---

# Of a chain that of the token before; of a tree those after all tokens before, with an axis of tokens in front.


def _kept(problem: Problem, arrays: dict[str, Any], start: Any, most: int) -> Any:
    """Return what is kept before the first token, of states that start so."""
    return jnp.zeros((most, *start.shape), start.dtype) if "parent_tokens" in arrays else start


def _keep(kept: Any, states: Any, token: Any) -> Any:
    """Return what is kept after a token. A token after the last of a tree, which is no sequence's, is dropped."""
    return states if kept.ndim == states.ndim else kept.at[token].set(states, mode="drop")


def _continued(kept: Any, start: Any, parents: Any, token: Any) -> Any:
    """Return the states that a token of each of some sequences continues."""
    if parents is None:
        return kept
    is_earlier = (parents >= 0) & (parents < token)
    earlier = kept[jnp.where(is_earlier, parents, 0), jnp.arange(kept.shape[1])]
    return jnp.where(is_earlier.reshape(-1, *[1] * (start.ndim - 1)), earlier, start)


# --- One token ---


def _token(problem: Problem, arrays: dict[str, Any], old: Any) -> tuple[Any, Any]:
    """Return the states of some sequences after a token, as the next one finds them, and their outputs."""

    def by_head(name: str) -> Any:
        """Give B or C an axis of heads: (b, H, 1, N)."""
        grouped = arrays[name].astype(jnp.float32).reshape(x.shape[0], problem.ngroups, 1, problem.dstate)
        repeated = jnp.repeat(grouped, problem.nheads // problem.ngroups, axis=1)
        return repeated if problem.heads_axis else repeated[:, 0]

    x, A = (arrays[name].astype(jnp.float32) for name in ("x", "A"))
    dt = arithmetic.step_sizes(problem, arrays)
    A = A.reshape(-1, 1, 1) if "A" in problem.tied else A
    new = old.astype(jnp.float32) * jnp.exp(A * dt[..., None]) + (dt * x)[..., None] * by_head("B")
    out = jnp.sum(new * by_head("C"), axis=-1)
    return new.astype(storage.carried(problem, arrays)), arithmetic.finished(problem, arrays, out)
