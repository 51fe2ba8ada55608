"""Records a calibration pass: what blocks, layers, experts and activations see."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import Tensor, nn

from autoround_modifier.activations import ActivationQuantizer
from autoround_modifier.blocks.embedded_tokens import EmbeddedTokens
from autoround_modifier.blocks.experts import ExpertRouting
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.samples import call_token_mask
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.calibration import check_loss_masks
from autoround_modifier.host.lifecycle import State

__all__ = ["CalibrationRecorder", "layers_to_record", "loss_mask_of"]

# (module, hook, kind of hook, options): `HooksMixin.register_hook`
RegisterHook = Callable[..., Any]


class CalibrationRecorder:
    """
    Owns the hooks of a calibration pass, and the mask of the tokens that count in the block that
    runs: it is read off the arguments of each block, and applies to all that runs inside it.

    :param blocks: the decoder blocks
    :param loss_mask: block -> (batch, tokens) mask of the dataset for the batch that runs, or None
    :param routing: which tokens each expert receives
    :param importance: of input channels, which the recorder adds to
    :param store: keeps inputs and outputs of blocks; None where nobody needs them
    :param embeddings: of the tokens of the model, or None
    :param batch: gives the number of the batch that runs
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        loss_mask: Callable[[nn.Module], Tensor | None],
        routing: ExpertRouting,
        importance: Importance,
        store: CalibrationStore | None,
        embeddings: nn.Module | None = None,
        batch: Callable[[], int] = lambda: 0,
    ):
        self.blocks = list(blocks)
        self.loss_mask = loss_mask
        self.routing = routing
        self.importance = importance
        self.store = store
        self.embeddings = embeddings
        self.batch = batch
        self._tokens = EmbeddedTokens()
        self._token_mask: Tensor | None = None

    def install(
        self,
        register: RegisterHook,
        layers: Iterable[nn.Module],
        activations: Iterable[ActivationQuantizer],
    ) -> None:
        """
        :param register: registers a hook; the caller removes them
        :param layers: whose importance is recorded
        :param activations: whose statistics are recorded
        """
        if self.store is not None and self.embeddings is not None:
            register(self.embeddings, self._leave_embeddings, "forward")
        for block in self.blocks:
            register(block, self._enter_block, "forward_pre", with_kwargs=True)
            if self.store is not None:
                register(block, self._leave_block, "forward")
        for one in activations:
            register(one.module, one.hook(self._recorder(one)), one.hook_type)
        for mixture in self.routing.mixtures:
            register(mixture, self._enter_mixture, "forward_pre")
        for layer in layers:
            register(layer, self._enter_layer, "forward_pre")

    def _enter_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self._token_mask = call_token_mask(block, args, kwargs, self.loss_mask(block))
        if self.store is not None:
            self.store.enter(block, args, kwargs, self._token_mask, self._token_ids)

    def _leave_embeddings(self, embeddings: nn.Module, args: Any, output: Any) -> None:
        self._tokens.record(self.batch(), args, output)

    def _token_ids(self, hidden: Tensor) -> Tensor | None:
        return self._tokens.ids_of(self.batch(), hidden)

    def _leave_block(self, block: nn.Module, args: Any, output: Any) -> None:
        assert self.store is not None
        self.store.leave(block, output)

    def _enter_mixture(self, mixture: Any, args: Any) -> None:
        self.routing.enter(mixture, args, self._token_mask)

    def _enter_layer(self, layer: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            x, mask = args[0], self._token_mask
            if isinstance(layer, nn.Linear) and layer in self.routing.layers:
                x, mask = self.routing.select(layer, x), None
            self.importance.record(layer, x, mask)

    def _recorder(self, one: ActivationQuantizer) -> Callable[[Tensor], None]:
        def record(x: Tensor) -> None:
            one.record(x, self._token_mask)

        return record


def layers_to_record(
    layers: Iterable[nn.Module],
    in_blocks: Container[nn.Module],
    experts: Container[nn.Module],
    scale_search: bool,
) -> list[nn.Module]:
    """
    :return: the layers whose importance is used: all for the scale search; without it, layers
        outside of blocks, and experts, whose tokens are counted
    """
    return [x for x in layers if scale_search or x not in in_blocks or x in experts]


def loss_mask_of(state: State) -> Callable[[nn.Module], Tensor | None]:
    """
    :return: block -> the dataset's loss mask for this batch, (batch, tokens), or None. It raises
        `CalibrationError` if no token of any batch counts
    """
    # A loss mask is of the text; blocks outside of the decoder see patches of images.
    decoder = set(state.model.get_decoder().modules())

    def loss_mask(block: nn.Module) -> Tensor | None:
        masks = state.loss_masks if block in decoder else None
        # LLM-Compressor's basic pipeline collects them batch by batch.
        if masks and state.data.calib is not None and len(masks) == len(state.data.calib):
            check_loss_masks(masks)
        return masks[state.current_batch_idx] if masks else None

    return loss_mask
