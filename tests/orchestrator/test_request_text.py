"""Text of requests: characters and stop strings across token boundaries."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from braid_orchestrator.text import StopStrings, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
# Few letters, so that strings overlap themselves and one another.
TEXTS = st.text("ab日🙂", max_size=24)
STOPS = st.lists(st.text("ab日🙂", min_size=1, max_size=5), min_size=1, max_size=4)


def ended(text: str, stops: list[str], include: bool, armed_from: int) -> tuple[str, str | None]:
    """Look behind every character for a string that ends there."""
    for end in range(armed_from + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(TEXTS, STOPS, st.lists(st.integers(0, 24), max_size=6), st.booleans(), st.integers(0, 3))
@settings(deadline=None, max_examples=500)
def test_a_text_ends_where_it_should_whatever_its_pieces(
    text: str, stops: list[str], cuts: list[int], include: bool, unarmed: int
) -> None:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[begin:end] for begin, end in itertools.pairwise(ends)]
    armed_from = sum(map(len, pieces[:unarmed]))
    expected, stop = ended(text, stops, include, armed_from)
    gate = StopStrings(stops, include)
    given_out, pushed, found = "", "", None
    for count, piece in enumerate(pieces):
        out, found = gate.push(piece, armed=count >= unarmed)
        given_out, pushed = given_out + out, pushed + piece
        if found is not None:
            break
        held = pushed[len(given_out) :]
        # No more is held back than may become a stop string, and no less.
        longest = max((n for stop in stops for n in range(len(stop)) if pushed.endswith(stop[:n])), default=0)
        assert held == pushed[len(pushed) - longest :]
    assert (given_out if found is not None else given_out + gate.rest(), found) == (expected, stop)
    assert gate.rest() == ""


def test_what_is_held_back_comes_as_soon_as_it_is_no_stop_string() -> None:
    gate = StopStrings(["\n\nclass"])
    assert [gate.push(piece)[0] for piece in ("x", "\n", "\n\n", "cl", "ose", "\n\ncla")] == [
        *("x", "", "\n", "", "\n\nclose", ""),
    ]
    assert gate.rest() == "\n\ncla" and gate.rest() == ""


def test_no_stop_strings_hold_nothing_back() -> None:
    gate = StopStrings(())
    assert gate.push("text") == ("text", None) and gate.rest() == ""


def spaced_tokenizer() -> Tokenizer:
    """A tokenizer whose words begin with their space, and that drops a text's first one."""
    words = ["<unk>", "▁hello", "▁world", "s", "<0xE6>", "<0x97>", "<0xA5>"]
    backend = Backend(models.BPE({word: n for n, word in enumerate(words)}, [], byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )

    class Fast:
        backend_tokenizer = backend

    return Tokenizer(Fast())


@pytest.mark.parametrize(
    ("before", "ids", "pieces"),
    [
        ([], [2, 3, 1], ["world", "s", " hello"]),
        ([1], [2, 3, 1], [" world", "s", " hello"]),
        ([1] * 20, [2, 4, 5, 6], [" world", "", "", "日"]),
        # A prompt that ends inside a character: what was its text already is not said again.
        ([1, 4], [3, 2], ["s", " world"]),
    ],
)
def test_text_goes_on_behind_the_prompt(before: list[int], ids: list[int], pieces: list[str]) -> None:
    stream = spaced_tokenizer().stream(before)
    assert [stream.push(token) for token in ids] == pieces


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = Tokenizer.load(TINY)
    assert tokenizer is not None
    text = "héllo 日本 🙂 x"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream(tokenizer.encode("before"))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and "" in pieces
    assert all("\ufffd" not in piece for piece in pieces)
