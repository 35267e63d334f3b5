"""Small archives in the layout, names and quirks of the real ones: CUB, ImageNet, OpenImages, MNIST, CIFAR-10, clones.

Images are grey noise with a bright rectangle, which boxes and masks frame. Among them are a grey JPEG, a CMYK one, one
that EXIF turns, and a PNG named .jpg; hidden files lie about; a class of CUBV2 has three images, as in the real set.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from wsol_eval.kangaroo_raccoon import CLONES

CUB_CLASSES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
WNIDS = ("n01440764", "n01443537", "n02105855")
MIDS = ("01226z", "0bt_c3", "0by6g")
KINDS = ("plain", "grey", "cmyk", "turned", "png")
TREE = """
{root}
  CUB/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg    CUB-200-2011's images/
  CUB/001.Black_footed_Albatross/30107316117.jpg                       CUBV2
  ILSVRC/train/n01440764/n01440764_10026.JPEG                          ImageNet
  ILSVRC/val/ILSVRC2012_val_00000001.JPEG
  ILSVRC/val2/0/0.jpeg                                                 ImageNetV2, Threshold0.7
  OpenImages/{{train,val,test}}/01226z/7af766bd43da900b.jpg              OpenImages30k, masks and ignored regions beside
  metadata/{{CUB,ILSVRC,OpenImages}}/{{train,val,test}}/*.txt              of clovaai/wsolevaluation
  weights/{{vgg16,inception_v3,resnet50}}.pth                            not written here: `wsol-eval data weights`
  kangaroo/{{images/00001.jpg,annots/00001.xml}}                        scale kangaroo-raccoon: two clones
  raccoon_dataset/{{images/raccoon-1.jpg,annotations/raccoon-1.xml}}
  MNIST/raw/*-ubyte                                                    scale cifar10-jpeg
  cifar10-imagefolder.zip                                              scale cifar10-jpeg
"""

Entry = tuple[str, int]  # id and class


def write(root: Path) -> str:
    """Write all sets below a folder that is new or empty; returns a picture of the tree. ValueError for another."""
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root}: expected a new or empty folder")
    rng = np.random.default_rng(0)
    for write_set in (_cub, _ilsvrc, _openimages, _kangaroo_raccoon, _mnist, _cifar):
        write_set(root, rng)
    return TREE.format(root=root)


def _cub(root: Path, rng: np.random.Generator) -> None:
    shown = [name.split(".")[1] for name in CUB_CLASSES]
    for split, per_class in (("train", (4, 4, 4)), ("val", (6, 5, 3)), ("test", (3, 3, 3))):
        ids = []
        for label, count in enumerate(per_class):
            for i in range(count):
                first = 100 * ("train", "val", "test").index(split)
                number = (
                    f"{30107316117 + 1000 * label + i}" if split == "val" else f"{shown[label]}_{first + i:04d}_{i}"
                )
                ids.append((f"{CUB_CLASSES[label]}/{number}.jpg", label))
        _write_split(root, "CUB", split, ids, rng, last_newline=False)
    (root / "CUB" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    hidden = root / "CUB" / CUB_CLASSES[0] / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "copy-checkpoint.jpg").write_bytes(b"no image")


def _ilsvrc(root: Path, rng: np.random.Generator) -> None:
    train = [(f"train/{wnid}/{wnid}_{10026 + i}.JPEG", label) for label, wnid in enumerate(WNIDS) for i in range(4)]
    val = [(f"val2/{label}/{i}.jpeg", label) for label in range(3) for i in range(3)]
    test = [(f"val/ILSVRC2012_val_{i + 1:08d}.JPEG", i % 3) for i in range(9)]
    _write_split(root, "ILSVRC", "train", train, rng, boxes=False)
    (root / "metadata" / "ILSVRC" / "train" / "image_ids_proxy.txt").write_text(
        "".join(f"{name}\n" for name, _ in train[::2])
    )
    _write_split(root, "ILSVRC", "val", val, rng, several=True)
    _write_split(root, "ILSVRC", "test", test, rng, several=True)


def _openimages(root: Path, rng: np.random.Generator) -> None:
    for split, count in (("train", 4), ("val", 6), ("test", 3)):
        ids = [
            (f"{split}/{mid}/{rng.integers(1 << 60):016x}.jpg", label)
            for label, mid in enumerate(MIDS)
            for _ in range(count)
        ]
        _write_split(root, "OpenImages", split, ids, rng, boxes=False, masks=split != "train")


def _write_split(
    root: Path,
    dataset: str,
    split: str,
    ids: list[Entry],
    rng: np.random.Generator,
    boxes: bool = True,
    several: bool = False,
    masks: bool = False,
    last_newline: bool = True,
) -> None:
    """Images and metadata of a split; every kind of image comes early."""
    sizes, localization = [], []
    for number, (name, label) in enumerate(ids):
        width, height = (int(side) for side in rng.integers(90, 140, 2))
        x0, y0 = (int(value) for value in rng.integers(5, 30, 2))
        x1, y1 = x0 + width // 2, y0 + height // 2
        pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        pixels[y0 : y1 + 1, x0 : x1 + 1, label] = 250
        _save(root / dataset / name, pixels, KINDS[number % len(KINDS)])
        sizes.append(f"{name},{width},{height}")
        localization.append(f"{name},{x0},{y0},{x1},{y1}")
        if several and number % 2:
            localization.append(f"{name},{x0 + 3},{y0 + 3},{x1 + 5},{y1 + 5}")
        if masks:
            localization.pop()
            localization += _masks(root / dataset, name, (height, width), (x0, y0, x1, y1), several=number % 3 == 0)
    lines = {
        "image_ids.txt": [name for name, _ in ids],
        "class_labels.txt": [f"{name},{label}" for name, label in ids],
        "image_sizes.txt": sizes if boxes else [],
        "localization.txt": localization if boxes or masks else [],
    }
    folder = root / "metadata" / dataset / split
    folder.mkdir(parents=True, exist_ok=True)
    for file, each in lines.items():
        (folder / file).write_text("\n".join(each) + "\n" * (last_newline and bool(each)))


def _save(path: Path, pixels: np.ndarray, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if kind == "grey":
        image = image.convert("L")
    elif kind == "cmyk":
        image = image.convert("CMYK")
    options = {}
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    image.save(path, format="PNG" if kind == "png" else "JPEG", **options)


def _masks(root: Path, name: str, shape: tuple[int, int], box: tuple[int, int, int, int], several: bool) -> list[str]:
    """PNGs of one or two instances and of the ignored region; lines of localization.txt."""
    x0, y0, x1, y1 = box
    stem, mid = name.removesuffix(".jpg"), name.split("/")[1]
    middle = (x0 + x1) // 2
    parts = [(x0, middle), (middle + 1, x1)] if several else [(x0, x1)]
    lines = []
    for number, (left, right) in enumerate(parts):
        mask = np.zeros(shape, np.uint8)
        mask[y0 : y1 + 1, left : right + 1] = 255
        place = f"{stem}_m{mid}_{number:08x}.png"
        Image.fromarray(mask).save(root / place)
        lines.append(f"{name},{place},{'' if number else f'{stem}_ignore.png'}")
    ignored = np.zeros(shape, np.uint8)
    ignored[y0 : y1 + 1, x1 - 2 : x1 + 6] = 255
    Image.fromarray(ignored).save(root / f"{stem}_ignore.png")
    return lines


def _kangaroo_raccoon(root: Path, rng: np.random.Generator) -> None:
    """Seventeen of each. The third XML names its image without suffix, the fourth an older copy; the fifth has no size.

    The last kangaroo is cut off, as one is in the repository.
    """
    for label, clone in enumerate(CLONES):
        folder = root / clone.folder
        (folder / clone.annotations).mkdir(parents=True)
        for number in range(1, 18):
            stem = f"raccoon-{number}" if label else f"{number:05d}"
            width, height = (int(side) for side in rng.integers(90, 140, 2))
            x0, y0 = (int(value) for value in rng.integers(5, 30, 2))
            pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
            pixels[y0 : y0 + 50, x0 : x0 + 50, label] = 250
            _save(folder / "images" / f"{stem}.jpg", pixels, KINDS[number % len(KINDS)])
            named = {3: stem, 4: "older copy.jpg"}.get(number, f"{stem}.jpg")
            size = (
                "" if number == 5 else f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            )
            corners = [(x0 + shift, y0 + shift) for shift in ((0, 3) if number % 2 else (0,))]
            objects = "".join(
                f"<object><name>{clone.folder}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + 50}</xmax><ymax>{y + 50}</ymax></bndbox></object>"
                for x, y in corners
            )
            if not label and number == 17:
                path = folder / "images" / f"{stem}.jpg"
                path.write_bytes(path.read_bytes()[:-200])
            text = f"<annotation><filename>{named}</filename>{size}{objects}</annotation>"
            (folder / clone.annotations / f"{stem}.xml").write_text(text)


def _mnist(root: Path, rng: np.random.Generator) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 100), ("t10k", 40)):
        digits = np.zeros((count, 28, 28), np.uint8)
        digits[:, 6:22, 10:18] = rng.integers(128, 256, (count, 16, 8))
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array, magic in (("images-idx3", digits, 0x803), ("labels-idx1", labels, 0x801)):
            head = b"".join(value.to_bytes(4, "big") for value in (magic, *array.shape))
            (folder / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())


def _cifar(root: Path, rng: np.random.Generator) -> None:
    with zipfile.ZipFile(root / "cifar10-imagefolder.zip", "w") as archive:
        for part in ("train", "test"):
            for name in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"):
                for i in range(5):
                    buffer = io.BytesIO()
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
                    archive.writestr(f"{part}/{name}/{i:04d}.jpg", buffer.getvalue())
