"""Scales trained end to end: gradients, what stays fixed, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import OffloadCache
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from datasets import Dataset
from helpers import integers, quantized_layers, saved_integers, saved_tensors
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import nn
from torch.nn import functional as F

from autoround_modifier import AutoRoundModifier, ScaleDistillationModifier, oneshot
from autoround_modifier.blocks.model_pass import model_logits
from autoround_modifier.distillation import TeacherBatch, distiller, residency, teacher
from autoround_modifier.distillation.scales import StreamedScale, TrainedScale
from autoround_modifier.errors import CalibrationError, NonFiniteError, RecipeError, SchemeError
from autoround_modifier.evaluation import compare
from autoround_modifier.modifiers import scale_distillation

UNSEEN = torch.tensor(token_samples(8, 12, seed=99)["input_ids"])


def rounded(num_bits: int = 2, symmetric: bool = True, group_size: int | None = 32, **fields):
    """Quantizes fast."""
    return AutoRoundModifier(
        preset="opt_rtn",
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(num_bits, symmetric, group_size)},
        **fields,
    )


def tuned(**fields):
    return AutoRoundModifier(
        preset="light",
        iters=2,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(2, True, 32)},
        **fields,
    )


def rtn_of_the_host():
    group = weight_scheme(2, True, 32)
    return QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": group})


def distilled(*modifiers, data=None, **fields):
    """:return: the model and the modifier that distilled it"""
    fields = {"iters": 20, "lr": 0.02, **fields}
    last = ScaleDistillationModifier(**fields)
    model = quantize(tiny_llama(), [*(modifiers or [rounded()]), last], data)
    return model, last


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight_scale.clone() for name, layer in quantized_layers(model).items()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# ------------------------------------------------------------------ divergence


def batch_of(log_probs: torch.Tensor, kept: int, mask=None) -> TeacherBatch:
    """:param log_probs: (positions, vocabulary)"""
    top = log_probs.topk(kept)
    return TeacherBatch({}, top.indices.int(), top.values, mask)


@pytest.mark.parametrize("positions_at_once", [1, 2, 100])
def test_divergence_of_all_tokens_is_exact(positions_at_once, monkeypatch):
    monkeypatch.setattr(teacher, "CPU_LOGITS", 5 * positions_at_once)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 3, 5, generator=generator).log_softmax(-1)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    exact = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="sum")
    (gradient,) = torch.autograd.grad(exact, logits)
    value = teacher.divergence(logits, batch_of(wanted.flatten(0, 1), 5), scale=3.0)
    torch.testing.assert_close(value, exact.detach())
    torch.testing.assert_close(logits.grad, 3 * gradient)


def test_tokens_that_are_not_kept_are_one_outcome():
    wanted = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    got = torch.tensor([[[0.4, 0.3, 0.1, 0.2]]]).log()
    merged = 0.5 * torch.tensor(0.5 / 0.4).log() + 0.2 * torch.tensor(0.2 / 0.3).log()
    value = teacher.divergence(got, batch_of(wanted, 2))
    torch.testing.assert_close(value, merged, rtol=1e-5, atol=1e-6)
    exact = F.kl_div(got[0], wanted, log_target=True, reduction="sum")
    assert value < exact


def test_gradient_of_tokens_that_are_not_kept():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(6, 9, generator=generator).log_softmax(-1)
    logits = torch.randn(1, 6, 9, generator=generator, requires_grad=True)
    expected = batch_of(wanted, 4)
    kept = expected.log_probs
    student = logits[0].log_softmax(-1).gather(-1, expected.tokens.long())
    rest, student_rest = (1 - kept.exp().sum(-1)), (1 - student.exp().sum(-1))
    value = (kept.exp() * (kept - student)).sum() + (rest * (rest / student_rest).log()).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(teacher.divergence(logits, expected, scale=2.0), value.detach())
    torch.testing.assert_close(logits.grad, 2 * gradient)


@pytest.mark.parametrize("head_selects", [True, False])
def test_a_share_of_the_positions(head_selects, monkeypatch):
    model = tiny_llama()
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 0] = mask[1, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    (whole,) = teacher.record_teacher(model, [batch])
    if not head_selects:  # of a model that does not know `logits_to_keep`
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda **inputs: forward(**inputs))
    (part,) = teacher.record_teacher(model, [batch], position_fraction=0.5)
    assert part.recorded.tolist() == [1, 3, 5, 7]
    assert part.mask.tolist() == [[True] * 4, [False, True, True, True]]
    chosen = torch.zeros_like(mask).index_fill_(1, part.recorded, 1).bool()[mask.bool()]
    torch.testing.assert_close(part.log_probs, whole.log_probs[chosen])
    logits = model_logits(model, part.inputs, part.recorded)
    assert logits.shape[:2] == (2, 4)
    torch.testing.assert_close(teacher.divergence(logits, part), torch.zeros(()), atol=1e-3, rtol=0)


def test_positions_without_a_token_do_not_count():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(1, 4, 5, generator=generator).log_softmax(-1)
    logits = torch.randn(1, 4, 5, generator=generator)
    mask = torch.tensor([[True, True, False, True]])
    value = teacher.divergence(logits, batch_of(wanted[mask], 5, mask))
    exact = F.kl_div(logits[mask].log_softmax(-1), wanted[mask], log_target=True, reduction="sum")
    torch.testing.assert_close(value, exact)


def test_padding_and_loss_masks_are_honoured():
    model = tiny_llama()
    ids = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]),
        "loss_mask": torch.tensor([[1, 1, 1, 0, 1, 1]]),
    }
    (recorded,) = teacher.record_teacher(model, [batch])
    assert recorded.mask.tolist() == [[False, True, True, False, True, True]]
    assert recorded.num_positions == 4
    assert set(recorded.inputs) == {"input_ids", "attention_mask"}
    with pytest.raises(CalibrationError, match="no token that counts"):
        teacher.record_teacher(model, [batch | {"loss_mask": torch.zeros(1, 6)}])


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_gradient_of_the_scale(symmetric, group_size):
    model = quantize(tiny_llama(torch.float32), rounded(3, symmetric, group_size))
    layer = model.model.layers[0].mlp.down_proj
    trained = TrainedScale(layer, layer.quantization_scheme.weights)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    with trained.trained():
        layer(x).square().sum().backward()

    values = integers(layer).float() - layer.weight_zero_point.float().repeat_interleave(
        layer.in_features // layer.weight_scale.shape[1], dim=1
    )
    factor = trained.factor.detach().clone().requires_grad_()
    scale = (factor * trained.unit).repeat_interleave(layer.in_features // factor.shape[1], dim=1)
    y = x.detach().clone().requires_grad_()
    F.linear(y, values * scale).square().sum().backward()
    torch.testing.assert_close(trained.factor.grad, factor.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_a_scale_keeps_its_sign():
    model = quantize(tiny_llama(), rounded(2))
    layer = model.model.layers[0].mlp.down_proj
    before, first = integers(layer), layer.weight_scale.clone()
    trained = TrainedScale(layer, layer.quantization_scheme.weights)
    with torch.no_grad():
        trained.factor.mul_(-1)
    trained.apply()
    assert trained.finish() == 0
    assert torch.equal(layer.weight_scale.sign(), first.sign())
    assert torch.equal(integers(layer), before)


# ------------------------------------------------------------------ what changes, what does not


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_integers_and_zero_points_stay(num_bits, symmetric, tmp_path):
    plain = quantized_layers(quantize(tiny_llama(), rounded(num_bits, symmetric)))
    model, modifier = distilled(rounded(num_bits, symmetric), lr=0.01 / 2**num_bits)
    assert modifier.result.kept
    assert modifier.result.moved == 0
    values = {}
    for name, layer in quantized_layers(model).items():
        values[name] = integers(layer)
        assert torch.equal(layer.weight_zero_point, plain[name].weight_zero_point)
        assert not torch.equal(layer.weight_scale, plain[name].weight_scale), name
        assert torch.equal(values[name], integers(plain[name]))
    model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    for name, expected in values.items():
        assert torch.equal(saved_integers(tensors, name, num_bits), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_that_bfloat16_cannot_carry_are_counted(symmetric):
    model = quantize(tiny_llama(), rounded(8, symmetric))
    layer = model.model.layers[0].mlp.up_proj
    before = integers(layer)
    trained = TrainedScale(layer, layer.quantization_scheme.weights)
    with torch.no_grad():
        trained.factor.mul_(1.01)
    trained.apply()
    moved = trained.finish()
    difference = (integers(layer).int() - before).abs()
    assert 0 < moved < 0.02 * before.numel()
    assert (difference.max(), difference.sum()) == (1, moved)


def test_moved_integers_are_reported(monkeypatch):
    """Whatever training gains: the count is what differs from the model before it."""
    judgements = iter([2.0, 1.0])  # held-out samples, before and after

    def divergence(logits, batch, scale=None):
        if scale is None:
            return torch.tensor(next(judgements) * batch.num_positions)
        return teacher.divergence(logits, batch, scale)

    monkeypatch.setattr(distiller, "divergence", divergence)
    data = token_samples(2)
    plain = quantized_layers(quantize(tiny_llama(), rounded(8), data))
    model, modifier = distilled(rounded(8), data=data, iters=2, lr=0.01, holdout_fraction=0.5)
    assert modifier.result.kept
    differing = sum(
        int((integers(layer) != integers(plain[name])).sum())
        for name, layer in quantized_layers(model).items()
    )
    assert modifier.result.moved == differing > 0


def test_comes_closer_on_text_it_never_saw():
    data = token_samples(64)
    before = compare(tiny_llama(), quantize(tiny_llama(), rounded(), data), UNSEEN).kl
    model, modifier = distilled(data=data, iters=60)
    assert compare(tiny_llama(), model, UNSEEN).kl < 0.9 * before
    assert modifier.result.final_kl < 0.9 * modifier.result.initial_kl


@pytest.mark.parametrize("first", ["gptq", "rounding"])
def test_follows_other_modifiers(first):
    groups = {"group_0": weight_scheme(3)}
    other = {
        "gptq": GPTQModifier(ignore=["lm_head"], config_groups=groups),
        "rounding": QuantizationModifier(ignore=["lm_head"], config_groups=groups),
    }[first]
    model, modifier = distilled(other, data=token_samples(64), lr=0.005)
    assert 0.1 < modifier.result.initial_kl < 1
    assert modifier.result.final_kl < modifier.result.initial_kl
    assert all(layer.weight_scale.isfinite().all() for layer in quantized_layers(model).values())


def test_norms_are_trained_unless_told_otherwise():
    original = tiny_llama().model.norm.weight
    model, _ = distilled()
    assert not torch.equal(model.model.norm.weight, original)
    model, modifier = distilled(norm_lr=0, data=token_samples(64))
    assert modifier.result.kept
    assert torch.equal(model.model.norm.weight, original)


def test_offloaded_norms_are_trained(tmp_path):
    model = tiny_llama()
    for layer in model.model.layers:
        offload_module(layer.input_layernorm, "cpu", "disk", offload_dir=str(tmp_path))
    before = [layer.input_layernorm.weight.clone() for layer in model.model.layers]
    last = ScaleDistillationModifier(iters=8, lr=0.02)
    quantize(model, [rounded(), last], token_samples(64))
    assert last.result.kept
    for layer, was in zip(model.model.layers, before, strict=True):
        assert not torch.equal(layer.input_layernorm.weight, was)


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(residency, "free_memory", lambda device: 0)


def offloaded(folder: Path) -> nn.Module:
    """:return: a model whose weights are on the disk, and brought into memory when they are used"""
    model = tiny_llama()
    for module in model.modules():
        if module._parameters:
            offload_module(module, "cpu", "disk", offload_dir=str(folder))
    return model


@pytest.mark.parametrize(
    ("num_bits", "lr", "kept"), [(2, 0.01, True), (2, 50.0, False), (8, 0.01, False)]
)
def test_weights_that_do_not_fit_are_brought_for_each_use(
    num_bits, lr, kept, no_memory, tmp_path, monkeypatch, log
):
    """The result is that of the weights in memory; what stays there are gains and biases."""
    fields = {"iters": 6, "lr": lr, "batch_size": 2}
    here, last = tiny_llama(), ScaleDistillationModifier(**fields)
    quantize(here, [rounded(num_bits), last], token_samples(16))
    assert last.result.kept == kept
    onloaded = []
    step = torch.optim.Adam.step

    def spy(optimizer, *args, **kwargs):
        onloaded.append([x.ndim for x in OffloadCache.keep_onloaded_values.values()])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    there, streamed = offloaded(tmp_path), ScaleDistillationModifier(**fields)
    quantize(there, [rounded(num_bits), streamed], token_samples(16))
    assert any("each weight is brought there when it is used" in message for message in log)
    assert len(onloaded) == 6
    assert all(set(dims) == {1} for dims in onloaded)
    assert OffloadCache.keep_onloaded_values == {}
    assert replace(streamed.result, seconds=0) == replace(last.result, seconds=0)
    expected, found = state(here), state(there)
    assert expected.keys() == found.keys()
    assert [name for name, x in expected.items() if not torch.equal(x, found[name])] == []


def test_a_streamed_scale_restores_integers_that_moved():
    model = quantize(tiny_llama(), rounded(8))
    layer = model.model.layers[0].mlp.up_proj
    before, weight = integers(layer), layer.weight.clone()
    trained = StreamedScale(layer, layer.quantization_scheme.weights)
    with torch.no_grad():
        trained.factor.mul_(1.01)
    trained.apply()
    assert torch.equal(layer.weight, weight)  # not before the end
    assert trained.finish() > 0
    assert torch.equal(trained.weight(), layer.weight)
    assert not torch.equal(integers(layer), before)
    trained.reset()
    trained.finish()
    assert torch.equal(integers(layer), before)
    assert torch.equal(layer.weight_scale, trained.initial)


def test_what_does_not_help_is_dropped(log):
    plain = state(quantize(tiny_llama(), rounded()))
    model, modifier = distilled(lr=50.0)
    assert not modifier.result.kept
    assert modifier.result.final_kl > modifier.result.initial_kl
    for name, value in state(model).items():
        assert torch.equal(value, plain[name]), name
    assert any("not better, so dropped" in message for message in log)


def test_a_failure_leaves_the_quantized_model(monkeypatch):
    plain = state(quantize(tiny_llama(), rounded()))
    seen = []
    model = tiny_llama()

    def fail(logits, batch, scale=None):
        seen.append(scale)
        if len(seen) > 8:
            raise RuntimeError("out of memory")
        return teacher.divergence(logits, batch, scale)

    monkeypatch.setattr(distiller, "divergence", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize(model, [rounded(), ScaleDistillationModifier(iters=20, lr=0.02)])
    assert seen[-1] is not None  # it was in training
    for name, value in state(model).items():
        assert torch.equal(value, plain[name]), name
    assert all(block.forward.__name__ != "forward_again" for block in model.model.layers)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_trained_after_a_failure(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    trained = []
    monkeypatch.setattr(
        "autoround_modifier.modifiers.scale_distillation.train_scales",
        lambda *args: trained.append(args),
    )
    monkeypatch.setattr("autoround_modifier.modifiers.layer_quantizer.write_back", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantize(tiny_llama(), [rounded(), ScaleDistillationModifier()])
    reset_session()  # finalizes what was initialized
    assert not trained


def test_says_on_what_it_was_judged(log):
    _, modifier = distilled(holdout_fraction=0)
    assert modifier.result.judged_on == "training samples"
    assert any("KL divergence on training samples" in message for message in log)


def test_checkpointing_and_batches_do_not_change_the_result():
    with_it, _ = distilled(gradient_checkpointing=True)
    without, _ = distilled(gradient_checkpointing=False)
    for name, scale in scales(with_it).items():
        assert torch.equal(scale, scales(without)[name]), name


def test_a_seed_fixes_the_result():
    first, again, other = (scales(distilled(seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(scale, again[name]) for name, scale in first.items())
    assert any(not torch.equal(scale, other[name]) for name, scale in first.items())


@pytest.mark.parametrize(
    ("first", "iters", "passed", "taught"),
    [
        (tuned(num_calibration_samples=6), 20, 6, 16),
        (tuned(num_calibration_samples=6), 2, 6, 11),  # two steps of four, and those set aside
        (rounded(), 20, 16, 16),  # the scale search uses all samples
        (rtn_of_the_host(), 20, 16, 16),
    ],
)
def test_distillation_has_samples_of_its_own(first, iters, passed, taught, monkeypatch):
    found = {}
    record, initialize = scale_distillation.record_teacher, ScaleDistillationModifier.on_initialize

    def recorded(model, batches, *more):
        found["taught"] = len(batches := list(batches))
        return record(model, batches, *more)

    def initialized(self, state, **kwargs):
        found["passed"] = len(state.data.calib)
        return initialize(self, state, **kwargs)

    monkeypatch.setattr(scale_distillation, "record_teacher", recorded)
    monkeypatch.setattr(ScaleDistillationModifier, "on_initialize", initialized)
    first = first.model_copy(deep=True)
    _, modifier = distilled(first, iters=iters)
    assert found == {"passed": passed, "taught": taught}
    assert modifier.result.judged_on == "held-out samples"


def test_samples_of_different_lengths():
    rows = token_samples(16)
    rows = [
        {"input_ids": ids[: 6 + 3 * (index % 3)]} for index, ids in enumerate(rows["input_ids"])
    ]
    data = Dataset.from_list(
        [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    )
    _, modifier = distilled(data=data)
    assert modifier.result.kept


def test_batches_of_one_shape_are_stacked():
    model = tiny_llama()
    ids = torch.randint(3, 100, (5, 8), generator=torch.Generator().manual_seed(0))
    short, patches = {"input_ids": ids[:1, :4]}, {"input_ids": ids[:1], "patches": ids[:3]}
    batches = teacher.record_teacher(model, [{"input_ids": row[None]} for row in ids[:3]])
    batches += teacher.record_teacher(model, [short])
    odd = TeacherBatch(patches, batches[0].tokens, batches[0].log_probs, None)
    stacked = list(distiller._stacked([*batches, odd]))
    assert [len(batch.inputs["input_ids"]) for batch in stacked] == [3, 1, 1]
    whole = teacher.divergence(model(**stacked[0].inputs).logits, stacked[0])
    torch.testing.assert_close(whole, torch.zeros(()), atol=1e-3, rtol=0)


# ------------------------------------------------------------------ refused


def test_refuses_what_cannot_work():
    with pytest.raises(CalibrationError, match="needs calibration data"):
        oneshot(model=tiny_llama(), recipe=ScaleDistillationModifier())
    for recipe in ([], [rounded()]):
        with pytest.raises(RecipeError, match="no linear layer with a quantization scheme"):
            quantize(tiny_llama(), [ScaleDistillationModifier(iters=1), *recipe])
    with pytest.raises(RecipeError, match=r"quantized already.*q_proj.*in one recipe"):
        quantize(quantize(tiny_llama(), rounded()), ScaleDistillationModifier(iters=1))
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    for quantizer, place in (
        (QuantizationModifier(scheme="W8A8", ignore=["lm_head"]), "self_attn.q_proj"),
        (rounded(kv_cache_scheme=cache), "its key-value cache"),
    ):
        with pytest.raises(
            SchemeError,
            match=f"or cache. These layers have another scheme: model.layers.0..*{place}",
        ):
            quantize(tiny_llama(), [quantizer, ScaleDistillationModifier(iters=1)])


def test_refuses_a_broken_original():
    model = tiny_llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="original's output"):
        quantize(model, [rounded(), ScaleDistillationModifier(iters=1)])
