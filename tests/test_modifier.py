"""The modifier in LLM-Compressor's lifecycle: fields, determinism, padding, chain, blocks."""

from __future__ import annotations

import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from datasets import Dataset
from helpers import integers, quantized_layers
from llmcompressor import oneshot as host_oneshot
from torch.utils.data import DataLoader

from autoround_modifier import PRESETS, AutoRoundModifier
from autoround_modifier.evaluation import compare
from autoround_modifier.host.attention import sdpa_computes_the_same


def modifier(num_bits: int = 2, symmetric: bool = True, **fields) -> AutoRoundModifier:
    fields = {
        "iters": 8,
        "batch_size": 4,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": weight_scheme(num_bits, symmetric)},
        **fields,
    }
    return AutoRoundModifier(**fields)


def all_integers(model) -> dict[str, torch.Tensor]:
    return {name: integers(module) for name, module in quantized_layers(model).items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert torch.equal(values, second[name]), name


def differ(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(values, second[name]) for name, values in first.items())


def test_presets():
    published = {"best": (1000, 512), "default": (200, 128), "light": (50, 128)}
    for name, (iters, samples) in published.items():
        preset = AutoRoundModifier(preset=name)
        assert (preset.iters, preset.num_calibration_samples) == (iters, samples)
        assert preset.requires_calibration_data
        assert preset.scale_search
        assert preset.loss == "balanced"
        assert preset.lr is None
    assert AutoRoundModifier(preset="light", iters=7, lr=0.1).iters == 7
    assert not AutoRoundModifier(preset="rtn").requires_calibration_data
    opt_rtn = AutoRoundModifier(preset="opt_rtn")
    assert opt_rtn.iters == 0
    assert opt_rtn.scale_search
    assert set(PRESETS) == {"best", "default", "light", "opt_rtn", "rtn"}


@pytest.mark.parametrize("symmetric", [True, False])
def test_tuning_beats_rounding(symmetric):
    tokens = torch.tensor(token_samples(8, 12, seed=99)["input_ids"])
    data = token_samples(64)
    kl = {}
    for preset in ("rtn", "opt_rtn", "light"):
        fields = {"iters": None, "preset": preset, "batch_size": 8}
        model = quantize(tiny_llama(), modifier(3, symmetric, **fields), data)
        kl[preset] = compare(tiny_llama(), model, tokens).kl
    assert kl["light"] < kl["opt_rtn"] < kl["rtn"]


def test_the_host_oneshot_uses_this_modifier(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
quant_stage:
  quant_modifiers:
    AutoRoundModifier:
      iters: 2
      batch_size: 4
      ignore: [lm_head]
      scheme: W4A16
      targets: ["re:.*mlp.down_proj$"]
"""
    )
    model = host_oneshot(
        model=tiny_llama(),
        recipe=str(recipe),
        dataset=token_samples(),
        processor=tiny_tokenizer(),
    )
    layers = quantized_layers(model)
    assert list(layers) == [f"model.layers.{index}.mlp.down_proj" for index in (0, 1)]


def test_same_seed_same_integers_and_other_seed_others():
    runs = [all_integers(quantize(tiny_llama(), modifier(seed=seed))) for seed in (1, 1, 2)]
    assert_same(runs[0], runs[1])
    assert differ(runs[0], runs[2])


def test_the_order_of_the_data_does_not_matter():
    data = token_samples()
    expected = all_integers(quantize(tiny_llama(), modifier(), data))
    reordered = data.select(list(reversed(range(len(data)))))
    assert_same(expected, all_integers(quantize(tiny_llama(), modifier(), reordered)))
    stacked = quantize(tiny_llama(), modifier(), data, batch_size=4)
    assert_same(expected, all_integers(stacked))


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_contributes_nothing(left):
    lengths = [12 - index % 5 for index in range(16)]
    ids = torch.tensor(token_samples()["input_ids"])
    mask = torch.stack([torch.arange(12) < length for length in lengths])
    if left:
        mask = mask.flip(1)

    def run(padding: int, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        data = Dataset.from_dict(
            {
                "input_ids": ids.where(mask, padding).tolist(),
                "attention_mask": mask.long().tolist(),
            }
        )
        return all_integers(quantize(tiny_llama(), modifier(), data))

    assert_same(run(3, mask), run(77, mask))
    # The test can tell: without the mask the padding does change the result.
    everything = torch.ones_like(mask)
    assert differ(run(3, mask), run(3, everything))


@pytest.mark.parametrize("fields", [{}, {"scale_search": True}], ids=["tuning", "search"])
def test_loss_mask_is_honoured(fields):
    """The model is causal: tokens that are masked at the end cannot change anything before them."""
    ids = torch.tensor(token_samples()["input_ids"])
    results = []
    for tail in (5, 99):
        ids[:, 8:] = tail
        columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for counts in (0, 1):
            mask = torch.ones_like(ids)
            mask[:, 8:] = counts
            rows = {name: value.tolist() for name, value in columns.items()}
            data = Dataset.from_dict({**rows, "loss_mask": mask.tolist()})
            model = quantize(tiny_llama(), modifier(**fields), data, use_loss_mask=True)
            results.append(all_integers(model))
    masked, unmasked, masked_again, unmasked_again = results
    assert_same(masked, masked_again)
    assert differ(unmasked, unmasked_again)
    assert differ(masked, unmasked)


def test_padding_by_the_host():
    lengths = [12 - index % 5 for index in range(16)]
    rows = [row[:length] for row, length in zip(token_samples()["input_ids"], lengths, strict=True)]
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    recipe = modifier()
    quantize(tiny_llama(), recipe, data, batch_size=4, data_collator="padding")
    one_by_one = modifier()
    quantize(tiny_llama(), one_by_one, data)
    # Other shapes, so other rounding in bfloat16; the same function up to that.
    for padded, plain in zip(recipe.block_reports, one_by_one.block_reports, strict=True):
        assert padded.initial_loss == pytest.approx(plain.initial_loss, rel=0.02)


def test_samples_of_different_lengths():
    ids = token_samples()["input_ids"]
    rows = [row[: 12 - index % 4] for index, row in enumerate(ids)]
    data = Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    recipe = modifier(iters=30)
    quantize(tiny_llama(), recipe, data)
    # Two blocks, tuned on 14 samples of 9 to 12 tokens and judged on 2.
    first, second = recipe.block_reports
    assert first.best_loss < 0.95 * first.initial_loss
    assert second.best_loss < second.initial_loss
    assert min(first.best_iteration, second.best_iteration) > 0


def test_two_blocks_per_group():
    recipe = modifier(iters=30)
    quantize(tiny_llama(num_layers=4), recipe, sequential_targets_per_subgraph=2)
    names = [report.name for report in recipe.block_reports]
    assert names == ["model.layers.0, model.layers.1", "model.layers.2, model.layers.3"]
    assert all(report.best_loss < report.initial_loss for report in recipe.block_reports)


def test_the_basic_pipeline_tunes_block_by_block():
    expected = all_integers(quantize(tiny_llama(), modifier()))
    recipe = modifier()
    model = quantize(tiny_llama(), recipe, pipeline="basic")
    assert [report.name for report in recipe.block_reports] == ["model.layers.0", "model.layers.1"]
    assert_same(expected, all_integers(model))


def test_each_block_is_tuned_on_the_quantized_chain():
    chained, unchained = modifier(), modifier(enable_quanted_input=False)
    first = all_integers(quantize(tiny_llama(), chained))
    second = all_integers(quantize(tiny_llama(), unchained))
    one = "model.layers.0.mlp.down_proj"
    assert torch.equal(first[one], second[one])  # the first block has no blocks before it
    assert differ(first, second)
    # Quantized inputs carry the error of the blocks before: the initial loss shows it.
    assert chained.block_reports[1].initial_loss > unchained.block_reports[1].initial_loss


def test_a_block_without_targets_keeps_the_chain():
    recipe = modifier(ignore=["lm_head", "re:.*layers.1.*"])
    model = quantize(tiny_llama(num_layers=3), recipe)
    assert [report.name for report in recipe.block_reports] == ["model.layers.0", "model.layers.2"]
    assert not any(".1." in name for name in quantized_layers(model))
    unchained = modifier(ignore=["lm_head", "re:.*layers.1.*"], enable_quanted_input=False)
    quantize(tiny_llama(num_layers=3), unchained)
    assert recipe.block_reports[1].initial_loss != unchained.block_reports[1].initial_loss


def test_groups_with_different_bits():
    groups = {
        "attention": weight_scheme(4, targets=("re:.*self_attn.*_proj$",)),
        "mlp": weight_scheme(2, False, targets=("re:.*mlp.*_proj$",)),
    }
    model = quantize(tiny_llama(), modifier(config_groups=groups))
    for name, module in quantized_layers(model).items():
        args = module.quantization_scheme.weights
        expected = (4, True) if "self_attn" in name else (2, False)
        assert (args.num_bits, args.symmetric) == expected
        values = integers(module)
        assert values.min() >= -(2 ** (args.num_bits - 1))
        assert values.max() <= 2 ** (args.num_bits - 1) - 1
        assert bool(module.weight_zero_point.any()) == (not args.symmetric)


@pytest.mark.parametrize("preset", ["rtn", "opt_rtn"])
def test_no_iterations(preset):
    model = quantize(tiny_llama(), modifier(preset=preset, iters=0))
    assert len(quantized_layers(model)) == 14
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


def test_rtn_needs_no_data():
    model = host_oneshot(model=tiny_llama(), recipe=modifier(preset="rtn", iters=0))
    assert len(quantized_layers(model)) == 14


def test_iters_0_is_rounding_to_nearest():
    model = quantize(tiny_llama(), modifier(4, preset="default", iters=0))
    for name, module in quantized_layers(model).items():
        original = tiny_llama().get_submodule(name).weight.float().unflatten(-1, (-1, 32))
        expected = (original / module.weight_scale.float().unsqueeze(-1)).round().clamp(-8, 7)
        assert torch.equal(integers(module).float(), expected.flatten(1))


def test_one_sample_is_enough():
    recipe = modifier(iters=30)
    quantize(tiny_llama(), recipe, token_samples(1))
    # The only sample is tuned on and judged on.
    assert len(recipe.block_reports) == 2
    for report in recipe.block_reports:
        assert report.best_iteration > 0
        assert report.best_loss < 0.1 * report.initial_loss


def test_soft_capped_attention_is_not_tuned_in_sdpa():
    model = tiny_llama()
    assert sdpa_computes_the_same(model)
    model.config.attn_logit_softcapping = 50.0
    assert not sdpa_computes_the_same(model)


def test_layers_left_out_are_named(log):
    groups = {"group_0": weight_scheme(targets=("re:.*mlp.*_proj$",))}
    quantize(tiny_llama(), modifier(config_groups=groups))
    assert any("8 linear layers inside of blocks are neither" in line for line in log)


def test_hooks_are_gone_after_a_run():
    model = quantize(tiny_llama(), modifier(scale_search=True))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_a_data_loader_is_taken():
    loader = DataLoader(token_samples().with_format("torch"), batch_size=2)
    assert len(quantized_layers(quantize(tiny_llama(), modifier(), loader))) == 14


def test_parameters_are_as_trainable_as_before():
    model = tiny_llama()
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    quantize(model, modifier())
    assert not model.model.layers[0].input_layernorm.weight.requires_grad
    assert model.model.layers[1].input_layernorm.weight.requires_grad


def test_hooks_on_layers_stay_in_force():
    """Online rotations are plain hooks on the linear layers; tuning must go through them."""
    model = tiny_llama()
    calls = []
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    quantize(model, modifier())
    assert sum(calls) == 8  # one batch in each of 8 iterations


def test_recipe_reloads_and_reproduces(tmp_path):
    model = quantize(tiny_llama(), modifier(symmetric=False, seed=5))
    expected = all_integers(model)
    model.save_pretrained(tmp_path, save_compressed=True)
    recipe = tmp_path / "recipe.yaml"
    assert "!!python" not in recipe.read_text()
    again = quantize(tiny_llama(), str(recipe))
    assert_same(expected, all_integers(again))


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_compilation_do_not_show_in_the_integers(dtype, set_threads):
    """The tolerance is zero: of 2-bit integers after 20 steps, none differs."""
    results = []
    for threads, compiled in ((1, False), (2, False), (2, True)):
        set_threads(threads)
        recipe = modifier(iters=20, enable_torch_compile=compiled)
        results.append(all_integers(quantize(tiny_llama(dtype), recipe)))
    for other in results[1:]:
        assert_same(results[0], other)
