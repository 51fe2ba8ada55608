"""The `--checkpoints` option, one test for each exported checkpoint, and a record of results.

A test module names its engine in ``ENGINE`` and the packages whose versions matter in
``PACKAGES``. A test with the argument `case` says by ``@pytest.mark.cases(FORMATS, only=...)``
which it gets. What `record` is given is written to ``results/ENGINE.json`` beside the checkpoints,
from which ``table.py`` makes a table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


@dataclass(frozen=True)
class Case:
    """
    :ivar row: name of a row of ``rows.py``
    :ivar format: to which it was exported
    :ivar path: the exported folder, or file
    :ivar folder: of the row, with ``checkpoint``, ``dense`` and ``reference.safetensors``
    """

    row: str
    format: str
    path: Path
    folder: Path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoints", type=Path, help="the folder that make_checkpoints.py wrote")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "cases(formats, only, smollm2): beginnings of the names of formats; whether a row in a "
        "format is taken; whether it is SmolLM2, not a tiny model",
    )
    config.stash[RESULTS] = {}


def checkpoints_of(config: pytest.Config) -> Path:
    folder = config.getoption("--checkpoints")
    if folder is None:
        raise pytest.UsageError("Run make_checkpoints.py, then name its output: --checkpoints")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    folder = checkpoints_of(metafunc.config)
    mark = next(metafunc.definition.iter_markers("cases"))
    formats, only = mark.args[0], mark.kwargs.get("only", lambda row, format: True)
    cases = [
        Case(entry["row"], entry["format"], folder / entry["path"], folder / entry["row"])
        for entry in json.loads((folder / "exports.json").read_text())
        if "path" in entry
        and entry["format"].startswith(formats)
        and entry["row"].startswith("smollm2") == mark.kwargs.get("smollm2", False)
        and only(entry["row"], entry["format"])
    ]
    if not cases:
        raise pytest.UsageError(f"{folder} has no checkpoint for {metafunc.function.__name__}")
    metafunc.parametrize("case", cases, ids=[f"{case.format}-{case.row}" for case in cases])


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keeps what was found of a case; call it before what may fail."""
    engine, found = request.module.ENGINE, request.config.stash[RESULTS]

    def keep(case: Case, said: str, **facts: Any) -> None:
        entry = {"row": case.row, "format": case.format, "said": said, **facts}
        found.setdefault(engine, []).append(entry)

    return keep


def pytest_sessionfinish(session: pytest.Session) -> None:
    for engine, entries in session.config.stash[RESULTS].items():
        path = checkpoints_of(session.config) / "results" / f"{engine}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        modules = {item.module for item in session.items if engine == item.module.ENGINE}
        packages = {name for module in modules for name in module.PACKAGES}
        versions = {name: version(name) for name in sorted(packages)}
        path.write_text(json.dumps({"versions": versions, "results": entries}, indent=1))
