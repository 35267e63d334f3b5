"""What `eval` reads and reports: the features of one side from any kind of file, and remarks on a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from prdc_metrics.feature_files import FEATURE_SUFFIXES, load_features, load_sample_archive, subset
from prdc_metrics.metrics import PRDCResult
from shared_utils.logging import get_logger

logger = get_logger("prdc_metrics")
"""the library's logger: its lines, such as skipped files, also go to the console"""


def side(
    path: Path,
    *,
    embedding: str,
    weights: Path | None,
    seed: int,
    side_length: int | None,
    num_samples: int | None,
    batch_size: int,
    workers: int,
    device: str,
    cache: Path | None,
    skip_broken: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """Features (N, D) of one side, and what a reader must know about their origin.

    Args:
        path: features, an archive of samples, a folder or .zip of images; only features are not embedded.
        embedding: name, as in `extract_features`; likewise the other arguments.
        weights: state dict of a pretrained embedding.
        seed: seed of the subset and of a random embedding.
        side_length: size of the images that the embedding sees; None: its default.
        num_samples: size of the subset; None takes all.
        batch_size: images per forward pass.
        workers: processes that decode images.
        device: device of the embedding.
        cache: folder for features.
        skip_broken: skip broken images.
    """
    archive = load_sample_archive(path)
    if archive is None and path.suffix.lower() in FEATURE_SUFFIXES:
        features = load_features(path)
        chosen = subset(len(features), num_samples, seed)
        if len(chosen) < len(features):
            logger.info("%s: %d of %d rows, drawn with seed %d", path, len(chosen), len(features), seed)
        origin = {"path": str(path), "rows": len(features), "embedding": "as in the file"}
        about = origin_file(path)
        return features[chosen], origin | (json.loads(about.read_text()) if about.is_file() else {})
    from prdc_metrics.embeddings import embedding_provenance  # torchvision takes seconds; features need none of it
    from prdc_metrics.features import extract_features

    features = extract_features(
        path if archive is None else archive,
        embedding,
        weights=weights,
        seed=seed,
        side=side_length,
        num_samples=num_samples,
        sample_seed=seed,
        batch_size=batch_size,
        num_workers=workers if archive is None else 0,
        device=device,
        cache=cache,
        skip_broken=skip_broken,
    )
    provenance = embedding_provenance(embedding, weights=weights, seed=seed, side=side_length)
    return features, {"path": str(path), "embedding": provenance}


def origin_file(features: Path) -> Path:
    """Where `features` says what a feature file was made of and how."""
    return features.with_name(features.name + ".json")


def explain(result: PRDCResult) -> None:
    """Print the expectations next to the values, and warnings, to stderr."""
    for k in result.ks:
        expected = result.expected_coverage[k]
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.values[k].items())
        logger.info("k=%d: %s (identical distributions: density 1, coverage %.4f)", k, shown, expected)
        if expected < 0.95:
            logger.warning(
                "k=%d gives an expected coverage of %.3f even for identical distributions; see prdc-metrics expect",
                k,
                expected,
            )
    if result.num_real != result.num_fake:
        logger.warning("%d reals and %d fakes: compare only with runs of these sizes", result.num_real, result.num_fake)
