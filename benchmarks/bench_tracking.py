"""Measure memory and speed of extras/track_video.py and of sam2's own video predictor on the same JPEG frames.

    python benchmarks/bench_tracking.py                  peak memory at 200 and 2,000 frames, frames per second
    python benchmarks/bench_tracking.py --model-cfg configs/sam2.1/sam2.1_hiera_t.yaml --frames 12

It draws frames of 960 x 540 and prompts two objects on the first one. Each run is a separate process; the peak
is the resident memory of that process, including Python, torch and the model. On the CPU it measures the process time
of one thread, which a busy machine changes little. Weights are the demo's, or random for another config: right for
memory and speed, meaningless for quality.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra.utils import instantiate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "extras")]
import common  # noqa: E402
import files  # noqa: E402
import track_video  # noqa: E402
import tracking  # noqa: E402

DEMO_CFG, DEMO_WEIGHTS = ROOT / "demo" / "sam2_demo.yaml", ROOT / "demo" / "sam2_demo.pt"
PROMPTS = {(0, 1): ([(210, 350, 1)], None), (0, 2): ([(600, 200, 1)], None)}
KINDS = {"sam2": "sam2's own", "project": "track_video.py"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-cfg", default=str(DEMO_CFG))
    parser.add_argument("--frames", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--height", type=int, default=540)
    parser.add_argument("--rounds", type=int, default=3, help="runs of the shortest clip; each is printed")
    parser.add_argument("--skip-sam2-above", type=int, default=2000, help="frames that sam2's own does not survive")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        is_demo = args.model_cfg == str(DEMO_CFG)
        checkpoint = DEMO_WEIGHTS if is_demo else save_random_weights(args, folder / "random.pt")
        print(f"{args.model_cfg}, {args.width} x {args.height} px, {len(PROMPTS)} objects, {args.device}")
        unit = "frames/CPU s" if files.detect_device(args.device) == "cpu" else "frames/s"
        print(f"{'':16}{'frames':>8}{'peak MB':>10}{unit:>14}")
        for count in sorted(args.frames):
            draw_frames(folder / "frames", count, args.width, args.height)
            for kind in [*KINDS] * (args.rounds if count == min(args.frames) else 1):
                if kind == "sam2" and count > args.skip_sam2_above:
                    continue
                peak, rate = measure(args, kind, folder / "frames", checkpoint)
                print(f"{KINDS[kind]:16}{count:8}{peak:10.0f}{rate:14.3f}", flush=True)


def save_random_weights(args, path):
    torch.manual_seed(0)
    model = instantiate(common.read_config(args.model_cfg), _recursive_=True)
    torch.save({"model": model.state_dict()}, path)
    return path


def draw_frames(folder, count, width, height):
    """Write JPEG frames of smooth noise and two moving discs. Existing frames are kept."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 120, (9, 16, 3)).astype(np.uint8)
    ground = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    for number in range(len(list(folder.iterdir())), count):
        image = np.roll(ground, number, axis=1)
        for color, x, y in (((90, 160, 220), 210, 350), ((120, 200, 90), 600, 200)):
            place = round(x + 80 * np.sin(number / 15)), round(y + 60 * np.cos(number / 20) - 60)
            cv2.circle(image, place, height // 8, color, -1)
        cv2.imwrite(str(folder / f"{number:05}.jpg"), image)


def measure(args, kind, frames, checkpoint):
    """Run one of KINDS in a separate process: (peak resident memory in MB, frames per second, decoding included)."""
    done = subprocess.run([sys.executable, __file__, "--child", f"{kind},{frames},{checkpoint}", "--model-cfg",
                           args.model_cfg, "--device", args.device], stdout=subprocess.PIPE, text=True, check=True)
    peak, rate = map(float, done.stdout.split()[-2:])
    return peak, rate


def child(args):
    """Track with the method of --child and print the peak in MB and the frames per second."""
    kind, folder, checkpoint = args.child.split(",")
    device = files.detect_device(args.device)
    torch.set_num_threads(1)
    clock = time.process_time if device == "cpu" else time.perf_counter
    predictor = common.load_video_predictor(args.model_cfg, checkpoint, device)
    started = clock()
    count = 0
    if kind == "project":
        masks = (tracking.label_map(objects, logits) for _, objects, logits, _ in tracking.track(
            predictor, track_video.ImageFolder(Path(folder)), PROMPTS))
    else:
        state = predictor.init_state(folder)
        tracking.add_prompts(predictor, state, PROMPTS)
        masks = (tracking.label_map(list(objects), logits[:, 0]) for _, objects, logits in
                 predictor.propagate_in_video(state))
    for _ in tqdm(masks, KINDS[kind], disable=None):
        count += 1
    rate = count / (clock() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(peak, rate)


if __name__ == "__main__":
    main()
