"""Draw the demo's clip: a polyp seen by a moving camera, and its true mask on every frame.

    python extras/demo/make_demo_clip.py

The scene is drawn as in demo/make_demo_data.py. The camera pans, rotates and zooms over it, while the wall moves a
little as if breathing. Writes clip.mp4 (320 x 288, 60 frames, 25 per second) and clip_masks/00000.png ... (0 and 255),
and prints the box around the polyp on the first frame.
"""

import argparse
import shutil
import sys
from pathlib import Path

import av
import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
import make_demo_data as scene  # noqa: E402

WIDTH, HEIGHT = 320, 288
SCENE = 1.6        # side of the scene / side of the picture
FRAMES, RATE = 60, 25


def main():
    parser = argparse.ArgumentParser(description="데모용 내시경 영상과 프레임마다의 정답 마스크를 그립니다.")
    parser.add_argument("--seed", type=int, default=0, help="난수 시드 (기본: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "data",
                        help="결과 폴더 (기본: extras/demo/data)")
    args = parser.parse_args()
    masks = args.output / "clip_masks"
    shutil.rmtree(masks, ignore_errors=True)
    masks.mkdir(parents=True)
    rng = np.random.default_rng(args.seed)
    image, polyp = draw_scene(rng)
    with av.open(str(args.output / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            picture, mask = draw_frame(rng, image, polyp, number / FRAMES)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            (masks / f"{number:05}.png").write_bytes(cv2.imencode(".png", mask)[1].tobytes())
            if number == 0:
                x, y, width, height = cv2.boundingRect(mask)
        container.mux(stream.encode())
    print(f"데모 영상: {args.output / 'clip.mp4'} ({FRAMES}프레임), 정답: {masks}")
    print(f'첫 프레임의 폴립: --box "{x},{y},{x + width - 1},{y + height - 1}"')


def draw_scene(rng):
    """The wall with one polyp: (float32 H x W x 3, RGB, 0 to 255; mask of the polyp, uint8 H x W, 0 or 255)."""
    scene.WIDTH, scene.HEIGHT = round(WIDTH * SCENE), round(HEIGHT * SCENE)
    y, x = np.mgrid[0:scene.HEIGHT, 0:scene.WIDTH].astype(np.float32)
    image, color = scene.draw_wall(rng, x, y)
    mask, height = scene.draw_polyp(rng, image, color, x, y, share=0.045)
    scene.draw_highlights(rng, image, height)
    return image.astype(np.float32), mask.astype(np.uint8) * 255


def draw_frame(rng, image, polyp, time):
    """The frame at `time` (0 to 1): (uint8 HEIGHT x WIDTH x 3, RGB; mask, uint8 HEIGHT x WIDTH, 0 or 255)."""
    rows, columns = np.nonzero(polyp)
    swing = 2 * np.pi * time
    centre_x = columns.mean() + 70 * np.sin(swing)      # the polyp moves over a third of the picture
    centre_y = rows.mean() + 45 * np.sin(2 * swing + 0.5)
    zoom, turn = 1 + 0.3 * np.sin(1.5 * swing), 0.35 * np.sin(swing + 1)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    across, down = (x - WIDTH / 2) / zoom, (y - HEIGHT / 2) / zoom
    breath = 4 * np.sin(3 * swing)
    where_x = centre_x + across * np.cos(turn) - down * np.sin(turn) + breath * np.sin(down / 60)
    where_y = centre_y + across * np.sin(turn) + down * np.cos(turn) + breath * np.cos(across / 60)
    maps = where_x.astype(np.float32), where_y.astype(np.float32)
    picture = cv2.remap(image, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    mask = cv2.remap(polyp, *maps, cv2.INTER_LINEAR) > 127

    across, down = np.abs(x / WIDTH - 0.5), np.abs(y / HEIGHT - 0.5)  # the lamp and the octagon move with the camera
    picture *= (1.05 - 0.9 * (across**2 + down**2))[..., None]
    inside = (across + down < 0.8) & (np.maximum(across, down) < 0.49)
    picture = np.where(inside[..., None], picture + rng.normal(0, 2.5, picture.shape), 6)
    return np.clip(picture, 0, 255).astype(np.uint8), np.where(mask & inside, 255, 0).astype(np.uint8)


if __name__ == "__main__":
    main()
