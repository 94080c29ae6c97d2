"""Text to tokens and back, where a model has a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from braid_wire.errors import ConfigInvalid
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

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

    def stream(self) -> TextStream:
        """Decodes tokens one by one."""
        return TextStream(self._fast)


class TextStream:
    """Turns tokens into text as they come; bytes that are not yet a character wait."""

    def __init__(self, fast: Any) -> None:
        self._tokenizer = fast.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        return self._stream.step(self._tokenizer, token) or ""
