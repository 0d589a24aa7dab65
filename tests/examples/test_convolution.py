"""The convolution with its cache: packed rows, sequences that begin, and drafts that are taken back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import jax_array

from mamba2_jax import convolution
from mamba2_jax.convolution import Rows, after_rejected

CHANNELS, WIDTH = 3, 4
# One program each: JAX would compile each of their operations.
convolve, convolve_packed, histories, last_inputs, stored = map(
    jax.jit,
    (
        convolution.convolve,
        convolution.convolve_packed,
        convolution.histories,
        convolution.last_inputs,
        convolution.stored,
    ),
)
after_path = jax.jit(convolution.after_path, static_argnums=(0, 1))


@pytest.fixture
def layer(rng):
    return [jax_array(rng.standard_normal(s), jnp.float32) for s in ((CHANNELS, 1, WIDTH), (CHANNELS,))]


def exact(inputs, weight, bias):
    """Convolve one sequence from its beginning in float64."""
    padded = np.concatenate([np.zeros((WIDTH - 1, CHANNELS)), inputs])
    sums = [(padded[t : t + WIDTH] * np.array(weight)[:, 0].T).sum(0) + np.array(bias) for t in range(len(inputs))]
    return np.array(sums) / (1 + np.exp(-np.array(sums)))


def drawn(rng, *lengths):
    return [rng.standard_normal((length, CHANNELS)).astype("float32") for length in lengths]


def packed(pieces):
    edges = np.cumsum([0, *map(len, pieces)])
    return jax_array(np.concatenate(pieces)), Rows(jax_array(edges, jnp.int32))


def test_pieces_of_any_length_are_the_sequence(layer, rng):
    """Three sequences in pieces, some empty, some single tokens; slots that nobody names keep what they hold."""
    sequences = drawn(rng, 9, 7, 6)
    cache = jnp.full((5, WIDTH - 1, CHANNELS), jnp.nan)
    slots, done = jax_array([3, 0, 4]), [0, 0, 0]
    got = [[], [], []]
    for lengths in ((4, 1, 0), (0, 2, 6), (1, 1, 0), (4, 3, 0)):
        x, rows = packed([s[n : n + length] for s, n, length in zip(sequences, done, lengths, strict=True)])
        history = histories(cache, slots, has_initial_state=jax_array(done) > 0)
        y = np.array(convolve_packed(history, x, rows, *layer))
        last = last_inputs(history, x, rows, rows.lengths)
        cache = stored(cache, jnp.where(rows.lengths > 0, slots, -1), last)
        for i, length in enumerate(lengths):
            got[i].append(y[int(rows.starts[i]) :][:length])
            done[i] += length
    for pieces, sequence in zip(got, sequences, strict=True):
        np.testing.assert_allclose(np.concatenate(pieces), exact(sequence, *layer), rtol=1e-5, atol=1e-6)
    assert np.isnan(np.asarray(cache)[[1, 2]]).all()
    np.testing.assert_array_equal(cache[3], sequences[0][-3:])


def test_side_by_side_is_packed(layer, rng):
    x = jax_array(rng.standard_normal((2, 5, CHANNELS)), jnp.float32)
    history = jax_array(rng.standard_normal((2, 6, CHANNELS)), jnp.float32)
    rows = Rows(jax_array([0, 5, 10], jnp.int32))
    apart = convolve_packed(history, x.reshape(10, CHANNELS), rows, *layer).reshape(x.shape)
    np.testing.assert_allclose(convolve(history, x, *layer), apart, rtol=1e-6, atol=1e-6)


def test_rejected_drafts_are_taken_back(layer, rng):
    """A cache of as many more inputs as there are drafts; the next call forgets those that were rejected."""
    drafts, accepted = 4, [1, 4, 2]
    texts = drawn(rng, 8, 8, 8)
    cache, slots = jnp.zeros((3, WIDTH - 1 + drafts, CHANNELS)), jax_array([2, 0, 1])
    lengths, kept = [3, 3, 3], None
    for step in range(3):
        wrong = drawn(rng, *[drafts] * 3)
        pieces = [t[n : n + drafts] for t, n in zip(texts, lengths, strict=True)] if step else [t[:3] for t in texts]
        if step == 1:  # of the drafts, only the accepted ones are the text's
            pieces = [np.concatenate([p[:a], w[a:]]) for p, w, a in zip(pieces, wrong, accepted, strict=True)]
        x, rows = packed(pieces)
        history = histories(cache, slots, has_initial_state=jnp.full(3, step > 0), kept=kept)
        y = convolve_packed(history, x, rows, *layer)
        cache = stored(cache, slots, last_inputs(history, x, rows, rows.lengths))
        if step == 1:
            kept = after_rejected(cache.shape[1], jax_array([drafts - a for a in accepted]))
            lengths = [n + a for n, a in zip(lengths, accepted, strict=True)]
        if step == 2:
            for i, (text, n) in enumerate(zip(texts, lengths, strict=True)):
                own = np.array(y)[int(rows.starts[i]) : int(rows.starts[i]) + len(pieces[i])]
                np.testing.assert_allclose(own, exact(text, *layer)[n : n + drafts], rtol=1e-5, atol=1e-6)


def test_inputs_before_tokens_on_the_way(layer, rng):
    (one, other), old = drawn(rng, 5, 3), jax_array(rng.standard_normal((2, 3, CHANNELS)), jnp.float32)
    x, rows = packed([one, other])
    ends = jax_array([[1, 4], [2, 3]])
    found = last_inputs(old, x, rows, ends)
    for i, sequence in enumerate((one, other)):
        whole = np.concatenate([old[i], sequence])
        for j, end in enumerate(np.array(ends[i])):
            np.testing.assert_array_equal(found[i, j], whole[end : end + 3])


def test_trees_of_drafts(layer, rng):
    """Each token goes on after its parent, and the next call after any leaf; a chain is a tree."""
    parents = np.array([[-1, 0, 1, 0, 3, 4], [-1, 0, 1, 2, 3, 4]])
    tokens, leaves = parents.shape[1], jax_array([5, 3])
    before = drawn(rng, 5, 2)
    cache = jnp.zeros((2, WIDTH - 1 + tokens - 1, CHANNELS))
    x, rows = packed(before)
    begun = last_inputs(histories(cache, jnp.arange(2), has_initial_state=jnp.zeros(2, bool)), x, rows, rows.lengths)
    cache = stored(cache, jnp.arange(2), begun)
    inputs = np.stack(drawn(rng, tokens, tokens))
    history = histories(cache, jnp.arange(2))
    # By one operation after the other, whose bits do not depend on the program.
    y = convolution.convolve(history, jax_array(inputs), *layer, parents=jax_array(parents))
    chain = convolution.convolve(history, jax_array(inputs), *layer)
    np.testing.assert_array_equal(y[1], chain[1])
    cache = stored(cache, jnp.arange(2), jnp.concatenate([history, jax_array(inputs)], axis=1)[:, tokens:])
    kept = after_path(cache.shape[1], WIDTH, jax_array(parents), leaves)
    after = histories(cache, jnp.arange(2), kept=kept)
    for i in range(2):
        for token in range(tokens):
            path = [token]
            while path[0] > 0:
                path.insert(0, parents[i, path[0]])
            text = np.concatenate([before[i], inputs[i, path]])
            np.testing.assert_allclose(y[i, token], exact(text, *layer)[-1], rtol=1e-5, atol=1e-6)
            if token == leaves[i]:
                np.testing.assert_array_equal(after[i, -(WIDTH - 1) :], text[-(WIDTH - 1) :])


def test_what_is_kept_of_some_sequences_leaves_others_as_they_are(rng):
    cache = jax_array(rng.standard_normal((3, 6, CHANNELS)), jnp.float32)
    found = histories(cache, jax_array([2, 0]), kept=after_rejected(6, jax_array([2])))
    np.testing.assert_array_equal(found[0], np.concatenate([np.zeros((2, CHANNELS)), cache[2, :4]]))
    np.testing.assert_array_equal(found[1], cache[0])
