"""What hooks record of a pass through the model: inputs of blocks, and tokens of experts."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import quantize, tiny_llama, token_samples, weight_scheme
from llmcompressor.modeling.moe.context import moe_calibration_context
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from autoround_modifier import AutoRoundModifier
from autoround_modifier.blocks.experts import ExpertRouting
from autoround_modifier.blocks.importance import Importance
from autoround_modifier.blocks.patching import hooks_registered
from autoround_modifier.blocks.reverse import ReversePass
from autoround_modifier.blocks.store import CalibrationStore
from autoround_modifier.modifiers.recorder import CalibrationRecorder

# ------------------------------------------------------------------ blocks that write in place


class InPlaceBlock(LlamaDecoderLayer):
    """A Llama block that adds to its input in place, or not."""

    in_place = True

    def forward(self, hidden_states, **kwargs):
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if self.in_place:
            hidden_states += attention
        else:
            hidden_states = hidden_states + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OutOfPlaceBlock(InPlaceBlock):
    in_place = False


def tuned(block_class: type[nn.Module], **fields) -> tuple[dict[str, Tensor], list[tuple]]:
    model = tiny_llama(torch.float32)
    for block in model.model.layers:
        block.__class__ = block_class
    model._no_split_modules = [block_class.__name__]
    modifier = AutoRoundModifier(
        batch_size=4,
        ignore=["lm_head"],
        config_groups={"group_0": weight_scheme(3)},
        **fields,
    )
    quantize(model, modifier, sequential_targets=[block_class.__name__])
    losses = [(one.initial_loss, one.best_loss) for one in modifier.block_reports]
    return model.state_dict(), losses


@pytest.mark.parametrize("fields", [{"iters": 4}, {"preset": "opt_rtn", "iters": None}])
def test_a_block_that_adds_to_its_input_in_place_is_tuned_as_another(fields):
    weights, losses = tuned(InPlaceBlock, **fields)
    expected, expected_losses = tuned(OutOfPlaceBlock, **fields)
    assert losses == expected_losses
    assert len(losses) == (2 if fields["iters"] else 0)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def test_the_recorder_takes_the_input_before_the_block_runs():
    class Doubling(nn.Module):
        def forward(self, hidden_states, attention_mask=None):
            hidden_states *= 2
            return (hidden_states,)

    block = Doubling()
    store = CalibrationStore({block: "layers.0"}, num_samples=None, sort=False)
    routing = ExpertRouting(nn.Module())
    recorder = CalibrationRecorder([block], lambda block: None, routing, Importance(), store)
    registered = []

    def register(module, hook, kind, **options):
        registered.append(partial(getattr(module, f"register_{kind}_hook"), hook, **options))

    recorder.install(register, [], [])
    padding = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with hooks_registered(*registered):
        block(hidden_states=torch.ones(2, 3, 4), attention_mask=padding)
    samples = store.pop(block)
    assert [x.unique().tolist() for x in samples.inputs] == [[1.0], [1.0]]
    assert [x.unique().tolist() for x in samples.outputs] == [[2.0], [2.0]]
    assert [mask.tolist() for mask in samples.masks] == [
        [[True, True, False]],
        [[True, True, True]],
    ]


# ------------------------------------------------------------------ the reverse pass


class Block(nn.Module):
    def __init__(self, name: str, in_place: bool):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name, self.in_place = name, in_place

    def forward(self, *args, **kwargs):
        hidden = kwargs[self.name] if self.name else args[0]
        change = self.linear(hidden)
        if self.in_place:
            hidden += change
            return hidden
        return hidden + change


class Model(nn.Module):
    """Blocks that take hidden states under a name, or by position if there is none."""

    def __init__(self, name: str, in_place: bool = False):
        super().__init__()
        self.name = name
        self.embedding = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(name, in_place) for _ in range(3)])

    def forward(self, input_ids, use_cache=False):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(**{self.name: hidden}) if self.name else block(hidden)
        return SimpleNamespace(logits=hidden)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["hidden_states", "hidden_state", ""])
def test_the_reverse_pass_takes_hidden_states_by_any_name(name, in_place):
    """And the gradients are right, whether the blocks write into their inputs or not."""
    model = Model(name, in_place).eval().requires_grad_(False)
    ids = torch.arange(6).view(2, 3)
    blocks = {block: f"blocks.{index}" for index, block in enumerate(model.blocks)}
    with torch.enable_grad():
        reverse = ReversePass(model, blocks, [{"input_ids": ids}], batch_size=2)
        assert list(reverse.blocks.values()) == ["blocks.0", "blocks.1", "blocks.2"]
        reverse.forward(lambda logits, batch, index: 2 * logits.detach(), {})
        for block in reversed(model.blocks):
            reverse.backward(block)

        embedded = model.embedding(ids).requires_grad_()
        hidden = embedded
        for block in model.blocks:
            hidden = hidden + block.linear(hidden)
        hidden.square().sum().backward()
    torch.testing.assert_close(torch.cat(reverse.gradients), embedded.grad)


def test_a_sensitivity_pass_where_hidden_state_is_a_keyword():
    model = Model("hidden_state").eval().requires_grad_(False)
    blocks = {block: f"blocks.{index}" for index, block in enumerate(model.blocks)}
    seen = []
    observers = {model.blocks[1].linear: lambda layer, x, mask: seen.append(x.shape)}
    with torch.enable_grad():
        batches = [{"input_ids": torch.arange(6).view(2, 3)}] * 2
        reverse = ReversePass(model, blocks, batches, batch_size=3)
        reverse.forward(lambda logits, batch, index: torch.ones_like(logits), observers)
        for block in reversed(model.blocks):
            reverse.backward(block)
    assert seen == [(2, 3, 4)] * 2
    assert [x.shape for x in reverse.gradients] == [(1, 3, 4)] * 4


# ------------------------------------------------------------------ experts


class Mixture(nn.ModuleList):
    """Two experts, both chosen for every token: expert 0 first by the odd tokens."""

    num_experts = 2


@pytest.mark.parametrize("all_shown", [True, False])
def test_an_expert_that_all_tokens_are_routed_to(all_shown):
    """It sees as many rows as where every expert sees every token, but in another order."""
    experts = Mixture([nn.Linear(1, 1), nn.Linear(1, 1)])
    routing = ExpertRouting(nn.Module())
    routing.layers = {experts[0]: (experts, 0), experts[1]: (experts, 1)}
    hidden = torch.arange(4.0).unsqueeze(1)
    chosen = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]])
    mask = torch.tensor([[True, True, True, False]])  # the last token is padding
    # LLM-Compressor's mixtures give an expert first the tokens that chose it first
    routed = {experts[0]: hidden[[1, 3, 0, 2]], experts[1]: hidden[[0, 2, 1, 3]]}
    expected = {experts[0]: [1.0, 0.0, 2.0], experts[1]: [0.0, 2.0, 1.0]}
    for layer, rows in routed.items():
        if all_shown:
            with moe_calibration_context():
                routing.enter(experts, (hidden, chosen), mask)
            found = routing.select(layer, hidden)
        else:
            routing.enter(experts, (hidden, chosen), mask)
            found = routing.select(layer, rows)
        assert found.flatten().tolist() == expected[layer]


def test_importance_where_one_expert_gets_all_tokens(tmp_path):
    """With LLM-Compressor's own mixture, whose router prefers expert 2, and with padding."""
    from test_experts import mixture

    model = mixture(tmp_path)
    experts = model.model.layers[0].mlp.experts
    routing, importance = ExpertRouting(model), Importance()
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 9:] = False
    seen = {}

    def prefer(module, args, output):
        logits, weights, chosen = output
        chosen = chosen.clone()
        chosen[:, 0], chosen[:, 1] = torch.arange(len(chosen)) % 2, 2
        chosen[::3] = chosen[::3].flip(1)  # every third token has expert 2 as its first
        return logits, weights, chosen

    def enter(module, args):
        routing.enter(module, args, mask)
        seen["hidden"] = args[0]

    def record(layer, args):
        importance.record(layer, routing.select(layer, args[0]))

    model.model.layers[0].mlp.gate.register_forward_hook(prefer)
    experts.register_forward_pre_hook(enter)
    layer = experts[2].gate_proj
    layer.register_forward_pre_hook(record)
    with torch.no_grad():
        model(torch.tensor(token_samples(2)["input_ids"]))
    assert importance.num_tokens(layer) == 18
    expected = seen["hidden"][mask.flatten()].float().square().sum(0)
    torch.testing.assert_close(importance.pop(layer).float(), expected)
