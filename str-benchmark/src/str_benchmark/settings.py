"""Everything that a run may set, and the presets: the paper's, and the small ones of the renderer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from str_benchmark.charset import EASYOCR_ENGLISH, resolve_charset
from str_benchmark.config import STRConfig
from str_benchmark.data.names import EVALUATION_NAMES, IRREGULAR, REGULAR

MEASURES = ("accuracy", "cost", "mean", "failures", "subset")
OPTIMIZERS = ("adadelta", "adamw")
SCHEDULES = ("constant", "onecycle")


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the paper's TRBA."""

    model: str = "TPS-ResNet-BiLSTM-Attn"
    """one of the 24 combinations, or CRNN, RARE, R2AM, STAR-Net, GRCNN, Rosetta, TRBA"""
    charset: str = "36"
    """36, 62, 94, the characters themselves, or a .txt file with them"""
    test_charset: str = ""
    """characters that count when words are compared, in the same form; empty: those of charset"""
    max_length: int = 25
    """characters of the longest word"""
    height: int = 32
    """pixels"""
    width: int = 100
    """pixels"""
    rgb: bool = False
    """colour images instead of gray"""
    pad: bool = False
    """keep an image's aspect ratio and pad, instead of stretching"""
    variable_width: bool = False
    """read each image at its own aspect ratio, padded (networks without TPS); training uses one width"""
    output_channel: int = 512
    """channels of the feature map; convolutions scale with it"""
    hidden_size: int = 256
    """size of the LSTMs"""
    num_fiducial: int = 20
    """points of TPS"""
    localization_channel: int = 512
    """channels of TPS's localization network"""
    ctc_head: str = "released"
    """head of BiLSTM-CTC: released (as the public checkpoints) or paper (its parameter counts)"""
    train: tuple[str, ...] = ("MJ", "ST")
    """training sets: names below the data root, folders, or rendered sets"""
    ratios: tuple[float, ...] = (0.5, 0.5)
    """share of each in every batch"""
    data_fraction: float = 1.0
    """share of each training set, from its start"""
    filter: str = "report"
    """filter of training labels: report, strip, reference or off"""
    nfkd: bool = False
    """replace label characters outside the charset by their compatible ones (é by e), as PARSeq does"""
    drop_whitespace: bool = False
    """remove whitespace from labels, as PARSeq does"""
    validation: tuple[str, ...] = ("validation",)
    """sets by which the kept weights are chosen; none: the last weights are kept"""
    val_every: int = 2000
    """steps between validations"""
    evaluate: tuple[str, ...] = (*EVALUATION_NAMES, "IC13_1095?", "COCO_Text?")
    """evaluation sets; a name that ends in ? may be missing. With subset: the part, and the whole"""
    regular: tuple[str, ...] = REGULAR
    """sets of the regular accuracy"""
    irregular: tuple[str, ...] = IRREGULAR
    """sets of the irregular accuracy; the total counts both"""
    resident: bool = False
    """keep the decoded training set on the device"""
    optimizer: str = "adadelta"
    """adadelta (rho 0.95, eps 1e-8) or adamw"""
    lr: float = 1.0
    """learning rate, or its peak"""
    schedule: str = "constant"
    """constant or onecycle (10 % warm-up, then cosine to 0)"""
    batch_size: int = 192
    """words per step over all ranks"""
    steps: int = 300_000
    """optimizer steps"""
    grad_clip: float = 5.0
    """gradient norm at which it is clipped"""
    finetune: tuple[str, ...] = ()
    """sets for fine-tuning after the training"""
    finetune_epochs: int = 10
    """passes over the fine-tuning sets"""
    measure: str = "accuracy"
    """accuracy (train and evaluate), cost (of the untrained network), mean, failures or subset (of other runs)"""
    released: str = ""
    """public checkpoint to evaluate as it is, instead of training: english_g2"""
    of: tuple[str, ...] = ()
    """mean, failures, subset: the table, then the rows (or one stage's choice, such as trans=TPS)"""

    def __post_init__(self) -> None:
        for name, kind in self.__dataclass_fields__.items():
            if kind.type.startswith("tuple"):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("charset", "test_charset"):  # a record holds the characters of a file
            if getattr(self, name).endswith(".txt"):
                object.__setattr__(self, name, resolve_charset(getattr(self, name)))
        for name, choices in (("measure", MEASURES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.released and self.released not in PUBLIC:
            raise ValueError(f"released: expected one of {', '.join(PUBLIC)}, got {self.released!r}")
        if len(self.ratios) != len(self.train):
            raise ValueError(f"ratios: expected {len(self.train)}, one per training set, got {len(self.ratios)}")
        if self.variable_width and not self.pad:
            raise ValueError("variable_width: images keep their ratio, so pad must be set too")
        for name in ("batch_size", "steps", "val_every", "finetune_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        _ = self.config, self.test_characters  # for its own checks

    @property
    def test_characters(self) -> str:
        """The characters that count when words are compared."""
        return resolve_charset(self.test_charset or self.charset)

    @property
    def config(self) -> STRConfig:
        """The network."""
        return STRConfig.from_name(
            self.model,
            charset=self.charset,
            max_length=self.max_length,
            img_size=(self.height, self.width),
            variable_width=self.variable_width,
            in_channels=3 if self.rgb else 1,
            output_channel=self.output_channel,
            hidden_size=self.hidden_size,
            num_fiducial=self.num_fiducial,
            localization_channel=self.localization_channel,
            ctc_head=self.ctc_head,
        )


PAPER = Settings()
DIGITS = Settings(
    model="None-VGG-None-CTC", charset="0123456789", max_length=3, width=64, output_channel=48, hidden_size=48,
    localization_channel=16, num_fiducial=10, train=("A", "B"), validation=(), resident=True,
    evaluate=("test-sans-upright", "test-serif-upright", "test-sans-rotated", "test-serif-rotated"),
    regular=("test-sans-upright", "test-serif-upright"), irregular=("test-sans-rotated", "test-serif-rotated"),
    optimizer="adamw", lr=2e-3, schedule="onecycle", batch_size=48, steps=800,
)  # fmt: skip
WORDS = replace(
    DIGITS, charset="36", max_length=7, width=100, output_channel=64, hidden_size=64, localization_channel=32,
    num_fiducial=20, train=("words",), ratios=(1.0,),
    evaluate=("test-words-none", "test-words-rotate", "test-words-curve", "test-words-perspective"),
    regular=("test-words-none",), irregular=("test-words-rotate", "test-words-curve", "test-words-perspective"),
    batch_size=128, steps=1500,
)  # fmt: skip
TINY = replace(
    DIGITS, output_channel=16, hidden_size=16, train=("tiny",), ratios=(1.0,),
    evaluate=("test-tiny", "test-tiny-curve"), regular=("test-tiny",), irregular=("test-tiny-curve",),
    batch_size=8, steps=6,
)  # fmt: skip
ENGLISH_G2 = Settings(
    model="None-VGG-BiLSTM-CTC", charset=EASYOCR_ENGLISH, height=64, width=320, pad=True, variable_width=True,
    output_channel=256, max_length=40, optimizer="adamw", lr=2e-4, schedule="onecycle", batch_size=32, steps=2000,
    val_every=250,
)  # fmt: skip
PRESETS = {"paper": PAPER, "digits": DIGITS, "words": WORDS, "tiny": TINY, "english_g2": ENGLISH_G2}
PUBLIC = {"english_g2": ENGLISH_G2}
"""public checkpoints whose shape is known by name"""
