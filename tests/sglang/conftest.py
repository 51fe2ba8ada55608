"""The `--checkpoints` option, and the table at the end.

These tests are for the engine's own environment; elsewhere they are not collected.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# `find_spec` may also find this very folder, as a namespace without an origin.
_spec = importlib.util.find_spec("sglang")
if _spec is None or _spec.origin is None:
    collect_ignore_glob = ["test_*.py"]

TABLE = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoints", type=Path, help="the folder make_checkpoints.py wrote")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}


@pytest.fixture(scope="session")
def checkpoints(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--checkpoints")
    if folder is None:
        pytest.fail("Run make_checkpoints.py, then pass its output with --checkpoints")
    return folder


@pytest.fixture
def table(request: pytest.FixtureRequest) -> dict[str, str]:
    """What SGLang said of each checkpoint, to print when the session ends."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    lines = config.stash[TABLE]
    if lines:
        terminalreporter.section("what SGLang loads the checkpoints into")
        width = max(map(len, lines))
        for name, answer in sorted(lines.items()):
            terminalreporter.write_line(f"{name.ljust(width)}  {answer}")
