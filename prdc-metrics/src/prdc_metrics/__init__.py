"""Precision, recall, density and coverage for generative models (arXiv 2002.09797).

Names are imported when they are first used, so that the command line's --help needs no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "PRDCMetric": "streaming",
    "PRDCResult": "metrics",
    "RealManifold": "manifold",
    "compute_prdc": "metrics",
    "expected_coverage": "expectation",
    "expected_density": "expectation",
    "extract_features": "features",
    "knn_radii": "metrics",
    "prdc": "metrics",
    "realism": "realism",
    "smallest_k": "expectation",
    "subsample_intervals": "resampling",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """The public API, by name."""
    if name not in _HOME:
        raise AttributeError(f"module 'prdc_metrics' has no attribute {name!r}")
    return getattr(import_module(f"prdc_metrics.{_HOME[name]}"), name)
