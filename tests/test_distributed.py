"""Several processes with a share of the samples each give what one gives with all of them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import saved_tensors
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "shared_run.py"


@functools.cache
def run(folder: Path, setting: str, processes: int) -> list[dict[str, torch.Tensor]]:
    """:return: what each process ended with"""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    folder = folder / f"{setting}-{processes}"
    subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), SCRIPT, folder, setting],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("setting", ["w2", "w4 static int8"])
def test_as_one_process(folder, setting, processes):
    (alone,) = run(folder, setting, 1)
    shared = run(folder, setting, processes)
    for tensors in shared:
        assert tensors.keys() == alone.keys()
        for name in set(alone) - {"losses"}:
            if name.endswith("weight"):  # of the same integers and scales
                torch.testing.assert_close(tensors[name], alone[name])
            elif tensors[name].is_floating_point():
                torch.testing.assert_close(tensors[name], alone[name], rtol=1e-6, atol=0)
            else:
                assert torch.equal(tensors[name], alone[name]), name
        assert torch.equal(tensors["losses"], shared[0]["losses"])  # one best iterate for all
        torch.testing.assert_close(tensors["losses"], alone["losses"], rtol=1e-5, atol=0)
    one, many = (saved_tensors(folder / f"{setting}-{n}" / "saved") for n in (1, processes))
    for name in one:
        if "packed" in name:
            assert torch.equal(one[name], many[name]), name
    blocks = sorted(path.name for path in (folder / f"{setting}-{processes}/blocks").glob("b*"))
    assert blocks == ["block-0000.safetensors", "block-0001.safetensors"]  # one process writes


def test_a_slow_process_reads_no_quantized_weight(folder):
    """Processes share the memory of the model: nobody writes before all have read."""
    (alone,) = run(folder, "slow", 1)
    assert (alone["losses"][:, 2] == 4).any()  # it is the last step's weight that is kept, so
    for tensors in run(folder, "slow", 2):  # nothing makes processes wait for each other after it
        for name in set(alone) - {"losses"}:
            torch.testing.assert_close(tensors[name], alone[name])


def test_processes_agree_in_bfloat16(folder):
    """
    Gradients are rounded to bfloat16 once for each process, so some signs differ from those of one
    process; but all processes end with the same integers, which are as good.
    """
    (alone,) = run(folder, "w2 bfloat16", 1)
    first, second = run(folder, "w2 bfloat16", 2)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    # Of the first block: the second is tuned on outputs of the first, which are not the same ones.
    torch.testing.assert_close(first["losses"][0, 1], alone["losses"][0, 1], rtol=0.05, atol=0)
