"""Arguments of the peers' functions, and one token of the step written out, for the tests of the drop-ins."""

import torch

H, P, N, G = 4, 8, 16, 2


def model(*rows, tied=True, slots=8, seed=0):
    """Random arguments with as many leading axes for tokens as rows has numbers, parameters as views if tied."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, device="cpu").to(torch.get_default_device())

    A = -torch.exp(normal(H))[:, None, None].expand(H, P, N) if tied else -torch.exp(normal(H, P, N))
    dt = normal(*rows, H)[..., None].expand(*rows, H, P) if tied else normal(*rows, H, P)
    bias, D = ((normal(H)[:, None].expand(H, P) if tied else normal(H, P)) for _ in range(2))
    return {
        "state": normal(slots, H, P, N),
        "x": normal(*rows, H, P),
        "dt": dt,
        "A": A,
        "B": normal(*rows, G, N),
        "C": normal(*rows, G, N),
        "D": D,
        "z": normal(*rows, H, P),
        "dt_bias": bias,
    }


def wide(arguments):
    return {name: tensor.double().clone() for name, tensor in arguments.items()}


def token(a, row, state):
    """One token in float64: returns the output and the new state."""
    heads = torch.arange(H) // (H // G)
    d = torch.nn.functional.softplus(a["dt"][row] + a["dt_bias"])
    x, B, C, z = a["x"][row], a["B"][row][heads][:, None], a["C"][row][heads][:, None], a["z"][row]
    state = state * torch.exp(a["A"] * d[..., None]) + (d * x)[..., None] * B
    return ((state * C).sum(-1) + a["D"] * x) * z * torch.sigmoid(z), state


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
