"""Calls with a ReplayState: FlashInfer's checkpointing_ssu, which 0.7.4 has with rings of one buffer.

FlashInfer writes the checkpoint of a sequence as ``update`` does only where the tokens that it is compiled for are the
cursor's: its rule for others is another one. docs/flashinfer.md lists what is refused and why.
"""

from collections.abc import Iterator

import numpy as np

from ssu_bridge.backends.base import DeviceKernel, cannot_run_there, lacks_form
from ssu_bridge.backends.flashinfer import module
from ssu_bridge.backends.flashinfer.kernel import AddedAxis, Specialisation, kernel_of
from ssu_bridge.backends.flashinfer.module import ReplayModule
from ssu_bridge.core.problem import Problem

# Its code does not compile for others.
_HEADDIM, _DSTATES, _DSTATES_OF_8_BITS = 64, (64, 128, 192, 256), (128, 256)
# The tokens that one product of its tensor cores takes.
_MOST_PENDING = 16
# What its tensor cores multiply: another x of two bytes would be read as this.
_PRODUCTS = "bfloat16"
# Sequences and heads are axes of the grid.
_MOST_BLOCKS = 65535
_STATES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
_ROUNDABLE = ("float16", "int8", "float8_e4m3fn")
_VECTORS = ("state", "x", "B", "C", "z", "replay_x", "replay_B", "out")
_DENSE = ("state_batch_indices", "cu_seqlens")
# What it reads in the dtype of x; the rings have it from what they keep.
_LIKE_X = ("B", "C", "z", "out")


def refusal(problem: Problem) -> str | None:
    """Refuse what checkpointing_ssu rejects or computes otherwise than ``update``."""
    reason = cannot_run_there(problem) or lacks_form(problem) or module.lacks_replay()
    return reason or next((f"with a ReplayState it {reason}" for reason in _reasons(problem)), None)


def _reasons(problem: Problem) -> Iterator[str]:
    yield from _wrong_sizes(problem)
    yield from _wrong_dtypes(problem)
    yield from _wrong_layout(problem)


def _wrong_sizes(problem: Problem) -> Iterator[str]:
    options = problem.options
    if problem.headdim != _HEADDIM:
        yield f"supports headdim {_HEADDIM}, and this is {problem.headdim}"
    state = dict(problem.dtypes)["state"]
    dstates = _DSTATES_OF_8_BITS if np.dtype(state).itemsize == 1 else _DSTATES
    if problem.dstate not in dstates:
        yield f"supports dstate {', '.join(map(str, dstates))} with {state}, and this is {problem.dstate}"
    if options.replay_window > _MOST_PENDING:
        yield f"supports a window of at most {_MOST_PENDING} tokens, and this is {options.replay_window}"
    for what, count in (("heads", problem.nheads), ("sequences", problem.sequences)):
        if count > _MOST_BLOCKS:
            yield f"supports at most {_MOST_BLOCKS} {what}, and these are {count}"
    if not -(2**31) <= options.pad_slot_id < 2**31:
        yield f"requires a pad_slot_id of 32 bits, and this is {options.pad_slot_id}"
    tokens = problem.tokens if problem.layout == "multi" else 1
    if problem.layout != "packed" and tokens not in (0, options.replay_tokens):
        yield (
            f"needs as many tokens of each sequence as the cursor has, {options.replay_tokens}, and these are "
            f"{tokens}; with cu_seqlens it takes fewer"
        )


def _wrong_dtypes(problem: Problem) -> Iterator[str]:
    dtypes = dict(problem.dtypes)
    if dtypes["state"] not in _STATES:
        yield f"supports checkpoints of {', '.join(_STATES)}, and this is {dtypes['state']}"
    if problem.stochastic_rounding and dtypes["state"] not in _ROUNDABLE:
        yield f"rounds only {', '.join(_ROUNDABLE)} states stochastically, and this is {dtypes['state']}"
    if dtypes["x"] != _PRODUCTS:
        yield f"requires x in {_PRODUCTS}, and this is {dtypes['x']}"
    for name in _LIKE_X:
        if dtypes.get(name, dtypes["x"]) != dtypes["x"]:
            yield f"requires {name} in x's dtype {dtypes['x']}, and this is {dtypes[name]}"
    if dtypes.get("D", _weights(problem)) != dtypes.get("dt_bias", _weights(problem)):
        yield f"requires D and dt_bias in one dtype, and these are {dtypes['D']} and {dtypes['dt_bias']}"
    if dtypes.get("cu_seqlens", "int32") != "int32":
        yield "requires cu_seqlens in int32, and this is int64"


def _wrong_layout(problem: Problem) -> Iterator[str]:
    if "D" in problem.names and "D" not in problem.tied:
        yield "requires D tied to heads, and this has one number per channel"
    if unaligned := [name for name in _VECTORS if name in problem.unaligned]:
        yield f"requires {', '.join(unaligned)} at addresses that are multiples of 16 bytes, and some entries are not"
    if strided := [name for name in _DENSE if name in problem.strided]:
        yield f"requires dense {', '.join(strided)}, and got gaps between entries"


def settings(problem: Problem) -> str:
    """Return what checkpointing_ssu guarantees less than other backends."""
    state = dict(problem.dtypes)["state"]
    said = [f"its checkpointing kernel, which multiplies in {_PRODUCTS}"]
    if "state_scale" not in problem.names:
        said.append(f"computes the outputs of a call that writes the checkpoint from one that is rounded to {state}")
    said.append("requires finite numbers in all rows of the rings, and checks no number of the cursor")
    if "state_batch_indices" in problem.names:
        said.append("checks no index but pad_slot_id")
    if problem.layout == "packed":
        said.append(f"sequences of at most {problem.options.replay_tokens} tokens")
    if problem.stochastic_rounding:
        said.append("rounds with its own random numbers")
    return "; ".join(said)


def load(problem: Problem) -> DeviceKernel:
    """Return the kernel, which FlashInfer may have to compile."""
    options = problem.options
    added = {"single": AddedAxis.TOKEN, "multi": AddedAxis.NONE, "packed": AddedAxis.LEADING}
    # One of its programs for a head, and what only its two-kernel path has: that needs memory of its own.
    scalars = {"dt_softplus": options.dt_softplus, "pad_slot_id": options.pad_slot_id, "d_split": 1}
    scalars |= {"precompute_heads_per_cta": 0, "main_pipeline_stages": 0, "main_ctas_per_sm": 0}
    specialisation = Specialisation(
        module=module_of(problem),
        names=(*problem.names, *problem.results),
        scalars=tuple(scalars.items()),
        added_axis=added[problem.layout],
        fills_pads="state_batch_indices" in problem.names,
    )
    sizes = {"H": problem.nheads, "P": problem.headdim, "N": problem.dstate, "G": problem.ngroups}
    return kernel_of(problem, specialisation, sizes | {"R": options.replay_window + options.replay_tokens})


def module_of(problem: Problem) -> ReplayModule:
    """Return what FlashInfer compiles for a problem."""
    dtypes, options = dict(problem.dtypes), problem.options
    return ReplayModule(
        state_dtype=dtypes["state"],
        input_dtype=dtypes["x"],
        dt_dtype=dtypes["dt"],
        weight_dtype=_weights(problem),
        matrixA_dtype=dtypes["A"],
        stateIndex_dtype=dtypes.get("state_batch_indices", "int32"),
        state_scale_dtype=dtypes.get("state_scale"),
        dim=problem.headdim,
        dstate=problem.dstate,
        npredicted=options.replay_tokens,
        max_window=options.replay_window,
        heads_per_group=problem.nheads // problem.ngroups,
        num_groups=problem.ngroups,
        philox_rounds=options.config.philox_rounds if problem.stochastic_rounding else 0,
        enable_pdl=False,
    )


def _weights(problem: Problem) -> str:
    """Return the dtype of D and dt_bias, as FlashInfer's own function does without either."""
    dtypes = dict(problem.dtypes)
    return next(dtypes[name] for name in ("D", "dt_bias", "dt") if name in dtypes)
