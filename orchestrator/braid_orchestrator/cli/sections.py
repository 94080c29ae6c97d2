"""Help texts whose options stand in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

_HELP = "help"
"""What sections call the help option, whatever click does."""


class SectionedCommand(click.Command):
    """A command that shows its options in sections.

    Args:
        sections: title → names of the parameters below it, in their order.
        rest: title of all others.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], rest: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self._sections = sections
        self._rest = rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        options = (parameter for parameter in self.params if isinstance(parameter, click.Option))
        shown = ((option.name, option.get_help_record(ctx)) for option in options)
        records = {name: record for name, record in shown if record is not None}
        help_option = self.get_help_option(ctx)
        if help_option is not None and (record := help_option.get_help_record(ctx)) is not None:
            records[_HELP] = record
        for title, names in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section(self._rest):
            formatter.write_dl(list(records.values()))
