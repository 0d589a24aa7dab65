"""Torch calls: checked, launched, and kept for calls of the same signature."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.core.aliasing import Memory, needs_fresh_output
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.dispatch import Choice, consider_problem, load
from ssu_bridge.frontends.base import SEED, Arrays, draws_seed, named, refuse_copy, returned
from ssu_bridge.frontends.torch import custom_op, transforms
from ssu_bridge.frontends.torch.host import from_host, to_host
from ssu_bridge.frontends.torch.metadata import Key, key_of, problem_of
from ssu_bridge.frontends.torch.seeds import draw, placed
from ssu_bridge.frontends.torch.signature_cache import SignatureCache, tell_autograd


class Launcher:
    """Runs calls with these options: repeated ones from the signature cache, others after a check.

    Attributes:
        repeated: the calls that were checked.
    """

    def __init__(self, options: Options):
        refuse_copy(options)
        self._options = options
        self._seeds = options.config.stochastic_rounding
        self.repeated = SignatureCache(options)

    def __call__(self, arrays: Arrays, out: torch.Tensor | None) -> tuple[Any, ...]:
        """Run one call and return what ``update`` does."""
        draws = False
        if self._seeds or len(arrays) > SEED:
            transforms.require_supported(named(arrays, out))  # they fail in making a seed
            if transforms.recording():
                return custom_op.trace(self._options, arrays, out)
            draws = draws_seed(arrays, self._options)
            arrays = placed(arrays, self._options)
        try:
            results = self.repeated.run(arrays, out, draws)
        except Exception:
            self._kernel(arrays, out)  # to say what is wrong with a tensor, if that is why
            raise
        return _untraced(self._check_and_launch)(arrays, out, draws) if results is None else results

    def _check_and_launch(self, arrays: Arrays, out: torch.Tensor | None, draws: bool) -> tuple[Any, ...]:
        transforms.require_supported(named(arrays, out))
        if transforms.recording():
            return custom_op.trace(self._options, arrays, out)
        kernel, problem = self._kernel(arrays, out)
        results, given = problem.results, named(arrays)
        fresh_output = needs_fresh_output(problem, {name: _memory(t) for name, t in named(arrays, out).items()})
        given["out"] = torch.empty_like(given["x"], memory_format=torch.contiguous_format) if out is None else out
        written = [given[name] for name in results]
        output = given["out"]
        if fresh_output:  # a copy: rows that belong to no sequence keep what they have
            output = output.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(kernel, DeviceKernel):
            kernel.check(*{**given, "out": output}.values(), *written[1:])
        if draws:
            draw(arrays[SEED])
        if isinstance(kernel, HostKernel):
            _run_on_host(kernel, results, given)
        elif fresh_output:
            kernel.function(*{**given, "out": output}.values(), *written[1:])
            with torch.inference_mode():  # an inference tensor may be out, outside of it too, as it may of a kernel
                given["out"].copy_(output)
        else:
            kernel.function(*given.values(), *written[1:])
            self.repeated.add(kernel.function, arrays, given["out"])
        tell_autograd(*written)
        return returned(given)

    def _kernel(self, arrays: Arrays, out: torch.Tensor | None) -> tuple[DeviceKernel | HostKernel, Problem]:
        kernel, problem = _checked_kernel(key_of(arrays, out), self._options)
        transforms.require_no_grad(named(arrays, out), lambda: consider_problem(problem).backend)
        return kernel, problem


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that Dynamo does not trace where a caller's frame fell back to eager code.

    Dynamo is looked for and not imported, which takes two seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return function
    untraced: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


def launcher(state_type: type, options: Options) -> Launcher:
    """Return what runs calls with these options."""
    return Launcher(options)


def _memory(tensor: torch.Tensor) -> np.ndarray:
    where = Memory(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.element_size())
    return np.asarray(where)


def consider(arrays: Arrays, out: torch.Tensor | None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the device that the tensors are on."""
    return (consider_problem(problem_of(key_of(placed(arrays, options), out), options)),)


@functools.lru_cache(maxsize=4096)
def _checked_kernel(key: Key, options: Options) -> tuple[DeviceKernel | HostKernel, Problem]:
    problem = problem_of(key, options)
    kernel = load(problem)
    assert isinstance(kernel, DeviceKernel | HostKernel)
    return kernel, problem


def _run_on_host(kernel: HostKernel, results: tuple[str, ...], given: dict[str, torch.Tensor]) -> None:
    host = {name: to_host(tensor) for name, tensor in given.items()}
    kernel.function(host, host["out"])
    with torch.inference_mode():  # as above
        for name in results:
            given[name].copy_(from_host(host[name]))
