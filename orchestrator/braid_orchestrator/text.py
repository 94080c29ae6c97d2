"""Text to tokens and back, where a model has a tokenizer; strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from braid_wire.errors import ConfigInvalid
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

_CONTEXT = 8
"""Tokens of a prompt that tell how the text goes on behind it."""
_UNFINISHED = "\ufffd"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        fast: a transformers tokenizer.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    @classmethod
    def load(cls, model: Path) -> Tokenizer | None:
        """The tokenizer in a checkpoint's directory; None where it has none.

        Raises:
            ConfigInvalid: it has one that cannot be read.
        """
        if not any((model / name).exists() for name in _FILES):
            return None
        try:
            return cls(AutoTokenizer.from_pretrained(model, local_files_only=True))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigInvalid(
                f"the tokenizer in {model} cannot be read: {error}", field="tokenizer"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model wants."""
        ids: list[int] = self._fast.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without special ones."""
        text: str = self._fast.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, before: Sequence[int] = ()) -> TextStream:
        """Decodes tokens one by one.

        Args:
            before: token ids that they follow; the text is what goes on behind theirs.
        """
        return TextStream(self._fast, list(before[-_CONTEXT:]))


class TextStream:
    """Turns tokens into text as they come; bytes that are not yet a character wait."""

    def __init__(self, fast: Any, before: list[int]) -> None:
        self._tokenizer = fast.backend_tokenizer
        # Some tokenizers drop the space that a text begins with, so its beginning must not be here. But
        # what follows half a character cannot be told from its text.
        known = not self._tokenizer.decode(before, skip_special_tokens=True).endswith(_UNFINISHED)
        self._stream = DecodeStream(ids=before if known else [], skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._stream.step(self._tokenizer, token) or ""


class StopStrings:
    """Lets text through until one of some strings has come.

    The text ends with the first character that completes a string (the longest one, where it
    completes several), so it does not matter in which pieces it comes.

    Args:
        strings: none of them empty.
        include: the string that ends the text is part of it.
    """

    def __init__(self, strings: Sequence[str], include: bool = False) -> None:
        self._stops = [_Stop(string) for string in strings]
        self._include = include
        self._held = ""

    def push(self, text: str, armed: bool = True) -> tuple[str, str | None]:
        """What may be given out, and the string that has ended the text.

        Args:
            text: what comes next.
            armed: False: a string that is completed by this text does not end it.
        """
        whole, before = self._held + text, len(self._held)
        for place, character in enumerate(text):
            complete = [stop.text for stop in self._stops if stop.completed_by(character)]
            if complete and armed:
                found = max(complete, key=len)
                end = before + place + 1
                self._held = ""
                return whole[: end if self._include else end - len(found)], found
        waiting = max((stop.matched for stop in self._stops), default=0)
        self._held = whole[len(whole) - waiting :]
        return whole[: len(whole) - waiting], None

    def rest(self) -> str:
        """What was held back because it might have become one of the strings."""
        rest, self._held = self._held, ""
        return rest


class _Stop:
    """How much of one string the text ends with (the automaton of Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # For every length, the longest shorter beginning of the string that it also ends with.
        self._shorter = [0, 0]
        for end in range(1, len(text)):
            length = self._shorter[end]
            while length and text[length] != text[end]:
                length = self._shorter[length]
            self._shorter.append(length + 1 if text[length] == text[end] else 0)

    def completed_by(self, character: str) -> bool:
        """Take the next character; whether the text ends with the string now."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._shorter[self.matched]
        if self.text[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.text):
            return False
        self.matched = self._shorter[self.matched]
        return True
