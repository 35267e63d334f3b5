"""The networks: one file per stage."""

from str_benchmark.config import COMBINATIONS, KNOWN_AS, STRConfig
from str_benchmark.models.recognizer import Recognizer, build_model, count_parameters, output_columns

__all__ = ["COMBINATIONS", "KNOWN_AS", "Recognizer", "STRConfig", "build_model", "count_parameters", "output_columns"]
