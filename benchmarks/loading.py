"""
Memory and speed of a quantized model in Python: `load` with each backend, beside Transformers' own.

    make bench-loading

SmolLM2-135M is rounded to 4 and to 2 bits (symmetric, groups of 64). Each backend loads it in a
process of its own: the peak of its memory (``VmHWM``) and what is resident afterwards count from
before the model, with all that is imported. Then it continues a text, always by its first choice,
one token at a time. Time is that of the processor, in one thread, so that other work on the machine
counts little; the best of several runs counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from child import current_rss, report, run_child
from transformers import AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import save_smollm2

from autoround_modifier import load, quantize
from autoround_modifier.inference.backends import BACKENDS
from autoround_modifier.runs.files import write_atomically

BITS = (4, 2)
TEXT = "The history of the city begins with a small harbour that"
RUNS = 3
MIB = 2**20
UNPACKED = "transformers"


def save_checkpoint(source: str, bits: int, folder: Path) -> None:
    """Round SmolLM2 without tuning: what is measured does not depend on the integers."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights | {"strategy": "group", "group_size": 64}}
    quantize(source, {"group_0": group}, preset="rtn", output_dir=folder)


def peak() -> int:
    """:return: the most bytes that were resident since `reset_peak`"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def settle() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def packed_bytes(model: PreTrainedModel) -> int:
    """:return: of all tensors of the model, each once"""
    tensors = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@torch.no_grad()
def measure(folder: str, backend: str, dtype: str, tokens: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt")
    if backend not in (UNPACKED, "torch", "torch-int4"):
        _import(backend)
    settle()
    before = current_rss()
    reset_peak()
    started = time.process_time()
    model = load(folder, backend, device="cpu", dtype=getattr(torch, dtype))
    loading = time.process_time() - started
    loading_peak = peak() - before
    options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    times, written = [], None
    model.generate(**ids, max_new_tokens=2, **options)  # Transformers unpacks here
    settle()
    used = current_rss() - before
    for _ in range(RUNS):
        started = time.process_time()
        written = model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        times.append(time.process_time() - started)
    prompt = ids["input_ids"].repeat(1, 24)[:, :256]
    first = []
    for _ in range(RUNS):
        started = time.process_time()
        model(prompt)
        first.append(time.process_time() - started)
    assert written is not None
    return {
        "backend": backend,
        "dtype": dtype,
        "loading_seconds": loading,
        "loading_peak": loading_peak,
        "resident_after_running": used,
        "peak": peak() - before,
        "tensor_bytes": packed_bytes(model),
        "tokens_per_second": tokens / min(times),
        "prompt_tokens_per_second": prompt.shape[1] / min(first),
        "written": written[0].tolist(),
        "logits": model(ids["input_ids"]).logits[0].float().tolist(),
    }


def _import(backend: str) -> None:
    """Import what a backend imports, so that this does not count as memory of the model."""
    package = next(one.package for one in BACKENDS if one.name == backend)
    if package is not None:
        importlib.import_module(package)


def compared(result: dict[str, Any], unpacked: dict[str, Any]) -> dict[str, Any]:
    """:return: the result with how far it is from Transformers' own"""
    pairs = zip(result["written"], unpacked["written"], strict=True)
    logits, reference = (torch.tensor(one["logits"]) for one in (result, unpacked))
    kept = {name: value for name, value in result.items() if name not in ("logits", "written")}
    return kept | {
        "equal_tokens": sum(a == b for a, b in pairs),
        "tokens": len(result["written"]),
        "largest_gap": float((logits - reference).abs().max()),
        "largest_logit": float(reference.abs().max()),
        "speed_ratio": result["tokens_per_second"] / unpacked["tokens_per_second"],
        "prompt_speed_ratio": (
            result["prompt_tokens_per_second"] / unpacked["prompt_tokens_per_second"]
        ),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| checkpoint | dtype | backend | tensors | resident | peak | "
        "tokens per second | prompt | tokens equal | largest gap of logits |",
        "| --- " * 10 + "|",
    ]
    for one in results:
        cells = (
            one["checkpoint"],
            one["dtype"],
            f"`{one['backend']}`",
            f"{one['tensor_bytes'] / MIB:.0f} MiB",
            f"{one['resident_after_running'] / MIB:.0f} MiB",
            f"{one['peak'] / MIB:.0f} MiB",
            f"{one['tokens_per_second']:.1f} ({one['speed_ratio']:.2f})",
            f"{one['prompt_tokens_per_second']:.0f} ({one['prompt_speed_ratio']:.2f})",
            f"{one['equal_tokens']}/{one['tokens']}",
            f"{one['largest_gap']:.1e} of {one['largest_logit']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--source", help="folder of SmolLM2-135M")
    parser.add_argument("--checkpoints", nargs="*", default=(), help="NAME=FOLDER of finished ones")
    parser.add_argument("--backends", nargs="*", help="all that are installed, if not given")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        report(measure(*arguments.child, arguments.tokens))
        return
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = dict(one.split("=", 1) for one in arguments.checkpoints)
        if not folders:
            source = arguments.source or str(save_smollm2())
            for bits in BITS:
                folders[f"W{bits}"] = str(Path(scratch) / f"w{bits}")
                save_checkpoint(source, bits, Path(folders[f"W{bits}"]))
        names = arguments.backends or [one.name for one in BACKENDS if one.is_installed]
        for checkpoint, folder in folders.items():
            for dtype in arguments.dtypes:
                unpacked = None
                for backend in (UNPACKED, *names):
                    command = [__file__, "--tokens", str(arguments.tokens), "--child", folder]
                    try:
                        result = run_child(*command, backend, dtype)
                    except RuntimeError as error:
                        print(f"{checkpoint} {dtype} {backend}: {error}", file=sys.stderr)
                        continue
                    unpacked = unpacked or result
                    results.append({"checkpoint": checkpoint, **compared(result, unpacked)})
                    print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if arguments.output:
        text = json.dumps({"torch": torch.__version__, "results": results}, indent=2)
        write_atomically(arguments.output, f"{text}\n")


if __name__ == "__main__":
    main()
