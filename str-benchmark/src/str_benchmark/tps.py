"""Thin-plate-spline rectification (section 3.1, appendix; equations 1 to 5): fiducial points to a sampling grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6


def base_points(num_fiducial: int) -> Tensor:
    """C: the fiducial points of the rectified image, (F, 2) float64: the top edge (y = -1), then the bottom (y = 1)."""
    x = torch.linspace(-1, 1, num_fiducial // 2, dtype=torch.float64)
    return torch.cat([torch.stack([x, torch.full_like(x, y)], 1) for y in (-1.0, 1.0)])


def skewed_start(num_fiducial: int) -> Tensor:
    """C' that the localization network starts from (RARE, figure 6a), (F, 2) float64: not the identity."""
    n = num_fiducial // 2
    x, y = torch.linspace(-1, 1, n, dtype=torch.float64), torch.linspace(0, 1, n, dtype=torch.float64)
    return torch.cat([torch.stack([x, -y], 1), torch.stack([x, 1 - y], 1)])


def pixel_centres(height: int, width: int) -> Tensor:
    """P: (height * width, 2) float64 as (x, y), row-major."""
    x = (2 * torch.arange(width, dtype=torch.float64) + 1 - width) / width
    y = (2 * torch.arange(height, dtype=torch.float64) + 1 - height) / height
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def inverse_delta(points: Tensor) -> Tensor:
    """Inverse of [[1, C, R], [0, 0, C^T], [0, 0, 1^T]], (F+3, F+3), with R_ij = r^2 ln r (equations 2 and 4)."""
    f = len(points)
    r = torch.cdist(points, points)
    kernel = r.square() * torch.where(r == 0, torch.ones_like(r), r).log()
    delta = points.new_zeros(f + 3, f + 3)
    delta[:f, 0], delta[:f, 1:3], delta[:f, 3:] = 1, points, kernel
    delta[f : f + 2, 3:], delta[f + 2, 3:] = points.T, 1
    return torch.linalg.inv(delta)


def lifted(pixels: Tensor, points: Tensor) -> Tensor:
    """P-hat: a row [1, x, y, r_1^2 ln r_1, ...] for each pixel, (n, F+3), r its distance from a base point."""
    r = torch.cdist(pixels, points)
    return torch.cat([torch.ones_like(pixels[:, :1]), pixels, r.square() * (r + EPSILON).log()], 1)


class ThinPlateSpline(nn.Module):
    """Grid generator for a fixed number of fiducial points and a fixed size of the rectified image.

    The two matrices are solved in float64 and kept as float32 buffers. They depend only on the sizes, so they are not
    saved: a checkpoint fits images of any size.

    Args:
        num_fiducial: F, even, 4 or more.
        size: (height, width) of the rectified image.
    """

    inv_delta_C: Tensor  # (F+3, F+3)
    P_hat: Tensor  # (height * width, F+3)

    def __init__(self, num_fiducial: int, size: tuple[int, int]):
        super().__init__()
        if num_fiducial < 4 or num_fiducial % 2:
            raise ValueError(f"num_fiducial: expected an even number of 4 or more, got {num_fiducial}")
        if min(size) < 1:
            raise ValueError(f"size: expected (height, width) of 1 or more, got {size}")
        self.num_fiducial, self.size = num_fiducial, tuple(size)
        points = base_points(num_fiducial)
        self.register_buffer("inv_delta_C", inverse_delta(points).float(), persistent=False)
        self.register_buffer("P_hat", lifted(pixel_centres(*size), points).float(), persistent=False)

    def forward(self, C_prime: Tensor) -> Tensor:
        """Grid (B, height, width, 2) float32 for `grid_sample`, from fiducial points C' (B, F, 2) of the input."""
        if C_prime.ndim != 3 or C_prime.shape[1:] != (self.num_fiducial, 2):
            raise ValueError(f"C_prime: expected (B, {self.num_fiducial}, 2), got {tuple(C_prime.shape)}")
        with torch.autocast(C_prime.device.type, enabled=False):  # r^2 ln r and the solve need float32
            padded = F.pad(C_prime.to(self.P_hat.dtype), (0, 0, 0, 3))  # (B, F+3, 2)
            transform = self.inv_delta_C @ padded  # T, (B, F+3, 2)
            return (self.P_hat @ transform).reshape(-1, *self.size, 2)

    def rectify(self, images: Tensor, C_prime: Tensor) -> Tensor:
        """Images (B, C, H, W) resampled to (B, C, *size): bilinear, border padding, align_corners.

        Base points as C' are not an exact identity: P lies on pixel centres, while align_corners puts -1 and 1 on the
        outer ones. The public checkpoints were trained this way.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(self.P_hat.dtype)
            return F.grid_sample(images, self(C_prime), padding_mode="border", align_corners=True)
