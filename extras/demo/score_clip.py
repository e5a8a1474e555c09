"""Compare tracked masks of the demo's clip with the true ones: mean IoU, called J in DAVIS.

    python extras/demo/score_clip.py extras/demo/output/clip [another result ...]

Each result is a folder that track_video.py has written. The first frame, which has the prompt, is not scored.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files import ImageError, calculate_iou, read_mask, run  # noqa: E402
from PIL import Image  # noqa: E402

TRUTH = Path(__file__).resolve().parent / "data" / "clip_masks"


def main():
    parser = argparse.ArgumentParser(description="추적한 마스크를 데모 영상의 정답과 비교합니다 (평균 J).")
    parser.add_argument("results", nargs="+", type=Path, help="track_video.py의 결과 폴더")
    parser.add_argument("--truth", type=Path, default=TRUTH,
                        help="정답 마스크 폴더 (기본: extras/demo/data/clip_masks)")
    args = parser.parse_args()
    truths = sorted(args.truth.glob("*.png"))[1:]
    if not truths:
        raise ImageError(f"{args.truth}: 정답 마스크가 없습니다. 먼저 make_demo_clip.py로 그리세요")
    for result in args.results:
        scores = [score(result / "masks" / path.name, path) for path in truths]
        print(f"{result}: 평균 J {np.mean(scores):.4f} ({len(scores)}프레임, 가장 낮은 프레임 {np.min(scores):.4f})")


def score(path, truth_path):
    """IoU of a tracked mask's object 1 with the true mask. Raises ImageError."""
    if not path.is_file():
        raise ImageError(f"{path}: 없습니다. 먼저 track_video.py로 추적하세요")
    tracked, truth = np.array(Image.open(path)), read_mask(truth_path)
    if tracked.shape != truth.shape:
        raise ImageError(f"{path}: 정답과 크기가 다릅니다. 데모 영상을 추적한 결과가 아닙니다")
    return calculate_iou(tracked == 1, truth > 0)


if __name__ == "__main__":
    run(main, "")
