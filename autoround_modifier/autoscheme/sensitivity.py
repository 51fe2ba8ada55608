"""
Measures what each layer loses under each scheme: one pass forward, one pass back.

The forward pass runs the original on the calibration data, keeps what every block was called with,
and takes the gradient of the loss at the output of the last block. The way back goes block by
block: each runs again, with gradients, on the inputs that were kept. In memory are the inputs of
all blocks, and the activations and quantized weights of one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.utils.helpers import eval_context
from torch import Tensor, nn
from torch.func import functional_call

from autoround_modifier.activations import fake_quantize_in_range, needs_calibration
from autoround_modifier.autoscheme.scores import SCORES, QuantizedLayer, Score
from autoround_modifier.calibration.capture import BlockCapture, ImportanceCapture
from autoround_modifier.calibration.samples import call_token_mask, content_key, output_hidden
from autoround_modifier.distillation.teacher import (
    POSITIONS,
    counting_positions,
    forward_arguments,
    logits_of,
)
from autoround_modifier.errors import CalibrationError, NonFiniteError
from autoround_modifier.layer_quantizer import LayerQuantizer
from autoround_modifier.patching import parameters_frozen
from autoround_modifier.tuning.block import BlockGroup
from autoround_modifier.validation import Layer

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
    :param blocks: its blocks and their names, in any order; those count that lead one to the next
        up to the last that runs, not those of another tower
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
    return _Measurement(model, blocks, layers, options, config).run(batches, on_block)


class _Measurement:
    """
    :ivar gradients: dL/dh of each sample, (1, tokens, hidden), at the input of the block whose turn
        was last; at first at the output of the last block
    :ivar ranges: smallest and largest input of each layer, (1,)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[nn.Module, str],
        layers: dict[Layer, str],
        options: dict[str, QuantizationScheme],
        config: SensitivityConfig,
    ):
        self.model = model
        self.blocks = blocks
        self.layers = layers
        self.options = {name: s for name, s in options.items() if s.weights is not None}
        self.unquantized = [name for name in options if name not in self.options]
        self.static = any(needs_calibration(s.input_activations) for s in options.values())
        self.config = config
        self.capture = BlockCapture(blocks, num_samples=None, keep_outputs=False, sort=False)
        self.importance = ImportanceCapture()
        self.ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.gradients: list[Tensor] = []
        self.num_tokens = 0
        self.scores: Scores = {}
        self.reached: set[Layer] = set()

    def run(self, batches: list[dict[str, Any]], on_block: Callable[[], None]) -> Scores:
        with ExitStack() as stack:
            stack.enter_context(eval_context(self.model))
            stack.enter_context(parameters_frozen([self.model]))
            self.blocks = self._chain(batches[0]) if batches else {}
            self._forward(batches)
            for block in reversed(self.blocks):
                self._backward(block)
                on_block()
            self._score_embeddings(batches)
        return self.scores

    # ------------------------------------------------------------------ forward

    @torch.no_grad()
    def _chain(self, batch: dict[str, Any]) -> dict[nn.Module, str]:
        """:return: the blocks that run one after the other on each other's output, to the last"""
        ran: list[tuple[nn.Module, Tensor, Tensor]] = []

        def leave_block(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            ran.append((block, hidden, output_hidden(output)))

        with ExitStack() as stack:
            for block in self.blocks:
                handle = block.register_forward_hook(leave_block, with_kwargs=True)
                stack.callback(handle.remove)
            logits_of(self.model, forward_arguments(batch))
        chain: dict[nn.Module, str] = {}
        expected: Tensor | None = None
        for block, hidden, output in reversed(ran):
            if block in chain or (expected is not None and not torch.equal(output, expected)):
                break
            chain[block] = self.blocks[block]
            expected = hidden
        return dict(reversed(chain.items()))

    def _forward(self, batches: list[dict[str, Any]]) -> None:
        """
        Record what blocks and layers see, score the layers behind the last block, and find the
        gradient at its output.
        """
        if not self.blocks:
            raise CalibrationError(
                "no decoder block ran on the calibration data; name them by `sequential_targets`"
            )
        in_blocks = {module for block in self.blocks for module in block.modules()}
        outside = [x for x in self.layers if x not in in_blocks and isinstance(x, nn.Linear)]
        # What they see is not known yet, so the search weighs their input channels alike.
        scores = self._new_scores(outside)
        mask: Tensor | None = None
        leaf: Tensor | None = None
        last_block = next(reversed(self.blocks))

        def enter_block(block: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal mask
            mask = call_token_mask(block, args, kwargs, loss_mask)

        def leave_block(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            nonlocal leaf
            self.capture.record(block, args, kwargs, output, mask)
            if block is not last_block:
                return output
            leaf = output_hidden(output).detach().requires_grad_()
            return (leaf, *output[1:]) if isinstance(output, (tuple, list)) else leaf

        def enter_layer(layer: nn.Module, args: Any) -> None:
            self.importance.record(layer, args[0], mask)
            self._record_range(layer, args, mask)

        with ExitStack() as stack:
            for block in self.blocks:
                before = block.register_forward_pre_hook(enter_block, with_kwargs=True)
                after = block.register_forward_hook(leave_block, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    stack.callback(layer.register_forward_pre_hook(enter_layer).remove)
            stack.enter_context(self._scoring(scores))
            for index, batch in enumerate(batches):
                loss_mask = batch.get("loss_mask")
                leaf = None
                self._pull_back_from_logits(batch, index)
                if leaf is None or leaf.grad is None:
                    raise CalibrationError(
                        f"{self.blocks[last_block]}: the model's output does not depend on it in "
                        f"calibration batch {index}"
                    )
                self.gradients += [g.unsqueeze(0).to("cpu", copy=True) for g in leaf.grad]
        if not self.num_tokens:
            raise CalibrationError("the calibration data has no token that counts")
        self._store(scores)

    def _pull_back_from_logits(self, batch: dict[str, Any], index: int) -> None:
        """
        Run the model, and send back the gradient of the cross entropy, summed over the positions
        that count.
        """
        logits = logits_of(self.model, forward_arguments(batch))
        mask = counting_positions(batch, logits.shape[:2])
        gradient = torch.zeros_like(logits)
        for row, ids in enumerate(batch["input_ids"]):
            counts = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask[row]
            positions = counts.nonzero().squeeze(-1)
            if not len(positions):
                continue
            real = logits.detach()[row, positions.to(logits.device)]
            if not torch.isfinite(real).all():
                raise NonFiniteError(
                    f"the original's output has NaN or infinity in calibration batch {index}; load "
                    "the model in bfloat16 or float32"
                )
            self.num_tokens += len(positions)
            labels = self._labels(ids.cpu(), positions, real)
            rows = gradient[row]
            for part, where, wanted in zip(
                real.split(POSITIONS),
                positions.split(POSITIONS),
                labels.split(POSITIONS),
                strict=True,
            ):
                slope = part.float().softmax(-1)
                slope.scatter_add_(-1, wanted.unsqueeze(-1), -torch.ones_like(slope[:, :1]))
                rows[where.to(rows.device)] = slope.to(rows.dtype)
            if not SCORES[self.config.score].sampled_labels:
                rows[positions[-1]] = 0  # nothing follows
        if logits.requires_grad:
            logits.backward(gradient)

    def _labels(self, ids: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        """
        :param ids: (length,), of one sample
        :param positions: (tokens,), those that count
        :param logits: (tokens, vocabulary)
        :return: (tokens,), the wanted next tokens, on the device of the logits
        """
        if not SCORES[self.config.score].sampled_labels:
            return ids.roll(-1)[positions].to(logits.device)
        # Drawn on the CPU and by the content of the sample: the same on any device, in any batch.
        key = int.from_bytes(content_key(ids[positions], None)[:7], "little")
        generator = torch.Generator().manual_seed(key ^ self.config.seed)
        drawn = [
            torch.multinomial(part.float().softmax(-1).cpu(), 1, generator=generator)
            for part in logits.split(POSITIONS)
        ]
        return torch.cat(drawn).squeeze(-1).to(logits.device)

    def _record_range(self, layer: nn.Module, args: Any, mask: Tensor | None) -> None:
        """Of the inputs that count, where a scale of some option is static."""
        if not self.static or not args or not args[0].numel():
            return
        x = args[0].detach()
        if mask is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        low, high = (end.view(1) for end in x.aminmax())
        if layer in self.ranges:
            low, high = low.minimum(self.ranges[layer][0]), high.maximum(self.ranges[layer][1])
        self.ranges[layer] = low, high

    # ------------------------------------------------------------------ back

    def _backward(self, block: nn.Module) -> None:
        """Run a block again, score its layers, and take the gradient to its input."""
        captured = self.capture.pop(block)
        if captured is None or len(captured.inputs) != len(self.gradients):
            raise CalibrationError(
                f"{self.blocks[block]}: not run once for each sample, so no gradient leads through "
                "it. Choose `sequential_targets` that follow each other."
            )
        inside = set(block.modules())
        scores = self._new_scores([layer for layer in self.layers if layer in inside])
        group = BlockGroup([block], [captured.calls])
        with self._scoring(scores):
            for samples, hidden in group.batches(captured.inputs, self.config.batch_size):
                leaf = hidden.detach().requires_grad_()
                gradient = torch.cat([self.gradients[index] for index in samples])
                group.forward(leaf, samples).backward(gradient.to(leaf.device))
                for index, row in zip(samples, cast(Tensor, leaf.grad), strict=True):
                    self.gradients[index] = row.unsqueeze(0).to("cpu", copy=True)
        self._store(scores)

    def _score_embeddings(self, batches: list[dict[str, Any]]) -> None:
        """Run the model up to the first block, and score the embeddings that lead to it."""
        embeddings = [layer for layer in self.layers if isinstance(layer, nn.Embedding)]
        if not embeddings:
            return
        scores = self._new_scores(embeddings)
        position = 0

        def leave_embedding(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        def enter_block(block: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal position
            hidden = args[0] if args else kwargs["hidden_states"]
            gradient = torch.cat(self.gradients[position : position + len(hidden)])
            position += len(hidden)
            hidden.backward(gradient.to(hidden.device))
            raise _FirstBlockReached

        with ExitStack() as stack:
            for layer in embeddings:
                stack.callback(layer.register_forward_hook(leave_embedding).remove)
            stack.enter_context(self._scoring(scores))
            first = next(iter(self.blocks))
            stack.callback(first.register_forward_pre_hook(enter_block, with_kwargs=True).remove)
            for batch in batches:
                with contextlib.suppress(_FirstBlockReached):
                    logits_of(self.model, forward_arguments(batch))
        self._store(scores)

    # ------------------------------------------------------------------ scores

    def _new_scores(self, layers: Sequence[Layer]) -> dict[Layer, Score]:
        """:return: a score of each layer that counts nothing yet"""
        quantized: dict[Layer, dict[str, QuantizedLayer]] = {layer: {} for layer in layers}
        for name, scheme in self.options.items():
            assert scheme.weights is not None
            # With 8 bits there is next to nothing to lose, nor to find.
            search = self.config.scale_search and scheme.weights.num_bits < 8
            names = {layer: self.layers[layer] for layer in layers}
            args = dict.fromkeys(layers, scheme.weights)
            quantizer = LayerQuantizer(names, args, fused=False)
            quantizer.importance = self.importance.copy()
            quantizer.find_shared_scales(self.model, layers, search)
            for layer in layers:
                rounded = quantizer.initial_format(layer, search).dequantize()
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

    @contextlib.contextmanager
    def _scoring(self, scores: dict[Layer, Score]) -> Iterator[None]:
        """Let scores count what their layers do and what gradient comes back."""
        gains: dict[Layer, float] = {
            layer: embedding_gain(layer) for layer in scores if isinstance(layer, nn.Embedding)
        }

        def watch(layer: Layer, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            x = x.flatten(0, -2) if x.is_floating_point() else x.flatten()
            gain = gains.get(layer, 1.0)

            @torch.no_grad()
            def count(gradient: Tensor) -> None:
                if gradient.any():
                    scores[layer].add(x, gradient.flatten(0, -2) * gain)
                    self.reached.add(layer)

            output.register_hook(count)

        handles = [layer.register_forward_hook(watch) for layer in scores]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _store(self, scores: dict[Layer, Score]) -> None:
        for layer, score in scores.items():
            if layer in self.reached:
                means = {name: value / self.num_tokens for name, value in score.total().items()}
                if not all(map(math.isfinite, means.values())):
                    raise NonFiniteError(
                        f"{self.layers[layer]}: its gradient or its error has NaN or infinity; "
                        "load the model in bfloat16 or float32"
                    )
                self.scores[self.layers[layer]] = dict.fromkeys(self.unquantized, 0.0) | means


class _FirstBlockReached(Exception):
    """Ends a forward pass."""


def embedding_gain(layer: nn.Embedding) -> float:
    """:return: by what the layer multiplies the rows of its weight, as Gemma 3's does"""
    row = torch.ones_like(layer.weight[:1])
    index = torch.zeros(1, dtype=torch.long, device=row.device)
    with torch.no_grad():
        return float(functional_call(layer, {"weight": row}, (index,)).flatten()[0])
