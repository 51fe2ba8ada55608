"""The table of vLLM's kernels against what vLLM itself chooses, on platforms that are not there."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path

import pytest
from kernel_choice import choose
from rows import group
from vllm.model_executor.kernels.linear.mixed_precision import humming
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

# The package without what it imports at its start: LLM-Compressor is not installed here.
PACKAGE = types.ModuleType("autoround_modifier")
PACKAGE.__path__ = [str(Path(__file__).parents[2] / "autoround_modifier")]
sys.modules.setdefault("autoround_modifier", PACKAGE)

from autoround_modifier.engines.hardware import DEVICES  # noqa: E402
from autoround_modifier.engines.layers import AlikeLayers  # noqa: E402
from autoround_modifier.engines.rows import ASKED  # noqa: E402
from autoround_modifier.engines.scheme import Scheme  # noqa: E402
from autoround_modifier.engines.support import find_kernel  # noqa: E402
from autoround_modifier.engines.vllm_table import VLLM  # noqa: E402

GPUS = ["sm75", "sm80", "sm89", "sm90", "sm100", "sm120"]
GROUPS = [None, 16, 32, 64, 128, 256]
# Output and input features: in all multiples, not in Machete's, in none
SHAPES = [(4096, 4096), (192, 768), (36, 768)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A CUDA platform of the capability that the name says, with Humming installed."""
    capability = DEVICES[request.param].capability
    answers = {
        "is_cuda": True,
        "is_cuda_alike": True,
        "is_cpu": False,
        "get_device_capability": DeviceCapability(*divmod(capability, 10)),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(current_platform, name, lambda *_, answer=answer: answer, raising=False)
    monkeypatch.setattr(
        current_platform,
        "is_device_capability",
        lambda asked, *_: asked in (capability, divmod(capability, 10)),
        raising=False,
    )
    monkeypatch.setattr(current_platform, "_enum", PlatformEnum.CUDA, raising=False)
    monkeypatch.setattr(humming, "has_humming", lambda: True)
    return request.param


def chosen(config_group: dict, shape: tuple[int, int]) -> str:
    """:return: class name of the kernel that vLLM chooses, without its ending"""
    return choose(config_group, (shape[1], shape[0])).removesuffix("LinearKernel")


def of_table(config_group: dict, shape: tuple[int, int], device: str):
    scheme = Scheme.of_group(config_group, "pack-quantized")
    assert scheme is not None
    return find_kernel(VLLM, AlikeLayers(scheme, False, shape), DEVICES[device], dtype="bfloat16")


@pytest.mark.parametrize("gpu", GPUS, indirect=True)
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_the_table_has_what_vllm_chooses_on_gpus(gpu: str, num_bits: int) -> None:
    for symmetric, size, shape in itertools.product((True, False), GROUPS, SHAPES):
        config_group = group(num_bits, symmetric, size)
        choice = of_table(config_group, shape, gpu)
        assert choice.known == ASKED
        assert choice.kernel == chosen(config_group, shape), (symmetric, size, shape)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_the_table_has_what_vllm_chooses_on_cpus(num_bits: int) -> None:
    for symmetric, size, shape in itertools.product((True, False), GROUPS, SHAPES):
        config_group = group(num_bits, symmetric, size)
        choice = of_table(config_group, shape, "cpu")
        if choice.kernel is not None:
            assert choice.kernel == chosen(config_group, shape)
            continue
        with pytest.raises(ValueError, match="Failed to find a kernel"):
            chosen(config_group, shape)
        if num_bits == 4:
            assert "needs output features in multiples of 32" in choice.note
