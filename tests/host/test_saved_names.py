"""host/saved_names.py: names in the files."""

from __future__ import annotations

import pytest
from conftest import tiny_llama
from safetensors import safe_open
from tiny_mixtures import tiny_mixture
from torch import nn

from autoround_modifier.host.saved_names import name_experts_as_released, saved_name


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("Mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("MiniMaxM2", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("Phimoe", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ("Qwen3Moe", "model.layers.0.mlp.experts.3.gate_proj.weight"),
        ("GraniteMoe", "model.layers.0.block_sparse_moe.experts.3.gate_proj.weight"),
    ],
)
def test_experts_get_the_names_of_the_release(prefix, expected, tmp_path):
    model = tiny_mixture(tmp_path / "original", prefix)
    (path,) = (x for x, _ in model.named_parameters() if "layers.0" in x and "3.gate_proj" in x)
    name_experts_as_released(model)
    name_experts_as_released(model)  # nothing more
    assert saved_name(model)(path) == expected
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert expected in file.keys()  # noqa: SIM118
        names = {saved_name(model)(name) for name in model.state_dict()}
        assert set(file.keys()) == names


def test_names_stay_where_nothing_renames_them():
    model = tiny_llama()
    name_experts_as_released(model)
    assert saved_name(model)("model.layers.0.mlp.up_proj.weight") == (
        "model.layers.0.mlp.up_proj.weight"
    )
    assert saved_name(nn.Linear(2, 2))("weight") == "weight"
