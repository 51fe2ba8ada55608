"""
The vocabulary of a GGUF file. llama.cpp's converter takes a byte-level vocabulary whose
``tokenizer.json`` says ``byte_fallback: true`` for one of SentencePiece; llama.cpp loads such a
file and aborts on the first text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoround_modifier.checkpoints.saved_files import read_json
from autoround_modifier.errors import ExportError

__all__ = ["VOCABULARY_KEYS", "check_vocabulary", "vocabulary_fields"]

VOCABULARY_KEYS = "tokenizer."
EMBEDDINGS = "token_embd.weight"
MODEL, TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.tokens"


def vocabulary_fields(template: Any, vocabulary: Path | None) -> dict[str, Any]:
    """
    :param template: reader of the converter's file
    :param vocabulary: GGUF file of the same model; None for the template itself
    :return: the fields about its vocabulary, by key
    :raises ExportError: if the file cannot be read, or has another number of tokens than the model
        has embeddings
    """
    import gguf

    reader = template
    if vocabulary is not None:
        try:
            reader = gguf.GGUFReader(vocabulary)
        except (OSError, ValueError) as error:
            raise ExportError(f"{vocabulary} cannot be read as GGUF: {error}") from error
        count = len(reader.fields[TOKENS].data) if TOKENS in reader.fields else 0
        rows = next(len(x.data) for x in template.tensors if x.name == EMBEDDINGS)
        if count != rows:
            raise ExportError(
                f"{vocabulary} has {count} tokens, and the model {rows}; name a GGUF file of the "
                "same model"
            )
    return {key: field for key, field in reader.fields.items() if key.startswith(VOCABULARY_KEYS)}


def check_vocabulary(fields: dict[str, Any], folder: Path) -> None:
    """
    :param fields: see `vocabulary_fields`
    :param folder: of the checkpoint
    :raises ExportError: if a byte-level vocabulary was taken for one of SentencePiece
    """
    path = folder / "tokenizer.json"
    if MODEL not in fields or fields[MODEL].contents() != "llama" or not path.is_file():
        return
    if _is_byte_level(read_json(path).get("pre_tokenizer")):
        raise ExportError(
            f"llama.cpp's converter takes the byte-level vocabulary of {path} for one of "
            "SentencePiece, and llama.cpp would abort on the first text. Put the tokenizer files "
            "of the original model into the checkpoint, or name a GGUF file of the same model "
            "whose vocabulary is used: `vocabulary` (`--vocabulary`)"
        )


def _is_byte_level(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    return step.get("type") == "ByteLevel" or any(
        _is_byte_level(inner) for inner in step.get("pretokenizers") or ()
    )
