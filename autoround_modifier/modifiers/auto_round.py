"""`AutoRoundModifier`: SignRound as a step of an LLM-Compressor recipe. Lifecycle only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from loguru import logger
from pydantic import PrivateAttr, model_validator
from torch import nn

from autoround_modifier.activations import (
    calibrate_remaining,
)
from autoround_modifier.blocks.placement import SamplePlacement
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.checkpoints.check import check_before_saving
from autoround_modifier.device import Compute, compilation_pays
from autoround_modifier.errors import RecipeError
from autoround_modifier.host.applied_schemes import (
    forget_carriers,
    forget_scheme,
    forget_schemes,
    modules_of,
)
from autoround_modifier.host.attention import sdpa_computes_the_same, tuning_attention
from autoround_modifier.host.blocks import declare_blocks, find_blocks, input_embeddings
from autoround_modifier.host.experts import routed_experts_only
from autoround_modifier.host.layers import stored_weight
from autoround_modifier.host.lifecycle import (
    AUTOROUND_CLASS_NAME,
    Event,
    HooksMixin,
    PlainDataModifier,
    QuantizationMixin,
    State,
    apply_calibration_status,
    disable_quantization,
    recipe_modifiers,
    targets_embeddings,
    untie_word_embeddings,
)
from autoround_modifier.host.loading import check_not_compressed
from autoround_modifier.host.shared_state import SHARED_STATE_PIPELINE, blocks_share_state
from autoround_modifier.modifiers.block_quantizer import BlockQuantizer, groups_to_tune
from autoround_modifier.modifiers.failures import nothing_tuned, what_is_left
from autoround_modifier.modifiers.finishing import prepare_saving
from autoround_modifier.modifiers.generation import GenerationCheck
from autoround_modifier.modifiers.gguf_blocks import TunedBlocks
from autoround_modifier.modifiers.gguf_layers import (
    check_alone,
    choose_gguf_types,
    saved_configs,
    say_what_falls_back,
)
from autoround_modifier.modifiers.preparation import PreparedModel, prepare_model
from autoround_modifier.modifiers.recorder import (
    CalibrationRecorder,
    layers_to_record,
    loss_mask_of,
)
from autoround_modifier.modifiers.routers import ignored_layers
from autoround_modifier.modifiers.settings import (
    SchemeSettings,
    TuningSettings,
    reason_for_calibration,
)
from autoround_modifier.modifiers.targets import warn_of_targets
from autoround_modifier.modifiers.validation import (
    Schemes,
    check_calibration_data,
    check_experts,
    check_finite,
    check_fit,
    check_kv_cache,
    check_layers_in_blocks,
    check_not_quantized,
    check_not_taken,
    check_processes,
    check_schemes_unchanged,
    log_uncovered_layers,
    resolve_schemes,
    warn_of_blocks_without_mask,
)
from autoround_modifier.parallel import is_distributed
from autoround_modifier.progress.bar import Progress
from autoround_modifier.progress.block_report import BlockReport
from autoround_modifier.progress.events import (
    CalibrationDataFound,
    PhaseEnded,
    PhaseStarted,
    phase,
    publish,
)
from autoround_modifier.runs.checkpoint import RunCheckpoint
from autoround_modifier.runs.digests import run_description, run_digests

__all__ = ["AutoRoundModifier"]

CAPTURE = "capture"


class AutoRoundModifier(TuningSettings, PlainDataModifier, SchemeSettings):
    """
    Learns how each weight rounds, by the sign of the gradient, one decoder block at a time
    (SignRound, https://arxiv.org/abs/2309.05516). The checkpoint format does not change.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        AutoRoundModifier:
          preset: default
          ignore: [lm_head]
          config_groups:
            group_0:
              targets: [Linear]
              weights: {num_bits: 2, type: int, symmetric: true, strategy: group, group_size: 64}
    ```

    Lifecycle:

    - on_initialize: refuse bad input, apply the schemes
    - on_calibration_start: hook the blocks
    - on_sequential_epoch_end: tune the blocks that just ran, write back, advance the quantized
      chain; quantize targets outside of blocks by the scale search
    - on_calibration_end: quantize targets that never ran, remove hooks, freeze

    Targets, schemes and ``ignore`` are those of `QuantizationMixin`. Routers of experts are ignored
    unless a target names them (`modifiers/routers.py`). Its observers have no part in
    weights, and are refused; those of static activations default to ``static_minmax``. All other
    fields are those of `TuningSettings`.
    """

    requires_calibration_data: bool = True

    _without_error_propagation: bool = PrivateAttr(default=False)
    _checks_generation: bool = PrivateAttr(default=False)
    _generation: GenerationCheck | None = PrivateAttr(default=None)
    _prepared: PreparedModel = PrivateAttr(default_factory=PreparedModel)
    _block_quantizer: BlockQuantizer | None = PrivateAttr(default=None)
    _checkpoint: RunCheckpoint | None = PrivateAttr(default=None)
    _blocks: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _store: CalibrationStore | None = PrivateAttr(default=None)
    _tune_in_sdpa: bool = PrivateAttr(default=False)
    _progress: Progress | None = PrivateAttr(default=None)
    _only_modifier: bool = PrivateAttr(default=False)
    _stopped: bool = PrivateAttr(default=False)
    _warned_of: set[str] = PrivateAttr(default_factory=set)

    @model_validator(mode="after")
    def _say_whether_data_is_needed(self) -> AutoRoundModifier:
        self._find_whether_data_is_needed()
        return self

    def _find_whether_data_is_needed(self) -> None:
        self.requires_calibration_data = bool(
            self.iters or self.scale_search or self.has_static_activations()
        )

    @property
    def num_samples_used(self) -> int | None:
        """
        How many calibration samples the blocks are tuned on; None for all that the pipeline runs,
        as static scales alone take.
        """
        if not self.requires_calibration_data:
            return 0
        return self.num_calibration_samples if self.iters else None

    def assign_schemes(self, config_groups: dict[str, Any], ignore: list[str]) -> None:
        super().assign_schemes(config_groups, ignore)
        self._find_whether_data_is_needed()

    def run_without_error_propagation(self) -> None:
        """
        Called by `oneshot`, which starts the run with ``propagate_error=False``: this class is not
        the one whose name makes LLM-Compressor do so.
        """
        self._without_error_propagation = True

    def check_generation(self) -> None:
        """Called by `oneshot`: warn if the quantized model repeats a single token."""
        self._checks_generation = True

    @property
    def block_reports(self) -> list[BlockReport]:
        """What was done to each group of blocks, in order."""
        return [] if self._block_quantizer is None else list(self._block_quantizer.reports)

    # ------------------------------------------------------------------ lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises CompressedSourceError: if the model is compressed already
        :raises RecipeError: if there is no scheme, no module is targeted, the model is quantized
            already, there is no block to tune, ``engine`` would not load the checkpoint, or the
            class is renamed and LLM-Compressor would feed it quantized inputs
        :raises SchemeError: if a scheme is not supported or does not fit its layer
        :raises CalibrationError: if data is needed and there is none
        :raises SavingError: if the model could not be saved
        :raises NonFiniteError: if a targeted weight has NaN or infinity
        :raises RuntimeError: if several processes share a model on disk
        :raises CheckpointError: if ``checkpoint_dir`` holds another run, or another process uses it
        :raises OSError: if ``checkpoint_dir`` cannot be written to
        """
        known_by_name = type(self).__name__ == AUTOROUND_CLASS_NAME
        if not (known_by_name or self._without_error_propagation):
            raise RecipeError(
                f"{type(self).__name__} is an AutoRoundModifier under another name. LLM-Compressor "
                "would feed its blocks quantized inputs, because it recognises AutoRound by the "
                "class name. Run it by `autoround_modifier.oneshot`, or name the class "
                "AutoRoundModifier."
            )
        if not self.has_schemes:
            raise RecipeError(
                "AutoRoundModifier has neither `scheme` nor `config_groups`: give one of them, or "
                "put an AutoSchemeModifier before it, which chooses"
            )
        model = state.model
        check_not_compressed(model)
        check_not_quantized(model, self.checkpoint_dir)
        modifiers = recipe_modifiers()
        before = modifiers[: next(i for i, x in enumerate([*modifiers, self]) if x is self)]
        forget_schemes(model, modules_of(model, before))
        self._only_modifier = len(modifiers) <= 1
        check_processes(model)
        check_experts(model)
        self.set_gguf_types({})
        self.add_ignored(ignored_layers(model, self.resolved_config))
        plan = prepare_saving(model)
        warn_of_targets(model, self.resolved_config, plan.mtp.schemes)
        schemes = resolve_schemes(model, self.resolved_config)
        self._blocks = find_blocks(model, kwargs.get("sequential_targets"))
        if self.gguf_scheme is not None:
            check_alone(self, modifiers)
            schemes = self._choose_gguf_types(model, schemes, plan.blocks)
        check_not_taken(schemes)
        check_fit(schemes)
        check_finite({name: layer for name, (layer, _) in schemes.items()})
        check_kv_cache(model, self.kv_cache_scheme)
        if self.iters:
            check_layers_in_blocks(self._blocks, schemes, self.iters)
        if self.requires_calibration_data:
            reason = reason_for_calibration(self, self)
            check_calibration_data(state.data.calib, reason, model)
            publish(CalibrationDataFound(state.data.calib))
        self._check_what_will_be_saved(model)

        if self.checkpoint_dir is not None:
            batches = state.data.calib if self.requires_calibration_data else None
            digests = run_digests(model, self, modifiers, batches)
            described = run_description(model, modifiers, batches)
            self._checkpoint = RunCheckpoint(Path(self.checkpoint_dir), digests, described)
        QuantizationMixin.initialize_quantization(self, model)
        num_weights = sum(stored_weight(layer).numel() for layer, _ in schemes.values())
        compiled = self.enable_torch_compile
        if compiled is None:
            compiled = compilation_pays(num_weights, self.iters, self.scale_search)
        self._prepared = prepare_model(
            model,
            schemes,
            Compute(compiled),
            self.kv_cache_scheme is not None,
            self.min_expert_tokens,
            plan.blocks,
        )
        if kwargs.get("sequential_targets") is None:
            declare_blocks(model, self._blocks)
        log_uncovered_layers(model, self._blocks, self.ignore)
        if self.requires_calibration_data:
            warn_of_blocks_without_mask(self._blocks)
        self._tune_in_sdpa = sdpa_computes_the_same(model)
        if self._checks_generation and self.requires_calibration_data:
            self._generation = GenerationCheck(model, state.data.calib)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        prepared, names = self._prepared, self._prepared.quantizer.names
        check_schemes_unchanged(names, prepared.quantizer.args)
        named_layers = ((name, layer) for layer, name in names.items())
        if targets_embeddings(state.model, named_layers):
            untie_word_embeddings(state.model)
        for module in (*names, *(one.module for one in prepared.activations)):
            apply_calibration_status(module)
        if not self.requires_calibration_data:
            return
        publish(PhaseStarted(CAPTURE))

        in_blocks = {module for block in self._blocks for module in block.modules()}
        to_record = [one for one in prepared.activations if not one.calibrated]
        if self.iters or any(one.module in in_blocks for one in to_record):
            # One process that runs out of memory would leave the others waiting.
            alone = self.offload_device != "auto" or not is_distributed()
            placement = SamplePlacement(self.offload_device if alone else "cpu")
            self._store = CalibrationStore(self._blocks, self.num_samples_used, placement)
            num_blocks = len(self._blocks)
            steps = num_blocks * (self.iters or 0)
            self._progress = Progress("tuning", steps, num_blocks, title="AutoRound")
            self._block_quantizer = BlockQuantizer(
                self._blocks,
                prepared.quantizer,
                prepared.activations,
                self._store,
                self.tuning_config(),
                bool(self.scale_search),
                self._tune_in_sdpa,
                self.enable_quanted_input,
                self.strict,
                self._checkpoint,
                self._progress.advance,
            )
        recorder = CalibrationRecorder(
            self._blocks,
            loss_mask_of(state),
            prepared.routing,
            prepared.quantizer.initial.importance,
            self._store,
            input_embeddings(state.model),
            lambda: state.current_batch_idx,
        )
        layers = layers_to_record(
            names, in_blocks, prepared.routing.layers, bool(self.scale_search)
        )
        recorder.install(self._register_cleaning_up, layers, to_record)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        state.model.apply(disable_quantization)  # the basic pipeline leaves it enabled
        with self._clean_up_on_failure():
            if self._store is not None and state.model not in modules:
                self._check_pipeline(state.model)
            groups, modules = groups_to_tune(state.model, modules, self._blocks, self._store)
            self._find_shared_scales(state.model, modules)
            if self._block_quantizer is not None:
                with (
                    tuning_attention(state.model, self._tune_in_sdpa),
                    HooksMixin.disable_hooks(),
                    routed_experts_only(),
                ):
                    for group in groups:
                        self._block_quantizer.quantize(group)
                if state.model not in modules:
                    self._warn_of_dropped_state()
            self._quantize_rest(modules)
            ran = set(modules)
            calibrate_remaining([one for one in self._prepared.activations if one.module in ran])

    def on_calibration_end(self, state: State, event: Event | None, **kwargs: Any) -> None:
        with self._clean_up_on_failure():
            if self.iters and not any(report.failure is None for report in self.block_reports):
                raise RecipeError(nothing_tuned(self.iters, self._blocks, self.block_reports))
            never_ran = list(self._prepared.quantizer.unquantized)
            self._find_shared_scales(state.model, never_ran)
            self._quantize_rest(never_ran)
            calibrate_remaining(self._prepared.activations)
        self._release()
        if self.requires_calibration_data:
            publish(PhaseEnded(CAPTURE))
        QuantizationMixin.end_calibration(self, state.model)
        if self.gguf_scheme is not None:
            forget_carriers(self._prepared.quantizer.names)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if not self.ended_:
            self.clean_up()  # the run has stopped, and the host only cleans up
        elif self._generation is not None:
            self._generation.warn_if_repeating(state.model)
        return True

    # ------------------------------------------------------------------ steps of the lifecycle

    def _choose_gguf_types(
        self, model: nn.Module, targeted: Schemes, blocks: TunedBlocks
    ) -> Schemes:
        """:return: the carrier scheme of each layer"""
        scheme = self.gguf_scheme
        assert scheme is not None
        types = choose_gguf_types(model, scheme, targeted, self._blocks)
        say_what_falls_back(model, scheme, types)
        blocks.scheme, blocks.types = scheme, types
        self.set_gguf_types(types)
        return resolve_schemes(model, self.resolved_config)

    def _check_what_will_be_saved(self, model: nn.Module) -> None:
        """By all modifiers of the recipe; the last one of this class knows the schemes of all."""
        modifiers = recipe_modifiers()
        tuners = [x for x in modifiers if isinstance(x, AutoRoundModifier)]
        if not tuners or tuners[-1] is self:
            check_before_saving(model, saved_configs(modifiers), self.engine)

    def _find_shared_scales(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        layers = self._prepared.quantizer.waiting(modules)
        self._prepared.quantizer.initial.find_shared_scales(model, layers, bool(self.scale_search))

    def _quantize_rest(self, modules: Iterable[nn.Module]) -> None:
        """Quantize what was not tuned: by the scale search, or to nearest if only that is asked."""
        search = bool(self.iters or self.scale_search)
        with phase("search" if search else "rounding"):
            done = self._prepared.quantizer.quantize(modules, search)
        if self.iters and done:
            logger.info(
                f"outside of the tuned blocks, quantized by the scale search: {', '.join(done)}"
            )

    def _check_pipeline(self, model: nn.Module) -> None:
        """
        The first subgraph of the sequential pipeline has no blocks: nothing is tuned yet.

        :raises RecipeError: if blocks pass on state that this pipeline drops
        """
        if blocks_share_state(model):
            raise RecipeError(
                "blocks of this model share keys and values, which LLM-Compressor's sequential "
                f"pipeline does not pass on: give `oneshot` `pipeline={SHARED_STATE_PIPELINE!r}` "
                "(`autoround_modifier.oneshot` does so by itself)"
            )

    def _warn_of_dropped_state(self) -> None:
        """The sequential pipeline calls each subgraph with copies of containers of tensors."""
        writers = [] if self._block_quantizer is None else self._block_quantizer.writers
        if len(writers) == 1 and writers[0] not in self._warned_of:
            self._warned_of.add(writers[0])
            logger.warning(
                f"{writers[0]} writes into an argument, which LLM-Compressor's sequential pipeline "
                "does not pass on. If later blocks read it, give `oneshot` "
                f"`pipeline={SHARED_STATE_PIPELINE!r}`."
            )

    # ------------------------------------------------------------------ failures

    def clean_up(self) -> None:
        """
        Called when the run has stopped, for whatever reason: leave no hooks, and layers that are
        not quantized as they were. Nothing happens the second time, nor after a run that ended.
        """
        if self._stopped or self.ended_:
            return
        self._stopped = True
        quantizer = self._prepared.quantizer
        total, left = len(quantizer.names), len(quantizer.unquantized)
        groups = 0 if self._block_quantizer is None else self._block_quantizer.num_finished
        self._release()
        for layer in quantizer.unquantized:
            forget_scheme(layer)
        if self.gguf_scheme is not None:  # with a carrier the others would not compute as saved
            forget_carriers(x for x in quantizer.names if x not in quantizer.unquantized)
        for one in self._prepared.activations:
            if one.statistics is not None and not one.calibrated:
                forget_scheme(one.module)
        if total:
            logger.error(
                what_is_left(total - left, total, groups, self.checkpoint_dir, self._only_modifier)
            )

    def _register_cleaning_up(
        self, module: nn.Module, hook: Callable[..., Any], kind: str, **options: Any
    ) -> None:
        """Register a hook whose failure cleans up."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._clean_up_on_failure():
                return hook(*args, **kwargs)

        self.register_hook(module, guarded, kind, **options)

    @contextlib.contextmanager
    def _clean_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C among them
            self.clean_up()
            raise

    def _release(self) -> None:
        """Drop hooks and everything recorded."""
        self.remove_hooks()
        if self._progress is not None:
            self._progress.close()
        self._store = None
        if self._checkpoint is not None:
            self._checkpoint.close()
        if self._block_quantizer is not None:
            self._block_quantizer.release()
