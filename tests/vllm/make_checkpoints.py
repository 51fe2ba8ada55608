"""Step 1, in the package's environment: one compressed checkpoint per row, with its reference.

The reference is what Transformers computes from the saved checkpoint, in float32 and in bfloat16:
step 2 asks the engine the same questions. For each row this writes

    OUTPUT/<row>/checkpoint/                    what `save_pretrained` saved, and nothing else
    OUTPUT/<row>/reference.json                 log-probabilities and greedy continuations
    OUTPUT/<row>/weights_<dtype>.safetensors    dequantized weights of two blocks

    python make_checkpoints.py MODEL OUTPUT [--rows NAME ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from llmcompressor.modifiers import Modifier
from rows import ROWS, Row
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from autoround_modifier import AutoRoundModifier, AutoSchemeModifier, oneshot, self_generated

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Germany is",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain, where the air "
    "is thin, it boils at a lower temperature, because the pressure of the air is",
    "def add(a, b):\n    return a + b\n\ndef multiply(a, b):\n    return",
    "Once upon a time there was a fisherman who lived with his wife in a small hut by the sea. "
    "Every morning he went out to fish, and every evening he came",
)
NEW_TOKENS = 16
LAYERS = (0, 15)
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def quantize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Quantize in place, tuned for a few iterations on text of the model's own."""
    dataset = self_generated(model, tokenizer, num_samples=16, max_seq_length=64)
    recipe: list[Modifier] = []
    config_groups = row.config_groups
    if row.avg_bits is not None:
        options = [
            {"name": name, "weights": group["weights"]} for name, group in config_groups.items()
        ]
        recipe.append(AutoSchemeModifier(avg_bits=row.avg_bits, options=options, cache_dir=False))
        config_groups = None
    recipe.append(
        AutoRoundModifier(
            iters=10,
            batch_size=4,
            config_groups=config_groups,
            kv_cache_scheme=row.kv_cache_scheme,
            ignore=["lm_head"],
        )
    )
    oneshot(model=model, tokenizer=tokenizer, dataset=dataset, recipe=recipe)


def save_checkpoint(source: Path, directory: Path, row: Row) -> None:
    """Quantize the model in `source` as the row says and save it compressed."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if row.config_groups is None:
        model.save_pretrained(directory)
    else:
        quantize(model, tokenizer, row)
        model.save_pretrained(directory, save_compressed=True)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def prompt_logprobs(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """
    :return: the log-probability of each token after the first, given the tokens before it
    """
    logits = model(torch.tensor([token_ids])).logits[0]  # [tokens, vocabulary]
    logprobs = logits.float().log_softmax(-1)
    following = torch.tensor(token_ids[1:])
    return logprobs[:-1].gather(1, following[:, None])[:, 0].tolist()


@torch.no_grad()
def greedy(model: PreTrainedModel, token_ids: list[int]) -> tuple[list[int], list[float]]:
    """
    Continue the prompt for `NEW_TOKENS` tokens, past any end-of-text token.

    :return: the tokens, and for each by how much its log-probability beats the second best
    """
    tokens, margins = [], []
    inputs, cache = token_ids, None
    for _ in range(NEW_TOKENS):
        output = model(torch.tensor([inputs]), past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        inputs, cache = tokens[-1:], output.past_key_values
    return tokens, margins


def load(checkpoint: Path, row: Row, dtype: torch.dtype) -> PreTrainedModel:
    """Load a saved checkpoint with Transformers, to compute in `dtype`."""
    if row.runs_in_float32:
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    model(torch.tensor([[0]]))  # the first forward pass decompresses every layer
    return model.to(dtype)


def ask(
    checkpoint: Path, row: Row, dtype: torch.dtype
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """
    Let Transformers compute a saved checkpoint in `dtype`.

    :return: the answers to each prompt, and the dequantized weights of `LAYERS`
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load(checkpoint, row, dtype)
    prompts = []
    for text in PROMPTS:
        token_ids = tokenizer(text)["input_ids"]
        continuation, margins = greedy(model, token_ids)
        prompts.append(
            {
                "token_ids": token_ids,
                "logprobs": prompt_logprobs(model, token_ids),
                "continuation": continuation,
                "margins": margins,
            }
        )

    # The forward passes above made Transformers decompress every layer.
    names = [f"model.layers.{layer}.{name}" for layer in LAYERS for name in PROJECTIONS]
    weights = {name: model.get_submodule(name).weight.detach().contiguous() for name in names}
    return prompts, weights


def write_reference(checkpoint: Path, directory: Path, row: Row) -> None:
    """Write down what Transformers computes from the saved checkpoint, in both dtypes."""
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        answers[name], weights = ask(checkpoint, row, dtype)
        save_file(weights, directory / f"weights_{name}.safetensors")
    (directory / "reference.json").write_text(json.dumps(answers, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a bfloat16 checkpoint of SmolLM2-135M")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    arguments = parser.parse_args()

    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        directory = arguments.output / row.name
        save_checkpoint(arguments.model, directory / "checkpoint", row)
        write_reference(directory / "checkpoint", directory, row)
        print(f"{row.name}: {directory}", flush=True)


if __name__ == "__main__":
    main()
