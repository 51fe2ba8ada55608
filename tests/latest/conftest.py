"""Options of these tests, and the table at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

TABLE = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoints", type=Path, help="the folder make_checkpoints.py wrote")
    parser.addoption("--package-python", type=Path, help="interpreter of the package's environment")
    parser.addoption(
        "--sites", type=Path, help="folder with one release of compressed-tensors in each folder"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = {}


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """Versions -> recipes that do not reload exactly, to print when the session ends."""
    return request.config.stash[TABLE]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    terminalreporter.section("recipes whose checkpoint does not give the logits of its model")
    for versions, recipes in config.stash[TABLE].items():
        terminalreporter.write_line(f"{versions}: {', '.join(sorted(recipes)) or 'none'}")
