"""`ScaleDistillationModifier`: trains scales end to end, as a step of a recipe. Lifecycle only."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

from datasets import Dataset
from loguru import logger
from pydantic import PrivateAttr
from torch import nn

from autoround_modifier.calibration import sample_batches
from autoround_modifier.distillation import (
    DistillationConfig,
    DistillationResult,
    TeacherBatch,
    record_teacher,
    train_scales,
    trainable_layers,
    trainable_norms,
    weights_on_device,
)
from autoround_modifier.fields import DistillationFields
from autoround_modifier.host.blocks import find_blocks
from autoround_modifier.host.lifecycle import (
    DisableQuantization,
    PlainDataModifier,
    State,
    eval_context,
)
from autoround_modifier.modifiers.failures import say_what_is_left
from autoround_modifier.modifiers.finishing import prepare_saving
from autoround_modifier.modifiers.validation import (
    check_calibration_data,
    check_not_quantized,
    check_one_process,
)
from autoround_modifier.progress.bar import Progress
from autoround_modifier.progress.events import Result, phase, publish

__all__ = ["ScaleDistillationModifier"]


class ScaleDistillationModifier(DistillationFields, PlainDataModifier):
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

    The whole model takes part in each step. Weights that are offloaded stay on the device where
    half of its free memory holds them; otherwise each is brought there when it is used. The
    activations of one block at a time are kept.

    Lifecycle:

    - on_initialize: refuse bad input, record what the original predicts
    - on_finalize: train, when all other modifiers are done. What was trained is kept only if it
      lowers the divergence on samples set aside
    """

    _samples: Dataset | None = PrivateAttr(default=None)
    _teacher: list[TeacherBatch] = PrivateAttr(default_factory=list)
    _blocks: list[nn.Module] = PrivateAttr(default_factory=list)
    _result: DistillationResult | None = PrivateAttr(default=None)

    @property
    def result(self) -> DistillationResult | None:
        """What training changed; None before it."""
        return self._result

    @property
    def num_batches_used(self) -> int:
        """How many calibration batches are recorded, if there are so many."""
        drawn = math.ceil(self.iters * self.batch_size / (1 - self.holdout_fraction))
        return min(self.num_calibration_samples, drawn + 1)

    def take_samples(self, samples: Dataset) -> None:
        """
        Train on these, not on those that the modifiers of the pass through the blocks are given.

        :param samples: with ``input_ids``
        """
        self._samples = samples

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises CalibrationError: if there is no calibration data
        :raises RecipeError: if the model is quantized already, or no modifier before this one
            quantizes linear layers
        :raises SchemeError: if a scale cannot be trained
        :raises NonFiniteError: if the original gives NaN or infinity
        :raises RuntimeError: if several processes share the work
        """
        check_one_process("ScaleDistillationModifier")
        model = state.model
        data = state.data.calib if self._samples is None else self._samples
        check_calibration_data(data, "ScaleDistillationModifier", model)
        check_not_quantized(model)
        trainable_layers(model)
        prepare_saving(model)
        self._blocks = list(find_blocks(model, kwargs.get("sequential_targets")))
        logger.info("Recording the original's predictions")
        with (
            DisableQuantization(model),
            weights_on_device(model),
            eval_context(model),
            say_what_is_left("Scale distillation stopped before anything was quantized."),
        ):
            self._teacher = record_teacher(
                model,
                self._batches(cast(Iterable, state.data.calib)),
                self.position_fraction,
                self.batch_size,
            )
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises NonFiniteError: if the quantized model gives NaN or infinity
        """
        teacher, self._teacher = self._teacher, []
        if not self.ended_:
            return True  # the run has failed, and the host only cleans up
        model = state.model
        progress = Progress("distillation", self.iters, title="Scale distillation")
        with (
            phase("distillation"),
            contextlib.closing(progress),
            weights_on_device(model) as scale_of,
            say_what_is_left(
                "Scale distillation stopped; scales, gains and biases are as before it. The "
                "model in memory is quantized: `save_pretrained` saves it, "
                "`autoround_modifier.distill` trains it again."
            ),
        ):
            scales = [scale_of(layer, args) for layer, args in trainable_layers(model).items()]
            norms = trainable_norms(model)
            self._result = train_scales(
                model, self._blocks, scales, norms, teacher, self._config(), progress.advance
            )
        result = self._result
        publish(Result("distillation", result))
        logger.info(
            f"Scale distillation: KL divergence on {result.judged_on} {result.initial_kl:.4f} -> "
            f"{result.final_kl:.4f}, {'kept' if result.kept else 'not better, so dropped'}; "
            f"{result.seconds:.1f} s"
        )
        if result.moved:
            logger.info(f"{result.moved} integers moved by one step to be saved exactly")
        return True

    def _batches(self, given: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """
        :param given: calibration batches of the pass
        :return: those to train on, no more than the steps need
        """
        if self._samples is None:
            return islice(given, self.num_batches_used)
        samples, self._samples = self._samples, None
        return sample_batches(samples.select(range(min(self.num_batches_used, len(samples)))))

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
