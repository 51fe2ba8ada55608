"""The files of a processor, as a release has them beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from images import IMAGE_SIZE, PATCH_SIZE, ImageAndText, tokenizer


@dataclass(frozen=True)
class Release:
    """
    What the folder of a model says of a processor that needs torchvision, and so cannot be made in
    the package's environment.

    :ivar processor: its class
    :ivar tokens: special tokens by attribute; their ids follow those of the vocabulary
    :ivar video: the class of its video processor, which takes the fields of the image processor
    :ivar fields: of the processor
    :ivar images: fields of the image processor, where the catalogue has none
    """

    processor: str
    tokens: dict[str, str]
    video: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)


QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
# Gemma 3 and PaliGemma look these up.
NEW_LINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
PIXTRAL = {"image_token": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}
RELEASES = {
    "qwen2_vl": Release("Qwen2VLProcessor", QWEN, "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": Release("Qwen2_5_VLProcessor", QWEN, "Qwen2VLVideoProcessor"),
    "qwen3_vl": Release("Qwen3VLProcessor", QWEN, "Qwen3VLVideoProcessor"),
    "smolvlm": Release(
        "SmolVLMProcessor",
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
            "video_token": "<video>",
        },
        "SmolVLMVideoProcessor",
        {"image_seq_len": 4},
    ),
    "internvl": Release(
        "InternVLProcessor",
        {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        "InternVLVideoProcessor",
        {"image_seq_length": 4},
    ),
    "llava": Release("PixtralProcessor", PIXTRAL, fields={"patch_size": PATCH_SIZE}),
    "mistral3": Release(
        "PixtralProcessor", PIXTRAL, fields={"patch_size": PATCH_SIZE, "spatial_merge_size": 2}
    ),
    "llama4": Release(
        "Llama4Processor",
        {
            "patch_token": "<|patch|>",
            "image_token": "<|image|>",
            "start_of_image_token": "<|image_start|>",
            "end_of_image_token": "<|image_end|>",
            "tile_x_separator_token": "<|tile_x_separator|>",
            "tile_y_separator_token": "<|tile_y_separator|>",
        },
        fields={"patch_size": PATCH_SIZE},
        images={
            "image_processor_type": "Llama4ImageProcessor",
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "max_patches": 1,
        },
    ),
}


def write_processor(processor: Any, model_type: str, folder: Path) -> None:
    """
    :param processor: a tokenizer, a processor of images and text, or what stands for one
    :param model_type: of the model's configuration
    """
    release = RELEASES.get(model_type)
    stands_in = isinstance(processor, ImageAndText) or not hasattr(processor, "image_processor")
    if release is None or not stands_in:
        if hasattr(processor, "tokenizer"):
            processor.tokenizer.add_tokens(NEW_LINES)
        processor.save_pretrained(folder)
        return
    words = tokenizer(**release.tokens)
    words.save_pretrained(folder)
    images = release.images or processor.image_processor.to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    described = {"processor_class": release.processor, **release.fields}
    (folder / "processor_config.json").write_text(json.dumps(described))
    if release.video is not None:
        videos = {**images, "video_processor_type": release.video}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "processor_class": release.processor})
    )
