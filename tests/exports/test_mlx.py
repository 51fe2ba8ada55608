"""Checkpoints of MLX on its CPU package: dequantized by MLX, and run by mlx-lm, in float32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from safetensors.numpy import load_file

ENGINE = "mlx"
PACKAGES = ("mlx", "mlx-lm")
# Norm of the differences of logits, as a part of that of the logits: the order of float32 sums
FLOAT32 = 1e-5

mx.set_default_device(mx.cpu)


@pytest.mark.cases(("mlx",))
def test_weights_and_logits(case, record):
    model, _ = load(str(case.path))
    model.set_dtype(mx.float32)  # scales too; their values stay
    reference = load_file(case.folder / "reference.safetensors")
    found = np.array(model(mx.array(reference["token_ids"])))
    difference = found - reference["logits"]
    gap = float(np.abs(difference).max())
    relative_gap = float(np.linalg.norm(difference) / np.linalg.norm(reference["logits"]))
    dense = load_file(case.folder / "dense" / "model.safetensors")
    parameters = dict(tree_flatten(model.parameters()))
    names = [name.removesuffix(".scales") for name in parameters if name.endswith(".scales")]
    record(case, "run", gap=gap, relative_gap=relative_gap, kernels=["QuantizedLinear"])
    assert names
    for name in names:
        layer = dict(model.named_modules())[name]
        weight = mx.dequantize(
            *(parameters[f"{name}.{part}"] for part in ("weight", "scales", "biases")),
            group_size=layer.group_size,
            bits=layer.bits,
        )
        assert np.array_equal(np.array(weight), dense[f"{name}.weight"]), name
    assert relative_gap <= FLOAT32
