"""24 scene-text recognizers from four stages (arXiv 1904.01906).

The names below are imported on first use, so the command line starts without torch.
"""

from importlib import import_module

_MODULES = {
    "analysis": ["compare_words", "matched_gains", "module_means"],
    "config": ["COMBINATIONS", "KNOWN_AS", "STRConfig"],
    "data.annotated": ["AnnotatedDataset"],
    "data.filters": ["FilterReport", "LabelFilter", "subset"],
    "data.lmdb_store": ["LMDBDataset", "write_lmdb"],
    "data.mixture": ["BalancedBatchSampler"],
    "decoding": ["ctc_beam_search", "ctc_greedy"],
    "evaluation": ["evaluate"],
    "frontier": ["non_dominated", "upper_hull"],
    "metrics": ["bootstrap_interval", "failure_intersection", "mcnemar", "ned", "total_accuracy", "word_accuracy"],
    "models.export": ["export_onnx"],
    "models.inference": ["fold_batch_norm", "for_inference"],
    "models.pretrained": ["load_pretrained"],
    "models.recognizer": ["Recognizer", "build_model"],
    "reading": ["predict"],
    "render": ["render_words"],
    "tokenizers": ["AttnTokenizer", "CTCTokenizer"],
    "tps": ["ThinPlateSpline"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
