"""Settings of the engine, the `--checkpoints` option and the table at the end.

These tests are for the engine's own environment; elsewhere they are not collected.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# `find_spec` may also find this very folder, as a namespace without an origin.
_spec = importlib.util.find_spec("vllm")
if _spec is None or _spec.origin is None:
    collect_ignore_glob = ["test_*.py"]

# Read by vLLM when it is imported or starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_INT4_W4A8="0",  # on CPUs with AMX the default also quantizes activations
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process, where our kernel is registered
    VLLM_LOGGING_LEVEL="ERROR",
)

TABLE = pytest.StashKey[list[tuple[str, ...]]]()
ARCHITECTURES = pytest.StashKey[list[tuple[str, ...]]]()
HEADER = (
    *("row", "dtype", "loaded", "vLLM's own CPU kernel", "kernel used"),
    *("mean gap (allowed)", "max gap (allowed)", "same greedy tokens", "text"),
)
ARCHITECTURES_HEADER = (
    *("architecture", "family", "runs", "vLLM's class", "gap in float32"),
    *("gap in bfloat16 (of Transformers)", "kernels, or why not"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoints", type=Path, help="the folder make_checkpoints.py wrote")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = []
    config.stash[ARCHITECTURES] = []


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> list[tuple[str, ...]]:
    """Lines to print when the session ends."""
    return request.config.stash[TABLE]


@pytest.fixture(scope="session")
def architectures(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    """Lines of a Markdown table, written beside the checkpoints when the session ends."""
    found = request.config.stash[ARCHITECTURES]
    yield found
    lines = [ARCHITECTURES_HEADER, ("---",) * len(ARCHITECTURES_HEADER), *found]
    path = request.config.getoption("--checkpoints") / "architectures.md"
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoints(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--checkpoints")
    if folder is None:
        pytest.fail("Run make_checkpoints.py, then pass its output with --checkpoints")
    return folder


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.stash[TABLE]:
        return
    blank = ("",) * len(HEADER)
    lines = [HEADER, *((*line, *blank)[: len(HEADER)] for line in config.stash[TABLE])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    terminalreporter.section("log-probabilities: vLLM against Transformers, in nats")
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
