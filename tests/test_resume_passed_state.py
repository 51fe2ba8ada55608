"""
Blocks that pass more than hidden states on: they write into an argument, and a later block reads it
there. Gemma 3n shares keys and values in this way.
"""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from conftest import quantize, tiny_llama, weight_scheme
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.chain import QuantizedChain
from autoround_modifier.blocks.group import BlockGroup
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.tuning import Tuner


class Attributes:
    """Keeps entries as attributes, like a cache object."""

    def __setitem__(self, name, value):
        setattr(self, f"entry_{name}", value)

    def __getitem__(self, name):
        return getattr(self, f"entry_{name}")


class SharingBlock(LlamaDecoderLayer):
    """The first block writes into ``shared``; all others but the second add what they find."""

    def forward(self, hidden_states, shared=None, **kwargs):
        output = super().forward(hidden_states, **kwargs)
        if self.self_attn.layer_idx == 0:
            shared["own"] = self.mlp(hidden_states), "first"
        elif self.self_attn.layer_idx > 1:
            output = output + shared["own"][0]
        return output


class SharingModel(LlamaModel):
    container: type = UserDict

    def forward(self, *args, **kwargs):
        return LlamaModel.forward(self, *args, shared=self.container(), **kwargs)


def sharing_llama(container: type):
    model = tiny_llama(num_layers=4)
    model.model.__class__ = type("SharingModel", (SharingModel,), {"container": container})
    for block in model.model.layers:
        block.__class__ = SharingBlock
    model._no_split_modules = ["SharingBlock"]
    return model


class Interrupted(BaseException):
    pass


def tuned(model, checkpoint_dir=None, stop_after=None, ignore=("lm_head",), data=None, **fields):
    """:return: all tensors of the tuned model; None if the run was interrupted"""
    modifier = AutoRoundModifier(
        iters=4,
        batch_size=4,
        ignore=list(ignore),
        config_groups={"group_0": weight_scheme(2)},
        checkpoint_dir=checkpoint_dir and str(checkpoint_dir),
        **fields,
    )
    original, calls = Tuner.run, []

    def run(self, *args):
        if len(calls) == stop_after:
            raise Interrupted
        calls.append(1)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "run", run)
        try:
            quantize(model, modifier, data, pipeline="basic")
        except Interrupted:
            return None
    assert len(modifier.block_reports) == 4
    return model.state_dict()


def differ(one, other) -> list[str]:
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


@pytest.mark.parametrize("container", [UserDict, dict, Attributes])
def test_an_interrupted_run_gives_the_same_integers(container, tmp_path):
    whole = tuned(sharing_llama(container))
    for stop_after in (1, 3):
        folder = tmp_path / str(stop_after)
        assert tuned(sharing_llama(container), folder, stop_after) is None
        assert differ(whole, tuned(sharing_llama(container), folder)) == []


def test_full_precision_inputs_go_with_full_precision_state():
    """Tuning a block leaves nothing behind for the next, whatever carries the state."""
    separate, *others = (
        tuned(sharing_llama(container), enable_quanted_input=False)
        for container in (dict, UserDict, Attributes)
    )
    for other in others:
        assert differ(separate, other) == []


def test_all_containers_carry_the_quantized_state(monkeypatch):
    original, written = BlockGroup.__init__, []

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        written.append(len(self.written))

    monkeypatch.setattr(BlockGroup, "__init__", init)
    chained, *others = (
        tuned(sharing_llama(container)) for container in (dict, UserDict, Attributes)
    )
    for other in others:
        assert differ(chained, other) == []
    assert written == 3 * [0, 16, 16, 16]  # one tensor for each sample


def gemma3n(folder) -> Gemma3nForCausalLM:
    """Four blocks, of which the last two take keys and values from the first two."""
    config = Gemma3nTextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=[64] * 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=32,
        laurel_rank=32,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        sliding_window=8,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    if not folder.exists():
        Gemma3nForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return Gemma3nForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_gemma_3n(tmp_path):
    ignore = ("lm_head", "re:.*altup.*", "re:.*per_layer_model_projection")

    def run(*args, **fields):
        return tuned(gemma3n(tmp_path / "model"), *args, ignore=ignore, **fields)

    whole = run()
    assert run(tmp_path / "run", 2) is None
    assert differ(whole, run(tmp_path / "run")) == []
    unchained = run(enable_quanted_input=False)
    changed = differ(whole, unchained)
    assert changed
    assert not [name for name in changed if ".layers.0." in name]


# ------------------------------------------------------------------ one block after the other


class Writer(nn.Module):
    """Writes a multiple of its input, by its weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, 2.0)

    def forward(self, hidden, shared):
        shared["key"] = self.linear(hidden)
        return hidden


class InPlaceWriter(Writer):
    def forward(self, hidden, shared):
        shared["key"].copy_(self.linear(hidden))
        return hidden


class Reader(nn.Module):
    def forward(self, hidden, shared):
        return hidden + shared["key"]


def recorded(writer: nn.Module, batch: int, container: type = UserDict):
    """:return: what was recorded of a writer and two readers, on the samples 1, 2, 3, 4"""
    blocks = {writer: "layers.0", Reader(): "layers.1", Reader(): "layers.2"}
    store = CalibrationStore(blocks, num_samples=None, sort=False)
    hidden = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    with torch.no_grad():
        for x in hidden.split(batch):
            shared = container(key=torch.zeros(batch, 1, 1))
            for block in blocks:
                store.enter(block, (x,), {"shared": shared})
                x = block(x, shared)
                store.leave(block, x)
    return list(blocks), [store.pop(block) for block in blocks]


def quantized(writer: Writer) -> dict:
    """The weight 2 becomes 10."""
    return {writer.linear: lambda x: 10 * x}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("writer_class", [Writer, InPlaceWriter])
def test_later_blocks_see_what_quantized_blocks_wrote(writer_class, batch):
    blocks, samples = recorded(writer_class(), batch)
    assert [x.item() for x in samples[1].outputs] == [3.0, 6.0, 9.0, 12.0]
    assert [x.item() for x in samples[2].outputs] == [5.0, 10.0, 15.0, 20.0]

    first = BlockGroup(blocks[:1], [samples[0].calls])
    assert first.writes
    inputs, chain = samples[0].inputs, QuantizedChain()
    written = first.advance(inputs, 4, quantized(blocks[0]))
    chain.advance(inputs, samples[0].outputs, written)
    hidden = chain.take(samples[1].inputs)

    second = BlockGroup(blocks[1:2], [samples[1].calls], written=chain.written)
    assert not second.writes
    stacked = torch.cat(hidden)
    assert second.forward(stacked, [0, 1, 2, 3]).flatten().tolist() == [11.0, 22.0, 33.0, 44.0]
    assert second.forward(stacked[[2, 0]], [2, 0]).flatten().tolist() == [33.0, 11.0]
    third = BlockGroup(blocks[2:], [samples[2].calls], written=chain.written)
    assert third.forward(stacked, [0, 1, 2, 3]).flatten().tolist() == [11.0, 22.0, 33.0, 44.0]
    # without the chain: what the full-precision block wrote
    second = BlockGroup(blocks[1:2], [samples[1].calls])
    assert second.forward(stacked, [0, 1, 2, 3]).flatten().tolist() == [3.0, 6.0, 9.0, 12.0]


def test_the_chain_reaches_blocks_that_run_after_the_first_was_tuned():
    """As in the sequential pipeline, which keeps the object meanwhile."""
    writer, reader = Writer(), Reader()
    store = CalibrationStore({writer: "layers.0", reader: "layers.1"}, num_samples=3)
    calls = [(torch.full((1, 1, 1), x), UserDict()) for x in (1.0, 2.0, 3.0, 4.0)]
    for x, shared in calls:
        store.enter(writer, (x, shared), {})
        store.leave(writer, writer(x, shared))
    samples, chain = store.pop(writer), QuantizedChain()
    group = BlockGroup([writer], [samples.calls])
    written = group.advance(samples.inputs, 4, quantized(writer))
    chain.advance(samples.inputs, samples.outputs, written)
    del samples, written, group
    for x, shared in calls:
        store.enter(reader, (x, shared), {})
        store.leave(reader, reader(x, shared))
    samples = store.pop(reader)
    hidden = torch.cat(chain.take(samples.inputs))
    group = BlockGroup([reader], [samples.calls], written=chain.written)
    assert torch.equal(group.forward(hidden, [0, 1, 2]), 11 * hidden)


def test_what_no_later_block_reads_is_not_kept_in_the_chain():
    blocks, samples = recorded(Writer(), 1)
    chain = QuantizedChain()
    group = BlockGroup(blocks[:1], [samples[0].calls])
    chain.advance([], [], group.advance(samples[0].inputs, 4, quantized(blocks[0])))
    assert len(chain.written) == 4
    del samples, group
    assert len(chain.written) == 0


@pytest.mark.parametrize("container", [UserDict, dict])
def test_blocks_that_are_tuned_together_pass_it_on_with_gradients(container):
    blocks, samples = recorded(Writer(), 1, container)
    group = BlockGroup(blocks, [one.calls for one in samples])
    weight = blocks[0].linear.weight
    for _ in range(2):  # nothing is left of the first pass
        weight.grad = None
        output = group.forward(torch.cat(samples[0].inputs), [0, 1, 2, 3])
        assert output.flatten().tolist() == [5.0, 10.0, 15.0, 20.0]
        output.sum().backward()
        assert weight.grad.item() == 2 * (1 + 2 + 3 + 4)


def test_a_writer_in_the_pipeline_that_drops_what_it_writes_is_named(log):
    """What later blocks read is known only once they run: it is said as soon as one has written."""

    class Silent(SharingBlock):
        def forward(self, hidden_states, shared=None, **kwargs):
            if self.self_attn.layer_idx == 0:
                shared["own"] = self.mlp(hidden_states)
            return LlamaDecoderLayer.forward(self, hidden_states, **kwargs)

    model = sharing_llama(UserDict)
    for block in model.model.layers:
        block.__class__ = Silent
    model._no_split_modules = ["Silent"]
    groups = {"group_0": weight_scheme(2)}
    quantize(model, AutoRoundModifier(iters=1, ignore=["lm_head"], config_groups=groups))
    (warning,) = [line for line in log if "does not pass on" in line]
    assert warning.startswith("WARNING model.layers.0 writes into an argument")
    assert "pipeline='basic'" in warning
