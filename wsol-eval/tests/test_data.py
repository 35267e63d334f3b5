"""Metadata, images, masks and score maps on disk, whole and damaged."""

import errno

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image

from shared_utils.images import BrokenFile
from wsol_eval import Metadata, ScoreMaps, WSOLDataset, read_metadata, write_metadata
from wsol_eval.build import build_metadata
from wsol_eval.conformance import FIXTURES
from wsol_eval.cutouts import make_split
from wsol_eval.data import CROP, FolderSource, epoch_batches, num_batches
from wsol_eval.evaluate import evaluate_center
from wsol_eval.storedmaps import Scoring, score_maps
from wsol_eval.verify import verify

CLASSES = ("crow", "duck", "hen")


def make_set(root, masks=False, per_class=4):
    """A data set of coloured rectangles in the reference's format: images, metadata, and masks if wanted."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        ids, labels, sizes, boxes, paths = [], {}, {}, {}, {}
        for i in range(per_class * len(CLASSES)):
            label = i % len(CLASSES)
            name = f"{split}/{CLASSES[label]}/{i}.png"
            width, height = (int(v) for v in rng.integers(60, 120, 2))
            x0, y0, x1, y1 = 10, 15, width // 2 + 5, height // 2 + 5
            pixels = np.full((height, width, 3), 120, np.uint8)
            pixels[y0 : y1 + 1, x0 : x1 + 1, label] = 250
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name)
            ids, labels[name], sizes[name] = [*ids, name], label, (width, height)
            boxes[name] = np.array([[x0, y0, x1, y1]])
            if masks:
                mask, ignore = np.zeros((2, height, width), np.uint8)
                mask[y0 : y1 + 1, x0 : x1 + 1] = 255
                ignore[:, x1 - 3 : x1 + 10] = 255
                for kind, array in (("mask", mask), ("ignore", ignore)):
                    Image.fromarray(array).save(root / f"{name[:-4]}_{kind}.png")
                paths[name] = ([f"{name[:-4]}_mask.png"], f"{name[:-4]}_ignore.png")
        metadata = Metadata(ids, labels, sizes, {} if masks else boxes, paths, ids[:3] if split == "train" else [])
        write_metadata(metadata, root / "metadata" / split)
    return root


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("masked"), masks=True)


@pytest.fixture(scope="module")
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def source(root, split="val", **options):
    return FolderSource(WSOLDataset(root, root / "metadata", split, **options), workers=0)


def test_metadata_round_trip(birds, masked, tmp_path):
    for root in (birds, masked):
        found = read_metadata(root / "metadata" / "train")
        write_metadata(found, tmp_path)
        again = read_metadata(tmp_path)
        assert (again.image_ids, again.class_labels, again.image_sizes) == (
            found.image_ids, found.class_labels, found.image_sizes)  # fmt: skip
        assert again.masks == found.masks and again.proxy_ids == found.proxy_ids
        assert {k: v.tolist() for k, v in again.boxes.items()} == {k: v.tolist() for k, v in found.boxes.items()}


def test_sample_is_fixed_by_its_own_seed(birds):
    metadata = read_metadata(birds / "metadata" / "val")
    np.random.seed(1)
    one = metadata.sample(2, seed=5)
    np.random.seed(2)
    assert metadata.sample(2, seed=5) == one and len(one) == 6
    assert metadata.sample(2, seed=6) != one
    assert metadata.sample(5) == metadata.image_ids  # a class with fewer gives all it has
    cubv2 = read_metadata(FIXTURES / "CUBV2")
    assert len(cubv2.sample(5)) == 998 and len(cubv2.sample(6)) == 1000


@pytest.mark.parametrize(
    "name,line,message",
    [
        ("class_labels.txt", "a.jpg", "expected 2 values"),
        ("class_labels.txt", "a.jpg,bird", "expected a whole number, got 'bird'"),
        ("localization.txt", "a.jpg,1,2,3", "3 or 5 values"),
        ("localization.txt", "a.jpg,9,2,3,4", "x0 <= x1"),
        ("image_ids.txt", "a.jpg", "'a.jpg' is listed twice"),
        ("image_ids.txt", "b.jpg", "'b.jpg' has no class"),
    ],
)
def test_malformed_metadata_names_file_and_line(tmp_path, name, line, message):
    write_metadata(Metadata(["a.jpg"], {"a.jpg": 0}, {"a.jpg": (9, 9)}, {"a.jpg": np.array([[0, 0, 4, 4]])}), tmp_path)
    with open(tmp_path / name, "a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="image_ids.txt"):
        read_metadata(tmp_path / "nothing")


def test_verify_and_build(birds, tmp_path):
    metadata = read_metadata(birds / "metadata" / "val")
    assert verify(metadata, birds) == []
    first, second = metadata.image_ids[:2]
    wrong = Metadata(
        [*metadata.image_ids, "gone.png"], metadata.class_labels | {"gone.png": 0},
        metadata.image_sizes | {first: (5, 5)}, metadata.boxes | {second: np.array([[0, 0, 500, 5]])},
    )  # fmt: skip
    problems = verify(wrong, birds)
    assert any("gone.png: no such image" in line for line in problems)
    assert any(first in line and "(5, 5)" in line for line in problems)
    assert any(second in line and "outside the image" in line for line in problems)
    lines = [f"{name[4:]},{','.join(map(str, box[0]))}" for name, box in metadata.boxes.items()]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    built = build_metadata(birds / "val", tmp_path / "boxes.csv")[""]
    assert built.num_classes == 3 and built.image_sizes == {k[4:]: v for k, v in metadata.image_sizes.items()}
    xywh = [f"{name[4:]},{b[0]},{b[1]},{b[2] - b[0] + 1},{b[3] - b[1] + 1}" for name, (b,) in metadata.boxes.items()]
    (tmp_path / "xywh.csv").write_text("\n".join(xywh))
    again = build_metadata(birds / "val", tmp_path / "xywh.csv", "xywh")[""]
    assert all((again.boxes[name] == built.boxes[name]).all() for name in built.image_ids)
    (tmp_path / "odd.csv").write_text("crow/none.png,0,0,1,1")
    with pytest.raises(ValueError, match="none.png' is no image"):
        build_metadata(birds / "val", tmp_path / "odd.csv")
    with pytest.raises(FileNotFoundError, match="boxen.csv: no such file"):
        build_metadata(birds / "val", tmp_path / "boxen.csv")
    (tmp_path / "voc").mkdir()
    with pytest.raises(FileNotFoundError, match="voc: no .xml below"):
        build_metadata(birds / "val", tmp_path / "voc")


def test_verify_names_what_is_annotated_only_in_part_or_under_another_name(birds):
    metadata = read_metadata(birds / "metadata" / "val")
    first, *others = metadata.image_ids
    boxes = {"typo.png": metadata.boxes[first]} | {name: metadata.boxes[name] for name in others}
    masks = {first: ([], ""), "other.png": ([], "")}
    ids, labels, sizes = metadata.image_ids, metadata.class_labels, metadata.image_sizes
    assert verify(Metadata(ids, labels, sizes, boxes), birds) == [
        f"{first}: no box", "typo.png: has a box, but is not in image_ids.txt",
    ]  # fmt: skip
    assert verify(Metadata(ids, labels, sizes, {}, masks), birds) == [
        *(f"{name}: no mask" for name in others), "other.png: has a mask, but is not in image_ids.txt",
    ]  # fmt: skip


def test_images_boxes_and_masks_agree(birds, masked, fabric):
    for root in (birds, masked):
        part = source(root)
        for batch in part.evaluation(5, fabric):
            for i in range(len(batch.labels)):
                colour = batch.images[i, batch.labels[i]] > 1.5  # the bright rectangle
                y, x = np.nonzero(colour.numpy())
                if root is birds:
                    box = batch.boxes[i][0]
                    assert np.abs(box - [x.min(), y.min(), x.max(), y.max()]).max() <= 4
                else:
                    assert (batch.masks[i] == 1)[colour.numpy()].mean() > 0.97
                    assert not (batch.masks[i][y.min() + 3 : y.max() - 3, x.min() + 3 : x.max() - 3] == 255).any()
                    assert (batch.masks[i] == 255).any()


def test_training_images_depend_on_seed_epoch_and_image_alone(birds, fabric, tmp_path):
    def batches(root, epoch, first=0, **options):
        return [image for image, _ in source(root, "train", **options).training(5, 3, epoch, first, fabric, False)]

    whole = batches(birds, 0)
    assert [len(part) for part in whole] == [5, 5, 2] and whole[0].shape[1:] == (3, CROP, CROP)
    assert torch.equal(torch.cat(whole[1:]), torch.cat(batches(birds, 0, first=1)))
    assert not torch.equal(whole[0], batches(birds, 1)[0])
    for _ in range(2):  # filled, then read
        assert torch.equal(torch.cat(whole), torch.cat(batches(birds, 0, cache=tmp_path)))
    assert len(source(birds, "train", proxy=True)) == 3


def test_dense_targets_follow_crop_and_flip(birds, masked, fabric):
    for root in (birds, masked):
        for images, targets in source(root).training(4, 0, 0, 0, fabric, True):
            bright = images.amax(1) > 1.5
            inside = (targets == 1)[bright].float().mean()
            assert targets.shape == images[:, 0].shape
            assert inside > 0.9


def test_broken_image_is_named_or_left_out(birds, fabric, tmp_path, caplog):
    root = make_set(tmp_path, per_class=2)
    broken = read_metadata(root / "metadata" / "val").image_ids[1]
    (root / broken).write_bytes((root / broken).read_bytes()[:60])
    with pytest.raises(BrokenFile, match="1.png: "):
        list(source(root).evaluation(4, fabric))
    lenient = source(root, skip_broken=True)
    left = [name for batch in lenient.evaluation(4, fabric) for name in batch.image_ids]
    assert len(left) == 5 and broken not in left and len(lenient.skipped) == 1
    (root / broken).unlink()
    with pytest.raises(BrokenFile, match="data verify"):
        list(source(root).evaluation(4, fabric))


def test_centre_report_counts_every_image_once(birds, masked, fabric):
    assert evaluate_center(source(birds), fabric, 0.1).n == 12
    report = evaluate_center(source(masked), fabric, 0.1)
    assert report.all is None and report.pixels.n == 12 and "pxap" in report.metrics()


@pytest.mark.parametrize("count,batch,ranks", [(10, 4, 1), (10, 4, 2), (9, 4, 2), (8, 4, 2), (3, 8, 2)])
def test_ranks_share_an_epoch(count, batch, ranks):
    parts = [epoch_batches(count, batch, 0, 0, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {num_batches(count, batch, ranks)}
    seen = np.concatenate([index for part in parts for index in part])
    assert len(set(seen.tolist())) == len(seen) >= count - (ranks - 1)


@pytest.mark.parametrize("name", ["maps", "maps.lmdb"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float64"])
def test_score_maps_on_disk(tmp_path, name, dtype):
    maps = torch.rand(3, 8, 9, dtype=torch.float64)
    ScoreMaps(tmp_path / name, dtype).write(["a/0.jpg", "a/1.jpg", "b"], maps)
    store = ScoreMaps(tmp_path / name)
    for i, key in enumerate(["a/0.jpg", "a/1.jpg", "b"]):
        found = store.read(key)
        wanted = (maps[i].numpy() * 255).astype(np.uint8) if dtype == "uint8" else maps[i].numpy().astype(dtype)
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(FileNotFoundError, match="no score map of image 'c'"):
        store.read("c")


def test_truncated_maps_are_named(tmp_path):
    maps = torch.rand(40, 64, 64)
    ids = [str(i) for i in range(40)]
    for name in ("maps", "maps.lmdb"):
        ScoreMaps(tmp_path / name).write(ids, maps)
    for path, message in ((tmp_path / "maps" / "3.npy", r"3\.npy: the score map is truncated"),
                          (tmp_path / "maps.lmdb", r"maps\.lmdb: truncated")):  # fmt: skip
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=message):
            ScoreMaps(tmp_path / path.relative_to(tmp_path).parts[0]).read("3")
    with pytest.raises(FileNotFoundError, match="no such LMDB"):
        ScoreMaps(tmp_path / "none.lmdb").read("3")


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"7\.npy: cannot be written \(No space left"):
        ScoreMaps(tmp_path).write(["7"], torch.rand(1, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_stored_maps_are_measured_as_in_memory(birds, tmp_path):
    metadata = read_metadata(birds / "metadata" / "val")
    maps = torch.rand(12, CROP, CROP)
    ScoreMaps(tmp_path / "m", "float64").write(metadata.image_ids, maps)
    report = score_maps(ScoreMaps(tmp_path / "m"), metadata, Scoring(0.05))
    assert report.n == 12
    with pytest.raises(ValueError, match="a native map has its image's size, .*got 224 x 224; pass --resize"):
        score_maps(ScoreMaps(tmp_path / "m"), metadata, Scoring(0.05, fit="native"))
    small = {name: torch.rand(1, *metadata.image_sizes[name][::-1]) for name in metadata.image_ids}
    for name, each in small.items():
        ScoreMaps(tmp_path / "n").write([name], each)
    with pytest.raises(ValueError, match="expected a map of 224 x 224"):
        score_maps(ScoreMaps(tmp_path / "n"), metadata)
    for fit in ("native", "resize"):
        assert score_maps(ScoreMaps(tmp_path / "n"), metadata, Scoring(0.05, fit=fit)).n == 12


def test_cutouts_are_fixed_by_their_seed_and_boxes_fit():
    digits, longer = make_split("test", 20, 3), make_split("test", 30, 3)
    assert torch.equal(digits.images, longer.images[:20]) and torch.equal(digits.labels, longer.labels[:20])
    assert not torch.equal(digits.images, make_split("val", 20, 3).images)
    for mask, boxes in zip(digits.masks, digits.boxes, strict=True):
        x0, y0, x1, y1 = boxes[0]
        assert mask.sum() == mask[y0 : y1 + 1, x0 : x1 + 1].sum()
        assert mask[y0].any() and mask[y1].any() and mask[:, x0].any() and mask[:, x1].any()


def test_only_the_telling_background_tells_the_class():
    """A nearest-mean classifier on pixels away from the digit: chance, or far above it."""
    right = {}
    for dataset in ("photographs", "photographs-telling"):
        train, test = make_split("train", 400, 3, dataset), make_split("test", 200, 3, dataset)
        border = torch.ones(32, 32, dtype=torch.bool)
        border[3:-3, 3:-3] = False
        a, b = (each.images[:, :, border].sort(-1).values.flatten(1) for each in (train, test))
        means = torch.stack([a[train.labels == label].mean(0) for label in range(10)])
        right[dataset] = (torch.cdist(b, means).argmin(1) == test.labels).float().mean().item()
    assert right["photographs"] < 0.2 < 0.4 < right["photographs-telling"]
