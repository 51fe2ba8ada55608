"""Ready samples of token ids that cannot calibrate are refused before the first forward pass."""

from __future__ import annotations

import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, token_samples, weight_scheme
from datasets import Dataset
from llmcompressor import oneshot as host_oneshot
from torch.utils.data import DataLoader

from autoround_modifier import (
    AutoRoundModifier,
    AutoSchemeModifier,
    ScaleDistillationModifier,
    choose_schemes,
    distill,
    oneshot,
)
from autoround_modifier.calibration import check_samples
from autoround_modifier.calibration.batches import PaddedBatch
from autoround_modifier.errors import CalibrationError

IDS = [3, 4, 5, 6]

WRONG = {
    "loss mask of zeros": (
        {"input_ids": [IDS] * 4, "attention_mask": [[1] * 4] * 4, "loss_mask": [[0] * 4] * 4},
        r"loss_mask excludes every token in 4 of 4 calibration samples.*generation",
    ),
    "attention mask of zeros": (
        {"input_ids": [IDS] * 4, "attention_mask": [[0] * 4] * 4},
        "attention_mask is zero everywhere in 4 of 4 calibration samples",
    ),
    "masks that leave nothing together": (
        {"input_ids": [IDS] * 2, "attention_mask": [[1, 1, 0, 0]] * 2}
        | {"loss_mask": [[0, 0, 1, 1]] * 2},
        "loss_mask excludes every token in 2 of 2",
    ),
    "no token": ({"input_ids": [IDS, []]}, "calibration sample 2 has no token"),
    "another tokenizer": (
        {"input_ids": [IDS, [3, 128]]},
        "sample 2 has token id 128, and the model has the ids 0 to 127",
    ),
    "negative": ({"input_ids": [[-100, 3]]}, "sample 1 has token id -100"),
    "a mask of another length": (
        {"input_ids": [IDS], "attention_mask": [[1] * 3]},
        "sample 1: attention_mask has 3 entries for 4 tokens",
    ),
}


def tuned(**fields) -> AutoRoundModifier:
    return AutoRoundModifier(
        iters=1, batch_size=2, config_groups={"group_0": weight_scheme(4)}, **fields
    )


def no_forward(model):
    def refuse(*_):
        raise AssertionError("a forward pass")

    model.model.embed_tokens.register_forward_pre_hook(refuse)
    return model


@pytest.mark.parametrize("columns", WRONG)
@pytest.mark.parametrize("run", ["ours", "host", "loader"])
def test_before_the_first_forward_pass(columns, run):
    """Also when LLM-Compressor's own `oneshot` runs the modifier."""
    columns, problem = WRONG[columns]
    data, model = Dataset.from_dict(columns), no_forward(tiny_llama())
    if run == "loader":
        rows = [{name: torch.tensor(x) for name, x in row.items()} for row in data]
        data = DataLoader(rows, batch_size=1)
    start = host_oneshot if run == "host" else oneshot
    with pytest.raises(CalibrationError, match=problem):
        start(model=model, recipe=tuned(), dataset=data, processor=tiny_tokenizer())


@pytest.mark.parametrize(
    "modifier", [AutoSchemeModifier, ScaleDistillationModifier], ids=lambda x: x.__name__
)
def test_the_other_modifiers(modifier):
    columns, problem = WRONG["loss mask of zeros"]
    if modifier is AutoSchemeModifier:
        recipe = [
            modifier(options=["W8A8", "FP8_DYNAMIC"], avg_bits=8.5),
            AutoRoundModifier(iters=1),
        ]
    else:
        recipe = [AutoRoundModifier(preset="rtn", scheme="W8A8"), modifier(iters=1)]
    with pytest.raises(CalibrationError, match=problem):
        quantize(no_forward(tiny_llama()), recipe, Dataset.from_dict(columns))


def test_samples_that_distillation_alone_takes():
    rows = list(token_samples(8)["input_ids"])
    rows[-1] = [10**6, *rows[-1][1:]]
    group = {"group_0": weight_scheme(4)}
    first = AutoRoundModifier(iters=1, num_calibration_samples=4, config_groups=group)
    with pytest.raises(CalibrationError, match="1000000"):
        quantize(
            no_forward(tiny_llama()),
            [first, ScaleDistillationModifier(iters=1)],
            Dataset.from_dict({"input_ids": rows}),
        )


def test_without_a_recipe():
    columns, problem = WRONG["loss mask of zeros"]
    data = Dataset.from_dict(columns)
    with pytest.raises(CalibrationError, match=problem):
        choose_schemes(tiny_llama(), ["W8A8", "FP8_DYNAMIC"], 8.5, data)
    model = quantize(
        tiny_llama(),
        AutoRoundModifier(preset="rtn", config_groups={"group_0": weight_scheme(4)}),
    )
    with pytest.raises(CalibrationError, match=problem):
        distill(model, tiny_llama(), data)


def test_masks_of_a_loader_that_nobody_can_look_into():
    """They are found when the first block runs, and not after the last."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            mask = torch.ones(4, dtype=torch.int64)
            return {"input_ids": torch.tensor(IDS), "attention_mask": mask, "loss_mask": 0 * mask}

    model, ran = tiny_llama(), []
    model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(CalibrationError, match="loss_mask excludes every token in all 2"):
        quantize(model, tuned(), DataLoader(Rows(), batch_size=2), use_loss_mask=True)
    assert not ran


def test_some_samples_that_count_for_nothing(log):
    data = {
        "input_ids": [IDS] * 4,
        "attention_mask": [[1] * 4, [1] * 4, [1] * 4, [0] * 4],
        "loss_mask": [[0] * 4, [0] * 4, [1] * 4, [1] * 4],
    }
    check_samples(Dataset.from_dict(data))
    assert log == [
        "WARNING attention_mask is zero everywhere in 1 of 4 calibration samples and loss_mask "
        "excludes every token in 2 of 4 calibration samples; they count for nothing\n",
    ]


def test_ids_of_placeholders_beside_images():
    check_samples([{"input_ids": [[-200, 3]], "pixel_values": torch.zeros(1, 3)}], 128)
    with pytest.raises(CalibrationError, match="token id -200"):
        check_samples([{"input_ids": [[-200, 3]]}], 128)


@pytest.mark.parametrize(
    "data",
    [
        Dataset.from_dict({"input_ids": [[IDS]]}),  # one row of batches
        Dataset.from_dict({"pixel_values": [[0.5]]}),
        [torch.tensor(IDS)],
        iter([]),
        object(),
    ],
)
def test_what_is_not_looked_at(data):
    check_samples(data, 4)


def test_batches():
    rows = torch.tensor([IDS, IDS])
    batch = {"input_ids": rows, "attention_mask": torch.tensor([[0] * 4, [1] * 4])}
    check_samples([batch], 128)
    with pytest.raises(CalibrationError, match=r"1 of 2 .* and .* 1 of 2"):
        check_samples([batch | {"loss_mask": torch.zeros(2, 4)}], 128)


def test_a_dataset_with_a_format():
    data = Dataset.from_dict({"input_ids": [IDS] * 300}).with_format("torch")
    check_samples(data, 128)
    with pytest.raises(CalibrationError, match="sample 1 has token id 5"):
        check_samples(data, 5)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "loss_mask"])
def test_null_in_a_sample(name):
    """LLM-Compressor's sampler and collator would fail on it without a place."""
    columns = {"input_ids": [IDS] * 3, "attention_mask": [[1] * 4] * 3, "loss_mask": [[1] * 4] * 3}
    columns[name] = [*columns[name][:2], None]
    with pytest.raises(CalibrationError, match=f"calibration sample 3: `{name}` is null"):
        quantize(no_forward(tiny_llama()), tuned(), Dataset.from_dict(columns))


def test_columns_that_are_not_for_the_model(log):
    columns = {"text": ["w3"] * 4, "meta": [{"a": 1}] * 4, "labels": [0, 1, 0, 1], "id": [1] * 4}
    recipe = tuned()
    quantize(tiny_llama(), recipe, Dataset.from_dict({"input_ids": [IDS] * 4, **columns}))
    assert len(recipe.block_reports) == 2
    assert any("not for the model: text, meta, labels" in line for line in log)


def test_one_token_is_enough_to_run():
    quantize(tiny_llama(), tuned(), Dataset.from_dict({"input_ids": [[3], [4], [5], [6]]}))


def test_padded_batch():
    samples = [
        {"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "loss_mask": [0, 1, 1]},
        {"input_ids": [6], "attention_mask": [1], "loss_mask": [1]},
    ]
    batch = PaddedBatch(pad_token_id=9)(samples)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[3, 4, 5], [6, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "loss_mask": [[0, 1, 1], [1, 0, 0]],
    }
    assert PaddedBatch(1)(samples)["loss_mask"].tolist() == [[0], [1]]
    ids = [{"input_ids": sample["input_ids"]} for sample in samples]
    assert PaddedBatch()(ids)["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(PaddedBatch()(ids[:1] * 2)) == {"input_ids"}
    assert PaddedBatch.fits(samples[0])
    assert not PaddedBatch.fits(["input_ids", "pixel_values"])
    assert not PaddedBatch.fits(["pixel_values"])
