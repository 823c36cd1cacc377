"""Lets torchvision from PyPI be imported beside the CPU build of torch, in tests.

Its operators do not load there, and two that it registers shapes for have to exist. Preparing
images does not use them. Users take torchvision from where their CPU build of torch comes from.
"""

import torch

for name in ("nms", "qnms"):
    torch.library.define(
        f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
