"""Options that say how a prompt is continued."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from braid_orchestrator.cli.options import Command
from braid_orchestrator.client import GenerateOptions, Sampling

SECTIONS = {
    "Length": ("max_tokens", "min_tokens", "deadline", "completions"),
    "Sampling": (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
    ),
    "Stopping": ("stop", "stop_id", "include_stop", "ignore_eos"),
    "Log-probabilities": ("logprobs", "prompt_logprobs"),
}
"""Title of the help text → names of these options."""

_COUNT = click.IntRange(min=0)


class Bias(click.ParamType):
    """A token id and what is added to its logit: 17=-3.5."""

    name = "id=bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The pair."""
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not ID=BIAS, as in 17=-3.5", param, ctx)


def generation_options(command: Command) -> Command:
    """The options of `SECTIONS`; the command gets `max_tokens`, `sampling` and `options`."""

    @wraps(command)
    def call(**values: Any) -> Any:
        names = [name for section in SECTIONS.values() for name in section]
        given = {name: values.pop(name) for name in names}
        return command(
            max_tokens=given["max_tokens"] or None,
            sampling=_sampling(given),
            options=_options(given),
            **values,
        )

    wrapped: Command = call
    for option in reversed((*_length(), *_choosing(), *_stopping(), *_telling())):
        wrapped = option(wrapped)
    return wrapped


def _sampling(given: dict[str, Any]) -> Sampling:
    names = (*SECTIONS["Sampling"], *SECTIONS["Log-probabilities"], "min_tokens")
    return Sampling(
        **{name: given[name] for name in names if name != "logit_bias"}, logit_bias=dict(given["logit_bias"])
    )


def _options(given: dict[str, Any]) -> GenerateOptions:
    options = GenerateOptions(
        stop_token_ids=given["stop_id"],
        stop_strings=given["stop"],
        include_stop_str_in_output=given["include_stop"],
        ignore_eos=given["ignore_eos"],
        n=given["completions"],
    )
    if given["deadline"] is not None:
        options["deadline_s"] = given["deadline"]
    return options


def _length() -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option(
            "-n",
            "--max-tokens",
            type=_COUNT,
            default=64,
            show_default=True,
            help="Most tokens to make for each prompt; 0: as many as the context has room for.",
        ),
        click.option("--min-tokens", type=_COUNT, default=0, help="Let nothing stop it before so many."),
        click.option(
            "--deadline",
            type=float,
            metavar="SECONDS",
            help="Longest time for each prompt, waiting included.",
        ),
        click.option(
            "--completions",
            type=click.IntRange(min=1),
            default=1,
            help="Completions of each prompt; the seed of each is one above the last one's.",
        ),
    )


def _choosing() -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option("--temperature", type=float, default=0.0, help="0 (the default): the likeliest token."),
        click.option("--top-k", type=_COUNT, default=0, help="Keep the k likeliest tokens."),
        click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens of this mass."),
        click.option(
            "--min-p", type=float, default=0.0, help="Drop tokens below this fraction of the likeliest."
        ),
        click.option("--seed", type=_COUNT, help="Makes sampling repeatable."),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            help="Above 1: fewer tokens that stand in the prompt or were made.",
        ),
        click.option(
            "--presence-penalty", type=float, default=0.0, help="Above 0: fewer tokens that were made."
        ),
        click.option(
            "--frequency-penalty",
            type=float,
            default=0.0,
            help="Above 0: fewer tokens that were made, the more often the fewer.",
        ),
        click.option(
            "--logit-bias",
            type=Bias(),
            multiple=True,
            help="Makes a token likelier, or less likely; repeatable.",
        ),
    )


def _stopping() -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
        click.option("--stop-id", type=_COUNT, multiple=True, help="End before this token; repeatable."),
        click.option("--include-stop", is_flag=True, help="Print the text that ended it, too."),
        click.option("--ignore-eos", is_flag=True, help="Go on behind the model's own end tokens."),
    )


def _telling() -> tuple[Callable[[Command], Command], ...]:
    return (
        click.option(
            "--logprobs", type=_COUNT, help="With --json: of every token made, and of so many others there."
        ),
        click.option("--prompt-logprobs", type=_COUNT, help="The same for the prompt's tokens."),
    )
