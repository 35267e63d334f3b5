"""All boxes of all thresholds from one pass over the grey levels, instead of one contour search per threshold.

The reference thresholds an 8-bit map, so that there are at most 255 different foregrounds. Adding the pixels from
bright to dark, a union-find keeps the 8-connected components (the component tree); a component's box is constant
from the level where it last changed down to the level where it changes next. Adding them from dark to bright,
4-connected, gives the holes in the same way. One such state is a node: a box and the thresholds L at which
`grey > L` has it. Cost: O(pixels), whatever the number of thresholds.

"Largest" means the area of the polygon through the pixel centres of the outer contour (cv2.contourArea). Of the 2 x 2
quads of a component without holes, those of four pixels give 1 and those of three 1/2; quads also count holes (Euler
number). Where holes leave two candidates undecided, the contour is walked.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from wsol_eval.neighbours import EIGHT, FOUR, GAIN, RING

LEVELS = 256

# Columns of a node. It exists for thresholds LOW..HIGH; X0..Y1 are its first and last pixels; AREA2 is twice the area
# without its holes; HOLES counts them (-1: the node is a hole); FIRST is its first pixel in raster order,
# as y << 16 | x.
LOW, HIGH, X0, Y0, X1, Y1, AREA2, HOLES, FIRST = range(9)
COLUMNS = 9
# A component that is still growing has instead: the level where it last changed, its pixels, 4 x its Euler number.
LEVEL, COUNT, EULER4 = LOW, HIGH, HOLES


@njit(cache=True, nogil=True)
def _find(parent: np.ndarray, pixel: np.uint32) -> np.uint32:
    above = parent[pixel]
    while above != pixel:
        parent[pixel] = parent[above]
        pixel = parent[pixel]
        above = parent[pixel]
    return pixel


@njit(cache=True, nogil=True)
def _sort(grey: np.ndarray, places: np.ndarray, start: np.ndarray) -> int:
    """All pixels by grey level, as y << 16 | x in raster order within a level; returns the highest level."""
    height, width = grey.shape
    start[:] = 0
    for y in range(height):
        for x in range(width):
            start[np.int64(grey[y, x]) + 1] += 1
    top = 0
    for level in range(LEVELS):
        if start[level + 1]:
            top = level
        start[level + 1] += start[level]
    cursor = start[:LEVELS].copy()
    for y in range(height):
        for x in range(width):
            level = grey[y, x]
            places[cursor[level]] = y << 16 | x
            cursor[level] += 1
    return top


@njit(cache=True, nogil=True)
def _rings(padded: np.ndarray, sign: np.int16, masks: np.ndarray) -> None:
    """Bits of RING that are there already when a pixel comes: brighter ones (sign 1) or darker ones (sign -1).

    Of equal ones, those that precede it in raster order. The padding of -1 never comes before a bright pixel, always
    before a dark one.
    """
    height, width = masks.shape[0] - 2, masks.shape[1] - 2
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            here = sign * padded[y, x]
            masks[y, x] = (
                np.uint8(sign * padded[y - 1, x - 1] >= here)
                | np.uint8(sign * padded[y - 1, x] >= here) << 1
                | np.uint8(sign * padded[y - 1, x + 1] >= here) << 2
                | np.uint8(sign * padded[y, x + 1] > here) << 3
                | np.uint8(sign * padded[y + 1, x + 1] > here) << 4
                | np.uint8(sign * padded[y + 1, x] > here) << 5
                | np.uint8(sign * padded[y + 1, x - 1] > here) << 6
                | np.uint8(sign * padded[y, x - 1] >= here) << 7
            )


@njit(cache=True, nogil=True)
def _emit(
    nodes: np.ndarray, count: int, parts: np.ndarray, root: np.uint32, low: int, high: int, grow: int, holes: int
) -> int:
    nodes[count, LOW], nodes[count, HIGH] = low, high
    nodes[count, X0], nodes[count, Y0] = parts[root, X0] - grow, parts[root, Y0] - grow
    nodes[count, X1], nodes[count, Y1] = parts[root, X1] + grow, parts[root, Y1] + grow
    nodes[count, AREA2], nodes[count, HOLES], nodes[count, FIRST] = parts[root, AREA2], holes, parts[root, FIRST]
    return count + 1


@njit(cache=True, nogil=True)
def _merge(parts: np.ndarray, root: np.uint32, other: np.uint32) -> None:
    parts[root, COUNT] += parts[other, COUNT]
    parts[root, X0] = min(parts[root, X0], parts[other, X0])
    parts[root, Y0] = min(parts[root, Y0], parts[other, Y0])
    parts[root, X1] = max(parts[root, X1], parts[other, X1])
    parts[root, Y1] = max(parts[root, Y1], parts[other, Y1])
    parts[root, AREA2] += parts[other, AREA2]
    parts[root, EULER4] += parts[other, EULER4]
    parts[root, FIRST] = min(parts[root, FIRST], parts[other, FIRST])


@njit(cache=True, nogil=True)
def _start(parts: np.ndarray, p: np.uint32, x: int, y: int, level: int) -> None:
    parts[p, LEVEL], parts[p, COUNT] = level, 1
    parts[p, X0], parts[p, X1], parts[p, Y0], parts[p, Y1] = x, x, y, y
    parts[p, AREA2], parts[p, EULER4], parts[p, FIRST] = 0, 4, y << 16 | x


@njit(cache=True, nogil=True)
def _extend(parts: np.ndarray, root: np.uint32, x: int, y: int) -> None:
    parts[root, COUNT] += 1
    parts[root, X0], parts[root, X1] = min(parts[root, X0], x), max(parts[root, X1], x)
    parts[root, Y0], parts[root, Y1] = min(parts[root, Y0], y), max(parts[root, Y1], y)


@njit(cache=True, nogil=True)
def _foreground(
    places: np.ndarray,
    start: np.ndarray,
    top: int,
    pitch: int,
    offsets: np.ndarray,
    masks: np.ndarray,
    parent: np.ndarray,
    parts: np.ndarray,
    nodes: np.ndarray,
    groups: np.ndarray,
    gain: np.ndarray,
) -> int:
    """Nodes of the 8-connected components of `grey > L`, L from top - 1 down to 0; returns how many."""
    count = 0
    for level in range(top, 0, -1):
        for i in range(start[level], start[level + 1]):
            y, x = places[i] >> 16, places[i] & 0xFFFF
            p = np.uint32((y + 1) * pitch + x + 1)
            mask = masks[p]
            if groups[mask, 0] == 0:
                parent[p] = p
                _start(parts, p, x, y, level)
                continue
            root = _find(parent, np.uint32(p + offsets[groups[mask, 1]]))
            if parts[root, LEVEL] > level:
                count = _emit(nodes, count, parts, root, level, parts[root, LEVEL] - 1, 0, 1 - parts[root, EULER4] // 4)
            for j in range(2, groups[mask, 0] + 1):
                other = _find(parent, np.uint32(p + offsets[groups[mask, j]]))
                if other == root:
                    continue
                if parts[other, LEVEL] > level:
                    holes = 1 - parts[other, EULER4] // 4
                    count = _emit(nodes, count, parts, other, level, parts[other, LEVEL] - 1, 0, holes)
                if parts[other, COUNT] > parts[root, COUNT]:
                    root, other = other, root
                parent[other] = root
                _merge(parts, root, other)
            parent[p] = root
            _extend(parts, root, x, y)
            parts[root, LEVEL] = level
            parts[root, AREA2] += gain[mask, 0]
            parts[root, EULER4] += gain[mask, 1]
            parts[root, FIRST] = min(parts[root, FIRST], places[i])
    for i in range(start[1], start[top + 1]):
        p = np.uint32(((places[i] >> 16) + 1) * pitch + (places[i] & 0xFFFF) + 1)
        if parent[p] == p:
            count = _emit(nodes, count, parts, p, 0, parts[p, LEVEL] - 1, 0, 1 - parts[p, EULER4] // 4)
    return count


@njit(cache=True, nogil=True)
def _holes(
    places: np.ndarray,
    start: np.ndarray,
    top: int,
    pitch: int,
    offsets: np.ndarray,
    masks: np.ndarray,
    parent: np.ndarray,
    parts: np.ndarray,
    nodes: np.ndarray,
    count: int,
    groups: np.ndarray,
) -> int:
    """Append the nodes of the 4-connected holes of `grey > L`, L from 0 up to top - 1; returns the new count.

    Pixel 0 stands for the outside: the padding belongs to it, and so does whatever touches it.
    """
    parent[:] = 0
    outside = np.uint32(0)
    for level in range(top):
        for i in range(start[level], start[level + 1]):
            y, x = places[i] >> 16, places[i] & 0xFFFF
            p = np.uint32((y + 1) * pitch + x + 1)
            mask = masks[p]
            if groups[mask, 0] == 0:
                parent[p] = p
                _start(parts, p, x, y, level)
                continue
            root = _find(parent, np.uint32(p + offsets[groups[mask, 1]]))
            if root != outside and parts[root, LEVEL] < level:
                count = _emit(nodes, count, parts, root, parts[root, LEVEL], level - 1, 1, -1)
            for j in range(2, groups[mask, 0] + 1):
                other = _find(parent, np.uint32(p + offsets[groups[mask, j]]))
                if other == root:
                    continue
                if other != outside and parts[other, LEVEL] < level:
                    count = _emit(nodes, count, parts, other, parts[other, LEVEL], level - 1, 1, -1)
                if other == outside or (root != outside and parts[other, COUNT] > parts[root, COUNT]):
                    root, other = other, root
                parent[other] = root
                if root != outside:
                    _merge(parts, root, other)
            parent[p] = root
            if root != outside:
                _extend(parts, root, x, y)
                parts[root, LEVEL] = level
    for i in range(start[0], start[top]):
        p = np.uint32(((places[i] >> 16) + 1) * pitch + (places[i] & 0xFFFF) + 1)
        if parent[p] == p:
            count = _emit(nodes, count, parts, p, parts[p, LEVEL], top - 1, 1, -1)
    return count


@njit(cache=True, nogil=True)
def workspace(height: int, width: int) -> tuple[np.ndarray, ...]:
    """Arrays that `build` needs, reusable for maps of one size; the last one receives the nodes."""
    pixels, padded = height * width, (height + 2) * (width + 2)
    places, start = np.empty(pixels, np.int32), np.empty(LEVELS + 1, np.int64)
    levels, masks = np.full((height + 2, width + 2), -1, np.int16), np.empty((height + 2, width + 2), np.uint8)
    parent, parts = np.empty(padded, np.uint32), np.empty((padded, COLUMNS), np.int32)
    return places, start, levels, masks, parent, parts, np.empty((2 * pixels, COLUMNS), np.int32)


@njit(cache=True, nogil=True)
def build(
    grey: np.ndarray,
    with_holes: bool,
    work: tuple[np.ndarray, ...],
    eight: np.ndarray,
    four: np.ndarray,
    gain: np.ndarray,
) -> tuple[int, int]:
    """Write the nodes of a grey map (H, W) uint8 into the last array of `work`; returns their count and max(grey).

    `eight`, `four` and `gain` are the tables EIGHT, FOUR and GAIN.
    """
    places, start, levels, masks, parent, parts, nodes = work
    pitch = grey.shape[1] + 2
    offsets = np.array([-pitch - 1, -pitch, -pitch + 1, 1, pitch + 1, pitch, pitch - 1, -1])  # as RING
    top = _sort(grey, places, start)
    levels[1:-1, 1:-1] = grey
    _rings(levels, np.int16(1), masks)
    count = _foreground(places, start, top, pitch, offsets, masks.ravel(), parent, parts, nodes, eight, gain)
    if with_holes:
        _rings(levels, np.int16(-1), masks)
        count = _holes(places, start, top, pitch, offsets, masks.ravel(), parent, parts, nodes, count, four)
    return count, top


@njit(cache=True, nogil=True)
def outer_area2(grey: np.ndarray, level: int, first: int) -> int:
    """Twice the polygon area of the outer contour of `grey > level` whose first pixel is `first`, y << 16 | x."""
    height, width = grey.shape
    y0, x0 = first >> 16, first & 0xFFFF
    y, x, came, area2, opening = y0, x0, 7, 0, -1  # the first pixel in raster order is entered from the west
    while True:
        step = -1
        for turn in range(1, 9):
            direction = (came + turn) % 8
            ny, nx = y + RING[direction][0], x + RING[direction][1]
            if 0 <= ny < height and 0 <= nx < width and grey[ny, nx] > level:
                step = direction
                break
        if step < 0 or (y == y0 and x == x0 and step == opening):
            return abs(area2)
        if opening < 0:
            opening = step
        ny, nx = y + RING[step][0], x + RING[step][1]
        area2 += x * ny - nx * y
        y, x, came = ny, nx, (step + 4) % 8


@njit(cache=True, nogil=True)
def _iou(ax0: int, ay0: int, ax1: int, ay1: int, boxes: np.ndarray, k: int) -> float:
    width = min(ax1, boxes[k, 2]) - max(ax0, boxes[k, 0]) + 1
    height = min(ay1, boxes[k, 3]) - max(ay0, boxes[k, 1]) + 1
    overlap = max(0, width) * max(0, height)
    whole = (boxes[k, 2] - boxes[k, 0] + 1) * (boxes[k, 3] - boxes[k, 1] + 1)
    union = (ax1 - ax0 + 1) * (ay1 - ay0 + 1) + whole - overlap
    return overlap / union if union > 0 else 0.0


@njit(cache=True, nogil=True)
def _node_iou(
    nodes: np.ndarray, i: int, boxes: np.ndarray, begin: int, end: int, height: int, width: int, past_end: bool
) -> float:
    """Best IoU of a node; `past_end`: the box ends one pixel after its last one, clipped into the map."""
    x1 = min(nodes[i, X1] + 1, width - 1) if past_end else nodes[i, X1]
    y1 = min(nodes[i, Y1] + 1, height - 1) if past_end else nodes[i, Y1]
    best = 0.0
    for k in range(begin, end):
        best = max(best, _iou(nodes[i, X0], nodes[i, Y0], x1, y1, boxes, k))
    return best


@njit(cache=True, nogil=True)
def largest_nodes(grey: np.ndarray, nodes: np.ndarray, count: int, top: int) -> np.ndarray:
    """Index of the node with the largest outer contour for each L < top; of equal ones the one that starts last.

    A node without holes has the area AREA2. Holes leave a lower bound (AREA2) and an upper one (its box); the contour
    is walked only where these do not decide.
    """
    floor, rivals = np.full(LEVELS, -1, np.int32), np.zeros(LEVELS, np.int32)
    for i in range(count):
        for level in range(nodes[i, LOW], nodes[i, HIGH] + 1):
            floor[level] = max(floor[level], nodes[i, AREA2])
    ceiling = np.empty(count, np.int32)
    for i in range(count):
        box = 2 * (nodes[i, X1] - nodes[i, X0]) * (nodes[i, Y1] - nodes[i, Y0])
        ceiling[i] = box if nodes[i, HOLES] else nodes[i, AREA2]
        for level in range(nodes[i, LOW], nodes[i, HIGH] + 1):
            rivals[level] += ceiling[i] >= floor[level]
    chosen, area, first = np.full(LEVELS, -1, np.int64), np.full(LEVELS, -1, np.int64), np.full(LEVELS, -1, np.int64)
    for i in range(count):
        exact = np.int64(nodes[i, AREA2]) if nodes[i, HOLES] == 0 else np.int64(-1)
        for level in range(nodes[i, LOW], nodes[i, HIGH] + 1):
            if ceiling[i] < floor[level]:
                continue
            if exact < 0 and rivals[level] > 1:
                exact = np.int64(outer_area2(grey, level, nodes[i, FIRST]))
            begin = np.int64(nodes[i, FIRST])
            if chosen[level] < 0 or exact > area[level] or (exact == area[level] and begin > first[level]):
                chosen[level], area[level], first[level] = i, exact, begin
    return chosen


@njit(cache=True, nogil=True)
def _sweep(
    maps: np.ndarray,
    boxes: np.ndarray,
    ends: np.ndarray,
    largest: bool,
    past_end: bool,
    eight: np.ndarray,
    four: np.ndarray,
    gain: np.ndarray,
) -> np.ndarray:
    images, height, width = maps.shape
    best = np.full((images, LEVELS), -1.0)
    work = workspace(height, width)
    nodes, zero = work[-1], np.zeros((1, COLUMNS), np.int32)
    for n in range(images):
        begin, end = ends[n], ends[n + 1]
        count, top = build(maps[n], not largest, work, eight, four, gain)
        if largest:
            chosen = largest_nodes(maps[n], nodes, count, top)
            for level in range(top):
                best[n, level] = _node_iou(nodes, chosen[level], boxes, begin, end, height, width, past_end)
        else:
            for i in range(count):
                iou = _node_iou(nodes, i, boxes, begin, end, height, width, past_end)
                for level in range(nodes[i, LOW], nodes[i, HIGH] + 1):
                    best[n, level] = max(best[n, level], iou)
        best[n, top:] = _node_iou(zero, 0, boxes, begin, end, height, width, False)
    return best


def sweep(maps: np.ndarray, boxes: np.ndarray, ends: np.ndarray, largest: bool, past_end: bool) -> np.ndarray:
    """Best IoU per image and level, (N, 256) float64.

    Args:
        maps: (N, H, W) uint8, contiguous.
        boxes: (K, 4) int64, ground truth of all images.
        ends: (N + 1,) int64; image n has boxes[ends[n] : ends[n + 1]].
        largest: only the largest contour counts, else all, holes included.
        past_end: boxes end one pixel after their last one, clipped into the map.
    """
    return _sweep(maps, boxes, ends, largest, past_end, EIGHT, FOUR, GAIN)


def boxes_of_level(grey: np.ndarray, level: int, largest: bool, past_end: bool) -> np.ndarray:
    """Boxes of the contours of `grey > level`, (k, 4) int64; none gives (0, 4)."""
    work = workspace(*grey.shape)
    size, top = build(grey, not largest, work, EIGHT, FOUR, GAIN)
    nodes = work[-1][:size]
    if largest:
        nodes = nodes[largest_nodes(grey, nodes, size, top)[level : level + 1]] if level < top else nodes[:0]
    nodes = nodes[(nodes[:, LOW] <= level) & (level <= nodes[:, HIGH])]
    boxes = nodes[:, [X0, Y0, X1, Y1]].astype(np.int64)
    if past_end:
        boxes[:, 2:] = np.minimum(boxes[:, 2:] + 1, [grey.shape[1] - 1, grey.shape[0] - 1])
    return boxes
