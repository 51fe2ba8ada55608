"""
The choice of schemes under a budget of bits: how well scores rank layers, and what the choice is
worth beside auto-round's AutoScheme and simpler rules.

    make bench-autoscheme TEXT=path/to/text.jsonl

Three parts, each with rows of its own in the output; rows that are there already do not run again.

- ``ranking``: each unit of layers is quantized alone, and the divergence of the model is measured;
  then the rank correlation of each score with it.
- ``search``: seconds and peak memory of measuring and choosing, ours and auto-round's, on the same
  number of calibration tokens.
- ``compare``: the model tuned under the schemes that each rule chooses, for each budget.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from child import current_rss, report, run_child
from compressed_tensors.utils import match_named_modules
from llmcompressor.utils.pytorch import infer_sequential_targets
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from autoround_modifier import AutoRoundModifier, oneshot, text_dataset
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.evaluation import compare, next_token_logits
from autoround_modifier.formats import TunedWeight
from autoround_modifier.host.saved_size import saved_bits
from autoround_modifier.host.schemes import weight_spec
from autoround_modifier.runs.files import write_atomically
from autoround_modifier.schemes import MeasuredUnit, Measurement, resolve_options
from autoround_modifier.schemes.sensitivity import SensitivityConfig, measure_sensitivity
from autoround_modifier.schemes.units import Unit, find_units
from autoround_modifier.search import search_range

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from smollm2 import save_smollm2

BITS = (2, 4, 8)
OPTIONS = [f"W{bits}A16G64" for bits in BITS]
BUDGETS = (2.5, 3.0, 3.5)
RULES = ("ours", "ours-with-W3", "auto-round", "uniform", "ends")
SCORES = ("fisher", "delta_loss")
SEARCHES = (*SCORES, "fisher-with-W3", "auto-round")
CHANNEL = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
# One scheme for all layers, as close to the budget as group sizes allow
UNIFORM = {2.5: "W2A16G32", 3.0: "W3A16_channel", 3.5: "W3A16G32"}
WITH_W3 = [*OPTIONS, *UNIFORM.values(), "W3A16G64"]
SCHEMES = resolve_options(
    [{"name": x, "weights": CHANNEL} if x.endswith("_channel") else x for x in WITH_W3]
)


class Bench:
    """The model, its texts and its layers."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.model = self.load()
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        self.units = find_units(self.model, self.layers)
        sizes = {"max_seq_length": arguments.length, "tokenizer": self.tokenizer}
        self.calibration = text_dataset(
            arguments.text, num_samples=arguments.samples, split="calib", **sizes
        )
        held_out = text_dataset(
            arguments.text, num_samples=arguments.eval_samples, split="eval", **sizes
        )
        self.held_out = torch.tensor(held_out["input_ids"])

    def load(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.arguments.model, dtype=torch.bfloat16)

    def scores(self, score: str, options: list[str]) -> dict[str, dict[str, float]]:
        """:return: layer -> scheme -> score, as `AutoSchemeModifier` measures it"""
        targets = infer_sequential_targets(self.model, None)
        blocks = {block: name for name, block in match_named_modules(self.model, targets)}
        names = {layer: name for name, layer in self.layers.items()}
        ids = torch.tensor(self.calibration["input_ids"][: self.arguments.search_samples])
        batches = [{"input_ids": row[None]} for row in ids]
        config = SensitivityConfig(score=score)
        schemes = {option: SCHEMES[option] for option in options}
        return measure_sensitivity(self.model, blocks, names, schemes, batches, config)

    def measurement(self, score: str, options: list[str]) -> Measurement:
        scores = self.scores(score, options)
        schemes = {option: SCHEMES[option] for option in options}
        units = [
            MeasuredUnit(
                unit.name,
                unit.layers,
                unit.targets,
                sum(self.layers[name].weight.numel() for name in unit.layers),
                {option: self.bits(unit, option) for option in options},
                {option: sum(scores[name][option] for name in unit.layers) for option in options},
            )
            for unit in self.units
        ]
        return Measurement(score, schemes, units, 0, 0)

    def bits(self, unit: Unit, option: str) -> int:
        return sum(saved_bits(self.layers[name], SCHEMES[option]) for name in unit.layers)


# ---------------------------------------------------------------------- ranking


def rank(bench: Bench) -> dict[str, Any]:
    """Quantize one unit at a time, with searched scales, and measure what that does."""
    arguments, model = bench.arguments, bench.model
    importance = Importance()
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: importance.record(layer, args))
        for layer in bench.layers.values()
    ]
    next_token_logits(model, torch.tensor(bench.calibration["input_ids"]))
    for handle in handles:
        handle.remove()
    found = {layer: importance.pop(layer) for layer in bench.layers.values()}

    samples = bench.held_out[: arguments.rank_samples]
    reference = next_token_logits(model, samples)
    truth: dict[str, list[float]] = {option: [] for option in OPTIONS[:2]}
    for unit in bench.units:
        for option, divergences in truth.items():
            args = SCHEMES[option].weights
            saved = {}
            for name in unit.layers:
                layer = bench.layers[name]
                saved[name] = layer.weight.detach().clone()
                spec = weight_spec(args)
                best = search_range(layer.weight, spec, found[layer])
                with torch.no_grad():
                    layer.weight.copy_(TunedWeight(layer.weight, spec, best).dequantize())
            divergences.append(compare(reference, model, samples).kl)
            with torch.no_grad():
                for name, weight in saved.items():
                    bench.layers[name].weight.copy_(weight)
        print(unit.name, {k: f"{v[-1]:.4f}" for k, v in truth.items()}, file=sys.stderr, flush=True)
    result: dict[str, Any] = {"units": [unit.name for unit in bench.units], "truth": truth}
    for score in SCORES:
        measured = bench.measurement(score, OPTIONS)
        for option, divergences in truth.items():
            values = [unit.scores[option] for unit in measured.units]
            result[f"{score} {option}"] = {
                "scores": values,
                "spearman": spearman(values, divergences),
                "sum": sum(values),
                "sum_measured": sum(divergences),
            }
    return result


def spearman(a: list[float], b: list[float]) -> float:
    """:return: correlation of the ranks; ties do not occur"""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


# ---------------------------------------------------------------------- search and comparison


def search(bench: Bench, method: str) -> dict[str, Any]:
    """Measure and choose, timed; bits of each unit for every budget."""
    if method == "auto-round":
        import auto_round.auto_scheme  # noqa: F401, not charged to the search
    held = current_rss()
    started = time.perf_counter()
    if method == "auto-round":
        chosen = auto_round_choices(bench)
        seconds = time.perf_counter() - started
    else:
        options = WITH_W3 if method.endswith("-with-W3") else OPTIONS
        measured = bench.measurement(method.removesuffix("-with-W3"), options)
        seconds = time.perf_counter() - started
        chosen = {str(budget): measured.choose(budget).schemes for budget in BUDGETS}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "peak_mib": peak / 2**20,
        "peak_mib_beyond_model": (peak - held) / 2**20,
        "schemes": chosen,
    }


def auto_round_choices(bench: Bench) -> dict[str, list[str]]:
    """
    auto-round's AutoScheme, with the groups of layers that ours has. It counts a zero point for
    symmetric integers as well, so it is asked without scales, for what is left of the budget.
    """
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme

    options = [
        QuantizationScheme(bits=bits, group_size=64, sym=True, data_type="int", act_bits=16)
        for bits in BITS
    ]
    weights = {name: layer.weight.numel() for name, layer in bench.layers.items()}
    total = sum(weights.values())
    overhead = sum(bench.bits(unit, OPTIONS[0]) for unit in bench.units) / total - BITS[0]
    budgets = [budget - overhead for budget in BUDGETS]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "calibration.json"
        rows = map(json.loads, Path(bench.arguments.text).read_text().splitlines())
        texts = [{"text": row["text"]} for row in rows if row["split"] == "calib"]
        text.write_text(json.dumps(texts))
        os.environ["AR_AUTO_SCHEME_CACHE"] = folder  # scores of an earlier run would not count
        scheme = AutoScheme(
            avg_bits=budgets,
            options=options,
            shared_layers=[unit.layers for unit in bench.units if len(unit.layers) > 1],
            ignore_scale_zp_bits=True,
            nsamples=bench.arguments.search_samples,
            seqlen=bench.arguments.length,
        )
        configs = GenScheme(
            scheme,
            bench.model,
            list(bench.layers),
            {},
            dataset=str(text),
            device_map="cpu",
            tokenizer=bench.tokenizer,
        ).get_layer_config()
    return {
        str(budget): [f"W{config[unit.layers[0]]['bits']}A16G64" for unit in bench.units]
        for budget, config in zip(BUDGETS, configs.values(), strict=True)
    }


def ends(bench: Bench, budget: float) -> list[str]:
    """Four bits from both ends of the model inwards, as far as the budget goes; two bits inside."""
    schemes = [OPTIONS[0]] * len(bench.units)
    total = sum(layer.weight.numel() for layer in bench.layers.values())
    room = int(budget * total) - sum(bench.bits(unit, OPTIONS[0]) for unit in bench.units)
    count = len(schemes)
    inwards = [index for step in range(count) for index in (step, count - 1 - step)]
    for index in dict.fromkeys(inwards):
        unit = bench.units[index]
        room -= bench.bits(unit, OPTIONS[1]) - bench.bits(unit, OPTIONS[0])
        if room < 0:
            break
        schemes[index] = OPTIONS[1]
    return schemes


def tuned(bench: Bench, schemes: list[str]) -> dict[str, Any]:
    """
    :param schemes: of each unit
    """
    groups: dict[str, Any] = {}
    bits = 0
    for unit, name in zip(bench.units, schemes, strict=True):
        scheme = SCHEMES[name]
        group = groups.setdefault(name, scheme.model_copy(update={"targets": []}))
        group.targets += unit.layers
        bits += sum(saved_bits(bench.layers[layer], scheme) for layer in unit.layers)
    model = bench.load()
    recipe = AutoRoundModifier(
        preset="light",
        batch_size=bench.arguments.batch_size,
        seed=bench.arguments.seed,
        config_groups=groups,
        ignore=["lm_head"],
    )
    oneshot(model=model, tokenizer=bench.tokenizer, dataset=bench.calibration, recipe=recipe)
    result = compare(bench.model, model, bench.held_out)
    total = sum(layer.weight.numel() for layer in bench.layers.values())
    return {
        "avg_bits": bits / total,
        "kl": result.kl,
        "top1": result.top1,
        "perplexity": result.perplexity,
        "layers": {name: schemes.count(name) for name in sorted(set(schemes))},
    }


# ---------------------------------------------------------------------- rows


def run_row(arguments: argparse.Namespace, row: list[str]) -> dict[str, Any]:
    """The only work of a child process."""
    bench = Bench(arguments)
    part, *rest = row
    if part == "ranking":
        return rank(bench)
    if part == "search":
        return search(bench, rest[0])
    rule, budget = rest[0], float(rest[1])
    if rule == "uniform":
        return tuned(bench, [UNIFORM[budget]] * len(bench.units))
    if rule == "ends":
        return tuned(bench, ends(bench, budget))
    method = rule.replace("ours", "fisher")
    searched = json.loads(arguments.output.read_text())[f"search {method}"]
    return tuned(bench, searched["schemes"][str(budget)])


def markdown(results: dict[str, dict]) -> str:
    lines = []
    if "ranking" in results:
        lines += [
            "| score | scheme | Spearman | sum of scores | sum measured |",
            "| --- " * 5 + "|",
        ]
        for score in SCORES:
            for option in OPTIONS[:2]:
                row = results["ranking"][f"{score} {option}"]
                lines.append(
                    f"| {score} | {option} | {row['spearman']:.3f} | {row['sum']:.2f} "
                    f"| {row['sum_measured']:.2f} |"
                )
        lines.append("")
    lines += ["| search | seconds | peak MiB | beyond the model |", "| --- " * 4 + "|"]
    for method in SEARCHES:
        row = results.get(f"search {method}")
        if row:
            lines.append(
                f"| {method} | {row['seconds']:.0f} | {row['peak_mib']:.0f} "
                f"| {row['peak_mib_beyond_model']:.0f} |"
            )
    lines += ["", "| budget | rule | bits | KL | top-1 | perplexity |", "| --- " * 6 + "|"]
    for budget in BUDGETS:
        for rule in RULES:
            row = results.get(f"compare {rule} {budget}")
            if row:
                lines.append(
                    f"| {budget} | {rule} | {row['avg_bits']:.3f} | {row['kl']:.3f} "
                    f"| {row['top1']:.1%} | {row['perplexity']:.1f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint; defaults to the packaged SmolLM2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=40)
    parser.add_argument("--search-samples", type=int, default=32)
    parser.add_argument("--rank-samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--parts", nargs="+", default=["search", "compare", "ranking"])
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, choices=BUDGETS)
    parser.add_argument("--output", type=Path, default=Path("output/autoscheme.json"))
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model or save_smollm2()
    if arguments.row:
        report(run_row(arguments, arguments.row))
        return

    rows = []
    for part in arguments.parts:
        if part == "search":
            rows += [["search", method] for method in SEARCHES]
        elif part == "compare":
            rows += [
                ["compare", rule, str(budget)]
                for budget in arguments.budgets
                for rule in arguments.rules
            ]
        else:
            rows.append([part])
    output = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        results = json.loads(output.read_text()) if output.exists() else {}
        key = " ".join(row)
        if key in results:
            continue
        result = run_child(__file__, *sys.argv[1:], "--row", *row)
        # Read again: another process may have added rows of its own.
        results = json.loads(output.read_text()) if output.exists() else {}
        results[key] = result
        write_atomically(output, json.dumps(results, indent=1))
        output.with_suffix(".md").write_text(markdown(results) + "\n")
    print(markdown(json.loads(output.read_text())))


if __name__ == "__main__":
    main()
