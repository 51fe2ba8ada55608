"""The table of checkpoints: one row, one tuned model, exported to every format that holds it.

Read in all environments, so it imports neither the package nor an engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ALL_LINEARS = ("Linear",)
ATTENTION, MLP = (r"re:.*self_attn\..*_proj$",), (r"re:.*mlp\..*_proj$",)


@dataclass(frozen=True)
class Row:
    """
    One checkpoint of a tiny Llama.

    :param name: the folder that it is saved in
    :param schemes: bits, symmetric, group size (None for one scale per channel), targets
    :param ignored: targets that stay unquantized, beside the head
    :param preset: name of a scheme, in place of ``schemes``: of a type of GGUF that has the name of
        the row and holds no integers of compressed-tensors
    """

    name: str
    schemes: tuple[tuple[int, bool, int | None, tuple[str, ...]], ...] = ()
    ignored: tuple[str, ...] = field(default=())
    preset: str = ""


def _row(bits: int, symmetric: bool, group_size: int | None) -> Row:
    size = "channel" if group_size is None else f"g{group_size}"
    name = f"w{bits}{'' if symmetric else '_asym'}_{size}"
    return Row(name, ((bits, symmetric, group_size, ALL_LINEARS),))


ROWS = [
    *(_row(bits, symmetric, 64) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    *(_row(bits, True, 32) for bits in (2, 4)),
    _row(4, False, 128),
    _row(2, True, 256),
    *(_row(bits, True, None) for bits in (2, 4, 8)),
    _row(4, False, None),
    Row("w4_w2_mixed", ((4, True, 64, ATTENTION), (2, True, 64, MLP))),
    Row("w4_w2_mixed_asym", ((4, False, 64, ATTENTION), (2, False, 32, MLP))),
    Row("w4_groups_mixed", ((4, True, 64, ATTENTION), (4, True, 32, MLP))),
    Row("w4_without_down", ((4, True, 64, ALL_LINEARS),), (r"re:.*mlp\.down_proj$",)),
    Row("w4_without_block_0", ((4, True, 64, ALL_LINEARS),), (r"re:model\.layers\.0\..*",)),
    Row("mxfp4", preset="MXFP4A16"),
    Row("nvfp4", preset="NVFP4A16"),
    *(
        Row(name, preset=f"gguf:{name}")
        for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q2_k_s", "q3_k_m", "q4_k_m")
    ),
]
