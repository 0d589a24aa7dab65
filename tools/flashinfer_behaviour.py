"""What FlashInfer's own function does with calls that the flashinfer backend refuses or works around.

    python tools/flashinfer_behaviour.py [NAME ...]

needs a GPU and prints the table of docs/flashinfer.md, for another version of FlashInfer or another GPU to be compared
with it. Each call runs in a process of its own, because some leave the GPU in error. Arrays that may be written out of
bounds are slices out of the middle of larger ones.
"""

import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

GUARD = 2  # slots before and after the state


def arrays(b=3, slots=6, H=4, G=2, P=64, N=64, T=0, state=torch.float32, other=torch.float32, **changes):
    """The arguments of a call as FlashInfer wants them, the state inside a larger array of ones."""
    torch.manual_seed(0)
    tokens = (b, T) if T else (b,)

    def normal(*shape):
        return torch.randn(*shape, device="cuda").to(other)

    whole = torch.ones(slots + 2 * GUARD, H, P, N, device="cuda").to(state)
    call = {
        "state": whole[GUARD : GUARD + slots],
        "x": normal(*tokens, H, P),
        "dt": normal(*tokens, H)[..., None].expand(*tokens, H, P),
        "A": torch.full((H,), -0.5, device="cuda")[:, None, None].expand(H, P, N),
        "B": normal(*tokens, G, N),
        "C": normal(*tokens, G, N),
        "D": normal(H)[:, None].expand(H, P),
        "out": torch.full((*tokens, H, P), 7.0, device="cuda").to(other),
        "dt_softplus": True,
        "state_batch_indices": torch.arange(b, device="cuda").int(),
    }
    if T:
        call["cache_steps"] = T
    return whole, call | changes


def run(call):
    from flashinfer.mamba import selective_state_update

    selective_state_update(**{name: value for name, value in call.items() if value is not None})
    torch.cuda.synchronize()


def indices(*values, dtype=torch.int32):
    return torch.tensor(values, device="cuda", dtype=dtype)


def guards(whole):
    return [i - GUARD for i in (0, 1, len(whole) - 2, len(whole) - 1) if not (whole[i] == 1).all()]


def written(whole):
    return f"slots written: {[i - GUARD for i in range(len(whole)) if not (whole[i] == 1).all()]}"


def result(call):
    return "ran; " + ("out is finite" if call["out"].float().isfinite().all() else "out has NaN or Inf")


# --- The calls ---


def pad_destination(algorithm):
    whole, call = arrays(dst_state_batch_indices=indices(3, -1, 4), algorithm=algorithm)
    run(call)
    return written(whole) + " of destinations 3, pad, 4"


def pad_destination_simple():
    return pad_destination("simple")


def pad_destination_vertical():
    return pad_destination("vertical")


def pad_destination_horizontal():
    return pad_destination("horizontal")


def pad_destination_tokens():
    whole, call = arrays(T=3, dst_state_batch_indices=indices(3, -1, 4))
    run(call)
    return written(whole) + " of destinations 3, pad, 4"


def pad_destination_one_token_of_many():
    whole, call = arrays(T=1, dst_state_batch_indices=indices(3, -1, 4))
    run(call)
    return written(whole) + " of destinations 3, pad, 4"


def index_out_of_range():
    whole, call = arrays(state_batch_indices=indices(0, 6, 1))
    run(call)
    return written(whole) + " of 6 slots, for indices 0, 6, 1"


def intermediate_states_and_the_state():
    buffer = torch.zeros(6, 3, 4, 64, 64, device="cuda")
    whole, call = arrays(T=3, intermediate_states_buffer=buffer, intermediate_state_indices=indices(0, 1, 2))
    run(call)
    return f"intermediate states {'written' if buffer.any() else 'not written'}, {written(whole)}"


def intermediate_index_minus_one():
    whole = torch.zeros(10, 3, 4, 64, 64, device="cuda")
    _, call = arrays(T=3, intermediate_states_buffer=whole[2:8], intermediate_state_indices=indices(0, -1, 2))
    run(call | {"disable_state_update": True})
    return f"entries written: {[i - 2 for i in range(10) if whole[i].any()]} for 0, -1, 2"


def intermediate_states_one_token():
    buffer = torch.zeros(6, 1, 4, 64, 64, device="cuda")
    _, call = arrays(intermediate_states_buffer=buffer)
    run(call)
    return f"intermediate states {'written' if buffer.any() else 'ignored'}"


def counts_one_token():
    results = []
    for count in (1, 2):
        table = indices(0, 1, 2, 3, 4, 5).view(3, 2)
        whole, call = arrays(state_batch_indices=table, num_accepted_tokens=indices(*[count] * 3, dtype=torch.int64))
        run(call)
        results.append(written(whole))
    return f"with counts of 1: {results[0]}; of 2: {results[1]}; table [[0, 1], [2, 3], [4, 5]]"


def vertical_tokens():
    run(arrays(T=3, algorithm="vertical")[1])
    return "ran"


def horizontal_tokens():
    run(arrays(T=3, algorithm="horizontal")[1])
    return "ran"


def int16_pad(algorithm):
    _, call = arrays(P=64, N=128, state=torch.int16, other=torch.bfloat16, algorithm=algorithm)
    scales = torch.full((10, 4, 64), float("nan"), device="cuda")
    scales[2:8] = 0.01
    run(call | {"state_scale": scales[2:8], "state_batch_indices": indices(0, -1, 2)})
    return result(call) + ", with a NaN before the scales"


def int16_pad_simple():
    return int16_pad("simple")


def int16_pad_vertical():
    return int16_pad("vertical")


def int16_pad_tokens():
    _, call = arrays(P=64, N=128, T=1, state=torch.int16, other=torch.bfloat16)
    scales = torch.full((10, 4, 64), float("nan"), device="cuda")
    scales[2:8] = 0.01
    run(call | {"state_scale": scales[2:8], "state_batch_indices": indices(0, -1, 2)})
    return result(call) + ", with a NaN before the scales"


def int16_dstate_96(algorithm):
    _, call = arrays(N=96, state=torch.int16, other=torch.bfloat16, algorithm=algorithm)
    scale = torch.full((6, 4, 64), 0.01, device="cuda")
    run(call | {"state_scale": scale})
    return call["state"][:3].float() * scale[:3, ..., None]


def int16_dstate_96_vertical():
    apart = (int16_dstate_96("vertical") - int16_dstate_96("simple")).abs().max().item()
    return f"ran; its states and the simple kernel's are up to {apart:.3g} apart"


def int16_horizontal():
    _, call = arrays(N=128, state=torch.int16, other=torch.bfloat16, algorithm="horizontal")
    run(call | {"state_scale": torch.full((6, 4, 64), 0.01, device="cuda")})
    return "ran"


def headdim_256(algorithm):
    _, call = arrays(b=40, slots=40, H=8, P=256, N=128, state=torch.bfloat16, other=torch.bfloat16, algorithm=algorithm)
    run(call)
    same = (call["out"] == 7).sum((0, 1)) > 100
    return f"ran; rows of out that stay as they were: {int(same.sum())} of 256"


def headdim_256_simple():
    return headdim_256("simple")


def headdim_256_vertical():
    return headdim_256("vertical")


def headdim_256_auto():
    return headdim_256("auto")


def headdim_256_horizontal():
    return headdim_256("horizontal")


def headdim_80():
    run(arrays(P=80, N=128, state=torch.bfloat16, other=torch.bfloat16)[1])
    return "ran"


def headdim_32():
    run(arrays(P=32, N=128, state=torch.bfloat16, other=torch.bfloat16)[1])
    return "ran"


def dstate_32_bfloat16():
    run(arrays(N=32, state=torch.bfloat16, other=torch.bfloat16)[1])
    return "ran"


def dstate_288(algorithm="vertical"):
    run(arrays(N=288, state=torch.bfloat16, other=torch.bfloat16, algorithm=algorithm)[1])
    return "ran"


def three_heads_in_a_group(algorithm="auto", T=0):
    run(arrays(H=6, algorithm=algorithm, T=T)[1])
    return "ran"


def three_heads_in_a_group_horizontal():
    return three_heads_in_a_group("horizontal")


def three_heads_in_a_group_tokens():
    return three_heads_in_a_group(T=3)


def fewer_slots_than_sequences():
    run(arrays(slots=2, state_batch_indices=indices(0, 1, -1))[1])
    return "ran"


def wide_pad_id():
    whole, call = arrays(pad_slot_id=2**40)
    run(call)
    return written(whole) + " of 0, 1, 2"


def untied_A():
    run(arrays(A=-torch.rand(4, 64, 64, device="cuda"))[1])
    return "ran"


def untied_dt():
    run(arrays(dt=torch.rand(3, 4, 64, device="cuda"))[1])
    return "ran"


def B_of_another_dtype():
    run(arrays(B=torch.rand(3, 2, 64, device="cuda").bfloat16())[1])
    return "ran"


def D_of_another_dtype():
    run(arrays(D=torch.rand(4, device="cuda").bfloat16()[:, None].expand(4, 64))[1])
    return "ran"


def no_D():
    run(arrays(D=None)[1])
    return "ran"


def tables_of_two_dtypes():
    run(arrays(dst_state_batch_indices=indices(3, 4, 5, dtype=torch.int64))[1])
    return "ran"


def misaligned(by, **changes):
    memory = torch.randn(3 * 4 * 64 + by // 4, device="cuda")
    return arrays(x=memory[by // 4 :].view(3, 4, 64), **changes)[1]


def x_at_8_bytes():
    run(misaligned(8))
    return "ran"


def x_at_16_bytes_simple():
    run(misaligned(16, algorithm="simple"))
    return "ran"


def x_at_16_bytes_vertical():
    run(misaligned(16, algorithm="vertical"))
    return "ran"


def x_at_16_bytes_horizontal():
    run(misaligned(16, algorithm="horizontal"))
    return "ran"


def strided_out():
    out = torch.zeros(3, 2, 4, 64, device="cuda")[:, 0]
    run(arrays(out=out)[1])
    return "ran"


def no_sequences():
    run(arrays(b=0)[1])
    torch.ones(1, device="cuda").add_(1)  # would raise what the launch left behind
    return "ran"


def softplus_of_minus_20():
    _, call = arrays(dt=torch.full((3, 4, 1), -20.0, device="cuda").expand(3, 4, 64))
    call["state"].zero_()
    run(call)
    return f"of a zero state, the largest is {call['state'].abs().max().item():.3g}; float64 has about 1e-09"


def rounding(values):
    """Round these stochastically many times; return what came of each."""
    _, call = arrays(P=64, N=128, state=torch.float16, other=torch.bfloat16)
    counts = []
    for value in values:
        call["state"].fill_(0)
        call["dt"] = torch.ones(3, 4, 1, device="cuda", dtype=torch.bfloat16).expand(3, 4, 64)
        call["x"].fill_(1)
        call["B"].fill_(value)
        run(call | {"dt_softplus": False, "rand_seed": torch.tensor([5], device="cuda")})
        counts.append(sorted(set(call["state"][:3].flatten().tolist()), key=str)[:4])
    return counts


def rounding_of_small_numbers():
    return f"3e-5 becomes {rounding([3e-5])[0]}"


def rounding_of_infinity_and_nan():
    found = rounding([float("inf"), float("nan"), 65504.0 * 4])
    return f"Inf becomes {found[0]}, NaN {found[1]}, 262016 {found[2]}"


def rounding_of_bfloat16():
    run(arrays(state=torch.bfloat16, other=torch.bfloat16, rand_seed=torch.tensor([5], device="cuda"))[1])
    return "ran"


def int16_and_a_seed():
    _, call = arrays(N=128, state=torch.int16, other=torch.bfloat16, rand_seed=torch.tensor([5], device="cuda"))
    run(call | {"state_scale": torch.ones(6, 4, 64, device="cuda")})
    return "ran"


def packed(lengths, longest, **changes):
    rows = sum(lengths)
    _, call = arrays(b=rows, slots=6, **changes)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    call["state_batch_indices"] = torch.arange(len(lengths), device="cuda").int()
    return call | {"cu_seqlens": ends, "cache_steps": longest}


def packed_longer_than_told():
    call = packed((1, 6), 3)
    run(call)
    right = packed((1, 6), 6)
    run(right)
    return f"ran; out is up to {(call['out'] - right['out']).abs().max().item():.3g} off"


def packed_vertical():
    run(packed((1, 2), 3, algorithm="vertical"))
    return "ran"


def strided_cu_seqlens():
    call = packed((1, 2), 3)
    ends = torch.zeros(3, 2, device="cuda").int()
    ends[:, 0] = call["cu_seqlens"]
    run(call | {"cu_seqlens": ends[:, 0]})
    return "ran"


def strided_intermediate_states():
    buffer = torch.zeros(6, 2, 3, 4, 64, 64, device="cuda")[:, 0]
    run(arrays(T=3, intermediate_states_buffer=buffer, disable_state_update=True)[1])
    return "ran"


HELPERS = [
    "arrays",
    "run",
    "indices",
    "guards",
    "written",
    "result",
    "pad_destination",
    "int16_pad",
    "int16_dstate_96",
    "headdim_256",
    "misaligned",
    "rounding",
    "packed",
    "main",
    "look",
]


def look(name):
    """Run one call in a process of its own; return what it printed, or the end of its error."""
    done = subprocess.run([sys.executable, __file__, f"={name}"], capture_output=True, text=True, timeout=150)
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1]
    errors = [line for line in done.stderr.strip().splitlines() if "rror:" in line or "errors detected" in line]
    return "raises " + (errors[-1] if errors else f"exit status {done.returncode}")[:260]


def main():
    asked = sys.argv[1:]
    if asked and asked[0].startswith("="):
        print(globals()[asked[0][1:]]())
        return
    names = asked or [
        name
        for name, value in globals().items()
        if inspect.isfunction(value) and value.__module__ == __name__ and name not in HELPERS
    ]
    with ThreadPoolExecutor(8) as pool:
        for name, seen in zip(names, pool.map(look, names), strict=True):
            print(f"{name}: {seen}", flush=True)


if __name__ == "__main__":
    main()
