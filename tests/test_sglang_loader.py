"""Which names of layers SGLang finds: `tests/sglang` asks its own code about the same cases."""

from __future__ import annotations

import pytest
import torch

from autoround_modifier.engines.check import find_problems, problems_of_names
from autoround_modifier.engines.layout import CheckpointLayout, TensorLayout
from autoround_modifier.engines.sglang_loader import SAYING, SILENT, sglang_problems

SILENT_CLASS, SAYING_CLASS = "LlamaForCausalLM", "Gemma2ForCausalLM"
BLOCK = "model.layers.0"
ATTENTION = [f"{BLOCK}.self_attn.{x}_proj" for x in "qkv"]
REST = [f"{BLOCK}.{x}_proj" for x in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]
QKV, GATE_UP = f"{BLOCK}.self_attn.qkv_proj", f"{BLOCK}.mlp.gate_up_proj"
NO_TARGET = "looks for layers that it fuses by their own names"
TAKEN_FOR_PLAIN = "takes quantized layers for layers in 16 bits"
TAKEN_FOR_QUANTIZED = "takes layers in 16 bits for quantized ones"
ANOTHER = "gives layers another scheme"
SEVERAL = "fuses layers into one, which has one scheme"


def layout(
    *targets: list[str],
    ignore: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    architecture: str = SILENT_CLASS,
) -> CheckpointLayout:
    """
    :param targets: of each config group
    :param ignore: of the config
    :param plain: layers that are not quantized
    """
    tensors = {}
    for name in (*ATTENTION, *REST):
        if name in plain:
            tensors[f"{name}.weight"] = TensorLayout((64, 64), torch.bfloat16)
        else:
            tensors[f"{name}.weight_packed"] = TensorLayout((64, 8), torch.int32)
            tensors[f"{name}.weight_scale"] = TensorLayout((64, 2), torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    section = {
        "config_groups": {
            f"group_{i}": {"targets": own, "weights": weights} for i, own in enumerate(targets)
        },
        "ignore": ["lm_head", *ignore],
    }
    config = {
        "architectures": [architecture],
        "model_type": "llama",
        "quantization_config": section,
    }
    return CheckpointLayout(config, tensors)


@pytest.mark.parametrize(
    ("given", "silent", "saying"),
    [
        (layout(["Linear"]), {}, {}),
        (layout([*ATTENTION, *REST]), {NO_TARGET: (QKV, GATE_UP)}, {}),
        (layout([*ATTENTION, *REST, QKV, GATE_UP]), {}, {}),
        (layout([r"re:.*_proj$"]), {}, {}),
        (layout(ATTENTION, REST), {NO_TARGET: (QKV, GATE_UP)}, {}),
        (layout([*ATTENTION, QKV], [*REST, GATE_UP]), {}, {}),
        (layout(ATTENTION, ["Linear"]), {ANOTHER: (QKV,)}, {ANOTHER: (QKV,)}),
        (layout([*ATTENTION, QKV], ["Linear"]), {}, {}),
        (
            layout(ATTENTION[:1], [*ATTENTION[1:], *REST, QKV, GATE_UP]),
            {SEVERAL: (QKV,)},
            {SEVERAL: (QKV,)},
        ),
        (
            layout(["Linear"], ignore=tuple(ATTENTION), plain=tuple(ATTENTION)),
            {TAKEN_FOR_QUANTIZED: (QKV,)},
            {},
        ),
        (layout(["Linear"], ignore=(*ATTENTION, QKV), plain=tuple(ATTENTION)), {}, {}),
        (
            layout([*REST, GATE_UP], ignore=tuple(ATTENTION), plain=tuple(ATTENTION)),
            {NO_TARGET: (QKV,)},
            {},
        ),
        (
            layout(["Linear"], ignore=("self_attn.qkv_proj",)),
            {TAKEN_FOR_PLAIN: (QKV,)},
            {},
        ),
    ],
)
def test_fused_layers_are_found_as_sglang_finds_them(given, silent, saying):
    for architecture, expected in ((SILENT_CLASS, silent), (SAYING_CLASS, saying)):
        given.config["architectures"] = [architecture]
        problems = sglang_problems(given)
        assert len(problems) == len(expected)
        for problem, (what, names) in zip(problems, expected.items(), strict=True):
            assert problem.what.startswith(what)
            assert set(problem.names) == set(names)
            assert str(problem).startswith("SGLang: ")
            assert problem.fatal


def test_nothing_is_said_of_classes_that_are_not_known():
    named = [*ATTENTION, *REST]
    assert not sglang_problems(layout(named, architecture="AnotherForCausalLM"))
    assert not set(SILENT) & set(SAYING)
    unquantized = layout(named)
    del unquantized.config["quantization_config"]
    assert not sglang_problems(unquantized)


def test_it_is_found_beside_the_problems_of_other_engines():
    given = layout([*ATTENTION, *REST])
    assert problems_of_names(given)["sglang"] == sglang_problems(given)
    assert problems_of_names(given)["vllm"] == []
    assert set(find_problems(given)) == {"vllm", "sglang", "transformers"}
