"""Speculation changes no text: greedy ones are equal, drawn ones have the same distribution."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import random_weights
from test_texts import GREEDY, TEXTS, assert_same_texts

from mamba2_jax import checkpoint, generate, speculate
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV
from mamba2_jax.sampling import Sampling, sample
from mamba2_jax.speculate import Speculation, look_up, tree_depths, tree_parents, verify

PLAIN = Sampling(1.0, 1.0)
TINY = Mamba2Config(64, 32, 1, num_heads=4, head_dim=16, state_size=8)


@pytest.fixture(scope="module")
def trained():
    return checkpoint.load(KJV)


@pytest.fixture(scope="module")
def small():
    return TINY, random_weights(TINY, jax.random.key(0))


# --- Drafts ---


def found_by_hand(text, speculation):
    """Return the branches, and how many tokens before the first were the same, for one text."""

    def same(place):
        count = 0
        while count < speculation.longest and place - count >= 0 and text[place - count] == text[-1 - count]:
            count += 1
        return count

    branches, first = [], None
    while len(branches) < speculation.branches:
        begun = {branch[0] for branch in branches}
        places = [p for p in range(len(text) - 1) if text[p + 1] not in begun]
        if not places:
            return branches, first or 0
        best = max(places, key=lambda p: (same(p), p))
        repeated = text[best + 1 :] * speculation.depth
        branches.append(repeated[: speculation.depth])
        first = same(best) if first is None else first
    return branches, first


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
@pytest.mark.parametrize("speculation", [Speculation(6, longest=4), Speculation(7, 2), Speculation(4, 3)], ids=str)
def test_drafts_follow_the_longest_and_latest_match(xp, speculation, rng):
    lengths = np.array([1, 2, 3, 9, 30, 40])
    texts = rng.integers(0, 3, (len(lengths), 40)).astype("int32")
    find = look_up if xp is np else jax.jit(look_up, static_argnums=(2, 3))
    drafts, matched = map(np.asarray, find(texts, lengths, speculation, xp))
    assert drafts.shape == (6, speculation.branches, speculation.depth)
    for text, length, own, count in zip(texts, lengths, drafts, matched, strict=True):
        branches, first = found_by_hand(text[:length].tolist(), speculation)
        assert int(count) == first
        np.testing.assert_array_equal(own[: len(branches)], np.array(branches, int).reshape(-1, speculation.depth))


def test_a_tree_of_drafts():
    assert tree_parents(1, 3).tolist() == [-1, 0, 1, 2]
    assert tree_parents(3, 2).tolist() == [-1, 0, 1, 0, 3, 0, 5]
    assert tree_depths(3, 2).tolist() == [0, 1, 2, 1, 2, 1, 2]
    assert tree_parents(1, 0).tolist() == [-1]


# --- Verification ---


def test_what_is_accepted():
    """Per case: drafts of a token's branches, what was drawn after each token, and what comes of it."""
    cases = [
        ([[5, 6, 7]], [5, 6, 7, 8], [5, 6, 7, 8], 3, 3),
        ([[5, 6, 7]], [5, 6, 9, 7], [5, 6, 9], 2, 2),
        ([[5, 6, 7]], [4, 6, 7, 8], [4], 0, 0),
        ([[5, 6], [7, 8]], [7, 6, 1, 8, 2], [7, 8, 2], 2, 4),
        ([[5, 6], [7, 8]], [5, 9, 1, 8, 2], [5, 9], 1, 1),
        ([[5, 6], [7, 8]], [9, 6, 1, 8, 2], [9], 0, 0),
    ]
    for drafts, drawn, tokens, accepted, leaf in cases:
        found = jax.tree.map(np.array, jax.jit(verify)(np.array([drafts]), np.array([drawn])))
        assert found.tokens[0, : accepted + 1].tolist() == tokens
        assert (found.accepted[0], found.leaf[0]) == (accepted, leaf)


@pytest.mark.parametrize("branches", [1, 2])
def test_draws_have_the_distribution_of_plain_sampling(branches):
    """40,000 texts of a model whose next token depends on the last one; the first three tokens of each are counted."""
    count, vocabulary, depth, wanted = 40_000, 4, 2, 3
    chances = np.array([[4, 3, 2, 1], [1, 1, 6, 2], [2, 5, 2, 1], [3, 1, 1, 5]]) / 10
    depths = tree_depths(branches, depth)

    @jax.jit
    def write(text, length):
        keys, rows = jax.random.split(jax.random.key(0), count), jnp.arange(count)[:, None]
        drafts = jnp.broadcast_to(jnp.array([[1, 2], [0, 3]][:branches]), (count, branches, depth))
        fed = jnp.concatenate([text[rows, length[:, None] - 1], drafts.reshape(count, -1)], axis=1)
        own = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, length[:, None] + depths)
        drawn = sample(jnp.log(chances)[fed].reshape(-1, vocabulary), own.reshape(-1), PLAIN).reshape(fed.shape)
        found = verify(drafts, drawn)
        text = text.at[rows, length[:, None] + jnp.arange(depth + 1)].set(found.tokens, mode="drop")
        return text, length + found.accepted + 1

    text, length = np.zeros((count, 1 + wanted + depth), "int32"), np.ones(count, "int32")
    for _ in range(wanted):
        text, length = map(np.array, write(text, length))
    assert (length > wanted).all()
    assert (length > wanted + 1).any()
    counts = np.zeros([vocabulary] * wanted)
    np.add.at(counts, tuple(text[:, 1 : 1 + wanted].T), 1)
    expected = count * np.einsum("i,ij,jk->ijk", chances[0], chances, chances)
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-squared with 63 degrees of freedom: larger in one of 1,000 runs.
    assert statistic < 103.4


# --- Texts ---


def texts(trained, prompts, count, speculation, sampling, keys):
    how = {"speculation": speculation, "sampling": sampling}
    progress = speculate.begin(*trained, prompts, keys, capacity=1024, **how)
    progress = speculate.speculate(*trained, progress, keys, until=count, **how)
    assert (progress.drawn >= count).all()
    assert (np.array(progress.lengths) - np.array(progress.drawn)).tolist() == list(map(len, prompts))
    drawn = [text[len(p) :][:count].tolist() for text, p in zip(np.array(progress.text), prompts, strict=True)]
    return drawn, progress


@pytest.mark.parametrize("_device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "speculation",
    [
        # Chains of drawn texts are verified by default, below, and with replay in test_scheduler.py.
        pytest.param(Speculation(), id="chain", marks=pytest.mark.nightly),
        pytest.param(Speculation(7, 2, shortest=1), id="tree"),
        pytest.param(Speculation(5, replay=12), id="replay", marks=pytest.mark.nightly),
    ],
)
@jax.default_matmul_precision("float32")  # a GPU's default has ten bits
def test_greedy_texts_are_those_of_plain_decoding(trained, speculation, _device):
    keys = jax.random.split(jax.random.key(0), len(TEXTS))
    drawn, progress = texts(trained, list(TEXTS), 200, speculation, GREEDY, keys)
    assert_same_texts(trained, drawn)
    calls, drafts, accepted = progress.counts
    np.testing.assert_array_equal(calls + accepted + 1, progress.drawn)
    assert (accepted < drafts).all()
    assert (accepted > 20).all()


def test_drawn_texts_are_those_of_plain_decoding_with_the_seed(trained):
    prompt = list(b"And the LORD said unto Moses, Speak unto")
    for seed in (1, 2):
        plain = list(generate.stream(*trained, prompt, 60, sampling=PLAIN, seed=seed))
        reports = []
        own = speculate.stream(
            *trained, prompt, 60, speculation=Speculation(4), sampling=PLAIN, seed=seed, report=reports.append
        )
        assert list(own) == plain
        assert len(reports) == 1
        assert 0 < reports[0].accepted < reports[0].drafts


@pytest.mark.parametrize("count", [0, 1, 32, 33, 70])
def test_a_stream_decodes_what_was_asked_and_no_more(small, count):
    reports = []
    how = {"speculation": Speculation(4, shortest=1), "sampling": GREEDY, "report": reports.append}
    assert len(list(speculate.stream(*small, [1, 2, 3], count, **how))) == count
    # The first token comes from the prompt; the last call may draw up to three more.
    drawn = reports[0].calls + reports[0].accepted + 1
    assert max(count, 1) <= drawn <= max(count, 1) + 3


def test_what_is_decoded_after_an_end_token_is_not_reported(small):
    """The device is at the next piece by then."""
    reports, options = [], {"speculation": Speculation(4, shortest=1), "sampling": GREEDY}
    text = list(speculate.stream(*small, [1, 2, 3], 32, **options, report=reports.append))
    ends = dataclasses.replace(TINY, eos_token_ids=(text[-1],))
    assert text[-1] in list(speculate.stream(ends, small[1], [1, 2, 3], 100, **options, report=reports.append))
    assert reports[1] == reports[0]


def test_texts_end_before_one_is_full(small):
    how = {"speculation": Speculation(4), "sampling": GREEDY}
    keys = jax.random.split(jax.random.key(0))
    progress = speculate.begin(*small, [[1] * 6, [5, 7]], keys, capacity=16, **how)
    progress = speculate.speculate(*small, progress, keys, until=100, **how)
    assert 12 < progress.lengths.max() <= 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((1,), "tokens: expected an int from 2 to 64, got 1"),
        ((8.0,), r"tokens: expected an int from 2 to 64, got 8\.0"),
        ((8, 0), "branches: expected an int from 1 to 63, got 0"),
        ((8, 2), "branches: expected a divisor of 7 drafts, got 2"),
        ((8, 1, 0), "shortest: expected an int from 1 to 64, got 0"),
        ((8, 1, 3, 16, 7), "replay: expected at least tokens, 8, got 7"),
        ((7, 2, 3, 16, 9), "replay: expected None with a tree, got 9"),
        ((8, 1, 5, 4), "longest: expected at least shortest, 5, got 4"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Speculation(*options)


def test_the_prompts_that_are_measured_are_those_of_the_texts():
    prompts = (KJV / "prompts.txt").read_text().splitlines()
    texts = json.loads((Path(__file__).parent / "greedy_texts.json").read_text())
    assert prompts == list(texts)
