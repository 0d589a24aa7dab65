"""The named problems that the tests, ``check`` and the benchmarks share."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the dtype "bfloat16")
import numpy as np

from ssu_bridge.core.arguments import CURSOR, FLOAT_ARRAYS, RINGS, TIED_AXES, patterns
from ssu_bridge.core.quantized import SCALES, QuantizedState, paired
from ssu_bridge.core.rounding import LARGEST

_PAD, _LOWEST, _HIGHEST = -1, -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: its sizes, its dtypes and which optional arguments it has.

    Attributes:
        name: what it is called.
        sequences, slots, headdim, dstate, ngroups: sizes.
        nheads: 0 for arrays without an axis of heads (Mamba-1).
        dtypes: of arrays that are not float32 (indices: int32), by name; "*" for every float array but the state.
        tied: A, dt, D and dt_bias are one number a head; else those named in ``untied`` alone are not.
        absent: optional arguments that are not given.
        indices, destinations: the slot tables, of one number a sequence or of a tuple of numbers; None for absent.
        pad_slot_id, dt_softplus, disable_state_update: as in ``update``.
        group_axis: B and C have an axis of groups.
        tokens: of each sequence, on an axis of their own; None for one token without it.
        cu_seqlens: with it, ``tokens`` is the number of packed rows.
        accepted: the accepted token counts; None for absent.
        steps: of the intermediate states, 0 for none; they have an entry for each slot, and ``spare_entries`` more.
        entries: the entries of the sequences; None for absent.
        intermediate_stride, round_each_token: as in ``update``.
        parents: the parent tokens, as the leading axes of x; None for absent.
        has_initial_state: for each sequence; None for absent. Slots that only those name that have none hold NaN.
        seed: of stochastic rounding; None for absent.
        window, most: the window and the tokens of a cursor; 0 for no replay. Rows that are not pending hold NaN.
        starts, pending: of the cursor, for each slot.
    """

    name: str
    sequences: int = 3
    slots: int = 6
    nheads: int = 4
    headdim: int = 16
    dstate: int = 32
    ngroups: int = 2
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    untied: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    indices: tuple[Any, ...] | None = (4, 0, 2)
    destinations: tuple[Any, ...] | None = None
    pad_slot_id: int = _PAD
    dt_softplus: bool = True
    disable_state_update: bool = False
    group_axis: bool = True
    tokens: int | None = None
    cu_seqlens: tuple[int, ...] | None = None
    accepted: tuple[int, ...] | None = None
    steps: int = 0
    spare_entries: int = 0
    entries: tuple[int, ...] | None = None
    intermediate_stride: int = 1
    round_each_token: bool = False
    parents: tuple[Any, ...] | None = None
    has_initial_state: tuple[bool, ...] | None = None
    seed: int | None = None
    window: int = 0
    most: int = 1
    starts: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()

    def arrays(self, seed: int) -> dict[str, np.ndarray]:
        """Draw the arrays, by the names that kernels have for them."""
        rng = np.random.default_rng(seed)
        values = {name: rng.standard_normal(shape) for name, shape in self._shapes()}
        values["A"] = -np.exp(values["A"])
        # dt + dt_bias where softplus is tiny, where it is the identity, and in between.
        extremes = rng.choice([0.0, -25.0, 22.0], values["dt"].shape, p=[0.9, 0.05, 0.05])
        values["dt"] = values["dt"] + extremes if self.dt_softplus else np.abs(values["dt"]) * 0.1
        if "dt_bias" in values and not self.dt_softplus:
            values["dt_bias"] = np.abs(values["dt_bias"]) * 0.1
        others = self.dtypes.get("*", "float32")
        default = {n: "float32" if n in (*SCALES, "replay_dt") else others for n in values}
        source = {"intermediate_states": "state", "replay_x": "x", "replay_B": "B"}
        dtypes = {n: self.dtypes.get(source.get(n, n), default[n]) for n in values}
        if self.window:
            values["replay_dt"] = np.abs(values["replay_dt"])
            _spoil_rows(values, self._is_pending())
        result: dict[str, np.ndarray] = {}
        for name, value in values.items():
            if dtypes[name] in LARGEST:
                pair = QuantizedState.quantize(value.astype("float32"), dtypes[name])
                result[name], result[SCALES[name]] = pair
            else:
                result[name] = value.astype(dtypes[name])
        tables = {
            "state_batch_indices": self.indices,
            "dst_state_batch_indices": self.destinations,
            "num_accepted_tokens": self.accepted,
            "cu_seqlens": self.cu_seqlens,
            "intermediate_state_indices": self.entries,
            "parent_tokens": self.parents,
        }
        for name, table in tables.items():
            if table is not None:
                result[name] = np.array(table, self.dtypes.get(name, "int32"))
        if self.has_initial_state is not None:
            result["has_initial_state"] = np.array(self.has_initial_state, "bool")
            named = list(range(self.sequences) if self.indices is None else self.indices)
            read = [slot for slot, has in zip(named, self.has_initial_state, strict=True) if has]
            fresh = [slot for slot in named if slot in range(self.slots) and slot not in read]
            result["state_scale" if "state_scale" in result else "state"][fresh] = np.nan
        if self.window:
            result |= zip(CURSOR, (np.array(numbers, "int32") for numbers in (self.starts, self.pending)), strict=True)
        if self.seed is not None:
            result["rand_seed"] = np.array(self.seed, "int64")
        return result

    @property
    def flags(self) -> dict[str, Any]:
        """The arguments of ``update`` that are not arrays."""
        flags = {"dt_softplus": self.dt_softplus, "pad_slot_id": self.pad_slot_id}
        flags |= {"disable_state_update": True} if self.disable_state_update else {}
        flags |= {"round_each_token": True} if self.round_each_token else {}
        return flags | ({"intermediate_stride": self.intermediate_stride} if self.intermediate_stride > 1 else {})

    def _is_pending(self) -> np.ndarray:
        """Return which rows of the rings are pending, (slots, rows)."""
        length = self.window + self.most
        start, pending = (np.array(numbers, np.int64)[:, None] for numbers in (self.starts, self.pending))
        is_pending: np.ndarray = (np.arange(length) - start) % length < np.clip(pending, 0, self.window)
        return is_pending

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the float arrays of the call with their shapes."""
        layout = "packed" if self.cu_seqlens is not None else "single" if self.tokens is None else "multi"
        sizes = {"S": self.slots, "H": self.nheads, "P": self.headdim, "N": self.dstate, "G": self.ngroups}
        sizes |= {"b": self.sequences, "T": self.tokens or 0, "L": self.tokens or 0}
        sizes |= {"E": self.slots + self.spare_entries, "K": self.steps, "R": self.window + self.most}
        absent = {"out", *self.absent, *(() if self.steps else ("intermediate_states",))}
        absent |= set() if self.window else {*RINGS}
        for name in (*FLOAT_ARRAYS, "replay_dt"):
            if name not in absent:
                # The last shape of several is the one tied to heads, or without an axis of groups.
                is_last = name not in self.untied if name in TIED_AXES else not self.group_axis
                yield (
                    name,
                    tuple(sizes[symbol] for symbol in patterns(name, layout, self.nheads > 0)[-1 if is_last else 0]),
                )


def _spoil_rows(values: Mapping[str, np.ndarray], is_pending: np.ndarray) -> None:
    """Put NaN where nothing may be read."""
    for name in RINGS:
        np.moveaxis(values[name], 2, 1)[~is_pending] = np.nan


def arguments(
    arrays: Mapping[str, np.ndarray], framework: str, convert: Callable[[np.ndarray], Any], window: int = 0
) -> dict[str, Any]:
    """Return a case's arrays as the arguments of ``update`` in a framework.

    Args:
        arrays: what :meth:`Case.arrays` returned.
        framework: "jax", "torch" or "numpy": JAX takes another seed than the others.
        convert: makes an array of the framework.
        window: the case's.
    """
    given = dict(arrays)
    if framework == "jax" and "rand_seed" in given and given["rand_seed"].dtype == "int64":
        given["rand_seed"] = given["rand_seed"].reshape(1).view("uint32")
    return paired({name: convert(array) for name, array in given.items()}, window)


_ALL_UNTIED = ("A", "dt", "D", "dt_bias")
_MAMBA1: dict[str, Any] = {"nheads": 0, "ngroups": 1}
_MODEL: dict[str, Any] = {"sequences": 2, "slots": 3, "headdim": 64, "dstate": 128}
_STATE_16 = {"state": "bfloat16"}
_INPUTS_16 = {"*": "bfloat16", "A": "float32"}
# A packed call of int8 states with a destination for each token, and one for a padding index.
_PACKED_INT8: dict[str, Any] = {"dtypes": {"state": "int8"}, "slots": 9, "tokens": 4, "cu_seqlens": (0, 2, 3, 4)}
_PACKED_INT8["destinations"] = ((1, 3), (0, _PAD), (5, 6))
# Two slots for each sequence, which starts from the one of its accepted tokens.
_DRAFTS: dict[str, Any] = {"tokens": 2, "slots": 9, "indices": ((4, 1), (0, 8), (2, 3))}
# A binary tree, a chain with a branch of its own, and numbers that stand for the state that the sequence starts from.
_TREES = ((-1, 0, 0, 1, 1), (-1, 0, 1, -1, 3), (7, 1, _LOWEST, 2, _HIGHEST))
# A slot for each of their tokens.
_NODES = ((1, 6, 7, 8, _PAD), (9, 10, 11, 0, 12), (13, 14, 15, 5, 3))
# Each token continues the one three before.
_LONG = tuple(range(-3, 67))

# Slots at different phases: with these numbers of tokens those of the sequences flush, do not, and wrap around.
_REPLAY: dict[str, Any] = {"window": 5, "most": 3, "starts": (0, 7, 6, 2, 1, 4), "pending": (5, 2, 1, 3, 4, 0)}
# What stands for other numbers, or for slots that nobody names.
_WILD = {"starts": (_LOWEST, 7, -1, 9, _HIGHEST, 8), "pending": (_HIGHEST, 2, 7, _LOWEST, 6, -3)}

CASES: tuple[Case, ...] = (
    Case("mamba2"),
    Case("mamba2, no slots", indices=None, sequences=6),
    Case("mamba2, spare slots, no indices", indices=None),
    Case("one sequence", sequences=1, indices=(3,)),
    Case("no sequences", sequences=0, indices=()),
    Case("no slots at all", slots=0, indices=(0, _PAD, 7)),
    Case("untied", untied=_ALL_UNTIED),
    Case("untied A", untied=("A",)),
    Case("untied dt", untied=("dt",)),
    Case("untied D and dt_bias", untied=("D", "dt_bias")),
    Case("mamba1", **_MAMBA1, headdim=48, dstate=16, group_axis=False),
    Case("mamba1, group axis", **_MAMBA1, headdim=48, dstate=16),
    Case("mamba1, bfloat16", **_MAMBA1, headdim=48, dstate=16, dtypes={"state": "bfloat16", "*": "bfloat16"}),
    Case("one group", ngroups=1),
    Case("one group, no axis", ngroups=1, group_axis=False),
    Case("a group a head", ngroups=4),
    Case("no softplus", dt_softplus=False),
    Case("bare", absent=("D", "z", "dt_bias"), dt_softplus=False, indices=None),
    Case("no D", absent=("D",)),
    Case("no z", absent=("z",)),
    Case("no dt_bias", absent=("dt_bias",)),
    Case("odd sizes", nheads=3, ngroups=1, headdim=7, dstate=19),
    Case(
        "odd sizes, untied, float16",
        nheads=3,
        ngroups=3,
        headdim=5,
        dstate=33,
        untied=_ALL_UNTIED,
        dtypes={"state": "float16"},
    ),
    Case("size one", nheads=1, ngroups=1, headdim=1, dstate=1),
    *(
        case
        for dtype in ("bfloat16", "float16")
        for case in (
            Case(f"{dtype} state", dtypes={"state": dtype}),
            Case(f"{dtype} all but A", dtypes={"state": dtype, "*": dtype, "A": "float32"}),
            Case(f"{dtype} all", dtypes={"state": dtype, "*": dtype}, untied=_ALL_UNTIED),
        )
    ),
    Case("bfloat16 x, float32 B and C", dtypes={"x": "bfloat16", "z": "bfloat16"}),
    Case("float16 x, bfloat16 state", dtypes={"x": "float16", "state": "bfloat16"}),
    *(Case(f"bfloat16 {name} alone", dtypes={name: "bfloat16"}) for name in ("dt", "A", "B", "C", "D", "z", "dt_bias")),
    *(
        Case(f"float16 {name} alone", dtypes={name: "float16"}, untied=_ALL_UNTIED)
        for name in ("dt", "A", "B", "C", "D", "z", "dt_bias")
    ),
    Case("pads", indices=(_PAD, 5, _PAD)),
    Case("pad id inside the slots", indices=(0, 5, 2), pad_slot_id=0),
    Case("pad id beyond int32", indices=(0, 5, 2), pad_slot_id=2**40),
    Case("indices out of range", indices=(6, _LOWEST, _HIGHEST)),
    Case("int64 indices", indices=(5, -(2**63), 2**63 - 1), dtypes={"state_batch_indices": "int64"}),
    Case("destinations", indices=(4, 0, 2), destinations=(1, 0, 5)),
    Case("destinations, pads in both", indices=(4, _PAD, 2), destinations=(_PAD, 1, 3)),
    Case("destinations out of range", indices=(4, 0, 2), destinations=(6, _HIGHEST, _LOWEST)),
    Case(
        "destinations without indices",
        indices=None,
        destinations=(3, 4, 5),
        dtypes={"dst_state_batch_indices": "int64"},
    ),
    Case("mamba2-130m", **_MODEL, nheads=24, ngroups=1, indices=(2, 0)),
    Case("mamba2-130m, bfloat16", **_MODEL, nheads=24, ngroups=1, indices=(2, 0), dtypes=_STATE_16 | _INPUTS_16),
    Case("nemotron-h-8b", **_MODEL, nheads=128, ngroups=8, indices=(1, 2), dtypes=_STATE_16 | _INPUTS_16),
    Case("mamba-130m", **(_MODEL | _MAMBA1 | {"headdim": 1536, "dstate": 16}), group_axis=False, indices=(2, 0)),
    # --- Several tokens ---
    Case("tokens", tokens=4),
    Case("tokens, one", tokens=1),
    Case("tokens, none", tokens=0),
    Case("tokens, no slots", tokens=3, indices=None),
    Case("tokens, untied, no group axis", tokens=3, untied=_ALL_UNTIED, ngroups=1, group_axis=False),
    Case("tokens, bare", tokens=2, absent=("D", "z", "dt_bias"), dt_softplus=False),
    Case("tokens, mamba1", tokens=3, **_MAMBA1, headdim=48, dstate=16, group_axis=False),
    Case("tokens, odd sizes", tokens=5, nheads=3, ngroups=1, headdim=7, dstate=19),
    *(Case(f"tokens, {dtype}", tokens=4, dtypes={"state": dtype, "*": dtype}) for dtype in ("bfloat16", "float16")),
    Case("tokens, pads", tokens=3, indices=(_PAD, 5, _HIGHEST)),
    Case("tokens, destinations", tokens=3, destinations=(1, 0, _PAD)),
    Case("tokens, a destination each", tokens=2, slots=9, indices=(4, 0, 2), destinations=((1, 3), (0, _PAD), (5, 6))),
    Case("tokens, a wide table", tokens=2, slots=9, indices=(4, 0, 8), destinations=((1, 3, 0), (9, 7, 4), (5, 6, 1))),
    Case("tokens, one slot again and again", tokens=3, destinations=((4, 4, 4), (0, 5, 0), (1, 1, 2))),
    Case("one token, tables", indices=((4, 9), (0, 1), (2, 3)), destinations=((1,), (_LOWEST,), (5,))),
    Case("accepted", **_DRAFTS, destinations=_DRAFTS["indices"], accepted=(2, 1, 0)),
    Case(
        "accepted out of range", **_DRAFTS, accepted=(-(2**63), 2**63 - 1, 3), dtypes={"num_accepted_tokens": "int64"}
    ),
    # --- Packed ---
    Case("packed", tokens=9, cu_seqlens=(0, 4, 5, 9)),
    Case("packed, empty sequences", tokens=5, cu_seqlens=(0, 0, 5, 5)),
    Case("packed, no rows", tokens=0, cu_seqlens=(0, 0, 0, 0)),
    Case("packed, no sequences", tokens=3, sequences=0, indices=(), cu_seqlens=(0,)),
    Case("packed, rows of no sequence", tokens=9, cu_seqlens=(2, 3, 5, 7), dtypes={"cu_seqlens": "int64"}),
    Case("packed, no slots, bfloat16", tokens=6, cu_seqlens=(0, 1, 3, 6), indices=None, dtypes=_STATE_16),
    Case("packed, mamba1", tokens=6, cu_seqlens=(0, 1, 3, 6), **_MAMBA1, headdim=24, group_axis=False),
    Case("packed, decreasing", tokens=9, cu_seqlens=(6, 2, 2, _HIGHEST)),
    Case("packed, ends of the range", tokens=4, cu_seqlens=(_LOWEST, _HIGHEST, 1, _LOWEST)),
    Case(
        "packed, tables and accepted",
        tokens=7,
        slots=12,
        cu_seqlens=(0, 3, 3, 7),
        indices=((4, 1, 6, 7), (0, 8, 9, 10), (2, 3, 5, 11)),
        destinations=((4, 1, 6, 7), (0, 8, 9, 10), (2, 3, _PAD, 11)),
        accepted=(3, 1, 4),
    ),
    Case("packed, longer than the table", tokens=6, cu_seqlens=(0, 4, 5, 6), destinations=((4, 1), (0, 3), (2, 5))),
    # --- Intermediate states ---
    Case("intermediates", tokens=3, steps=3),
    Case("intermediates, one token", steps=2),
    Case("intermediates of a packed call", tokens=6, cu_seqlens=(0, 3, 3, 6), steps=2, entries=(1, 3, 0)),
    Case("intermediates, own entries", tokens=2, steps=4, entries=(2, 6, 7), spare_entries=2),
    Case("intermediates, no slots", tokens=2, steps=2, indices=None),
    Case(
        "intermediates, pads and entries out of range", tokens=2, steps=2, indices=(_PAD, 1, 2), entries=(3, _LOWEST, 6)
    ),
    Case("intermediates, no update", tokens=3, steps=3, disable_state_update=True, dtypes=_STATE_16),
    Case("no update", disable_state_update=True),
    Case("no update, tokens", tokens=3, disable_state_update=True),
    Case("intermediates, mamba1, float16", **_MAMBA1, tokens=2, steps=2, headdim=8, dtypes={"state": "float16"}),
    Case("intermediates, every second", tokens=5, steps=2, intermediate_stride=2),
    Case("intermediates, none of a short call", tokens=3, steps=1, intermediate_stride=4, dtypes={"state": "float16"}),
    Case(
        "intermediates, every third of packed ones",
        tokens=12,
        cu_seqlens=(0, 7, 9, 12),
        steps=1,
        intermediate_stride=3,
        entries=(1, 3, 0),
        dtypes=_STATE_16,
    ),
    # --- Sequences that start from zeros ---
    Case("fresh", has_initial_state=(True, False, True)),
    Case("fresh, no slots", has_initial_state=(False, False, True), indices=None, dtypes=_STATE_16),
    Case("fresh, destinations", has_initial_state=(False, True, False), destinations=(1, 0, 5)),
    Case("fresh, tokens", tokens=3, has_initial_state=(True, False, False), dtypes={"state": "float16"}),
    Case("fresh, packed", tokens=7, cu_seqlens=(0, 3, 3, 7), has_initial_state=(False, False, True)),
    Case("fresh, int8 state", tokens=2, steps=2, has_initial_state=(False, True, False), dtypes={"state": "int8"}),
    Case("fresh, no update, one token", has_initial_state=(False, True, True), disable_state_update=True),
    # --- Trees of draft tokens ---
    Case("tree", tokens=5, slots=16, destinations=_NODES, parents=_TREES),
    Case("tree, intermediates", tokens=5, steps=5, parents=_TREES, dtypes={"parent_tokens": "int64"}),
    Case("tree, bfloat16, mamba1", **_MAMBA1, tokens=5, steps=6, parents=_TREES, dtypes=_STATE_16),
    Case("tree, outputs alone", tokens=5, parents=_TREES, untied=_ALL_UNTIED, disable_state_update=True),
    Case("tree of no tokens", tokens=0, parents=((),) * 3),
    Case("tree of no tokens, intermediates", tokens=0, steps=2, parents=((),) * 3),
    Case("tree, packed, no rows", tokens=0, cu_seqlens=(0, 0, 0, 0), parents=()),
    Case("tree of one token", steps=1, parents=(0, -1, 5)),
    Case("tree, one token on an axis", tokens=1, steps=1, parents=((0,), (-1,), (5,))),
    Case("tree, over its own slot", tokens=5, slots=16, parents=_TREES, destinations=((4, 4, 4, 4, 4), *_NODES[1:])),
    Case(
        "tree, pads, fresh",
        tokens=5,
        steps=5,
        indices=(4, _PAD, 2),
        parents=_TREES,
        has_initial_state=(False, True, True),
    ),
    Case(
        "tree, packed",
        tokens=9,
        slots=16,
        cu_seqlens=(0, 5, 5, 8),
        destinations=_NODES,
        parents=(*_TREES[0], -1, 0, 0, 3),
        indices=((4, 9), (0, 8), (2, 3)),
        accepted=(2, 1, 0),
    ),
    Case(
        "tree, packed, longer than a tree",
        tokens=80,
        sequences=2,
        slots=3,
        indices=(1, 0),
        steps=64,
        cu_seqlens=(0, 70, 80),
        parents=(*_LONG, *range(-1, 9)),
    ),
    *(Case(f"tree, {dtype} state", tokens=5, steps=5, parents=_TREES, dtypes={"state": dtype}) for dtype in LARGEST),
    Case(
        "tree, stochastic float16",
        tokens=5,
        slots=16,
        destinations=_NODES,
        parents=_TREES,
        dtypes={"state": "float16"},
        seed=11,
    ),
    # --- The state rounded after each token ---
    Case("rounded each", tokens=4, round_each_token=True, dtypes={"state": "bfloat16"}),
    Case("rounded each, float32", tokens=3, round_each_token=True),
    Case("rounded each, one token", round_each_token=True, dtypes={"state": "bfloat16"}),
    Case("rounded each, mamba1", tokens=3, round_each_token=True, nheads=0, ngroups=1, dtypes={"state": "float16"}),
    Case(
        "rounded each, packed, pad",
        tokens=7,
        cu_seqlens=(0, 3, 4, 7),
        indices=(4, _PAD, 2),
        destinations=((5, 1, 4), (0, 0, 0), (3, _PAD, 2)),
        round_each_token=True,
        dtypes={"state": "float16", "*": "bfloat16"},
    ),
    Case(
        "rounded each, tree",
        tokens=5,
        slots=16,
        destinations=_NODES,
        parents=_TREES,
        round_each_token=True,
        dtypes={"state": "bfloat16"},
    ),
    *(
        Case(
            f"rounded each, {dtype} state{', stochastic' * (seed is not None)}",
            tokens=3,
            steps=3,
            round_each_token=True,
            dtypes={"state": dtype},
            seed=seed,
        )
        for dtype, seed in (("int16", None), ("int8", None), ("float8_e4m3fn", None), ("int8", 5), ("bfloat16", 6))
    ),
    # --- Quantised ---
    *(
        case
        for dtype in LARGEST
        for case in (
            Case(f"{dtype} state", dtypes={"state": dtype}),
            Case(f"{dtype} state, bfloat16", dtypes={"state": dtype} | _INPUTS_16, untied=_ALL_UNTIED),
            Case(f"{dtype} state, tokens", dtypes={"state": dtype}, tokens=3, destinations=(1, 0, _PAD)),
            Case(f"{dtype} state, intermediates", dtypes={"state": dtype}, tokens=3, steps=3, entries=(5, 1, 6)),
            Case(f"{dtype} state, no update", dtypes={"state": dtype}, tokens=2, steps=2, disable_state_update=True),
        )
    ),
    Case("int8 state, mamba1", dtypes={"state": "int8"}, **_MAMBA1, headdim=24, dstate=16, group_axis=False),
    Case("int16 state, pads", dtypes={"state": "int16"}, indices=(_PAD, 5, 9)),
    Case("int8 state, a destination each", **_PACKED_INT8),
    # --- Stochastic rounding ---
    *(
        case
        for dtype in ("float16", "bfloat16", "int8", "float8_e4m3fn")
        for case in (
            Case(f"stochastic {dtype}", dtypes={"state": dtype}, seed=2**62 + 12345),
            Case(f"stochastic {dtype}, tokens", dtypes={"state": dtype}, tokens=3, steps=3, seed=-(2**63)),
        )
    ),
    Case(
        "stochastic float16, odd sizes", dtypes={"state": "float16"}, nheads=3, ngroups=1, headdim=5, dstate=7, seed=0
    ),
    Case("stochastic bfloat16, destinations", dtypes=_STATE_16, destinations=(1, _PAD, 5), seed=7),
    Case("stochastic int8, packed", **_PACKED_INT8, seed=2**63 - 1),
    # --- Replay ---
    Case("replay", **_REPLAY),
    Case("replay, tokens", **_REPLAY, tokens=3),
    Case("replay, two tokens, one group, bare", **_REPLAY, tokens=2, ngroups=1, absent=("D", "z", "dt_bias")),
    Case(
        "replay, one token on an axis, no softplus", **_REPLAY, tokens=1, dt_softplus=False, group_axis=False, ngroups=1
    ),
    Case("replay, no tokens", **_REPLAY, tokens=0),
    Case("replay, no slots", **_REPLAY, indices=None),
    Case("replay, pads", **_REPLAY, tokens=2, indices=(_PAD, 0, 6)),
    Case("replay, no sequences", **_REPLAY, sequences=0, indices=()),
    Case("replay, no slots at all", window=4, slots=0, indices=(0, _PAD, 7)),
    Case("replay, wild numbers", **(_REPLAY | _WILD), tokens=2),
    Case("replay, window of one", window=1, starts=(0, 1, 0, 1, 1, 0), pending=(1, 0, 1, 1, 0, 1)),
    Case("replay, packed", **_REPLAY, tokens=6, cu_seqlens=(0, 3, 4, 6)),
    Case("replay, packed, no tokens", **_REPLAY, tokens=0, cu_seqlens=(0, 0, 0, 0)),
    Case("replay, packed, empty and too long", **_REPLAY, tokens=9, cu_seqlens=(1, 6, 6, 8)),
    Case("replay, packed, decreasing", **_REPLAY, tokens=9, cu_seqlens=(6, 2, 2, _HIGHEST)),
    Case("replay, bfloat16", **_REPLAY, tokens=3, dtypes=_STATE_16 | _INPUTS_16),
    Case("replay, float16 state, mixed", **_REPLAY, dtypes={"state": "float16", "x": "bfloat16", "B": "float16"}),
    Case("replay, odd sizes", **_REPLAY, nheads=3, ngroups=3, headdim=5, dstate=7, tokens=2),
    Case(
        "replay, a long window",
        window=32,
        most=32,
        starts=(40,),
        pending=(31,),
        slots=1,
        sequences=1,
        tokens=32,
        indices=(0,),
    ),
    *(Case(f"replay, {dtype} state", **_REPLAY, tokens=3, dtypes={"state": dtype} | _INPUTS_16) for dtype in LARGEST),
    *(
        Case(f"replay, stochastic {dtype}", **_REPLAY, tokens=2, dtypes={"state": dtype}, seed=13)
        for dtype in ("bfloat16", "int8")
    ),
)
