"""How fast, and in how much memory, a large folder of JPEG files is listed and read; no network runs.

    python benchmarks/folder.py                             # 200,000 small files in 1,000 classes
    python benchmarks/folder.py --files 6000 --side 500     # files as large as ImageNet's
    torchrun --nproc-per-node=2 benchmarks/folder.py        # each rank reads its share

The files are made in a temporary folder and read as in adv_mae.py: decoded, cropped at random to 224 pixels
(--side below 224: to 32), mirrored. `listed`: seconds to find all files. `first`: seconds to an epoch's first
batch. `main`, `worker`: MB that a rank's process, and the largest of those that read for it, share with no
other process near the end of an epoch (Linux).
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adv_mae  # noqa: E402
from common import batches, device_name, load_data, of_all_ranks, text_table, transformed, world  # noqa: E402


def make_jpegs(side: int, n: int) -> list[bytes]:
    """n different JPEG files of side x 3/4 side pixels, smooth, so that they are as small as photographs."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (1, 3, side // 10, side // 8)))
    smooth = F.interpolate(coarse.float(), (3 * side // 4, side), mode="bicubic")[0].clamp(0, 255).byte()
    pixels, files = smooth.permute(1, 2, 0).numpy(), []
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        for i in range(n):
            Image.fromarray(np.roll(pixels, i, 1)).save(file.name, quality=95)
            files.append(Path(file.name).read_bytes())
    return files


def make_folder(root: Path, files: int, classes: int, side: int) -> None:
    """train/ with that many files, val/ with one per class."""
    jpegs = make_jpegs(side, 50)
    for split, n in (("train", files), ("val", classes)):
        for i in range(n):
            folder = root / split / f"n{i % classes:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{folder.name}_{i:08d}.JPEG").write_bytes(jpegs[i % 50])


def own_memory() -> list[int]:
    """MB of this process, then of its children, that no other process shares."""
    me, found = os.getpid(), []
    children = Path(f"/proc/{me}/task/{me}/children")
    for pid in [str(me), *(children.read_text().split() if children.exists() else [])]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) // 1024)
    return found


def measure(root: str, workers: int, flags: argparse.Namespace) -> list[list[str]]:
    """A line of the table per epoch."""
    cpu, lines, began = torch.device("cpu"), [], time.perf_counter()
    args = adv_mae.Args(image_size=224 if flags.side >= 224 else 32)
    images, _ = load_data("folder", root, cpu, image_size=args.image_size, stream=True)
    listed = time.perf_counter() - began
    images = transformed(images, adv_mae.augmentation(adv_mae.recipe_of("mae", args), args))
    for epoch in range(1, flags.epochs + 1):
        began, first, seen, memory = time.perf_counter(), 0.0, 0, [0, 0]
        for x, _ in batches(images, 256, cpu, shuffle=epoch, workers=workers):
            first = first or time.perf_counter() - began
            seen += len(x)
            if memory == [0, 0] and seen * world()[1] > 0.9 * len(images):  # soon the first processes leave
                memory = own_memory()
        speed = seen * world()[1] / (time.perf_counter() - began)
        numbers = (listed, first, speed, memory[0], max(memory[1:], default=0))
        formats = (".2f", ".2f", ",.0f", "d", "d")
        cells = [format(v, f) for v, f in zip(numbers, formats, strict=True)]
        lines.append([str(workers), str(epoch), *cells])
    return lines


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--files", type=int, default=200_000, help="number of training images")
    add("--classes", type=int, default=1_000, help="number of classes")
    add("--side", type=int, default=64, help="longer side of a stored image in pixels")
    add("--workers", default="1,8", help="processes per rank that read, comma-separated")
    add("--epochs", type=int, default=3, help="epochs for each number of processes")
    add("--json", default="", help="write the table to this file")
    flags = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        if world()[0] == 0:
            make_folder(Path(folder), flags.files, flags.classes, flags.side)
        root = of_all_ranks(folder)[0]
        for workers in map(int, flags.workers.split(",")):
            lines += measure(root, workers, flags)
        if world()[1] > 1:
            dist.barrier()  # then rank 0 removes the files
    if world()[0] == 0:
        header = ["workers", "epoch", "listed", "first", "images/s", "main", "worker"]
        what = f"folder.py, {flags.files:,} files in {flags.classes:,} classes, {flags.side} pixels"
        what += f", {world()[1]} rank(s), {os.cpu_count()} cores"
        info = {"what": what, "device": device_name(torch.device("cpu"))}
        print(", ".join(info.values()) + "\n" + text_table(header, lines))
        if flags.json:
            info |= {"torch": torch.__version__, "table": [header, *lines]}
            Path(flags.json).write_text(json.dumps(info, indent=1))


if __name__ == "__main__":
    main()
