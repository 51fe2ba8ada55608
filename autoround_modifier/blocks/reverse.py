"""
One pass through the model forward, and one back, block by block.

The forward pass keeps what every block was called with, and takes the gradient of a loss at the
output of the last block. On the way back each block runs once more, with gradients, on the inputs
that were kept. In memory are the inputs of all blocks, and the activations of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.model_pass import forward_arguments, model_logits
from autoround_modifier.blocks.patching import hooks_registered
from autoround_modifier.blocks.samples import call_token_mask, input_hidden, output_hidden
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.errors import CalibrationError

__all__ = ["LayerObserver", "LogitGradient", "ReversePass"]

# (logits, batch, its number) -> gradient of the loss by the logits, of the same shape
LogitGradient = Callable[[Tensor, dict[str, Any], int], Tensor]
# (layer, its input, (batch, tokens) mask of the tokens that count or None)
LayerObserver = Callable[[nn.Module, Tensor, Tensor | None], None]


class ReversePass:
    """
    The model must be in evaluation mode, with frozen parameters, inside of ``torch.enable_grad``.

    :param model: is not changed
    :param blocks: of the model and their names, in any order
    :param batches: arguments of the model's forward; ``attention_mask`` and ``loss_mask``,
        (batch, length), say which positions count
    :param batch_size: samples that go back through a block together
    :ivar blocks: those that lead from one to the next up to the last that runs, in order; blocks
        of another part of the model, such as a vision encoder, are not among them
    :ivar gradients: dL/dh of each sample, (1, tokens, hidden), on the CPU: at first at the output
        of the last block, then at the input of the block that `backward` ran last
    :raises CalibrationError: if no block runs
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: dict[nn.Module, str],
        batches: list[dict[str, Any]],
        batch_size: int,
    ):
        self.model = model
        self.batches = batches
        self.batch_size = batch_size
        self.blocks = self._sequence(blocks) if batches else {}
        if not self.blocks:
            raise CalibrationError(
                "no decoder block ran on the calibration data; name them by `sequential_targets`"
            )
        self.gradients: list[Tensor] = []
        self._store = CalibrationStore(
            self.blocks, num_samples=None, keep_outputs=False, sort=False
        )

    @torch.no_grad()
    def _sequence(self, blocks: dict[nn.Module, str]) -> dict[nn.Module, str]:
        """:return: the blocks that run one after the other on each other's output, to the last"""
        ran: list[tuple[nn.Module, Tensor, Tensor]] = []

        def leave_block(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = input_hidden(args, kwargs)
            if hidden is None:
                raise CalibrationError(
                    f"{blocks[block]}: called without hidden states; choose other "
                    "`sequential_targets`"
                )
            ran.append((block, hidden, output_hidden(output)))

        hooks = [
            partial(block.register_forward_hook, leave_block, with_kwargs=True) for block in blocks
        ]
        with hooks_registered(*hooks):
            model_logits(self.model, forward_arguments(self.batches[0]))
        sequence: dict[nn.Module, str] = {}
        expected: Tensor | None = None
        for block, hidden, output in reversed(ran):
            if block in sequence or (expected is not None and not torch.equal(output, expected)):
                break
            sequence[block] = blocks[block]
            expected = hidden
        return dict(reversed(sequence.items()))

    def forward(
        self, logit_gradient: LogitGradient, observers: Mapping[nn.Module, LayerObserver]
    ) -> None:
        """
        Run the model on all batches, and take the gradient at the output of the last block.

        :param logit_gradient: of the loss
        :param observers: called with the inputs of layers
        :raises CalibrationError: if the output does not depend on the last block
        """
        last_block = next(reversed(self.blocks))
        for index, batch in enumerate(self.batches):
            call = _ForwardCall(list(self.blocks), self._store, batch, observers)
            with hooks_registered(*call.hooks()):
                logits = model_logits(self.model, forward_arguments(batch))
                gradient = logit_gradient(logits, batch, index)
                if logits.requires_grad:
                    logits.backward(gradient)
            if call.leaf is None or call.leaf.grad is None:
                raise CalibrationError(
                    f"{self.blocks[last_block]}: the model's output does not depend on it in "
                    f"calibration batch {index}"
                )
            self.gradients += [g.unsqueeze(0).to("cpu", copy=True) for g in call.leaf.grad]

    def backward(self, block: nn.Module) -> None:
        """
        Run a block again, and carry the gradients from its output to its input.

        :param block: the last of `blocks` that was not run yet
        :raises CalibrationError: if the block did not run once for each sample
        """
        captured = self._store.pop(block)
        if captured is None or len(captured.inputs) != len(self.gradients):
            raise CalibrationError(
                f"{self.blocks[block]}: not run once for each sample, so no gradient leads through "
                "it. Choose `sequential_targets` that follow each other."
            )
        group = BlockGroup([block], [captured.calls])
        for samples, hidden in group.batches(captured.inputs, self.batch_size):
            leaf = hidden.detach().requires_grad_()
            gradient = torch.cat([self.gradients[index] for index in samples])
            # a copy of the leaf, because a block may write into its input
            group.forward(leaf.clone(), samples).backward(gradient.to(leaf.device))
            for index, row in zip(samples, cast(Tensor, leaf.grad), strict=True):
                self.gradients[index] = row.unsqueeze(0).to("cpu", copy=True)

    def backward_to_embeddings(self, embeddings: list[nn.Embedding]) -> None:
        """
        Run the model up to the first block, and carry the gradients to the outputs of embeddings.

        :param embeddings: those whose outputs shall have gradients
        """
        position = 0

        def leave_embedding(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        def enter_block(block: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal position
            hidden = cast(Tensor, input_hidden(args, kwargs))
            gradient = torch.cat(self.gradients[position : position + len(hidden)])
            position += len(hidden)
            hidden.backward(gradient.to(hidden.device))
            raise _FirstBlockReached

        first = next(iter(self.blocks))
        # before other hooks of the layer, which shall see an output that takes gradients
        hooks: list[Callable[[], Any]] = [
            partial(layer.register_forward_hook, leave_embedding, prepend=True)
            for layer in embeddings
        ]
        hooks.append(partial(first.register_forward_pre_hook, enter_block, with_kwargs=True))
        with hooks_registered(*hooks):
            for batch in self.batches:
                with contextlib.suppress(_FirstBlockReached):
                    model_logits(self.model, forward_arguments(batch))


class _ForwardCall:
    """
    The hooks of one forward pass.

    :ivar mask: of the tokens that count in the block that runs, (batch, tokens), bool, or None
    :ivar leaf: the output of the last block, (batch, tokens, hidden), which takes the gradient
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        store: CalibrationStore,
        batch: dict[str, Any],
        observers: Mapping[nn.Module, LayerObserver],
    ):
        self.blocks = blocks
        self.store = store
        self.loss_mask = batch.get("loss_mask")
        self.observers = observers
        self.mask: Tensor | None = None
        self.leaf: Tensor | None = None

    def hooks(self) -> list[Callable[[], Any]]:
        registrations: list[Callable[[], Any]] = []
        for block in self.blocks:
            registrations += [
                partial(block.register_forward_pre_hook, self._enter_block, with_kwargs=True),
                partial(block.register_forward_hook, self._leave_block),
            ]
        registrations += [
            partial(layer.register_forward_pre_hook, self._enter_layer) for layer in self.observers
        ]
        return registrations

    def _enter_block(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.mask = call_token_mask(block, args, kwargs, self.loss_mask)
        self.store.enter(block, args, kwargs, self.mask)

    def _leave_block(self, block: nn.Module, args: Any, output: Any) -> Any:
        self.store.leave(block, output)
        if block is not self.blocks[-1]:
            return output
        self.leaf = output_hidden(output).detach().requires_grad_()
        return (self.leaf, *output[1:]) if isinstance(output, (tuple, list)) else self.leaf

    def _enter_layer(self, layer: nn.Module, args: Any) -> None:
        self.observers[layer](layer, args[0], self.mask)


class _FirstBlockReached(Exception):
    """Ends a forward pass."""
