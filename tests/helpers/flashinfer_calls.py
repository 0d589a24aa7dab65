"""Cases that FlashInfer takes, and the views that its own function asks a caller for."""

import ctypes
import dataclasses
import re

import numpy as np
from modes import to_mode

import ssu_bridge
from ssu_bridge.backends.flashinfer import backend, module
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.testing.cases import Case

CASE = Case("flashinfer", headdim=64, dstate=64)
BARE = Case("bare", headdim=64, dstate=64, absent=("D", "z", "dt_bias"), indices=None)
TOKENS, STEPS = 3, 4
FLAGS = ("dt_softplus", "pad_slot_id", "disable_state_update")


def sized(case=CASE, **fields):
    return dataclasses.replace(case, **fields)


def tokens(case=CASE, count=TOKENS):
    """The same for several tokens of each sequence."""
    return sized(case, tokens=count)


def packed(case=CASE, lengths=(1, 0, 2)):
    """The same with the tokens of all sequences one after the other."""
    return sized(case, tokens=sum(lengths), cu_seqlens=tuple(map(int, np.cumsum([0, *lengths]))))


def table(columns=TOKENS, first=0):
    """A slot for each token of three sequences, no two the same."""
    return tuple(tuple(range(first + i * columns, first + (i + 1) * columns)) for i in range(3))


def quantized(case=CASE, dtype="int16"):
    """The same with a quantised state: as a checkpoint, FlashInfer takes one of 8 bits with these dstates alone."""
    dstate = max(case.dstate, 128) if case.window else case.dstate
    return sized(case, dstate=dstate, dtypes={**case.dtypes, "state": dtype})


def intermediates(case=CASE):
    """The same with intermediate states, as FlashInfer stores them: the state is left as it is."""
    return sized(case, steps=STEPS, disable_state_update=True)


def draw(case=CASE, **changes):
    """A case's arrays, by the names that kernels have for them, and flags."""
    return {**case.arrays(seed=3), **case.flags, **changes}


def arrays_of(call):
    return {name: value for name, value in call.items() if name not in FLAGS}


def tensors_of(call, mode="torch"):
    """A call's arrays as Torch tensors, by the names that kernels have for them."""
    return unpaired(to_mode(arrays_of(call), mode))


def problem_of(call, capability=(9, 0), window=0):
    """The Problem of a call, or of a case, on a GPU; ``window`` is that of the cursor of a call."""
    if isinstance(call, Case):
        call, window = draw(call), call.window
    return ssu_bridge.explain(**paired(call, window), backend="reference").choices[0].problem.on("cuda", capability)


def assert_refused(case, change, says):
    """Assert that the backend's refusal of a case, whose problem a function may change, says what an expression finds."""
    problem = problem_of(case)
    reason = backend.refusal(change(problem) if change else problem)
    assert reason is not None
    assert re.search(says, reason), reason


def address(tensor):
    """The address of a tensor of TVM-FFI's, also of the versions that do not say it."""
    if hasattr(tensor, "data_ptr"):
        return tensor.data_ptr()
    # Its last field is a DLTensor*, whose first field is the address.
    dltensor = ctypes.c_void_p.from_address(id(tensor) + type(tensor).__basicsize__ - ctypes.sizeof(ctypes.c_void_p))
    return ctypes.c_void_p.from_address(dltensor.value).value or 0


def as_flashinfer_wants(tensors, one_token_axis=False):
    """The views that a caller of FlashInfer's own function has to make."""
    _, H, P, N = tensors["state"].shape
    wanted = dict.fromkeys(module.ARGUMENTS.split(", ")) | tensors
    wanted["output"] = wanted.pop("out")
    wanted["intermediate_states_buffer"] = wanted.pop("intermediate_states", None)
    per_token = ("x", "z", "dt", "B", "C", "output")
    if one_token_axis:
        wanted |= {name: wanted[name].unsqueeze(1) for name in per_token if wanted[name] is not None}
    wanted["A"] = wanted["A"][:, None, None].expand(H, P, N)
    for name in ("dt", "D", "dt_bias"):
        if wanted[name] is not None:
            wanted[name] = wanted[name][..., None].expand(*wanted[name].shape, P)
    return wanted


# What checkpointing_ssu takes of the inputs of a call with a ReplayState.
BRAIN = {"*": "bfloat16", "A": "float32"}
WINDOW, MOST = 5, 3
REPLAY = Case(
    "replay",
    headdim=64,
    dstate=64,
    window=WINDOW,
    most=1,
    starts=(0, 5, 4, 2, 1, 3),
    pending=(5, 2, 1, 3, 4, 0),
    dtypes={**BRAIN, "state": "bfloat16"},
)
REPLAY_TOKENS = sized(REPLAY, tokens=MOST, most=MOST, starts=(0, 7, 6, 2, 1, 4))
REPLAY_PACKED = sized(REPLAY_TOKENS, tokens=6, cu_seqlens=(0, 3, 4, 6))


RINGS = ("replay_x", "replay_B", "replay_dt")


def without_nan(arrays):
    """The same with numbers in all rows of the rings, which FlashInfer multiplies with zeros."""
    # np.nan_to_num leaves bfloat16 alone.
    finite = {n: np.where(np.isnan(array), array.dtype.type(1.5), array) for n, array in arrays.items() if n in RINGS}
    return {**arrays, **finite}


def as_checkpointing_wants(tensors, layout):
    """The views that a caller of FlashInfer's checkpointing_ssu has to make, by the names of its arguments."""
    _, H, P, N = tensors["state"].shape
    ours = dict(zip(module.REPLAY_PARAMETERS, module.REPLAY_ARGUMENTS.split(", "), strict=True))
    wanted = dict.fromkeys(module.REPLAY_ARGUMENTS.split(", "))
    wanted |= {ours[name]: tensor for name, tensor in tensors.items()}
    for name in ("x", "dt", "B", "C", "z", "output"):
        if wanted[name] is not None and layout != "multi":
            wanted[name] = wanted[name].unsqueeze(1 if layout == "single" else 0)
    wanted["A"] = wanted["A"][:, None, None].expand(H, P, N)
    for name in ("dt", "D", "dt_bias"):
        if wanted[name] is not None:
            wanted[name] = wanted[name][..., None].expand(*wanted[name].shape, P)
    return wanted
