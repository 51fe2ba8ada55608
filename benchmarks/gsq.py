"""
GSQ (https://arxiv.org/abs/2604.18556) as a peer: an implementation of its own, after the paper and
the published source, on this package's captured block inputs and with its saving.

Each block is quantized in stages, as in the source:

1. query and key projections by themselves, on the error of their own outputs (their Hessian);
2. the other layers of attention, on the squared error after attention;
3. the layers of the MLP, on the squared error of the block's output.

Each starts from GPTQ. The targets are what the full-precision block makes of the inputs that it
gets from the quantized blocks before it. ``stages: joint`` trains all layers at once on the block's
output instead.

The published step sizes are for hundreds of steps of 262,144 tokens. In tens of steps of some
hundred tokens they do not leave GPTQ behind, and much larger ones do harm; see `GSQSettings.lr`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from gptq_start import gptq
from gsq_block import after_attention, after_mlp, hessians_recorded, outputs
from gsq_settings import PUBLISHED_LAYER_STEPS, PUBLISHED_STEPS, GSQSettings
from gsq_weight import GumbelNoise, RelaxedWeight
from torch import Tensor, nn

from autoround_modifier import AutoRoundModifier, oneshot
from autoround_modifier.blocks.forwards import quantized_forwards, with_weight
from autoround_modifier.formats import IntegerGrid, QuantizedWeight
from autoround_modifier.modifiers import block_quantizer
from autoround_modifier.tuning import Tuner, TuningResult
from autoround_modifier.tuning.loss import LOSSES
from autoround_modifier.tuning.sampling import minibatches

if TYPE_CHECKING:
    from peers import Task

__all__ = ["GSQTuner", "gsq"]

NOISE_SIZE = 2**24


@dataclass
class Stage:
    """
    Layers that are trained together.

    :param run: takes stacked inputs and the samples that they are of
    :param inputs: (1, tokens, hidden) per sample
    :param targets: of the outputs, likewise
    """

    layers: list[nn.Linear]
    run: Callable[[Tensor, list[int]], Tensor]
    inputs: list[Tensor]
    targets: list[Tensor]


@dataclass
class GSQTuner(Tuner):
    """
    Takes the place of `Tuner`; parameters as there. All samples are trained on, and the last
    iterate is kept. The losses of the result are squared errors of one batch, with the weights that
    it starts from and with those that are kept.
    """

    settings: GSQSettings = field(default_factory=GSQSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        grids = [fmt.grid for fmt in self.formats.values()]
        if not all(isinstance(grid, IntegerGrid) and grid.symmetric for grid in grids):
            raise ValueError("GSQ has symmetric integers only")
        if len(self.group.blocks) != 1 or self.fixed or any(x is not None for x in self.masks):
            raise ValueError(
                "this GSQ takes one block at a time, all of its layers, and no padding"
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        self._noise = GumbelNoise(NOISE_SIZE, generator, self.group.device)
        self._start: dict[nn.Linear, QuantizedWeight] = {}
        self._final: dict[nn.Linear, QuantizedWeight] = {}

    def _tune(self, on_iteration: Callable[[], None]) -> TuningResult:
        started = time.perf_counter()
        with self.group.frozen(), torch.enable_grad():
            if self.settings.stages == "joint":
                self._jointly(on_iteration)
            else:
                self._by_halves(on_iteration)
        initial, final = (self._batch_loss(weights) for weights in (self._start, self._final))
        weights = {layer: self._final[layer] for layer in self.formats}
        seconds = time.perf_counter() - started
        return TuningResult(weights, initial, final, self.settings.steps, seconds)

    def _jointly(self, on_iteration: Callable[[], None]) -> None:
        with hessians_recorded(self.formats) as hessians:
            from_block = outputs(
                self.group.forward, self.group, self.inputs, self.config.batch_size
            )
        if self.settings.targets == "block":
            self.targets = from_block
        relaxed = self._relaxed(self.formats, hessians)
        stage = Stage(list(self.formats), self.group.forward, self.inputs, self.targets)
        self._train_on_samples(stage, relaxed, on_iteration)

    def _by_halves(self, on_iteration: Callable[[], None]) -> None:
        group, inputs, batch_size = self.group, self.inputs, self.config.batch_size
        (block,) = group.blocks
        first, second = partial(after_attention, group), lambda x, samples: after_mlp(block, x)
        in_attention = set(block.self_attn.modules())  # type: ignore[union-attr, operator]
        of_attention = [layer for layer in self.formats if layer in in_attention]
        of_mlp = [layer for layer in self.formats if layer not in in_attention]
        alone = [
            layer
            for name, layer in block.named_modules()
            if layer in of_attention and name.endswith(("q_proj", "k_proj"))
        ]

        with hessians_recorded(of_attention) as hessians:
            middle = outputs(first, group, inputs, batch_size)
        from_block = outputs(second, group, middle, batch_size)
        self._check_halves(from_block[0])
        if self.settings.targets == "block":
            self.targets = from_block
        relaxed = self._relaxed(of_attention, hessians)
        for layer in alone:
            self._train_alone(layer, relaxed.pop(layer), hessians[layer])
        self._train_on_samples(Stage(list(relaxed), first, inputs, middle), relaxed, lambda: None)

        with group.quantized(quantized_forwards(self._final)):
            middle = outputs(first, group, inputs, batch_size)
        with hessians_recorded(of_mlp) as hessians:
            outputs(second, group, middle, batch_size)
        relaxed = self._relaxed(of_mlp, hessians)
        self._train_on_samples(Stage(of_mlp, second, middle, self.targets), relaxed, on_iteration)

    @torch.no_grad()
    def _check_halves(self, output: Tensor) -> None:
        whole = self.group.forward(self.inputs[0].to(self.group.device), [0])
        if not torch.allclose(whole.float(), output.float(), rtol=0.05, atol=0.05):
            raise ValueError(f"{type(self.group.blocks[0]).__name__} has another structure")

    def _relaxed(
        self, layers: Iterable[nn.Linear], hessians: dict[nn.Linear, Tensor]
    ) -> dict[nn.Linear, RelaxedWeight]:
        """:return: of each layer; what it starts from is kept for the result"""
        settings, found = self.settings, {}
        for layer in layers:
            fmt = self.formats[layer]
            if settings.start == "search":
                nearest = fmt.quantized()
                integers, scales = nearest.values.float(), nearest.scale.float()
            else:
                integers, scales = gptq(
                    layer.weight,
                    hessians[layer],
                    fmt.num_bits,
                    fmt.grouping.group_size,
                    settings.damping,
                    settings.scale_candidates,
                )
            self._start[layer] = self._quantized_weight(layer, integers, scales)
            found[layer] = RelaxedWeight(
                integers, scales, fmt.num_bits, self._noise, settings.std, settings.strength
            )
        return found

    def _quantized_weight(
        self, layer: nn.Linear, integers: Tensor, scales: Tensor
    ) -> QuantizedWeight:
        fmt = self.formats[layer]
        parts = {
            "values": integers.to(torch.int8),
            "scale": scales.to(fmt.grid.scale_dtype),
            "zero_point": torch.zeros_like(scales, dtype=torch.int8),
        }
        return QuantizedWeight(parts, fmt.grid, fmt.grouping)

    def _train_alone(self, layer: nn.Linear, relaxed: RelaxedWeight, hessian: Tensor) -> None:
        """On the squared error of the layer's own output."""
        settings, weight = self.settings, layer.weight.float()
        damped = hessian.clone()
        damped.diagonal().add_(settings.damping * hessian.diagonal().mean())
        steps = settings.steps if settings.layer_steps is None else settings.layer_steps
        for step in range(steps):
            sample = relaxed.sample(*settings.sharpness(step, steps))
            optimization = settings.optimization(step, steps, PUBLISHED_LAYER_STEPS, cosine=False)
            relaxed.descend((sample - weight) @ damped, optimization)
        self._final[layer] = self._quantized_weight(layer, *relaxed.hard())

    def _train_on_samples(
        self,
        stage: Stage,
        relaxed: dict[nn.Linear, RelaxedWeight],
        on_iteration: Callable[[], None],
    ) -> None:
        settings, group, loss = self.settings, self.group, LOSSES[self.settings.loss]
        fixed = quantized_forwards(self._final)
        batches = minibatches(self._train, self.config.batch_size, self.config.seed)
        for step in range(settings.steps):
            sharpness = settings.sharpness(step, settings.steps)
            leaves = {
                layer: one.sample(*sharpness).to(layer.weight.dtype).requires_grad_()
                for layer, one in relaxed.items()
            }
            forwards = {layer: with_weight(leaf, layer.bias) for layer, leaf in leaves.items()}
            with group.quantized({**fixed, **forwards}):
                for indices, hidden in group.microbatches(stage.inputs, next(batches)):
                    target = torch.cat([stage.targets[index] for index in indices])
                    error = loss(stage.run(hidden, indices), target.to(hidden.device), None)
                    (error / target[..., 0].numel()).backward()
            optimization = settings.optimization(step, settings.steps, PUBLISHED_STEPS, cosine=True)
            for layer, leaf in leaves.items():
                assert leaf.grad is not None
                relaxed[layer].descend(leaf.grad.float(), optimization)
            on_iteration()
        for layer, one in relaxed.items():
            self._final[layer] = self._quantized_weight(layer, *one.hard())

    @torch.no_grad()
    def _batch_loss(self, weights: dict[nn.Linear, QuantizedWeight]) -> float:
        samples = self._train[: self.config.batch_size]
        with self.group.quantized(quantized_forwards(weights)):
            return float(self._loss(samples) / self._share.tokens_of(samples))


def gsq(task: Task, **options: Any) -> dict[str, Any]:
    """
    :param options: fields of `GSQSettings`
    :return: all of them
    """
    pairs = {key: tuple(x) if isinstance(x, list) else x for key, x in options.items()}
    settings = GSQSettings(**pairs)
    group = {"targets": ["Linear"], "weights": task.weights}
    modifier = AutoRoundModifier(
        ignore=["lm_head"],
        config_groups={"group_0": group},
        preset="light",
        iters=settings.steps,
        loss="mse",
        scale_search=settings.start == "search",
        holdout_fraction=0.0,
        batch_size=task.batch_size,
        seed=task.seed,
    )
    with mock.patch.object(block_quantizer, "Tuner", partial(GSQTuner, settings=settings)):
        oneshot(model=task.model, tokenizer=task.tokenizer, dataset=task.dataset, recipe=[modifier])
    return asdict(settings)
