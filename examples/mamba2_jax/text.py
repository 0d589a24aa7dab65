"""Text to tokens and back, as it comes."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mamba2_jax.config import Mamba2Config


class Reader(Protocol):
    """Reads the tokens of one sequence, one by one."""

    def __call__(self, token: int) -> str:
        """Return the text that a token adds; part of a character waits for the rest."""

    def rest(self) -> str:
        """Return the text that still waits when the sequence has ended."""


class Tokenizer(Protocol):
    """What the examples need of one."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def reader(self) -> "Reader":
        """Return what reads the tokens of one sequence."""


class Bytes:
    """Each byte of UTF-8 is a token."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def reader(self) -> Reader:
        """Return what makes characters of bytes."""
        return _BytesReader()


class _BytesReader:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


class FromFile:
    """The tokenizer of a ``tokenizer.json``, which the package ``tokenizers`` reads."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Loaded

        self._loaded = Loaded.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._loaded.encode(text).ids)

    def reader(self) -> Reader:
        """Return what makes text of tokens."""
        return _FileReader(self._loaded.decode)


class _FileReader:
    """Decodes tokens together with those before them, because what a token adds depends on them."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # From the last two times that text was shown: what a token adds needs no more of what came before.
        self._tokens: list[int] = []
        self._shown = 0

    def __call__(self, token: int) -> str:
        self._tokens.append(token)
        # Part of a character decodes to this one; so does the character itself, which then comes with what follows it.
        return "" if self._decode(self._tokens).endswith("\N{REPLACEMENT CHARACTER}") else self.rest()

    def rest(self) -> str:
        added = self._decode(self._tokens)[len(self._decode(self._tokens[: self._shown])) :]
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return added


def tokenizer_of(folder: Path, config: Mamba2Config) -> Tokenizer:
    """Return the tokenizer of a checkpoint: its ``tokenizer.json``, or bytes where it has 256 tokens and none."""
    path = folder / "tokenizer.json"
    if path.exists():
        return FromFile(path)
    if config.vocab_size == 256:
        return Bytes()
    raise FileNotFoundError(f"{path}: needed for {config.vocab_size} tokens; only 256 can be bytes")
