"""Where captured samples are kept, and what happens where memory is short."""

from __future__ import annotations

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from helpers import integers, quantized_layers, record_call
from torch import nn

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.placement import HOST, SamplePlacement
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.errors import RecipeError
from autoround_modifier.modifiers import block_quantizer
from autoround_modifier.tuning import Tuner

ACCELERATOR = torch.device("meta")  # stands for one
LAYERS = "model.layers"
SAMPLES = 1000  # bytes of those of a block
WEIGHTS = 100


def block(weights: int = WEIGHTS) -> nn.Module:
    return nn.Linear(10, weights // 10, bias=False, device=ACCELERATOR)


def placement(free: float | None, choice: str = "auto", tuning: int | None = 0) -> SamplePlacement:
    """:param tuning: bytes that tuning a block before took; None if none was tuned"""
    result = SamplePlacement(choice, free=lambda device: None if free is None else round(free))
    result.recorded(LAYERS, SAMPLES)
    if tuning is not None:
        result.tuned([block()], tuning)
    return result


@pytest.mark.parametrize(
    ("free", "tuning", "expected"),
    [
        (2 * SAMPLES, 0, ACCELERATOR),
        (2 * SAMPLES, 2 * SAMPLES, HOST),
        (SAMPLES, 0, HOST),  # a tenth stays free
        (10 * SAMPLES, None, HOST),  # what tuning takes is not known
        (None, 0, HOST),  # the device does not say
    ],
)
def test_samples_are_on_the_accelerator_while_they_fit(free, tuning, expected):
    assert placement(free, tuning=tuning).choose(block(), LAYERS, ACCELERATOR) == expected


def test_tuning_takes_more_for_larger_blocks():
    one = placement(1.5 * SAMPLES, tuning=SAMPLES // 4)
    assert one.choose(block(), LAYERS, ACCELERATOR) == ACCELERATOR
    assert one.choose(block(10 * WEIGHTS), LAYERS, ACCELERATOR) == HOST


def test_recording_takes_memory_too():
    """Blocks are recorded in eager attention, which tuning is not."""
    one = placement(2 * SAMPLES)
    one.called(SAMPLES // 2)
    assert one.choose(block(), LAYERS, ACCELERATOR) == ACCELERATOR
    one.called(SAMPLES)
    assert one.choose(block(), LAYERS, ACCELERATOR) == HOST


def test_weights_that_are_not_there_yet_count():
    on_host = nn.Linear(10, SAMPLES // 40, bias=False)  # float32: as large as the samples
    one = placement(2 * SAMPLES)
    assert one.choose(on_host, LAYERS, ACCELERATOR) == HOST
    assert one.choose(block(SAMPLES // 4), LAYERS, ACCELERATOR) == ACCELERATOR


def test_the_first_block_of_a_list_is_on_the_host():
    """Those of a vision encoder have other samples."""
    assert placement(100 * SAMPLES).choose(block(), "vision.blocks", ACCELERATOR) == HOST


def test_blocks_that_are_tuned_together_are_on_the_host():
    one = placement(100 * SAMPLES)
    one.tuned([block(), block()], 0)
    assert one.choose(block(), LAYERS, ACCELERATOR) == HOST


@pytest.mark.parametrize(("choice", "expected"), [("none", ACCELERATOR), ("cpu", HOST)])
def test_a_choice_is_followed(choice, expected):
    free = 0 if choice == "none" else 100 * SAMPLES
    assert placement(free, choice).choose(block(), LAYERS, ACCELERATOR) == expected


def test_on_a_cpu_there_is_no_choice():
    for choice in ("auto", "none", "cpu"):
        assert placement(1e12, choice).choose(block(), LAYERS, HOST) == HOST


class Asked(SamplePlacement):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__("auto")
        self.calls: list[tuple] = []

    def choose(self, block, blocks, device):
        self.calls.append((block, blocks))
        return HOST

    def recorded(self, blocks, samples):
        self.calls.append((blocks, samples))


def test_the_store_asks_once_for_each_block_and_says_what_it_holds():
    """All samples of a block are in one place, also where memory becomes short meanwhile."""
    blocks = {nn.Identity(): f"layers.{index}" for index in range(2)}
    one = Asked()
    store = CalibrationStore(blocks, None, one, sort=False)
    for block in blocks:
        for x in torch.randn(3, 2, 5, 8):
            record_call(store, block, (x,), {"mask": torch.ones(1, 5)}, x + 1)
        store.pop(block)
    held = 3 * 2 * 2 * 5 * 8 * 4 + 5 * 4  # inputs and outputs; one mask, which all share
    assert one.calls == [x for block in blocks for x in [(block, "layers"), ("layers", held)]]


# ------------------------------------------------------------------ memory that runs out


@pytest.fixture
def samples_seem_to_be_elsewhere(monkeypatch):
    """The host has another name, so that samples on it count as those of an accelerator."""
    monkeypatch.setattr(block_quantizer, "HOST", torch.device("cpu", 0))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


def run(choice: str = "auto") -> tuple[dict[str, torch.Tensor], list[int]]:
    """:return: the integers, and the steps that were reported"""
    model = tiny_llama(num_layers=2)
    recipe = AutoRoundModifier(
        iters=30,
        batch_size=4,
        offload_device=choice,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(2)},
    )
    quantize(model, recipe, token_samples(16, 24))
    return {name: integers(x) for name, x in quantized_layers(model).items()}, [
        report.best_iteration for report in recipe.block_reports
    ]


@pytest.fixture
def memory_is_short_once(monkeypatch) -> list[str]:
    """The first block runs out of memory in its third step."""
    tune, happened = Tuner.run, []

    def short(tuner: Tuner, on_iteration):
        steps = 0

        def step() -> None:
            nonlocal steps
            steps += 1
            if steps == 3 and not happened:
                happened.append("out of memory")
                raise torch.OutOfMemoryError("no memory")
            on_iteration()

        return tune(tuner, step)

    monkeypatch.setattr(Tuner, "run", short)
    return happened


def test_a_block_whose_samples_do_not_fit_is_tuned_again_from_the_host(
    monkeypatch, samples_seem_to_be_elsewhere, memory_is_short_once, log
):
    moved = []
    monkeypatch.setattr(Tuner, "move_samples", lambda tuner, device: moved.append(device))
    again = run()
    assert moved == [torch.device("cpu", 0)]
    assert memory_is_short_once == ["out of memory"]
    (message,) = [x for x in log if "the memory of the accelerator does not hold" in x]
    assert message.startswith("WARNING model.layers.0: ")
    assert "offload_device: cpu" in message
    monkeypatch.undo()
    plain = run()
    assert again[1] == plain[1] != [0, 0]
    assert again[0].keys() == plain[0].keys()
    assert all(torch.equal(x, plain[0][name]) for name, x in again[0].items())


def test_where_the_place_was_chosen_the_error_stands(
    samples_seem_to_be_elsewhere, memory_is_short_once
):
    with pytest.raises(torch.OutOfMemoryError):
        run("none")


def test_without_an_accelerator_the_error_stands(memory_is_short_once):
    with pytest.raises(torch.OutOfMemoryError):
        run()


def test_another_place_is_refused():
    with pytest.raises((RecipeError, ValueError), match="'auto', 'none' or 'cpu'"):
        AutoRoundModifier(offload_device="disk", scheme="W4A16")
