"""
Tunes one block of fake tensors on a fake accelerator, from capture to the quantized chain.

    python fake_accelerator.py resident|offloaded|moved|mixed|experts|mismatch

resident: captured activations are on the accelerator; offloaded: on the CPU; moved: first on the
accelerator, then on the CPU; mixed: some are; mismatch: a weight is left on the CPU. Prints the
copies from the CPU to the accelerator in each step, and the device of the tuned integers.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from helpers import record_call, search_range, tuned_weight
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from autoround_modifier.blocks.forwards import quantized_forwards
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.placement import SamplePlacement
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.tuning import Tuner, TuningConfig

DEVICE = "accel:0"
WEIGHTS = QuantizationArgs(num_bits=2, symmetric=True, strategy="group", group_size=16)


class Numbers(FakeTensorMode):
    """A fake number is 1 where the program asks for its value, and every element of a mask true."""

    copies_to_device = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            target = (kwargs or {}).get("device")
            if args[0].device.type == "cpu" and target is not None and target.type != "cpu":
                Numbers.copies_to_device += 1
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype, device="cpu").numpy().item()
        if func is torch.ops.aten.nonzero.default:
            shape = args[0].numel(), args[0].ndim
            indices = torch.empty(shape, dtype=torch.long, device="meta")
            return FakeTensor(self, indices, args[0].device)
        return super().dispatch(func, types, args, kwargs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(
            *(self.first(self.norm(x)).unsqueeze(1) for _ in range(3)), attn_mask=attention_mask
        )
        return x + self.second(y.squeeze(1)).tanh()


def main(case: str) -> None:
    _setup_privateuseone_for_python_backend("accel")
    with Numbers():
        with torch.device(DEVICE):
            block = Block()
        store = CalibrationStore(
            {block: "model.layers.0"},
            num_samples=None,
            placement=SamplePlacement("none" if case in ("resident", "moved") else "cpu"),
            sort=False,  # sorting reads the numbers
        )
        for _ in range(4):
            x = torch.randn(2, 8, 32, device=DEVICE)
            mask = torch.ones(2, 1, 8, 8, dtype=torch.bool, device=DEVICE)
            real = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
            with torch.no_grad():
                record_call(store, block, (x,), {"attention_mask": mask}, block(x, mask), real)
        captured = store.pop(block)
        assert captured is not None
        if case == "mixed":
            captured.inputs[::2] = [x.to(DEVICE) for x in captured.inputs[::2]]
            captured.outputs[1::2] = [x.to(DEVICE) for x in captured.outputs[1::2]]
            captured.masks[::3] = [None for _ in captured.masks[::3]]
        layers = [block.first, block.second]
        importance = torch.rand(32, dtype=torch.float64, device=DEVICE)
        formats = {
            x: tuned_weight(
                x.weight,
                WEIGHTS,
                search_range(x.weight, WEIGHTS, importance),
                importance=importance,
            )
            for x in layers
        }
        if case == "mismatch":
            formats[block.first].weight = formats[block.first].weight.to("cpu")
        group = BlockGroup([block], [captured.calls])
        distinct = len({id(call.kwargs["attention_mask"]) for call in captured.calls})
        experts = {block.second} if case == "experts" else set()
        config = TuningConfig(iters=3, batch_size=4, loss="balanced")
        tuner = Tuner(
            group,
            formats,
            captured.inputs,
            captured.outputs,
            captured.masks,
            config,
            experts=experts,
        )
        if case == "moved":
            tuner.move_samples(torch.device("cpu"))
            tensors = [*captured.inputs, *captured.outputs, *captured.masks]
            tensors += [x for call in group.calls[0] for x in call.tensors()]
            assert {x.device.type for x in tensors} == {"cpu"}
            assert len({id(call.kwargs["attention_mask"]) for call in group.calls[0]}) == distinct
        copies = []

        def count_copies() -> None:
            copies.append(Numbers.copies_to_device)
            Numbers.copies_to_device = 0

        result = tuner.run(count_copies)
        print("copies in each step:", *copies)
        home = [x.device for x in captured.inputs]
        group.advance(captured.inputs, 4, quantized_forwards(result.weights, experts))
        assert [x.device for x in captured.inputs] == home
        (device,) = {weight.values.device for weight in result.weights.values()}
        print(device)


if __name__ == "__main__":
    main(sys.argv[1])
