"""One W4 checkpoint for each architecture of the catalogue, with what Transformers computes.

The models are those of `tests/architectures`, twice as wide: vLLM's attention on a CPU takes heads
of 32 and more. For each this writes

    OUTPUT/<name>/checkpoint/       what a user's folder holds: the saved model, its processor
    OUTPUT/<name>/reference.json    prompts, their log-probabilities, greedy continuations

    python make_architecture_checkpoints.py OUTPUT [--only NAME ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from llmcompressor.core import reset_session
from llmcompressor.modeling.moe.linearize import linearize_moe
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "architectures")]

import catalogue  # noqa: E402
from catalogue import CATALOGUE, Architecture  # noqa: E402
from checks import modifier, run  # noqa: E402
from conftest import VOCABULARY, tiny_tokenizer  # noqa: E402
from processor_files import write_processor  # noqa: E402

WIDTHS = {
    *("hidden_size", "intermediate_size", "ffn_dim", "ffn_hidden_size", "embed_dim"),
    *("word_embed_proj_dim", "head_dim", "query_pre_attn_scalar", "mrope_section", "mamba_d_head"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    *("intermediate_size_mlp", "hidden_size_per_layer_input", "out_hidden_size", "projection_dim"),
    *("projector_input_dim", "projector_output_dim", "vision_output_dim"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim"),
    "v_head_dim",
}
# What vLLM needs beside: of DeepSeek's release the fields that Transformers does not read, and the
# sizes of its attention, the only ones it has; a convolution in steps of 32; prompts whose tokens
# see those before them only.
FIELDS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
        "qk_head_dim": 96,
    },
    "Granite 4": {"mamba_d_state": 16},
    "PaliGemma": {"text_config": {"use_bidirectional_attention": False}},
}
NUM_PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 3, 14, 6


def widened(fields: dict[str, Any]) -> dict[str, Any]:
    """:return: a configuration's fields with all widths doubled, those of its parts too"""

    def new(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return widened(value)
        if name not in WIDTHS or value is None:
            return value
        return [2 * one for one in value] if isinstance(value, list) else 2 * value

    return {name: new(name, value) for name, value in fields.items()}


def wide(architecture: Architecture) -> Architecture:
    def config() -> Any:
        narrow = architecture.config()
        fields = widened(narrow.to_dict())
        for name, value in FIELDS.get(architecture.name, {}).items():
            fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
        return type(narrow).from_dict(fields)

    return replace(architecture, config=config)


# Parts that releases name in another way than Transformers 5 names those of a new model.
RELEASE_NAMES = {
    "clip_vision_model": ("vision_tower.", "vision_tower.vision_model."),
    "siglip_vision_model": ("vision_tower.", "vision_tower.vision_model."),
}


def as_released(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """
    :param folder: that `model` was loaded from; its tensors get the names of a release
    :return: what Transformers loads from it; it saves it under the same names
    """
    part = getattr(model.config, "vision_config", None)
    if part is None or part.model_type not in RELEASE_NAMES:
        return model
    old, new = RELEASE_NAMES[part.model_type]
    path = folder / "model.safetensors"
    tensors = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return linearize_moe(type(model).from_pretrained(folder, dtype=torch.bfloat16))


def quantize(architecture: Architecture, folder: Path) -> PreTrainedModel:
    model = as_released(architecture.build(folder), folder)
    return run(architecture, model, architecture.samples(), modifier(architecture, "none"))


def processor(architecture: Architecture) -> Any:
    """:return: of images and text, or None for a language model"""
    if architecture.samples is catalogue.text_samples:
        return None
    with mock.patch.object(catalogue, "processed", lambda make, image: make()):
        return architecture.samples()


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """:return: log-probabilities of each prompt's tokens, and what greedy decoding appends"""
    found = []
    for token_ids in prompts:
        tokens, margins = list(token_ids), []
        for _ in range(NEW_TOKENS):
            ids = torch.tensor([tokens])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            best = logits[-1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
        logprobs = logits[: len(token_ids) - 1].log_softmax(-1)
        following = torch.tensor(token_ids[1:])
        found.append(
            {
                "token_ids": token_ids,
                "logprobs": logprobs.gather(1, following[:, None])[:, 0].tolist(),
                "continuation": tokens[len(token_ids) :],
                "margins": margins,
            }
        )
    return found


def slug(name: str) -> str:
    """:return: the folder of a row"""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def make(architecture: Architecture, folder: Path, original: Path) -> None:
    """
    :param folder: of the row
    :param original: for the model before; LLM-Compressor looks there when it saves
    """
    model = quantize(architecture, original)
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PROMPTS, PROMPT_LENGTH)
    prompts = torch.randint(3, VOCABULARY, shape, generator=generator).tolist()
    # Where Transformers loads the checkpoint, its logits are these too (tests/architectures), but
    # it rounds the experts' weights to bfloat16.
    exact = copy.deepcopy(model).float().eval()
    found = {
        "float32": answers(exact, prompts),
        "bfloat16": answers(model.eval(), prompts),
    }
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint, save_compressed=True)
    words = processor(architecture) or tiny_tokenizer()
    write_processor(words, model.config.model_type, checkpoint)
    reference = {"name": architecture.name, "family": architecture.family, "prompts": found}
    (folder / "reference.json").write_text(json.dumps(reference, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+")
    arguments = parser.parse_args()
    for architecture in CATALOGUE:
        if arguments.only and architecture.name not in arguments.only:
            continue
        folder = arguments.output / slug(architecture.name)
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as original:
            make(wide(architecture), folder, Path(original))
        reset_session()
        print(f"{architecture.name}: {folder}", flush=True)


if __name__ == "__main__":
    main()
