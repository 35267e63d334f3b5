"""Precision, recall, density and coverage for generative models (arXiv 2002.09797)."""

from prdc_metrics.expectation import expected_coverage, expected_density, smallest_k
from prdc_metrics.features import extract_features
from prdc_metrics.manifold import RealManifold
from prdc_metrics.metrics import PRDCResult, compute_prdc, knn_radii, prdc
from prdc_metrics.realism import realism
from prdc_metrics.resampling import subsample_intervals
from prdc_metrics.streaming import PRDCMetric

__all__ = [
    "PRDCMetric",
    "PRDCResult",
    "RealManifold",
    "compute_prdc",
    "expected_coverage",
    "expected_density",
    "extract_features",
    "knn_radii",
    "prdc",
    "realism",
    "smallest_k",
    "subsample_intervals",
]
