"""`AutoRoundModifier`: SignRound as a step of an LLM-Compressor recipe. Lifecycle only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from compressed_tensors.quantization import (
    QuantizationScheme,
    disable_quantization,
    is_preset_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.utils import match_named_modules, patch_attr
from llmcompressor.core import Event, State, active_session
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.calibration import apply_calibration_status
from llmcompressor.modifiers.quantization.quantization import QuantizationMixin
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.utils import targets_embeddings, untie_word_embeddings
from llmcompressor.utils.pytorch import infer_sequential_targets
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from autoround_modifier.activations import (
    DEFAULT_OBSERVER,
    ActivationSite,
    activation_sites,
    needs_calibration,
)
from autoround_modifier.block_quantizer import BlockQuantizer
from autoround_modifier.calibration.capture import BlockCapture, split_towers
from autoround_modifier.calibration.experts import ExpertRouting, routed_experts_only
from autoround_modifier.calibration.samples import call_token_mask
from autoround_modifier.errors import RecipeError
from autoround_modifier.export import choose_saved_format
from autoround_modifier.layer_quantizer import LayerQuantizer
from autoround_modifier.presets import PRESET_FIELDS, PRESETS
from autoround_modifier.report import BlockReport
from autoround_modifier.run_checkpoint import RunCheckpoint, model_digest, text_digest
from autoround_modifier.tuning import TuningConfig, attention_for_tuning
from autoround_modifier.validation import (
    Layer,
    blocks_without_mask,
    check_calibration_data,
    check_kv_cache,
    check_layers,
    check_processes,
    check_same_blocks,
    check_schemes_unchanged,
    listed,
    resolve_schemes,
    uncovered_layers,
    untargeted_routers,
)

__all__ = ["AutoRoundModifier"]

# Compiling takes some ten seconds, once: as long as this many weights, times the passes over them,
# take longer without.
COMPILE_FROM = 1e9
SEARCH_PASSES = 30


class AutoRoundModifier(Modifier, QuantizationMixin):
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
    unless a target names them (`validation.untargeted_routers`). Its observers have no part in
    weights, and are refused; those of static activations default to ``static_minmax``.

    :param preset: ``best`` (1000 iterations, 512 samples), ``default`` (200, 128), ``light``
        (50, 128), ``opt_rtn`` (scale search, no tuning) or ``rtn`` (rounding to nearest, data only
        for static scales of activations).
        A field that is given overrides its preset.
    :param iters: sign-gradient steps per group of blocks; 0 tunes nothing
    :param lr: step size of V, the learned offset before rounding, in integer steps; it decays
        linearly to 0. Defaults to ``1 / iters``. With ``scale_search`` that is the step of the
        median channel, others have an eighth to eight times of it, the less the more important
        they are (`formats.speed`); MXFP4 and NVFP4 have twice as much for small weights and less
        for large ones (`formats.floating`)
    :param minmax_lr: step size of the clipping factors alpha and beta; defaults to ``lr`` without
        ``scale_search``, and to ``lr / 2^(num_bits - 2)`` with it
    :param batch_size: calibration samples in each batch
    :param gradient_accumulate_steps: batches in each step
    :param num_calibration_samples: largest number of calibration samples tuned on; the importance
        of input channels, and static scales where nothing is tuned, take all that the pipeline runs
    :param scale_search: start from the best scale of a search, which weighs errors by the
        importance of their input channel, and tune it within [0, 2] of that (SignRoundV2,
        https://arxiv.org/abs/2512.04746); false starts from the minimum and maximum of each
        group, tuned within [0, 1]. With ``loss: mse`` that is SignRound as first published, for
        integers
    :param loss: what tuning minimises between a block's output and the full-precision one:
        ``balanced``, the squared error as a share of the output's squared length, of each token
        and of the whole sample; ``mse``, the mean squared error (SignRound); ``filtered``, the
        same without the largest 0.1 % of the differences (SignRoundV2, for less than 4 bits)
    :param enable_minmax_tuning: learn alpha and beta, not only V; by default for integers only,
        and never where the whole tensor has one scale
    :param enable_quanted_input: feed each block the output of the quantized blocks before it,
        not that of the full-precision ones
    :param holdout_fraction: share of the samples on which candidates are compared; they are
        never tuned on
    :param holdout_evaluations: number of candidates compared, evenly spaced, the last among them
    :param enable_torch_compile: quantize by compiled code while tuning; the results are the same.
        By default where there is enough to tune to make up for the compilation
    :param min_expert_tokens: experts of a mixture to which fewer calibration tokens are routed are
        quantized by the scale search alone, with all input channels alike
    :param checkpoint_dir: where each finished block is kept, as far as blocks are tuned or have
        static activations. The same run, started again after it
        was interrupted, goes on after the last of them; its result is the same. The folder is left
        as it is at the end: delete it once the model is saved
    :param strict: raise if the loss or a gradient has NaN or infinity; otherwise such a block keeps
        the rounding it started from, with a warning
    :param seed: fixes every random choice
    """

    requires_calibration_data: bool = True

    preset: str = "default"
    iters: int | None = Field(default=None, ge=0)
    lr: float | None = Field(default=None, gt=0)
    minmax_lr: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulate_steps: int = Field(default=1, ge=1)
    num_calibration_samples: int | None = Field(default=None, ge=0)
    scale_search: bool | None = None
    loss: Literal["balanced", "mse", "filtered"] | None = None
    enable_minmax_tuning: bool | None = None
    enable_quanted_input: bool = True
    holdout_fraction: float = Field(default=0.125, ge=0, le=0.5)
    holdout_evaluations: int = Field(default=5, ge=1)
    enable_torch_compile: bool | None = None
    min_expert_tokens: int = Field(default=32, ge=0)
    checkpoint_dir: str | None = Field(default=None, exclude=True)
    strict: bool = False
    seed: int = 42

    _quantizer: LayerQuantizer = PrivateAttr(default_factory=lambda: LayerQuantizer({}, {}, False))
    _block_quantizer: BlockQuantizer | None = PrivateAttr(default=None)
    _routing: ExpertRouting = PrivateAttr(default_factory=lambda: ExpertRouting(nn.Module()))
    _checkpoint: RunCheckpoint | None = PrivateAttr(default=None)
    _sites: list[ActivationSite] = PrivateAttr(default_factory=list)
    _blocks: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _capture: BlockCapture | None = PrivateAttr(default=None)
    _token_mask: Tensor | None = PrivateAttr(default=None)
    _attention: str | None = PrivateAttr(default=None)
    _progress: tqdm | None = PrivateAttr(default=None)

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"unknown preset `{value}`; use one of {', '.join(PRESETS)}")
        return value

    @field_validator("scheme", mode="before")
    @classmethod
    def _known_scheme(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value or ():
            if not is_preset_scheme(name):
                raise ValueError(
                    f"unknown scheme `{name}`; use one of {', '.join(PRESET_SCHEMES)}, or "
                    "`config_groups`"
                )
        return value

    @field_validator("config_groups", "kv_cache_scheme")
    @classmethod
    def _observe_the_whole_range(cls, value: Any) -> Any:
        _set_default_observer(value.values() if isinstance(value, dict) else [value])
        return value

    @model_validator(mode="after")
    def _refuse_fields_without_effect(self) -> AutoRoundModifier:
        for name in ("weight_observer", "output_observer", "bypass_divisibility_checks"):
            if getattr(self, name):
                raise ValueError(f"`{name}` has no effect on AutoRoundModifier; remove it")
        if set(self.observer or ()) - {"input"}:
            raise ValueError(
                "AutoRoundModifier has no observers of weights and outputs; use `observer: {input: "
                "...}` or `input_observer`"
            )
        return self

    @model_validator(mode="after")
    def _resolve_preset(self) -> AutoRoundModifier:
        preset = PRESETS[self.preset]
        for name in PRESET_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))
        if self.iters and not self.num_calibration_samples:
            raise ValueError(
                f"iters is {self.iters} but num_calibration_samples is 0; tuning needs samples"
            )
        self._find_whether_data_is_needed()
        return self

    def _find_whether_data_is_needed(self) -> None:
        self.requires_calibration_data = bool(
            self.iters or self.scale_search or self._has_static_activations()
        )

    @property
    def has_schemes(self) -> bool:
        """Whether the recipe says how layers are quantized."""
        return self.scheme is not None or self.config_groups is not None

    def assign_schemes(self, config_groups: dict[str, Any], ignore: list[str]) -> None:
        """
        Called before `on_initialize`, where the recipe leaves the schemes open.

        :param config_groups: as in a recipe
        :param ignore: as in a recipe; added to what the modifier ignores
        """
        groups = {
            name: QuantizationScheme.model_validate(group) for name, group in config_groups.items()
        }
        _set_default_observer(groups.values())
        self.config_groups = groups
        self.ignore = list(dict.fromkeys([*self.ignore, *ignore]))
        self._resolved_config = None
        self._find_whether_data_is_needed()

    def _has_static_activations(self) -> bool:
        groups = self.resolved_config.config_groups.values()
        return self.kv_cache_scheme is not None or any(
            needs_calibration(scheme.input_activations) for scheme in groups
        )

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        # The host writes this dict into recipe.yaml; plain data keeps the file loadable.
        return super().model_dump(**{"mode": "json", **kwargs})

    @property
    def block_reports(self) -> list[BlockReport]:
        """What was done to each group of blocks, in order."""
        return [] if self._block_quantizer is None else list(self._block_quantizer.reports)

    # ------------------------------------------------------------------ lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """
        :raises RecipeError: if there is no scheme, or no module is targeted
        :raises SchemeError: if a scheme is not supported or does not fit its layer
        :raises CalibrationError: if data is needed and there is none
        :raises NonFiniteError: if a targeted weight has NaN or infinity
        :raises RuntimeError: if several processes share a model on disk
        :raises CheckpointError: if ``checkpoint_dir`` holds another run
        :raises OSError: if ``checkpoint_dir`` cannot be written to
        """
        if not self.has_schemes:
            raise RecipeError(
                "AutoRoundModifier has neither `scheme` nor `config_groups`: give one of them, or "
                "put an AutoSchemeModifier before it, which chooses"
            )
        model = state.model
        check_processes(model)
        self._leave_routers_alone(model)
        schemes = resolve_schemes(model, self.resolved_config)
        check_layers(schemes)
        check_kv_cache(model, self.kv_cache_scheme)
        if self.requires_calibration_data:
            check_calibration_data(state.data.calib, self._reason_for_calibration())

        if self.checkpoint_dir is not None:
            self._checkpoint = RunCheckpoint(Path(self.checkpoint_dir), self._run_digests(model))
        QuantizationMixin.initialize_quantization(self, model)
        names = {module: name for name, (module, _) in schemes.items()}
        for layer in names:
            choose_saved_format(layer.quantization_scheme, type(layer))
        args = {module: scheme.weights for module, scheme in schemes.values()}
        fused = self._compilation_pays(names)
        self._routing = ExpertRouting(model)
        self._quantizer = LayerQuantizer(
            names, args, fused, self._routing.layers, self.min_expert_tokens
        )
        self._sites = activation_sites(
            model.named_modules(), names, self.kv_cache_scheme is not None, fused
        )
        targets = infer_sequential_targets(model, kwargs.get("sequential_targets"))
        self._blocks = {block: name for name, block in match_named_modules(model, targets)}
        self._say_what_may_not_be_meant(model)
        self._attention = attention_for_tuning(model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        check_schemes_unchanged(self._quantizer.names, self._quantizer.args)
        named_layers = ((name, layer) for layer, name in self._quantizer.names.items())
        if targets_embeddings(state.model, named_layers):
            untie_word_embeddings(state.model)
        for module in (*self._quantizer.names, *(site.module for site in self._sites)):
            apply_calibration_status(module)
        if not self.requires_calibration_data:
            return

        for block in self._blocks:
            self.register_hook(block, self._enter_block(state), "forward_pre", with_kwargs=True)
        in_blocks = {module for block in self._blocks for module in block.modules()}
        if self.iters or any(
            site.module in in_blocks for site in self._sites if not site.calibrated
        ):
            # static scales alone take all samples that the pipeline runs
            limit = self.num_calibration_samples if self.iters else None
            self._capture = BlockCapture(self._blocks, limit)
            self._block_quantizer = BlockQuantizer(
                self._blocks,
                self._quantizer,
                self._sites,
                self._capture,
                self._tuning_config(),
                bool(self.scale_search),
                self.enable_quanted_input,
                self.strict,
                self._checkpoint,
                self._advance_progress,
            )
            for block in self._blocks:
                self.register_hook(block, self._record_block(), "forward", with_kwargs=True)
        for site in self._sites:
            if not site.calibrated:
                self.register_hook(site.module, site.hook(self._observe(site)), site.hook_type)
        for mixture in self._routing.mixtures:
            self.register_hook(mixture, self._enter_mixture(), "forward_pre")
        for layer in self._quantizer.names:
            if self.scale_search or layer not in in_blocks or layer in self._routing.layers:
                self.register_hook(layer, self._record_layer(), "forward_pre")

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        state.model.apply(disable_quantization)  # the basic pipeline leaves it enabled
        blocks = [module for module in modules if module in self._blocks]
        # The sequential pipeline delivers the blocks of one subgraph, to be tuned together as far
        # as they follow each other; the basic pipeline delivers the whole model at once.
        together = split_towers(blocks, self._blocks)
        groups = [[block] for block in blocks] if state.model in modules else together
        # Blocks that ran inside of code that LLM-Compressor does not trace, like vision towers,
        # are in no subgraph. They come first, one by one.
        if self._capture is not None:
            recorded = self._capture.recorded()
            with self._clean_up_on_failure():
                check_same_blocks([self._blocks[block] for block in recorded])
            untraced = [block for block in recorded if block not in blocks]
            groups = [[block] for block in untraced] + groups
            modules = [*modules, *(part for block in untraced for part in block.modules())]
        with self._clean_up_on_failure():
            self._quantizer.find_shared_scales(state.model, modules, bool(self.scale_search))
            if self._block_quantizer is not None:
                with (
                    self._model_attention(state.model),
                    HooksMixin.disable_hooks(),
                    routed_experts_only(),
                ):
                    for group in groups:
                        self._block_quantizer.quantize(group)
            self._quantize_pending(modules)
            ran = set(modules)
            self._calibrate_activations([site for site in self._sites if site.module in ran])

    def on_calibration_end(self, state: State, event: Event | None, **kwargs: Any) -> None:
        with self._clean_up_on_failure():
            never_ran = list(self._quantizer.pending)
            self._quantizer.find_shared_scales(state.model, never_ran, bool(self.scale_search))
            self._quantize_pending(never_ran)
            self._calibrate_activations(self._sites)
        self._release()
        QuantizationMixin.end_calibration(self, state.model)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        if not self.ended_:
            self.on_calibration_end(state, None)
        return True

    def _leave_routers_alone(self, model: nn.Module) -> None:
        routers = untargeted_routers(model, self.resolved_config)
        if routers:
            logger.info(
                f"{len(routers)} routers of experts stay as they are, unless a target names them: "
                f"{listed(routers)}"
            )
            self.ignore = [*self.ignore, *routers]
            self._resolved_config = None

    def _quantize_pending(self, modules: Iterable[nn.Module]) -> None:
        """By the scale search, or to nearest if nothing asks for more."""
        search = bool(self.iters or self.scale_search)
        done = self._quantizer.quantize_pending(modules, search)
        if self.iters and done:
            logger.info(
                f"outside of the tuned blocks, quantized by the scale search: {', '.join(done)}"
            )

    @staticmethod
    def _calibrate_activations(sites: list[ActivationSite]) -> None:
        """What tuning has not calibrated yet, on what the full-precision model gave."""
        for site in sites:
            if site.calibrated:
                continue
            site.synchronize()
            if site.calibrate_or_keep_one():
                logger.warning(
                    f"{site.name}: no calibration sample reached its key-value cache, whose scale "
                    "stays 1"
                )

    def _reason_for_calibration(self) -> str:
        if self.iters or self.scale_search:
            reason = f"`iters: {self.iters}`" if self.iters else "`scale_search: true`"
            if not self._has_static_activations():
                reason += " (`preset: rtn` needs none)"
            return reason
        return "a static scale of activations"

    def _compilation_pays(self, layers: Iterable[Layer]) -> bool:
        if self.enable_torch_compile is not None:
            return self.enable_torch_compile
        passes = max(self.iters or 0, SEARCH_PASSES if self.scale_search else 0)
        return passes * sum(layer.weight.numel() for layer in layers) >= COMPILE_FROM

    def _say_what_may_not_be_meant(self, model: nn.Module) -> None:
        left_out = uncovered_layers(model, self._blocks, self.ignore)
        if left_out:
            logger.info(
                f"{len(left_out)} linear layers inside of blocks are neither targeted nor ignored "
                f"and stay as they are: {listed(left_out)}"
            )
        blind = blocks_without_mask(self._blocks)
        if blind and self.requires_calibration_data:
            logger.warning(
                f"{listed(blind)} receive no `attention_mask`: padding in the calibration data "
                "would count as text"
            )

    # ------------------------------------------------------------------ capture

    def _enter_block(self, state: State) -> Callable[..., None]:
        # A loss mask is of the text; other towers see patches of images.
        decoder = set(state.model.get_decoder().modules())

        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            masks = state.loss_masks if block in decoder else None
            loss_mask = masks[state.current_batch_idx] if masks else None
            self._token_mask = call_token_mask(block, args, kwargs, loss_mask)

        return enter

    def _record_block(self) -> Callable[..., None]:
        def record(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            assert self._capture is not None
            with self._clean_up_on_failure():
                self._capture.record(block, args, kwargs, output, self._token_mask)

        return record

    def _record_layer(self) -> Callable[..., None]:
        def record(layer: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                x, mask = args[0], self._token_mask
                if layer in self._routing.layers:
                    x, mask = self._routing.select(layer, x), None
                self._quantizer.importance.record(layer, x, mask)

        return record

    def _enter_mixture(self) -> Callable[..., None]:
        def enter(mixture: LinearExperts2D, args: Any) -> None:
            self._routing.enter(mixture, args, self._token_mask)

        return enter

    def _observe(self, site: ActivationSite) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            site.observe(x, self._token_mask)

        return observe

    def _release(self) -> None:
        """Drop hooks and everything captured."""
        self.remove_hooks()
        if self._progress is not None:
            self._progress.close()
        self._capture = self._progress = None
        if self._block_quantizer is not None:
            self._block_quantizer.release()

    @contextlib.contextmanager
    def _clean_up_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._release()
            total = len(self._quantizer.names)
            kept = (
                "Nothing was saved."
                if self._checkpoint is None
                else f"Finished blocks are kept in {self.checkpoint_dir}."
            )
            logger.error(
                f"AutoRound stopped with {total - len(self._quantizer.pending)} of "
                f"{total} layers quantized. The model in memory is partly quantized: "
                f"load it again before the next attempt. {kept}"
            )
            raise

    @contextlib.contextmanager
    def _model_attention(self, model: nn.Module) -> Iterator[None]:
        """
        Calibration runs in eager attention. Tuning returns to SDPA where the model uses it: the
        captured masks fit both, and it is faster and smaller.
        """
        if self._attention == "sdpa":
            with patch_attr(model.config, "_attn_implementation", "sdpa"):
                yield
        else:
            yield

    # ------------------------------------------------------------------ tuning

    def _tuning_config(self) -> TuningConfig:
        names = TuningConfig.__dataclass_fields__
        return TuningConfig(**{name: getattr(self, name) for name in names})

    def _advance_progress(self, steps: int) -> None:
        if self._progress is None:
            total = len(self._blocks) * (self.iters or 0)
            self._progress = tqdm(total=total, desc="AutoRound", unit="it", smoothing=0.05)
        self._progress.update(steps)

    def _run_digests(self, model: nn.Module) -> dict[str, str]:
        """What the result depends on, but for the calibration data."""
        modifiers = active_session().lifecycle.recipe.modifiers
        recipe = [
            (type(modifier).__name__, modifier.model_dump(mode="json", fallback=_class_name))
            for modifier in modifiers
        ]
        for _, fields in recipe:
            for name in ("checkpoint_dir", "enable_torch_compile"):
                fields.pop(name, None)
        return {
            "version of autoround_modifier": version("autoround_modifier"),
            "recipe": text_digest(recipe),
            # two modifiers of one recipe need a folder each
            "modifier of the recipe": str([x is self for x in modifiers].index(True)),
            "model": model_digest(model),
        }


def _set_default_observer(schemes: Iterable[Any]) -> None:
    """
    Observe the whole range where no observer is named. LLM-Compressor's default is a moving
    average of which the first batch makes up most; then results depend on batch size and order.

    :param schemes: `QuantizationScheme` or `QuantizationArgs` of activations, or None; updated
    """
    for scheme in schemes:
        args = getattr(scheme, "input_activations", scheme)
        if args is not None and needs_calibration(args) and args.observer is None:
            args.observer = DEFAULT_OBSERVER


def _class_name(value: object) -> str:
    return type(value).__name__
