"""
Runs recipes in a process that sees no accelerator.

    python cpu_run.py FILE RECIPE...

Writes recipe -> layer -> codes, as `runs.codes` returns them, by `torch.save`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
    os.environ[name] = ""  # before PyTorch is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from runs import codes, dense, run  # noqa: E402


def main(file: str, *recipes: str) -> None:
    if torch.accelerator.is_available():
        raise SystemExit("this process was to run on the CPU, but PyTorch finds an accelerator")
    torch.save({recipe: codes(run(dense("cpu"), recipe)) for recipe in recipes}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
