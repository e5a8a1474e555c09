"""Print the result of `make kvasir` beside that of the reference guide.

    python benchmarks/print_kvasir.py output/kvasir/reference/comparison/summary.json
"""

import json
import sys
from pathlib import Path


def main():
    sys.stdout.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    count, before, after = (summary[name] for name in ("num_images", "original_iou", "finetuned_iou"))
    print(f"""
                이미지     원본 SAM2   파인튜닝 SAM2        차이
참고 가이드         50        65.92%          83.33%     +17.4%p
이 실행         {count:6}       {before:7.2%}         {after:7.2%}    {summary["difference_pp"]:+6.1f}%p

참고 가이드는 이미지 50장, 이 실행은 {count}장의 평균이라 같은 측정은 아닙니다.
이 실행: 프롬프트 {summary["prompt"]}, 장치 {summary["device"]}, {summary["finetuned"]}""")


if __name__ == "__main__":
    main()
