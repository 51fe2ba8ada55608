"""Attention masks that hide nothing but the future are left out of tuning."""

from __future__ import annotations

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.causal import without_causal_masks
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.samples import BlockCall

TOKENS = 6
LOWEST = torch.finfo(torch.bfloat16).min


def causal(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    seen = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    return seen if dtype == torch.bool else torch.where(seen, 0.0, LOWEST).to(dtype)


def padded() -> torch.Tensor:
    mask = causal()
    mask[..., :2] = LOWEST
    return mask


def windowed() -> torch.Tensor:
    return torch.where(torch.ones(TOKENS, TOKENS).tril(-3).bool(), LOWEST, causal())


def calls(*masks: torch.Tensor | None) -> list[BlockCall]:
    return [BlockCall((), {"attention_mask": mask, "other": 1}) for mask in masks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool])
def test_a_causal_mask_is_left_out(dtype):
    found = without_causal_masks(calls(causal(dtype), causal(dtype)))
    assert [call.kwargs for call in found] == 2 * [{"attention_mask": None, "other": 1}]


@pytest.mark.parametrize(
    "mask",
    [
        padded(),
        windowed(),
        torch.zeros(1, 1, TOKENS, TOKENS),  # hides nothing
        0.5 * (causal(torch.float32) == 0),  # a bias, such as ALiBi's
        torch.ones(1, TOKENS, dtype=torch.long),
        None,
    ],
    ids=["padded", "windowed", "open", "biased", "of tokens", "none"],
)
def test_other_masks_stay_and_so_do_those_beside_them(mask):
    assert without_causal_masks(calls(causal(), mask)) is None


class Attention(nn.Module):
    """:param default: what it does without a mask: causal attention, or attention to all tokens"""

    def __init__(self, default: str) -> None:
        super().__init__()
        self.default = default
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None, other: int):
        y = self.linear(x).unsqueeze(1)
        is_causal = attention_mask is None and self.default == "causal"
        mask = None if attention_mask is None else attention_mask.to(y.dtype)
        y = F.scaled_dot_product_attention(y, y, y, attn_mask=mask, is_causal=is_causal)
        return x + y.squeeze(1)


@pytest.mark.parametrize(("default", "expected"), [("causal", True), ("open", False)])
def test_only_where_the_block_computes_the_same(default, expected):
    """A block may take no mask for leave to see the future."""
    block = Attention(default)
    hidden = [torch.randn(1, TOKENS, 8) for _ in range(3)]
    group = BlockGroup([block], [calls(*3 * [causal()])])
    before = group.forward(torch.cat(hidden), [0, 1, 2])
    assert group.leave_out_causal_masks(hidden) is expected
    masks = [call.kwargs["attention_mask"] for call in group.calls[0]]
    assert (masks == 3 * [None]) is expected
    assert torch.allclose(group.forward(torch.cat(hidden), [0, 1, 2]), before, atol=1e-5)


class NeedsMask(Attention):
    """As DeepSeek-V3.2's, which cuts its mask."""

    def forward(self, x, attention_mask, other):
        return super().forward(x, attention_mask[:, :1], other)


class NotFinite(Attention):
    def forward(self, x, attention_mask, other):
        y = super().forward(x, attention_mask, other)
        return y if attention_mask is not None else y * torch.nan


class InPlace(Attention):
    """Writes into its input."""

    def forward(self, x, attention_mask, other):
        x *= 2
        return super().forward(x, attention_mask, other)


class OpenForMany(Attention):
    """Another attention from so many tokens on."""

    def forward(self, x, attention_mask, other):
        self.default = "open" if x.shape[1] == TOKENS else "causal"
        return super().forward(x, attention_mask, other)


@pytest.mark.parametrize("kind", [NeedsMask, NotFinite, InPlace, OpenForMany])
def test_blocks_that_keep_their_masks(kind):
    block = kind("open")
    hidden = [torch.randn(1, TOKENS, 8) for _ in range(2)]
    masks = [causal(), causal()]
    if kind is OpenForMany:
        hidden.insert(0, torch.randn(1, 3, 8))
        masks.insert(0, causal()[..., :3, :3])
    before = [x.clone() for x in hidden]
    group = BlockGroup([block], [calls(*masks)])
    assert not group.leave_out_causal_masks(hidden)
    assert [call.kwargs["attention_mask"] is None for call in group.calls[0]] == len(masks) * [
        False
    ]
    assert all(torch.equal(x, y) for x, y in zip(hidden, before, strict=True))


def test_a_block_that_writes_into_its_input_may_do_without():
    group = BlockGroup([InPlace("causal")], [calls(causal())])
    hidden = [torch.randn(1, TOKENS, 8)]
    before = hidden[0].clone()
    assert group.leave_out_causal_masks(hidden)
    assert torch.equal(hidden[0], before)


def test_all_blocks_of_a_group_or_none():
    blocks = [Attention("causal"), Attention("open")]
    group = BlockGroup(blocks, [calls(causal()), calls(causal())])
    assert not group.leave_out_causal_masks([torch.randn(1, TOKENS, 8)])
    assert all(call[0].kwargs["attention_mask"] is not None for call in group.calls)


@pytest.mark.parametrize("padding", [0, 8])
def test_a_model_is_tuned_without_masks_where_no_sample_is_padded(padding, monkeypatch):
    masks = []
    forward = LlamaDecoderLayer.forward

    def recorded(block, hidden, *args, attention_mask=None, **kwargs):
        if torch.is_grad_enabled():
            masks.append(attention_mask)
        return forward(block, hidden, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", recorded)
    data = token_samples(8, 24)
    if padding:
        row = [0] * padding + [1] * (24 - padding)
        data = data.map(lambda x: {**x, "attention_mask": row})
    recipe = AutoRoundModifier(
        iters=3, batch_size=4, ignore=["lm_head"], config_groups={"group_0": weight_scheme(4)}
    )
    quantize(tiny_llama(num_layers=2), recipe, data)
    assert len(masks) == 2 * 3
    assert all((mask is None) == (not padding) for mask in masks)
