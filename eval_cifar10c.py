"""Accuracy on common corruptions, clean and attacked, of the checkpoints of any script.

CIFAR-10-C, CIFAR-100-C and ImageNet-C (Hendrycks and Dietterich 2019, 1903.12261) have 15 types of corruption
and 4 extra ones, in 5 severities. For each type and severity (a cell) we measure

    TA  accuracy on the corrupted test images                        (Kucer et al. 2021, Figure 4, top)
    RA  accuracy on these images when PGD-20 attacks each of them    (Figure 4, bottom)

    python eval_cifar10c.py --quick                                    # two small networks trained on digits
    python eval_cifar10c.py runs/a/best.pt runs/b/best.pt --download   # CIFAR-10-C (2.9 GB)
    python eval_cifar10c.py runs/a/best.pt --eval-examples 1000        # attack 1,000 images of each cell
    python eval_cifar10c.py runs/a/best.pt --dataset folder --data-dir ImageNet-C
    python eval_cifar10c.py runs/a/best.pt --generate                  # without CIFAR-10-C
    torchrun --nproc-per-node=8 eval_cifar10c.py runs/a/best.pt

Kucer et al., section 4.4, means over corruptions, ResNet-18, TA / RA (of T1 and T2 at l2 1.0 TA only):
    l2 1.0: T0 78.36 / 35.83, T1 80.23, T2 79.15, T3 76.52 / 38.33;  linf: RA T0 32.20, T3 36.22

Differs from the paper, which released no code, or is our choice where it is silent:
- The attack has the norm and radius of the run that made the checkpoint (plain.pt, too).
- We average over all severities, and over the 15 types as well as over all types.
- --generate computes six types from clean test images by the definitions and constants (for 32 pixels) of the
  official make_cifar_c.py. Random numbers differ, so do not compare with published accuracies.
The rest: results/kucer.md.
"""
import hashlib
import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (
    Images, Network, Positive, Run, Suite, UserError, all_ranks_fine, batches, ce_per_image,
    check_classifier, cli, draw, eps_name, full_precision, grouped_bars, load_checkpoint, load_data,
    open_folder, paper_numbers, pgd, place_model, progress, reading, rebuild, robust_accuracy, start_run,
    suite_accuracy, suite_attacks, text_table, train_digits, whole_number, world, write_atomically,
)  # fmt: skip

Attack = Literal[Suite, "none"]


@dataclass
class Args:
    checkpoints: tuple[str, ...] = ()  # best.pt, plain.pt, ... of any runs
    # run
    seed: int = 0  # seed of the attacks and of --generate
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: a folder in runs/ named after that of the first checkpoint
    resume: bool = False  # continue the run in its folder, with the same flags, or start it
    quick: bool = False  # a miniature on the bundled digits; trains two small networks if none is named
    # data
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # corrupted images
    data_dir: str = "data"  # folder that holds CIFAR-10-C/ or <corruption>/<severity>/<class>/*.jpg|png
    data_mirror: str = ""  # URL of a folder with the official archive, if the official host is slow
    download: bool = False  # fetch CIFAR-10-C or CIFAR-100-C if it is not there
    generate: bool = False  # make six types of corruption from the test images of --dataset
    image_size: Positive = 32  # side in pixels for --generate, and for folders if the checkpoint has none
    corruptions: str = ""  # types of corruption, comma-separated; empty: all that are found
    severities: str = "1,2,3,4,5"  # severities from 1 to 5, comma-separated (paper: not given)
    # evaluation
    norm: Literal["own", "linf", "l2"] = "own"  # norm of the attack; own: that of training
    eps: float = 0.0  # radius of the attack; images are in [0, 1]; 0: that of training
    eval_attack: Attack = "pgd20"  # attack (paper: pgd20); suite-fast: a tenth of suite; none: no RA
    eval_steps: Positive = 20  # steps of PGD in evaluation (paper: 20)
    eval_examples: int = 0  # random images of each cell to attack, the same in every run; 0: all
    batch_size: Positive = 500  # images per batch, over all GPUs
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    QUICK: ClassVar[dict] = dict(
        dataset="digits", generate=True, severities="1,3,5", eval_steps=10, eval_examples=60
    )


BENCHMARK = [
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]

ARCHIVES = {  # name, number of classes, record at zenodo.org, MD5
    "cifar10": ("CIFAR-10-C", 10, 2535967, "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100": ("CIFAR-100-C", 100, 3555552, "11f0ed0f1191edbf9fa23466ae6021d3"),
}


# ---- data --------------------------------------------------------------------------------------------


def open_data(args: Args, device: torch.device) -> tuple[list[str], Callable[[str, int, int], Images]]:
    """(the types there are, a function (type, severity, size) -> the images of a cell). Images in folders are
    read in this size; others have a size of their own. Raises UserError."""
    root = Path(args.data_dir)
    if args.generate:
        options = dict(image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers)
        _, test_set = load_data(args.dataset, args.data_dir, device, **options)
        if not isinstance(test_set.pixels, Tensor):
            raise UserError("--generate needs images that fit in memory: fewer, or a smaller --image-size.")
        return list(GENERATED), lambda kind, severity, size: replace(
            test_set, pixels=corrupt(test_set.pixels, kind, severity, args.seed).to(device)
        )
    if args.dataset == "folder":  # ImageNet-C
        types = sorted({path.parent.name for path in root.glob("*/[1-5]")})
        if not types:
            raise UserError(f"no <corruption>/<severity>/<class>/*.jpg|png in {root}: see --data-dir.")
        return types, lambda kind, s, size: open_folder(root / kind / str(s), size or args.image_size)
    if args.dataset not in ARCHIVES:
        raise UserError(f"there are no files of corrupted {args.dataset}: add --generate.")
    name, classes, _, _ = ARCHIVES[args.dataset]
    wanted = args.download and world()[0] == 0  # rank 0 downloads, the other ranks wait
    all_ranks_fine(download(args.dataset, root, args.data_mirror) if wanted else "")
    folder = root / name if (root / name).is_dir() else root
    if not (folder / "labels.npy").exists():
        how = "try --download, another --data-dir, or --generate"
        raise UserError(f"there is no {name} with labels.npy in {folder}: {how}.")
    types = BENCHMARK + [kind for kind in EXTRA if (folder / f"{kind}.npy").exists()]
    return types, lambda kind, severity, size: open_arrays(folder, kind, severity, classes)


def download(dataset: str, root: Path, mirror: str) -> str:
    """Fetch and unpack the official archive unless its files are there. Returns what went wrong, or ''."""
    from torchvision.datasets.utils import download_and_extract_archive

    name, _, record, md5 = ARCHIVES[dataset]
    files = [f"{file}.npy" for file in (*BENCHMARK, *EXTRA, "labels")]
    unpacked = not (root / f"{name}.tar").exists()  # the archive is removed when all of it is unpacked
    if unpacked and any(all((folder / f).exists() for f in files) for folder in (root / name, root)):
        return ""
    url = f"{mirror.rstrip('/') or f'https://zenodo.org/records/{record}/files'}/{name}.tar"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds without data; urllib's own default is to wait for ever
    try:
        download_and_extract_archive(url, str(root), filename=f"{name}.tar", md5=md5, remove_finished=True)
    except Exception as e:  # urllib, http.client, tarfile and torchvision raise a dozen kinds
        reason = " ".join(str(e).split()) or type(e).__name__
        return f"could not fetch {url} ({reason}): try another host with --data-mirror, or --generate."
    finally:
        socket.setdefaulttimeout(timeout)
    return ""


def open_arrays(folder: Path, kind: str, severity: int, classes: int) -> Images:
    """A cell of CIFAR-10-C: kind.npy is uint8 (5 n, S, S, 3), labels.npy (5 n,); rows (s - 1) n to s n have
    severity s. The images stay on the disk until they are used. Raises UserError."""
    with reading(folder / "labels.npy"):
        labels = np.load(folder / "labels.npy", allow_pickle=False).astype(np.int64).reshape(5, -1)
        if (labels != labels[0]).any() or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"not five times the same labels from 0 to {classes - 1}")
        n = labels.shape[1]
    with reading(folder / f"{kind}.npy"):
        pixels = np.load(folder / f"{kind}.npy", mmap_mode="c", allow_pickle=False)
        if pixels.dtype != np.uint8 or pixels.shape != (5 * n, pixels.shape[1], pixels.shape[1], 3):
            raise ValueError(f"{pixels.dtype} {pixels.shape}, not uint8 ({5 * n}, size, size, 3)")
        pixels = pixels[(severity - 1) * n : severity * n]
    digest = hashlib.sha256(labels.tobytes() + pixels[:100].tobytes()).hexdigest()
    pixels, y = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels[0])
    return Images(pixels, y, [str(i) for i in range(classes)], torch.arange(n), digest)


# ---- six corruptions made here -----------------------------------------------------------------------

GENERATED = {  # the constant c of make_cifar_c.py for severities 1 to 5
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # probability of becoming 0 or 1
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to V of HSV
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor of the distance from the channel's mean
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # standard deviation in pixels
}


def corrupt(pixels: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 on the CPU: the corruption `kind` of GENERATED, severity 1 to 5."""
    c = GENERATED[kind][severity - 1]
    cell = 10 * (BENCHMARK + EXTRA).index(kind) + severity
    generator = torch.Generator().manual_seed(seed * 1_000 + cell)
    parts = []
    for part in pixels.cpu().split(1000):
        x = part.float() / 255
        if kind == "gaussian_noise":
            x = x + c * torch.randn(x.shape, generator=generator)
        elif kind == "impulse_noise":
            hit = torch.rand(x.shape, generator=generator) < c
            x = torch.where(hit, (torch.rand(x.shape, generator=generator) < 0.5).float(), x)
        elif kind == "brightness":  # R, G and B keep their ratios, so hue and saturation stay
            value = x.amax(1, keepdim=True)
            brighter = (value + c).clamp(max=1)
            x = torch.where(value > 0, x * brighter / value.clamp(min=1e-9), brighter)
        elif kind == "contrast":
            average = x.mean((2, 3), keepdim=True)
            x = (x - average) * c + average
        elif kind == "jpeg_compression":
            x = torch.stack([as_jpeg(image, c) for image in part]) / 255
        else:
            x = blur(x, c)
        # Rounded down, as in make_cifar_c.py. Without the 1e-3 an unchanged value could become one less.
        parts.append((x.clamp(0, 1) * 255 + 1e-3).byte())
    return torch.cat(parts)


def as_jpeg(image: Tensor, quality: int) -> Tensor:
    """uint8 (3, H, W), compressed by Pillow."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian filter on (B, 3, H, W), cut off at 4 sigma; beyond the border the last pixel is repeated."""
    radius = int(4 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    line = (line / line.sum()).view(1, 1, 1, -1)
    out = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")  # (3 B, 1, ., .)
    return F.conv2d(F.conv2d(out, line), line.transpose(2, 3)).view_as(x)


# ---- networks and their accuracy ---------------------------------------------------------------------

# The networks whose means the paper gives (results/paper.txt). It does not give other flags.
PAPER_TRAINING = {
    "script": "rotation_at", "stage": "train", "dataset": "cifar10", "image_size": 32, "arch": "resnet18",
    "width": 1.0, "stem": "cifar", "init": "", "pretrain": "none", "epochs": 100, "lr": 0.1, "step_size": 0.0,
    "attack_steps": 10, "lambda1": 0.5, "lambda2": 0.5, "val_fraction": 0.15, "select": "clean",
}  # fmt: skip


def load_network(path: Path, classes: int, args: Args) -> dict:
    """The checkpoint of a classifier, with norm and eps of its attack, the size of its images (0: not known)
    and the paper's [TA, RA]. Raises UserError if it is damaged or does not fit data or flags."""
    state = load_checkpoint(path)
    check_classifier(state, path)
    if state["network"]["heads"]["class"] != classes:
        raise UserError(f"{path} is no classifier of the {classes} classes of {args.dataset}.")
    with reading(path):
        trained = dict(state.get("args", {}))
        size = whole_number(trained.get("image_size", 0))
        norm = trained.get("norm") if args.norm == "own" else args.norm
        own_eps = trained.get("eps", -1) if norm == trained.get("norm") else -1  # -1: no radius in this norm
        eps = args.eps or float(own_eps)
        possible = 0 <= eps <= {"linf": 1, "l2": 1_000}.get(norm, -1)
        paper = []
        if PAPER_TRAINING.items() <= (trained | state).items():
            setting = f"{trained['norm']} {eps_name(trained['eps'])} {trained['variant']}"
            paper = [float(v) if v else None for v in paper_numbers("eval_cifar10c", args, setting)]
    if args.generate and size > args.image_size:
        raise UserError(f"{path} was trained on images of {size} pixels: add --image-size {size}.")
    if args.dataset == "folder" and not size and args.image_size == Args.image_size:
        raise UserError(f"{path} does not say how large its images are: add --image-size.")
    if args.eval_attack != "none" and not possible:
        ball = f"there is no attack with norm {norm} and radius {eps:g}"
        raise UserError(f"{path}: {ball}. Give --norm linf --eps 8/255 or the like, or --eval-attack none.")
    return state | {"norm": norm, "eps": eps, "size": size, "paper": paper or [None, None]}


def evaluate_cell(model: Network, state: dict, images: Images, attack: str, run: Run, label: str) -> dict:
    """A row: accuracy under `attack`, which is 'none' or one of --eval-attack. state: see load_network."""
    args, norm, eps, size = run.args, state["norm"], state["eps"], state["size"]

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        data = batches(images, args.batch_size, run.device, workers=args.workers)
        for x, y in progress(data, len(images), label):
            if size and x.shape[-1] != size:  # the size that the network was trained on
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
            yield x, y

    def attack_by_pgd(x: Tensor, y: Tensor) -> Tensor:
        return pgd(lambda z: ce_per_image(model(z), y), x, norm=norm, eps=eps, steps=args.eval_steps)

    torch.manual_seed(args.seed + world()[0])
    with full_precision(model, not args.eval_amp):
        if attack == "none":
            accuracy = robust_accuracy(model, stream())
        elif attack == "pgd20":
            accuracy = robust_accuracy(model, stream(), attack_by_pgd)
        else:
            attacks, batch_size = suite_attacks(attack, norm, eps, args.seed), args.batch_size // world()[1]
            after = suite_accuracy(model, stream(), attacks, batch_size=max(1, batch_size))
            accuracy = list(after.values())[-1]
    name = f"pgd-{args.eval_steps}" if attack == "pgd20" else attack
    row = {"attack": name, "norm": norm, "eps": 0 if attack == "none" else eps, "examples": len(images)}
    correct = round(accuracy * len(images) / 100)  # means are computed from it
    return row | {"correct": correct, "accuracy": round(accuracy, 2)}


def mean(cells: list[dict], **wanted: str | int) -> float:
    """Mean accuracy (%) of the cells with these fields, without rounding."""
    chosen = [cell for cell in cells if wanted.items() <= cell.items()]
    return sum(100 * cell["correct"] / cell["examples"] for cell in chosen) / len(chosen)


def means(cells: list[dict], papers: dict[str, list]) -> list[dict]:
    """Rows with the means of all cells, for the types of the benchmark and for all types.
    papers: the paper's [TA, RA] for each network."""
    rows = []
    for name, attack in dict.fromkeys((cell["name"], cell["attack"]) for cell in cells):
        every = [cell for cell in cells if (cell["name"], cell["attack"]) == (name, attack)]
        benchmark = [cell for cell in every if cell["corruption"] in BENCHMARK]
        groups = [every] if len(benchmark) in (0, len(every)) else [benchmark, every]
        for group in groups:
            types = len({cell["corruption"] for cell in group})
            of = " of 15" if group == benchmark and types < 15 else ""
            row = group[0] | {"corruption": f"mean of {types}{of}", "severity": "all"}
            paper = papers[name][attack != "none"] if row["examples"] == 10_000 else None
            row |= {"accuracy": round(mean(group), 2), "paper": paper}
            rows.append({key: value for key, value in row.items() if key != "correct"})
    return rows


# ---- the run -----------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Evaluate every checkpoint on every cell, print the table; returns what results.json holds."""
    if not set(args.severities.split(",")) <= set("12345"):
        raise UserError(f"--severities {args.severities}: give numbers from 1 to 5, such as 1,3,5.")
    if not args.checkpoints and not args.quick:
        raise UserError("name at least one checkpoint, such as runs/.../best.pt, or try --quick.")
    if not args.checkpoints and args.dataset != "digits":
        raise UserError("--quick trains its networks on digits: leave out --dataset, or name a checkpoint.")
    if args.download and (args.generate or args.dataset not in ARCHIVES):
        raise UserError("--download needs --dataset cifar10 or cifar100, without --generate.")
    run = start_run(args, Path(args.checkpoints[0]).resolve().parent.name if args.checkpoints else "")
    run.remember_files("checkpoints", args.checkpoints)
    results = run.finished(table) or evaluate_all(run, args)
    run.say(table(results, args) + f"\n\nThe rows are in {run.folder / 'results.json'}.")
    picture(results, run)
    return results


def evaluate_all(run: Run, args: Args) -> dict:
    """All rows; a resumed run skips the cells that are done. Raises UserError."""
    types, open_cell = open_data(args, run.device)
    wanted = [kind.strip() for kind in args.corruptions.split(",")] if args.corruptions else types
    if unknown := [kind for kind in wanted if kind not in types]:
        raise UserError(f"there is no '{unknown[0]}' here; there are {', '.join(types)}.")
    cells = dict.fromkeys((kind, int(severity)) for kind in wanted for severity in args.severities.split(","))
    first, digest = None, hashlib.sha256()
    for kind, severity in cells:  # all must be readable
        images = open_cell(kind, severity, 0)
        first = first or images
        # A missing class would shift the labels of those after it.
        if images.classes != first.classes or len(images) != len(first):
            differs = "other classes or number of images than in the first type"
            raise UserError(f"{kind} {severity}: {differs}; check the files.")
        digest.update(images.digest.encode())
    run.remember("data", digest.hexdigest())  # labels and 100 images per cell; for folders, file names

    files = args.checkpoints or [train_digits(run) / name for name in ("plain.pt", "best.pt")]
    paths = [Path(file) for file in files]
    names = [f"{path.resolve().parent.name}/{path.stem}" for path in paths]
    classes = len(first.classes)
    states = {name: load_network(path, classes, args) for name, path in zip(names, paths, strict=True)}
    if len(states) < len(paths):
        raise UserError("two of the checkpoints have the same name in folders of the same name; rename one.")
    for name, state in states.items():
        trained_on = state.get("args", {}).get("dataset", "unknown data")
        if trained_on != args.dataset and args.dataset != "folder":
            run.say(f"warning: {name} was trained on {trained_on}, not {args.dataset}: check its classes.")
    rows = run.rows()
    seen = {(row["name"], row["corruption"], row["severity"]) for row in rows}
    for name, state in states.items():
        model = place_model(rebuild(state, name), run.device, "auto" if args.eval_amp else "off").eval()
        for kind, severity in cells:
            if (name, kind, severity) in seen:
                continue
            images = open_cell(kind, severity, state["size"])
            for attack in dict.fromkeys(("none", args.eval_attack)):  # clean, then attacked
                if attack != "none" and args.eval_examples:
                    images = draw(images, min(args.eval_examples, len(images)), seed=0)
                row = evaluate_cell(model, state, images, attack, run, f"{name}, {kind} {severity}")
                columns = {"corruption": kind, "severity": severity, "generated": args.generate}
                rows.append({"name": name} | row | columns)
            run.keep_rows(rows)
            run.say(f"{name}, {kind} {severity}: {rows[-1]['attack']} {rows[-1]['accuracy']:.2f}")
    return run.finish(rows + means(rows, {name: state["paper"] for name, state in states.items()}))


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: a column per network and attack; a line per type (mean over
    severities), per severity (mean over the types of the benchmark) and per mean of both."""
    rows = results["rows"]
    cells = [row for row in rows if row["severity"] != "all"]
    counted = [cell for cell in cells if cell["corruption"] in BENCHMARK] or cells
    types = len({cell["corruption"] for cell in counted})
    pairs = dict.fromkeys((row["name"], row["attack"]) for row in rows)
    columns, lines = [{"name": name, "attack": attack} for name, attack in pairs], []
    for kind in dict.fromkeys(cell["corruption"] for cell in cells):
        lines.append([kind, *(f"{mean(cells, corruption=kind, **column):.2f}" for column in columns)])
    for s in dict.fromkeys(cell["severity"] for cell in counted):
        numbers = (f"{mean(counted, severity=s, **column):.2f}" for column in columns)
        lines.append([f"severity {s}, mean of {types}", *numbers])
    for title in dict.fromkeys(row["corruption"] for row in rows if row["severity"] == "all"):
        means_of = [row for row in rows if row["corruption"] == title]
        lines.append([title, *(f"{row['accuracy']:.2f}" for row in means_of)])
        if any(row["paper"] for row in means_of):
            known = (f"{row['paper']:.2f}" if row["paper"] else "" for row in means_of)
            lines.append(["  the paper", *known])
    attacks = dict.fromkeys(
        f"{row['name']}: {row['attack']} in the {row['norm']} ball of radius {eps_name(row['eps'])} around "
        f"{row['examples']:,} corrupted images." for row in cells if row["attack"] != "none"
    )  # fmt: skip
    source = "corruptions GENERATED here, not the official ones" if args.generate else f"from {args.data_dir}"
    heading = (
        f"{args.dataset}, {source}; accuracy (%) on {cells[0]['examples']:,}\nimages per type and severity, "
        f"{'mixed precision' if args.eval_amp else 'float32'}."
    )
    header = [f"{name} {'clean' if attack == 'none' else attack}" for name, attack in pairs]
    return "\n" + "\n".join([heading, *attacks]) + "\n\n" + text_table(["corruption", *header], lines)


def picture(results: dict, run: Run) -> None:
    """Bars like those of Figure 4, corruptions.png: TA above, RA below, means over severities."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    cells = [row for row in results["rows"] if row["severity"] != "all"]
    types, names, attacks = (
        list(dict.fromkeys(cell[key] for cell in cells)) for key in ("corruption", "name", "attack")
    )
    figure = Figure(figsize=(max(6, len(types)), 1 + 2.5 * len(attacks)), layout="constrained")
    axes = figure.subplots(len(attacks), sharex=True, squeeze=False)[:, 0]
    for ax, attack in zip(axes, attacks, strict=True):
        heights = {n: [mean(cells, name=n, attack=attack, corruption=kind) for kind in types] for n in names}
        grouped_bars(ax, types, heights)
        ax.set_ylabel(f"accuracy (%), {'clean' if attack == 'none' else attack}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    if world()[0] == 0:
        write_atomically(run.folder / "corruptions.png", lambda f: figure.savefig(f, format="png"))


if __name__ == "__main__":
    cli(main, Args)
