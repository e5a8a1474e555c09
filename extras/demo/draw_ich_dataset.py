"""Draw the dataset of `make demo-ich`: simplified head CTs, some with a haemorrhage, in the format of train.py.

    python extras/demo/draw_ich_dataset.py

A head is an ellipsoid of brain inside a thin skull and a scalp, with ventricles, a falx, and calcified spots as bright
as blood, in Hounsfield units, of adult size and with thick slices. (A skull of realistic thickness would fill the
32 mm patches of the demo's model, which would need more training than a demo allows to distinguish it from blood.) A
haemorrhage is an irregular ball with a dark rim. Three of four patients have one; some have several scans. Volumes are
written as .pkl, .npy and .nii.gz, with axes as scanners write them (LPS) or as nibabel does (RAS). The random numbers
depend on --seed and the patient's number, so that the files are the same every time.
"""

import argparse
import csv
import pickle
import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

SHAPE = (92, 112, 38)              # voxels
VOXEL = np.array([2.2, 2.2, 5.0])  # mm
AIR, SCALP, SKULL, FLUID, BRAIN, FALX, CALCIFIED = -1000, 30, 1100, 8, 33, 50, 130  # Hounsfield units
FORMATS = (".pkl", ".npy", ".nii.gz")
OWN = re.compile(r"(train|val)\.csv|(volumes|masks)(/patient_\d+_\d+\.(pkl|npy|nii\.gz))?")  # files of this script

for _stream in (sys.stdout, sys.stderr):
    _stream.reconfigure(errors="replace")  # a terminal without Hangul shows "?" instead of raising


def smooth_noise(rng, cells):
    """Smooth noise, float32 SHAPE in [-1, 1], with `cells` random values along each axis."""
    grid = torch.from_numpy(rng.uniform(-1, 1, (1, 1, cells, cells, cells)).astype(np.float32))
    return torch.nn.functional.interpolate(grid, SHAPE, mode="trilinear", align_corners=True)[0, 0].numpy()


def reach_of(points, centre, radii):
    """Distance of each point from a centre, float32 SHAPE: 1 on the ellipsoid with these radii (mm)."""
    return np.sqrt(sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip(points, centre, radii)))


def draw_head(rng, points):
    """A head without a haemorrhage: (float32 SHAPE in Hounsfield units, reach_of each voxel: 1 at the skull)."""
    radii = np.array([68, 86, 72]) * rng.uniform(0.93, 1.07, 3)
    reach = reach_of(points, rng.uniform(-7, 7, 3), radii) * (1 + 0.02 * smooth_noise(rng, 4))
    head = np.full(SHAPE, AIR, np.float32)
    head[reach < 1.09] = SCALP
    head[reach < 1.03] = SKULL * rng.uniform(0.8, 1.2)
    inside = reach < 1
    head[inside] = (BRAIN + 3 * smooth_noise(rng, 9) + 2 * smooth_noise(rng, 5))[inside]
    head[inside & (reach > 0.96)] = FLUID
    x, y, z = points
    for side in (-1, 1):
        ventricle = reach_of((x - side * (9 + 0.1 * np.abs(y)), y, z), (0, rng.uniform(-8, 8), 8),
                             (rng.uniform(4, 8), 32, 10))
        head[ventricle < 1] = FLUID
        spot = reach_of(points, (side * rng.uniform(10, 16), rng.uniform(-32, -18), rng.uniform(2, 12)),
                        rng.uniform(3, 5, 3))
        head[spot < 1] = CALCIFIED
    head[(np.abs(x) < 1.6) & inside & (reach > 0.6) & (z > 0)] = FALX
    return head, reach


def draw_haemorrhage(rng, head, reach, points, centre, radius):
    """Draw a haemorrhage into the brain of `head` in place; returns its mask, bool SHAPE. centre and radius in mm."""
    bumps = 1 + 0.3 * smooth_noise(rng, 6) + 0.15 * smooth_noise(rng, 12)
    ball = reach_of(points, centre, radius * rng.uniform(0.8, 1.2, 3)) * bumps
    brain = reach < 0.97
    mask = (ball < 1) & brain
    head[(ball < 1.3) & brain & ~mask] -= 10
    head[mask] = rng.uniform(56, 74) + (4 * smooth_noise(rng, 8))[mask]
    return mask


def draw_scan(rng, haemorrhage):
    """Draw one scan: (volume, int16 SHAPE in Hounsfield units; mask, bool SHAPE).

    haemorrhage: (centre along x, y, z as a fraction of the brain's radii, radius in mm), or None.
    """
    points = [(np.arange(count) - (count - 1) / 2) * size for count, size in zip(SHAPE, VOXEL)]
    x, y, z = (axis.astype(np.float32) for axis in np.meshgrid(*points, indexing="ij"))
    turn = np.radians(rng.uniform(-8, 8))
    points = (x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn), z)
    head, reach = draw_head(rng, points)
    mask = np.zeros(SHAPE, bool)
    if haemorrhage:
        share, radius = haemorrhage
        mask = draw_haemorrhage(rng, head, reach, points, share * (68, 86, 72), radius)
    blurred = (head + np.roll(head, 1, 0) + np.roll(head, 1, 1) + np.roll(head, (1, 1), (0, 1))) / 4
    return (blurred + rng.normal(0, 4, SHAPE)).round().astype(np.int16), mask


def write_scan(folder, name, kind, volume, mask, axes):
    """Write the files of a scan, whose arrays are in RAS order, with other axes ("LPS"); returns the volume's path."""
    sign = np.array([1 if letter in "RAS" else -1 for letter in axes])
    affine = np.diag([*(sign * VOXEL), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(SHAPE) - 1) / 2
    volume, mask = (array[tuple(slice(None, None, step) for step in sign)] for array in (volume, mask))
    path = folder / "volumes" / f"{name}{kind}"
    if kind == ".nii.gz":
        nib.save(nib.Nifti1Image(volume, affine), path)
    elif kind == ".npy":
        np.save(path, volume)
    else:
        path.write_bytes(pickle.dumps({"image": np.ascontiguousarray(volume), "affine": affine}))
    if mask.any() or kind == ".npy":  # a .npy always needs a mask, because it has no affine
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / "masks" / f"{name}.nii.gz")
    return path


def draw_patient(folder, number, seed):
    """Draw and write one patient's scans; returns the rows of the CSV."""
    rng = np.random.default_rng([seed, number])
    scans = 3 if number % 12 == 5 else 2 if number % 6 == 1 else 1
    direction = rng.normal(size=3)
    share = direction / np.linalg.norm(direction) * rng.uniform(0.2, 0.68)
    radius = 14 * np.exp(rng.normal(0.35, 0.2))
    rows = []
    for scan in range(scans):
        haemorrhage = None if number % 4 == 3 else (share, radius * 1.15**scan)  # it grows from scan to scan
        volume, mask = draw_scan(rng, haemorrhage)
        name = f"patient_{number:03}_{scan}"
        path = write_scan(folder, name, FORMATS[(number + scan) % 3], volume, mask, "LPS" if number % 2 else "RAS")
        rows.append({"path": path.relative_to(folder).as_posix(), "ich": int(mask.any()),
                     "patient_id": f"patient_{number:03}"})
    return rows


def main():
    parser = argparse.ArgumentParser(description="SAM-Med3D 데모용 머리 CT와 출혈 마스크를 그려 저장합니다.")
    parser.add_argument("--seed", type=int, default=0, help="난수 시드 (기본: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "data" / "ich",
                        help="결과 폴더: 없거나, 비었거나, 이 스크립트가 만든 것. 전에 만든 것은 지우고 새로 그림 "
                        "(기본: extras/demo/data/ich)")
    parser.add_argument("--train", type=int, default=48, help="학습 환자 수 (기본: 48)")
    parser.add_argument("--val", type=int, default=12, help="검증 환자 수 (기본: 12)")
    args = parser.parse_args()
    for path in args.output.rglob("*"):
        if not OWN.fullmatch(path.relative_to(args.output).as_posix()):
            sys.exit(f"오류: 다른 파일이 있는 폴더라 지우고 새로 만들지 않습니다: {path}")
    for name in ("volumes", "masks"):
        shutil.rmtree(args.output / name, ignore_errors=True)
        (args.output / name).mkdir(parents=True)
    numbers = {"train": range(args.train), "val": range(args.train, args.train + args.val)}
    for split, patients in numbers.items():
        rows = [row for number in patients for row in draw_patient(args.output, number, args.seed)]
        with (args.output / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["path", "ich", "patient_id"])
            writer.writeheader()
            writer.writerows(rows)
        print(f"{args.output / f'{split}.csv'}: 환자 {len(patients)}명, 볼륨 {len(rows)}개, "
              f"출혈 {sum(row['ich'] for row in rows)}개")


if __name__ == "__main__":
    main()
