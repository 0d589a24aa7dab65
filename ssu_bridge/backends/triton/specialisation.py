"""What is compiled into a kernel."""

import dataclasses

from ssu_bridge.backends.triton.tiles import Tile, is_plain
from ssu_bridge.core.arguments import TOKENWISE
from ssu_bridge.core.problem import Problem

# What has a row for each token.
TOKEN_ROWS = (*TOKENWISE, "out")

# From this compute capability on, a kernel can start before those ahead of it are done.
_OVERLAPPING = (9, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Specialisation:
    """Everything that is compiled into a kernel. Numbers of sequences, slots and tokens, and strides, are not."""

    kernel: str
    capability: tuple[int, int]
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    layout: str
    dtypes: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    tied: tuple[str, ...]
    tables: tuple[str, ...]
    dt_softplus: bool
    pad_slot_id: int
    intermediate_stride: int
    philox_rounds: int
    rounds_each_token: bool
    window: int
    most_tokens: int
    unaligned: tuple[str, ...]
    # Whether rows of several tokens have no gaps between them, and so strides that are compiled in.
    dense: bool
    tile: Tile

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are compiled in, by their symbols in the table of arguments."""
        return {"H": self.nheads, "P": self.headdim, "N": self.dstate, "G": self.ngroups}

    @property
    def tensors(self) -> dict[str, str]:
        """The dtypes of the tensors that a kernel reads and writes: the inputs in their order, then ``out``."""
        dtypes = dict(self.dtypes)
        return {**dtypes, "out": dtypes["x"]}

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may start before those ahead of it are done, and waits for them itself."""
        return self.capability >= _OVERLAPPING

    @property
    def target(self) -> str:
        """The specialisation spelt out."""
        sizes = ",".join(f"{symbol}{size}" for symbol, size in self.sizes.items())
        arrays = ",".join(
            f"{name}:{dtype}{'/head' if name in self.tied else ''}{'/token' if name in self.tables else ''}"
            for name, dtype in self.dtypes
        )
        flags = f"softplus={self.dt_softplus:d};pad={self.pad_slot_id};unaligned={','.join(self.unaligned)}"
        if "rand_seed" in dict(self.dtypes):
            flags += f";rounds={self.philox_rounds}"
        if self.intermediate_stride > 1:
            flags += f";stride={self.intermediate_stride}"
        if self.rounds_each_token:
            flags += ";each=1"
        if self.dense:
            flags += ";dense=1"
        if self.window:
            flags += f";replay={self.window}+{self.most_tokens}"
        ahead = f"+{self.tile.ahead}" if self.tile.ahead else ""
        chunk = f"x{self.tile.chunk}{'' if self.tile.one_chunk else '+'}" if self.tile.chunk else ""
        chunk += "/d" if self.tile.decays else ""
        heads = f"*{self.tile.heads}" if self.tile.heads > 1 else ""
        if self.tile.segments.most > 1:
            chunk += f";segments={self.tile.segments.most}x{self.tile.segments.least}"
        return (
            f"ssu_bridge.triton(sm{self.capability[0]}{self.capability[1]};{self.layout};{sizes};{arrays}->"
            f"{','.join(self.results)};{flags};tile={self.tile.rows}x{self.tile.warps}{chunk}{heads}{ahead})"
        )


def specialise(problem: Problem, tile: Tile) -> Specialisation:
    """Return what has to be compiled for a problem that runs on CUDA."""
    assert problem.capability is not None
    return Specialisation(
        kernel=_kernel_name(problem, tile),
        capability=problem.capability,
        nheads=problem.nheads,
        headdim=problem.headdim,
        dstate=problem.dstate,
        ngroups=problem.ngroups,
        layout=problem.layout,
        dtypes=tuple((name, dtype) for name, dtype in problem.dtypes if name != "out"),
        results=problem.results,
        tied=problem.tied,
        tables=tuple(sorted(problem.tables)),
        dt_softplus=problem.options.dt_softplus,
        pad_slot_id=problem.options.pad_slot_id,
        intermediate_stride=problem.options.intermediate_stride,
        philox_rounds=problem.options.config.philox_rounds if "rand_seed" in problem.names else 0,
        rounds_each_token=problem.rounds_each_token,
        window=problem.options.replay_window,
        most_tokens=problem.options.replay_tokens,
        unaligned=_unaligned(problem),
        dense=_is_dense(problem),
        tile=tile,
    )


def _unaligned(problem: Problem) -> tuple[str, ...]:
    """Return the arrays that are read and stored element by element.

    If one of the two that a float8 state is stored in is, so is the other: where the same values are stored both by
    elements and by vectors, ptxas 12.8 takes every other element from a register that does not hold it yet.
    """
    names, dtypes = set(problem.unaligned), dict(problem.dtypes)
    stored = dtypes.keys() & {"state", "intermediate_states"}
    if dtypes["state"] == "float8_e4m3fn" and names & stored:
        names |= stored
    return tuple(sorted(names))


def _is_dense(problem: Problem) -> bool:
    """Return whether rows of tokens have no gaps between them, of calls that were measured to be faster for it."""
    is_measured = problem.layout != "single" and not (problem.replays or problem.rounds_each_token)
    return is_measured and not {*TOKEN_ROWS}.intersection(problem.strided)


def _kernel_name(problem: Problem, tile: Tile) -> str:
    if problem.replays:
        return "replay_tokens" if tile.chunk else "replay_token"
    return "matrix_form" if tile.chunk else "single_token" if is_plain(problem) else "many_tokens"


def launches(specialisation: Specialisation) -> tuple[Specialisation, ...]:
    """Return the specialisations of the kernels that a call launches, one after the other."""
    tile = specialisation.tile
    before = ["decays"] * tile.decays + ["segment_states"] * (tile.segments.most > 1)
    return (*(dataclasses.replace(specialisation, kernel=kernel) for kernel in before), specialisation)
