"""Names of the paper's evaluation sets and of the groups that its tables report."""

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
