"""The texts that the trained model wrote when it read prompts token by token: each way of reading gives the same."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax import checkpoint, model
from mamba2_jax.generate import KJV, bucket, prefill, stream
from mamba2_jax.requests import Sequence
from mamba2_jax.sampling import Sampling
from mamba2_jax.scheduler import Scheduler

TEXTS = {
    tuple(prompt.encode()): text.encode("latin-1")
    for prompt, text in json.loads((Path(__file__).parent / "greedy_texts.json").read_text()).items()
}
GREEDY = Sampling(temperature=0)
TIED = 1e-4


@pytest.fixture(scope="module")
def trained():
    return checkpoint.load(KJV)


def assert_same_texts(trained, texts, count=200, prompts=TEXTS):
    """From a token on that two logits are as good as equal for, a text may be another; so many tokens are compared."""
    for (prompt, expected), got in zip(((p, TEXTS[p]) for p in prompts), texts, strict=True):
        assert len(got) == count <= len(expected) == 200
        for place in (i for i, (one, other) in enumerate(zip(bytes(got), expected, strict=False)) if one != other):
            states = model.zero_states(trained[0], 1, "float32", "float32")
            before = [list(prompt) + list(expected[:place])]
            logits = np.sort(prefill(*trained, states, before, jnp.zeros(1, jnp.int32)).logits[0])
            assert logits[-1] - logits[-2] < TIED, (bytes(prompt), place)
            break


def scheduled(trained, batch):
    requests = [Sequence(list(prompt), 200) for prompt in TEXTS]
    for request in requests:
        batch.submit(request)
    list(batch.run())
    return [request.drawn for request in requests]


def test_there_are_texts():
    assert len(TEXTS) == 10


# By default prompts of the smallest bucket and of the largest: a program is compiled for each.
BUCKETS = {rows: [p for p in TEXTS if bucket(len(p)) == rows] for rows in (16, 32, 64, 128, 256)}


@pytest.mark.parametrize("_device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "rows", [pytest.param(rows, marks=[] if rows in (16, 256) else [pytest.mark.nightly]) for rows in BUCKETS]
)
@jax.default_matmul_precision("float32")  # a GPU's default has ten bits
def test_prefill_in_buckets(trained, rows, _device):
    # How a prompt was read shows in the first tokens.
    assert sum(map(len, BUCKETS.values())) == len(TEXTS)
    prompts = BUCKETS[rows]
    assert prompts
    texts = [list(stream(*trained, list(p), 48, sampling=GREEDY)) for p in prompts]
    assert_same_texts(trained, texts, 48, prompts)


@pytest.mark.parametrize("_device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@jax.default_matmul_precision("float32")
def test_the_scheduler_and_its_prefix_cache(trained, _device):
    """Pieces of prompts beside sequences that decode; then all prompts again, most of them from their snapshots."""
    batch = Scheduler(*trained, width=3, sampling=GREEDY, rows=48, prefixes=20, prefix_stride=16)
    assert_same_texts(trained, scheduled(trained, batch))
    found, look_up = [], batch._cache.longest
    batch._cache.longest = lambda prompt: found.append(look_up(prompt)) or found[-1]
    assert_same_texts(trained, scheduled(trained, batch))
    assert [place and place[0] for place in found] == [(len(p) - 1) // 16 * 16 or None for p in TEXTS]


@pytest.mark.nightly  # in test_scheduler.py the length of a piece changes no text of a smaller model
def test_the_scheduler_without_a_prefix_cache(trained):
    assert_same_texts(trained, scheduled(trained, Scheduler(*trained, width=4, sampling=GREEDY, piece=3, rows=20)))
