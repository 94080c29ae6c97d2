"""A model's tokenizer as one zip archive, for a frontend that turns text into tokens itself."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from braid_wire.errors import ConfigInvalid

CHUNK_BYTES = 64 * 1024

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "*.tiktoken",
)
"""A directory without any of these has no tokenizer."""

_BESIDES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)

# The earliest date that a zip entry can have: the same files make the same archive everywhere.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class TokenizerArchive:
    """A zip of the files that make up a tokenizer.

    Args:
        data: the archive.
    """

    data: bytes

    @classmethod
    def of(cls, model: Path) -> TokenizerArchive:
        """Pack the tokenizer of a checkpoint, with its chat template and its config; no weights.

        Raises:
            ConfigInvalid: the directory has no tokenizer, or a file of it cannot be read.
        """
        if not has_tokenizer(model):
            raise ConfigInvalid(f"{model.name} has no tokenizer; send token ids", field="tokenizer")
        buffer = io.BytesIO()
        try:
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in _found(model, _VOCABULARIES + _BESIDES):
                    entry = zipfile.ZipInfo(path.name, _DATE)
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise ConfigInvalid(
                f"the tokenizer in {model} cannot be read: {error}", field="tokenizer"
            ) from error
        return cls(buffer.getvalue())

    @property
    def sha256(self) -> str:
        """Of the archive, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The archive in pieces of at most `CHUNK_BYTES`, at least one."""
        for start in range(0, len(self.data), CHUNK_BYTES):
            yield self.data[start : start + CHUNK_BYTES]


def has_tokenizer(model: Path) -> bool:
    """Whether a checkpoint's directory holds one."""
    return bool(_found(model, _VOCABULARIES))


def _found(model: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files that are there, each once, by name."""
    return sorted({path for pattern in patterns for path in model.glob(pattern) if path.is_file()})
