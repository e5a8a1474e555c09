"""Coverage-guided fuzzing of the parsers of untrusted input. Not part of the tests: it never ends by itself.

    pip install atheris
    python tests/fuzz_parsers.py points|boxes|image|labels|coco|archive -max_total_time=120

Every input must give a result or the one expected error; anything else is a crash, whose input is written to
the current folder.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import atheris
import numpy as np

os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(2**22)  # else it ends at the first header that claims 3 GB of pixels
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["download_dataset", "prepare_data", "test_my_image", "zipfile", "json"]):
    import download_dataset
    import prepare_data
    import test_my_image

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def points(data):
    try:
        test_my_image.parse_points(data.ConsumeUnicode(60))
    except argparse.ArgumentTypeError:
        pass


def boxes(data):
    try:
        test_my_image.parse_boxes(data.ConsumeUnicode(60))
    except argparse.ArgumentTypeError:
        pass


def image(data):
    path = FOLDER / "image.tif"
    starts = [b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", b"GIF89a", b"BM", b"II*\x00",
              b""]
    path.write_bytes(data.PickValueInList(starts) + data.ConsumeBytes(4096))
    args = argparse.Namespace(data_dir=FOLDER, threshold=data.PickValueInList([None, 0, 127.5]),
                              void=[[255]] * data.ConsumeBool(),
                              **{name: data.ConsumeBool() for name in ("numbered", "classes", "merge")})
    for read, error in ((test_my_image.read_image, test_my_image.ImageError),
                        (lambda path: prepare_data.read_source_mask(path, 0, args, defaultdict(list)),
                         (prepare_data.ImageError, SystemExit))):
        try:
            pixels = read(path)
            assert pixels.shape[0] and pixels.shape[1]
        except error:
            pass


def labels(data):
    """Label maps and color masks of any type and any values."""
    kind = data.PickValueInList([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
    shape = [data.ConsumeIntInRange(1, 6), data.ConsumeIntInRange(1, 6)]
    if data.ConsumeBool():
        shape.append(data.ConsumeIntInRange(1, 4))
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    values = np.frombuffer(data.ConsumeBytes(size).ljust(size, b"\0"), kind).reshape(shape)
    for classes in (False, True):
        try:
            result = prepare_data.to_labels(values[..., :3] if values.ndim == 3 else values, classes)
            assert result.dtype == np.uint16 and result.shape == values.shape[:2]
        except prepare_data.ImageError:
            pass


def coco(data):
    """A COCO file with any values, and one with any bytes."""
    def value(depth=0):
        kind = data.ConsumeIntInRange(0, 7 if depth < 3 else 4)
        if kind < 5:
            return (data.ConsumeInt(4), data.ConsumeFloat(), data.ConsumeUnicode(8), None, "a.png")[kind]
        if kind == 5:
            return [value(depth + 1) for _ in range(data.ConsumeIntInRange(0, 6))]
        names = ["id", "file_name", "height", "width", "image_id", "segmentation", "counts", "size"]
        return {data.PickValueInList(names): value(depth + 1) for _ in range(data.ConsumeIntInRange(0, 5))}

    def segmentation():
        kind, size = data.ConsumeIntInRange(0, 3), [data.ConsumeIntInRange(0, 60), 40]
        if kind == 0:
            return {"size": size, "counts": data.ConsumeUnicodeNoSurrogates(30)}
        if kind == 1:
            return {"size": size, "counts": [data.ConsumeIntInRange(-3, 3000) for _ in range(5)]}
        return [[data.ConsumeFloat() for _ in range(data.ConsumeIntInRange(0, 9))]] if kind == 2 else value()

    image = {"id": 1, "file_name": "a.png", "height": data.ConsumeIntInRange(-2, 50), "width": 40}
    annotations = [{"image_id": 1, "segmentation": segmentation(), "iscrowd": value(), "category_id": value()}
                   for _ in range(data.ConsumeIntInRange(0, 3))]
    content = json.dumps({"categories": [{"id": value(), "name": value()}],
                          "images": [image, value()] if data.ConsumeBool() else [image],
                          "annotations": [*annotations, value()] if data.ConsumeBool() else annotations}).encode()
    if data.ConsumeBool():
        content = data.ConsumeBytes(400)
    (FOLDER / "images").mkdir(exist_ok=True)
    (FOLDER / "images" / "a.png").write_bytes(b"")
    (FOLDER / "coco.json").write_bytes(content)
    try:
        args = argparse.Namespace(images=FOLDER / "images", coco=FOLDER / "coco.json",
                                  category=[None, ["a.png"]][data.ConsumeBool()], merge=data.ConsumeBool(),
                                  keep_crowd=data.ConsumeBool(), allow_empty=data.ConsumeBool(), recursive=False)
        pairs, _ = prepare_data.pairs_from_coco(args.coco, {}, args.images, "all", args, {}, defaultdict(list))
        for pair in pairs:
            pair.read_mask((40, 40))
    except (SystemExit, prepare_data.ImageError):
        pass


def archive(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as whole:
        for _ in range(data.ConsumeIntInRange(0, 3)):
            member = zipfile.ZipInfo(data.ConsumeUnicodeNoSurrogates(20) or "x")
            member.external_attr = data.ConsumeInt(4) & 0xFFFFFFFF
            whole.writestr(member, data.ConsumeBytes(30))
    content = bytearray(file.getvalue())
    for _ in range(data.ConsumeIntInRange(0, 8)):
        content[data.ConsumeIntInRange(0, len(content) - 1)] = data.ConsumeIntInRange(0, 255)
    (FOLDER / "inside").mkdir(exist_ok=True)
    path = FOLDER / "archive.zip"
    path.write_bytes(content)
    try:
        download_dataset.check_archive(path)
        download_dataset.unpack(path, FOLDER / "inside" / "target", {})
    except (SystemExit, download_dataset.BadDownload, OSError):
        pass
    assert {entry.name for entry in FOLDER.iterdir()} <= {"archive.zip", "inside"}, "left the folder"


if __name__ == "__main__":
    target = {"points": points, "boxes": boxes, "image": image, "labels": labels, "coco": coco,
              "archive": archive}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, lambda content: target(atheris.FuzzedDataProvider(content)))
    atheris.Fuzz()
