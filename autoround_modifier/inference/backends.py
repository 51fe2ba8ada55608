"""What can run packed weights: a table of backends, and the conditions of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoround_modifier.inference.ark_layer import ArkLinear
from autoround_modifier.inference.gptqmodel_layer import finish_gptqmodel, gptqmodel_linear
from autoround_modifier.inference.humming_layer import HummingLinear
from autoround_modifier.inference.int4_layer import Int4Linear
from autoround_modifier.inference.packed_weight import CHANNEL, PackedSpec, PackedWeight

__all__ = ["BACKENDS", "TORCH", "TRANSFORMERS", "Backend", "Use"]

TRANSFORMERS = "transformers"
ALL_BITS = tuple(range(1, 9))
Build = Callable[[PackedWeight, "Tensor | None", torch.dtype], nn.Module]


@dataclass(frozen=True)
class Use:
    """
    What a layer is used for and where.

    :param spec: of its weight
    :param kind: ``linear``; ``embedding``; ``own``, a class derived from `nn.Linear`, which cannot
        be replaced by another
    :param device: on which it computes
    :param dtype: in which it computes
    """

    spec: PackedSpec
    kind: str
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """
    :param name: as `load` takes it
    :param title: in messages
    :param build: makes a layer of a weight, a bias and the dtype to compute in; None for the layer
        that keeps the weight as it is in the file
    :param package: module that must be installed; None for none
    :param install: how to install it
    :param devices: types of devices; empty for any
    :param automatic: types of devices on which it is chosen without being named; None for any
    :param bits: of an integer
    :param zero_points: whether they may be
    :param groups: group sizes, -1 for one scale per row; empty for any
    :param dtypes: to compute in; empty for any
    :param in_multiple: of which the number of input features must be a multiple
    :param out_multiple: of which the number of output features must be a multiple
    :param kinds: of layers; see `Use`
    :param finish: is called once, with the whole model; None for nothing
    """

    name: str
    title: str
    build: Build | None
    package: str | None = None
    install: str = ""
    devices: tuple[str, ...] = ()
    automatic: tuple[str, ...] | None = None
    bits: tuple[int, ...] = ALL_BITS
    zero_points: bool = True
    groups: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    in_multiple: int = 1
    out_multiple: int = 1
    kinds: tuple[str, ...] = ("linear",)
    finish: Callable[[nn.Module], None] | None = None

    @property
    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def chosen_on(self, device: torch.device) -> bool:
        """:return: whether it is chosen there without being named"""
        return self.automatic is None or device.type in self.automatic

    def missing(self, device: torch.device) -> str | None:
        """:return: why it does not run on this machine at all, after its name; None if it does"""
        if self.devices and device.type not in self.devices:
            return f"runs on {_either(self.devices)}, and the model is on {device.type}"
        if not self.is_installed:
            return f"needs the package `{self.package}`: {self.install}"
        return None

    def refusal(self, use: Use) -> str | None:
        """:return: why it does not run a layer, after its name; None if it does"""
        spec = use.spec
        checks = (
            (use.kind in self.kinds, f"does not run {_KINDS[use.kind]}"),
            (spec.num_bits in self.bits, f"takes {_either(self.bits)} bits, not {spec.num_bits}"),
            (spec.symmetric or self.zero_points, "takes no zero points"),
            (
                not self.groups or spec.group_size in self.groups,
                f"takes {_groups(self.groups)}, not {_groups((spec.group_size,))}",
            ),
            (
                not self.dtypes or use.dtype in self.dtypes,
                f"computes in {_either(_dtypes(self.dtypes))}, not {_dtypes((use.dtype,))[0]}",
            ),
            (
                spec.in_features % self.in_multiple == 0,
                f"needs input features in multiples of {self.in_multiple}, not {spec.in_features}",
            ),
            (
                spec.out_features % self.out_multiple == 0,
                f"needs output features in multiples of {self.out_multiple}, not "
                f"{spec.out_features}",
            ),
        )
        return next((said for holds, said in checks if not holds), None)


_KINDS = {
    "linear": "linear layers",
    "embedding": "embeddings",
    "own": "linear layers of the model's own classes",
}

# In the order in which they are chosen. The last one runs everything.
BACKENDS = (
    Backend(
        name="gptqmodel",
        title="GPTQModel",
        build=gptqmodel_linear,
        package="gptqmodel",
        install="see docs/guides/loading.md",
        devices=("cuda", "xpu", "cpu"),
        automatic=("cuda", "xpu"),  # on CPUs it compiles its kernels first
        bits=(2, 3, 4, 8),
        groups=(CHANNEL, 16, 32, 64, 128, 256, 512, 1024),
        dtypes=(torch.float16, torch.bfloat16),
        in_multiple=32,
        out_multiple=32,
        finish=finish_gptqmodel,
    ),
    Backend(
        name="humming",
        title="Humming",
        build=HummingLinear,
        package="humming",
        install="pip install humming-kernels",
        devices=("cuda",),
        automatic=(),  # nobody has run it here
        bits=(2, 3, 4, 5, 6, 7, 8),
        groups=(CHANNEL, 16, 32, 64, 128, 256),
        dtypes=(torch.float16, torch.bfloat16),
        in_multiple=32,
        out_multiple=32,
    ),
    Backend(
        name="ark",
        title="auto-round's kernel",
        build=lambda weight, bias, _: ArkLinear(weight, bias),
        package="auto_round_kernel",
        install="pip install 'autoround-modifier[cpu]'",
        devices=("cpu",),
        bits=(2, 3, 4, 5, 6, 7, 8),
    ),
    Backend(
        name="torch-int4",
        title="PyTorch's 4-bit kernel",
        build=lambda weight, bias, _: Int4Linear(weight, bias),
        devices=("cpu",),
        bits=(2, 3, 4),
        groups=(32, 64, 128, 256),
        # Of the other dtypes PyTorch has plain loops, slower than unpacking
        dtypes=(torch.bfloat16,),
        out_multiple=16,
    ),
    Backend(
        name="torch",
        title="unpacking layer by layer",
        build=None,
        kinds=("linear", "embedding", "own"),
    ),
)
TORCH = BACKENDS[-1]


def _either(items: tuple[object, ...]) -> str:
    words = [str(item) for item in items]
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _groups(sizes: tuple[int, ...]) -> str:
    numbers = tuple(size for size in sizes if size != CHANNEL)
    parts = ["one scale per row"] if CHANNEL in sizes else []
    return " or ".join(parts + ([f"groups of {_either(numbers)}"] if numbers else []))


def _dtypes(dtypes: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    return tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
