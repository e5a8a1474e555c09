"""Read NIfTI files and check volumes and masks; shared by segment_volume.py and sam_med3d_ich.

A voxel of a mask is foreground if its value is above 0.5; its label is the value, rounded. This file does not import
sam2, which sam_med3d_ich does not need.
"""

import nibabel as nib
import numpy as np

MILLIMETRES = {"meter": 1000, "micron": 0.001}  # per unit of a NIfTI header; the default unit is the millimetre
TOLERANCE = 0.1    # voxels: two grids that are this far apart, or further, are different
SOFT = -150, 300   # Hounsfield units: between air and bone
LEAST_AIR = 0.005  # minimum share of air in the voxels of a CT
MOST_BONE = 0.4    # maximum share of bone in the other voxels


def load_nifti(path):
    """Load a nibabel image. First reads its files to the end, where a compressed file has its checksum (nibabel stops
    at the last voxel). Raises the errors of nibabel, gzip, bz2 and zlib for a damaged file.
    """
    image = nib.load(path)
    for holder in image.file_map.values():
        with nib.openers.ImageOpener(holder.filename) as file:
            while file.read(2**20):
                pass
    return image


def affine_in_mm(image):
    """The affine of a nibabel NIfTI image, float64 4 x 4, from voxel indices to millimetres."""
    scale = MILLIMETRES.get(image.header.get_xyzt_units()[0], 1)
    return np.diag([scale] * 3 + [1]) @ image.affine


def voxels_apart(affine, other, shape):
    """The largest distance of a voxel in two grids, in voxels along an axis of the first. affine, other: 4 x 4."""
    corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(shape)[:, None] - 1)
    corners = np.vstack([corners, np.ones(8)])
    return round(float(np.abs(np.linalg.inv(affine) @ other @ corners - corners).max()), 4)


def labels_of(mask):
    """The labels in a mask, ascending ints. mask: numbers, X x Y x Z."""
    return np.unique(np.round(mask[(mask > 0.5) & np.isfinite(mask)])).astype(int).tolist()


def doubts_about_values(values, window):
    """Warnings, in Korean, if the values of a volume, X x Y x Z, seem not to be in Hounsfield units like the window.

    window: (lowest, highest) value; None, or a window above soft tissue, gives no warning. A CT has air, and most of
    the rest is soft tissue. An MR has no negative values. If the intercept was lost, values are in Hounsfield units +
    1024, and soft tissue is at 1064.
    """
    sample = values[::2, ::2, ::2]
    sample = sample[sample >= -1100]  # lower values are padding, as in the corners of scanners' images
    is_air, is_bone = sample < SOFT[0], sample > SOFT[1]
    if window is None or window[0] > SOFT[1] or \
            is_air.sum() >= LEAST_AIR * max(1, sample.size) and is_bone.sum() <= MOST_BONE * (~is_air).sum():
        return []
    return ["값이 Hounsfield 단위(HU)가 아닌 것 같습니다. MR이면 --window none을 쓰고, HU에 1024를 더한 값이면 "
            "레벨에도 1024를 더해 --window 1064,80처럼 쓰세요"]


def doubts_about_affine(affine):
    """Warnings, in Korean, about the affine of a volume, 4 x 4, in millimetres: programs that know neither the size nor
    the position of the voxels write an identity, possibly in LPS axes (SimpleITK)."""
    if not np.array_equal(np.abs(affine), np.eye(4)):
        return []
    return ["affine이 단위 행렬(복셀 1 mm, 원점 0)입니다. 실제 값이 아니면 부피와 방향이 틀립니다"]


def doubts_about_header(path):
    """Warnings, in Korean, about the voxel positions in the header of a NIfTI file."""
    image = nib.load(path)
    header = image.header
    if not header["qform_code"] and not header["sform_code"]:
        return ["qform과 sform이 없습니다. 축을 LAS로 보므로 방향과 좌우가 틀릴 수 있습니다"]
    if not header["qform_code"] or not header["sform_code"]:
        return []
    try:
        apart = voxels_apart(header.get_sform(), header.get_qform(), image.shape[:3])
    except ValueError:  # an invalid quaternion
        apart = np.inf
    return ["qform과 sform이 서로 다릅니다. sform을 씁니다"] if apart >= TOLERANCE else []
