"""
Kills a run twenty times, and lets it go on each time; a program of its own, so that it can fork.
A run kills itself after a random number of tuning steps and file operations, so that the moments
do not depend on the speed of the machine.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import quantize, tiny_llama, weight_scheme
from helpers import integers, quantized_layers
from safetensors.torch import load_file, save_file

from autoround_modifier import AutoRoundModifier
from autoround_modifier.runs import checkpoint
from autoround_modifier.tuning.optimizer import SignSGD

KILLS = 20
LATEST = 50  # of some 90 moments of a whole run


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


def kill_at(moment: int) -> None:
    """Let this process kill itself before its ``moment``-th tuning step or file operation."""
    left = moment

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    os.fsync = counting(os.fsync)
    Path.replace = counting(Path.replace)
    Path.unlink = counting(Path.unlink)
    checkpoint.save_file = counting(checkpoint.save_file)
    SignSGD.end_step = counting(SignSGD.end_step)


def start(checkpoint_dir: Path, result: Path, moment: int | None = None) -> int:
    """
    :param moment: when the run kills itself; None for never
    :return: the status of its process
    """
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        if moment is not None:
            kill_at(moment)
        run(checkpoint_dir, result)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tiny_llama(num_layers=6)
    start(folder / "whole", folder / "whole.safetensors")
    whole = load_file(folder / "whole.safetensors")

    moments = random.Random(0)
    attempt, finished, same = 0, [], []
    while len(finished) < KILLS or not same:
        checkpoint_dir, result = folder / f"run{attempt}", folder / f"run{attempt}.safetensors"
        moment = moments.randrange(LATEST) if len(finished) < KILLS else None
        status = start(checkpoint_dir, result, moment)
        if os.WIFSIGNALED(status):
            blocks = sorted(checkpoint_dir.glob("block-*.safetensors"))
            for block in blocks:
                load_file(block)  # whole, each of them
            finished.append(len(blocks))
        else:  # it had ended before that moment, or nobody kills any more
            tensors = load_file(result)
            same.append(all(torch.equal(tensors[name], whole[name]) for name in whole))
            attempt += 1
    print(json.dumps({"kills": len(finished), "finished": finished, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
