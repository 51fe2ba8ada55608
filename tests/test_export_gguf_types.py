"""Every type of GGUF holds the numbers of its layers, as gguf-py reads them; or it is refused."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import quantize, tiny_llama, tiny_tokenizer, weight_scheme
from test_export import ATTENTION, MLP, changed, spec, tuned
from test_export_gguf import (
    CONVERTER,
    NAMES,
    dequantized,
    in_process,  # noqa: F401
    permuted,
    q2_0,
    weights,
)
from tiny_mixtures import tiny_mixture

from autoround_modifier import (
    AutoRoundModifier,
    ExportError,
    export,
    load_recipe,
    quantized_weights,
)
from autoround_modifier.exports.gguf_blocks import pack_integers
from autoround_modifier.exports.gguf_rounding import round_q6_k
from autoround_modifier.exports.gguf_types import BLOCK_TYPES
from autoround_modifier.exports.integer_layers import IntegerLayer

pytestmark = pytest.mark.usefixtures("in_process")
BITS = {"q2_0": 2, "tq2_0": 2, "q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def types(reader: gguf.GGUFReader) -> dict[str, int]:
    return {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}


def exported(source: Path, kind: str, folder: Path, **options):
    """:return: what `export` says, weights by name in GGUF, types by name"""
    said = export(source, f"gguf:{kind}", folder / "model.gguf", llama_cpp=CONVERTER, **options)
    found, reader = weights(folder / "model.gguf")
    return said, found, types(reader)


def in_gguf(name: str) -> str:
    _, _, number, inside = name.split(".", 3)
    return f"blk.{number}.{NAMES[inside]}.weight"


@pytest.mark.parametrize("kind", BITS)
def test_every_integer_of_a_block(kind):
    """Each number that the type holds, with a negative scale and with a positive one."""
    block, bits = BLOCK_TYPES[kind], BITS[kind]
    codes = (torch.arange(2 * 256).reshape(2, 256) * 3 % 2**bits).to(torch.uint8)
    layer = IntegerLayer(
        spec(out_features=2, in_features=256, num_bits=bits, group_size=-1),
        codes,
        torch.tensor([[0.5], [-0.25]], dtype=torch.bfloat16),
        torch.full((2, 1), 2 ** (bits - 1), dtype=torch.uint8),
    )
    packed = pack_integers(layer, block)
    assert packed.shape == (2, 256 // block.block * block.size)
    if kind == "q2_0":
        found = q2_0(packed, 256)
    else:
        found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(block.number))
    expected = torch.tensor([[0.5], [-0.25]]) * (codes.float() - 2 ** (bits - 1))
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_sizes_are_those_of_gguf(kind):
    block = BLOCK_TYPES[kind]
    if block.number != 42:
        assert gguf.GGML_QUANT_SIZES[block.number] == (block.block, block.size)
        assert gguf.GGMLQuantizationType(block.number).name.lower() == kind
        name = gguf.LlamaFileType(block.file_type).name.removesuffix("_S")  # of a mixture
        assert "MXFP4" in name or name.endswith(kind.upper())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("q4_1", (3, False, 32)), ("q4_1", (4, True, 32)), ("q5_1", (3, False, None))],
)
def test_types_with_a_minimum(kind, scheme, tmp_path):
    source = tuned(scheme).folder
    _, found, numbers = exported(source, kind, tmp_path)
    for name, weight in dequantized(source).items():
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(name.split(".", 3)[3])
        weight = weight if heads is None else permuted(weight, heads)
        assert np.array_equal(found[in_gguf(name)], weight.numpy()), name
        assert numbers[in_gguf(name)] == BLOCK_TYPES[kind].number


def test_minima_that_float16_would_round(tmp_path):
    """Products of a scale of eight digits and a zero point may have twelve digits."""

    def change(tensors, config):
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name].fill_(255 / 128)

    source = changed(tuned((4, False, 32)).folder, tmp_path / "source", change)
    with pytest.raises(ExportError, match=r"(?s)exported to.*gguf:q5_0.*minima") as refused:
        exported(source, "q4_1", tmp_path)
    share = re.search(r"not exact in float16, in ([\d.]+) % of the groups", str(refused.value))
    assert share is not None
    assert 0 < float(share[1]) < 100
    _, _, numbers = exported(source, "auto", tmp_path)
    assert numbers["blk.0.ffn_down.weight"] == BLOCK_TYPES["q5_0"].number


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    recipe = load_recipe("w2a16_g256_autoround", iters=1)
    model = quantize(tiny_llama(num_layers=1, hidden_size=256), recipe)
    return saved(model, tmp_path_factory.mktemp("wide"))


def test_groups_of_256_in_two_bits(wide, tmp_path):
    _, found, numbers = exported(wide, "tq2_0", tmp_path)
    down = "model.layers.0.mlp.down_proj"
    assert np.array_equal(found[in_gguf(down)], dequantized(wide)[down].numpy())
    assert numbers[in_gguf(down)] == gguf.GGMLQuantizationType.TQ2_0


@pytest.fixture(scope="module")
def mixed() -> Path:
    return tuned((2, True, 64, MLP), (4, True, 32, ATTENTION)).folder


@pytest.mark.parametrize(
    ("kind", "of_mlp", "of_attention", "note"),
    [
        ("auto", "q2_0", "q4_0", "4 in q4_0, 3 in q2_0"),
        ("q2_0", "q2_0", "q4_0", "q2_0 does not hold 4 of 7 layers .* in q4_0: .*q_proj"),
        ("q4_1", "q4_1", "q4_1", None),
    ],
)
def test_layers_that_the_named_type_does_not_hold(
    mixed, kind, of_mlp, of_attention, note, tmp_path
):
    said, found, numbers = exported(mixed, kind, tmp_path)
    assert said.format == f"gguf:{kind}"
    down, o = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
    for name, expected in ((down, of_mlp), (o, of_attention)):
        assert np.array_equal(found[in_gguf(name)], dequantized(mixed)[name].numpy())
        assert numbers[in_gguf(name)] == BLOCK_TYPES[expected].number
    notes = [text for text in said.notes if "embeddings" not in text]
    assert (len(notes) == 0) if note is None else re.search(note, notes[0])


def test_a_type_that_holds_no_layer(mixed, tmp_path):
    with pytest.raises(ExportError, match=r"(?s)`gguf:mxfp4` cannot hold.*holds no integers"):
        exported(mixed, "mxfp4", tmp_path)
    with pytest.raises(ExportError, match=r"(?s)`gguf:auto` cannot hold.*exported to gptq"):
        exported(tuned((8, False, 32)).folder, "auto", tmp_path)


@pytest.fixture(scope="module", params=["MXFP4A16", "NVFP4A16"])
def floats(request, tmp_path_factory) -> Path:
    modifier = AutoRoundModifier(scheme=request.param, ignore=["lm_head"], iters=1)
    folder = tmp_path_factory.mktemp("floats")
    return saved(quantize(tiny_llama(num_layers=1), modifier), folder)


@pytest.mark.parametrize("named", [True, False])
def test_floating_point_numbers(floats, named, tmp_path):
    first = next(iter(quantized_weights(floats).values()))
    kind = "mxfp4" if first.global_scale is None else "nvfp4"
    _, found, numbers = exported(floats, kind if named else "auto", tmp_path)
    for name, weight in quantized_weights(floats).items():
        size, scale = weight.grouping.group_size, weight.scale.double()
        expected = weight.values.double() * scale.repeat_interleave(size, 1)
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(name.split(".", 3)[3])
        expected = expected if heads is None else permuted(expected, heads)
        known = in_gguf(name)
        assert np.array_equal(found[known].astype(np.float64), expected.numpy()), name
        assert numbers[known] == BLOCK_TYPES[kind].number
        if kind == "nvfp4":
            factor = found[known.replace("weight", "scale")]
            assert factor.shape == (1,)
            assert factor[0] == np.float32(1 / weight.global_scale.item())


def test_floats_elsewhere(floats, tmp_path):
    with pytest.raises(ExportError, match=r"no integer format.*gguf:auto"):
        export(floats, "gptq", tmp_path / "out")
    with pytest.raises(ExportError, match="alone holds it"):
        exported(floats, "q4_0", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("f16", 1), ("bf16", 30), ("q8_0", 8), ("q6_k", 8), (None, 30)]
)
def test_embeddings_and_head(name, kind, tmp_path):
    """Rows of 64 are no multiple of the block of Q6_K."""
    source = tuned((4, True, 32)).folder
    said, found, numbers = exported(source, "q4_0", tmp_path, embeddings=name)
    from safetensors.torch import load_file

    saved_tensors = load_file(source / "model.safetensors")
    for known, saved_name in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        assert numbers[f"{known}.weight"] == kind
        expected = saved_tensors[f"{saved_name}.weight"].float().numpy()
        error = np.abs(found[f"{known}.weight"] - expected).max()
        assert error <= (np.abs(expected).max() / 250 if kind == 8 else 0)
    about = [note for note in said.notes if "q6_k" in note or "embeddings" in note]
    assert len(about) == (name in ("q6_k", None))


def test_tied_embeddings_are_rounded_once(tmp_path):
    _, _, numbers = exported(
        tuned((4, True, 32), tied=True).folder, "q4_0", tmp_path, embeddings="q8_0"
    )
    assert numbers["token_embd.weight"] == 8
    assert "output.weight" not in numbers


def test_an_unknown_type_of_embeddings(tmp_path):
    source = tuned((4, True, 32)).folder
    with pytest.raises(ExportError, match=r"`q3`; use one of f16, bf16, q8_0, q6_k"):
        exported(source, "q4_0", tmp_path, embeddings="q3")
    with pytest.raises(ExportError, match="is for GGUF"):
        export(source, "gptq", tmp_path / "out", embeddings="q8_0")


def test_rounding_to_q6_k():
    weight = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    weight[0, :256] = 0
    weight[1, 256:272] = 0
    packed = round_q6_k(weight)
    assert packed.shape == (5, 2 * 210)
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q6_K)
    assert not found[0, :256].any()
    largest = np.abs(weight).reshape(5, 32, 16).max(-1).repeat(16, 1)
    # half a step, what the largest positive number loses, and what rounding of scales adds
    assert (np.abs(found - weight) <= largest * 0.035 + 0.02).all()
    assert np.square(found - weight).mean() / np.square(weight).mean() < 1e-3


def test_quantized_embeddings(tmp_path):
    modifier = AutoRoundModifier(
        config_groups={
            "linear": weight_scheme(4, True, 32),
            "embedding": weight_scheme(8, True, 32, ["Embedding"]),
        },
        ignore=["lm_head"],
        iters=1,
        engine="vllm",
    )
    source = saved(quantize(tiny_llama(num_layers=1), modifier), tmp_path / "source")
    said, found, numbers = exported(source, "q4_0", tmp_path, embeddings="q8_0")
    assert numbers["token_embd.weight"] == numbers["output.weight"] == 8
    expected = dequantized(source)["model.embed_tokens"]
    assert np.array_equal(found["token_embd.weight"], expected.numpy())
    assert "they are in q8_0: model.embed_tokens" in said.notes[0]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """Experts of the first block in 2 bits, all other layers in 4."""
    folder = tmp_path_factory.mktemp("mixture")
    groups = {
        "first": weight_scheme(2, True, 64, [r"re:.*layers\.0\.mlp\.experts.*_proj$"]),
        "attention": weight_scheme(
            4, True, 64, [r"re:.*self_attn.*_proj$", r"re:.*1\.mlp\.experts.*_proj$"]
        ),
    }
    modifier = AutoRoundModifier(
        config_groups=groups, ignore=["lm_head", r"re:.*gate$"], iters=0, engine="vllm"
    )
    return saved(quantize(tiny_mixture(folder / "dense"), modifier), folder / "quantized")


def test_experts(mixture, tmp_path):
    _, found, numbers = exported(mixture, "q2_0", tmp_path)
    layers = dequantized(mixture)
    for number, kind in ((0, "q2_0"), (1, "q4_0")):
        for inside in ("gate", "up", "down"):
            name = f"blk.{number}.ffn_{inside}_exps.weight"
            before = f"model.layers.{number}.mlp.experts"
            stack = torch.stack([layers[f"{before}.{i}.{inside}_proj"] for i in range(4)])
            assert np.array_equal(found[name].reshape(stack.shape), stack.numpy())
            assert numbers[name] == BLOCK_TYPES[kind].number
    assert np.array_equal(
        found["blk.1.attn_q.weight"], layers["model.layers.1.self_attn.q_proj"].numpy()
    )


def test_experts_that_are_not_all_quantized(mixture, tmp_path):
    name = "model.layers.0.mlp.experts.3.up_proj"

    def change(tensors, config):
        weight = dequantized(mixture)[name]
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16)

    source = changed(mixture, tmp_path / "source", change)
    said = r"ffn_up_exps.* holds 4 experts in one type, and 3 of them are quantized: .*experts\.0"
    with pytest.raises(ExportError, match=said):
        exported(source, "q2_0", tmp_path)
