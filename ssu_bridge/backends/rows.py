"""The table of arguments as the native library takes it, and its check of the tensors of a compiled kernel."""

from collections.abc import Callable, Collection, Sequence

from ssu_bridge.core.arguments import ARGUMENTS, SLOT_TABLES, TIED_AXES, TOKEN_AXES
from ssu_bridge.native import library

# More tokens than a tensor has.
ANY_TOKENS = (0, 2**63 - 1)

# What the table says of an argument: name, shapes, free axes, how many axes a tied view repeats, whether it is written;
# then whether a kernel was compiled for it tied, and for which dtype ("": for any).
Row = tuple[str, tuple[str, ...], str, int, bool, bool, str]


def row(name: str) -> Row:
    """Return what the table says of an argument."""
    argument = ARGUMENTS[name]
    return name, argument.shapes, argument.free, TIED_AXES.get(name, 0), argument.written, False, ""


def compiled_check(
    dtypes: Sequence[tuple[str, str]],
    results: Sequence[str],
    *,
    tied: Collection[str],
    tables: Collection[str] | None,
    layout: str,
    sizes: dict[str, int],
    intermediate_stride: int = 1,
    tokens: tuple[int, int] = ANY_TOKENS,
) -> Callable[..., object]:
    """Return a function of tensors that raises ValueError unless a kernel was compiled for such.

    It looks at ranks, sizes, dtypes, strides and devices of all of them, as ``describe`` does, and reads no memory.

    Args:
        dtypes: (name, dtype) of each input, in the order in which the kernel takes them.
        results: the names of what it computes, out first.
        tied: the parameters that it reads as one number a head.
        tables: the slot tables that it reads as having a column for each token; None: it reads them either way.
        layout: "single", "multi" or "packed".
        sizes: those that are compiled in, by their symbols: H, P, N, G.
        intermediate_stride: of the intermediate states.
        tokens: of how many tokens a sequence may be that is not packed.
    """
    by_name = dict(dtypes)
    rows = [_compiled_row(name, dtype, name in tied, tables) for name, dtype in (*dtypes, ("out", by_name["x"]))]
    layout_number = list(TOKEN_AXES).index(layout)
    check: Callable[..., object] = library().compiled_check(
        rows, "state" in results, intermediate_stride, layout_number, list(sizes.items()), tokens
    )
    return check


def _compiled_row(name: str, dtype: str, tied: bool, tables: Collection[str] | None) -> Row:
    _, shapes, free, tied_axes, written, _, _ = row(name)
    if name in TIED_AXES and not tied:
        shapes, tied_axes = shapes[:1], 0
    if tables is not None and name in SLOT_TABLES:
        shapes = shapes[1:] if name in tables else shapes[:1]
    return name, shapes, free, tied_axes, written, tied, dtype
