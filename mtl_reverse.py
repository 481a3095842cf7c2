"""Reversing attacks at test time by several self-supervised tasks (Lawhon, Mao, Yang: Using multiple self-supervised tasks
improves model robustness, 2022, arXiv:2204.03714; the single-task method: Mao et al., ICCV 2021).

An attack on a classifier F also raises the losses of tasks that need no labels. So, before F sees an image x, change x
within a ball of radius eps_v so that those losses become small (Algorithm 1: `reverse` and `reverse_step`). All
networks stay as they are.

    x' = x + noise;  K times:
        L = L_s + L_r + L_i                                              contrastive, rotation and inpainting loss of x'
        x' <- x' - eta (L_s / L) d(L_s)  - eta (L_r / L) d(L_r)          in even iterations
        x' <- x' - eta (L_s / L) d(L_s)  - eta (L_i / L) d(L_i)          in odd ones
        x' <- the nearest image within eps_v of x
    predict F(x');  d: the gradient with respect to x', divided by its largest entry

    python mtl_reverse.py --quick                            # digits, about a minute and a half on two CPU cores
    python mtl_reverse.py --victim carmon2019.pt             # Table 1: CIFAR-10 and the published WideResNet-28-10 of Carmon et al.
    python mtl_reverse.py --victim runs/X/best.pt            # a classifier of any script here
    python mtl_reverse.py                                    # train the classifier too
    python mtl_reverse.py --victim carmon2019.pt --as-published   # a row more: what the authors' code computes
    torchrun --nproc-per-node=8 mtl_reverse.py --victim carmon2019.pt

The paper, clean / PGD at linf 8/255: no reversal 89.7 / 63.9, SSL (Mao et al.) 86.6 / 65.3, MTL 87.7 / 65.6.

The attackers (--attacks). pgd knows F only; it is the paper's. aware maximises CE(F(x)) - lambda L(x), so that little
is left to reverse. bpda goes through the defence and takes the gradient at x' for that at x. unrolled differentiates
through all K iterations. suite: AutoPGD, MultiTargeted and Square on F. No attacker sees the defence's own draws of
noise and views, which are the same for all.

Differs from the paper, from its code (SelfSupDefense, branch one-by-one, commit b8f5ea7), or is our choice where both
are silent:
- their code increases the losses; the paper and ours decrease them. Their code maps the inpainting gradient from 128 to
  32 pixels by a convolution with random weights; ours is the exact gradient (the sum over 4 x 4 pixels). Their rotation
  and inpainting networks see images that are not normalised, in train mode. Their code keeps three perturbations, ours
  one. --as-published is their loop, on our networks;
- L_s is a head on F's own frozen features, as in their code; the paper also speaks of a branch of its own and of a
  reversal "independent of F" (--backbone shared: all tasks on a trunk of their own, which starts as F's). The networks
  are their code's: a head 256-16, NiN, a context encoder;
- the ball's centre is the image as it came (line 11 of Algorithm 1 would move it), and the result is clipped to [0, 1];
- the losses are those of x', also in the first iteration (Algorithm 1 prints x, without the noise);
- a gradient is divided by its largest entry, per image, as in that commit (855d32d: per pixel; Algorithm 1 has it as it
  is: x' would hardly move); SSL takes its signs (Mao); the noise at the start is uniform in the ball;
- K 40, eta 2/255, temperature 0.2, 4 views and the ten steps of PGD are their code's. eps_v is 16/255: the paper's "8",
  doubled there;
- weights are 1:1:1, as in the paper (their code: 1:50:10). L_i is the mean over the hole where the paper prints the
  sum, which would take nearly all of L (--weights 1,1,9408 is the sum);
- L_s averages over all pairs of views of an image, as printed (their code takes one of three), and L_i over the hole
  (theirs: with its visible border);
- views are drawn per image and resized bicubically (theirs: one draw for the whole batch, bilinear);
- the negatives are views of --bank training images and L_t / L is per image, so that what becomes of an image does not
  depend on its batch (theirs: the batch's other images, --negatives batch);
- if one of rotation and inpainting is not among --tasks, the other moves x' in every iteration;
- inpainting's images are in [-1, 1], which tanh can reach, and enlarged by repeating pixels in training too (theirs, as
  far as is known: normalised by CIFAR's mean and deviation, and bilinear); the contrastive head's Adam has the rate
  1e-4 (Mao et al.; theirs 3e-4);
- how branches are trained is not in the paper: 200 epochs of SGD with Nesterov momentum, rate 0.1, weight decay 5e-4,
  batch 128 (the contrastive head: Adam, 1024), from related code;
- PGD's steps are 2/255; a classifier of our own is trained by PGD-10, with a cosine; all networks are those of the
  epoch of lowest loss on held-out images.
"""
import contextlib
import copy
import hashlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from common import (
    STATS, Epoch, Images, Network, OldRun as Run, UserError, batches, batchnorm_mode, build_model,
    ce_per_image, check_args, check_batches, check_classifier, old_cli as cli, count_batches, distribute,
    draw, eps_name, full_precision, image_uniform, learning_rate, load_checkpoint, load_data, load_trunk,
    load_weights, map_images, old_numbers as numbers, pgd, place_model, print_table,
    random_crop_flip, reading, rebuild, save_image_grid, seed_step, simclr_augment, split_train,
    old_start_run as start_run, suite_attacks, sum_over_ranks, sync_buffers, words, world, write_results,
)  # fmt: skip


@dataclass
class Args:
    # run
    stage: Literal["all", "train-branches"] = "all"  # train-branches: stop before the evaluation
    victim: str = ""  # the classifier to protect: a checkpoint of any script here, or Carmon et al.'s file; empty: train one (--arch)
    branches: str = ""  # folder of a run that trained the tasks' networks for the same --victim; empty: train them
    seed: int = 0  # seed of the split, the weights, the order of images, the attacks and the reversal
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks, and of the reversal
    compile: bool = False  # torch.compile the trunks
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/<script>[-quick]-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest in runs/ with the same arguments), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in a minute and a half on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels, a power of 2; other images are resized
    flip: bool = True  # mirror images at random in training and in views
    arch: Literal["wrn28_10", "resnet18", "resnet34", "resnet50", "preact18", "preact34"] = "wrn28_10"  # classifier, without --victim
    width: float = 1.0  # multiplies the number of channels of the classifier
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer. cifar: 3x3; imagenet: 7x7 with stride 2 and max-pooling, for large images (ResNets)
    # training of the classifier, without --victim: SGD with Nesterov momentum 0.9, half a cosine
    epochs: int = 100  # epochs of training the classifier
    batch_size: int = 128  # images per step over all GPUs, in training the classifier
    lr: float = 0.1  # initial learning rate of the classifier
    weight_decay: float = 5e-4  # weight decay of all SGD, on all weights
    # attack, in the classifier's training and in the evaluation
    norm: Literal["linf", "l2"] = "linf"  # norm of the ball that the attack stays in (the reversal's is linf)
    eps: float = 8 / 255  # radius of that ball, in [0, 1] pixel units (paper: 8/255)
    attack_steps: int = 10  # PGD steps (their code: 10)
    step_size: float = 0.0  # length of a step; 0: linf 2/255 (or more if eps is large), l2 2 eps / steps
    # branches, the tasks' networks: SGD as above for rotation and inpainting, Adam for the contrastive head
    backbone: Literal["separate", "shared"] = "separate"  # shared: all tasks on one trunk, which starts as the classifier's (section 5)
    branch_epochs: int = 200  # epochs of training each branch
    branch_batch_size: int = 128  # images per step over all GPUs, of rotation and inpainting (and of all if shared)
    branch_lr: float = 0.1  # initial learning rate of rotation and inpainting (and of all if shared)
    head_batch_size: int = 1024  # images per step of the contrastive head (not if shared); the others of the batch are its negatives
    head_lr: float = 1e-4  # learning rate of the contrastive head (Adam)
    branch_width: float = 1.0  # multiplies the channels of the rotation and inpainting networks
    inpaint_size: int = 128  # side to which images are enlarged for inpainting (not if shared), a power of 2
    crop: float = 0.08  # smallest share of an image's area that a view shows, in training and reversal
    temperature: float = 0.2  # tau: temperature of the contrastive loss, in training and reversal
    # reversal (Algorithm 1)
    tasks: str = "contrastive,rotation,inpainting"  # tasks of the MTL row, any of these; the SSL row is contrastive
    reverse_steps: int = 40  # K, number of iterations
    reverse_step_size: float = 2 / 255  # eta, step size
    reverse_eps: float = 16 / 255  # eps_v, radius of the ball around x
    weights: str = "1,1,1"  # weights of the contrastive, rotation and inpainting loss (their code: 1,50,10)
    views: int = 4  # views of each image in the contrastive loss
    negatives: Literal["bank", "batch"] = "bank"  # negatives of the contrastive loss: views of training images (bank), or of the batch's other images (batch)
    bank: int = 512  # number of training images in the bank
    as_published: bool = False  # also evaluate what the authors' code computes, with its own weights and negatives
    commit: Literal["b8f5ea7", "855d32d"] = "b8f5ea7"  # which commit of the authors' code --as-published follows. b8f5ea7: the last, which increases the losses; 855d32d: an earlier one that decreases them. Which one made Table 1 is not known
    # attackers
    attacks: str = "pgd,aware,bpda,unrolled"  # attacks besides pgd: aware (keeps L low), bpda and unrolled (go through the reversal), suite, suite-fast and standard (on F alone)
    lambdas: str = "0.5,1,2,5,10"  # lambda of the attack aware: comma-separated, one attack for each (0 is pgd)
    adaptive_steps: int = 20  # PGD steps of bpda and unrolled, from where pgd ended; the point of highest loss counts
    eot: int = 4  # draws of the defence over which bpda and unrolled average their loss and its gradient
    # evaluation
    val_fraction: float = 0.1  # share of the training images held out to select the epoch
    eval_examples: int = 0  # test images to evaluate on, drawn once and for all; 0: all
    eval_batch_size: int = 128  # images per batch of the evaluation over all GPUs (their code: 512 or 50)
    eval_amp: bool = False  # evaluate in mixed precision instead of float32 (the reversal is always in that of --amp)
    sweep: bool = False  # also accuracy over K and for eps_v of half, 3/4, 1 and 1 1/2 of --reverse-eps

    # Digits at their own 8 x 8 pixels; weights that make the three losses about equal, so that each has a say.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.125, epochs=10, batch_size=64, lr=0.05, eps=0.1, attack_steps=7,
        branch_epochs=15, branch_batch_size=64, branch_lr=0.05, head_batch_size=256, head_lr=1e-2, branch_width=0.25, inpaint_size=32, crop=0.5,
        reverse_steps=10, reverse_step_size=0.04, reverse_eps=0.15, weights="1,10,50", bank=64, attacks="pgd,aware,bpda,unrolled,suite-fast",
        lambdas="0.1,1",
        adaptive_steps=4, eot=1, eval_examples=150, eval_batch_size=256,
    )  # fmt: skip


TASKS = ("contrastive", "rotation", "inpainting")


# ---- the reversal: Algorithm 1 -------------------------------------------------------------------------------------


@dataclass
class Defence:
    """A row of the table: the tasks that move an image, with the weights of their losses. Without tasks the classifier stands alone."""

    name: str
    branches: dict[str, nn.Module]  # task: its network, which maps images to losses (B,)
    weights: dict[str, float]
    args: Args
    bank: Tensor | None = None  # (M, 16), negatives of L_s; None: the other images of the batch
    sign: bool = False  # steps along the gradient's signs, as in Mao et al.
    published: bool = False  # what the authors' code computes, in place of Algorithm 1


def ssl_loss(defence: Defence, task: str, z: Tensor, seeds: Tensor) -> Tensor:
    """A task's weighted loss per image, (B,). seeds: int64 (B,), from which the views are drawn."""
    branch, weight = defence.branches[task], defence.weights[task]
    if task != "contrastive":
        return weight * branch(z)
    views = defence.args.views
    rand = image_rand(torch.cat([mix_seeds(seeds, v) for v in range(views)]))
    return weight * branch(z, views, rand, defence.bank)


def whose_turn(tasks: Iterable[str], k: int) -> list[str]:
    """The tasks that move the image in iteration k = 1, 2, ...: lines 4, 6 and 8. Rotation and inpainting take turns if both are there."""
    if not {"rotation", "inpainting"} <= set(tasks):
        return list(tasks)
    return [t for t in tasks if t != ("inpainting" if k % 2 == 0 else "rotation")]


def direction(g: Tensor, sign: bool) -> Tensor:
    """Where a gradient (B, 3, S, S) points: divided by its largest entry, or its signs. The derivative of these, for attackers, is taken
    to be that of the former, since a sign has none (BPDA)."""
    scaled = g / (g.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
    return scaled + (g.sign() - scaled).detach() if sign else scaled


def reverse_step(z: Tensor, x: Tensor, k: int, defence: Defence, seeds: Tensor, differentiable: bool = False) -> Tensor:
    """Iteration k of Algorithm 1: from z to the next image, in the ball around x. differentiable: so that its derivative can be taken."""
    args, turn, losses, move = defence.args, whose_turn(defence.branches, k), {}, 0
    with torch.enable_grad():
        z = z if differentiable else z.detach().requires_grad_()
        for task in defence.branches:
            with torch.set_grad_enabled(differentiable or task in turn):  # of the third only the value is needed
                losses[task] = ssl_loss(defence, task, z, mix_seeds(seeds, k))
        L = sum(losses.values())  # line 3, (B,)
        for task in turn:  # lines 4 to 9
            (g,) = torch.autograd.grad(losses[task].sum(), z, create_graph=differentiable)
            move = move + (losses[task] / L).view(-1, 1, 1, 1) * direction(g, defence.sign)
        z = z - args.reverse_step_size * move
        z = torch.clamp(z, x - args.reverse_eps, x + args.reverse_eps).clamp(0, 1)  # line 10
    return z if differentiable else z.detach()


def start(x: Tensor, defence: Defence, seeds: Tensor) -> Tensor:
    """Line 1: noise, uniform in the ball."""
    noise = 2 * image_uniform(mix_seeds(seeds, 0), x.shape[1:].numel()).view_as(x) - 1
    return (x + defence.args.reverse_eps * noise).clamp(0, 1)


def trajectory(x: Tensor, defence: Defence, seeds: Tensor) -> Iterator[Tensor]:
    """The images of Algorithm 1: x with noise, then after each of the K iterations; x itself if there are none, or no tasks."""
    if not defence.branches or defence.args.reverse_steps == 0:
        yield x
        return
    z = start(x, defence, seeds)
    yield z
    for k in range(1, defence.args.reverse_steps + 1):
        z = reverse_step(z, x, k, defence, seeds)
        yield z


def reverse(x: Tensor, defence: Defence, seeds: Tensor) -> Tensor:
    """Algorithm 1: images x (B, 3, S, S) in [0, 1], attacked or not, to x'.

    seeds: int64 (B,), an image's noise and views are drawn from its own; with a bank of negatives, nothing depends on the batch.
    """
    if defence.published:
        return reverse_as_published(x, defence, seeds)
    for z in trajectory(x, defence, seeds):  # noqa: B007
        pass
    return z  # the last one


def mix_seeds(seeds: Tensor, n: int) -> Tensor:
    """Other seeds (int64) for the n-th use of these, by a step of a linear congruential generator (Knuth's constants)."""
    return seeds * 6364136223846793005 + (n + 1) * 1442695040888963407 % 2**63


def image_rand(seeds: Tensor) -> Callable[..., Tensor]:
    """Stands in for torch.rand where the first dimension counts the images that have these seeds, int64 (B,): what an image is given
    depends on its seed and on how often it was asked before, not on the batch it is in (see `image_uniform`)."""
    calls = itertools.count(1)

    def rand(*shape: int, device: torch.device | None = None) -> Tensor:
        return image_uniform(mix_seeds(seeds, next(calls)), math.prod(shape[1:])).view(shape)

    return rand


# ---- the tasks: networks and losses --------------------------------------------------------------------------------


class Contrastive(nn.Module):
    """L_s (section 3.2.1): how far apart the views of an image are, compared with other images. A small head on the features of `net`."""

    def __init__(self, net: Network, args: Args):
        super().__init__()
        self.net = net
        self.head = nn.Sequential(nn.Linear(net.trunk.dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 16))
        self.crop, self.flip, self.temperature = args.crop, args.flip, args.temperature

    def augment(self, x: Tensor, rand: Callable) -> Tensor:
        """A view of each image: crop, mirror, colour jitter at full strength, always, and grey with probability 0.2 (as in their code)."""
        return simclr_augment(x, strength=1.0, crop=self.crop, flip=self.flip, jitter=1.0, rand=rand)

    def embed(self, x: Tensor, views: int, rand: Callable = torch.rand) -> Tensor:
        """Unit vectors of `views` views of each image: (B, 3, S, S) -> (B, views, 16). `rand` is asked for numbers of views * B images."""
        v = self.augment(x.repeat(views, 1, 1, 1), rand)  # the first view of all images, then the second, ...
        return F.normalize(self.head(self.net.features(v)), dim=1).unflatten(0, (views, len(x))).transpose(0, 1)

    def losses(self, x: Tensor, views: int = 2, rand: Callable = torch.rand, bank: Tensor | None = None) -> Tensor:
        """For each image, -log of the share of view j among all that view i is compared with: (B, V, V); i = j is not meant.

        bank: (M, 16), the negatives; None: the views of all other images of the batch, on all GPUs.
        """
        z = self.embed(x, views, rand)
        similar = z @ z.mT / self.temperature  # (B, V, V): z_i z_j / tau
        if bank is not None:
            negative = z @ bank.T / self.temperature  # (B, V, M)
        else:
            every_z, first = gather(z)  # (N, V, 16)
            negative = (z.flatten(0, 1) @ every_z.flatten(0, 1).T / self.temperature).unflatten(0, z.shape[:2])  # (B, V, N V)
            image_of_view = torch.arange(len(every_z), device=x.device).repeat_interleave(views)
            same_image = image_of_view == first + torch.arange(len(x), device=x.device)[:, None]  # (B, N V)
            negative = negative.masked_fill(same_image[:, None], -math.inf)
        itself = torch.eye(views, dtype=torch.bool, device=x.device)
        log_sum = torch.cat([similar.masked_fill(itself, -math.inf), negative], 2).logsumexp(2, keepdim=True)  # the sum over k
        return log_sum - similar

    def forward(self, x: Tensor, views: int = 2, rand: Callable = torch.rand, bank: Tensor | None = None) -> Tensor:
        """L_s per image, (B,): the mean over the pairs of different views, of which y_ij = 1."""
        losses = self.losses(x, views, rand, bank)
        itself = torch.eye(views, dtype=torch.bool, device=x.device)
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
    return sum_over_ranks(torch.cat([z.new_zeros(before, *z.shape[1:]), z, z.new_zeros(after, *z.shape[1:])])), before


class NiN(nn.Module):
    """Network in Network (Lin et al. 2014) with four blocks, as in Gidaris et al. 2018: (B, 3, S, S) -> (B, dim)."""

    def __init__(self, width: float):
        super().__init__()
        a, b, c = (max(1, round(n * width)) for n in (192, 160, 96))

        def conv(c_in: int, c_out: int, size: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, size, padding=size // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.layers = nn.Sequential(
            conv(3, a, 5), conv(a, b, 1), conv(b, c, 1), nn.MaxPool2d(3, 2, 1),
            conv(c, a, 5), conv(a, a, 1), conv(a, a, 1), nn.AvgPool2d(3, 2, 1),
            conv(a, a, 3), conv(a, a, 1), conv(a, a, 1),
            conv(a, a, 3), conv(a, a, 1), conv(a, a, 1),
        )  # fmt: skip
        self.dim = a

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class Rotation(nn.Module):
    """L_r (section 3.2.3): cross-entropy of telling by how much an image was turned, averaged over the four rotations."""

    def __init__(self, net: Network):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])  # (4 B, 3, S, S)
        k = torch.arange(4, device=x.device).repeat_interleave(len(x))
        return ce_per_image(self.net(turned, "rotation"), k).unflatten(0, (4, len(x))).mean(0)  # (B,)


def context_channels(size: int) -> list[int]:
    """Channels after each halving of an image of `size` pixels to 4: 64, 64, 128, 256, 512 for 128 pixels."""
    return [min(64 * 2 ** max(i - 1, 0), 512) for i in range(int(math.log2(size)) - 2)]


class ContextEncoder(nn.Module):
    """Encoder of the inpainting network (Pathak et al. 2016): (B, 3, size, size) -> (B, dim); convolutions halve the image to 4 x 4."""

    def __init__(self, size: int, width: float):
        super().__init__()
        channels = [3] + [max(1, round(c * width)) for c in context_channels(size)]
        self.dim = max(1, round(4000 * width))
        layers = []
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], self.dim, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


class ContextDecoder(nn.Module):
    """Its decoder: (B, dim, 1, 1) -> the image's centre, (B, 3, size / 2, size / 2), in (-1, 1)."""

    def __init__(self, dim: int, size: int, width: float):
        super().__init__()
        middle = [max(1, round(c * width)) for c in context_channels(size)[1:]][::-1]
        channels = [dim, *middle, 3]
        layers = []
        for i, (c_in, c_out) in enumerate(zip(channels, channels[1:], strict=False)):
            stride, padding = (1, 0) if i == 0 else (2, 1)  # 1 to 4 pixels, then twice as many
            layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=i == len(middle))]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def enlarge(x: Tensor, size: int) -> Tensor:
    """Repeat pixels: (B, C, S, S) -> (B, C, size, size). Its gradient, the adjoint map, sums over the copies of a pixel."""
    return x.repeat_interleave(size // x.shape[3], 3).repeat_interleave(size // x.shape[2], 2)


class Inpainting(nn.Module):
    """L_i (section 3.2.2): mean squared error of the pixels painted into a hole in the middle, in units of half the range of pixels."""

    FILL = (117 / 255, 104 / 255, 123 / 255)  # ImageNet's mean colour

    def __init__(self, net: Network, decoder: Network, size: int):
        super().__init__()
        self.net, self.decoder, self.size = net, decoder, size
        self.register_buffer("fill", torch.tensor(self.FILL).view(1, 3, 1, 1), persistent=False)

    def paint(self, x: Tensor) -> tuple[Tensor, Tensor, slice]:
        """(what is painted, what was there, both (B, 3, size / 2, size / 2) in (-1, 1); which of their rows and columns are the hole)."""
        x = enlarge(x, self.size)
        border = self.size // 32  # of the centre, 64 pixels of 128, the outer 4 are visible
        hole = slice(self.size // 4 + border, 3 * self.size // 4 - border)
        holed = x.clone()
        holed[:, :, hole, hole] = self.fill
        painted = self.decoder.features(self.net.features(holed)[:, :, None, None])
        centre = slice(self.size // 4, 3 * self.size // 4)
        return painted, 2 * x[:, :, centre, centre] - 1, slice(border, self.size // 2 - border)

    def forward(self, x: Tensor) -> Tensor:
        """L_i per image, (B,)."""
        painted, truth, hole = self.paint(x)
        return (painted - truth)[:, :, hole, hole].square().mean((1, 2, 3))


class Shared(nn.ModuleDict):
    """All tasks on one trunk, trained together: L = L_s + L_r + L_i per image."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(task(x) for task in self.values())


def build_branches(args: Args, victim: Network) -> dict[str, nn.Module]:
    """{task: its network}, each of which maps images to losses (B,); untrained, but for the classifier's features."""
    if args.backbone == "shared":
        net = build_model(**victim.spec | {"heads": {"rotation": 4}})
        load_trunk(net.trunk, {"model": victim.state_dict()}, "the classifier")
        features, rotation, inpainting, size, dim = net, net, net, args.image_size, net.trunk.dim
    else:
        mean, std = STATS[args.dataset]
        features, rotation, size = victim, Network(NiN(args.branch_width), {"rotation": 4}, mean, std), args.inpaint_size
        inpainting = Network(ContextEncoder(size, args.branch_width), {}, [0.5] * 3, [0.5] * 3)  # images in [-1, 1]
        dim = inpainting.trunk.dim
    decoder = Network(ContextDecoder(dim, size, args.branch_width), {}, [0.0], [1.0])  # a Network for its mixed precision
    tasks = [Contrastive(features, args), Rotation(rotation), Inpainting(inpainting, decoder, size)]
    return dict(zip(TASKS, tasks, strict=True))


# ---- what the authors' code computes ---------------------------------------------------------------------------------


def reverse_as_published(x: Tensor, defence: Defence, seeds: Tensor) -> Tensor:
    """The loop of the code linked in the paper (attack_constrastive_Mhead at --commit), on our networks; its last commit increases the losses.

    Three perturbations with starts of their own, of which the first is the result. The other two are copied from it only in their own
    turn, so their gradients are two iterations old. Rotation and inpainting networks: in train mode, on images that are not normalised;
    L_i is the mean over the whole centre, the visible border included. Weights L_t / L of the whole batch, with 1:50:10. L_s: negatives are
    the batch; of three positives the first counts; one draw of the augmentation for all images of a view.
    """
    args, branches, size = defence.args, defence.branches, defence.branches["inpainting"].size
    generator = torch.Generator(x.device).manual_seed(int(seeds[0]) % 2**63) if len(x) else None
    eps, eta = args.reverse_eps, args.reverse_step_size

    def uniform(like: Tensor) -> Tensor:
        noise = 2 * torch.rand(like.shape, generator=generator, device=x.device) - 1
        return (like + eps * noise).clamp(0, 1) - like

    def once_per_view(n: int, *shape: int, device: torch.device) -> Tensor:
        drawn = torch.rand(args.views, 1, *shape, generator=generator, device=device)
        return drawn.expand(-1, n // args.views, *[-1] * len(shape)).flatten(0, 1)

    def raw(net: Network, z: Tensor) -> Tensor:
        return z * net.std + net.mean  # what the network's own normalisation undoes

    def first_positive(losses: Tensor) -> Tensor:  # (B, V, V) -> (B, V)
        return torch.cat([losses[:, :1, 1], losses[:, 1:, 0]], 1)

    def scaled(g: Tensor) -> Tensor:
        if args.commit == "b8f5ea7":
            return direction(g, sign=False)
        return g / (g.abs().amax(1, keepdim=True) + 1e-12)  # per pixel

    scale = size // x.shape[3]
    bound = 1 / math.sqrt(3 * scale**2)  # PyTorch's initial weights of a convolution
    weight, bias = (bound * (2 * torch.rand(shape, generator=generator, device=x.device) - 1) for shape in ((3, 3, scale, scale), (3,)))
    big = enlarge(x, size)
    delta = {"contrastive": uniform(x), "rotation": uniform(x), "inpainting": uniform(big)}
    for i in range(args.reverse_steps):
        z = {t: ((big if t == "inpainting" else x) + delta[t]).requires_grad_() for t in TASKS}
        turn = "rotation" if i % 2 else "inpainting"
        with torch.enable_grad(), contextlib.ExitStack() as modes:
            for t in ("rotation", "inpainting"):
                modes.enter_context(batchnorm_mode(branches[t], "train"))
            painted, truth, _ = branches["inpainting"].paint(raw(branches["inpainting"].net, z["inpainting"]))
            losses = {
                "contrastive": first_positive(branches["contrastive"].losses(z["contrastive"], args.views, once_per_view)).mean(),
                "rotation": 50 * branches["rotation"](raw(branches["rotation"].net, z["rotation"])).mean(),
                "inpainting": 10 * (painted - truth).square().mean(),
            }
            grads = {t: torch.autograd.grad(losses[t], z[t])[0] for t in ("contrastive", turn)}
        if turn == "inpainting":  # back to 32 pixels by a convolution with random weights, drawn once per call
            grads[turn] = F.conv2d(grads[turn], weight, bias, stride=scale)
        total = sum(losses.values())
        for t in ("contrastive", turn):
            step = eta * (losses[t] / total).detach() * scaled(grads[t])
            moved = delta["contrastive"] - step if args.commit == "855d32d" else delta["contrastive"] + step
            delta["contrastive"] = moved.clamp(-eps, eps)
        delta["contrastive"] = (x + delta["contrastive"]).clamp(0, 1) - x
        delta[turn] = enlarge(delta["contrastive"], size) if turn == "inpainting" else delta["contrastive"]
    return (x + delta["contrastive"]).clamp(0, 1)


# ---- the attackers -------------------------------------------------------------------------------------------------

# What seeds are mixed with, so that no two uses draw the same: the defence after an attack, PGD's start, measuring losses, the bank of
# negatives, the attackers' own draws.
FOR_DEFENCE, FOR_START, FOR_MEASURE, FOR_BANK, FOR_ATTACKER = 1, 2, 3, 4, 1_000


def logits_of(victim: Network, x: Tensor, args: Args) -> Tensor:
    """F(x), in float32 unless --eval-amp."""
    with full_precision(victim, not args.eval_amp):
        return victim(x, "class")


class Unrolled(torch.autograd.Function):
    """`reverse` with its derivative, for attackers: backwards through all iterations, each computed again from where it began.
    So K images are kept and one iteration's graph at a time, whatever K is."""

    PART = 64  # images per graph, where they do not depend on each other: a graph holds 6 GB for WideResNet-28-10 and 4 views (counted on a CPU, bf16)

    @staticmethod
    def forward(ctx: Any, x: Tensor, defence: Defence, seeds: Tensor) -> Tensor:
        ctx.defence, ctx.seeds, ctx.x = defence, seeds, x.detach()
        ctx.points = list(trajectory(ctx.x, defence, seeds))
        return ctx.points[-1].clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if len(ctx.points) == 1:  # no iterations
            return g, None, None
        parts = torch.arange(len(g), device=g.device).split(Unrolled.PART if ctx.defence.bank is not None else max(1, len(g)))
        return torch.cat([Unrolled.pull_back(ctx, g[rows], rows) for rows in parts]), None, None

    @staticmethod
    def pull_back(ctx: Any, g: Tensor, rows: Tensor) -> Tensor:
        """From the derivative of something by the last images to that by the first, of some rows of the batch."""
        defence, seeds, for_x = ctx.defence, ctx.seeds[rows], torch.zeros_like(g)
        for k in range(len(ctx.points) - 1, 0, -1):
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention kernels (ViTs) have no second derivative
                z, x = ctx.points[k - 1][rows].requires_grad_(), ctx.x[rows].requires_grad_()
                after = reverse_step(z, x, k, defence, seeds, differentiable=True)
            g, more = torch.autograd.grad(after, (z, x), g)  # x also is the centre of the ball
            for_x += more
        with torch.enable_grad():
            x = ctx.x[rows].requires_grad_()
            first = start(x, defence, seeds)
        return for_x + torch.autograd.grad(first, x, g)[0]


def attack(kind: str, x: Tensor, y: Tensor, seeds: Tensor, victim: Network, defence: Defence, lam: float = 0.0) -> Tensor:
    """The attacker's images, in the eps-ball around x (section 3.1). See the top for the kinds; none of them sees the defence's draws."""
    args, draws = defence.args, FOR_ATTACKER

    def fresh() -> Tensor:  # seeds of the next draw of the defence
        nonlocal draws
        draws += 1
        return mix_seeds(seeds, draws)

    def class_loss(z: Tensor) -> Tensor:
        return ce_per_image(logits_of(victim, z, args), y)

    def lagrangian(z: Tensor) -> Tensor:
        new = fresh()
        return class_loss(z) - lam * sum(ssl_loss(defence, t, z, new) for t in defence.branches)

    def mean(defended: Callable) -> Tensor:  # over draws; checkpoint: F's graph is made again in turn, so that not all are kept
        draws = args.eot if defence.branches else 1
        return sum(checkpoint(class_loss, defended(), use_reentrant=False, preserve_rng_state=False) for _ in range(draws)) / draws

    def straight_through(z: Tensor) -> Tensor:  # BPDA (Athalye et al. 2018): the reversal's derivative is taken to be the identity
        return mean(lambda: z + (reverse(z.detach(), defence, fresh()) - z).detach())

    def unrolled(z: Tensor) -> Tensor:
        return mean(lambda: Unrolled.apply(z, defence, fresh()))

    if kind == "none":
        return x
    u = image_uniform(mix_seeds(seeds, FOR_START), x.shape[1:].numel()).view_as(x)
    noise = 2 * u - 1 if args.norm == "linf" else F.normalize(torch.erfinv(2 * u - 1).flatten(1)).view_as(x)
    by_pgd = partial(pgd, norm=args.norm, eps=args.eps, step_size=args.step_size)
    start, steps = x + args.eps * noise, args.attack_steps
    if kind == "aware" and lam > 0:
        return by_pgd(lagrangian, x, steps=steps, start=start)
    x_adv = by_pgd(class_loss, x, steps=steps, start=start)
    if kind in ("suite", "suite-fast", "standard"):
        return suite(kind, x, x_adv, y, lambda z: logits_of(victim, z, args), args)
    if kind in ("bpda", "unrolled"):
        loss = straight_through if kind == "bpda" else unrolled
        return by_pgd(loss, x, steps=args.adaptive_steps, start=x_adv, keep_best=True)
    return x_adv


def suite(kind: str, x: Tensor, x_adv: Tensor, y: Tensor, classify: Callable, args: Args) -> Tensor:
    """x_adv, but where F still stands, the images of the first attack of the suite (on F alone) that F falls to."""
    x_adv = x_adv.clone()
    with torch.no_grad():
        for _, starts, by in suite_attacks(kind, args.norm, args.eps, args.seed):
            for i in range(starts):
                rows = (classify(x_adv).argmax(1) == y).nonzero().squeeze(1)
                if not len(rows):
                    return x_adv
                found = by(classify, x[rows], y[rows], i)
                fooled = classify(found).argmax(1) != y[rows]
                x_adv[rows[fooled]] = found[fooled]
    return x_adv


# ---- training ------------------------------------------------------------------------------------------------------

# Added to an epoch's number, so that no two kinds of training draw the same random numbers.
FIRST_ID = {"classifier": 0, "contrastive": 100_000, "rotation": 200_000, "inpainting": 300_000, "shared": 400_000}


def train(name: str, run: Run, args: Args, net: nn.Module, trained: nn.Module, about: dict, train_set: Images, val_set: Images) -> dict:
    """Train `trained`, a part of `net` or all of it, and return its checkpoint: the epoch of lowest loss on held-out images.

    name: 'classifier' (net: images to logits; adversarial training), a task or 'shared' (net: images to losses, which are minimised).
    about: what the checkpoint says of it, as its `network`.
    """
    if (done := run.load(f"{name}.pt")) is not None:
        load_weights(trained, done["model"], run.folder / f"{name}.pt")
        return done  # before the run was resumed
    run.begin()
    if name == "classifier":
        epochs, batch_size, lr = args.epochs, args.batch_size, args.lr
    elif name == "contrastive":
        epochs, batch_size, lr = args.branch_epochs, args.head_batch_size, args.head_lr
    else:
        epochs, batch_size, lr = args.branch_epochs, args.branch_batch_size, args.branch_lr
    if name == "contrastive":
        opt = torch.optim.Adam(trained.parameters(), lr)
    else:
        opt = torch.optim.SGD(trained.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    state = run.resume(name, trained, opt)
    best = state.get("best", {"loss": math.inf, "epoch": 0, "model": {}})
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(net, args.sync_bn)
    steps = count_batches(len(train_set), batch_size)
    train_attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)

    def loss_of(net: nn.Module, bare: nn.Module, x: Tensor, y: Tensor) -> Tensor:  # (B,)
        if name != "classifier":
            return net(x)
        with batchnorm_mode(bare, "eval"):
            x_adv = train_attack(lambda z: ce_per_image(bare(z, "class"), y), x)
        return ce_per_image(net(x_adv, "class"), y)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": about, "model": trained.state_dict(), "optimizer": opt.state_dict(), "args": vars(args), "name": name,
            "epoch": epoch, "step": step, "sums": sums or {}, "history": history, "best": best, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        epoch_id = FIRST_ID[name] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        stream = batches(
            train_set, batch_size, run.device, shuffle=args.seed * 1_000_003 + epoch_id, skip=skip, workers=args.workers
        )
        net.eval()  # what is frozen stays in eval mode
        trained.train()
        with Epoch(epoch, len(train_set), steps, run.device, skip, sums) as log:
            for x, y in stream:  # (B, 3, S, S), (B,)
                sync_buffers(net)
                seed_step(args.seed, epoch_id, log.step)
                step = epoch * steps + log.step
                for group in opt.param_groups if name != "contrastive" else []:
                    group["lr"] = learning_rate(lr, step, 0, epochs * steps)
                if name != "inpainting":
                    x = random_crop_flip(x, args.image_size // 8, args.flip, "reflect" if name == "contrastive" else "constant")
                loss = loss_of(ddp, net, x, y).mean()
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                log.update(len(y), loss=loss)
                if log.interrupted():
                    break
        if log.interrupted():
            save(epoch, log.step, log.shared_sums())
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        sync_buffers(net)
        net.eval()
        seed_step(args.seed, FIRST_ID[name], 999_999)  # each epoch is judged by the same draws
        labels = val_set.labels[val_set.index].to(run.device)
        held_out = map_images(lambda x, i: loss_of(net, net, x, labels[i]), val_set, run, batch_size, indexed=True).mean().item()
        if held_out < best["loss"]:
            best = {"loss": held_out, "epoch": epoch + 1, "model": copy.deepcopy(trained.state_dict())}
        run.log(
            history, name, epoch + 1, epochs, lr=opt.param_groups[0]["lr"], **log.means(), val_loss=held_out,
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        save(epoch + 1)
    if not best["model"]:
        raise UserError(f"the loss of {name} on held-out images was never a number: take a smaller --lr, --branch-lr or --head-lr.")
    run.save(f"{name}.pt", {
        "network": about, "model": best["model"], "args": vars(args), "name": name, "stage": "train", "epoch": best["epoch"],
        "val_loss": best["loss"],
    })  # fmt: skip
    trained.load_state_dict(best["model"])
    return run.load(f"{name}.pt")


def get_classifier(run: Run, args: Args, given: dict | None, train_set: Images, val_set: Images) -> tuple[Network, dict]:
    """(F, frozen, in eval mode; its checkpoint): that of --victim, or trained."""
    torch.manual_seed(args.seed)
    mean, std = STATS[args.dataset]
    heads = {"class": len(train_set.classes)}
    victim = rebuild(given, args.victim) if given else build_model(args.arch, heads, width=args.width, stem=args.stem, mean=mean, std=std)
    place_model(victim, run.device, args.amp, args.compile)
    state = given or train("classifier", run, args, victim, victim, victim.spec, train_set, val_set)
    return victim.eval().requires_grad_(False), state


def get_branches(run: Run, args: Args, victim: Network, tasks: list[str], train_set: Images, val_set: Images) -> dict[str, nn.Module]:
    """{task: its network, frozen, in eval mode}: those of --branches, or trained."""
    digest = hashlib.sha256()
    for v in victim.state_dict().values():
        digest.update(v.cpu().contiguous().numpy().tobytes())
    torch.manual_seed(args.seed)
    branches = build_branches(args, victim)
    for branch in branches.values():
        for net in branch.modules():
            if isinstance(net, Network) and net is not victim:
                place_model(net, run.device, args.amp, args.compile)
        branch.to(run.device)
    if args.backbone == "shared":
        together = Shared(branches)
        todo = {"shared": (together, together)}
    else:
        todo = {t: (branches[t], branches[t].head if t == "contrastive" else branches[t]) for t in tasks}
    for name, (net, trained) in todo.items():
        network = {"branch": name, "dataset": args.dataset, "image_size": args.image_size}
        if name in ("contrastive", "shared"):
            network |= {"classifier": digest.hexdigest(), "crop": args.crop, "flip": args.flip, "temperature": args.temperature}
        if name != "contrastive":
            network["branch_width"] = args.branch_width
        if name == "inpainting":
            network["inpaint_size"] = args.inpaint_size
        if args.branches:
            path = Path(args.branches) / f"{name}.pt"
            if not path.exists():
                raise UserError(f"--branches {args.branches} holds no {path.name}: name a run with the same --backbone that trained it (--tasks).")
            state = load_checkpoint(path)
            if state["network"] != network:
                k = next((k for k in network if state["network"].get(k) != network[k]), "more")
                told = "was trained on the features of another classifier" if k == "classifier" else (
                    f"has {k} {state['network'].get(k)}, not {network.get(k)}")  # fmt: skip
                raise UserError(f"{path} {told}: train branches for this one (without --branches).")
            load_weights(trained, state["model"], path)
        else:
            train(name, run, args, net, trained, network, train_set, val_set)
        net.eval().requires_grad_(False)
    return branches


# ---- evaluation ----------------------------------------------------------------------------------------------------

# Table 1: {defence: (clean, attacked)}; defence-aware attackers are said to do no better than PGD, without numbers.
PAPER = {"none": (89.7, 63.9), "ssl": (86.6, 65.3), "mtl": (87.7, 65.6)}


def paper_number(defence: str, kind: str, args: Args, carmon: bool) -> float | None:
    """Table 1's accuracy, if the setting is the paper's, as far as that is known; carmon: --victim is Carmon et al.'s file."""
    usual = Args()
    same = ("dataset", "image_size", "norm", "eps", "attack_steps", "step_size", "eval_examples", "eval_amp")
    if defence != "none":  # as in their code where the paper is silent; its "8" may be half of what the code calls 8
        same += ("backbone", "views", "temperature", "reverse_steps", "reverse_step_size")
        carmon = carmon and args.reverse_eps in (8 / 255, 16 / 255) and (defence == "ssl" or numbers(args.weights, "weights") == [1, 1, 1])
    if not carmon or defence not in PAPER or kind not in ("none", "pgd") or any(getattr(args, k) != getattr(usual, k) for k in same):
        return None
    return PAPER[defence][kind == "pgd"]


def make_defences(run: Run, args: Args, branches: dict[str, nn.Module], train_set: Images) -> list[Defence]:
    """The rows of the table: none, SSL (Mao et al.), that of --tasks, and what the authors' code computes if asked for."""
    weights = dict(zip(TASKS, numbers(args.weights, "weights"), strict=True))
    bank = None
    if args.negatives == "bank":
        some = draw(train_set, min(args.bank, len(train_set)), args.seed)

        def embed(x: Tensor, i: Tensor) -> Tensor:
            rand = image_rand(torch.cat([mix_seeds(mix_seeds(mix_seeds(i, args.seed), FOR_BANK), v) for v in range(args.views)]))
            return branches["contrastive"].embed(x, args.views, rand)

        bank = map_images(embed, some, run, args.eval_batch_size, indexed=True).flatten(0, 1)
    tasks = words(args.tasks)
    name = "mtl" if set(tasks) == set(TASKS) else "+".join(tasks)
    ours = Defence(name, {t: branches[t] for t in TASKS if t in tasks}, weights, args, bank)
    ssl = Defence("ssl", {"contrastive": branches["contrastive"]}, weights, args, bank, sign=True)
    return [Defence("none", {}, {}, args), ssl, ours] + ([replace(ours, name="as published", published=True)] if args.as_published else [])


def jobs(defences: list[Defence]) -> list[tuple[str, float, list[Defence]]]:
    """(attack, its lambda, the defences to judge by its images). Attacks that know F only are made once for all."""
    args, known = defences[0].args, ("none", "pgd", "suite", "suite-fast", "standard")
    kinds = ["none", "pgd", *words(args.attacks)]
    attacked = [d for d in defences if not d.published]  # which PGD is enough for
    todo = [(kind, 0.0, defences if kind in ("none", "pgd") else attacked) for kind in known if kind in kinds]
    for d in attacked:
        if not d.branches:  # the classifier alone: going through the defence means to go on with PGD
            todo += [("bpda", 0.0, [d])] if {"bpda", "unrolled"} & set(kinds) else []
            continue
        todo += [("aware", lam, [d]) for lam in numbers(args.lambdas, "lambdas") if "aware" in kinds]
        todo += [(kind, 0.0, [d]) for kind in ("bpda", "unrolled") if kind in kinds]
    return todo


@dataclass
class Judge:
    """The classifier and the test images, attacked and defended. `i` are the images' positions in the test set, int64 (B,)."""

    run: Run
    victim: Network
    test_set: Images

    def seeds(self, i: Tensor) -> Tensor:
        return mix_seeds(self.test_set.index[i.cpu()].to(i.device), self.run.args.seed)

    def label(self, i: Tensor) -> Tensor:
        return self.test_set.labels[self.test_set.index[i.cpu()]].to(i.device)

    def attacked(self, kind: str, x: Tensor, i: Tensor, defence: Defence, lam: float = 0.0) -> Tensor:
        return attack(kind, x, self.label(i), self.seeds(i), self.victim, defence, lam)

    def defended(self, x: Tensor, i: Tensor, defence: Defence) -> Tensor:
        return reverse(x, defence, mix_seeds(self.seeds(i), FOR_DEFENCE))

    def right(self, x: Tensor, i: Tensor) -> Tensor:
        """Is F right on these images? 1 or 0, (B,)."""
        logits = logits_of(self.victim, x, self.run.args)
        if not logits.isfinite().all():
            raise FloatingPointError("the classifier returns NaN or infinite logits, so its accuracy would mean nothing.")
        return (logits.argmax(1) == self.label(i)).float()

    def each(self, f: Callable, images: int = 0) -> Tensor:
        """f(x, i) of all test images, or of the first (they are in random order)."""
        some = self.test_set.subset(torch.arange(min(images or len(self.test_set), len(self.test_set))))
        return map_images(f, some, self.run, self.run.args.eval_batch_size, indexed=True).cpu()


def judge_all(judge: Judge, defences: list[Defence], epoch: int, carmon: bool) -> list[dict]:
    """Rows of results.json: accuracies with standard errors, the table's cells, paired differences, losses, the sweep."""
    run, args = judge.run, judge.run.args
    rows = run.rows("judged.json")  # written job by job, so that a resumed run does none twice

    def keep(new: list[dict]) -> None:
        rows.extend(new)
        run.keep("judged.json", rows)

    def kept(**what: Any) -> bool:
        return any(all(row.get(k) == v for k, v in what.items()) for row in rows)

    for kind, lam, judged in jobs(defences):
        if kept(kind="bits", name=judged[0].name, attack=kind, **{"lambda": lam}):
            continue
        began = time.perf_counter()
        bits = judge.each(partial(rights, judge, kind, lam, judged))  # (n, defences)
        keep([{"kind": "bits", "name": d.name, "attack": kind, "lambda": lam, "right": "".join("01"[int(b)] for b in column)}
              for d, column in zip(judged, bits.T.tolist(), strict=True)])  # fmt: skip
        accuracies = ", ".join(f"{d.name} {100 * p:.2f}%" for d, p in zip(judged, bits.mean(0).tolist(), strict=True))
        run.say(f"attack {kind}{f', lambda {lam:g}' if kind == 'aware' else ''}: {accuracies} ({time.perf_counter() - began:.1f} s)")
    for defence in defences[1:]:
        if not kept(kind="losses", name=defence.name):
            keep(loss_rows(judge, defence))
    if args.sweep and not kept(kind="sweep"):
        keep([row for d in defences[1:3] for row in sweep_rows(judge, d)])  # SSL and --tasks
    picture(judge, defences[2])
    bits = {(row["name"], row["attack"], row["lambda"]): torch.tensor([float(b) for b in row["right"]]) for row in rows if row["kind"] == "bits"}
    steps = dict.fromkeys(("pgd", "aware"), args.attack_steps) | dict.fromkeys(("bpda", "unrolled"), args.adaptive_steps)
    accuracies = [
        {"name": name, "attack": f"{kind}-{steps[kind]}" if kind in steps else kind, "lambda": lam, "norm": args.norm,
         "eps": 0 if kind == "none" else args.eps, "examples": len(b)} | accuracy(b) | {"paper": paper_number(name, kind, args, carmon), "epoch": epoch}
        for (name, kind, lam), b in bits.items()
    ]  # fmt: skip
    return accuracies + columns(bits) + [row for row in rows if row["kind"] != "bits"]


def rights(judge: Judge, kind: str, lam: float, judged: list[Defence], x: Tensor, i: Tensor) -> Tensor:
    """Is F right on the attacked images behind each of the defences? (B, defences)."""
    x_adv = judge.attacked(kind, x, i, judged[0], lam)
    return torch.stack([judge.right(judge.defended(x_adv, i, d), i) for d in judged], 1)


def accuracy(bits: Tensor) -> dict[str, float]:
    """Accuracy in percent and its standard error, of (n,) 1 where right."""
    p = bits.mean().item()
    return {"accuracy": round(100 * p, 2), "se": round(100 * math.sqrt(p * (1 - p) / len(bits)), 2)}


# The columns of the table: which attacks each is the strongest of. An adaptive attacker has them all.
COLUMNS = {
    "clean": ("none",), "pgd": ("pgd",), "defence-aware": ("pgd", "aware"), "suite": ("suite", "suite-fast", "standard"),
    "adaptive": ("pgd", "aware", "bpda", "unrolled", "suite", "suite-fast", "standard"),
}  # fmt: skip


def columns(bits: dict[tuple[str, str, float], Tensor]) -> list[dict]:
    """The table's cells, for each defence and column the accuracy under the strongest of its attacks, and paired differences between
    defences: mean and standard error of the difference per image. bits: (defence, attack, lambda): (n,) 1 where right."""
    rows, chosen = [], {}
    names, made = list(dict.fromkeys(name for name, _, _ in bits)), {kind for _, kind, _ in bits}
    shown = {"clean", "pgd"} | ({"defence-aware"} if "aware" in made else set()) | ({"suite"} if {"suite", "suite-fast", "standard"} & made else set())
    shown |= {"adaptive"} if {"bpda", "unrolled"} & made else set()
    for column in [c for c in COLUMNS if c in shown]:
        for name in names:
            mine = {key: b for key, b in bits.items() if key[0] == name and key[1] in COLUMNS[column]}
            if name != "as published" or column in ("clean", "pgd"):
                key = min(mine, key=lambda k: mine[k].mean().item())
                chosen[column, name] = mine[key]
                about = {"kind": "column", "name": name, "column": column, "strongest": key[1], "lambda": key[2], "examples": len(mine[key])}
                rows.append(about | accuracy(mine[key]))
    for a, b in [(a, b) for i, b in enumerate(names) for a in names[i + 1 :]]:
        for column in COLUMNS:
            if (column, a) in chosen and (column, b) in chosen:
                d = 100 * (chosen[column, a] - chosen[column, b])
                rows.append({"kind": "difference", "name": f"{a} - {b}", "column": column, "examples": len(d), "difference": round(d.mean().item(), 2),
                             "se": round(d.std(correction=0).item() / math.sqrt(len(d)), 2)})  # fmt: skip
    return rows


def loss_rows(judge: Judge, defence: Defence, images: int = 500) -> list[dict]:
    """The tasks' losses, not weighted, of clean images, attacked by PGD, and reversed."""
    unweighted = replace(defence, weights=dict.fromkeys(TASKS, 1.0))
    kinds = ("clean", "attacked", "reversed")

    def losses(x: Tensor, i: Tensor) -> Tensor:  # (B, 3, tasks)
        x_adv, seeds = judge.attacked("pgd", x, i, defence), mix_seeds(judge.seeds(i), FOR_MEASURE)
        of = (x, x_adv, judge.defended(x_adv, i, defence))
        return torch.stack([torch.stack([ssl_loss(unweighted, task, z, seeds) for task in defence.branches], 1) for z in of], 1)

    values = judge.each(losses, images)
    return [
        {"kind": "losses", "name": defence.name, "task": task, "images": kind, "mean": round(v.mean().item(), 4),
         "values": [float(f"{x:.4g}") for x in v.tolist()]}
        for c, kind in enumerate(kinds) for task, v in zip(defence.branches, values[:, c].T, strict=True)
    ]  # fmt: skip


def sweep_rows(judge: Judge, defence: Defence) -> list[dict]:
    """Accuracy over K (0: with the noise alone), on clean and on PGD's images, for several eps_v."""
    args, rows = judge.run.args, []
    balls = [replace(defence, args=replace(args, reverse_eps=factor * args.reverse_eps)) for factor in (0.5, 0.75, 1.0, 1.5)]
    shown = [k for k in (0, 1, 2, 5, 10, 20, 40, 80, 160) if k < args.reverse_steps] + [args.reverse_steps]

    def along(x: Tensor, i: Tensor) -> Tensor:  # (B, balls, 2, points)
        seeds, starts = mix_seeds(judge.seeds(i), FOR_DEFENCE), (x, judge.attacked("pgd", x, i, defence))
        paths = [[trajectory(z, ball, seeds) for z in starts] for ball in balls]
        right = [[torch.stack([judge.right(z, i) for k, z in enumerate(path) if k in shown], 1) for path in pair] for pair in paths]
        return torch.stack([torch.stack(pair, 1) for pair in right], 1)

    for ball, pair in zip(balls, (100 * judge.each(along).mean(0)).tolist(), strict=True):
        radius = ball.args.reverse_eps
        for kind, line in zip(("none", "pgd"), pair, strict=True):
            rows += [{"kind": "sweep", "name": defence.name, "attack": kind, "reverse_eps": radius, "reverse_steps": k,
                      "examples": len(judge.test_set), "accuracy": round(a, 2)} for k, a in zip(shown, line, strict=True)]  # fmt: skip
        judge.run.say(f"{defence.name}, eps_v {eps_name(radius)}, K {shown[-1]}: clean {pair[0][-1]:.2f}, attacked {pair[1][-1]:.2f}")
    return rows


def picture(judge: Judge, defence: Defence) -> None:
    """Write reversed.png: test images, attacked by PGD, reversed, and what the reversal added, magnified (grey is nothing)."""

    def rows(x: Tensor, i: Tensor) -> Tensor:
        x_adv = judge.attacked("pgd", x, i, defence)
        return torch.stack([x, x_adv, judge.defended(x_adv, i, defence)], 1)

    x, x_adv, z = judge.each(rows, 10).unbind(1)
    gain = 0.5 / max((z - x_adv).abs().max().item(), 1e-6)
    if world()[0] == 0:
        grid = {"clean": x, "attacked": x_adv, "reversed": z, f"difference x {gain:.3g}": 0.5 + gain * (z - x_adv)}
        save_image_grid(judge.run.folder / "reversed.png", grid)


def show(results: dict, folder: Path) -> None:
    """Print Table 1 with ours, paired differences, and the tasks' losses before and after."""
    args, rows = results["args"], results["rows"]
    cells = {(row["name"], row["column"]): row for row in rows if row.get("kind") == "column"}
    names, shown = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    print(
        f"\n{args['dataset']}, {args['victim'] or args['arch']}, attacked with {args['norm']} eps {eps_name(args['eps'])}; accuracy (%) and its standard "
        f"error on {cells['none', 'clean']['examples']:,} test images. K {args['reverse_steps']}, eta {eps_name(args['reverse_step_size'])}, eps_v "
        f"{eps_name(args['reverse_eps'])}.\n"
    )
    table = []
    for name in names:
        table.append([name] + [f"{cells[name, c]['accuracy']:.2f} ±{cells[name, c]['se']:.2f}" if (name, c) in cells else "" for c in shown])
        paper = {row["attack"].split("-")[0]: row["paper"] for row in rows if row["name"] == name and row.get("paper") is not None}
        if paper:
            table.append(["  the paper"] + [f"{paper[k]:.1f}" if (k := {"clean": "none"}.get(c, c)) in paper else "" for c in shown])
    differences = {(row["name"], row["column"]): row for row in rows if row.get("kind") == "difference"}
    for name in dict.fromkeys(name for name, _ in differences):
        table.append([name] + [f"{d['difference']:+.2f} ±{d['se']:.2f}" if (d := differences.get((name, c))) else "" for c in shown])
    print_table(["defence"] + [{"pgd": f"pgd-{args['attack_steps']}"}.get(c, c) for c in shown], table)
    print()
    for column in [c for c in ("defence-aware", "adaptive") if c in shown]:
        by = {name: cells[name, column] for name in names if (name, column) in cells}
        told = [f"{name} {c['strongest']}" + (f" with lambda {c['lambda']:g}" if c["strongest"] == "aware" else "") for name, c in by.items()]
        print(f"{column}, the strongest attack on each: {', '.join(told)}.")
    losses = {}
    for row in [row for row in rows if row.get("kind") == "losses"]:
        losses.setdefault(f"{row['name']}, {row['task']}", []).append(f"{row['mean']:.3f}")
        n = len(row["values"])
    print(f"\nThe tasks' losses, not weighted, of {n} test images, attacked by PGD-{args['attack_steps']}, and reversed:\n")
    print_table(["loss", "clean", "attacked", "reversed"], [[name, *means] for name, means in losses.items()])
    print(f"\nresults.json, reversed.png and the checkpoints are in {folder}", flush=True)


def load_carmon(path: str | Path) -> dict:
    """A checkpoint for `build_model` and `load_weights`, from one of ours or from the published WideResNet-28-10 of Carmon et al. 2019 (RST):

        theirs                                        ours
        conv1, bn1, fc                                trunk.conv1, trunk.bn, heads.class
        block1.layer.0.{bn1, conv1, bn2, conv2}       trunk.layer1.0.{the same}
        block1.layer.0.convShortcut                   trunk.layer1.0.shortcut.1
        sub_block1.*                                  nothing: it is in the file, but no image passes through it

    all after `module.` (nn.DataParallel) or not, as the file's entry `state_dict` or alone. Images are not normalised. Raises UserError,
    naming the entry, if one is missing, unknown or of another shape.
    """
    with reading(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state if isinstance(state, dict) else {}
    if isinstance(state.get("network"), dict):
        return load_checkpoint(path)
    if state.get("normalize_input"):
        raise UserError(f"{path} says normalize_input, but Carmon et al.'s published network takes images as they are.")
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    given = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    given = {k: v for k, v in given.items() if not k.startswith("sub_block1.")}
    for k in ("block1.layer.0.conv1.weight", "fc.weight"):
        if k not in given or given[k].dim() not in (2, 4):
            raise UserError(f"{path} is neither a checkpoint of ours nor one of Carmon et al.'s WideResNets: it has no {k}.")
    network = {"arch": "wrn28_10", "heads": {"class": len(given["fc.weight"])}, "width": len(given["block1.layer.0.conv1.weight"]) / 160}
    network |= {"stem": "cifar", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    own = build_model(**network).state_dict()
    weights = {k: own[k] for k in ("mean", "std")}
    for k in sorted(own.keys() - weights.keys()):
        name = k.removeprefix("trunk.").replace("shortcut.1", "convShortcut").replace("heads.class", "fc")
        name = re.sub(r"^layer(\d)", r"block\1.layer", re.sub(r"^bn\.", "bn1.", name))
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, own[k])  # which old files lack, and nothing uses
        if name not in given or given[name].shape != own[k].shape:
            what = f"has shape {tuple(given[name].shape)}, not {tuple(own[k].shape)}" if name in given else "is missing"
            raise UserError(f"{path} is no WideResNet-28 of Carmon et al.: {name} {what}.")
        weights[k] = given.pop(name).to(own[k].dtype)
    if given:
        raise UserError(f"{path} is no WideResNet-28 of Carmon et al.: it holds {min(given)}.")
    return {"network": network, "model": weights, "args": {}, "name": Path(path).stem, "stage": "train", "epoch": 0, "source": "Carmon et al. 2019"}


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Train what is not given, evaluate, print the table; returns what results.json holds ({} after --stage train-branches)."""
    check(args)
    given = load_carmon(args.victim) if args.victim else None
    if given:
        check_classifier(given, f"--victim {args.victim}")
    run = start_run(args)
    results = run.finished() or train_and_evaluate(run, args, given)
    if results and world()[0] == 0:
        show(results, run.folder)
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    tasks, attacks = words(args.tasks), words(args.attacks)
    kinds = ("pgd", "aware", "bpda", "unrolled", "suite", "suite-fast", "standard")
    if not tasks or not set(tasks) <= set(TASKS) or len(set(tasks)) < len(tasks):
        raise UserError(f"--tasks {args.tasks!r}: give one or more of {','.join(TASKS)}, each once.")
    if not set(attacks) <= set(kinds):
        raise UserError(f"--attacks {args.attacks}: give some of {','.join(kinds)}.")
    if len(weights := numbers(args.weights, "weights", "1,1,1")) != 3 or not all(weights):
        raise UserError(f"--weights {args.weights}: give three numbers above 0, for L_s, L_r and L_i.")
    if not numbers(args.lambdas, "lambdas") and "aware" in attacks:
        raise UserError("--attacks aware needs --lambdas, such as 0.5,1,5.")
    for flag, size, low in ("image-size", args.image_size, 8), ("inpaint-size", args.inpaint_size, 32):
        if size < low or size & (size - 1):
            raise UserError(f"--{flag} {size} must be a power of 2, {low} or more.")
    if args.inpaint_size < args.image_size and args.backbone == "separate":
        raise UserError(f"--inpaint-size {args.inpaint_size} must be at least --image-size {args.image_size}.")
    if args.compile and "unrolled" in attacks:
        raise UserError("--compile makes networks without second derivatives, which the attack unrolled needs: leave out one of them.")
    if args.commit != Args.commit and not args.as_published:
        raise UserError("--commit needs --as-published.")
    if args.branches and not args.victim:
        raise UserError("--branches were trained for a classifier: name it with --victim.")
    if args.branches and not Path(args.branches).is_dir():
        raise UserError(f"--branches {args.branches} is no folder: name that of a run which trained branches.")
    if args.branches and args.stage == "train-branches":
        raise UserError("--stage train-branches trains them: leave out --branches.")
    if args.as_published and (args.backbone == "shared" or set(tasks) != set(TASKS)):
        raise UserError("--as-published needs all three --tasks, and --backbone separate.")


def train_and_evaluate(run: Run, args: Args, given: dict | None) -> dict:
    """All stages that --stage asks for."""
    train_set, test_set = load_data(
        args.dataset, args.data_dir, run.device, image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers
    )
    train_set, val_set = split_train(train_set, val_fraction=args.val_fraction, seed=args.seed)
    test_set = draw(test_set, min(args.eval_examples or len(test_set), len(test_set)), seed=0)  # in random order: folders are sorted by class
    if not args.branches:
        if not len(val_set):
            raise UserError("no held-out images to select epochs by: raise --val-fraction.")
        for size in (args.branch_batch_size, args.head_batch_size, *([] if given else [args.batch_size])):
            check_batches(len(train_set), size)
    if args.as_published:  # BatchNorm in train mode
        check_batches(min(500, len(test_set)), args.eval_batch_size)
    if given and given["network"]["heads"]["class"] != len(test_set.classes):
        raise UserError(f"--victim knows {given['network']['heads']['class']} classes, {args.dataset} has {len(test_set.classes)}.")
    victim, about = get_classifier(run, args, given, train_set, val_set)
    tasks = [t for t in TASKS if t == "contrastive" or t in words(args.tasks)]  # contrastive: the SSL row
    branches = get_branches(run, args, victim, tasks, train_set, val_set)
    run.begin()
    if args.stage == "train-branches":
        command = run.next_command(stage="all", victim=args.victim or run.folder / "classifier.pt", branches=run.folder)
        run.say(f"The branches are in {run.folder}; go on with: {command}")
        return {}
    began = time.perf_counter()
    carmon = about.get("source") == "Carmon et al. 2019" and victim.spec["width"] == 1
    with full_precision(nn.Identity(), not args.eval_amp):  # no TF32 in what is not in mixed precision
        rows = judge_all(Judge(run, victim, test_set), make_defences(run, args, branches, train_set), about.get("epoch", 0), carmon)
    return write_results(run, rows, began)


if __name__ == "__main__":
    cli(main, Args)
