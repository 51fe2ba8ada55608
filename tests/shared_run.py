"""
One run, by as many processes as `torchrun` starts, each with its share of the samples.

    torchrun --nproc-per-node 2 shared_run.py FOLDER SETTING

Every process writes the integers and scales it ended with; the first one also saves the model.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from compressed_tensors.distributed import init_dist
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from helpers import quantized_layers
from safetensors.torch import save_file

from autoround_modifier import AutoRoundModifier
from autoround_modifier.tuning import Tuner

STATIC = {"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}
# "slow": the second process is late in reading the weights that all of them share
SETTINGS: dict[str, tuple[torch.dtype, dict]] = {
    "w2": (torch.float32, {"config_groups": {"group_0": weight_scheme(2)}}),
    "w4 static int8": (torch.float32, {"config_groups": {"group_0": weight_scheme(4) | STATIC}}),
    "fp8": (torch.float32, {"scheme": "FP8"}),
    "slow": (
        torch.float32,
        {"config_groups": {"group_0": weight_scheme(2)}, "iters": 4, "holdout_evaluations": 1},
    ),
    "w2 bfloat16": (torch.bfloat16, {"config_groups": {"group_0": weight_scheme(2)}}),
}


def main(folder: Path, setting: str) -> None:
    torch.set_num_threads(1)
    dtype, fields = SETTINGS[setting]
    tiny_llama(dtype)  # written to disk while every process is still alone
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if torch.accelerator.is_available():
            init_dist()
        else:  # `init_dist` wants an accelerator
            dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 1 and setting.endswith("slow"):
        original = Tuner._quantized
        Tuner._quantized = lambda self: time.sleep(0.5) or original(self)
    modifier = AutoRoundModifier(
        batch_size=4,
        num_calibration_samples=14,  # of 16
        ignore=["lm_head"],
        checkpoint_dir=str(folder / "blocks"),
        **{"iters": 8, **fields},
    )
    model = quantize(tiny_llama(dtype), modifier, token_samples(16), num_calibration_samples=16)
    tensors = {}
    for name, layer in quantized_layers(model).items():
        for part, value in layer.state_dict().items():
            tensors[f"{name}.{part}"] = value.clone()
    losses = [(x.initial_loss, x.best_loss, x.best_iteration) for x in modifier.block_reports]
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"rank{rank}.safetensors")
    model.save_pretrained(folder / "saved", save_compressed=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
