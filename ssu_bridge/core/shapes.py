"""Shapes and strides of a call's arrays against the table of arguments."""

from collections.abc import Mapping

import numpy as np

from ssu_bridge.core.arguments import ARGUMENTS, SIZES, TIED_AXES, TOKEN_AXES, VECTOR_BYTES, pattern_of, patterns
from ssu_bridge.core.arrays import ArrayInfo, is_dense


class Shapes:
    """Matches the arrays' shapes against ``ARGUMENTS``, learning the sizes on the way."""

    def __init__(self, arrays: Mapping[str, ArrayInfo]):
        state, x = arrays["state"], arrays["x"]
        if len(state.shape) not in (3, 4):
            raise ValueError(
                f"state: expected shape (slots, nheads, headdim, dstate) or (slots, headdim, dstate), got {state.shape}"
            )
        self.heads_axis = len(state.shape) == 4
        self.state_shape = state.shape
        self.state_axes = "slots, nheads, headdim, dstate" if self.heads_axis else "slots, headdim, dstate"
        self.indexed = "state_batch_indices" in arrays
        self.sizes: dict[str, int] = {"1": 1, "2": 2} | ({} if self.heads_axis else {"H": 1, "G": 1})
        extra = len(x.shape) - (len(state.shape) - 1)
        if extra not in (0, 1):
            raise ValueError(
                f"x: expected {len(state.shape) - 1} axes, or {len(state.shape)} for several tokens, got shape "
                f"{x.shape}, with a state of ({self.state_axes}) {state.shape}"
            )
        if "cu_seqlens" in arrays:
            if extra:
                raise ValueError(f"cu_seqlens: expected None with x of shape (sequences, tokens, ...), {x.shape}")
            if len(arrays["cu_seqlens"].shape) != 1 or arrays["cu_seqlens"].shape[0] < 1:
                raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {arrays['cu_seqlens'].shape}")
            self.layout = "packed"
            self.sizes["b"] = arrays["cu_seqlens"].shape[0] - 1
        else:
            self.layout = "multi" if extra else "single"
        self.token_axes = TOKEN_AXES[self.layout]
        self.sizes["Q"] = self.sizes.get("b", x.shape[0]) + 1

    def match(self, name: str, info: ArrayInfo) -> None:
        """Check an array's shape, and learn the sizes that it fixes and nothing before it has."""
        for pattern in self._patterns(name):
            sizes = dict(self.sizes)
            fixed = (*zip(pattern, info.shape, strict=False), *self._implied(name, pattern))
            if len(pattern) == len(info.shape) and all(sizes.setdefault(symbol, n) == n for symbol, n in fixed):
                self.sizes = sizes
                self._check_heads(name)
                return
        context = "" if name == "state" else f", with a state of ({self.state_axes}) {self.state_shape}"
        hint = self._hint(name, info.shape)
        raise ValueError(f"{name}: expected shape {self._expected(name)}, got {info.shape}{context}{hint}")

    def _hint(self, name: str, shape: tuple[int, ...]) -> str:
        """Return what to add to an error where an array fits a Mamba-2 call that lacks its axis of sequences."""
        sizes = dict(zip("HPN", self.state_shape, strict=False))
        one = [pattern.replace("b", "") for layout in ("single", "multi") for pattern in patterns(name, layout, True)]
        fits = (all(sizes.get(s, n) == n for s, n in zip(p, shape, strict=True)) for p in one if len(p) == len(shape))
        if self.heads_axis or not any(fits):
            return ""
        return (
            "; a state of three axes is one of Mamba-1: for one sequence of Mamba-2, inside jax.vmap too, give state, "
            "x, dt, B, C and z an axis of one sequence, as in state[None]"
        )

    def _check_heads(self, name: str) -> None:
        """Check the sizes that no array may contradict by itself, as soon as one fixes them."""
        size = self.sizes
        for symbol in "HPNG":
            if size.get(symbol, 1) < 1:
                raise ValueError(f"{name}: expected {SIZES[symbol]} of at least 1, got 0")
        if size["H"] % size.get("G", 1):
            raise ValueError(f"{name}: expected ngroups to divide nheads = {size['H']}, got ngroups = {size['G']}")

    def check_sizes(self, stride: int) -> None:
        """Check the sizes that the shapes have fixed, against each other; ``stride`` is that of intermediate states."""
        size = self.sizes
        if not self.indexed and size["S"] < size["b"]:
            raise ValueError(
                f"state: expected at least {size['b']} slots, one for each sequence, because state_batch_indices is "
                f"None; got {size['S']}"
            )
        tokens = size.get("T", 1)
        for symbol, name in (("W", "state_batch_indices"), ("V", "dst_state_batch_indices")):
            if size.get(symbol, tokens) < tokens:
                raise ValueError(f"{name}: expected at least {tokens} columns, one a token, got {size[symbol]}")
        steps = tokens // stride
        if size.get("K", steps) < steps:
            each = "a token" if stride == 1 else f"for every {stride} tokens"
            raise ValueError(f"intermediate_states: expected at least {steps} steps, one {each}, got {size['K']}")

    def is_tied(self, name: str, info: ArrayInfo) -> bool:
        """Return whether a parameter is one number a head."""
        if len(info.shape) < len(self._patterns(name)[0]):
            return True
        if not self.heads_axis:
            return False
        trailing = range(-TIED_AXES[name], 0)
        # The stride of a single entry means nothing.
        return all(info.shape[axis] == 1 or (info.strides and not info.strides[axis]) for axis in trailing)

    def check_strides(self, name: str, info: ArrayInfo, tied: bool) -> None:
        """Check that an array is dense along the axes that may not be strided."""
        if info.strides is None:
            return
        pattern, inner = self._inner(name, info)
        # After the free axes: dense, but for the trailing axes of a tied view, which repeat one element.
        repeated = self._repeated(name, info, tied)
        dense, step = [0] * repeated, 1
        for n in reversed(info.shape[len(info.shape) - inner : len(info.shape) - repeated]):
            dense.insert(0, step)
            step *= n
        axes = list(zip(info.shape, info.strides, strict=True))
        trailing = zip(axes[len(axes) - inner :], dense, strict=True)
        if any(n > 1 and stride != expected for (n, stride), expected in trailing):
            raise ValueError(
                f"{name}: expected {self._spell(pattern[len(pattern) - inner :])} to be dense in memory "
                f"(strides {tuple(dense)}), got strides {info.strides}; make it contiguous"
            )
        if ARGUMENTS[name].written:
            for n, stride in sorted(axes[: len(axes) - inner], key=lambda axis: abs(axis[1])):
                if n > 1 and abs(stride) < step:
                    raise ValueError(
                        f"{name}: expected memory that does not overlap itself, got strides {info.strides}"
                    )
                step = max(step, n * abs(stride))

    def is_dense(self, name: str, info: ArrayInfo, tied: bool) -> bool:
        """Return whether an array's entries have no gaps between them; of a tied view those that do not repeat."""
        if info.strides is None:
            return True
        axes = len(info.shape) - self._repeated(name, info, tied)
        return is_dense(info.shape[:axes], info.strides[:axes])

    def is_aligned(self, name: str, info: ArrayInfo) -> bool:
        """Return whether each vector that a kernel loads of an array begins at a multiple of VECTOR_BYTES."""
        if not info.aligned:
            return False
        _, inner = self._inner(name, info)
        size, step = np.dtype(info.dtype).itemsize, 1
        for axis in reversed(range(len(info.shape))):
            # The stride of a single entry means nothing: as if dense, so that it has the kernel that several have.
            stride = step if info.strides is None or info.shape[axis] == 1 else info.strides[axis]
            if axis < len(info.shape) - inner and stride * size % VECTOR_BYTES:
                return False
            step *= info.shape[axis]
        return True

    def _repeated(self, name: str, info: ArrayInfo, tied: bool) -> int:
        """Return how many of the last axes of a tied view repeat one element."""
        return TIED_AXES[name] if tied and len(info.shape) == len(self._patterns(name)[0]) else 0

    def _inner(self, name: str, info: ArrayInfo) -> tuple[str, int]:
        """Return the pattern of an array and how many of its last axes must be dense."""
        pattern = self.pattern(name, len(info.shape))
        return pattern, len(pattern.lstrip(ARGUMENTS[name].free.replace("*", self.token_axes)))

    def pattern(self, name: str, count: int) -> str:
        """Return the symbols of an array's axes, for an array of so many."""
        return pattern_of(name, self.layout, self.heads_axis, count)

    def _patterns(self, name: str) -> tuple[str, ...]:
        return patterns(name, self.layout, self.heads_axis)

    def _implied(self, name: str, pattern: str) -> tuple[tuple[str, int], ...]:
        """Return the sizes that a shape fixes by having no axis for them: without an axis of groups there is one."""
        return (("G", 1),) if "G" in self._patterns(name)[0] and "G" not in pattern else ()

    def _expected(self, name: str) -> str:
        """Write out the shapes of an array that do not contradict the sizes known so far."""
        return " or ".join(
            self._spell(pattern)
            for pattern in self._patterns(name)
            if all(self.sizes.get(symbol, n) == n for symbol, n in self._implied(name, pattern))
        )

    def _spell(self, pattern: str) -> str:
        """Write a shape out as sizes where they are known: (4, 64, dstate=128) says too little, (4, 64, 128) enough."""
        sizes = [str(self.sizes.get(symbol, SIZES.get(symbol, ">=1"))) for symbol in pattern]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
