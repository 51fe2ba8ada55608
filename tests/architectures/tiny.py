"""
A tiny configuration of any model class of Transformers, by rules on the names of its fields.

A rule gives a field its value where the default is larger. Sub-configurations follow the same
rules. `EXCEPTIONS` holds what rules do not give.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["EXCEPTIONS", "IMAGE_SIZE", "VOCABULARY", "tiny_config", "tiny_inputs"]

VOCABULARY = 160
TEXT_VOCABULARY = 128  # ids from here on stand for images, video and audio
WIDTH = 64
HEAD_DIM = 16
IMAGE_SIZE = 32
PATCH_SIZE = 8
MAX_LAYERS = 4

# Names of fields (full matches) with their value, the first that matches
RULES: list[tuple[str, Any]] = [
    (r"pad_token_id|sep_token_id|cls_token_id|mask_token_id|unk_index|mask_index", 0),
    (r"(bos|eos|eod|decoder_start|forced_bos|forced_eos)_token_id", 1),
    (r"(type|task_type|mel|token_type)_vocab_size", 2),
    (r".*vocab_size.*|.*_vocab|num_embeddings|num_centroids", VOCABULARY),
    (r".*(max|original_max).*position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 64),
    (r"max_(source|target)_positions|model_max_length|max_sequence_length|seq_len|seq_length", 64),
    (r"max_2d_position_embeddings", 64),
    # state-space layers: two times the width is four heads of 32
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"(mamba_)?chunk_size|attention_chunk_size", 8),
    (r"time_step_rank|mamba_dt_rank", 32),
    # attention
    (r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"linear_num_key_heads", 2),
    (r"(.*_)?(num_heads|n_heads?|attention_heads|num_attention_heads|num_value_heads)", 4),
    (r"index_n_heads|n_mamba_heads|linear_num_heads", 4),
    (r"index_head_dim", 32),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(.*_)?(head_dim|head_size|d_kv|d_head|dim_head|kv_channels|attention_head_dim)", HEAD_DIM),
    (r"query_pre_attn_scalar|rotary_dim", HEAD_DIM),
    (r"(.*_)?(lora_rank|lowrank|adapter_rank|gated_norm_rank|laurel_rank)", 32),
    (r"(.*_)?(sliding_window|sliding_window_size|attention_window_size|local_attention)", 8),
    (r"keep_window_size|index_local_blocks", 8),
    # experts
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k|top_k_experts)", 2),
    (r"(.*_)?(num|n)_shared_experts", 1),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts|zero_expert_num|n_experts)", 4),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups", 1),
    (r"(.*_)?(moe|expert|shared)(_.*)?_intermediate_size|expert_ffn_hidden_size", WIDTH),
    (r"share_expert_dim|shared_intermediate_size", WIDTH),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # layers
    (r"num_hidden_layers|n_layers?|num_layers|layers|depth|resampler_depth|num_blocks", 2),
    (r"(encoder|decoder)_layers|num_(encoder|decoder)_layers|num_layers_per_stack", 2),
    (r"(.*_)?num_hidden_layers|num_mem_blocks", 2),
    (r"num_nextn_predict_layers|mtp_num_hidden_layers", 0),
    # widths
    (r"hidden_size_per_layer_input", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim)(_.*)?", 2 * WIDTH),
    (r"d_ff|dff|dim_ff|n_inner|d_inner|feed_forward_size|ffn_embed_dim", 2 * WIDTH),
    (r"(.*_)?hidden_size(_.*)?|(.*_)?hidden_dim|lru_width", WIDTH),
    (r"d_model|n_embd|(.*_)?(embed|embedding|emb|proj|projection|embds)_(dim|size)", WIDTH),
    (r"output_dim|(.*_)?projector_(input|output)_dim|vision_output_dim|projector_hidden", WIDTH),
    # images
    (r"image_size|crop_size|resolution", IMAGE_SIZE),
    (r"patch_size", PATCH_SIZE),
    (r"num_position_embeddings|num_patches|num_image_tokens", (IMAGE_SIZE // PATCH_SIZE) ** 2),
    (r"pos_emb_(height|width|time)", IMAGE_SIZE // PATCH_SIZE),
    (r"num_query_tokens|resampler_n_latents|resampler_num_latents|latent_query_num", 8),
    (r"window_size", 2 * PATCH_SIZE),
]
NUM_QUERIES = 8
# Of the classes that do not take text alone
IMAGE_SHAPES: dict[str, tuple[int, ...]] = {
    "BlipForConditionalGeneration": (1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "Blip2ForConditionalGeneration": (1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "InstructBlipForConditionalGeneration": (1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "InstructBlipVideoForConditionalGeneration": (1, 1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "IdeficsForVisionText2Text": (1, 1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "Kosmos2ForConditionalGeneration": (1, 3, IMAGE_SIZE, IMAGE_SIZE),
    "Pix2StructForConditionalGeneration": (1, 8, 2 + 3 * PATCH_SIZE**2),
    "UdopForConditionalGeneration": (1, 3, IMAGE_SIZE, IMAGE_SIZE),
}
COMPILED_RULES = [(re.compile(pattern), value) for pattern, value in RULES]
MEDIA_TOKEN = re.compile(
    r"(.*_)?(image|video|audio|vision|boi|eoi|boa|eoa|im|user|boc|img)(_.*)?_(id|index|ids)"
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")

# Fields that are None, or smaller, and without which a default would not fit the other fields
REPLACED = {"head_dim": HEAD_DIM, "mamba_d_head": 32, "mamba_head_dim": 32, "mamba_headdim": 32}

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
GLM_MROPE = {**MROPE, "partial_rotary_factor": 1.0}
SMALL_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 32,
}
MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1, "chunk_size": 8}

# By class of the configuration: fields that rules do not give
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Mamba2Config": MAMBA2,
    "Qwen2VLTextConfig": {"rope_parameters": MROPE},
    "Qwen2_5_VLTextConfig": {"rope_parameters": MROPE},
    "PaddleOCRTextConfig": {"rope_parameters": MROPE},
    "Qwen2_5OmniTextConfig": {"rope_parameters": MROPE},
    "Glm4vTextConfig": {"rope_parameters": GLM_MROPE},
    "Glm46VTextConfig": {"rope_parameters": GLM_MROPE},
    "GlmOcrTextConfig": {"rope_parameters": GLM_MROPE},
    "Glm4vMoeTextConfig": {"rope_parameters": GLM_MROPE},
    "ErnieVLMoeTextConfig": {"rope_parameters": MROPE},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]}},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 150},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 150},
    "BambaConfig": {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "JambaConfig": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_DIM,
        "num_key_value_heads": 4,
    },
    "Zamba2Config": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "Lfm2Config": {
        "num_hidden_layers": 2,
        "full_attn_idxs": [1],
        "layer_types": ["conv", "full_attention"],
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "NemotronConfig": {"num_key_value_heads": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
    },
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "BltConfig": {"use_cache": False},
    "Blip2Config": {"image_token_index": 150},
    "InstructBlipConfig": {"image_token_index": 150},
    "InstructBlipVideoConfig": {"video_token_index": 150},
    "Pix2StructVisionConfig": {"patch_embed_hidden_size": 3 * PATCH_SIZE**2},
    "DiffusionGemmaConfig": {"vision_config": "Gemma4VisionConfig"},
    "XmodConfig": {"default_language": "en_XX"},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {**MROPE, "mrope_section": [2, 3, 3]}}
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "laurel_rank": 32,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "HrmTextConfig": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "ChameleonVQVAEConfig": SMALL_VQ,
    "JanusVQVAEConfig": SMALL_VQ,
    "Emu3VQVAEConfig": SMALL_VQ,
    "Florence2VisionConfig": {
        "embed_dim": (32, 32, 64, 64),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 4, 4),
        "num_groups": (2, 2, 4, 4),
    },
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": WIDTH,
    },
    "HunYuanVLTextConfig": {"rope_parameters": MROPE},
    "HunYuanVLVisionConfig": {"max_image_size": 64, "max_vit_seq_len": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 150, "IMGIMG1A": 151}},
    "Emu3Config": {"vocabulary_map": {"<image>": 150, "<|extra_200|>": 151}},
    "Granite4VisionConfig": {
        "text_config": "Granite4VisionTextConfig",
        "deepstack_layer_map": [(-1, 0)],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "1/2",
    },
    "InklingVisionConfig": {"num_hidden_layers": 2},
    "Step3p7TextConfig": {"sliding_window": 8},
}


def tiny_config(config_class: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """
    :param config_class: of a model
    :param given: fields that are not left to rules
    :return: of a model of about 100 thousand parameters
    """
    return _tiny(config_class(), _TokenIds(), given)


class _TokenIds:
    """Ids of tokens that stand for images, video and audio, one after the other."""

    def __init__(self) -> None:
        self.next_id = TEXT_VOCABULARY

    def take(self) -> int:
        self.next_id += 1
        return self.next_id - 1


def _tiny(
    default: PreTrainedConfig, token_ids: _TokenIds, given: dict[str, Any]
) -> PreTrainedConfig:
    values = _values(default)
    given = {**EXCEPTIONS.get(type(default).__name__, {}), **given}
    plain = {} if type(default).has_no_defaults_at_init else _values(type(default)())
    # What a sub-configuration has from its parent, and what rules make smaller
    changed = {
        name: value
        for name, value in values.items()
        if isinstance(value, (int, float, str)) and value != plain.get(name, value)
    }
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            own = given.pop(name, {})
            if isinstance(own, str):
                value, own = getattr(transformers, own)(), {}
            changed[name] = _tiny(value, token_ids, own)
        elif name in given:
            changed.pop(name, None)
        elif MEDIA_TOKEN.fullmatch(name):
            if isinstance(value, int):
                changed[name] = token_ids.take()
            elif isinstance(value, (list, tuple)):
                changed[name] = type(value)(token_ids.take() for _ in value)
        elif isinstance(value, dict) and name == "rope_parameters":
            if _rope(value) != value:
                changed[name] = _rope(value)
        elif _smaller(name, value) != value:
            changed[name] = _smaller(name, value)
    changed |= {
        name: small
        for name, small in REPLACED.items()
        if name in values and (values[name] is None or isinstance(values[name], (int, str)))
    }
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        changed["num_key_value_heads"] = 4  # of latent attention: as many as heads
    changed |= _layers(values)
    changed |= {
        name: _tiny(getattr(transformers, value)(), token_ids, {})
        if name.endswith("_config") and isinstance(value, str)
        else value
        for name, value in given.items()
    }
    if "is_decoder" in values and "is_encoder_decoder" in values and not default.is_encoder_decoder:
        changed.setdefault("is_decoder", True)
    return type(default)(**changed)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """:return: of its fields, some of which are stored under the name that others know them by"""
    values = vars(config)
    return {
        field.name: values[name]
        for field in fields(config)
        if (name := field.name) in values
        or (name := config.attribute_map.get(field.name, "")) in values
    }


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    for pattern, small in COMPILED_RULES:
        if pattern.fullmatch(name):
            if isinstance(value, int):
                return min(value, small) if value >= 0 else value
            if name in ("image_size", "patch_size") and all(type(one) is int for one in value):
                return type(value)(min(one, small) for one in value)
            if name.endswith("token_id"):
                return small
            return value
    return value


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary embeddings sum to half a head."""
    made = {}
    for key, one in value.items():
        if isinstance(one, dict):
            made[key] = _rope(one)
        elif key.endswith("mrope_section"):
            made[key] = [2, 3, 3]
        elif key == "original_max_position_embeddings":
            made[key] = 64
        else:
            made[key] = one
    return made


def _layers(values: dict[str, Any]) -> dict[str, Any]:
    """
    One layer of each kind, where lists say what each layer is.

    :return: the number of layers, and those lists
    """
    count_name = next((name for name in LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if count_name is None:
        return {}
    count = values[count_name]
    per_layer = {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == count
        and count > 1
        and all(isinstance(one, (str, int, float)) or one is None for one in value)
    }
    if not per_layer:
        return {}
    kinds = list(zip(*per_layer.values(), strict=True))
    chosen = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]][:MAX_LAYERS]
    if len(chosen) == 1:
        chosen = [0, 1]
    lists = {
        name: type(value)(_smaller(name, value[index]) for index in chosen)
        for name, value in per_layer.items()
    }
    return {**lists, count_name: len(chosen)}


def tiny_inputs(
    model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """
    :param ids: token ids, (1, tokens)
    :param generator: of random images
    :return: what the model's forward method needs
    """
    name = type(model).__name__
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if name not in IMAGE_SHAPES:
        return inputs
    pixels = torch.rand(IMAGE_SHAPES[name], generator=generator).to(model.dtype)
    if name == "Pix2StructForConditionalGeneration":
        pixels[..., :2] = torch.arange(1, 9)[:, None]  # row and column of each patch
        return {"flattened_patches": pixels, "decoder_input_ids": ids}
    inputs["pixel_values"] = pixels
    if name.startswith(("Blip2", "InstructBlip")):
        if name.startswith("InstructBlip"):
            inputs["qformer_input_ids"] = ids.clone()
        config = model.config
        image = config.video_token_index if "Video" in name else config.image_token_index
        ids[:, :NUM_QUERIES] = image
    if name.startswith("Idefics"):
        inputs["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.long)
    if name.startswith("Kosmos2"):
        mask = torch.zeros_like(ids)
        mask[:, 1 : 1 + NUM_QUERIES] = 1
        inputs["image_embeds_position_mask"] = mask
    if name.startswith("Udop"):
        corners = torch.rand(*ids.shape, 4, generator=generator)
        inputs["bbox"] = corners.sort(dim=-1).values.to(model.dtype)
    return inputs
