"""Fusion of elementwise functions into one pass over memory, where there is a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from loguru import logger

__all__ = ["SLICE_ELEMENTS", "fuse"]

# Weights to compute with at once without fusion: what is computed on the way fits the cache.
SLICE_ELEMENTS = 2**17
# Variants of one function: a few for each numeric format of a recipe. Beyond them it would not be
# compiled any more, without a word of ours.
RECOMPILE_LIMIT = 64

Result = TypeVar("Result")


def fuse(function: Callable[..., Result]) -> Callable[..., Result]:
    """
    :param function: takes tensors whose first dimension may vary from call to call, and options
    :return: the same function through `torch.compile`, from its first call on; where that fails,
        as on a machine without a C++ compiler, the function as it is, with one warning
    """
    compiled: Callable[..., Result] | None = None

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Result:
        nonlocal compiled
        if compiled is None:
            # Rounding to a narrower dtype in between is part of the result: never leave it out.
            compiled = torch.compile(function, options={"emulate_precision_casts": True})
        try:
            with torch.compiler.config.patch(  # type: ignore[attr-defined]
                recompile_limit=RECOMPILE_LIMIT
            ):
                return compiled(*args, **kwargs)
        except Exception as error:  # whatever the compiler's reason: the plain function decides
            if compiled is not function:
                logger.warning(
                    "torch.compile is not available, so tuning takes longer: "
                    f"{str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
                )
            compiled = function
            return function(*args, **kwargs)

    return call
