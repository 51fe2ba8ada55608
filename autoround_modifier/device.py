"""How functions that run over all numbers of a weight are computed, by device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import psutil
import torch
from loguru import logger
from torch.torch_version import TorchVersion

__all__ = [
    "Compute",
    "compilation_pays",
    "compile_options",
    "compiled_rounds_as_plain",
    "device_name",
    "free_memory",
    "mark_memory",
    "peak_memory",
    "peak_since_mark",
    "reset_peak_memory",
    "slice_elements",
]

# Numbers to compute with at once without a compiler. On a CPU, intermediate results then fit its
# cache; on an accelerator they only have to fit its memory, and each kernel launch costs time.
CPU_SLICE_ELEMENTS = 2**17
ACCELERATOR_SLICE_ELEMENTS = 2**26
DYNAMO_CONFIG: dict[str, Any] = {
    # Variants of one compiled function: a few for each numeric format of a recipe. PyTorch compiles
    # no more than this number.
    "recompile_limit": 64,
    # Constants of formats stay constants. A division by a constant is a multiplication by its
    # inverse on GPUs, in plain code too; by a variable it is not, and its last bit may differ.
    "specialize_int": True,
    "specialize_float": True,
}

# Compiling takes some ten seconds, once: about as long as computing with this many weights takes
# without a compiler.
COMPILE_FROM = 1e9
# How often the scale search computes with each weight.
SEARCH_PASSES = 30

Result = TypeVar("Result")


class Compute:
    """
    Runs elementwise functions, through `torch.compile` or in slices. The values are the same.

    :param compiled: use `torch.compile`; set to false, with one warning, if compiling fails or
        compiled code would give other values
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
        :raises torch.OutOfMemoryError: and every other error of the function itself; what it has
            updated until then stays updated
        """
        failure = None
        if self.compiled and not compiled_rounds_as_plain(device):
            self.compiled = False
            logger.warning(
                f"compiled code of PyTorch {torch.__version__} rounds differently from plain code "
                "on CPUs, so torch.compile is not used and tuning takes longer; PyTorch 2.13 and "
                "later do not have this problem"
            )
        if self.compiled:
            (everything,) = arguments(None)
            try:
                return [self._run_compiled(function, everything)]
            except Exception as error:
                # Compiling ends before the function runs, so no argument has changed yet.
                failure = _compiler_failure(error)
                if failure is None:
                    raise
        # If the function itself is at fault, this raises its error, and compiling goes on.
        results = [function(*part) for part in arguments(slice_elements(device))]
        if failure is not None:
            self.compiled = False
            logger.warning(
                f"torch.compile failed, so tuning continues without it and takes longer: {failure}"
            )
        return results

    def _run_compiled(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        if function not in self._functions:
            self._functions[function] = torch.compile(
                function, fullgraph=True, options=compile_options()
            )
        import torch._dynamo.config as dynamo

        with dynamo.patch(**DYNAMO_CONFIG):
            return self._functions[function](*arguments)


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
        between two operations are rounded to their dtype, products and sums are not contracted,
        and divisions are rounded to nearest (Triton's default division is off by up to one unit in
        the last place). The pattern matcher is off: in PyTorch 2.11 and before it removes a
        conversion to bfloat16 and back, and with it the rounding of the scales
        (https://github.com/pytorch/pytorch/pull/180575)
    """
    options: dict[str, Any] = {"emulate_precision_casts": True, "pattern_matcher": False}
    import torch._inductor.config as inductor

    if hasattr(getattr(inductor, "eager_numerics", None), "division_rounding"):
        options["eager_numerics.division_rounding"] = True  # from PyTorch 2.11 on
    elif hasattr(inductor, "emulate_divison_rounding"):  # its name in 2.10, misspelt
        options["emulate_divison_rounding"] = True
    return options


def compiled_rounds_as_plain(device: torch.device) -> bool:
    """
    :return: whether compiled code can give the same values. On CPUs, Inductor drops conversions to
        a narrower dtype and back, too (https://github.com/pytorch/pytorch/pull/185847); of the
        versions tried, 2.13 is the first that does not
    """
    return device.type != "cpu" or TorchVersion(torch.__version__) >= TorchVersion("2.13")


def _compiler_failure(error: Exception) -> str | None:
    """:return: why compiling failed, in one line; None if the function or the device failed"""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, torch.OutOfMemoryError):
        return None
    kinds = (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler)
    if not isinstance(error, kinds):
        return None
    lines = str(error).strip().splitlines()
    context = [x.partition(":")[2] for x in lines if "Developer debug context:" in x]
    return ":".join(lines[:1] + context[:1]) or type(error).__name__


def device_name() -> str:
    """:return: of the accelerator, or of the CPU with the number of threads"""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return f"CPU, threads: {torch.get_num_threads()}"
    module = torch.get_device_module(accelerator)
    return str(getattr(module, "get_device_name", lambda: accelerator)())


def free_memory(device: torch.device) -> int | None:
    """
    :return: bytes that PyTorch can still allocate there, those that it has reserved and not given
        out among them; None where an accelerator does not say
    """
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    if ask is None or not _counts_memory():
        return None
    reserved = torch.accelerator.memory_reserved(device)
    return int(ask(device)[0] + reserved - torch.accelerator.memory_allocated(device))


@cache
def _counts_memory() -> bool:
    """:return: whether there is an accelerator whose memory PyTorch counts"""
    if not torch.accelerator.is_available():
        return False
    try:
        torch.accelerator.memory_allocated()
    except RuntimeError:  # a backend with an allocator of another kind
        return False
    return True


class _Peak:
    """The peak before the last mark, since `reset_peak_memory`."""

    earlier = 0


def peak_memory() -> int:
    """:return: bytes of the accelerator at the peak since `reset_peak_memory`; 0 without one"""
    return max(_Peak.earlier, peak_since_mark())


def reset_peak_memory() -> None:
    _Peak.earlier = 0
    if _counts_memory():
        torch.accelerator.reset_peak_memory_stats()


def mark_memory() -> int:
    """
    Begin to look for a peak, without a change of what `peak_memory` gives.

    :return: bytes of the accelerator that tensors hold now; 0 without one
    """
    if not _counts_memory():
        return 0
    _Peak.earlier = peak_memory()
    torch.accelerator.reset_peak_memory_stats()
    return torch.accelerator.memory_allocated()


def peak_since_mark() -> int:
    """:return: bytes of the accelerator at the peak since `mark_memory`; 0 without one"""
    return torch.accelerator.max_memory_allocated() if _counts_memory() else 0
