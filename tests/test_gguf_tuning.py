"""Models tuned in types of GGUF: what is tuned, saved, resumed and refused."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from conftest import quantize, tiny_llama
from helpers import quantized_layers, saved_tensors
from transformers import AutoModelForCausalLM

from autoround_modifier import AutoRoundModifier
from autoround_modifier.checkpoints.gguf_blocks import SavedBlocks

FAST = {"iters": 2, "batch_size": 4, "ignore": ["lm_head"]}


def tuner(scheme: str, **fields) -> AutoRoundModifier:
    return AutoRoundModifier(scheme=scheme, **{**FAST, **fields})


def weights_of_blocks(folder) -> dict[str, torch.Tensor]:
    """Layer -> its weight as somebody else's code reads the blocks, float32."""
    saved = SavedBlocks(folder)
    return {
        name: torch.from_numpy(
            gguf.quants.dequantize(
                saved.blocks(name).numpy(), gguf.GGMLQuantizationType[kind.upper()]
            )
        )
        for name, kind in saved.types.items()
    }


@pytest.mark.parametrize("scheme", ["gguf:q2_k", "gguf:q3_k_m", "GGUF:Q4_K_M", "gguf:q6_k"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_weights_are_those_of_the_blocks(scheme, dtype, tmp_path, log):
    model = tiny_llama(dtype, hidden_size=256)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model = quantize(model, tuner(scheme), output_dir=tmp_path / "out")
    found = weights_of_blocks(tmp_path / "out")
    assert len(found) == 14
    tensors = saved_tensors(tmp_path / "out")
    in_memory = dict(model.named_parameters())
    for name, weight in found.items():
        assert torch.equal(tensors[f"{name}.weight"], weight.to(dtype)), name
        assert torch.equal(in_memory[f"{name}.weight"], weight.to(dtype)), name
        assert not torch.equal(tensors[f"{name}.weight"], before[f"{name}.weight"])
    for name, tensor in tensors.items():
        if name.removesuffix(".weight") not in found:
            assert torch.equal(tensor, before[name]), name
    assert not quantized_layers(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [line for line in log if line.startswith("ERROR")]
