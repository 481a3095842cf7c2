"""Reversing attacks at test time by several self-supervised tasks (Lawhon, Mao, Yang: Using multiple
self-supervised tasks improves model robustness, 2022, arXiv:2204.03714; one task: Mao et al., ICCV 2021).

An attack on a classifier F also raises the losses of tasks that need no labels. So before F sees an image x,
we change x within a ball of radius eps_v so that these losses fall (Algorithm 1). No network changes.

    x' = x + noise;  in each of K iterations:
        L = L_s + L_r + L_i        the weighted contrastive, rotation and inpainting loss of x'
        x' <- x' - eta ((L_s / L) d(L_s) + (L_r / L) d(L_r))      in odd iterations L_i in place of L_r
        x' <- the nearest image within eps_v of x
    predict F(x');  d: the gradient with respect to x', divided by its largest absolute value

    python mtl_reverse.py --quick                          # digits, under two minutes on two cores
    python mtl_reverse.py --victim carmon2019.pt           # Table 1: CIFAR-10, the network of Carmon et al.
    python mtl_reverse.py --victim carmon2019.pt --branches runs/X --out runs/Y   # task networks of runs/X
    python mtl_reverse.py --victim runs/X/best.pt          # a classifier of any script here
    python mtl_reverse.py                                  # train the classifier, too
    torchrun --nproc-per-node=8 mtl_reverse.py --victim carmon2019.pt

The paper, clean / PGD, linf 8/255: no reversal 89.7 / 63.9, SSL (Mao et al.) 86.6 / 65.3, MTL 87.7 / 65.6.

Differs from the paper:
- The authors' code increases the losses in its last commit and decreases them in others. We decrease them, as
  Algorithm 1 does.
- A gradient is divided by its largest absolute value, per image (code); SSL takes its signs (Mao et al.).
- The ball's centre stays the given image; line 11 of Algorithm 1 would move it.
- From the code: K 40, eta 2/255, eps_v 16/255 (the paper's "8", doubled), temperature 0.2, 4 views, and the
  weights 1, 50, 10 of L_s, L_r, L_i (Algorithm 1: 1, 1, 1). L_i is a mean over the hole (paper: a sum).
- L_s is a head on F's own frozen features, as in the code; the paper says "independent of F".
- No image depends on its batch: the negatives are views of training images, and L_s / L is per image.
- Attackers who know the defence are ours (see `attack`); the paper reports PGD on F.
The rest: results/lawhon.md.
"""
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from common import (
    STATS, CommonArgs, Images, Network, Positive, Run, Share, UserError, batchnorm_mode, build_model,
    ce_per_image, check_batches, check_classifier, cli, count_batches, distribute, draw, eps_name,
    full_precision, image_uniform, is_correct, learning_rate, load_checkpoint, load_foreign, load_weights,
    map_images, numbers, paper_numbers, pgd, place_model, random_crop_flip, reading, rebuild, save_image_grid,
    seed_step, simclr_augment, split_train, start_run, suite_attacks, sum_over_ranks, text_table, world,
)  # fmt: skip

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

TASKS = ("contrastive", "rotation", "inpainting")
ATTACKS = ("pgd", "aware", "bpda", "unrolled", "suite")
Arch = Literal["wrn28_10", "resnet18", "resnet34", "resnet50", "preact18", "preact34"]


def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A reader of comma-separated words, each one of `known`. It raises ValueError."""

    def read(text: str) -> tuple[str, ...]:
        return tuple(sorted(set(text.split(",")), key=known.index))

    read.__name__ = "/".join(known)  # for argparse's message
    return read


def three_numbers(text: str) -> tuple[float, ...]:
    """Read three numbers above 0 such as 1,50,10. Raises ValueError."""
    values = numbers(text)
    if len(values) != 3 or min(values) == 0:
        raise ValueError(text)
    return values


Attacks = Annotated[tuple, some_of(ATTACKS)]


@dataclass
class Args(CommonArgs):
    # run
    victim: str = ""  # checkpoint of the classifier F, ours or Carmon et al.'s (paper); empty: train one
    branches: str = ""  # folder of a run whose task networks (and their flags) to reuse; empty: train them
    # data and model
    flip: bool = True  # mirror images at random in training and in views
    arch: Arch = "wrn28_10"  # network of F without --victim (paper: wrn28_10)
    width: float = 1.0  # factor on the number of channels of F without --victim (paper: 1)
    # training of F without --victim (SGD with Nesterov momentum 0.9, cosine schedule)
    epochs: Positive = 100  # epochs of the adversarial training of F
    batch_size: Positive = 128  # images per step of the training of F, over all GPUs
    lr: float = 0.1  # initial learning rate of the training of F
    weight_decay: float = 5e-4  # weight decay of SGD, on all weights of F and of rotation and inpainting
    # attack, in the training of F and in the evaluation
    norm: Literal["linf", "l2"] = "linf"  # norm of the attack (paper: linf)
    eps: float = 8 / 255  # radius of the attack; images are in [0, 1] (paper: 8/255)
    attack_steps: Positive = 10  # steps of PGD in the training of F
    step_size: float = 0.0  # step size of PGD; 0: 2 eps / steps, for linf at least 2/255
    # task networks (SGD as above for rotation and inpainting, Adam for the contrastive head)
    branch_epochs: Positive = 200  # epochs of training of each task network (paper: not given)
    branch_batch_size: Positive = 128  # images per step of rotation and inpainting, over all GPUs
    branch_lr: float = 0.1  # initial learning rate of rotation and inpainting (paper: not given)
    head_batch_size: Positive = 1024  # images per step of the contrastive head, all GPUs (Mao et al.: 1024)
    head_lr: float = 1e-4  # learning rate of the contrastive head (Mao et al.: 1e-4)
    branch_width: float = 1.0  # factor on the channels of the rotation and inpainting networks
    crop: Share = 0.08  # smallest fraction of an image's area that a view shows (code: 0.08)
    temperature: float = 0.2  # tau, temperature of the contrastive loss (code: 0.2)
    # reversal (Algorithm 1)
    tasks: Annotated[tuple, some_of(TASKS)] = TASKS  # tasks of the defence, comma-separated (paper: all)
    reverse_steps: Positive = 40  # K, number of iterations of the reversal (code: 40)
    reverse_step_size: float = 2 / 255  # eta, step size of the reversal (code: 2/255)
    reverse_eps: Share = 16 / 255  # eps_v, radius of the reversal, a linf ball (paper: "8", code: 16/255)
    weights: Annotated[tuple, three_numbers] = (1.0, 50.0, 10.0)  # L_s, L_r, L_i weights (Algorithm 1: 1,1,1)
    views: Positive = 4  # views of each image in the contrastive loss, at least 2 (code: 4)
    bank: Positive = 512  # training images whose views are the negatives of the contrastive loss
    # evaluation
    attacks: Attacks = ATTACKS[:4]  # comma-separated: pgd (paper; always run), aware, bpda, unrolled, suite
    eval_attack: Literal["suite", "suite-fast", "standard", "apgd"] = "suite"  # the suite that `suite` runs
    eval_steps: Positive = 10  # steps of the attacks pgd and aware (code: 10)
    lambdas: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0)  # values of lambda; `aware` runs once per value
    adaptive_steps: Positive = 20  # steps of bpda and unrolled, started from pgd's images
    eot: Positive = 4  # random draws of the defence that bpda and unrolled average over in each step
    eval_batch_size: Positive = 128  # images per batch in evaluation, over all GPUs
    eval_amp: bool = False  # evaluate F in mixed precision, not float32 (reversal: --amp)
    val_fraction: Share = 0.1  # fraction of the training images held out to select the epochs

    QUICK: ClassVar[dict] = dict(
        # Digits stay 8 x 8. With these weights each loss has at least 15% of L on attacked images.
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.125, epochs=10, batch_size=64,
        lr=0.05, eps=0.1, attack_steps=7, eval_steps=7, branch_epochs=15, branch_batch_size=64,
        branch_lr=0.05, head_batch_size=256, head_lr=1e-2, branch_width=0.25, crop=0.5, reverse_steps=10,
        reverse_step_size=0.04, reverse_eps=0.15, weights=(1.0, 10.0, 50.0), bank=64, attacks=ATTACKS,
        eval_attack="suite-fast", lambdas=(0.1, 1.0), adaptive_steps=4, eot=1, eval_examples=150,
        eval_batch_size=256,
    )  # fmt: skip


# ---- Algorithm 1 -------------------------------------------------------------------------------------


@dataclass
class Defence:
    """A row of the table: the classifier F and the tasks that move its images; none: F alone."""

    name: str
    classifier: Network
    branches: dict[str, nn.Module]  # {task: task network, which maps images to losses (B,)}
    args: Args
    bank: Tensor | None = None  # (M, 16), negatives of the contrastive loss
    sign: bool = False  # steps along the signs of the gradient (Mao et al.)

    def loss(self, task: str, z: Tensor, seeds: Tensor) -> Tensor:
        """L_s, L_r or L_i per image, (B,), with its weight. seeds: of the views, int64 (B,)."""
        weight, branch, views = self.args.weights[TASKS.index(task)], self.branches[task], self.args.views
        if task != "contrastive":
            return weight * branch(z)
        return weight * branch(z, views, image_rand(seeds, views), self.bank)

    def classify(self, z: Tensor) -> Tensor:
        """Logits F(z), (B, classes), of images as they are; in float32 unless --eval-amp."""
        with full_precision(self.classifier, not self.args.eval_amp):
            return self.classifier(z, "class")


def reverse(x: Tensor, defence: Defence, seeds: Tensor, step: Callable | None = None) -> Tensor:
    """Algorithm 1: images x (B, 3, S, S) in [0, 1], attacked or not, to x'. step: `reverse_step`, or for
    attackers `DifferentiableStep.apply`.

    seeds: int64 (B,). An image's noise and views depend on its seed alone, and nothing on its batch.
    """
    if not defence.branches:
        return x
    z = start(x, defence, seeds)
    for k in range(1, defence.args.reverse_steps + 1):  # line 2
        z = (step or reverse_step)(z, x, k, defence, seeds)
    return z


def start(x: Tensor, defence: Defence, seeds: Tensor) -> Tensor:
    """Line 1: x with noise, uniform in the ball."""
    noise = 2 * image_uniform(mix_seeds(seeds, 0), x.shape[1:].numel()).view_as(x) - 1
    return (x + defence.args.reverse_eps * noise).clamp(0, 1)


def reverse_step(
    z: Tensor, x: Tensor, k: int, defence: Defence, seeds: Tensor, differentiable: bool = False
) -> Tensor:  # fmt: skip
    """Iteration k of Algorithm 1: from z to the next image, in the ball around x. differentiable: keep the
    graph, so that an attacker can differentiate the step."""
    args, losses, move = defence.args, {}, 0
    active = active_tasks(defence.branches, k)
    with torch.enable_grad():
        z = z if differentiable else z.detach().requires_grad_()
        for task in defence.branches:
            with torch.set_grad_enabled(differentiable or task in active):  # else it only enters L
                losses[task] = defence.loss(task, z, mix_seeds(seeds, k))
        total = sum(losses.values()).clamp(min=1e-12)  # line 3: L, (B,)
        for task in active:  # lines 4 to 9
            (g,) = torch.autograd.grad(losses[task].sum(), z, create_graph=differentiable)
            move = move + (losses[task] / total).view(-1, 1, 1, 1) * direction(g, defence.sign)
        z = z - args.reverse_step_size * move
        z = torch.clamp(z, x - args.reverse_eps, x + args.reverse_eps).clamp(0, 1)  # line 10
    return z if differentiable else z.detach()


def active_tasks(tasks: Iterable[str], k: int) -> list[str]:
    """The tasks that move the image in iteration k = 1, 2, ...: rotation in even and inpainting in odd ones
    (lines 5 to 9), unless one of the two is missing; contrastive in all (line 4)."""
    if not {"rotation", "inpainting"} <= set(tasks):
        return list(tasks)
    return [task for task in tasks if task != ("inpainting" if k % 2 == 0 else "rotation")]


def direction(g: Tensor, sign: bool) -> Tensor:
    """A gradient (B, 3, S, S) divided by its largest absolute value, per image, or its signs. The derivative
    of a sign is 0, so attackers get that of the scaled gradient (BPDA)."""
    scaled = g / (g.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
    return scaled + (g.sign() - scaled).detach() if sign else scaled


# ---- random numbers that belong to an image ----------------------------------------------------------


def mix_seeds(seeds: Tensor, n: int) -> Tensor:
    """Other seeds (int64) for the n-th use of these, by a step of a linear congruential generator (Knuth)."""
    return seeds * 6364136223846793005 + (n + 1) * 1442695040888963407 % 2**63


def image_rand(seeds: Tensor, views: int) -> Callable[..., Tensor]:
    """A torch.rand for a batch of the first views of all images, then the second, ...: a row depends on its
    image's seed, int64 (B,), its view, and the number of calls before, on nothing else."""
    seeds, calls = torch.cat([mix_seeds(seeds, v) for v in range(views)]), itertools.count(1)

    def rand(*shape: int, device: torch.device | None = None) -> Tensor:
        return image_uniform(mix_seeds(seeds, next(calls)), math.prod(shape[1:])).view(shape)

    return rand


# ---- the tasks: networks and losses ------------------------------------------------------------------


class Contrastive(nn.Module):
    """L_s (section 3.2.1): how far apart the views of an image are, compared with other images. The network
    is a small head on the features of the classifier."""

    def __init__(self, classifier: Network, args: Args):
        super().__init__()
        self.features = classifier.features  # a method, so the classifier is no part of this module
        self.head = nn.Sequential(
            nn.Linear(classifier.trunk.dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 16)
        )
        self.crop, self.flip, self.temperature = args.crop, args.flip, args.temperature

    def embed(self, x: Tensor, views: int, rand: Callable = torch.rand) -> Tensor:
        """Unit vectors z of views of each image: (B, 3, S, S) -> (B, views, 16). rand: makes the numbers of
        the first view of all images, then of the second, ..."""
        # Crop, mirror, colour jitter, always and at full strength, and grey with probability 0.2 (code)
        options = {"strength": 1.0, "crop": self.crop, "flip": self.flip, "jitter": 1.0, "rand": rand}
        v = simclr_augment(x.repeat(views, 1, 1, 1), **options)
        return F.normalize(self.head(self.features(v)), dim=1).unflatten(0, (views, len(x))).transpose(0, 1)

    def forward(
        self, x: Tensor, views: int = 2, rand: Callable = torch.rand, bank: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """L_s per image, (B,): the mean over the pairs i, j of different views of the image (y_ij = 1). The
        denominator sums over all other views and the negatives: `bank` (M, 16), or in training (None) the
        views of all other images of the batch, on all GPUs."""
        z = self.embed(x, views, rand)
        similar = z @ z.mT / self.temperature  # (B, V, V): z_i z_j / tau
        if bank is not None:
            negative = z @ bank.T / self.temperature  # (B, V, M)
        else:
            all_z, first = gather(z)  # (N, V, 16)
            negative = (z.flatten(0, 1) @ all_z.flatten(0, 1).T / self.temperature).unflatten(0, z.shape[:2])
            image = torch.arange(len(all_z), device=x.device).repeat_interleave(views)  # of each of the N V
            own = image == first + torch.arange(len(x), device=x.device)[:, None]  # (B, N V)
            negative = negative.masked_fill(own[:, None], -math.inf)
        itself = torch.eye(views, dtype=torch.bool, device=x.device)
        others = torch.cat([similar.masked_fill(itself, -math.inf), negative], 2)
        losses = others.logsumexp(2, keepdim=True) - similar  # (B, V, V)
        return losses.masked_fill(itself, 0).sum((1, 2)) / (views * (views - 1))


def gather(z: Tensor) -> tuple[Tensor, int]:
    """(the z (B, ...) of all ranks one after the other, with gradients; where this rank's begin)."""
    rank, ranks = world()
    if ranks == 1:
        return z, 0
    sizes = torch.zeros(ranks, dtype=torch.int64, device=z.device)  # they may differ by one
    sizes[rank] = len(z)
    dist.all_reduce(sizes)
    before, after = int(sizes[:rank].sum()), int(sizes[rank + 1 :].sum())
    padded = torch.cat([z.new_zeros(before, *z.shape[1:]), z, z.new_zeros(after, *z.shape[1:])])
    return sum_over_ranks(padded), before


def network_in_network(width: float) -> nn.Module:
    """Four blocks of Lin et al. 2014, as in Gidaris et al. 2018: (B, 3, S, S) -> (B, 192 width)."""
    a, b, c = (max(1, round(n * width)) for n in (192, 160, 96))

    def conv(c_in: int, c_out: int, size: int) -> nn.Sequential:
        layer = nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(c_out), nn.ReLU())

    network = nn.Sequential(
        conv(3, a, 5), conv(a, b, 1), conv(b, c, 1), nn.MaxPool2d(3, 2, 1),
        conv(c, a, 5), conv(a, a, 1), conv(a, a, 1), nn.AvgPool2d(3, 2, 1),
        conv(a, a, 3), conv(a, a, 1), conv(a, a, 1),
        conv(a, a, 3), conv(a, a, 1), conv(a, a, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    network.dim = a  # for the head
    return network


class Rotation(nn.Module):
    """L_r (section 3.2.3): cross-entropy of the rotation of an image, mean over the four rotations."""

    def __init__(self, args: Args):
        super().__init__()
        self.net = Network(network_in_network(args.branch_width), {"rotation": 4}, *STATS[args.dataset])

    def forward(self, x: Tensor) -> Tensor:
        """L_r per image, (B,)."""
        turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])  # (4 B, 3, S, S)
        k = torch.arange(4, device=x.device).repeat_interleave(len(x))
        return ce_per_image(self.net(turned), k).unflatten(0, (4, len(x))).mean(0)


def context_networks(size: int, width: float) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the inpainting network (Pathak et al. 2016): (B, 3, size, size) -> (B, c), and
    (B, c, 1, 1) -> the centre of the image, (B, 3, size / 2, size / 2), in (-1, 1)."""
    halvings = int(math.log2(size)) - 2  # 128 pixels: 5, to 64, 64, 128, 256 and 512 channels of 4 x 4 pixels
    channels = [max(1, round(min(32 * 2 ** max(i, 1), 512) * width)) for i in range(halvings)]
    c, encoder, decoder = max(1, round(4000 * width)), [], []
    for c_in, c_out in itertools.pairwise([3, *channels]):
        encoder += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
    encoder.append(nn.Conv2d(channels[-1], c, 4, bias=False))
    for i, (c_in, c_out) in enumerate(itertools.pairwise([c, *channels[:0:-1], 3])):
        stride, padding = (1, 0) if i == 0 else (2, 1)  # first 1 to 4 pixels, then doubled
        convolution = nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=c_out == 3)
        decoder += [nn.BatchNorm2d(c_in), nn.ReLU(), convolution]
    return nn.Sequential(*encoder, nn.Flatten()), nn.Sequential(*decoder, nn.Tanh())


def enlarge(x: Tensor, size: int) -> Tensor:
    """Repeat pixels: (B, C, S, S) -> (B, C, size, size). Its gradient sums over the copies of a pixel."""
    return x.repeat_interleave(size // x.shape[3], 3).repeat_interleave(size // x.shape[2], 2)


class Inpainting(nn.Module):
    """L_i (section 3.2.2): mean squared error in a hole in the middle of an image, reconstructed by a network
    that sees the rest. Pixels are in [-1, 1]; images are enlarged four times (CIFAR-10: 128 pixels). In
    images of less than 32 pixels some hidden pixels have visible copies."""

    FILL = (117 / 255, 104 / 255, 123 / 255)  # of the hole (code)

    def __init__(self, args: Args):
        super().__init__()
        self.size = 4 * args.image_size
        half = [0.5] * 3  # mean and standard deviation that map [0, 1] to [-1, 1]
        encoder, decoder = context_networks(self.size, args.branch_width)
        self.encoder = Network(encoder, {}, half, half)
        self.decoder = Network(decoder, {}, [0.0], [1.0])  # Network adds mixed precision
        self.register_buffer("fill", torch.tensor(self.FILL).view(1, 3, 1, 1), persistent=False)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the network's output in the hole, the truth there): both (B, 3, h, h), in [-1, 1]."""
        x = enlarge(x, self.size)
        quarter, border = self.size // 4, self.size // 32  # of the centre's 64 pixels the outer 4 are visible
        hole = slice(quarter + border, 3 * quarter - border)
        holed = x.clone()
        holed[:, :, hole, hole] = self.fill
        centre = self.decoder.features(self.encoder.features(holed)[:, :, None, None])
        return centre[:, :, border:-border, border:-border], 2 * x[:, :, hole, hole] - 1

    def forward(self, x: Tensor) -> Tensor:
        """L_i per image, (B,)."""
        output, truth = self.reconstruct(x)
        return (output - truth).square().mean((1, 2, 3))


def build_branches(args: Args, classifier: Network) -> dict[str, nn.Module]:
    """{task: task network, which maps images to losses (B,)}, not trained."""
    rotation, inpainting = Rotation(args), Inpainting(args)
    return {"contrastive": Contrastive(classifier, args), "rotation": rotation, "inpainting": inpainting}


# ---- the attackers -----------------------------------------------------------------------------------

# Mixed into seeds, so that no two uses draw the same: the defence after an attack, the start of PGD, the
# measured losses, the bank of negatives, the attackers' own draws of the defence.
FOR_DEFENCE, FOR_START, FOR_MEASURE, FOR_BANK, FOR_ATTACKER = 1, 2, 3, 4, 1_000


def attack(kind: str, x: Tensor, y: Tensor, seeds: Tensor, defence: Defence, lam: float = 0.0) -> Tensor:
    """Adversarial images in the eps-ball around x (section 3.1). kind: 'none' or one of ATTACKS. seeds: of
    the random start and of the attackers' draws of the defence, int64 (B,).

    pgd, the paper's attack, knows F only. aware maximises CE(F(x)) - lambda L(x), to leave little to reverse
    (section 4). bpda goes through the defence and uses the gradient at x' as if it were that at x. unrolled
    differentiates through all K iterations (for SSL's signs: through the scaled gradient). suite is AutoPGD,
    MultiTargeted and Square on F. No attacker sees the defence's own draws of noise and views.
    """
    args, draws = defence.args, itertools.count(FOR_ATTACKER + 1)

    def fresh() -> Tensor:  # seeds of the next draw of the defence
        return mix_seeds(seeds, next(draws))

    def class_loss(z: Tensor) -> Tensor:
        return ce_per_image(defence.classify(z), y)

    def lagrangian(z: Tensor) -> Tensor:
        drawn = fresh()
        return class_loss(z) - lam * sum(defence.loss(task, z, drawn) for task in defence.branches)

    def defended(z: Tensor) -> Tensor:
        if kind == "unrolled":
            return reverse(z, defence, fresh(), DifferentiableStep.apply)
        return z + (reverse(z.detach(), defence, fresh()) - z).detach()  # BPDA: the derivative by z is 1

    def adaptive(z: Tensor) -> Tensor:  # mean over draws; with checkpoint() one graph of F at a time is kept
        n = args.eot if defence.branches else 1
        of_draw = partial(checkpoint, class_loss, use_reentrant=False, preserve_rng_state=False)
        return sum(of_draw(defended(z)) for _ in range(n)) / n

    if kind == "none":
        return x
    u = image_uniform(mix_seeds(seeds, FOR_START), x.shape[1:].numel()).view_as(x)
    noise = 2 * u - 1 if args.norm == "linf" else F.normalize(torch.erfinv(2 * u - 1).flatten(1)).view_as(x)
    by_pgd = partial(pgd, norm=args.norm, eps=args.eps, step_size=args.step_size)
    x_start = x + args.eps * noise
    if kind == "aware":
        return by_pgd(lagrangian, x, steps=args.eval_steps, start=x_start)
    x_adv = by_pgd(class_loss, x, steps=args.eval_steps, start=x_start)
    if kind == "suite":
        return suite(x, x_adv, y, defence)
    if kind in ("bpda", "unrolled"):
        return by_pgd(adaptive, x, steps=args.adaptive_steps, start=x_adv, keep_best=True)
    return x_adv


class DifferentiableStep(torch.autograd.Function):
    """`reverse_step` with its derivative, for attackers. The backward pass computes the iteration again, so
    the images of all K iterations and the graph of one are kept, which takes 0.1 GB per image for
    WideResNet-28-10 and 4 views."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, x: Tensor, k: int, defence: Defence, seeds: Tensor) -> Tensor:
        ctx.save_for_backward(z, x)
        ctx.constants = k, defence, seeds
        return reverse_step(z, x, k, defence, seeds)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # The fused attention of ViTs has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            z, x = (v.detach().requires_grad_() for v in ctx.saved_tensors)
            after = reverse_step(z, x, *ctx.constants, differentiable=True)
        return *torch.autograd.grad(after, (z, x), g), None, None, None  # x also is the centre of the ball


def suite(x: Tensor, x_adv: Tensor, y: Tensor, defence: Defence) -> Tensor:
    """x_adv, but where it does not fool F, the images of the first attack of --eval-attack that does."""
    x_adv, args, model = x_adv.clone(), defence.args, defence.classify
    with torch.no_grad():
        rows = (model(x_adv).argmax(1) == y).nonzero().squeeze(1)  # images that do not fool F yet
        for _, restarts, one_attack in suite_attacks(args.eval_attack, args.norm, args.eps, args.seed):
            for i in range(restarts):
                if not len(rows):
                    return x_adv
                attacked = one_attack(model, x[rows], y[rows], i)
                fooled = model(attacked).argmax(1) != y[rows]
                x_adv[rows[fooled]] = attacked[fooled]
                rows = rows[~fooled]
    return x_adv


# ---- training ----------------------------------------------------------------------------------------

# Added to the epoch in random seeds, so that no two trainings draw the same numbers.
SEED_OFFSET = {"classifier": 0, "contrastive": 100_000, "rotation": 200_000, "inpainting": 300_000}


def train(stage: str, run: Run, args: Args, model: nn.Module, train_set: Images, val_set: Images) -> dict:
    """Train the classifier (on adversarial images) or a task network, and return its checkpoint: the
    epoch of lowest loss on held-out images, whose weights `model` then has."""
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    epochs, batch_size, lr, optimizer = {
        "classifier": (args.epochs, args.batch_size, args.lr, sgd),
        "contrastive": (args.branch_epochs, args.head_batch_size, args.head_lr, torch.optim.Adam),
    }.get(stage, (args.branch_epochs, args.branch_batch_size, args.branch_lr, sgd))
    opt = optimizer(model.parameters(), lr)
    ddp = distribute(model)
    steps_per_epoch = count_batches(len(train_set), batch_size)
    labels = val_set.labels[val_set.index].to(run.device)
    ball = {"norm": args.norm, "eps": args.eps, "steps": args.attack_steps, "step_size": args.step_size}

    def losses(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # (B,)
        if stage != "classifier":
            return net(x)
        with batchnorm_mode(model, "eval"):
            x_adv = pgd(lambda z: ce_per_image(model(z), y), x, **ball)
        return ce_per_image(net(x_adv), y)

    for epoch in run.epochs(stage, epochs, model, opt, seed_offset=SEED_OFFSET[stage]):
        model.train()
        first_step = epoch * steps_per_epoch
        for step, (x, y) in enumerate(run.batches(train_set, batch_size), first_step):
            if stage != "inpainting":
                mode = "reflect" if stage == "contrastive" else "constant"
                x = random_crop_flip(x, args.image_size // 8, args.flip, mode)
            loss = losses(ddp, x, y).mean()

            if stage != "contrastive":
                opt.param_groups[0]["lr"] = learning_rate(lr, step, 0, epochs * steps_per_epoch)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss)

        model.eval()
        seed_step(args.seed, SEED_OFFSET[stage], 999_999)  # the same views and attacks after each epoch
        held_out = partial(map_images, images=val_set, run=run, batch_size=batch_size, indexed=True)
        val_loss = held_out(lambda x, i: losses(model, x, labels[i])).mean().item()
        run.keep_best(f"{stage}.pt", model, -val_loss, val_loss=val_loss)
    state = run.load(f"{stage}.pt", stage=stage, network=model.spec)
    model.load_state_dict(state["model"])
    return state


def get_branches(
    run: Run, args: Args, classifier: Network, train_set: Images, val_set: Images
) -> dict[str, nn.Module]:  # fmt: skip
    """{task: task network, frozen, in eval mode}: those of --branches, or trained."""
    torch.manual_seed(args.seed)
    branches = build_branches(args, classifier)
    values = b"".join(v.cpu().numpy().tobytes() for v in classifier.state_dict().values())
    spec = {"classifier": hashlib.sha256(values).hexdigest(), "images": train_set.digest}
    for task in needed_tasks(args):
        branch = branches[task].to(run.device)
        branch.spec = spec | {"task": task, "image size": args.image_size}  # for checkpoints
        for net in branch.children():
            if isinstance(net, Network):
                place_model(net, run.device, args.amp, args.compile)
        if args.branches:
            path = Path(args.branches) / f"{task}.pt"
            state = load_checkpoint(path)
            if state["network"] != branch.spec:
                raise UserError(f"{path} is for another classifier or other images: leave out --branches.")
            load_weights(branch, state["model"], path)
        else:
            train(task, run, args, branch, train_set, val_set)
        branch.eval().requires_grad_(False)
    return branches


def needed_tasks(args: Args) -> list[str]:
    """The tasks of --tasks, and contrastive for the row SSL."""
    return [task for task in TASKS if task in ("contrastive", *args.tasks)]


# ---- evaluation --------------------------------------------------------------------------------------


def make_defences(
    run: Run, args: Args, classifier: Network, branches: dict[str, nn.Module], train_set: Images
) -> list[Defence]:  # fmt: skip
    """The rows of the table: none, SSL (Mao et al.), and that of --tasks."""
    subset = draw(train_set, min(args.bank, len(train_set)), args.seed)

    def embed(x: Tensor, i: Tensor) -> Tensor:
        rand = image_rand(mix_seeds(mix_seeds(i, args.seed), FOR_BANK), args.views)
        return branches["contrastive"].embed(x, args.views, rand)

    bank = map_images(embed, subset, run, args.eval_batch_size, indexed=True).flatten(0, 1)
    name = "mtl" if args.tasks == TASKS else "+".join(args.tasks)
    ssl = {"contrastive": branches["contrastive"]}
    return [
        Defence("none", classifier, {}, args),
        Defence("ssl", classifier, ssl, args, bank, sign=True),
        Defence(name, classifier, {task: branches[task] for task in args.tasks}, args, bank),
    ]


def jobs(defences: list[Defence]) -> list[tuple[str, float, list[Defence]]]:
    """(attack, its lambda, the defences that are evaluated on its images): attacks that know F alone are made
    once for all defences."""
    args = defences[0].args
    kinds = ("none", "pgd", *args.attacks)
    adaptive = [kind for kind in ("bpda", "unrolled") if kind in kinds]
    todo = [(kind, 0.0, defences) for kind in ("none", "pgd", "suite") if kind in kinds]
    if adaptive:  # without a defence, bpda is PGD with more steps
        todo.append(("bpda", 0.0, defences[:1]))
    for defence in defences[1:]:
        todo += [("aware", lam, [defence]) for lam in args.lambdas if "aware" in kinds]
        todo += [(kind, 0.0, [defence]) for kind in adaptive]
    return todo


class Evaluation:
    """The test images, attacked and defended. i: positions in the test set, int64 (B,)."""

    def __init__(self, run: Run, test_set: Images):
        self.run, self.args, self.test_set = run, run.args, test_set
        self.labels = test_set.labels[test_set.index].to(run.device)
        self.seeds = mix_seeds(test_set.index.to(run.device), run.args.seed)

    def attacked(self, kind: str, x: Tensor, i: Tensor, defence: Defence, lam: float = 0.0) -> Tensor:
        return attack(kind, x, self.labels[i], self.seeds[i], defence, lam)

    def defended(self, x: Tensor, i: Tensor, defence: Defence) -> Tensor:
        return reverse(x, defence, mix_seeds(self.seeds[i], FOR_DEFENCE))

    def is_right(self, kind: str, lam: float, defences: list[Defence], x: Tensor, i: Tensor) -> Tensor:
        """1 where F is right on the attacked images behind each of the defences, else 0: (B, defences). The
        attack is made against the first of them."""
        x_adv = self.attacked(kind, x, i, defences[0], lam)
        logits = [defence.classify(self.defended(x_adv, i, defence)) for defence in defences]
        return torch.stack([is_correct(v, self.labels[i]) for v in logits], 1).float()

    def clean_attacked_reversed(self, x: Tensor, i: Tensor, defence: Defence) -> Tensor:
        """The images, the same attacked by PGD, and these reversed: (B, 3, 3, S, S)."""
        x_adv = self.attacked("pgd", x, i, defence)
        return torch.stack([x, x_adv, self.defended(x_adv, i, defence)], 1)

    def over_images(self, f: Callable, n: int = 0) -> Tensor:
        """f(x, i) of all test images, or of the first n (they are in random order)."""
        subset = self.test_set.subset(torch.arange(min(n or len(self.test_set), len(self.test_set))))
        return map_images(f, subset, self.run, self.args.eval_batch_size, indexed=True).cpu()


def evaluate(evaluation: Evaluation, defences: list[Defence], state: dict) -> list[dict]:
    """Rows of results.json: accuracies, the tasks' losses, the cells of the table, paired differences. state:
    the checkpoint of the classifier. A resumed run repeats no finished attack."""
    run, args = evaluation.run, evaluation.args
    names = {"none": "none", "suite": args.eval_attack}
    names |= {kind: f"{kind}-{args.eval_steps}" for kind in ("pgd", "aware")}
    names |= {kind: f"{kind}-{args.adaptive_steps}" for kind in ("bpda", "unrolled")}
    rows = run.rows()
    done = {(row["name"], row.get("attack"), row.get("lambda")) for row in rows}
    for kind, lam, evaluated in jobs(defences):
        if (evaluated[0].name, names[kind], lam) in done:
            continue
        began = time.perf_counter()
        correct = evaluation.over_images(partial(evaluation.is_right, kind, lam, evaluated))  # (n, defences)
        eps = 0 if kind == "none" else args.eps
        shared = {"attack": names[kind], "lambda": lam, "norm": args.norm, "eps": eps}
        shared |= {"epoch": state.get("epoch", 0), "source": state.get("source", "")}
        for defence, c in zip(evaluated, correct.T, strict=True):
            bits = "".join("01"[int(v)] for v in c)  # for paired differences
            rows.append({"name": defence.name} | shared | accuracy(c) | {"correct": bits})
        run.keep_rows(rows)
        accuracies = ", ".join(f"{row['name']} {row['accuracy']:.2f}%" for row in rows[-len(evaluated) :])
        of = f" with lambda {lam:g}" if kind == "aware" else ""
        run.say(f"{names[kind]}{of}: {accuracies} ({time.perf_counter() - began:.1f} s)")
    for defence in defences[1:]:
        if (defence.name, None, None) not in done:
            rows += loss_rows(evaluation, defence)
            run.keep_rows(rows)
    save_picture(evaluation, defences[2])
    return rows + columns([row for row in rows if "correct" in row])


def accuracy(correct: Tensor) -> dict[str, float]:
    """Accuracy in percent and its standard error, of (n,) 1 where F is right."""
    p, n = correct.mean().item(), len(correct)
    return {"examples": n, "accuracy": round(100 * p, 2), "se": round(100 * math.sqrt(p * (1 - p) / n), 2)}


SUITES = ("suite", "standard", "apgd")
# {column of the table: (its own attacks, others)}. A column shows the strongest attack on each defence, if
# one of its own was run. An adaptive attacker has them all.
COLUMNS = {
    "clean": (("none",), ()), "pgd": (("pgd",), ()), "defence-aware": (("aware",), ("pgd",)),
    "suite": (SUITES, ()), "adaptive": (("bpda", "unrolled"), ("pgd", "aware", *SUITES)),
}  # fmt: skip


def columns(rows: list[dict]) -> list[dict]:
    """From the rows of all attacks the cells of the table, then the paired differences between defences: mean
    and standard error of the difference per image."""
    cells, differences, strongest = [], [], {}
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = [row["attack"].split("-")[0] for row in rows]
    for column, (own, others) in COLUMNS.items():
        if not set(own) & set(kinds):
            continue
        of_column = [row for row, kind in zip(rows, kinds, strict=True) if kind in own + others]
        for name in names:
            of_name = [row for row in of_column if row["name"] == name]
            row = strongest[column, name] = min(of_name, key=lambda row: row["accuracy"])
            copied = {key: row[key] for key in ("name", "lambda", "examples", "accuracy", "se")}
            cells.append({"kind": "column", "column": column, "strongest": row["attack"]} | copied)
    for (a, b), column in itertools.product(itertools.combinations(names, 2), COLUMNS):
        if (column, a) in strongest:
            bits = [[float(c) for c in strongest[column, name]["correct"]] for name in (a, b)]
            d = 100 * (torch.tensor(bits[1]) - torch.tensor(bits[0]))
            se = d.std(correction=0).item() / math.sqrt(len(d))
            row = {"kind": "difference", "name": f"{b} - {a}", "column": column, "examples": len(d)}
            differences.append(row | {"difference": round(d.mean().item(), 2), "se": round(se, 2)})
    return cells + differences


def loss_rows(evaluation: Evaluation, defence: Defence, n: int = 500) -> list[dict]:
    """Each task's loss, not weighted, of images that are clean, attacked by PGD, and reversed; and its share
    of L, with the weights, in percent."""

    def losses(x: Tensor, i: Tensor) -> Tensor:  # (B, 3, tasks)
        images = evaluation.clean_attacked_reversed(x, i, defence).unbind(1)
        seeds = mix_seeds(evaluation.seeds[i], FOR_MEASURE)
        of_task = (torch.stack([defence.loss(t, z, seeds) for z in images], 1) for t in defence.branches)
        return torch.stack(list(of_task), 2)

    weighted, rows = evaluation.over_images(losses, n), []
    shares = 100 * (weighted / weighted.sum(2, keepdim=True)).mean(0)  # (3, tasks)
    for c, kind in enumerate(("clean", "attacked", "reversed")):
        for t, task in enumerate(defence.branches):
            values = weighted[:, c, t] / evaluation.args.weights[TASKS.index(task)]
            row = {"kind": "losses", "name": defence.name, "task": task, "images": kind}
            row |= {"share": round(shares[c, t].item(), 2), "mean": round(values.mean().item(), 4)}
            rows.append(row | {"values": [float(f"{v:.4g}") for v in values.tolist()]})
    return rows


def save_picture(evaluation: Evaluation, defence: Defence) -> None:
    """Write reversed.png: test images, attacked by PGD, reversed, and the difference."""
    images = evaluation.over_images(partial(evaluation.clean_attacked_reversed, defence=defence), 10)
    x, x_adv, z = images.unbind(1)
    gain = 0.5 / max((z - x_adv).abs().max().item(), 1e-6)
    difference = {f"difference x {gain:.3g}": 0.5 + gain * (z - x_adv)}  # grey is none
    if world()[0] == 0:
        pictures = {"clean": x, "attacked": x_adv, "reversed": z} | difference
        save_image_grid(evaluation.run.folder / "reversed.png", pictures)


# ---- the run -----------------------------------------------------------------------------------------

# With --branches these flags are those of the run that trained the task networks.
TRAINING = (
    "branch_epochs", "branch_batch_size", "branch_lr", "head_batch_size", "head_lr", "weight_decay",
    "branch_width", "crop", "flip", "temperature", "val_fraction",
)  # fmt: skip


def main(args: Args) -> dict:
    """Train what is not given, evaluate, print the table; returns what results.json holds."""
    if args.image_size < 8 or args.image_size & (args.image_size - 1):
        raise UserError(f"--image-size {args.image_size} must be a power of 2, 8 or more (inpainting).")
    if args.views < 2:
        raise UserError("--views 1: the contrastive loss compares views of an image; take 2 or more.")
    if args.branches and not args.victim:
        raise UserError("--branches has task networks of one classifier: name it with --victim.")
    given, files = None, [args.victim] if args.victim else []
    if args.victim:
        given = load_victim(args.victim)
        check_classifier(given, args.victim)
        if (size := given.get("args", {}).get("image_size", args.image_size)) != args.image_size:
            raise UserError(f"{args.victim} was trained on images of {size} pixels: --image-size {size}.")
    if args.branches:
        files += [str(Path(args.branches) / f"{task}.pt") for task in needed_tasks(args)]
        with reading(files[-1]):
            if not (Path(args.branches) / "rows.json").exists():  # it is written after all training
                raise UserError(f"--branches {args.branches}: give a run that has trained (with rows.json).")
            saved = load_checkpoint(files[-1])["args"]
            args = replace(args, **{flag: saved[flag] for flag in TRAINING})
    if args.compile and "unrolled" in args.attacks:
        raise UserError("--compile: unrolled needs second derivatives; take --attacks without it.")
    run = start_run(args)
    run.remember_files("networks", files)
    if args.branches:
        run.say(f"{args.branches}: " + ", ".join(f"{flag} {getattr(args, flag)}" for flag in TRAINING))
    results = run.finished(table) or train_and_evaluate(run, args, given)
    run.say(table(results, args) + f"\n\nThe checkpoints and reversed.png are in {run.folder}.")
    return results


def train_and_evaluate(run: Run, args: Args, given: dict | None) -> dict:
    """Train the task networks, and the classifier unless its checkpoint is `given`, and evaluate; returns
    what results.json holds."""
    train_set, test_set = run.load_data()
    if not args.eval_examples:
        test_set = draw(test_set, len(test_set), seed=0)  # in random order: folders are sorted by class
    train_set, val_set = split_train(train_set, val_fraction=args.val_fraction, seed=args.seed)
    if not len(val_set) and not args.branches:
        raise UserError("no images to select the epochs by: raise --val-fraction.")
    if not args.branches:
        for size in (args.branch_batch_size, args.head_batch_size, args.batch_size):
            check_batches(len(train_set), size)  # before the first training
    torch.manual_seed(args.seed)
    classes = len(test_set.classes)
    if given and given["network"]["heads"]["class"] != classes:
        raise UserError(f"{args.victim} was not trained for the {classes} classes of the data.")
    if given:
        classifier = rebuild(given, args.victim)
    else:
        mean, std = STATS[args.dataset]
        classifier = build_model(args.arch, {"class": classes}, width=args.width, mean=mean, std=std)
    place_model(classifier, run.device, args.amp, args.compile)
    state = given or train("classifier", run, args, classifier, train_set, val_set)
    classifier.eval().requires_grad_(False)
    branches = get_branches(run, args, classifier, train_set, val_set)
    with full_precision(nn.Identity(), not args.eval_amp):  # only switches TF32 off
        defences = make_defences(run, args, classifier, branches, train_set)
        return run.finish(evaluate(Evaluation(run, test_set), defences, state))


CARMON = "Carmon et al. 2019"  # the network of Table 1
# Names of weights of Carmon et al., after the prefix `module.` is dropped, and ours.
CARMON_NAMES = {
    r"^conv1\.": "trunk.conv1.", r"^bn1\.": "trunk.bn.", r"^fc\.": "heads.class.",
    r"^block(\d)\.layer\.": r"trunk.layer\1.", r"\.convShortcut\.": ".shortcut.1.",
}  # fmt: skip


def load_victim(path: str | Path) -> dict:
    """A checkpoint of ours, or one made of a WideResNet of Carmon et al. 2019 (RST), whose images are not
    normalised. No image passes through sub_block1, which is in their file. Raises UserError."""
    state = load_foreign(path)
    with reading(path):
        if "network" in state:
            return load_checkpoint(path)
        if state.get("normalize_input"):
            raise UserError(f"{path} wants normalised images: take a network without normalize_input.")
        weights = {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
        for name, value in state.get("state_dict", state).items():
            name = name.removeprefix("module.")
            for theirs, ours in CARMON_NAMES.items():
                name = re.sub(theirs, ours, name)
            if not name.startswith("sub_block1."):
                weights[name] = value
        blocks = len({name.split(".")[2] for name in weights if name.startswith("trunk.layer1.")})
        width = len(weights["trunk.layer1.0.conv1.weight"]) / 160
        spec = {"arch": f"wrn{6 * blocks + 4}_10", "heads": {"class": len(weights["heads.class.weight"])}}
        spec |= {"width": width, "stem": "cifar", "mean": [0.0] * 3, "std": [1.0] * 3}
    source = CARMON if (spec["arch"], width) == ("wrn28_10", 1) else ""
    return {"network": spec, "model": weights, "stage": "train", "epoch": 0, "source": source}


# ---- the table ---------------------------------------------------------------------------------------


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: Table 1 with ours, paired differences, the tasks' losses. The paper's
    numbers follow each line if the classifier has the layout of Carmon et al.'s and the flags their defaults
    (eps_v may be 8/255)."""
    rows = results["rows"]
    cells = {(row["column"], row["name"]): row for row in rows if row.get("kind") == "column"}
    differences = {(row["column"], row["name"]): row for row in rows if row.get("kind") == "difference"}
    shown, names = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = []
    for name in names:
        of_name = [cells[column, name] for column in shown]
        lines.append([name, *(f"{cell['accuracy']:.2f} ±{cell['se']:.2f}" for cell in of_name)])
        known = paper_numbers("mtl_reverse", args, name) if rows[0]["source"] == CARMON else []
        if known:
            lines.append(["  the paper (RST_adv)", *known, *[""] * len(shown[len(known) :])])
    for name in dict.fromkeys(name for _, name in differences):
        of_name = [differences[column, name] for column in shown]
        lines.append([name, *(f"{cell['difference']:+.2f} ±{cell['se']:.2f}" for cell in of_name)])
    eta, eps_v = eps_name(args.reverse_step_size), eps_name(args.reverse_eps)
    text = (
        f"\n{args.dataset}, {args.victim or args.arch}, attacked with {args.norm} eps {eps_name(args.eps)}.\n"
        f"Reversal: K {args.reverse_steps}, eta {eta}, eps_v {eps_v}, "
        f"weights {','.join(f'{w:g}' for w in args.weights)}.\n"
        f"Accuracy (%) and its standard error on {rows[0]['examples']:,} test images:\n\n"
    )
    header = [f"pgd-{args.eval_steps}" if column == "pgd" else column for column in shown]
    text += text_table(["defence", *header], lines) + "\n"
    for column in ("defence-aware", "adaptive"):
        if column in shown:
            strongest = []
            for name in names:
                kind, lam = cells[column, name]["strongest"], cells[column, name]["lambda"]
                of = f" with lambda {lam:g}" if kind.startswith("aware") else ""
                strongest.append(f"{name} {kind}{of}")
            text += f"\n{column}, the strongest attack on each: {', '.join(strongest)}."
    losses, lines = [row for row in rows if row.get("kind") == "losses"], {}
    for row in losses:
        line = lines.setdefault((row["name"], row["task"]), [f"{row['name']}, {row['task']}"])
        line.append(f"{row['mean']:.3f}")
        if row["images"] == "attacked":
            line.append(f"{row['share']:.1f}%")
    text += (
        f"\n\nThe tasks' losses, not weighted, of {len(losses[0]['values'])} test images, attacked by "
        f"PGD-{args.eval_steps}, and reversed;\nshare: of L, with the weights, on the attacked images.\n\n"
    )
    return text + text_table(["loss", "clean", "attacked", "share", "reversed"], list(lines.values()))


if __name__ == "__main__":
    cli(main, Args)
