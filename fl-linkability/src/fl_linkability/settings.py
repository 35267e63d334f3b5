"""All settings of a run: the federation (data, network, rounds, mitigation), and what is measured on its updates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

TEXTS = ("blog", "yelp")
DATASETS = ("digits", "mnist", "femnist", "flair", "pipa", "openimages", "csv", *TEXTS)
MODELS = ("mlp", "cnn", "mobilenet-head", "mobilenet", "lstm")
BACKGROUND_KINDS = {
    "bkg-repl": "repl", "rand-aug": "random", "mm-aug": "cluster", "calibrated": "calibrated", "decoys": "adversarial",
}  # fmt: skip
MITIGATIONS = (
    "none", "noise", *BACKGROUND_KINDS, "style-jitter", "clip", "local-dp", "central-dp",
)  # fmt: skip
MEASURES = (
    "reid", "pairs", "all-pairs", "open", "open-reid", "open-matching", "stage", "images", "groups", "utility",
    "protocol", "describe",
)  # fmt: skip
CHOICES = {
    "dataset": DATASETS,
    "model": MODELS,
    "bn": ("frozen", "local", "sent"),
    "engine": ("batched", "loop", "flower-inprocess", "flower-ray"),
    "who": ("anon", "both"),
    "refresh": ("fixed", "round"),
    "measure": MEASURES,
    "center": ("none", "leave-one-out"),
    "learner": ("federated", "central", "background", "k-nn", "chance"),
    "control": ("none", "permuted-labels", "permuted-devices"),
    "shard": ("random", "chrono", "given"),
}


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the paper's protocol on digits users (preset paper-embedded)."""

    dataset: str = "digits"
    """digits, mnist, femnist (LEAF), flair, blog, yelp, or pipa, openimages, csv: your table of images, users.csv"""
    users: int = 40
    """number of users; in a real data set, those with the most images; 0: all"""
    images_per_device: int = 64
    """synthetic users: images per device; real data sets: the least number (blog: posts, yelp: reviews)"""
    prior_images: int = 0
    """synthetic users: images on the prior device; 0: as on the anonymous one"""
    alpha: float = 0.5
    """synthetic users: Dirichlet prior over classes"""
    style: bool = True
    """synthetic users: each has a drawing style"""
    skew: bool = True
    """synthetic users: each prefers some classes"""
    drift: float = 0.0
    """synthetic users: 0: both halves alike (the paper's random split); 1: the anonymous half is unlike the prior"""
    iid: bool = False
    """synthetic users: replace every image by a draw from all users"""
    background: int = 1188
    """number of background images; fewer than available: a class-balanced subset (synthetic users) or the first ones"""
    side: int = 16
    """side of an image in pixels"""
    shard: str = "random"
    """real data sets: how a user's samples are split into devices: random, chrono (texts by date, FLAIR by Flickr's
    numbers, tables in the order of their lines), or given (by the table's device_id and role)"""
    model: str = "mlp"
    """mlp, cnn (LEAF's for FEMNIST), mobilenet-head (a linear layer on frozen features), mobilenet (all of it), lstm
    (texts)"""
    hidden: int = 32
    """units of the mlp's or cnn's hidden layer (LEAF's cnn: 2048; its channels grow with it) or of the lstm"""
    embedding: int = 100
    """lstm: numbers per word"""
    vocabulary: int = 5000
    """texts: size of the vocabulary (the most frequent words), padding and unknown words included"""
    length: int = 30
    """texts: most words of a sentence (blog) or review (yelp); the rest is cut off"""
    bn: str = "frozen"
    """mobilenet: running statistics frozen, local (of the batch) or sent; the last two need engine loop"""
    pretrained: bool = True
    """mobilenet: start from ImageNet's weights"""
    pretrain_epochs: int = 0
    """epochs on the background before the first round"""
    rounds: int = 200
    """rounds of federated averaging"""
    clients_per_round: int = 8
    """devices that train in a round (the paper: a tenth)"""
    local_epochs: int = 1
    """passes of a client over its data"""
    batch_size: int = 8
    """images per local step (the paper does not give it)"""
    lr: float = 0.01
    """learning rate of local SGD"""
    momentum: float = 0.0
    """momentum of local SGD"""
    weight_decay: float = 0.0
    """weight decay of local SGD"""
    engine: str = "batched"
    """batched, loop, flower-inprocess or flower-ray"""
    clients_at_once: int = 0
    """clients in one batched step; 0: all clients of the round"""
    keep: str = "all"
    """parameters whose updates are stored: all, or name prefixes joined by |"""
    mitigation: str = "none"
    """none, noise, bkg-repl, rand-aug, mm-aug, calibrated, decoys, style-jitter, clip, local-dp, central-dp, or two
    joined by a plus sign"""
    ratio: float = 1.0
    """background images relative to the device's own"""
    clusters: int = 40
    """mm-aug: number of clusters, M"""
    std: float = 0.0
    """noise: standard deviation per weight"""
    clip_norm: float = 0.5
    """clip, local-dp, central-dp: clipping norm"""
    epsilon: float = 50.0
    """local-dp: epsilon of one round"""
    delta: float = 1e-5
    """local-dp, central-dp: delta"""
    noise_multiplier: float = 1.0
    """central-dp: noise over clipping norm"""
    who: str = "anon"
    """which devices mitigate: anon (the paper) or both"""
    refresh: str = "fixed"
    """background images: drawn once, or in every round"""

    measure: str = "reid"
    """what to measure on the updates"""
    attack: str = "paper-mlp"
    """see fl_linkability.attacks"""
    layers: str = "fc2"
    """layer that the attack sees, or all"""
    center: str = "none"
    """none (the paper) or leave-one-out"""
    aux_until: int = 0
    """known updates come from rounds before this one, probes from this one on; 0: all rounds for both"""
    deltas_per_user: int = 0
    """known updates per user; 0: all"""
    seen: float = 0.5
    """open-reid, open-matching: share of users with known updates"""
    set_size: int = 1
    """images: images per set; groups: updates per sum"""
    learner: str = "federated"
    """utility: who learns the task"""
    control: str = "none"
    """none, permuted-labels (of the known updates) or permuted-devices (users of the probes' devices)"""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for part in self.mitigation.split("+"):
            if part not in MITIGATIONS:
                raise ValueError(f"mitigation must be one of {', '.join(MITIGATIONS)}, got {part!r}")
        if "noise" in self.mitigation.split("+") and not self.std:
            raise ValueError("mitigation noise: std must be above 0, got 0, which adds no noise")
        if (self.dataset in TEXTS) != (self.model == "lstm"):
            raise ValueError(f"model lstm goes with {' and '.join(TEXTS)}, got {self.model!r} for {self.dataset}")
        if not 0 <= self.seen <= 1:
            raise ValueError(f"seen must lie in [0, 1], got {self.seen}")
        if self.set_size < 1:
            raise ValueError(f"set_size must be at least 1, got {self.set_size}")

    def federation(self) -> dict:
        """The settings that decide the updates; runs that share them share one simulation."""
        return {name: value for name, value in asdict(self).items() if name not in MEASUREMENT}


MEASUREMENT = (
    "measure", "attack", "layers", "center", "aux_until", "deltas_per_user", "seen", "set_size", "learner", "control",
)  # fmt: skip
DATA_SETTINGS = (
    "dataset", "users", "images_per_device", "prior_images", "alpha", "style", "skew", "drift", "iid", "background",
    "side", "shard", "model", "pretrained", "vocabulary", "length",
)  # fmt: skip
_PAPER_EMBEDDED = Settings()
_OURS = Settings(
    rounds=60, local_epochs=2, lr=0.1, who="both", measure="protocol", attack="centroid", layers="all",
    center="leave-one-out",
)  # fmt: skip
_PHOTOS = Settings(
    dataset="csv", users=0, images_per_device=0, background=0, side=224, shard="given", model="mobilenet-head",
    rounds=2000, clients_per_round=10, keep="fc", layers="fc", clusters=100,
)  # fmt: skip
PRESETS = {
    "paper-embedded": _PAPER_EMBEDDED,
    "ours-all-devices": replace(_OURS, rounds=20, clients_per_round=80, aux_until=10, measure="reid"),
    "ours": _OURS,
    "mnist": replace(_PAPER_EMBEDDED, dataset="mnist", side=28, hidden=64, background=2000, clusters=40),
    "femnist": replace(
        _PHOTOS, dataset="femnist", users=200, images_per_device=50, side=28, model="mlp", hidden=128, layers="fc2",
        keep="all", shard="random", rounds=200, clients_per_round=40,
    ),
    "femnist-like": replace(
        _PAPER_EMBEDDED, dataset="femnist", images_per_device=40, background=0, side=28, model="cnn", hidden=256,
        lr=0.05,
    ),
    "photos-head": _PHOTOS,
    "photos-full": replace(_PHOTOS, model="mobilenet", clients_at_once=16),
    "flair": replace(
        _PHOTOS, dataset="flair", users=327, images_per_device=50, shard="chrono", model="mobilenet",
        clients_at_once=16, clients_per_round=65,
    ),
    "blog": replace(
        _PHOTOS, dataset="blog", images_per_device=400, shard="random", model="lstm", hidden=64, clients_per_round=11,
        keep="lstm", layers="lstm", clusters=300,
    ),
    "yelp": replace(
        _PHOTOS, dataset="yelp", images_per_device=200, shard="random", model="lstm", hidden=128, embedding=50,
        vocabulary=1000, length=100, clients_per_round=24, keep="embedding", layers="embedding", clusters=300,
    ),
}  # fmt: skip
