"""Memory beyond the model does not depend on the number of blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import disable_onloading, load_offloaded_model
from conftest import quantize, tiny_llama, weight_scheme
from helpers import saved_tensors
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier

SCRIPT = Path(__file__).parent / "memory_run.py"
# Modules, traced graphs and the allocator took 1 to 3 MiB for twelve more blocks; when the outputs
# of all blocks were kept, 25 to 28 MiB.
TOLERANCE = 6 * 2**20
# Freed tensors go back to the system at once, so that peaks do not depend on free space
EXACT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc")
def test_sixteen_blocks_take_no_more_than_four(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **EXACT}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kept = (16 - 4) * found["outputs"]
    for place in ("memory", "disk"):
        four, sixteen = found[place]
        assert sixteen - four < TOLERANCE < kept / 2, found


def test_a_model_on_the_disk_gives_the_same_checkpoint(tmp_path):
    def tuned(model, folder):
        scheme = weight_scheme(2)
        recipe = AutoRoundModifier(
            iters=2, batch_size=4, ignore=["lm_head"], config_groups={"group_0": scheme}
        )
        quantize(model, recipe, output_dir=folder)
        return saved_tensors(folder)

    model = tiny_llama()
    with load_offloaded_model():
        offloaded = AutoModelForCausalLM.from_pretrained(
            model.config._name_or_path,
            dtype=torch.bfloat16,
            device_map="auto_offload",
            max_memory={"cpu": 0},
            offload_folder=tmp_path / "offloaded",
        )
    with disable_onloading():
        assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    expected = tuned(model, tmp_path / "memory")
    found = tuned(offloaded, tmp_path / "disk")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
