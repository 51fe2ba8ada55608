"""
Whole runs on an accelerator: every kind of format, mixtures, resuming, and the other modifiers.

    make gpu-check

What may differ between devices is counted and recorded (`record_property`), not asserted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import quantize, token_samples, weight_scheme
from runs import RECIPES, chosen_device, codes, dense, mixture, run
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama import modeling_llama
from transformers.models.qwen3_moe import modeling_qwen3_moe

from autoround_modifier import (
    AutoRoundModifier,
    AutoSchemeModifier,
    ScaleDistillationModifier,
    quantized_weights,
)
from autoround_modifier.tuning import Tuner

pytestmark = pytest.mark.gpu

ON_THE_CPU = ["W2", "FP8_DYNAMIC"]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return chosen_device()


@pytest.fixture(scope="module", autouse=True)
def cpu_codes(tmp_path_factory) -> Iterator[Callable[[], dict[str, dict[str, Tensor]]]]:
    """What `cpu_run.py` gives; it runs while the other tests do."""
    file = tmp_path_factory.mktemp("cpu") / "codes.pt"
    script = Path(__file__).parent / "cpu_run.py"
    process = subprocess.Popen([sys.executable, script, file, *ON_THE_CPU])

    def result() -> dict[str, dict[str, Tensor]]:
        assert process.wait(timeout=120) == 0
        return torch.load(file)

    yield result
    process.kill()
    process.wait()


@pytest.fixture
def attention(monkeypatch) -> dict[str, int]:
    """How often attention ran with gradients: in SDPA, and in a model's eager implementation."""
    counts = {"sdpa": 0, "eager": 0}

    def count(owner: object, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            if torch.is_grad_enabled():
                counts[kind] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(F, "scaled_dot_product_attention", "sdpa")
    for module in (modeling_llama, modeling_qwen3_moe):
        count(module, "eager_attention_forward", "eager")
    return counts


def counted(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    """:return: how many codes differ, of how many"""
    assert first.keys() == second.keys()
    differing = sum(int((values != second[name]).sum()) for name, values in first.items())
    return f"{differing} of {sum(values.numel() for values in first.values())}"


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, values in first.items() if not torch.equal(values, second[name])] == []


def assert_saved(model, written, device: torch.device, folder: Path) -> None:
    """What was tuned, on the device, is what the saved files hold; nothing else is quantized."""
    names = {module: name for name, module in model.named_modules()}
    tuned = {names[module]: weight for module, (weight, _) in written.items()}
    in_memory = codes(model)
    model.save_pretrained(folder, save_compressed=True)
    saved = quantized_weights(folder)
    assert set(saved) == set(tuned) == set(in_memory)
    for name, weight in tuned.items():
        assert weight.values.device.type == device.type, name
        assert torch.equal(in_memory[name], weight.values.float().cpu()), name
        on_disk = saved[name]
        for part, tensor in weight.parts.items():
            assert torch.equal(on_disk.parts[part].float(), tensor.float().cpu()), (name, part)


@pytest.mark.parametrize("loaded_on", ["the CPU", "the accelerator"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved_is_what_was_tuned(recipe, loaded_on, device, written, attention, tmp_path):
    model = run(dense("cpu" if loaded_on == "the CPU" else device), recipe)
    assert attention["sdpa"] > 0
    assert attention["eager"] == 0
    assert len(written) == 14
    assert_saved(model, written, device, tmp_path)


@pytest.mark.parametrize(
    ("recipe", "loaded_on"), [*((name, "the CPU") for name in RECIPES), ("W2", "the accelerator")]
)
def test_saved_is_what_was_tuned_of_a_mixture(
    recipe, loaded_on, device, written, attention, tmp_path
):
    model = mixture("cpu" if loaded_on == "the CPU" else device, tmp_path / "original")
    model = run(model, recipe, engine="vllm")
    assert attention["sdpa"] > 0
    assert attention["eager"] == 0
    assert len(written) == 2 * (4 + 4 * 3)
    assert_saved(model, written, device, tmp_path / "quantized")


def test_samples_may_be_anywhere(device, record_property):
    """The integers are the same; `auto` has those of all blocks but the first on the device."""
    found = {
        choice: codes(run(dense(device, num_layers=4), "W2", offload_device=choice))
        for choice in ("cpu", "none", "auto")
    }
    for choice in ("none", "auto"):
        counts = counted(found["cpu"], found[choice])
        record_property(f"integers that differ with offload_device {choice}", counts)
        assert_same(found["cpu"], found[choice])


def test_a_run_goes_on_with_the_same_integers(device, tmp_path, monkeypatch, record_property):
    whole = codes(run(dense(device, num_layers=4), "W2"))
    again = codes(run(dense(device, num_layers=4), "W2"))
    record_property("integers that differ when a run is repeated", counted(whole, again))

    class Interrupted(BaseException):
        pass

    tune, finished = Tuner.run, []

    def interrupted_run(self, *args):
        if len(finished) == 2:
            raise Interrupted
        finished.append(1)
        return tune(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "run", interrupted_run)
        with pytest.raises(Interrupted):
            run(dense(device, num_layers=4), "W2", checkpoint_dir=str(tmp_path))
    resumed = codes(run(dense(device, num_layers=4), "W2", checkpoint_dir=str(tmp_path)))
    record_property("integers that differ when a run goes on", counted(whole, resumed))
    assert_same(whole, resumed)


def test_compiled_and_plain_runs_give_the_same_integers(device, log, record_property):
    """Without alpha and beta: the sign of a sum can differ (see test_gpu_formats.py)."""
    fields = {"enable_minmax_tuning": False}
    plain, compiled = (
        codes(run(dense(device), "W4 asymmetric", **fields, enable_torch_compile=flag))
        for flag in (False, True)
    )
    assert not any("torch.compile failed" in line for line in log)
    record_property("integers that differ in a compiled run", counted(plain, compiled))
    assert_same(plain, compiled)


def test_schemes_are_chosen_on_the_device(device, written, tmp_path):
    chooser = AutoSchemeModifier(
        avg_bits=3.5,
        options=["W2A16G32", "W4A16G32", "W8A16G32"],
        cache_dir=False,
        batch_size=4,
    )
    tuner = AutoRoundModifier(iters=4, batch_size=4, ignore=["lm_head"])
    model = quantize(dense(device), [chooser, tuner], token_samples(16, 24))
    assert chooser.choice is not None
    assert chooser.choice.avg_bits() <= 3.5
    assert {weight.weight.device.type for weight in written} == {device.type}
    assert_saved(model, written, device, tmp_path)


def test_scales_are_distilled_on_the_device(device, tmp_path):
    rounded = AutoRoundModifier(
        preset="opt_rtn", ignore=["lm_head"], config_groups={"group_0": weight_scheme(2)}
    )
    distiller = ScaleDistillationModifier(iters=20, lr=0.01)
    model = quantize(dense(device), [rounded, distiller], token_samples(32, 24))
    assert distiller.result is not None
    assert distiller.result.kept
    assert distiller.result.final_kl < distiller.result.initial_kl
    in_memory = codes(model)
    model.save_pretrained(tmp_path, save_compressed=True)
    saved = quantized_weights(tmp_path)
    for name, values in in_memory.items():
        assert torch.equal(saved[name].values.float(), values), name


@pytest.mark.parametrize("recipe", ON_THE_CPU)
def test_where_a_model_is_loaded_and_run(recipe, device, cpu_codes, record_property):
    on_device = codes(run(dense(device), recipe))
    from_cpu = codes(run(dense("cpu"), recipe))
    name = f"{recipe}: codes that differ if the model was loaded on the CPU"
    record_property(name, counted(on_device, from_cpu))
    name = f"{recipe}: codes that differ in a run on the CPU"
    record_property(name, counted(on_device, cpu_codes()[recipe]))
