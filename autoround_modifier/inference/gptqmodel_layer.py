"""
GPTQModel's kernels.

They need no file of their own: ``qweight`` is ``weight_packed`` transposed, bit for bit, where an
integer has 2, 3, 4 or 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autoround_modifier.errors import BackendError
from autoround_modifier.exports.bit_stream import pack_rows
from autoround_modifier.inference.packed_weight import PackedSpec, PackedWeight

__all__ = ["finish_gptqmodel", "gptqmodel_linear"]

# Of GPTQModel 7.7. On CPUs its `transform_cpu` puts zeros in the place of zero points, and
# `_weight_int4pack_mm_for_cpu` of PyTorch refuses other features per scale in the forward pass
FUSED = "TorchFusedLinear"
FUSED_FEATURES_PER_SCALE = (32, 64, 128, 256)


def gptqmodel_linear(weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """
    :param weight: on the device where the layer computes
    :param bias: (out_features,), or None
    :param dtype: to compute in: float16 or bfloat16
    :return: a layer of GPTQModel, which is to be finished with the whole model
    :raises BackendError: if GPTQModel has no kernel for it on that device
    """
    from gptqmodel.quantization import FORMAT, METHOD
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.importer import select_quant_linear

    spec = weight.spec
    # The first version stores a zero point less one, and cannot hold 0.
    format = FORMAT.GPTQ if spec.symmetric else FORMAT.GPTQ_V2
    fields: dict[str, Any] = {
        "bits": spec.num_bits,
        "group_size": spec.group_size,
        "desc_act": False,
        "sym": spec.symmetric,
        "pack_dtype": torch.int32,
    }
    try:
        kinds = select_quant_linear(
            **fields,
            device=weight.packed.device,
            backend=BACKEND.AUTO,
            format=format,
            quant_method=METHOD.GPTQ,
            pack=False,
            dtype=dtype,
            multi_select=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise BackendError(f"GPTQModel has no kernel for {spec.label}: {error}") from error
    reasons = []
    for kind in kinds:
        if kind.__name__ == FUSED and not _fused_runs(spec, weight.packed.device):
            reasons.append(f"{FUSED}: fails with zero points, or with these features per scale")
            continue
        try:
            layer = kind(
                **fields,
                in_features=spec.in_features,
                out_features=spec.out_features,
                bias=bias is not None,
                format=format,
                backend=kind.SUPPORTS_BACKENDS[0],
                dtype=dtype,
                register_buffers=True,
                name=spec.name,
            )
        except (ValueError, NotImplementedError) as error:
            reasons.append(f"{kind.__name__}: {error}")
            continue
        second = format == FORMAT.GPTQ_V2 or kind.REQUIRES_FORMAT_V2
        _fill(layer, weight, bias, dtype, second)
        return layer
    raise BackendError(f"GPTQModel has no kernel for {spec.name}: {'; '.join(reasons)}")


def _fused_runs(spec: PackedSpec, device: torch.device) -> bool:
    """:return: whether `FUSED` computes what the weight says"""
    if not spec.symmetric:
        return False
    return device.type != "cpu" or spec.features_per_scale in FUSED_FEATURES_PER_SCALE


def _fill(
    layer: Any, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, second: bool
) -> None:
    """:param second: whether zero points are stored as they are, and not less one"""
    spec, device = weight.spec, weight.packed.device
    zero_point = weight.zero_point
    if zero_point is None:
        middle = 2 ** (spec.num_bits - 1)
        zero_point = torch.full(weight.scale.shape, middle, dtype=torch.int16)
    stored = (zero_point.T.cpu() - (0 if second else 1)).to(torch.uint8).contiguous()
    parts = {
        "qweight": weight.packed.T.contiguous(),
        "qzeros": pack_rows(stored, spec.num_bits).to(device),
        "scales": weight.scale.T.to(dtype).contiguous(),
        "g_idx": torch.arange(spec.in_features, dtype=torch.int32, device=device)
        // spec.features_per_scale,
    }
    if bias is not None:
        parts["bias"] = bias.detach().to(dtype)
    for name, tensor in parts.items():
        if getattr(layer, name, None) is not None:
            layer.register_buffer(name, tensor)
    layer.qzero_format(format=2 if second else 1)


def finish_gptqmodel(model: nn.Module) -> None:
    """Let the layers of GPTQModel in a model prepare themselves, which is done once for all."""
    from gptqmodel.utils.model import hf_gptqmodel_post_init

    hf_gptqmodel_post_init(model, use_act_order=False)
