"""Reports and evaluations as runs leave them, of a dense model and of a mixture of experts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from autoround_modifier.report.schema import (
    EVALUATION_FILE,
    REPORT_FILE,
    AutoSchemeRecord,
    BlockRecord,
    DataRecord,
    DistillationRecord,
    DivergenceRecord,
    Evaluation,
    Generation,
    LayerRecord,
    ModelRecord,
    PhaseRecord,
    QuantizationReport,
    SizeRecord,
    TaskResult,
    TextRecord,
    TokenDivergence,
)

RECIPE = """\
quant_stage:
  quant_modifiers:
    AutoRoundModifier:
      preset: default
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 2, type: int, symmetric: true, strategy: group, group_size: 64}
"""
AUTO_SCHEME_RECIPE = """\
quant_stage:
  quant_modifiers:
    AutoSchemeModifier:
      avg_bits: 3.0
      options: [W2A16G64, W4A16G64, W8A16G64]
    AutoRoundModifier:
      preset: light
      ignore: [lm_head]
"""
WEIGHTS = {
    "q_proj": 576 * 576,
    "k_proj": 576 * 192,
    "v_proj": 576 * 192,
    "o_proj": 576 * 576,
    "gate_proj": 576 * 1536,
    "up_proj": 576 * 1536,
    "down_proj": 576 * 1536,
}
ERRORS = {
    "q_proj": 0.05,
    "k_proj": 0.03,
    "v_proj": 0.11,
    "o_proj": 0.09,
    "gate_proj": 0.13,
    "up_proj": 0.15,
    "down_proj": 0.17,
}
BITS = {"W2A16 G64": 2.25, "W4A16 G64": 4.25, "W8A16 G64": 8.25}
VERSIONS = {
    "autoround_modifier": "0.1.0",
    "llmcompressor": "0.14.0.1",
    "compressed-tensors": "0.19.0",
    "torch": "2.13.0",
    "transformers": "5.17.0",
    "python": "3.11.2",
    "system": "Linux-6.1-x86_64",
}
UNQUANTIZED = 28_311_552 * 2 + 70_000
TEXT = (
    "The lighthouse keeper climbed the stairs each evening before sunset. He carried a can of oil, "
    "a cloth, and a small notebook in which he wrote the direction of the wind.\n\nOn the third of "
    "March the notebook says only: fog, no ships, lamp lit at four. Nobody knows why he left the "
    "island that night, or who wound the clock the next morning."
)


def layers(schemes: dict[str, float] = BITS, blocks: int = 30, mixed: bool = False) -> list:
    chance = random.Random(0)
    made = []
    for block in range(blocks):
        for kind, weights in WEIGHTS.items():
            scheme = "W2A16 G64"
            if mixed and (kind in ("v_proj", "down_proj") or block in (0, blocks - 1)):
                scheme = "W8A16 G64" if block == 0 else "W4A16 G64"
            bits = schemes[scheme]
            error = ERRORS[kind] * 4 ** (2.25 - bits) * (0.6 + block / blocks)
            error *= chance.uniform(0.8, 1.2)
            module = "self_attn" if weights < 576 * 1536 else "mlp"
            made.append(
                LayerRecord(
                    name=f"model.layers.{block}.{module}.{kind}",
                    kind=kind,
                    block=block,
                    scheme=scheme,
                    bits_per_weight=bits,
                    weights=weights,
                    error_of="output",
                    initial_error=error * chance.uniform(1.3, 1.9),
                    error=error,
                    moved=int(weights * chance.uniform(0.05, 0.18) / bits),
                )
            )
    return made


def block_records(blocks: int = 30) -> list[BlockRecord]:
    chance = random.Random(1)
    made = []
    for block in range(blocks):
        before = 0.02 * 1.14**block * chance.uniform(0.85, 1.2)
        made.append(
            BlockRecord(
                name=f"model.layers.{block}",
                initial_loss=before,
                best_loss=before * chance.uniform(0.45, 0.7),
                best_iteration=chance.choice([80, 120, 160, 200]),
                seconds=chance.uniform(38, 45),
            )
        )
    return made


def report(**changes: Any) -> QuantizationReport:
    """A dense model at 2 bits; fields as given."""
    made = changes.pop("layers", None)
    made = layers() if made is None else made
    quantized = sum(x.weights for x in made)
    size = sum(x.bits_per_weight * x.weights / 8 for x in made)
    fields: dict[str, Any] = {
        "versions": VERSIONS,
        "device": "CPU, 2 threads",
        "started": "2026-01-20T09:30:00Z",
        "seconds": 1604.0,
        "command": [
            "/home/me/.venv/bin/autoround-modifier",
            "quantize",
            "HuggingFaceTB/SmolLM2-135M",
            "--recipe",
            "w2a16_autoround",
            "--dataset",
            "my text.jsonl",
            "--output",
            "SmolLM2-135M-w2a16",
        ],
        "recipe": RECIPE,
        "recipe_name": "w2a16_autoround",
        "model": ModelRecord(
            source="HuggingFaceTB/SmolLM2-135M",
            revision="93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
            architecture="LlamaForCausalLM",
            parameters=134_515_008,
        ),
        "data": DataRecord(
            source="my text.jsonl",
            samples=128,
            tokens=128 * 2048,
            max_length=2048,
            digest="9f2c4e" + "0a" * 13,
        ),
        "phases": [
            PhaseRecord(name=name, seconds=seconds, peak_host_bytes=host, peak_device_bytes=0)
            for name, seconds, host in (
                ("preparation", 2.1, 910_000_000),
                ("capture", 74.0, 2_900_000_000),
                ("search", 212.0, 3_050_000_000),
                ("tuning", 1290.0, 3_420_000_000),
                ("saving", 4.3, 2_100_000_000),
            )
        ],
        "blocks": block_records(),
        "layers": made,
        "unquantized": ["model.embed_tokens", "lm_head"],
        "size": SizeRecord(
            original_bytes=269_060_552,
            saved_bytes=int(size) + UNQUANTIZED,
            quantized_weights=quantized,
            quantized_bits=8 * size / max(quantized, 1),
        ),
    }
    return QuantizationReport(**{**fields, **changes})


def auto_scheme_report(blocks: int = 30) -> QuantizationReport:
    made = layers(blocks=blocks, mixed=True)
    counts = {name: sum(x.scheme == name for x in made) for name in BITS}
    frontier = [(2.25 + 0.15 * i, 1.3 * 0.84**i + 0.002) for i in range(41)]
    return report(
        layers=made,
        blocks=block_records(blocks),
        recipe=AUTO_SCHEME_RECIPE,
        recipe_name=None,
        auto_scheme=AutoSchemeRecord(
            budget=3.0, score="fisher", frontier=frontier, chosen=frontier[5], layers=counts
        ),
        distillation=DistillationRecord(
            initial_kl=0.412,
            final_kl=0.371,
            kept=True,
            judged_on="held-out samples",
            seconds=310.0,
        ),
    )


def mixture_report(blocks: int = 16, experts: int = 32) -> QuantizationReport:
    """Attention is tuned; of the experts, those with few tokens are not."""
    chance = random.Random(2)
    made = [x for x in layers(blocks=blocks) if "self_attn" in x.name]
    for block in range(blocks):
        for expert in range(experts):
            tokens = int(3000 * chance.paretovariate(1.4)) % 40_000 if chance.random() > 0.02 else 0
            for part in ("gate_proj", "up_proj", "down_proj"):
                made.append(
                    LayerRecord(
                        name=f"model.layers.{block}.mlp.experts.{expert}.{part}",
                        kind=f"experts.{part}",
                        block=block,
                        scheme="W2A16 G64",
                        bits_per_weight=2.25,
                        weights=1024 * 512,
                        error_of="output" if tokens >= 32 else "weight",
                        initial_error=0.2 if tokens >= 32 else None,
                        error=chance.uniform(0.08, 0.14),
                        moved=chance.randrange(20_000) if tokens >= 32 else 0,
                        tokens=tokens,
                    )
                )
    phases = [
        PhaseRecord(name=name, seconds=seconds, peak_host_bytes=host, peak_device_bytes=device)
        for name, seconds, host, device in (
            ("preparation", 21.0, 9_100_000_000, 0),
            ("capture", 160.0, 19_000_000_000, 6_200_000_000),
            ("search", 410.0, 19_200_000_000, 7_100_000_000),
            ("tuning", 5_290.0, 21_000_000_000, 11_400_000_000),
            ("saving", 14.3, 12_000_000_000, 900_000_000),
        )
    ]
    size = sum(x.bits_per_weight * x.weights / 8 for x in made)
    failed = block_records(blocks)
    failed[3] = failed[3].model_copy(update={"failure": "NaN in the loss", "scarce_experts": 2})
    return report(
        layers=made,
        blocks=failed,
        phases=phases,
        seconds=5900.0,
        device="NVIDIA H100 80GB HBM3",
        size=SizeRecord(
            original_bytes=1_700_000_000,
            saved_bytes=int(size) + 150_000_000,
            quantized_weights=sum(x.weights for x in made),
            quantized_bits=2.25,
        ),
        model=ModelRecord(
            source="/models/Tiny-Mixture",
            architecture="Qwen3MoeForCausalLM",
            parameters=850_000_000,
        ),
    )


def token_divergences() -> list[TokenDivergence]:
    chance = random.Random(3)
    made, start = [], 0
    for end in [i for i, c in enumerate(TEXT) if c in " \n"] + [len(TEXT)]:
        if end > start:
            kl = min(chance.paretovariate(0.9) * 0.12 - 0.1, 6.5)
            same = kl < 0.4 or chance.random() < 0.45
            made.append(TokenDivergence(text=TEXT[start:end], kl=kl, same_top1=same))
        start = end
    return made


def evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "versions": VERSIONS,
        "original": "HuggingFaceTB/SmolLM2-135M",
        "quantized": "SmolLM2-135M-w2a16",
        "commands": [
            "autoround-modifier evaluate HuggingFaceTB/SmolLM2-135M SmolLM2-135M-w2a16 "
            "--text held-out.txt --tasks arc_challenge,gsm8k",
        ],
        "task_commands": [
            "lm_eval --model hf --model_args pretrained=SmolLM2-135M-w2a16,dtype=auto "
            "--tasks arc_challenge,gsm8k --batch_size auto",
        ],
        "text": TextRecord(source="held-out.txt", digest="ab" * 32, samples=64, length=512),
        "divergence": DivergenceRecord(
            kl=1.148, top1=0.448, perplexity=68.91, original_perplexity=22.45
        ),
        "generations": [
            Generation(
                prompt="The capital of France is",
                original=" Paris. It is the largest city in the country and the seat of its "
                "government.",
                quantized=" the city of Paris, and the capital of the country is the city.",
            ),
            Generation(
                prompt="To boil an egg,",
                original=" bring water to a boil, lower the egg in gently,\nand wait eight "
                "minutes.",
                quantized=" put the egg in the water. <script>alert('not run')</script> & wait",
            ),
        ],
        "tokens": token_divergences(),
        "tasks": [
            TaskResult(
                task="arc_challenge",
                metric="acc_norm",
                shots=25,
                original=0.2901,
                quantized=0.2457,
                original_stderr=0.0133,
                quantized_stderr=0.0126,
            ),
            TaskResult(
                task="gsm8k",
                metric="exact_match",
                filter="strict-match",
                shots=5,
                original=0.0152,
                quantized=0.0106,
            ),
        ],
    }
    return Evaluation(**{**fields, **changes})


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": False,
                    "group_size": 64,
                    "num_bits": 2,
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    },
}


def write_checkpoint(
    folder: Path,
    made: QuantizationReport,
    evaluated: Evaluation | None = None,
    config: dict[str, Any] | None = CONFIG,
) -> Path:
    """:return: the folder, with the files that a page and a card are made of"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(made.model_dump_json())
    if evaluated is not None:
        (folder / EVALUATION_FILE).write_text(evaluated.model_dump_json())
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text(made.recipe)
    return folder
