"""The training loop: several models in one process, everything resident on the device, exactly resumable.

A step is a pure function of the parameters and of random numbers drawn in advance: uniforms choose images, occluders
and pairs, normals give the samples. They are drawn per model, for a chunk of steps at once, so a model does not depend
on the others in the stack, a whole step is one CUDA graph, and every rank of a distributed run sees the same global
batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor

from hib_ndigit_mnist.checkpoint import Progress, deferred_interrupt
from hib_ndigit_mnist.data import NDigitSet
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding, default_logvar
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.losses import HOPELESS, LossOutput, eta_of_variance, vib_objective
from hib_ndigit_mnist.models import Encoder, ModelStack, build_encoder, to_unit
from hib_ndigit_mnist.occlusion import draw_occlusion, join_tiles
from hib_ndigit_mnist.pair_nll import DISTANCE_EPS
from hib_ndigit_mnist.pairs import ClassIndex, Pairs, balanced_pairs, two_streams
from hib_ndigit_mnist.settings import BackboneTraining, Training
from shared_utils.cuda_graph import StepGraph, set_learning_rate
from shared_utils.logging import get_logger, progress

logger = get_logger("hib-ndigit-mnist")

CHUNK = 50  # steps whose random numbers are drawn at once
COLLAPSED = 0.02  # coefficient of variation of sigma over a batch


@dataclass(frozen=True)
class Trained:
    """A trained model on the CPU and its diagnostics, one entry per logged step."""

    encoder: Encoder
    match: MatchProbability
    history: dict[str, list[float]] = field(default_factory=dict)


Visit = Callable[[int, list[Trained]], list[Any]]


def train(
    data: NDigitSet,
    trainings: Sequence[Training],
    seeds: Sequence[int],
    *,
    device: str = "auto",
    graph: bool = True,
    checkpoint: Path | None = None,
    checkpoint_every: int = 5000,
    visit_at: Sequence[int] = (),
    visit: Visit | None = None,
) -> tuple[list[Trained], list[list[Any]]]:
    """Train one model per seed, all stacked, in float32: networks of this size gain nothing from lower precision.

    The same call gives the same models, interrupted or not.

    Under torchrun the ranks share the images of every batch, and the loss covers all pairs of the whole batch: `batch`
    and `lr` mean the same with 1 and with N processes.

    Args:
        data: training images.
        trainings: one per model, all with the same `shape()`.
        seeds: one per model, for its weights and all its random numbers.
        device: see `make_fabric`.
        graph: on CUDA, replay the step as a CUDA graph (single process).
        checkpoint: file to resume from and to save to.
        checkpoint_every: steps between saves, rounded up to whole chunks.
        visit_at: steps after which `visit` is called.
        visit: (step, models so far) -> one result per model, made of plain values.

    Returns:
        The models, and for each visit its results.

    Raises:
        ValueError: no models, trainings that cannot be stacked, a batch that the ranks cannot share equally,
            a checkpoint of another run.
        KeyboardInterrupt: after the state was saved, if there is a checkpoint file.
    """
    if not trainings or len(trainings) != len(seeds):
        raise ValueError(f"expected a training and a seed per model, got {len(trainings)}, {len(seeds)}")
    if len({training.shape() for training in trainings}) > 1:
        raise ValueError("trainings: only beta and occlusion_p may differ within a stack")
    run = _Run(data, trainings, seeds, device, graph)
    state = Progress(checkpoint, _identity(data, trainings, seeds, visit_at))
    state.resume(run)
    _warn_if_hopeless(trainings[0])
    steps = trainings[0].steps
    with deferred_interrupt() as interrupted, progress() as bar:
        task = bar.add_task(f"train {len(seeds)} x {trainings[0].method}", total=steps, completed=run.step)
        while run.step < steps:
            stop = min([s for s in (*visit_at, steps) if s > run.step])
            run.chunk(min(CHUNK, stop - run.step))
            bar.update(task, completed=run.step)
            if visit and run.step in visit_at:
                state.visits.append(visit(run.step, run.models()))
            if checkpoint and (run.step == steps or run.step // checkpoint_every > state.saved // checkpoint_every):
                state.save(run)
            if interrupted():
                if checkpoint:
                    state.save(run)
                    logger.info("step %d is saved in %s; the same command resumes there", run.step, checkpoint)
                raise KeyboardInterrupt
    return run.models(), state.visits


class _Run:
    """The state between two chunks: the stack, its optimizer and its random streams."""

    def __init__(
        self,
        data: NDigitSet,
        trainings: Sequence[Training],
        seeds: Sequence[int],
        device: str,
        graph: bool,
    ):
        self.fabric = make_fabric(device, "32-true")
        self.training, self.step = trainings[0], 0
        self.history: list[tuple[int, Tensor]] = []  # step, diagnostics
        self.data = data.to(self.fabric.device)
        self.index = ClassIndex(self.data.labels)
        options = self.training.encoder_options(data.num_digits, data.tile)
        self.stack = ModelStack([_new_encoder(options, seed) for seed in seeds])
        cuda = self.fabric.device.type == "cuda"
        groups: list[dict[str, Any]] = [
            {"params": list(self.stack.weights)},
            {"params": list(self.stack.match.parameters())},
        ]
        for group in groups:
            group["lr"] = torch.tensor(0.0, device=self.fabric.device) if cuda else 0.0
        optimizer = torch.optim.Adam(groups, fused=True, capturable=cuda)
        self.module, self.optimizer = self.fabric.setup(self.stack, optimizer)
        self.generators = [torch.Generator(self.fabric.device).manual_seed(seed) for seed in seeds]

        def per_model(name: str) -> Tensor:
            return torch.tensor([getattr(each, name) for each in trainings], device=self.fabric.device)

        self.beta, self.occlusion_p = per_model("beta"), per_model("occlusion_p")
        self.graph = StepGraph(self._step) if cuda and graph and self.fabric.world_size == 1 else None
        if self.training.batch % self.fabric.world_size:
            raise ValueError(
                f"batch: {self.training.batch} images cannot be shared equally by {self.fabric.world_size} ranks"
            )

    def chunk(self, steps: int) -> None:
        """Take `steps` steps with new random numbers; log the last one."""
        uniform, normal = self._draw(steps)
        for i in range(steps):
            for group, factor in zip(self.optimizer.param_groups, (1.0, self.training.match_lr), strict=True):
                rate = learning_rate(self.training, self.step) * factor
                set_learning_rate(group, rate)
            out, sigma = (self.graph or self._step)(uniform[i], normal[i])
            self.step += 1
        self.history.append((self.step, _diagnostics(out, sigma)))

    def _draw(self, steps: int) -> tuple[Tensor, Tensor]:
        t, device = self.training, self.fabric.device
        wide = t.batch * (1 + 4 * self.data.num_digits) + t.batch * (t.batch - 1) // 2
        samples = 0 if t.is_point else t.samples
        uniform = [torch.rand(steps, wide, generator=g, device=device) for g in self.generators]
        normal = [torch.randn(steps, t.batch, samples, t.dim, generator=g, device=device) for g in self.generators]
        return torch.stack(uniform, 1), torch.stack(normal, 1)  # (steps, M, ...)

    def _step(self, uniform: Tensor, normal: Tensor) -> tuple[LossOutput, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        images, labels, keys = self._batch(uniform)
        embedding = self.stack.embedding(self._encode(images))
        pairs = balanced_pairs(labels, keys, self.training.pairs)
        out = self._loss(embedding, normal, pairs)
        self.fabric.backward(out.loss.sum())
        self.optimizer.step()
        return LossOutput(*(part.detach() for part in out)), embedding.variance().detach().sqrt().mean((-2, -1))

    def _batch(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Random numbers (M, ...) -> images (M, B, 1, H, W) in [0, 1], labels (M, B), pair keys (M, pairs)."""
        b, n = self.training.batch, self.data.num_digits
        choice, occluders, keys = uniform.split([b, 4 * b * n, uniform.shape[1] - b * (1 + 4 * n)], 1)
        rows = two_streams(self.index, len(self.data), choice.unflatten(1, (2, b // 2)))  # (M, B)
        tiles = self.data.digits[self.data.image_ids[rows]]  # (M, B, N, h, h)
        p = self.occlusion_p[:, None, None]
        info = draw_occlusion(occluders.unflatten(1, (b, n, 4)), p, self.data.tile)
        return to_unit(join_tiles(tiles.masked_fill(info.hidden(self.data.tile), 0))), self.data.labels[rows], keys

    def _encode(self, images: Tensor) -> Tensor:
        """Outputs of the whole batch; each rank encodes its share, and gradients flow back to that rank."""
        ranks = self.fabric.world_size
        if ranks == 1:
            return self.module(images)
        mine = images.chunk(ranks, 1)[self.fabric.global_rank]
        gathered = cast(
            Tensor, self.fabric.all_gather(self.module(mine), sync_grads=True)
        )  # (ranks, M, B / ranks, ...)
        return gathered.movedim(0, 1).flatten(1, 2)

    def _loss(self, embedding: GaussianMixtureEmbedding, normal: Tensor, pairs: Pairs) -> LossOutput:
        if self.training.method == "contrastive":
            return _classical(embedding.mu[..., 0, :], pairs, self.training.margin, self.stack.match)
        z = embedding.sample(1 if self.training.is_point else self.training.samples, noise=normal)
        return vib_objective(
            embedding, z, pairs, self.stack.match, self.beta, self.training.objective, self.training.kl
        )

    def models(self) -> list[Trained]:
        """Copies on the CPU, with the history so far."""
        steps = [step for step, _ in self.history]
        logged = torch.stack([values for _, values in self.history]).cpu()  # (entries, quantities, M)
        result = []
        for number in range(len(self.stack)):
            history = dict(zip(DIAGNOSTICS, logged[:, :, number].T.tolist(), strict=True))
            _warn_if_collapsed(history["sigma_variation"], self.training, number)
            encoder, match = self.stack.model(number)
            result.append(Trained(encoder, match, {"step": steps} | history))
        return result


DIAGNOSTICS = (*LossOutput._fields, "sigma", "sigma_min", "sigma_max", "sigma_variation")


def _diagnostics(out: LossOutput, sigma: Tensor) -> Tensor:
    """(quantities, M): the loss and its parts, and sigma over the batch (M, B)."""
    mean = sigma.mean(1)
    spread = [mean, sigma.amin(1), sigma.amax(1), sigma.std(1) / mean.clamp_min(1e-12)]
    return torch.stack([value.float() for value in (*out, *spread)]).clone()


def _warn_if_collapsed(variation: list[float], training: Training, number: int) -> None:
    late = variation[len(variation) // 2 :]
    if not training.is_point and training.steps > 2 * CHUNK and max(late) < COLLAPSED:
        logger.warning(
            "model %d: sigma is nearly the same for all images (variation %.1f %%): the variance has collapsed; "
            "a larger beta, more occlusion or a larger logvar_bias may help",
            number,
            100 * max(late),
        )


def _warn_if_hopeless(training: Training) -> None:
    bias = default_logvar(training.dim) if training.logvar_bias is None else training.logvar_bias
    eta = 0.0 if training.is_point else eta_of_variance(training.dim * math.exp(bias), 1.0, 1.0)
    if eta > HOPELESS:
        logger.warning(
            "logvar_bias %.2f with %d dimensions: an image matches itself with a probability of %.2g at the start, so "
            "that partners cannot match either; use a smaller one",
            bias,
            training.dim,
            1 - eta,
        )


def _classical(z: Tensor, pairs: Pairs, margin: float, match: MatchProbability) -> LossOutput:
    """Equation 1 on stacked points z (M, B, D), with the pairs and weights of the soft loss."""
    left, right = (z.gather(1, i[..., None].expand(-1, -1, z.shape[2])) for i in (pairs.first, pairs.second))
    squares = (left - right).square().sum(-1)
    apart = (margin - (squares + DISTANCE_EPS).sqrt()).clamp_min(0).square()
    terms = torch.where(pairs.match, squares, apart) * pairs.weight
    positive, negative = (terms * pairs.match).sum(1), (terms * ~pairs.match).sum(1)
    idle = 0.0 * (match.a_raw + match.b)  # a and b are not used here: they are fitted after training
    return LossOutput(positive + negative + idle, 2 * positive, 2 * negative, idle, match.a, match.b)


def learning_rate(training: Training | BackboneTraining, step: int) -> float:
    """Cosine schedule from lr to lr_final."""
    share = (1 + math.cos(math.pi * step / training.steps)) / 2
    return training.lr_final + (training.lr - training.lr_final) * share


def make_fabric(device: str = "auto", precision: str = "auto") -> Fabric:
    """Fabric with one process, or with all that torchrun or Slurm started (DDP).

    Args:
        device: auto (CUDA if available), cpu or cuda.
        precision: auto (bf16-mixed on CUDA from Ampere on, else 32-true) or a precision of Fabric.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        ampere = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16-mixed" if ampere else "32-true"
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", world)))
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(
        accelerator=device,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]  # Fabric checks the name
    )
    fabric.launch()
    return fabric


def _new_encoder(options: dict[str, Any], seed: int) -> Encoder:
    """An encoder whose weights depend only on the seed; leaves the global random state unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(**options)


def _identity(
    data: NDigitSet, trainings: Sequence[Training], seeds: Sequence[int], visit_at: Sequence[int]
) -> dict[str, Any]:
    plain = [{name: list(v) if isinstance(v, tuple) else v for name, v in asdict(t).items()} for t in trainings]
    return {"trainings": plain, "seeds": list(seeds), "data": data.fingerprint(), "visit_at": list(visit_at)}
