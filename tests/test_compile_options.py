"""What compiled code is allowed to do otherwise than plain code: nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from autoround_modifier.device import Compute, compile_options, compiled_rounds_as_plain
from autoround_modifier.formats import WeightSpec

FORMATS = {
    "int4 symmetric": WeightSpec("int", 4, group_size=32),
    "int4 asymmetric": WeightSpec("int", 4, symmetric=False, group_size=32),
    "fp8": WeightSpec("float", 8, strategy="channel"),
    "mxfp4": WeightSpec("float", 4, group_size=32, power_of_two_scale=True),
    "nvfp4": WeightSpec("float", 4, group_size=16, global_scale=True),
}


def through_bfloat16(x: Tensor) -> Tensor:
    return (x + (x.to(torch.bfloat16).float() - x)) / (x.abs() + 0.3)


@dataclass(frozen=True)
class Divisor:
    number: int


def divide(divisor: Divisor, x: Tensor) -> Tensor:
    return x / divisor.number


def test_rounding_is_neither_moved_nor_left_out():
    options = compile_options()
    assert options["emulate_precision_casts"] is True
    assert options["pattern_matcher"] is False
    assert [value for name, value in options.items() if "rounding" in name] == [True]
    x = torch.randn(1000)
    (compiled,) = Compute(compiled=True).run(through_bfloat16, lambda _: [(x,)], x.device)
    assert torch.equal(compiled, through_bfloat16(x))


@pytest.mark.parametrize("version", ["2.10.0", "2.12.1+cpu"])
def test_old_compilers_are_not_used_on_cpus(version, monkeypatch, log):
    monkeypatch.setattr(torch, "__version__", version)
    assert compiled_rounds_as_plain(torch.device("cuda"))
    compute, x = Compute(compiled=True), torch.randn(8)
    for _ in range(2):
        (result,) = compute.run(through_bfloat16, lambda _: [(x,)], x.device)
        assert torch.equal(result, through_bfloat16(x))
    assert not compute.compiled
    assert sum(version in line for line in log) == 1


def test_constants_of_formats_are_not_made_variables():
    """PyTorch would make one of a number that it has met with a second value."""
    compute, x = Compute(compiled=True), torch.randn(8)
    before = counters["stats"]["unique_graphs"]
    for number in (3, 7, 15, 255):
        (result,) = compute.run(divide, lambda _, n=number: [(Divisor(n), x)], x.device)
        assert torch.equal(result, x / number)
    assert counters["stats"]["unique_graphs"] - before == 4


@pytest.mark.parametrize("name", FORMATS)
def test_no_number_is_divided_by_a_tensor(name):
    """On GPUs Inductor computes that approximately, whatever its options."""
    grid = FORMATS[name].grid(torch.bfloat16)
    weight = torch.randn(4, 32).bfloat16()
    w_min, w_max = weight.float().amin(-1), weight.float().amax(-1)
    global_scale = torch.full((4,), 100.0) if name == "nvfp4" else None

    def step(weight: Tensor, rounding: Tensor) -> Tensor:
        dequantized, scale = grid.fake_quantize(weight, w_min, w_max, global_scale, rounding)
        return dequantized * grid.rounding_speed(weight, scale)

    graph = make_fx(step)(weight, torch.zeros(4, 32)).graph
    operations = {str(node.target) for node in graph.nodes}
    assert "aten.div.Tensor" in operations
    assert "aten.reciprocal.default" not in operations
