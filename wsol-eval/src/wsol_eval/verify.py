"""Is a split whole: every file decoded to its end, sizes, boxes and masks as the metadata say?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import joblib
import numpy as np

from shared_utils.images import BrokenFile
from wsol_eval.data import load_mask, read_annotated
from wsol_eval.metadata import Metadata


def verify(metadata: Metadata, data_root: str | Path, workers: int = 1) -> list[str]:
    """What is wrong with a split on disk, one line each; empty when nothing is.

    Every image and mask is decoded to its end; files that are missing or broken, sizes that differ from the image's,
    images without boxes or masks where others have some, annotations of images that are not listed, and boxes that end
    outside their image or look like x,y,width,height are reported.

    Args:
        metadata: of the split.
        data_root: folder that ids are relative to.
        workers: processes that decode; 0 takes one per core.
    """
    check = partial(_wrong_with, root=Path(data_root))
    tasks = [(n, metadata.image_sizes.get(n), metadata.masks.get(n, ([], ""))) for n in metadata.image_ids]
    found = joblib.Parallel(n_jobs=workers or -1)(joblib.delayed(check)(*task) for task in tasks)
    problems = [line for lines in found for line in lines]
    listed = set(metadata.image_ids)
    for what, annotated in (("box", metadata.boxes), ("mask", metadata.masks)):
        if annotated:
            problems += [f"{name}: no {what}" for name in metadata.image_ids if name not in annotated]
        problems += [f"{name}: has a {what}, but is not in image_ids.txt" for name in annotated if name not in listed]
    return problems + _outside(metadata)


def _wrong_with(name: str, size: tuple[int, int] | None, masks: tuple[list[str], str], root: Path) -> list[str]:
    problems = []
    try:
        image = read_annotated(root / name, size)
        if size is not None and image.size != size:
            problems.append(f"{name}: the metadata says {size}, the image {image.size}")
    except BrokenFile as error:
        problems.append(str(error))
    for path in [*masks[0], masks[1]]:
        try:
            if path:
                load_mask(root / path)
        except BrokenFile as error:
            problems.append(f"{name}: {error}")
    return problems


def _outside(metadata: Metadata) -> list[str]:
    problems = []
    for name, boxes in metadata.boxes.items():
        width, height = metadata.image_sizes.get(name, (np.inf, np.inf))
        if (boxes[:, 2] > width).any() or (boxes[:, 3] > height).any():
            problems.append(f"{name}: a box ends outside the image of {width} x {height}: {boxes.tolist()}")
    return problems
