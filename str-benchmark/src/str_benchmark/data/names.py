"""Names of evaluation sets, the groups that papers report, and which set is a part of which."""

from collections.abc import Sequence

REGULAR = ("IIIT_3000", "SVT_647", "IC03_867", "IC13_1015")
IRREGULAR = ("IC15_2077", "SVTP_645", "CUTE_288")
EVALUATION_NAMES = (
    "IIIT_3000",
    "SVT_647",
    "IC03_860",
    "IC03_867",
    "IC13_857",
    "IC13_1015",
    "IC15_1811",
    "IC15_2077",
    "SVTP_645",
    "CUTE_288",
)
IN_DISTRIBUTION = ("IIIT_3000", "SVT_647", "IC13_1015", "IC15_2077")  # their training sets serve fine-tuning
OUT_OF_DISTRIBUTION = ("IC03_867", "SVTP_645", "CUTE_288")

UNION14M = tuple(
    f"Union14M_{name}"
    for name in ("curve", "multi_oriented", "artistic", "contextless", "salient", "multi_words", "general")
)
GROUPS = {
    "paper": EVALUATION_NAMES,
    "parseq-subset": ("IIIT_3000", "SVT_647", "IC13_857", "IC15_1811", "SVTP_645", "CUTE_288"),
    "parseq": ("IIIT_3000", "SVT_647", "IC13_1015", "IC15_2077", "SVTP_645", "CUTE_288"),
    "parseq-new": ("ArT", "COCO_Text", "Uber"),
    "union14m": UNION14M,
}
"""what `eval --evaluate` takes in place of its sets: the paper's ten, PARSeq's three groups, Union14M's benchmark"""
PART_OF = {
    "IC03_860": "IC03_867",
    "IC13_857": "IC13_1015",
    "IC13_1015": "IC13_1095",
    "IC15_1811": "IC15_2077",
    "IC03_train_936": "IC03_train_1097",
    "IC03_train_1097": "IC03_train",
}


def wholes_of(name: str) -> list[str]:
    """The sets that a set is a part of, the next larger first."""
    found = []
    while name in PART_OF:
        name = PART_OF[name]
        found.append(name)
    return found


def each_word_once(names: Sequence[str]) -> list[str]:
    """The sets without those that are a part of another one among them."""
    return [name for name in names if not set(wholes_of(name)) & set(names)]
