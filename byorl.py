"""Bootstrap Your Own Robust Latents (BYORL; Gowal, Huang, van den Oord, Mann, Kohli: Self-supervised adversarial robustness for the
low-label, high-data regime, ICLR 2021).

BYOL without labels, on views that are attacked. An online network (encoder e, projector g, predictor q; weights theta) predicts
what a slowly moving copy of itself (e, g; weights xi) makes of another, clean view of the same image:

    v, v' = two random augmentations of x;   z' = g_xi(e_xi(v')), no gradient
    delta = argmin over the eps-ball of cos(q(g(e(v + delta))), z')                      (eq. 5; the attack, by AutoPGD)
    minimise 2 - 2 cos(q(g(e(v + delta))), z'), and the same with v and v' exchanged      (eq. 7)
    xi <- tau xi + (1 - tau) theta

Then e is frozen and a linear classifier is trained on it with few or many labels: on attacked images (robust head) or on clean
ones (plain head). The paper's surprise: on BYORL's representation the plain head is nearly as robust.

    python byorl.py --quick --eps 0.5 --norm l2     # digits: BYOL and BYORL, about a minute on two CPU cores
    python byorl.py --eps 0.5 --norm l2             # CIFAR-10, 1000 epochs, PreAct-ResNet-34 x2, heads for 1% to 100% of the labels
                                                    # (the paper's radius is 128/255, the default)
    python byorl.py --norm linf --eps 8/255         # Table 3, row x2
    python byorl.py --method uat-ft                 # the baseline
    python byorl.py --init runs/X/byorl.pt --dataset stl10 --label-fractions 0.01,0.1,1   # transfer (Table 1)
    torchrun --nproc-per-node=8 byorl.py --eps 0.5 --norm l2

The paper: CIFAR-10 alone, linf 8/255, robust head on all labels, clean / robust: x1 78.02 / 41.30, x2 80.80 / 43.24, x4 81.32 / 43.19.

Differs from the paper, whose code is not public, or is our choice where it is silent:
- eq. 6 prints ascent on the cosine; eqs. 5 and 7 and the text need descent;
- the attack sees batch statistics in BatchNorm and leaves the running ones alone; the target network uses those of its own batch;
- LARS and the views as in BYOL's code, but SimCLR's colour jitter (0.4, 0.4, 0.4, 0.1), of which "strength 0.5" is the vocabulary;
- features have 512 * width dimensions (basic blocks); the "2048" of the text fits x4 only;
- --eps 0 is BYOL, its heads trained and judged at l2 128/255 or linf 8/255;
- heads: batch size that of pre-training, crop and flip, robust ones with PGD-10, best epoch on the 1,024 held-out images by robust
  (robust head) or clean accuracy (plain head); so "100%" are the 48,976 labels that are left, "1%" is 500;
- UAT-FT: SGD as for the AT of Kucer et al. but with a cosine, PGD-10; the same number of steps for teacher and student.
"""
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    STATS, Epoch, Images, Network, Run, UserError, apgd, batches, batchnorm_mode, build_model, ce_per_image, cli, count_batches,
    distribute, draw, eps_name, evaluate, join, load_checkpoint, load_data, load_extra, load_trunk, load_weights, pgd_attack,
    place_model, print_table, radii, random_crop_flip, robust_accuracy, save_image_grid, seed_step, simclr_augment, split_train,
    start_run, sync_batchnorm, sync_buffers, world, write_results,
)  # fmt: skip


@dataclass
class Args:
    # run
    method: Literal["byorl", "uat-ft"] = "byorl"  # uat-ft: the baseline, adversarial training with pseudo-labels, a network per share of labels
    stage: Literal["all", "pretrain", "probe", "evaluate"] = "all"  # pretrain: encoders (or UAT-FT) only; probe: heads only; evaluate: --init only
    init: str = ""  # the encoder to put heads on, in place of pre-training, e.g. runs/X/byorl.pt; with --stage evaluate a head, or a folder of heads
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes that decode images (folder)
    out: str = ""  # folder of the run; empty: runs/<script>-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest such run), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in about a minute on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    extra_data: str = ""  # FILE.npz or .npy with more images, uint8 (N, size, size, 3), without labels (paper: 500,000)
    flip: bool = True  # mirror images at random in training
    arch: Literal[
        "preact18", "preact34", "resnet18", "resnet34", "resnet50", "vit_b16", "vit_s16", "vit_ti16", "vit_s4", "vit_ti4"
    ] = "preact34"  # encoder (paper: preact34; ImageNet: resnet50); with --init that of the checkpoint, as are width and stem
    width: float = 2.0  # multiplies the number of channels (paper: 2 on CIFAR-10, 4 with extra data and on ImageNet)
    stem: Literal["cifar", "imagenet"] = "cifar"  # imagenet: 7x7 stride 2 and max-pooling, for large images
    # optimiser (LARS)
    epochs: int = 1000  # of pre-training; an epoch is as many images as the labelled set has, also with --extra-data
    warmup_epochs: int = 10  # epochs in which the learning rate rises from 0; then half a cosine back to 0
    batch_size: int = 512  # images per step over all GPUs
    lr: float = 2.0  # highest learning rate (ImageNet: 1.2)
    weight_decay: float = 5e-4  # not on biases and BatchNorm
    # attack in pre-training
    norm: Literal["linf", "l2"] = "l2"  # norm of the ball that the attack stays in
    eps: float = 128 / 255  # radius of that ball, in [0, 1] pixel units (paper: l2 128/255, linf 8/255); 0: BYOL
    attack: Literal["apgd", "pgd"] = "apgd"  # AutoPGD, or PGD (Table 4)
    attack_steps: int = 40  # of it
    apgd_checkpoints: Literal["paper", "code"] = "paper"  # where AutoPGD may halve its step, see common.apgd_checkpoints
    # method
    tau: float = 0.996  # of the target network at the start; 1 at the end (ImageNet: 0.999)
    hidden: int = 4096  # hidden units of projector and predictor
    projection: int = 256  # their outputs
    jitter_strength: float = 0.5  # of the colour jitter (Figure 5)
    blur: float = 0.0  # probability of blur in a view (for ImageNet)
    crop: float = 0.08  # smallest share of the area that a view shows
    plain: bool = False  # also pre-train without attack (BYOL), for comparison
    # heads
    label_fractions: str = "0.01,0.02,0.05,0.1,0.2,0.5,1"  # shares of the training labels, a head for each
    heads: Literal["both", "robust", "plain"] = "both"  # robust: trained on attacked images
    probe_epochs: int = 50  # Adam; the learning rate is divided by 10 after half of them
    probe_lr: float = 2e-3  # of Adam
    probe_steps: int = 10  # PGD steps when training a robust head, and in UAT-FT
    uat_epochs: int = 200  # UAT-FT: SGD with momentum 0.9, one epoch of warm-up, then half a cosine to 0
    uat_lr: float = 0.2  # highest learning rate of UAT-FT
    # evaluation
    val_images: int = 1024  # training images held out to choose the epoch of each head
    eval_attack: Literal["pgd20", "suite", "suite-fast"] = "suite"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it
    eval_steps: int = 20  # PGD steps
    eval_examples: int = 0  # test images to attack, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    # Digits of 8 x 8 pixels, as many as they have: the ball of radius 0.5 is large on them.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.25, epochs=14, warmup_epochs=2, batch_size=64, lr=1.0,
        attack_steps=4, tau=0.97, hidden=256, projection=64, jitter_strength=0.2, crop=0.7, plain=True, label_fractions="0.1,1", heads="both",
        probe_epochs=10, probe_lr=0.05, probe_steps=4, val_images=200, eval_attack="pgd20",
    )  # fmt: skip


# Flags that make an encoder what it is.
PRETRAINING = (
    "epochs", "warmup_epochs", "lr", "attack", "attack_steps", "apgd_checkpoints", "tau", "hidden", "projection", "jitter_strength", "blur", "crop",
)  # fmt: skip

# (clean, robust) accuracy in the paper: {(norm, width, extra images, attack, judged on, encoder, head, share of its labels): ...}.
# Tables 1, 2 and 6 are of x4 and extra images, as their numbers and those of the text show, though the captions say CIFAR-10.
PAPER = {
    ("l2", 4.0, "+500k", "apgd-40", "cifar10", "byorl", "robust", 1.0): (93.01, 77.61),  # Table 2
    ("l2", 4.0, "+500k", "apgd-40", "cifar10", "byorl", "plain", 1.0): (93.19, 77.09),
    ("l2", 4.0, "+500k", "", "cifar10", "byol", "robust", 1.0): (91.23, 0.05),
    ("l2", 4.0, "+500k", "", "cifar10", "byol", "plain", 1.0): (94.76, 0.00),
    ("l2", 4.0, "+500k", "apgd-40", "stl10", "byorl", "robust", 1.0): (76.49, 57.88),
    ("l2", 4.0, "+500k", "apgd-40", "stl10", "byorl", "plain", 1.0): (77.54, 57.66),
    ("l2", 4.0, "+500k", "apgd-40", "cifar100", "byorl", "robust", 1.0): (48.34, 28.24),
    ("l2", 4.0, "+500k", "apgd-40", "cifar100", "byorl", "plain", 1.0): (49.20, 27.17),
    ("linf", 4.0, "+500k", "apgd-40", "cifar10", "byorl", "robust", 1.0): (84.96, 52.75),  # Table 6
    ("linf", 4.0, "+500k", "apgd-40", "cifar10", "byorl", "plain", 1.0): (86.57, 50.94),
    ("linf", 4.0, "+500k", "apgd-40", "stl10", "byorl", "robust", 1.0): (65.40, 37.79),  # Table 1 has 37.28, and 37.79 for UAT-FT: swapped?
    ("linf", 4.0, "+500k", "apgd-40", "stl10", "byorl", "plain", 1.0): (65.75, 36.51),
    ("linf", 4.0, "+500k", "apgd-40", "cifar100", "byorl", "robust", 1.0): (37.80, 14.82),
    ("linf", 4.0, "+500k", "apgd-40", "cifar100", "byorl", "plain", 1.0): (39.51, 12.21),
    ("l2", 2.0, "", "apgd-40", "cifar10", "byorl", "robust", 0.01): (None, 65.43),  # section 4.2
    ("l2", 4.0, "+500k", "apgd-40", "cifar10", "byorl", "robust", 0.01): (None, 75.50),
}

def _add_tables_1_3_4() -> None:
    for norm, attack, encoder, *numbers in (  # Table 1: robust heads, 1, 10 and 100% of the labels of STL-10, then of CIFAR-100
        ("l2", "apgd-40", "byorl", 33.85, 53.23, None, 10.09, 22.51, None), ("l2", "", "uat-ft", 37.71, 42.16, 53.23, 3.68, 10.80, 14.43),
        ("linf", "apgd-40", "byorl", 24.18, 36.30, None, 5.28, 10.12, None), ("linf", "", "uat-ft", 23.47, 36.52, 37.79, 2.18, 4.88, 7.21),
    ):  # fmt: skip
        for i, number in enumerate(numbers):
            if number is not None:  # the others are in Tables 2 and 6
                PAPER[norm, 4.0, "+500k", attack, ("stl10", "cifar100")[i // 3], encoder, "robust", (0.01, 0.1, 1.0)[i % 3]] = (None, number)
    for width, attack, *numbers in (
        (1.0, "apgd-40", 78.02, 41.30), (2.0, "apgd-40", 80.80, 43.24), (4.0, "apgd-40", 81.32, 43.19),  # Table 3
        (2.0, "pgd-5", 85.26, 1.05), (2.0, "pgd-10", 81.44, 37.88), (2.0, "pgd-20", 80.29, 42.58), (2.0, "pgd-40", 79.60, 43.41),  # Table 4,
        (2.0, "apgd-10", 80.49, 40.59), (2.0, "apgd-20", 80.53, 43.27), (2.0, "apgd-60", 80.69, 43.64),  # with apgd-40 at 80.47 / 43.64
    ):  # fmt: skip
        PAPER["linf", width, "", attack, "cifar10", "byorl", "robust", 1.0] = tuple(numbers)


_add_tables_1_3_4()


# ---- the method ----------------------------------------------------------------------------------------------------


def mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """Projector and predictor: (B, n_in) -> (B, n_out)."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_out, bias=False))


class Online(nn.Module):
    """Encoder, projector and predictor; images (B, 3, H, W) in [0, 1] -> predictions (B, n_out)."""

    def __init__(self, encoder: Network, hidden: int, n_out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.trunk.dim, hidden, n_out)
        self.predictor = mlp(n_out, hidden, n_out)

    def project(self, x: Tensor) -> Tensor:
        """The target network's output: (B, n_out)."""
        return self.projector(self.encoder.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor(self.project(x))


class BothViews(nn.Module):
    """The two views one after the other, each with its own BatchNorm statistics, in one call (as DistributedDataParallel wants)."""

    def __init__(self, online: Online):
        super().__init__()
        self.online = online

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        return self.online(v1), self.online(v2)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos, (B,), in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def attack_view(online: Online, v: Tensor, target: Tensor, args: Args) -> Tensor:
    """eq. 5: the view v + delta whose prediction is farthest from `target`, the other view's projection."""
    if args.eps == 0:
        return v
    generator = torch.Generator(v.device).manual_seed(torch.randint(2**31, ()).item())

    def loss(z: Tensor) -> Tensor:
        return distance(online(z), target)

    with batchnorm_mode(online, "train"):  # batch statistics; the running ones stay as they are
        if args.attack == "pgd":
            return pgd_attack(args.norm, args.eps, args.attack_steps, generator=generator)(loss, v)
        return apgd(
            loss, v, eps=args.eps, norm=args.norm, steps=args.attack_steps, checkpoints=args.apgd_checkpoints, generator=generator
        )


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as in BYOL's code: weight decay inside the trust ratio, the rate outside the
    momentum. Biases and BatchNorm (vectors) get neither decay nor trust ratio: plain SGD with momentum."""

    def __init__(self, params: Iterator, lr: float, weight_decay: float, momentum: float = 0.9, trust: float = 1e-3):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.dim() > 1:
                    g = g + group["weight_decay"] * p
                    ratio = group["trust"] * p.norm() / g.norm()
                    g = g * torch.where((p.norm() > 0) & (g.norm() > 0), ratio, 1.0)
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum"]
                buffer.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * buffer)


def learning_rate(highest: float, step: int, warmup: int, steps: int) -> float:
    """Linear from 0 to `highest` in `warmup` steps, then half a cosine to 0 at `steps`."""
    if step < warmup:
        return highest * step / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def target_rate(start: float, step: int, steps: int) -> float:
    """tau: 1 - (1 - tau_0) (1 + cos(pi k / K)) / 2, from `start` to 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- pre-training --------------------------------------------------------------------------------------------------


def pretrain(name: str, run: Run, args: Args, images: Images, epoch_size: int) -> dict:
    """Train one encoder ('byol': without attack, 'byorl') and return its checkpoint. An epoch is `epoch_size` images."""
    if (done := run.load(f"{name}.pt")) is not None:
        return done  # before the run was resumed
    index = ["byol", "byorl"].index(name)
    torch.manual_seed(args.seed)
    mean, std = STATS[args.dataset]
    encoder = build_model(args.arch, {}, width=args.width, stem=args.stem, mean=mean, std=std)
    place_model(encoder, run.device, args.amp, args.compile)
    online = Online(encoder, args.hidden, args.projection).to(run.device)
    target = copy.deepcopy(online).requires_grad_(False)  # its predictor is not used
    opt = LARS(online.parameters(), args.lr, args.weight_decay)
    state = resume(name, run, online, opt)
    if "target" in state:
        load_weights(target, state["target"], run.folder / "last.pt")
    history, began = state["history"], time.perf_counter() - state["seconds"]
    if args.sync_bn:
        sync_batchnorm(target)
    ddp = distribute(BothViews(online), args.sync_bn)
    steps = count_batches(epoch_size, args.batch_size)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": encoder.spec, "model": online.state_dict(), "target": target.state_dict(), "optimizer": opt.state_dict(),
            "args": vars(args), "name": name, "epoch": epoch, "step": step, "sums": sums or {}, "history": history,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], args.epochs):
        epoch_id = index * 100_000 + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        shuffle = args.seed * 1_000_003 + epoch_id
        some = draw(images, epoch_size, shuffle)  # all of them, if there is no --extra-data
        stream = batches(some, args.batch_size, run.device, shuffle=shuffle, skip=skip, workers=args.workers)
        online.train(), target.train()
        with Epoch(epoch, epoch_size, steps, run.device, skip, sums) as log:
            for x, _ in stream:  # (B, 3, S, S); the labels are not used
                seed_step(args.seed, epoch_id, log.step)
                k = epoch * steps + log.step
                v1, v2 = (simclr_augment(x, args.jitter_strength, args.blur, args.crop, args.flip) for _ in range(2))
                with torch.no_grad():  # clean views, fixed during the attack
                    z1, z2 = target.project(v1), target.project(v2)
                if name == "byorl":
                    v1, v2 = attack_view(online, v1, z2, args), attack_view(online, v2, z1, args)
                p1, p2 = ddp(v1, v2)
                loss = (distance(p1, z2) + distance(p2, z1)).mean()  # eq. 7, both directions
                for group in opt.param_groups:
                    group["lr"] = learning_rate(args.lr, k, args.warmup_epochs * steps, args.epochs * steps)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                tau = target_rate(args.tau, k, args.epochs * steps)
                with torch.no_grad():
                    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                        xi.lerp_(theta, 1 - tau)
                log.update(len(x), loss=loss)
                if log.interrupted():
                    break
        if log.interrupted():
            save(epoch, log.step, log.shared_sums())
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        run.log(
            history, name, epoch + 1, args.epochs, lr=opt.param_groups[0]["lr"], **log.means(),
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        save(epoch + 1)
    run.save(f"{name}.pt", {
        "network": encoder.spec, "model": encoder.state_dict(), "args": vars(args), "name": name, "stage": "pretrain",
        "epoch": args.epochs, "extra_images": len(images) - epoch_size,
    })  # fmt: skip
    return run.load(f"{name}.pt")


def resume(name: str, run: Run, model: nn.Module, opt: torch.optim.Optimizer) -> dict:
    """Where to begin with the training called `name`: in the middle, if last.pt is of it; weights and optimiser are loaded then."""
    state = run.load("last.pt", "optimizer", "name", "history", "seconds")
    if state is None or state["name"] != name:
        before = state or {"history": [], "seconds": 0.0}
        return {"epoch": 0, "step": 0, "sums": {}} | {k: before[k] for k in ("history", "seconds")}
    load_weights(model, state["model"], run.folder / "last.pt")
    opt.load_state_dict(state["optimizer"])
    return state


# ---- with labels: linear heads on a frozen encoder, and UAT-FT -------------------------------------------------------


def head_eps(args: Args) -> float:
    """Radius at which heads are trained and judged: --eps, or the paper's for the norm if that is 0 (BYOL)."""
    return args.eps or {"l2": 128 / 255, "linf": 8 / 255}[args.norm]


def classifier(
    name: str, run: Run, args: Args, encoder: dict | None, images: Images, epoch_size: int, val_set: Images, robust: bool, about: dict
) -> dict:
    """Train a classifier and return its checkpoint, that of the best epoch on `val_set` (early stopping, appendix A).

    encoder: a checkpoint; a linear head is trained on it and it stays as it is. None: the whole network is trained (UAT-FT).
    robust: adversarially (Madry et al. 2018). An epoch is `epoch_size` of the images. about: what else the checkpoint tells.
    """  # fmt: skip
    file = f"{name.replace(' ', '-')}.pt"
    if (done := run.load(file)) is not None:
        return done  # before the run was resumed
    torch.manual_seed(args.seed)
    mean, std = STATS[args.dataset]
    spec = encoder["network"] if encoder else {"arch": args.arch, "width": args.width, "stem": args.stem, "mean": mean, "std": std}
    model = build_model(**spec | {"heads": {"class": len(val_set.classes)}})
    if encoder:
        load_trunk(model.trunk, encoder, name)
        model.trunk.requires_grad_(False)
        opt, epochs = torch.optim.Adam(model.heads.parameters(), args.probe_lr), args.probe_epochs
    else:
        epochs = args.uat_epochs
        opt = torch.optim.SGD(model.parameters(), args.uat_lr, momentum=0.9, weight_decay=args.weight_decay)
    place_model(model, run.device, args.amp, args.compile)
    trained = model.heads if encoder else model
    state = resume(name, run, trained, opt)
    best = state.get("best", {"accuracy": -1.0, "model": {}, "epoch": 0})
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(model, args.sync_bn and not encoder)
    eps = head_eps(args)
    attack = pgd_attack(args.norm, eps, args.probe_steps)
    steps = count_batches(epoch_size, args.batch_size)
    epoch_ids = 300_000 + 100_000 * (encoder is None and not robust)  # draws of its own for each kind of training

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        with batchnorm_mode(model, "eval"):
            return attack(lambda z: ce_per_image(model(z), y), x)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": model.spec, "model": trained.state_dict(), "optimizer": opt.state_dict(), "args": vars(args), "name": name,
            "epoch": epoch, "step": step, "sums": sums or {}, "history": history, "best": best, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        shuffle = args.seed * 1_000_003 + epoch_ids + epoch
        some = draw(images, epoch_size, shuffle)
        stream = batches(some, args.batch_size, run.device, shuffle=shuffle, skip=skip, workers=args.workers)
        model.train(not encoder)  # a frozen encoder normalises by its running statistics
        with Epoch(epoch, epoch_size, steps, run.device, skip, sums) as log:
            for x, y in stream:
                seed_step(args.seed, epoch_ids + epoch, log.step)
                for group in opt.param_groups:
                    if encoder:
                        group["lr"] = args.probe_lr * (0.1 if epoch >= epochs / 2 else 1.0)
                    else:
                        group["lr"] = learning_rate(args.uat_lr, epoch * steps + log.step, steps, epochs * steps)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                x = perturb(x, y) if robust else x
                loss = F.cross_entropy(ddp(x), y)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                log.update(len(y), loss=loss)
                if log.interrupted():
                    break
        if log.interrupted():
            save(epoch, log.step, log.shared_sums())
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        sync_buffers(model)
        held_out = batches(val_set, args.batch_size, run.device, workers=args.workers)
        accuracy = robust_accuracy(model, held_out, perturb if robust else None)
        if accuracy > best["accuracy"]:
            best = {"accuracy": accuracy, "epoch": epoch + 1, "model": {k: v.clone() for k, v in trained.state_dict().items()}}
        if not encoder:  # of a head no line per epoch: there are many heads
            run.log(
                history, name, epoch + 1, epochs, lr=opt.param_groups[0]["lr"], **log.means(), val=accuracy,
                seconds=round(time.perf_counter() - began, 1),
            )  # fmt: skip
        save(epoch + 1)
    trained.load_state_dict(best["model"])
    run.save(file, {
        "network": model.spec, "model": model.state_dict(), "args": vars(args) | {"eps": eps}, "name": name, "stage": "train",
        "epoch": best["epoch"], **about,
    })  # fmt: skip
    return run.load(file)


def heads(run: Run, args: Args, encoders: dict[str, dict], train_set: Images, fractions: list[float]) -> list[dict]:
    """Linear heads on every encoder for every share of the labels; returns their checkpoints."""
    found = []
    for name, encoder in encoders.items():
        for fraction in fractions:  # nested: a larger share holds the smaller ones, drawn uniformly, not per class
            some, val_set = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
            for head in ("robust", "plain") if args.heads == "both" else (args.heads,):
                about = {"encoder": name, "head": head, "label_fraction": fraction, "encoder_args": encoder.get("args", {})}
                about["extra_images"] = encoder.get("extra_images", 0)
                label = f"{name} {head} {100 * fraction:g}%"
                found.append(classifier(label, run, args, encoder, some, len(some), val_set, head == "robust", about))
    return found


def uat_ft(run: Run, args: Args, images: Images, train_set: Images, fractions: list[float]) -> list[dict]:
    """UAT-FT (Uesato et al. 2019; section 4, Baseline): for every share of the labels, a plain network learns from the labelled
    images and labels the others; then a network of the same kind is trained adversarially on all. Returns the checkpoints.

    images: those of `train_set`, then the --extra-data. With all labels and no extra data it is adversarial training.
    """
    found = []
    for fraction in fractions:
        name = f"uat-ft {100 * fraction:g}%"
        labelled, val_set = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
        unlabelled = torch.ones(len(images), dtype=torch.bool)
        unlabelled[labelled.index] = unlabelled[val_set.index] = False
        rest = images.subset(unlabelled.nonzero().squeeze(1))
        known = replace(images, index=labelled.index)
        union = known
        if len(rest) and run.load(f"{name.replace(' ', '-')}.pt") is None:
            teacher = classifier(f"{name} teacher", run, args, None, known, len(train_set), val_set, False, {})
            union = pseudo_label(run, args, teacher, known, rest)
        about = {"encoder": "uat-ft", "head": "", "label_fraction": fraction, "encoder_args": vars(args)}
        about["extra_images"] = len(images) - len(train_set)
        found.append(classifier(name, run, args, None, union, len(train_set), val_set, True, about))
    return found


def pseudo_label(run: Run, args: Args, teacher: dict, labelled: Images, rest: Images) -> Images:
    """The images of both; those of `rest` get the teacher's most likely class as their label."""
    model = place_model(build_model(**teacher["network"]), run.device, "off").eval()
    load_weights(model, teacher["model"], teacher["name"])
    labels = rest.labels.clone()
    labels[rest.index] = of_all(lambda x: model(x).argmax(1), rest, run, args).cpu()
    labels[labelled.index] = labelled.labels[labelled.index]
    return Images(rest.pixels, labels, labelled.classes, torch.cat([labelled.index, rest.index]))


@torch.no_grad()
def of_all(f: Callable[[Tensor], Tensor], images: Images, run: Run, args: Args) -> Tensor:
    """f(x) of all images in their order, (n, ...), the same on all ranks, each of which computes its share."""
    number = torch.zeros_like(images.labels)  # stands in for the label, so that a batch tells which images are in it
    number[images.index] = torch.arange(len(images))
    out = None
    for x, i in batches(replace(images, labels=number), args.batch_size, run.device, workers=args.workers):
        values = f(x)
        out = values.new_zeros(len(images), *values.shape[1:]) if out is None else out
        out[i] = values
    if world()[1] > 1:
        dist.all_reduce(out)
    return out


# ---- evaluation ----------------------------------------------------------------------------------------------------


def retrieve(run: Run, args: Args, encoders: dict[str, dict], test_set: Images, queries: int = 50, nearest: int = 8) -> None:
    """Figure 1: the test images whose representations have the largest cosines with that of a query, clean and attacked.

    The attack (AutoPGD-40 in the run's ball) moves the query's representation towards that of an image of another class.
    Writes retrieval.png for one query and prints, for `queries` of them, the share of neighbours that are of the query's class.
    """
    order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))
    test_set = test_set.subset(order)  # folders are sorted by class
    labels = test_set.labels[test_set.index]
    n = min(queries, len(test_set))
    y = labels[:n]
    others = (y[:, None] != y[None]).float().argmax(1)  # for each query the first of another class
    shown = int((y == y.min()).float().argmax())  # as in the paper: CIFAR-10's first class is the airplane
    if (y == y[0]).all():
        return
    x, rows = of_all(lambda x: x, test_set.subset(torch.arange(n)), run, args), {}
    for name, state in encoders.items():
        model = place_model(build_model(**state["network"]), run.device, args.amp).eval()
        load_weights(model, state["model"], name)
        gallery = F.normalize(of_all(model.features, test_set, run, args))  # (N, dim)
        x_adv = apgd(
            lambda z: F.cosine_similarity(model.features(z), gallery[others]), x, eps=head_eps(args), norm=args.norm, steps=40  # noqa: B023
        )
        for how, query in ("a clean", x), ("an attacked", x_adv):
            with torch.no_grad():
                cosines = F.normalize(model.features(query)) @ gallery.T  # (n, N)
            cosines[range(n), range(n)] = -1  # not the query itself
            found = cosines.topk(min(nearest, len(test_set) - 1)).indices.cpu()
            neighbours = of_all(lambda x: x, test_set.subset(found[shown]), run, args)
            rows[f"{name}, {how.split()[1]}"] = torch.cat([query[shown : shown + 1], neighbours])
            run.say(f"{name}: {100 * (labels[found] == y[:, None]).float().mean():.0f}% of the neighbours of {how} image are of its class")
    if world()[0] == 0:
        save_image_grid(run.folder / "retrieval.png", rows)


def judge(run: Run, args: Args, classifiers: list[dict], test_set: Images) -> list[dict]:
    """Two rows of results.json per classifier: clean accuracy, and accuracy under --eval-attack."""
    done = run.read("heads.json") or {"rows": []}  # one by one, so that a resumed run judges none twice
    rows = done["rows"]
    for state in classifiers:
        name, eps = state["name"], head_eps(args)
        if any(row["name"] == name for row in rows):
            continue
        about = {k: state[k] for k in ("label_fraction", "head", "encoder", "extra_images")}
        judged = evaluate(run, name, state, test_set, [0, eps], {}, train_eps=eps)
        rows += [row | {"paper": known} | about for row, known in zip(judged, paper(state, args), strict=True)]
        run.write("heads.json", json.dumps({"script": "byorl", "rows": rows}, indent=1))
        run.say(f"{name}: clean {rows[-2]['accuracy']}, robust {rows[-1]['accuracy']}")
    return rows


def paper(state: dict, args: Args) -> tuple[float | None, float | None]:
    """The paper's (clean, robust) accuracy for this classifier, judged with `args`; (None, None) if the setting is another."""
    usual, pre = vars(Args()), state["encoder_args"]
    same = {"dataset", "image_size", "flip", "arch", "stem", "batch_size", "weight_decay"}
    same |= {"uat_epochs", "uat_lr", "probe_steps"} if state["encoder"] == "uat-ft" else set(PRETRAINING) - {"attack", "attack_steps"}
    judging = ("image_size", "flip", "batch_size", "val_images", "probe_epochs", "probe_lr", "eval_attack", "eval_examples", "eval_amp")
    radius = {"l2": 128 / 255, "linf": 8 / 255}[args.norm]
    if (
        any(pre.get(k) != usual[k] for k in same)
        or any(state["args"].get(k) != usual[k] or getattr(args, k) != usual[k] for k in judging)
        or (pre["norm"], pre["eps"] or radius, state["args"]["eps"], head_eps(args)) != (args.norm, radius, radius, radius)
    ):
        return None, None
    attack = f"{pre['attack']}-{pre['attack_steps']}" if state["encoder"] == "byorl" else ""
    extra = {0: "", 500_000: "+500k"}.get(state["extra_images"], "other")
    key = (args.norm, pre["width"], extra, attack, args.dataset, state["encoder"], state["head"], state["label_fraction"])
    return PAPER.get(key, (None, None))


def show(results: dict, folder: str) -> None:
    """Print a line per classifier: clean and robust accuracy, and the paper's where the setting is its own."""
    args, rows = results["args"], results["rows"]
    eps = max(row["eps"] for row in rows)
    attack = next(row["attack"] for row in rows if row["eps"] == eps)
    print(
        f"\n{args['dataset']}, {args['arch']} x{args['width']:g}; accuracy (%) on {rows[0]['examples']:,} test images, clean "
        f"and under {attack.upper()} ({args['norm']} eps {eps_name(eps)}). {results['seconds']:.0f} s in all.\n"
    )
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        clean, robust = [row for row in rows if row["name"] == name]
        table.append([name, f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}"])
        if robust["paper"] is not None:
            table.append(["  the paper", "" if clean["paper"] is None else f"{clean['paper']:.2f}", f"{robust['paper']:.2f}"])
    print_table(["encoder, head, share of labels", "clean", "robust"], table)
    print(f"\nresults.json and the checkpoints are in {folder}", flush=True)


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Pre-train, train the heads, evaluate them, print the table; returns what results.json holds ({} if --stage is not that far)."""
    fractions = radii(args.label_fractions)
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise UserError(f"--label-fractions {args.label_fractions}: give shares such as 0.01,0.1,1.")
    if args.stage in ("probe", "evaluate") and not args.init or args.stage == "pretrain" and args.init:
        raise UserError("--stage probe and evaluate need --init (an encoder such as runs/X/byorl.pt; a head or a folder of heads); "
                        "--stage pretrain takes none.")  # fmt: skip
    given = read_init(args)
    if given:  # network and pre-training are those of the checkpoint, for the record
        network = given[0]["network"]
        its_args = given[0].get("encoder_args") or given[0].get("args", {})
        args = replace(args, **{k: network[k] for k in ("arch", "width", "stem")}, **{k: its_args[k] for k in PRETRAINING if k in its_args})
    run = start_run(args, "byorl")
    results = run.finished() or train_and_evaluate(run, args, fractions, given)
    if results and world()[0] == 0:
        show(results, str(run.folder))
    return results


def read_init(args: Args) -> list[dict]:
    """The checkpoints that --init names: one encoder, or with --stage evaluate a classifier or all in a folder."""
    if not args.init:
        return []
    path, evaluating = Path(args.init), args.stage == "evaluate"
    files = sorted(path.glob("*%.pt")) if evaluating and path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no heads (files such as byorl-plain-1%.pt).")
    given = [load_checkpoint(file) for file in files]
    for file, state in zip(files, given, strict=True):
        if evaluating and not {"label_fraction", "head", "encoder", "encoder_args", "name"} <= state.keys():
            raise UserError(f"{file} is no head of byorl.py; to train some on an encoder, use --stage probe --init {file}.")
        if not any(k.startswith("trunk.") for k in state["model"]):
            raise UserError(f"{file} holds no encoder; take a file such as byorl.pt or best.pt.")
    return given


def train_and_evaluate(run: Run, args: Args, fractions: list[float], given: list[dict]) -> dict:
    """All stages that --stage asks for."""
    train_set, test_set = load_data(
        args.dataset, args.data_dir, run.device, image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers
    )
    images = join(train_set, load_extra(args.extra_data, args.image_size, run.device)) if args.extra_data else train_set
    if args.eval_examples:
        order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))
        test_set = test_set.subset(order[: args.eval_examples])
    for fraction in fractions:
        some, _ = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)  # raises if too few
        if absent := set(range(len(train_set.classes))) - set(train_set.labels[some.index].tolist()):
            run.say(
                f"note: among {100 * fraction:g}% of the labels is no '{train_set.classes[min(absent)]}' ({len(absent)} of "
                f"{len(train_set.classes)} classes are missing); the paper does not balance classes either."
            )
    for state in given:
        differs = [k for k in ("norm", "eps", "dataset", "image_size") if state.get("args", {}).get(k) != getattr(args, k)]
        if differs:
            run.say(f"note: --init was trained with another --{', --'.join(differs)}: {[state.get('args', {}).get(k) for k in differs]}.")
        if args.stage == "evaluate" and state["network"]["heads"]["class"] != len(test_set.classes):
            raise UserError(f"{state['name']} knows {state['network']['heads']['class']} classes, {args.dataset} has {len(test_set.classes)}.")
    run.begin()
    if args.stage == "evaluate":
        classifiers = given
    elif args.method == "uat-ft" and not given:
        classifiers = uat_ft(run, args, images, train_set, fractions)
    else:
        encoders = {state.get("name", "init").split()[0]: state for state in given}
        for name in [] if given else ["byol"] * (args.plain or args.eps == 0) + ["byorl"] * (args.eps > 0):
            encoders[name] = pretrain(name, run, args, images, len(train_set))
        retrieve(run, args, encoders, test_set)
        classifiers = heads(run, args, encoders, train_set, fractions) if args.stage != "pretrain" else []
    if args.stage in ("pretrain", "probe"):
        then = "probe --init a file" if args.stage == "pretrain" else "evaluate --init the folder"
        run.say(f"The checkpoints are in {run.folder}; go on with: python byorl.py --stage {then}")
        return {}
    began = time.perf_counter()
    rows = judge(run, args, classifiers, test_set)
    last = run.load("last.pt")
    seconds = (last["seconds"] if last else 0.0) + time.perf_counter() - began
    return write_results(run, rows, seconds)


if __name__ == "__main__":
    cli(main, Args)
