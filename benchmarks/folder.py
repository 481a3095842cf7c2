"""How fast, and in how much memory, a large folder of JPEG files is listed and read; nothing else is computed.

    python benchmarks/folder.py                                   # 200,000 files in 1,000 classes, 1 and 8 workers
    python benchmarks/folder.py --files 5000 --side 500 --crop    # as for ImageNet: random crops of 224 pixels
    torchrun --nproc-per-node=2 benchmarks/folder.py              # each rank reads its share

The files are made in a temporary folder. `first` is the time to the first batch of an epoch. `private` is the
memory (Linux: Private_Dirty) that a reading process has for itself at the end of an epoch.
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
from common import batches, device_name, load_data, text_table, transformed, world  # noqa: E402


def make_files(root: Path, files: int, classes: int, side: int) -> None:
    """train/ with that many files of side x 3/4 side pixels, smooth as photographs are, and a small val/."""
    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, side // 10, side // 8)))
    smooth = F.interpolate(coarse[None].float(), (3 * side // 4, side), mode="bicubic")[0].clamp(0, 255)
    pixels, jpegs = smooth.byte().permute(1, 2, 0).numpy(), []
    for i in range(50):
        Image.fromarray(np.roll(pixels, i, 1)).save(root / "one.jpg", quality=95)
        jpegs.append((root / "one.jpg").read_bytes())
    for split, n in (("train", files), ("val", classes)):
        for i in range(n):
            folder = root / split / f"n{i % classes:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{folder.name}_{i:08d}.JPEG").write_bytes(jpegs[i % 50])


def private_mb() -> list[int]:
    """Memory of this process, then of each of its children, that no other process shares."""
    me, found = os.getpid(), []
    children = Path(f"/proc/{me}/task/{me}/children")
    for pid in [str(me), *(children.read_text().split() if children.exists() else [])]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) // 1024)
    return found


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--files", type=int, default=200_000, help="number of training images")
    add("--classes", type=int, default=1_000)
    add("--side", type=int, default=64, help="longer side of a stored image in pixels")
    add("--crop", action="store_true", help="A-MAE's random crops of 224 pixels; else the whole image, 32 pixels")
    add("--workers", default="1,8", help="numbers of processes per rank, comma-separated")
    add("--epochs", type=int, default=3)
    add("--json", default="", help="write the rows to this file")
    flags = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    cpu, rows, root = torch.device("cpu"), [], [""]
    torch.set_num_threads(1)
    size = 224 if flags.crop else 32
    with tempfile.TemporaryDirectory() as folder:
        if world()[0] == 0:
            make_files(Path(folder), flags.files, flags.classes, flags.side)
            root = [folder]
        if world()[1] > 1:
            dist.broadcast_object_list(root)
        for workers in map(int, flags.workers.split(",")):
            began = time.perf_counter()
            images, _ = load_data("folder", root[0], cpu, image_size=size, stream=True)
            listed = time.perf_counter() - began
            if flags.crop:
                args = adv_mae.Args()
                images = transformed(images, adv_mae.augmentation(adv_mae.recipe_of("mae", args), args))
            for epoch in range(1, flags.epochs + 1):
                began, seen, used = time.perf_counter(), 0, []
                for x, _ in batches(images, 256, cpu, shuffle=epoch, workers=workers):
                    first = first if seen else time.perf_counter() - began
                    seen += len(x)
                    if seen * world()[1] < 0.95 * len(images):  # later the workers begin to leave
                        used = used if seen * world()[1] < 0.9 * len(images) else private_mb()
                seconds = time.perf_counter() - began
                row = {"workers": workers, "epoch": epoch, "listed_s": round(listed, 2)}
                row |= {"first_s": round(first, 2), "images_per_s": round(seen / seconds)}
                rows.append(row | {"main_mb": used[0], "worker_mb": max(used[1:])})
        if world()[1] > 1:
            dist.barrier()  # before the files are removed
    if world()[0] == 0:
        info = {"benchmark": "folder.py", "device": device_name(cpu), "torch": torch.__version__}
        info |= {"ranks": world()[1], "files": flags.files, "classes": flags.classes, "crop": flags.crop}
        print(", ".join(f"{key} {value}" for key, value in info.items()))
        print(text_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
        if flags.json:
            Path(flags.json).write_text(json.dumps(info | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
