"""Adversarial masked auto-encoders (Rebuffi, Wiles, Shelhamer, Gowal: Adversarially self-supervised pre-training improves
accuracy and robustness, ICLR 2023 workshop).

A Vision Transformer is pre-trained on attacked images, then fine-tuned on clean ones. Masked auto-encoding (MAE, He et
al. 2022) hides 75% of an image's patches p; an encoder e sees the visible ones, a small decoder d paints the others.
A-MAE also attacks the visible ones:

    delta = argmax over the eps-ball of (1 - m) || d(e(p + delta, m)) - (p - mu(p)) / sigma(p) ||^2      (eq. 4; by PGD, eq. 2)
    minimise the same loss at p + delta

The mask m, 1 where a patch is visible, is drawn once for attack and update; delta is on visible patches only; the
target is made of the clean image's hidden patches. The other ways of pre-training attack their own loss in the same
way: adversarial RotNet (eq. 5, --method rotnet), supervised (--method supervised), and BYOL (byorl.py). Fine-tuning has
no attack; its learning rate decays from layer to layer by gamma towards the input (--layer-decay), which keeps the
robust early layers. The paper: all methods gain from the attack on ImageNet and its variants, and with l2 on average
also on other data sets.

    python adv_mae.py --quick                                          # digits, MAE and A-MAE, under two minutes on two CPU cores
    torchrun --nproc-per-node=8 adv_mae.py --data-dir imagenet --workers 16    # ImageNet, ViT-B/16: pre-train with l2 0.5, fine-tune, evaluate
    torchrun --nproc-per-node=8 adv_mae.py --data-dir imagenet --norm linf --eps 1/255 --stage pretrain
    torchrun --nproc-per-node=8 adv_mae.py --data-dir imagenet --method rotnet --eps 4 --stage pretrain
    python adv_mae.py --data-dir imagenet --stage finetune --init runs/X/a-mae.pt --layer-decay 0.75 --eval-data imagenet-r,imagenet-a
    python adv_mae.py --dataset cifar10 --recipe sgd --stage finetune --init runs/X/a-mae.pt    # a cell of Table 1 (X: on ImageNet)

The paper, CIFAR-10 (Table 1, AdamW), pre-trained without attack / linf / l2: MAE 98.03 / 98.30 / 98.46, RotNet 96.14 /
97.29 / 97.43, supervised 98.55 / 98.69 / 98.76, BYOL 98.12 / 98.69 / 98.67.

Differs from the paper, which released no code and refers to He et al., or is our choice where it is silent:
- the number of epochs of MAE is not given (He et al.: 800, their best 1600); nor is the best gamma, so all four are
  fine-tuned;
- the attack runs with drop path off, stays in [0, 1], and in l2 starts on the ball's surface and takes normalised steps
  (eq. 2 shows linf only);
- patches are normalised after the image's channels, with the unbiased variance and 1e-6, as in He et al.'s code;
- positions stay fixed in fine-tuning too (their code trains them there; those of a published checkpoint with trained
  ones go on being trained);
- layer k from the top gets the rate times gamma^k; the paper prints gamma^-k, which contradicts its own gamma = 0
  (frozen) and 1 (full);
- "batch size 512, using AdamW with learning rate 0.0005" is taken literally (He et al. would have scaled it to 0.001);
  mixup, cutmix, label smoothing, drop path, RandAugment and random erasing have the values of their code, whose RandAugment applies each of
  its two operations with probability 1/2; torchvision's operations lack Invert and SolarizeAdd, have Identity, and a
  milder Posterize;
- warm-up is the same share of any number of epochs (40 of 800, 20 of 300, 5 of 100); the moving average of weights is
  faster in the first steps;
- for BYOL the paper refers to Gowal et al.; ours is their recipe for ImageNet (300 epochs, batch 1024, rate 1.2);
- label smoothing is part of the attacked loss; the attack of the supervised method is on the mixed labels; rotations
  are drawn once per image, after the augmentation;
- Table 1's augmentation is "random horizontal flipping", so there is no mixup, cutmix, RandAugment or erasing there;
  its AdamW keeps label smoothing and drop path, and which gamma counts is not said;
- Figure 5's steps and radii are not given: PGD-20 at 0.25 to 2 on 1,000 images. ImageNet-A and -R are scored among
  their 200 classes, ImageNet-C is the mean of 15 types and 5 severities, the central crop 87.5%;
- the last epoch is reported; the 16 classes of Conflict Stimuli get the mean of their classes' probabilities, as in its
  authors' code.
"""
import argparse
import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    IMAGENET_STATS, STATS, VITS, Block, Epoch, Images, Network, OldRun as Run, UserError, ViT,
    batches, batchnorm_mode, build_model, build_trunk, check_args, old_cli as cli, count_batches,
    distribute, draw, eps_name, old_evaluate as evaluate, full_precision, image_uniform, init_transformer,
    l2_norm, learning_rate, load_checkpoint, load_data, load_trunk, load_weights, map_images, old_numbers as
    numbers, open_folder, overruled, patchify, pgd, place_model, print_table, reading, rebuild,
    robust_accuracy, rotate, save_image_grid, seed_step, sincos_positions, split_epoch, old_start_run as
    start_run, transformed, unpatchify, progress as with_progress, words, world, write_results,
)  # fmt: skip


@dataclass
class Args:
    # run
    stage: Literal["all", "pretrain", "finetune", "evaluate"] = "all"  # pretrain: without fine-tuning; finetune: the encoder that --init names; evaluate: only score the classifier(s) that --init names
    init: str = ""  # encoder to fine-tune: of this script, of byorl.py, or a published ViT (see load_vit). With --stage evaluate: a classifier, or a folder of them
    seed: int = 0  # seed of the weights, the order of images, masks, augmentation and attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the network
    workers: int = 8  # processes per GPU that read and augment images
    out: str = ""  # folder of the run; empty: runs/<script>[-quick]-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest in runs/ with the same arguments), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in under two minutes on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "folder"  # folder: --data-dir holds train/ and test/ or val/, as ImageNet does
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 224  # side in pixels; other images are resized
    flip: bool = True  # mirror images at random in training
    arch: Literal["vit_b16", "vit_s16", "vit_ti16", "vit_s4", "vit_ti4", "vit_mini4"] = "vit_b16"  # network (paper: vit_b16); vit_*4 for images of 32 pixels
    width: float = 1.0  # multiplies the number of heads, 64 channels each
    # pre-training
    method: Literal["mae", "rotnet", "supervised"] = "mae"  # pre-training; for BYOL take byorl.py --heads none and --init its checkpoint
    pretrain_epochs: int = 0  # epochs of pre-training; 0: the recipe's (mae 800, rotnet and supervised 300)
    pretrain_batch_size: int = 4096  # images per step of pre-training over all GPUs
    pretrain_lr: float = 0.0  # highest learning rate of pre-training; 0: the recipe's for this batch size (mae 1.5e-4, others 1e-4, times batch / 256)
    accumulate: int = 1  # parts into which each GPU's share of a batch is cut, one after the other, to save memory; in fine-tuning too
    mask_ratio: float = 0.75  # share of the patches that MAE hides (paper: 75%)
    crop: float = 0.0  # smallest share of an image's area in a random crop, in pre-training and with --recipe imagenet; 0: the recipe's (MAE 0.2, others 0.08)
    decoder_width: int = 512  # channels of MAE's decoder (paper: 2048 hidden units, which is 4 times as many)
    decoder_depth: int = 8  # layers of MAE's decoder
    decoder_heads: int = 16  # attention heads of MAE's decoder
    target: Literal["normalised", "pixels"] = "normalised"  # what MAE paints: patches normalised each (eq. 3), or as they are (ablation)
    attacked: Literal["visible", "all"] = "visible"  # all: the hidden patches, and so the target, are attacked too (ablation; section 3.1 advises against it)
    plain: bool = False  # also pre-train without attack, for comparison
    # attack in pre-training (appendix C)
    norm: Literal["linf", "l2"] = "l2"  # norm of the ball that the attack stays in
    eps: float = 0.5  # radius of that ball, in [0, 1] pixel units (the paper's best, l2 / linf: mae 0.5 / 1/255, supervised 4 / 6/255, rotnet 4 / 4/255, byol 2 / 2/255); 0: no attack
    attack_steps: int = 2  # PGD steps in training (paper: 2)
    step_size: float = 0.0  # length of a step; 0: 5 eps / 8 (paper)
    # fine-tuning
    recipe: Literal["imagenet", "adamw", "sgd"] = "imagenet"  # how to fine-tune: as He et al. on ImageNet, or in one of the two ways of Table 1, with flips only
    epochs: int = 100  # epochs of fine-tuning (imagenet, adamw)
    steps: int = 2500  # steps of fine-tuning (sgd)
    batch_size: int = 512  # images per step of fine-tuning over all GPUs
    lr: float = 0.0  # highest learning rate of fine-tuning; 0: the recipe's (imagenet and adamw 5e-4, sgd 0.01)
    layer_decay: str = "0.65,0.75,0.85,0.95"  # comma-separated gammas, a fine-tuned network for each: the rate of layer k from the top is gamma^k times --lr; 0: only the last norm and the head, 1: all the same (not for sgd)
    # regularisation of fine-tuning with --recipe imagenet (smoothing and drop path with adamw, too), and of supervised and rotnet pre-training
    mixup: float = 0.8  # alpha of mixup (not in rotnet); 0: none
    cutmix: float = 1.0  # alpha of cutmix (not in rotnet); each GPU's share of a batch gets one of the two; 0: none
    smoothing: float = 0.1  # label smoothing
    drop_path: float = 0.1  # rate in the last layer, rising from 0 in the first
    rand_augment: bool = True  # RandAugment of strength 9 of 10
    erase: float = 0.25  # probability that a random rectangle is erased, in fine-tuning
    ema: float = 0.9999  # share of the weights' moving average that a step keeps (rotnet and supervised pre-training); 0: no average
    # evaluation
    eval_data: str = ""  # comma-separated folders DIR/<class>/* to score as well: ImageNet-A, -R, -V2, -Sketch, Conflict Stimuli
    real: str = ""  # real.json of ImageNet-ReaL, to score the test images (ILSVRC2012_val_*) by it as well
    eval_crop: float = 0.875  # share of an image's shorter side that the evaluated central crop has (1: all; adamw and sgd squeeze the whole image)
    eval_attack: Literal["pgd20", "suite", "suite-fast", "standard"] = "pgd20"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it; standard: AutoAttack without FAB
    eval_steps: int = 20  # PGD steps in evaluation
    eval_norm: Literal["linf", "l2"] = "l2"  # norm of the attack in evaluation (Figure 5)
    eval_eps: str = "0.25,0.5,1,2"  # comma-separated radii at which the fine-tuned networks are attacked; empty: none
    eval_examples: int = 1000  # test images to attack, drawn once and for all; 0: all. Clean accuracy is that of all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    # Digits have 8 x 8 pixels: at 16 a patch is 2 x 2 of them, and a small network does. They are no photographs, hence only mild crops.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=16, flip=False, arch="vit_mini4", workers=0, amp="off", pretrain_epochs=20, pretrain_batch_size=64,
        pretrain_lr=1e-3, crop=0.6, decoder_width=64, decoder_depth=1, decoder_heads=2, plain=True, recipe="adamw", epochs=8, batch_size=64, lr=4e-3,
        layer_decay="0.65", mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0, rand_augment=False, erase=0.0, eval_eps="0.25,0.5",
        eval_examples=200,
    )  # fmt: skip


@dataclass(kw_only=True)
class Recipe:
    """How to train: the columns of He et al.'s tables, and Table 1's two."""

    epochs: int = 0
    steps: int = 0  # in place of epochs
    batch_size: int
    lr: float
    lowest: float = 0.0  # learning rate at the end of the cosine
    warmup: float  # share of the steps
    weight_decay: float  # not on vectors (biases, LayerNorm)
    betas: tuple[float, float] | None  # of AdamW; None: SGD with momentum 0.9
    clip: float = 0.0  # largest norm of the gradient; 0: any
    crop: float = 0.0  # smallest share of the area in a random crop; 0: the image is squeezed into the square instead
    rand_augment: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0


def recipe_of(kind: str, args: Args) -> Recipe:
    """The recipe of pre-training (mae, rotnet, supervised) or fine-tuning (imagenet, adamw, sgd), with what the flags change."""
    pretraining = dict(batch_size=args.pretrain_batch_size, betas=(0.9, 0.95))
    per_256 = args.pretrain_batch_size / 256
    adamw = dict(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr or 5e-4, lowest=1e-6, warmup=5 / 100, weight_decay=0.05, betas=(0.9, 0.999),
        smoothing=args.smoothing, drop_path=args.drop_path,
    )  # fmt: skip
    if kind == "mae":
        return Recipe(
            epochs=args.pretrain_epochs or 800, lr=args.pretrain_lr or 1.5e-4 * per_256, warmup=40 / 800, weight_decay=0.05, crop=args.crop or 0.2,
            **pretraining,
        )  # fmt: skip
    if kind in ("rotnet", "supervised"):  # He et al.'s training from scratch; RotNet without mixup and cutmix (appendix C)
        mixing = dict(mixup=args.mixup, cutmix=args.cutmix) if kind == "supervised" else {}
        return Recipe(
            epochs=args.pretrain_epochs or 300, lr=args.pretrain_lr or 1e-4 * per_256, warmup=20 / 300, weight_decay=0.3, crop=args.crop or 0.08,
            rand_augment=args.rand_augment, smoothing=args.smoothing, drop_path=args.drop_path, ema=args.ema, **pretraining, **mixing,
        )  # fmt: skip
    if kind == "imagenet":
        return Recipe(crop=args.crop or 0.08, rand_augment=args.rand_augment, erase=args.erase, mixup=args.mixup, cutmix=args.cutmix, **adamw)
    if kind == "adamw":
        return Recipe(**adamw)
    # Steiner et al. 2021; appendix E
    return Recipe(steps=args.steps, batch_size=args.batch_size, lr=args.lr or 0.01, warmup=500 / 2500, weight_decay=0.0, betas=None, clip=1.0)


# ---- the method ----------------------------------------------------------------------------------------------------


class MAE(nn.Module):
    """Encoder and decoder. The encoder works on the visible patches only, which is where MAE's speed comes from."""

    def __init__(self, encoder: ViT, patches: int, width: int, depth: int, heads: int):
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)  # in place of the encoder's fc_norm, which is for averaged tokens
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, encoder.patch_embed.weight[0].numel())
        self.side, self.width = math.isqrt(patches), width
        for part in (self.embed, self.decoder, self.predict):
            init_transformer(part)

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        """Paint the hidden patches: (B, N - n, 3 * p * p).

        visible: (B * n, 3, p, p), normalised; order: (B, N), all patches' numbers, the n visible ones first. Attention does not care for
        the order, so the tokens stay in this one and each gets the position of its number.
        """
        (b, total), n = order.shape, len(visible) // len(order)
        weight, bias = self.encoder.patch_embed.weight, self.encoder.patch_embed.bias
        tokens = F.linear(visible.flatten(1), weight.flatten(1), bias).view(b, n, -1)
        tokens = tokens + self.encoder.positions(self.side, self.side)[order[:, :n]]
        tokens = self.embed(self.norm(self.encoder.encode(tokens)))  # (B, 1 + n, width)
        hidden = self.mask_token.expand(b, total - n, -1)
        patches = torch.cat([tokens[:, 1:], hidden], 1)  # (B, N, width)
        patches = patches + sincos_positions(self.width, self.side, self.side, order.device)[order]
        out = self.decoder(torch.cat([tokens[:, :1], patches], 1))
        return self.predict(self.decoder_norm(out[:, 1 + n :]))


class MaskedAutoencoder(Network):
    """An MAE with normalisation and mixed precision around it; a patch is treated as an image of its own, in [0, 1]."""

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        return self.features(visible, order)


Loss = Callable[[nn.Module, Tensor], Tensor]  # (network, what is attacked (B, ...)) -> (B,)


def count_visible(patches: int, mask_ratio: float) -> int:
    """How many of an image's patches stay visible: 49 of 196."""
    return patches - round(mask_ratio * patches)


def shuffle_patches(x: Tensor, seeds: Tensor, args: Args) -> tuple[Tensor, Tensor, int]:
    """An image's patches in random order: (B, N, 3, p, p), that order (B, N), and how many of the first are visible. It depends on the
    image's seed alone, so that attack and update, and any number of ranks, have the same mask."""
    patches = patchify(x, VITS[args.arch][0])
    order = image_uniform(seeds, patches.shape[1]).argsort(1)
    image = torch.arange(len(x), device=x.device)[:, None]
    return patches[image, order], order, count_visible(patches.shape[1], args.mask_ratio)


def target_of(patches: Tensor, model: Network, args: Args) -> Tensor:
    """What is to be painted, (p - mu) / sigma of eq. 3: (B, M, 3, p, p) -> (B, M, 3 * p * p)."""
    p = ((patches - model.mean) / model.std).flatten(2)
    if args.target == "pixels":
        return p
    return (p - p.mean(2, keepdim=True)) / (p.var(2, keepdim=True) + 1e-6).sqrt()


def painting(out: Tensor, patches: Tensor, model: Network, args: Args) -> Tensor:
    """The inverse of `target_of`, with mu and sigma of the true patches (B, M, 3, p, p): (B, M, 3 * p * p) -> (B, M, 3, p, p) in [0, 1]."""
    if args.target == "normalised":
        p = ((patches - model.mean) / model.std).flatten(2)
        out = out * (p.var(2, keepdim=True) + 1e-6).sqrt() + p.mean(2, keepdim=True)
    return (out.view_as(patches) * model.std + model.mean).clamp(0, 1)


def masked_task(x: Tensor, seeds: Tensor, model: Network, args: Args) -> tuple[Tensor, Loss]:
    """MAE: what is attacked, the visible patches (B, n, 3, p, p), and eq. 4 as a function of them.

    Since the hidden patches are not among what PGD moves, delta is zero there at its start and after each step, and the whole l2 budget is
    spent on what the encoder sees.
    """
    patches, order, n = shuffle_patches(x, seeds, args)
    clean = target_of(patches[:, n:], model, args)

    def loss(net: nn.Module, z: Tensor) -> Tensor:
        target = clean if args.attacked == "visible" else target_of(z[:, n:], model, args)
        return (net(z[:, :n].flatten(0, 1), order) - target).square().mean((1, 2))

    return patches[:, :n] if args.attacked == "visible" else patches, loss


def rotation_task(x: Tensor, seeds: Tensor, recipe: Recipe) -> tuple[Tensor, Loss]:
    """RotNet: the images, turned by one of four angles each, and eq. 5's loss."""
    turn = (4 * image_uniform(seeds, 1)[:, 0]).long()  # (B,)

    def loss(net: nn.Module, z: Tensor) -> Tensor:
        return F.cross_entropy(net(z), turn, reduction="none", label_smoothing=recipe.smoothing)

    return rotate(x, turn), loss


def class_task(x: Tensor, target: Tensor, recipe: Recipe) -> tuple[Tensor, Loss]:
    """Supervised training: the images, which may be mixtures, and the cross-entropy with their targets (B, classes) (eq. 1)."""

    def loss(net: nn.Module, z: Tensor) -> Tensor:
        return F.cross_entropy(net(z), target, reduction="none", label_smoothing=recipe.smoothing)

    return x, loss


def perturb(z: Tensor, loss: Loss, seeds: Tensor, model: Network, args: Args) -> Tensor:
    """eq. 2: PGD on what a task gives. The start depends on the image's seed alone."""
    noise = 2 * image_uniform(seeds + 1, z[0].numel()).view_as(z) - 1  # + 1: other numbers than the mask's
    if args.norm == "l2":
        noise = torch.erfinv(noise)  # Gaussian
        noise = noise / l2_norm(noise)
    with batchnorm_mode(model, "eval"):  # for ViTs: without drop path
        return pgd(
            lambda v: loss(model, v), z, eps=args.eps, norm=args.norm, steps=args.attack_steps,
            step_size=args.step_size or 5 / 8 * args.eps, start=z + args.eps * noise,
        )


# ---- augmentation, optimiser ---------------------------------------------------------------------------------------


def rand_augment(image: Any, fill: tuple[int, ...]) -> Any:
    """RandAugment (Cubuk et al. 2020) by torchvision, with strength 9 of 10 give or take 0.5: two operations, each with probability 1/2.
    image: of Pillow."""
    from torchvision.transforms import InterpolationMode, v2

    for _ in range(2):
        if torch.rand(()) < 0.5:
            strength = int((90 + 5 * torch.randn(())).round().clamp(0, 100))
            image = v2.RandAugment(1, strength, num_magnitude_bins=101, interpolation=InterpolationMode.BICUBIC, fill=list(fill))(image)
    return image


def random_erase(x: Tensor, p: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """With probability p, put Gaussian noise in place of a rectangle of the image x, uint8 (3, H, W) (Zhong et al. 2020)."""
    from torchvision.transforms import v2

    if torch.rand(()) >= p:
        return x
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    z = v2.RandomErasing(p=1, scale=(0.02, 1 / 3), value="random")((x / 255 - m) / s)  # where the noise has mean 0, variance 1
    return ((z * s + m).clamp(0, 1) * 255).round().byte()


def augmentation(recipe: Recipe, args: Args) -> Callable:
    """From a stored image to what is trained on, uint8 (3, S, S), in the processes that read the images."""
    from torchvision.transforms import InterpolationMode, v2

    size, cubic = args.image_size, InterpolationMode.BICUBIC
    mean, std = STATS[args.dataset]
    steps = [v2.RandomResizedCrop(size, (recipe.crop, 1.0), interpolation=cubic) if recipe.crop else v2.Resize((size, size), cubic)]
    steps += [v2.RandomHorizontalFlip()] if args.flip else []
    steps += [functools.partial(rand_augment, fill=tuple(round(255 * m) for m in mean))] if recipe.rand_augment else []
    steps += [v2.PILToTensor()]
    steps += [functools.partial(random_erase, p=recipe.erase, mean=mean, std=std)] if recipe.erase else []
    return v2.Compose(steps)


def central_crop(args: Args) -> Callable:
    """From a stored image to what is evaluated, uint8 (3, S, S)."""
    from torchvision.transforms import InterpolationMode, v2

    size, cubic = args.image_size, InterpolationMode.BICUBIC
    if args.recipe != "imagenet":  # "without preserving aspect ratio" (appendix C)
        return v2.Compose([v2.Resize((size, size), cubic), v2.PILToTensor()])
    return v2.Compose([v2.Resize(round(size / args.eval_crop), cubic), v2.CenterCrop(size), v2.PILToTensor()])


def mix(x: Tensor, y: Tensor, recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of the batch, as torchvision has them: images and targets (B, classes)."""
    from torchvision.transforms import v2

    ways = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
    ways += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
    return v2.RandomChoice(ways)(x, y) if ways and len(x) > 1 else (x, F.one_hot(y, classes).float())


def layer_of(name: str, depth: int) -> int:
    """A parameter's layer, from 0 (patches, class token, positions) over 1 ... depth (blocks) to depth + 1 (last norm and head)."""
    if name.startswith(("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed")):
        return 0
    return int(name.split(".")[2]) + 1 if name.startswith("trunk.blocks.") else depth + 1


def parameter_groups(model: Network, weight_decay: float, gamma: float | None) -> list[dict]:
    """Groups for an optimiser, with `scale`, by which the learning rate is to be multiplied: gamma^(depth + 1 - layer) in fine-tuning
    (14 layers for ViT-B), 1 if gamma is None. Vectors have no weight decay, nor, but for MAE, have class token and positions (He et al.'s code)."""
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            depth = len(model.trunk.blocks) if gamma is not None else 0
            scale = 1.0 if gamma is None else gamma ** (depth + 1 - layer_of(name, depth))
            free = p.dim() == 1 or name in ("trunk.cls_token", "trunk.pos_embed")  # MAE's is trunk.encoder.cls_token
            group = groups.setdefault((scale, free), {"params": [], "scale": scale, "weight_decay": 0.0 if free else weight_decay})
            group["params"].append(p)
    return list(groups.values())


def optimiser(model: Network, recipe: Recipe, gamma: float | None) -> torch.optim.Optimizer:
    """AdamW or SGD on `parameter_groups`."""
    groups = parameter_groups(model, recipe.weight_decay, gamma)
    if recipe.betas:
        return torch.optim.AdamW(groups, recipe.lr, betas=recipe.betas)
    return torch.optim.SGD(groups, recipe.lr, momentum=0.9)


# ---- training ------------------------------------------------------------------------------------------------------

# Added to an epoch's number, so that no two kinds of training draw the same random numbers.
FIRST_ID = {"plain": 0, "pretrain": 100_000, "finetune": 200_000}


def start_model(kind: str, args: Args, recipe: Recipe, start: dict | None, classes: int) -> Network:
    """A network to train: for MAE, with a head on the images' turn or class, or, with the checkpoint `start`, for fine-tuning."""
    if start is None:
        mean, std = STATS[args.dataset]
        heads = {"mae": {}, "rotnet": {"rotation": 4}, "supervised": {"class": classes}}[kind]
        model = build_model(args.arch, heads, width=args.width, mean=mean, std=std)
    else:
        model = build_model(**start["network"] | {"heads": {"class": classes}})  # its own normalisation, on other data too
        load_trunk(model.trunk, start, args.init or start["name"])
        nn.init.trunc_normal_(model.heads["class"].weight, std=2e-5)  # He et al.'s code
        nn.init.zeros_(model.heads["class"].bias)
    for i, block in enumerate(model.trunk.blocks):
        block.drop_path = recipe.drop_path * i / (len(model.trunk.blocks) - 1)
    if kind == "mae":
        return masked_autoencoder(model, args)
    return model


def masked_autoencoder(encoder: Network, args: Args) -> MaskedAutoencoder:
    """A network without heads becomes the encoder of a new MAE."""
    patches = (args.image_size // VITS[args.arch][0]) ** 2
    mae = MAE(encoder.trunk, patches, args.decoder_width, args.decoder_depth, args.decoder_heads)
    model = MaskedAutoencoder(mae, {}, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist())
    model.spec = encoder.spec
    encoder.trunk.fc_norm.requires_grad_(False)  # not used here
    return model


def train(
    name: str, kind: str, run: Run, args: Args, train_set: Images, *, eps: float = 0.0, start: dict | None = None, gamma: float | None = None
) -> dict:
    """Train a network by the recipe `kind` and return its checkpoint, name.pt.

    Pre-training (mae, rotnet, supervised) is adversarial if eps > 0; fine-tuning (imagenet, adamw, sgd) begins at the checkpoint `start`
    and decays learning rates by `gamma`.
    """
    file = f"{name}.pt"
    if (done := run.load(file)) is not None:
        return done  # before the run was resumed
    recipe, finetuning = recipe_of(kind, args), start is not None
    classes, n_images, ranks = len(train_set.classes), len(train_set), world()[1]
    torch.manual_seed(args.seed)
    model = start_model(kind, args, recipe, start, classes)
    place_model(model, run.device, args.amp, args.compile)
    opt = optimiser(model, recipe, gamma)
    state = run.resume(name, model, opt)
    average = {k: v.clone() for k, v in model.state_dict().items()} if recipe.ema else {}
    average = {k: v.to(run.device) for k, v in state.get("average", average).items()}
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(model)
    steps = count_batches(n_images, recipe.batch_size)
    total = recipe.steps or recipe.epochs * steps
    epochs = math.ceil(total / steps)
    first_id = FIRST_ID["finetune" if finetuning else "pretrain" if eps else "plain"]

    def task(x: Tensor, y: Tensor, seeds: Tensor) -> tuple[Tensor, Loss]:
        if kind == "mae":
            return masked_task(x, seeds, model, args)
        if kind == "rotnet":
            return rotation_task(x, seeds, recipe)
        return class_task(x, y, recipe)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": model.spec, "model": model.state_dict(), "average": average, "optimizer": opt.state_dict(), "args": vars(args), "name": name,
            "epoch": epoch, "step": step, "sums": sums or {}, "history": history, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        epoch_id = first_id + epoch
        shuffle = args.seed * 1_000_003 + epoch_id
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        images = transformed(train_set, augmentation(recipe, args), seed=shuffle)
        stream = batches(images, recipe.batch_size, run.device, shuffle=shuffle, skip=skip, workers=args.workers)
        positions = split_epoch(n_images, recipe.batch_size)
        model.train()
        with Epoch(epoch, n_images, min(steps, total - epoch * steps), run.device, skip, sums) as log:
            for x, y in log.watch(stream):  # (B, 3, S, S), (B,): this rank's share
                step = epoch * steps + log.step
                if step == total:  # --recipe sgd ends in mid-epoch
                    break
                seed_step(args.seed, epoch_id, log.step)
                for group in opt.param_groups:
                    group["lr"] = group["scale"] * learning_rate(recipe.lr, step, round(recipe.warmup * total), total, recipe.lowest)
                seeds = image_seeds(shuffle, positions[log.step]).to(x.device)
                batch_images = n_images // steps + (log.step < n_images % steps)  # over all ranks; the first ones have one more
                opt.zero_grad(set_to_none=True)
                if kind not in ("mae", "rotnet"):
                    x, y = mix(x, y, recipe, classes)  # y: from now on (B, classes)
                loss_sum = torch.zeros((), device=x.device)
                parts = min(args.accumulate, len(x))
                split = zip(x.tensor_split(parts), y.tensor_split(parts), seeds.tensor_split(parts), strict=True)
                for i, (x_part, y_part, seeds_part) in enumerate(split):
                    z, loss = task(x_part, y_part, seeds_part)
                    if eps:
                        z = perturb(z, loss, seeds_part, model, args)
                    last = ddp is model or i == parts - 1
                    with contextlib.nullcontext() if last else ddp.no_sync():  # ranks exchange gradients once, at the last part
                        values = loss(ddp, z)  # (b,)
                        (values.sum() * ranks / batch_images).backward()  # DDP averages over ranks: in all, the gradient of the batch's mean
                    loss_sum += values.detach().sum()
                if recipe.clip:
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                opt.step()
                if recipe.ema:
                    decay = min(recipe.ema, (1 + step) / (10 + step))  # so that a short run's average is not its initial weights
                    for key, v in model.state_dict().items():
                        average[key].lerp_(v, 1 - decay)
                log.update(len(x), loss=loss_sum / len(x))
                if log.interrupted():
                    break
        if log.interrupted():
            save(epoch, log.step, log.shared_sums())
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        run.log(
            history, name, epoch + 1, epochs, lr=max(g["lr"] for g in opt.param_groups), **log.means(), seconds=round(time.perf_counter() - began, 1)
        )
        save(epoch + 1)
    about = about_pretraining(eps, args, classes) if not finetuning else start["pretrained"]
    if finetuning and "layer_decay" in start:  # fine-tuned for the second time
        about = about | {"as_paper": False}
    run.save(file, {
        "network": model.spec, **split_weights(kind, average or model.state_dict()), "args": vars(args), "name": name, "epoch": epochs,
        "stage": "train" if finetuning or kind == "supervised" else "pretrain", "pretrained": about, **({"layer_decay": gamma} if finetuning else {}),
    })  # fmt: skip
    return run.load(file)


def split_weights(kind: str, weights: dict) -> dict:
    """Weights for a checkpoint; of an MAE what fine-tuning takes and, apart from it, the decoder, which only pictures need."""
    if kind != "mae":
        return {"model": weights}
    encoder = {k.replace("trunk.encoder.", "trunk."): v for k, v in weights.items() if k.startswith(("trunk.encoder.", "mean", "std"))}
    return {"model": encoder, "decoder": {k: v for k, v in weights.items() if not k.startswith("trunk.encoder.")}}


def image_seeds(seed: int, positions: Tensor) -> Tensor:
    """A seed for each image of an epoch that has this `seed`, by its position in it, on whatever rank it is: int64 (B,)."""
    # Room for 2^24 images in an epoch; times a large odd number, as `image_uniform` asks for.
    return (seed * 2**24 % 2**62 + positions) * 0x2545F4914F6CDD1D


def about_pretraining(eps: float, args: Args, classes: int) -> dict:
    """What a checkpoint tells of its pre-training, for tables."""
    about = {k: getattr(args, k) for k in ("method", "norm", "arch", "width", "image_size", "dataset", "attack_steps", "seed")}
    same = all(getattr(args, k) == getattr(Args, k) for k in PAPER_PRETRAINING)
    return about | {"eps": eps, "epochs": recipe_of(args.method, args).epochs, "classes": classes, "as_paper": same}


# ---- pictures ------------------------------------------------------------------------------------------------------


def picture(run: Run, args: Args, encoders: dict[str, dict], test_set: Images, count: int = 8) -> None:
    """reconstruction.png: test images, what is visible of them, the same attacked, and what each MAE paints."""
    some = test_set.subset(torch.arange(min(count * world()[1], len(test_set))))  # of which this rank gets its share
    x, _ = next(batches(transformed(some, central_crop(args)), len(some), run.device, workers=0))
    seeds = image_seeds(args.seed, torch.arange(len(x))).to(run.device)
    rows = {"image": x}
    for name, state in encoders.items():
        model = masked_autoencoder(build_model(**state["network"]), args)
        encoder = {k.replace("trunk.", "trunk.encoder."): v for k, v in state["model"].items() if k.startswith("trunk.")}
        load_weights(model, encoder | state["decoder"], name)
        place_model(model, run.device, args.amp).eval()
        patches, order, n = shuffle_patches(x, seeds, args)
        visible, hidden = patches[:, :n], patches[:, n:]  # (B, n, 3, p, p), (B, N - n, 3, p, p)
        attacked = visible
        if args.eps:
            attacked = perturb(*masked_task(x, seeds, model, replace(args, attacked="visible")), seeds, model, args)
        with torch.no_grad():
            painted = painting(model(attacked.flatten(0, 1), order), hidden, model, args)

        def put(seen: Tensor, rest: Tensor) -> Tensor:
            """Patches, visible ones first, back in their places: (B, 3, S, S)."""
            back = order.argsort(1)
            return unpatchify(torch.cat([seen, rest], 1)[torch.arange(len(order), device=order.device)[:, None], back])

        grey = torch.full_like(hidden, 0.5)
        rows |= {"visible": put(visible, grey), f"{name}: attacked": put(attacked, grey), f"{name}: painted": put(attacked, painted)}
    if world()[0] == 0:
        save_image_grid(run.folder / "reconstruction.png", rows)


def filters(state: dict, count: int = 28) -> Tensor:
    """Figure 4: the first principal components of a ViT's patch embedding, each stretched to [0, 1]: (count, 3, p, p).

    The weights, standardised over the filters (appendix D), are filters x pixels; the components are directions among pixels.
    """
    w = state["model"]["trunk.patch_embed.weight"].float()  # (dim, 3, p, p)
    flat = w.flatten(1)
    flat = (flat - flat.mean(0)) / flat.std(0).clamp(min=1e-12)
    components = torch.linalg.svd(flat, full_matrices=False).Vh[:count]
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    return ((components - low) / (high - low)).view(-1, *w.shape[1:])


# ---- evaluation ----------------------------------------------------------------------------------------------------

# The 16 classes of Conflict Stimuli (Geirhos et al. 2019) as ImageNet's classes, counted in the order of their WordNet numbers.
CONFLICT = {
    "airplane": "404", "bear": "294-297", "bicycle": "444 671", "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914", "bottle": "440 720 737 898 899 901 907", "car": "436 511 817", "cat": "281-286", "chair": "423 559 765 857",
    "clock": "409 530 892", "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268", "elephant": "385 386",
    "keyboard": "508 878", "knife": "499", "oven": "766", "truck": "555 569 656 675 717 734 864 867",
}  # fmt: skip


class ChooseAmong(nn.Module):
    """A classifier that chooses among groups of its classes, (k, classes) with rows that sum to one: by the mean of their probabilities.
    (B, 3, S, S) -> (B, k), probabilities up to a factor.

    A row with a single 1 stands for one class: so the 200 classes of ImageNet-A and -R are masked."""

    def __init__(self, model: nn.Module, groups: Tensor):
        super().__init__()
        self.model, self.groups = model, groups

    def forward(self, x: Tensor, *heads: str) -> Tensor:
        return self.model(x, *heads).softmax(1) @ self.groups.T


def groups_of(names: list[str], classes: list[str], folder: str) -> Tensor:
    """For a folder's classes which of the network's they are: (k, classes). Their names are the network's (wnids), or numbers from 0
    (ImageNet-V2), or the 16 of Conflict Stimuli. Raises UserError for anything else."""
    numbered = all(name.isdecimal() for name in names)
    if set(names) <= set(classes):
        members = [[classes.index(name)] for name in names]
    elif numbered and all(int(name) < len(classes) for name in names):
        members = [[int(name)] for name in names]
    elif set(names) <= set(CONFLICT) and len(classes) == 1000:
        ranges = [[part.split("-") for part in CONFLICT[name].split()] for name in names]
        members = [[i for r in rs for i in range(int(r[0]), int(r[-1]) + 1)] for rs in ranges]
    else:
        odd = min(name for name in names if (int(name) >= len(classes) if numbered else name not in classes))
        raise UserError(f"{folder}: the class folder '{odd}' is none of the network's {len(classes)} classes; name folders as in the training set.")
    groups = torch.zeros(len(names), len(classes))
    for row, these in zip(groups, members, strict=True):
        row[these] = 1 / len(these)
    return groups


def without_agreement(images: Images) -> Images:
    """Conflict Stimuli less those of equal shape and texture (cat1-cat3.png), in which nothing is in conflict (1,280 - 80)."""
    names = [Path(path).stem for path, _ in images.pixels.samples]
    kinds = [[part.rstrip("0123456789") for part in name.split("-")] for name in names]
    return images.subset(torch.tensor([i for i, kind in enumerate(kinds) if len(kind) != 2 or kind[0] != kind[1]]))


def open_variants(args: Args, classes: list[str]) -> dict[str, tuple[Images, Tensor]]:
    """{name of the folder: (images, groups)} of --eval-data. Raises UserError for a folder that cannot be used."""
    variants = {}
    for folder in words(args.eval_data):
        if Path(folder).name in (*variants, "test", "real"):
            raise UserError(f"--eval-data: '{Path(folder).name}' names two test sets; rename the folder {folder}.")
        images = open_folder(Path(folder), args.image_size, "--eval-data")
        groups = groups_of(images.classes, classes, folder)
        images = without_agreement(images) if set(images.classes) <= set(CONFLICT) and len(classes) == 1000 else images
        variants[Path(folder).name] = transformed(images, central_crop(args)), groups
    return variants


def real_labels(args: Args, test_set: Images) -> list[list[int]] | None:
    """ImageNet-ReaL's labels of the test images, several or none for each (Beyer et al. 2020). Raises UserError if they do not fit."""
    if not args.real:
        return None
    try:
        labels = json.loads(Path(args.real).read_text())
        validation_index = [int(Path(test_set.pixels.samples[i][0]).stem.split("_")[-1]) - 1 for i in test_set.index.tolist()]
        chosen = [[int(label) for label in labels[i]] for i in validation_index]
        if min(validation_index) < 0 or not any(chosen):
            raise ValueError
        return chosen
    except OSError as e:
        raise UserError(f"cannot read {args.real} ({e.strerror}); --real wants ImageNet-ReaL's real.json.") from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError):
        raise UserError(f"{args.real} and the test images do not fit: --real wants real.json and files such as ILSVRC2012_val_00000001.JPEG.") from None


def judge(run: Run, args: Args, classifiers: list[dict], test_set: Images, variants: dict, real: list[list[int]] | None) -> list[dict]:
    """Rows of results.json: clean accuracy of each classifier on the test set and all variants, and under attack at --eval-eps."""
    rows = run.rows("judged.json")  # written one by one, so that a resumed run judges none twice
    stored = transformed(test_set, central_crop(args))
    to_attack = draw(stored, min(args.eval_examples or len(stored), len(stored)), seed=0)
    small = min(args.batch_size, 64 * world()[1])  # attacks are in float32, whose activations take 0.1 GB per image of a ViT-B/16
    for state in classifiers:
        name = state["name"]
        if any(row["name"] == name for row in rows):
            continue
        model = place_model(rebuild(state, name), run.device, args.amp if args.eval_amp else "off").eval()
        about = {k: state.get(k) for k in ("layer_decay", "pretrained")} | {"checkpoint": state.get("file") or str(run.folder / f"{name}.pt")}

        def score(model: nn.Module, images: Images, where: str) -> float:
            stream = batches(images, args.batch_size, run.device, workers=args.workers)
            with full_precision(model, not args.eval_amp):
                return robust_accuracy(model, with_progress(stream, len(images), where))

        scores = {"test": (score(model, stored, "test"), len(stored))}
        for where, (images, groups) in variants.items():
            scores[where] = score(ChooseAmong(model, groups.to(run.device)), images, where), len(images)
        if real:
            with full_precision(model, not args.eval_amp):
                predicted = map_images(lambda x: model(x).argmax(1), stored, run, args.batch_size).tolist()
            right = [k in labels for k, labels in zip(predicted, real, strict=True) if labels]
            scores["real"] = 100 * sum(right) / len(right), len(right)
        mine = [
            {"name": name, "attack": "none", "norm": args.eval_norm, "eps": 0, "examples": n, "accuracy": round(accuracy, 2), "paper": None,
             "epoch": state["epoch"], "set": where}
            for where, (accuracy, n) in scores.items()
        ]  # fmt: skip
        mine[0]["paper"] = paper_number(state, args)
        radii = [eps for eps in numbers(args.eval_eps, "eval-eps") if eps > 0]
        attacked = evaluate(run, name, state, to_attack, radii, norm=args.eval_norm, batch_size=small, look_at=radii[0]) if radii else []
        mine += [row | {"set": "test"} for row in attacked]
        rows += [row | about for row in mine]
        run.keep("judged.json", rows)
        told = (f"{row['norm'] + ' ' + eps_name(row['eps']) if row['eps'] else row['set']} {row['accuracy']:.2f}" for row in mine)
        run.say(f"{name}: {', '.join(told)}")
    return rows


# Table 1: accuracy after fine-tuning, pre-trained without attack, linf, l2 (the best radius of each).
PAPER = {  # (method, data set, recipe)
    ("supervised", "cifar10", "sgd"): (98.78, 98.97, 99.08), ("supervised", "cifar10", "adamw"): (98.55, 98.69, 98.76),
    ("rotnet", "cifar10", "sgd"): (94.79, 96.90, 96.79), ("rotnet", "cifar10", "adamw"): (96.14, 97.29, 97.43),
    ("mae", "cifar10", "sgd"): (96.77, 97.78, 98.00), ("mae", "cifar10", "adamw"): (98.03, 98.30, 98.46),
    ("byol", "cifar10", "sgd"): (97.72, 98.80, 98.96), ("byol", "cifar10", "adamw"): (98.12, 98.69, 98.67),
    ("supervised", "cifar100", "sgd"): (90.96, 91.60, 92.53), ("supervised", "cifar100", "adamw"): (90.71, 90.59, 91.07),
    ("rotnet", "cifar100", "sgd"): (78.65, 83.00, 83.48), ("rotnet", "cifar100", "adamw"): (82.55, 85.22, 86.45),
    ("mae", "cifar100", "sgd"): (83.28, 86.39, 86.68), ("mae", "cifar100", "adamw"): (88.15, 89.24, 89.74),
    ("byol", "cifar100", "sgd"): (86.91, 90.56, 91.10), ("byol", "cifar100", "adamw"): (88.62, 90.61, 91.05),
    ("supervised", "sun397", "sgd"): (76.53, 74.26, 76.62), ("supervised", "sun397", "adamw"): (77.59, 76.13, 78.01),
    ("rotnet", "sun397", "sgd"): (59.79, 61.52, 63.95), ("rotnet", "sun397", "adamw"): (68.01, 69.09, 70.27),
    ("mae", "sun397", "sgd"): (69.88, 69.98, 71.82), ("mae", "sun397", "adamw"): (76.39, 76.56, 77.31),
    ("byol", "sun397", "sgd"): (74.82, 75.02, 75.31), ("byol", "sun397", "adamw"): (76.47, 75.65, 75.96),
    ("supervised", "resisc45", "sgd"): (96.32, 95.31, 96.17), ("supervised", "resisc45", "adamw"): (96.94, 96.52, 96.92),
    ("rotnet", "resisc45", "sgd"): (94.56, 94.29, 95.14), ("rotnet", "resisc45", "adamw"): (95.15, 95.30, 95.93),
    ("mae", "resisc45", "sgd"): (94.69, 93.85, 95.30), ("mae", "resisc45", "adamw"): (96.62, 96.44, 96.94),
    ("byol", "resisc45", "sgd"): (95.07, 95.15, 95.46), ("byol", "resisc45", "adamw"): (96.44, 95.89, 96.08),
    ("supervised", "dmlab", "sgd"): (73.63, 74.56, 74.49), ("supervised", "dmlab", "adamw"): (74.88, 74.61, 75.27),
    ("rotnet", "dmlab", "sgd"): (63.73, 69.01, 68.89), ("rotnet", "dmlab", "adamw"): (66.80, 68.60, 68.31),
    ("mae", "dmlab", "sgd"): (70.22, 73.86, 73.76), ("mae", "dmlab", "adamw"): (76.32, 76.90, 77.34),
    ("byol", "dmlab", "sgd"): (70.93, 72.90, 71.81), ("byol", "dmlab", "adamw"): (72.13, 73.40, 72.39),
}  # fmt: skip
PAPER_METHODS = ("mae", "rotnet", "supervised")  # of this script
BEST_EPS = {  # (linf, l2), section 4.1 and Table 1
    "supervised": (6 / 255, 4.0), "rotnet": (4 / 255, 4.0), "mae": (1 / 255, 0.5), "byol": (2 / 255, 2.0),
}  # fmt: skip
# A run counts as the paper's if these have their defaults. Not among them: --layer-decay, which it does not report, and --norm and --eps,
# which BEST_EPS checks. The data sets of --dataset folder are known by the folder's name.
PAPER_PRETRAINING = (
    "flip", "pretrain_epochs", "arch", "width", "image_size", "pretrain_batch_size", "pretrain_lr", "mask_ratio", "crop", "decoder_width", "decoder_depth",
    "decoder_heads", "target", "attacked", "attack_steps", "step_size", "mixup", "cutmix", "smoothing", "drop_path", "rand_augment", "ema", "quick",
)  # fmt: skip
PAPER_BYOL = dict(
    dataset="folder", image_size=224, arch="vit_b16", width=1.0, epochs=300, batch_size=1024, lr=1.2, tau=0.999, blur=0.5, weight_decay=5e-4, hidden=4096,
    projection=256, attack="pgd", attack_steps=2,
)  # fmt: skip
PAPER_FINETUNING = ("flip", "arch", "width", "image_size", "epochs", "steps", "batch_size", "lr", "eval_amp", "quick")


def paper_number(state: dict, args: Args) -> float | None:
    """Table 1's accuracy for this classifier, or None if its setting is another."""
    about = state.get("pretrained") or {}
    data = Path(args.data_dir).name.lower() if args.dataset == "folder" else args.dataset
    row = PAPER.get((about.get("method"), data, args.recipe))
    same = about.get("as_paper") and about.get("dataset") == "folder" and about.get("classes") == 1000 and args.stage == "finetune"
    if row is None or not same or any(getattr(args, k) != getattr(Args, k) for k in PAPER_FINETUNING):
        return None
    eps = about["eps"]
    if not eps:
        return row[0]
    i = ("linf", "l2").index(about["norm"])
    return row[1 + i] if eps == BEST_EPS[about["method"]][i] else None


def show(results: dict, folder: Path) -> None:
    """Print a line per classifier: accuracy on each set, their average, and under attack; Table 1's beside it where the setting is its own."""
    args, rows = results["args"], results["rows"]
    sets = list(dict.fromkeys(row["set"] for row in rows if not row["eps"]))
    attacked = list(dict.fromkeys((row["attack"], row["norm"], row["eps"]) for row in rows if row["eps"]))
    header = ["network", *sets] + (["average"] if len(sets) > 1 else []) + [f"{norm} {eps_name(eps)}" for _, norm, eps in attacked]
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        clean = {row["set"]: row["accuracy"] for row in mine if not row["eps"]}
        values = [clean[s] for s in sets] + ([sum(clean.values()) / len(clean)] if len(sets) > 1 else [])
        values += [row["accuracy"] for row in mine if row["eps"]]
        table.append([name] + [f"{v:.2f}" for v in values])
        if mine[0]["paper"] is not None:
            table.append(["  the paper", f"{mine[0]['paper']:.2f}"] + [""] * (len(values) - 1))
    tuned = all(row["layer_decay"] is not None for row in rows)
    how = f"fine-tuned on clean images ({args['recipe']})" if tuned else "as they are"
    attack = f" and under {attacked[0][0].upper()} on {next(r['examples'] for r in rows if r['eps']):,}" if attacked else ""
    print(
        f"\n{args['dataset']}, {args['arch']} x{args['width']:g}, {how}; accuracy (%) on {rows[0]['examples']:,} test images{attack}. "
        f"{results['seconds']:.0f} s in all.\n"
    )
    print_table(header, table)
    print(f"\nresults.json, the pictures and the checkpoints are in {folder}", flush=True)


def load_vit(path: str | Path) -> dict:
    """A checkpoint for `build_model` and `load_weights`, from one of ours or from a published one of MAE, DeiT or timm, to which ViT maps one to one:

        theirs                                          ours
        cls_token, blocks.*                             trunk.cls_token, trunk.blocks.*
        patch_embed.proj.{weight, bias}                 trunk.patch_embed.{weight, bias}
        pos_embed (1, 1 + N, dim)                       nothing, if it is the fixed table; else trunk.pos_embed
        fc_norm.{weight, bias}                          trunk.fc_norm.*; without it LayerNorm's own start
        head.{weight, bias}                             heads.class.*, if there is a fc_norm (else the head reads the class token)
        norm.*, mask_token, decoder_*                   nothing: pre-training's last norm and decoder, which fine-tuning drops

    Images are normalised by ImageNet's mean and deviation, as MAE and DeiT have it (some of timm's were trained with 0.5 for all).
    The weights may be the file itself, or its entry `model` or `state_dict`. Raises UserError, naming the key, for anything else in it
    (relative positions, layer scale, a distillation token, ...) and if the sizes are none of VITS.
    """
    with reading(path), torch.serialization.safe_globals([argparse.Namespace]):  # which MAE puts beside the weights: data only
        state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("network"), dict):
        return load_checkpoint(path)
    for entry in ("model", "state_dict"):
        state = state[entry] if isinstance(state, dict) and isinstance(state.get(entry), dict) else state
    if not isinstance(state, dict) or not all(isinstance(state.get(k), Tensor) for k in ("cls_token", "pos_embed", "patch_embed.proj.weight")):
        raise UserError(f"{path} is no Vision Transformer: it lacks cls_token, pos_embed or patch_embed.proj.weight.")
    dim, _, patch = state["patch_embed.proj.weight"].shape[:3]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    arch = next((name for name, sizes in VITS.items() if (patch, depth, dim) == (sizes[0], sizes[1], 64 * sizes[2])), None)
    if arch is None:
        raise UserError(f"{path} has patches of {patch}, {depth} blocks of width {dim}: none of {', '.join(VITS)}.")
    n = state["pos_embed"].shape[1] - 1
    side = math.isqrt(n)
    table = torch.cat([torch.zeros(1, dim), sincos_positions(dim, side, side)]) if side * side == n else None
    fixed = table is not None and torch.allclose(state["pos_embed"][0].float(), table, atol=1e-5)
    classes = len(state["head.weight"]) if {"head.weight", "fc_norm.weight"} <= state.keys() else 0
    network = {"arch": arch, "heads": {"class": classes} if classes else {}, "width": 1.0, "stem": "cifar"}
    network |= {"mean": list(IMAGENET_STATS[0]), "std": list(IMAGENET_STATS[1])} | ({} if fixed else {"positions": n})
    weights = {"trunk." + k: v for k, v in build_trunk(arch, 1.0, "cifar").fc_norm.state_dict(prefix="fc_norm.").items()}
    weights |= {k: torch.tensor(network[k]).view(1, 3, 1, 1) for k in ("mean", "std")}
    for k, v in state.items():
        if k.startswith(("norm.", "decoder_")) or k == "mask_token" or (k.startswith("head.") and not classes) or (k == "pos_embed" and fixed):
            continue
        name = "heads.class" + k[4:] if k.startswith("head.") else "trunk." + k.replace("patch_embed.proj.", "patch_embed.")
        weights[name] = v.float()
    load_weights(build_model(**network), weights, path)  # every key and shape as they should be?
    return {"network": network, "model": weights, "args": {}, "name": Path(path).stem, "stage": "train" if classes else "pretrain", "epoch": 0}


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Pre-train, fine-tune, evaluate, print the table; returns what results.json holds ({} if --stage is not that far)."""
    check(args)
    given = read_init(args)
    if given:  # the network is the checkpoint's, for the record
        about = given[0]["pretrained"]
        its = {k: given[0]["network"][k] for k in ("arch", "width")}
        its |= {k: about[k] for k in ("method", "norm", "eps") if about.get(k) is not None and about["method"] in PAPER_METHODS}
        unused, args = overruled(args, its), replace(args, **its)
    run = start_run(args)
    if given and unused:
        run.say(f"note: {', '.join(unused)}: not used, since --init was made otherwise.")
    if args.eps == Args.eps and args.method != "mae" and not given:
        linf, l2 = BEST_EPS[args.method]
        run.say(f"note: --eps {args.eps:g} is the best radius for MAE; for {args.method} the paper's are l2 {l2:g} and linf {eps_name(linf)}.")
    results = run.finished() or train_and_evaluate(run, args, given)
    if results and world()[0] == 0:
        show(results, run.folder)
    return results


def gammas_of(args: Args) -> list[float]:
    """The layer-wise decays to fine-tune with; SGD has none."""
    return numbers(args.layer_decay, "layer-decay", "0.65,0.75") if args.recipe != "sgd" else [1.0]


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    gammas = gammas_of(args)
    if not gammas or not all(0 <= g <= 1 for g in gammas):
        raise UserError(f"--layer-decay {args.layer_decay!r}: give numbers from 0 to 1, such as 0.65,0.75.")
    if len({f"{g:g}" for g in gammas}) < len(gammas):
        raise UserError(f"--layer-decay {args.layer_decay!r} names the same gamma twice.")
    numbers(args.eval_eps, "eval-eps")
    if args.stage in ("finetune", "evaluate") and not args.init:
        raise UserError(f"--stage {args.stage} needs --init (finetune: an encoder such as runs/X/a-mae.pt; evaluate: a classifier or a folder of them).")
    if args.stage in ("all", "pretrain") and args.init:
        raise UserError(f"--stage {args.stage} takes no --init; to fine-tune an encoder use --stage finetune.")
    if args.eval_norm == "linf" and args.eval_eps == (Args.QUICK["eval_eps"] if args.quick else Args.eval_eps):
        raise UserError("--eval-norm linf needs radii of its own: give --eval-eps 1/255,2/255.")


def read_init(args: Args) -> list[dict]:
    """The checkpoints that --init names: one encoder, or with --stage evaluate a classifier or all in a folder."""
    if not args.init:
        return []
    path, evaluating = Path(args.init), args.stage == "evaluate"
    if path.is_dir() and not evaluating:
        raise UserError(f"{path} is a folder; name the encoder in it, such as {path / 'a-mae.pt'}.")
    files = sorted(file for file in path.glob("*.pt") if file.name != "last.pt") if evaluating and path.is_dir() else [path]
    given = [(file, load_vit(file)) for file in files]
    if evaluating and path.is_dir():
        given = [(file, state) for file, state in given if state["network"].get("heads", {}).get("class")]
        if not given:
            raise UserError(f"{path} holds no classifiers (files such as a-mae-0.75.pt).")
    for file, state in given:
        if "optimizer" in state:
            raise UserError(f"{file} is the state of a run, to resume it; take a finished network such as a-mae.pt or a-mae-0.75.pt.")
        if state["network"].get("arch") not in VITS or not any(k.startswith("trunk.") for k in state["model"]):
            raise UserError(f"{file} holds no Vision Transformer; take a file such as a-mae.pt, or byorl.pt of an encoder --arch vit_b16.")
        if evaluating and "class" not in state["network"].get("heads", {}):
            raise UserError(f"{file} is no classifier; to make it one, use --stage finetune.")
        name = state.get("stage") if state.get("script") == "byorl" else state.get("name", file.stem)
        state["name"], state["file"] = file.stem if evaluating else name, str(file)
        its = state.get("args", {})
        if "pretrained" not in state:  # of byorl.py, or a published one
            about = {k: its.get(k) for k in ("norm", "eps", "arch", "width", "image_size", "dataset", "attack_steps", "epochs", "seed")}
            method = "byol" if state["name"] == "byorl" else state["name"]
            about |= {"eps": 0.0} if state["name"] == "byol" or not its else {}
            same = all(its.get(k) == v for k, v in PAPER_BYOL.items()) and (about["eps"] == 0 or its.get("step_size") == 5 / 8 * about["eps"])
            classes = 1000 if "imagenet" in str(its.get("data_dir")).lower() else 0
            state["pretrained"] = about | {"method": method, "classes": classes, "as_paper": same}
        recipe = its.get("recipe", args.recipe) if state.get("layer_decay") is not None else args.recipe
        if evaluating and recipe != args.recipe:
            raise UserError(f"{file} was fine-tuned with --recipe {recipe}, which also says how images are cut: give that.")
        if any(state["network"][k] != given[0][1]["network"][k] for k in ("arch", "width")):
            raise UserError(f"{file} and {given[0][0]} are networks of different sizes; evaluate one after the other.")
    return [state for _, state in given]


def train_and_evaluate(run: Run, args: Args, given: list[dict]) -> dict:
    """All stages that --stage asks for."""
    stored = {"cifar10": 32, "cifar100": 32, "stl10": 96}.get(args.dataset, args.image_size)  # they are resized as they are needed
    train_set, test_set = load_data(
        args.dataset, args.data_dir, run.device, image_size=stored, data_mirror=args.data_mirror, workers=args.workers, stream=True
    )
    check_sizes(args, train_set, test_set, given)
    variants, real = open_variants(args, train_set.classes), real_labels(args, test_set)
    for state in given:
        if (size := state.get("args", {}).get("image_size", args.image_size)) != args.image_size:
            run.say(f"note: {state['name']} was trained on images of {size} pixels, not of {args.image_size} (--image-size).")
        if args.stage == "evaluate" and state["network"]["heads"]["class"] != len(train_set.classes):
            raise UserError(f"{state['name']} knows {state['network']['heads']['class']} classes, {args.dataset} has {len(train_set.classes)}.")
    run.begin()
    if args.stage == "evaluate":
        classifiers = given
    else:
        radii = {args.method: 0.0} if args.plain or args.eps == 0 else {}
        radii |= {f"a-{args.method}": args.eps} if args.eps > 0 else {}  # a for adversarial
        encoders = {state["name"]: state for state in given}
        if not given:
            encoders = {name: train(name, args.method, run, args, train_set, eps=eps) for name, eps in radii.items()}
        if args.method == "mae" and not given:
            picture(run, args, encoders, test_set)
        if world()[0] == 0:
            save_image_grid(run.folder / "filters.png", {name: filters(state) for name, state in encoders.items()})
        if args.stage == "pretrain":
            for name in encoders:
                run.say(f"go on with: {run.next_command(stage='finetune', init=run.folder / f'{name}.pt')}")
            return {}
        classifiers = [
            train(f"{name}-{gamma:g}" if args.recipe != "sgd" else f"{name}-sgd", args.recipe, run, args, train_set, start=state, gamma=gamma)
            for name, state in encoders.items()
            for gamma in gammas_of(args)
        ]
    began = time.perf_counter()
    rows = judge(run, args, classifiers, test_set, variants, real)
    return write_results(run, rows, began)


def check_sizes(args: Args, train_set: Images, test_set: Images, given: list[dict]) -> None:
    """Raise UserError where batches, parts of batches or masks would be empty, or images do not fit the network --init."""
    if len(test_set) < world()[1]:
        raise UserError(f"{len(test_set)} test images are too few for {world()[1]} processes.")
    sizes = []
    if args.stage in ("all", "pretrain"):
        sizes.append(args.pretrain_batch_size)
    if args.stage in ("all", "finetune"):
        sizes.append(args.batch_size)
    for size in sizes:
        share = len(train_set) // (count_batches(len(train_set), size) * world()[1])
        if share < args.accumulate:
            raise UserError(f"{share} images per process and step cannot be cut into --accumulate {args.accumulate} parts.")
    patches = (args.image_size // VITS[args.arch][0]) ** 2
    learned = given[0]["network"].get("positions", 0) if given else 0
    if learned not in (0, patches):
        raise UserError(f"{args.init} has learned positions for {learned} patches, --image-size {args.image_size} makes {patches}.")
    if args.method != "mae" or args.stage not in ("all", "pretrain"):
        return
    if not 0 < count_visible(patches, args.mask_ratio) < patches:
        raise UserError(f"--mask-ratio {args.mask_ratio:g} of {patches} patches leaves none visible, or none to paint.")
    if args.decoder_width % args.decoder_heads or args.decoder_width % 4:
        raise UserError(f"--decoder-width {args.decoder_width} must be a multiple of 4 and of --decoder-heads {args.decoder_heads}.")


if __name__ == "__main__":
    cli(main, Args)
