"""Saved checkpoints to export, and what was in the model before it was saved."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from conftest import quantize, tiny_llama, tiny_tokenizer, weight_scheme
from export_readers import Integers
from transformers import PreTrainedModel

from autoround_modifier import AutoRoundModifier, quantized_weights
from autoround_modifier.exports.integer_specs import IntegerSpec


class Tuned(NamedTuple):
    """A saved checkpoint, and what was in the model, read before it was saved."""

    folder: Path
    layers: dict[str, tuple[int, Integers]]


def quantized_model(
    *schemes: tuple, tied: bool = False, layers: int = 1, iters: int | None = None
) -> PreTrainedModel:
    """
    :param schemes: bits, symmetric, group size or None, and targets if there are several
    :param iters: of tuning; None rounds to nearest, which is fast
    """
    groups = {
        f"group_{i}": weight_scheme(bits, symmetric, size, *targets)
        for i, (bits, symmetric, size, *targets) in enumerate(schemes)
    }
    how = {"preset": "rtn"} if iters is None else {"iters": iters}
    modifier = AutoRoundModifier(config_groups=groups, ignore=["lm_head"], **how)
    return quantize(tiny_llama(num_layers=layers, tied=tied), modifier)


def integers_of(model: PreTrainedModel) -> dict[str, tuple[int, Integers]]:
    """:return: layer -> bits, and unsigned integers and zero points"""
    found = {}
    for name, weight in quantized_weights(model).items():
        bits = weight.grid.num_bits
        offset = 2 ** (bits - 1)
        codes, zeros = (x.clone().long() + offset for x in (weight.values, weight.zero_point))
        found[name] = (bits, Integers(codes, weight.scale.clone(), zeros))
    return found


@functools.cache
def tuned(*schemes: tuple, tied: bool = False, layers: int = 1, iters: int | None = None) -> Tuned:
    """:param schemes: see `quantized_model`, as for the others"""
    model = quantized_model(*schemes, tied=tied, layers=layers, iters=iters)
    found = integers_of(model)
    folder = Path(tempfile.mkdtemp(prefix="exported_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Tuned(folder, found)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def spec(**fields) -> IntegerSpec:
    """Of a linear layer of 64 x 64 in W4A16 with groups of 32, but for what is given."""
    known = {"name": "model.layers.0.x", "out_features": 64, "in_features": 64, "num_bits": 4}
    return IntegerSpec(**{**known, "symmetric": True, "group_size": 32, "kind": "linear", **fields})
