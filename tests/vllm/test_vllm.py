"""vLLM loads each checkpoint unchanged and computes what Transformers computes from it.

Rows of integer weights run twice, all others in bfloat16:

- float32, through the dequantizing kernel. Both engines then evaluate the same function almost
  without rounding, so the tolerance is tight, even for a model that quantization has ruined and
  that amplifies every rounding error.
- bfloat16, as served, through vLLM's own kernel where it has one for the CPU. How far two correct
  bfloat16 computations may differ depends on the model, so Transformers' own distance between
  bfloat16 and float32 is the yardstick.
"""

from __future__ import annotations

from pathlib import Path

import dequantizing_kernel
import format_kernels
import pytest
import torch
from dequantizing_kernel import DequantizingLinearKernel
from engine import Answers, ask_engine
from kernel_choice import own_kernel
from reference import Reference, gaps
from rows import ROWS, Row

# Nats. Measured: at most 3e-4 and 2e-3 (2 bits, plain rounding: a ruined model), and 1e-5 and
# 5e-5 for the others. One flipped bit of one weight moves the mean by 1.5e-3.
FLOAT32_MEAN, FLOAT32_MAX = 1e-3, 1e-2
# Times Transformers' own distance between bfloat16 and float32. Two independent roundings of one
# function are sqrt(2) apart when each is 1 off. Measured: 0.8 to 1.2, and 0.4 to 1.5.
BFLOAT16_MEAN_FACTOR, BFLOAT16_MAX_FACTOR = 2, 3
# In a model of 2 bits, rounding to bfloat16 decides over single tokens, by up to 4 nats: others in
# each order of summation.
BFLOAT16_LEFT_OUT = 0.02

# Of the largest weight. The inputs by which the applied weights are read are quantized themselves.
QUANTIZED_ACTIVATIONS_TOLERANCE = 0.01

dequantizing_kernel.register()
format_kernels.register()

CASES = [
    pytest.param((row, dtype), id=f"{row.name}-{dtype}")
    for row in ROWS
    for dtype in (("float32", "bfloat16") if row.runs_in_float32 else ("bfloat16",))
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Row, str]:
    return request.param


@pytest.fixture(scope="module")
def reference(case: tuple[Row, str], checkpoints: Path) -> Reference:
    row, dtype = case
    return Reference.load(checkpoints / row.name, dtype)


@pytest.fixture(scope="module")
def allowed(case: tuple[Row, str], reference: Reference, checkpoints: Path) -> tuple[float, float]:
    """The mean and the maximum gap that pass, in nats, without the tokens left out."""
    row, dtype = case
    if dtype == "float32":
        return FLOAT32_MEAN, FLOAT32_MAX
    exact = Reference.load(checkpoints / row.name, "float32")
    mean, maximum = gaps(reference.logprobs, exact.logprobs, BFLOAT16_LEFT_OUT)
    return (
        row.tolerance * BFLOAT16_MEAN_FACTOR * mean,
        row.tolerance * BFLOAT16_MAX_FACTOR * maximum,
    )


@pytest.fixture(scope="module")
def answers(
    case: tuple[Row, str],
    reference: Reference,
    allowed: tuple[float, float],
    checkpoints: Path,
    table: list[tuple[str, ...]],
) -> Answers:
    """Start the engine once per case; the table gets a line whether or not it starts."""
    row, dtype = case
    own = ", ".join(own_kernels(row)) or "-"
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(format_kernels.Dequantizing, "activations", row.activations)
        # The former accepts float32 layers, and then raises: its GEMM has 16-bit types only.
        disabled = "CPUWNA16LinearKernel" if dtype == "float32" else row.broken_kernel
        environment.setenv("VLLM_DISABLED_KERNELS", disabled or "")
        try:
            answers = ask_engine(
                checkpoints / row.name / "checkpoint", dtype, reference.prompts, reference.blocks()
            )
        except Exception:
            table.append((row.name, dtype, "NO", own))
            raise
    table.append((row.name, dtype, "yes", own, *measurements(answers, reference, allowed)))
    return answers


def own_kernels(row: Row) -> list[str]:
    """:return: for each config group, the class of vLLM's own kernel, or that it has none"""
    if row.broken_kernel is not None:
        return [f"{row.broken_kernel}, broken"]
    if row.kernel is not None:
        ours = row.kernel in [kernel.__name__ for kernel in format_kernels.KERNELS]
        return ["refused" if ours else row.kernel]
    return [own_kernel(group) or "refused" for group in (row.config_groups or {}).values()]


def measurements(
    answers: Answers, reference: Reference, allowed: tuple[float, float]
) -> tuple[str, ...]:
    """:return: the cells of the table that only an engine that started can fill"""
    mean, maximum = gaps(answers.logprobs, reference.logprobs)
    same = [
        ours == theirs
        for pair in zip(answers.continuations, reference.continuations, strict=True)
        for ours, theirs in zip(*pair, strict=True)
    ]
    return (
        ", ".join(sorted(answers.kernels)) or "-",
        f"{mean:.5f} ({allowed[0]:.3f})",
        f"{maximum:.5f} ({allowed[1]:.3f})",
        f"{sum(same)}/{len(same)}",
        repr(answers.texts[0][:32]),
    )


def test_kernels(case: tuple[Row, str], answers: Answers) -> None:
    """vLLM's own kernel runs what it can, and ours the rest."""
    row, dtype = case
    if row.kernel is not None:
        assert answers.kernels == {row.kernel}
        return
    expected = set()
    for group in (row.config_groups or {}).values():
        own = own_kernel(group) if dtype == "bfloat16" else None
        expected.add(own or DequantizingLinearKernel.__name__)
    assert answers.kernels == expected


def test_weights(case: tuple[Row, str], answers: Answers, reference: Reference) -> None:
    """The weights that the engine multiplies by are Transformers', bit for bit."""
    tolerance = QUANTIZED_ACTIVATIONS_TOLERANCE if case[0].activations else 0

    def differ(weight: torch.Tensor, expected: torch.Tensor) -> bool:
        gap = (weight.float() - expected.float()).abs().max()
        return bool(gap > tolerance * expected.abs().max())

    different = [
        name
        for name, weight in answers.weights.items()
        if differ(weight, reference.fused_weight(name))
    ]
    assert len(answers.weights) == 4 * len(reference.blocks())
    assert not different


def test_prompt_logprobs(
    case: tuple[Row, str], answers: Answers, reference: Reference, allowed: tuple[float, float]
) -> None:
    left_out = BFLOAT16_LEFT_OUT if case[1] == "bfloat16" else 0
    mean, maximum = gaps(answers.logprobs, reference.logprobs, left_out)
    assert mean <= allowed[0]
    assert maximum <= allowed[1]


def test_greedy_continuation(case: tuple[Row, str], answers: Answers, reference: Reference) -> None:
    """The same tokens, up to the first near tie. In bfloat16 near ties are everywhere."""
    if case[1] == "bfloat16":
        assert all(answers.texts)
        return
    for ours, theirs, margins in zip(
        answers.continuations, reference.continuations, reference.margins, strict=True
    ):
        for token, expected, margin in zip(ours, theirs, margins, strict=True):
            if margin <= 2 * FLOAT32_MAX:
                break
            assert token == expected
