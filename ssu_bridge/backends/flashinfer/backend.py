"""The flashinfer backend: FlashInfer's CUDA kernels, for JAX and Torch arrays on NVIDIA GPUs.

FlashInfer compiles them; the native library passes the arrays in the layout that they need, without Python in a call.
What they reject or compute wrong is refused here; docs/flashinfer.md records what was observed.
"""

from ssu_bridge.backends.base import DeviceKernel, Feature, cannot, cannot_run_there, lacks_form, missing_jax_ffi
from ssu_bridge.backends.flashinfer import module, replay
from ssu_bridge.backends.flashinfer.kernel import AddedAxis, Specialisation, kernel_of
from ssu_bridge.backends.flashinfer.module import Module
from ssu_bridge.config import FLASHINFER_ALGORITHMS
from ssu_bridge.core.arguments import SLOT_TABLES, VECTOR_BYTES
from ssu_bridge.core.problem import Problem

PLATFORM = "cuda"
CONFIG_FIELDS = ("philox_rounds", "algorithm")

_DSTATES = range(64, 257, 32)
# An int16 row is kept in registers, 64 elements at a time.
_INT16_STEP = 64
# What it compiles a multi-token kernel for; its horizontal single-token kernel has the same limit.
_HEADS_IN_A_GROUP = (1, 2, 4, 8, 16, 32, 64)
# More might not fit into a block's shared memory, which is smallest on 8.6, 8.9 and 12.0.
_MOST_TOKENS = 16
_MOST_HEADS = 65535
_VECTORS = ("state", "x", "B", "C", "z", "state_scale", "intermediate_states", "intermediate_state_scales")
_DENSE = ("intermediate_states", "intermediate_state_scales", "cu_seqlens", "num_accepted_tokens")
# The arrays that its function requires in the dtype of another.
ALIKE = {
    "x": ("B", "C", "z", "out"),
    "dt": ("D", "dt_bias"),
    "state": ("intermediate_states",),
    "state_batch_indices": ("dst_state_batch_indices", "intermediate_state_indices"),
}


def missing(framework: str) -> str | None:
    """Return what is missing of a known FlashInfer, nvcc and, for JAX arrays, the FFI package."""
    return module.missing() or missing_jax_ffi(framework)


def refusal(problem: Problem) -> str | None:
    """Refuse what FlashInfer rejects, and what it silently computes wrong."""
    if problem.replays:
        return replay.refusal(problem)
    rules = (cannot_run_there, _lacks, _wrong_sizes, _wrong_dtypes, _wrong_layout, _wrong_intermediates, _wrong_tokens)
    return next(filter(None, (rule(problem) for rule in (*rules, _wrong_algorithm))), None)


def settings(problem: Problem) -> str:
    """Return which of FlashInfer's kernels run, and what they guarantee less than other backends."""
    if problem.replays:
        return replay.settings(problem)
    tokens = "multi-token" if _by_token(problem) else "single-token"
    said = [f"its {tokens} kernels, algorithm {_algorithm(problem)}"]
    if any(dtype.startswith("int") and name != "state" and name != "rand_seed" for name, dtype in problem.dtypes):
        said.append("checks no index but pad_slot_id")
    if problem.layout == "packed":
        said.append(f"sequences of at most {_longest(problem)} tokens")
    if problem.stochastic_rounding:
        limit = "" if module.rounds_subnormals() else ", and to zero below 2**-14"
        said.append(f"rounds with its own random numbers{limit}")
    return "; ".join(said)


def load(problem: Problem) -> DeviceKernel:
    """Return the kernel, which FlashInfer may have to compile."""
    if problem.replays:
        return replay.load(problem)
    options = problem.options
    scalars = {
        "dt_softplus": options.dt_softplus,
        "pad_slot_id": options.pad_slot_id,
        "disable_state_update": options.disable_state_update,
        "cache_steps": _longest(problem) if problem.layout == "packed" else 0,
        "algorithm": ("auto", *FLASHINFER_ALGORITHMS).index(_algorithm(problem)),
    }
    specialisation = Specialisation(
        module=_module(problem),
        names=(*problem.names, *problem.results),
        scalars=tuple(scalars.items()),
        added_axis=AddedAxis.TOKEN if problem.layout == "single" and _by_token(problem) else AddedAxis.NONE,
    )
    return kernel_of(problem, specialisation, {"P": problem.headdim, "N": problem.dstate})


def _module(problem: Problem) -> Module:
    assert problem.capability is not None
    dtypes = dict(problem.dtypes)
    indices = [dtypes[name] for name in SLOT_TABLES if name in dtypes]
    return Module(
        state_dtype=dtypes["state"],
        input_dtype=dtypes["x"],
        weight_dtype=dtypes["dt"],
        matrixA_dtype=dtypes["A"],
        stateIndex_dtype=indices[0] if indices else "int32",
        dim=problem.headdim,
        dstate=problem.dstate,
        ntokens_mtp=_longest(problem),
        cu_seqlens_dtype=dtypes.get("cu_seqlens", "int32"),
        num_accepted_tokens_dtype=dtypes.get("num_accepted_tokens", "int64"),
        sm_major=problem.capability[0],
        state_scale_dtype=dtypes.get("state_scale"),
        philox_rounds=problem.options.config.philox_rounds if problem.stochastic_rounding else 0,
    )


def _longest(problem: Problem) -> int:
    """Return how many tokens a sequence may have: packed, as many as the tables have columns, or as there are rows."""
    if problem.layout != "packed":
        return max(problem.tokens, 1)
    # Few sizes to compile for.
    rows = 1 << max(problem.tokens - 1, 0).bit_length()
    return min(rows, problem.columns) if problem.columns else rows


def _by_token(problem: Problem) -> bool:
    """Return whether its multi-token kernels run.

    The single-token ones write out of bounds for a padding index among the destinations, read the scale of an int16
    state at a padding index, and ignore counts and intermediate states.
    """
    reasons = ("dst_state_batch_indices", "num_accepted_tokens", "intermediate_states")
    at_pads = "state_scale" in problem.names and "state_batch_indices" in problem.names
    return problem.layout != "single" or at_pads or any(name in problem.names for name in reasons)


def _simple_alone(problem: Problem) -> str | None:
    """Return what a problem needs that only the simple one of its multi-token kernels does."""
    needs = {
        "destination slots": "dst_state_batch_indices",
        "accepted token counts": "num_accepted_tokens",
        "packed sequences": "cu_seqlens",
        "int16 states": "state_scale",
    }
    return next((what for what, name in needs.items() if name in problem.names), None)


def _algorithm(problem: Problem) -> str:
    """Return the algorithm to request of FlashInfer: its own choice, unless it could choose a kernel that errs."""
    requested = problem.options.config.algorithm
    if requested in FLASHINFER_ALGORITHMS:
        return requested
    if _by_token(problem):
        return "simple" if _simple_alone(problem) else "auto"
    return "auto" if problem.nheads // problem.ngroups in _HEADS_IN_A_GROUP else "simple"


# --- What is refused ---


def _lacks(problem: Problem) -> str | None:
    lacking = (Feature.TREES, Feature.FRESH, Feature.STRIDE, Feature.ROUND_EACH)
    return cannot(problem, *lacking) or lacks_form(problem)


def _wrong_sizes(problem: Problem) -> str | None:
    heads, N = problem.nheads, problem.dstate
    if problem.headdim not in (headdims := module.headdims()):
        known = f"from 32 to 256 in multiples of {headdims.step}" if isinstance(headdims, range) else "64 or 128"
        return f"it supports headdim {known}, and this is {problem.headdim}"
    if N not in _DSTATES or ("state_scale" in problem.names and N % _INT16_STEP):
        step = _INT16_STEP if "state_scale" in problem.names else _DSTATES.step
        return f"it supports dstate from 64 to 256 in multiples of {step}, and this is {N}"
    if _by_token(problem) and heads // problem.ngroups not in _HEADS_IN_A_GROUP:
        return (
            "its multi-token kernels, which this call needs, support 1, 2, 4, 8, 16, 32 or 64 heads in a group, and "
            f"these are {heads // problem.ngroups}"
        )
    if heads > _MOST_HEADS:
        return f"it supports at most {_MOST_HEADS} heads, and these are {heads}"
    if problem.slots < problem.sequences:
        return f"it requires at least as many slots as sequences, and these are {problem.slots} and {problem.sequences}"
    if not -(2**31) <= problem.options.pad_slot_id < 2**31:
        return f"it requires a pad_slot_id of 32 bits, and this is {problem.options.pad_slot_id}"
    return None


def _wrong_dtypes(problem: Problem) -> str | None:
    dtypes = dict(problem.dtypes)
    if dtypes["state"] in ("int8", "float8_e4m3fn"):
        return f"it supports only int16 among quantised states, and this is {dtypes['state']}"
    if problem.stochastic_rounding and dtypes["state"] != "float16":
        return f"it rounds only float16 states stochastically, and this is {dtypes['state']}"
    for like, names in ALIKE.items():
        unlike = [name for name in names if name in dtypes and dtypes[name] != dtypes.get(like, dtypes[name])]
        if unlike:
            return f"it requires {unlike[0]} in {like}'s dtype {dtypes[like]}, and this is {dtypes[unlike[0]]}"
    return None


def _wrong_layout(problem: Problem) -> str | None:
    untied = [name for name in ("A", "dt", "D", "dt_bias") if name in problem.names and name not in problem.tied]
    if untied:
        return f"it requires {', '.join(untied)} tied to heads, and this call has one number per channel"
    # Its single-token kernels store single elements, its multi-token kernels vectors.
    vectors = (*_VECTORS, "out") if _by_token(problem) else _VECTORS
    if unaligned := [name for name in vectors if name in problem.unaligned]:
        return (
            f"it requires {', '.join(unaligned)} at addresses that are multiples of {VECTOR_BYTES} bytes, and some "
            "entries are not"
        )
    dense = _DENSE if _by_token(problem) else (*_DENSE, "out")
    if strided := [name for name in dense if name in problem.strided]:
        return f"it requires dense {', '.join(strided)}, and got gaps between entries"
    return None


def _wrong_intermediates(problem: Problem) -> str | None:
    if "intermediate_states" not in problem.names:
        return None
    if not problem.options.disable_state_update:
        return (
            "it does not update the state when it stores intermediate states (disable_state_update=True requests that)"
        )
    if problem.layout == "packed":
        return "with packed sequences it uses the steps of the intermediate states as the longest sequence's length"
    if "intermediate_state_indices" in problem.names:
        return "it would write out of bounds for a padding index in intermediate_state_indices"
    if problem.entries < problem.slots:
        return f"it requires an entry of intermediate states per slot, not {problem.entries} for {problem.slots}"
    return None


def _wrong_tokens(problem: Problem) -> str | None:
    if _longest(problem) <= _MOST_TOKENS:
        return None
    if problem.layout == "packed":
        return (
            f"it must know that no sequence has more than {_MOST_TOKENS} tokens: from the columns of a slot "
            f"table, here {problem.columns or 'none'}, or from the number of rows, here {problem.tokens}"
        )
    return f"it supports at most {_MOST_TOKENS} tokens in a call, and these are {problem.tokens}"


def _wrong_algorithm(problem: Problem) -> str | None:
    requested = problem.options.config.algorithm
    assert problem.capability is not None
    if requested not in FLASHINFER_ALGORITHMS or requested == "simple":
        return None
    if _by_token(problem):
        if problem.capability < (10, 0):
            return f"its {requested} multi-token kernel, which this call needs, runs from compute capability 10.0 on"
        what = _simple_alone(problem)
        return what and f"its {requested} multi-token kernel, which this call needs, does not support {what}"
    if problem.capability < (9, 0):
        return f"its {requested} kernel runs from compute capability 9.0 on"
    if requested == "horizontal" and "state_scale" in problem.names:
        return "its horizontal kernel does not support int16 states"
    if requested == "horizontal" and problem.headdim % 64:
        return f"its horizontal kernel supports headdim in multiples of 64, and this is {problem.headdim}"
    if requested == "vertical" and problem.headdim < 48:
        return f"its vertical kernel supports headdim from 48 on, and this is {problem.headdim}"
    if requested == "horizontal" and problem.nheads // problem.ngroups not in _HEADS_IN_A_GROUP:
        return "its horizontal kernel supports 1, 2, 4, 8, 16, 32 or 64 heads in a group"
    return None
