"""The paper's corruption: in each digit tile, with probability p, a square of uniformly drawn side is painted over.

Occluders are plain numbers: they can be stored and applied to the same or other images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OcclusionInfo:
    """One occluder per digit tile; every field (..., N).

    Args:
        occluded: bool, whether the tile has one.
        side: int64 in 0 .. tile.
        top: int64, first row inside the tile.
        left: int64, first column inside the tile.
    """

    occluded: Tensor
    side: Tensor
    top: Tensor
    left: Tensor

    def __getitem__(self, index: slice | Tensor) -> OcclusionInfo:
        return OcclusionInfo(self.occluded[index], self.side[index], self.top[index], self.left[index])

    def hidden(self, tile: int) -> Tensor:
        """(..., N, tile, tile) bool: the pixels under an occluder."""
        pixel = torch.arange(tile, device=self.side.device)

        def within(start: Tensor) -> Tensor:
            return (pixel >= start[..., None]) & (pixel < (start + self.side)[..., None])

        covered = within(self.top)[..., :, None] & within(self.left)[..., None, :]
        return covered & self.occluded[..., None, None]


def draw_occlusion(uniform: Tensor, p: float | Tensor, tile: int) -> OcclusionInfo:
    """Occluders from uniform numbers in [0, 1): (..., N, 4) -> fields (..., N).

    The side is uniform over 0 .. tile, the corner over the positions inside the tile; E[hidden area] at p = 1 is
    (2 tile + 1) / (6 tile): 0.339 for 28.
    """
    occluded = uniform[..., 0] < p
    side = _scaled(uniform[..., 1], tile + 1)
    room = tile - side + 1
    return OcclusionInfo(occluded, side, _scaled(uniform[..., 2], room), _scaled(uniform[..., 3], room))


def apply_occlusion(x: Tensor, info: OcclusionInfo, fill: float = 0) -> Tensor:
    """Paint the occluders into images.

    Args:
        x: (B, 1, H, W) or (1, H, W), any dtype; N square tiles of side H = W / N next to each other.
        info: fields (B, N) or (N,).
        fill: value of hidden pixels; 0 is MNIST's background.

    Raises:
        ValueError: W is not N tiles of side H.
    """
    tile, tiles = x.shape[-2], info.side.shape[-1]
    if x.shape[-1] != tiles * tile:
        raise ValueError(f"x: {tiles} tiles of side {tile} need a width of {tiles * tile}, got {x.shape[-1]}")
    return x.masked_fill(join_tiles(info.hidden(tile)), fill)


def join_tiles(tiles: Tensor) -> Tensor:
    """(..., N, h, w) side by side: (..., 1, h, N w)."""
    return tiles.movedim(-3, -2).flatten(-2).unsqueeze(-3)


@dataclass(frozen=True)
class RandomOcclusion:
    """Occlude every tile independently; calling it returns the images and the occluders that were drawn.

    Args:
        p: probability of an occluder per tile.
        tile: side of a digit in pixels.
        fill: value of hidden pixels.

    Raises:
        ValueError: p outside [0, 1], tile < 1; on a call: a height other than `tile`, a width that is not a multiple.
    """

    p: float = 0.2
    tile: int = 28
    fill: float = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or self.tile < 1:
            raise ValueError(f"expected p in [0, 1] and tile >= 1, got p={self.p}, tile={self.tile}")

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, OcclusionInfo]:
        """Images (B, 1, H, W) or (1, H, W), any dtype -> the same shape, and the occluders (B, N) or (N,)."""
        if x.ndim not in (3, 4) or x.shape[-3] != 1:
            raise ValueError(f"x: expected (B, 1, H, W) or (1, H, W), got {tuple(x.shape)}")
        if x.shape[-2] != self.tile or x.shape[-1] % self.tile:
            size = f"{x.shape[-2]} x {x.shape[-1]}"
            raise ValueError(f"x: expected height {self.tile} and a width that is a multiple of it, got {size}")
        shape = (*x.shape[:-3], x.shape[-1] // self.tile, 4)
        uniform = torch.rand(shape, generator=generator, device=generator.device if generator else x.device)
        info = draw_occlusion(uniform.to(x.device), self.p, self.tile)
        return apply_occlusion(x, info, self.fill), info


def _scaled(uniform: Tensor, count: int | Tensor) -> Tensor:
    """Integers 0 .. count - 1; the clamp guards against uniform * count rounding up to count."""
    return (uniform * count).long().clamp(max=count - 1)
