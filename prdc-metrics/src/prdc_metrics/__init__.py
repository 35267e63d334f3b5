"""Precision, recall, density and coverage for generative models (arXiv 2002.09797).

Names are imported on first use, so the command line's --help does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prdc_metrics.expectation import expected_coverage, expected_density, smallest_k
    from prdc_metrics.family import compute_family
    from prdc_metrics.features import extract_features
    from prdc_metrics.manifold import RealManifold
    from prdc_metrics.metrics import PRDCResult, compute_prdc, knn_radii, prdc
    from prdc_metrics.resampling import relabelled_intervals, subsample_intervals
    from prdc_metrics.single_samples import authenticity, nearest_reals, realism
    from prdc_metrics.streaming import PRDCMetric
else:
    _HOME = {
        "PRDCMetric": "streaming",
        "PRDCResult": "metrics",
        "RealManifold": "manifold",
        "authenticity": "single_samples",
        "compute_family": "family",
        "compute_prdc": "metrics",
        "expected_coverage": "expectation",
        "expected_density": "expectation",
        "extract_features": "features",
        "knn_radii": "metrics",
        "nearest_reals": "single_samples",
        "prdc": "metrics",
        "realism": "single_samples",
        "relabelled_intervals": "resampling",
        "smallest_k": "expectation",
        "subsample_intervals": "resampling",
    }

    def __getattr__(name):
        """Import a name of the public API; hidden from type checkers, which would accept any name otherwise."""
        if name not in _HOME:
            raise AttributeError(f"module 'prdc_metrics' has no attribute {name!r}")
        return getattr(import_module(f"prdc_metrics.{_HOME[name]}"), name)

    def __dir__():
        return sorted({*globals(), *_HOME})


__all__ = [
    "PRDCMetric",
    "PRDCResult",
    "RealManifold",
    "authenticity",
    "compute_family",
    "compute_prdc",
    "expected_coverage",
    "expected_density",
    "extract_features",
    "knn_radii",
    "nearest_reals",
    "prdc",
    "realism",
    "relabelled_intervals",
    "smallest_k",
    "subsample_intervals",
]
