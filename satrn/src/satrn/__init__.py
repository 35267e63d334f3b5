"""SATRN: recognition of text of arbitrary shape with two-dimensional self-attention (arXiv 1910.04396).

Names are imported on first use, so the command line's --help does not load torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CHARSET_94": "config",
    "SATRN": "models",
    "AdaptivePositionalEncoding2D": "positional",
    "EncoderOutput": "models",
    "LocalityAwareFeedForward": "laff",
    "Recognition": "decoding",
    "SATRNConfig": "config",
    "Tokenizer": "charset",
    "costs": "complexity",
    "evaluate_rotation": "evaluate",
    "load_mmocr_checkpoint": "pretrained",
    "load_pretrained": "pretrained",
    "mcnemar": "evaluate",
    "preset": "config",
    "read_dictionary": "pretrained",
    "render_words": "data.render",
    "rotate_words": "rotation",
    "sinusoid": "positional",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public API, by name."""
    if name not in _HOME:
        raise AttributeError(f"module 'satrn' has no attribute {name!r}")
    return getattr(import_module(f"satrn.{_HOME[name]}"), name)
