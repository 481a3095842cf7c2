"""Adversarial self-supervised pre-training, then fine-tuning (Chen, Liu, Chang, Cheng, Amini, Wang: Adversarial
robustness: from self-supervised pre-training to fine-tuning, CVPR 2020).

Pre-training teaches a trunk theta_p (the stem and first three stages of a ResNet-50v2) a task without labels;
fine-tuning puts a new last stage and a linear layer theta_f on it and learns the classes. Either may be adversarial
(eq. 1: minimise E max over delta of the loss):

    P1  none                                F1  theta_f only, theta_p frozen, clean images (ST)
    P2  the task on clean images            F2  theta_f only, adversarial training (AT)
    P3  the task, adversarially             F3  everything, ST
    RS  the task on noisy images (Table 8)  F4  everything, AT

Tasks: rotation (which of 4 turns), jigsaw (which of 31 permutations of 4 x 4 tiles), Selfie (which of the masked
patches belongs here), and all three at once (eq. 2-4), each on its own perturbed image:

    minimise over theta, maximise over delta:  sum_i loss_i(x + delta_i) + lambda log det(G^T G),  G = normalised input gradients

log det(G^T G) <= 0 is largest where the tasks' gradients are orthogonal: the attack looks for diverse directions, the
weights are trained against them (so eq. 2-3 and the code; Pang et al., whom the paper follows, let the weights maximise
it).

    python chen_pretrain_finetune.py --quick                                # digits, rotation, the eight pairs of Table 3
    python chen_pretrain_finetune.py --task selfie --pretrain P3 --finetune F4   # one cell of Table 3
    python chen_pretrain_finetune.py --table3                               # all 24 (20 runs: P1 has no task), then Tables 4-6
    python chen_pretrain_finetune.py --task ensemble                        # Table 5: AP+DPE; AP+SE: --dpe-lambda 0
    python chen_pretrain_finetune.py --stage compare runs/X/*P3F4.ta.pt     # Tables 4 and 6, Figure 5, of any checkpoints
    python eval_unforeseen.py runs/X/rotation-P3F4.ta.pt                    # Figures 3 and 4, Kang et al.'s attacks
    torchrun --nproc-per-node=8 chen_pretrain_finetune.py --table3

The paper, CIFAR-10, linf 8/255, clean / PGD-20: P1F4 84.72 / 47.22, P3F4 of Selfie 86.02 / 51.05, of three models 86.04
/ 54.64.

Differs from the paper, or from its published code where that says more, or is our choice where both are silent:
- eq. 1 prints an l2 ball; the numbers are of linf 8/255, steps of 2/255, PGD-10 in training and PGD-20 in evaluation
  (the code's; the paper's section 4.2, which our copy lacks, says the same, from memory);
- an adversarial pre-training step averages the loss over tasks and over clean and attacked images (code; eq. 1 has the
  attacked ones only), and adds lambda log det undivided; the attack sums the tasks' losses (eq. 3);
- pre-training hands on its last epoch (the code keeps the best on held-out images, for jigsaw on the test set); "TA"
  and "RA" of fine-tuning pick the epoch by clean or PGD-20 accuracy on 10% of the training images, which are not
  augmented (in the code they are);
- BatchNorm uses batch statistics in training attacks (code), but these passes leave the running ones alone (in the code
  they do not);
- Selfie: cross-entropy of a softmax of a softmax (code; --no-double-softmax), summed over the masked places, 13 layers,
  one order of patches for the whole batch (on each GPU), exact GELU (code: tanh);
- the ensemble's trunk has the stem's BatchNorm, which the published one lacks; frozen parts stay in eval mode (F1, F2
  were not published);
- gradients in G are of the turned, the shuffled and the upright image, as in the code: they are what the attack
  follows. --frames aligned turns and unshuffles them first;
- from the code: ImageNet's mean and deviation for CIFAR, 30 random orders of jigsaw and an image whole with probability
  0.1 besides, as many of each turn in a batch, Selfie with a smaller crop and no flip;
- averaged models (Table 6): the mean of their probabilities, attacked through its logarithm;
- Table 7's images are from 80 Million Tiny Images, which has been withdrawn (ours: CIFAR-10's own and --extra-data),
  and its task is not named (ours: --task);
- RS trains on the noisy images alone, not clipped, sigma 0.25 (the paper gives neither);
- rates: batch 256; fine-tuning 0.1, divided by 10 at epochs 30 and 50; pre-training 0.1, Selfie 0.025, ensemble 0.001,
  cosine: so the published version's section 4.2, from memory, as our copy lacks it; a warm-up of 200 steps (not for
  Selfie and the ensemble) and the epochs of pre-training are the code's. No Nesterov (code: in Selfie and the
  ensemble). The code's fine-tuning: --batch-size 128 --lr-steps 60,80; in pre-training it also has other batches (256,
  128, 80), Selfie's rate 0.1 and weight decay 5e-4 for standard jigsaw.
"""
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    IMAGENET_STATS, Epoch, Images, Network, OldRun as Run, UserError, batches, batchnorm_mode,
    build_model, build_trunk, ce_per_image, check_args, check_batches, check_classifier, old_cli as cli,
    count_batches, distribute, draw, eps_name, old_evaluate as evaluate, full_precision, jigsaw,
    jigsaw_permutations, join, learning_rate, load_checkpoint, load_extra, load_splits, load_weights,
    old_numbers as numbers, patchify, pgd, place_model, print_table, random_crop_flip, rebuild,
    robust_accuracy, rotate, seed_step, old_start_run as start_run, sync_buffers, progress as
    with_progress, world, write_results,
)  # fmt: skip

TASKS = ("selfie", "rotation", "jigsaw")
Views = dict[str, tuple[Tensor, Tensor]]  # {task: (images (B, 3, S, S), target: (B,), of Selfie the order of patches)}
PAIRS = ("P1F3", "P1F4", "P2F3", "P2F4", "P3F1", "P3F2", "P3F3", "P3F4")  # the rows of Table 3


@dataclass
class Args:
    models: tuple[str, ...] = ()  # checkpoints for --stage compare
    # run
    stage: Literal["all", "pretrain", "compare"] = "all"  # pretrain: no fine-tuning; compare: transfer and ensembles of MODELS
    init: str = ""  # take the trunk of this checkpoint (pretrain-*.pt of a run) in place of pre-training
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/<script>[-quick]-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest in runs/ with the same arguments), or start it
    quick: bool = False  # a miniature on the bundled digits: Table 3 for one task in two minutes on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    label_fraction: float = 1.0  # share of the training images that is used, in pre-training too, at most those not held out for validation
    extra_data: str = ""  # FILE.npz or .npy with more images for pre-training, uint8 (N, size, size, 3)
    pretrain_images: int = 0  # number of images to pre-train on, drawn at random (Table 7); 0: all
    flip: bool = True  # mirror images at random in training (never in Selfie's pre-training, as in the code)
    arch: Literal["resnet26v2", "resnet50v2"] = "resnet50v2"  # trunk (paper: resnet50v2)
    width: float = 1.0  # multiplies the number of channels
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer. cifar: 3x3; imagenet: 7x7 with stride 2 and max-pooling, for large images
    # optimiser: SGD with momentum 0.9
    epochs: int = 100  # epochs of fine-tuning
    batch_size: int = 256  # images per step over all GPUs (paper: 256; restricted ImageNet 64)
    lr: float = 0.1  # initial learning rate of fine-tuning
    lr_steps: str = "30,50"  # epochs at which the rate of fine-tuning is divided by 10 (code: 60,80)
    weight_decay: float = 3e-4  # weight decay, on all weights (code); a third of it in pre-training with Selfie and the ensemble
    warmup_steps: int = 200  # steps in which the rate rises from a tenth, at the start of fine-tuning and of pre-training with rotation or jigsaw (code)
    pretrain_epochs: int = 0  # epochs of pre-training; 0: rotation and jigsaw 100 (P2: 200), Selfie 200, ensemble 150 (code)
    pretrain_lr: float = 0.0  # highest rate of pre-training, then a cosine; 0: rotation and jigsaw 0.1, Selfie 0.025, ensemble 0.001
    # attack in training
    norm: Literal["linf", "l2"] = "linf"  # norm of the ball that the attack stays in
    eps: float = 8 / 255  # radius of that ball, in [0, 1] pixel units (paper: 8/255)
    attack_steps: int = 10  # PGD steps in training (paper: 10)
    step_size: float = 0.0  # length of a step in training; 0: linf 2/255 (or more if eps is large), l2 2 eps / steps
    attack_bn: Literal["eval", "train"] = "train"  # BatchNorm mode under attack in training (train: the code's)
    # method
    task: Literal["selfie", "rotation", "jigsaw", "ensemble", "all"] = "rotation"  # task of pre-training; ensemble: all three at once; all: one after the other
    pretrain: Literal["P1", "P2", "P3", "RS", "all"] = "P3"  # how to pre-train: P1 not, P2 on clean, P3 on attacked, RS on noisy images; all: the rows of Table 3
    finetune: Literal["F1", "F2", "F3", "F4", "all"] = "F4"  # how to fine-tune: F1 the new part, F3 everything, on clean images; F2, F4 the same on attacked ones
    table3: bool = False  # the 24 cells of Table 3: all tasks, all pairs; each pre-training is done once
    # tasks
    grid: int = 4  # jigsaw tiles and Selfie patches per side
    num_permutations: int = 30  # permutations of jigsaw besides the identity
    whole: float = 0.1  # probability that jigsaw leaves an image whole, besides that of drawing the identity (code)
    double_softmax: bool = True  # Selfie's loss takes a softmax of the scores for scores, as in the code
    dpe_lambda: float = 0.1  # lambda of eq. 3: weight of the diversity of gradients; 0: AP+SE
    frames: Literal["own", "aligned"] = "own"  # compare the ensemble's gradients as the tasks see the image (own), or turned and unshuffled to the upright image (aligned)
    low_memory: bool = False  # the ensemble's tasks one after the other: the same gradients with a third of the memory in 1.5 times as long
    sigma: float = 0.25  # sigma: standard deviation of the noise of RS (the paper gives no value)
    # evaluation
    val_fraction: float = 0.1  # share of the training images held out to select the model (section 4.1)
    select: Literal["clean", "robust"] = "clean"  # print and compare the epoch of best clean (TA) or of best robust (RA) validation accuracy; both are kept and evaluated
    eval_attack: Literal["pgd20", "suite", "suite-fast", "standard"] = "pgd20"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it; standard: AutoAttack without FAB
    eval_steps: int = 20  # PGD steps in evaluation (paper: 20)
    eval_examples: int = 0  # test images to evaluate on, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=12, grid=3, flip=False, arch="resnet26v2", width=0.125, pretrain="all", finetune="all", epochs=7, batch_size=128,
        lr_steps="4,6", warmup_steps=10, pretrain_epochs=5, eps=0.1, attack_steps=5, num_permutations=10, val_fraction=0.06, eval_steps=10,
        eval_examples=240,
    )  # fmt: skip


# ---- the tasks -----------------------------------------------------------------------------------------------------


class Selfie(nn.Module):
    """Attention pooling (Trinh et al. 2019): what the visible patches say about a masked one is compared with all masked ones."""

    def __init__(self, dim: int, grid: int, layers: int = 13):
        super().__init__()
        self.grid, self.masked = grid, grid * grid // 4  # a quarter
        self.first = nn.Parameter(torch.zeros(1, 1, dim))  # its output stands for all visible patches
        heads = max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)  # of 64 channels at full width
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, activation=F.gelu, batch_first=True)  # dropout 0.1
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.row, self.col = nn.Parameter(torch.randn(grid, dim)), nn.Parameter(torch.zeros(grid, dim))  # (code)

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
        last_stages = [self.resnet.layer4, build_trunk(args.arch, args.width, args.stem).layer4]  # one for rotation, one for jigsaw
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
        pieces = patchify(x, x.shape[2] // self.grid)  # (B, N, 3, S/n, S/n)
        maps = self.resnet.shared(pieces.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return self.branches[task](maps.mean((2, 3)).unflatten(0, pieces.shape[:2]), target)


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
    return x, torch.randperm(permutations.shape[1], device=device)  # (patches,)


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

    def task_loss(self, task: str, x: Tensor, target: Tensor) -> Tensor:
        """Loss per image (B,)."""
        return task_loss(self.model, task, x, target, self.args.double_softmax)

    def diversity(self, views: Views, gradients: Iterable[Tensor]) -> Tensor:
        """Eq. 4 per image (B,), of the gradients for the tasks' images."""
        if self.args.frames == "aligned":
            gradients = [to_upright(task, g, views[task][1], self.permutations) for task, g in zip(views, gradients, strict=True)]
        return log_det(list(gradients))

    def adversarial(self, views: Views, diverse: bool) -> tuple[Tensor, Tensor]:
        """Per image: (sum of the tasks' losses (B,), eq. 4 (B,), or zeros if not `diverse`)."""
        with sdpa_kernel(SDPBackend.MATH) if diverse else contextlib.nullcontext():  # fused attention has no second derivative
            total = sum(self.task_loss(task, x, target) for task, (x, target) in views.items())
        if not diverse:
            return total, torch.zeros_like(total)
        # A task's loss depends on that task's images only, so one call gives all gradients (with BatchNorm's batch statistics, of all its images).
        gradients = torch.autograd.grad(total.sum(), [x for x, _ in views.values()], create_graph=True)
        return total, self.diversity(views, gradients)

    def forward(self, clean: Views, attacked: Views | None, diverse: bool) -> Tensor:
        """The loss to be minimised: mean over the images and tasks, over clean and attacked images, plus lambda times eq. 4: the weights lower
        what the attack raises."""
        loss = self.adversarial(clean, False)[0].mean() / len(clean)
        if attacked is None:
            return loss
        if diverse:
            attacked = {task: (x.detach().requires_grad_(), target) for task, (x, target) in attacked.items()}
        total, h = self.adversarial(attacked, diverse)
        return 0.5 * (loss + total.mean() / len(clean)) + self.args.dpe_lambda * h.mean()

    # The same with the graph of one task at a time (--low-memory). Eq. 4 is a function of the gradients g_i, so its derivative through g_i
    # is that of <v_i, g_i> with v_i = dh/dg_i held constant. Each task is passed through once more for that, with the same dropout.

    def one_by_one(self, views: Views) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """(lambda * eq. 4 (B,), for each task: its images as a leaf, its loss (B,), a term (B,) with the derivatives of lambda * eq. 4)."""
        seed, lam = int(torch.randint(2**31, ())), self.args.dpe_lambda

        def gradient(i: int, task: str, create_graph: bool) -> tuple[Tensor, Tensor, Tensor]:
            x = views[task][0].detach().requires_grad_()
            with torch.random.fork_rng([x.device] if x.is_cuda else []), sdpa_kernel(SDPBackend.MATH):
                torch.manual_seed(seed + i)
                loss = self.task_loss(task, x, views[task][1])
            return x, loss, torch.autograd.grad(loss.sum(), x, create_graph=create_graph)[0]

        def with_terms(weights: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for i, (task, v) in enumerate(zip(views, weights, strict=True)):
                x, loss, g = gradient(i, task, True)
                yield x, loss, lam * (v * g).flatten(1).sum(1)

        def without() -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # AP+SE
            for task, (x, target) in views.items():
                x = x.detach().requires_grad_()
                loss = self.task_loss(task, x, target)
                yield x, loss, torch.zeros_like(loss)

        if lam == 0:
            return torch.zeros(len(next(iter(views.values()))[0]), device=self.permutations.device), without()
        with batchnorm_mode(self.model, "train" if self.model.training else "eval"):  # moves no running statistics
            gradients = [gradient(i, task, False)[2].requires_grad_() for i, task in enumerate(views)]
        h = self.diversity(views, gradients)
        return lam * h.detach(), with_terms(torch.autograd.grad(h.sum(), gradients))

    def image_gradient(self, views: Views) -> Tensor:
        """Gradient of eq. 3 for the images, (B, 3 * tasks, S, S)."""
        return torch.cat([torch.autograd.grad((loss + term).sum(), x)[0] for x, loss, term in self.one_by_one(views)[1]], 1)

    def backward(self, clean: Views, attacked: Views) -> Tensor:
        """loss.backward() of what `forward` returns, and its value; with several ranks averaged over them."""
        value = torch.zeros((), device=self.permutations.device)
        for task, (x, target) in clean.items():
            loss = 0.5 * self.task_loss(task, x, target).mean() / len(clean)
            loss.backward()
            value += loss.detach()
        diversity, passes = self.one_by_one(attacked)
        for _, loss, term in passes:
            loss = 0.5 * loss.mean() / len(clean)
            (loss + term.mean()).backward()
            value += loss.detach()
        if world()[1] > 1:
            for p in self.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world()[1]
        return value + diversity.mean()


# ---- pre-training --------------------------------------------------------------------------------------------------

# Added to an epoch's number, so that the two kinds of training draw other random numbers.
FIRST_ID = {"pretrain": 0, "finetune": 100_000}


def recipe(task: str, kind: str, args: Args) -> tuple[int, float, float, int, float]:
    """(epochs, highest rate, lowest rate, steps of warm-up, weight decay) of pre-training."""
    epochs = {"selfie": 200, "ensemble": 150}.get(task, 200 if kind == "P2" else 100)
    high = {"selfie": 0.025, "ensemble": 0.001}.get(task, 0.1)
    low = 1e-8 if task == "ensemble" else 1e-6
    steps, decay = (0, args.weight_decay / 3) if task in ("selfie", "ensemble") else (args.warmup_steps, args.weight_decay)
    return args.pretrain_epochs or epochs, args.pretrain_lr or high, low, steps, decay


def warmup(step: int, steps: int) -> float:
    """Factor of the rate: from 0.1 to 1 in the first `steps` steps of a training (code)."""
    return min(1.0, 0.1 + 0.9 * step / steps) if steps else 1.0


def pretrain(task: str, kind: str, run: Run, args: Args, images: Images, val_set: Images) -> dict:
    """P2, P3 or RS on one task, or on the ensemble of all; returns the checkpoint of the last epoch."""
    name = f"pretrain-{kind}-{task}"
    if (done := run.load(f"{name}.pt")) is not None:
        return done  # before the run was resumed
    tasks = TASKS if task == "ensemble" else (task,)
    epochs, high, low, warmup_steps, decay = recipe(task, kind, args)
    torch.manual_seed(args.seed)
    model = Network(Pretext(tasks, args), {}, *IMAGENET_STATS)
    diverse = len(tasks) > 1 and args.dpe_lambda > 0
    place_model(model, run.device, args.amp, args.compile and not diverse)  # what is compiled has no second derivative
    if diverse:
        fast_second_derivatives(model)
        if model.amp == torch.float16:  # whose gradient scale would be taken off the second derivatives once too often
            run.say("note: float16 has no place for second derivatives; this pre-training computes in float32.")
            model.amp = None
    count = args.num_permutations if "jigsaw" in tasks else 0
    permutations = jigsaw_permutations(args.grid, count, args.seed).to(run.device)
    objective = Objective(model, permutations, args)
    opt = torch.optim.SGD(model.parameters(), high, momentum=0.9, weight_decay=decay)
    state = run.resume(name, model, opt)
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(objective, args.sync_bn)
    steps = count_batches(len(images), args.batch_size)
    attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)
    low_memory = args.low_memory and len(tasks) > 1

    def perturb(views: Views) -> Views:
        """Each task's image gets a perturbation of its own; together they maximise eq. 3: the images lie one after the other in the
        channels, so that it is one attack."""

        def split(z: Tensor) -> Views:  # (B, 3 * tasks, S, S)
            return {task: (x, target) for x, (task, (_, target)) in zip(z.split(3, 1), views.items(), strict=True)}

        def loss(z: Tensor) -> Tensor:  # (B,)
            if low_memory:
                return (z * objective.image_gradient(split(z))).flatten(1).sum(1)  # its gradient is what the attack wants
            total, h = objective.adversarial(split(z), diverse)
            return total + args.dpe_lambda * h

        with batchnorm_mode(model, args.attack_bn), input_gradients_only(model):
            return split(attack(loss, torch.cat([x for x, _ in views.values()], 1)))

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
                step = epoch * steps + log.step
                for group in opt.param_groups:  # half a cosine
                    group["lr"] = learning_rate(high, step, 0, epochs * steps, low) * warmup(step, warmup_steps)
                selfie = task == "selfie"  # crops less and is not mirrored (code)
                x = random_crop_flip(x, pad=args.image_size // (16 if selfie else 8), flip=args.flip and not selfie)
                clean = {task: make_view(task, x, permutations, args.whole) for task in tasks}
                if kind == "RS":  # the noisy images alone, not clipped (our choice)
                    clean = {task: (v + args.sigma * torch.randn_like(v), target) for task, (v, target) in clean.items()}
                attacked = perturb(clean) if kind == "P3" and args.eps > 0 else None
                opt.zero_grad(set_to_none=True)
                if low_memory and attacked:
                    loss = objective.backward(clean, attacked)
                else:
                    loss = ddp(clean, attacked, diverse)
                    loss.backward()
                opt.step()
                log.update(len(x), loss=loss)
                if log.interrupted():
                    break
        sync_buffers(model)
        save(epoch, log.step, log.shared_sums())  # before validation too: it can be long
        if log.interrupted():
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
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


def inherit(model: Network, start: dict, source: str) -> None:
    """Give the classifier theta_p of a pre-training checkpoint, all of it and nothing else (8,533,696 parameters of ResNet-50v2).
    Raises UserError if they do not fit: the published code goes on with random weights then."""
    own_stage = {k: v for k, v in model.trunk.state_dict().items() if k.startswith("layer4.")}
    found = {k.removeprefix("trunk.resnet."): v for k, v in start["model"].items() if k.startswith("trunk.resnet.")}
    if not found:
        raise UserError(f"{source} holds no pre-trained trunk; take a file such as pretrain-P3-rotation.pt.")
    load_weights(model.trunk, found | own_stage, source)


def shared_parts(model: Network) -> list[nn.Module]:
    """The modules of theta_p."""
    return [m for name, m in model.trunk.named_children() if name != "layer4"]


def finetune(name: str, pair: str, run: Run, args: Args, start: dict | None, train_set: Images, val_set: Images) -> dict[str, dict]:
    """F1-F4 from the pre-training checkpoint `start` (None: P1); returns the checkpoints {'ta': ..., 'ra': ...} of the epochs of best
    clean and best robust accuracy on `val_set`."""
    files = {pick: f"{name}.{pick}.pt" for pick in ("ta", "ra")}
    done = run.load(f"{name}.done.pt")
    if done is not None:  # before the run was resumed
        return {pick: run.require(file) for pick, file in files.items()}
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
    train_attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)
    val_attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.eval_steps)

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
        drops = sum(epoch >= at for at in numbers(args.lr_steps, "lr-steps"))
        model.train()
        freeze()
        with Epoch(epoch, len(train_set), steps, run.device, skip, sums) as log:
            for x, y in stream:  # (B, 3, S, S), (B,)
                sync_buffers(model)
                seed_step(args.seed, epoch_id, log.step)
                step = epoch * steps + log.step
                for group in opt.param_groups:
                    group["lr"] = args.lr * 0.1**drops * warmup(step, args.warmup_steps)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                x_adv = x
                if robust:
                    with batchnorm_mode(model, args.attack_bn):
                        freeze()
                        x_adv = train_attack(lambda z: ce_per_image(model(z), y), x)
                loss = F.cross_entropy(ddp(x_adv), y)
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
            history, name, epoch + 1, args.epochs, lr=opt.param_groups[0]["lr"], **log.means(), val_clean=scores["ta"], val_robust=scores["ra"],
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        for pick, score in scores.items():
            if score > best[pick]:
                best[pick] = score
                run.save(files[pick], {
                    "network": model.spec, "model": model.state_dict(), "args": vars(args), "name": name, "epoch": epoch + 1,
                    "stage": "train" if robust else "plain", "pick": pick,
                })  # fmt: skip
        save(epoch + 1)
    run.save(f"{name}.done.pt", {"network": {}, "model": {}})
    return {pick: run.require(file) for pick, file in files.items()}


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
    """joint[s, t, u]: share (%) of the images whose adversarial version, made for model s, both t and u get wrong; joint[s, t, t] is the
    attack success rate of Table 4 (of all images, footnote 2). s itself is also fooled by what it gets wrong without attack, so that
    joint[s, s, s] = 100 - RA of s."""
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
                    fooled = torch.stack([model(x_adv).argmax(1) != y for model in models])
                fooled[s] |= wrong[s]
                joint[s] += fooled.float() @ fooled.float().T
    if world()[1] > 1:
        dist.all_reduce(joint), dist.all_reduce(seen)
    return 100 * joint / seen.clamp(min=1)


def compare(run: Run, args: Args, states: dict[str, dict], test_set: Images) -> list[dict]:
    """Tables 4 and 6 and Figure 5 for any classifiers: rows of results.json."""
    models = {}
    for name, state in states.items():
        models[name] = place_model(rebuild(state, name), run.device, args.amp).eval()
    attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.eval_steps)
    about = {"attack": f"pgd-{args.eval_steps}", "norm": args.norm, "eps": args.eps, "examples": len(test_set)}
    usual = as_usual(vars(args), EVALUATION) and all(as_usual(state.get("args", {}), TRAINING) and state.get("pick") == "ta" for state in states.values())
    tasks = {name: str(state.get("name")).removesuffix("-P3F4") if usual else "" for name, state in states.items()}
    usual = usual and len(set(tasks.values())) == len(tasks)  # not two networks of one task

    def stream(label: str) -> Iterable[tuple[Tensor, Tensor]]:
        torch.manual_seed(args.seed + world()[0])
        return with_progress(batches(test_set, args.batch_size, run.device, workers=args.workers), len(test_set), label)

    rows = []
    with contextlib.ExitStack() as precision:
        for model in models.values():
            precision.enter_context(full_precision(model, not args.eval_amp))
        joint = transfer(list(models.values()), stream("transfer"), attack).tolist()
        for (s, made_for), (t, other) in itertools.product(enumerate(models), repeat=2):
            known = PAPER_TABLE4.get((tasks[made_for], tasks[other])) if usual else None
            rows.append(about | {
                "kind": "transfer", "name": f"{made_for} -> {other}", "source": made_for, "target": other,
                "accuracy": round(100 - joint[s][t][t], 2), "paper": None if known is None else round(100 - known, 2),
            })  # fmt: skip
        for s, made_for in enumerate(models):
            for (t, a), (u, b) in itertools.combinations([(t, name) for t, name in enumerate(models) if t != s], 2):
                rows.append(about | {
                    "kind": "venn", "name": f"{made_for} -> {a} and {b}", "source": made_for, "target": a, "other": b,
                    "accuracy": round(100 - joint[s][t][u], 2), "paper": None,
                })  # fmt: skip
        sizes = range(1, len(models) + 1) if len(models) <= 4 else (1, len(models))
        for subset in itertools.chain.from_iterable(itertools.combinations(models, k) for k in sizes):
            average = Average([models[name] for name in subset])
            row = about | {"kind": "average", "name": " + ".join(subset), "models": list(subset)}
            known = PAPER_TABLE6.get(frozenset(tasks[name] for name in subset) if usual else None, (None, None))
            clean = robust_accuracy(average, stream(row["name"]))
            robust = robust_accuracy(average, stream(row["name"]), lambda x, y: attack(lambda z: ce_per_image(average(z), y), x))  # noqa: B023
            rows.append(row | {"attack": "none", "eps": 0, "accuracy": round(clean, 2), "paper": known[0]})
            rows.append(row | {"accuracy": round(robust, 2), "paper": known[1]})
    return rows


# ---- the paper's numbers, the tables -------------------------------------------------------------------------------

# (TA, RA, epochs) in Tables 3, 5 (se, dpe) and 8: {(task, pair): ...}; P1 has no task. RSF4 of jigsaw is printed so: P2F4's numbers once more.
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
PAPER_TABLE4 = {  # attack success rate (%): {(made for, evaluated): ...}
    ("selfie", "selfie"): 48.95, ("rotation", "selfie"): 37.75, ("jigsaw", "selfie"): 36.65,
    ("selfie", "rotation"): 38.92, ("rotation", "rotation"): 49.60, ("jigsaw", "rotation"): 38.12,
    ("selfie", "jigsaw"): 38.96, ("rotation", "jigsaw"): 39.56, ("jigsaw", "jigsaw"): 51.17,
}  # fmt: skip
PAPER_TABLE5_JIGSAW = (83.74, 48.83, 48)  # so too Figure 1 and, as 51.17, Table 4: not the network of Table 3
PAPER_TABLE6 = {
    frozenset(("jigsaw", "rotation")): (85.36, 53.08), frozenset(("jigsaw", "selfie")): (85.64, 53.32),
    frozenset(("rotation", "selfie")): (86.51, 53.83), frozenset(TASKS): (86.04, 54.64),
}  # fmt: skip
PAPER_TABLE7 = {  # (TA, RA, epochs), by number of images to pre-train on, from 80 Million Tiny Images; the task is not named
    (30_000, "P3F2"): (65.65, 30.00, 70), (30_000, "P3F4"): (85.29, 49.64, 42), (50_000, "P3F2"): (66.87, 30.42, 87),
    (50_000, "P3F4"): (85.26, 49.66, 61), (150_000, "P3F2"): (67.73, 30.24, 95), (150_000, "P3F4"): (85.18, 50.61, 55),
}  # fmt: skip
# The flags that the paper or its code state, or that would change what its numbers mean: of a training, and of an evaluation.
TRAINING = (
    "dataset", "image_size", "arch", "width", "stem", "norm", "eps", "attack_steps", "step_size", "attack_bn", "label_fraction", "extra_data",
    "pretrain_images", "flip", "epochs", "batch_size", "lr", "lr_steps", "weight_decay", "warmup_steps", "pretrain_epochs", "pretrain_lr",
    "grid", "num_permutations", "whole", "double_softmax", "sigma", "frames", "val_fraction", "init",
)  # fmt: skip
EVALUATION = ("dataset", "image_size", "norm", "eps", "eval_attack", "eval_steps", "eval_examples", "eval_amp")


def as_usual(settings: dict, flags: tuple[str, ...]) -> bool:
    """Do `flags` have their defaults, which are the paper's?"""
    usual = vars(Args())
    return all(settings.get(k) == usual[k] for k in flags)


def paper_key(task: str, dpe_lambda: float) -> str:
    """Under which name PAPER knows a task."""
    return ("dpe" if dpe_lambda > 0 else "se") if task == "ensemble" else task


def paper_numbers(task: str, pair: str, args: Args) -> tuple[float | None, float | None]:
    """The paper's (TA, RA) of a cell, if the run has its settings."""
    lambdas = (0.0, Args.dpe_lambda) if task == "ensemble" else (args.dpe_lambda,)
    if not as_usual(vars(args), (*TRAINING, *EVALUATION, "select")) or args.dpe_lambda not in lambdas:
        return None, None
    return PAPER.get((paper_key(task, args.dpe_lambda), pair), (None, None))[:2]


def show(results: dict, folder: Path) -> None:
    """Print all that results.json holds as the paper's tables, its own numbers below ours where the setting is its own."""
    args, rows = results["args"], results["rows"]
    picked = [row for row in rows if "pair" in row and row["pick"] == ("ta" if args["select"] == "clean" else "ra")]
    mine = {(clean["task"], clean["pair"]): (clean, robust) for clean, robust in zip(picked[::2], picked[1::2], strict=True)}
    if picked:
        attack = picked[1]["attack"]
        print(
            f"\n{args['dataset']}, {args['arch']} x{args['width']:g}; TA: clean accuracy (%), RA: under {attack.upper()} ({args['norm']} eps "
            f"{eps_name(args['eps'])}), on {picked[0]['examples']:,} test images; epoch: that of the best RA on held-out images.\n"
            f"Checkpoints: best {'TA' if args['select'] == 'clean' else 'RA'} on held-out images. "
            f"{results['seconds']:.0f} s of training and evaluation.\n"
        )
        show_cells(mine, args)
    show_compared(rows)
    print(f"\nresults.json and the checkpoints are in {folder}", flush=True)


def show_cells(mine: dict, args: dict) -> None:
    """Table 3 (or 8): a line per pair, TA, RA and the epoch of best RA per task. Then Tables 5 and 7, if there is something for them."""

    def measured(clean: dict, robust: dict) -> list[str]:
        return [f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}", str(clean["best_epoch"])]

    def printed(numbers: tuple) -> list[str]:
        return [f"{numbers[0]:.2f}", f"{numbers[1]:.2f}", str(numbers[2])]

    tasks = [task for task in dict.fromkeys(task for task, _ in mine) if task] or [""]
    table = []
    for pair in dict.fromkeys(pair for _, pair in mine):
        ours, papers = [pair], ["  the paper"]
        for task in tasks:
            key = (task, pair) if (task, pair) in mine else ("", pair)  # P1 is the same for all tasks
            ours += measured(*mine[key]) if key in mine else [""] * 3
            known = key in mine and mine[key][0]["paper"] is not None
            papers += printed(PAPER[paper_key(key[0], args["dpe_lambda"]), pair]) if known else [""] * 3
        table += [ours] + ([papers] if any(papers[1:]) else [])
    print_table(["", *(f"{task} {what}".strip() for task in tasks for what in ("TA", "RA", "epoch"))], table)
    single = [task for task in TASKS if (task, "P3F4") in mine]
    if len(single) > 1 or ("ensemble", "P3F4") in mine:
        table = []
        for task, name in [*((task, task) for task in TASKS), ("se", "AP + SE"), ("dpe", "AP + DPE")]:
            key = ("ensemble" if task == paper_key("ensemble", args["dpe_lambda"]) else task, "P3F4")
            ours = measured(*mine[key]) if key in mine else [""] * 3
            table.append([name, *ours, *printed(PAPER_TABLE5_JIGSAW if task == "jigsaw" else PAPER[task, "P3F4"])])
        print("\nTable 5; the paper's: CIFAR-10, ResNet-50v2, linf 8/255 (AP + SE, AP + DPE: --task ensemble)\n")
        print_table(["P3F4 after", "TA", "RA", "epoch", "paper: TA", "RA", "epoch"], table)
    if args["pretrain_images"] or args["extra_data"]:
        table = [[f"{clean['images']:,} {task}", pair, *measured(clean, robust)] for (task, pair), (clean, robust) in mine.items() if clean["images"]]
        table += [[f"  the paper, {n:,}", pair, *printed(numbers)] for (n, pair), numbers in PAPER_TABLE7.items()]
        print("\nTable 7; the paper's images are others (80 Million Tiny Images), and it does not name the task\n")
        print_table(["pre-training images", "", "TA", "RA", "epoch"], table)


def show_compared(rows: list[dict]) -> None:
    """Tables 4 and 6 and the numbers of Figure 5."""
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("transfer", "venn", "average")}
    rate = {(row["source"], row["target"]): 100 - row["accuracy"] for row in kinds["transfer"]}
    names = list(dict.fromkeys(source for source, _ in rate))
    if rate:
        known = {(row["source"], row["target"]): f"{100 - row['paper']:.2f}" for row in kinds["transfer"] if row["paper"] is not None}
        table = []
        for target in names:
            table.append([target, *(f"{rate[source, target]:.2f}" for source in names)])
            table += [["  the paper", *(known.get((source, target), "") for source in names)]] if known else []
        print("\nTable 4, attack success rate (%): columns made for, rows evaluated\n")
        print_table(["", *names], table)
    for row in kinds["venn"]:
        made_for, a, b, both = row["source"], row["target"], row["other"], 100 - row["accuracy"]
        only_a, only_b = rate[made_for, a] - both, rate[made_for, b] - both
        print(f"Figure 5, made for {made_for}: fools {a} and {b} {both:.2f}%, {a} only {only_a:.2f}%, {b} only {only_b:.2f}%")
    if kinds["average"]:
        table = []
        for clean, robust in zip(kinds["average"][::2], kinds["average"][1::2], strict=True):
            table.append([clean["name"], f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}"])
            table += [["  the paper", f"{clean['paper']:.2f}", f"{robust['paper']:.2f}"]] if clean["paper"] is not None else []
        print("\nTable 6, averaged predictions\n")
        print_table(["models", "TA", "RA"], table)


# ---- layers with second derivatives that are worth their time: PyTorch's take several times as long -----------------------


def fast_second_derivatives(module: nn.Module) -> None:
    """Let the convolutions and BatchNorms in `module` compute second derivatives fast; their weights and results stay the same.

    Where the gradient for an image is itself differentiated (chen_pretrain_finetune.py, eq. 4), PyTorch always makes the convolution
    weights' second derivatives too, and BatchNorm's from some 25 passes over the data. Here a step of the
    attack took 0.44 s in place of 1.3 s (rotation, ResNet-50v2, batch 8, bfloat16, CPU). Use `input_gradients_only` around an attack.
    """
    for m in module.modules():
        if type(m) is nn.BatchNorm2d:
            m.__class__ = _BatchNorm2d
        elif type(m) is nn.Conv2d and m.bias is None and m.groups == 1 and m.dilation == (1, 1):
            m.__class__ = _Conv2d


@contextlib.contextmanager
def input_gradients_only(module: nn.Module) -> Iterator[None]:
    """No gradients for the weights of the layers above meanwhile. (Other layers notice by themselves that none are wanted.)"""
    weights = [p for m in module.modules() if isinstance(m, (_Conv2d, _BatchNorm2d)) for p in m.parameters() if p.requires_grad]
    try:
        for p in weights:
            p.requires_grad_(False)
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if torch.is_autocast_enabled(x.device.type):  # what goes into _Convolve is not cast
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w = x.to(dtype), w.to(dtype)
        return _Convolve.apply(x, w, self.stride, self.padding)


class _Convolve(torch.autograd.Function):
    """F.conv2d. Its gradient for x is a transposed convolution, whose own derivatives are those that are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, w, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        for_x = for_w = None
        if ctx.needs_input_grad[0]:
            left = [(x.shape[i + 2] + 2 * ctx.padding[i] - w.shape[i + 2]) % ctx.stride[i] for i in (0, 1)]  # pixels no window begins at
            for_x = F.conv_transpose2d(g, w, None, ctx.stride, ctx.padding, left)
        if ctx.needs_input_grad[1]:
            for_w = torch.nn.grad.conv2d_weight(x, w.shape, g, ctx.stride, ctx.padding)
        return for_x, for_w, None, None


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:  # a scale and a shift
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return torch.addcmul(shift.to(x.dtype).view(1, -1, 1, 1), x, scale.to(x.dtype).view(1, -1, 1, 1))
        running = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        if self.track_running_stats:
            self.num_batches_tracked += 1
        return _Normalise.apply(x, self.weight, self.bias, *running, self.momentum, self.eps)


class _Normalise(torch.autograd.Function):
    """BatchNorm in train mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_NormaliseGradient.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None, None


class _NormaliseGradient(torch.autograd.Function):
    """BatchNorm's gradients for x, w and b; the first can be differentiated again, with the formulas below, per channel:

    r = 1 / standard deviation, z = (x - mean) r; the gradient for x is f = w r (g - E[g] - z E[g z]). Given u, the derivative of
    <u, f> with respect to g is the same map applied to u, as it is symmetric; with respect to x it is

        w r^2 (E[u] E[g z] + E[g] E[u z] - E[g z] u - E[u z] g + z (3 E[u z] E[g z] + E[u] E[g] - E[u g]))

    and with respect to w it is the sum of u f / w, n r (E[u g] - E[u] E[g] - E[u z] E[g z]), n values being in the mean E.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        for_x, for_w, for_b = _normalise_gradient(g, x, w, mean, rstd, eps)  # the last two are the sums of g z and of g
        ctx.save_for_backward(g, x, w, mean, rstd, for_w, for_b)
        ctx.eps = eps
        return for_x, for_w, for_b

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *of_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(v is not None for v in of_weights):
            raise NotImplementedError("the second derivative of BatchNorm's weights is not written; use nn.BatchNorm2d.")
        if u is None:
            return (None,) * 6
        g, x, w, mean, rstd, gz, gs = ctx.saved_tensors
        for_g, uz, us = _normalise_gradient(u, x, w, mean, rstd, ctx.eps)
        ug = _normalise_gradient(u, g, w, torch.zeros_like(mean), torch.ones_like(rstd), ctx.eps)[1]  # the sum of u g
        n = x.numel() / x.shape[1]
        gz, gs, uz, us, ug = (v / n for v in (gz, gs, uz, us, ug))  # from here on means

        def channels(v: Tensor) -> Tensor:  # (C,) -> (1, C, 1, 1)
            return v.to(x.dtype).view(1, -1, 1, 1)

        k = w * rstd**2
        of_x = k * rstd * (3 * uz * gz + us * gs - ug)
        for_x = torch.addcmul(channels(k * (us * gz + gs * uz) - of_x * mean), x, channels(of_x))
        for_x = for_x.addcmul_(u, channels(-k * gz)).addcmul_(g, channels(-k * uz))
        return for_g, for_x, n * rstd * (ug - us * gs - uz * gz), None, None, None


def _normalise_gradient(g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's gradients for x, w and b in one kernel."""
    return torch.ops.aten.native_batch_norm_backward(g, x, w, None, None, mean, rstd, True, eps, [True, True, True])


# ---- the run -------------------------------------------------------------------------------------------------------


def cells(args: Args) -> list[tuple[str, str]]:
    """[(task, pair)] of Table 3 that are asked for; P1 has no task."""
    tasks = TASKS if args.table3 or args.task == "all" else (args.task,)
    kind, last = ("all", "all") if args.table3 else (args.pretrain, args.finetune)
    if tasks == ("ensemble",):  # Table 5
        kind, last = "P3" if kind == "all" else kind, "F4" if last == "all" else last
    pairs = [pair for pair in (*PAIRS, "RSF2", "RSF4") if kind in (pair[:2], "all" if pair in PAIRS else "") and last in (pair[2:], "all")]
    if "all" not in (kind, last):
        pairs = [kind + last]
    return list(dict.fromkeys(("" if pair.startswith("P1") else task, pair) for task in tasks for pair in pairs))


def label(task: str, pair: str) -> str:
    """'rotation-P3F4', the name of a cell's files; P1 has no task."""
    return f"{task}-{pair}" if task else pair


def main(args: Args) -> dict:
    """Pre-train, fine-tune, evaluate, print the tables; returns what results.json holds ({} after --stage pretrain)."""
    check(args)
    run = start_run(args)
    results = run.finished() or train_and_evaluate(run, args)
    if results and world()[0] == 0:
        show(results, run.folder)
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    if args.stage == "compare" and not args.models:
        raise UserError("--stage compare wants checkpoints: python chen_pretrain_finetune.py --stage compare runs/X/*.ta.pt")
    if args.models and args.stage != "compare":
        raise UserError(f"{args.models[0]}: checkpoints are for --stage compare (--init takes a pre-trained trunk).")
    if args.stage == "compare":
        if args.init:
            raise UserError("--init is for fine-tuning; --stage compare takes the checkpoints themselves.")
        if args.eval_attack != "pgd20":
            raise UserError("--stage compare attacks by PGD (--eval-steps): leave out --eval-attack.")
        return
    tasks = {task for task, _ in cells(args)} - {""}
    selfie, puzzle = bool(tasks & {"selfie", "ensemble"}), bool(tasks & {"jigsaw", "ensemble"})
    numbers(args.lr_steps, "lr-steps", "30,50")  # raises if it is none
    if args.norm == "l2" and "ensemble" in tasks:
        raise UserError("--task ensemble has three images in one attack, so --norm l2 would be a ball around all three; use linf.")
    if not args.val_fraction:
        raise UserError("no validation images to select the best epoch by: raise --val-fraction.")
    if args.table3 and (args.task, args.pretrain, args.finetune) not in {(Args.task, Args.pretrain, Args.finetune), (Args.task, "all", "all")}:
        raise UserError("--table3 stands for all tasks and pairs: leave out --task, --pretrain and --finetune.")
    if args.stage == "pretrain" and (args.init or not tasks):
        raise UserError("--stage pretrain has nothing to do with --init or --pretrain P1.")
    if args.init and (len(cells(args)) > 1 or not tasks):
        raise UserError("--init is for one cell with pre-training: name one --task, --pretrain and --finetune.")
    if selfie and args.grid < 3:
        raise UserError("--grid 2 leaves Selfie a single masked patch, among which there is nothing to choose; take 3 or more.")
    if (selfie or puzzle) and args.image_size % args.grid:
        raise UserError(f"--image-size {args.image_size} is no multiple of --grid {args.grid}.")
    if puzzle:
        jigsaw_permutations(args.grid, args.num_permutations)  # raises if there are not that many
    # On single pixels a 3x3 convolution with stride 2 sometimes has NaN in its bf16 weight gradient (PyTorch 2.14 and 2.15, CPU).
    stride = 16 if args.stem == "imagenet" else 4  # of the trunk without its last stage
    if selfie and args.image_size < stride * args.grid:
        raise UserError(
            f"--image-size {args.image_size}: Selfie's patches would be smaller than {stride} pixels, the trunk's stride; "
            f"take {stride * args.grid} or more."
        )
    if args.image_size <= stride:
        raise UserError(f"--image-size {args.image_size}: one pixel would be left for the last stage; take more than {stride}.")


def train_and_evaluate(run: Run, args: Args) -> dict:
    """All cells asked for, each pre-training once; a resumed run goes on in the cell, or the evaluation, that was interrupted."""
    given = load_checkpoint(args.init) if args.init else None
    same = len({Path(file).stem for file in args.models}) < len(args.models)  # then the folders tell them apart
    files = {f"{Path(file).parent.name}/{Path(file).stem}" if same else Path(file).stem: file for file in args.models}
    states = {name: load_checkpoint(file) for name, file in files.items()}
    if len(states) < len(args.models):
        raise UserError("two of the checkpoints have the same name in folders of the same name; rename one.")
    train_set, val_set, test_set = load_splits(args, run.device)
    images = train_set
    if args.extra_data:
        images = join(train_set, load_extra(args.extra_data, args.image_size, run.device))
    if args.pretrain_images > len(images):
        raise UserError(f"--pretrain-images {args.pretrain_images}: there are {len(images)} (see --extra-data).")
    if args.pretrain_images:
        images = draw(images, args.pretrain_images, seed=args.seed)
        check_batches(len(images), args.batch_size)
    for name, state in states.items():
        check_classifier(state, files[name])
        if state["network"]["heads"]["class"] != len(test_set.classes):
            raise UserError(f"{files[name]} is no classifier of the {len(test_set.classes)} classes of {args.dataset}.")
        its = {k: state.get("args", {}).get(k, getattr(args, k)) for k in ("dataset", "image_size")}
        if any(v != getattr(args, k) for k, v in its.items()):
            run.say(f"note: {files[name]} was trained on {its['dataset']} at {its['image_size']} pixels.")
    if given:
        ((task, pair),) = cells(args)
        if (found := (given.get("task", task), given.get("kind", pair[:2]))) != (task, pair[:2]):
            raise UserError(f"{args.init} is {found[1]} on {found[0]}: say --task {found[0]} --pretrain {found[1]}.")
        inherit(build_model(args.arch, {"class": 1}, width=args.width, stem=args.stem), given, args.init)  # does it fit?
    if min(numbers(args.lr_steps, "lr-steps"), default=0) >= args.epochs and args.stage == "all":
        run.say(f"note: with --epochs {args.epochs} the rate of fine-tuning is never lowered (--lr-steps {args.lr_steps}).")
    run.begin()
    began = time.perf_counter()
    if args.stage == "compare":
        return write_results(run, compare(run, args, states, test_set), began)
    rows, models, judging = run.rows("judged.json"), {}, 0.0  # judging: seconds
    for task, pair in cells(args):
        start = None if pair.startswith("P1") else given or pretrain(task, pair[:2], run, args, images, val_set)
        if args.stage == "pretrain":
            continue
        name = label(task, pair)
        picks = finetune(name, pair, run, args, start, train_set, val_set)
        models[name] = picks[chosen(args)]
        if any(row["name"] == name for row in rows):
            continue
        began = time.perf_counter()
        for pick, state in picks.items():
            if pick == "ra" and state["epoch"] == picks["ta"]["epoch"]:
                judged = rows[-2:]  # the epoch of best RA is that of best TA: its two rows once more
            else:
                look_at = args.eps if state["stage"] == "train" and pick == chosen(args) else 0.0
                judged = evaluate(run, name, state, test_set, [0, args.eps], look_at=look_at)
            known = paper_numbers(task, pair, args) if pick == chosen(args) else (None, None)
            cell = {"task": task, "pair": pair, "pick": pick, "best_epoch": picks["ra"]["epoch"], "images": start and start.get("images")}
            rows += [row | cell | {"paper": number} for row, number in zip(judged, known, strict=True)]
        run.keep("judged.json", rows)
        judging += time.perf_counter() - began
    if args.stage == "pretrain":
        for task, kind in dict.fromkeys((task, pair[:2]) for task, pair in cells(args) if task):
            trunk = run.folder / f"pretrain-{kind}-{task}.pt"
            run.say(f"go on with: {run.next_command(stage='all', task=task, pretrain=kind, finetune='F4', table3=False, init=trunk)}")
        return {}
    began = time.perf_counter() - judging  # last.pt has the time of training
    finals = {name: state for name, state in models.items() if name.endswith("P3F4")}  # of Tables 4 and 6
    if len(finals) > 1:
        rows = rows + compare(run, args, finals, test_set)
    return write_results(run, rows, began)


def chosen(args: Args) -> str:
    """Which of the two checkpoints of a cell is printed and compared: 'ta' or 'ra'."""
    return "ta" if args.select == "clean" else "ra"


if __name__ == "__main__":
    cli(main, Args)
