"""Draw the training data of the demo model: still scenes and clips of shapes on textured grounds.

A scene holds one to eight overlapping things of any colour, texture, outline and softness of edge: blobs, polygons,
crescents, bent strips; some carry parts of another colour, some look like their neighbour. In a clip
they move, turn, deform, shrink to nothing, pass behind each other, leave and come back, and the camera moves too. A
still scene is a clip of one frame. Highlights, thin lines and a dark surround occur here as in the images of
make_demo_data.py; its colours and its polyps do not.

    python demo/draw_scenes.py        # a sheet of scenes and clips to look at: demo/output/scenes.png

Chapters:
    settings          limits
    scenes and clips  main() and draw_clip()
    things            the objects of a scene: outline, color, parts
    textures          grounds, surfaces, highlights
    motion            places over time, things pasted into the frames
    the camera        blur, noise and light of the finished frames
"""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

# ---- settings ----

MIN_PIXELS = 50     # an object with fewer visible pixels is never prompted (at 128 px)
MAX_THINGS = 8      # a part counts as one


# ---- scenes and clips ----


def main():
    rows = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        stills = [draw_clip(rng, 256, 1) for _ in range(3)]
        clip = draw_clip(rng, 256, 12)
        tiles = [tile for frames, labels, _ in stills for tile in (frames[0], color_labels(labels[0]))]
        tiles += [tile for t in (0, 5, 11) for tile in (clip[0][t], color_labels(clip[1][t]))]
        rows.append(np.concatenate(tiles, 1))
    path = Path(__file__).resolve().parent / "output" / "scenes.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.concatenate(rows)[..., ::-1])[1].tobytes())
    print(path)


def draw_clip(rng, size, times):
    """Draw one clip; with times = 1, a still scene.

    times: the number of frames, or the times (in frames) to draw.

    Returns:
        frames: uint8 count x size x size x 3, RGB.
        labels: uint8 count x size x size; 0 is background, k the visible part of thing k.
        groups: for each object that can be prompted, the labels that form its mask: (k,), or a whole and its parts.
    """
    times = np.arange(times) if np.isscalar(times) else times
    count, pace = len(times), rng.uniform(0.2, 1.6)  # pace: of everything that moves
    roughness = rng.uniform(0.15, 1)  # of all surfaces: how strong their texture is
    ground, backdrop = rng.uniform(20, 235, 3), int(1.6 * size) if count > 1 else size  # room for the camera
    wall = texture(rng, backdrop, ground, roughness)
    if rng.random() < 0.25:
        draw_lines(rng, wall)
    things, groups = [], []
    while len(groups) < rng.integers(1, MAX_THINGS + 1):
        model = things[-1] if things and rng.random() < 0.2 else None
        thing = new_thing(rng, size, ground, roughness, pace, model)
        things.append(thing)
        number = len(groups) + 1
        parts = list(range(number + 1, number + 1 + len(thing.parts)))
        groups += [[number, *parts], *([part] for part in parts)]
    camera = Motion(rng, size, pace * rng.choice([0, 0.3, 1]), 0)
    finish = Finish(rng, size)
    frames, labels = np.zeros((count, size, size, 3), np.uint8), np.zeros((count, size, size), np.uint8)
    for row, t in enumerate(times):
        view = camera.matrix(t, np.array([size / 2, size / 2]), about=np.array([size / 2, size / 2]))
        shift = np.array([[1, 0, -(backdrop - size) / 2], [0, 1, -(backdrop - size) / 2], [0, 0, 1]])
        image = cv2.warpAffine(wall, (view @ shift)[:2], (size, size), borderMode=cv2.BORDER_REFLECT)
        number = 0
        for thing in things:
            number = paste(image, labels[row], thing, view, t, number + 1)
        frames[row] = finish(image)
        labels[row][finish.beyond] = 0
    return frames, labels, groups


def color_labels(labels):
    """Labels S x S as distinct colours, uint8 S x S x 3, to look at."""
    hue = (labels.astype(np.float32) * 67 % 180).astype(np.uint8)
    lit = np.where(labels > 0, 230, 0).astype(np.uint8)
    return cv2.cvtColor(np.stack([hue, lit, lit], -1), cv2.COLOR_HSV2RGB)


# ---- things ----


@dataclass
class Thing:
    """One object: its outline in its own pixels around (0, 0), what it looks like and how it moves."""

    outline: np.ndarray         # N x 2
    surface: np.ndarray         # side x side x 3, centred on (0, 0)
    centre: np.ndarray          # (x, y) at time 0, in pixels of the scene; of a part: of the thing that carries it
    motion: "Motion"
    softness: float             # sigma of the edge, pixels
    glow: float                 # brightness that it adds around itself: a rim of light, or a shadow if negative
    glow_shift: np.ndarray      # where the shadow falls
    dome: float                 # how much brighter it is in the middle than at the edge
    rim: float                  # how much brighter a line along its edge is
    waves: np.ndarray           # deformation: (amplitude, waves around the outline, speed) of each wave
    parts: list = field(default_factory=list)


def new_thing(rng, size, ground, roughness, pace, model=None, whole=None):
    """A new thing at a random place; if given, with the surface and outline of `model`, or as a part of `whole`."""
    if whole is None:
        radius = size * np.exp(rng.uniform(np.log(0.08), np.log(0.4)))
        centre = rng.uniform(0.05, 0.95, 2) * size
        motion = Motion(rng, size, pace, leaves=0.25)
    else:
        reach = np.linalg.norm(whole.outline, axis=1)
        radius = rng.uniform(0.25, 0.6) * np.median(reach)
        centre = whole.outline[rng.integers(len(whole.outline))] * rng.uniform(0, 0.8)
        motion = Motion(rng, size, 0, 0)
    if model is None:
        points = outline(rng, radius)
        side = int(2 * np.abs(points).max() * 1.3) + 8
        surface = texture(rng, side, contrasting(rng, ground, roughness), roughness)
        if rng.random() < 0.25:
            add_highlights(rng, surface, cells=rng.integers(3, 12), share=rng.uniform(0.01, 0.12))
    else:
        points, surface = model.outline, model.surface
    waves = np.stack([rng.uniform(0, 0.12, 2) * (rng.random() < 0.5), rng.integers(2, 5, 2), rng.uniform(0, 0.6, 2)], 1)
    thing = Thing(
        points, surface, centre, motion,
        softness=size / 128 * np.exp(rng.uniform(np.log(0.25), np.log(2.2))),
        glow=rng.uniform(-45, 25) if rng.random() < 0.4 else 0,
        glow_shift=rng.normal(0, 0.015, 2) * size,
        dome=rng.uniform(0, 60) if rng.random() < 0.5 else 0,
        rim=rng.uniform(-60, 60) if rng.random() < 0.2 else 0,
        waves=waves,
    )
    if whole is None and radius > 0.12 * size and rng.random() < 0.3:
        color = surface.mean((0, 1))
        thing.parts = [new_thing(rng, size, color, roughness, pace, whole=thing) for _ in range(rng.integers(1, 3))]
    return thing


def contrasting(rng, ground, roughness):
    """A colour that contrasts with `ground`: at a distance of 16 to 185, farther between rough surfaces."""
    shift = rng.normal(0, 1, 3) if rng.random() < 0.75 else np.full(3, rng.choice([-1, 1]))  # or brightness alone
    contrast = np.exp(rng.uniform(np.log(12), np.log(160))) + 25 * roughness
    return np.clip(ground + contrast * shift / np.linalg.norm(shift), 5, 250)


def outline(rng, radius):
    """A random closed outline around (0, 0): N x 2 points in pixels."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    squeeze, kind = rng.uniform(0.45, 1), rng.random()
    if kind < 0.55:  # a blob
        reach = np.ones_like(angle)
        for wave in range(2, 7):
            reach += rng.normal(0, 0.35 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
        reach = np.clip(reach, 0.3, None)
    elif kind < 0.68:  # a polygon
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        reach = rng.uniform(0.7, 1.1, len(angle))
    elif kind < 0.8:  # a rectangle
        corner = rng.uniform(0.4, 1.1)
        angle = np.array([corner, np.pi - corner, np.pi + corner, 2 * np.pi - corner])
        reach = np.ones(4)
    else:  # a bent strip: thin, from straight to nearly closed
        bend, width = rng.uniform(0.3, 5), rng.uniform(0.12, 0.4)
        along = np.linspace(-bend / 2, bend / 2, 32)
        profile = width * (1 - rng.uniform(0, 0.7) * np.abs(np.linspace(-1, 1, 32)))
        arc = np.concatenate([along, along[::-1]])
        reach = np.concatenate([1 + profile / 2, (1 - profile / 2)[::-1]]) / min(1, bend / 2)
        points = np.stack([np.cos(arc), np.sin(arc)], 1) * reach[:, None]
        points = (points - points.mean(0)) * radius
        turn, squeeze = rng.uniform(0, 2 * np.pi), 1
        return points @ rotation(turn).T
    points = np.stack([np.cos(angle), squeeze * np.sin(angle)], 1) * (reach * radius)[:, None]
    return points @ rotation(rng.uniform(0, 2 * np.pi)).T


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# ---- textures ----


def texture(rng, side, color, roughness):
    """A textured field around `color`: float32 side x side x 3, 0 to 255.

    roughness: 0 (no texture) to 1.
    """
    surface = np.broadcast_to(color.astype(np.float32), (side, side, 3)).copy()
    angle, slope = rng.uniform(0, 2 * np.pi), roughness * rng.uniform(0, 50)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side - 0.5
    across = (x * np.cos(angle) + y * np.sin(angle)).astype(np.float32)
    surface += (slope * across)[..., None]
    surface += (roughness * rng.uniform(0, 30) * value_noise(rng, side, int(rng.integers(3, 20))))[..., None]
    kind = rng.random()
    if kind < 0.2:  # stripes
        wave = np.sin(across * rng.uniform(20, 90))
        surface += (roughness * rng.uniform(5, 35) * wave)[..., None] * rng.uniform(0.3, 1, 3).astype(np.float32)
    elif kind < 0.4:  # blotches of a second tint
        spots = (value_noise(rng, side, int(rng.integers(5, 12))) > 0.2).astype(np.float32)
        surface += spots[..., None] * (roughness * rng.uniform(-40, 40, 3)).astype(np.float32)
    elif kind < 0.7:  # all scales at once, as in photographs
        strength = roughness * rng.uniform(5, 35)
        for octave in range(1, 6):
            surface += (strength / octave * value_noise(rng, side, 2 ** (octave + 1)))[..., None]
    return surface


def draw_lines(rng, surface):
    """A few thin bent lines, like vessels or cracks, of one colour (surface changed in place)."""
    side, shade = len(surface), rng.uniform(-50, 50)
    lines = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(2, 12)):
        steps = np.cumsum(rng.normal(0, 0.5, 40)) + rng.uniform(0, 2 * np.pi)
        path = rng.uniform(0, side, 2) + np.cumsum(np.stack([np.cos(steps), np.sin(steps)], 1), 0) * side / 50
        cv2.polylines(lines, [np.round(path * 16).astype(np.int32)], False, 255, int(rng.integers(1, 4)),
                      cv2.LINE_AA, shift=4)
    surface += (shade / 255 * cv2.GaussianBlur(lines, (0, 0), 0.7).astype(np.float32))[..., None]


def add_highlights(rng, image, cells, share):
    """Nearly white spots over `share` of the image (changed in place), about as large as a cell is wide."""
    wish = value_noise(rng, len(image), int(cells))
    spots = (wish > np.quantile(wish[::4, ::4], 1 - share)).astype(np.float32)
    image += cv2.GaussianBlur(spots, (0, 0), 1)[..., None] * (rng.uniform(225, 255) - image)


def value_noise(rng, side, cells):
    """Smooth noise, float32 side x side in about [-1, 1], with `cells` bumps along a side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)


# ---- motion ----


class Motion:
    """Where something is at time t (frames): a drift, a swing, a turn and a change of size.

    leaves: probability of a swing so wide that the thing leaves the picture and comes back. With the same
        probability it shrinks to nothing, as the slices of a round body do.
    """

    def __init__(self, rng, size, pace, leaves):
        self.drift = rng.normal(0, 0.008, 2) * size * pace
        self.swing = rng.normal(0, 0.06, 2) * size * min(pace, 1)
        self.period, self.phase = rng.uniform(12, 50), rng.uniform(0, 2 * np.pi, 2)
        if rng.random() < leaves:
            direction = rng.normal(0, 1, 2)
            self.swing = direction / np.linalg.norm(direction) * size * rng.uniform(0.7, 1.4)
            self.period, self.phase = rng.uniform(24, 60), np.zeros(2)
            self.drift *= 0
        self.end = rng.uniform(3, 30) if rng.random() < leaves else np.inf
        self.turn = rng.normal(0, 0.04) * pace
        self.growth = rng.uniform(0, 0.25) * min(pace, 1)
        self.start = np.sin(self.phase)

    def section(self, t):
        """The radius at time t, as a share of that at time 0, of a ball that is cut into slices."""
        return np.sqrt(max(0, 1 - (t / self.end) ** 2))

    def matrix(self, t, centre, about=0):
        """3 x 3 matrix from the thing's own pixels, around `about`, to the scene's, at time t."""
        scale = (1 + self.growth * np.sin(2 * np.pi * t / self.period)) * self.section(t)
        linear = scale * rotation(self.turn * t)
        place = centre + self.drift * t + self.swing * (np.sin(2 * np.pi * t / self.period + self.phase) - self.start)
        return np.vstack([np.column_stack([linear, place - linear @ np.broadcast_to(about, 2)]), [0, 0, 1]])


def paste(image, labels, thing, view, t, number, within=None):
    """Draw a thing, then its parts, into `image` and `labels` (both changed in place).

    view: 3 x 3 matrix from the carrier's pixels to the image's. within: the alpha of the thing that carries this part.
    Returns: the highest number used.
    """
    if thing.motion.section(t) < 0.05:
        return number + len(thing.parts)
    own = view @ thing.motion.matrix(t, thing.centre)
    angle = np.linspace(0, 2 * np.pi, len(thing.outline), endpoint=False)
    bulge = 1 + sum(a * np.sin(waves * angle) * np.sin(speed * t) for a, waves, speed in thing.waves)
    points = (thing.outline * bulge[:, None]) @ own[:2, :2].T + own[:2, 2]

    size, margin = len(image), 4 + int(8 * thing.softness + np.abs(thing.glow_shift).max())
    x1, y1 = np.clip(np.floor(points.min(0)) - margin, 0, size).astype(int)
    x2, y2 = np.clip(np.ceil(points.max(0)) + margin, 0, size).astype(int)
    if x1 >= x2 or y1 >= y2:
        return number + len(thing.parts)
    patch, corner = image[y1:y2, x1:x2], np.array([x1, y1])
    inside = np.zeros(patch.shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.round((points - corner) * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    solid = inside.astype(np.float32) / 255
    alpha = cv2.GaussianBlur(solid, (0, 0), thing.softness)
    if within is not None:  # a part does not reach beyond its whole
        carrier = within[y1:y2, x1:x2]
        alpha, inside = alpha * carrier, np.where(carrier > 0.5, inside, 0)
    if thing.glow:
        move = np.float32([[1, 0, thing.glow_shift[0]], [0, 1, thing.glow_shift[1]]])
        halo = cv2.warpAffine(cv2.GaussianBlur(solid, (0, 0), 3 * thing.softness + 1), move, solid.shape[::-1])
        patch += (thing.glow * halo)[..., None]
    half = len(thing.surface) / 2
    place = own @ np.array([[1, 0, -half], [0, 1, -half], [0, 0, 1]])
    place[:2, 2] -= corner
    surface = cv2.warpAffine(thing.surface, place[:2], solid.shape[::-1], borderMode=cv2.BORDER_REFLECT)
    if thing.dome:
        surface += (thing.dome * (cv2.GaussianBlur(solid, (0, 0), size * 0.05) - 0.6))[..., None]
    if thing.rim:
        near_edge = (1 - cv2.GaussianBlur(solid, (0, 0), size * 0.012)).clip(0, 0.25) * 4
        surface += (thing.rim * solid * near_edge)[..., None]
    patch += alpha[..., None] * (surface - patch)
    labels[y1:y2, x1:x2][inside > 127] = number

    if thing.parts:
        whole = np.zeros(image.shape[:2], np.float32)
        whole[y1:y2, x1:x2] = alpha
        for part in thing.parts:
            number = paste(image, labels, part, own, t, number + 1, whole)
    return number


# ---- the camera ----


class Finish:
    """Camera effects, the same in all frames of a clip: light, highlights, field of view, blur, noise,
    compression."""

    def __init__(self, rng, size):
        self.rng = rng
        y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
        light = 1 - rng.uniform(0, 0.8) * (x * x + y * y)
        if rng.random() < 0.3:  # a shadow falls across the picture
            edge = rng.uniform(-0.4, 0.4) + value_noise(rng, size, 3) * rng.uniform(0, 0.3)
            angle, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.15)
            light *= 1 - rng.uniform(0.1, 0.5) / (1 + np.exp((edge - x * np.cos(angle) - y * np.sin(angle)) / width))
        self.beyond, self.surround = np.zeros((size, size), bool), 0
        if rng.random() < 0.2:  # one shade, mostly dark, beyond a field of view: round, square or with cut corners
            power, turn = rng.choice([2, 4, 12]), rotation(rng.choice([0, np.pi / 4]))
            across, down = np.abs(np.tensordot(turn, np.stack([x, y]), 1))
            self.beyond = across**power + down**power > rng.uniform(0.38, 0.62) ** power
            self.surround = rng.uniform(0, 40) if rng.random() < 0.8 else rng.uniform(0, 255)
        self.light = light[..., None].astype(np.float32)
        self.shine = None
        if rng.random() < 0.2:
            self.shine = np.zeros((size, size, 1), np.float32)
            add_highlights(rng, self.shine, rng.integers(8, 40), rng.uniform(0.002, 0.02))
            self.shine /= 255
        self.sigma = size / 128 * rng.uniform(0.4, 1.2) if rng.random() < 0.3 else 0
        self.is_grey = rng.random() < 0.2
        self.noise = rng.uniform(0, 8)
        self.quality = int(rng.integers(40, 96)) if rng.random() < 0.4 else None

    def __call__(self, image):
        """float32 S x S x 3 -> uint8 S x S x 3."""
        image = image * self.light
        if self.shine is not None:
            image = image + self.shine * (250 - image)
        image[self.beyond] = self.surround
        if self.sigma:
            image = cv2.GaussianBlur(image, (0, 0), self.sigma)
        if self.is_grey:
            image = np.repeat(image.mean(2, keepdims=True), 3, 2)
        grain = self.rng.standard_normal(image.shape, np.float32)
        image = np.clip(image + self.noise * grain, 0, 255).astype(np.uint8)
        if self.quality:
            image = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1], 1)
        return image


if __name__ == "__main__":
    main()
