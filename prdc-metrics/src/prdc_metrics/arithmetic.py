"""Full float32 precision in matrix products and convolutions, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(tf32: bool = False) -> Iterator[None]:
    """float32 products and convolutions in full float32, or (tf32) CUDA products in tf32; restores the settings.

    Since PyTorch 2.9 each backend has `fp32_precision`, read and set here; PyTorch raises if the older switches are
    read after the newer were set. A switch that is already right is left alone, and one that only inherited its
    parent's value inherits it again at the end.
    """
    backends: Any = torch.backends  # its stubs lack fp32_precision
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        matmul, convolution = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.allow_tf32 = convolution
        return
    switches = [(backends.cuda.matmul, backends), (backends.cudnn.conv, backends.cudnn)]
    switches += [(backends.mkldnn.matmul, backends.mkldnn), (backends.mkldnn.conv, backends.mkldnn)]
    before = []
    for owner, parent in switches:
        wanted = "tf32" if tf32 and owner is backends.cuda.matmul else "ieee"
        value = owner.fp32_precision
        if value not in ((wanted,) if wanted == "tf32" else (wanted, "none")):
            before.append((owner, "none" if value == parent.fp32_precision else value))
            owner.fp32_precision = wanted
    try:
        yield
    finally:
        for owner, value in before:
            owner.fp32_precision = value
