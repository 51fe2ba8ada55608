"""
Kills a run twenty times, and lets it go on each time; a program of its own, so that it can fork.

    python killed_run.py FOLDER

Prints one JSON line: kills, finished blocks at each kill, and whether the integers at the end are
those of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import quantize, tiny_llama, weight_scheme
from helpers import integers, quantized_layers
from safetensors.torch import load_file, save_file

from autoround_modifier import AutoRoundModifier

KILLS = 20


def run(checkpoint_dir: Path, result: Path) -> None:
    modifier = AutoRoundModifier(
        iters=6,
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(2)},
        checkpoint_dir=str(checkpoint_dir),
    )
    model = quantize(tiny_llama(num_layers=6), modifier)
    layers = quantized_layers(model).items()
    save_file({name: integers(layer) for name, layer in layers}, result)


def start(checkpoint_dir: Path, result: Path) -> int:
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        run(checkpoint_dir, result)
        os._exit(0)
    return child


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tiny_llama(num_layers=6)
    began = time.monotonic()
    os.waitpid(start(folder / "whole", folder / "whole.safetensors"), 0)
    duration = time.monotonic() - began
    whole = load_file(folder / "whole.safetensors")

    moments = random.Random(0)
    attempt, finished, same = 0, [], []
    while len(finished) < KILLS or not same:
        checkpoint_dir, result = folder / f"run{attempt}", folder / f"run{attempt}.safetensors"
        child = start(checkpoint_dir, result)
        if len(finished) < KILLS:
            time.sleep(moments.uniform(0, 0.7 * duration))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            blocks = sorted(checkpoint_dir.glob("block-*.safetensors"))
            for block in blocks:
                load_file(block)  # whole, each of them
            finished.append(len(blocks))
        else:  # it was faster than the kill, or nobody kills any more
            tensors = load_file(result)
            same.append(all(torch.equal(tensors[name], whole[name]) for name in whole))
            attempt += 1
    print(json.dumps({"kills": len(finished), "finished": finished, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
