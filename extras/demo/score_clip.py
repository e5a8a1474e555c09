"""Compare tracked masks of the demo's clip with the true ones: mean J (IoU), as DAVIS calls it.

    python extras/demo/score_clip.py extras/demo/output/clip [another result ...]

Each result is a folder that track_video.py has written. The first frame, which holds the prompt, does not count.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import ImageError, calculate_iou, read_mask, run  # noqa: E402
from PIL import Image  # noqa: E402

TRUTH = Path(__file__).resolve().parent / "data" / "clip_masks"


def main():
    parser = argparse.ArgumentParser(description="추적한 마스크를 데모 영상의 정답과 비교합니다 (평균 J).")
    parser.add_argument("results", nargs="+", type=Path, help="track_video.py의 결과 폴더")
    parser.add_argument("--truth", type=Path, default=TRUTH,
                        help="정답 마스크 폴더 (기본: extras/demo/data/clip_masks)")
    args = parser.parse_args()
    for result in args.results:
        scores = []
        for path in sorted(args.truth.glob("*.png"))[1:]:
            tracked = result / "masks" / path.name
            if not tracked.is_file():
                raise ImageError(f"{tracked}: 없습니다. 먼저 track_video.py로 추적하세요")
            scores.append(calculate_iou(np.array(Image.open(tracked)) == 1, read_mask(path) > 0))
        print(f"{result}: 평균 J {np.mean(scores):.4f} ({len(scores)}프레임, 가장 낮은 프레임 {np.min(scores):.4f})")


if __name__ == "__main__":
    run(main, "")
