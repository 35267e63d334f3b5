"""Everything that a run may set, and the two papers' settings for each data set."""

from __future__ import annotations

from dataclasses import dataclass, replace

SUITES = (
    "clean", "calibration", "temperature", "occlusion", "fgsm", "pgd", "autoattack", "corruption", "ood", "odin",
    "mahalanobis", "in_between", "localization",
)  # fmt: skip
DETECTION = {"ood", "odin", "mahalanobis"}  # suites that need out-of-distribution inputs
DATASETS = ("twowave", "digits", "cifar10", "cifar100", "cifar10-jpeg", "imagenet", "cub", "image-folder")
CHOICES = {
    "dataset": DATASETS,
    "mix": ("none", "cutmix", "mixup", "mixup+cutmix", "manifold-mixup", "feature-cutmix"),
    "branch": ("none", "stochdepth", "shakedrop", "dropblock"),
    "adversarial": ("none", "training", "logit-pairing"),
    "outliers": ("none", "svhn", "gan", "uniform"),
    "augment": ("none", "crop-flip", "imagenet", "wsol"),
    "optimizer": ("sgd", "adam"),
    "task": ("classification", "properties", "detection", "captioning"),
    "detector": ("faster-rcnn", "ssd"),
}
MIXED_IN_THE_NETWORK = ("manifold-mixup", "feature-cutmix")


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the paper's baseline on CIFAR-100."""

    task: str = "classification"
    """classification; properties (Table 2) and detection (Table 10) measure something else; no captioning"""
    dataset: str = "cifar100"
    """twowave, digits, cifar10, cifar100, cifar10-jpeg, imagenet, cub or image-folder"""
    network: str = "pyramidnet200-240"
    """one of `cutmix_robustness.networks.NETWORKS`"""
    mix: str = "none"
    """none, cutmix, mixup, mixup+cutmix, manifold-mixup or feature-cutmix"""
    alpha: float = 1.0
    """lam ~ Beta(alpha, alpha)"""
    prob: float = 1.0
    """probability of mixing"""
    mode: str = "batch"
    """one lam and box per batch, or per sample"""
    partner: str = "permute"
    """permute, roll or flip"""
    rounding: str = "reference"
    """rounding of the box: reference or exact"""
    correct_lam: bool = True
    """take the label weight from the clipped box"""
    variant: str = "standard"
    """variant of CutMix (Table 8): standard, center_gaussian, fixed, scheduled, one_hot or complete"""
    fixed_size: int = 16
    """side of the box of variant fixed, in pixels"""
    mix_point: int = -1
    """manifold-mixup, feature-cutmix: always mix at this point (0: image); -1: a random one per batch"""
    cutout: int = 0
    """side of Cutout's square in pixels; 0: none"""
    label_smoothing: float = 0.0
    """eps: each target becomes (1 - eps) y + eps / K"""
    branch: str = "none"
    """regularizer of residual branches: none, stochdepth, shakedrop or dropblock"""
    branch_rate: float = 0.25
    """drop rate of the last branch (linear decay); dropblock: share of units dropped"""
    adversarial: str = "none"
    """none, training (clean and FGSM images 1:1) or logit-pairing (the same with paired logits)"""
    pairing_weight: float = 0.5
    """weight of the squared distance of paired logits"""
    gaussian_noise: bool = False
    """add CIFAR-C's Gaussian noise to training images, severity 1 .. 5 at random"""
    outliers: str = "none"
    """none, svhn, gan or uniform: such images are added to the batch 1:1, with the uniform label"""
    train_images: int = 0
    """number of training images, drawn by the seed, equally many of each class (CIFAR); 0: all"""
    validation_images: int = 0
    """number of training images, drawn by the seed with class shares kept, held out to choose an epoch; 0: none"""
    augment: str = "crop-flip"
    """none, crop-flip (pad 4), imagenet (resized crop, flip, colour) or wsol (resize 256, crop 224, flip)"""
    epochs: int = 300
    """passes over the training set"""
    batch_size: int = 64
    """images per step over all ranks; an incomplete last batch is dropped"""
    optimizer: str = "sgd"
    """sgd (Nesterov 0.9) or adam"""
    lr: float = 0.25
    """learning rate, x 0.1 at the milestones"""
    head_lr: float = 0.0
    """learning rate of the linear layer if it differs; 0: the same"""
    weight_decay: float = 1e-4
    """weight decay of all parameters"""
    milestones: tuple[int, ...] = (150, 225)
    """epochs (task detection: steps) at which the learning rate drops"""
    eval_every: int = 1
    """epochs between test errors; the best is reported as well as the last; 0: only the last"""
    initial_weights: str = ""
    """checkpoint of `train` below the data root to start the network from (localization, detection)"""
    suites: tuple[str, ...] = ("clean", "calibration", "occlusion", "fgsm", "pgd", "corruption", "ood", "in_between")
    """suites that are run after the last epoch"""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """severities of the corruptions"""
    probe_images: int = 0
    """number of test images, drawn by the seed, for occlusion, PGD, corruptions and in-between pairs; 0: all"""
    detector: str = "faster-rcnn"
    """task detection: faster-rcnn or ssd"""
    detector_side: int = 600
    """shorter side of Faster R-CNN's images, in pixels"""
    steps: int = 120_000
    """task detection: iterations"""

    def __post_init__(self) -> None:
        for name in ("milestones", "suites", "severities"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for suite in self.suites:
            if suite not in SUITES:
                raise ValueError(f"suites must be among {', '.join(SUITES)}, got {suite!r}")
        if self.task == "classification":
            self._check_suites()
        if not self.alpha > 0 or not 0 <= self.prob <= 1 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                "alpha must be above 0, prob in [0, 1] and label_smoothing in [0, 1), got "
                f"{self.alpha}, {self.prob} and {self.label_smoothing}"
            )
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0 or self.cutout < 0:
            raise ValueError("epochs and batch_size must be at least 1, lr above 0 and cutout at least 0")
        if any(severity not in (1, 2, 3, 4, 5) for severity in self.severities) or not self.severities:
            raise ValueError(f"severities must be among 1 .. 5, got {self.severities}")
        if self.mix in MIXED_IN_THE_NETWORK and (self.adversarial != "none" or self.outliers != "none"):
            raise ValueError(f"mix {self.mix} cannot be combined with adversarial training or outliers")

    def _check_suites(self) -> None:
        """Refuse a suite that the data set cannot serve before the training, not after it."""
        for suite in self.suites:
            if suite in DETECTION and self.dataset in ("digits", "imagenet", "cub", "image-folder"):
                raise ValueError(
                    f"suite {suite} needs out-of-distribution inputs, {self.dataset} has none; leave it out"
                )
            if suite == "localization" and self.dataset not in ("digits", "imagenet", "cub"):
                raise ValueError(f"suite localization needs boxes, which {self.dataset} lacks; leave it out")


_CIFAR100 = Settings()
_TWOWAVE = Settings(
    dataset="twowave", network="small", augment="none", epochs=60, lr=0.1, weight_decay=5e-4, milestones=(30, 45),
    eval_every=5, fixed_size=8, probe_images=300, severities=(1, 3, 5),
)  # fmt: skip
_IMAGENET = Settings(
    dataset="imagenet", network="resnet50", augment="imagenet", batch_size=256, lr=0.1, milestones=(75, 150, 225),
    suites=("clean", "calibration", "occlusion", "fgsm", "pgd", "corruption", "in_between"),
)  # fmt: skip
_JPEG = Settings(
    dataset="cifar10-jpeg", network="wrn16-2", epochs=30, batch_size=128, lr=0.1, weight_decay=5e-4,
    milestones=(15, 22), eval_every=5, probe_images=1000, severities=(3,),
)  # fmt: skip
_JPEG_SHORT = replace(
    _JPEG, network="small-wide", train_images=1000, epochs=150, batch_size=64, milestones=(75, 112), eval_every=50,
    severities=(1, 3, 5),
)  # fmt: skip
PRESETS = {
    "twowave": _TWOWAVE,
    "twowave-cutmix": replace(_TWOWAVE, mix="cutmix"),
    "cifar10-jpeg": _JPEG,
    "cifar10-jpeg-cutmix": replace(_JPEG, mix="cutmix", prob=0.5),
    "cifar10-jpeg-short": _JPEG_SHORT,
    "cifar100": _CIFAR100,
    "cifar100-cutmix": replace(_CIFAR100, mix="cutmix", prob=0.5),
    "cifar10": replace(_CIFAR100, dataset="cifar10"),
    "cifar10-cutmix": replace(_CIFAR100, dataset="cifar10", mix="cutmix", prob=0.5),
    "cifar100-short": replace(
        _CIFAR100, network="wrn28-10", epochs=200, lr=0.1, weight_decay=5e-4, milestones=(100, 150)
    ),
    "resnet110-cutmix": replace(_CIFAR100, network="resnet110", lr=0.1, mix="cutmix"),
    "imagenet": _IMAGENET,
    "imagenet-cutmix": replace(_IMAGENET, mix="cutmix"),
    "image-folder": replace(_IMAGENET, dataset="image-folder", suites=("clean", "calibration", "fgsm", "pgd")),
}
