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

# Its tensors have no content; here it stands for an accelerator.
ACCELERATOR = torch.device("meta")
SAMPLES = 10
WEIGHTS = 100


def block() -> nn.Module:
    return nn.Linear(WEIGHTS // 10, 10, bias=False)


def hidden() -> torch.Tensor:
    return torch.empty(2, 5, 8, device=ACCELERATOR)


NEEDED = SAMPLES * 2 * 5 * 8 * 4  # inputs and outputs, float32


def placement(free: float, choice: str = "auto", taken: int | None = 0) -> SamplePlacement:
    """:param taken: by tuning a block before; None if none was tuned"""
    result = SamplePlacement(choice, SAMPLES, free=lambda device: round(free))
    if taken is not None:
        result.tuned([block()], taken)
    return result


@pytest.mark.parametrize(
    ("free", "taken", "expected"),
    [
        (2 * NEEDED, 0, ACCELERATOR),
        (2 * NEEDED, 2 * NEEDED, HOST),
        (NEEDED, 0, HOST),  # a tenth stays free
        (2 * NEEDED, None, HOST),  # what tuning takes is not known
    ],
)
def test_samples_are_on_the_accelerator_while_they_fit(free, taken, expected):
    assert placement(free, taken=taken).choose(block(), hidden()) == expected


def test_tuning_takes_more_for_larger_blocks():
    one = placement(1.5 * NEEDED, taken=NEEDED // 4)
    assert one.choose(block(), hidden()) == ACCELERATOR
    one.popped(block())
    large = nn.Linear(WEIGHTS, 10, bias=False)
    assert one.choose(large, hidden()) == HOST


def test_other_arguments_count():
    mask = torch.empty(2, 1, 5, 1000, device=ACCELERATOR)
    assert placement(2 * NEEDED).choose(block(), hidden(), [mask]) == HOST


def test_blocks_that_are_recorded_together_share_the_memory():
    """The first call of each comes before any sample takes memory."""
    one, blocks = placement(2.5 * NEEDED), [block() for _ in range(3)]
    assert [one.choose(x, hidden()) for x in blocks] == [ACCELERATOR, ACCELERATOR, HOST]
    one.popped(blocks[0])
    assert one.choose(blocks[2], hidden()) == ACCELERATOR


@pytest.mark.parametrize(("choice", "expected"), [("none", ACCELERATOR), ("cpu", HOST)])
def test_a_choice_is_followed(choice, expected):
    free = 0 if choice == "none" else 100 * NEEDED
    assert placement(free, choice).choose(block(), hidden()) == expected


def test_on_a_cpu_there_is_no_choice():
    for choice in ("auto", "none", "cpu"):
        assert placement(1e12, choice).choose(block(), torch.empty(2, 5, 8)) == HOST


def test_an_unknown_number_of_samples_is_on_the_host():
    one = SamplePlacement("auto", None, free=lambda device: 10**12)
    one.tuned([block()], 0)
    assert one.choose(block(), hidden()) == HOST


def test_the_store_asks_once_for_each_block():
    """All samples of a block are in one place, also where memory becomes short meanwhile."""

    class Asked(SamplePlacement):
        def __init__(self) -> None:
            super().__init__("auto", SAMPLES)
            self.calls: list[tuple] = []

        def choose(self, block, hidden, others=()):
            self.calls.append((block, hidden.shape, [x.shape for x in others]))
            return HOST

        def popped(self, block):
            self.calls.append((block, "popped"))

    blocks = {nn.Identity(): f"layers.{index}" for index in range(2)}
    one = Asked()
    store = CalibrationStore(blocks, SAMPLES, one, sort=False)
    for block in blocks:
        for x in torch.randn(3, 2, 5, 8):
            record_call(store, block, (x,), {"mask": torch.ones(2, 5)}, x + 1)
        store.pop(block)
    assert one.calls == [
        call for block in blocks for call in [(block, (2, 5, 8), [(2, 5)]), (block, "popped")]
    ]


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
    again = run()
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
