"""Lets torchvision be imported without its compiled operators: a CPU torch cannot load them.

Transformers' image processors use torchvision's tensor functions only. The import declares what
torchvision's operators return, so they must exist; none is called. Python imports this file when it
starts, in vLLM's processes too, where the folder is on `PYTHONPATH`.
"""

from importlib.util import find_spec

OPERATORS = (
    *("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"),
    *("_roi_align_backward", "_roi_pool_backward"),
    *("_ps_roi_align_backward", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward", "box_iou_rotated", "_cuda_version"),
)

if find_spec("torchvision") is not None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor x) -> Tensor")
