"""Everything that a run may set, and the settings of the paper and of its released code for each data set."""

from __future__ import annotations

from dataclasses import dataclass, replace

SEES_BIAS = ("balanced", "biascon", "dfr")
METHODS = ("vanilla", "biased", "rebias", "rubi", "learnedmixin", "hex", "lff", "jtt", *SEES_BIAS)
DATASETS = ("toy", "digits", "mnist", "imagenet9", "kinetics10", "csv", "waterbirds", "celeba", "bffhq")
CHOICES = {
    "method": METHODS,
    "dataset": DATASETS,
    "schedule": ("step", "cosine", "constant"),
    "order": ("f-first", "g-first"),
    "feature": ("pooled", "logits"),
    "sigma": ("fixed", "median", "dimension"),
    "sigma_every": ("epoch", "batch"),
    "estimator": ("unbiased", "biased"),
    "penalty": ("hsic", "hsic-shuffled", "feature-norm"),
    "head": ("trained", "frozen"),
    "networks": ("paper", "small"),
}

EFFECTIVE = {  # settings that matter only for some methods or data sets: default, which field, its values
    "head": ("trained", "method", ("rubi", "learnedmixin")),
    "pretrain_epochs": (0, "method", ("learnedmixin", "jtt")),
    "upweight": (50, "method", ("jtt",)),
    "conditional": (False, "method", ("rebias",)),
    "penalty": ("hsic", "method", ("rebias", "vanilla")),
    "n_g_update": (1, "method", ("rebias",)),
    "n_g_nets": (1, "method", ("rebias",)),
    "monitor_g": (False, "method", ("vanilla",)),
    "stylised": (False, "dataset", ("imagenet9",)),
    "side": (28, "dataset", ("mnist",)),
    "train_images": (0, "dataset", ("mnist",)),
    "n_confusing": (9, "dataset", ("digits", "mnist")),
}


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the paper's ReBias on Biased MNIST."""

    dataset: str = "mnist"
    """toy, digits, mnist, imagenet9, kinetics10, or images with bias labels: csv, waterbirds, celeba, bffhq"""
    method: str = "rebias"
    """vanilla, biased (g alone), rebias, rubi, learnedmixin, hex, lff, jtt; with bias labels balanced, biascon, dfr"""
    rho: float = 0.997
    """share of training images whose bias agrees with the label (digits, mnist)"""
    n_confusing: int = 9
    """number of other colours that a class may take, 1 to 9 (digits, mnist)"""
    side: int = 28
    """pixels of an MNIST image: 28, or 14 for CPUs"""
    train_images: int = 0
    """use only this many MNIST training images, from the start; 0: all"""
    stylised: bool = False
    """imagenet9: train on the stylised copy as well"""
    f_kernel: int = 7
    """kernel size of f (digits, mnist)"""
    f_widths: tuple[int, ...] = (16, 32, 64, 128)
    """channels of f's layers (digits, mnist)"""
    f_strides: tuple[int, ...] = (1, 1, 1, 1)
    """strides of f's layers (digits, mnist)"""
    g_widths: tuple[int, ...] = (16, 32, 64, 128)
    """channels of g's layers (digits, mnist)"""
    epochs: int = 80
    """passes over the training set"""
    batch_size: int = 256
    """images per step over all ranks; an incomplete last batch is dropped"""
    lr: float = 1e-3
    """learning rate of Adam, for f and g"""
    weight_decay: float = 1e-4
    """L2 penalty of Adam, for f and g"""
    schedule: str = "step"
    """step (x 0.1 every step_epochs), cosine or constant"""
    step_epochs: int = 20
    """epochs between steps of the learning rate"""
    f_lambda: float = 1.0
    """lambda: weight of HSIC (or of another penalty) in f's loss"""
    g_lambda: float = 1.0
    """lambda_g: weight of g's cross-entropy"""
    order: str = "f-first"
    """which network is updated first in a step: f-first (paper) or g-first (released code)"""
    n_g_update: int = 1
    """updates of g per update of f; 0 leaves g at its random weights (a control)"""
    n_g_nets: int = 1
    """biased networks"""
    feature: str = "pooled"
    """what HSIC compares: pooled features or logits"""
    sigma: str = "fixed"
    """bandwidths: fixed, median (of the distances) or dimension (its square root)"""
    sigma_value: float = 1.0
    """the fixed bandwidth; otherwise a factor on it"""
    sigma_every: str = "epoch"
    """take the median over a share of the training set before every epoch, or over each batch"""
    sigma_sampling: float = 0.25
    """that share"""
    estimator: str = "unbiased"
    """estimator of HSIC: unbiased or biased"""
    conditional: bool = False
    """compute HSIC within classes"""
    penalty: str = "hsic"
    """hsic, or the controls hsic-shuffled (g of other images) or feature-norm (mean square of f's features)"""
    head: str = "trained"
    """RUBi's and LearnedMixin's heads: trained, or frozen at random as in the released code"""
    pretrain_epochs: int = 0
    """epochs before the training proper: of g (LearnedMixin) or of the first network (JTT)"""
    upweight: int = 50
    """JTT: weight of samples that the first network gets wrong (released: 50 or 100)"""
    monitor_g: bool = False
    """vanilla: also train a g, only to measure its dependence with f"""
    eval_every: int = 0
    """epochs between points of the training curve; 0: none"""
    networks: str = "paper"
    """paper, or small: tiny networks for images and videos (for rehearsals)"""
    network: str = ""
    """measure a network instead of training one: mnist-f, mnist-g, imagenet9-f, imagenet9-g, kinetics10-f or -g"""

    def __post_init__(self) -> None:
        for name in ("f_widths", "f_strides", "g_widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must lie in [0, 1], got {self.rho}")
        if self.epochs < 1 or self.n_g_nets < 1 or self.n_g_update < 0:
            raise ValueError("epochs and n_g_nets must be at least 1, n_g_update at least 0")
        for name, (value, field, meant_for) in EFFECTIVE.items():
            if getattr(self, name) != value and getattr(self, field) not in meant_for:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no effect with {field} {getattr(self, field)}, "
                    f"only with {' or '.join(meant_for)}; leave it at {value}"
                )
        if self.penalty != "hsic" and (self.penalty == "feature-norm") != (self.method == "vanilla"):
            raise ValueError(
                f"penalty {self.penalty} has no effect with method {self.method}: hsic-shuffled is for rebias, "
                "feature-norm for vanilla"
            )
        if self.sigma == "median" and self.sigma_every == "batch" and self.sigma_value != 1:
            raise ValueError(f"sigma_value has no effect on the median of each batch, got {self.sigma_value}")
        if self.method in SEES_BIAS and self.dataset in ("imagenet9", "kinetics10"):
            raise ValueError(f"{self.method} needs a bias label for every training image; {self.dataset} has none")
        if self.method in ("hex", "biascon", "dfr") and self.dataset not in ("digits", "mnist"):
            raise ValueError(f"{self.method} works only on coloured digits (digits or mnist), not on {self.dataset}")
        if self.method == "rebias" and self.batch_size < 4:
            raise ValueError(f"HSIC needs batches of 4 or more, batch_size is {self.batch_size}")


_TOY = Settings(
    dataset="toy", epochs=286, batch_size=128, weight_decay=0.0, schedule="constant",
    order="g-first", feature="logits", f_lambda=10.0,
)  # fmt: skip
_DIGITS = Settings(
    dataset="digits", rho=0.9, f_kernel=3, f_widths=(16, 32, 64), f_strides=(1, 2, 2), g_widths=(16, 32), epochs=8,
    batch_size=128, lr=3e-3, schedule="constant", f_lambda=30.0, order="g-first", sigma="median", sigma_every="batch",
)  # fmt: skip
_MNIST = Settings()
_IMAGENET9 = Settings(dataset="imagenet9", epochs=120, batch_size=128, schedule="cosine", sigma="median")
_KINETICS10 = replace(_IMAGENET9, dataset="kinetics10", lr=0.1, feature="logits")
PRESETS = {
    "toy": _TOY,
    "digits": _DIGITS,
    "mnist-14": replace(_DIGITS, dataset="mnist", side=14, train_images=6000),
    "mnist": _MNIST,
    "mnist-reference": replace(_MNIST, order="g-first"),
    "imagenet9": _IMAGENET9,
    "imagenet9-reference": replace(_IMAGENET9, order="g-first"),
    "kinetics10": _KINETICS10,
    **{name: replace(_IMAGENET9, dataset=name) for name in ("csv", "waterbirds", "celeba", "bffhq")},
    "kinetics10-reference": replace(_KINETICS10, order="g-first", feature="pooled", sigma="fixed"),
}
