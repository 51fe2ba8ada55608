"""
Accuracy of this package and its peers on a model, on text that calibration never saw.

    make bench-accuracy TEXT=path/to/text.jsonl

``TEXT`` is a JSON-lines file with a field ``text``; lines with ``"split": "calib"`` calibrate and
lines with ``"split": "eval"`` evaluate. Models are on the accelerator, if there is one. Each row
runs in a process of its own, so that its peak memory is its own. Results are written to a JSON file
after each row, and as a Markdown table beside it; rows that the file already holds do not run
again.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from child import report, run_child
from llmcompressor.modifiers import Modifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoround_modifier import (
    PRESETS,
    AutoRoundModifier,
    ScaleDistillationModifier,
    load_recipe,
    oneshot,
    self_generated,
    text_dataset,
)
from autoround_modifier.evaluation import compare
from autoround_modifier.formats import tuned_weight
from autoround_modifier.formats.floating import FloatElement, FloatGrid
from autoround_modifier.formats.grid import Grid
from autoround_modifier.runs.files import write_atomically

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import save_smollm2

# scheme -> bits, symmetric
SCHEMES = {
    f"w{bits}{'' if symmetric else '-asym'}": (bits, symmetric)
    for bits in range(2, 9)
    for symmetric in (True, False)
}

# What is compared, with the same number of steps on both sides. The first setting of the ablation
# is the whole; each of the others changes one thing.
SUITES = {
    "peers": [
        "llmcompressor-rtn",
        "llmcompressor-awq",
        "llmcompressor-gptq",
        "llmcompressor-autoround+iters=50",
        "auto-round+iters=50",
        "auto-round+iters=50+enable_alg_ext=true",
        "opt_rtn",
        "default+iters=50+scale_search=false+loss=mse",
        "default+iters=50",
    ],
    "ablation": [
        "default+iters=50",
        "default+iters=50+equal_channels=true",
        "default+iters=50+scale_search=false",
        "default+iters=50+loss=mse",
        "default+iters=50+loss=filtered",
        "default+iters=50+enable_minmax_tuning=false",
        "default+iters=50+enable_quanted_input=false",
        "default+iters=50+holdout_fraction=0",
        "default+iters=50+distillation.iters=24",
    ],
    "formats": ["rtn", "opt_rtn", "light"],
}


def integer_weights(scheme: str, group_size: int) -> dict:
    """:return: fields of `QuantizationArgs`"""
    bits, symmetric = SCHEMES[scheme]
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
    }


def weights_of(scheme: str, group_size: int) -> dict:
    """
    :param scheme: as in `autoround`, of a recipe with one group of layers
    :param group_size: as there
    :return: fields of `QuantizationArgs`
    """
    if scheme in SCHEMES:
        return integer_weights(scheme, group_size)
    quantized = autoround(scheme, group_size, {}).resolved_config.model_dump()
    (group,) = quantized["config_groups"].values()
    if group["input_activations"]:
        raise SystemExit(f"{scheme}: the peers are compared without quantized activations")
    return group["weights"]


def autoround(scheme: str, group_size: int, settings: dict) -> AutoRoundModifier:
    """
    :param scheme: a key of `SCHEMES`, or the name of a shipped recipe with one modifier
    :param group_size: also in place of the 128 of recipes, for models whose layers it does not
        divide
    """
    if scheme in SCHEMES:
        weights = integer_weights(scheme, group_size)
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return AutoRoundModifier(ignore=["lm_head"], config_groups=groups, **settings)
    (shipped,) = load_recipe(scheme).modifiers
    groups = shipped.resolved_config.model_dump()["config_groups"]
    for group in groups.values():
        for args in (group["weights"], group["input_activations"]):
            if args and args["group_size"] == 128:
                args["group_size"] = group_size
            if args and args["block_structure"] == [128, 128]:
                args["block_structure"] = [group_size, group_size]
    return AutoRoundModifier(
        ignore=shipped.ignore,
        config_groups=groups,
        kv_cache_scheme=shipped.kv_cache_scheme,
        **settings,
    )


def use_equal_steps() -> None:
    """Let V of small and large floating-point weights move equally far in a sign step."""
    FloatGrid.rounding_speed = Grid.rounding_speed  # type: ignore[method-assign]


def use_equal_channels() -> None:
    """Let V of all channels move equally far in a sign step, as in SignRound."""
    tuned_weight.channel_speed = torch.ones_like  # type: ignore[assignment]


def use_fixed_unit() -> None:
    """Let V of floating-point weights count in scales, as auto-round does, not in local steps."""
    use_equal_steps()
    original = FloatElement.round

    def round_with_fixed_unit(
        element: FloatElement, x: torch.Tensor, rounding: torch.Tensor | None = None
    ) -> torch.Tensor:
        return original(element, x if rounding is None else x + rounding)

    FloatElement.round = round_with_fixed_unit  # type: ignore[method-assign]


# Options of a method that change what no setting of the modifier does.
ALTERNATIVES = {
    "equal_steps": use_equal_steps,
    "equal_channels": use_equal_channels,
    "fixed_unit": use_fixed_unit,
}


def load_model(folder: Path, device: torch.device) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)


def run_row(arguments: argparse.Namespace, scheme: str, method: str, calibration: str) -> dict:
    """Quantize once and measure; the only work of a child process."""
    name, *overrides = method.split("+")
    options = {key: yaml.safe_load(value) for key, value in (x.split("=") for x in overrides)}
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator or torch.device("cpu")
    original = load_model(arguments.model, device)
    bos = True if arguments.add_bos_token else None
    sizes = {
        "num_samples": arguments.samples,
        "max_seq_length": arguments.length,
        "add_bos_token": bos,
    }
    if calibration == "text-without-bos":
        sizes["add_bos_token"] = False
    if calibration == "self":
        dataset = self_generated(original, tokenizer, **sizes, seed=arguments.seed)
    else:
        dataset = text_dataset(arguments.text, tokenizer, **sizes, split="calib")
    held_out = text_dataset(
        arguments.text,
        tokenizer,
        arguments.eval_samples,
        arguments.length,
        add_bos_token=bos,
        split="eval",
    )

    model = load_model(arguments.model, device)
    if name in PRESETS:
        common = {"batch_size": arguments.batch_size, "seed": arguments.seed}
        distillation = {
            key.removeprefix("distillation."): options.pop(key)
            for key in list(options)
            if key.startswith("distillation.")
        }
        for option, use in ALTERNATIVES.items():
            if options.pop(option, False):
                use()
        settings = {"preset": name, **common, **options}
        recipe: list[Modifier] = [autoround(scheme, arguments.group_size, settings)]
        needs_data = recipe[0].requires_calibration_data
        if distillation:
            settings["distillation"] = {**common, **distillation}
            recipe.append(ScaleDistillationModifier(**settings["distillation"]))
        started = time.perf_counter()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=dataset if needs_data or distillation else None,
            recipe=recipe,
        )
    else:
        from peers import PEERS, Task  # imports much that our own rows shall not be charged with

        weights = weights_of(scheme, arguments.group_size)
        task = Task(
            arguments.model,
            model,
            tokenizer,
            dataset,
            weights,
            arguments.batch_size,
            arguments.seed,
        )
        started = time.perf_counter()
        settings = PEERS[name](task, **options)
    # A peer in a process of its own measures itself.
    seconds = settings.get("seconds", time.perf_counter() - started)
    peak = settings.get(
        "peak_mib",
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # MiB on Linux
    )
    result = compare(original, model, torch.tensor(held_out["input_ids"]))
    return {
        "scheme": scheme,
        "method": method,
        "calibration": calibration,
        "seed": arguments.seed,
        "kl": result.kl,
        "kl_per_sample": list(result.kl_per_sample),
        "top1": result.top1,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "seconds": seconds,
        "peak_mib": peak,
        "settings": settings,
    }


# What `figures` fills
FIGURES = "seeds | KL | KL of the worst text | top-1 | perplexity | seconds | peak MiB"


def figures(runs: Sequence[Mapping[str, Any]]) -> str:
    """:return: cells of a line: means over seeds, in brackets the lowest and highest"""
    kls = [row["kl"] for row in runs]
    spread = f" ({min(kls):.3f} to {max(kls):.3f})" if len(runs) > 1 else ""
    return (
        f"{len(runs)} | {mean(kls):.3f}{spread} "
        f"| {mean(max(row['kl_per_sample']) for row in runs):.2f} "
        f"| {mean(row['top1'] for row in runs):.1%} "
        f"| {mean(row['perplexity'] for row in runs):.1f} "
        f"| {mean(row['seconds'] for row in runs):.0f} "
        f"| {mean(row['peak_mib'] for row in runs):.0f}"
    )


def markdown(results: list[dict]) -> str:
    """One line for each scheme and method: means over seeds, in brackets the lowest and highest."""
    lines = [f"| scheme | method | calibration | {FIGURES} |", "| --- " * 10 + "|"]
    rows: dict[tuple, list[dict]] = {}
    for row in results:
        rows.setdefault((row["scheme"], row["method"], row["calibration"]), []).append(row)
    lines += [f"| {' | '.join(key)} | {figures(runs)} |" for key, runs in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; defaults to the packaged SmolLM2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=["w2", "w2-asym", "w3", "w4"],
        help="integer weights by group, such as w2 or w4-asym, or names of shipped recipes",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        help="a preset or a name in peers.py, with +field=value... appended, also "
        "+distillation.field=value; default: the suite's",
    )
    parser.add_argument("--suite", default="peers", choices=SUITES)
    parser.add_argument(
        "--calibrations",
        nargs="+",
        default=["text"],
        choices=["text", "text-without-bos", "self"],
        help="text-without-bos shows what BOS is worth: evaluation has it all the same",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--add-bos-token",
        action="store_true",
        help="begin samples with BOS although the tokenizer does not, as converted GGUF files need",
    )
    parser.add_argument("--output", type=Path, default=Path("output/accuracy.json"))
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model or save_smollm2()
    if arguments.row:
        *row, seed = arguments.row
        arguments.seed = int(seed)
        report(run_row(arguments, *row))
        return

    output = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(output.read_text()) if output.exists() else []
    done = {(x["scheme"], x["method"], x["calibration"], x["seed"]) for x in results}
    # Seed by seed, so that a run that is cut short has all methods of the first seeds.
    wanted = [
        (scheme, method, calibration, seed)
        for seed in arguments.seeds
        for scheme in arguments.schemes
        for method in arguments.methods or SUITES[arguments.suite]
        for calibration in arguments.calibrations
    ]
    for row in wanted:
        if row in done:
            continue
        try:
            results.append(run_child(__file__, *sys.argv[1:], "--row", *map(str, row)))
        except RuntimeError:
            print(f"| {' | '.join(map(str, row))} | failed, see above |", flush=True)
            continue
        write_atomically(output, json.dumps(results, indent=1))
        output.with_suffix(".md").write_text(markdown(results) + "\n")
        print(markdown(results[-1:]).splitlines()[-1], flush=True)
    print(markdown(results))


if __name__ == "__main__":
    main()
