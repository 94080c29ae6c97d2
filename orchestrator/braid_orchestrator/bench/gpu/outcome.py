"""What a check found."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from braid_wire.errors import RequestInvalid

PASSED, FAILED, ERROR, TIMEOUT, SKIPPED = "passed", "failed", "error", "timeout", "skipped"

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


class Skip(Exception):
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Measure:
    """One figure; `bound` is empty where nothing was promised of it."""

    name: str
    value: float | str
    unit: str = ""
    bound: str = ""

    @property
    def holds(self) -> bool:
        """Whether the bound is kept; NaN keeps none.

        Raises:
            RequestInvalid: the bound is none, such as ">= 0.8".
        """
        if not self.bound:
            return True
        sign, _, text = self.bound.partition(" ")
        if sign not in _COMPARE or isinstance(self.value, str):
            raise RequestInvalid(f"{self.name} has bound {self.bound!r}; it must be '>= x' or '<= x'")
        return _COMPARE[sign](self.value, float(text))


@dataclass
class Outcome:
    """One check: how it ended, why, and its figures."""

    check: str
    status: str = PASSED
    cause: str = ""
    seconds: float = 0.0
    measures: list[Measure] = field(default_factory=list)

    def note(self, name: str, value: float | str, unit: str = "", bound: str = "") -> None:
        """Add a figure; one that breaks its bound fails the check, which goes on."""
        measure = Measure(name, round(value, 6) if isinstance(value, float) else value, unit, bound)
        self.measures.append(measure)
        if not measure.holds:
            self.status = FAILED
            self.cause = "; ".join(filter(None, (self.cause, f"{name} is {measure.value}, not {bound}")))

    def to_json(self) -> dict[str, Any]:
        """JSON of it."""
        return {**asdict(self), "measures": [{**asdict(m), "holds": m.holds} for m in self.measures]}

    def write(self, path: Path) -> None:
        """To a file, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.to_json()))
        part.rename(path)

    @classmethod
    def read(cls, path: Path) -> Outcome:
        """What `write` wrote."""
        found = json.loads(path.read_text())
        keys = ("name", "value", "unit", "bound")
        measures = [Measure(**{key: one[key] for key in keys}) for one in found.pop("measures")]
        return cls(**found, measures=measures)
