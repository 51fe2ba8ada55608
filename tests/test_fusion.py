"""Compiled functions fall back to plain ones, and say so once."""

from __future__ import annotations

import pytest
import torch
from autoround_modifier.formats.compilation import fuse


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_without_a_compiler_the_plain_function_runs(monkeypatch, log):
    def no_compiler(function, options):
        def fail(*args):
            raise RuntimeError("InvalidCxxCompiler: no g++\nlong traceback")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    function = fuse(double)
    assert [function(torch.tensor(value)).item() for value in (1, 2, 3)] == [2, 4, 6]
    warnings = [message for message in log if "torch.compile" in message]
    assert len(warnings) == 1
    assert "no g++" in warnings[0]


def test_errors_of_the_function_itself_are_raised(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, options: function)
    with pytest.raises(TypeError):
        fuse(double)(None)
