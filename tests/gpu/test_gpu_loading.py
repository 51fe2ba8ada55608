"""A checkpoint that stays packed on an accelerator gives the logits that it gives on the CPU."""

from __future__ import annotations

import pytest
import torch
from test_loading import IDS, SCHEMES, logits, saved, unpacked

from autoround_modifier import load
from autoround_modifier.inference.backends import BACKENDS
from autoround_modifier.inference.choice import default_device

pytestmark = pytest.mark.gpu
INSTALLED = [one.name for one in BACKENDS if one.name != "ark" and one.is_installed]
RUN = [name for name in INSTALLED if name != "torch-int4"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("backend", ["auto", *RUN])
def test_logits(name, backend):
    device = default_device()
    if backend == "gptqmodel" and name == "W5":  # which it does not take
        backend = "auto"
    exact = logits(unpacked(saved(name)))
    own = (logits(unpacked(saved(name), torch.bfloat16)).float() - exact).abs().mean()
    model = load(saved(name), backend, dtype=torch.bfloat16)
    assert model.device.type == device.type
    with torch.no_grad():
        found = model(IDS.to(device)).logits.float().cpu()
    assert (found - exact).abs().mean() < 2 * own
