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
# Largest difference of logits, whose standard deviation is 3.2: the order of float32 sums.
# Measured: 0.0001.
FLOAT32 = 5e-4

mx.set_default_device(mx.cpu)


@pytest.mark.cases(("mlx",))
def test_weights_and_logits(case, record):
    model, _ = load(str(case.path))
    model.set_dtype(mx.float32)  # scales too; their values stay
    reference = load_file(case.folder / "reference.safetensors")
    found = np.array(model(mx.array(reference["token_ids"])))
    gap = float(np.abs(found - reference["logits"]).max())
    dense = load_file(case.folder / "dense" / "model.safetensors")
    parameters = dict(tree_flatten(model.parameters()))
    names = [name.removesuffix(".scales") for name in parameters if name.endswith(".scales")]
    record(case, "run", gap=gap, kernels=["QuantizedLinear"])
    assert names
    for name in names:
        layer = dict(model.named_modules())[name]
        weight = mx.dequantize(
            *(parameters[f"{name}.{part}"] for part in ("weight", "scales", "biases")),
            group_size=layer.group_size,
            bits=layer.bits,
        )
        assert np.array_equal(np.array(weight), dense[f"{name}.weight"]), name
    assert gap <= FLOAT32
