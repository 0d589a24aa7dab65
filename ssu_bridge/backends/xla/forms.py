"""In which form several tokens are computed: one after the other (loop), or in chunks by matrix products (matrix)."""

import math
from typing import NamedTuple

from ssu_bridge.backends.base import lacks_form
from ssu_bridge.core.problem import Problem

# The most tokens of a chunk. Longer ones compare more pairs of tokens; shorter ones read and write the state more,
# which costs a GPU more. Decays are exact for up to 128.
_MOST = {"cpu": 32}
_MOST_ELSEWHERE = 128
# Where chunks are computed one after another: a CPU has the state in its cache then, and on a GPU all at once were not
# measured to be faster. Elsewhere as many as have states of so many elements together.
_ONE_BY_ONE = ("cpu", "cuda")
_ELEMENTS_AT_ONCE = 2**26
# A state is read and written in the time that so many tokens of a chunk take.
_STATE_IN_TOKENS = 16
# A chunk of fewer tokens is no faster than the loop.
_LEAST = 8
# From so many tokens on, auto takes chunks: the fewest that were in none of the measured sizes slower on a CPU.
_LEAST_TOKENS = 8
# Where A or dt is not tied, tokens are scanned associatively from so many on, and so many at a time, or fewer where the
# states of a chunk have more elements than that together. On a CPU the loop is faster.
_NEVER_SCANNED = ("cpu",)
_LEAST_SCANNED = 16
_MOST_SCANNED = 64
_SCANNED_ELEMENTS = 2**26


class Chunking(NamedTuple):
    """How a sequence is cut: in segments of so many tokens, and each of them in ``chunks`` chunks of ``size`` or fewer.

    Where states are stored on the way, they are those at the ends of segments. With ``at_once`` all chunks are
    computed at once, but for the states that go from one to the next. With ``scanned`` those of a chunk come from an
    associative scan, and not from products of matrices.
    """

    segment: int
    chunks: int
    size: int
    at_once: bool = False
    scanned: bool = False


def refusal(problem: Problem) -> str | None:
    """Say why the selected form cannot run a problem; or None. The loop runs all but replay."""
    if problem.replays:
        return lacks_form(problem, "matrix")
    if problem.options.config.algorithm == "matrix" and not _is_one_token(problem):
        return _matrix_refusal(problem)
    return None


def settings(problem: Problem) -> str:
    """Return which form is selected and why, in words; "" for one token, which is none."""
    if problem.replays:
        return "matrix form of the tokens since the checkpoint and the new ones"
    if _is_one_token(problem):
        return ""
    taken = chunking(problem)
    if taken is not None:
        return f"{'associative scan' if taken.scanned else 'matrix form'}, {taken.size} tokens at a time"
    if problem.options.config.algorithm == "loop":
        return "loop over the tokens, as requested" + _exception(problem)
    lacks = _matrix_refusal(problem) if problem.platform in _NEVER_SCANNED else _chunk_refusal(problem)
    return f"loop over the tokens: {lacks or 'they are few'}{_exception(problem)}"


def _exception(problem: Problem) -> str:
    """Return what rounding after each token guarantees less than on other backends."""
    return "; its bits depend on how XLA fuses a program" if problem.rounds_each_token else ""


def chunking(problem: Problem) -> Chunking | None:
    """Return how the tokens are cut into chunks; None for the loop.

    It depends on sizes, dtypes and options alone, and for packed sequences not on their lengths.
    """
    selected = problem.options.config.algorithm
    if _is_one_token(problem) or selected == "loop" or _chunk_refusal(problem):
        return None
    scanned = bool(_untied(problem))
    if scanned and (problem.platform in _NEVER_SCANNED or not _are_known_as(problem, _LEAST_SCANNED)):
        return None
    is_known = problem.layout == "multi" and _is_known(problem.tokens)
    if selected != "matrix" and is_known and problem.tokens < _LEAST_TOKENS:
        return None
    most = _most_scanned(problem) if scanned else _most(problem)
    if "intermediate_states" in problem.names:
        segment = problem.options.intermediate_stride
    else:
        segment = problem.tokens if is_known else most
    count = -(-segment // most)
    size = -(-segment // count)
    at_once = problem.platform not in _ONE_BY_ONE and not scanned and _fit_at_once(problem, size)
    return Chunking(segment, count, size, at_once, scanned)


def _fit_at_once(problem: Problem, size: int) -> bool:
    """Return whether the states of all chunks may be there together; of symbolic numbers of JAX nothing is known."""
    if not (_is_known(problem.tokens) and _is_known(problem.sequences)):
        return False
    if problem.layout == "packed":
        chunks = problem.tokens // size + problem.sequences
    else:
        chunks = -(-problem.tokens // size) * problem.sequences
    return chunks * problem.nheads * problem.headdim * problem.dstate <= _ELEMENTS_AT_ONCE


def _untied(problem: Problem) -> list[str]:
    """Return the parameters that differ within a head, which the matrix form cannot have."""
    return [name for name in ("A", "dt", "dt_bias") if name in problem.names and name not in problem.tied]


def _are_known_as(problem: Problem, least: int) -> bool:
    """Return whether there are known to be so many tokens, or so many a packed sequence on average."""
    sequences = problem.sequences if problem.layout == "packed" else 1
    return _is_known(problem.tokens) and _is_known(problem.sequences) and problem.tokens >= least * sequences


def _most_scanned(problem: Problem) -> int:
    """Return how many tokens are scanned at a time."""
    sequences = problem.sequences if problem.layout == "multi" else 1
    elements = max(sequences * problem.nheads * problem.headdim * problem.dstate, 1)
    return max(min(_SCANNED_ELEMENTS // elements, _MOST_SCANNED), 1)


def _matrix_refusal(problem: Problem) -> str | None:
    """Say what the matrix form lacks, or None."""
    if untied := _untied(problem):
        return f"the matrix form takes parameters that are tied to the head, and {' and '.join(untied)} is not"
    return _chunk_refusal(problem)


def _chunk_refusal(problem: Problem) -> str | None:
    """Say what cannot be computed in chunks, in whichever form; or None."""
    if problem.rounds_each_token:
        return "the matrix form does not round the state after each token (round_each_token)"
    if "parent_tokens" in problem.names:
        return "the matrix form computes no trees (parent_tokens)"
    stores_some = "intermediate_states" in problem.names and problem.options.intermediate_stride < _LEAST
    if "dst_state_batch_indices" in problem.tables or stores_some:
        return (
            "the matrix form has no state after every token, but only after every k-th, with an intermediate_stride "
            f"k >= {_LEAST}"
        )
    return None


def _most(problem: Problem) -> int:
    """Return the most tokens of a chunk; of short packed sequences fewer, because each has a chunk of its own."""
    most = _MOST.get(problem.platform or "", _MOST_ELSEWHERE)
    if problem.layout == "packed" and _is_known(problem.tokens) and _is_known(problem.sequences):
        mean = problem.tokens / max(problem.sequences, 1)
        most = min(most, 2 ** max(round(math.log2(_STATE_IN_TOKENS * mean) / 2), 0))
    return most


def _is_one_token(problem: Problem) -> bool:
    return problem.layout == "single" or (_is_known(problem.tokens) and problem.tokens <= 1)


def _is_known(size: object) -> bool:
    """Say whether a size is a number, and not a symbol of an exported program."""
    return isinstance(size, int)
