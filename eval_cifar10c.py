"""Accuracy on common corruptions, clean and attacked (CIFAR-10-C: Hendrycks and Dietterich 2019, arXiv:1903.12261;
attacked as in Kucer et al. 2021, section 4.4 and Figure 4), of the checkpoints of any script.

15 benchmark types of corruption (and 4 extra ones) in 5 severities. For each of these cells

    TA  accuracy on the corrupted test images                                                 (Figure 4, top)
    RA  accuracy when PGD-20 also moves each corrupted image within the eps-ball around it    (Figure 4, bottom)

    python eval_cifar10c.py --quick                                           # digits, a minute on two CPU cores
    python eval_cifar10c.py runs/a/best.pt runs/b/best.pt --download          # CIFAR-10-C (2.9 GB), side by side
    python eval_cifar10c.py runs/a/best.pt --eval-examples 1000               # attack 1,000 images of each cell
    python eval_cifar10c.py runs/a/best.pt --dataset folder --data-dir ImageNet-C --image-size 224
    python eval_cifar10c.py runs/a/best.pt --generate --dataset cifar10       # without CIFAR-10-C at hand

The paper, mean over corruptions (ResNet-18): l2 eps 1.0, TA T0 78.36, T1 80.23, T2 79.15, T3 76.52, RA T0 35.83, T3
38.33; linf 8/255, RA T0 32.20, T3 36.22.

Differs from the paper, which released no code, or is our choice where it is silent:
- the radius of this attack is not given: each checkpoint's own, PGD-20 as in section 4.2;
- nor which severities and types count: all 5; we print the means over the 15 types of the benchmark and over all 19;
- --generate makes all corruptions but frost (which needs photographs), snow and spatter, after the definitions and with
  the constants of the official make_cifar_c.py. Other random numbers and libraries make other pixels: every row says
  "generated", do not compare it with published figures.
"""
import contextlib
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    Images, OldRun as Run, UserError, batches, ce_per_image, check_args, check_classifier, old_cli as cli,
    draw, eps_name, full_precision, load_checkpoint, load_data, open_folder, pgd, place_model,
    plasma, print_table, progress_bar, reading, rebuild, robust_accuracy, old_start_run as start_run,
    suite_accuracy, suite_attacks, progress as with_progress, words, world, write_atomically,
    write_results,
)  # fmt: skip


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ()  # best.pt, plain.pt, ... of any runs; columns are named after their folders, or variants if the folder is the same
    # run
    seed: int = 0  # seed of the attacks and of --generate
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/eval_cifar10c[-quick]-<network>
    resume: bool = False  # go on with the run in --out, cell by cell, or start it
    quick: bool = False  # a miniature: digits, generated corruptions; two small networks are trained if none is given
    # data
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # cifar10: CIFAR-10-C, cifar100: CIFAR-100-C, folder: --data-dir is <corruption>/<severity>/<class>/*, as ImageNet-C
    data_dir: str = "data"  # where CIFAR-10-C/ is, or is downloaded to (with --generate: where the clean data are)
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    download: bool = False  # fetch the official archive first, if it is not there
    generate: bool = False  # make the corruptions from the test images of --dataset instead of reading them
    image_size: int = 32  # side in pixels to which --dataset folder or --generate resizes (each network then gets the size it was trained on)
    batch_size: int = 500  # images per step over all GPUs
    corruptions: str = ""  # comma-separated types; empty: all there are
    severities: str = "1,2,3,4,5"  # comma-separated severities of each type
    # evaluation
    norm: Literal["own", "linf", "l2"] = "own"  # norm of the ball that the attack stays in; own: that of the checkpoint's training
    eps: float = 0.0  # radius of that ball, in [0, 1] pixel units, such as 8/255; 0: that of the checkpoint's training
    eval_attack: Literal["pgd20", "suite", "suite-fast", "standard", "none"] = "pgd20"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it; standard: AutoAttack without FAB; none: clean accuracy only
    eval_steps: int = 20  # PGD steps in evaluation
    eval_examples: int = 0  # test images to attack, of each type and severity, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    QUICK: ClassVar[dict] = dict(dataset="digits", generate=True, severities="1,3,5", eval_steps=10, eval_examples=60)


# The 15 types of the benchmark, in its order, and the 4 extra ones.
BENCHMARK = [
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost",
    "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]

ARCHIVES = {  # name, Zenodo record, MD5
    "cifar10": ("CIFAR-10-C", 2535967, "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100": ("CIFAR-100-C", 3555552, "11f0ed0f1191edbf9fa23466ae6021d3"),
}

# Kucer et al., section 4.4: (mean TA, mean RA) over corruptions of networks trained with (norm, eps, variant).
PAPER = {
    ("l2", 1.0, "T0"): (78.36, 35.83), ("l2", 1.0, "T1"): (80.23, None), ("l2", 1.0, "T2"): (79.15, None),
    ("l2", 1.0, "T3"): (76.52, 38.33), ("linf", 8 / 255, "T0"): (None, 32.20), ("linf", 8 / 255, "T3"): (None, 36.22),
}  # fmt: skip
PAPER_RUN = dict(
    dataset="cifar10", image_size=32, arch="resnet18", width=1.0, stem="cifar", val_fraction=0.15, epochs=100,
    lr=0.1, attack_steps=10, step_size=0.0, pretrain="none", init="", select="clean", quick=False, stage="train", task="rotation",
)  # fmt: skip


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass
class Corrupted:
    """A corrupted test set, of which nothing has been read yet."""

    types: list[str]  # the corruptions it has
    classes: int
    probe: Callable[[str, int], str]  # (type, severity) -> what identifies the cell; raises UserError if it cannot be read
    cell: Callable[[str, int], Images]  # (type, severity) -> its images


def open_arrays(folder: Path, classes: int, device: torch.device) -> Corrupted:
    """CIFAR-10-C's format: <corruption>.npy uint8 (5 n, H, W, 3), rows (s - 1) n ... s n - 1 have severity s; labels.npy (5 n,).

    Files are memory-mapped: only the cell that is asked for is read. Raises UserError for a missing or ill-formed file.
    """

    def load(name: str) -> np.ndarray:
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
        except FileNotFoundError:
            raise UserError(f"{folder} has no {name}.npy; get the whole set with --download, or make one with --generate.") from None
        except PermissionError:
            raise UserError(f"no permission to read {folder / name}.npy.") from None
        except (OSError, ValueError, EOFError):
            pass
        raise UserError(f"{folder / name}.npy is damaged or not an array; remove it and use --download.")

    labels = load("labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % 5 or not len(labels):
        raise UserError(f"{folder}/labels.npy holds {labels.dtype} {labels.shape}; expected integers for 5 severities of equal size.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{folder}/labels.npy has labels from {labels.min()} to {labels.max()}; expected 0 to {classes - 1}: is it the right --dataset?")
    n = len(labels) // 5
    if (labels.reshape(5, n) != labels[:n]).any():
        raise UserError(f"{folder}/labels.npy: its five parts differ, so they are not the same images in five severities.")
    names = [name for name in BENCHMARK + EXTRA if (folder / f"{name}.npy").exists()]

    def open_type(corruption: str) -> np.ndarray:
        pixels = load(corruption)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] != pixels.shape[2]:
            raise UserError(f"{folder}/{corruption}.npy holds {pixels.dtype} {pixels.shape}; expected uint8 (rows, size, size, 3).")
        if len(pixels) != len(labels):
            raise UserError(f"{folder}/{corruption}.npy has {len(pixels)} rows, labels.npy {len(labels)}; get the set again.")
        return pixels

    def probe(corruption: str, severity: int) -> str:
        first = open_type(corruption)[(severity - 1) * n :][:300]
        return hashlib.md5(first.tobytes() + labels.tobytes(), usedforsecurity=False).hexdigest()

    def cell(corruption: str, severity: int) -> Images:
        pixels = open_type(corruption)
        rows = slice((severity - 1) * n, severity * n)
        block = torch.from_numpy(np.array(pixels[rows])).to(device).permute(0, 3, 1, 2)  # (n, 3, H, W)
        return _images(block, torch.from_numpy(labels[rows].astype(np.int64)))

    return Corrupted(names, classes, probe, cell)


def _images(pixels: Tensor, labels: Tensor) -> Images:
    return Images(pixels, labels, [], torch.arange(len(labels)))


def open_folders(root: Path, size: int) -> Corrupted:
    """ImageNet-C's format: root/<corruption>/<severity>/<class>/*.jpg|png, streamed. Raises UserError if there is none."""
    names = {p.parent.name for p in root.glob("*/[1-5]") if p.is_dir()}
    known = [name for name in BENCHMARK + EXTRA if name in names]
    if not names:
        raise UserError(f"no corruptions in {root}: expected <corruption>/<severity>/<class>/*.jpg|png there; see --data-dir.")

    def classes_of(folder: Path) -> list[str]:
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    all_classes = max((classes_of(p) for name in names for p in root.glob(f"{name}/[1-5]")), key=len)
    if not all_classes:
        raise UserError(f"{root}: its <corruption>/<severity>/ hold no class folders; expected <corruption>/<severity>/<class>/*.jpg|png.")

    def probe(corruption: str, severity: int) -> str:
        # ImageFolder numbers the classes it finds: one that is missing would shift the labels of all after it.
        if (found := classes_of(root / corruption / str(severity))) != all_classes:
            odd = min(set(found) ^ set(all_classes))
            raise UserError(f"{root / corruption / str(severity)} has {len(found)} class folders, others {len(all_classes)} (such as '{odd}').")
        first = sorted((root / corruption / str(severity) / found[0]).iterdir())[:300]
        return " ".join([*found, *(f"{p.name}:{p.stat().st_size}" for p in first)])

    def cell(corruption: str, severity: int) -> Images:
        return open_folder(root / corruption / str(severity), size)

    return Corrupted(known + sorted(names - set(known)), len(all_classes), probe, cell)


def download(dataset: str, root: Path, mirror: str = "") -> None:
    """Fetch the official archive into `root`, check its MD5 and unpack it; what an interrupted call has fetched is kept and
    continued. Raises UserError if it cannot be had or is not the official one."""
    name, record, md5 = ARCHIVES[dataset]
    wanted = {f"{c}.npy" for c in [*BENCHMARK, *EXTRA, "labels"]}
    if any(all((folder / file).exists() for file in wanted) for folder in (root, root / name)):
        return
    archive = root / f"{name}.tar"
    url = f"{mirror.rstrip('/')}/{name}.tar" if mirror else f"https://zenodo.org/records/{record}/files/{name}.tar?download=1"
    root.mkdir(parents=True, exist_ok=True)
    if fetched := not archive.exists():
        fetch(url, archive)
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    if digest.hexdigest() != md5:
        if not fetched:
            raise UserError(f"{archive}, which was there already, is not the official one (MD5 {digest.hexdigest()}, not {md5}): move it away.")
        archive.unlink()
        raise UserError(f"{url} is not the official {name}.tar (MD5 {digest.hexdigest()}, not {md5}); it was removed, try again.")
    (root / name).mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        # Files of these names only, wherever in the archive they are, go to one folder: nothing can be written elsewhere.
        members = {Path(m.name).name: m for m in tar if m.isfile() and Path(m.name).name in wanted}
        for file in sorted(members, key=lambda file: file == "labels.npy"):  # labels last: their presence says it is complete
            write_atomically(root / name / file, lambda f: shutil.copyfileobj(tar.extractfile(members[file]), f))
    archive.unlink()


def fetch(url: str, target: Path) -> None:
    """Download to `target` through `target`.part, which is continued if it is there. Raises UserError when it breaks off."""
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0  # 200: this host starts again from the beginning
            total = have + int(answer.headers.get("Content-Length", 0))
            bar = progress_bar(total, target.name, unit="B")
            with open(part, "ab" if have else "wb") as f:
                while block := answer.read(2**20):
                    f.write(block)
                    have += len(block)
                    if bar is not None:
                        bar.update(len(block))
        if have < total:
            raise http.client.IncompleteRead(b"", total - have)
    except (OSError, ValueError, http.client.HTTPException) as e:  # ValueError: not a URL
        if not (isinstance(e, urllib.error.HTTPError) and e.code == 416):  # 416: nothing is left to fetch
            raise UserError(
                f"could not fetch {url} ({' '.join(str(e).split()) or type(e).__name__}); {have / 2**20:.1f} MB are kept in {part}: "
                "run again to go on, name another host with --data-mirror, or use --generate."
            ) from None
    os.replace(part, target)


# ---- generating: definitions and constants of make_cifar_c.py (Hendrycks and Dietterich 2019), severities 1 to 5 -----
# Each takes x float (B, 3, H, W) in [0, 1] on the CPU, a severity s in 0 ... 4 and a generator of random numbers.


def gaussian_noise(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Add normal noise."""
    return x + [0.04, 0.06, 0.08, 0.09, 0.10][s] * torch.randn(x.shape, generator=g)


def shot_noise(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Count photons: Poisson noise."""
    photons = [500, 250, 100, 75, 50][s]
    return torch.poisson(x * photons, generator=g) / photons


def impulse_noise(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Salt and pepper on single values."""
    hit = torch.rand(x.shape, generator=g) < [0.01, 0.02, 0.03, 0.05, 0.07][s]
    return torch.where(hit, (torch.rand(x.shape, generator=g) < 0.5).float(), x)  # salt and pepper in equal parts


def speckle_noise(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Multiply by normal noise around 1."""
    return x + x * [0.06, 0.1, 0.12, 0.16, 0.2][s] * torch.randn(x.shape, generator=g)


def filter2d(x: Tensor, kernel: Tensor, border: str) -> Tensor:
    """Correlate every channel of x (B, C, H, W) with kernel (h, w), h and w odd.

    Beyond the border: 'replicate' a a|a b c, 'reflect' c b|a b c, 'symmetric' b a|a b c.
    """
    h, w = kernel.shape
    b, c, *size = x.shape
    if border == "symmetric":
        rows, cols = (torch.arange(-(k // 2), n + k // 2) for k, n in zip((h, w), size, strict=True))
        rows, cols = (torch.where(i < 0, -1 - i, torch.where(i < n, i, 2 * n - 1 - i)) for i, n in ((rows, size[0]), (cols, size[1])))
        x = x[:, :, rows][:, :, :, cols]
    else:
        x = F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode=border)
    x = x.flatten(0, 1)[:, None]  # (B * C, 1, ., .): channels as a batch
    return F.conv2d(x, kernel[None, None].to(x)).view(b, c, *size)


def smooth(x: Tensor, sigma: float, border: str = "replicate", truncate: float = 4.0) -> Tensor:
    """Gaussian filter with a kernel that ends after truncate * sigma pixels."""
    radius = int(truncate * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    line = line / line.sum()
    return filter2d(filter2d(x, line[None], border), line[:, None], border)


def gaussian_blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Smooth with a Gaussian."""
    return smooth(x, [0.4, 0.6, 0.7, 0.8, 1][s])


def defocus_blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Smooth with a disk with soft edges."""
    radius, alias = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)][s]
    line = torch.arange(-3, 4)  # 7 x 7 holds the largest radius and the soft edge
    disk = (line[:, None] ** 2 + line**2 <= radius**2).float()
    soft = torch.exp(-0.5 * (torch.arange(-1, 2) / alias) ** 2)
    soft = soft[:, None] * soft / soft.sum() ** 2  # 3 x 3
    return filter2d(x, F.conv2d((disk / disk.sum())[None, None], soft[None, None], padding=1)[0, 0], "reflect")


def glass_blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Smooth, exchange neighbouring pixels, smooth again."""
    sigma, shift, times = [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)][s]
    x = (smooth(x, sigma) * 255).floor() / 255
    b, _, h, w = x.shape
    image = torch.arange(b)[:, None, None]
    for _ in range(times):
        # Each pixel becomes a copy of itself or of a neighbour above or to the left (make_cifar_c.py means to swap the two, but
        # its "swap" copies; it goes from the last pixel to the first, so that it always copies one not yet changed).
        dx, dy = torch.randint(-shift, shift, (2, b, h, w), generator=g)  # each (B, H, W), -shift ... shift - 1
        inside = torch.zeros(h, w, dtype=torch.bool)
        inside[shift + 1 : h - shift + 1, shift + 1 : w - shift + 1] = True
        rows = torch.arange(h)[:, None] + dy * inside  # (B, H, W)
        cols = torch.arange(w) + dx * inside
        x = x.permute(0, 2, 3, 1)[image, rows, cols].permute(0, 3, 1, 2)
    return smooth(x, sigma)


def motion_blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """ImageMagick's: the mean of 2 * radius + 1 pixels in one direction, weighted by half a Gaussian."""
    radius, sigma = [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)][s]
    b, _, h, w = x.shape
    angle = (torch.rand(b, generator=g) * 90 - 45).deg2rad()
    weight = torch.exp(-0.5 * (torch.arange(2 * radius + 1) / sigma) ** 2)
    image, pixels, out = torch.arange(b)[:, None, None], x.permute(0, 2, 3, 1), 0
    for i, share in enumerate(weight / weight.sum()):
        rows = (torch.arange(h) + (i * angle.sin() - 0.5).ceil().long()[:, None]).clamp(0, h - 1)  # (B, H)
        cols = (torch.arange(w) + (i * angle.cos() - 0.5).ceil().long()[:, None]).clamp(0, w - 1)
        out = out + share * pixels[image, rows[:, :, None], cols[:, None, :]]
    return out.permute(0, 3, 1, 2)


def zoom_blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """The mean of the image and of enlarged versions of its middle."""
    factors = np.arange(1, [1.06, 1.11, 1.16, 1.21, 1.26][s], 0.01)
    h, total = x.shape[-1], x
    for factor in factors.tolist():
        crop = math.ceil(h / factor)
        top = (h - crop) // 2
        part = x[:, :, top : top + crop, top : top + crop]
        part = F.interpolate(part, size=round(crop * factor), mode="bilinear", align_corners=True)
        trim = (part.shape[-1] - h) // 2
        total = total + part[:, :, trim : trim + h, trim : trim + h]
    return total / (len(factors) + 1)


def fog(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Add a random cloud, then restore the range."""
    thickness, decay = [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)][s]
    b, _, h, w = x.shape
    brightest = x.amax((1, 2, 3), keepdim=True)
    cells = [2**i for i in range(math.ceil(math.log2(max(h, w)))) for _ in range(3)]
    noise = [2 * torch.rand(b, n, n, generator=g) - 1 for n in cells]
    cloud = plasma(noise, decay**2)[:, None, :h, :w]  # squared, as in make_cifar_c.py
    return (x + thickness * cloud) * brightest / (brightest + thickness)


def brightness(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Raise V of HSV."""
    value = x.amax(1, keepdim=True)  # V of HSV; hue and saturation stay, so R, G and B keep their ratios
    brighter = (value + [0.05, 0.1, 0.15, 0.2, 0.3][s]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-9), brighter)


def saturate(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Scale and shift S of HSV."""
    scale, shift = [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)][s]
    value = x.amax(1, keepdim=True)
    depth = value - x.amin(1, keepdim=True)  # V * S of HSV
    saturation = (depth / value.clamp(min=1e-9) * scale + shift).clamp(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)  # grey has hue 0, which is red
    return value - value * saturation * torch.where(depth > 0, (value - x) / depth.clamp(min=1e-9), red)


def contrast(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Move every channel towards its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * [0.75, 0.5, 0.4, 0.3, 0.15][s] + mean


def elastic_transform(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """A random affine map, then a smooth random shift of every pixel. The constants are 32 times these, in pixels."""
    alpha, sigma, affine = [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)][s]
    b, _, h, w = x.shape
    middle, third = h // 2, h // 3
    points = torch.tensor([[middle + third, middle + third], [middle + third, middle - third], [middle - third, middle - third]]).float()
    moved = points + (torch.rand(b, 3, 2, generator=g) * 2 - 1) * 32 * affine  # three points (x, y) and where they go
    ones = torch.ones(b, 3, 1)
    to_source = torch.linalg.solve(torch.cat([moved, ones], 2), points.expand(b, 3, 2))  # (B, 3, 2): from (x, y, 1) to the source
    ys, xs = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    where = torch.stack([xs, ys, torch.ones_like(xs)], -1).view(1, h * w, 3) @ to_source
    x = sample(x, where.view(b, h, w, 2))
    shift = torch.zeros(b, 2, h, w)
    if alpha:
        shift = smooth(torch.rand(b, 2, h, w, generator=g) * 2 - 1, 32 * sigma, "symmetric", truncate=3) * 32 * alpha
    return sample(x, torch.stack([xs, ys], -1) + shift.permute(0, 2, 3, 1), "symmetric")


def sample(x: Tensor, where: Tensor, border: str = "reflect") -> Tensor:
    """Bilinear interpolation of x (B, C, H, W) at `where` (B, H, W, 2), in pixels, (x, y); borders as in `filter2d`."""
    size = torch.tensor([x.shape[3], x.shape[2]])
    where = 2 * where / (size - 1) - 1 if border == "reflect" else (2 * where + 1) / size - 1
    return F.grid_sample(x, where, padding_mode="reflection", align_corners=border == "reflect")


def through_pillow(x: Tensor, change: Callable) -> Tensor:
    """change(image) -> image for each image of x as a Pillow image."""
    from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

    return torch.stack([pil_to_tensor(change(to_pil_image(image))) for image in (x * 255).round().byte()]) / 255


def pixelate(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Make smaller and larger again by box filters."""
    from PIL import Image

    size = x.shape[-1]
    small = int(size * [0.95, 0.9, 0.85, 0.75, 0.65][s])
    return through_pillow(x, lambda im: im.resize((small, small), Image.BOX).resize((size, size), Image.BOX))


def jpeg_compression(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Compress as JPEG."""
    from PIL import Image

    def compress(im: Image.Image) -> Image.Image:
        file = io.BytesIO()
        im.save(file, "JPEG", quality=[80, 65, 58, 50, 40][s])
        return Image.open(file).convert("RGB")

    return through_pillow(x, compress)


GENERATORS = [
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, fog, brightness, contrast,
    elastic_transform, pixelate, jpeg_compression, speckle_noise, gaussian_blur, saturate,
]  # fmt: skip  # not frost, which needs photographs, snow and spatter


def corrupt(pixels: Tensor, corruption: str, severity: int, seed: int = 0) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8: the corruption of that name in severity 1 ... 5. The same seed, the same pixels."""
    function = {f.__name__: f for f in GENERATORS}[corruption]
    number_of_cell = 10 * (BENCHMARK + EXTRA).index(corruption) + severity
    g = torch.Generator().manual_seed(seed * 1_000 + number_of_cell)
    parts = [function(part.cpu().float() / 255, severity - 1, g) for part in pixels.split(1000)]
    # Rounded down, as there; the 1e-3 keeps unchanged values from falling to the one below.
    return torch.cat([(part.clamp(0, 1) * 255 + 1e-3).byte() for part in parts])


def generated(test_set: Images, device: torch.device, seed: int) -> Corrupted:
    """The corruptions of GENERATORS, made from `test_set` when asked for. Raises UserError if it is not held in memory."""
    if not isinstance(test_set.pixels, Tensor):
        raise UserError("--generate needs a test set that fits in memory; this folder is too large: take a part of it.")
    pixels, labels = test_set.pixels[test_set.index.to(test_set.pixels.device)], test_set.labels[test_set.index]
    if pixels.shape[-1] < 32:
        raise UserError("--generate needs --image-size 32 or more: the corruptions' constants are in pixels.")
    names = [name for name in BENCHMARK + EXTRA if name in [f.__name__ for f in GENERATORS]]

    def probe(corruption: str, severity: int) -> str:
        return hashlib.md5(pixels[:300].cpu().numpy().tobytes(), usedforsecurity=False).hexdigest()

    def cell(corruption: str, severity: int) -> Images:
        return _images(corrupt(pixels, corruption, severity, seed).to(device), labels)

    return Corrupted(names, len(test_set.classes), probe, cell)


# ---- evaluating ----------------------------------------------------------------------------------------------------


def load_networks(args: Args, classes: int, device: torch.device) -> dict[str, tuple[nn.Module, dict]]:
    """{name: (network in eval mode, the arguments it was trained with and its norm and radius)} of the checkpoints.
    Raises UserError for one that cannot be read, knows another number of classes, or was not trained to classify."""
    paths = [Path(p) for p in args.checkpoints]
    states = [load_checkpoint(p) for p in paths]
    variants = ["plain" if s.get("stage") == "plain" else s.get("args", {}).get("variant", "") for s in states]
    for names in ([p.resolve().parent.name for p in paths], variants, [str(p) for p in paths]):  # the first that tells them apart
        if len(set(names)) == len(paths) and all(names):
            break
    else:
        raise UserError("the same checkpoint is named twice.")
    networks = {}
    for name, path, state in zip(names, paths, states, strict=True):
        check_classifier(state, path)
        with reading(path):  # the arguments are as little to be trusted as the rest
            trained = dict(state.get("args", {}))
            int(trained.get("image_size", 0)), float(trained.get("eps", 0))
        has = state["network"]["heads"]["class"]
        if has != classes:
            raise UserError(f"{path} knows {has} classes, the data have {classes}: is it the right --dataset?")
        if args.dataset == "folder" and trained.get("image_size", 0) > args.image_size:  # files would be shrunk first, then enlarged
            raise UserError(f"{path} was trained on images of {trained['image_size']} pixels: give --image-size {trained['image_size']}.")
        norm = trained.get("norm") if args.norm == "own" else args.norm
        eps = args.eps or trained.get("eps")
        if args.eval_attack != "none" and (norm not in ("linf", "l2") or not isinstance(eps, float | int) or not 0 <= eps < math.inf):
            raise UserError(f"{path} does not say with which norm and radius it was trained; give --norm and --eps, or --eval-attack none.")
        if args.eval_attack != "none" and args.norm not in ("own", trained.get("norm")) and not args.eps:
            raise UserError(f"{path} was trained in another norm than --norm {args.norm}: give --eps, too.")
        model = place_model(rebuild(state, path), device, "auto" if args.eval_amp else "off").eval()
        task = "rotation" if "rotation" in state["network"]["heads"] else ""
        networks[name] = model, trained | {"attack_norm": norm, "attack_eps": eps, "stage": state.get("stage"), "task": task}
    return networks


def evaluate_cell(model: nn.Module, trained: dict, images: Images, args: Args, run: Run, label: str) -> list[dict]:
    """Rows of results.json: clean accuracy on all images and, unless --eval-attack is none, robust accuracy on --eval-examples of them."""
    size = trained.get("image_size", 0)

    def stream(some: Images):
        for x, y in with_progress(batches(some, args.batch_size, run.device, workers=args.workers), len(some), label):
            if size and x.shape[-1] != size:  # to what the network was trained on
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
            yield x, y

    rows = [{"attack": "none", "norm": trained["attack_norm"], "eps": 0, "examples": len(images)}]
    with full_precision(model, not args.eval_amp):
        rows[0]["accuracy"] = round(robust_accuracy(model, stream(images)), 2)
        if args.eval_attack != "none":
            if 0 < args.eval_examples < len(images):
                images = draw(images, args.eval_examples, seed=0)
            torch.manual_seed(args.seed + world()[0])
            norm, eps = trained["attack_norm"], trained["attack_eps"]
            if args.eval_attack == "pgd20":
                name = f"pgd-{args.eval_steps}"
                attack = partial(pgd, norm=norm, eps=eps, steps=args.eval_steps)
                accuracy = robust_accuracy(model, stream(images), lambda x, y: attack(lambda z: ce_per_image(model(z), y), x))
            else:
                name, attacks = args.eval_attack, suite_attacks(args.eval_attack, norm, eps, args.seed)
                accuracy = suite_accuracy(model, stream(images), attacks, batch_size=max(1, args.batch_size // world()[1]))["square"]
            rows.append({"attack": name, "norm": norm, "eps": eps, "examples": len(images), "accuracy": round(accuracy, 2)})
    return rows


def summarise(rows: list[dict], networks: dict, as_paper: bool) -> list[dict]:
    """Rows with the plain means over types and severities: of the 15 benchmark types and of all, as far as they are there.

    as_paper: the data and the attack are the paper's; then its means stand beside those of networks trained as its own.
    """
    means = []
    for name, (_, trained) in networks.items():
        for clean in (True, False):
            mine = [r for r in rows if r["name"] == name and (r["attack"] == "none") == clean]
            found = [c for c in BENCHMARK + EXTRA if any(r["corruption"] == c for r in mine)]
            sets = {"benchmark": [c for c in found if c in BENCHMARK], "all": sorted({r["corruption"] for r in mine})}
            for which, types in sets.items():
                cells = [r for r in mine if r["corruption"] in types]
                if not cells or (which == "all" and sets["all"] == sorted(sets["benchmark"])):
                    continue
                of = " of 15" if which == "benchmark" and len(types) < 15 else ""
                is_paper = as_paper and len(types) in (15, 19) and all(trained.get(k) == v for k, v in PAPER_RUN.items())
                is_paper = is_paper and trained.get("lr_step", 0) in (0, 40) and (trained["variant"] == "T0" or trained["lambda1"] > 0)
                is_paper = is_paper and (trained["variant"] != "T3" or trained["lambda2"] > 0)  # then it is T2
                own = trained["attack_eps"] == trained.get("eps") and trained["attack_norm"] == trained.get("norm")
                known = PAPER.get((trained.get("norm"), trained.get("eps"), trained.get("variant")), (None, None))
                means.append({
                    **cells[0], "corruption": f"mean of {len(types)}{of}", "severity": "all",
                    "accuracy": round(sum(r["accuracy"] for r in cells) / len(cells), 2),
                    "paper": known[0 if clean else 1] if is_paper and (clean or own) else None,
                })  # fmt: skip
    return means


def show(results: dict, folder: Path) -> None:
    """Print accuracy per corruption (mean over severities), per severity (mean over types) and the means."""
    args, rows = results["args"], results["rows"]
    columns = list(dict.fromkeys((r["name"], r["attack"]) for r in rows))
    cells = [r for r in rows if r["severity"] != "all"]

    def mean(name: str, attack: str, **where: object) -> str:
        found = [r["accuracy"] for r in cells if (r["name"], r["attack"]) == (name, attack) and where.items() <= r.items()]
        return f"{sum(found) / len(found):.2f}" if found else ""

    kinds = list(dict.fromkeys(r["corruption"] for r in cells))
    table = [[kind] + [mean(*column, corruption=kind) for column in columns] for kind in kinds]
    for s in sorted({r["severity"] for r in cells}):
        table.append([f"severity {s}"] + [mean(*column, severity=s) for column in columns])
    for kind in dict.fromkeys(r["corruption"] for r in rows if r["severity"] == "all"):
        summary = {(r["name"], r["attack"]): r for r in rows if r["corruption"] == kind}
        table.append([kind] + [f"{summary[c]['accuracy']:.2f}" for c in columns])
        if any(summary[c]["paper"] is not None for c in columns):
            table.append(["  the paper"] + ["" if summary[c]["paper"] is None else f"{summary[c]['paper']:.2f}" for c in columns])
        table.append(["  error (100 - mean)"] + [f"{100 - summary[c]['accuracy']:.2f}" for c in columns])
    made = "corruptions GENERATED here, not the official ones" if args["generate"] else f"corruptions read from {args['data_dir']}"
    attacked = {r["name"]: r for r in rows if r["attack"] != "none"}
    print(f"\n{args['dataset']}, {made}; accuracy (%) on {cells[0]['examples']:,} images per type and severity.")
    for name, r in attacked.items():
        print(f"{name}: {r['attack']} in the {r['norm']} ball of radius {eps_name(r['eps'])} around {r['examples']:,} corrupted images.")
    print()
    print_table(["corruption"] + [f"{name} {'clean' if attack == 'none' else attack}" for name, attack in columns], table)
    print(f"\nresults.json is in {folder}", flush=True)


# ---- the run -------------------------------------------------------------------------------------------------------


def train_digits(run: Run) -> tuple[str, str]:
    """For --quick: a plainly and an adversarially trained network, by rotation_at.py in a process of its own."""
    folder = run.folder / "digits"
    if world()[0] == 0 and not (folder / "results.json").exists():
        run.say("training two small networks on digits (rotation_at.py --quick --variant T0) ...")
        script = Path(__file__).resolve().parent / "rotation_at.py"
        command = [sys.executable, str(script), "--quick", "--variant", "T0", "--resume", "--out", str(folder), "--device", run.args.device]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"training on digits failed ({done.stderr.strip()[-300:]}); give a checkpoint instead.")
    if world()[1] > 1:
        dist.barrier()
    return str(folder / "plain.pt"), str(folder / "best.pt")


def main(args: Args) -> dict:
    """Evaluate the checkpoints on every cell, print the table; returns what results.json holds."""
    check(args)
    network = Path(args.checkpoints[0]).resolve().parent.name if args.checkpoints else "digits"
    run = start_run(args, name=f"eval_cifar10c{'-quick' if args.quick else ''}-{network}")
    results = run.finished()
    if results:
        same_checkpoints(run, args)
    results = results or evaluate_all(run, args)
    if world()[0] == 0:
        show(results, run.folder)
        picture(results, run)
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    if not args.checkpoints and not args.quick:
        raise UserError("name at least one checkpoint, such as runs/.../best.pt, or try --quick.")
    if not args.checkpoints and (args.dataset != "digits" or not Path(__file__).with_name("rotation_at.py").exists()):
        raise UserError(
            "--quick without a checkpoint trains two by rotation_at.py, which must lie beside this file, on digits; "
            "else name a checkpoint."
        )
    if not words(args.severities) or not set(words(args.severities)) <= set("12345"):
        raise UserError(f"--severities {args.severities}: give numbers from 1 to 5, such as 1,3,5.")


def md5(path: str) -> str:
    """MD5 of a file, in hex."""
    return hashlib.md5(Path(path).read_bytes(), usedforsecurity=False).hexdigest()


def same_checkpoints(run: Run, args: Args) -> None:
    """Raise UserError if a checkpoint is no longer the one that the finished run has judged (one that is gone is no matter)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        inputs = json.loads((run.folder / "inputs.json").read_text())
        for path in args.checkpoints:
            if Path(path).exists() and inputs.get(path, md5(path)) != md5(path):
                raise UserError(f"--resume: {path} has changed since {run.folder} was finished: choose another --out.")


def evaluate_all(run: Run, args: Args) -> dict:
    """Every cell for every network, written down as it is done."""
    began, severities = time.perf_counter(), [int(s) for s in dict.fromkeys(words(args.severities))]
    data = open_data(args, run.device)
    chosen = list(dict.fromkeys(words(args.corruptions))) or data.types
    if not args.corruptions and not args.generate and args.dataset != "folder":
        chosen = BENCHMARK + [c for c in EXTRA if c in data.types]  # a missing benchmark type is an error, not a smaller mean
    if unknown := [c for c in chosen if c not in data.types]:
        raise UserError(f"there is no '{unknown[0]}' here ({', '.join(data.types) or 'nothing at all'}); see --corruptions and --download.")
    inputs = {f"{c} {s}": data.probe(c, s) for c in chosen for s in severities}  # can all be read?
    if args.checkpoints:
        load_networks(args, data.classes, torch.device("cpu"))  # these too? Ask before the work begins
    run.begin()
    if not args.checkpoints:
        args.checkpoints = train_digits(run)
    networks = load_networks(args, data.classes, run.device)
    for name, (_, trained) in networks.items():
        if trained.get("dataset") not in (args.dataset, "folder"):
            run.say(f"note: {name} was trained on {trained.get('dataset', 'unknown data')}, not on {args.dataset}.")

    # Of a run that is resumed, cells already done count if checkpoints and data are still the same.
    inputs |= {p: md5(p) for p in args.checkpoints}
    rows = []
    try:
        if (run.folder / "cells.jsonl").exists():
            if json.loads((run.folder / "inputs.json").read_text()) != inputs:
                raise UserError(f"--resume: checkpoints or data have changed since {run.folder} began: choose another --out.")
            rows = [json.loads(line) for line in (run.folder / "cells.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        raise UserError(f"{run.folder} has a damaged inputs.json or cells.jsonl: choose another --out.") from None
    run.write("inputs.json", json.dumps(inputs, indent=1))
    finished = {(r["name"], r["corruption"], r["severity"]) for r in rows}
    for corruption in chosen:
        for severity in severities:
            todo = [name for name in networks if (name, corruption, severity) not in finished]
            images = data.cell(corruption, severity) if todo else None
            for name in todo:
                model, trained = networks[name]
                label = f"{corruption} {severity}, {name}"
                rows += [
                    {"name": name} | row | {"paper": None, "corruption": corruption, "severity": severity, "generated": args.generate}
                    for row in evaluate_cell(model, trained, images, args, run, label)
                ]
            run.write("cells.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        run.say(f"{corruption}: " + ", ".join(
            f"{name} {np.mean([r['accuracy'] for r in rows if (r['name'], r['corruption'], r['attack']) == (name, corruption, 'none')]):.1f}"
            for name in networks
        ))  # fmt: skip
    as_paper = args.dataset == "cifar10" and not args.generate and set(severities) == {1, 2, 3, 4, 5}
    as_paper = as_paper and all(row["examples"] == 10_000 for row in rows)
    as_paper = as_paper and args.eval_attack == "pgd20" and args.eval_steps == 20 and not args.eval_examples and not args.eval_amp
    return write_results(run, rows + summarise(rows, networks, as_paper), began)


def open_data(args: Args, device: torch.device) -> Corrupted:
    """The reader that the flags ask for. Raises UserError if the data are not there."""
    root = Path(args.data_dir)
    if args.generate:
        _, test_set = load_data(
            args.dataset, args.data_dir, device, image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers
        )
        return generated(test_set, device, args.seed)
    if args.dataset in ARCHIVES:
        name = ARCHIVES[args.dataset][0]
        if args.download and world()[0] == 0:
            download(args.dataset, root, args.data_mirror)
        if world()[1] > 1:
            dist.barrier()
        folder = root if any((root / f"{c}.npy").exists() for c in ["labels", *BENCHMARK, *EXTRA]) else root / name
        if not folder.is_dir():
            raise UserError(f"no {name} in {root}: name the folder that holds it with --data-dir, fetch it with --download, or make one with --generate.")
        return open_arrays(folder, {"cifar10": 10, "cifar100": 100}[args.dataset], device)
    if args.dataset == "folder":
        return open_folders(root, args.image_size)
    raise UserError(f"there is no corrupted version of {args.dataset} to read: add --generate.")


def picture(results: dict, run: Run) -> None:
    """The two panels of Figure 4, by report.py if it and matplotlib are there."""
    path = run.folder / "corruptions.png"
    try:
        import report

        report.figure4([results], path)
    except (ImportError, UserError) as e:
        run.say(f"(no picture: {e})")
    else:
        run.say(f"the bars of Figure 4: {path}")


if __name__ == "__main__":
    cli(main, Args)
