"""Evaluation of weakly supervised object localization (arXiv 2001.07437): metrics, methods, protocol.

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "BoxLocalization": "localization",
    "BoxResult": "localization",
    "Interval": "intervals",
    "Metadata": "metadata",
    "Network": "models",
    "PixelAP": "pixels",
    "PixelResult": "pixels",
    "ScoreMaps": "scoremaps",
    "WSOLDataset": "data",
    "best_iou_per_threshold": "sweep",
    "bootstrap": "intervals",
    "box_iou_inclusive": "boxes",
    "boxes_at_threshold": "sweep",
    "build_model": "models",
    "center_gaussian": "scoremaps",
    "merge_masks": "pixels",
    "paired": "intervals",
    "read_metadata": "metadata",
    "resize_boxes": "boxes",
    "resize_normalize": "scoremaps",
    "write_metadata": "metadata",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public API, by name."""
    if name not in _HOME:
        raise AttributeError(f"module 'wsol_eval' has no attribute {name!r}")
    return getattr(import_module(f"wsol_eval.{_HOME[name]}"), name)
