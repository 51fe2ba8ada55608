"""Measures what each layer loses under each scheme: one pass forward, one pass back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autoround_modifier.activations import fake_quantize_in_range, needs_calibration
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.patching import hooks_registered
from autoround_modifier.blocks.reverse import ReversePass
from autoround_modifier.errors import CalibrationError, NonFiniteError
from autoround_modifier.host.layers import Layer, parameters_frozen
from autoround_modifier.host.lifecycle import eval_context
from autoround_modifier.host.schemes import QuantizationArgs, QuantizationScheme, weight_spec
from autoround_modifier.schemes.labels import CrossEntropyGradient
from autoround_modifier.schemes.scores import SCORES, QuantizedLayer, Score
from autoround_modifier.search.initial_weights import InitialWeights

__all__ = ["SensitivityConfig", "measure_sensitivity"]

Scores = dict[str, dict[str, float]]  # layer -> scheme -> score


@dataclass(frozen=True)
class SensitivityConfig:
    """Settings of `measure_sensitivity`; the fields of `AutoSchemeModifier` explain them."""

    score: str = "fisher"
    scale_search: bool = True
    batch_size: int = 8
    seed: int = 42


def measure_sensitivity(
    model: nn.Module,
    blocks: dict[nn.Module, str],
    layers: dict[Layer, str],
    options: dict[str, QuantizationScheme],
    batches: list[dict[str, Any]],
    config: SensitivityConfig,
    on_block: Callable[[], None] = lambda: None,
) -> Scores:
    """
    :param model: the original; it is not changed
    :param blocks: its blocks and their names, in any order; see `ReversePass`
    :param layers: to measure, and their names
    :param options: schemes by name
    :param batches: arguments of the model's forward; ``attention_mask`` and ``loss_mask``,
        (batch, length), say which positions count
    :param config: settings
    :param on_block: called after each block on the way back, for progress bars
    :return: score of each layer under each scheme, divided by the number of tokens; layers that no
        gradient reached, such as experts without tokens, are not in it
    :raises CalibrationError: if no position counts, or the output does not depend on the blocks
    :raises NonFiniteError: if the original or a gradient gives NaN or infinity
    """
    with ExitStack() as stack:
        stack.enter_context(eval_context(model))
        stack.enter_context(parameters_frozen([model]))
        reverse = ReversePass(model, blocks, batches, config.batch_size)
        scorer = _Scorer(model, layers, options, config)
        in_blocks = {module for block in reverse.blocks for module in block.modules()}
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]

        # Layers after the last block are scored on the way forward. What they see is not known
        # before, so the search weighs their input channels alike.
        gradient = CrossEntropyGradient(SCORES[config.score].sampled_labels, config.seed)
        with scorer.scoring([layer for layer in linear if layer not in in_blocks]) as scores:
            reverse.forward(gradient, dict.fromkeys(linear, scorer.observe))
        if not gradient.num_tokens:
            raise CalibrationError("the calibration data has no token that counts")
        scorer.store(scores, gradient.num_tokens)
        for block in reversed(reverse.blocks):
            inside = set(block.modules())
            with scorer.scoring([layer for layer in linear if layer in inside]) as scores:
                reverse.backward(block)
            scorer.store(scores, gradient.num_tokens)
            on_block()
        embeddings = [layer for layer in layers if isinstance(layer, nn.Embedding)]
        if embeddings:
            with scorer.scoring(embeddings) as scores:
                reverse.backward_to_embeddings(embeddings)
            scorer.store(scores, gradient.num_tokens)
    return scorer.scores


class _Scorer:
    """
    :ivar importance: of the input channels of all linear layers
    :ivar ranges: smallest and largest input of each layer, (1,)
    :ivar scores: of the layers that are measured
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[Layer, str],
        options: dict[str, QuantizationScheme],
        config: SensitivityConfig,
    ):
        self.model = model
        self.layers = layers
        self.options = {name: s for name, s in options.items() if s.weights is not None}
        self.unquantized = [name for name in options if name not in self.options]
        self.has_static_scales = any(
            needs_calibration(s.input_activations) for s in options.values()
        )
        self.config = config
        self.importance = Importance()
        self.ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.scores: Scores = {}

    def observe(self, layer: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        """
        Record the importance of input channels and, where an option has static scales, the range.

        :param x: (..., in_features)
        :param mask: (batch, tokens), bool, False for tokens that shall not count
        """
        self.importance.record(layer, x, mask)
        if not self.has_static_scales or not x.numel():
            return
        x = x.detach()
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        low, high = (end.view(1) for end in x.aminmax())
        if layer in self.ranges:
            low, high = low.minimum(self.ranges[layer][0]), high.maximum(self.ranges[layer][1])
        self.ranges[layer] = low, high

    def scoring(self, layers: Sequence[Layer]) -> AbstractContextManager[dict[Layer, Score]]:
        """
        Let new scores of layers add up what the layers see and which gradients come back.

        :return: yields the scores
        """
        return _Scoring(self._new_scores(layers))

    def store(self, scores: dict[Layer, Score], num_tokens: int) -> None:
        """
        Keep the scores that a gradient reached, divided by the number of tokens.

        :raises NonFiniteError: if a score is NaN or infinite
        """
        for layer, score in scores.items():
            if score.reached:
                means = {name: value / num_tokens for name, value in score.total().items()}
                if not all(map(math.isfinite, means.values())):
                    raise NonFiniteError(
                        f"{self.layers[layer]}: its gradient or its error has NaN or infinity; "
                        "load the model in bfloat16 or float32"
                    )
                self.scores[self.layers[layer]] = dict.fromkeys(self.unquantized, 0.0) | means

    def _new_scores(self, layers: Sequence[Layer]) -> dict[Layer, Score]:
        """:return: a score of each layer that counts nothing yet"""
        quantized: dict[Layer, dict[str, QuantizedLayer]] = {layer: {} for layer in layers}
        names = {layer: self.layers[layer] for layer in layers}
        for name, scheme in self.options.items():
            assert scheme.weights is not None
            # With 8 bits there is almost nothing to lose, and so nothing to gain by a search.
            search = self.config.scale_search and scheme.weights.num_bits < 8
            specs = dict.fromkeys(layers, weight_spec(scheme.weights))
            initial = InitialWeights(names, specs, self.importance.copy())
            initial.find_shared_scales(self.model, layers, search)
            for layer in layers:
                rounded = initial.start(layer, search).dequantize()
                quantized[layer][name] = QuantizedLayer(
                    rounded - layer.weight, self._quantize_input(layer, scheme.input_activations)
                )
        score = SCORES[self.config.score]
        return {layer: score(layer.weight, options) for layer, options in quantized.items()}

    def _quantize_input(
        self, layer: Layer, args: QuantizationArgs | None
    ) -> Callable[[Tensor], Tensor] | None:
        if args is None:
            return None
        unknown = torch.zeros(1)

        def quantize(x: Tensor) -> Tensor:
            low, high = self.ranges.get(layer, (unknown, unknown))
            return fake_quantize_in_range(x, args, low, high)

        return quantize


class _Scoring:
    """Hooks that give scores the inputs of their layers and the gradients at the outputs."""

    def __init__(self, scores: dict[Layer, Score]):
        self.scores = scores
        self.gains: dict[Layer, float] = {
            layer: embedding_gain(layer) for layer in scores if isinstance(layer, nn.Embedding)
        }
        hooks = [partial(layer.register_forward_hook, self._leave_layer) for layer in scores]
        self._hooks = hooks_registered(*hooks)

    def __enter__(self) -> dict[Layer, Score]:
        self._hooks.__enter__()
        return self.scores

    def __exit__(self, *error: Any) -> bool | None:
        return self._hooks.__exit__(*error)

    def _leave_layer(self, layer: Layer, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = args[0].detach()
        x = x.flatten(0, -2) if x.is_floating_point() else x.flatten()
        gain = self.gains.get(layer, 1.0)

        @torch.no_grad()
        def count(gradient: Tensor) -> None:
            if gradient.any():
                self.scores[layer].add(x, gradient.flatten(0, -2) * gain)
                self.scores[layer].reached = True

        output.register_hook(count)


def embedding_gain(layer: nn.Embedding) -> float:
    """:return: by what the layer multiplies the rows of its weight, as Gemma 3's does"""
    row = torch.ones_like(layer.weight[:1])
    index = torch.zeros(1, dtype=torch.long, device=row.device)
    with torch.no_grad():
        return float(functional_call(layer, {"weight": row}, (index,)).flatten()[0])
