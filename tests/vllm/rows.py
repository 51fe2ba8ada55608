"""The table of checkpoints: one row, one checkpoint, one engine start.

Read in both environments, so it imports neither the package nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_LINEARS = ["Linear"]
ATTENTION = [r"re:.*self_attn\..*_proj$"]
MLP = [r"re:.*mlp\..*_proj$"]


@dataclass(frozen=True)
class Row:
    """
    One checkpoint.

    :param name: the folder it is saved in, and its line in the final table
    :param config_groups: the recipe's field of that name; None leaves the model unquantized
    """

    name: str
    config_groups: dict[str, dict] | None


def group(
    num_bits: int,
    symmetric: bool = True,
    group_size: int | None = 64,
    targets: list[str] = ALL_LINEARS,
) -> dict:
    """
    :param group_size: None for one scale per output channel
    :return: one config group of integer weights
    """
    weights = {
        "num_bits": num_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
    }
    return {"targets": targets, "weights": weights}


ROWS = (
    # What two engines differ by without any quantization: the yardstick for the others.
    Row("unquantized", None),
    Row("w4a16_sym_g64", {"group_0": group(4)}),
    Row("w4a16_asym_g64", {"group_0": group(4, symmetric=False)}),
    Row("w8a16_sym_channel", {"group_0": group(8, group_size=None)}),
    Row("w8a16_sym_g64", {"group_0": group(8)}),
    Row("w2a16_sym_g64", {"group_0": group(2)}),
    Row("w2a16_asym_g64", {"group_0": group(2, symmetric=False)}),
    Row("w3a16_sym_g64", {"group_0": group(3)}),
    Row(
        "mixed_attn4_mlp2_g64",
        {"group_0": group(4, targets=ATTENTION), "group_1": group(2, targets=MLP)},
    ),
)
