"""Image and text samples, made by Transformers' processors with tiny sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from conftest import VOCABULARY, tiny_tokenizer
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerFast

__all__ = ["IMAGE_SIZE", "IMAGE_TOKEN", "PATCH_SIZE", "from_model", "processed", "tokenizer"]

NUM_SAMPLES = 4
IMAGE_SIZE = 32
PATCH_SIZE = 8
IMAGE_TOKEN = VOCABULARY  # the first special token that is added


def from_model(model: str, file: str, name: str, **fields: Any) -> Any:
    """:return: a class of ``transformers.models.{model}.{file}``, called with ``fields``"""
    return getattr(importlib.import_module(f"transformers.models.{model}.{file}"), name)(**fields)


def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """
    :param tokens: special tokens by attribute (``image_token="<image>"``); their ids follow those
        of the vocabulary, in this order
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<eos>",
        eos_token="<eos>",
        extra_special_tokens=tokens,
    )


def processed(make_processor: Callable[[], Any], image: str) -> Dataset:
    """
    :param make_processor: makes a processor of images and text
    :param image: what stands for the image in the text
    """
    processor = make_processor()
    generator = np.random.default_rng(0)
    samples = []
    for index in range(NUM_SAMPLES):
        pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        text = f"{image} w3 w{10 + index} w{40 + index} w{70 + index} w5"
        made = processor(text=[text], images=[[Image.fromarray(pixels)]], return_tensors="np")
        samples.append({name: value.tolist() for name, value in made.items()})
    return Dataset.from_list(samples)


class ImageAndText:
    """
    Stands for the processors that cannot be made without torchvision, mostly because they process
    videos too: Transformers' image processor, and text in which each image token is repeated.

    :param image_processor: Transformers'
    :param num_tokens: of each image
    :param with_types: add ``mm_token_type_ids``, 1 for the tokens of images
    """

    def __init__(self, image_processor: Any, num_tokens: int, with_types: bool = False) -> None:
        self.image_processor = image_processor
        self.num_tokens = num_tokens
        self.with_types = with_types
        self.tokenizer = tokenizer(image_token="<image>")

    def __call__(
        self, text: list[str], images: list[list[Image.Image]], return_tensors: str
    ) -> Any:
        pixels = self.image_processor(images[0], return_tensors=return_tensors)
        expanded = [one.replace("<image>", "<image>" * self.num_tokens) for one in text]
        made = {**self.tokenizer(expanded, return_tensors=return_tensors), **pixels}
        made.pop("token_type_ids", None)
        if self.with_types:
            made["mm_token_type_ids"] = (made["input_ids"] == IMAGE_TOKEN).astype(int)
        return made
