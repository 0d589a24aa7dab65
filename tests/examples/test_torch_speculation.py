"""Verification in Torch: the texts are those of transformers' own loop."""

import pytest
import torch

import torch_speculation
from torch_speculation import decode, look_up, random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = [[5, 33, 7, 5, 33], [9, 9, 60, 1, 2], [1, 2, 3, 4, 5]]


def expected(model, prompts, count):
    tokens = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)
    return whole[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_texts_are_those_of_transformers(device, tokens):
    """Each sequence accepts as many drafts as it does; on a GPU all calls are one graph's."""
    model = random_model().to(device).eval()
    texts, calls = decode(model, PROMPTS, 40, tokens)
    assert texts == expected(model, PROMPTS, 40)
    assert calls == 39 if tokens == 1 else 39 / tokens <= calls < 39


def test_drafts_are_what_followed():
    assert look_up([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 3) == [4, 8, 1]
    assert look_up([3, 1, 2, 5, 7, 1, 2, 6, 3, 1, 2], 2) == [5, 7]
    assert look_up([7, 7, 7], 4) == [7, 7, 7, 7]
    assert look_up([1, 2], 2) == [2, 2]


def test_a_model_with_limits_of_dt_is_refused():
    model = random_model()
    model.config.time_step_limit = (0.0, 0.1)
    with pytest.raises(ValueError, match=r"time_step_limit: expected none, got \(0\.0, 0\.1\)"):
        torch_speculation.Verifier(model, 1, 2)
