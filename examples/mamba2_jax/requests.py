"""Requests to the scheduler, and the progress of each."""

import dataclasses


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request, and what came of it. What it asks for is read when it is submitted, and not again.

    Attributes:
        prompt: its tokens, at least one.
        count: how many tokens to draw.
        seed: of its draws, which do not depend on who else is in the batch.
        drawn: the tokens so far.
        ended: why there will be no more: "count", "end token" or "aborted"; "" while there will be.
    """

    prompt: list[int]
    count: int
    seed: int = 0
    drawn: list[int] = dataclasses.field(default_factory=list)
    ended: str = ""
    _submitted: bool = False

    @property
    def done(self) -> bool:
        """Whether there will be no more tokens."""
        return bool(self.ended)


@dataclasses.dataclass(eq=False)
class Running:
    """A request as it was submitted, and how far it has got.

    Attributes:
        request: it; its tokens are drawn into that.
        prompt, count, seed: of the request.
        slot: of the state cache.
        read: how many tokens of the prompt have been.
        accepted, rejected: how many drafts of the last call were.
    """

    request: Sequence
    prompt: tuple[int, ...]
    count: int
    seed: int
    slot: int = -1
    read: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def unread(self) -> int:
        """How many tokens of the prompt are left to read."""
        return len(self.prompt) - self.read


Present = list[tuple[int, Running]]  # who is in the batch, with their places
