"""Draw calls of ``update``: what they are made of is Python source, so that a call is also the script that repeats it."""

import random
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np

from fuzz.draw_layouts import layouts_of
from fuzz.draw_mistakes import mistake
from fuzz.oracle import QMAX, Options, sequences

FLOATS = ("float32", "bfloat16", "float16")
ROUNDABLE = ("bfloat16", "float16", "int8", "float8_e4m3fn")
ENDS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
# The modes that JAX compiles, and the others, each with its backends.
TRACED = {"jax": ("cpu", "xla", "reference"), "jax.jit": ("cpu", "xla")}
EAGER = {"numpy": ("cpu", "cpu", "reference"), "torch": ("cpu", "cpu", "reference")}
TRACED_ON_GPU = {"jax": ("triton", "xla"), "jax.jit": ("triton", "xla")}
ON_GPU = {"torch.cuda": ("triton",)}


class Call(NamedTuple):
    """A call of ``update``.

    Attributes:
        number: the seed of its NumPy generator ``rng``.
        mode, backend: who makes it, and what runs it.
        statements: Python source that puts dense NumPy arrays into ``a``, by the names that kernels have for them.
        arrays: what they make.
        layouts, at_end: where they lie in memory, and of each buffer whether it ends at its guard.
        flags: the arguments that are not arrays.
        options: the same for the oracle.
        exact: float32 makes no error.
        donates: JAX may take the memory of what is written.
        host_tables: JAX gets tables of NumPy.
        on_gpu: the arrays are on a GPU.
        spoils: a statement that makes the arguments ``given`` wrong, or None.
    """

    number: int
    mode: str
    backend: str
    statements: tuple
    arrays: dict
    layouts: dict
    at_end: dict
    flags: dict
    options: Options
    exact: bool
    donates: bool
    host_tables: bool
    on_gpu: bool
    spoils: str | None


def evaluate(statements, a, rng=None):
    """Run statements that fill ``a``, or change what is in it."""
    for statement in statements:
        exec(statement, {"np": np, "rng": rng, "a": a})
    return a


def draw(form_seed, number, modes):
    """Draw a call.

    Args:
        form_seed: of all that a program or a kernel is compiled for.
        number: of the rest.
        modes: the modes and their backends.
    """
    return _Draw(random.Random(f"form {form_seed}"), random.Random(f"content {number}"), number, modes).call()


class _Draw:
    """One call being drawn.

    ``form`` draws what a program or a kernel is compiled for, ``content`` what is in the arrays, and ``extent`` how many
    sequences, tokens and slots there are, and where arrays lie: XLA compiles a program for these too, Triton no kernel.
    """

    def __init__(self, form, content, number, modes):
        self.form, self.content, self.number = form, content, number
        self.mode = form.choice(list(modes))
        self.backend = form.choice(modes[self.mode])
        self.dense = self.mode.startswith("jax")
        self.on_gpu = modes in (ON_GPU, TRACED_ON_GPU)
        self.for_kernels = self.on_gpu and not self.dense
        self.extent = random.Random(f"extent {number}") if self.for_kernels else form
        self.statements, self.shapes, self.dtypes, self.repeats = [], {}, {}, {}

    def maybe(self, share):
        return self.form.random() < share

    def call(self):
        self._sizes()
        self._options()
        self._floats()
        self._tables()
        self._seed()
        if not self.dense and self.maybe(0.7):
            self._array(
                "out",
                self.row_axes + self.channels,
                f"np.full({{shape}}, {self.content.choice(['7.0', 'np.nan'])})",
                self.dtypes["x"],
            )
        arrays = evaluate(self.statements, {}, np.random.default_rng(self.number))
        drawn = len(self.statements)
        self._spoil_what_is_not_read(arrays)
        if self.values == "special":
            self._put_specials(arrays)
        evaluate(self.statements[drawn:], arrays)
        layouts, at_end = ({}, {}) if self.dense else layouts_of(self)
        self.layouts = layouts
        flags = {"backend": self.backend, "dt_softplus": self.softplus, "pad_slot_id": self.pad} | self.flags
        options = Options(
            self.pad, self.softplus, self.flags.get("disable_state_update", False),
            self.flags.get("intermediate_stride", 1), self.flags.get("round_each_token", False), 10,
            self.window, self.most,
        )  # fmt: skip
        call = Call(
            self.number, self.mode, self.backend, tuple(self.statements), arrays, layouts, at_end, flags, options,
            self.values == "exact", self.maybe(0.7), self.dense and self.maybe(0.5), self.on_gpu, None,
        )  # fmt: skip
        return call._replace(spoils=mistake(self)) if self.content.random() < 0.08 else call

    # --- Sizes and options ---

    def _sizes(self):
        form, maybe = self.form, self.maybe
        self.layout = form.choice(["single", "multi", "packed"])
        self.long = self.layout != "single" and maybe(0.05)
        self.H = 0 if maybe(0.15) else form.choice([1, 2, 3, 4, 6, 8])
        self.G = form.choice([g for g in range(1, self.H + 1) if self.H % g == 0]) if self.H else 1
        self.P = form.choice([form.randint(1, 24), 8, 16, 32, 64] if not self.long else [1, 3, 8, 16])
        self.N = form.choice([form.randint(1, 40), 16, 32, 64, 128] if not self.long else [1, 5, 16, 32])
        if self.H * self.P * self.N > 16384:
            self.H, self.G = min(self.H, 2), 1
        self.replays = self.H > 0 and maybe(0.15)
        self.tree = not self.replays and maybe(0.15)
        self.window = self.most = 0
        least, most = (17, 64 if self.tree and self.layout == "multi" else 150) if self.long else (0, 6)
        if self.layout == "single":
            least = most = 1
        if self.replays:
            most = max(form.randint(least, min(most, 20)), 1)
            self.most = most + form.choice([0, 0, 2])
            self.window = self.most + form.choice([0, 1, 5, 16])
        extent = self.extent
        self.b = extent.choice([0, 1, 1, 2, 2, 3, 3, 4])
        self.longest = extent.randint(least, most)
        self.edges = [extent.randint(0, 2)]
        for _ in range(self.b):
            self.edges.append(self.edges[-1] + extent.randint(0, self.longest))
        rows = self.edges[-1] + extent.randint(0, 2)
        self.row_axes = {"single": (self.b,), "multi": (self.b, self.longest), "packed": (rows,)}[self.layout]
        self.channels = (self.H, self.P) if self.H else (self.P,)

    def _options(self):
        form, maybe = self.form, self.maybe
        lacks = self.backend == "xla" and maybe(0.95)  # what XLA does not support is refused a few times only
        self.state = form.choice(FLOATS if lacks else [*FLOATS, *QMAX])
        self.seeded = self.state in ROUNDABLE and not lacks and maybe(0.5)
        round_each = not self.replays and maybe(0.2)
        inexact = round_each and self.state in QMAX
        self.values = form.choices(["exact", "plain", "special", "tiny"], [0 if inexact or self.long else 4, 5, 1, 1])[
            0
        ]
        self.softplus = self.values != "exact" and maybe(0.7)
        self.pad = form.choice([-1, -1, -1, 0, 2, 10**10])
        self.table = None if maybe(0.2) else 2 if not self.replays and maybe(0.35) else 1
        self.destinations = None
        if not self.replays and maybe(0.3):
            self.destinations = 2 if self.tree or maybe(0.5) else 1
        self.steps = not self.replays and self.destinations is None and maybe(0.35)
        self.flags = {}
        if round_each:
            self.flags["round_each_token"] = True
        if not self.replays and self.destinations is None and maybe(0.2):
            self.flags["disable_state_update"] = True
        if self.steps and not self.tree and maybe(0.4):
            self.flags["intermediate_stride"] = form.choice([2, 3, 8, 2**31 - 1])
        if maybe(0.3):
            self.flags["algorithm"] = form.choice(
                ["loop", "matrix", "simple"] if self.backend != "cpu" else ["loop", "loop", "simple", "matrix"]
            )
        extent, longest = self.extent, max(self.longest, 1)
        self.width = longest + extent.choice([0, 0, 1])
        if self.layout == "packed" and extent.random() < 0.3:
            self.width = extent.randint(1, longest)
        columns = self.width if 2 in (self.table, self.destinations) else 1
        apart = 2 if self.destinations else 1
        self.slots = extent.choice([self.b * columns * apart + extent.randint(0, 3)] * 4 + [extent.randint(0, 5)])
        if self.table is None:
            self.slots = max(self.slots, self.b)
        self.slots = min(self.slots, max(40, self.b))

    # --- Contents ---

    def _array(self, name, shape, source, dtype):
        """Add an array of these values."""
        self.shapes[name], self.dtypes[name] = tuple(shape), dtype
        self.statements.append(f'a["{name}"] = np.array({source.format(shape=tuple(shape))}).astype({dtype!r})')

    def _floats(self):
        form = self.form
        kinds = {n: form.choice(FLOATS) for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")}
        if self.maybe(0.4):
            kinds |= dict.fromkeys(("x", "B", "C", "z"), form.choice(FLOATS))
        rows, P, N = self.row_axes, self.P, self.N
        source = self._source
        self._state("state", (self.slots,))
        self._array("x", rows + self.channels, source("x"), kinds["x"])
        self._tied("dt", rows, (P,), kinds["dt"])
        self._tied("A", (), (P, N), kinds["A"])
        groups = () if self.G == 1 and self.maybe(0.4) else (self.G,)
        self._array("B", (*rows, *groups, N), source("B"), kinds["B"])
        self._array("C", (*rows, *groups, N), source("C"), kinds["C"])
        if self.maybe(0.6):
            self._tied("D", (), (P,), kinds["D"])
        if self.maybe(0.5):
            self._array("z", rows + self.channels, source("z"), kinds["z"])
        if self.maybe(0.6):
            self._tied("dt_bias", (), (P,), kinds["dt_bias"])
        if self.replays:
            self._rings(kinds)
        if self.steps:
            extent = self.extent
            entries = max((1 if self.long else self.slots) + extent.choice([-2, 0, 0, 1, 3]), 0)
            stride = self.flags.get("intermediate_stride", 1)
            steps = self.longest // stride + extent.choice([0, 0, 1])
            if self.layout == "packed":
                steps = max(extent.randint(0, steps), 1 // stride)
            self._state("intermediate_states", (entries, steps))

    def _source(self, name):
        """Return the source of random values for an array, before they are cast."""
        if self.values == "exact":
            return {
                "x": "rng.integers(-255, 256, {shape}) / 64",
                "z": "rng.integers(-4, 5, {shape})",
                "dt": "2.0 ** rng.integers(-1, 2, {shape})",
                "A": "np.zeros({shape})",
                "dt_bias": "rng.integers(0, 2, {shape}) / 2",
                "B": "rng.integers(-4, 5, {shape})",
                "D": "rng.integers(-2, 3, {shape})",
                "C": "rng.integers(-2, 3, {shape})",
                "state": "rng.integers(-64, 65, {shape}) / 2",
            }[name]
        plain = "rng.standard_normal({shape})"
        if name == "A":
            return f"-np.exp({plain})"
        if name == "dt":
            extremes = "rng.choice([0.0, -25.0, 22.0], {shape}, p=[0.9, 0.05, 0.05])"
            return f"2 * {plain} - 2 + {extremes}" if self.softplus else f"0.1 * abs({plain})"
        if name == "dt_bias" and not self.softplus:
            return f"0.1 * abs({plain})"
        return f"{plain} * 1e-39" if self.values == "tiny" and name in ("state", "x") else plain

    def _state(self, name, leading):
        """Add a state or intermediate states."""
        shape = (*leading, *self.channels, self.N)
        scale = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}[name]
        if self.state not in QMAX:
            self._array(name, shape, self._source("state"), self.state)
            return
        most = {"int16": 32767, "int8": 127, "float8_e4m3fn": 16}[self.state]
        most = min(most, 64) if self.values == "exact" else most
        self._array(name, shape, f"rng.integers({-most}, {most + 1}, {{shape}})", self.state)
        powers = (
            "2.0 ** -rng.integers(0, 2, {shape})" if self.values == "exact" else "np.exp(rng.standard_normal({shape}))"
        )
        self._array(scale, shape[:-1], powers + (" * 1e-39" if self.values == "tiny" else ""), "float32")

    def _tied(self, name, leading, trailing, dtype):
        """Add a parameter that may be one number a head, by its shape or by repeating them."""
        heads = (self.H,) if self.H else ()
        ways = [
            "tied",
            "tied",
            *(() if self.replays else ["full"]),
            *(() if self.replays and self.dense else ["repeated"]),
        ]
        how = self.form.choice(ways) if self.H else "full"
        source = self._source(name)
        shape = (*leading, *heads, *trailing)
        if how == "tied":
            self._array(name, (*leading, *heads), source, dtype)
        elif how == "repeated":
            ones = f"[..., {', '.join(['None'] * len(trailing))}]"
            inner = source.replace("{shape}", str((*leading, *heads)))
            self._array(name, shape, f"np.broadcast_to(({inner}){ones}, {{shape}})", dtype)
            self.repeats[name] = len(trailing)
        else:
            self._array(name, shape, source, dtype)

    def _rings(self, kinds):
        S, H, G, length = self.slots, self.H, self.G, self.window + self.most
        self._array("replay_x", (S, H, length, self.P), self._source("x"), kinds["x"])
        self._array("replay_B", (S, G, length, self.N), self._source("B"), kinds["B"])
        steps = self._source("dt") if self.values == "exact" else "0.3 * abs(rng.standard_normal({shape}))"
        self._array("replay_dt", (S, H, length), steps, "float32")
        wild = self.content.random() < 0.2
        for name, most in (("replay_start", length - 1), ("replay_pending", self.window)):
            numbers = [self._wild("int32", length) if wild else self.content.randint(0, most) for _ in range(S)]
            self._array(name, (S,), f"np.array({numbers})", "int32")

    # --- Tables ---

    def _wild(self, dtype, near):
        """Draw a number that names nothing, or something by chance."""
        lowest, highest = ENDS[dtype]
        ends = [lowest, lowest + 1, highest, highest - 1, self.pad if lowest <= self.pad <= highest else -1]
        return self.content.choice([*ends, -1, -2, near, near + 1, self.content.randint(-3, near + 3)])

    def _table(self, name, shape, numbers, near):
        """Add a table of numbers, some of them wild."""
        dtype = self.form.choice(["int32", "int64"]) if self.mode != "jax.jit" else "int32"
        numbers = list(numbers)
        if self.content.random() < 0.1:
            numbers = [self._wild(dtype, near) for _ in numbers]
        elif self.content.random() < 0.3:
            numbers = [self._wild(dtype, near) if self.content.random() < 0.15 else n for n in numbers]
        self._array(name, shape, f"np.array({numbers}).reshape({{shape}})", dtype)

    def _slots(self, count, taken):
        """Draw slots that are not taken, as far as there are any."""
        free = [slot for slot in range(self.slots) if slot not in taken]
        self.content.shuffle(free)
        numbers = [free.pop() if free else self.content.randint(-1, self.slots) for _ in range(count)]
        taken.update(numbers)
        return numbers

    def _tables(self):
        b, taken, content = self.b, set(), self.content
        shapes = {1: (b,), 2: (b, self.width)}
        if self.table:
            shape = shapes[self.table]
            read = self._slots(int(np.prod(shape)), taken)
            self._table("state_batch_indices", shape, read, self.slots)
        if self.table == 2 and self.maybe(0.7):
            counts = [content.randint(0, self.width) for _ in range(b)]
            self._table("num_accepted_tokens", (b,), counts, self.width)
        if self.destinations:
            shape = shapes[self.destinations]
            again = self.table == self.destinations and self.maybe(0.4)
            count = int(np.prod(shape))
            self._table("dst_state_batch_indices", shape, read if again else self._slots(count, taken), self.slots)
        if self.layout == "packed":
            self._table("cu_seqlens", (b + 1,), self.edges, self.row_axes[0])
        if self.steps and self.maybe(0.5):
            entries = list(range(self.shapes["intermediate_states"][0])) + [-1] * b
            self._table("intermediate_state_indices", (b,), content.sample(entries, b), b)
        if self.tree:
            count = int(np.prod(self.row_axes))
            parents = [content.choice([-1, 0, 1, content.randint(-1, 5), t % 7 - 1]) for t in range(count)]
            self._table("parent_tokens", self.row_axes, parents, 5)
        if not self.replays and self.maybe(0.3):
            has = [content.random() < 0.5 for _ in range(b)]
            self._array("has_initial_state", (b,), f"np.array({has})", "bool")

    def _seed(self):
        if self.seeded:
            seed = self.content.choice([0, self.content.randint(-(2**63), 2**63 - 1)])
            self._array("rand_seed", self.form.choice([(), (1,)]), f"np.array({seed}).reshape({{shape}})", "int64")

    # --- What has no influence, and what must stay where it is ---

    def _spoil_what_is_not_read(self, a):
        """Put NaN wherever nothing may be read."""
        if not self.maybe(0.6):
            return
        options = Options(self.pad, window=self.window, tokens=self.most)
        found = sequences(a, options)
        read = {one.load for one in found if one.rows}
        unread = [slot for slot in range(self.slots) if slot not in read]
        if unread:
            self.statements.append(f'a["{"state_scale" if "state_scale" in a else "state"}"][{unread}] = np.nan')
        owned = {row for one in found for row in one.rows}
        rows = [row for row in range(int(np.prod(self.row_axes))) if row not in owned]
        if rows:
            for name in ("x", "dt", "B", "C", "z"):
                if name in a:
                    trailing = a[name].shape[len(self.row_axes) :]
                    self.statements.append(f'a["{name}"].reshape(-1, *{trailing})[{rows}] = np.nan')
        if self.replays:
            length = self.window + self.most
            for slot in range(self.slots):
                start, count = (
                    int(a["replay_start"][slot]) % length,
                    min(max(int(a["replay_pending"][slot]), 0), self.window),
                )
                idle = [(start + k) % length for k in range(count, length)]
                for name in ("replay_x", "replay_B", "replay_dt"):
                    self.statements.append(f'a["{name}"][{slot}, :, {idle}] = np.nan')

    def _put_specials(self, a):
        """Put numbers that are not finite, or huge, into some places: they stay in their sequence and head."""
        names = [name for name in ("x", "z", "B", "C", "state") if name in a and a[name].size]
        for _ in range(self.content.randint(1, 3)):
            name = self.content.choice(names) if names else None
            if name is None or a[name].dtype.name in QMAX:
                continue
            place = int(self.content.randrange(a[name].size))
            self.statements.append(
                f'a["{name}"].reshape(-1)[{place}] = {self.content.choice(["np.nan", "np.inf", "-np.inf"])}'
            )
