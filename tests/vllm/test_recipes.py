"""vLLM's loader has a place for every tensor that a shipped recipe saves.

On the GPUs that the recipe is for: the scheme that vLLM selects there is asked for its parameters;
kernels, which would need the GPU, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from vllm.distributed import parallel_state
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

HOPPER = DeviceCapability(9, 0)
LAYERS = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
RECIPES = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "recipes").glob("*_autoround.yaml")
    if not path.stem.startswith("gguf_")  # which are for llama.cpp
)


class NoKernel:
    """Stands in for whatever vLLM would choose on a GPU."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


def replacement(name: str) -> object:
    """:return: what a scheme shall find in its module by this name, None for what is there"""
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    if name == "choose_mp_linear_kernel":
        return lambda *args, **kwargs: NoKernel
    if re.fullmatch(r"init_\w+_linear_kernel", name):
        return lambda *args, **kwargs: NoKernel()
    if name == "get_current_vllm_config":
        return lambda: settings
    if name == "expose_input_quant_key":
        return lambda layer, kernel: None
    return None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Schemes as on a Hopper GPU, but for the kernels that would run them."""
    one_process = SimpleNamespace(world_size=1, rank_in_group=0)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parallel_state, "_TP", one_process))
        stack.enter_context(
            mock.patch.object(current_platform, "get_device_capability", return_value=HOPPER)
        )
        for module in vars(schemes).values():
            for name in list(getattr(module, "__dict__", {})):
                if (new := replacement(name)) is not None:
                    stack.enter_context(mock.patch.object(module, name, new))
        yield


def parameters_of(config: dict, name: str, in_features: int, out_features: int) -> dict:
    """:return: shape and dtype of each parameter that vLLM makes for a layer, by name"""
    layer = torch.nn.Linear(in_features, out_features)
    scheme = CompressedTensorsConfig.from_config(config).get_scheme(layer, name)
    made = torch.nn.Module()
    scheme.create_weights(
        layer=made,
        input_size=in_features,
        input_size_per_partition=in_features,
        output_size=out_features,
        output_partition_sizes=[out_features],
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    return {key: (tuple(value.shape), value.dtype) for key, value in made.named_parameters()}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_saved_tensor_has_a_place(recipe: str, layer: str, checkpoints: Path) -> None:
    folder = checkpoints / "recipes" / recipe
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        saved = {
            name.removeprefix(f"{layer}."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(f"{layer}.")
        }
    in_features = 512 if layer.endswith("down_proj") else 256
    with without_kernels():
        expected = parameters_of(config, layer, in_features, 256)
    assert set(saved) == set(expected)
    for name, value in saved.items():
        shape, dtype = expected[name]
        assert value.numel() == torch.Size(shape).numel(), name
        assert value.dtype.is_floating_point == dtype.is_floating_point, name
        assert value.element_size() == dtype.itemsize or "scale" in name, name
