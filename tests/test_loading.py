"""A checkpoint that is loaded with packed weights computes what Transformers computes."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import shutil
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import huggingface_hub.constants
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import quantize, tiny_llama, tiny_tokenizer, weight_scheme
from helpers import saved_tensors
from safetensors.torch import load_file, save_file
from tiny_mixtures import tiny_mixture
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from autoround_modifier import (
    AutoRoundModifier,
    BackendError,
    CheckpointError,
    HubError,
    load,
    quantized_weights,
)
from autoround_modifier.inference import packed_layer
from autoround_modifier.inference.backends import BACKENDS, Use
from autoround_modifier.inference.choice import choose
from autoround_modifier.inference.int4_layer import Int4Linear
from autoround_modifier.inference.packed_layer import PackedEmbedding, PackedLinear
from autoround_modifier.inference.packed_weight import PackedSpec, PackedWeight, unpack_rows

IDS = torch.arange(3, 27).view(2, 12)
SCHEMES = {
    "W2": [weight_scheme(2)],
    "W2 asymmetric": [weight_scheme(2, False)],
    "W3 asymmetric channel": [weight_scheme(3, False, None)],
    "W4": [weight_scheme(4)],
    "W4 asymmetric": [weight_scheme(4, False)],
    "W5": [weight_scheme(5)],
    "W8 channel": [weight_scheme(8, True, None)],
    "W2 and W4": [
        weight_scheme(2, True, 64, ["re:.*mlp.*_proj"]),
        weight_scheme(4, False, 32, ["re:.*attn.*_proj"]),
    ],
    "attention alone": [weight_scheme(4, True, 32, ["re:.*attn.*_proj"])],
}
UP = "model.layers.0.mlp.up_proj"


@functools.cache
def saved(name: str, **options) -> Path:
    """:return: folder of a tiny checkpoint; not to be changed"""
    groups = {f"group_{i}": group for i, group in enumerate(SCHEMES[name])}
    modifier = AutoRoundModifier(config_groups=groups, ignore=["lm_head"], preset="rtn")
    return saved_by(modifier, tiny_llama(**options))


def saved_by(modifier: AutoRoundModifier, model: PreTrainedModel, **options) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="loaded_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    quantize(model, modifier).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def unpacked(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def dequantized(
    model: PreTrainedModel, folder: Path, renamed: Mapping[str, str] = MappingProxyType({})
) -> PreTrainedModel:
    """
    :param model: before it was quantized
    :param renamed: part of a name in the file -> in the model
    :return: the same in float32, with the weights that the checkpoint stands for
    """
    model = model.float()
    for name, weight in quantized_weights(folder).items():
        values, scale, zero_point = weight.values, weight.scale, weight.zero_point
        groups = values.float().view(*scale.shape, -1) - zero_point.float().unsqueeze(-1)
        product = (groups * scale.float().unsqueeze(-1)).view(values.shape)
        path = ".".join(renamed.get(part, part) for part in name.split("."))
        layer = model.get_submodule(path)
        layer.__dict__["_parameters"] = {"weight": nn.Parameter(product)}  # nothing offloads it
        layer.register_parameter("bias", None)
    return model


def layers(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# ------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_as_transformers(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = load(saved(name), "torch", dtype=dtype)
        assert torch.equal(logits(model), logits(unpacked(saved(name), dtype)))


@pytest.mark.parametrize("name", ["W2", "W2 asymmetric", "W4", "W4 asymmetric", "W2 and W4"])
def test_pytorchs_kernel_is_as_close_as_bfloat16(name):
    exact = logits(unpacked(saved(name)))
    model = load(saved(name), "torch-int4")
    assert model.dtype == torch.bfloat16
    assert layers(model, Int4Linear)
    gap = (logits(model).float() - exact).abs().mean()
    own = (logits(unpacked(saved(name), torch.bfloat16)).float() - exact).abs().mean()
    assert gap < 1.5 * own


def test_generation_is_the_same():
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for dtype in (torch.float32, torch.bfloat16):
        expected = unpacked(saved("W2"), dtype).generate(IDS, **options)
        model = load(saved("W2"), "torch", dtype=dtype)
        assert torch.equal(model.generate(IDS, **options), expected)


def test_tied_embeddings_stay_tied():
    folder = saved("W4", tied=True)
    model = load(folder, "torch", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(unpacked(folder)))


def test_biases(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    scheme = {"group_0": weight_scheme(4)}
    source = AutoModelForCausalLM.from_pretrained(tmp_path)
    folder = saved_by(
        AutoRoundModifier(config_groups=scheme, ignore=["lm_head"], preset="rtn"), source
    )
    exact = logits(unpacked(folder))
    assert torch.equal(logits(load(folder, "torch", dtype=torch.float32)), exact)
    assert (logits(load(folder, "torch-int4")).float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_quantized_embeddings_and_head(tied):
    groups = {
        "group_0": weight_scheme(4),
        "group_1": weight_scheme(8, False, None, ["Embedding"]),
    }
    modifier = AutoRoundModifier(config_groups=groups, ignore=[], preset="rtn", engine="vllm")
    folder = saved_by(modifier, tiny_llama(tied=tied))
    model = load(folder, dtype=torch.float32, backend="torch")
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert isinstance(model.lm_head, PackedLinear)
    assert torch.equal(logits(model), logits(dequantized(tiny_llama(), folder)))
    kinds = {type(layer) for name, layer in model.named_modules() if name.endswith("_proj")}
    assert kinds == {PackedLinear}
    assert type(load(folder).model.embed_tokens) is PackedEmbedding  # no other backend runs them


@pytest.mark.parametrize("prefix", ["Qwen3Moe", "Mixtral", "GraniteMoe"])
def test_experts(prefix, tmp_path):
    """In Transformers they are one tensor, and in files of Mixtral w1, w2 and w3."""
    routers = ["re:.*gate$", "re:.*router.*"]
    modifier = AutoRoundModifier(
        config_groups={"group_0": weight_scheme(4)},
        ignore=["lm_head", *routers],
        preset="rtn",
        engine="vllm",
    )
    folder = saved_by(modifier, tiny_mixture(tmp_path, prefix))
    model = load(folder, "torch", dtype=torch.float32)
    experts = {name for name in layers(model, PackedLinear) if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    renamed = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    if prefix == "GraniteMoe":
        renamed = {}
    source = dequantized(tiny_mixture(tmp_path, prefix), folder, renamed)
    assert (logits(model) - logits(source)).abs().max() < 1e-5


def test_classes_of_the_model_keep_their_own_forward():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    weight, spec = packed(rows=32, columns=32, bits=4, group_size=32)
    for kind, input in ((Doubled, torch.randn(5, 32)), (Scaled, torch.tensor([[1, 31]]))):
        layer, plain = kind(32, 32), kind(32, 32)
        if kind is Doubled:
            plain.bias = layer.bias
        packed_layer.leave_without_weight(layer, spec)
        layer.take(weight, torch.float32)
        plain.weight = nn.Parameter(layer.weight)
        assert isinstance(layer, kind)
        assert torch.equal(layer(input), plain(input))


def test_rows_of_a_large_layer_are_dequantized_in_portions(monkeypatch):
    exact = logits(load(saved("W4"), "torch", dtype=torch.float32))
    monkeypatch.setattr(packed_layer, "WEIGHTS_AT_ONCE", 24 * 64)
    gap = (logits(load(saved("W4"), "torch", dtype=torch.float32)) - exact).abs().max()
    assert gap < 1e-5


# ------------------------------------------------------------------ what is in memory


def test_weights_are_as_large_as_in_the_file():
    for name in ("W2", "W4 asymmetric", "W5"):
        model = load(saved(name), "torch")
        stored = saved_tensors(saved(name))
        for path, layer in layers(model, PackedLinear).items():
            assert "weight" not in dict(layer.named_parameters())
            for part in ("weight_packed", "weight_scale"):
                assert torch.equal(getattr(layer, part), stored[f"{path}.{part}"])
        packed_layers = layers(model, PackedLinear)
        assert len(packed_layers) == 14
        held = sum(x.nbytes for layer in packed_layers.values() for x in layer.buffers())
        dense = sum(2 * layer.in_features * layer.out_features for layer in packed_layers.values())
        assert held < {"W2": 0.2, "W4 asymmetric": 0.35, "W5": 0.4}[name] * dense


def test_nothing_is_unpacked_while_loading(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was dequantized")

    monkeypatch.setattr(packed_layer, "dequantize_rows", refuse)
    model = load(saved("W2 and W4"), "torch")
    with pytest.raises(AssertionError, match="dequantized"):
        logits(model)


def test_files_may_change_afterwards(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved("W4"), folder)
    model = load(folder, "torch", dtype=torch.float32)
    expected = logits(unpacked(saved("W4")))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "other.safetensors")
    (folder / "other.safetensors").replace(folder / "model.safetensors")
    assert torch.equal(logits(model), expected)


def test_a_sharded_checkpoint(tmp_path):
    """Two files, and the scales of a layer in another one than its integers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved("W4 asymmetric"), folder)
    tensors = load_file(folder / "model.safetensors")
    parts: list[dict[str, Tensor]] = [{}, {}]
    for i, name in enumerate(sorted(tensors)):
        parts[i % 2][name] = tensors[name]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {name: names[i] for i in range(2) for name in parts[i]}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    model = load(folder, "torch", dtype=torch.float32)
    assert torch.equal(logits(model), logits(unpacked(saved("W4 asymmetric"))))


@pytest.mark.parametrize(("bits", "columns"), itertools.product(range(1, 9), [32, 96, 40]))
def test_integers_are_those_of_compressed_tensors(bits, columns):
    offset = 2 ** (bits - 1)
    integers = torch.randint(-offset, offset, (7, columns), dtype=torch.int8)
    assert torch.equal(unpack_rows(pack_to_int32(integers, bits), bits, columns), integers)


# ------------------------------------------------------------------ which backend runs what


def packed(rows: int, columns: int, bits: int, group_size: int, symmetric: bool = True):
    offset = 2 ** (bits - 1)
    integers = torch.randint(-offset, offset, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows, columns // group_size).bfloat16()
    zero_point = None
    if not symmetric:
        zero_point = torch.randint(0, 2 * offset, scale.shape, dtype=torch.int16)
    spec = PackedSpec("layer", rows, columns, bits, symmetric, group_size)
    return PackedWeight(spec, pack_to_int32(integers, bits), scale, zero_point), spec


def use(**fields) -> Use:
    spec = {"num_bits": 4, "symmetric": True, "group_size": 64, "in_features": 64}
    spec |= {"out_features": 64} | fields
    kind, device = spec.pop("kind", "linear"), spec.pop("device", "cpu")
    dtype = spec.pop("dtype", torch.bfloat16)
    return Use(PackedSpec("layer", **spec), kind, torch.device(device), dtype)


@pytest.fixture
def kernels(monkeypatch):
    """Nothing is installed but what is named: ``kernels("ark")``."""

    def installed(*names):
        for backend in BACKENDS:
            there = backend.package is None or backend.name in names
            monkeypatch.setitem(INSTALLED, backend.name, there)

    INSTALLED: dict[str, bool] = {}
    property_ = property(lambda backend: INSTALLED[backend.name])
    monkeypatch.setattr(BACKENDS[0].__class__, "is_installed", property_)
    installed()
    return installed


def chosen(one: Use) -> str:
    return choose("auto", {"layer": one})["layer"].name


def test_the_best_that_is_installed_is_chosen(kernels):
    assert chosen(use()) == "torch-int4"
    assert chosen(use(num_bits=2, symmetric=False)) == "torch-int4"
    assert chosen(use(num_bits=8)) == "torch"
    assert chosen(use(dtype=torch.float32)) == "torch"
    assert chosen(use(out_features=24)) == "torch"
    assert chosen(use(kind="embedding")) == "torch"
    assert chosen(use(kind="own")) == "torch"
    assert chosen(use(device="cuda")) == "torch"
    kernels("ark", "gptqmodel", "humming")
    assert chosen(use()) == "ark"
    assert chosen(use(num_bits=7, dtype=torch.float32, group_size=-1)) == "ark"
    assert chosen(use(kind="embedding")) == "torch"
    assert chosen(use(device="cuda")) == "gptqmodel"
    assert chosen(use(device="cuda", num_bits=5)) == "torch"
    assert chosen(use(device="cuda", dtype=torch.float32)) == "torch"


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("torch-int4", {"num_bits": 8}, "takes 2, 3 or 4 bits, not 8"),
        ("torch-int4", {"dtype": torch.float16}, "computes in bfloat16, not float16"),
        (
            "torch-int4",
            {"group_size": 16},
            "takes groups of 32, 64, 128 or 256, not groups of 16",
        ),
        ("torch-int4", {"group_size": -1}, "or 256, not one scale per row"),
        ("torch-int4", {"out_features": 24}, "output features in multiples of 16, not 24"),
        ("torch-int4", {"kind": "embedding"}, "does not run embeddings"),
        ("ark", {"kind": "own"}, "linear layers of the model's own classes"),
        ("ark", {"num_bits": 1}, "takes 2, 3, 4, 5, 6, 7 or 8 bits, not 1"),
        ("gptqmodel", {"num_bits": 5}, "takes 2, 3, 4 or 8 bits, not 5"),
        ("gptqmodel", {"in_features": 80}, "input features in multiples of 32, not 80"),
        ("gptqmodel", {"dtype": torch.float32}, "computes in float16 or bfloat16, not float32"),
        ("gptqmodel", {"group_size": 48}, "takes one scale per row or groups of 16, 32"),
    ],
)
def test_a_layer_that_a_backend_does_not_run(kernels, name, fields, said):
    kernels("ark", "gptqmodel")
    with pytest.raises(BackendError) as error:
        choose(name, {"model.layer": use(**fields)})
    message = str(error.value)
    assert f"it {said}" in message or said in message
    assert ": model.layer" in message
    assert "`torch`" in message


def test_refused_before_weights_are_read(kernels, monkeypatch):
    monkeypatch.setattr("autoround_modifier.inference.loading.load_skeleton", None)
    with pytest.raises(BackendError, match=r"takes 2, 3 or 4 bits, not 8: model\.layers\.0"):
        load(saved("W8 channel"), "torch-int4")


@pytest.mark.parametrize(
    ("name", "device", "said"),
    [
        ("marlin", None, "there is no backend `marlin`; use one of auto, gptqmodel, humming, ark"),
        ("ark", "cpu", r"needs the package `auto_round_kernel`: pip install .*\[cpu\]"),
        ("gptqmodel", "cpu", "needs the package `gptqmodel`"),
        ("humming", "cpu", "runs on cuda, and the model is on cpu. Here `torch-int4`, `torch`"),
        ("torch-int4", "meta", "runs on cpu, and the model is on meta"),
    ],
)
def test_backends_that_are_not_there(kernels, name, device, said):
    with pytest.raises(BackendError, match=said):
        load(saved("W4"), name, device=device)


def test_arguments_of_auto_rounds_kernel(monkeypatch, kernels):
    """The kernel itself runs in `tests/backends`."""
    calls = []

    def repack(integers, scale, zero_point, *layout):
        calls.append(layout)
        zero = zero_point.float() if layout[-1] else torch.zeros_like(scale)
        size = layout[0]
        expanded = (x.repeat_interleave(size, dim=0) for x in (zero, scale))
        zero, scale = expanded
        return (integers.float() - zero) * scale

    def multiply(input, weight, bias, rows, columns, *layout):
        assert weight.shape == (columns, rows)
        return functional.linear(input, weight.T, bias)

    fake = types.SimpleNamespace(repack_quantized_weight=repack, woqgemm_linear=multiply)
    monkeypatch.setitem(sys.modules, "auto_round_kernel", fake)
    kernels("ark")
    for name in ("W2", "W4 asymmetric", "W8 channel"):
        model = load(saved(name), dtype=torch.float32)
        assert not layers(model, PackedLinear)
        assert (logits(model) - logits(unpacked(saved(name)))).abs().max() < 1e-5
    assert (32, "auto", "int2", "fp32", False) in calls
    assert (32, "auto", "int4", "fp32", True) in calls
    assert (64, "auto", "int8", "fp32", False) in calls  # one scale per row of 64


# ------------------------------------------------------------------ what cannot stay packed


def test_other_formats_are_transformers(log):
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    group = {**weight_scheme(8, True, None), "input_activations": inputs}
    modifier = AutoRoundModifier(config_groups={"g": group}, ignore=["lm_head"], preset="rtn")
    folder = saved_by(modifier, tiny_llama())
    model = load(folder)
    assert not layers(model, PackedLinear)
    said = [line for line in log if "loaded by Transformers" in line]
    assert len(said) == 1
    assert "W8A8 channel dynamic quantizes activations: model.layers.0" in said[0]
    assert torch.equal(logits(model), logits(unpacked(folder, torch.bfloat16)))
    with pytest.raises(BackendError, match=r"quantizes activations.*`transformers` loads it"):
        load(folder, "torch")


def test_a_model_that_is_not_quantized(log, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(tiny_llama()))
    assert "it is not quantized" in "".join(log)


def test_transformers_by_name(log):
    model = load(saved("W4"), "transformers")
    assert not layers(model, PackedLinear)
    assert "loaded by Transformers" not in "".join(log)


def test_a_quantized_cache(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved("W4"), folder)
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    edit_config(folder, lambda config: config["quantization_config"].update(kv_cache_scheme=cache))
    with pytest.raises(BackendError, match="the key-value cache is quantized"):
        load(folder, "torch")


def test_another_quantization_method(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved("W4"), folder)
    edit_config(folder, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(BackendError, match="it is in the format awq"):
        load(folder, "torch")


def test_a_layer_that_is_tied_to_a_quantized_one(tmp_path):
    groups = {"group_0": weight_scheme(8, True, None, ["Embedding"])}
    modifier = AutoRoundModifier(config_groups=groups, ignore=[], preset="rtn", engine="vllm")
    folder = saved_by(modifier, tiny_llama())
    edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(BackendError, match=r"lm_head\.weight is tied to model\.embed_tokens"):
        load(folder, "torch")


def test_missing_tensors(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved("W4"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    for part in ("packed", "scale", "shape"):
        del tensors[f"{UP}.weight_{part}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks tensors.*{UP}.weight, model.norm.weight"):
        load(folder, "torch")


def test_another_dtype():
    with pytest.raises(BackendError, match="`half` is no dtype to compute in; use one of auto"):
        load(saved("W4"), dtype="half")
    assert load(saved("W4"), dtype="float16").dtype == torch.float16


def test_a_name_that_is_not_there(monkeypatch):
    with pytest.raises(HubError, match="there is no folder `nobody/nothing`"):
        load("nobody/nothing")


def test_it_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load(saved("W4"), "torch").save_pretrained(tmp_path)


def test_a_revision_of_the_hub(tmp_path, monkeypatch):
    """Another branch than the one that is there without asking, from the cache of the hub."""
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    for name, source in (("main", saved("W2")), ("four-bits", saved("W4"))):
        commit = name[0] * 40
        (cache / "refs" / name).write_text(commit)
        shutil.copytree(source, cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, source in ((None, saved("W2")), ("four-bits", saved("W4"))):
        loaded = load("some/model", backend="torch", device="cpu", revision=revision)
        assert torch.equal(logits(loaded), logits(load(source, backend="torch", device="cpu")))
    with pytest.raises(HubError, match="some/model"):
        load("some/model", revision="eight-bits")
