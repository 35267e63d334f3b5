"""The small VAE of the truncation experiment: the paper's figure 7 without a StyleGAN.

Fakes are decoded from psi * N(0, I); the smaller psi, the nearer to the mode: high fidelity, low diversity.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from shared_utils.files import whole_file
from shared_utils.seeding import restore_rng_state, rng_state, seed_everything

PIXEL_SD = 0.15  # of the Gaussian likelihood; a Bernoulli one leaves most of the code unused on 8 x 8 digits


class VAE(nn.Module):
    """Fully connected VAE on flat images in [0, 1]: (B, D) -> latent (B, L) -> (B, D)."""

    def __init__(self, dim: int, latent: int, hidden: tuple[int, ...]):
        super().__init__()
        self.latent = latent
        self.encoder = _mlp(dim, *hidden, 2 * latent)
        self.decoder = _mlp(latent, *reversed(hidden), dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, D) -> negative evidence lower bound in nats per image (constants left out), 0-d float32."""
        mean, log_var = self.encoder(images).chunk(2, dim=1)  # (B, L) each
        z = mean + torch.randn_like(mean) * (log_var / 2).exp()  # (B, L)
        reconstruction = ((self.decode(z) - images) / PIXEL_SD).square().sum() / 2
        kl = (mean.square() + log_var.exp() - 1 - log_var).sum() / 2
        return (reconstruction + kl) / len(images)

    def decode(self, z: Tensor) -> Tensor:
        """(B, L) -> (B, D) mean image in [0, 1]."""
        return self.decoder(z).sigmoid()


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit_vae(
    images: Tensor,
    *,
    latent: int = 8,
    hidden: tuple[int, ...] = (128, 64),
    epochs: int = 150,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 25,
) -> VAE:
    """Train the VAE with Adam; the same arguments give the same weights, even if it was killed and restarted.

    Reseeds the global random state with `seed`. All float32: at this size half precision gains nothing.

    Args:
        images: (n, D) floating in [0, 1]; copied to the device once.
        latent: L, width of the code.
        hidden: widths of the encoder's layers; the decoder mirrors them.
        epochs: passes over the images.
        batch_size: images per step; the last batch of an epoch may be smaller.
        lr: learning rate.
        seed: seed of weights, order and noise.
        device: "cpu", "cuda" or "cuda:<index>".
        checkpoint: file to resume from and to save to; refused if its settings or images differ.
        checkpoint_every: epochs between saves.

    Returns:
        The trained model in eval mode, on `device`.

    Raises:
        ValueError: images not (n, D) floating in [0, 1]; a checkpoint that is damaged or from another run.
    """
    _check_images(images)
    fabric = _fabric(torch.device(device))
    seed_everything(seed)
    model = VAE(images.shape[1], latent, hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    wrapped, optimizer = fabric.setup(model, optimizer)
    run = dict(latent=latent, hidden=list(hidden), epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    run["images"] = hashlib.sha256(images.cpu().float().contiguous().numpy().data).hexdigest()
    images = images.to(fabric.device, torch.float32)
    done = 0
    if checkpoint is not None and Path(checkpoint).exists():
        done = _resume(Path(checkpoint), run, model, optimizer)

    for epoch in range(done, epochs):
        order = torch.randperm(len(images), device=images.device)
        for batch in images[order].split(batch_size):  # (B, D)
            optimizer.zero_grad()
            fabric.backward(wrapped(batch))
            optimizer.step()
        finished = epoch + 1
        if checkpoint is not None and (finished % checkpoint_every == 0 or finished == epochs):
            _save(Path(checkpoint), run, finished, model, optimizer)
    return model.eval()


@torch.inference_mode()
def sample(model: VAE, psi: float, n: int, seed: int) -> Tensor:
    """Decode n draws of psi * N(0, I): (n, D) float32 on the CPU; one seed gives the same normals at any psi."""
    z = torch.randn(n, model.latent, generator=torch.Generator().manual_seed(seed))  # (n, L)
    return model.decode(psi * z.to(next(model.parameters()).device)).cpu()


def _check_images(images: Tensor) -> None:
    if images.ndim != 2 or 0 in images.shape or not images.is_floating_point():
        found = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images: expected floating (n, D), got {found}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # NaN fails as well
        raise ValueError(f"images: expected values in [0, 1], got [{low:g}, {high:g}]")


def _fabric(device: torch.device) -> Fabric:
    devices = 1 if device.type == "cpu" else [device.index or 0]
    return Fabric(accelerator=device.type, devices=devices, precision="32-true")


def _save(path: Path, run: dict, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"run": run, "epoch": epoch, "rng": rng_state()}
    with whole_file(path) as temporary:
        torch.save(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, temporary)


def _resume(path: Path, run: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load everything a checkpoint holds; returns the number of finished epochs."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = state["run"]
    except Exception as error:  # zip, pickle and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a checkpoint ({reason}); delete it to start again") from error
    if stored != run:
        differing = ", ".join(key for key in run if run[key] != stored.get(key))
        raise ValueError(f"{path}: checkpoint of another run (different {differing}); delete it or name another")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restore_rng_state(state["rng"])
    return state["epoch"]
