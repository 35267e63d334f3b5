"""How far a network sees, from its layers."""

from __future__ import annotations

from torch import nn

WINDOWS = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.MaxPool3d)


def receptive_field(network: nn.Module, axis: int = -1) -> int:
    """Width of the input that one position of the last feature map depends on.

    Layers count in the order of `modules()`; shortcuts, which see less than the main path, are skipped.

    Args:
        network: convolutions and poolings in sequence, with shortcuts named "shortcut" or "downsample".
        axis: axis of the kernels: -1 for width, 0 for time in 3-D networks.
    """
    field, jump = 1, 1
    for name, module in network.named_modules():
        if isinstance(module, WINDOWS) and "shortcut" not in name and "downsample" not in name:
            kernel, stride = (_along(size, axis) for size in (module.kernel_size, module.stride))
            field, jump = field + (kernel - 1) * jump, jump * stride
    return field


def _along(size: int | tuple[int, ...], axis: int) -> int:
    return size if isinstance(size, int) else size[axis]
