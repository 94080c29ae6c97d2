"""The options of `braid generate`: what they do, print and refuse."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from braid_orchestrator.cli import run
from braid_orchestrator.cli.generate import _finite
from braid_orchestrator.client import Client
from braid_orchestrator.launcher import launch
from braid_orchestrator.settings import Settings
from cli_harness import TINY, Place, eventually

PROMPT = "def read(self, size=-1):\n    "


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Generate = Callable[..., Done]


@pytest.fixture(scope="module")
def address(place: Place) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BRAID_RUNTIME_DIR", str(place.runtime))
        settings = Settings(TINY, max_sequences=4, max_context=1024, pool_bytes=1 << 26, threads=1)
        with launch(settings, placement="embedded") as cell:
            yield cell.address


@pytest.fixture
def generate(address: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Generate]:
    """Runs `braid generate` in this process; the cell holds nothing in the end."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Done:
        code = run(["generate", "unused", *map(str, arguments), "--connect", address])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    yield call
    signal.signal(signal.SIGTERM, before)
    with Client(address) as client:
        assert eventually(lambda: not any(pool.used for pool in client.status().pools))


def test_help_has_sections(generate: Generate) -> None:
    text = generate("x", "--help").out
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        *("Length:", "Sampling:", "Stopping:", "Log-probabilities:", "Input and output:", "The cell:"),
    ]
    assert text.index("Stopping:") < text.index("--stop ") < text.index("Log-probabilities:")
    assert text.index("The cell:") < text.index("--placement")
    assert "-h, --help" in text and "PROMPT..." not in text.partition("Length:")[2]


def test_penalties_and_bias_change_what_is_made(generate: Generate) -> None:
    plain = generate("11 12 13", "--ids", "-n", 12).out.split()
    assert generate("11 12 13", "--ids", "-n", 5, "--logit-bias", "77=100").out.split() == ["77"] * 5
    spread = ("--frequency-penalty", 2, "--presence-penalty", 2, "--repetition-penalty", 3)
    other = generate("11 12 13", "--ids", "-n", 12, *spread).out.split()
    assert other != plain and len(set(other)) >= len(set(plain))


def test_stop_tokens_and_least_lengths(generate: Generate) -> None:
    certain = ("11 12 13", "--ids", "-n", 9, "--logit-bias", "77=100", "--stop-id", 77, "--json")
    (at_once,) = (generate(*certain)).said
    assert (at_once["token_ids"], at_once["finish_reason"], at_once["stop"]) == ([], "stop", 77)
    (later,) = (generate(*certain, "--min-tokens", 4)).said
    assert later["completion_tokens"] == 4 and later["stop"] == 77


def test_several_completions_in_order(generate: Generate) -> None:
    warm = ("-n", 6, "--temperature", 1.2)
    seeds = [generate("11 12 13", "--ids", *warm, "--seed", seed).out for seed in (7, 8, 9)]
    printed = generate("11 12 13", "--ids", *warm, "--seed", 7, "--completions", 3).out
    headers = [f"==> 11 12 13 ({number} of 3) <==\n" for number in (1, 2, 3)]
    assert printed == "".join(header + out for header, out in zip(headers, seeds, strict=True))
    two = (generate("11 12", "13", "--ids", *warm, "--completions", 2, "--json")).said
    assert [(item["prompt"], item["index"]) for item in two] == [
        *(([11, 12], 0), ([11, 12], 1), ([13], 0), ([13], 1)),
    ]


def test_json_tells_logprobs(generate: Generate) -> None:
    (plain,) = (generate("11 12 13", "--ids", "-n", 4, "--json")).said
    assert "logprobs" not in plain and plain["stop"] is None and plain["cached_tokens"] == 0
    asked = ("--logprobs", 2, "--prompt-logprobs", 0, "--json")
    (told,) = (generate("11 12 13", "--ids", "-n", 4, *asked)).said
    assert [entry["token_id"] for entry in told["logprobs"]] == told["token_ids"] == plain["token_ids"]
    for entry in told["logprobs"]:
        assert entry["top"][0] == [entry["token_id"], entry["logprob"]] and len(entry["top"]) == 2
    assert [entry["token_id"] for entry in told["prompt_logprobs"]] == [12, 13]


def test_what_cannot_be_is_null_in_json() -> None:
    assert _finite({"a": (1.5, [-math.inf]), "b": "x"}) == {"a": [1.5, [None]], "b": "x"}


def test_refusals_name_the_option(generate: Generate) -> None:
    for field, *options in (
        ("temperature", "--temperature", "nan"),
        ("presence_penalty", "--presence-penalty", 3),
        ("repetition_penalty", "--repetition-penalty", 0),
        ("logit_bias", "--logit-bias", "3000=1"),
        ("logit_bias", "--logit-bias", "3=inf"),
        ("logprobs", "--logprobs", 21),
        ("min_tokens", "--min-tokens", 65),
        ("n is 200", "--completions", 200),
        ("deadline_s", "--deadline", "-1"),
    ):
        done = generate("1", "--ids", *options)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error REQUEST_INVALID: ") and field in done.err, done
    late = generate("1", "--ids", "-n", 900, "--deadline", "0.05", "--json")
    assert late.code == 2 and late.err.startswith("error STEP_TIMEOUT: "), late
    usage = generate("1", "--ids", "--logit-bias", "3")
    assert usage.code == 2 and "ID=BIAS" in usage.err


def test_stop_strings_end_the_text(generate: Generate) -> None:
    how = ("-n", 0, "--ignore-eos", "--stop", "self", "--json")
    (first, second) = generate(PROMPT, PROMPT, *how, "--include-stop").said
    assert first == second
    assert first["stop"] == "self" and first["text"].endswith("self")
    (without,) = generate(PROMPT, *how).said
    assert without["text"] + "self" == first["text"]
