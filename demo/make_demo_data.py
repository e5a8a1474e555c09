"""Draw the demo's dataset: cartoons of endoscopy images with polyps, in the layout of data/.

    python demo/make_demo_data.py

An image shows a reddish wall with folds around a dark opening, blood vessels, wet highlights and the black
corners of an endoscope's picture, and one or two polyps: domes of nearly the wall's colour, with a soft border.
The share of the image that polyps cover follows Kvasir-SEG (median 11 %, from 0.5 % to 81 %, counted by
prepare_data.py --check). The seed depends on the image's number, so the images are the same every time.
"""

import argparse
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 320, 288
MEDIAN_SHARE, SPREAD = 0.11, 0.75  # of a polyp: log-normal share of the image

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising


def smooth_noise(rng, cells):
    """Smooth noise, float32 HEIGHT x WIDTH in about [-1, 1], with `cells` bumps across."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def blur(field, sigma):
    return cv2.GaussianBlur(field, (0, 0), sigma)


def draw_wall(rng, x, y):
    """The wall of the bowel: float32 H x W x 3, RGB, 0 to 255."""
    red = rng.uniform(165, 215)
    color = np.array([red, red * rng.uniform(0.42, 0.58), red * rng.uniform(0.3, 0.46)], np.float32)
    opening_x, opening_y = rng.uniform(0.1, 0.9) * WIDTH, rng.uniform(0.1, 0.9) * HEIGHT
    distance = np.hypot(x - opening_x, (y - opening_y) * rng.uniform(0.8, 1.3)) / WIDTH
    light = 1 - rng.uniform(0.5, 0.95) * np.exp(-(distance / rng.uniform(0.12, 0.3)) ** 2)  # dark in the opening
    # folds: rings around the opening, bent by noise; bright on one flank, in shadow on the other
    rings = distance * rng.uniform(14, 30) + 1.6 * smooth_noise(rng, 5) + 0.5 * smooth_noise(rng, 11)
    depth = rng.uniform(0.05, 0.2) * (0.5 + 0.5 * smooth_noise(rng, 4))
    light += depth * (np.abs(np.sin(rings)) ** 0.6 + 0.6 * np.sin(rings) - 0.7)
    wall = color * (light * (1 + 0.08 * smooth_noise(rng, 7) + 0.04 * smooth_noise(rng, 40)))[..., None]
    # vessels: the zero lines of smooth noise, thin and darker
    for cells in (9, 16):
        vessels = np.exp(-(smooth_noise(rng, cells) / 0.035) ** 2) * (smooth_noise(rng, 5) > 0)
        wall *= 1 - (blur(vessels.astype(np.float32), 0.8) * rng.uniform(0, 0.22))[..., None] * [0.6, 1, 1]
    return wall, color


def draw_polyp(rng, image, color, x, y, share):
    """Put a dome over `image` (changed in place); returns its mask, bool H x W."""
    radius = np.sqrt(share * WIDTH * HEIGHT / np.pi)
    squeeze, turn = rng.uniform(0.65, 1), rng.uniform(0, np.pi)
    margin = min(0.25 + radius / WIDTH * 0.4, 0.45)
    centre_x, centre_y = rng.uniform(margin, 1 - margin) * WIDTH, rng.uniform(margin, 1 - margin) * HEIGHT
    along = ((x - centre_x) * np.cos(turn) + (y - centre_y) * np.sin(turn)) * np.sqrt(squeeze)
    across = (-(x - centre_x) * np.sin(turn) + (y - centre_y) * np.cos(turn)) / np.sqrt(squeeze)
    angle = np.arctan2(across, along)
    bumps = sum(rng.normal(0, 0.12 / wave) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi)) for wave in (2, 3, 4, 5))
    reach = np.hypot(along, across) / (radius * (1 + bumps))  # 1 on the outline
    mask = reach < 1

    height = np.sqrt(np.clip(1 - reach**2, 0, None)) * (1 + 0.1 * smooth_noise(rng, 12))
    slope_y, slope_x = np.gradient(blur(height.astype(np.float32), 0.02 * radius + 1) * radius * 0.5)
    lamp = rng.uniform(0, 2 * np.pi)
    shade = 0.84 + 0.3 * height - 0.14 * np.clip(slope_x * np.cos(lamp) + slope_y * np.sin(lamp), -1, 1)
    tint = color * rng.uniform(1.0, 1.2) * rng.uniform(0.95, 1.06, 3)
    pits = 0.08 * smooth_noise(rng, int(rng.integers(30, 50))) + 0.05 * smooth_noise(rng, 12)
    ground = blur(image, 12)  # the polyp has the brightness of the wall behind it
    ambient = ground.mean(axis=2, keepdims=True) / color.mean()
    ambient = np.clip(0.3 * ambient + 0.7 * ambient[mask].mean(), 0.6, 1.1)
    surface = tint * ambient * (shade + pits)[..., None]
    # a shadow beside the polyp, then the polyp with a soft border
    shadow = blur(np.roll(mask, (round(radius * 0.12 * np.sin(lamp)), round(radius * 0.12 * np.cos(lamp))),
                          (0, 1)).astype(np.float32), 0.1 * radius + 2)
    image *= 1 - rng.uniform(0.1, 0.35) * shadow[..., None]
    alpha = blur(mask.astype(np.float32), rng.uniform(1.5, 5))[..., None]
    image[:] = alpha * surface + (1 - alpha) * image
    return mask, height


def draw_highlights(rng, image, height):
    """Draw wet spots: small, white, and more frequent where the surface faces the lamp."""
    wish = smooth_noise(rng, 45) + 0.5 * smooth_noise(rng, 8) + 0.25 * height
    spots = blur((wish > np.quantile(wish, 1 - rng.uniform(0.002, 0.012))).astype(np.float32), 0.9)[..., None]
    image[:] = spots * 250 + (1 - spots) * image


def draw_image(rng):
    """Draw one image.

    Returns: uint8 HEIGHT x WIDTH x 3, RGB, and its mask, uint8 HEIGHT x WIDTH, 0 or 255.
    """
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    image, color = draw_wall(rng, x, y)
    mask, heights = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), np.float32)
    for number in range(2 if rng.random() < 0.12 else 1):
        share = np.clip(MEDIAN_SHARE * np.exp(rng.normal(0, SPREAD)), 0.006, 0.6) / (1 + 2 * number)
        polyp, height = draw_polyp(rng, image, color, x, y, share)
        mask |= polyp
        heights = np.maximum(heights, height)
    draw_highlights(rng, image, heights)

    across, down = np.abs(x / WIDTH - 0.5), np.abs(y / HEIGHT - 0.5)
    image *= (1 - rng.uniform(0.2, 0.7) * (across**2 + down**2) * 2)[..., None]
    corner = rng.uniform(0.72, 0.86)  # the endoscope shows an octagon
    inside = (across + down < corner) & (np.maximum(across, down) < 0.49)
    image = blur(image, rng.uniform(0.5, 1.1)) + rng.normal(0, 2.5, image.shape)
    image = np.where(inside[..., None], image, rng.uniform(2, 12))
    return np.clip(image, 0, 255).astype(np.uint8), np.where(mask & inside, 255, 0).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description="데모용 내시경 그림과 마스크를 그려 data/와 같은 구조로 저장합니다.")
    parser.add_argument("--seed", type=int, default=0, help="난수 시드 (기본: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "data",
                        help="결과 폴더, 있으면 새로 만듦 (기본: demo/data)")
    parser.add_argument("--train", type=int, default=160, help="학습 이미지 수 (기본: 160)")
    parser.add_argument("--val", type=int, default=40, help="검증 이미지 수 (기본: 40)")
    args = parser.parse_args()
    first = 0
    for split, count in (("train", args.train), ("val", args.val)):
        images, masks = args.output / "images" / split, args.output / "masks" / split
        for folder in (images, masks):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for number in range(first, first + count):
            image, mask = draw_image(np.random.default_rng([args.seed, number]))
            content = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (images / f"demo_{number:04}.jpg").write_bytes(content.tobytes())
            (masks / f"demo_{number:04}.png").write_bytes(cv2.imencode(".png", mask)[1].tobytes())
        first += count
    print(f"데모 데이터: {args.output} (학습 {args.train}쌍, 검증 {args.val}쌍, 시드 {args.seed})")


if __name__ == "__main__":
    main()
