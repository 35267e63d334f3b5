"""Weights from elsewhere: MMOCR's public checkpoints, and our own under another charset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from satrn.charset import FIRST
from satrn.config import SATRNConfig
from satrn.models import SATRN
from satrn.settings import Settings
from satrn.train import load_checkpoint
from shared_utils.logging import get_logger

logger = get_logger("satrn")
MMOCR_CHARSET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!\"#$%&'()*+,-./:;<=>?@[\\]_`~"
# what stands behind the characters: end (which is the start as well), padding, unknown
SPECIALS = {"0.x": ("unknown", "end", "padding"), "1.x": ("end", "padding", "unknown")}


def load_mmocr_checkpoint(path: Path, charset: str = MMOCR_CHARSET, layout: str = "1.x", heads: int = 8) -> SATRN:
    """A SATRN of MMOCR (variant "mmocr"), by parameter name; its sizes are read off the weights.

    Args:
        path: of the .pth file (a state dict, alone or under "state_dict").
        charset: the dictionary's characters in its order.
        layout: order of the special classes: 1.x (end, padding, unknown) or 0.x (unknown, end, padding).
        heads: attention heads (weights do not tell).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state dict; missing, unknown or misshapen parameters; a charset that does not fit.
    """
    if layout not in SPECIALS:
        raise ValueError(f"layout must be one of {', '.join(SPECIALS)}, got {layout!r}")
    weights = _read_state_dict(Path(path))
    try:
        cfg = _mmocr_config(weights, charset, heads)
        rows = _class_rows(len(charset), layout)
        embedding = weights["decoder.trg_word_emb.weight"]
        weights["decoder.trg_word_emb.weight"] = embedding[[*rows, rows[0]]]  # its end is its start as well
        for name in ("decoder.classifier.weight", "decoder.classifier.bias"):
            weights[name] = _pick_rows(weights[name], rows)
        ours = {_our_name(name): value.flatten(1) if _is_gate(name) else value for name, value in weights.items()}
        ours = {
            name: value for name, value in ours.items() if not name.endswith(("position_encoder", "position_table"))
        }
        model = SATRN(cfg)
        model.load_state_dict(ours)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path}: these weights are no SATRN of MMOCR with {len(charset)} characters ({error})"
        ) from error
    return model.eval()


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors of a damaged or foreign file
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    weights.pop("data_preprocessor.mean", None), weights.pop("data_preprocessor.std", None)
    if not weights:
        raise ValueError(f"{path}: holds no weights")
    return weights


def _mmocr_config(weights: dict[str, Tensor], charset: str, heads: int) -> SATRNConfig:
    def layers(part: str) -> int:
        return 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(f"{part}.layer_stack."))

    first = weights["backbone.conv1.conv.weight"]
    return SATRNConfig(
        variant="mmocr",
        d_model=2 * first.shape[0],
        in_channels=first.shape[1],
        ffn=weights["decoder.layer_stack.0.mlp.w_1.weight"].shape[0],
        enc_layers=layers("encoder"),
        dec_layers=layers("decoder"),
        heads=heads,
        charset=charset,
    )


def _class_rows(characters: int, layout: str) -> list[int]:
    """Their rows in our order: end, unknown, characters."""
    order = SPECIALS[layout]
    return [characters + order.index("end"), characters + order.index("unknown"), *range(characters)]


def _pick_rows(value: Tensor, rows: list[int]) -> Tensor:
    """Rows in our order; a class that their classifier lacks (its last one) can never win."""
    lacking = torch.zeros_like(value[:1]) if value.ndim > 1 else value.new_full((1,), -1e4)
    return torch.cat([value, lacking])[[min(row, len(value)) for row in rows]]


def _is_gate(name: str) -> bool:
    return "_scale." in name and name.endswith(".weight")  # 1x1 convolutions there, dense layers here


def _our_name(name: str) -> str:
    """A2DPE's perceptrons have a (silent) dropout between their layers here."""
    return name.replace("_scale.2.", "_scale.3.")


def load_pretrained(path: Path, charset: str | None = None) -> SATRN:
    """The network of a checkpoint of `satrn train`; with another charset, rows are carried over by character.

    Args:
        path: of the checkpoint.
        charset: of the new network; None: the checkpoint's. Characters that it lacks start afresh and are logged.
    """
    content = load_checkpoint(Path(path))
    s = Settings(**content["run"]["settings"])
    old, new = s.charset, charset or s.charset
    model, weights = SATRN(replace(s, charset=new).network()), content["model"]
    fresh = [character for character in new if character not in old]
    if fresh:
        logger.info("%s: newly initialised for %s", path, "".join(fresh))
    if old != new:
        for name, value in model.state_dict().items():
            if value.shape != weights[name].shape or name.startswith(
                ("decoder.trg_word_emb", "decoder.classifier", "ctc")
            ):
                weights[name] = _carry_over(weights[name], value, old, new)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the settings beside them ({error})") from error
    return model.eval()


def _carry_over(old_rows: Tensor, new_rows: Tensor, old: str, new: str) -> Tensor:
    """End, unknown and start keep their rows (start is the last of an embedding); characters are looked up."""
    rows = new_rows.clone()
    rows[:FIRST] = old_rows[:FIRST]
    for i, character in enumerate(new):
        if character in old:
            rows[FIRST + i] = old_rows[FIRST + old.index(character)]
    if len(old_rows) == FIRST + len(old) + 1:
        rows[-1] = old_rows[-1]
    return rows
