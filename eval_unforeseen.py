"""Robustness against unforeseen attacks: ten attacks, most never used in training.

Kang, Sun, Hendrycks, Brown, Steinhardt, Testing Robustness Against Unforeseen Adversaries, 2019 (1908.08016).
Chen et al. (CVPR 2020) cite these attacks for their Figures 3 and 4.

Each attack changes an image by some parameters: a flow of pixels, the brightness of snowflakes, coefficients
of JPEG, ... Signed gradients move them within a box or ball of their own, which has six radii.

    UAR = 100 * sum of the six accuracies / sum of the six ATA

ATA: accuracy of the best network that was trained against the same attack (Kang et al.).

    python eval_unforeseen.py --quick                             # two small networks trained on digits
    python eval_unforeseen.py runs/X/best.pt runs/Y/best.pt       # all ten attacks
    python eval_unforeseen.py runs/X/best.pt --unforeseen l1,elastic --eval-examples 1000
    torchrun --nproc-per-node=8 eval_unforeseen.py runs/X/best.pt

Definitions, constants and radii are those of Kang et al.'s code, from which this differs:
- Images misclassified without attack count as not robust and are not attacked (their code attacks all).
- Gabor noise updates its sparse parameters (their code: the others).
- Clouds are scaled for each image, not for a batch; their edges are the mean of the nearest neighbours.
- jpeg-l1 changes no coefficient by more than 1 (their bound differs).
- Snow keeps to its budget in the last step, too. l2 starts on the surface of the ball, not inside.
Radii are for 32 pixels (from 64 pixels on, for 224) and are not scaled to other sizes.
The rest: results/chen.md.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    Images, Network, Positive, Run, UserError, batches, ce_per_image, check_attack, check_classifier, cli,
    full_precision, grouped_bars, l2_norm, load_checkpoint, pgd, place_model, progress, train_digits,
    rebuild, robust_accuracy, start_run, text_table, world, write_atomically,
)  # fmt: skip


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ()  # classifiers to evaluate: best.pt, plain.pt, ... of any runs
    # run
    seed: int = 0  # seed of the attacks' random starts and of the target classes
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: a folder in runs/ named after the first checkpoint's
    resume: bool = False  # continue the run in its folder, with the same flags, or start it
    quick: bool = False  # a miniature on the bundled digits; trains two small networks if none is named
    # data
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # images and labels
    data_dir: str = "data"  # data folder, also for downloads; folder: it holds train/ and test/ or val/
    data_mirror: str = ""  # URL of a folder with the official archive, if the official host is slow
    image_size: Positive = 32  # side in pixels; other images are resized
    # evaluation
    unforeseen: str = "all"  # attacks, comma-separated, such as l1,elastic; all: the ten
    unforeseen_steps: Positive = 200  # steps of each attack (Kang et al.: 200)
    targeted: bool = True  # attack towards a random wrong class (Kang et al.); off: away from the right one
    batch_size: Positive = 500  # images per step over all GPUs
    eval_examples: int = 0  # random test images to evaluate on, the same in every run; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    QUICK: ClassVar[dict] = dict(dataset="digits", unforeseen_steps=20, eval_examples=60)


# ---- the attacks -------------------------------------------------------------------------------------

# {attack: (six radii calibrated for CIFAR-10, accuracy (%) of the best network trained against each (ATA),
# six radii for 224 pixels)}; fog, gabor and snow were calibrated for 224 pixels only. Units: linf, l2, l1,
# fog, gabor: 1/255; jpeg: half steps of quantisation; elastic: pixels; snow: 1 is full brightness.
UNFORESEEN = {
    "linf": ((1, 2, 4, 8, 16, 32), (91.0, 87.8, 81.6, 71.3, 46.5, 23.1), (1, 2, 4, 8, 16, 32)),
    "l2": (
        (40, 80, 160, 320, 640, 2560), (90.1, 86.4, 79.6, 67.3, 49.9, 17.3),
        (150, 300, 600, 1200, 2400, 4800),
    ),
    "l1": (
        (195, 390, 780, 1560, 6240, 24960), (92.2, 90.0, 83.2, 73.8, 47.4, 35.3),
        (9562.5, 19125, 76500, 153000, 306000, 612000),
    ),
    "jpeg-linf": (
        (0.03125, 0.0625, 0.125, 0.25, 0.5, 1), (89.7, 87.0, 83.1, 78.6, 69.7, 35.4),
        (0.0625, 0.125, 0.25, 0.5, 1, 2),
    ),
    "jpeg-l2": ((0.25, 0.5, 1, 2, 4, 8), (92.2, 91.0, 88.4, 85.8, 81.3, 72.0), (8, 16, 32, 64, 128, 256)),
    "jpeg-l1": (
        (2, 8, 64, 256, 512, 1024), (91.4, 88.1, 80.2, 68.9, 56.3, 37.7),
        (256, 1024, 4096, 16384, 65536, 131072),
    ),
    "elastic": ((0.125, 0.25, 0.5, 1, 2, 8), (87.4, 81.3, 72.1, 58.2, 45.4, 27.8), (0.25, 0.5, 2, 4, 8, 16)),
    "fog": ((128, 256, 512, 2048, 4096, 8192), None, (128, 256, 512, 2048, 4096, 8192)),
    "gabor": ((6.25, 12.5, 25, 400, 800, 1600), None, (6.25, 12.5, 25, 400, 800, 1600)),
    "snow": ((0.0625, 0.125, 0.25, 2, 4, 8), None, (0.0625, 0.125, 0.25, 2, 4, 8)),
}  # fmt: skip


def unforeseen(loss: Callable, x: Tensor, kind: str, eps: float, steps: int = 200) -> Tensor:
    """Images like x that raise `loss`, by the attack `kind` within its own ball of radius `eps`.

    loss: as for `pgd`. x: (B, 3, H, W) in [0, 1]. kind, eps: a key of UNFORESEEN and a radius in its unit
    (for linf 8, not 8/255). The step size is eps / sqrt(steps). Fog, gabor and snow, whose parameters lie in
    a fixed box and whose eps multiplies their effect, take sqrt(0.001 / steps), l1 and jpeg-l1 the steps of
    Frank-Wolfe. Returns images in [0, 1], detached. Raises ValueError for wrong arguments.
    """
    check_attack(x, 0, "linf")
    if kind not in UNFORESEEN or not eps > 0:
        raise ValueError(f"kind must be one of {', '.join(UNFORESEEN)} and eps positive, got {kind!r}, {eps}")
    x, step, small_step = x.detach(), eps / math.sqrt(steps), math.sqrt(0.001 / steps)
    if kind in ("linf", "l2"):
        return pgd(loss, x, eps=eps / 255, norm=kind, steps=steps, step_size=step / 255)
    # An attack: the start of its parameters p, the image that p makes, an update of p along the gradient
    if kind in ("fog", "gabor", "snow"):
        p, image, update = overlay_attack(x, kind, eps, small_step)
    elif kind.startswith("jpeg"):
        p, image, update = jpeg_attack(x, kind, eps / 2, step / 2)  # eps / 2 as in their code
    elif kind == "elastic":
        p, image = eps * uniform(x, 2, *x.shape[2:]), functools.partial(warp, x)
        update = in_box(-eps, eps, step)
    else:  # l1
        p = random_in_l1_ball(torch.zeros_like(x), eps / 255).clamp(-x, 1 - x)  # stays in the ball
        image = functools.partial(torch.add, x)
        update = functools.partial(frank_wolfe, low=-x, high=1 - x, radius=eps / 255)
    for i in range(steps):
        with torch.enable_grad():
            leaf = p.detach().requires_grad_()
            (grad,) = torch.autograd.grad(loss(image(leaf)).sum(), leaf)
        p = update(p.detach(), grad, i)
    return image(p).detach().clamp(0, 1)


def uniform(x: Tensor, *shape: int) -> Tensor:
    """Random numbers in [-1, 1], (B, *shape)."""
    return 2 * torch.rand(len(x), *shape, device=x.device) - 1


def in_box(low: float, high: float, step: float) -> Callable:
    """An update by the signs of the gradient that keeps to [low, high]."""
    return lambda p, grad, i: (p + step * grad.sign()).clamp(low, high)


def jpeg_attack(x: Tensor, kind: str, radius: float, step: float) -> tuple[Tensor, Callable, Callable]:
    """p: the changes of JPEG's coefficients, none by more than 1."""
    coefficients = to_jpeg(x)
    bound = torch.ones_like(coefficients)

    def image(p: Tensor) -> Tensor:
        return from_jpeg(coefficients + p, *x.shape[2:]).clamp(0, 1)

    def update_l2(p: Tensor, grad: Tensor, i: int) -> Tensor:
        p = p + step * grad / (l2_norm(grad) + 1e-12)
        return (p * (radius / l2_norm(p).clamp(min=radius))).clamp(-bound, bound)

    if kind == "jpeg-linf":
        return radius * uniform(x, coefficients.shape[1]), image, in_box(-radius, radius, step)
    if kind == "jpeg-l1":
        start = random_in_l1_ball(torch.zeros_like(coefficients), radius)
        return start, image, functools.partial(frank_wolfe, low=-bound, high=bound, radius=radius)
    start = torch.randn(coefficients.shape, device=x.device)
    length = torch.rand(len(x), 1, device=x.device) ** (1 / start.shape[1])  # uniform in the ball
    return radius * length * start / l2_norm(start), image, update_l2


def overlay_attack(x: Tensor, kind: str, eps: float, step: float) -> tuple[Tensor, Callable, Callable]:
    """p: random numbers of a cloud (fog), waves at some pixels (gabor), brightness of flakes (snow)."""
    h, w = x.shape[2:]
    if kind == "fog":
        levels = int(math.log2(max(h, w))) + 1  # the cloud is up to twice as wide as the image
        sizes = [2**i for i in range(levels) for _ in range(3)]
        brightest, trim = x.amax((2, 3), keepdim=True), (2**levels - h) // 2

        def in_fog(p: Tensor) -> Tensor:
            parts = (2 * p - 1).split([s * s for s in sizes], 1)
            noise = [part.view(-1, s, s) for part, s in zip(parts, sizes, strict=True)]
            cloud = plasma(noise, 2.0)[:, None, trim : trim + h, trim : trim + w]
            return ((x + eps / 255 * cloud) / (brightest + eps / 255)).clamp(0, 1)

        return 0.5 + 0.5 * uniform(x, sum(s * s for s in sizes)), in_fog, in_box(0, 1, step)
    if kind == "gabor":
        waves = gabor_kernels(len(x), x.device)
        sparse = torch.rand(len(x), h, w, device=x.device) < 1 / 14
        # Their code moves all parameters but these, and sets these to 0 in its first step.
        return (
            uniform(x, h, w) * sparse,
            lambda p: (x + eps / 255 * gabor_noise(p, waves)).clamp(0, 1),
            lambda p, grad, i: (p + step * grad.sign()).clamp(-1, 1) * sparse,
        )
    strokes, side = snow_kernels().to(x.device), math.ceil(max(h, w) / 4)  # snow

    def in_budget(p: Tensor, grad: Tensor, i: int) -> Tensor:  # at most 0.2 on average over 8 x 8 places
        p = (p + step * grad.sign()).clamp(1e-9, 1)
        mean = F.adaptive_avg_pool2d(p, max(1, side // 8))
        return p * F.interpolate(0.2 / mean.clamp(min=0.2), (side, side))

    start = torch.exp((uniform(x, 7, side, side) + 1) / -0.4)
    return start, lambda p: snow(x, p, strokes, eps), in_budget


def random_in_l1_ball(like: Tensor, radius: float) -> Tensor:
    """Uniform in the l1 ball (Barthe et al. 2005, theorem 1), shaped like `like` (B, ...)."""
    b, n = len(like), like[0].numel()
    rows = -torch.rand(b, n + 1, device=like.device).clamp(min=1e-9).log()
    signs = torch.randint(0, 2, (b, n), device=like.device) * 2 - 1
    return (radius * signs * rows[:, :-1] / rows.sum(1, keepdim=True)).view_as(like)


def frank_wolfe(p: Tensor, grad: Tensor, i: int, low: Tensor, high: Tensor, radius: float) -> Tensor:
    """Step i of Frank-Wolfe: towards the point of the l1 ball in [low, high] that maximises <grad, .>.

    That point spends the radius on the entries of largest gradient, each up to its bound. p is an average of
    such points, so it stays inside.
    """
    size, order = grad.flatten(1).abs().sort(1, descending=True)
    bound = torch.where(grad > 0, high, -low).flatten(1).gather(1, order)
    spent = bound.cumsum(1) - bound
    amount = torch.minimum((radius - spent).clamp(min=0), bound) * (size > 0)
    amount = torch.zeros_like(bound).scatter(1, order, amount)
    return p + (grad.sign() * amount.view_as(p) - p) / (i + 1)


# Quantisation of JPEG at quality 50 (ITU-T T.81, tables K.1 and K.2).
JPEG_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
JPEG_CHROMINANCE = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # else 99
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@functools.cache  # needed in every step of an attack; copying them to a GPU makes it wait
def jpeg_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(quantisation of Y, quantisation of Cb and Cr, discrete cosine transform), 8 x 8 each, and the 3 x 3
    matrices from RGB to Y, Cb, Cr and back."""
    chrominance = torch.full((8, 8), 99.0)
    chrominance[:4, :4] = torch.tensor(JPEG_CHROMINANCE)
    n = torch.arange(8)
    cosines = torch.cos((2 * n + 1) * n[:, None] * math.pi / 16) / 2  # row: frequency
    cosines[0] /= math.sqrt(2)
    to_ycbcr = torch.tensor(YCBCR)
    tables = torch.tensor(JPEG_LUMINANCE).float(), chrominance, cosines, to_ycbcr, torch.linalg.inv(to_ycbcr)
    return tuple(table.to(device) for table in tables)


def to_jpeg(x: Tensor) -> Tensor:
    """Images to coefficients (B, n), not rounded: 8 x 8 blocks of Y, then of Cb and Cr at half the size.
    Sides are padded to multiples of 16."""
    luminance, chrominance, dct, to_ycbcr, _ = jpeg_tables(x.device)
    h, w = x.shape[2:]
    x = F.pad(x, (0, -w % 16, 0, -h % 16), mode="replicate") * 255
    y, cb, cr = torch.einsum("dc,bchw->bdhw", to_ycbcr, x).split(1, 1)
    planes = (y - 128, luminance), (F.avg_pool2d(cb, 2), chrominance), (F.avg_pool2d(cr, 2), chrominance)
    parts = []
    for plane, table in planes:
        blocks = plane.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).squeeze(1)
        blocks = blocks.permute(0, 1, 3, 2, 4)  # (B, rows, cols, 8, 8)
        parts.append((dct @ blocks @ dct.T / table).flatten(1))
    return torch.cat(parts, 1)


def from_jpeg(coefficients: Tensor, h: int, w: int) -> Tensor:
    """Coefficients to images (B, 3, h, w), not clipped."""
    luminance, chrominance, dct, _, to_rgb = jpeg_tables(coefficients.device)
    rows, cols = -(-h // 16), -(-w // 16)
    planes = []
    parts = coefficients.split([256 * rows * cols, *[64 * rows * cols] * 2], 1)
    for part, table, k in zip(parts, (luminance, chrominance, chrominance), (2, 1, 1), strict=True):
        blocks = dct.T @ (part.view(-1, k * rows, k * cols, 8, 8) * table) @ dct
        plane = blocks.permute(0, 1, 3, 2, 4).reshape(-1, 8 * k * rows, 8 * k * cols)
        planes.append(plane if k == 2 else plane.repeat_interleave(2, 1).repeat_interleave(2, 2))
    planes[0] = planes[0] + 128
    return torch.einsum("cd,bdhw->bchw", to_rgb, torch.stack(planes, 1))[:, :, :h, :w] / 255


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Read pixel p of the result at p + flow, (B, 2, H, W) as (x, y) in pixels of a square image, after a
    Gaussian of 3 pixels at 224 has smoothed the flow."""
    h, w = x.shape[2:]
    radius, sigma = max(2, round(12 * h / 224)), 3 * h / 224
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2)
    kernel = (line[:, None] * line / line.sum() ** 2).expand(2, 1, -1, -1)
    flow = F.conv2d(F.pad(flow, (radius,) * 4, mode="reflect"), kernel, groups=2)
    ys, xs = (torch.linspace(-1, 1, n, device=x.device) for n in (h, w))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1) + flow.permute(0, 2, 3, 1) * 2 / h
    return F.grid_sample(x, grid, align_corners=True)


def plasma(noise: list[Tensor], decay: float) -> Tensor:
    """Clouds in [0, 1], (B, size, size), by the diamond-square algorithm on a torus.

    noise: for each halving of the grid, from one cell to `size` / 2 cells per side, three tensors
    (B, cells, cells) in [-1, 1]; every halving divides their weight by `decay`.
    """
    size, weight = 2 * noise[-1].shape[1], 1.0
    cloud, step = noise[0].new_zeros(len(noise[0]), size, size), size
    left = iter(noise)
    while step >= 2:
        half = step // 2

        def around(total: Tensor) -> Tensor:
            return total / 4 + weight * next(left)

        corners = cloud[:, ::step, ::step]
        across = corners + corners.roll(-1, 1)
        cloud[:, half::step, half::step] = around(across + across.roll(-1, 2))  # centres of the squares
        centres = cloud[:, half::step, half::step]
        # edges
        cloud[:, ::step, half::step] = around(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        cloud[:, half::step, ::step] = around(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, weight = half, weight / decay
    cloud = cloud - cloud.amin((1, 2), keepdim=True)
    return cloud / cloud.amax((1, 2), keepdim=True)


def gabor_kernels(b: int, device: torch.device) -> Tensor:
    """(B, 23, 23): for each image 1 to 10 waves of one length, evenly spread in angle, under a Gaussian."""
    width, length, turn, waves = torch.rand(4, b, 1, 1, device=device)
    line = torch.linspace(-0.5, 0.5, 23, device=device)
    y, x = line[:, None], line
    envelope = torch.exp(-0.5 * (x**2 + y**2) / (0.1 + 0.3 * width + 0.001) ** 2)
    total, sides = 0, (10 * waves).floor() + 1
    for i in range(10):
        angle = math.pi * (turn + i / sides)
        along = x * angle.cos() + y * angle.sin()
        total = total + (i < sides) * torch.cos(2 * math.pi * (3 + 2.75 * length) * along)
    return envelope * total


def gabor_noise(p: Tensor, kernels: Tensor) -> Tensor:
    """p (B, H, W) convolved with each image's own kernel, with even contrast, in [0, 1]: (B, 1, H, W)."""
    v = F.conv2d(p[None], kernels[:, None], padding=11, groups=len(p))[0]
    v = v - v.mean((1, 2), keepdim=True).detach()
    with torch.no_grad():
        size = v.abs()
        even = 1.001 / (0.001 + size / size.amax((1, 2), keepdim=True).clamp(min=1e-12))
    v = (v * even)[:, None]
    low, high = v.detach().amin((2, 3), keepdim=True), v.detach().amax((2, 3), keepdim=True)
    return (v - low) / (high - low).clamp(min=1e-12)


def snow_kernels() -> Tensor:
    """(7, 13, 13) on the CPU: blurred strokes through the centre, all towards the same side."""
    mirrored, *drawn = torch.rand(29).tolist()
    at = torch.arange(13) - 6
    kernels = []
    for i in range(7):
        down, across, thick, blur = drawn[4 * i : 4 * i + 4]
        down, across = 2 + int(5 * down), 2 + int(5 * across)  # where the stroke ends, from the centre
        slope, along, off = min(down, across) / max(down, across), at[None], at[:, None]
        width = (1 if thick < 0.6 else 3 if thick < 0.9 else 5) * math.sqrt(1 + slope) / 2
        inside = (along.abs() <= max(down, across)) * (off * along >= 0)
        stroke = (1 + width / 2 - (off - slope * along).abs()).clamp(0, 1) * inside
        stroke = stroke.T if down > across else stroke
        line = torch.exp(-0.5 * (torch.arange(-1, 2) / (0.41 + 0.19 * blur)) ** 2)
        line = line / line.sum()
        kernels.append(F.conv2d(stroke[None, None], (line[:, None] * line)[None, None], padding=1)[0, 0])
    return torch.stack(kernels).flip(2) if mirrored < 0.5 else torch.stack(kernels)


def snow(x: Tensor, flakes: Tensor, kernels: Tensor, eps: float) -> Tensor:
    """x, paler, under snow. flakes (B, 7, side, side) in [0, 1]: the brightness of seven layers of strokes, a
    stroke at every 4th pixel, each layer with an offset of its own."""
    h, w = x.shape[2:]
    side = flakes.shape[2]
    grids = x.new_zeros(len(x), 7, 4 * side, 4 * side)
    for i in range(7):
        row, col = (0, i) if i < 4 else (i - 3, 0)
        grids[:, i, row::4, col::4] = flakes[:, i] ** 4
    fallen = F.conv2d(grids[:, :, :h, :w], kernels[None], padding=6)  # (B, 1, H, W)
    grey = 0.2126 * x[:, :1] + 0.7152 * x[:, 1:2] + 0.0722 * x[:, 2:]
    return (0.75 * x + 0.25 * torch.maximum(x, 1.5 * grey + 0.5) + eps * fallen).clamp(0, 1)


# ---- the run -----------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Evaluate every checkpoint under every attack and strength, print the table; returns what results.json
    holds. Raises UserError."""
    kinds = list(dict.fromkeys(word.strip() for word in args.unforeseen.split(",")))
    kinds = list(UNFORESEEN) if kinds == ["all"] else kinds
    if wrong := [kind for kind in kinds if kind not in UNFORESEEN]:
        raise UserError(f"--unforeseen {wrong[0]} is not known; there are {', '.join(UNFORESEEN)}, and all.")
    if not args.checkpoints and not args.quick:
        raise UserError("name at least one checkpoint, such as runs/.../best.pt, or try --quick.")
    run = start_run(args, Path(args.checkpoints[0]).resolve().parent.name if args.checkpoints else "")
    run.remember_files("checkpoints", args.checkpoints)
    results = run.finished(table) or evaluate_all(run, args, kinds)
    run.say(table(results, args) + f"\n\nThe rows are in {run.folder / 'results.json'}.")
    picture(results, run)
    return results


def evaluate_all(run: Run, args: Args, kinds: list[str]) -> dict:
    """All rows; a resumed run skips those that are done."""
    _, test_set = run.load_data()
    files = args.checkpoints or [train_digits(run) / name for name in ("plain.pt", "best.pt")]
    paths = [Path(file) for file in files]
    names = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    states = {name: load_network(path, test_set, args) for name, path in zip(names, paths, strict=True)}
    if len(states) < len(paths):
        raise UserError("two of the checkpoints have the same name in folders of the same name; rename one.")
    rows = run.rows()
    seen = {(row["name"], row["attack"], row["strength"]) for row in rows}
    as_published = args.targeted and args.unforeseen_steps == 200 and not args.eval_amp
    as_published = as_published and (args.dataset, args.image_size) == ("cifar10", 32)
    for name, state in states.items():
        model = place_model(rebuild(state, name), run.device, "auto" if args.eval_amp else "off").eval()
        for kind in ("none", *kinds):
            radii, ata, large = UNFORESEEN.get(kind, ((0,), None, (0,)))
            for i, eps in enumerate(radii if args.image_size < 64 else large):
                strength = 0 if kind == "none" else i + 1
                if (name, kind, strength) in seen:
                    continue
                torch.manual_seed(args.seed + world()[0])
                stream = batches(test_set, args.batch_size, run.device, workers=args.workers)
                stream = progress(stream, len(test_set), f"{name}, {kind} {eps:g}")
                with full_precision(model, not args.eval_amp):
                    accuracy = robust_accuracy(model, stream, attack_on(model, kind, eps, args))
                rows.append({
                    "name": name, "attack": kind, "norm": kind, "eps": eps, "examples": len(test_set),
                    "accuracy": round(accuracy, 2), "epoch": state.get("epoch"), "strength": strength,
                    "steps": args.unforeseen_steps, "targeted": args.targeted,
                    "ata": ata[i] if ata and as_published else None,
                })  # fmt: skip
                run.keep_rows(rows)
    return run.finish(rows)


def attack_on(model: Network, kind: str, eps: float, args: Args) -> Callable | None:
    """attack(x, y) -> x_adv, or None for the kind 'none', clean accuracy."""
    classes = model.spec["heads"]["class"]

    def attack(x: Tensor, y: Tensor) -> Tensor:
        if not args.targeted:
            return unforeseen(lambda z: ce_per_image(model(z), y), x, kind, eps, args.unforeseen_steps)
        target = (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
        return unforeseen(lambda z: -ce_per_image(model(z), target), x, kind, eps, args.unforeseen_steps)

    return None if kind == "none" else attack


def load_network(path: Path, test_set: Images, args: Args) -> dict:
    """The checkpoint of a classifier of these classes and this size of images. Raises UserError."""
    state = load_checkpoint(path)
    check_classifier(state, path)
    size, classes = state.get("args", {}).get("image_size", args.image_size), len(test_set.classes)
    if state["network"]["heads"]["class"] != classes:
        raise UserError(f"{path} is no classifier of the {classes} classes of {args.dataset}.")
    if size != args.image_size:
        raise UserError(f"{path} was trained on images of {size} pixels: take --image-size {size}.")
    return state


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: a line per attack and network with accuracies, their mean and UAR."""
    rows, lines = results["rows"], []
    header = ["attack", "", *(f"radius {i}" for i in range(1, 7)), "mean", "UAR"]
    for kind in dict.fromkeys(row["attack"] for row in rows if row["strength"]):
        for name in dict.fromkeys(row["name"] for row in rows):
            six = [row for row in rows if (row["name"], row["attack"]) == (name, kind)]
            total = sum(row["accuracy"] for row in six)
            uar = f"{100 * total / sum(row['ata'] for row in six):.1f}" if six[0]["ata"] else ""
            accuracies = [f"{row['accuracy']:.2f}" for row in six]
            lines.append([kind, name, *accuracies, f"{total / len(six):.2f}", uar])
    clean = ", ".join(f"{row['name']} {row['accuracy']:.2f}" for row in rows if not row["strength"])
    aim = "towards a random wrong class" if args.targeted else "away from the right class"
    heading = (
        f"{args.dataset}, accuracy (%) on {rows[0]['examples']:,} test images under the attacks of Kang et "
        f"al.,\n{args.unforeseen_steps} steps {aim}, {'mixed precision' if args.eval_amp else 'float32'}. "
        f"Clean: {clean}. {results['seconds']:.0f} s."
    )
    return f"\n{heading}\n\n" + text_table(header, lines)


def picture(results: dict, run: Run) -> None:
    """Bars like those of Chen et al.'s Figure 3, unforeseen.png: the mean over the six strengths."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = results["rows"]
    kinds = list(dict.fromkeys(row["attack"] for row in rows if row["strength"]))
    names = list(dict.fromkeys(row["name"] for row in rows))
    heights = {}
    for name in names:
        cells = [[r["accuracy"] for r in rows if (r["name"], r["attack"]) == (name, kind)] for kind in kinds]
        heights[name] = [sum(cell) / len(cell) for cell in cells]
    figure = Figure(figsize=(max(6, len(kinds)), 4), layout="constrained")
    ax = figure.subplots()
    grouped_bars(ax, kinds, heights)
    ax.set_ylabel("accuracy (%), mean over six strengths")
    ax.legend()
    if world()[0] == 0:
        write_atomically(run.folder / "unforeseen.png", lambda f: figure.savefig(f, format="png"))


if __name__ == "__main__":
    cli(main, Args)
