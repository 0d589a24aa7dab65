"""What a call must give, in float64, from docs/semantics.md alone: nothing of the package is imported here.

Errors are carried along to first order, in units of a rounding to float32: what a computation in float32 may differ by.
"""

import functools
from typing import NamedTuple

import numpy as np

QMAX = {"int16": 32767, "int8": 127, "float8_e4m3fn": 448}
MOST_OF_A_TREE = 64
# Beyond this float32 overflows on the way, and what comes then depends on the order of its operations.
WILD = 1e30


class Options(NamedTuple):
    """The arguments of a call that are not arrays; ``window`` and ``tokens`` are those of a cursor, 0 without one."""

    pad_slot_id: int = -1
    dt_softplus: bool = False
    disable_state_update: bool = False
    intermediate_stride: int = 1
    round_each_token: bool = False
    philox_rounds: int = 10
    window: int = 0
    tokens: int = 0


class Sequence(NamedTuple):
    """Where a sequence reads and stores.

    Attributes:
        rows: of the tokens of all sequences, those that it has.
        read: the slot that it names, None for a padding index.
        load: the slot whose numbers it starts from; None: from zeros.
        parents: for each token the one before it, -1 for the state that the sequence starts from.
        states, entries: for each token the slot, and the (entry, step), that its state goes to, or None.
    """

    rows: range
    read: int | None
    load: int | None
    parents: list
    states: list
    entries: list


class Store(NamedTuple):
    """One state that is stored: to which array and place, its float64 value with errors, random words, and if known.

    ``known`` says of each head whether its numbers are defined.
    """

    name: str
    place: tuple
    state: np.ndarray
    errors: np.ndarray
    words: np.ndarray | None
    known: np.ndarray


class Expected(NamedTuple):
    """Outputs (rows, H, P) with their errors, which rows are written, which (row, head) are known, and the stores."""

    out: np.ndarray
    errors: np.ndarray
    written: np.ndarray
    known: np.ndarray
    stores: list


# --- Where ---


def layout_of(a):
    """Return "single", "multi" or "packed"."""
    if "cu_seqlens" in a:
        return "packed"
    return "multi" if a["x"].ndim == a["state"].ndim else "single"


def sequences(a, o):
    """Return where each sequence of a call reads and stores, whatever its tables hold."""
    slots, stored = len(a["state"]), a.get("intermediate_states")
    packed = layout_of(a) == "packed"
    count = len(a["cu_seqlens"]) - 1 if packed else len(a["x"])
    each = a["x"].shape[1] if layout_of(a) == "multi" else 1

    def slot(index):
        index = int(index)
        return index if index != o.pad_slot_id and 0 <= index < slots else None

    found = []
    for i in range(count):
        rows = range(i * each, (i + 1) * each)
        if packed:
            first, end = (min(max(int(edge), 0), len(a["x"])) for edge in a["cu_seqlens"][i : i + 2])
            rows = range(first, max(first, end))
        rows = rows[: MOST_OF_A_TREE if "parent_tokens" in a else o.tokens or None]
        table, read = a.get("state_batch_indices"), i
        if table is not None and table.ndim == 1:
            read = slot(table[i])
        elif table is not None:
            accepted = int(a["num_accepted_tokens"][i]) if "num_accepted_tokens" in a else 1
            columns = table.shape[1]
            read = slot(table[i, min(max(accepted, 1), columns) - 1]) if columns else None
        fresh = "has_initial_state" in a and not a["has_initial_state"][i]
        parents, states, entries = [], [], []
        for t, row in enumerate(rows):
            parent = int(a["parent_tokens"].reshape(-1)[row]) if "parent_tokens" in a else t - 1
            parents.append(parent if 0 <= parent < t else -1)
            states.append(_target(a, o, i, t, t == len(rows) - 1, read, slot))
            step, rest = divmod(t + 1, o.intermediate_stride)
            entry = read
            if read is not None and "intermediate_state_indices" in a:
                entry = int(a["intermediate_state_indices"][i])
            goes = stored is not None and entry is not None and 0 <= entry < len(stored)
            entries.append((entry, step - 1) if goes and not rest and step <= stored.shape[1] else None)
        found.append(Sequence(rows, read, None if fresh else read, parents, states, entries))
    return found


def _target(a, o, i, t, is_last, read, slot):
    """Return the slot that a sequence's state after token t goes to, or None."""
    table = a.get("dst_state_batch_indices")
    if read is None or o.disable_state_update or o.window:
        return None
    if table is not None and table.ndim == 2:
        return slot(table[i, t]) if t < table.shape[1] else None
    if "parent_tokens" in a or not is_last:
        return None
    return read if table is None else slot(table[i])


def meeting(found, o):
    """Return the sequences whose results are undefined, because they meet others in a slot or an entry."""
    writers, readers = {}, {}
    for i, one in enumerate(found):
        slots = [one.read] if o.window and one.rows else one.states
        for place in {("slot", s) for s in slots} | {("entry", e and e[0]) for e in one.entries}:
            if place[1] is not None:
                writers.setdefault(place, set()).add(i)
        if one.rows and one.load is not None:
            readers.setdefault(("slot", one.load), set()).add(i)
    undefined = set()
    for place, who in writers.items():
        who = who | readers.get(place, set())
        undefined |= who if len(who) > 1 else set()
    return undefined


def owners(found, rows):
    """Return of how many sequences each row is."""
    count = np.zeros(rows, int)
    for one in found:
        count[one.rows.start : one.rows.stop] += 1
    return count


def apart(a, o):
    """Return whether no two sequences of a call meet, in a slot, an entry or a row."""
    found = sequences(a, o)
    rows = max((one.rows.stop for one in found), default=0)
    return not meeting(found, o) and owners(found, rows).max(initial=0) <= 1


# --- How numbers are rounded ---


@functools.cache
def grid(dtype):
    """Return all numbers of a dtype from 0 on, in order, and infinity."""
    if dtype in ("int8", "int16"):
        return np.append(np.arange(QMAX[dtype] + 1.0), np.inf)
    kind = np.dtype(dtype)
    with np.errstate(invalid="ignore"):
        every = np.arange(2 ** (8 * kind.itemsize - 1), dtype=f"u{kind.itemsize}").view(kind).astype(np.float64)
    return np.append(np.sort(every[np.isfinite(every)]), np.inf)


def to_grid(values, dtype, words=None):
    """Round float32 values to a dtype's numbers, in float64: to nearest even, or up where a random word says so."""
    if dtype == "float32":
        return values.astype(np.float64)
    numbers = grid(dtype)
    magnitude = np.abs(values.astype(np.float64))
    if dtype in QMAX:
        magnitude = np.minimum(magnitude, QMAX[dtype])
    place = np.searchsorted(numbers, magnitude, side="right") - 1
    lo, hi = numbers[place], numbers[np.minimum(place + 1, len(numbers) - 1)]
    # Past the largest number the next one would be as far from it as the one before.
    above = np.where(np.isinf(hi), lo + (lo - numbers[np.maximum(place - 1, 0)]), hi)
    fraction = (magnitude - lo) / (above - lo)
    if words is None:
        up = (fraction > 0.5) | ((fraction == 0.5) & (place % 2 == 1))
    else:
        up = (np.floor(fraction * 2**24) > (words >> np.uint32(8))) & np.isfinite(hi)
    rounded = np.where(up, hi, lo)
    return np.copysign(np.where(np.isinf(values) & (dtype not in QMAX), np.inf, rounded), values)


def scales_of(rows, dtype):
    """Return the scale that each row of float32 states is stored with."""
    scales = np.abs(rows).max(-1) * np.float32(1 / QMAX[dtype])
    return np.where(scales <= np.float32(2.0**-128), np.float32(1), scales)


def words_of(place, shape, token, kind, key, rounds):
    """Return the random words of a slot's elements, by Philox-4x32 with its definition's constants."""
    first = place * int(np.prod(shape))
    e = np.arange(first, first + int(np.prod(shape)), dtype=np.uint64)
    block, low = e // np.uint64(4), np.uint64(0xFFFFFFFF)
    c = [block & low, block >> np.uint64(32), np.full_like(e, token), np.full_like(e, kind)]
    k0, k1 = key
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (right >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            right & low,
            (left >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            left & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.choose((e % np.uint64(4)).astype(int), c).astype(np.uint32).reshape(shape)


def key_of(seed):
    """Return the two words of a seed."""
    number = int(np.ascontiguousarray(seed).reshape(-1).view(np.int64)[0]) % 2**64
    return number % 2**32, number >> 32


# --- What ---


def _known_where(store, known):
    """Return a store that is known in some heads at most; a ring of B has groups of them."""
    groups = known.reshape(len(store.known), -1).all(1)
    return store._replace(known=store.known & groups)


class Oracle:
    """The numbers of a call.

    Args:
        a: its NumPy arrays by the names that kernels have for them.
        o: its Options.
        unit: what a result may differ by for each unit of its error, 2**-24 times as many as are allowed.
        smallest: what may be taken for zero.
        exact: float32 computes this call without an error.
    """

    def __init__(self, a, o, unit, smallest=2.0**-149, exact=False):
        self.a, self.o, self.unit, self.exact, self.smallest = a, o, unit, exact, 0.0 if exact else smallest / unit
        heads = a["state"].ndim == 4
        self.dtype, self.scaled = a["state"].dtype.name, "state_scale" in a
        self.H, (self.P, self.N) = a["state"].shape[1] if heads else 1, a["state"].shape[-2:]
        rows = int(np.prod(a["x"].shape[: a["x"].ndim - (2 if heads else 1)]))
        per_head = {"dt": a["dt"].ndim < a["x"].ndim} | {
            n: a[n].ndim == 1 and heads for n in ("D", "dt_bias") if n in a
        }

        def wide(name, *shape):
            return a[name].astype(np.float64).reshape(shape)

        self.x, self.z = wide("x", rows, self.H, self.P), wide("z", rows, self.H, self.P) if "z" in a else None
        self.dt = wide("dt", rows, self.H, 1 if per_head["dt"] else self.P)
        G = a["B"].shape[-2] if heads and a["B"].ndim == a["x"].ndim else 1
        self.B, self.C = (np.repeat(wide(n, rows, G, self.N), self.H // G, axis=1) for n in "BC")
        self.A = wide("A", self.H, self.P, self.N) if a["A"].ndim > 1 else wide("A", self.H, 1, 1)
        self.D, self.bias = (
            wide(n, self.H, 1 if per_head[n] else self.P) if n in a else None for n in ("D", "dt_bias")
        )
        self.key = key_of(a["rand_seed"]) if "rand_seed" in a else None
        self.G, self.rows = G, rows

    def expected(self):
        """Return all that the call must give."""
        found = sequences(self.a, self.o)
        undefined = meeting(found, self.o)
        count = owners(found, self.rows)
        out = Expected(
            np.zeros((self.rows, self.H, self.P)), np.zeros((self.rows, self.H, self.P)),
            count > 0, np.zeros((self.rows, self.H), bool), [],
        )  # fmt: skip
        with np.errstate(all="ignore"):
            for i, one in enumerate(found):
                stores, known = (self._replayed if self.o.window else self._stepped)(one, out)
                known &= i not in undefined
                out.known[one.rows.start : one.rows.stop] = known
                out.stores.extend(_known_where(store, known) for store in stores)
        out.known[count > 1] = False
        return out

    def _stepped(self, one, out):
        shape = (self.H, self.P, self.N)
        start = (np.zeros(shape), np.zeros(shape)) if one.load is None else (self._loaded(one.load), np.zeros(shape))
        after, stores, known = [None] * len(one.rows) + [start], [], self._is_tame(start[0])
        rounds_each = self.o.round_each_token and layout_of(self.a) != "single" and self.dtype != "float32"
        for t, row in enumerate(one.rows):
            d, d_errors = self._step_size(row)
            state, errors = self._advanced(*after[one.parents[t]], self.x[row], self.B[row], d, d_errors)
            known &= self._output(row, state, errors, out) & self._is_tame(state) & self._is_tame(d)
            slot, entry = one.states[t], one.entries[t]
            words = self._words(slot if slot is not None else one.read or 0, t, 0)
            if slot is not None:
                stores.append(Store("state", (slot,), state, errors, words, np.ones(self.H, bool)))
            if entry is not None:
                own = words if rounds_each else self._words(entry[0], t, 1)
                stores.append(Store("intermediate_states", entry, state, errors, own, np.ones(self.H, bool)))
            after[t] = self._rounded(state, errors, words) if rounds_each else (state, errors)
        return stores, known

    def _replayed(self, one, out):
        a, o, shape, slot = self.a, self.o, (self.H, self.P, self.N), one.read
        length, n, stores = o.window + o.tokens, len(one.rows), []
        start = pending = 0
        state, errors = np.zeros(shape), np.zeros(shape)
        if slot is not None and n:
            start = int(a["replay_start"][slot]) % length
            pending = min(max(int(a["replay_pending"][slot]), 0), o.window)
            state = self._loaded(slot)
        known = self._is_tame(state)
        for k in range(pending):
            row = (start + k) % length
            x, B, d = (a[f"replay_{name}"][slot, :, row].astype(np.float64) for name in ("x", "B", "dt"))
            B, d = np.repeat(B, self.H // self.G, axis=0), d[:, None]
            state, errors = self._advanced(state, errors, x, B, d, np.zeros_like(d))
            known &= self._is_tame(state)
        if slot is not None and n and pending + n > o.window:
            stores.append(Store("state", (slot,), state, errors, self._words(slot, 0, 0), np.ones(self.H, bool)))
        for k, row in enumerate(one.rows):
            d, d_errors = self._step_size(row)
            state, errors = self._advanced(state, errors, self.x[row], self.B[row], d, d_errors)
            known &= self._output(row, state, errors, out) & self._is_tame(state)
            if slot is not None:
                place = (slot, (start + pending + k) % length)
                B = self.B[row][:: self.H // self.G]
                stores.append(
                    Store("replay_x", place, self.x[row], np.zeros_like(self.x[row]), None, np.ones(self.H, bool))
                )
                stores.append(Store("replay_B", place, B, np.zeros_like(B), None, np.ones(self.G, bool)))
                stores.append(Store("replay_dt", place, d[:, 0], d_errors[:, 0], None, np.ones(self.H, bool)))
        return stores, known

    def _loaded(self, slot):
        values = self.a["state"][slot].reshape(self.H, self.P, self.N).astype(np.float32)
        if self.scaled:
            values = values * self.a["state_scale"][slot].reshape(self.H, self.P, 1)
        return values.astype(np.float64)

    def _step_size(self, row):
        """Return dt with bias and softplus, (H, P or 1), and its errors."""
        d = self.dt[row] if self.bias is None else self.dt[row] + self.bias
        errors = np.abs(d)
        if self.o.dt_softplus:
            # A relative error of the sum is one of the exponential, magnified by how large the sum is.
            errors = errors / (1 + np.exp(-d))
            d = np.where(d > 20, d, np.log1p(np.exp(np.minimum(d, 20))))
            errors = errors + 2 * np.abs(d)
        return d, self._allowed(errors)

    def _advanced(self, state, errors, x, B, d, d_errors):
        """Return the state after a token, and its errors."""
        d, d_errors, x, B = d[..., None], d_errors[..., None], x[..., None], B[:, None]
        decay = np.exp(self.A * d)
        added = d * x * B
        decay_errors = decay * (np.abs(self.A) * d_errors + np.abs(self.A * d) + 2)
        errors = errors * decay + np.abs(state) * decay_errors + d_errors * np.abs(x * B) + 3 * np.abs(added)
        state = state * decay + added
        return state, self._allowed(errors + np.abs(state), 3 + (1 + np.abs(d)) * np.abs(B))

    def _output(self, row, state, errors, out):
        """Put a row's output and its errors where they belong; return which heads are tame."""
        C = np.abs(self.C[row])[:, None]
        y, y_errors = (state * self.C[row][:, None]).sum(-1), ((errors + np.abs(state)) * C).sum(-1)
        if self.D is not None:
            skip = self.D * self.x[row]
            y, y_errors = y + skip, y_errors + np.abs(skip) + np.abs(y) + np.abs(self.D) * self.smallest
        y_errors = self._allowed(y_errors)
        if self.z is not None:
            z = self.z[row]
            gate = z / (1 + np.exp(-z))
            y, y_errors = y * gate, y_errors * np.abs(gate) + np.abs(y * gate) * (3 + np.abs(z)) + self.smallest
        out.out[row], out.errors[row] = y, y_errors
        return self._is_tame(y)

    def _allowed(self, errors, times=1):
        """Return errors with so many times what subnormal numbers are rounded by, of a call that is not exact."""
        return np.zeros_like(errors) if self.exact else errors + times * self.smallest

    def _is_tame(self, numbers):
        """Return of each head whether all its numbers are finite, and far from where float32 overflows."""
        return (np.abs(numbers.reshape(self.H, -1)) < WILD).all(-1)

    def _words(self, place, token, kind):
        if self.key is None:
            return None
        return words_of(place, (self.H, self.P, self.N), token, kind, self.key, self.o.philox_rounds or 10)

    def _rounded(self, state, errors, words):
        """Return the state as it is stored, and its errors: none where all that it may be is stored as one number."""
        allowed, single = self.unit * errors, state.astype(np.float32)
        scales, relative = np.ones((*state.shape[:-1], 1), np.float32), 0.0
        if self.scaled:
            scales = scales_of(single, self.dtype)[..., None]
            # How far the scale may be off.
            relative = allowed.max(-1, keepdims=True) / np.maximum(np.abs(state).max(-1, keepdims=True), 1e-45)
            relative = np.where(relative > 0, relative + 2.0**-22, 0)
        inverse = np.float32(1) / scales
        kept = to_grid(single * inverse, self.dtype, words)
        ends = [
            to_grid(
                (state + sign * (allowed + relative * np.abs(state))).astype(np.float32) * inverse, self.dtype, words
            )
            for sign in (-1, 1)
        ]
        value = (kept.astype(np.float32) * scales).astype(np.float64)
        between = np.abs(ends[1] - ends[0]) * scales
        return value, (relative * np.abs(value) + between) / self.unit
