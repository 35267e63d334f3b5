"""Single models and a user's own images: the work of the commands train, eval, embed, inspect and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hib_ndigit_mnist.backbones import HedgedModel
from hib_ndigit_mnist.checkpoint import check_output, load_file, save_file
from hib_ndigit_mnist.data import NDigitSet, ndigit_sets
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.evaluate import CONDITIONS, PAIR_TOLERANCE, Evaluation, TestSet, embed, fit_match
from hib_ndigit_mnist.finetune import embed_images, score, train_on
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.images import read_digit_images
from hib_ndigit_mnist.metrics import ood_auroc
from hib_ndigit_mnist.models import Encoder, build_encoder
from hib_ndigit_mnist.photos import ImageFiles
from hib_ndigit_mnist.settings import BackboneTraining, TrainedOn
from hib_ndigit_mnist.train import train
from shared_utils.logging import get_logger, rank

logger = get_logger("hib-ndigit-mnist")

GALLERY = 2000  # embeddings of clean training images stored in a model file, so that `inspect` can name numbers


# ---- a model as a file ----


def train_to_file(
    settings: TrainedOn, output: Path, seed: int, data_root: Path, device: str, checkpoint_every: int
) -> None:
    """Train one model and write weights, settings and a gallery of embedded training images.

    Raises:
        ValueError, FileNotFoundError: invalid settings, missing data.
    """
    check_output(output)
    sets = _sets(settings, data_root)
    training, checkpoint = settings.training(), output.with_name(output.name + ".checkpoint")
    (model,), _ = train(
        sets["train"],
        [training],
        [seed],
        device=device,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    if rank():
        return
    match = model.match
    if training.method == "contrastive":
        match = fit_match(model.encoder, sets["train"], training.occlusion_p)
    rows = torch.linspace(0, len(sets["train"]) - 1, min(GALLERY, len(sets["train"]))).long()
    gallery = embed(model.encoder, sets["train"].images(rows)).to(torch.float32)
    plain = {f.name: list(v) if isinstance(v := getattr(settings, f.name), tuple) else v for f in fields(TrainedOn)}
    state = {"settings": plain, "tile": sets["train"].tile, "seed": seed, "history": model.history}
    state |= {"encoder": model.encoder.state_dict(), "match": match.state_dict()}
    state |= {"gallery": {"mu": gallery.mu, "logvar": gallery.logvar, "labels": sets["train"].labels[rows]}}
    save_file(output, state)
    checkpoint.unlink(missing_ok=True)
    logger.info("%s: loss %.4f after %d steps", output, model.history["loss"][-1], training.steps)


class LoadedModel:
    """A model written by `train_to_file`: encoder and match in eval mode on the CPU, settings, gallery.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or a file of another kind.
    """

    def __init__(self, path: Path):
        state = load_file(path)
        if "backbone" in state:
            raise ValueError(f"{path}: a model of your own images: use eval or embed, with a folder or CSV of images")
        try:
            saved = {f.name: state["settings"][f.name] for f in fields(TrainedOn)}
            given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
            self.settings = TrainedOn(**given)
            options = self.settings.encoder_options(self.settings.num_digits, state["tile"])
            self.encoder: Encoder = build_encoder(**options)
            self.match = MatchProbability()
            self.encoder.load_state_dict(state["encoder"])
            self.match.load_state_dict(state["match"])
            gallery = state["gallery"]
            self.gallery = GaussianMixtureEmbedding(gallery["mu"], gallery["logvar"])
            self.gallery_labels: Tensor = gallery["labels"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a model of this package ({str(error).splitlines()[0]})") from error
        self.encoder.eval()


def evaluate_file(
    path: Path,
    split: str | None,
    conditions: Sequence[str],
    data_root: Path,
    device: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, float]:
    """All scores of a model file on its data set; `sizes` go to `TestSet.of`, `options` to `Evaluation`."""
    for condition in conditions:
        if condition not in CONDITIONS:
            raise ValueError(f"conditions: expected {' or '.join(CONDITIONS)}, got {condition!r}")
    model = LoadedModel(path)
    sets = _sets(model.settings, data_root)
    splits = [name for name in sets if name != "train"]
    split = split or splits[0]
    if split not in splits:
        raise ValueError(f"split: expected one of {', '.join(splits)}, got {split!r}")
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    encoder = model.encoder.to("cuda" if on_cuda else "cpu")
    evaluation = Evaluation(encoder, model.match, TestSet.of(sets[split], **sizes), **options)
    scores = evaluation.verification() | evaluation.identification() | evaluation.calibration()
    if not encoder.point:
        scores |= evaluation.uncertainty() | evaluation.spread() | evaluation.selective()
        if split == "test_seen" and "test_unseen" in sets:  # numbers that were not trained are the outside images
            outside = Evaluation(encoder, model.match, TestSet.of(sets["test_unseen"], **sizes), **options)
            scores["ood_auroc_clean"] = ood_auroc(evaluation.eta["clean"], outside.eta["clean"])
    unwanted = [condition for condition in CONDITIONS if condition not in conditions]
    return {name: value for name, value in scores.items() if not any(word in name for word in unwanted)}


# ---- a user's own images ----


def embed_to_file(
    model_path: Path, images: Path, output: Path, invert: bool, skip_broken: bool, reading: dict[str, Any]
) -> None:
    """Write mu (n, C, D), logvar (n, C, D; left out for points), eta (n,) and file names (n,) as .npz.

    `reading` (workers, device, precision) is for models of a user's own images.
    """
    check_output(output)
    if "backbone" in load_file(model_path):
        own = HedgedModel.load(model_path)
        files = _readable(ImageFiles.of(images, labelled=False), skip_broken, reading["workers"])
        names, embedding = files.names, embed_images(own, files, **reading)
        eta = own.uncertainty(embedding)
    else:
        model = LoadedModel(model_path)
        pixels, names = read_digit_images(images, model.encoder.shape, invert, skip_broken)
        embedding = embed(model.encoder, pixels)
        eta = _eta(model, embedding)
    arrays: dict[str, Any] = {"mu": embedding.mu.numpy(), "eta": eta.numpy()}
    if embedding.logvar is not None:
        arrays["logvar"] = embedding.logvar.numpy()
    output.parent.mkdir(parents=True, exist_ok=True)
    np.savez(output, files=np.array(names), **arrays)
    logger.info("%d images in %s", len(embedding), output)


def train_on_images(
    source: Path, settings: BackboneTraining, output: Path, seed: int, skip_broken: bool, options: dict[str, Any]
) -> None:
    """Train a backbone on class folders or a CSV and write the model; `options` go to `train_on`."""
    check_output(output)
    images = _readable(ImageFiles.of(source), skip_broken, options["workers"]).with_partners()
    checkpoint = output.with_name(output.name + ".checkpoint")
    train_on(images, images.labels, settings, seed, checkpoint=checkpoint, **options).save(output)
    checkpoint.unlink(missing_ok=True)
    logger.info("%s: %d images of %d classes", output, len(images), len(images.labels.unique()))


def evaluate_on_images(
    model_path: Path, source: Path, outside: Path | None, skip_broken: bool, reading: dict[str, Any]
) -> dict[str, float]:
    """The scores of `score` on class folders or a CSV; `outside` needs no classes."""
    if "backbone" not in load_file(model_path):
        raise ValueError(f"{model_path}: a model of N-digit images; leave out {source}")
    model = HedgedModel.load(model_path)
    sets = [ImageFiles.of(source)] + ([ImageFiles.of(outside, labelled=False)] if outside else [])
    if len(sets[0].classes) < 2:
        raise ValueError(f"{source}: expected at least two classes, found only {sets[0].classes[0]!r}")
    read = [_readable(each, skip_broken, reading["workers"]) for each in sets]
    embedding, *far = (embed_images(model, each, **reading) for each in read)
    skipped = sum(map(len, sets)) - sum(map(len, read))
    return score(model, embedding, read[0].labels, *far) | {"skipped": skipped}


def _readable(images: ImageFiles, skip_broken: bool, workers: int) -> ImageFiles:
    return images.without_broken(workers) if skip_broken else images


def inspect_image(model_path: Path, image: Path, invert: bool, top: int) -> dict[str, Any]:
    """Gaussians and eta of an image, and the numbers with the highest mean match probability."""
    model = LoadedModel(model_path)
    pixels = read_digit_images(image, model.encoder.shape, invert).images
    if len(pixels) != 1:
        raise ValueError(f"{image}: expected one image, got {len(pixels)}")
    embedding = embed(model.encoder, pixels)
    match_prob = model.match.pairwise(embedding, model.gallery.to(torch.float64), method="quadrature")[0]
    numbers, which = model.gallery_labels.unique(return_inverse=True)
    mean = torch.zeros(len(numbers), dtype=match_prob.dtype).index_add_(0, which, match_prob) / which.bincount()
    best = mean.argsort(descending=True)[:top]
    width = model.settings.num_digits
    return {
        "eta": round(float(_eta(model, embedding)[0]), 4),
        "mu": embedding.mu[0].tolist(),
        "sigma": embedding.variance()[0].sqrt().tolist(),
        "match": {f"{int(numbers[i]):0{width}d}": round(float(mean[i]), 4) for i in best},
    }


def _eta(model: LoadedModel, embedding: GaussianMixtureEmbedding) -> Tensor:
    return model.match.self_mismatch(embedding, method="quadrature", tolerance=PAIR_TOLERANCE)


# ---- data ----


def export(data_root: Path, output: Path, num_digits: int, gap: str, standard: bool, seed: int) -> None:
    """Write every split as <split>.npz with images (n, 28, 28 N) uint8 and labels (n,) int64."""
    sets = ndigit_sets("mnist", num_digits, gap, data_root, standard=standard, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    for split, data in sets.items():
        images = data.images(torch.arange(len(data)))[:, 0].numpy()
        np.savez(output / f"{split}.npz", images=images, labels=data.labels.numpy())
        logger.info("%s: %d images of %d numbers", output / f"{split}.npz", len(data), len(data.labels.unique()))


def _sets(settings: TrainedOn, data_root: Path) -> dict[str, NDigitSet]:
    name, num_digits, gap, sizes = settings.data()
    return ndigit_sets(name, num_digits, gap, data_root, **dict(sizes))
