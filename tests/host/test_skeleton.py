"""host/skeleton.py: a model without weights."""

from __future__ import annotations

import torch
from conftest import tiny_llama

from autoround_modifier.host.skeleton import skeleton


def test_all_is_on_the_meta_device_under_the_same_names():
    model = tiny_llama()
    copied = skeleton(model)
    assert type(copied) is type(model)
    expected = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    state = copied.state_dict()
    assert {name: (x.shape, x.dtype) for name, x in state.items()} == expected
    assert {x.device.type for x in state.values()} == {"meta"}


def test_shared_weights_stay_shared():
    model = tiny_llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = skeleton(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


def test_the_model_is_left_as_it_is():
    model = tiny_llama()
    called = []
    handle = model.register_forward_pre_hook(lambda module, args: called.append(module))
    weight = model.lm_head.weight
    copied = skeleton(model)
    copied.lm_head.quantization_scheme = "changed"
    copied.config.vocab_size = 1
    assert not copied._forward_pre_hooks
    assert not hasattr(model.lm_head, "quantization_scheme")
    assert model.config.vocab_size != 1
    assert model.lm_head.weight is weight
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert called == [model]
    handle.remove()
