"""How functions that run over all numbers of a weight are computed, by device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from loguru import logger

__all__ = ["Compute", "compilation_pays", "compile_options", "slice_elements"]

# Numbers to compute with at once without a compiler. On a CPU, intermediate results then fit its
# cache; on an accelerator they only have to fit its memory, and each kernel launch costs time.
CPU_SLICE_ELEMENTS = 2**17
ACCELERATOR_SLICE_ELEMENTS = 2**26
# Variants of one compiled function: a few for each numeric format of a recipe. Beyond this number
# PyTorch would silently run the function uncompiled.
RECOMPILE_LIMIT = 64

# Compiling takes some ten seconds, once: about as long as computing with this many weights takes
# without a compiler.
COMPILE_FROM = 1e9
# How often the scale search computes with each weight.
SEARCH_PASSES = 30

Result = TypeVar("Result")


class Compute:
    """
    Runs elementwise functions, through `torch.compile` or in slices. The values are the same.

    :param compiled: use `torch.compile`; set to false, with one warning, if a compiler fails
    """

    def __init__(self, compiled: bool = False):
        self.compiled = compiled
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def run(
        self,
        function: Callable[..., Result],
        arguments: Callable[[int | None], Iterable[tuple[Any, ...]]],
        device: torch.device,
    ) -> list[Result]:
        """
        :param function: may update its arguments in place
        :param arguments: largest number of elements in one call -> the arguments of each call,
            which together cover the weight; given None, those of one call for all of it
        :param device: of the tensors
        :return: the result of each call
        :raises torch.OutOfMemoryError: and every other error of the function itself
        """
        if self.compiled:
            (everything,) = arguments(None)
            try:
                with torch.compiler.config.patch(  # type: ignore[attr-defined]
                    recompile_limit=RECOMPILE_LIMIT
                ):
                    return [self._compiled(function)(*everything)]
            except Exception as error:
                # A compiler fails before the function has run, so no argument has changed yet.
                if not _is_compiler_error(error):
                    raise
                self.compiled = False
                reason = str(error).strip().splitlines()
                logger.warning(
                    "torch.compile failed, so tuning continues without it and takes longer: "
                    f"{reason[0] if reason else type(error).__name__}"
                )
        return [function(*part) for part in arguments(slice_elements(device))]

    def _compiled(self, function: Callable[..., Result]) -> Callable[..., Result]:
        if function not in self._functions:
            self._functions[function] = torch.compile(
                function, fullgraph=True, options=compile_options()
            )
        return self._functions[function]


def compilation_pays(num_weights: int, iters: int | None, scale_search: bool | None) -> bool:
    """
    :param num_weights: of all layers
    :param iters: sign-gradient steps
    :return: whether there is enough to compute to make up for the time that compiling takes
    """
    passes = max(iters or 0, SEARCH_PASSES if scale_search else 0)
    return passes * num_weights >= COMPILE_FROM


def slice_elements(device: torch.device) -> int:
    """:return: how many numbers to compute with at once without a compiler"""
    return CPU_SLICE_ELEMENTS if device.type == "cpu" else ACCELERATOR_SLICE_ELEMENTS


def compile_options() -> dict[str, Any]:
    """
    :return: options of `torch.compile` by which compiled code rounds as eager code does: results
        between two operations are rounded to their dtype, and divisions are rounded to nearest
        (Triton's default division is off by up to one unit in the last place)
    """
    options: dict[str, Any] = {"emulate_precision_casts": True}
    import torch._inductor.config as inductor

    if hasattr(getattr(inductor, "eager_numerics", None), "division_rounding"):
        options["eager_numerics.division_rounding"] = True
    elif hasattr(inductor, "emulate_divison_rounding"):  # its name, misspelt, before
        options["emulate_divison_rounding"] = True
    return options


def _is_compiler_error(error: Exception) -> bool:
    """:return: whether compiling failed, rather than the function or the device"""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    inner = getattr(error, "inner_exception", None)
    if isinstance(error, torch.OutOfMemoryError) or isinstance(inner, torch.OutOfMemoryError):
        return False
    return isinstance(error, (TorchDynamoException, CppCompileError, InvalidCxxCompiler))
