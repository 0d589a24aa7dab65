"""The named problems that the tests, ``check`` and the benchmarks share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the dtype "bfloat16")
import numpy as np

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
        indices, destinations: the slot tables; None for absent.
        pad_slot_id, dt_softplus: as in ``update``.
        group_axis: B and C have an axis of groups.
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
    indices: tuple[int, ...] | None = (4, 0, 2)
    destinations: tuple[int, ...] | None = None
    pad_slot_id: int = _PAD
    dt_softplus: bool = True
    group_axis: bool = True

    def arrays(self, seed: int) -> dict[str, np.ndarray]:
        """Draw the arrays, by the names of ``update``'s arguments."""
        rng = np.random.default_rng(seed)
        b, N = self.sequences, self.dstate
        heads = (self.nheads,) if self.nheads else ()
        channels = (*heads, self.headdim)
        groups = (self.ngroups,) if self.group_axis else ()
        shapes = {
            "state": (self.slots, *channels, N),
            "x": (b, *channels),
            "dt": (b, *self._channels("dt")),
            "A": self._channels("A", N),
            "B": (b, *groups, N),
            "C": (b, *groups, N),
            "D": self._channels("D"),
            "z": (b, *channels),
            "dt_bias": self._channels("dt_bias"),
        }
        values = {n: rng.standard_normal(shape) for n, shape in shapes.items() if n not in self.absent}
        values["A"] = -np.exp(values["A"])
        # dt + dt_bias where softplus is tiny, where it is the identity, and in between.
        extremes = rng.choice([0.0, -25.0, 22.0], shapes["dt"], p=[0.9, 0.05, 0.05])
        values["dt"] = values["dt"] + extremes if self.dt_softplus else np.abs(values["dt"]) * 0.1
        if "dt_bias" in values and not self.dt_softplus:
            values["dt_bias"] = np.abs(values["dt_bias"]) * 0.1
        others = self.dtypes.get("*", "float32")
        default = {n: "float32" if n == "state" else others for n in values}
        result = {n: value.astype(self.dtypes.get(n, default[n])) for n, value in values.items()}
        for name, table in (("state_batch_indices", self.indices), ("dst_state_batch_indices", self.destinations)):
            if table is not None:
                result[name] = np.array(table, self.dtypes.get(name, "int32"))
        return result

    @property
    def flags(self) -> dict[str, Any]:
        """The arguments of ``update`` that are not arrays."""
        return {"dt_softplus": self.dt_softplus, "pad_slot_id": self.pad_slot_id}

    def _channels(self, name: str, *state_axis: int) -> tuple[int, ...]:
        """Return the shape of a parameter: one number a head where it is tied."""
        if self.nheads and name not in self.untied:
            return (self.nheads,)
        heads = (self.nheads,) if self.nheads else ()
        return (*heads, self.headdim, *state_axis)


_ALL_UNTIED = ("A", "dt", "D", "dt_bias")

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
    Case("mamba1", nheads=0, ngroups=1, headdim=48, dstate=16, group_axis=False),
    Case("mamba1, group axis", nheads=0, ngroups=1, headdim=48, dstate=16),
    Case("mamba1, bfloat16", nheads=0, ngroups=1, headdim=48, dstate=16, dtypes={"state": "bfloat16", "*": "bfloat16"}),
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
    *(Case(f"{dtype} state", dtypes={"state": dtype}) for dtype in ("bfloat16", "float16")),
    *(
        Case(f"{dtype} all but A", dtypes={"state": dtype, "*": dtype, "A": "float32"})
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Case(f"{dtype} all", dtypes={"state": dtype, "*": dtype}, untied=_ALL_UNTIED)
        for dtype in ("bfloat16", "float16")
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
    Case("mamba2-130m", sequences=2, slots=3, nheads=24, headdim=64, dstate=128, ngroups=1, indices=(2, 0)),
    Case(
        "mamba2-130m, bfloat16",
        sequences=2,
        slots=3,
        nheads=24,
        headdim=64,
        dstate=128,
        ngroups=1,
        indices=(2, 0),
        dtypes={"state": "bfloat16", "*": "bfloat16", "A": "float32"},
    ),
    Case(
        "nemotron-h-8b",
        sequences=2,
        slots=3,
        nheads=128,
        headdim=64,
        dstate=128,
        ngroups=8,
        indices=(1, 2),
        dtypes={"state": "bfloat16", "*": "bfloat16", "A": "float32"},
    ),
    Case(
        "mamba-130m",
        sequences=2,
        slots=3,
        nheads=0,
        ngroups=1,
        headdim=1536,
        dstate=16,
        group_axis=False,
        indices=(2, 0),
    ),
)
