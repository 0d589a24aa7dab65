"""Calls whose rows of tokens have gaps between them, as slices of one projection have."""

import torch

# Calls whose rows have gaps: several tokens, packed ones, trees, states on the way, parameters that are not tied.
WITH_GAPS = {
    "few": {"tokens": 3},
    "a chunk": {"tokens": 8},
    "chunks": {"tokens": 40},
    "prompt": {"tokens": 320},
    "segments": {"tokens": 1100},
    "packed": {"tokens": 90, "cu_seqlens": (0, 1, 40, 90)},
    "packed segments": {"tokens": 1300, "cu_seqlens": (0, 1, 40, 1300)},
    "tree": {"tokens": 7, "parents": ((-1, 0, 1, 1, 0, -1, 5),) * 3},
    "packed trees": {"tokens": 80, "cu_seqlens": (0, 3, 20, 80), "parents": tuple(t % 7 - 1 for t in range(80))},
    "states on the way": {"tokens": 90, "steps": 2, "intermediate_stride": 40},
    "states of tokens": {"tokens": 3, "steps": 3},
    "untied": {"tokens": 5, "untied": ("dt", "dt_bias", "A", "D")},
    "untied, packed": {"tokens": 9, "cu_seqlens": (0, 1, 4, 9), "untied": ("dt",)},
}


def spread(case, tensors):
    """Return a call's tensors with gaps between the rows of tokens, and an output that has some."""
    rows = 2 if case.cu_seqlens is None else 1
    names = [name for name in ("x", "dt", "B", "C", "z", "parent_tokens") if name in tensors]
    result = {**tensors, **{name: with_gaps(tensors[name], rows) for name in names}}
    result["out"] = with_gaps(torch.full_like(tensors["x"], float("nan")), rows)
    assert all(result[name].stride() != tensors[name].stride() for name in names)
    return result


def with_gaps(tensor, rows):
    """Return a tensor whose ``rows`` leading axes have gaps: as a slice of a wider one."""
    wider = [size + 1 for size in tensor.shape[:rows]]
    # Where a row is one number, the gap is another number after each.
    row = [size + 8 * (i == 0) for i, size in enumerate(tensor.shape[rows:])] or [2]
    whole = torch.full((*wider, *row), 9, device=tensor.device, dtype=tensor.dtype)
    view = whole[tuple(slice(size) for size in tensor.shape)]
    return (view if view.ndim == tensor.ndim else view[..., 0]).copy_(tensor)
