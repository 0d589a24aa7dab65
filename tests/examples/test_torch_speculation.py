"""Verification in Torch: the texts are those of transformers' own loop."""

import importlib

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = [[5, 33, 7, 5, 33], [9, 9, 60, 1, 2], [1, 2, 3, 4, 5]]


@pytest.fixture
def example():
    """The module, imported by the tests that need it: with transformers it takes seconds."""
    return importlib.import_module("torch_speculation")


def expected(model, prompts, count):
    tokens = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)
    return whole[:, tokens.shape[1] :].tolist()


def told(texts, wrong=()):
    """Drafts that are what follows, but for those in wrong places."""
    wholes = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]

    def draft(text, count):
        whole = next((whole for whole in wholes if whole[: len(text)] == text), [])
        right = (whole[len(text) :] + [0] * count)[:count]
        return [(token + (place in wrong)) % 64 for place, token in enumerate(right, len(text))]

    return draft


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_texts_are_those_of_transformers(example, device, tokens):
    """Whatever is drafted; on a GPU all calls are one graph's. What a random model says repeats itself or does not."""
    model = example.random_model().to(device).eval()
    count = 24
    texts, fewest = expected(model, PROMPTS, count), -(-(count - 1) // tokens)
    drafted = {"looked up": example.look_up, "right": told(texts), "some wrong": told(texts, wrong=range(0, 99, 3))}
    decoded = {name: example.decode(model, PROMPTS, count, tokens, draft) for name, draft in drafted.items()}
    assert [name for name, (own, _) in decoded.items() if own != texts] == []
    calls = {name: calls for name, (_, calls) in decoded.items()}
    assert calls["right"] == fewest <= calls["looked up"] <= count - 1
    assert fewest < calls["some wrong"] < count - 1 or tokens == 1


def test_drafts_are_what_followed(example):
    assert example.look_up([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 3) == [4, 8, 1]
    assert example.look_up([3, 1, 2, 5, 7, 1, 2, 6, 3, 1, 2], 2) == [5, 7]
    assert example.look_up([7, 7, 7], 4) == [7, 7, 7, 7]
    assert example.look_up([1, 2], 2) == [2, 2]


def test_a_model_with_limits_of_dt_is_refused(example):
    model = example.random_model()
    model.config.time_step_limit = (0.0, 0.1)
    with pytest.raises(ValueError, match=r"time_step_limit: expected none, got \(0\.0, 0\.1\)"):
        example.Verifier(model, 1, 2)
