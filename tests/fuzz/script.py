"""A call as a script that needs nothing of the fuzz, and what was wrong with it."""

from fuzz.draw_layouts import TABLES
from fuzz.memory import PROJECTED, extents

# Torch has no dtype of NumPy's bfloat16 and float8.
TORCH = """
def tensor(array):
    other = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}.get(array.dtype.name)
    return torch.from_numpy(array) if other is None else torch.from_numpy(array.view(f"i{array.itemsize}")).view(other)
"""
# On a GPU the buffers are copied as a whole, so that the arrays lie there as they did.
CUDA = """
def tensor(array):
    owner = array
    while owner.base is not None: owner = owner.base
    dtype = getattr(torch, array.dtype.name)
    memory = on_gpu.setdefault(id(owner), torch.from_numpy(owner).cuda())
    memory = memory.view(torch.uint8 if dtype is torch.bool else dtype)
    first = array.ctypes.data - owner.ctypes.data if array.size else 0
    strides = [stride // array.itemsize for stride in array.strides]
    return memory.as_strided(array.shape, strides, first // array.itemsize).view(dtype)
on_gpu = {}
"""
JAX = """
def on_jax(name, array):
    if name == "rand_seed":
        return jnp.asarray(array.reshape(1).view("uint32"))
    return jnp.array(array.astype("int32") if array.dtype == "int64" else array)
"""


def script(call, wrong, note=""):
    """Return Python source that makes a call, ends with what was wrong, and fails where that is a number."""
    framework = call.mode.split(".")[0]
    lines = [f"# {note}".rstrip(), f"# {call.mode}, {call.backend}: {wrong}"]
    lines += ["import ml_dtypes, numpy as np", "import ssu_bridge", ""]
    lines += [f"rng, a = np.random.default_rng({call.number}), {{}}", *call.statements]
    lines += _placed(call)
    if framework == "torch":
        lines += ["import torch", CUDA if call.on_gpu else TORCH]
        lines += ["a = {name: tensor(array) for name, array in a.items()}"]
    if framework == "jax":
        kept = f"array if name in {TABLES}{'' if call.host_tables else ' and array.dtype == np.int64'} else "
        lines += [
            "import jax, jax.numpy as jnp",
            JAX,
            f"a = {{name: {kept}on_jax(name, array) for name, array in a.items()}}",
        ]
    lines += _given(call)
    lines += _called(call, framework)
    lines += _asserted(wrong)
    return "\n".join(lines) + "\n"


def _placed(call):
    """Put the arrays where they lie: strided, at odd addresses, or sharing memory."""
    if not call.layouts:
        return []
    arrays = call.arrays
    lines = [f"buffers = {{name: np.zeros(size, 'uint8') for name, size in {extents(arrays, call.layouts)}.items()}}"]
    lines += ["def placed(name, buffer, first, strides, fills):"]
    lines += ["    size = a[name].itemsize"]
    lines += [
        "    view = np.ndarray(a[name].shape, a[name].dtype, buffers[buffer], first * size, [size * s for s in strides])"
    ]
    lines += ["    if fills: view[...] = a[name]", "    a[name] = view"]
    for name, (buffer, first, strides) in call.layouts.items():
        fills = name in (buffer, *PROJECTED)
        first = first if arrays[name].size else 0
        lines.append(f"placed({name!r}, {buffer!r}, {first}, {strides}, {fills})")
    return lines


def _given(call):
    lines = ["given = dict(a)"]
    for name, scale in (("state", "state_scale"), ("intermediate_states", "intermediate_state_scales")):
        lines += [
            f"if {scale!r} in given: given[{name!r}] = ssu_bridge.QuantizedState(given[{name!r}], given.pop({scale!r}))"
        ]
    if call.options.window:
        rings = "given.pop('replay_x'), given.pop('replay_B'), given.pop('replay_dt')"
        cursor = f"given.pop('replay_start'), given.pop('replay_pending'), {call.options.window}, {call.options.tokens}"
        lines += [f"given['state'] = ssu_bridge.ReplayState(given['state'], {rings})"]
        lines += [f"given['replay'] = ssu_bridge.ReplayCursor({cursor})"]
    flags = dict(call.flags)
    if call.mode == "jax" and not call.donates:
        flags["donate"] = False
    lines += [f"given |= {flags}"]
    return lines + ([call.spoils] if call.spoils else [])


def _called(call, framework):
    if call.mode != "jax.jit":
        return ["results = ssu_bridge.update(**given)"]
    names = "['state', 'intermediate_states']" if call.donates else "[]"
    return [
        f"flags = {{name: given.pop(name) for name in {list(call.flags)}}}",
        f"step = jax.jit(lambda **given: ssu_bridge.update(**given, **flags), donate_argnames={names})",
        "results = step(**given)",
    ]


def _asserted(wrong):
    places = {"out": "results[0]", "state": "results[1]", "intermediate_states": "results[2]"}
    lines = [f"# {wrong.name}{list(wrong.place)}: expected {wrong.expected}, got {wrong.got}"]
    if wrong.name in places and wrong.place and " to " in wrong.expected:
        low, high = wrong.expected.replace("np.float64", "").split(" to ")
        lines += [f"result = {places[wrong.name]}", "result = getattr(result, 'checkpoint', result)"]
        lines += ["result = getattr(result, 'values', result)" if wrong.name != "out" else ""]
        shape = "result.reshape(-1, *result.shape[-2:])" if wrong.name == "out" else "result"
        lines += [f"got = float({shape}[{', '.join(map(str, wrong.place))}])", f"assert {low} <= got <= {high}, got"]
    return [line for line in lines if line]
