"""Functions over all numbers of a weight: compiled, or in slices, with the same results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import tuned_weight
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache

from autoround_modifier import device
from autoround_modifier.activations.functional import fake_quantize_activation
from autoround_modifier.device import Compute, compile_options, slice_elements
from autoround_modifier.formats import IntegerGrid, TunedWeight
from autoround_modifier.host.schemes import QuantizationArgs, preset_name_to_scheme, weight_spec
from autoround_modifier.search import search_range

CPU = torch.device("cpu")
INT4 = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)


def failing_to_compile(error: Exception, calls: list | None = None):
    """:return: in place of `torch.compile`: raises when the compiled function is called first"""

    def torch_compile(function, **options):
        def compiled(*args):
            if calls is not None:
                calls.append(function)
            raise error

        return compiled

    return torch_compile


def warnings_in(log: list[str]) -> list[str]:
    return [message for message in log if message.startswith("WARNING")]


# --------------------------------------------------------------------- a compiler that fails


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many weights each evaluation of integers had at once."""
    found = []
    original = IntegerGrid.quantize

    def spy(self, weight, *state):
        found.append(weight.numel())
        return original(self, weight, *state)

    monkeypatch.setattr(IntegerGrid, "quantize", spy)
    return found


def tuned(compute: Compute, weight: torch.Tensor) -> TunedWeight:
    """:return: a weight after a search and three steps"""
    spec = weight_spec(INT4)
    found = search_range(weight, spec, compute=compute)
    state = TunedWeight(weight, spec, found, compute=compute)
    state.make_trainable()
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        state.dequantize()
        gradient = torch.randn(weight.shape, generator=generator)
        state.descend(gradient, torch.tensor(0.3), torch.tensor(0.02))
    return state


@pytest.mark.parametrize(
    "error",
    [
        InvalidCxxCompiler("no g++\nlong traceback"),
        InductorError(RuntimeError("fp8e4nv not supported"), None),
        FailOnRecompileLimitHit("Hard failure due to fullgraph=True"),
    ],
    ids=["no compiler", "backend", "recompile limit"],
)
def test_what_cannot_be_compiled_runs_in_slices(error, sizes, monkeypatch, log):
    weight = torch.randn(520, 512).bfloat16()  # a little more than two slices
    expected = tuned(Compute(), weight)
    assert max(sizes) <= device.CPU_SLICE_ELEMENTS < weight.numel()
    sizes.clear()
    attempts: list = []
    monkeypatch.setattr(torch, "compile", failing_to_compile(error, attempts))
    compute = Compute(compiled=True)
    found = tuned(compute, weight)
    assert max(sizes) <= device.CPU_SLICE_ELEMENTS
    assert len(attempts) == 1
    assert not compute.compiled
    assert torch.equal(found.rounding, expected.rounding)
    for ours, theirs in zip(found.clipping, expected.clipping, strict=True):
        assert torch.equal(ours, theirs)
    for name, part in expected.quantized().parts.items():
        assert torch.equal(found.quantized().parts[name], part)
    (warning,) = warnings_in(log)
    assert str(error).splitlines()[0] in warning
    assert "long traceback" not in warning


def test_a_compiler_may_fail_at_a_later_function(sizes, monkeypatch):
    def torch_compile(function, **options):
        def compiled(*args):
            if function.__name__ == "_descend":
                raise InvalidCxxCompiler("no g++")
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", torch_compile)
    state = tuned_weight(torch.randn(520, 512), INT4, compiled=True)
    state.make_trainable()
    state.dequantize()
    state.descend(torch.ones(520, 512), torch.tensor(0.5), torch.tensor(0.5))
    assert state.rounding.unique().tolist() == [-0.5]
    state.dequantize()
    slices = [256 * 512, 256 * 512, 8 * 512]
    assert sizes == [520 * 512, *slices, *slices]


def test_a_missing_compiler_is_recognised(log):
    compute = Compute(compiled=True)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1

    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert compute.run(double, lambda size: [(torch.ones(3),)], CPU)[0].tolist() == [3, 3, 3]
    assert not compute.compiled
    (warning,) = warnings_in(log)
    assert "compiler" in warning.lower()


# --------------------------------------------------------------------- errors of the function


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("device-side assert")]
)
def test_errors_of_compiled_code_are_raised(error, monkeypatch, log):
    """The function updates its arguments: run again, it would update them twice."""

    def torch_compile(function, **options):
        def compiled(*args):
            function(*args)
            raise error

        return compiled

    monkeypatch.setattr(torch, "compile", torch_compile)
    state = tuned_weight(torch.randn(8, 32), INT4, compiled=True)
    state.make_trainable()
    with pytest.raises(type(error), match=str(error)):
        state.descend(torch.ones(8, 32), torch.tensor(0.5), torch.tensor(0.0))
    assert state.rounding.unique().tolist() == [-0.5]
    assert state.compute.compiled
    assert warnings_in(log) == []


def test_no_memory_while_compiling_is_no_failure_of_the_compiler(monkeypatch):
    error = InductorError(torch.OutOfMemoryError("CUDA out of memory"), None)
    monkeypatch.setattr(torch, "compile", failing_to_compile(error))
    compute = Compute(compiled=True)
    with pytest.raises(InductorError, match="out of memory"):
        compute.run(torch.neg, lambda size: [(torch.ones(3),)], CPU)
    assert compute.compiled


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.ndim != 2:
        raise ValueError("two dimensions")
    return x @ y


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [((3, 4), RuntimeError, "cannot be multiplied"), ((4,), ValueError, "two dimensions")],
)
def test_errors_found_while_compiling_are_the_function_s_own(shape, error, message, log):
    compute = Compute(compiled=True)
    arguments = torch.ones(shape), torch.ones(3, 4)
    with pytest.raises(error, match=message) as raised:
        compute.run(product, lambda size: [arguments], CPU)
    assert raised.type is error
    assert compute.compiled
    assert warnings_in(log) == []


# --------------------------------------------------------------------- options, slices


def test_compiled_code_rounds_as_eager_code_does(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: given.append(options) or f)
    Compute(compiled=True).run(torch.neg, lambda size: [(torch.ones(3),)], CPU)
    (options,) = given
    assert options["fullgraph"]
    assert options["options"] == compile_options()
    assert compile_options()["emulate_precision_casts"] is True
    rounding = [name for name in compile_options() if name.endswith("rounding")]
    assert len(rounding) == 1
    assert compile_options()[rounding[0]] is True


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            SimpleNamespace(eager_numerics=SimpleNamespace(division_rounding=False)),
            "eager_numerics.division_rounding",
        ),
        (SimpleNamespace(emulate_divison_rounding=False), "emulate_divison_rounding"),
    ],
    ids=["2.13", "2.10"],
)
def test_the_name_of_the_division_changed(config, expected, monkeypatch):
    monkeypatch.setattr(torch._inductor, "config", config)
    options = {"emulate_precision_casts": True, "pattern_matcher": False, expected: True}
    assert compile_options() == options


def test_slices_fit_a_processor_s_cache_and_an_accelerator_s_memory():
    assert slice_elements(CPU) == 2**17
    for name in ("cuda", "xpu", "mps"):
        assert slice_elements(torch.device(name)) == 2**26


def test_an_accelerator_computes_with_whole_weights():
    weight = torch.empty(8192, 8192, device="meta")  # 2^26
    spec = weight_spec(QuantizationArgs(num_bits=4, strategy="group", group_size=128))
    zero = torch.empty(8192 * 64, device="meta")
    state = TunedWeight(weight, spec, (zero, zero))
    (whole,) = state._slices(slice_elements(weight.device))
    assert whole[0].numel() == 2**26


# --------------------------------------------------------------------- all functions, compiled


# On an accelerator where there is one: its compiler is another one.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def compute() -> Compute:
    """One for all tests, as for all layers of a run."""
    return Compute(compiled=True)


def weights_of(preset: str) -> QuantizationArgs:
    return preset_name_to_scheme(preset, ["Linear"]).weights


BLOCKS = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[16, 32])
INT2 = QuantizationArgs(num_bits=2, strategy="group", group_size=32)
# arguments, whether alpha and beta are tuned, whether steps differ by channel
WEIGHTS = {
    "integers, clipping, channels": (INT4, True, True),
    "symmetric integers": (INT2, False, False),
    "FP8": (weights_of("FP8_DYNAMIC"), False, False),
    "FP8 blocks, clipping, channels": (BLOCKS, True, True),
    "MXFP4, channels": (weights_of("MXFP4A16"), False, True),
    "NVFP4, clipping, channels": (weights_of("NVFP4A16"), True, True),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, compute):
    args, clipping, channels = WEIGHTS[name]
    weight, gradient = torch.randn(2, 40, 96).bfloat16().to(DEVICE)
    global_scale = None
    if args.strategy == "tensor_group":
        global_scale = torch.tensor([500.0], device=DEVICE)
    importance = torch.rand(96).to(DEVICE) if channels else None
    plain, compiled = (
        TunedWeight(weight, weight_spec(args), None, global_scale, importance, one)
        for one in (Compute(), compute)
    )
    for state in (plain, compiled):
        state.make_trainable(clipping)
        for _ in range(2):
            rounding_lr, clipping_lr = torch.tensor([0.3, 0.02], device=DEVICE)
            state.descend(gradient, rounding_lr, clipping_lr)
    assert compute.compiled
    assert torch.equal(plain.rounding, compiled.rounding)
    assert len(compiled.clipping) == (2 if clipping else 0)
    for ours, theirs in zip(plain.clipping, compiled.clipping, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(plain.dequantize(), compiled.dequantize())
    assert torch.equal(compiled.dequantize(), compiled.quantized().dequantize())


def test_rounding_to_nearest(compute):
    weight = torch.randn(40, 96).bfloat16().to(DEVICE)
    plain, compiled = (
        TunedWeight(weight, weight_spec(INT4), compute=one) for one in (Compute(), compute)
    )
    assert torch.equal(plain.dequantize(), compiled.dequantize())
    assert compute.compiled


@pytest.mark.parametrize("symmetric", [True, False])
def test_search(symmetric, compute):
    weight, importance = torch.randn(40, 96).bfloat16().to(DEVICE), torch.rand(96).to(DEVICE)
    spec = weight_spec(INT4.model_copy(update={"symmetric": symmetric}))
    plain = search_range(weight, spec, importance)
    compiled = search_range(weight, spec, importance, compute=compute)
    assert compute.compiled
    for ours, theirs in zip(plain, compiled, strict=True):
        assert torch.equal(ours, theirs)


def inputs_of(preset: str) -> QuantizationArgs:
    return preset_name_to_scheme(preset, ["Linear"]).input_activations


ACTIVATIONS = {
    "INT8 of each token": inputs_of("W8A8"),
    "FP8 of each token": inputs_of("FP8_DYNAMIC"),
    "static FP8": inputs_of("FP8"),
    "static INT8": QuantizationArgs(num_bits=8, symmetric=False, strategy="tensor"),
    "NVFP4": inputs_of("NVFP4"),
    "MXFP4": inputs_of("MXFP4"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, compute):
    args = ACTIVATIONS[name]
    x = torch.randn(2, 5, 64).bfloat16().to(DEVICE)
    scale = zero_point = global_scale = None
    if not args.dynamic:
        scale = torch.tensor([0.013], device=DEVICE).bfloat16()
        zero_point = torch.tensor([0], dtype=torch.int8, device=DEVICE)
    if args.strategy == "tensor_group":
        global_scale = torch.tensor([700.0], device=DEVICE)
    arguments = (x, scale, zero_point, global_scale, args)
    ((compiled, within),) = compute.run(fake_quantize_activation, lambda size: [arguments], DEVICE)
    assert compute.compiled
    plain, plainly_within = fake_quantize_activation(*arguments)
    assert torch.equal(compiled, plain)
    assert (within is None) == (plainly_within is None) == bool(args.dynamic)
    assert within is None or torch.equal(within, plainly_within)
