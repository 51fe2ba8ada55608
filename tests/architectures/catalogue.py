"""Tiny models of many architectures, built from Transformers' configurations, and their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import VOCABULARY, token_samples
from datasets import Dataset
from images import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PATCH_SIZE,
    ImageAndText,
    from_model,
    processed,
    tokenizer,
)
from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import PreTrainedModel

__all__ = ["CATALOGUE", "Architecture"]

# What most configurations have in common. All linear layers have 32, 64 or 128 input features.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def text_samples() -> Dataset:
    """Token ids, each sample a batch of one."""
    return token_samples(4).map(lambda row: {name: [value] for name, value in row.items()})


# Why Transformers 5.17 does not load a checkpoint again
FUSED_EXPERTS = "reads the experts of this architecture from one tensor only"
NO_WEIGHT = "has no attribute .weight"


@dataclass(frozen=True)
class Architecture:
    """
    :ivar name: as in the table
    :ivar family: as in the table
    :ivar config: makes the configuration
    :ivar model_class: name in Transformers
    :ivar samples: makes the calibration data
    :ivar sequential_targets: classes of the blocks that are quantized; None for the model's own
    :ivar ignore: what stays unquantized beside ``lm_head``
    :ivar pipeline: of LLM-Compressor; its default is sequential for each modifier
    :ivar untraced: what `Outcome.traced` says where LLM-Compressor cannot trace all blocks
    :ivar limitation: why Transformers cannot load the checkpoint, as the refusal before the run and
        `Outcome.reloaded` say
    :ivar engine: that the recipe is checked for
    :ivar note: for the table
    """

    name: str
    family: str
    config: Callable[[], Any]
    model_class: str
    samples: Callable[[], Dataset] = text_samples
    sequential_targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    pipeline: str = "independent"
    untraced: str = ""
    limitation: str = ""
    engine: str = "any"
    note: str = ""

    def build(self, folder: Path) -> PreTrainedModel:
        """
        :param folder: where the model is written first, to be loaded as users load theirs
        :return: a model with random weights
        """
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model = model_class(self.config()).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder)
        return linearize_moe(model_class.from_pretrained(folder, dtype=torch.bfloat16))


def text_config(class_name: str, **fields: Any) -> Callable[[], Any]:
    """:return: makes a configuration of a tiny language model"""
    return lambda: getattr(transformers, class_name)(**{**TEXT, **fields})


def dense(name: str, prefix: str, **fields: Any) -> Architecture:
    """:param prefix: of the names of Transformers' classes"""
    return Architecture(
        name, "dense", text_config(f"{prefix}Config", **fields), f"{prefix}ForCausalLM"
    )


def moe(name: str, prefix: str, limitation: str = "", **fields: Any) -> Architecture:
    """Likewise, of a mixture of experts."""
    return replace(
        dense(name, prefix, **fields), family="mixture of experts", limitation=limitation
    )


def hybrid(name: str, prefix: str, limitation: str = "", **fields: Any) -> Architecture:
    """Likewise, of a model with state-space layers."""
    return replace(dense(name, prefix, **fields), family="hybrid", limitation=limitation)


VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def vision_language(
    name: str,
    prefix: str,
    text: dict[str, Any],
    vision: dict[str, Any],
    samples: Callable[[], Dataset],
    text_block: str,
    vision_block: str | None = None,
    vision_limitation: str | None = None,
    vision_not_in_vllm: str = "",
    note: str = "",
    limitation: str = "",
    **fields: Any,
) -> list[Architecture]:
    """
    :param prefix: of the names of Transformers' classes
    :param text: fields of the text configuration beside `TEXT`
    :param vision: fields of the vision configuration beside `VISION`
    :param text_block: class of the language model's blocks
    :param vision_block: class of the vision tower's blocks, if they get a row of their own
    :param limitation: see `Architecture`
    :param vision_limitation: the same for the row of both, where it differs
    :param vision_not_in_vllm: why vLLM refuses the row of both
    :param fields: of the configuration
    :return: a row with the language model quantized, and one with both
    """

    def config() -> Any:
        return getattr(transformers, f"{prefix}Config")(
            text_config={**TEXT, "vocab_size": 160, **text},
            vision_config={**VISION, **vision},
            **fields,
        )

    connectors = "re:.*(projector|connector|merger|patch_embed).*"
    only_text = Architecture(
        name,
        "vision-language",
        config,
        f"{prefix}ForConditionalGeneration",
        samples,
        (text_block,),
        ("re:.*(vision|visual).*", connectors),
        limitation=limitation,
        note=note,
    )
    if vision_block is None:
        return [only_text]
    both = replace(
        only_text,
        name=f"{name}, vision tower too",
        limitation=limitation if vision_limitation is None else vision_limitation,
        untraced=f"not traced: {vision_block}",
        engine="transformers" if vision_not_in_vllm else only_text.engine,
        note="; ".join(x for x in (note, vision_not_in_vllm) if x),
        sequential_targets=(vision_block, text_block),
        ignore=(connectors, "re:.*(vision|visual).*(head|pooler).*"),
    )
    return [only_text, both]


def clip_images() -> Any:
    return from_model(
        "clip",
        "image_processing_pil_clip",
        "CLIPImageProcessorPil",
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=SQUARE,
    )


def llava_samples() -> Dataset:
    return processed(
        lambda: transformers.LlavaProcessor(
            clip_images(),
            tokenizer(image_token="<image>"),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        "<image>",
    )


def llava_next_samples() -> Dataset:
    return processed(
        lambda: transformers.LlavaNextProcessor(
            from_model(
                "llava_next",
                "image_processing_pil_llava_next",
                "LlavaNextImageProcessorPil",
                size={"shortest_edge": IMAGE_SIZE},
                crop_size=SQUARE,
                image_grid_pinpoints=[[32, 64], [64, 32]],
            ),
            tokenizer(image_token="<image>"),
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ),
        "<image>",
    )


def gemma3_samples() -> Dataset:
    return processed(
        lambda: transformers.Gemma3Processor(
            from_model(
                "gemma3", "image_processing_pil_gemma3", "Gemma3ImageProcessorPil", size=SQUARE
            ),
            tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
            image_seq_length=4,
        ),
        "<boi>",
    )


def idefics3_samples() -> Dataset:
    return processed(
        lambda: transformers.Idefics3Processor(
            from_model(
                "idefics3",
                "image_processing_pil_idefics3",
                "Idefics3ImageProcessorPil",
                size={"longest_edge": IMAGE_SIZE},
                max_image_size={"longest_edge": IMAGE_SIZE},
                do_image_splitting=False,
            ),
            tokenizer(image_token="<image>"),
            image_seq_len=NUM_PATCHES // 4,
        ),
        "<image>",
    )


def smolvlm_samples() -> Dataset:
    return processed(
        lambda: ImageAndText(
            from_model(
                "smolvlm",
                "image_processing_pil_smolvlm",
                "SmolVLMImageProcessorPil",
                size={"longest_edge": IMAGE_SIZE},
                max_image_size={"longest_edge": IMAGE_SIZE},
                do_image_splitting=False,
            ),
            NUM_PATCHES // 4,
        ),
        "<image>",
    )


def mllama_samples() -> Dataset:
    return processed(
        lambda: transformers.MllamaProcessor(
            from_model(
                "mllama",
                "image_processing_pil_mllama",
                "MllamaImageProcessorPil",
                size=SQUARE,
                max_image_tiles=2,
            ),
            tokenizer(image_token="<|image|>", python_token="<|python_tag|>"),
        ),
        "<|image|>",
    )


def siglip_images() -> Any:
    return from_model(
        "siglip", "image_processing_pil_siglip", "SiglipImageProcessorPil", size=SQUARE
    )


def paligemma_samples() -> Dataset:
    def make() -> Any:
        images = siglip_images()
        images.image_seq_length = NUM_PATCHES
        return transformers.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))

    return processed(make, "<image>")


def tiled_images() -> Any:
    return from_model(
        "got_ocr2", "image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil", size=SQUARE
    )


def internvl_samples() -> Dataset:
    return processed(lambda: ImageAndText(tiled_images(), NUM_PATCHES // 4), "<image>")


def aya_samples() -> Dataset:
    return processed(
        lambda: transformers.AyaVisionProcessor(
            tiled_images(),
            tokenizer(
                image_token="<image>",
                img_patch_token="<|IMG_PATCH|>",
                start="<|START_OF_IMG|>",
                end="<|END_OF_IMG|>",
                line="<|IMG_LINE_BREAK|>",
                tile="TILE",
                tile_global="TILE_GLOBAL",
            ),
            patch_size=PATCH_SIZE,
            img_size=IMAGE_SIZE,
            downsample_factor=2,
        ),
        "<image>",
    )


def pixtral_samples(spatial_merge_size: int = 1) -> Dataset:
    return processed(
        lambda: ImageAndText(
            from_model(
                "pixtral",
                "image_processing_pil_pixtral",
                "PixtralImageProcessorPil",
                size={"longest_edge": IMAGE_SIZE},
                patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE},
            ),
            NUM_PATCHES // spatial_merge_size**2,
        ),
        "<image>",
    )


def qwen_samples() -> Dataset:
    return processed(
        lambda: ImageAndText(
            from_model(
                "qwen2_vl",
                "image_processing_pil_qwen2_vl",
                "Qwen2VLImageProcessorPil",
                patch_size=PATCH_SIZE,
                size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
            ),
            NUM_PATCHES // 4,
            with_types=True,
        ),
        "<image>",
    )


IMAGES_ALONE = "its image processor alone; the whole processor needs torchvision"
QWEN: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": IMAGE_TOKEN + 1,
    "vision_start_token_id": IMAGE_TOKEN + 2,
    "vision_end_token_id": IMAGE_TOKEN + 3,
    "note": IMAGES_ALONE,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

CATALOGUE = [
    dense("Llama", "Llama"),
    dense("Qwen2", "Qwen2"),
    dense("Qwen3", "Qwen3", head_dim=16),
    dense("Mistral", "Mistral", head_dim=16),
    dense("Phi-3", "Phi3"),
    dense("Gemma 2", "Gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    Architecture(
        "Gemma 3",
        "dense",
        text_config(
            "Gemma3TextConfig",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "Gemma3ForCausalLM",
        note="norms with offset 1, sliding window",
    ),
    dense("OPT", "OPT", ffn_dim=128, word_embed_proj_dim=64),
    dense("GPT-NeoX", "GPTNeoX"),
    replace(dense("Falcon", "Falcon"), limitation=NO_WEIGHT, note="parallel blocks, FalconLinear"),
    dense("Granite", "Granite"),
    dense("OLMo 2", "Olmo2"),
    replace(dense("Cohere", "Cohere"), note="parallel blocks"),
    Architecture(
        "Gemma 3n",
        "dense",
        text_config(
            "Gemma3nTextConfig",
            num_hidden_layers=4,
            head_dim=16,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=32,
            laurel_rank=32,
            altup_num_inputs=2,
            num_kv_shared_layers=2,
            sliding_window=8,
            activation_sparsity_pattern=[0.0] * 4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        "Gemma3nForCausalLM",
        ignore=("re:.*altup.*", "re:.*per_layer_model_projection"),
        pipeline="basic",
        untraced="not traced: Gemma3nTextDecoderLayer",
        note="the last two blocks share keys and values, so `oneshot` takes the pipeline `basic`",
    ),
    replace(
        hybrid(
            "Jamba",
            "Jamba",
            num_hidden_layers=4,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=32,
            use_mamba_kernels=False,
        ),
        ignore=(r"re:.*\.mamba\..*",),
        note="vLLM has the layers of Mamba 1 in 16 bits only",
    ),
    hybrid("Bamba", "Bamba", attn_layer_indices=[1], **MAMBA),
    hybrid(
        "Granite 4",
        "GraniteMoeHybrid",
        FUSED_EXPERTS,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        shared_intermediate_size=64,
        **MAMBA,
    ),
    moe("Mixtral", "Mixtral", num_local_experts=4),
    moe(
        "Qwen2-MoE",
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    moe(
        "Qwen3-MoE",
        "Qwen3Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        head_dim=16,
    ),
    moe("OLMoE", "Olmoe", num_experts=4, num_experts_per_tok=2),
    moe("Granite-MoE", "GraniteMoe", FUSED_EXPERTS, num_local_experts=4),
    moe(
        "DeepSeek-V3",
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
    moe(
        "gpt-oss",
        "GptOss",
        FUSED_EXPERTS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    replace(
        vision_language(
            "Llama 4",
            "Llama4",
            {
                "head_dim": 16,
                "num_local_experts": 4,
                "intermediate_size_mlp": 128,
                "interleave_moe_layer_step": 2,
                "attention_chunk_size": 32,
            },
            {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64},
            text_samples,
            "Llama4TextDecoderLayer",
            image_token_index=IMAGE_TOKEN,
        )[0],
        family="mixture of experts",
    ),
    *vision_language(
        "Qwen2-VL",
        "Qwen2VL",
        {"rope_parameters": MROPE},
        {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2},
        qwen_samples,
        "Qwen2VLDecoderLayer",
        "Qwen2VLVisionBlock",
        **QWEN,
    ),
    *vision_language(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        {"rope_parameters": MROPE},
        {
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        qwen_samples,
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLVisionBlock",
        **QWEN,
    ),
    *vision_language(
        "Qwen3-VL",
        "Qwen3VL",
        {"rope_parameters": MROPE, "head_dim": 16},
        {
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 64,
            "num_position_embeddings": NUM_PATCHES,
            "deepstack_visual_indexes": [0],
        },
        qwen_samples,
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLVisionBlock",
        **QWEN,
    ),
    *vision_language(
        "LLaVA",
        "Llava",
        {"model_type": "llama"},
        {"model_type": "clip_vision_model"},
        llava_samples,
        "LlamaDecoderLayer",
        "CLIPEncoderLayer",
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    ),
    *vision_language(
        "LLaVA-NeXT",
        "LlavaNext",
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "clip_vision_model"},
        llava_next_samples,
        "MistralDecoderLayer",
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    *vision_language(
        "Gemma 3 multimodal",
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
        {},
        gemma3_samples,
        "Gemma3DecoderLayer",
        "SiglipEncoderLayer",
        NO_WEIGHT,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=IMAGE_TOKEN + 1,
        eoi_token_index=IMAGE_TOKEN + 2,
        mm_tokens_per_image=4,
    ),
    *vision_language(
        "Idefics3",
        "Idefics3",
        {"model_type": "llama"},
        {},
        idefics3_samples,
        "LlamaDecoderLayer",
        "Idefics3EncoderLayer",
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    ),
    *vision_language(
        "SmolVLM",
        "SmolVLM",
        {"model_type": "llama"},
        {},
        smolvlm_samples,
        "LlamaDecoderLayer",
        note=IMAGES_ALONE,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    ),
    *vision_language(
        "Mllama",
        "Mllama",
        {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        {
            "attention_heads": 4,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 128,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        mllama_samples,
        "re:.*language_model.layers.[0-9]+$",
        "MllamaVisionEncoderLayer",
        image_token_index=IMAGE_TOKEN,
    ),
    *vision_language(
        "PaliGemma",
        "PaliGemma",
        {"model_type": "gemma", "head_dim": 16, "vocab_size": 2048},
        {"projection_dim": 64, "vision_use_head": False},
        paligemma_samples,
        "GemmaDecoderLayer",
        image_token_index=IMAGE_TOKEN,
        projection_dim=64,
        hidden_size=64,
    ),
    *vision_language(
        "InternVL",
        "InternVL",
        {"model_type": "qwen2"},
        {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
        internvl_samples,
        "Qwen2DecoderLayer",
        "InternVLVisionLayer",
        vision_not_in_vllm="vLLM has the attention of this tower in 16 bits only",
        note=IMAGES_ALONE,
        image_token_id=IMAGE_TOKEN,
    ),
    *vision_language(
        "Pixtral",
        "Llava",
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "pixtral"},
        pixtral_samples,
        "MistralDecoderLayer",
        "PixtralAttentionLayer",
        note=IMAGES_ALONE,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    *vision_language(
        "Mistral 3",
        "Mistral3",
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "pixtral"},
        lambda: pixtral_samples(2),
        "MistralDecoderLayer",
        note=IMAGES_ALONE,
        image_token_index=IMAGE_TOKEN,
    ),
    *vision_language(
        "Aya Vision",
        "AyaVision",
        {
            "model_type": "cohere2",
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "siglip_vision_model"},
        aya_samples,
        "Cohere2DecoderLayer",
        image_token_index=IMAGE_TOKEN + 1,
    ),
]
