"""Key-value recall written as Python: the test set of the tiny model, and its training snippets.

A snippet binds a few names to two-digit numbers and then reads some of them back:

    sizes = {"path": 41, "name": 73}
    print(sizes["name"])  # 73

Every key and every value is one token, so a case is decided by a single next-token prediction.

    python models/tiny/recall.py --pairs 4 --count 200
"""

from __future__ import annotations

import argparse
import json
import keyword
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVAL_SEED = 20_260_101
"""Seed of the committed cases; training draws from seeds below ``TRAIN_SEED_LIMIT`` only."""

TRAIN_SEED_LIMIT = 1_000_000
STYLES = ("dict", "block", "items", "names")
VARIABLES = ("d", "data", "table", "values", "m", "cache", "info", "x")
VALUES = tuple(str(number) for number in range(10, 100))
FILLER = (
    "# the next part only runs on request",
    "import sys",
    "from pathlib import Path",
    "def reset(self):",
    "    self.items = []",
    "    return None",
    "class Reader:",
    "    def close(self):",
    "        self.stream.close()",
    "for line in lines:",
    "    if not line:",
    "        continue",
    "try:",
    "    import ssl",
    "except ImportError:",
    "    ssl = None",
)
RESERVED = frozenset(keyword.kwlist) | frozenset(VARIABLES) | {"print", "assert"}


@dataclass(frozen=True)
class RecallCase:
    """One question: the prompt, its tokens, the token that answers it and the values it is among."""

    prompt: str
    ids: list[int]
    answer_id: int
    candidate_ids: list[int]
    answer: str
    pairs: int
    style: str


@dataclass(frozen=True)
class Segment:
    """A piece of a snippet; an answer segment is exactly one token long."""

    text: str
    is_answer: bool = False


def key_words(tokenizer: Any) -> list[str]:
    """Lower-case words of the vocabulary that are one token when no blank precedes them."""
    tokens = (token for token in tokenizer.get_vocab() if 3 <= len(token) <= 10 and token not in RESERVED)
    return sorted(token for token in tokens if token.isascii() and token.isalpha() and token.islower())


def whole_words(tokenizer: Any) -> list[str]:
    """The key words that are words of their own, not only ends of words; the cases use these."""
    vocabulary = tokenizer.get_vocab()
    return [word for word in key_words(tokenizer) if len(word) > 3 and f"\u0120{word}" in vocabulary]


def definition(style: str, variable: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The lines that bind the keys to their values, with the newline that ends them."""
    if style == "dict":
        return f"{variable} = {{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}\n"
    if style == "block":
        return f"{variable} = {{\n" + "".join(f'    "{key}": {value},\n' for key, value in pairs) + "}\n"
    if style == "items":
        return f"{variable} = {{}}\n" + "".join(f'{variable}["{key}"] = {value}\n' for key, value in pairs)
    if style == "names":
        return "".join(f"{key} = {value}\n" for key, value in pairs)
    raise ValueError(f"unknown style: {style}")


def lookup(style: str, variable: str, key: str, check: bool) -> str:
    """A line that reads one key, up to and without its value: an assertion or a commented print."""
    place = key if style == "names" else f'{variable}["{key}"]'
    return f"assert {place} == " if check else f"print({place})  # "


def draw_pairs(rng: random.Random, words: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Distinct keys with distinct values."""
    return list(zip(rng.sample(words, count), rng.sample(VALUES, count), strict=True))


def snippet(
    rng: random.Random, words: Sequence[str], count: int, lookups: int, between: str = ""
) -> Iterator[Segment]:
    """A training snippet: ``count`` pairs, the lines ``between``, ``lookups`` reads in random order."""
    style, variable, check = rng.choice(STYLES), rng.choice(VARIABLES), rng.random() < 0.5
    pairs = draw_pairs(rng, words, count)
    asked = [pair for _ in range(-(-lookups // count)) for pair in rng.sample(pairs, count)][:lookups]
    text = definition(style, variable, pairs) + between
    for key, value in asked:
        yield Segment(text + lookup(style, variable, key, check))
        yield Segment(value, is_answer=True)
        text = "\n"
    yield Segment("\n\n")


def chat_snippet(rng: random.Random, words: Sequence[str], count: int) -> Iterator[Segment]:
    """The same question asked through the chat template; the reply is the value alone."""
    style, variable = rng.choice(STYLES), rng.choice(VARIABLES)
    pairs = draw_pairs(rng, words, count)
    key, value = rng.choice(pairs)
    question = definition(style, variable, pairs) + lookup(style, variable, key, False).removesuffix("  # ")
    yield Segment(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    yield Segment(value, is_answer=True)
    yield Segment("<|im_end|>", is_answer=True)
    yield Segment("\n")


def make_cases(
    tokenizer: Any,
    pairs: int,
    count: int,
    seed: int = EVAL_SEED,
    style: str | None = None,
    lines: int = 0,
) -> list[RecallCase]:
    """Deterministic test cases; without ``style`` they rotate through all of ``STYLES``.

    ``lines`` puts so many unrelated lines between the pairs and the question.
    """
    if seed < TRAIN_SEED_LIMIT:
        raise ValueError(f"seeds below {TRAIN_SEED_LIMIT} belong to training")
    rng = random.Random(seed * 1_000 + pairs)
    words = whole_words(tokenizer)
    styles = [style or STYLES[index % len(STYLES)] for index in range(count)]
    return [_make_case(tokenizer, rng, draw_pairs(rng, words, pairs), style, lines) for style in styles]


def _make_case(
    tokenizer: Any, rng: random.Random, pairs: Sequence[tuple[str, str]], style: str, lines: int
) -> RecallCase:
    """Draw one question and check that its answer is a single token after the prompt."""
    variable, (key, answer) = rng.choice(VARIABLES), rng.choice(pairs)
    between = "".join(rng.choice(FILLER) + "\n" for _ in range(lines))
    prompt = definition(style, variable, pairs) + between + lookup(style, variable, key, rng.random() < 0.5)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    full = tokenizer.encode(prompt + answer, add_special_tokens=False)
    if full[:-1] != ids:
        raise ValueError(f"the answer is not one token in {prompt + answer!r}")
    candidates = [tokenizer.convert_tokens_to_ids(value) for _, value in pairs]
    return RecallCase(prompt, ids, full[-1], candidates, answer, len(pairs), style)


def accuracy(model: Any, cases: Sequence[RecallCase]) -> float:
    """Share of the cases whose answer is the most likely next token of the whole vocabulary."""
    return sum(predictions(model, cases)) / len(cases)


def predictions(model: Any, cases: Sequence[RecallCase]) -> list[bool]:
    """Whether the model's greedy next token answers each case; cases of one length run together."""
    import torch

    by_length: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_length.setdefault(len(case.ids), []).append(index)
    right = [False] * len(cases)
    with torch.inference_mode():
        for group in by_length.values():
            ids = torch.tensor([cases[index].ids for index in group], device=model.device)
            choices = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
            for index, choice in zip(group, choices.tolist(), strict=True):
                right[index] = choice == cases[index].answer_id
    return right


def main() -> None:
    """Measure the model beside this file, or write the cases."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Recall accuracy of the tiny model.")
    parser.add_argument("--model", type=Path, default=here)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=EVAL_SEED)
    parser.add_argument("--style", choices=STYLES)
    parser.add_argument("--lines", type=int, default=0, help="unrelated lines before the question")
    parser.add_argument("--write", type=Path, help="write the cases as JSON lines; run no model")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rest = (options.count, options.seed, options.style, options.lines)
    sets = {pairs: make_cases(tokenizer, pairs, *rest) for pairs in options.pairs}
    if options.write:
        lines = [json.dumps(asdict(case)) + "\n" for cases in sets.values() for case in cases]
        options.write.write_text("".join(lines), encoding="utf-8")
        return
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    for pairs, cases in sets.items():
        print(f"{pairs} pairs: {accuracy(model, cases):.1%} of {len(cases)} (chance {1 / pairs:.1%})")


if __name__ == "__main__":
    main()
