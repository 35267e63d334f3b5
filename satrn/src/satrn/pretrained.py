"""The network of a checkpoint of `satrn train` or MMOCR, with its own or another charset."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from satrn.charset import FIRST
from satrn.config import SATRNConfig
from satrn.models import SATRN
from satrn.settings import Settings
from shared_utils.logging import get_logger

logger = get_logger("satrn")
LOWER = "0123456789abcdefghijklmnopqrstuvwxyz"
SYMBOLS = LOWER + "ABCDEFGHIJKLMNOPQRSTUVWXYZ!\"#$%&'()*+,-./:;<=>?@[\\]_`~"
DICTIONARIES = {len(each): each for each in (LOWER, LOWER + " ", SYMBOLS, SYMBOLS + " ")}  # MMOCR's English ones
DICTIONARY_FILES = {f"{name}{tail}.txt" for name in ("lower_english_digits", "english_digits_symbols")
                    for tail in ("", "_space")}  # fmt: skip
SPECIALS = 3  # classes after the characters
# Their order. 0.x cannot predict padding: its classifier has one row less than its embedding: this shows the version.
UNKNOWN_0X, END_0X = 0, 1
END_1X, UNKNOWN_1X = 0, 2
BUFFERS = ("data_preprocessor.", "encoder.position_enc.h_position_encoder", "encoder.position_enc.w_position_encoder",
           "decoder.position_enc.position_table")  # fmt: skip


class _Inert:
    """Replaces every object in a checkpoint that is not a tensor or a plain value; it does nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's content, on the CPU, loaded with weights_only.

    MMEngine's runner stores its log and NumPy arrays with the weights: other objects are loaded as inert ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle errors of a damaged or unknown file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has no weights; expected a checkpoint of satrn or MMOCR")
    return content


def load_pretrained(path: Path, charset: str | None = None, dictionary: str | None = None) -> SATRN:
    """The network of a checkpoint of `satrn train` or MMOCR; another charset keeps the rows of known characters.

    Args:
        path: path of the checkpoint.
        charset: of the new network; None: the checkpoint's. Characters that it lacks are newly initialised and logged.
        dictionary: characters of an MMOCR checkpoint in their order; see `load_mmocr_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither kind of checkpoint, or weights that do not fit.
    """
    content = read_checkpoint(path)
    if "run" in content:
        model = SATRN(settings_of(content, path).network())
        try:
            model.load_state_dict(content["model"])
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit the stored settings ({_one_line(error)})") from error
    else:
        model = _mmocr(content, path, dictionary)
    return (model if charset is None or charset == model.cfg.charset else _with_charset(model, charset, path)).eval()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def settings_of(content: dict, path: Path) -> Settings:
    """Settings in a checkpoint of `satrn train`. ValueError if they are unknown."""
    try:
        settings = {k: v for k, v in content["run"]["settings"].items() if k != "count_only"}  # a former setting
        return Settings(**settings)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: has no settings of this version of satrn ({error})") from error


def weights_record(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file of weights, for a run log."""
    with open(path, "rb") as file:
        return {Path(path).name: hashlib.file_digest(file, "sha256").hexdigest()}


def _with_charset(model: SATRN, charset: str, path: Path) -> SATRN:
    old, new = model.cfg.charset, SATRN(replace(model.cfg, charset=charset))
    fresh = [character for character in charset if character not in old]
    if fresh:
        logger.info("%s: newly initialised for %s", path, "".join(fresh))
    weights = model.state_dict()
    for name, value in new.state_dict().items():
        if name.startswith(("decoder.trg_word_emb", "decoder.classifier", "ctc")):
            weights[name] = _carry_over(weights[name], value, old, charset)
    new.load_state_dict(weights)
    return new


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


# ---- MMOCR ------------------------------------------------------------


def load_mmocr_checkpoint(path: Path, dictionary: str | None = None, heads: int | None = None) -> SATRN:
    """A SATRN of MMOCR (variant "mmocr"), as written by its runner; the weights tell sizes and version.

    Args:
        path: of the .pth file.
        dictionary: the characters in their order; None: MMOCR's own dictionary of that size (36, 37, 90 or 91
            characters).
        heads: attention heads; None: from the stored configuration, else eight as in all of MMOCR's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state dict; missing, unknown or misshapen parameters; a dictionary that does not fit, or none
            was given and the size does not identify it.
    """
    return _mmocr(read_checkpoint(path), path, dictionary, heads).eval()


def read_dictionary(path: Path) -> str:
    """Characters of an MMOCR dictionary file: one per line; a space is a character.

    Raises:
        ValueError: a line of several characters, a repeated one, or no characters.
    """
    lines = [line.strip("\r") for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    for number, line in enumerate(lines, 1):
        if len(line) > 1:
            raise ValueError(f"{path} line {number}: expected one character, got {line!r}")
    characters = "".join(lines)
    if not characters or len(set(characters)) < len(characters):
        raise ValueError(f"{path}: expected different characters, one per line, got {len(characters)}")
    return characters


def _mmocr(content: dict, path: Path, dictionary: str | None, heads: int | None = None) -> SATRN:
    meta = content.get("meta")
    config = str(meta.get("cfg", "")) if isinstance(meta, dict) else ""  # the runner's, as Python text
    content = content.get("state_dict", content)
    weights = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    weights = {name: value for name, value in weights.items() if not name.startswith(BUFFERS)}
    if "decoder.trg_word_emb.weight" not in weights or "decoder.classifier.weight" not in weights:
        raise ValueError(f"{path}: has no weights of a SATRN of satrn or MMOCR")
    embedding, classes = weights["decoder.trg_word_emb.weight"], len(weights["decoder.classifier.weight"])
    charset = _dictionary(path, len(embedding), classes, dictionary, config)
    n = len(charset)
    end, unknown = (END_0X, UNKNOWN_0X) if classes < len(embedding) else (END_1X, UNKNOWN_1X)
    rows = [n + end, n + unknown, *range(n)]  # ours: end, unknown, characters; its end is its start as well
    weights["decoder.trg_word_emb.weight"] = embedding[[*rows, n + end]]
    for name in ("decoder.classifier.weight", "decoder.classifier.bias"):
        weights[name] = weights[name][rows]
    try:
        stored = re.search(r"n_head=(\d+)", config)
        model = SATRN(_mmocr_config(weights, charset, heads or (int(stored[1]) if stored else 8)))
        model.load_state_dict({_our_name(name): _our_shape(name, value) for name, value in weights.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: these are not weights of MMOCR's SATRN ({_one_line(error)})") from error
    return model


def _dictionary(path: Path, embeddings: int, classes: int, given: str | None, config: str) -> str:
    """Characters of a checkpoint, as given or by their number. ValueError if there is any doubt."""
    characters = embeddings - SPECIALS
    if classes not in (embeddings, embeddings - 1) or (given is not None and len(given) != characters):
        wanted = "" if given is None else f"; the dictionary has {len(given)} characters, expected {characters}"
        raise ValueError(
            f"{path}: {embeddings} embeddings and {classes} classes, expected the characters and 3 special classes"
            f" (start and end in one, padding, unknown){wanted}"
        )
    named = {Path(name).name for name in re.findall(r"dict_file=['\"]([^'\"]+)", config)}
    foreign = named - DICTIONARY_FILES
    if given is None and (foreign or characters not in DICTIONARIES):
        trained_with = ", ".join(foreign) or "which no English dictionary of MMOCR has"
        raise ValueError(
            f"{path}: {characters} characters, {trained_with}; name the dictionary that it was trained with"
            " (--dictionary FILE)"
        )
    return DICTIONARIES[characters] if given is None else given


def _mmocr_config(weights: dict[str, Tensor], charset: str, heads: int) -> SATRNConfig:
    def layers(part: str) -> int:
        numbers = [int(name.split(".")[2]) for name in weights if name.startswith(f"{part}.layer_stack.")]
        return 1 + max(numbers, default=-1)

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


def _our_shape(name: str, value: Tensor) -> Tensor:
    """A2DPE's gates are 1x1 convolutions in MMOCR, dense layers here."""
    return value.flatten(1) if "_scale." in name and name.endswith(".weight") else value


def _our_name(name: str) -> str:
    """A2DPE's perceptrons have a (silent) dropout between their layers here."""
    return name.replace("_scale.2.", "_scale.3.")
