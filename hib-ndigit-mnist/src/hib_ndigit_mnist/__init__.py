"""Hedged instance embedding and N-digit MNIST (arXiv 1810.00319).

Names are imported on first use, so the command line starts without torch.
"""

from importlib import import_module

_MODULES = {
    "backbones": ["HedgedModel"],
    "data": ["NDigitMNIST", "read_mnist"],
    "embedding": ["GaussianMixtureEmbedding"],
    "finetune": ["embed_images", "score", "train_on"],
    "hedging": ["MatchProbability"],
    "losses": ["LossOutput", "VIBPairLoss", "contrastive_loss", "soft_contrastive_loss"],
    "mc_dropout": ["DropoutHead", "mismatch_of_passes"],
    "mc_infonce": [
        "MCInfoNCEHead",
        "MCInfoNCELoss",
        "infonce_of_samples",
        "inverse_concentration",
        "von_mises_fisher_samples",
    ],
    "metrics": [
        "accuracy_rejection_area",
        "average_precision",
        "binned_correlation",
        "count_partners",
        "expected_calibration_error",
        "knn_accuracy",
        "knn_predict",
        "ood_auroc",
        "r_auroc",
        "recall_at_1",
    ],
    "models": ["HedgedEncoder", "HedgedHead", "MLPEncoder"],
    "ndigit": ["SplitIndex", "build_ndigit_indices", "standard_indices"],
    "occlusion": ["OcclusionInfo", "RandomOcclusion", "apply_occlusion"],
    "pairs": ["TwoStreamSampler", "verification_pairs"],
    "pfe": ["PFEHead", "PFELoss", "harmonic_mean_sigma", "mutual_likelihood_score"],
    "photos": ["ImageFiles"],
    "quadrature": ["expected_sigmoid"],
    "settings": ["BackboneTraining"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
