"""
What tuning takes on one GPU of 80 GB: Llama-3.1-8B and 70B at 2 bits in groups of 64, DeepSeek-R1
by its recipe, `default` (200 iterations of 8 samples, 128 samples) of 2048 tokens.

    python benchmarks/estimate.py

Nothing of this has run on a GPU. Each number is one of three kinds, and the tables say which:

- counted: shapes of the real configuration on the meta device, bytes by the code, and the tensors
  that autograd saves in a real block of an eighth of the width (saved bytes per token are linear
  in the widths), with the attention that tuning uses (SDPA);
- measured: on a CPU, by benchmarks/memory.py and, for time, in docs/benchmarks/results.md;
- assumed: the constants in capitals below.

W is the number of weights of a block in linear layers that see every token, E that of its routed
experts, A that of the experts one token goes to, n the tokens of a step, T those of a sample, N all
calibration tokens, H the hidden size, g the group size.

Device, at the peak, for the largest block:

- full precision: 2 (W + E)
- V: 2 (W + E)
- best integers: 1 (W + E)
- dequantized weight and gradient: 4 W; for experts only those of one layer at a time
- groups: 22 (W + E) / g, float32 minimum, maximum, alpha and beta, scale and zero point of the best
  candidate and of the module
- saved for the backward pass: n times the counted bytes per token
- masks of a step: 2 n T

On a CPU activations take ACTIVATIONS times what autograd saves, by the last table: what was
measured less what was counted of all else. The tables say what that would make on the GPU as well.
Where a step is more than one pass (``gradient_accumulate_steps``, samples of several lengths)
gradients of experts are kept: 2 E.

CPU memory: 2 bytes for each weight of the model, unless it is on the disk; captured inputs,
outputs, the quantized chain and the pipeline's own cache, 2 N H each; attention masks, twice
(captured, and in the pipeline's cache), 2 N T each.

Seconds of an iteration: (6 (W + A) + attention) n / FLOPS + (16 W + 22 E) / BANDWIDTH + expert
layers * LAUNCHES * LAUNCH. Attention: 3.5 * 2 T (query and value size) heads, forward and backward.
A step reads and writes 16 bytes of a weight (6 to dequantize, 2 to look for NaN, 8 to descend), of
an expert 22, since it is dequantized twice. Besides, for each block: forward passes over N tokens
to record (there all experts see all tokens) and for the quantized chain, and six over an eighth of
them to compare candidates; SEARCH_PASSES passes of 6 bytes over the weights; the block moved to the
GPU and back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from predicted_size import DEEPSEEK_R1
from torch import Tensor, nn
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama

from autoround_modifier.presets import PRESETS
from autoround_modifier.tuning.loss import LOSSES

# Assumed
FLOPS = 300e12  # sustained, bfloat16
BANDWIDTH = 2e12  # bytes per second, device memory
LAUNCHES, LAUNCH = 20, 10e-6  # kernels for one layer of an expert in an iteration, seconds of each
MOVED = {"CPU memory": 25e9, "disk": 2e9}  # bytes per second, one way
# Measured, see `check`
ACTIVATIONS = 3.0
# Measured: time of an iteration as a multiple of that of the bare block, the largest in
# docs/benchmarks/results.md
OF_THE_FLOOR = 1.5
SEARCH_PASSES = 30  # as in `autoround_modifier.device`
# Measured by benchmarks/memory.py --blocks 1: width, samples, tokens, MiB beyond the model
MEASURED = [(576, 64, 256, 141), (576, 64, 512, 271), (1536, 64, 256, 476)]
SAVED = "saved for the backward pass"

PRESET = PRESETS["default"]
BATCH, LENGTH = 8, 2048
PESSIMISTIC = "peak, activations as on a CPU"
BATCHES = ("", ", batches of 4", ", batches of 2")
COUNTED_AT = 8  # the counted block is this many times narrower
GB, MIB = 1e9, 2**20

LLAMA = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 128256}


def llama(**fields: int) -> LlamaConfig:
    return LlamaConfig(**{**LLAMA, **fields}, attn_implementation="sdpa", dtype=torch.bfloat16)


def deepseek(**fields: int) -> DeepseekV3Config:
    fields = {**DEEPSEEK_R1, **fields}
    return DeepseekV3Config(**fields, attn_implementation="sdpa", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Model:
    """
    :ivar parameters: in all
    :ivar narrow: the same architecture, `COUNTED_AT` times narrower
    :ivar group_size: of most weights
    """

    name: str
    parameters: float
    config: PreTrainedConfig
    narrow: PreTrainedConfig
    group_size: int


MODELS = [
    Model(
        "Llama-3.1-8B",
        8.03e9,
        llama(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32
        ),
        llama(
            hidden_size=512,
            intermediate_size=1792,
            num_attention_heads=4,
            num_key_value_heads=1,
            num_hidden_layers=1,
        ),
        64,
    ),
    Model(
        "Llama-3.1-70B",
        70.55e9,
        llama(
            hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80
        ),
        llama(
            hidden_size=1024,
            intermediate_size=3584,
            num_attention_heads=8,
            num_key_value_heads=1,
            num_hidden_layers=1,
        ),
        64,
    ),
    Model(
        "DeepSeek-R1",
        671.03e9,
        deepseek(),
        deepseek(
            hidden_size=896,
            intermediate_size=2304,
            moe_intermediate_size=256,
            num_attention_heads=16,
            num_key_value_heads=16,
            q_lora_rank=192,
            kv_lora_rank=64,
            n_routed_experts=32,
        ),
        128,
    ),
]


@dataclass(frozen=True)
class Block:
    """
    :ivar dense: weights of linear layers that see every token (W)
    :ivar experts: weights of routed experts (E)
    :ivar active: weights of the experts of one token (A)
    :ivar expert_layers: how many linear layers the experts have
    :ivar attention: products of query and key, and of probability and value, of one token, for
        each token it attends to
    """

    dense: int
    experts: int
    active: int
    expert_layers: int
    attention: int

    @property
    def weights(self) -> int:
        return self.dense + self.experts


# ---------------------------------------------------------------------- counted


def decoder_layer(config: PreTrainedConfig, index: int) -> nn.Module:
    if isinstance(config, DeepseekV3Config):
        return modeling_deepseek_v3.DeepseekV3DecoderLayer(config, index)
    return modeling_llama.LlamaDecoderLayer(config, index)


def count_block(config: PreTrainedConfig, index: int) -> Block:
    with torch.device("meta"):
        layer = decoder_layer(config, index)
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    dense = sum(module.weight.numel() for module in linear)
    heads, experts, active, expert_layers = config.num_attention_heads, 0, 0, 0
    if isinstance(config, DeepseekV3Config):
        attention = heads * (config.qk_head_dim + config.v_head_dim)
        if index >= config.first_k_dense_replace:
            count = config.n_routed_experts
            experts = 3 * count * config.hidden_size * config.moe_intermediate_size
            active = experts * config.num_experts_per_tok // count
            expert_layers = 3 * count
    else:
        attention = heads * 2 * config.head_dim
    return Block(dense, experts, active, expert_layers, attention)


def saved_bytes_per_token(config: PreTrainedConfig, index: int, tokens: int = 256) -> float:
    """:return: bytes that autograd saves of one token, in a block and the loss, without weights"""
    torch.manual_seed(0)
    model_class = {
        LlamaConfig: modeling_llama.LlamaRotaryEmbedding,
        DeepseekV3Config: modeling_deepseek_v3.DeepseekV3RotaryEmbedding,
    }
    layer = decoder_layer(config, index).to(torch.bfloat16)
    rotary = model_class[type(config)](config)
    if isinstance(config, DeepseekV3Config) and index >= config.first_k_dense_replace:
        layer.mlp.experts = linear_experts(config)
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16)
    positions = rotary(hidden, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(hidden, position_embeddings=positions, attention_mask=None)
        output = output[0] if isinstance(output, tuple) else output
        LOSSES[PRESET.loss](output, hidden.flip(1), None).backward()
    inputs = 2 * hidden.nbytes  # and targets, on the device
    return (sum(storage.nbytes() for storage in saved.values()) + inputs) / tokens


def linear_experts(config: DeepseekV3Config) -> nn.ModuleList:
    """:return: what LLM-Compressor makes of a block's experts, with empty weights"""
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

    experts_class = modeling_deepseek_v3.DeepseekV3Experts
    return LinearExperts2D.get_linear_experts_cls(experts_class)(config).to(torch.bfloat16)


# ---------------------------------------------------------------------- estimates


def device_bytes(
    block: Block, saved_per_token: float, group_size: int, batch: int, length: int
) -> dict[str, float]:
    tokens = batch * length
    return {
        "full precision": 2 * block.weights,
        "V": 2 * block.weights,
        "best integers": block.weights,
        "dequantized, and gradient": 4 * block.dense,
        "ranges and scales of groups": 22 * block.weights / group_size,
        SAVED: tokens * saved_per_token,
        "masks of a step": 2 * tokens * length,
    }


def in_batches(parts: dict[str, float], batch: int) -> dict[str, float]:
    """:return: parts of `device_bytes` for another batch size"""
    return {
        name: size * batch / BATCH if name in (SAVED, "masks of a step") else size
        for name, size in parts.items()
    }


def with_scratch(parts: dict[str, float]) -> dict[str, float]:
    """:return: parts of `device_bytes` where activations take as much as on a CPU"""
    return {**parts, SAVED: ACTIVATIONS * parts[SAVED]}


def cpu_bytes(model: Model) -> dict[str, float]:
    tokens = PRESET.num_calibration_samples * LENGTH
    return {
        "model (none of it if on the disk)": 2 * model.parameters,
        "captured, chain and the pipeline's cache": 4 * 2 * tokens * model.config.hidden_size,
        "attention masks": 2 * 2 * tokens * LENGTH,
    }


def hours(model: Model) -> dict[str, float]:
    total: dict[str, float] = {}
    for index in range(model.config.num_hidden_layers):
        for name, seconds in block_seconds(count_block(model.config, index)).items():
            total[name] = total.get(name, 0.0) + seconds / 3600
    return total


def block_seconds(block: Block) -> dict[str, float]:
    step = BATCH * LENGTH
    everything = PRESET.num_calibration_samples * LENGTH
    attention = 2 * LENGTH * block.attention  # operations of one token, forward

    def forward(tokens: float, weights: float) -> float:
        return tokens * (2 * weights + attention) / FLOPS

    active = block.dense + block.active
    return {
        "forward and backward": PRESET.iters * step * (6 * active + 3.5 * attention) / FLOPS,
        "memory traffic of steps": PRESET.iters
        * (16 * block.dense + 22 * block.experts)
        / BANDWIDTH,
        "launches for experts": PRESET.iters * block.expert_layers * LAUNCHES * LAUNCH,
        "other forward passes": forward(everything, block.weights)
        + forward(everything * (1 + 6 / 8), active),
        "scale search": SEARCH_PASSES * 6 * block.weights / BANDWIDTH,
        **{f"moved from and to {name}": 4 * block.weights / speed for name, speed in MOVED.items()},
    }


def check() -> list[tuple[int, int, int, float, float, int, float]]:
    """
    :return: width, samples, tokens, MiB counted, saved for the backward pass among them, MiB
        measured, and what activations take as a multiple of what is saved
    """
    rows = []
    for width, samples, length, measured in MEASURED:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 192),
            attn_implementation="sdpa",
        )
        block = count_block(config, 0)
        parts = device_bytes(block, saved_bytes_per_token(config, 0, length), 64, 4, length)
        del parts["full precision"]  # in the model already
        parts["captured"] = 2 * 2 * samples * length * width + 2 * samples * length**2
        counted, saved = sum(parts.values()) / MIB, parts[SAVED] / MIB
        multiple = (measured - counted + saved) / saved
        rows.append((width, samples, length, counted, saved, measured, multiple))
    return rows


# ---------------------------------------------------------------------- tables


def table(title: str, columns: list[dict[str, float]], kinds: dict[str, str]) -> list[str]:
    lines = [
        f"| {title} | {' | '.join(model.name for model in MODELS)} | kind |",
        "| --- " * (len(MODELS) + 2) + "|",
    ]
    for name in columns[0]:
        values = " | ".join(
            f"{column[name]:.{2 if column[name] < 10 else 1}f}" for column in columns
        )
        lines.append(f"| {name} | {values} | {kinds.get(name, 'counted')} |")
    return [*lines, ""]


def markdown() -> str:
    device, cpu, time = [], [], []
    for model in MODELS:
        last = model.config.num_hidden_layers - 1  # of the largest kind
        block = count_block(model.config, last)
        saved = COUNTED_AT * saved_bytes_per_token(model.narrow, last)
        parts = device_bytes(block, saved, model.group_size, BATCH, LENGTH)
        weights = {"weights of the largest block, billions": block.weights / 1e9}
        device.append(
            weights
            | {name: size / GB for name, size in parts.items()}
            | {
                name: sum(case.values()) / GB
                for name, case in {
                    "peak": parts,
                    "peak, batches of 4": in_batches(parts, 4),
                    "peak, batches of 2": in_batches(parts, 2),
                    PESSIMISTIC: with_scratch(parts),
                    f"{PESSIMISTIC}, batches of 4": with_scratch(in_batches(parts, 4)),
                    f"{PESSIMISTIC}, batches of 2": with_scratch(in_batches(parts, 2)),
                    "more if a step is several passes": {"gradients": 2 * block.experts},
                }.items()
            }
        )
        parts = cpu_bytes(model)
        names = list(parts)
        cpu.append(
            {name: size / GB for name, size in parts.items()}
            | {"beyond the model": sum(parts[name] for name in names[1:]) / GB}
        )
        spent = hours(model)
        disk = spent.pop("moved from and to disk")
        floor = sum(spent.values())
        from_disk = floor - spent["moved from and to CPU memory"] + disk
        time.append(
            spent
            | {
                "floor": floor,
                "floor, model on the disk": from_disk,
                f"{OF_THE_FLOOR} times the floor": OF_THE_FLOOR * floor,
            }
        )
    assumed = "extrapolated from assumed speeds"
    lines = table(
        f"device memory, GB, batches of {BATCH} x {LENGTH}",
        device,
        {
            SAVED: f"counted at 1/{COUNTED_AT} width, extrapolated",
            **{f"peak{x}": "sum" for x in BATCHES},
            **{f"{PESSIMISTIC}{x}": "sum, extrapolated from a CPU" for x in BATCHES},
        },
    )
    lines += table("CPU memory, GB", cpu, {"beyond the model": "sum"})
    kinds = dict.fromkeys(time[0], assumed)
    lines += table(
        f"hours, {PRESET.iters} iterations",
        time,
        kinds
        | {"launches for experts": "assumed", "floor": "sum", "floor, model on the disk": "sum"}
        | {f"{OF_THE_FLOOR} times the floor": "largest ratio measured on a CPU"},
    )
    lines += [
        "| the formulas beside one block on a CPU: width | samples | tokens | counted, MiB "
        "| of it saved for the backward pass | measured, MiB | activations / saved |",
        "| --- " * 7 + "|",
    ]
    for width, samples, length, counted, saved, measured, multiple in check():
        lines.append(
            f"| {width} | {samples} | {length} | {counted:.0f} | {saved:.0f} | {measured} "
            f"| {multiple:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
