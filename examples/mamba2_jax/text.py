"""Text to tokens and back, as it comes."""

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mamba2_jax.config import Mamba2Config


class Tokenizer(Protocol):
    """What the examples need of one."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""

    def reader(self) -> Callable[[int], str]:
        """Return a function that takes the tokens of one sequence, one by one, and returns the text that each adds."""


class Bytes:
    """Each byte of UTF-8 is a token."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def reader(self) -> Callable[[int], str]:
        """Return a function from bytes to the characters that they complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


class FromFile:
    """The tokenizer of a ``tokenizer.json``, which the package ``tokenizers`` reads."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer as Loaded

        self._loaded = Loaded.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._loaded.encode(text).ids)

    def reader(self) -> Callable[[int], str]:
        """Return a function from tokens to what they add to the text; part of a character waits for the rest."""
        tokens: list[int] = []
        shown = ""

        def read(token: int) -> str:
            nonlocal shown
            tokens.append(token)
            text = self._loaded.decode(tokens)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""
            added, shown = text[len(shown) :], text
            return added

        return read


def tokenizer_of(folder: Path, config: Mamba2Config) -> Tokenizer:
    """Return the tokenizer of a checkpoint: its ``tokenizer.json``, or bytes where it has 256 tokens and none."""
    path = folder / "tokenizer.json"
    if path.exists():
        return FromFile(path)
    if config.vocab_size == 256:
        return Bytes()
    raise FileNotFoundError(f"{path}: needed for {config.vocab_size} tokens; only 256 can be bytes")
