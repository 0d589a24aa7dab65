"""Ctrl-C at any line of the package: where it comes is counted, so that it comes there again.

Run as a program it interrupts first calls in each framework, each of a kernel of its own, and makes the same call again.
"""

import os
import sys

import ssu_bridge

PACKAGE = os.path.dirname(ssu_bridge.__file__)


class Interrupt:
    """A KeyboardInterrupt at the ``line``-th line of the package that runs inside of ``with``; it counts without one."""

    def __init__(self, line=0):
        self.line, self.seen = line, 0

    def __enter__(self):
        sys.settrace(self._called)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _called(self, frame, event, argument):
        return self._at_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _at_line(self, frame, event, argument):
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._at_line


def main(steps):
    """Interrupt calls at every so many lines; the calls after them have the bits that they should."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from ssu_bridge.testing.cases import Case, arguments

    case = Case("interrupted", sequences=2, slots=4, indices=(3, 0), tokens=2, dtypes={"state": "int8"})
    converters = {"numpy": np.array, "torch": torch.from_numpy, "jax": jnp.array, "jit": jnp.array}

    def bits(framework, pad):
        given = arguments(case.arrays(seed=0), framework.replace("jit", "jax"), converters[framework])
        flags = case.flags | {"pad_slot_id": pad, "backend": "cpu"}
        call = lambda given: ssu_bridge.update(**given, **flags)  # noqa: E731
        results = (jax.jit(call) if framework == "jit" else call)(given)
        return [np.asarray(array).tobytes() for array in jax.tree.leaves(results)]

    for framework, step in steps.items():
        expected = bits(framework, -1)
        with Interrupt() as counted:
            bits(framework, -2)
        assert counted.seen > 1000, counted.seen
        print(f"{framework}: {counted.seen} lines, of which one in {step}", file=sys.stderr)
        for line in range(1, counted.seen + 1, step):
            try:
                with Interrupt(line):
                    bits(framework, -2 - line)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError(f"{framework}: Ctrl-C at line {line} was swallowed")
            assert bits(framework, -2 - line) == bits(framework, -2 - line) == expected, (framework, line)
    print("all the same")


if __name__ == "__main__":
    of_host, of_jax = map(int, sys.argv[1:])
    main({"numpy": of_host, "torch": of_host, "jax": of_jax, "jit": of_jax})
