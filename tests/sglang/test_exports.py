"""Which exported checkpoints SGLang loads, and into what."""

from __future__ import annotations

from pathlib import Path

import pytest
from loader import Refused, load

AWQ, AWQ_MARLIN, GPTQ_MARLIN = "AWQLinearScheme", "AWQMarlinLinearScheme", "GPTQMarlinLinearScheme"
HUMMING = "HummingLinearMethod"
NO_KERNEL = Refused("GPTQ CUDA kernel has been removed")
NO_METHOD = Refused("Invalid quantization method: gptq")
NO_PACKING = Refused("Unsupported packing_format: auto_round,")
NO_CHANNELS = Refused("negative dimension")  # the group size -1 is taken as a number of features
# Export -> what SGLang makes of it at compute capability 7.5, from 8.0 on, and with
# `--quantization humming`
EXPORTS = {
    "awq-w4a16": (AWQ, AWQ_MARLIN, HUMMING),
    "awq-w4a16_asym": (AWQ, AWQ_MARLIN, HUMMING),
    "gptq-w2a16": (NO_METHOD, NO_METHOD, HUMMING),
    "gptq-w2a16_asym": (NO_METHOD, NO_METHOD, HUMMING),
    "gptq-w3a16": (NO_METHOD, NO_METHOD, HUMMING),
    "gptq-w4a16": (NO_METHOD, GPTQ_MARLIN, HUMMING),
    "gptq-w4a16_asym": (NO_METHOD, NO_METHOD, HUMMING),
    "gptq-w8a16": (NO_METHOD, GPTQ_MARLIN, NO_CHANNELS),
    "auto_round-w2a16": (NO_KERNEL, NO_KERNEL, HUMMING),
    "auto_round-w2a16_asym": (NO_PACKING, NO_PACKING, HUMMING),
    "auto_round-w3a16": (NO_KERNEL, NO_KERNEL, HUMMING),
    "auto_round-w4a16": (NO_KERNEL, GPTQ_MARLIN, HUMMING),
    "auto_round-w4a16_asym": (AWQ, AWQ_MARLIN, HUMMING),
    "auto_round-w8a16": (NO_KERNEL, GPTQ_MARLIN, NO_CHANNELS),
}


@pytest.mark.parametrize("capability", [75, 80, 89, 90, 100])
@pytest.mark.parametrize("name", EXPORTS)
def test_sglang_takes_an_export_for_what_it_is(name, capability, checkpoints, table):
    before, since, humming = EXPORTS[name]
    for option, expected in ((None, before if capability < 80 else since), ("humming", humming)):
        folder = checkpoints / "exports" / name
        if isinstance(expected, Refused):
            with pytest.raises(Refused, match=str(expected)):
                load(folder, capability, option)
        else:
            found = {x.scheme or x.method for x in load(folder, capability, option).values()}
            assert found == {expected}
    table[f"exports/{name}"] = ", ".join(
        f"refused ({x})" if isinstance(x, Refused) else x for x in (since, humming)
    )


def test_all_exports_are_in_the_table(checkpoints: Path):
    assert {folder.name for folder in (checkpoints / "exports").iterdir()} == set(EXPORTS)
