"""Continuous batching: who shares the batch changes nobody's text."""

import numpy as np
import pytest

from mamba2_jax import checkpoint
from mamba2_jax.generate import KJV, stream
from mamba2_jax.sampling import Sampling
from mamba2_jax.scheduler import Scheduler, Sequence

WIDTH = 4
PROMPTS = [b"In the beginning", b"And Moses said", b"Blessed are", b"T", b"The LORD is my", b"Behold, ", b"Who"]


@pytest.fixture(scope="module")
def trained():
    return checkpoint.load(KJV)


def scheduler(trained, **options):
    return Scheduler(*trained, **{"width": WIDTH, "slots": WIDTH + 2, **options})


def sequences():
    return [Sequence(list(prompt), count=20 + 9 * i, seed=i) for i, prompt in enumerate(PROMPTS)]


def decode(trained, requests, **options):
    batch = scheduler(trained, **options)
    for request in requests:
        batch.submit(request)
    seen = [(request.seed, token) for request, token in batch.run()]
    for request in requests:
        assert [token for seed, token in seen if seed == request.seed] == request.drawn
    return {request.seed: request.drawn for request in requests}


def test_each_text_is_the_one_of_the_sequence_alone(trained):
    together = decode(trained, sequences())
    assert {seed: len(drawn) for seed, drawn in together.items()} == {r.seed: r.count for r in sequences()}
    for request in sequences():
        assert decode(trained, [request])[request.seed] == together[request.seed]


def test_the_logits_of_a_sequence_have_the_bits_of_the_sequence_alone(trained):
    def logits(others):
        batch, request = scheduler(trained), sequences()[4]
        batch.submit(request)
        found = []
        for other in others:
            batch.submit(other)
        while not request.done:
            batch.advance()
            found.append(np.array(batch._carry.logits[0]))
        return np.stack(found)

    assert np.array_equal(logits([]), logits(sequences()[:4] + sequences()[5:]))


def test_a_sequence_may_join_while_others_decode(trained):
    first, late = sequences()[5:]
    batch = scheduler(trained)
    batch.submit(first)
    for _ in range(3):
        batch.advance()
    assert first.drawn
    batch.submit(late)
    both = {sequence.seed for sequence, _ in batch.run()}
    assert both == {first.seed, late.seed}
    assert late.drawn == decode(trained, [sequences()[6]])[6]


def test_a_slot_is_cleared_for_its_next_owner(trained):
    once, again = (Sequence(list(PROMPTS[0]), 20, seed=0) for _ in range(2))
    batch = scheduler(trained, width=1, slots=1)
    for request in (once, again):
        batch.submit(request)
    assert {sequence.slot for sequence, _ in batch.run()} <= {0, -1}
    assert again.drawn == once.drawn


@pytest.mark.parametrize("piece", [1, 5, 64])
def test_the_length_of_a_piece_changes_no_text(trained, piece):
    assert decode(trained, sequences()[:2], piece=piece) == decode(trained, sequences()[:2])


def test_slots_are_taken_and_given_back(trained):
    batch = scheduler(trained, sampling=Sampling(temperature=0))
    requests = sequences()
    for request in requests:
        batch.submit(request)
    while not all(request.done for request in requests):
        batch.advance()
        slots = [request.slot for request in requests if request.slot >= 0]
        assert len(slots) == len(set(slots)) <= WIDTH
        assert all(request.slot == -1 for request in requests if request.done)
    assert sorted(batch._free_slots) == list(range(WIDTH + 2))


def test_an_empty_prompt_is_refused(trained):
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        scheduler(trained).submit(Sequence([], 5))
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        next(stream(*trained, [], 5))


def test_fewer_slots_than_places_are_refused(trained):
    with pytest.raises(ValueError, match="slots: expected at least the width 4, got 3"):
        scheduler(trained, slots=3)
