"""Adversarial self-supervised pre-training, then fine-tuning (Chen, Liu, Chang, Cheng, Amini, Wang: Adversarial robustness: from
self-supervised pre-training to fine-tuning, CVPR 2020).

Pre-training teaches a trunk theta_p (the stem and first three stages of a ResNet-50v2) a task without labels; fine-tuning puts a new last
stage and a linear layer theta_f on it and learns the classes. Either may be adversarial (eq. 1: minimise E max over delta of the loss):

    P1  none                    F1  theta_f only, theta_p frozen, clean images (ST)
    P2  the task on clean images                F2  theta_f only, adversarial training (AT)
    P3  the task, adversarially                 F3  everything, ST
    RS  the task on noisy images (Table 8)      F4  everything, AT

Tasks: rotation (which of 4 turns), jigsaw (which of 31 permutations of 4 x 4 tiles), Selfie (which of the masked patches belongs here),
and all three at once (eq. 2-4), each on its own perturbed image, with a term that makes their input gradients orthogonal:

    minimise over theta, maximise over delta:  sum_i loss_i(x + delta_i) + lambda log det(G^T G),  G = normalised input gradients

    python chen_pretrain_finetune.py --quick                                   # digits, rotation, the eight pairs of Table 3
    python chen_pretrain_finetune.py --task selfie --pretrain P3 --finetune F4     # one cell of Table 3
    python chen_pretrain_finetune.py --table3                                  # all 24, then Tables 4 and 6
    python chen_pretrain_finetune.py --task ensemble                           # Table 5: AP+DPE; AP+SE: --dpe-lambda 0
    python chen_pretrain_finetune.py --stage compare runs/X/*P3F4.ta.pt        # Tables 4 and 6, Figure 5, of any checkpoints
    torchrun --nproc-per-node=8 chen_pretrain_finetune.py --table3

The paper, CIFAR-10, linf 8/255, clean / PGD-20: P1F4 84.72 / 47.22, P3F4 of Selfie 86.02 / 51.05, of three models 86.04 / 54.64.

Differs from the paper, or from its published code where that says more, or is our choice where both are silent:
- an adversarial pre-training step averages the loss on clean and on attacked images (code; eq. 1 has the attacked ones only);
- BatchNorm uses batch statistics in training attacks (code), but these passes leave the running ones alone (in the code they do not);
- Selfie: cross-entropy of a softmax of a softmax (code; --no-double-softmax), one permutation per batch, 13 layers; no Nesterov;
- the ensemble's trunk has the stem's BatchNorm, which the published one lacks; frozen parts stay in eval mode (F1, F2 were not published);
- gradients in G are of the turned, the shuffled and the upright image; --frames aligned turns them back first (code: own);
- rates: those of the paper (batch 256; fine-tuning 0.1, divided by 10 at epochs 30 and 50; pre-training 0.1, Selfie 0.025, ensemble 0.001,
  cosine), a warm-up of 200 steps and numbers of epochs from the code; the code's own fine-tuning: --batch-size 128 --lr-steps 60,80;
- "TA" and "RA" pick the epoch by clean or PGD-20 accuracy on 10% of the training images (the code: jigsaw by the test set).
"""
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    IMAGENET_STATS, Epoch, Images, Network, Run, UserError, batches, batchnorm_mode, build_model, build_trunk, ce_per_image, cli,
    count_batches, distribute, draw, eps_name, evaluate, full_precision, jigsaw, jigsaw_permutations, join, load_checkpoint,
    load_extra, load_splits, load_weights, numbers, pgd_attack, place_model, print_table, random_crop_flip, robust_accuracy, rotate, seed_step,
    start_run, sync_buffers, world, write_results,
)  # fmt: skip

TASKS = ("selfie", "rotation", "jigsaw")
Views = dict[str, tuple[Tensor, Tensor]]  # task: (image, target)
PAIRS = ("P1F3", "P1F4", "P2F3", "P2F4", "P3F1", "P3F2", "P3F3", "P3F4")  # the rows of Table 3


@dataclass
class Args:
    models: tuple[str, ...] = ()  # checkpoints for --stage compare
    # run
    stage: Literal["all", "pretrain", "compare"] = "all"  # pretrain: no fine-tuning; compare: transfer and ensembles of MODELS
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes that decode images (folder)
    out: str = ""  # folder of the run; empty: runs/<script>-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest such run), or start it
    quick: bool = False  # a miniature on the bundled digits: Table 3 for one task in two minutes on two CPU cores
    # method
    task: Literal["selfie", "rotation", "jigsaw", "ensemble", "all"] = "rotation"  # of pre-training; ensemble: all three at once; all: one after the other
    pretrain: Literal["P1", "P2", "P3", "RS", "all"] = "P3"  # see above; all: P1, P2 and P3 with what Table 3 pairs them with
    finetune: Literal["F1", "F2", "F3", "F4", "all"] = "F4"  # see above
    table3: bool = False  # the 24 cells of Table 3: all tasks, all pairs; each pre-training is done once
    init: str = ""  # take the trunk of this checkpoint (pretrain-*.pt of a run) in place of pre-training
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    label_fraction: float = 1.0  # share of the training images that is used, at most those not held out for validation
    extra_data: str = ""  # FILE.npz or .npy with more images for pre-training, uint8 (N, size, size, 3)
    pretrain_images: int = 0  # number of images to pre-train on, drawn at random (Table 7); 0: all
    flip: bool = True  # mirror images at random in training (not for Selfie, as in the code)
    arch: Literal["resnet26v2", "resnet50v2"] = "resnet50v2"  # trunk (paper: resnet50v2)
    width: float = 1.0  # multiplies the number of channels
    stem: Literal["cifar", "imagenet"] = "cifar"  # imagenet: 7x7 stride 2 and max-pooling, for large images
    # optimiser: SGD with momentum 0.9
    epochs: int = 100  # epochs of fine-tuning
    batch_size: int = 256  # images per step over all GPUs (paper: 256; restricted ImageNet 64)
    accumulate: int = 1  # parts that a batch of the ensemble is cut into to save memory (BatchNorm sees a part)
    lr: float = 0.1  # initial learning rate of fine-tuning
    lr_steps: str = "30,50"  # epochs at which it is divided by 10 (code: 60,80)
    weight_decay: float = 3e-4  # on all weights (code; 1e-4 for Selfie and the ensemble)
    warmup_steps: int = 200  # steps in which the rate rises from a tenth at the start of a training (code)
    pretrain_epochs: int = 0  # epochs of pre-training; 0: rotation and jigsaw 100 (P2: 200), Selfie 200, ensemble 150 (code)
    pretrain_lr: float = 0.0  # its highest rate, then a cosine; 0: rotation and jigsaw 0.1, Selfie 0.025, ensemble 0.001
    # attack in training
    norm: Literal["linf", "l2"] = "linf"  # norm of the ball that the attack stays in
    eps: float = 8 / 255  # radius of that ball, in [0, 1] pixel units
    attack_steps: int = 10  # PGD steps
    step_size: float = 0.0  # of the training attack; 0: linf 2/255 (or more if eps is large), l2 2 eps / steps
    attack_bn: Literal["eval", "train"] = "train"  # BatchNorm mode under attack in training (train: the code's)
    # tasks
    grid: int = 4  # jigsaw tiles and Selfie patches per side
    num_permutations: int = 30  # permutations of jigsaw besides the identity
    whole: float = 0.1  # probability that jigsaw leaves an image whole, besides that of drawing the identity (code)
    double_softmax: bool = True  # Selfie as in the code
    dpe_lambda: float = 0.1  # lambda of eq. 3; 0: AP+SE
    frames: Literal["own", "aligned"] = "own"  # pixel frames in which the ensemble's gradients are compared
    sigma: float = 0.25  # standard deviation of the noise of RS
    # evaluation
    val_fraction: float = 0.1  # share of the training images held out to select the model (section 4.1)
    select: Literal["clean", "robust"] = "clean"  # which of the two models that are reported the tables compare with the paper's
    eval_attack: Literal["pgd20", "suite", "suite-fast"] = "pgd20"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it
    eval_steps: int = 20  # PGD steps
    eval_examples: int = 0  # test images to attack, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=12, grid=3, flip=False, arch="resnet26v2", width=0.125, pretrain="all", finetune="all", epochs=7, batch_size=128, lr=0.1,
        lr_steps="4,6", warmup_steps=10, pretrain_epochs=5, eps=0.1, attack_steps=5, num_permutations=10, val_fraction=0.06,
    )  # fmt: skip


# (TA, RA, epochs) in Tables 3, 5, 7 (with all CIFAR-10 images: Table 3) and 8: {(task, pair): ...}; P1 has no task.
PAPER = {
    ("", "P1F3"): (94.24, 0.00, 92), ("", "P1F4"): (84.72, 47.22, 99),
    ("selfie", "P2F3"): (95.09, 0.00, 97), ("rotation", "P2F3"): (95.45, 0.00, 92), ("jigsaw", "P2F3"): (93.93, 0.00, 89),
    ("selfie", "P2F4"): (85.56, 50.42, 60), ("rotation", "P2F4"): (86.66, 50.95, 45), ("jigsaw", "P2F4"): (85.18, 50.94, 46),
    ("selfie", "P3F1"): (78.93, 6.30, 82), ("rotation", "P3F1"): (86.83, 18.22, 99), ("jigsaw", "P3F1"): (80.47, 2.68, 87),
    ("selfie", "P3F2"): (74.30, 37.65, 64), ("rotation", "P3F2"): (82.32, 45.10, 47), ("jigsaw", "P3F2"): (72.76, 32.59, 51),
    ("selfie", "P3F3"): (94.69, 0.00, 86), ("rotation", "P3F3"): (94.79, 0.00, 92), ("jigsaw", "P3F3"): (93.06, 0.00, 93),
    ("selfie", "P3F4"): (86.02, 51.05, 50), ("rotation", "P3F4"): (85.66, 50.40, 46), ("jigsaw", "P3F4"): (84.50, 49.61, 48),
    ("se", "P3F4"): (84.44, 49.53, 47), ("dpe", "P3F4"): (83.00, 52.22, 56),
    ("selfie", "RSF2"): (71.9, 30.57, 61), ("rotation", "RSF2"): (74.7, 34.23, 78), ("jigsaw", "RSF2"): (74.66, 33.84, 68),
    ("selfie", "RSF4"): (85.14, 50.23, 48), ("rotation", "RSF4"): (85.62, 51.25, 46), ("jigsaw", "RSF4"): (85.18, 50.94, 46),
}  # fmt: skip


PAPER_TABLE6 = ("jigsaw + rotation 85.36 / 53.08", "jigsaw + selfie 85.64 / 53.32", "rotation + selfie 86.51 / 53.83", "all 86.04 / 54.64")
FIRST_ID = {"pretrain": 0, "finetune": 100_000}  # added to an epoch's number, so that these two draw other random numbers


# ---- the tasks -----------------------------------------------------------------------------------------------------


class Selfie(nn.Module):
    """Attention pooling (Trinh et al. 2019): what the visible patches say about a masked one is compared with all masked ones."""

    def __init__(self, dim: int, grid: int, layers: int = 13):
        super().__init__()
        self.grid, self.masked = grid, grid * grid // 4  # a quarter
        self.first = nn.Parameter(torch.zeros(1, 1, dim))
        layer = nn.TransformerEncoderLayer(dim, max(1, dim // 64), 2 * dim, activation=F.gelu, batch_first=True)  # dropout 0.1
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.row, self.col = nn.Parameter(torch.randn(grid, dim)), nn.Parameter(torch.zeros(grid, dim))

    def forward(self, patches: Tensor, order: Tensor) -> Tensor:
        """patches (B, N, dim), row by row; the first quarter of `order` (N,) is masked -> scores (B, masked, masked): row i says how
        well each masked patch fits the place of the i-th."""
        masked, visible = order[: self.masked], order[self.masked :]
        seen = torch.cat([self.first.expand(len(patches), -1, -1).to(patches), patches[:, visible]], 1)  # without their places (code)
        pooled = self.encoder(seen)[:, :1]  # (B, 1, dim)
        query = pooled + self.row[masked // self.grid] + self.col[masked % self.grid]  # (B, masked, dim)
        return query @ patches[:, masked].transpose(1, 2)


class Pretext(nn.Module):
    """theta_p and a branch theta_pc for each task (Figure 2); the trunk of a `Network`, which normalises the images."""

    def __init__(self, tasks: tuple[str, ...], args: Args):
        super().__init__()
        self.resnet = build_trunk(args.arch, args.width, args.stem)
        last_stages = [self.resnet.layer4, build_trunk(args.arch, args.width, args.stem).layer4]  # rotation and jigsaw have their own
        del self.resnet.layer4  # what is left is inherited
        self.branches = nn.ModuleDict()
        for task in tasks:
            if task == "selfie":
                self.branches[task] = Selfie(self.resnet.shared_dim, args.grid)
            else:
                classes = 4 if task == "rotation" else args.num_permutations + 1
                pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
                self.branches[task] = nn.Sequential(last_stages.pop(), *pool, nn.Linear(self.resnet.dim, classes))
        self.grid, self.dim = args.grid, self.resnet.dim

    def forward(self, x: Tensor, task: str, target: Tensor) -> Tensor:
        """Logits (B, classes) of rotation and jigsaw, scores (B, masked, masked) of Selfie, whose `target` is the order of patches."""
        if task != "selfie":
            return self.branches[task](self.resnet.shared(x))
        b, c, s, _ = x.shape
        n = self.grid
        x = x.reshape(b, c, n, s // n, n, s // n).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B * N, 3, S/n, S/n)
        patches = self.resnet.shared(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)).unflatten(0, (b, n * n))
        return self.branches[task](patches, target)


def make_view(task: str, x: Tensor, permutations: Tensor, whole: float) -> tuple[Tensor, Tensor]:
    """(the image that the task shows, its target): for Selfie the image itself and the order of patches, one for the whole batch."""
    b, device = len(x), x.device
    if task == "rotation":
        k = (torch.arange(b, device=device) % 4)[torch.randperm(b, device=device)]  # as many of each turn (code)
        return rotate(x, k), k
    if task == "jigsaw":
        k = torch.randint(len(permutations), (b,), device=device)
        k = torch.where(torch.rand(b, device=device) < whole, 0, k)
        return jigsaw(x, permutations[k]), k
    return x, torch.randperm(permutations.shape[1], device=device)


def task_loss(model: Network, task: str, x: Tensor, target: Tensor, double_softmax: bool) -> Tensor:
    """Loss per image (B,): cross-entropy; of Selfie the sum over the masked places (chance: masked * ln masked = 5.545 for 4)."""
    out = model.features(x, task, target)
    if task != "selfie":
        return ce_per_image(out, target)
    out = out.softmax(2) if double_softmax else out
    right = torch.arange(out.shape[1], device=x.device).repeat(len(x))  # the i-th place wants the i-th patch
    return ce_per_image(out.flatten(0, 1), right).view(len(x), -1).sum(1)


def task_hits(model: Network, task: str, x: Tensor, target: Tensor) -> Tensor:
    """Share of right answers per image (B,), in [0, 1]."""
    out = model.features(x, task, target)
    right = torch.arange(out.shape[1], device=x.device) if task == "selfie" else target
    hits = (out.argmax(-1) == right).float()
    return hits.mean(1) if task == "selfie" else hits


def log_det(gradients: list[Tensor]) -> Tensor:
    """Eq. 4: log det(G^T G) per image (B,); the columns of G are the M gradients (B, 3, S, S), each of length 1. 0 if they are orthogonal;
    a ridge of 1e-5 (code) keeps it above (M - 1) ln 1e-5 where they are equal."""
    g = torch.stack([v.flatten(1) for v in gradients], 2)  # (B, D, M)
    g = g / (g.square().sum(1, keepdim=True) + 1e-20).sqrt()
    gram = g.transpose(1, 2) @ g + 1e-5 * torch.eye(g.shape[2], device=g.device)
    return torch.linalg.slogdet(gram).logabsdet


def to_upright(task: str, g: Tensor, target: Tensor, permutations: Tensor) -> Tensor:
    """A gradient for a turned or shuffled image, moved back to where its pixels came from."""
    if task == "rotation":
        return rotate(g, -target % 4)
    return jigsaw(g, permutations[target].argsort(1)) if task == "jigsaw" else g


class Objective(nn.Module):
    """Eq. 3 and what is minimised; a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: Network, permutations: Tensor, args: Args):
        super().__init__()
        self.model, self.permutations, self.args = model, permutations, args

    def adversarial(self, views: Views, diverse: bool) -> tuple[Tensor, Tensor]:
        """Per image: (sum of the tasks' losses (B,), eq. 4 (B,), or zeros if not `diverse`)."""
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if diverse else contextlib.nullcontext():
            total = sum(task_loss(self.model, task, x, target, self.args.double_softmax) for task, (x, target) in views.items())
        if not diverse:
            return total, torch.zeros_like(total)
        inputs = [x for x, _ in views.values()]
        gradients = torch.autograd.grad(total.sum(), inputs, create_graph=True)  # a loss depends on its own image only
        if self.args.frames == "aligned":
            gradients = [to_upright(task, g, views[task][1], self.permutations) for task, g in zip(views, gradients, strict=True)]
        return total, log_det(list(gradients))

    def forward(self, clean: Views, attacked: Views | None, diverse: bool) -> Tensor:
        """The loss to be minimised: mean over the images and tasks, over clean and attacked images, plus lambda times eq. 4."""
        loss = self.adversarial(clean, False)[0].mean() / len(clean)
        if attacked is None:
            return loss
        if diverse:
            attacked = {task: (x.detach().requires_grad_(), target) for task, (x, target) in attacked.items()}
        total, h = self.adversarial(attacked, diverse)
        return 0.5 * (loss + total.mean() / len(clean)) + self.args.dpe_lambda * h.mean()


# ---- pre-training --------------------------------------------------------------------------------------------------


def recipe(task: str, kind: str, args: Args) -> tuple[int, float, float, float]:
    """(epochs, highest rate, lowest rate, weight decay) of pre-training."""
    epochs = {"selfie": 200, "ensemble": 150}.get(task, 200 if kind == "P2" else 100)
    high = {"selfie": 0.025, "ensemble": 0.001}.get(task, 0.1)
    decay = args.weight_decay / 3 if task in ("selfie", "ensemble") else args.weight_decay
    return args.pretrain_epochs or epochs, args.pretrain_lr or high, 1e-8 if task == "ensemble" else 1e-6, decay


def pretrain(task: str, kind: str, run: Run, args: Args, images: Images, val_set: Images) -> dict:
    """P2, P3 or RS on one task, or on the ensemble of all; returns the checkpoint of the last epoch."""
    name = f"pretrain-{kind}-{task}"
    if (done := run.load(f"{name}.pt")) is not None:
        return done  # before the run was resumed
    tasks = TASKS if task == "ensemble" else (task,)
    epochs, high, low, decay = recipe(task, kind, args)
    torch.manual_seed(args.seed)
    model = Network(Pretext(tasks, args), {}, *IMAGENET_STATS)
    place_model(model, run.device, args.amp, args.compile)
    permutations = jigsaw_permutations(args.grid, args.num_permutations, "random", args.seed).to(run.device)
    objective = Objective(model, permutations, args)
    opt = torch.optim.SGD(model.parameters(), high, momentum=0.9, weight_decay=decay)
    state = run.resume(name, model, opt)
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(objective, args.sync_bn)
    diverse = len(tasks) > 1 and args.dpe_lambda > 0
    steps = count_batches(len(images), args.batch_size)
    attack = pgd_attack(args.norm, args.eps, args.attack_steps, step_size=args.step_size)

    def perturb(views: Views) -> Views:
        """Each task's image gets a perturbation of its own, which maximise eq. 3 together: the images lie one after the other in the
        channels, so that it is one attack."""
        targets = [target for _, target in views.values()]

        def loss(z: Tensor) -> Tensor:  # (B, 3 * tasks, S, S) -> (B,)
            total, h = objective.adversarial(dict(zip(views, zip(z.split(3, 1), targets, strict=True), strict=True)), diverse)
            return total + args.dpe_lambda * h

        with batchnorm_mode(model, args.attack_bn):
            z = attack(loss, torch.cat([x for x, _ in views.values()], 1))
        return dict(zip(views, zip(z.split(3, 1), targets, strict=True), strict=True))

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": {}, "model": model.state_dict(), "optimizer": opt.state_dict(), "args": vars(args), "name": name, "epoch": epoch,
            "step": step, "sums": sums or {}, "history": history, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        epoch_id = FIRST_ID["pretrain"] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        shuffle = args.seed * 1_000_003 + epoch_id
        stream = batches(images, args.batch_size, run.device, shuffle=shuffle, skip=skip, workers=args.workers)
        model.train()
        with Epoch(epoch, len(images), steps, run.device, skip, sums) as log:
            for x, _ in stream:  # (B, 3, S, S); the labels are not used
                sync_buffers(model)
                seed_step(args.seed, epoch_id, log.step)
                rate = low + (high - low) * 0.5 * (1 + math.cos(math.pi * (epoch * steps + log.step) / (epochs * steps)))
                for group in opt.param_groups:
                    group["lr"] = rate * warmup(epoch * steps + log.step, args) if task in ("rotation", "jigsaw") else rate
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip and "selfie" not in tasks)
                opt.zero_grad(set_to_none=True)
                parts, whole = x.chunk(args.accumulate), 0.0
                for i, part in enumerate(parts):
                    clean = {task: make_view(task, part, permutations, args.whole) for task in tasks}
                    if kind == "RS":  # the noisy images alone, not clipped (our choice)
                        clean = {task: (v + args.sigma * torch.randn_like(v), target) for task, (v, target) in clean.items()}
                    attacked = perturb(clean) if kind == "P3" and args.eps > 0 else None
                    last = i + 1 == len(parts)
                    with contextlib.nullcontext() if last or world()[1] == 1 else ddp.no_sync():
                        loss = ddp(clean, attacked, diverse) * (len(part) / len(x))
                        loss.backward()
                    whole = whole + loss.detach()
                opt.step()
                log.update(len(x), loss=whole)
                if log.interrupted():
                    break
        if log.interrupted():
            save(epoch, log.step, log.shared_sums())
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        sync_buffers(model)
        seed_step(args.seed, epoch_id, log.step)
        run.log(
            history, name, epoch + 1, epochs, lr=opt.param_groups[0]["lr"], **log.means(),
            **task_accuracy(model, tasks, val_set, permutations, run, args), seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        save(epoch + 1)
    run.save(f"{name}.pt", {
        "network": {"arch": args.arch, "width": args.width, "stem": args.stem}, "model": model.state_dict(), "args": vars(args), "task": task,
        "kind": kind, "stage": "pretrain", "epoch": epochs, "images": len(images),
    })  # fmt: skip
    return run.load(f"{name}.pt")


def warmup(step: int, args: Args) -> float:
    """Factor of the rate: from 0.1 to 1 in the first --warmup-steps (code)."""
    return min(1.0, 0.1 + 0.9 * step / max(1, args.warmup_steps))


@torch.no_grad()
def task_accuracy(model: Network, tasks: tuple[str, ...], val_set: Images, permutations: Tensor, run: Run, args: Args) -> dict[str, float]:
    """{'val_<task>': accuracy (%) on clean images}."""
    hits = torch.zeros(len(tasks) + 1, device=run.device)
    with batchnorm_mode(model, "eval"):
        for x, _ in batches(val_set, args.batch_size, run.device, workers=args.workers):
            hits[-1] += len(x)
            for i, task in enumerate(tasks):
                hits[i] += task_hits(model, task, *make_view(task, x, permutations, args.whole)).sum()
    if world()[1] > 1:
        dist.all_reduce(hits)
    return {f"val_{task}": 100 * (hits[i] / hits[-1].clamp(min=1)).item() for i, task in enumerate(tasks)}


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def inherit(model: Network, start: dict, source: str) -> int:
    """Give the classifier theta_p of a pre-training checkpoint, all of it and nothing else; returns the number of parameters (8,533,696
    for ResNet-50v2). Raises UserError if they do not fit: the published code goes on with random weights then."""
    trunk = {k: v for k, v in model.trunk.state_dict().items() if not k.startswith("layer4.")}
    found = {k.removeprefix("trunk.resnet."): v for k, v in start["model"].items() if k.startswith("trunk.resnet.")}
    if not found:
        raise UserError(f"{source} holds no pre-trained trunk; take a file such as pretrain-P3-rotation.pt.")
    wrong = [k for k in trunk.keys() | found.keys() if k not in trunk or k not in found or trunk[k].shape != found[k].shape]
    if wrong:
        raise UserError(f"{source} is of another architecture: {min(wrong)} does not fit ({len(wrong)} such; check --arch and --width).")
    model.trunk.load_state_dict(found, strict=False)  # all but layer4, as we have seen
    return sum(p.numel() for name, p in model.trunk.named_parameters() if not name.startswith("layer4."))


def shared_parts(model: Network) -> list[nn.Module]:
    """The modules of theta_p."""
    return [m for name, m in model.trunk.named_children() if name != "layer4"]


def finetune(name: str, pair: str, run: Run, args: Args, start: dict | None, train_set: Images, val_set: Images) -> dict[str, dict]:
    """F1-F4 from the pre-training checkpoint `start` (None: P1); returns the checkpoints {'ta': ..., 'ra': ...} of the epochs of best
    clean and best robust accuracy on `val_set`."""
    files = {pick: f"{name}.{pick}.pt" for pick in ("ta", "ra")}
    done = run.load(f"{name}.done.pt")
    if done is not None:  # before the run was resumed
        return {pick: run.load(file) for pick, file in files.items()}
    frozen, robust = pair[2:] in ("F1", "F2"), pair[2:] in ("F2", "F4")
    torch.manual_seed(args.seed)
    mean, std = IMAGENET_STATS  # for CIFAR too (code)
    model = build_model(args.arch, {"class": len(train_set.classes)}, width=args.width, stem=args.stem, mean=mean, std=std)
    if start is not None:
        inherit(model, start, args.init or f"the pre-training of {name}")
    place_model(model, run.device, args.amp, args.compile)
    for part in shared_parts(model) if frozen else []:
        part.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, momentum=0.9, weight_decay=args.weight_decay)
    state = run.resume(name, model, opt)
    best = state.get("best", {"ta": -1.0, "ra": -1.0})
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(model, args.sync_bn)
    steps = count_batches(len(train_set), args.batch_size)
    train_attack = pgd_attack(args.norm, args.eps, args.attack_steps, step_size=args.step_size)
    val_attack = pgd_attack(args.norm, args.eps, args.eval_steps)

    def freeze() -> None:
        for part in shared_parts(model) if frozen else []:
            part.eval()  # its BatchNorm too stays as pre-training left it

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": model.spec, "model": model.state_dict(), "optimizer": opt.state_dict(), "args": vars(args), "name": name,
            "epoch": epoch, "step": step, "sums": sums or {}, "history": history, "best": best, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], args.epochs):
        epoch_id = FIRST_ID["finetune"] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        shuffle = args.seed * 1_000_003 + epoch_id
        stream = batches(train_set, args.batch_size, run.device, shuffle=shuffle, skip=skip, workers=args.workers)
        model.train(), freeze()
        with Epoch(epoch, len(train_set), steps, run.device, skip, sums) as log:
            for x, y in stream:  # (B, 3, S, S), (B,)
                sync_buffers(model)
                seed_step(args.seed, epoch_id, log.step)
                drops = sum(epoch >= at for at in numbers(args.lr_steps))
                for group in opt.param_groups:
                    group["lr"] = args.lr * 0.1**drops * warmup(epoch * steps + log.step, args)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                if robust:
                    with batchnorm_mode(model, args.attack_bn):
                        freeze()
                        x = train_attack(lambda z: ce_per_image(model(z), y), x)
                loss = F.cross_entropy(ddp(x), y)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                log.update(len(y), loss=loss)
                if log.interrupted():
                    break
        sync_buffers(model)
        save(epoch, log.step, log.shared_sums())  # before validation too: it can be long
        if log.interrupted():
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        seed_step(args.seed, epoch_id, log.step)
        scores = validate(model, val_set, run, args, val_attack)
        run.log(
            history, name, epoch + 1, args.epochs, lr=opt.param_groups[0]["lr"], **log.means(), val_ta=scores["ta"], val_ra=scores["ra"],
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        for pick, score in scores.items():
            if score > best[pick]:
                best[pick] = score
                run.save(files[pick], {
                    "network": model.spec, "model": model.state_dict(), "args": vars(args), "name": name, "epoch": epoch + 1,
                    "stage": "train" if robust and pick == "ta" else "plain",  # what `evaluate` takes a picture of and doubts
                })  # fmt: skip
        save(epoch + 1)
    run.save(f"{name}.done.pt", {"network": {}, "model": {}})
    return {pick: run.load(file) for pick, file in files.items()}


def validate(model: Network, val_set: Images, run: Run, args: Args, attack: Callable) -> dict[str, float]:
    """Clean and robust accuracy (%) on held-out images."""

    def stream():
        return batches(val_set, args.batch_size, run.device, workers=args.workers)

    return {
        "ta": robust_accuracy(model, stream()),
        "ra": robust_accuracy(model, stream(), lambda x, y: attack(lambda z: ce_per_image(model(z), y), x)),
    }


# ---- several models: transfer of attacks, averaged predictions -------------------------------------------------------


class Average(nn.Module):
    """The mean of the models' probabilities (Table 6), as its logarithm: then cross-entropy of it is the loss of that mean, with a
    gradient that does not vanish as it would if probabilities were taken for logits."""

    def __init__(self, models: list[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        logs = torch.stack([F.log_softmax(m(x), 1) for m in self.models])  # (models, B, classes)
        return logs.logsumexp(0) - math.log(len(self.models))


def transfer(models: list[nn.Module], data: Iterable[tuple[Tensor, Tensor]], attack: Callable) -> Tensor:
    """joint[s, t, u]: share (%) of the images whose adversarial version, made for model s, fools both t and u; joint[s, t, t] is the
    attack success rate of Table 4, errors on clean images included, so that joint[s, s, s] = 100 - RA of s."""
    device = next(models[0].parameters()).device
    n = len(models)
    joint, seen = torch.zeros(n, n, n, device=device), torch.zeros((), device=device)
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(batchnorm_mode(model, "eval"))
        for x, y in data:
            seen += len(y)
            with torch.no_grad():
                wrong = torch.stack([model(x).argmax(1) != y for model in models])  # (models, B), without attack
            for s, source in enumerate(models):
                x_adv = attack(lambda z: ce_per_image(source(z), y), x)
                with torch.no_grad():
                    fooled = wrong | torch.stack([model(x_adv).argmax(1) != y for model in models])
                joint[s] += fooled.float() @ fooled.float().T
    if world()[1] > 1:
        dist.all_reduce(joint), dist.all_reduce(seen)
    return 100 * joint / seen.clamp(min=1)


def compare(run: Run, args: Args, states: dict[str, dict], test_set: Images) -> list[dict]:
    """Tables 4 and 6 and the numbers of Figure 5 for any classifiers; prints them and returns rows of results.json."""
    models, names = [], list(states)
    for name, state in states.items():
        model = build_model(**state["network"])
        load_weights(model, state["model"], name)
        models.append(place_model(model, run.device, args.amp).eval())
    attack = pgd_attack(args.norm, args.eps, args.eval_steps, generator=torch.Generator(run.device).manual_seed(args.seed + world()[0]))
    about = {"attack": f"pgd-{args.eval_steps}", "norm": args.norm, "eps": args.eps, "examples": len(test_set), "paper": None}
    rows = []

    def stream():
        return batches(test_set, args.batch_size, run.device, workers=args.workers)

    with contextlib.ExitStack() as precision:
        for model in models:
            precision.enter_context(full_precision(model))
        joint = transfer(models, stream(), attack).tolist()
        for s, t in itertools.product(range(len(names)), repeat=2):
            rows.append(about | {"name": f"{names[s]} -> {names[t]}", "accuracy": round(100 - joint[s][t][t], 2)})
        run.say("\nAttack success rate (%), Table 4: columns made for, rows evaluated\n")
        if world()[0] == 0:
            print_table(["", *names], [[names[t], *(f"{joint[s][t][t]:.2f}" for s in range(len(names)))] for t in range(len(names))])
        for s in range(len(names)):
            for t, u in itertools.combinations([i for i in range(len(names)) if i != s], 2):
                both = joint[s][t][u]
                run.say(
                    f"Figure 5, made for {names[s]}: fools both others {both:.2f}%, {names[t]} only {joint[s][t][t] - both:.2f}%, "
                    f"{names[u]} only {joint[s][u][u] - both:.2f}%"
                )
        table = []
        for k in range(1, len(names) + 1):
            for chosen in itertools.combinations(range(len(names)), k):
                average = Average([models[i] for i in chosen])
                label = " + ".join(names[i] for i in chosen)
                clean = robust_accuracy(average, stream())
                robust = robust_accuracy(average, stream(), lambda x, y: attack(lambda z: ce_per_image(average(z), y), x))  # noqa: B023
                rows += [about | {"name": label, "accuracy": round(robust, 2)}, about | {"name": label, "attack": "none", "eps": 0, "accuracy": round(clean, 2)}]
                table.append([label, f"{clean:.2f}", f"{robust:.2f}"])
    run.say(f"\nAveraged predictions, Table 6 (the paper: {'; '.join(PAPER_TABLE6)})\n")
    if world()[0] == 0:
        print_table(["models", "TA", "RA"], table)
    return rows


# ---- the run -------------------------------------------------------------------------------------------------------


def cells(args: Args) -> list[tuple[str, str]]:
    """[(task, pair)] of Table 3 that are asked for; P1 has no task."""
    tasks = TASKS if args.table3 or args.task == "all" else (args.task,)
    kind, last = ("all", "all") if args.table3 else (args.pretrain, args.finetune)
    if args.task == "ensemble" and "all" in (kind, last):
        kind, last = "P3", "F4"  # Table 5
    pairs = [pair for pair in (*PAIRS, "RSF2", "RSF4") if kind in (pair[:2], "all" if pair in PAIRS else "") and last in (pair[2:], "all")]
    if "all" not in (kind, last):
        pairs = [kind + last]
    return list(dict.fromkeys(("" if pair.startswith("P1") else task, pair) for task in tasks for pair in pairs))


def label(task: str, pair: str) -> str:
    """'rotation-P3F4', the name of a cell's files; P1 has no task."""
    return f"{task}-{pair}" if task else pair


def main(args: Args) -> dict:
    """Pre-train, fine-tune, evaluate, print the tables; returns what results.json holds."""
    numbers(args.lr_steps)  # raises if it is none
    if args.stage == "compare" and not args.models:
        raise UserError("--stage compare wants checkpoints: python chen_pretrain_finetune.py --stage compare runs/X/*.ta.pt")
    if args.models and args.stage != "compare":
        raise UserError(f"{args.models[0]}: checkpoints are for --stage compare (--init takes a pre-trained trunk).")
    if args.norm == "l2" and args.task in ("ensemble", "all") and args.dpe_lambda > 0 and args.stage != "compare":
        raise UserError("--task ensemble has three images in one attack, so --norm l2 would be a ball around all three; use linf.")
    if args.image_size % args.grid and (args.table3 or args.task != "rotation"):
        raise UserError(f"--image-size {args.image_size} is no multiple of --grid {args.grid}.")
    # Besides, PyTorch 2.15's bf16 double backward of a 3x3 convolution with stride 2 on a single pixel gives inf now and then (CPU).
    if args.image_size < 4 * args.grid and (args.table3 or args.task not in ("rotation", "jigsaw")):
        raise UserError(f"--image-size {args.image_size}: Selfie's patches would be smaller than 4 pixels, the trunk's stride; take {4 * args.grid} or more.")
    if args.init and (len(cells(args)) > 1 or cells(args)[0][0] == ""):
        raise UserError("--init is for one cell with pre-training: name one --task, --pretrain and --finetune.")
    run = start_run(args, "chen_pretrain_finetune")
    results = run.finished() or run_cells(run, args)
    if results and world()[0] == 0:
        show(results, str(run.folder))
    return results


def run_cells(run: Run, args: Args) -> dict:
    """All cells asked for, each pre-training once; a resumed run goes on in the cell, or the evaluation, that was interrupted."""
    given = load_checkpoint(args.init) if args.init else None
    states = {str(Path(file).name).removesuffix(".pt"): load_checkpoint(file) for file in args.models}
    train_set, val_set, test_set = load_splits(args, run.device)
    images = train_set
    if args.extra_data:
        images = join(train_set, load_extra(args.extra_data, args.image_size, run.device))
    if args.pretrain_images > len(images):
        raise UserError(f"--pretrain-images {args.pretrain_images}: there are {len(images)} (see --extra-data).")
    if args.pretrain_images:
        images = draw(images, args.pretrain_images, seed=args.seed)
    for name, state in states.items():
        if state["network"].get("heads", {}).get("class") != len(test_set.classes):
            raise UserError(f"{name} is no classifier of the {len(test_set.classes)} classes of {args.dataset}.")
    if given:
        inherit(build_model(args.arch, {"class": 1}, width=args.width, stem=args.stem), given, args.init)  # does it fit?
    run.begin()
    began = time.perf_counter()
    if args.stage == "compare":
        return write_results(run, compare(run, args, states, test_set), time.perf_counter() - began)
    done = run.read("judged.json") or {"rows": []}
    rows, models = done["rows"], {}
    for task, pair in cells(args):
        start = None if pair.startswith("P1") else given or pretrain(task, pair[:2], run, args, images, val_set)
        if args.stage == "pretrain":
            continue
        name = label(task, pair)
        picks = finetune(name, pair, run, args, start, train_set, val_set)
        models[name] = picks["ta"]
        if any(row["name"] == name for row in rows):
            continue
        for pick, state in picks.items():
            if pick == "ra" and state["epoch"] == picks["ta"]["epoch"]:  # the same network
                judged = [row | {"pick": "ra"} for row in rows[-2:]]
            else:
                judged = evaluate(run, name, state, test_set, [0, args.eps], {})
            known = paper(task, pair, args)
            epochs = {"best_epoch": picks["ra"]["epoch"], "task": task, "pair": pair, "pick": pick}
            rows += [row | epochs | {"paper": number} for row, number in zip(judged, known, strict=True)]
        run.write("judged.json", json.dumps({"script": "chen_pretrain_finetune", "rows": rows}, indent=1))
    if args.stage == "pretrain":
        run.say(f"The pre-trained trunks are in {run.folder}; go on with --init.")
        return {}
    finals = {name: state for name, state in models.items() if name in {f"{task}-P3F4" for task in TASKS}}
    if len(finals) > 1:
        rows = rows + compare(run, args, finals, test_set)
    last = run.load("last.pt")
    return write_results(run, rows, last["seconds"] if last else 0.0)


def paper(task: str, pair: str, args: Args) -> tuple[float | None, float | None]:
    """The paper's (TA, RA) of a cell, if the run has the settings it states."""
    usual = vars(Args())
    stated = ("dataset", "image_size", "arch", "width", "stem", "epochs", "batch_size", "lr", "lr_steps", "norm", "eps", "attack_steps", "label_fraction",
              "extra_data", "pretrain_images", "pretrain_lr", "val_fraction", "eval_attack", "eval_steps", "eval_examples", "eval_amp", "init")  # fmt: skip
    if any(getattr(args, k) != usual[k] for k in stated):
        return None, None
    key = {True: "dpe", False: "se"}[args.dpe_lambda > 0] if task == "ensemble" else task
    return PAPER.get((key, pair), (None, None, None))[:2]


def show(results: dict, folder: str) -> None:
    """Print Table 3: a line per pair, TA, RA and the epoch of best RA per task, the paper's below where the setting is its own."""
    args = results["args"]
    rows = [row for row in results["rows"] if "pair" in row and row["pick"] == ("ta" if args["select"] == "clean" else "ra")]
    if rows:
        tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task] or [""]
        table = []
        for pair in dict.fromkeys(row["pair"] for row in rows):
            mine = {row["task"]: (row, other) for row, other in zip(rows[::2], rows[1::2], strict=True) if row["pair"] == pair}
            ours, papers = [pair], ["  the paper"]
            for task in tasks:
                clean, robust = mine.get(task) or mine.get("") or ({}, {})
                ours += [f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}", str(clean["best_epoch"])] if clean else [""] * 3
                known = clean.get("paper") is not None
                papers += [f"{clean['paper']:.2f}", f"{robust['paper']:.2f}", ""] if known else [""] * 3
            table += [ours] + ([papers] if any(papers[1:]) else [])
        attack = rows[1]["attack"]
        print(
            f"\n{args['dataset']}, {args['arch']} x{args['width']:g}; TA: clean accuracy (%), RA: under {attack.upper()} ({args['norm']} eps "
            f"{eps_name(args['eps'])}), on {rows[0]['examples']:,} test images; epoch: that of the best RA on held-out images.\n"
            f"Checkpoints: best {'TA' if args['select'] == 'clean' else 'RA'} on held-out images. {results['seconds']:.0f} s of training.\n"
        )
        print_table(["", *(f"{task} {what}".strip() for task in tasks for what in ("TA", "RA", "epoch"))], table)
    print(f"\nresults.json and the checkpoints are in {folder}", flush=True)


if __name__ == "__main__":
    cli(main, Args)
