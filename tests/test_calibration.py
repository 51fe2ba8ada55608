"""Calibration: how calls are cut into samples and stacked again, masks, text."""

from __future__ import annotations

import pytest
import torch
from helpers import record_call

from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.samples import (
    BlockCall,
    call_token_mask,
    content_key,
    fingerprint,
    split_call,
    stackable,
    token_mask,
)
from autoround_modifier.blocks.store import CalibrationStore, module_list, split_by_module_list


def test_split_and_stack_are_inverse():
    hidden = torch.randn(3, 5, 8)
    mask = torch.randn(3, 1, 5, 5)
    cos, sin = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    position = torch.arange(5)
    kwargs = {
        "attention_mask": mask,
        "position_embeddings": (cos, sin),
        "cache_position": position,
        "use_cache": False,
        "past_key_values": None,
    }
    samples = split_call((hidden,), kwargs)
    assert len(samples) == 3
    for row, (one, call) in enumerate(samples):
        assert torch.equal(one, hidden[row : row + 1])
        assert torch.equal(call.kwargs["attention_mask"], mask[row : row + 1])
        assert call.kwargs["cache_position"] is position

    args, again = BlockCall.stack([call for _, call in samples], hidden)
    assert torch.equal(args[0], hidden)
    assert torch.equal(again["attention_mask"], mask)
    assert torch.equal(again["position_embeddings"][0], cos.expand(3, -1, -1))
    assert torch.equal(again["cache_position"], position)
    assert again["use_cache"] is False
    assert again["past_key_values"] is None


def test_hidden_states_by_name():
    hidden = torch.randn(2, 5, 8)
    samples = split_call((), {"hidden_states": hidden, "flag": True})
    args, kwargs = BlockCall.stack([call for _, call in samples], hidden)
    assert args == ()
    assert torch.equal(kwargs["hidden_states"], hidden)
    assert kwargs["flag"] is True
    ((one, call),) = split_call((), {"hidden_state": hidden[:1], "flag": True})
    assert torch.equal(BlockCall.stack([call], one)[1]["hidden_state"], hidden[:1])
    with pytest.raises(ValueError, match="hidden_states"):
        split_call((), {"x": hidden})


def test_samples_of_other_lengths_do_not_stack():
    short, long = torch.randn(1, 4, 8), torch.randn(1, 5, 8)
    call = BlockCall((), {"flag": True})
    assert call.signature(short) != call.signature(long)
    assert call.signature(short) == BlockCall((), {"flag": True}).signature(short.clone())
    assert call.signature(short) != BlockCall((), {"flag": False}).signature(short)


@pytest.mark.parametrize("kind", ["additive", "bool", "two-dimensional", "with a bias"])
@pytest.mark.parametrize(
    "real", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], ids=["right padding", "left padding"]
)
def test_token_mask(kind, real):
    counts = torch.tensor([real], dtype=torch.bool)
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & counts[:, None]
    mask = {
        "bool": causal[:, None],
        "additive": torch.zeros(1, 1, 5, 5).masked_fill(~causal[:, None], torch.finfo().min),
        "two-dimensional": counts.long(),
        "with a bias": torch.randn(1, 4, 5, 5).masked_fill(~causal[:, None], torch.finfo().min),
    }[kind]
    assert torch.equal(token_mask(mask, 5), counts)


def test_token_mask_without_padding():
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    sliding = causal & torch.ones(5, 5, dtype=torch.bool).triu(-1)
    assert token_mask(causal, 5) is None
    assert token_mask(sliding, 5) is None
    assert token_mask(None, 5) is None


def test_content_key_ignores_padding():
    hidden = torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, True, False, False]])
    other = hidden.clone()
    other[0, 3:] = 7.0
    assert content_key(hidden, mask) == content_key(other, mask)
    assert content_key(hidden, None) != content_key(other, None)


def test_fingerprint_is_of_the_content():
    hidden = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    assert fingerprint(hidden) == fingerprint(hidden.clone())
    assert fingerprint(hidden) != fingerprint(hidden + 1)


class Masked(torch.nn.Module):
    def forward(self, hidden, attention_mask=None):
        return hidden


def test_call_token_mask_by_position_and_by_name():
    hidden, padding = torch.randn(1, 3, 2), torch.tensor([[1, 1, 0]])
    expected = torch.tensor([[True, True, False]])
    assert torch.equal(call_token_mask(Masked(), (hidden, padding), {}, None), expected)
    by_name = {"hidden_states": hidden, "attention_mask": padding}
    assert torch.equal(call_token_mask(Masked(), (), by_name, None), expected)
    assert call_token_mask(Masked(), (hidden,), {}, None) is None


def test_call_token_mask_with_a_loss_mask():
    hidden, padding = torch.randn(1, 3, 2), torch.tensor([[1, 1, 0]])
    loss_mask = torch.tensor([[0, 1, 1, 1]])  # may be longer than the batch, which is truncated
    both = call_token_mask(Masked(), (hidden, padding), {}, loss_mask)
    assert both.tolist() == [[False, True, False]]
    assert call_token_mask(Masked(), (hidden,), {}, loss_mask).tolist() == [[False, True, True]]


def test_arguments_that_differ_are_not_stacked():
    hidden = torch.randn(1, 4, 8)
    positions = [torch.arange(12).view(3, 4), torch.arange(12).flip(0).view(3, 4)]
    same, other = (BlockCall((), {"positions": value}) for value in positions)
    assert same.signature(hidden) != other.signature(hidden)
    again = BlockCall((), {"positions": positions[0].clone()})
    assert same.signature(hidden) == again.signature(hidden)


def test_a_number_among_the_arguments():
    hidden = torch.randn(1, 4, 8)
    calls = [BlockCall((), {"layer_scale": torch.tensor(value)}) for value in (0.5, 0.5, 0.7)]
    signatures = [call.signature(hidden) for call in calls]
    assert signatures[0] == signatures[1] != signatures[2]


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 5, 8)], ids=["patches", "streams"])
def test_a_call_without_batch_dimension_is_one_sample(shape):
    hidden, lengths = torch.randn(shape), torch.tensor([0, 2, 5])
    ((one, call),) = split_call((hidden,), {"cu_seqlens": lengths})
    assert one.shape == (1, hidden[..., 0].numel(), 8)
    args, kwargs = BlockCall.stack([call], one)
    assert torch.equal(args[0], hidden)
    assert torch.equal(kwargs["cu_seqlens"], lengths)
    assert kwargs["cu_seqlens"] is not lengths  # the block may write into it
    assert call.signature(one) is None


def test_a_sample_that_stays_alone_may_appear_twice():
    assert list(stackable([4, 7, 4], lambda index: None)) == [[4], [7], [4]]
    assert list(stackable([4, 7, 4], lambda index: (index,))) == [[4, 4], [7]]


@pytest.mark.parametrize("batch", [2, 3])
def test_positions_for_time_height_and_width(batch):
    hidden, positions = torch.randn(batch, 5, 8), torch.randn(3, batch, 5)
    samples = split_call((hidden,), {"position_ids": positions})
    for row, (_, call) in enumerate(samples):
        assert torch.equal(call.kwargs["position_ids"], positions[:, row : row + 1])
    _, kwargs = BlockCall.stack([call for _, call in samples], hidden)
    assert torch.equal(kwargs["position_ids"], positions)


def test_a_tensor_with_no_dimension_for_samples_stays_alone():
    tiles = torch.randn(2, 5, 8)
    ((hidden, call),) = split_call((torch.randn(1, 5, 8),), {"cross_attention_states": tiles})
    assert call.signature(hidden) is None


def test_towers():
    names = [
        "visual.blocks.0",
        "model.layers.1",
        "visual.blocks.10",
        "model.layers.1.mlp",
        "head.a",
    ]
    assert [module_list(name) for name in names] == [
        "visual.blocks",
        "model.layers",
        "visual.blocks",
        "model.layers",
        "head",
    ]
    blocks = {torch.nn.Identity(): name for name in names[:3]}
    first, second, third = blocks
    assert split_by_module_list(blocks, blocks) == [[first, third], [second]]


def test_each_tower_has_its_own_samples():
    blocks = {torch.nn.Identity(): name for name in ("visual.blocks.0", "layers.0", "layers.1")}
    vision, first, second = blocks
    capture = CalibrationStore(blocks, num_samples=3)
    texts = torch.randn(4, 1, 5, 8)
    patches = torch.randn(7, 8)
    record_call(capture, vision, (patches,), {}, patches)
    for text in texts:
        record_call(capture, first, (text,), {}, text)
        record_call(capture, second, (text,), {}, (text,))
    assert capture.recorded() == [vision, first, second]
    assert [one.shape for one in capture.pop(vision).inputs] == [(1, 7, 8)]
    one, two = capture.pop(first), capture.pop(second)
    assert len(one.inputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, two.inputs, strict=True))
    assert capture.recorded() == []


def test_importance_sums_squares_of_real_tokens():
    layer = torch.nn.Linear(3, 2)
    capture = Importance()
    x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    capture.record(layer, x, torch.tensor([[True, False]]))
    capture.record(layer, x)
    assert capture.pop(layer).tolist() == [1 + 1 + 16, 4 + 4 + 25, 9 + 9 + 36]
    assert capture.pop(layer) is None
    assert capture.num_tokens(layer) == 3
