"""Words rendered along lines, arcs, rotated and in perspective, from matplotlib's fonts or any folder of fonts.

Only the fonts are read; with the same Pillow the same arguments give the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

WARPS = ("none", "rotate", "curve", "perspective")
GLYPH_SIZE = 30  # pixels per em of the drawing; the loader resizes
MARGIN = 3
FAMILIES = {
    "sans": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    "serif": (
        "DejaVuSerif",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneral",
        "STIXGeneralBol",
        "STIXGeneralItalic",
    ),
}


def font_files(fonts: str | Path) -> list[Path]:
    """Font files of a family ("sans", "serif", "all"), or of a folder (.ttf, .otf).

    Raises:
        ValueError: neither a family nor a folder with fonts.
    """
    bundled = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = FAMILIES | {"all": FAMILIES["sans"] + FAMILIES["serif"]}
    if str(fonts) in families:
        return [bundled / f"{name}.ttf" for name in families[str(fonts)]]
    found = sorted(path for path in Path(fonts).glob("*") if path.suffix.lower() in (".ttf", ".otf"))
    if not found:
        raise ValueError(f"fonts: expected one of {', '.join(families)} or a folder with .ttf or .otf, got {fonts}")
    return found


def random_words(n: int, alphabet: str, lengths: tuple[int, int], rng: np.random.Generator) -> list[str]:
    """N words of lengths (from, to) inclusive, characters drawn evenly."""
    counts = rng.integers(lengths[0], lengths[1] + 1, n)
    return ["".join(rng.choice(list(alphabet), count)) for count in counts]


def render_words(
    words: Sequence[str], seed: int | Sequence[int], fonts: str | Path = "all", warp: str = "none"
) -> tuple[list[np.ndarray], list[str]]:
    """One gray image per word.

    Args:
        words: what to draw.
        seed: seed of font, colours, geometry and noise.
        fonts: see `font_files`.
        warp: "none"; "rotate" (the word by up to 0.45 rad); "curve" (along an arc of 0.9 to 1.9 rad); "perspective".

    Returns:
        images (H, W) uint8 of different sizes, and the words.

    Raises:
        ValueError: an unknown warp, no fonts, or an empty word.
    """
    if warp not in WARPS:
        raise ValueError(f"warp: expected one of {', '.join(WARPS)}, got {warp!r}")
    rng, files = np.random.default_rng(seed), font_files(fonts)
    return [_render(word, rng, files[rng.integers(len(files))], warp) for word in words], list(words)


def _render(word: str, rng: np.random.Generator, font: Path, warp: str) -> np.ndarray:
    if not word.strip():
        raise ValueError(f"words: expected something to draw, got {word!r}")
    mask = _on_arc(word, font, rng) if warp == "curve" else _on_line(word, font)
    if warp == "rotate":
        mask = mask.rotate(np.degrees(rng.uniform(-0.45, 0.45)), Image.Resampling.BILINEAR, expand=True)
    elif warp == "perspective":
        mask = _perspective(mask, rng)
    box = mask.getbbox() or (0, 0, *mask.size)
    ink = np.asarray(mask.crop((box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN)))
    contrast = rng.uniform(0.35, 0.5) * rng.choice([-1, 1])
    background = rng.uniform(max(0, -contrast), min(1, 1 - contrast))
    image = background + contrast * ink / 255 + rng.normal(0, 0.05, ink.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


@lru_cache(maxsize=64)
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), GLYPH_SIZE)


@lru_cache(maxsize=4096)
def _glyph(path: Path, character: str) -> tuple[Image.Image, float]:
    """A character's mask, centred on the middle of its advance, and the advance."""
    font, advance = _font(path), _font(path).getlength(character)
    side = 2 * GLYPH_SIZE
    glyph = Image.new("L", (side, side))
    ImageDraw.Draw(glyph).text(((side - advance) / 2, side * 0.7), character, font=font, fill=255, anchor="ls")
    return glyph, advance


def _on_line(word: str, font: Path) -> Image.Image:
    width = int(_font(font).getlength(word)) + 2 * GLYPH_SIZE
    image = Image.new("L", (width, 2 * GLYPH_SIZE))
    ImageDraw.Draw(image).text((GLYPH_SIZE, GLYPH_SIZE * 1.4), word, font=_font(font), fill=255, anchor="ls")
    return image


def _on_arc(word: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """Glyphs along an arc that opens up or down, each turned with it."""
    arc, sign = rng.uniform(0.9, 1.9), rng.choice([-1, 1])
    glyphs = [_glyph(font, character) for character in word]
    total = sum(advance for _, advance in glyphs)
    radius = max(total / arc, GLYPH_SIZE)
    side = int(2 * total + 6 * GLYPH_SIZE)
    canvas, position = Image.new("L", (side, side)), -total / 2
    for glyph, advance in glyphs:
        angle = (position + advance / 2) / radius
        position += advance
        x = side / 2 + radius * np.sin(angle)
        y = side / 2 + sign * radius * (1 - np.cos(angle))
        turned = glyph.rotate(np.degrees(-sign * angle), Image.Resampling.BILINEAR)
        corner = round(x - glyph.width / 2), round(y - glyph.height / 2)
        canvas.paste(255, corner, turned)
    return canvas


def _perspective(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Perspective: the corners of the far side move in by up to a third of the height."""
    width, height = mask.size
    shrink = rng.uniform(0.1, 0.33) * height
    left, right = (shrink, 0.0) if rng.random() < 0.5 else (0.0, shrink)
    corners = [(0, -left), (width, -right), (width, height + right), (0, height + left)]
    targets = [(0, 0), (width, 0), (width, height), (0, height)]
    rows: list[list[float]] = []
    values: list[float] = []
    for (u, v), (x, y) in zip(corners, targets, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    coefficients = np.linalg.solve(np.array(rows), np.array(values)).tolist()
    return mask.transform(mask.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR)
