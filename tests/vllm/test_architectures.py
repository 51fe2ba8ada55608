"""vLLM loads the unchanged checkpoint of each architecture and computes what Transformers computes.

In float32, with test kernels for packed layers and experts, so that both engines evaluate the same
function almost without rounding; then in bfloat16, as served, with vLLM's own kernels where it has
one for the CPU. Prompts are text; vision towers are loaded. A row that vLLM cannot serve says why,
and the test checks that it is so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dequantizing_experts
import dequantizing_kernel
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from dequantizing_experts import DequantizingExperts
from dequantizing_kernel import DequantizingLinearKernel
from engine import Answers, ask_engine
from reference import gaps
from safetensors import safe_open
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry

# Nats. Measured: at most 5e-4 and 1.3e-3 (Gemma 2, 3: vLLM rounds their soft caps and embeddings),
# and 1e-6 and 3e-6 for all others.
FLOAT32_MEAN, FLOAT32_MAX = 1e-3, 1e-2
# As in test_vllm.py, times Transformers' own distance between bfloat16 and float32.
BFLOAT16_MEAN_FACTOR, BFLOAT16_MAX_FACTOR = 2, 3
NUM_BITS = 4

dequantizing_kernel.register()
dequantizing_experts.register()
# vLLM looks at each class in a process of its own, lest that start CUDA; here it would take half of
# the time.
registry._run_in_subprocess = lambda function: function()


@dataclass(frozen=True)
class Limit:
    """
    What vLLM 0.32 cannot do.

    :ivar reason: for the table
    :ivar error: expression that the message of the refusal matches; empty if it answers wrongly
    :ivar loads: whether it loads the checkpoint whole
    """

    reason: str
    error: str = ""
    loads: bool = False


OTHER_LOGITS = "loaded; vLLM computes other logits for this tiny model also without quantization"
LIMITS = {
    "GPT-NeoX": Limit(OTHER_LOGITS, loads=True),
    "DeepSeek-V3": Limit(OTHER_LOGITS, loads=True),
    "Aya Vision": Limit(OTHER_LOGITS, loads=True),
    "gpt-oss": Limit("vLLM's loader skips experts that are saved one by one"),
    "Jamba": Limit("loaded; no CPU kernel for Mamba 1", "selective_scan_fwd", loads=True),
    "InternVL, vision tower too": Limit(
        "vLLM has the attention of this tower in 16 bits only", "attention.k_proj.weight_packed"
    ),
    "Bamba": Limit("no class in vLLM since 0.24", "does not dispatch through the Transformers"),
    "Mllama": Limit("no class in vLLM since 0.11", "MllamaProcessor"),
    "Mllama, vision tower too": Limit("no class in vLLM since 0.11", "MllamaProcessor"),
}
# Engine arguments beside those of all.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Llama 4": {"block_size": 32},  # it divides the model's attention chunks
    "DeepSeek-V3": {"attention_backend": "CPU_MLA"},  # the other one has no float32
}
# Its last blocks use the keys and values of others; vLLM does not load their own.
UNUSED = {"Gemma 3n": r".*layers\.[23]\.self_attn\.[kv]_proj"}


@dataclass
class Row:
    """One checkpoint."""

    folder: Path

    def __post_init__(self) -> None:
        found = json.loads((self.folder / "reference.json").read_text())
        self.name: str = found["name"]
        self.family: str = found["family"]
        self.prompts: dict[str, list[dict[str, Any]]] = found["prompts"]

    def logprobs(self, dtype: str) -> list[list[float]]:
        return [prompt["logprobs"] for prompt in self.prompts[dtype]]

    def ask(self, dtype: str) -> Answers:
        prompts = [prompt["token_ids"] for prompt in self.prompts[dtype]]
        # The first accepts float32 layers, and then raises: its GEMM has 16-bit types only.
        disabled = "CPUWNA16LinearKernel" if dtype == "float32" else ""
        with (
            mock.patch.dict("os.environ", {"VLLM_DISABLED_KERNELS": disabled}),
            mock.patch("gc.collect", return_value=0),  # half of the time of a tiny engine
        ):
            try:
                return ask_engine(
                    self.folder / "checkpoint",
                    dtype,
                    prompts,
                    new_tokens=len(self.prompts[dtype][0]["continuation"]),
                    max_model_len=64,
                    skip_mm_profiling=True,
                    **ARGUMENTS.get(self.name, {}),
                )
            finally:
                cleanup_dist_env_and_memory()  # groups of mixtures differ from those of others

    def rows_of_weights(self) -> set[bytes]:
        """:return: each row of each packed weight that vLLM uses, dequantized in float32"""
        with safe_open(self.folder / "checkpoint" / "model.safetensors", "pt") as file:
            names = [
                name.removesuffix(".weight_packed")
                for name in file.keys()  # noqa: SIM118
                if name.endswith(".weight_packed")
                and not re.match(UNUSED.get(self.name, "$"), name)
            ]
            assert names
            found = set()
            for name in names:
                shape = torch.Size(file.get_tensor(f"{name}.weight_shape").tolist())
                packed = file.get_tensor(f"{name}.weight_packed")
                scale = file.get_tensor(f"{name}.weight_scale").float()
                integers = unpack_from_int32(packed, NUM_BITS, shape).float()
                weight = integers.view(*scale.shape, -1) * scale[..., None]
                found |= rows(weight.view(shape))
        return found


def rows(weight: torch.Tensor) -> set[bytes]:
    """:return: the bytes of each row; zeros without sign"""
    return {row.numpy().tobytes() for row in (weight.float() + 0.0).flatten(0, -2)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--checkpoints")
    found = sorted(folder.glob("architectures/*/reference.json")) if folder else []
    metafunc.parametrize(
        "row", [Row(path.parent) for path in found], ids=lambda row: row.name, scope="module"
    )


@contextmanager
def unpacked() -> Iterator[set[bytes]]:
    """The rows of all weights that the test kernels dequantize."""
    found: set[bytes] = set()
    of_layer = DequantizingLinearKernel.process_weights_after_loading
    of_experts = DequantizingExperts.dequantized

    def layer_spy(self: Any, layer: torch.nn.Module) -> None:
        of_layer(self, layer)
        found.update(rows(getattr(layer, self.w_q_name)))

    def experts_spy(self: Any, *args: torch.Tensor) -> torch.Tensor:
        weight = of_experts(self, *args)
        found.update(rows(weight))
        return weight

    with (
        mock.patch.object(DequantizingLinearKernel, "process_weights_after_loading", layer_spy),
        mock.patch.object(DequantizingExperts, "dequantized", experts_spy),
    ):
        yield found


def same_tokens(answers: Answers, row: Row) -> bool:
    """:return: whether greedy decoding chose the same tokens, up to the first near tie"""
    for ours, prompt in zip(answers.continuations, row.prompts["float32"], strict=True):
        for token, expected, margin in zip(
            ours, prompt["continuation"], prompt["margins"], strict=True
        ):
            if margin <= 2 * FLOAT32_MAX:
                break
            if token != expected:
                return False
    return True


def test_architecture(row: Row, architectures: list[tuple[str, ...]]) -> None:
    limit = LIMITS.get(row.name)
    if limit is not None and limit.error:
        with unpacked() as found, pytest.raises(Exception, match=limit.error):
            row.ask("float32")
        answer = "loads" if limit.loads else "no"
        architectures.append((row.name, row.family, answer, "", "", "", limit.reason))
        assert found == (row.rows_of_weights() if limit.loads else set())
        return

    with unpacked() as found:
        exact = row.ask("float32")
    mean, maximum = gaps(exact.logprobs, row.logprobs("float32"))
    if limit is not None:
        answer = "loads" if limit.loads else "no"
        architectures.append((row.name, row.family, answer, "", f"{mean:.2g}", "", limit.reason))
        assert mean > 100 * FLOAT32_MEAN
        assert (found == row.rows_of_weights()) == limit.loads
        return

    served = row.ask("bfloat16")
    allowed = gaps(row.logprobs("bfloat16"), row.logprobs("float32"))
    served_mean, served_maximum = gaps(served.logprobs, row.logprobs("float32"))
    kernels = ", ".join(sorted(served.kernels))
    architectures.append(
        (
            *(row.name, row.family, "yes", served.model, f"{mean:.1g}"),
            *(f"{served_mean:.1g} ({allowed[0]:.1g})", kernels),
        )
    )
    assert found == row.rows_of_weights()
    assert mean <= FLOAT32_MEAN
    assert maximum <= FLOAT32_MAX
    assert same_tokens(exact, row)
    assert served_mean <= BFLOAT16_MEAN_FACTOR * allowed[0]
    if row.family != "mixture of experts":  # a near tie of the router may choose another expert
        assert served_maximum <= BFLOAT16_MAX_FACTOR * allowed[1]
