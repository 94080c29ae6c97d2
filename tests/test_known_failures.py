"""The tests that `docs/KNOWN_FAILURES.md` names are there; and no definition hides another one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs" / "KNOWN_FAILURES.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE)
PACKAGES = ("wire", "kernels", "full_attn_svc", "linear_attn_svc", "orchestrator")
# What may stand before a second definition of a name.
SEVERAL = {"overload", "setter", "getter", "deleter", "register"}


def test_every_failure_has_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and not line.startswith("| failure")]
    assert len(rows) >= 25
    assert all("::test_" in row for row in rows)


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_is_there(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name for other, name in NAMED if other == file} <= defined


def twice(tree: ast.AST) -> Iterator[str]:
    """Names of functions that a class or a module defines a second time."""
    for scope in ast.walk(tree):
        if not isinstance(scope, ast.ClassDef | ast.Module):
            continue
        seen: set[str] = set()
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            marks = {re.split(r"[.(]", ast.unparse(one))[-1] for one in node.decorator_list}
            if node.name in seen and not marks & SEVERAL:
                yield node.name
            seen.add(node.name)


def test_nothing_is_defined_twice() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): list(twice(ast.parse(file.read_text()))) for file in files}
    assert {file: names for file, names in found.items() if names} == {}
    hidden = "class Wrapper:\n    def plan(self): ...\n    def plan(self): ...\n"
    assert list(twice(ast.parse(hidden))) == ["plan"]
