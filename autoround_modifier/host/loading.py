"""
Loads models that are released in FP8 or MXFP4, in 16 bits, and refuses compressed ones.

Transformers dequantizes such weights one by one while it reads them. Of its release 5.17, three
things are put right: it derives the size of a block from the number of scales, which is wrong where
blocks at the edge are smaller (`dequantize_fp8_blocks`); it would quantize to FP8 again on saving;
and LLM-Compressor leaves a mapping for linearized experts behind, with which no checkpoint of that
architecture can be loaded later in the same process.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.utils import patch_attr
from huggingface_hub import try_to_load_from_cache
from llmcompressor.utils import load_context
from loguru import logger
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
    conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import cached_file
from transformers.utils.quantization_config import Mxfp4Config

from autoround_modifier.config_sections import check_config
from autoround_modifier.errors import CheckpointError, CompressedSourceError, listed
from autoround_modifier.formats.fp8_blocks import dequantize_fp8_blocks, has_blocks
from autoround_modifier.host.layers import disable_onloading, stored_weight

__all__ = [
    "DEQUANTIZED_FORMATS",
    "auto_class",
    "check_not_compressed",
    "load_model",
    "model_positions",
    "save_without_requantizing",
    "source_config",
    "stored_format",
]

# Values of `quant_method` that are dequantized as they are loaded
DEQUANTIZED_FORMATS = ("fp8", "mxfp4")
# Files of formats that `config.json` need not name
FORMAT_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq"}


def source_config(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    :param name: folder of a checkpoint, or a name on the Hub
    :param revision: on the Hub
    :return: its ``config.json``; empty if there is none
    :raises OSError: if it is not there and cannot be downloaded
    :raises CheckpointError: if it is not JSON, or not what a config is
    """
    try:
        path = cached_file(str(name), "config.json", revision=revision)
    except OSError as error:
        raise OSError(
            f"there is no folder `{name}`, and no such model was found: {error}"
        ) from error
    if path is None:
        return {}
    try:
        return check_config(json.loads(Path(path).read_text(encoding="utf-8")), Path(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


def model_positions(config: PreTrainedConfig) -> int | None:
    """:return: the longest text, in tokens, that the model has positions for; None if unlimited"""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def auto_class(config: dict[str, Any]) -> Any:
    """
    :param config: `source_config`
    :return: the class whose `from_pretrained` knows the model
    """
    kind = str(config.get("model_type"))
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def stored_format(
    config: dict[str, Any], name: str | Path = "", revision: str | None = None
) -> str | None:
    """
    :param config: `source_config`
    :param name: where it is from; what is not on this machine is not looked for
    :param revision: on the Hub
    :return: `quant_method` of how the weights are stored, in lower case; None for plain weights
    """
    for part in (config, config.get("text_config") or {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return str(found.get("quant_method", "compressed-tensors")).lower()
    for file, method in FORMAT_FILES.items():
        if (Path(name) / file).is_file() or _is_cached(name, file, revision):
            return method
    return None


def check_not_compressed(model: str | Path | nn.Module, method: str | None = None) -> None:
    """
    :param model: in memory, or its name
    :param method: of a name: `stored_format`
    :raises CompressedSourceError: if its weights are compressed in a format that cannot be
        quantized again, or, in memory, are compressed in any format
    """
    if isinstance(model, (str, Path)):
        if method is not None and method not in DEQUANTIZED_FORMATS:
            raise CompressedSourceError(
                f"{model} is compressed already (`quant_method: {method}`). Quantizing it again "
                "would add its errors to the new ones: start from the model in 16 bits that it "
                f"was made from. Sources in {' and '.join(DEQUANTIZED_FORMATS)} are dequantized."
            )
        return
    method = _format_in_memory(model)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "the model"
    if method in DEQUANTIZED_FORMATS:
        raise CompressedSourceError(
            f"{name} was loaded with its weights in {method}. Load it by "
            "`autoround_modifier.load_model(name)`, which dequantizes them, or give `oneshot` its "
            "name."
        )
    if method is not None:
        raise CompressedSourceError(
            f"{name} is compressed already ({method}). Quantizing it again would add its errors "
            "to the new ones: load the model in 16 bits that it was made from."
        )
    misread = _misread_weights(model)
    if misread:
        raise CompressedSourceError(
            f"Transformers dequantized {name} as it was loaded, and gave the wrong scales to parts "
            f"of weights that blocks do not divide: {listed(misread, 3)}. Load it by "
            "`autoround_modifier.load_model(name)`, or give `oneshot` its name."
        )


def _misread_weights(model: nn.Module) -> list[str]:
    """:return: names of layers that Transformers 5.17 reads wrongly from FP8 (see this module)"""
    for conversion in getattr(model, "_weight_conversions", None) or ():
        for operation in getattr(conversion, "operations", ()):
            if isinstance(operation, Fp8Dequantize):
                config = operation.hf_quantizer.quantization_config
                block, skipped = config.weight_block_size, config.modules_to_not_convert or ()
                return [
                    name
                    for name, layer in model.named_modules()
                    if block
                    and isinstance(layer, nn.Linear)
                    and layer is not model.get_output_embeddings()  # type: ignore[operator]
                    and not any(part in name for part in skipped)
                    and any(
                        n > b and n % b
                        for n, b in zip(stored_weight(layer).shape, block, strict=True)
                    )
                ]
    return []


def _is_divided_unevenly(shape: Sequence[int], block: Sequence[int]) -> bool:
    return any(n > size and n % size for n, size in zip(shape, block, strict=True))


def _format_in_memory(model: nn.Module) -> str | None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        return str(getattr(method, "value", method)).lower()
    with disable_onloading():
        stored = [
            name
            for name, parameter in model.named_parameters()
            if name.endswith(".weight") and parameter.dtype in (torch.float8_e4m3fn, torch.uint8)
        ]
    return f"weights in 8 bits: {listed(stored, 3)}" if stored else None


def _is_cached(name: str | Path, file: str, revision: str | None) -> bool:
    try:
        return isinstance(try_to_load_from_cache(str(name), file, revision=revision), str)
    except ValueError:  # it cannot be a name on the Hub
        return False


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    Load a model to be quantized, with each expert of a mixture as linear layers of its own. Weights
    released in FP8 or MXFP4 are dequantized one by one as they are read.

    :param name: folder of a checkpoint, or a name on the Hub
    :param revision: on the Hub
    :param dtype: of the weights in memory; ``"auto"`` for that of the checkpoint, bfloat16 where
        it is dequantized and names none
    :param trust_remote_code: let a model run its own code
    :param kwargs: further arguments of `from_pretrained`. ``device_map="auto_offload"`` keeps what
        does not fit into main memory on the disk, in ``offload_folder``
    :return: the model
    :raises CompressedSourceError: if the checkpoint is compressed in another format
    """
    config = source_config(name, revision)
    method = stored_format(config, name, revision)
    check_not_compressed(name, method)
    if method is not None:
        stored = config.get("quantization_config") or config["text_config"]["quantization_config"]
        kind = FineGrainedFP8Config if method == "fp8" else Mxfp4Config
        kwargs["quantization_config"] = kind.from_dict({**stored, "dequantize": True})
        text = config.get("text_config") or config
        if dtype == "auto" and not (text.get("dtype") or text.get("torch_dtype")):
            dtype = torch.bfloat16
        logger.info(f"{name} is stored in {method}: dequantized as it is loaded")
    loader = auto_class(config)
    with load_context(loader), _own_mappings(config), _no_aliases(), _dequantized_by_blocks():
        model = loader.from_pretrained(
            name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs
        )
    save_without_requantizing(model)
    return model


def save_without_requantizing(model: nn.Module) -> None:
    """
    Let a model that was dequantized as it was loaded be saved as it is: Transformers would undo
    what it did on loading.

    :param model: updated; another is left as it is
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and any(map(_dequantizes, conversions)):
        kept = [_without_dequantizing(conversion) for conversion in conversions]
        model._weight_conversions = [one for one in kept if one is not None]  # type: ignore[assignment]


def _dequantizes(conversion: WeightTransform) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(one, (Fp8Dequantize, Mxfp4Dequantize)) for one in operations)


def _without_dequantizing(conversion: WeightTransform) -> WeightTransform | None:
    """:return: what a conversion does beside dequantizing; None if that is nothing"""
    if not _dequantizes(conversion):
        scale = "weight_scale_inv" in "".join(conversion._original_target_patterns)
        return None if scale else conversion
    assert isinstance(conversion, WeightConverter)
    operations = [
        one
        for one in conversion.operations
        if not isinstance(one, (Fp8Dequantize, Mxfp4Dequantize))
    ]
    if not operations:
        return None
    sources = [one for one in conversion._original_source_patterns if "_scale_inv" not in one]
    plain = WeightConverter(
        [one.removesuffix("$") for one in sources],
        [one.removesuffix("$") for one in conversion._original_target_patterns],
        operations,
    )
    plain.scope_prefix = conversion.scope_prefix
    plain.base_model_prefix = conversion.base_model_prefix
    return plain


@contextlib.contextmanager
def _own_mappings(config: dict[str, Any]) -> Iterator[None]:
    """Undo what loading linearized experts registers for all later models of this kind."""
    kind = str(config.get("model_type"))
    before = conversion_mapping.get_checkpoint_conversion_mapping(kind)
    registered = kind in conversion_mapping.USER_REGISTERED_MAPPINGS
    try:
        yield
    finally:
        cache = cast(dict[str, Any], conversion_mapping._checkpoint_conversion_mapping_cache)
        if before is None:
            cache.pop(kind, None)
        else:
            cache[kind] = before
        if not registered:
            conversion_mapping.USER_REGISTERED_MAPPINGS.discard(kind)


@contextlib.contextmanager
def _no_aliases() -> Iterator[None]:
    """
    Hide the aliases of old module names. To replace the class of experts, Transformers 5.17 lists
    the names in all its modules, which imports the module behind each alias: all image processors,
    and so torchvision, which need not be installed.
    """
    aliases = {
        module: vars(module)["__dir__"]
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.")
        and "__dir__" in vars(module)
        and vars(module).get("__file__", "") is None
    }
    try:
        for module in aliases:
            vars(module)["__dir__"] = lambda: []
        yield
    finally:
        for module, listing in aliases.items():
            vars(module)["__dir__"] = listing


@contextlib.contextmanager
def _dequantized_by_blocks() -> Iterator[None]:
    """Let Transformers take the size of a block from the config where weights are in FP8."""
    original = Fp8Dequantize._dequantize_one

    def dequantize(
        self: Fp8Dequantize, quantized: Tensor, scales: Tensor, output_dtype: Any = None
    ) -> Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        if not (quantized.is_floating_point() and block and has_blocks(quantized, scales, block)):
            return original(self, quantized, scales, output_dtype=output_dtype)
        weight = dequantize_fp8_blocks(quantized, scales, (block[0], block[1]))
        return weight.to(output_dtype or torch.bfloat16)

    with patch_attr(Fp8Dequantize, "_dequantize_one", dequantize):
        yield
