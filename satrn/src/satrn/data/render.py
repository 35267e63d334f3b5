"""A renderer of words in batches: glyphs of matplotlib's fonts, each placed by its own affine map.

A word may be rotated, bent along an arc or broken into two lines; backgrounds have no edges that would give away the
angle. `scene` imitates words cut from photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WARPS = ("straight", "rotate", "curve", "multi_line", "upright_or_vertical", "scene")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSerif.ttf", "DejaVuSans-Oblique.ttf")
SCENE_FONTS = (*FONTS, "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf")
CELL = 1.5  # side of a glyph's cell, in units of the font size
CELL_PIXELS = 30
LINE_HEIGHT = 1.05  # in units of the font size


@lru_cache(maxsize=8)
def glyphs(charset: str, fonts: tuple[str, ...] = FONTS) -> tuple[Tensor, Tensor]:
    """Coverage [fonts, characters, CELL_PIXELS, CELL_PIXELS] in 0 .. 1 and advances [fonts, characters] in font sizes.

    The middle of a capital's height in DejaVu is in the middle of its cell.

    Raises:
        ValueError: characters that a font lacks: it would draw them all as the same box.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    size = CELL_PIXELS / CELL
    cells = np.zeros((len(fonts), len(charset), CELL_PIXELS, CELL_PIXELS), dtype=np.float32)
    advances = np.zeros(cells.shape[:2], dtype=np.float32)
    for i, name in enumerate(fonts):
        known = FT2Font(str(folder / name)).get_charmap()
        lacking = "".join(character for character in charset if ord(character) not in known)
        if lacking:
            raise ValueError(f"words must have characters of matplotlib's {name}, which lacks {lacking!r}")
        font = ImageFont.truetype(str(folder / name), round(size))
        for j, character in enumerate(charset):
            image = Image.new("L", (CELL_PIXELS, CELL_PIXELS))
            baseline = CELL_PIXELS / 2 + 0.365 * size
            ImageDraw.Draw(image).text((CELL_PIXELS / 2, baseline), character, 255, font, anchor="ms")
            cells[i, j] = np.asarray(image, dtype=np.float32) / 255
            advances[i, j] = font.getlength(character) / size
    return torch.from_numpy(cells), torch.from_numpy(advances)


def random_words(count: int, charset: str, lengths: tuple[int, int], generator: torch.Generator) -> list[str]:
    """Strings of uniform characters and uniform length between two bounds (included).

    Raises:
        ValueError: count below 1 or impossible lengths.
    """
    shortest, longest = lengths
    if count < 1 or not 1 <= shortest <= longest:
        raise ValueError(f"need count >= 1 and 1 <= shortest <= longest, got {count} and {lengths}")
    drawn = torch.randint(len(charset), (count, longest), generator=generator).tolist()
    sizes = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return ["".join(charset[i] for i in row[:size]) for row, size in zip(drawn, sizes, strict=True)]


def render_words(
    words: Sequence[str],
    seed: int,
    warp: str = "rotate",
    size: tuple[int, int] = (32, 100),
    font_pixels: float = 24.0,
    degrees: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw words: dark on light, contrast 0.35 to 0.5, noise of standard deviation 0.05; `scene` as `_scene` says.

    Args:
        words: to draw; multi_line breaks each into two lines: at the space nearest to its middle, or, without
            a space, in the middle, with the odd character on the first line.
        seed: seed of fonts, angles, arcs, shades and noise.
        warp: straight; rotate (0 to 360 degrees); curve (an arc of 0.9 to 1.9 radians, up or down, and rotated by up
            to 15 degrees); multi_line; upright_or_vertical (each word at 0 or 90 degrees); scene (stretched to fill
            the image, as cropped words are, and rotated a little).
        size: height and width of the images.
        font_pixels: font size; words that do not fit are drawn smaller; scene ignores it.
        degrees: rotate all words by this angle instead.

    Returns:
        Images uint8 [N, 1, H, W] and the angles of the words in degrees [N] (anticlockwise).

    Raises:
        ValueError: no words, an empty word, or another warp.
    """
    if warp not in WARPS:
        raise ValueError(f"warp must be one of {', '.join(WARPS)}, got {warp!r}")
    if not words or not all(words):
        raise ValueError("words must not be empty")
    generator = torch.Generator().manual_seed(seed)
    count = len(words)
    uniform = torch.rand(7, count, generator=generator)
    names = SCENE_FONTS if warp == "scene" else FONTS
    fonts = (uniform[0] * len(names)).long()
    angles = {
        "rotate": 360 * uniform[1],
        "curve": 30 * uniform[1] - 15,
        "upright_or_vertical": 90.0 * (uniform[1] < 0.5),
    }.get(warp, torch.zeros(count))
    angles = angles if degrees is None else torch.full((count,), float(degrees))
    cells, places, turns, extent = _layout(words, fonts, warp, uniform[2], uniform[3], names)
    scale = _fit(extent, angles, size, font_pixels)[:, None].expand(-1, 2)
    if warp == "scene":  # a crop is as wide as its word and 0.8 to 1.25 font sizes high; its ends rise or fall by 0.15
        if degrees is None:
            angles = torch.rad2deg(torch.atan2(0.3 * uniform[1] - 0.15, extent[:, 1] / 2))
        width = extent[:, 1] * (1 + 0.15 * uniform[2])
        scale = torch.stack([size[1] / width, size[0] / (0.8 + 0.45 * uniform[3])], dim=1)
    coverage = torch.cat(
        [
            _draw(cells[i : i + 512], places[i : i + 512], turns[i : i + 512], scale[i : i + 512], part, size)
            for i, part in zip(range(0, count, 512), torch.deg2rad(angles).split(512), strict=True)
        ]
    )
    if warp == "scene":
        pixels = torch.cat([_scene(part, generator) for part in coverage.split(512)])
    else:
        contrast, light = 0.35 + 0.15 * uniform[4], 0.55 + 0.4 * uniform[5]
        pixels = light[:, None, None] - contrast[:, None, None] * coverage
        pixels = pixels + 0.05 * torch.randn(pixels.shape, generator=generator)
    return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)[:, None], angles


def _scene(coverage: Tensor, generator: torch.Generator) -> Tensor:
    """Shades [N, H, W] of coverage [N, H, W], uneven, blurred and noisy to different degrees.

    The contrast is 0.2 to 0.7; half of the words are light; a third throw a shadow; noise has a standard deviation of
    up to 0.06.
    """
    count, height, width = coverage.shape
    uniform = torch.rand(7, count, 1, 1, generator=generator)

    def uneven(rows: int, columns: int, strength: Tensor) -> Tensor:
        coarse = 2 * torch.rand(count, 1, rows, columns, generator=generator) - 1
        return strength * F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[:, 0]

    dark, contrast, swap = 0.4 * uniform[0], 0.2 + 0.5 * uniform[1], uniform[2] < 0.5
    ground, ink = torch.where(swap, dark, dark + contrast), torch.where(swap, dark + contrast, dark)
    ground = ground + uneven(3, 7, 0.25 * uniform[3]) + uneven(8, 25, 0.15 * uniform[4])
    shadow = coverage.roll((1, 2), dims=(1, 2)) * (uniform[5] < 1 / 3)
    ground = ground + shadow * (torch.rand(count, 1, 1, generator=generator) - ground)
    pixels = ground + coverage * (ink - ground) + uneven(2, 3, 0.15 * uniform[4])
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None]
    rounds = torch.randint(4, (count, 1, 1), generator=generator)
    for blurred in range(3):
        smooth = F.conv2d(F.pad(pixels[:, None], (1, 1, 1, 1), mode="replicate"), kernel)[:, 0]
        pixels = torch.where(rounds > blurred, smooth, pixels)
    return pixels + 0.06 * uniform[6] * torch.randn(pixels.shape, generator=generator)


def _layout(
    words: Sequence[str], fonts: Tensor, warp: str, arc: Tensor, sign: Tensor, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Cells [N, L, G, G], centres [N, L, 2] (x to the right, y down) and turns [N, L] of glyphs, and extents [N, 2].

    Units are font sizes; a word's centre is at 0. Cells after a word's end are empty.
    """
    charset = "".join(sorted(set("".join(words))))
    bank, advance_of = glyphs(charset, names)
    longest = max(map(len, words))
    number = torch.tensor([[charset.index(c) for c in word] + [-1] * (longest - len(word)) for word in words])
    present = number >= 0
    cells = bank[fonts[:, None], number.clamp(min=0)] * present[..., None, None]
    advances = advance_of[fonts[:, None], number.clamp(min=0)] * present
    line = torch.zeros_like(number)
    if warp == "multi_line":
        ends = torch.tensor([_line_end(word) for word in words])[:, None]
        line = (torch.arange(longest) >= ends).long() * present
        at_break = (torch.arange(longest) == ends) & torch.tensor([[c == " " for c in w.ljust(longest)] for w in words])
        advances = advances * ~at_break  # the space at the break takes no room on the second line
    x, widths = torch.zeros_like(advances), []
    for each in (0, 1):
        on_line = advances * (line == each)
        before = on_line.cumsum(dim=1) - on_line / 2
        width = on_line.sum(dim=1, keepdim=True)
        x = torch.where(line == each, before - width / 2, x)
        widths.append(width[:, 0])
    y = (line - 0.5 * (warp == "multi_line")) * LINE_HEIGHT
    turns = torch.zeros_like(x)
    width = torch.stack(widths).amax(dim=0)
    height = torch.full_like(width, 2 * LINE_HEIGHT if warp == "multi_line" else LINE_HEIGHT)
    if warp == "curve":  # along a circle whose arc has the word's length
        radius = (width / (0.9 + arc) * (sign > 0.5).float().mul(2).sub(1))[:, None]  # its sign: bent up or down
        turns = x / radius
        x, y = radius * turns.sin(), radius * (1 - turns.cos())
        middle = (y * present).sum(dim=1) / present.sum(dim=1)
        height = height + (y * present).abs().amax(dim=1)
        y = y - middle[:, None]
    return cells, torch.stack([x, y.expand_as(x)], dim=-1), turns, torch.stack([height, width], dim=1)


def _line_end(word: str) -> int:
    """Characters of a word's first line."""
    middle = (len(word) + 1) // 2
    spaces = [i for i in range(1, len(word) - 1) if word[i] == " "]
    return min(spaces, key=lambda i: abs(i - (len(word) - 1) / 2)) if spaces else middle


def _fit(extent: Tensor, angles: Tensor, size: tuple[int, int], font_pixels: float) -> Tensor:
    """Pixels per font size [N]: as given, or what makes the rotated word fit."""
    cos, sin = torch.deg2rad(angles).cos().abs(), torch.deg2rad(angles).sin().abs()
    height, width = extent.unbind(dim=1)
    fit = torch.minimum(size[0] / (height * cos + width * sin), size[1] / (height * sin + width * cos))
    return fit.clamp(max=font_pixels)


def _draw(cells: Tensor, places: Tensor, turns: Tensor, scale: Tensor, angles: Tensor, size: tuple[int, int]) -> Tensor:
    """Coverage [N, H, W] of words at a scale [N, 2] (x, y): each glyph is sampled in its rotated cell."""
    count, length = cells.shape[:2]
    # pixel -> font sizes from the image's centre -> turned back by the word's angle -> from the glyph's centre
    rows, columns = (torch.arange(n) + 0.5 - n / 2 for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y], dim=-1) / scale[:, None, None]  # (N, H, W, 2)
    points = _turn(points, angles[:, None, None])[:, None] - places[:, :, None, None]  # (N, L, H, W, 2)
    grid = _turn(points, -turns[:, :, None, None]) * (2 / CELL)
    shape = (count * length, 1, CELL_PIXELS, CELL_PIXELS)
    sampled = F.grid_sample(cells.reshape(shape), grid.flatten(0, 1), align_corners=False)
    return 1 - (1 - sampled.view(count, length, *size)).prod(dim=1)


def _turn(points: Tensor, angles: Tensor) -> Tensor:
    """Points [..., 2] (x right, y down) turned clockwise on the screen: a word sampled there turns anticlockwise."""
    cos, sin = angles.cos(), angles.sin()
    x, y = points.unbind(dim=-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
