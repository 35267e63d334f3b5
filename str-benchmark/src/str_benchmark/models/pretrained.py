"""Public checkpoints: safe loading, and a head for another alphabet, remapped character by character."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from str_benchmark.config import STRConfig
from str_benchmark.models.recognizer import Recognizer, build_model

RECOMPUTED = ("Transformation.GridGenerator.inv_delta_C", "Transformation.GridGenerator.P_hat")


@dataclass
class Pretrained:
    """A model with the weights of a file."""

    model: Recognizer
    kept: str
    """characters whose rows come from the file"""
    new: str
    """characters that the file does not know: their rows are newly initialised"""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """A state dict without `module.` and without TPS's matrices, which fit only one image size.

    The file may be the public code's (a plain state dict) or a training checkpoint of this package.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without weights, or with more than tensors (it is loaded with weights_only).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: file not found")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors
        raise ValueError(f"{path}: cannot be read as weights ({str(error).splitlines()[0]})") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        best = content.get("state", {}).get("best")
        content = best["weights"] if best else content["model"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__}")
    state = {name.removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in state.items() if name not in RECOMPUTED}


def load_pretrained(path: Path | str, config: STRConfig | str, charset: str | None = None) -> Pretrained:
    """Load a checkpoint into its own network, or into one with another alphabet.

    Args:
        path: see `read_weights`.
        config: network and alphabet of the file, or a name with the 36 characters.
        charset: desired alphabet; rows of the prediction head (and the attention cell's columns) are kept by
            character, unknown ones keep their new initialisation.

    Raises:
        ValueError: weights of another network; the message names the first keys or shapes that differ.
    """
    source = STRConfig.from_name(config) if isinstance(config, str) else config
    state = read_weights(path)
    model = Recognizer(source)
    _check(path, model, state)
    model.load_state_dict(state)
    if charset is None:
        return Pretrained(model.eval(), source.charset, "")
    target = build_model(replace(source, charset=charset))
    index = target.tokenizer.specials
    known = [character for character in target.config.charset if character in source.charset]
    pairs = [(c, c) for c in range(index)]
    pairs += [(source.charset.index(c) + index, target.config.charset.index(c) + index) for c in known]
    old, new = (torch.tensor(each) for each in zip(*pairs, strict=True))
    head = {name: target.state_dict()[name].clone() for name in _head_names(source)}
    for name, value in head.items():
        if name.endswith("weight_ih"):  # columns: the context, then the characters
            context = value.shape[1] - target.tokenizer.num_classes
            value[:, :context] = state[name][:, :context]
            value[:, context + new] = state[name][:, context + old]
        else:
            value[new] = state[name][old]
    target.load_state_dict(state | head)
    fresh = "".join(character for character in target.config.charset if character not in known)
    return Pretrained(target.eval(), "".join(known), fresh)


def _head_names(config: STRConfig) -> list[str]:
    """Parameters with one row or column per class."""
    if config.pred == "CTC":
        return ["Prediction.weight", "Prediction.bias"]
    generator = ["Prediction.generator.weight", "Prediction.generator.bias"]
    return [*generator, "Prediction.attention_cell.rnn.weight_ih"]


def _check(path: Path | str, model: Recognizer, state: dict[str, Tensor]) -> None:
    mine = model.state_dict()
    problems = [f"{name} is missing" for name in mine if name not in state and not name.endswith("num_batches_tracked")]
    problems += [f"{name} is not part of it" for name in state if name not in mine]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in mine.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"{path}: not the weights of {model.config.name} ({len(model.config.charset)} chars): {shown}")
    for name, value in mine.items():
        state.setdefault(name, value)
