"""One vLLM engine: start it on a checkpoint, ask everything, stop it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.linear import LinearBase

NEW_TOKENS = 16


@dataclass(frozen=True)
class Answers:
    """
    What an engine said.

    :param kernels: class names of the kernels that run the quantized layers
    :param logprobs: per prompt, of each token after the first given the tokens before it
    :param continuations: per prompt, the greedy tokens
    :param texts: the same, as text
    :param weights: per linear layer of the blocks asked for, its weight as the engine applies
        it, shape [out, in]; q, k, v and gate, up are fused
    :param model: class name of the engine's model
    """

    model: str
    kernels: set[str]
    logprobs: list[list[float]]
    continuations: list[list[int]]
    texts: list[str]
    weights: dict[str, torch.Tensor]


def kernels_in_use(model: torch.nn.Module) -> set[str]:
    """:return: class names of the kernels of the compressed-tensors layers"""
    schemes = (getattr(module, "scheme", None) for module in model.modules())
    return {
        type(kernel).__name__
        for scheme in schemes
        for attribute in ("kernel", "fp8_linear", "linear_kernel")
        if (kernel := getattr(scheme, attribute, None)) is not None
    }


def probe_value(layer: torch.nn.Module) -> float:
    """:return: a number that a layer's quantization of its input leaves as it is, or nearly so"""
    global_scale = getattr(layer, "input_global_scale_inv", None)
    if global_scale is not None:  # NVFP4: 6 times the scale 64
        return 6 * 64 / float(global_scale)
    scale = getattr(layer, "input_scale", None)
    return 1.0 if scale is None else 64 * float(scale)


def applied_weights(model: torch.nn.Module, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """
    Multiply the identity by each linear layer: whatever layout its kernel chose, the product is
    the transposed weight, and exact, because every sum has one term that is not zero.
    """
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase) and name.startswith(prefixes):
            value = probe_value(layer)
            identity = value * torch.eye(layer.input_size, dtype=layer.params_dtype)
            weights[name] = layer.quant_method.apply(layer, identity, None).t() / value
    return weights


def token_logprobs(positions: list, token_ids: list[int]) -> list[float]:
    """
    :param positions: vLLM's prompt log-probabilities; the first token has none
    :return: the log-probability of each prompt token after the first
    """
    following = zip(positions[1:], token_ids[1:], strict=True)
    return [candidates[token].logprob for candidates, token in following]


def ask_engine(
    checkpoint: Path,
    dtype: str,
    prompts: list[list[int]],
    blocks: Iterable[int] = (),
    new_tokens: int = NEW_TOKENS,
    **arguments: Any,
) -> Answers:
    """
    :param prompts: token ids
    :param blocks: the decoder blocks whose weights to return
    :param arguments: of the engine, beside those that are always the same
    """
    llm = LLM(
        str(checkpoint),
        dtype=dtype,
        enforce_eager=True,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,
        **{"max_model_len": 512, **arguments},
    )
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": token_ids} for token_ids in prompts],
            SamplingParams(
                temperature=0, prompt_logprobs=1, max_tokens=new_tokens, ignore_eos=True
            ),
            use_tqdm=False,
        )
        prefixes = tuple(f"model.layers.{block}." for block in blocks)
        return Answers(
            model=llm.apply_model(lambda model: type(model).__name__)[0],
            kernels=llm.apply_model(kernels_in_use)[0],
            logprobs=[
                token_logprobs(output.prompt_logprobs, token_ids)
                for output, token_ids in zip(outputs, prompts, strict=True)
            ],
            continuations=[list(output.outputs[0].token_ids) for output in outputs],
            texts=[output.outputs[0].text for output in outputs],
            weights=llm.apply_model(lambda model: applied_weights(model, prefixes))[0],
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
