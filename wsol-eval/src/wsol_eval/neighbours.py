"""What the eight neighbours of a pixel decide, as tables over their 256 masks: groups to join, area, Euler number."""

from __future__ import annotations

import numpy as np

RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # (dy, dx), clockwise from north-west
MASKS = 256  # bit i: the neighbour RING[i] is there


def _quads(mask: int, centre: int) -> tuple[int, int]:
    """Twice the area and four times the Euler number of the four quads around a pixel."""
    area2 = euler4 = 0
    for corner in range(0, 8, 2):  # north-west, north-east, south-east, south-west
        bits = [mask >> (corner - 1) % 8 & 1, mask >> corner & 1, mask >> (corner + 1) % 8 & 1, centre]
        count = sum(bits)
        diagonal = count == 2 and bits[0] == bits[2]
        area2 += max(0, count - 2)
        euler4 += (count == 1) - (count == 3) - 2 * diagonal
    return area2, euler4


def _groups(mask: int, eight: bool) -> list[int]:
    """One ring position per group of present neighbours that are connected with each other inside the ring."""
    present = [i for i in range(8) if mask >> i & 1]
    label = {i: i for i in present}
    near = {(i, (i + 1) % 8) for i in range(8)} | ({(i, (i + 2) % 8) for i in (1, 3, 5, 7)} if eight else set())
    for _ in range(8):
        for a, b in near:
            if a in label and b in label:
                label[a] = label[b] = min(label[a], label[b])
    members = present if eight else [i for i in present if i % 2]  # 4-connected: north, east, south, west
    return [next(i for i in members if label[i] == name) for name in sorted({label[i] for i in members})]


def _group_table(eight: bool) -> np.ndarray:
    table = np.full((MASKS, 5), -1, np.int8)  # count, then up to four ring positions
    for mask in range(MASKS):
        groups = _groups(mask, eight)
        table[mask, 0] = len(groups)
        table[mask, 1 : 1 + len(groups)] = groups
    return table


EIGHT, FOUR = _group_table(True), _group_table(False)
GAIN = np.array([np.subtract(_quads(mask, 1), _quads(mask, 0)) for mask in range(MASKS)], np.int32)  # (area2, euler4)
