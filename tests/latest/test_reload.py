"""
Checkpoints of all recipes, reloaded by the newest Transformers and by releases of
compressed-tensors that engines fix: vLLM 0.32 0.17, SGLang 0.5.23 0.18.

What is known not to work is expected to fail, so that a release that works shows.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

FILES = (Path(__file__).parents[2] / "recipes").glob("*.yaml")
RECIPES = sorted(x.stem for x in FILES if not x.stem.startswith("gguf_"))  # those are of llama.cpp
RELEASES = ("0.17.0", "0.18.0", "0.19.0", "0.20.0")  # of compressed-tensors
PACKAGE, NEWEST = "the package's Transformers", "the newest Transformers"
ASYMMETRIC = {"w2a16_asym_autoround", "w3a16_asym_autoround", "w4a16_asym_autoround"}
THREE_BITS = {"w3a16_autoround", "w3a16_asym_autoround"}
FP8_CACHE = "w4a16_fp8_kv_autoround"
SEVERAL_GROUPS = ("w2a16_w4a16_mixed_autoround", "autoscheme_w2_w4_w8_autoround")


class Inexact(Exception):
    """A checkpoint is refused, or gives other logits, as it is known to."""


@dataclass(frozen=True)
class Fault:
    """
    :ivar reason: why a checkpoint does not give the logits of the model
    :ivar says: expression that the message matches
    """

    reason: str
    says: str


ZERO_POINTS = Fault(
    "compressed-tensors 0.18 and later do not pack zero points on the meta device, and "
    "Transformers 5.23 and later compare their shapes with the file's",
    "ignore_mismatched_sizes",
)
PACKED_THREE_BITS = Fault(
    "compressed-tensors 0.17 reads ten integers of 3 bits from a word; later releases write 32 "
    "into three words",
    r"ignore_mismatched_sizes|shapes cannot be multiplied|must match the size",
)
CACHE = Fault(
    "compressed-tensors finds attention by its argument `past_key_values`, which Transformers 5.24 "
    "calls `cache`, so that the key-value cache stays in 16 bits",
    r"unexpected_keys: .*k_scale|logits differ",
)
ONE_GROUP = Fault(
    "with `dequantize=True` Transformers reads all layers by the first config group",
    r"issues during automatic conversion|logits differ",
)


def known_fault(recipe: str, transformers: str, compressed_tensors: str) -> Fault | None:
    host, format = numbers(transformers), numbers(compressed_tensors)
    if recipe in THREE_BITS and format < (0, 18):
        return PACKED_THREE_BITS
    if recipe in ASYMMETRIC and host >= (5, 23) and format >= (0, 18):
        return ZERO_POINTS
    return CACHE if recipe == FP8_CACHE and host >= (5, 24) else None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@pytest.fixture(scope="session")
def reload(request: pytest.FixtureRequest, tmp_path_factory):
    """Run `reload.py` by an interpreter, with a release of compressed-tensors, once for each."""
    option = request.config.getoption
    checkpoints = option("--checkpoints").resolve()

    @functools.cache
    def run(host: str, release: str | None, *options: str) -> dict[str, Any]:
        python = option("--package-python").absolute() if host == PACKAGE else sys.executable
        site = "" if release is None else str((option("--sites") / release).resolve())
        output = tmp_path_factory.mktemp("reloaded") / "reloaded.json"
        script = Path(__file__).with_name("reload.py")
        subprocess.run(
            [str(python), str(script), str(checkpoints / "checkpoints"), str(output), *options],
            env={**os.environ, "PYTHONPATH": site, "HF_HUB_OFFLINE": "1"},
            check=True,
            capture_output=True,
        )
        return json.loads(output.read_text())

    in_memory = json.loads((checkpoints / "memory.json").read_text())["checkpoints"]

    def of_recipe(host: str, release: str | None, recipe: str, *options: str) -> tuple[Any, str]:
        """:return: the versions, and why a checkpoint is not exact; empty if it is"""
        found = run(host, release, *options)
        assert set(found["checkpoints"]) == set(in_memory)
        result = found["checkpoints"][recipe]
        if "refused" in result:
            return found["versions"], result["refused"]
        logits, expected = (torch.tensor(x["logits"]) for x in (result, in_memory[recipe]))
        gap = float((logits - expected).abs().max())
        return found["versions"], f"logits differ by {gap:.3g}" if gap else ""

    return of_recipe


def expect(request: pytest.FixtureRequest, fault: Fault | None, problem: str) -> None:
    """:raises Inexact: if the problem is that of the known fault"""
    if fault is None:
        assert not problem
        return
    request.applymarker(pytest.mark.xfail(strict=True, raises=Inexact, reason=fault.reason))
    if problem:
        assert re.search(fault.says, problem), problem
        raise Inexact(problem)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("host", [PACKAGE, NEWEST])
def test_the_logits_are_those_of_the_model_in_memory(host, release, recipe, reload, table, request):
    versions, problem = reload(host, release, recipe)
    assert versions["compressed-tensors"] == release
    line = table.setdefault(f"Transformers {versions['transformers']}, {release}", [])
    if problem:
        line.append(f"{recipe.removesuffix('_autoround')} ({problem[:40]})")
    expect(request, known_fault(recipe, versions["transformers"], release), problem)


@pytest.mark.parametrize("recipe", RECIPES)
def test_so_they_are_by_what_the_environment_has(recipe, reload, request):
    """Which is newer than what is fixed above if LATEST asks for it."""
    versions, problem = reload(NEWEST, None, recipe)
    fault = known_fault(recipe, versions["transformers"], versions["compressed-tensors"])
    expect(request, fault, problem)


@pytest.mark.parametrize("recipe", sorted(ASYMMETRIC))
def test_zero_points_are_read_where_weights_are_dequantized(recipe, reload):
    _, problem = reload(NEWEST, None, recipe, "--dequantize")
    assert not problem


@pytest.mark.parametrize("recipe", SEVERAL_GROUPS)
def test_dequantizing_reads_several_config_groups(recipe, reload, request):
    _, problem = reload(NEWEST, None, recipe, "--dequantize")
    expect(request, ONE_GROUP, problem)
