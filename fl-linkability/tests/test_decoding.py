"""Photos are decoded in pieces: broken ones, killed runs, read-only data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fl_linkability.data import photos as photos_module
from fl_linkability.data.photos import decode
from fl_linkability.data.reading import Reading
from fl_linkability.experiments import Experiment
from fl_linkability.settings import PRESETS
from fl_linkability.train import make_fabric
from shared_utils.images import BrokenFile

FABRIC = make_fabric("cpu")


def photos(preset="photos-full", **changes):
    small = {"side": 32, "rounds": 1, "clients_per_round": 4, "clients_at_once": 3, "pretrained": False}
    return replace(PRESETS[preset], **small | {"clusters": 2, "measure": "utility"} | changes)


def write_images(folder, n):
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return paths


def test_broken_images_end_it_or_are_left_out(tmp_path):
    paths = write_images(tmp_path, 5)
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    reading = Reading(cache=tmp_path / "cache")
    with pytest.raises(BrokenFile, match="2.png"):
        decode(paths, 8, reading)
    images, broken = decode(paths, 8, replace(reading, skip_broken=True))
    assert broken.tolist() == [2] and (images[2] == 0).all() and (images[3] > 0).any()
    with pytest.raises(BrokenFile, match="2.png"):  # what was skipped once is still broken
        decode(paths, 8, reading)
    with pytest.raises(FileNotFoundError, match=r"gone.png: no such image \(1 of 6 are missing\)"):
        decode([*paths, tmp_path / "gone.png"], 8, reading)


def test_decoding_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    paths, read = write_images(tmp_path, 10), []
    monkeypatch.setattr(photos_module, "CHUNK", 4)
    original = photos_module.read_image

    def until(last):
        def reader(path, *arguments):
            read.append(int(path.stem))
            if int(path.stem) == last:
                raise KeyboardInterrupt
            return original(path, *arguments)

        return reader

    monkeypatch.setattr(photos_module, "read_image", until(6))
    with pytest.raises(KeyboardInterrupt):
        decode(paths, 8, Reading(cache=tmp_path / "cut", workers=1))
    read.clear()
    monkeypatch.setattr(photos_module, "read_image", until(None))
    again, _ = decode(paths, 8, Reading(cache=tmp_path / "cut", workers=1))
    assert sorted(read) == [4, 5, 6, 7, 8, 9]
    whole, _ = decode(paths, 8, Reading(cache=tmp_path / "whole", workers=3))
    assert torch.equal(again, whole)


def test_a_read_only_data_root_works(tmp_path, write_photos, monkeypatch):
    write_photos(tmp_path / "csv", per_device=3)
    monkeypatch.setenv("FL_LINKABILITY_CACHE", str(tmp_path / "elsewhere"))
    before = sorted(tmp_path.rglob("csv/*"))
    Experiment(photos("photos-head"), 0, Reading(tmp_path), FABRIC).bundle  # noqa: B018
    assert sorted(tmp_path.rglob("csv/*")) == before and list((tmp_path / "elsewhere").glob("images-*.u8"))
    assert not (tmp_path / ".fl-linkability").exists()
