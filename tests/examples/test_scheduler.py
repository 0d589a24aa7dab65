"""Continuous batching: who shares the batch changes nobody's text."""

import dataclasses

import numpy as np
import pytest
from small_models import first_layers

from mamba2_jax import checkpoint
from mamba2_jax.generate import KJV, stream
from mamba2_jax.prefix_cache import PrefixCache
from mamba2_jax.requests import Sequence
from mamba2_jax.sampling import Sampling
from mamba2_jax.scheduler import Scheduler
from mamba2_jax.speculate import Speculation

WIDTH = 4
PROMPTS = [b"In the beginning", b"And Moses said", b"Blessed are", b"T", b"The LORD is my", b"Behold, ", b"Who"]


@pytest.fixture(scope="module")
def trained():
    return first_layers(*checkpoint.load(KJV))


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


def test_the_logits_of_a_sequence_are_those_of_the_sequence_alone(trained):
    """Pieces of its prompt have other lengths beside others, and sums another order."""

    def logits(others):
        batch, request = scheduler(trained, piece=1), sequences()[4]
        batch.submit(request)
        found = {}
        for other in others:
            batch.submit(other)
        while not request.done:
            batch.advance()
            found[len(request.drawn)] = np.array(batch.batch.carry.logits[0])
        return np.stack([found[n] for n in sorted(found)])

    np.testing.assert_allclose(logits([]), logits(sequences()[:4] + sequences()[5:]), rtol=0, atol=1e-4)


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


def test_a_slot_s_next_owner_begins_from_zeros(trained):
    once, again = (Sequence(list(PROMPTS[0]), 20, seed=0) for _ in range(2))
    batch = scheduler(trained, width=1, slots=1)
    for request in (once, again):
        batch.submit(request)
    list(batch.run())
    assert again.drawn == once.drawn


def test_a_prompt_may_be_read_a_row_a_step(trained):
    assert decode(trained, sequences(), one_row=True) == decode(trained, sequences())


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
        slots = [running.slot for running in batch._places if running]
        assert len(slots) == len(set(slots)) <= WIDTH
        assert sorted([*slots, *batch._free_slots]) == list(range(WIDTH + 2))
    assert sorted(batch._free_slots) == list(range(WIDTH + 2))


REFUSED = {
    "no prompt": (Sequence([], 5), "prompt: expected at least one token, got none"),
    "a token beyond the vocabulary": (Sequence([7, 256], 5), "prompt: expected tokens from 0 to 255, got 256 at 1"),
    "a large token": (Sequence([2**31], 5), "prompt: expected tokens from 0 to 255, got 2147483648 at 0"),
    "a negative token": (Sequence([-1], 5), "prompt: expected tokens from 0 to 255, got -1 at 0"),
    "a token that is no int": (Sequence(["a"], 5), "prompt: expected tokens from 0 to 255, got 'a' at 0"),
    "no tokens to draw": (Sequence([7], 0), "count: expected an int of 1 or more, got 0"),
    "a count that is no int": (Sequence([7], 2.5), "count: expected an int of 1 or more, got 2.5"),
    **{
        f"seed {seed}": (Sequence([7], 5, seed=seed), rf"seed: expected an int from 0 to 2\*\*32 - 1, got {seed}")
        for seed in (-1, 2**32, None, 1.5)
    },
    "one with draws": (Sequence([7], 5, drawn=[1]), "sequence: expected a new one"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_request_is_refused_and_touches_nobody(trained, what):
    request, message = REFUSED[what]
    batch = scheduler(trained)
    with pytest.raises(ValueError, match=message):
        batch.submit(request)
    assert not batch._waiting
    if what != "one with draws" and request.count:
        with pytest.raises(ValueError, match=message.replace("of 1 or", "of 0 or")):
            stream(*trained, request.prompt, request.count, seed=request.seed)


def test_a_request_is_submitted_once_and_read_once(trained):
    expected = decode(trained, sequences()[:2])
    batch, (first, second) = scheduler(trained), sequences()[:2]
    for request in (first, second):
        batch.submit(request)
    for other in (batch, scheduler(trained)):
        with pytest.raises(ValueError, match="sequence: expected a new one, got one that was submitted before"):
            other.submit(first)
    with pytest.raises(TypeError, match="sequence: expected a Sequence, got list"):
        batch.submit([7])
    first.seed, first.count = -1, 10**9
    first.prompt.append(2**31)
    assert {request.seed for request, _ in batch.run()} == {-1, second.seed}
    assert {0: first.drawn, second.seed: second.drawn} == expected


def test_end_tokens_end_a_text(trained):
    config, weights = trained
    whole = decode(trained, sequences()[:3])
    ends = whole[1][7], whole[2][11]
    endings = {
        seed: next((i + 1 for i, t in enumerate(drawn) if t in ends), len(drawn)) for seed, drawn in whole.items()
    }
    assert endings[1] <= 8
    ending = dataclasses.replace(config, eos_token_ids=ends), weights
    requests = sequences()[:3]
    got = decode(ending, requests)
    assert got == {seed: drawn[: endings[seed]] for seed, drawn in whole.items()}
    assert {r.ended for r in requests if r.drawn[-1] in ends} == {"end token"}
    for request in requests:
        alone = list(stream(*ending, request.prompt, request.count, seed=request.seed))
        assert alone == whole[request.seed][: len(alone)]
        assert alone[-1] in ends or len(alone) == request.count


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_request_that_is_aborted_leaves_at_once(trained, when):
    """While it waits, while its prompt is read, and while it decodes; who comes next has its slot."""
    expected = decode(trained, [sequences()[1]])
    batch = scheduler(trained, width=1, slots=1, rows=8)
    first, second = sequences()[:2]
    for request in (first, second):
        batch.submit(request)
    for _ in range(when):
        batch.advance()
    before = list(first.drawn)
    batch.abort(first)
    assert {request.seed for request, _ in batch.run()} == {second.seed}
    assert (first.ended, first.drawn) == ("aborted", before)
    assert {second.seed: second.drawn} == expected
    batch.abort(second)
    assert second.ended == "count"


def test_decoding_goes_on_while_a_prompt_is_read(trained):
    """One row a step for who decodes, and no step has more rows than its budget."""
    batch = scheduler(trained, width=2, rows=9)
    first, long = sequences()[0], Sequence(list(b"And it came to pass, " * 4), 5, seed=9)
    batch.submit(first)
    while not first.drawn:
        batch.advance()
    batch.submit(long)
    drawn = len(first.drawn)
    for step in range(1, 11):
        batch.advance()
        assert len(first.drawn) == drawn + step
        assert next(r.read for r in batch._places if r and r.request is long) == 8 * step


@pytest.mark.parametrize("replay", [None, 8])
def test_each_sequence_is_verified_by_itself(trained, replay):
    """Beside pieces of prompts, with the same texts; drafts are taken back, and leave no trace in who comes next."""
    batch, requests = scheduler(trained, rows=40, speculation=Speculation(6, replay=replay)), sequences()
    for request in requests:
        batch.submit(request)
    list(batch.run())
    assert {request.seed: request.drawn for request in requests} == decode(trained, sequences())
    counts = batch.batch.counts
    assert 0 < counts.accepted < counts.drafts
    assert counts.calls + counts.accepted + len(requests) >= sum(len(request.drawn) for request in requests)


@pytest.mark.parametrize("speculation", [None, Speculation(4), Speculation(4, replay=4)], ids=str)
def test_prompts_that_begin_alike_start_from_a_snapshot(trained, speculation):
    begin = list(b"And the LORD spake unto Moses, saying, ")
    batch = scheduler(trained, width=2, rows=24, prefixes=3, prefix_stride=8, speculation=speculation)
    plain = decode(trained, [Sequence([*begin, tail], 12, seed=tail) for tail in b"ABC"])
    read = []
    for tail in b"ABC":
        request = Sequence([*begin, tail], 12, seed=tail)
        batch.submit(request)
        batch._admit()
        read.append(next(r.read for r in batch._places if r))
        list(batch.run())
        assert request.drawn == plain[tail]
    assert read == [0, 32, 32]


def test_what_a_prefix_cache_gives_up():
    cache = PrefixCache(2, 4)
    first, second, third = (tuple([n] * 9) for n in range(3))
    assert cache.longest(first) is None
    assert cache.keep(first, 0, 9) == 0
    assert cache.keep(first, 0, 8) == -1
    assert cache.longest(first) == (8, (0, 1))
    assert cache.longest(first[:8]) == (4, (0, 0))  # a token is left to read
    assert cache.keep(second, 0, 4) == 1
    assert cache.longest(second) == (4, (1, 0))
    assert cache.longest(first) is not None
    assert cache.keep(second, 0, 8) == 1  # the least recently used
    assert cache.keep(third, 4, 8) == 0
    assert cache.longest(first) is None
    assert cache.longest(second) == (8, (1, 1))
    assert cache.longest(third) == (8, (0, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 3}, "slots: expected at least the width 4, got 3"),
        ({"width": 0}, "width: expected an int of 1 or more, got 0"),
        ({"width": True}, "width: expected an int of 1 or more, got True"),
        ({"piece": 0}, "piece: expected an int of 1 or more, got 0"),
        ({"piece": 1.5}, "piece: expected an int of 1 or more, got 1.5"),
        ({"rows": 3}, "rows: expected an int of 4 or more, got 3"),
        ({"rows": 10, "prefixes": 4, "prefix_stride": 8}, "rows: expected an int of 11 or more, got 10"),
        ({"prefixes": 2}, "prefixes: expected an int of 4 or more, got 2"),
        ({"one_row": True, "prefixes": 4}, "one_row: expected neither prefixes nor speculation with it"),
        ({"one_row": True, "speculation": Speculation()}, "one_row: expected neither prefixes nor speculation with it"),
        ({"speculation": Speculation(7, 2)}, "speculation: expected one branch in packed rows, got 2"),
        ({"prefix_stride": 0}, "prefix_stride: expected an int of 1 or more, got 0"),
    ],
)
def test_wrong_options_are_refused_by_name(trained, options, message):
    with pytest.raises(ValueError, match=message):
        scheduler(trained, **options)
