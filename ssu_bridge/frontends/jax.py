"""The JAX frontend: one primitive, lowered to the kernel that is chosen for the platform, and its eager call.

Tracing checks the call and binds the primitive; lowering knows the platform, chooses the backend, loads its kernel and
registers it as an XLA FFI target. An eager call is a jitted function around the same, with the state donated.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ssu_bridge.arrays import ArrayInfo
from ssu_bridge.backends.base import HostKernel, TracedKernel
from ssu_bridge.choose import Choice, consider_problem, load
from ssu_bridge.config import Backend
from ssu_bridge.errors import NotInPlaceError, UnsupportedError
from ssu_bridge.frontends import Arrays, Launch, named, require_one_framework
from ssu_bridge.frontends.jax_targets import register
from ssu_bridge.problem import ARGUMENTS, Options, Problem, describe


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that traces calls with these options, launches them, or runs them on the host."""
    if issubclass(state_type, jax.core.Tracer):
        return functools.partial(_trace_call, options)
    if options.config.backend is Backend.REFERENCE:
        return functools.partial(_run_on_host, options)
    launch = _eager_launcher(options)
    if options.config.backend is not Backend.XLA:
        return launch

    def launch_or_trace(arrays: Arrays, out: Any) -> tuple[Any, Any]:
        # Under vmap or grad a concrete state stays the caller's: what it is batched or differentiated with is traced.
        traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        return _trace_call(options, arrays, out) if traced else launch(arrays, out)

    return launch_or_trace


def consider(arrays: Arrays, out: None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the arrays' platform; while tracing, for each platform of the process."""
    _explain_failure(arrays)
    state = arrays[0]
    traced = isinstance(state, jax.core.Tracer)
    platforms = _platforms().items() if traced else [_platform(next(iter(state.devices())))]
    problem = _describe(options, named(arrays))
    return tuple(consider_problem(problem.on(*platform)) for platform in platforms)


def to_host(array: Any) -> np.ndarray:
    """Return a NumPy copy. A view would keep JAX from donating the array."""
    return np.array(array)


def from_host(array: np.ndarray, like: Any = None) -> Any:
    """Return a JAX array with a copy of the values."""
    # device_put would take the NumPy array's own memory where it can, and JAX would then not donate the result.
    return jnp.array(array, device=None if like is None else like.sharding)


# --- Tracing ---


def _trace_call(options: Options, arrays: Arrays, out: Any) -> tuple[Any, Any]:
    require_one_framework(arrays)
    _refuse_out(out)
    return _trace(options, *_narrowed(arrays))


def _trace(options: Options, *positional: Any) -> tuple[Any, Any]:
    arrays = named(positional)
    problem = _describe(options, arrays)
    choices = [consider_problem(problem.on(*platform)) for platform in _platforms().items()]
    if all(choice.backend is None for choice in choices):
        raise choices[0].error()
    if options.config.backend is Backend.XLA:
        # Traced in place rather than behind the primitive, it can be differentiated and batched.
        kernel = load(choices[0].problem)
        assert isinstance(kernel, TracedKernel)
        return kernel.function(arrays)
    operands = _vary_alike(arrays.values())
    out, state = _step.bind(*operands, problem=problem)  # type: ignore[no-untyped-call]
    return out, state


def _vary_alike(arrays: Iterable[Any]) -> list[Any]:
    """Inside shard_map, mark all operands as varying over each mesh axis that one varies over, as the results do."""
    axes = [_varying(jax.typeof(array)) for array in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, axes, strict=True)
    ]


def _varying(kind: Any) -> frozenset[Any]:
    """Return the mesh axes over which an array of this type varies; versions of JAX differ in where they keep them."""
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(kind.vma if manual is None else manual.varying)


def _describe(options: Options, arrays: dict[str, Any]) -> Problem:
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays.values())
    infos = {name: _info(name, array) for name, array in arrays.items()}
    return describe(infos, options, framework="jax", platform=None, traced=traced)


def _info(name: str, array: Any) -> ArrayInfo:
    if isinstance(array, int):
        raise TypeError(f"{name}: expected a uint32[2] array or a jax.random.key, got int {array}")
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):  # type: ignore[attr-defined]
        data = jax.random.key_data(array)
        if name != "rand_seed" or data.shape != (2,):
            raise TypeError(f"{name}: expected {ARGUMENTS[name].dtypes[-1]} numbers, got keys of {array.dtype}")
        array = data
    # NumPy arrays come as they are; JAX takes them in these dtypes.
    return ArrayInfo(array.shape, jax.dtypes.canonicalize_dtype(array.dtype).name)


def _platforms() -> dict[str, tuple[int, int] | None]:
    """Return the platforms of this process, the default first, each with the capability of its first device."""
    platforms = dict([_platform(jax.devices()[0])])
    try:
        return platforms | dict([_platform(jax.devices("cpu")[0])])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return platforms


def _platform(device: Any) -> tuple[str, tuple[int, int] | None]:
    """Return a device's platform by the name that lowering has for it, and its compute capability."""
    if device.platform != "gpu":
        return device.platform, None
    major, dot, minor = str(device.compute_capability).partition(".")
    return ("cuda", (int(major), int(minor))) if dot else ("rocm", None)


# --- The primitive ---

_step = Primitive("ssu_bridge_update")
_step.multiple_results = True


@_step.def_abstract_eval  # type: ignore[untyped-decorator]
def _result_types(state: Any, x: Any, *_: Any, problem: Problem) -> tuple[Any, Any]:
    return x.update(weak_type=False), state.update(weak_type=False)


@_step.def_impl  # type: ignore[untyped-decorator]
def _run_at_once(*operands: Any, problem: Problem) -> Any:
    """Run the step where nothing traces or jits it, as under ``jax.disable_jit``."""
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_step.bind, problem=problem))(*operands)


def _lower(ctx: Any, *operands: Any, problem: Problem, platform: str | None = None) -> Any:
    platform = platform or ctx.module_context.platforms[0]
    on_platform = problem.on(platform, _platforms().get(platform))
    kernel = load(on_platform)
    if isinstance(kernel, TracedKernel):
        function = functools.partial(_by_name, kernel.function, problem.names)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)
    assert not isinstance(kernel, HostKernel)
    # Operand 0 is the state, result 1 the new state: one buffer. XLA puts a copy before it if it may not be changed.
    lowering = jax.ffi.ffi_lowering(register(kernel, platform), operand_output_aliases={0: 1})
    return lowering(ctx, *operands)


def _by_name(function: Callable[..., Any], names: tuple[str, ...], *arrays: Any) -> Any:
    return function(dict(zip(names, arrays, strict=True)))


mlir.register_lowering(_step, _lower)
for _name in ("cpu", "cuda"):
    mlir.register_lowering(_step, functools.partial(_lower, platform=_name), platform=_name)


def _refuse_gradient(*_: Any, **__: Any) -> Any:
    raise UnsupportedError('a gradient through this backend is not to be had; backend="xla" can be differentiated')


def _refuse_batching(*_: Any, **__: Any) -> Any:
    raise UnsupportedError('jax.vmap of this backend is not to be had yet; use jax.lax.map, or backend="xla"')


ad.primitive_jvps[_step] = _refuse_gradient
batching.primitive_batchers[_step] = _refuse_batching


# --- Eager calls ---


def _eager_launcher(options: Options) -> Launch:
    """Return the jitted step: it checks its arguments once for each set of shapes and dtypes, when it is traced.

    What runs in each call besides is kept to the least: whether the new state has the memory of the old one. For a
    foreign state the addresses tell. A state that came out of a step is marked: XLA allocated its memory, and then an
    old handle that is deleted says the same in a quarter of the time.
    """
    donate, read, write, host_array = options.donate, _READ, _WRITE, np.ndarray
    compiled = jax.jit(functools.partial(_trace, options), donate_argnums=0 if donate else ())

    def launch(arrays: Arrays, out: Any) -> tuple[Any, Any]:
        if out is not None:
            require_one_framework(arrays)
            _refuse_out(out)
        if type(arrays[read]) is host_array or type(arrays[write]) is host_array:
            arrays = _narrowed(arrays)
        state = arrays[0]
        try:
            before = None if hasattr(state, _MARK) else state.unsafe_buffer_pointer()
            results: tuple[Any, Any] = compiled(*arrays)
        except Exception as error:
            _explain_failure(arrays)
            before, results = _address(state), compiled(*_retry(arrays, error))
        if donate:
            new_state = results[1]
            if state.is_deleted() if before is None else _address(new_state) == before:
                new_state._ssu_bridge_step = True
            else:
                _report_copy(results, options)
        return results

    return launch


_MARK = "_ssu_bridge_step"


def _retry(arrays: Arrays, error: Exception) -> Arrays:
    """Return what to call the step with after it failed although no argument is wrong; raise the error if nothing is.

    A sharded state has no single address. A state that somebody else still views is not donated: XLA copies it on a
    CPU and refuses the call on a GPU.
    """
    state = arrays[0]
    if "external reference" in str(error):
        return jnp.copy(state), *arrays[1:]
    if state.is_fully_addressable and len(state.addressable_shards) == 1:
        raise error
    return arrays


_READ, _WRITE = (list(ARGUMENTS).index(name) for name in ("state_batch_indices", "dst_state_batch_indices"))


def _narrowed(arrays: Arrays) -> Arrays:
    """Make pads of NumPy's indices that 32 bits cannot hold.

    JAX would keep the low 32 bits, and those may name another sequence's slot.
    """
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return arrays
    narrow = np.iinfo(np.int32)
    return tuple(
        np.where((array >= narrow.min) & (array <= narrow.max), array, -1).astype(np.int32)
        if type(array) is np.ndarray and array.dtype == np.int64
        else array
        for array in arrays
    )


def _address(array: Any) -> Any:
    """Return where an array lies: a number, several for one that is sharded, None for a tracer."""
    try:
        return array.unsafe_buffer_pointer()
    except (RuntimeError, AttributeError, jax.errors.JAXTypeError):
        if isinstance(array, jax.core.Tracer):
            return None
        return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def _refuse_out(out: Any) -> None:
    if out is not None:
        raise TypeError("out: expected None with JAX arrays, whose results are always new arrays; got an array")


def _explain_failure(arrays: Arrays) -> None:
    """Raise the error that names the argument, if an argument is why a call failed."""
    require_one_framework(arrays)
    given = named(arrays)
    committed = {}
    for name, array in given.items():
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            raise ValueError(f"{name}: expected numbers in this machine's byte order, got dtype {array.dtype.str}")
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            continue
        if array.is_deleted():
            raise ValueError(
                f"{name}: expected a live array, got one that was deleted (donated to an earlier call); go on with the "
                "state that update returned"
            )
        if array is given["state"] and name != "state":
            raise ValueError(f"{name}: expected an array of its own, got the state, which is given up for the new one")
        if array.committed:
            committed[name] = array
    for name, array in committed.items():
        first, other = next(iter(committed.items()))
        if array.devices() != other.devices():
            raise ValueError(
                f"{name}: expected an array on {_spell(other.devices())}, where {first} is, "
                f"got one on {_spell(array.devices())}"
            )


def _spell(devices: Any) -> str:
    return ", ".join(sorted(map(str, devices)))


_warned = False


def _report_copy(results: tuple[Any, Any], options: Options) -> None:
    """Say that the new state has new memory: as an error if the configuration is strict, else as a warning, once."""
    global _warned
    if isinstance(results[1], jax.core.Tracer) or results[1].size == 0:  # no memory to speak of
        return
    message = (
        "the state was copied: JAX does not donate memory that somebody else still views (drop a live np.asarray, "
        "Torch or DLPack view) or, on the CPU, that it did not allocate (an array from DLPack), and a sharded state is "
        "gathered"
    )
    if options.config.strict_in_place:
        raise NotInPlaceError(f"state: {message}; the results are in this error's .results", results)
    if not _warned:
        _warned = True
        warnings.warn(f"ssu_bridge: {message}. This is said once.", RuntimeWarning, stacklevel=4)


def _run_on_host(options: Options, arrays: Arrays, out: Any) -> tuple[Any, Any]:
    _explain_failure(arrays)
    _refuse_out(out)
    device = next(iter(arrays[0].devices()))
    kernel = load(_describe(options, named(arrays)).on(*_platform(device)))
    assert isinstance(kernel, HostKernel)
    host = {name: to_host(array) for name, array in named(arrays).items()}
    host_out = np.empty(host["x"].shape, host["x"].dtype)
    kernel.function(host, host_out)
    results = from_host(host_out, arrays[1]), from_host(host["state"], arrays[0])
    if options.donate:
        arrays[0].delete()
    return results
