"""Draw the demo's volume: a CT of a head with a haemorrhage, in Hounsfield units, and the true mask of it.

    python extras/demo/make_demo_volume.py

Writes ct.nii.gz (int16) and ct_truth.nii.gz on a grid like that of a scanner: voxels of 0.8 x 0.8 x 3 mm, the gantry
tilted by 12 degrees, stored from right to left and from front to back (LPS). Prints the voxel in the middle of the
haemorrhage, the box around it in this slice, and a voxel inside it in each slice, in indices for segment_volume.py.
"""

import argparse
from pathlib import Path

import cv2
import nibabel as nib
import numpy as np

SHAPE = (208, 256, 48)       # voxels: from left to right, back to front, bottom to top
SPACING = (0.8, 0.8, 3.0)    # mm
TILT = np.deg2rad(12)        # around the axis from right to left
AIR, SCALP, BONE, FLUID, GREY, WHITE, BLOOD, OEDEMA = -1000, 30, 1100, 6, 37, 28, 68, 17  # Hounsfield units


def main():
    parser = argparse.ArgumentParser(description="데모용 머리 CT(출혈 하나)와 정답 마스크를 NIfTI로 그립니다.")
    parser.add_argument("--seed", type=int, default=0, help="난수 시드 (기본: 0)")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "data",
                        help="결과 폴더 (기본: extras/demo/data)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    volume, blood = draw_head(np.random.default_rng(args.seed))
    affine = make_affine()
    for name, data in (("ct", volume), ("ct_truth", blood)):
        image = nib.Nifti1Image(data[::-1, ::-1], affine)  # stored from right to left, front to back
        image.header.set_xyzt_units("mm")
        nib.save(image, args.output / f"{name}.nii.gz")
    x, y, z = np.array(np.nonzero(blood)).mean(axis=1).round().astype(int)
    print(f"데모 볼륨: {args.output / 'ct.nii.gz'} ({' x '.join(map(str, SHAPE))}), "
          f"정답: {args.output / 'ct_truth.nii.gz'}, 출혈 {blood.sum() * np.prod(SPACING) / 1000:.1f} ml")
    across, along = np.nonzero(blood[..., z])
    print(f'출혈의 가운데: --point "{z},{x},{y}"')
    print(f'그 슬라이스의 출혈: --box "{z},{across.min()},{along.min()},{across.max()},{along.max()}"')
    points = []
    for z in np.flatnonzero(blood.any(axis=(0, 1))):
        depth = cv2.distanceTransform(blood[..., z].copy(), cv2.DIST_L2, 5)  # largest farthest from the edge
        points.append("{},{},{}".format(z, *np.unravel_index(depth.argmax(), depth.shape)))
    print(f'출혈이 있는 모든 슬라이스: --each-slice --point "{";".join(points)}"')


def make_affine():
    """4 x 4, from stored voxel indices to millimetres (RAS+): tilted, the middle of the head at the origin."""
    tilt = np.array([[1, 0, 0], [0, np.cos(TILT), -np.sin(TILT)], [0, np.sin(TILT), np.cos(TILT)]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-SPACING[0], -SPACING[1], SPACING[2]])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


def draw_head(rng):
    """Draw (volume, int16 X x Y x Z in Hounsfield units; mask of the haemorrhage, uint8, 0 or 1), both in RAS order."""
    x, y, z = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * step for n, step in zip(SHAPE, SPACING)), indexing="ij")

    def ellipsoid(centre, radii, bumps=0.0):
        """Distance from the centre, float X x Y x Z: 1 on the ellipsoid's surface. centre and radii in mm."""
        reach = np.sqrt(sum(((axis - middle) / radius) ** 2 for axis, middle, radius in zip((x, y, z), centre, radii)))
        return reach * (1 + bumps * smooth_noise(rng, 9)) if bumps else reach

    head = ellipsoid((0, 0, -8), (76, 94, 86))
    brain = ellipsoid((0, 0, -8), (64, 82, 74))
    volume = np.full(SHAPE, AIR, np.float32)
    volume[head < 1] = SCALP
    volume[(head < 0.95) & (brain >= 1)] = BONE
    inside = brain < 1
    folds = smooth_noise(rng, 14) + 0.6 * smooth_noise(rng, 26)
    depth = np.clip((1 - brain) * 6, 0, 1)  # white matter lies deeper than grey
    volume[inside] = np.where(folds + 1.6 * depth > 1.1, WHITE, GREY)[inside]
    volume[inside & (brain > 0.93) & (folds > 0.5)] = FLUID  # sulci
    volume[inside & (np.abs(x) < 1)] = GREY + 12             # the falx, between the hemispheres
    for side in (-1, 1):
        volume[ellipsoid((side * 13, 5, 4), (7, 30, 14), 0.15) < 1] = FLUID
        volume[ellipsoid((side * 15, -22, 0), (3, 4, 4)) < 1] = 140  # calcified choroid plexus

    centre = (34, 12, 8)
    reach = ellipsoid(centre, (16, 19, 17), 0.4)
    blood = (reach < 1) & inside
    volume[(reach < 1.25) & inside & ~blood] = OEDEMA
    volume[blood] = BLOOD + 5 * smooth_noise(rng, 12)[blood]
    for number in range(SHAPE[2]):
        volume[..., number] = cv2.GaussianBlur(volume[..., number], (0, 0), 0.7)  # the scanner's point spread
    volume += rng.normal(0, 4, SHAPE)
    return np.clip(volume, -1024, 3071).round().astype(np.int16), blood.astype(np.uint8)


def smooth_noise(rng, cells):
    """Smooth noise, float32 X x Y x Z, about -1 to 1, with `cells` random values along each axis."""
    grid = rng.uniform(-1, 1, (cells, cells, cells)).astype(np.float32)
    planes = np.stack([cv2.resize(plane, SHAPE[1::-1], interpolation=cv2.INTER_CUBIC) for plane in grid])
    flat = planes.reshape(cells, -1)
    return cv2.resize(flat, (flat.shape[1], SHAPE[2]), interpolation=cv2.INTER_CUBIC).T.reshape(SHAPE)


if __name__ == "__main__":
    main()
