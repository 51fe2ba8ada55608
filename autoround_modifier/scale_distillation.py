"""`ScaleDistillationModifier`: trains scales end to end, as a step of a recipe. Lifecycle only."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

from compressed_tensors.modeling import KV_CACHE_ATTR
from compressed_tensors.offload import disable_offloading, is_distributed
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.helpers import DisableQuantization, eval_context
from llmcompressor.utils.pytorch import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn
from tqdm import tqdm

from autoround_modifier.distillation import (
    DistillationConfig,
    DistillationResult,
    TeacherBatch,
    TrainedScale,
    distill,
    record_teacher,
)
from autoround_modifier.errors import RecipeError, SchemeError
from autoround_modifier.validation import check_calibration_data, listed

__all__ = ["ScaleDistillationModifier"]

STRATEGIES = (
    QuantizationStrategy.GROUP,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.TENSOR,
)


class ScaleDistillationModifier(Modifier):
    """
    Trains the weight scales of a quantized model end to end, with the gains of its norms and its
    biases, so that its next-token distribution comes closer to the original's. Integers, zero
    points and the checkpoint format stay as they are. It follows any modifier that quantizes
    integer weights:

    ```yaml
    quant_stage:
      quant_modifiers:
        AutoRoundModifier:
          ignore: [lm_head]
          config_groups:
            group_0:
              targets: [Linear]
              weights: {num_bits: 2, type: int, symmetric: true, strategy: group, group_size: 64}
        ScaleDistillationModifier: {}
    ```

    The whole model takes part in each step, so it must fit on its device; the activations of one
    block at a time are kept.

    Lifecycle:

    - on_initialize: refuse bad input, record what the original predicts
    - on_finalize: train, when all other modifiers are done. What was trained is kept only if it
      lowers the divergence on samples set aside

    :param iters: training steps
    :param lr: step size of the scales, as a share of their mean size in each layer; Adam, cosine
        decay
    :param norm_lr: the same for the gains of norms and the biases of all layers; defaults to half
        of ``lr``, 0 leaves them alone
    :param batch_size: calibration batches, as `oneshot` delivers them (of one sample by default),
        in each step
    :param num_calibration_samples: largest number of those batches to train on
    :param gradient_checkpointing: compute the activations of each block again on the way back, for
        a quarter more time and a fraction of the memory
    :param holdout_fraction: share of the batches set aside to judge the result; with 0, or a
        single batch, it is judged on what it was trained on
    :param seed: fixes every random choice
    """

    iters: int = Field(default=50, ge=1)
    lr: float = Field(default=0.005, gt=0)
    norm_lr: float | None = Field(default=None, ge=0)
    batch_size: int = Field(default=4, ge=1)
    num_calibration_samples: int = Field(default=128, ge=1)
    gradient_checkpointing: bool = True
    holdout_fraction: float = Field(default=0.125, ge=0, le=0.5)
    seed: int = 42

    _teacher: list[TeacherBatch] = PrivateAttr(default_factory=list)
    _blocks: list[nn.Module] = PrivateAttr(default_factory=list)
    _result: DistillationResult | None = PrivateAttr(default=None)

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        # The host writes this dict into recipe.yaml; plain data keeps the file loadable.
        return super().model_dump(**{"mode": "json", **kwargs})

    @property
    def result(self) -> DistillationResult | None:
        """What training changed; None before it."""
        return self._result

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises CalibrationError: if there is no calibration data
        :raises RecipeError: if the model is quantized already, or no modifier before this one
            quantizes linear layers
        :raises SchemeError: if a scale cannot be trained
        :raises NonFiniteError: if the original gives NaN or infinity
        :raises RuntimeError: if several processes share the work
        """
        if is_distributed():
            raise RuntimeError(
                "ScaleDistillationModifier does not run in several processes. Start one process."
            )
        model = state.model
        check_calibration_data(state.data.calib, "ScaleDistillationModifier")
        done = [
            name
            for name, module in model.named_modules()
            if getattr(module, "quantization_status", None) is not None
            and module.quantization_status >= QuantizationStatus.FROZEN
        ]
        if done:
            raise RecipeError(
                "ScaleDistillationModifier needs the original's predictions, but the model is "
                f"quantized already: {listed(done)}. Quantize and distil in one recipe."
            )
        trainable_layers(model)
        targets = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        self._blocks = [block for _, block in match_named_modules(model, targets)]
        logger.info("Recording the original's predictions")
        with DisableQuantization(model), disable_offloading(), eval_context(model):
            batches = islice(cast(Iterable, state.data.calib), self.num_calibration_samples)
            self._teacher = record_teacher(model, batches)
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises NonFiniteError: if the quantized model gives NaN or infinity
        """
        teacher, self._teacher = self._teacher, []
        if not self.ended_:
            return True  # the run has failed, and the host only cleans up
        model = state.model
        with tqdm(total=self.iters, desc="Scale distillation", unit="it") as progress:

            def advance() -> None:
                progress.update()

            with disable_offloading():
                scales = [
                    TrainedScale(layer, args) for layer, args in trainable_layers(model).items()
                ]
                norms = trainable_norms(model)
                self._result = distill(
                    model, self._blocks, scales, norms, teacher, self._config(), advance
                )
        result = self._result
        logger.info(
            f"Scale distillation: KL divergence on {result.judged_on} {result.initial_kl:.4f} -> "
            f"{result.final_kl:.4f}, {'kept' if result.kept else 'not better, so dropped'}; "
            f"{result.seconds:.1f} s"
        )
        if result.moved:
            logger.info(f"{result.moved} integers moved by one step to be saved exactly")
        return True

    def _config(self) -> DistillationConfig:
        return DistillationConfig(
            iters=self.iters,
            lr=self.lr,
            norm_lr=self.lr / 2 if self.norm_lr is None else self.norm_lr,
            batch_size=self.batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            holdout_fraction=self.holdout_fraction,
            seed=self.seed,
        )


def trainable_layers(model: nn.Module) -> dict[nn.Linear, QuantizationArgs]:
    """
    :return: quantized linear layers, without the embeddings, and how their weights are quantized
    :raises RecipeError: if there is none
    :raises SchemeError: naming the layers whose scales have a fixed grid, or whose activations are
        quantized
    """
    layers: dict[nn.Linear, QuantizationArgs] = {}
    unsupported = []
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and hasattr(module, KV_CACHE_ATTR):
            unsupported.append(f"{name} (its key-value cache)")
        if scheme is None or scheme.weights is None or not isinstance(module, nn.Linear):
            continue
        args = scheme.weights
        if (
            args.type != QuantizationType.INT
            or args.strategy not in STRATEGIES
            or scheme.input_activations is not None
            or scheme.output_activations is not None
        ):
            unsupported.append(name)
        layers[module] = args
    if unsupported:
        raise SchemeError(
            "ScaleDistillationModifier trains scales of integer weights by group, channel or "
            "tensor, without quantized activations or cache; not so: "
            f"{listed(unsupported)}"
        )
    if not layers:
        raise RecipeError(
            "ScaleDistillationModifier found no linear layer with a quantization scheme; put it "
            "behind a modifier that quantizes weights, in the same recipe"
        )
    return layers


def trainable_norms(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """:return: gains and biases: parameters with one dimension named ``weight`` or ``bias``"""
    found = []
    seen: set[int] = set()
    for module in model.modules():
        for name in ("weight", "bias"):
            value = getattr(module, name, None)
            if not isinstance(value, nn.Parameter) or id(value) in seen:
                continue
            seen.add(id(value))
            if value.ndim == 1 and value.is_floating_point():
                found.append((module, name))
    return found
