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

from ssu_bridge.arrays import ArrayInfo, QuantizedState
from ssu_bridge.backends.base import HostKernel, TracedKernel
from ssu_bridge.choose import Choice, consider_problem, load
from ssu_bridge.config import Backend
from ssu_bridge.errors import NotInPlaceError, UnsupportedError
from ssu_bridge.frontends import Arrays, Launch, named, require_one_framework, returned
from ssu_bridge.frontends.jax_targets import register
from ssu_bridge.problem import ARGUMENTS, STATE, Options, Problem, describe


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that traces calls with these options, launches them, or runs them on the host."""
    if issubclass(state_type, jax.core.Tracer):
        return functools.partial(_trace_call, options)
    if options.config.backend is Backend.REFERENCE:
        return functools.partial(_run_on_host, options)
    launch = _eager_launcher(options)
    if options.config.backend is not Backend.XLA:
        return launch

    def launch_or_trace(arrays: Arrays, out: Any) -> tuple[Any, ...]:
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


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays as they are: a program that drew its own seed would round the same way in every run."""
    return arrays


def to_host(array: Any) -> np.ndarray:
    """Return a NumPy copy. A view would keep JAX from donating the array."""
    return np.array(_words(array))


def from_host(array: np.ndarray, like: Any = None) -> Any:
    """Return a JAX array with a copy of the values; a NumPy one where JAX was given one of those."""
    if isinstance(like, np.ndarray):
        return np.array(array)
    # device_put would take the NumPy array's own memory where it can, and JAX would then not donate the result.
    return jnp.array(array, device=None if like is None else like.sharding)


# --- Tracing ---


def _trace_call(options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    require_one_framework(arrays)
    _refuse_out(out)
    return _with_kept_state(options, arrays, _trace(options, *_narrowed(arrays)))


def _trace(options: Options, *positional: Any) -> tuple[Any, ...]:
    """Return what ``update`` does, but None for a state that is only read: a program would have to copy it."""
    arrays = named(positional)
    problem = _describe(options, arrays)
    if "rand_seed" in arrays:
        arrays["rand_seed"] = _shard_seed(_words(arrays["rand_seed"]), arrays["state"])
    choices = [consider_problem(problem.on(*platform)) for platform in _platforms().items()]
    if all(choice.backend is None for choice in choices):
        raise choices[0].error()
    if options.config.backend is Backend.XLA:
        # Traced in place rather than behind the primitive, it can be differentiated and batched.
        kernel = load(choices[0].problem)
        assert isinstance(kernel, TracedKernel)
        results = kernel.function(arrays)
    else:
        results = _step.bind(*_vary_alike(arrays.values()), problem=problem)  # type: ignore[no-untyped-call]
    kept = {"state": None} if options.disable_state_update else {}
    return returned({**arrays, **kept, **dict(zip(problem.results, results, strict=True))})


def _with_kept_state(options: Options, arrays: Arrays, results: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put a state that was only read back where ``update`` returns it."""
    if not options.disable_state_update:
        return results
    return results[0], returned({**named(arrays), "out": None})[1], *results[2:]


def _words(seed: Any) -> Any:
    """Return the two words of a key."""
    return jax.random.key_data(seed) if _is_key(seed) else seed


def _is_key(array: Any) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))  # type: ignore[attr-defined]


def _shard_seed(seed: Any, state: Any) -> Any:
    """Inside shard_map, where elements count from 0 in each shard, give each shard of a state a seed of its own."""
    for axis in sorted(_varying(jax.typeof(state)) - _varying(jax.typeof(seed)), key=str):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), jax.lax.axis_index(axis))
        seed = jax.random.key_data(key)
    return seed


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
    if _is_key(array):
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
def _result_types(*operands: Any, problem: Problem) -> tuple[Any, ...]:
    types = dict(zip(problem.names, operands, strict=True))
    types["out"] = types["x"]
    return tuple(types[name].update(weak_type=False) for name in problem.results)


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
    # What is written in place is an operand and a result of one buffer. XLA copies one that must not be changed.
    aliases = {problem.names.index(name): i for i, name in enumerate(problem.results) if name != "out"}
    lowering = jax.ffi.ffi_lowering(register(kernel, platform), operand_output_aliases=aliases)
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
    read, write, host_array, usual = _READ, _WRITE, np.ndarray, _WRITE + 1
    kept = STATE if options.disable_state_update else ()
    donated = tuple(i for i, name in enumerate(ARGUMENTS) if options.donate and name in _WRITTEN and name not in kept)
    donates_state = 0 in donated
    compiled = jax.jit(functools.partial(_trace, options), donate_argnums=donated)

    def launch(arrays: Arrays, out: Any) -> tuple[Any, ...]:
        if out is not None:
            require_one_framework(arrays)
            _refuse_out(out)
        if len(arrays) > usual or type(arrays[read]) is host_array or type(arrays[write]) is host_array:
            arrays = _narrowed(arrays)
        state = arrays[0]
        try:
            before = None if hasattr(state, _MARK) else state.unsafe_buffer_pointer()
            results: tuple[Any, ...] = compiled(*arrays)
        except Exception as error:
            _explain_failure(arrays)
            before, results = _address(state), compiled(*_retry(arrays, error))
        if not donates_state:
            return _with_kept_state(options, arrays, results)
        new_state = results[1]
        if type(new_state) is QuantizedState:
            new_state = new_state.values
        if state.is_deleted() if before is None else _address(new_state) == before:
            new_state._ssu_bridge_step = True
        else:
            _report_copy(new_state, results, options)
        return results

    return launch


_MARK = "_ssu_bridge_step"


def _retry(arrays: Arrays, error: Exception) -> Arrays:
    """Return what to call the step with after it failed although no argument is wrong; raise the error if nothing is.

    A sharded state has no single address. An array that somebody else still views is not donated: XLA copies it on a
    CPU and refuses the call on a GPU.
    """
    state = arrays[0]
    if "external reference" in str(error):
        given = zip(ARGUMENTS, arrays, strict=False)
        return tuple(jnp.copy(a) if name in _WRITTEN and a is not None else a for name, a in given)
    if state.is_fully_addressable and len(state.addressable_shards) == 1:
        raise error
    return arrays


_READ, _WRITE = (list(ARGUMENTS).index(name) for name in ("state_batch_indices", "dst_state_batch_indices"))
_WRITTEN = tuple(name for name, argument in ARGUMENTS.items() if argument.written and name != "out")


def _narrowed(arrays: Arrays) -> Arrays:
    """Keep NumPy's int64 from losing the high 32 bits in JAX, which would make it another sequence's slot.

    An index that 32 bits cannot hold becomes a pad, a count the largest or smallest that they can.
    """
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return arrays
    narrow = np.iinfo(np.int32)
    result = list(arrays)
    for i, (name, array) in enumerate(zip(ARGUMENTS, arrays, strict=False)):
        if type(array) is not np.ndarray or array.dtype != np.int64:
            continue
        inside = (array >= narrow.min) & (array <= narrow.max)
        beyond = np.clip(array, narrow.min, narrow.max) if name in _COUNTS else -1
        result[i] = np.where(inside, array, beyond).astype(np.int32)
    return tuple(result)


_COUNTS = ("num_accepted_tokens", "cu_seqlens")


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
        for written in given:
            if written != name and written in _WRITTEN and array is given[written]:
                what = "the state" if written == "state" else written
                raise ValueError(f"{name}: expected an array of its own, got {what}, which is given up for the new one")
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


def _report_copy(state: Any, results: tuple[Any, ...], options: Options) -> None:
    """Say that the new state has new memory: as an error if the configuration is strict, else as a warning, once."""
    global _warned
    if isinstance(state, jax.core.Tracer) or state.size == 0:  # no memory to speak of
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


def _run_on_host(options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    _explain_failure(arrays)
    _refuse_out(out)
    given = named(arrays)
    problem = _describe(options, given).on(*_platform(next(iter(arrays[0].devices()))))
    kernel = load(problem)
    assert isinstance(kernel, HostKernel)
    host = {name: to_host(array) for name, array in given.items()}
    host["out"] = np.empty(host["x"].shape, host["x"].dtype)
    kernel.function(host, host["out"])
    after = {name: from_host(host[name], given.get(name, given["x"])) for name in problem.results}
    if options.donate:
        for name in problem.results[1:]:
            given[name].delete()
    return returned({**given, **after})
