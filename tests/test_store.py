"""What is kept of each block's calls: which samples, how often, and that nothing changes it."""

from __future__ import annotations

import time
from collections import UserDict

import pytest
import torch
from helpers import record_call
from torch import Tensor, nn

from autoround_modifier.blocks.argument_objects import (
    put_together,
    take_apart,
    tensors_by_place,
)
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.kept_tensors import KeptTensors
from autoround_modifier.blocks.placement import HOST
from autoround_modifier.blocks.samples import content_key, fingerprint
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.errors import RecipeError


def named_blocks(number: int) -> dict[nn.Module, str]:
    return {nn.Identity(): f"layers.{index}" for index in range(number)}


def storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def held_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the memory that tensors keep alive, also where they are a part of it."""
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(sizes.values())


def kept_hidden(store: CalibrationStore, block: nn.Module) -> list[Tensor]:
    samples = store._recordings[block].samples.values()
    return [x for one in samples for x in (one.hidden, one.output) if x is not None]


# ------------------------------------------------------------------ which samples


@pytest.mark.parametrize("batch", [1, 4])
def test_samples_that_are_not_used_are_not_stored(batch):
    blocks = named_blocks(3)
    first, second, third = blocks
    store = CalibrationStore(blocks, num_samples=4)
    hidden = torch.randn(32, 6, 8)
    inputs = [x.clone() for x in hidden.split(batch)]
    for x in inputs:
        record_call(store, first, (x,), {}, x + 1)
    assert store._recordings[first].num_samples == 32
    one = store.pop(first)
    for x in inputs:
        record_call(store, second, (x + 1,), {"mask": torch.zeros(1, 6, 6)}, x + 2)
    assert len(kept_hidden(store, second)) == 2 * 4
    assert held_bytes(kept_hidden(store, second)) == 2 * 4 * hidden[0].nbytes
    two = store.pop(second)
    assert len(two.inputs) == len(two.outputs) == len(two.calls) == len(two.masks) == 4
    expected = sorted(hidden.split(1), key=lambda x: content_key(x, None))[:4]
    for x, at_first, at_second, out in zip(
        expected, one.inputs, two.inputs, two.outputs, strict=True
    ):
        assert torch.equal(at_first, x)
        assert torch.equal(at_second, x + 1)
        assert torch.equal(out, x + 2)
    assert one.positions == two.positions == [0, 1, 2, 3]
    assert one.digest == two.digest
    assert store.pop(third) is None


def test_blocks_that_ran_before_the_order_is_known_keep_no_more():
    """The basic pipeline runs all blocks on one batch before it runs the first on the next."""
    blocks = named_blocks(3)
    store = CalibrationStore(blocks, num_samples=4)
    hidden = torch.randn(32, 1, 6, 8)
    for x in hidden:
        for position, block in enumerate(blocks):
            record_call(store, block, (x + position,), {}, x + position + 1)
        assert all(len(one.samples) <= 4 for one in store._recordings.values())
    expected = sorted(hidden, key=lambda x: content_key(x, None))[:4]
    for position, block in enumerate(blocks):
        found = store.pop(block).inputs
        assert all(torch.equal(x, y + position) for x, y in zip(found, expected, strict=True))


def test_the_digest_is_of_all_samples_and_not_of_their_order():
    hidden = torch.randn(6, 1, 3, 8)

    def digest(samples: Tensor) -> bytes:
        blocks = named_blocks(1)
        (block,) = blocks
        store = CalibrationStore(blocks, num_samples=2)
        for x in samples:
            record_call(store, block, (x,), {}, x)
        return store.pop(block).digest

    assert digest(hidden) == digest(hidden.flip(0))
    last = max(range(6), key=lambda index: content_key(hidden[index], None))
    other = hidden.clone()
    other[last] += 1  # of a sample that is not used
    assert digest(other) != digest(hidden)


def test_what_takes_no_hidden_states_is_named():
    block = nn.Identity()
    store = CalibrationStore({block: "model.embeddings"}, num_samples=None)
    message = r"model\.embeddings \(Identity\) is no block that can be tuned.*sequential_targets"
    with pytest.raises(RecipeError, match=message):
        store.enter(block, (), {"input_ids": torch.zeros(1, 3)})


def test_a_block_that_ran_another_number_of_times_has_no_samples():
    blocks = named_blocks(4)
    first, twice, seldom, same = blocks
    store = CalibrationStore(blocks, num_samples=2)
    for index, x in enumerate(torch.randn(4, 1, 3, 8)):
        record_call(store, first, (x,), {}, x)
        record_call(store, twice, (x,), {}, x)
        record_call(store, twice, (x,), {}, x)
        if index:
            record_call(store, seldom, (x,), {}, x)
        record_call(store, same, (x,), {}, x)
    assert store.recorded() == [first, twice, same, seldom]
    assert len(store.pop(first).inputs) == 2
    assert store.pop(twice) is None
    assert store.pop(seldom) is None
    assert len(store.pop(same).inputs) == 2


@pytest.mark.parametrize(("num_samples", "sort"), [(None, True), (None, False), (2, False)])
def test_all_samples_are_kept_where_that_is_asked_for(num_samples, sort):
    blocks = named_blocks(2)
    first, second = blocks
    store = CalibrationStore(blocks, num_samples, sort=sort)
    hidden = torch.randn(5, 1, 3, 8)
    for x in hidden:
        record_call(store, first, (x,), {}, x)
    one = store.pop(first)
    for x in hidden:
        record_call(store, second, (x,), {}, x)
    two = store.pop(second)
    expected = sorted(hidden, key=lambda x: content_key(x, None)) if sort else list(hidden)
    for found in (one, two):
        assert all(torch.equal(x, y) for x, y in zip(found.inputs, expected, strict=True))


# ------------------------------------------------------------------ shared arguments


def keep_of_calls(make_kwargs) -> list[Tensor]:
    """:return: all tensors kept of the arguments of 16 calls of each of two blocks"""
    blocks = named_blocks(2)
    store = CalibrationStore(blocks, num_samples=None)
    for x in torch.randn(16, 1, 6, 8):
        kwargs = make_kwargs()
        for block in blocks:
            record_call(store, block, (x,), kwargs, x)
    calls = [call for block in blocks for call in store.pop(block).calls]
    return [x for call in calls for x in tensors_by_place(call.kwargs).values()]


def test_arguments_shared_by_calls_are_kept_once():
    # Parts of larger tables, which are copied also where source and store are on one device, as
    # everything is that comes from an accelerator
    table, causal = torch.randn(1, 100, 4), torch.randn(1, 1, 6, 100)
    mask, rope = causal[..., :6], table[:, :6]
    kept = keep_of_calls(lambda: {"attention_mask": mask, "rope": (rope,)})
    assert len(kept) == 2 * 16 * 2
    assert len(storages(kept)) == 2
    assert held_bytes(kept) == mask.nbytes + rope.nbytes
    again = keep_of_calls(lambda: {"attention_mask": causal[..., :6], "rope": (table[:, :6],)})
    assert len(storages(again)) == 2


def test_equal_arguments_of_each_batch_are_kept_once():
    """A model makes its causal mask anew for each batch."""
    kept = keep_of_calls(lambda: {"attention_mask": torch.ones(1, 1, 6, 6).tril()})
    assert len(storages(kept)) == 1
    assert all(torch.equal(x, torch.ones(1, 1, 6, 6).tril()) for x in kept)


def test_arguments_of_equal_sums_are_not_mistaken_for_each_other():
    order = [torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[3.0, 4.0, 1.0, 2.0]])]
    assert fingerprint(order[0]) == fingerprint(order[1])
    tensors = KeptTensors()
    assert [tensors.keep(x, HOST, merge=True).tolist() for x in order] == [
        x.tolist() for x in order
    ]


def test_a_reused_address_is_not_mistaken_for_the_tensor_that_was_there():
    tensors = KeptTensors()
    memory, kept = bytearray(8), []
    for value in (1.0, 2.0):
        memory[:4] = memory[4:] = torch.tensor([value]).numpy().tobytes()
        kept.append(tensors.keep(torch.frombuffer(memory, dtype=torch.float32)[:1], HOST))
    assert [x.tolist() for x in kept] == [[1.0], [2.0]]


def test_a_tensor_that_was_written_to_in_place_is_kept_again():
    tensors = KeptTensors()
    mask = torch.zeros(2, 8)[:, :4]
    tensors.next_call()
    before = tensors.keep(mask, HOST, merge=True)
    mask += 1
    tensors.next_call()
    after = tensors.keep(mask, HOST, merge=True)
    assert before.tolist() == [[0.0] * 4] * 2
    assert after.tolist() == [[1.0] * 4] * 2


def test_rows_of_a_batch_do_not_keep_the_batch():
    blocks = named_blocks(1)
    (block,) = blocks
    store = CalibrationStore(blocks, num_samples=1)
    hidden, mask = torch.randn(8, 6, 16), torch.randn(8, 1, 6, 6)
    record_call(store, block, (hidden,), {"attention_mask": mask}, hidden + 1)
    found = store.pop(block)
    assert held_bytes([*found.inputs, *found.outputs]) == 2 * hidden[0].nbytes
    assert held_bytes([found.calls[0].kwargs["attention_mask"]]) == mask[0].nbytes


# ------------------------------------------------------------------ writing in place


class InPlace(nn.Module):
    """Doubles its input and adds to its mask, in place; returns a sum of both."""

    def forward(self, hidden, attention_mask):
        hidden *= 2
        attention_mask += 1
        return hidden + attention_mask.sum()


def run_in_place(batch: int) -> tuple[list[Tensor], list, Tensor, Tensor]:
    block = InPlace()
    store = CalibrationStore({block: "layers.0"}, num_samples=None, sort=False)
    hidden, mask = torch.randn(4, 3, 2), torch.randn(4, 1, 3, 3)
    for x, m in zip(hidden.split(batch), mask.split(batch), strict=True):
        args, kwargs = (x.clone(),), {"attention_mask": m.clone()}
        store.enter(block, args, kwargs)
        store.leave(block, block(*args, **kwargs))
    samples = store.pop(block)
    return [block], [samples], hidden, mask


@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_block_was_called_with_is_recorded_before_it_runs(batch):
    _, (samples,), hidden, mask = run_in_place(batch)
    assert torch.equal(torch.cat(samples.inputs), hidden)
    assert torch.equal(torch.cat([x.kwargs["attention_mask"] for x in samples.calls]), mask)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_blocks_that_run_again_do_not_change_what_is_stored(batch_size):
    blocks, (samples,), hidden, mask = run_in_place(1)
    group = BlockGroup(blocks, [samples.calls])
    for _ in range(3):
        for indices, stacked in group.batches(samples.inputs, batch_size):
            expected = hidden[indices] * 2 + (mask[indices] + 1).sum()
            assert torch.allclose(group.forward(stacked, indices), expected, atol=1e-5)
    assert torch.equal(torch.cat(samples.inputs), hidden)
    assert torch.equal(torch.cat([x.kwargs["attention_mask"] for x in samples.calls]), mask)


def test_an_argument_of_all_samples_may_be_written_to():
    """It is not stacked, so the block would get the stored tensor itself."""

    class Count(nn.Module):
        def forward(self, hidden, positions):
            positions += 1
            return hidden + positions

    block = Count()
    store = CalibrationStore({block: "layers.0"}, num_samples=None, sort=False)
    x = torch.zeros(1, 3, 3)
    store.enter(block, (x, torch.arange(3)), {})
    store.leave(block, x)
    samples = store.pop(block)
    group = BlockGroup([block], [samples.calls])
    for _ in range(2):
        assert group.forward(x, [0])[0, 0].tolist() == [1.0, 2.0, 3.0]
    assert samples.calls[0].args[0].tolist() == [0, 1, 2]


def test_a_block_that_writes_into_the_output_of_the_one_before_it():
    first, second = nn.Identity(), nn.Identity()
    store = CalibrationStore({first: "layers.0", second: "layers.1"}, num_samples=None)
    x = torch.ones(1, 2, 2)
    store.enter(first, (x,), {})
    y = x + 1
    store.leave(first, y)
    store.enter(second, (y,), {})
    y *= 5
    store.leave(second, y)
    one, two = store.pop(first), store.pop(second)
    assert one.outputs[0].unique().tolist() == [2.0]
    assert two.inputs[0].unique().tolist() == [2.0]
    assert two.outputs[0].unique().tolist() == [10.0]


def test_a_model_that_writes_into_the_output_of_a_block():
    """As where features of images are added between blocks."""
    blocks = named_blocks(2)
    first, second = blocks
    store = CalibrationStore(blocks, num_samples=None)
    x = torch.ones(1, 2, 2)
    store.enter(first, (x,), {})
    y = x + 1
    store.leave(first, y)
    y += 5
    store.enter(second, (y,), {})
    store.leave(second, y + 1)
    one, two = store.pop(first), store.pop(second)
    assert one.outputs[0].unique().tolist() == [2.0]
    assert two.inputs[0].unique().tolist() == [7.0]


def test_hidden_states_that_nobody_writes_to_are_shared_with_their_owner():
    blocks = named_blocks(2)
    first, second = blocks
    store = CalibrationStore(blocks, num_samples=None)
    x, y, z = (torch.randn(1, 64, 64) for _ in range(3))
    record_call(store, first, (x,), {}, y)
    record_call(store, second, (y,), {}, z)
    one, two = store.pop(first), store.pop(second)
    assert storages([*one.inputs, *one.outputs, *two.inputs, *two.outputs]) == storages([x, y, z])
    assert not store._tensors._backups
    assert not store._tensors._earlier_backups


# ------------------------------------------------------------------ objects among the arguments


class State:
    def __init__(self):
        self.layers = [UserDict()]
        self.own = self
        self.length = 3


class Entries(dict):
    pass


def test_objects_are_made_anew_for_each_run():
    key = torch.ones(2)
    state, entries = State(), Entries(key=key)
    entries.name = "entries"
    state.layers[0]["key"] = key
    apart = take_apart(((state, entries), {"state": state, "flag": True}))
    state.layers[0]["key"] = entries["key"] = None
    state.length = 4
    for _ in range(2):
        (one, other), kwargs = put_together(apart)
        assert type(one) is State
        assert one is not state
        assert kwargs["state"] is one.own is one
        assert kwargs["flag"] is True
        assert one.layers[0]["key"] is key
        assert one.length == 3
        assert type(other) is Entries
        assert other["key"] is key
        assert other.name == "entries"
        one.layers[0]["key"] = other["key"] = None  # changes the next one in no way
    assert tensors_by_place(put_together(apart)) == tensors_by_place(apart)


def test_modules_functions_and_constants_stay_as_they_are():
    values = [nn.Linear(1, 1), len, lambda: 0, torch.float32, "x", None, int]
    for one, other in zip(take_apart(values), values, strict=True):
        assert one is other


# ------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5, 7), (8,), (1,), (), (0, 4)])
def test_equal_tensors_have_equal_fingerprints(shape, dtype):
    x = (torch.randn(shape) > 0).to(dtype)
    assert fingerprint(x) == fingerprint(x.clone())
    padded = torch.zeros((3, *shape), dtype=dtype)
    padded[1] = x
    assert fingerprint(padded[1]) == fingerprint(x)  # starts anywhere in memory
    if x.ndim == 3:
        assert fingerprint(x.transpose(0, 2).contiguous().transpose(0, 2)) == fingerprint(x)


def test_one_other_byte_gives_another_fingerprint():
    x = torch.zeros(19, dtype=torch.uint8)
    changed = []
    for index in range(19):
        y = x.clone()
        y[index] = 1
        changed.append(fingerprint(y))
    assert fingerprint(x) == 0
    assert 0 not in changed
    x.fill_(255)  # sums wrap around
    assert fingerprint(x) == -2 + 3 * 255


def test_fingerprints_are_read_in_words():
    """Byte by byte it took as long as tuning: 64 MB at 0.2 GB/s."""
    x = torch.randn(16 * 2**20)

    def seconds(run) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            run()
            times.append(time.process_time() - started)
        return min(times)

    by_bytes = seconds(lambda: x.view(torch.uint8).sum(dtype=torch.int64))
    assert seconds(lambda: fingerprint(x)) < by_bytes / 5
