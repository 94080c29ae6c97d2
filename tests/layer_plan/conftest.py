"""Configs for the layer-plan tests: the ones kept beside the tests, and shared ones where present."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def configs() -> dict[str, dict[str, Any]]:
    """File stem → config, of every config kept beside the tests."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((HERE / "configs").glob("*.json"))}


@pytest.fixture
def config(configs: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    """A private copy of one config (indirect parameter: its stem)."""
    return copy.deepcopy(configs[request.param])
