"""
K-quants of one model by llama.cpp, by auto-round and by this package, measured in llama.cpp.

    make bench-gguf MODEL=path/to/model TEXT=path/to/text.jsonl

``TEXT`` is a JSON-lines file with a field ``text``; lines with ``"split": "calib"`` calibrate and
lines with ``"split": "eval"`` evaluate. ``MODEL`` must be one that llama.cpp's converter takes, and
must not have been in a GGUF file (`off_grid.py`). Everyone gets the same samples and one thread,
and makes a file of its own; embeddings and head are Q8_0. The files are then compared with that of
the model in 16 bits. What is done already is kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from child import report, run_child
from datasets import Dataset
from export_engines import PREFIX
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from autoround_modifier import AutoRoundModifier, export, oneshot, text_dataset
from autoround_modifier.gguf_schemes import GGUF_TYPES
from autoround_modifier.runs.files import write_atomically

FOLDER = Path(__file__).parent
SCHEMES = ("q2_k_s", "q4_k_m")
# Method -> name in the table
METHODS = {
    "llama": "llama-quantize",
    "llama_imatrix": "llama-quantize, importance matrix",
    "auto_round_0": "auto-round, `iters=0`",
    "auto_round": "auto-round, tuned, `enable_alg_ext`",
    "ours_0": "this package, `iters: 0`",
    "ours": "this package, tuned",
    "ours_q5_0": "this package, tuned, Q5_0 where Q2_K falls back",
}
SETTINGS = {
    "auto_round_0": {"iters": 0},
    "auto_round": {"iters": 50, "enable_alg_ext": True},
    "ours_0": {"iters": 0},
    "ours": {"iters": 50},
    "ours_q5_0": {"iters": 50},
}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}


# ------------------------------------------------------------------------------ what is written


class Work:
    """
    :param folder: of the files
    :param model: checkpoint in 16 bits
    :param batch_size: samples of a step
    """

    def __init__(self, folder: Path, model: Path, batch_size: int, seed: int):
        self.folder, self.model = folder, model
        self.batch_size, self.seed = batch_size, seed
        self.original = folder / "f16.gguf"
        self.calibration = folder / "calibration.safetensors"
        self.evaluation = folder / "evaluation.npy"
        self.imatrix = folder / "imatrix.npz"
        self.reference = folder / "reference.npy"

    def file(self, scheme: str, method: str) -> Path:
        return self.folder / f"{scheme}-{method}.gguf"

    def facts(self, scheme: str, method: str) -> Path:
        """:return: file with seconds and settings"""
        return self.file(scheme, method).with_suffix(".json")

    def record(self, scheme: str, method: str, facts: dict[str, Any]) -> None:
        write_atomically(self.facts(scheme, method), json.dumps(facts))


def save_tokens(work: Work, text: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """
    :param sizes: split -> samples, and tokens of each
    """
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    bos = True if tokenizer.bos_token is not None else None
    found = {
        split: torch.tensor(
            text_dataset(text, tokenizer, count, length, add_bos_token=bos, split=split)[
                "input_ids"
            ]
        )
        for split, (count, length) in sizes.items()
    }
    np.save(work.evaluation, found["eval"].numpy())
    save_file({"input_ids": found["calib"]}, work.calibration)


def convert(work: Work, llama_cpp: Path) -> None:
    """llama.cpp's own converter"""
    script = llama_cpp / "convert_hf_to_gguf.py"
    options = ["--outtype", "f16", "--outfile", str(work.original)]
    subprocess.run([sys.executable, str(script), str(work.model), *options], check=True)


@torch.no_grad()
def save_importance(work: Work) -> dict[str, float]:
    """
    The importance matrix of llama.cpp, of all calibration samples: mean squares of the inputs of
    each layer, by tensor name.

    :return: seconds
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            squares = arguments[0].float().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(f"model.{name}"))
    tokens = load_file(work.calibration)["input_ids"]
    for ids in tokens.split(work.batch_size):
        model.model(ids)
    architecture = architecture_of(work.original)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    found = {
        f"{names.get_name(name)}.weight": (total / tokens.numel()).numpy()
        for name, total in sums.items()
    }
    np.savez(work.imatrix, **found)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def architecture_of(path: Path) -> gguf.MODEL_ARCH:
    name = gguf.GGUFReader(path).fields["general.architecture"].contents()
    return next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


# ------------------------------------------------------------------------------------- methods


def llama(python: str, *arguments: str) -> Any:
    """:return: what `gguf_llama.py` found"""
    command = [python, str(FOLDER / "gguf_llama.py"), *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in run.stdout.splitlines() if line.startswith(PREFIX))
    return json.loads(line.removeprefix(PREFIX))


def run_llama(work: Work, scheme: str, method: str, python: str) -> None:
    imatrix = [str(work.imatrix)] if method == "llama_imatrix" else []
    paths = str(work.original), str(work.file(scheme, method))
    blocks = AutoConfig.from_pretrained(work.model).num_hidden_layers
    work.record(scheme, method, llama(python, "quantize", *paths, scheme, str(blocks), *imatrix))


def run_auto_round(work: Work, scheme: str, method: str, python: str) -> None:
    name = f"gguf:{scheme}"
    settings = {"scheme": name, "batch_size": work.batch_size, "seed": work.seed}
    settings |= SETTINGS[method]
    with tempfile.TemporaryDirectory(dir=work.folder) as temporary:
        folder = Path(temporary)
        task = {"model": str(work.model), "format": name, "settings": settings}
        (folder / "task.json").write_text(json.dumps(task))
        shutil.copyfile(work.calibration, folder / "tokens.safetensors")
        child = str(FOLDER / "auto_round_child.py")
        # Its converter needs names that no release of `gguf` has yet.
        newer = os.environ | {"PYTHONPATH": str(Path(os.environ["LLAMA_CPP_ROOT"]) / "gguf-py")}
        del newer["LLAMA_CPP_ROOT"]
        subprocess.run([python, child, str(folder)], check=True, stdout=sys.stderr, env=newer)
        result = json.loads((folder / "result.json").read_text())
        (found,) = folder.rglob("*.gguf")
        found.rename(work.file(scheme, method))
    work.record(scheme, method, {**result, "settings": settings})


def run_ours(work: Work, scheme: str, method: str) -> dict[str, Any]:
    """Quantize and export; the only work of a child process."""
    name = f"gguf:{scheme}"
    settings = {"preset": "default", "batch_size": work.batch_size, "seed": work.seed}
    settings |= SETTINGS[method]
    if method == "ours_q5_0":  # as auto-round chooses
        GGUF_TYPES["q2_k"] = replace(GGUF_TYPES["q2_k"], fallback="q5_0")
    torch.manual_seed(work.seed)
    ids = load_file(work.calibration)["input_ids"]
    mask = torch.ones_like(ids).tolist()
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask})
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16)
    started, cpu_started = time.perf_counter(), time.process_time()
    recipe = [AutoRoundModifier(scheme=name, ignore=["lm_head"], **settings)]
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe, output_dir=folder)
        vocabulary = work.model / "tokenizer.model"  # which Transformers does not write again
        if vocabulary.exists():
            shutil.copy(vocabulary, folder)
        export(
            folder,
            name,
            work.file(scheme, method),
            embeddings="q8_0",
        )
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "settings": settings,
    }


def make(work: Work, scheme: str, method: str, pythons: dict[str, str]) -> None:
    """Write the file and its facts."""
    if method == "llama_imatrix" and not work.imatrix.exists():
        print(f"importance matrix: {save_importance(work)}", flush=True)
    if method.startswith("llama"):
        run_llama(work, scheme, method, pythons["llama"])
    elif method.startswith("auto_round"):
        run_auto_round(work, scheme, method, pythons["auto_round"])
    else:
        command = [__file__, *sys.argv[1:], "--row", scheme, method]
        work.record(scheme, method, run_child(*command))


# --------------------------------------------------------------------------------------- table


def sizes_of(path: Path) -> dict[str, Any]:
    tensors = gguf.GGUFReader(path).tensors
    blocks = [x for x in tensors if x.name.startswith("blk.") and len(x.shape) > 1]
    weights = sum(int(x.n_elements) for x in blocks)
    return {
        "bytes": path.stat().st_size,
        "block_bits": 8 * sum(int(x.n_bytes) for x in blocks) / weights,
        "types": dict(Counter(x.tensor_type.name for x in blocks)),
        "embeddings": next(x.tensor_type.name for x in tensors if x.name == "token_embd.weight"),
    }


def markdown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| scheme | by | KL from F16 | KL of the worst text | same top token | perplexity "
        "| file, MB | bits per weight of the blocks | types of the blocks | CPU seconds |",
        "| --- " * 10 + "|",
    ]
    for row in results:
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(row["types"].items()))
        seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else ""
        lines.append(
            f"| {row['scheme']} | {METHODS.get(row['method'], row['method'])} | {row['kl']:.4f} "
            f"| {max(row['kl_per_sample']):.3f} | {row['top1']:.1%} | {row['perplexity']:.2f} "
            f"| {row['bytes'] / 1e6:.1f} | {row['block_bits']:.2f} | {types} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def measure(work: Work, scheme: str, method: str, path: Path, python: str) -> dict[str, Any]:
    """:return: a row of the table, which is recorded"""
    facts = work.facts(scheme, method)
    known = json.loads(facts.read_text()) if facts.exists() else {}
    if "kl" not in known:
        if not work.reference.exists():
            temporary = work.reference.with_suffix(".part")
            llama(python, "reference", *map(str, (work.evaluation, work.original, temporary)))
            temporary.rename(work.reference)
        known |= llama(python, "measure", *map(str, (work.evaluation, path, work.reference)))
        known |= {"scheme": scheme, "method": method, **sizes_of(path)}
        work.record(scheme, method, known)
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("output/gguf"), help="folder")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="source, with the converter")
    parser.add_argument("--llama-cpp-python", required=True, help="of llama-cpp-python")
    parser.add_argument("--auto-round-python", required=True)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eval-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = Work(arguments.output, arguments.model, arguments.batch_size, arguments.seed)
    if arguments.row:
        report(run_ours(work, *arguments.row))
        return

    os.environ.update(ONE_THREAD, LLAMA_CPP_ROOT=str(arguments.llama_cpp))
    work.folder.mkdir(parents=True, exist_ok=True)
    if not work.calibration.exists():
        sizes = {
            "calib": (arguments.samples, arguments.length),
            "eval": (arguments.eval_samples, arguments.eval_length),
        }
        save_tokens(work, arguments.text, sizes)
    if not work.original.exists():
        convert(work, arguments.llama_cpp)
    pythons = {"llama": arguments.llama_cpp_python, "auto_round": arguments.auto_round_python}
    results = [measure(work, "", "F16", work.original, pythons["llama"])]
    for scheme in arguments.schemes:
        for method in arguments.methods:
            if method == "ours_q5_0" and scheme != "q2_k_s":
                continue
            if not work.facts(scheme, method).exists():
                try:
                    make(work, scheme, method, pythons)
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{scheme} {method} failed: {error}", flush=True)
                    continue
            path = work.file(scheme, method)
            results.append(measure(work, scheme, method, path, pythons["llama"]))
            write_atomically(work.folder / "results.md", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
