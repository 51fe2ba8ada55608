"""Real architectures, with tiny random weights, through LLM-Compressor's pipeline and back."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from catalogue import CATALOGUE
from checks import Outcome, check, collate
from conftest import tiny_tokenizer, weight_scheme

from autoround_modifier import AutoRoundModifier, RecipeError, oneshot
from autoround_modifier.blocks.store import CalibrationStore


@pytest.mark.parametrize("architecture", CATALOGUE, ids=lambda one: one.name)
def test_architecture(architecture, tmp_path):
    expected = Outcome(traced=architecture.untraced, reloaded=architecture.limitation)
    assert check(architecture, tmp_path) == expected


def test_a_loss_mask_of_the_text_leaves_images_alone(tmp_path):
    """A vision tower has as many patches as it has, whatever the text's mask says."""
    (llava,) = (one for one in CATALOGUE if one.name == "LLaVA, vision tower too")
    model = llava.build(tmp_path)
    last_three = llava.samples().map(
        lambda row: {"loss_mask": [[0] * (len(row["input_ids"][0]) - 3) + [1] * 3]}
    )
    counted = {}
    original = CalibrationStore.enter

    def enter(self, block, args, kwargs, token_mask=None, *rest):
        counted[self.names[block]] = None if token_mask is None else int(token_mask.sum())
        original(self, block, args, kwargs, token_mask, *rest)

    with mock.patch.object(CalibrationStore, "enter", enter):
        oneshot(
            model=model,
            recipe=AutoRoundModifier(
                iters=2,
                batch_size=2,
                ignore=["re:.*lm_head", *llava.ignore],
                config_groups={"group_0": weight_scheme(4)},
            ),
            dataset=last_three,
            processor=tiny_tokenizer(),
            data_collator=collate,
            sequential_targets=list(llava.sequential_targets),
            use_loss_mask=True,
        )
    assert {count for name, count in counted.items() if "vision" in name} == {None}
    assert {count for name, count in counted.items() if "language" in name} == {3}


def test_shared_keys_and_values_need_the_basic_pipeline(tmp_path):
    """
    Gemma 3n's blocks fill a dict that later blocks read; the sequential pipeline of LLM-Compressor
    gives each subgraph a copy of its own.
    """
    (gemma,) = (one for one in CATALOGUE if one.name == "Gemma 3n")
    with pytest.raises(RecipeError, match="`sequential` does not pass on"):
        check(replace(gemma, pipeline="sequential"), tmp_path)
