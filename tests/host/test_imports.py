"""Which modules may import which: `host/` alone LLM-Compressor, and no imports form a cycle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import autoround_modifier

NAME = "autoround_modifier"
FOLDER = Path(autoround_modifier.__file__).parent
HOST_LIBRARIES = ("llmcompressor", "compressed_tensors")

# Rooms, that is folders and single files of the package. Each may import from the lines above its
# own, and from nothing else of the package.
ORDER = (
    (
        "command",
        "defaults",
        "device",
        "errors",
        "gguf_schemes",
        "parallel",
        "presets",
        "progress",
        "readable",
        "version",
    ),
    ("calibration", "config_sections", "fields", "formats", "locks", "scheme_names"),
    ("engines",),
    ("host", "recipe_files"),
    ("activations", "checkpoints", "scheme_catalogue"),
    ("blocks",),
    ("search", "tuning"),
    ("distillation", "runs"),
    ("exports", "hub", "report", "schemes"),
    ("inference",),
    ("evaluation", "inspection", "modifiers"),
    ("recipes", "run_outputs"),
    ("entrypoint", "recipe_composition"),
    ("api", "job", "planning"),
    ("release",),
    ("cli",),
    ("__main__",),
)
# Mathematics that can be used without the host: not even modules that these import use it.
WITHOUT_HOST = (
    "device",
    "evaluation.divergence",
    "formats",
    "parallel",
    "schemes.solver",
    "search.clipping_range",
    "search.float_search",
    "search.integer_search",
    "search.shared_scale",
    "search.super_block_search",
    "tuning.loss",
    "tuning.optimizer",
    "tuning.sampling",
)


def sources() -> dict[str, ast.Module]:
    """:return: name of a module without the package's -> what it contains; "" is the package"""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources()


def imported(module: str) -> set[str]:
    """:return: full names of what a module imports, anywhere in it: modules, or names in them"""
    found = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_modules(module: str) -> set[str]:
    """:return: modules of the package that a module imports, without the package's name"""
    found = set()
    for name in imported(module):
        if name.split(".")[0] == NAME:
            inner = name.removeprefix(f"{NAME}.")
            found.add(inner if inner in SOURCES else inner.rpartition(".")[0])
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_place():
    assert {room(module) for module in SOURCES} - {""} == {name for line in ORDER for name in line}


@pytest.mark.parametrize("module", SOURCES)
def test_one_room_knows_the_host(module):
    libraries = {name.split(".")[0] for name in imported(module)}
    assert "auto_round" not in libraries
    if room(module) != "host":
        assert not libraries.intersection(HOST_LIBRARIES)


@pytest.mark.parametrize("module", [module for module in SOURCES if module])
def test_imports_between_rooms_go_one_way(module):
    (place,) = [index for index, line in enumerate(ORDER) if room(module) in line]
    allowed = {name for line in ORDER[:place] for name in line} | {room(module)}
    assert {room(name) for name in own_modules(module)} <= allowed


@pytest.mark.parametrize("module", WITHOUT_HOST)
def test_mathematics_needs_no_host(module):
    reached, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += own_modules(current)
    assert not [name for name in reached if room(name) == "host"]


def test_each_host_file_has_a_contract_test():
    """Each file of `host/` has a test file here, and there are no others."""
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    files = {path.stem for path in (FOLDER / "host").glob("*.py")} - {"__init__"}
    assert tests == files | {"imports"}
