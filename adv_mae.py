"""Adversarial masked autoencoders, A-MAE (Rebuffi, Wiles, Shelhamer, Gowal: Adversarially self-supervised
pre-training improves accuracy and robustness, ICLR 2023 workshop).

A Vision Transformer is pre-trained on attacked images and then fine-tuned on clean ones. A masked autoencoder
(MAE, He et al. 2022) hides 75% of an image's patches p: an encoder e sees the visible ones, and a small
decoder d reconstructs the others. A-MAE attacks the visible patches:

    delta = argmax over the eps-ball of (1 - m) || d(e(p + delta, m)) - (p - mu(p)) / sigma(p) ||^2   (eq. 4)
    minimise the same loss at p + delta

The mask m is 1 where a patch is visible, the same in the attack (PGD, eq. 2) and the update. The target is
the clean image. RotNet (eq. 5), supervised training (eq. 1) and BYOL (byorl.py) are attacked on their own
losses. In fine-tuning each layer has gamma times the learning rate of the next one towards the head.

    python adv_mae.py --quick                   # digits: MAE and A-MAE, two minutes on two CPU cores
    torchrun --nproc-per-node=8 adv_mae.py --data-dir imagenet       # ImageNet, ViT-B/16, l2 0.5
    python adv_mae.py --data-dir imagenet --method rotnet --eps 4 --recipe none   # pre-training alone
    python adv_mae.py --data-dir imagenet --init runs/X/a-mae.pt                  # fine-tuning alone
    python adv_mae.py --data-dir imagenet --init runs/X/a-mae-0.75.pt --recipe none     # evaluation alone
    python adv_mae.py --dataset cifar10 --init runs/X/a-mae.pt --recipe sgd       # a cell of Table 1

The paper, CIFAR-10 (Table 1, AdamW), pre-trained without attack / linf / l2: MAE 98.03 / 98.30 / 98.46,
RotNet 96.14 / 97.29 / 97.43, supervised 98.55 / 98.69 / 98.76, BYOL 98.12 / 98.69 / 98.67.

Differs from the paper, which has no public code and refers to He et al.:
- Layer k below the head has learning rate gamma^k. The paper prints gamma^-k, but its limits (gamma 0:
  frozen, 1: full fine-tuning) hold for gamma^k only. The best gamma is not given: we run all four of
  --layer-decay.
- MAE hides 75% of the patches and trains for 800 epochs, as He et al. (their best: 1600).
- The l2 attack starts on the ball's surface and takes normalised steps (eq. 2 shows linf).
- Images are normalised per channel, then each target patch by its mean and unbiased variance plus 1e-6.
- Fine-tuning's "batch size 512, learning rate 0.0005" is taken literally (He et al. would scale it to 0.001).
- Table 1 has no augmentation but horizontal flips; its AdamW keeps 100 epochs, label smoothing, drop path.
- Figure 5's attack and radii are ours: PGD-20 at l2 0.25 to 2 on 1,000 images. The last epoch is reported.
The rest: results/rebuffi.md.
"""
import copy
import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from common import (
    STATS, VITS, Block, CommonArgs, Images, Network, Positive, Run, Share, Shares, UserError, ViT, batches,
    batchnorm_mode, build_model, check_batches, check_classifier, cli, count_batches, distribute, draw,
    eps_name, evaluate, full_precision, image_uniform, init_transformer, l2_norm, learning_rate,
    load_checkpoint, load_foreign, load_trunk, load_weights, map_images, open_folder, patchify, pgd,
    place_model, progress, reading, rebuild, robust_accuracy, rotate, save_image_grid, sincos_positions,
    split_epoch, start_run, text_table, transformed, unpatchify, world,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

Arch = Literal["vit_b16", "vit_s16", "vit_ti16", "vit_s4", "vit_ti4", "vit_mini4"]
FineTuning = Literal["imagenet", "adamw", "sgd", "none"]


@dataclass
class Args(CommonArgs):
    # run
    workers: int = 8  # processes per GPU that read and augment images
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "folder"  # images and labels
    image_size: Positive = 224  # side in pixels, to which images are resized (paper: 224)
    flip: bool = True  # mirror images at random
    arch: Arch = "vit_b16"  # Vision Transformer: base, small, tiny, mini; patches of 16 or 4 (paper: vit_b16)
    width: float = 1.0  # factor on the number of attention heads, 64 channels each (paper: 1)
    init: str = ""  # checkpoint of an encoder to fine-tune: ours, byorl.py's or a published ViT
    # pre-training
    method: Literal["mae", "rotnet", "supervised"] = "mae"  # pre-training task (BYOL: byorl.py, then --init)
    pretrain_epochs: int = 0  # epochs of pre-training; 0: those of He et al. (mae 800, others 300)
    pretrain_batch_size: Positive = 4096  # images per step of pre-training over all GPUs (He et al.: 4096)
    pretrain_lr: float = 0.0  # highest learning rate; 0: He et al.'s, batch size / 256 * 1.5e-4 (mae) or 1e-4
    accumulate: Positive = 1  # parts in which each GPU's batch is computed, to save memory
    mask_ratio: Share = 0.75  # fraction of the patches that MAE hides (He et al.: 0.75)
    decoder_width: Positive = 512  # channels of MAE's decoder (He et al.: 512)
    decoder_depth: Positive = 8  # layers of MAE's decoder (paper: 8)
    decoder_heads: Positive = 16  # attention heads of MAE's decoder (paper: 16)
    plain: bool = False  # also pre-train without attack, for comparison
    # attack in pre-training (appendix C)
    norm: Literal["linf", "l2"] = "l2"  # norm of the attack (paper: both)
    eps: float = 0.5  # radius of the attack; images are in [0, 1] (best for mae: 0.5; linf 1/255); 0: none
    attack_steps: Positive = 2  # steps of PGD in pre-training (paper: 2)
    step_size: float = 0.0  # step size of PGD; 0: 5/8 of the radius (paper)
    # fine-tuning (appendix C)
    recipe: FineTuning = "imagenet"  # how to fine-tune; adamw, sgd: Table 1; none: not at all
    epochs: Positive = 100  # epochs of fine-tuning by imagenet or adamw (paper: 100)
    steps: Positive = 2500  # steps of fine-tuning by sgd (paper: 2500)
    batch_size: Positive = 512  # images per step of fine-tuning and evaluation over all GPUs (paper: 512)
    lr: float = 0.0  # highest learning rate of fine-tuning; 0: the paper's (imagenet, adamw 5e-4; sgd 0.01)
    layer_decay: Shares = (0.65, 0.75, 0.85, 0.95)  # gammas; one network for each (paper: these); not for sgd
    # augmentation in pre-training and fine-tuning
    crop: Share = 0.0  # smallest area of a random crop; 0: 0.2 for mae, else 0.08 (adamw, sgd: no crop)
    regularise: bool = True  # use the recipe's RandAugment, erasing, mixup, cutmix, smoothing, drop path
    # evaluation
    eval_data: str = ""  # folders of more test sets, comma-separated: ImageNet-A, -R, -V2, -Sketch, Conflict
    real: str = ""  # real.json, the labels of ImageNet-ReaL, for validation files named ILSVRC2012_val_*
    eval_crop: Share = 0.875  # central crop as a share of the shorter side (adamw, sgd: no crop)
    eval_norm: Literal["linf", "l2"] = "l2"  # norm of the attack in evaluation (paper, Figure 5: l2)
    eval_eps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # radii at which classifiers are attacked (Figure 5)
    attack_examples: int = 1000  # number of random test images that are attacked; 0: all

    # Digits of 8 x 8 pixels are enlarged to 16: a patch covers 2 x 2 original pixels.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=16, flip=False, arch="vit_mini4", workers=0, amp="off",
        pretrain_epochs=20, pretrain_batch_size=64, pretrain_lr=1e-3, crop=0.6, decoder_width=64,
        decoder_depth=1, decoder_heads=2, plain=True, recipe="adamw", epochs=8, batch_size=64, lr=4e-3,
        layer_decay=(0.65,), regularise=False, eval_eps=(0.25, 0.5), attack_examples=200,
    )  # fmt: skip


@dataclass(kw_only=True)
class Recipe:
    """How to train: a row of RECIPES."""

    epochs: int = 0  # 0: from --epochs
    steps: int = 0  # sgd only: from --steps
    batch_size: int = 0  # --pretrain-batch-size, --batch-size
    lr: float  # highest learning rate; pre-training: per 256 images
    lowest: float = 0.0  # learning rate at the end of the cosine
    warmup: float  # fraction of the steps
    weight_decay: float  # not on vectors (biases, LayerNorm)
    betas: tuple[float, float] | None = None  # of AdamW; None: SGD with momentum 0.9
    clip: float = 0.0  # largest norm of the gradient; 0: no clipping
    ema: float = 0.0  # decay of the moving average of the weights; 0: no average
    crop: float = 0.0  # smallest area of a random crop; 0: no crop, resized to a square
    rand_augment: bool = False  # of strength 9 of 10
    erase: float = 0.0  # probability that a random rectangle is erased
    mixup: float = 0.0  # alpha
    cutmix: float = 0.0  # alpha
    smoothing: float = 0.0  # label smoothing
    drop_path: float = 0.0  # stochastic depth: rate in the last layer, rising from 0 in the first


ROTNET = Recipe(
    epochs=300, lr=1e-4, warmup=20 / 300, weight_decay=0.3, betas=(0.9, 0.95), ema=0.9999, crop=0.08,
    rand_augment=True, smoothing=0.1, drop_path=0.1,
)  # fmt: skip
ADAMW = Recipe(
    lr=5e-4, lowest=1e-6, warmup=5 / 100, weight_decay=0.05, betas=(0.9, 0.999), smoothing=0.1, drop_path=0.1,
)  # fmt: skip
RECIPES = {
    # pre-training: He et al. 2022, appendix; RotNet has no mixup and cutmix (appendix C)
    "mae": Recipe(epochs=800, lr=1.5e-4, warmup=40 / 800, weight_decay=0.05, betas=(0.9, 0.95), crop=0.2),
    "rotnet": ROTNET,
    "supervised": replace(ROTNET, mixup=0.8, cutmix=1.0),
    # fine-tuning: appendix C and He et al.; for Table 1 by AdamW or SGD (appendix E; Steiner et al. 2021)
    "imagenet": replace(ADAMW, crop=0.08, rand_augment=True, erase=0.25, mixup=0.8, cutmix=1.0),
    "adamw": ADAMW,
    "sgd": Recipe(lr=0.01, warmup=500 / 2500, weight_decay=0.0, clip=1.0),
}


def recipe_of(kind: str, args: Args) -> Recipe:
    """A row of RECIPES with what the flags say."""
    recipe = RECIPES[kind]
    if not args.regularise:
        names = ("rand_augment", "erase", "mixup", "cutmix", "smoothing", "drop_path")
        recipe = replace(recipe, **dict.fromkeys(names, 0))
    if recipe.crop:
        recipe = replace(recipe, crop=args.crop or recipe.crop)
    if kind in ("mae", "rotnet", "supervised"):  # pre-training
        epochs, batch_size = args.pretrain_epochs or recipe.epochs, args.pretrain_batch_size
        lr = args.pretrain_lr or recipe.lr * batch_size / 256
        return replace(recipe, epochs=epochs, batch_size=batch_size, lr=lr)
    length = {"steps": args.steps} if kind == "sgd" else {"epochs": args.epochs}
    return replace(recipe, batch_size=args.batch_size, lr=args.lr or recipe.lr, **length)


# ---- the method --------------------------------------------------------------------------------------


class MAE(nn.Module):
    """Encoder and decoder (section 3.1). The encoder sees the visible patches only: this makes MAE fast."""

    def __init__(self, encoder: ViT, patches: int, width: int, depth: int, heads: int):
        super().__init__()
        if width % 4 or width % heads:
            wanted = f"a multiple of 4 and of --decoder-heads {heads}"
            raise UserError(f"--decoder-width {width} must be {wanted}.")
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.dim, eps=1e-6)  # of tokens; fc_norm is for their mean
        self.embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, encoder.patch_embed.weight[0].numel())
        self.side = math.isqrt(patches)
        self.register_buffer("positions", sincos_positions(width, self.side, self.side), persistent=False)
        for part in (self.embed, self.decoder, self.predict):
            init_transformer(part)

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        """Reconstruct the hidden patches: (B, N - n, 3 * p * p).

        visible: (B * n, 3, p, p), normalised. order: (B, N), all patches' numbers, the n visible ones first.
        Tokens stay in this order; each has the position of its own patch.
        """
        (b, total), n = order.shape, len(visible) // len(order)
        weight, bias = self.encoder.patch_embed.weight, self.encoder.patch_embed.bias
        tokens = F.linear(visible.flatten(1), weight.flatten(1), bias).view(b, n, -1)
        tokens = tokens + self.encoder.positions(self.side, self.side)[order[:, :n]]
        tokens = self.embed(self.norm(self.encoder.encode(tokens)))  # (B, 1 + n, width)
        hidden = self.mask_token.expand(b, total - n, -1)
        patches = torch.cat([tokens[:, 1:], hidden], 1) + self.positions[order]  # (B, N, width)
        out = self.decoder(torch.cat([tokens[:, :1], patches], 1))
        return self.predict(self.decoder_norm(out[:, 1 + n :]))


class MaskedAutoencoder(Network):
    """An MAE around the trunk of `encoder`, with its normalisation and mixed precision."""

    def __init__(self, encoder: Network, args: Args):
        patches = (args.image_size // VITS[args.arch][0]) ** 2
        mae = MAE(encoder.trunk, patches, args.decoder_width, args.decoder_depth, args.decoder_heads)
        super().__init__(mae, {}, encoder.spec["mean"], encoder.spec["std"])
        self.spec = encoder.spec
        encoder.trunk.fc_norm.requires_grad_(False)  # not used here

    def forward(self, visible: Tensor, order: Tensor) -> Tensor:
        """Visible patches in [0, 1], (B * n, 3, p, p) -> hidden ones, (B, N - n, 3 * p * p)."""
        return self.features(visible, order)


Loss = Callable[[nn.Module, Tensor], Tensor]  # (network, attacked inputs (B, ...)) -> (B,)


def image_seeds(seed: int, positions: Tensor) -> Tensor:
    """A seed for each image from an epoch's seed and the image's position in the epoch, int64 (B,): the same
    on any rank. At most 2^24 images."""
    # Times a large odd number, as `image_uniform` asks for.
    return (seed * 2**24 % 2**62 + positions) * 0x2545F4914F6CDD1D


def count_visible(patches: int, mask_ratio: float) -> int:
    """How many of an image's patches stay visible, rounded down as in MAE's code: 49 of 196."""
    visible = int(patches * (1 - mask_ratio))
    if not 0 < visible < patches:
        raise UserError(f"--mask-ratio {mask_ratio:g} leaves {visible} of {patches} patches visible.")
    return visible


def shuffle_patches(x: Tensor, seeds: Tensor, args: Args) -> tuple[Tensor, Tensor, int]:
    """(an image's patches in random order (B, N, 3, p, p); that order (B, N); the number n of visible ones,
    which come first). The order depends on the image's seed alone: the attack, the update and any number of
    ranks have the same mask."""
    patches = patchify(x, VITS[args.arch][0])
    order = image_uniform(seeds, patches.shape[1]).argsort(dim=1, stable=True)  # two numbers may be equal
    image = torch.arange(len(x), device=x.device)[:, None]
    return patches[image, order], order, count_visible(patches.shape[1], args.mask_ratio)


def standardise(patches: Tensor, model: Network) -> tuple[Tensor, Tensor, Tensor]:
    """((p - mu) / sigma of eq. 3, mu, sigma): (B, M, 3, p, p) -> (B, M, 3 * p * p) and twice (B, M, 1)."""
    p = ((patches - model.mean) / model.std).flatten(2)
    mu, sigma = p.mean(2, keepdim=True), (p.var(2, keepdim=True) + 1e-6).sqrt()
    return (p - mu) / sigma, mu, sigma


def masked_task(x: Tensor, seeds: Tensor, model: Network, args: Args) -> tuple[Tensor, Loss]:
    """MAE: the visible patches (B, n, 3, p, p), which are attacked, and eq. 4 as a function of them.

    Hidden patches are not in PGD's input. So delta is zero there from the start, and the whole l2 budget is
    spent on what the encoder sees.
    """
    patches, order, n = shuffle_patches(x, seeds, args)
    target, _, _ = standardise(patches[:, n:], model)

    def loss_fn(net: nn.Module, z: Tensor) -> Tensor:
        return (net(z.flatten(0, 1), order) - target).square().mean((1, 2))

    return patches[:, :n], loss_fn


def labelled_task(x: Tensor, target: Tensor, recipe: Recipe) -> tuple[Tensor, Loss]:
    """The images and the cross-entropy (eq. 1). target: labels (B,), or probabilities (B, classes)."""

    def loss_fn(net: nn.Module, z: Tensor) -> Tensor:
        return F.cross_entropy(net(z), target, reduction="none", label_smoothing=recipe.smoothing)

    return x, loss_fn


def perturb(z: Tensor, loss_fn: Loss, seeds: Tensor, model: Network, args: Args) -> Tensor:
    """Eq. 2: PGD on a task's inputs z. The random start depends on the image's seed alone."""
    noise = 2 * image_uniform(seeds + 1, z[0].numel()).view_as(z) - 1  # + 1: independent of the mask
    if args.norm == "l2":
        noise = torch.erfinv(noise)  # uniform to Gaussian
        noise = noise / l2_norm(noise)
    with batchnorm_mode(model, "eval"):  # without drop path
        return pgd(
            lambda v: loss_fn(model, v), z, eps=args.eps, norm=args.norm, steps=args.attack_steps,
            step_size=args.step_size or 5 / 8 * args.eps, start=z + args.eps * noise,
        )  # fmt: skip


# ---- augmentation, in the processes that read the images ---------------------------------------------


def rand_augment(image: Any, fill: list[int]) -> Any:
    """RandAugment (Cubuk et al. 2020) of a Pillow image: two operations, each with probability 1/2, of
    strength 9 of 10 with standard deviation 0.5 (He et al.'s code)."""
    options = {"num_magnitude_bins": 101, "interpolation": InterpolationMode.BICUBIC, "fill": fill}
    for _ in range(2):
        if torch.rand(()) < 0.5:
            strength = int((90 + 5 * torch.randn(())).round().clamp(0, 100))
            image = v2.RandAugment(1, strength, **options)(image)
    return image


def random_erase(x: Tensor, p: float, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """With probability p, Gaussian noise in a rectangle of the image, uint8 (3, H, W) (Zhong et al. 2020)."""
    if torch.rand(()) >= p:
        return x
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    erase = v2.RandomErasing(p=1, scale=(0.02, 1 / 3), value="random")
    z = erase((x / 255 - m) / s)  # normalised: the noise has mean 0, variance 1
    return ((z * s + m).clamp(0, 1) * 255).round().byte()


def augmentation(recipe: Recipe, args: Args) -> Callable:
    """A function from a stored image to what is trained on, uint8 (3, S, S)."""
    size, cubic = args.image_size, InterpolationMode.BICUBIC
    mean, std = STATS[args.dataset]
    steps = [v2.PILToTensor()]  # tensors are resized several times faster than Pillow's images
    if recipe.crop:
        steps += [v2.RandomResizedCrop(size, (recipe.crop, 1.0), interpolation=cubic)]
    else:
        steps += [v2.Resize((size, size), cubic)]
    if args.flip:
        steps += [v2.RandomHorizontalFlip()]
    if recipe.rand_augment:
        augment = functools.partial(rand_augment, fill=[round(255 * m) for m in mean])
        steps += [v2.ToPILImage(), augment, v2.PILToTensor()]
    if recipe.erase:
        steps += [functools.partial(random_erase, p=recipe.erase, mean=mean, std=std)]
    return v2.Compose(steps)


def central_crop(recipe: str, args: Args) -> Callable:
    """A function from a stored image to what is evaluated after fine-tuning by `recipe`, uint8 (3, S, S)."""
    size, cubic = args.image_size, InterpolationMode.BICUBIC
    if recipe in ("adamw", "sgd"):  # "without preserving aspect ratio" (appendix C)
        return v2.Compose([v2.Resize((size, size), cubic), v2.PILToTensor()])
    larger = round(size / (args.eval_crop or 1))
    return v2.Compose([v2.Resize(larger, cubic), v2.CenterCrop(size), v2.PILToTensor()])


def mix(x: Tensor, y: Tensor, recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch: images, targets (B, classes)."""
    ways = [v2.MixUp(alpha=recipe.mixup, num_classes=classes)] if recipe.mixup else []
    ways += [v2.CutMix(alpha=recipe.cutmix, num_classes=classes)] if recipe.cutmix else []
    return v2.RandomChoice(ways)(x, y) if ways and len(x) > 1 else (x, F.one_hot(y, classes).float())


# ---- training ----------------------------------------------------------------------------------------


def parameter_groups(model: Network, weight_decay: float, gamma: float | None) -> list[dict]:
    """Groups for an optimizer. `scale` multiplies the learning rate: gamma^k for layer k below the head in
    fine-tuning (section 4.2; 14 layers for ViT-B), 1 if gamma is None. Vectors have no weight decay, nor has
    the class token but for MAE's (He et al.'s code)."""
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        k = 0  # last norm and head
        if name.startswith("trunk.blocks."):
            k = len(model.trunk.blocks) - int(name.split(".")[2])
        elif name.startswith(("trunk.cls_token", "trunk.pos_embed", "trunk.patch_embed")):
            k = len(model.trunk.blocks) + 1
        scale = 1.0 if gamma is None else gamma**k
        no_decay = p.dim() == 1 or name in ("trunk.cls_token", "trunk.pos_embed")
        empty = {"params": [], "scale": scale, "weight_decay": 0.0 if no_decay else weight_decay}
        groups.setdefault((scale, no_decay), empty)["params"].append(p)
    return list(groups.values())


def start_model(kind: str, args: Args, recipe: Recipe, start: dict | None, classes: int) -> Network:
    """A new network to pre-train, or with the checkpoint `start` one to fine-tune."""
    if start is None:
        mean, std = STATS[args.dataset]
        heads = {"mae": {}, "rotnet": {"rotation": 4}, "supervised": {"class": classes}}[kind]
        model = build_model(args.arch, heads, width=args.width, mean=mean, std=std)
    else:  # keeps its mean and standard deviation, also on another data set
        model = build_model(**start["network"] | {"heads": {"class": classes}})
        load_trunk(model.trunk, start, args.init or start["stage"])
        nn.init.trunc_normal_(model.heads["class"].weight, std=2e-5)  # He et al.'s code
        nn.init.zeros_(model.heads["class"].bias)
    for i, block in enumerate(model.trunk.blocks):
        block.drop_path = recipe.drop_path * i / (len(model.trunk.blocks) - 1)
    return MaskedAutoencoder(model, args) if kind == "mae" else model


# Added to the epoch in random seeds, so that the three draw different numbers.
SEED_OFFSET = {"plain": 0, "attacked": 100_000, "fine-tuned": 200_000}


def batch_seeds(run: Run, n: int, batch_size: int) -> tuple[Tensor, ...]:
    """For each batch of an epoch of n images, `image_seeds` of this rank's share of the batch."""
    positions = split_epoch(n, batch_size)
    seeds = image_seeds(run.epoch_seed, torch.cat(positions)).to(run.device)
    return seeds.split([len(p) for p in positions])


def train(
    name: str, kind: str, run: Run, args: Args, train_set: Images, pretraining: dict, *,
    start: dict | None = None, gamma: float | None = None,
) -> dict:  # fmt: skip
    """Train a network by the recipe `kind` and return its checkpoint, name.pt.

    pretraining: see `pretraining_of`. Pre-training (mae, rotnet, supervised) is adversarial if this eps is
    not 0. Fine-tuning (imagenet, adamw, sgd) starts from the checkpoint `start`, with layer-wise decay
    `gamma`, and is not adversarial.
    """
    recipe = recipe_of(kind, args)
    eps = 0.0 if start else pretraining["eps"]
    classes = len(train_set.classes)
    ranks = world()[1]
    torch.manual_seed(args.seed)
    model = start_model(kind, args, recipe, start, classes)
    average = copy.deepcopy(model).to(run.device) if recipe.ema else model
    place_model(model, run.device, args.amp, args.compile)
    groups = parameter_groups(model, recipe.weight_decay, gamma)
    if recipe.betas:
        opt = torch.optim.AdamW(groups, recipe.lr, betas=recipe.betas)
    else:
        opt = torch.optim.SGD(groups, recipe.lr, momentum=0.9)
    ddp = distribute(model)
    steps_per_epoch = count_batches(len(train_set), recipe.batch_size)
    total = recipe.steps or recipe.epochs * steps_per_epoch
    epochs = math.ceil(total / steps_per_epoch)
    seed_offset = SEED_OFFSET["fine-tuned" if start else "attacked" if eps else "plain"]

    for epoch in run.epochs(name, epochs, model, opt, seed_offset=seed_offset, average=average):
        model.train()
        first_step = epoch * steps_per_epoch
        n = min(len(train_set), (total - first_step) * recipe.batch_size)  # sgd ends within an epoch
        images = transformed(train_set, augmentation(recipe, args), run.epoch_seed)
        seeds_of_epoch = batch_seeds(run, n, recipe.batch_size)
        for i, (x, y) in enumerate(run.batches(images, recipe.batch_size, n)):
            step, seeds = first_step + i, seeds_of_epoch[i]
            batch_size = n // len(seeds_of_epoch) + (i < n % len(seeds_of_epoch))  # over all ranks
            lr = learning_rate(recipe.lr, step, round(recipe.warmup * total), total, recipe.lowest)
            for group in opt.param_groups:
                group["lr"] = group["scale"] * lr
            if kind == "rotnet":
                y = (4 * image_uniform(seeds, 1)[:, 0]).long()  # one of four angles
                x = rotate(x, y)
            elif kind != "mae":
                x, y = mix(x, y, recipe, classes)  # y: from now on (B, classes)

            opt.zero_grad()
            loss_sum = torch.zeros((), device=x.device)
            parts = min(args.accumulate, batch_size // ranks)
            for part in range(parts):
                x_part, y_part, seeds_part = (v.tensor_split(parts)[part] for v in (x, y, seeds))
                if kind == "mae":
                    z, loss_fn = masked_task(x_part, seeds_part, model, args)  # eq. 4
                else:
                    z, loss_fn = labelled_task(x_part, y_part, recipe)  # eq. 1, eq. 5
                if eps:
                    z = perturb(z, loss_fn, seeds_part, model, args)
                values = loss_fn(ddp, z)  # (b,)
                # DDP averages over ranks, which makes this the gradient of the batch's mean.
                (values.sum() * ranks / batch_size).backward()
                loss_sum += values.detach().sum()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            opt.step()
            if recipe.ema:
                decay = min(recipe.ema, (1 + step) / (10 + step))  # small at first, to forget the start
                with torch.no_grad():
                    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            run.log(loss=loss_sum / len(x))

        if epoch + 1 == epochs:  # not after the loop: a resumed run may skip it
            state = {"network": model.spec, "stage": name, "epoch": epochs, "classes": train_set.classes}
            state |= {"recipe": kind, "layer_decay": gamma, "pretrained": pretraining}
            run.save(f"{name}.pt", state | split_weights(kind, average.state_dict()))
    return run.load(f"{name}.pt", stage=name, network=model.spec)


def split_weights(kind: str, weights: dict) -> dict:
    """Weights for a checkpoint: `model`, which fine-tuning takes, and MAE's `decoder`, for pictures only."""
    if kind != "mae":
        return {"model": weights}
    decoder = {k: v for k, v in weights.items() if not k.startswith("trunk.encoder.")}
    encoder = {k.replace("trunk.encoder.", "trunk."): v for k, v in weights.items() if k not in decoder}
    return {"model": encoder | {k: weights[k] for k in ("mean", "std")}, "decoder": decoder}


def pretraining_of(state: dict) -> dict:
    """How the encoder in a checkpoint was pre-trained, for tables: method, norm, eps, epochs."""
    if "pretrained" in state:
        return state["pretrained"]
    saved, stage = state.get("args", {}), state["stage"]  # of byorl.py; a published ViT has no args
    method = "byol" if stage in ("byol", "byorl") else stage
    eps = 0.0 if stage == "byol" else saved.get("eps", 0.0)
    return {"method": method, "norm": saved.get("norm", "l2"), "eps": eps, "epochs": saved.get("epochs")}


# ---- pictures ----------------------------------------------------------------------------------------


def picture(run: Run, args: Args, encoders: dict[str, dict], test_set: Images, count: int = 8) -> None:
    """Write reconstruction.png: test images, their visible patches, and what each MAE reconstructs from
    these when they are attacked."""
    images = transformed(test_set, central_crop(args.recipe, args)).pixels
    x = torch.stack([images[i][0] for i in test_set.index[:count].tolist()]).to(run.device) / 255
    seeds = image_seeds(args.seed, torch.arange(len(x), device=run.device))
    image = torch.arange(len(x), device=run.device)[:, None]
    rows = {"image": x}
    for name, state in encoders.items():
        model = MaskedAutoencoder(rebuild(state, name), args)
        model.load_state_dict(state["decoder"], strict=False)  # the encoder is there
        place_model(model, run.device, args.amp).eval()
        patches, order, n = shuffle_patches(x, seeds, args)
        z, hidden = patches[:, :n], patches[:, n:]  # (B, n, 3, p, p), (B, N - n, 3, p, p)
        grey, back = torch.full_like(hidden, 0.5), order.argsort(1)
        rows["visible"] = unpatchify(torch.cat([z, grey], 1)[image, back])
        if state["pretrained"]["eps"]:
            z = perturb(*masked_task(x, seeds, model, args), seeds, model, args)
            rows[f"{name}: attacked"] = unpatchify(torch.cat([z, grey], 1)[image, back])
        with torch.no_grad():
            _, mu, sigma = standardise(hidden, model)
            out = model(z.flatten(0, 1), order) * sigma + mu
            out = (out.view_as(hidden) * model.std + model.mean).clamp(0, 1)
        rows[f"{name}: reconstructed"] = unpatchify(torch.cat([z, out], 1)[image, back])
    save_image_grid(run.folder / "reconstruction.png", rows)


def filters(state: dict, count: int = 28) -> Tensor:
    """Figure 4: the first principal components of a ViT's patch embedding, each scaled to [0, 1]:
    (count, 3, p, p). The weights are standardised over the filters (appendix D)."""
    w = state["model"]["trunk.patch_embed.weight"].float()  # (dim, 3, p, p)
    flat = w.flatten(1)
    flat = (flat - flat.mean(0)) / flat.std(0).clamp(min=1e-12)
    components = torch.linalg.svd(flat, full_matrices=False).Vh[:count]
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    return ((components - low) / (high - low)).view(-1, *w.shape[1:])


# ---- ImageNet's variants -----------------------------------------------------------------------------

# The 16 classes of Conflict Stimuli (Geirhos et al. 2019): indices of ImageNet's classes, sorted by wnid.
CONFLICT = {
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145", "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898 899 901 907", "car": "436 511 817", "cat": "281-286",
    "chair": "423 559 765 857", "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268", "elephant": "385 386",
    "keyboard": "508 878", "knife": "499", "oven": "766", "truck": "555 569 656 675 717 734 864 867",
}  # fmt: skip


def choose_among(logits: Tensor, groups: Tensor) -> Tensor:
    """Choose among groups of a classifier's classes by the mean of their probabilities.

    logits: (B, classes); groups: (k, classes), each row sums to one. Returns (B, k), those means,
    renormalised over the listed classes. If each row is one class, it chooses among these classes, as for
    ImageNet-A and -R (200).
    """
    listed = (groups > 0).any(0)
    return logits.masked_fill(~listed, -math.inf).softmax(1) @ groups.T


def groups_of(names: list[str], classes: list[str], folder: str) -> Tensor:
    """For the class folders of a test set, which of the network's classes they are: (k, classes).

    A folder has the name of a class or, for ImageNet's 1,000 classes, the number of one (ImageNet-V2) or one
    of Conflict Stimuli's 16 names. Raises UserError for another name.
    """
    groups = torch.zeros(len(names), len(classes))
    for row, name in zip(groups, names, strict=True):
        if name in classes:
            row[classes.index(name)] = 1
        elif name.isdecimal() and int(name) < len(classes) == 1000:
            row[int(name)] = 1
        elif name in CONFLICT and len(classes) == 1000:
            for part in CONFLICT[name].split():
                first, _, last = part.partition("-")
                row[int(first) : int(last or first) + 1] = 1
        else:
            wanted = "name class folders as in the training set"
            raise UserError(f"{folder}: '{name}' is none of the network's {len(classes)} classes; {wanted}.")
    return groups / groups.sum(1, keepdim=True)


def open_variants(args: Args, classes: list[str]) -> dict[str, tuple[Images, Tensor]]:
    """{name: (images, groups)} of the folders --eval-data; see `groups_of`. Raises UserError for one that
    cannot be used."""
    variants: dict[str, tuple[Images, Tensor]] = {}
    for folder in filter(None, args.eval_data.split(",")):
        name = Path(folder).name
        if name in (*variants, "test", "real"):
            raise UserError(f"--eval-data: '{name}' names two test sets; rename the folder {folder}.")
        images = open_folder(Path(folder), args.image_size, "--eval-data")
        groups = groups_of(images.classes, classes, folder)
        if set(images.classes) <= set(CONFLICT) - set(classes):
            # Without the 80 images of 1,280 whose shape and texture agree, such as cat1-cat3.png.
            files = map(images.pixels.path, range(len(images)))
            kinds = [re.findall("[a-z]+", Path(file).stem) for file in files]
            images = images.subset(torch.tensor([i for i, kind in enumerate(kinds) if len(set(kind)) > 1]))
        variants[name] = images, groups
    return variants


def real_labels(args: Args, test_set: Images) -> list[list[int]] | None:
    """ImageNet-ReaL's labels of the test images, several or none for each (Beyer et al. 2020), or None
    without --real. Raises UserError if file and images do not fit."""
    if not args.real:
        return None
    if isinstance(test_set.pixels, Tensor):
        raise UserError("--real needs --dataset folder.")
    with reading(args.real):
        labels = dict(enumerate(json.loads(Path(args.real).read_text()), start=1))
        if max(max(of_image, default=0) for of_image in labels.values()) >= len(test_set.classes):
            raise ValueError(f"it has labels of more than the {len(test_set.classes)} classes")
        files = [Path(test_set.pixels.path(i)) for i in test_set.index.tolist()]
        chosen = [list(map(int, labels[int(file.stem.split("_")[-1])])) for file in files]
        if not any(chosen):
            raise ValueError("it has no label for any of the test images")
        return chosen


# ---- evaluation --------------------------------------------------------------------------------------


def evaluate_all(
    run: Run, args: Args, classifiers: dict[str, dict], test_set: Images, variants: dict,
    real: list[list[int]] | None,
) -> list[dict]:  # fmt: skip
    """Rows of results.json: clean accuracy of each classifier on all test sets, and under attack."""
    rows = run.rows()
    radii = [eps for eps in args.eval_eps if eps > 0]
    norm, n = args.eval_norm, min(args.attack_examples or len(test_set), len(test_set))
    small = min(args.batch_size, 64 * world()[1])  # in float32 an image takes 0.1 GB in a ViT-B/16
    for name, state in classifiers.items():
        if any(row["name"] == name for row in rows):  # a resumed run has them already
            continue
        crop = central_crop(state.get("recipe", "imagenet"), args)
        model = place_model(rebuild(state, name), run.device, args.amp).eval()
        images = transformed(test_set, crop)
        new_rows = evaluate(run, name, state, images, [0], norm=norm)
        clean = new_rows[0] = {"set": "test"} | new_rows[0]
        with full_precision(model, not args.eval_amp):
            for where, (others, groups) in variants.items():
                stream = batches(transformed(others, crop), args.batch_size, run.device, workers=args.workers)
                stream, groups = progress(stream, len(others), where), groups.to(run.device)
                accuracy = robust_accuracy(lambda x: choose_among(model(x), groups), stream)
                columns = {"set": where, "examples": len(others), "accuracy": round(accuracy, 2)}
                new_rows.append(clean | columns)
            if real:
                predicted = map_images(lambda x: model(x).argmax(1), images, run, args.batch_size).tolist()
                correct = [k in labels for k, labels in zip(predicted, real, strict=True) if labels]
                accuracy = round(100 * sum(correct) / len(correct), 2)
                new_rows.append(clean | {"set": "real", "examples": len(correct), "accuracy": accuracy})
        if radii:
            subset, options = draw(images, n, seed=0), {"norm": norm, "batch_size": small}
            attacked = evaluate(run, name, state, subset, radii, picture_eps=radii[0], **options)
            new_rows += [{"set": "test"} | row for row in attacked]
        file = args.init if args.recipe == "none" and args.init else str(run.folder / f"{name}.pt")
        columns = {"recipe": state.get("recipe"), "layer_decay": state.get("layer_decay")}
        columns |= {"pretrained": pretraining_of(state), "checkpoint": file}
        rows += [row | columns for row in new_rows]
        run.keep_rows(rows)
    return rows


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: a line per classifier ('' if there is none)."""
    rows, lines = results["rows"], []
    if not rows:
        return ""
    sets = list(dict.fromkeys(row["set"] for row in rows if not row["eps"]))
    attacks = list(dict.fromkeys((row["attack"], row["norm"], row["eps"]) for row in rows if row["eps"]))
    header = ["network", *sets, *(["average"] if len(sets) > 1 else [])]
    header += [f"{norm} {eps_name(eps)}" for _, norm, eps in attacks]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name]
        clean = [row["accuracy"] for row in of_name if not row["eps"]]
        values = clean + ([sum(clean) / len(clean)] if len(sets) > 1 else [])
        values += [row["accuracy"] for row in of_name if row["eps"]]
        lines.append([name, *(f"{value:.2f}" for value in values)])
    how = "as they are" if args.recipe == "none" else f"fine-tuned on clean images ({args.recipe})"
    attacked = [row for row in rows if row["eps"]]
    under = f"\nand under {attacks[0][0]} on {attacked[0]['examples']:,} of them" if attacked else ""
    heading = (
        f"{args.dataset}, {args.arch} x{args.width:g}, {how}; accuracy (%) on {rows[0]['examples']:,} test "
        f"images{under}. {results['seconds']:.0f} s of training and evaluation."
    )
    return f"\n{heading}\n\n" + text_table(header, lines)


# ---- the run -----------------------------------------------------------------------------------------


def load_vit(path: str, args: Args) -> dict:
    """The checkpoint of a ViT: one of ours, or a published one of MAE or timm, with or without its head.

    theirs -> ours: patch_embed.proj -> trunk.patch_embed; head -> heads.class; all others get `trunk.`.
    Dropped: a pos_embed that is the fixed table; mask_token and decoder_*; also norm and head if fc_norm is
    missing (no mean pooling). Images are normalised by ImageNet's mean and standard deviation, as in MAE
    (some of timm's: 0.5). --arch tells the number of heads, which the weights do not. Raises UserError,
    naming the key, for other keys and sizes.
    """
    with reading(path):
        weights = load_foreign(path)
        if "network" in weights:
            return load_checkpoint(path)
        weights = weights.get("model", weights.get("state_dict", weights))
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in weights.items()}
        pooled, positions = "fc_norm.weight" in weights, weights["pos_embed"][0].float()
        n, side = len(positions) - 1, math.isqrt(len(positions))
        fixed = F.pad(sincos_positions(positions.shape[1], side, side), (0, 0, 1, 0))
        learned = not torch.allclose(positions, fixed, atol=1e-5)
        dropped, new = ["mask_token", "decoder_"], ["mean", "std"]
        if not learned:
            dropped += ["pos_embed"]
        if not pooled:
            dropped += ["norm.", "head."]
            new += ["trunk.fc_norm.weight", "trunk.fc_norm.bias"]
        weights = {"trunk." + k: v for k, v in weights.items() if not k.startswith(tuple(dropped))}
        weights = {k.replace("trunk.head.", "heads.class."): v for k, v in weights.items()}
        weights = {k.replace("patch_embed.proj.", "patch_embed."): v for k, v in weights.items()}
        heads = {"class": len(weights["heads.class.weight"])} if "heads.class.weight" in weights else {}
        model = build_model(args.arch, heads, positions=n if learned else 0)
        weights |= {k: v for k, v in model.state_dict().items() if k in new}
        load_weights(model, weights, f"{path}, read as --arch {args.arch},")
    return {"network": model.spec, "model": model.state_dict(), "stage": Path(path).stem, "epoch": 0}


def main(args: Args) -> dict:
    """Pre-train, fine-tune, evaluate, print the table; returns what results.json holds."""
    start, name = None, args.method
    if args.init:
        start = load_vit(args.init, args)
        with reading(args.init):
            if start["network"]["arch"] not in VITS or "optimizer" in start:
                raise ValueError("no finished ViT such as a-mae.pt, or byorl.pt with --arch vit_b16")
            if args.recipe == "none":
                check_classifier(start, args.init)
            n = (args.image_size // VITS[start["network"]["arch"]][0]) ** 2
            if (learned := start["network"].get("positions", n)) != n:
                raise UserError(f"{args.init} has positions for {learned} patches, --image-size makes {n}.")
            pretraining = pretraining_of(start)
            flags = {flag: start["network"][flag] for flag in ("arch", "width")}
            flags |= {"norm": pretraining["norm"], "eps": pretraining["eps"]}
            args = replace(args, **flags)
        data = Path(args.data_dir).name if args.dataset == "folder" else args.dataset
        name = f"{Path(args.init).stem}-{data}-{args.recipe}"
    run = start_run(args, name)
    run.remember_files("files of --init and --real", filter(None, (args.init, args.real)))
    if start:
        mean, std = (", ".join(f"{v:g}" for v in start["network"][k]) for k in ("mean", "std"))
        how = f"{pretraining['method']}, {pretraining['norm']} eps {eps_name(pretraining['eps'])}"
        run.say(f"{args.init}: {args.arch}, pre-trained by {how}; mean {mean}, standard deviation {std}")
    results = run.finished(table) or train_and_evaluate(run, args, start)
    run.say(table(results, args) + f"\n\nThe pictures and the checkpoints are in {run.folder}.")
    return results


def train_and_evaluate(run: Run, args: Args, start: dict | None) -> dict:
    """Pre-train (or take the checkpoint `start`), fine-tune and evaluate; returns what results.json holds."""
    # Small images are kept in their size; the augmentation enlarges them.
    stored = {"cifar10": 32, "cifar100": 32, "stl10": 96}.get(args.dataset, args.image_size)
    train_set, test_set = run.load_data(stream=True, image_size=stored)
    variants, real = open_variants(args, train_set.classes), real_labels(args, test_set)
    run.remember("images of --eval-data", " ".join(images.digest for images, _ in variants.values()))
    if args.recipe != "none":
        check_batches(len(train_set), args.batch_size)  # not only after pre-training
    elif start:
        classes = start.get("classes", train_set.classes)  # published ViTs do not name theirs
        if classes != train_set.classes or start["network"]["heads"]["class"] != len(classes):
            raise UserError(f"{args.init} was trained for other classes than those of the data.")
    if start:
        encoders = {start["stage"]: start}
    else:
        radii = {args.method: 0.0} if args.plain or args.eps == 0 else {}
        radii |= {f"a-{args.method}": args.eps} if args.eps > 0 else {}  # a for adversarial
        encoders, epochs = {}, recipe_of(args.method, args).epochs
        for name, eps in radii.items():
            pretraining = {"method": args.method, "norm": args.norm, "eps": eps, "epochs": epochs}
            encoders[name] = train(name, args.method, run, args, train_set, pretraining)
        if args.method == "mae" and world()[0] == 0:
            picture(run, args, encoders, test_set)
    if world()[0] == 0:
        save_image_grid(run.folder / "filters.png", {name: filters(s) for name, s in encoders.items()})

    classifiers = {}
    for name, state in encoders.items():
        if args.recipe == "none":
            if state["network"]["heads"].get("class") == len(train_set.classes):
                classifiers[name] = state
            continue
        for gamma in args.layer_decay if args.recipe != "sgd" else (1.0,):
            tuned = f"{name}-{gamma:g}" if args.recipe != "sgd" else f"{name}-sgd"
            classifiers[tuned] = train(
                tuned, args.recipe, run, args, train_set, pretraining_of(state), start=state, gamma=gamma
            )
    return run.finish(evaluate_all(run, args, classifiers, test_set, variants, real))


if __name__ == "__main__":
    cli(main, Args)
