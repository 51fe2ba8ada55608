"""
Quantizes with Intel's `auto-round`, in an environment of its own (`make auto-round`): its newest
release needs another Transformers than LLM-Compressor allows.

    .venv-auto-round/bin/python benchmarks/auto_round_child.py FOLDER

``FOLDER`` holds ``task.json`` (``model``, a path, and ``settings``, arguments of `AutoRound`) and
``tokens.safetensors`` (``input_ids``, (samples, tokens)). Into it are written
``weights.safetensors``, the dequantized weights of all layers that changed, and ``result.json``;
where the task has a ``format``, what auto-round saves in that format instead of the weights.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    tokens = load_file(folder / "tokens.safetensors")["input_ids"]
    torch.manual_seed(task["settings"]["seed"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    started, cpu_started = time.perf_counter(), time.process_time()
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(task["model"]),
        dataset=list(tokens.split(task["settings"]["batch_size"])),
        device_map=str(torch.accelerator.current_accelerator(check_available=True) or "cpu"),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        **task["settings"],
    )
    result = {"version": importlib.metadata.version("auto-round")}
    if "format" in task:
        rounder.quantize_and_save(str(folder), format=task["format"])
    else:
        rounder.quantize()
    result["seconds"] = time.perf_counter() - started
    result["cpu_seconds"] = time.process_time() - cpu_started
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    if "format" not in task:
        after = model.state_dict()
        changed = {
            name: after[name].contiguous()
            for name, value in before.items()
            if name in after and not torch.equal(after[name], value)
        }
        save_file(changed, folder / "weights.safetensors")
        result["layers"] = len(changed)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
