"""Let torchvision be imported where its compiled operators do not fit the installed torch.

nnU-Net needs torchvision only because timm imports it. torchvision of PyPI is built for another
torch than the CPU build, and its import fails where it describes operators that are missing. So
they are declared here, without an implementation. Python imports this file by its name when the
folder is in PYTHONPATH; `example.py` adds it only if torchvision cannot be imported.
"""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
