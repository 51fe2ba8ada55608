"""A sample of `make sweep-architectures`: no class ends in silence or with a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import tiny
import transformers
from transformers.models.auto import modeling_auto

# Of every kind; those of the second group failed in some way before
SAMPLE = [
    "LlamaForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",  # has no linear layers
    "Qwen3MoeForCausalLM",
    "BambaForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "BertLMHeadModel",  # its blocks are not the only classes that must not be split
    "MambaForCausalLM",  # classes of blocks inside of one another
    "BioGptForCausalLM",  # names no classes of blocks
    "Gemma3nForCausalLM",  # blocks share keys and values
    "MixtralForCausalLM",  # experts have other names in the file
    "AriaTextForCausalLM",
]
SCRIPT = Path(sweep.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Verdicts by class and variant; in a process of its own, which forks others."""
    folder = tmp_path_factory.mktemp("sweep")
    options = ["--results", folder / "sweep.json", "--workers", "1", "--only", *SAMPLE]
    subprocess.run(
        [sys.executable, SCRIPT, *options],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    return json.loads((folder / "sweep.json").read_text())


@pytest.mark.parametrize("variant", sweep.VARIANTS)
@pytest.mark.parametrize("name", SAMPLE)
def test_right_or_refused(results, name, variant):
    result = results[name][variant]
    assert result["verdict"] in {"right", "refused"}, result["reason"]


def test_a_dense_model_is_right_in_both_variants(results):
    assert [results["LlamaForCausalLM"][one]["verdict"] for one in sweep.VARIANTS] == ["right"] * 2


def test_a_model_without_linear_layers_is_refused_with_the_reason(results):
    result = results["GPT2LMHeadModel"]["w4"]
    assert result["verdict"] == "refused"
    assert "no module matches targets" in result["reason"]


def test_every_causal_and_image_text_class_is_swept():
    names = sweep.class_names()
    assert len(names) == len(set(names)) > 200
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        assert set(mapping.values()) <= set(names)


def test_a_tiny_configuration_has_a_layer_of_each_kind():
    config = tiny.tiny_config(transformers.Qwen3NextConfig)
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.num_hidden_layers == 2
    assert config.num_experts == 4


def test_two_schemes_keep_together_what_engines_fuse():
    config = tiny.tiny_config(transformers.Qwen3MoeConfig)
    groups = sweep.two_schemes(transformers.Qwen3MoeForCausalLM(config), ["lm_head"])
    assert groups["attention"]["targets"] == [
        r"re:.*\.[0-9]+\.self_attn\.(.*\.)?(k_proj|o_proj|q_proj|v_proj)$"
    ]
    assert groups["rest"]["targets"] == [
        r"re:.*\.[0-9]+\.mlp\.(.*\.)?(down_proj|gate_proj|up_proj)$"
    ]


def test_a_warning_that_names_transformers_foretells_a_failure():
    failed = {"verdict": "silent", "reason": "logits", "warnings": ["WARNING Transformers cannot"]}
    assert sweep.judged(failed)["verdict"] == "warned"
    assert sweep.judged({**failed, "warnings": ["WARNING of something"]})["verdict"] == "silent"


def test_the_table_has_a_row_for_each_class_and_the_reasons_of_the_others():
    right = {"verdict": "right", "reason": "", "kind": "dense"}
    made = sweep.table(
        {
            "AForCausalLM": {"w4": right, "two schemes": {**right, "verdict": "refused"}},
            "BForCausalLM": {"w4": {"verdict": "not made", "reason": "cannot make: timm"}},
        }
    )
    assert "| `AForCausalLM` | dense | right | refused |  |" in made
    assert "| `BForCausalLM` | cannot make: timm |" in made
    assert "1 classes. w4: 1 right. two schemes: 1 refused." in made
    assert "1 more could not be made." in made


def test_a_refusal_is_brief_and_does_not_break_the_table():
    reason = "RecipeError: this recipe would save a checkpoint that does not load: vLLM: a|b <c>"
    assert sweep.brief(reason) == "vLLM: a|b <c>"
    assert sweep.markdown_row(["x", sweep.brief(reason)]) == r"| x | vLLM: a\|b \<c> |"
