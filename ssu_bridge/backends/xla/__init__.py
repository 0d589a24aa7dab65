"""The xla backend: the step in plain jax.numpy, on any device and differentiable."""

import functools

from ssu_bridge.backends.base import Feature, TracedKernel, cannot, nothing_missing
from ssu_bridge.backends.xla import forms
from ssu_bridge.core.problem import Problem

PLATFORM = None
CONFIG_FIELDS = ("round_each_token",)
missing = nothing_missing  # the caller has JAX already
settings = forms.settings


def refusal(problem: Problem) -> str | None:
    """Refuse arrays of other frameworks, quantised states and stochastic rounding, among others."""
    if problem.framework != "jax":
        return f"it runs on JAX arrays only, and these are {problem.framework} arrays"
    return cannot(problem, Feature.QUANTIZED, Feature.STOCHASTIC) or forms.refusal(problem)


def load(problem: Problem) -> TracedKernel:
    """Return the function that computes the step; it is traced into the caller's program."""
    from ssu_bridge.backends.xla import step  # which imports JAX

    return TracedKernel(functools.partial(step.run, problem))
