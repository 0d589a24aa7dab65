"""Draw what makes a right call a wrong one."""

import numpy as np

from fuzz.memory import dense
from fuzz.oracle import QMAX


def mistake(draw):
    """Return a statement that makes the arguments of a right call wrong."""
    wrong = ['given["x"] = given["x"][None, None]', 'given["A"] = None', 'given["backend"] = "none"']
    wrong += ['given["B"] = given["B"][..., :-1]', 'given["pad_slot_id"] = 1.5', 'given["dt_softplus"] = 1']
    wrong += ['given["C"] = given["C"][..., None, None]', 'given["num_accepted_tokens"] = given["x"]']
    if "dst_state_batch_indices" in draw.shapes:
        wrong += ['given["disable_state_update"] = True']
    if draw.dense:
        return draw.content.choice(wrong)
    wrong += ['given["donate"] = False']
    keeps = "disable_state_update" in draw.flags or (draw.tree and not draw.destinations)
    count, needed = (int(np.prod(draw.shapes[name])) for name in ("state", "x"))
    if draw.state not in QMAX and not draw.replays and not keeps:
        if draw.mode == "numpy":
            wrong += ['given["state"] = np.broadcast_to(given["state"], given["state"].shape)'] * 2
        if 0 < needed <= count and draw.layouts["state"].strides == dense(draw.shapes["state"]):
            wrong += [f'given["x"] = given["state"].reshape(-1)[:{needed}].reshape({draw.shapes["x"]})'] * 4
    return draw.content.choice(wrong)
