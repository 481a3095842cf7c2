"""Bootstrap Your Own Robust Latents (BYORL; Gowal, Huang, van den Oord, Mann, Kohli: Self-supervised adversarial
robustness for the low-label, high-data regime, ICLR 2021).

BYOL without labels, on views that are attacked. An online network (encoder e, projector g, predictor q; weights theta)
predicts what a slowly moving copy of itself (e, g; weights xi) makes of another, clean view of the same image:

    v, v' = two random augmentations of x;   z' = g_xi(e_xi(v')), no gradient
    delta = argmin over the eps-ball of cos(q(g(e(v + delta))), z')                      (eq. 5; the attack, by AutoPGD)
    minimise 2 - 2 cos(q(g(e(v + delta))), z'), and the same with v and v' exchanged      (eq. 7, made symmetric as in section 3.3)
    xi <- tau xi + (1 - tau) theta

Then e is frozen and a linear classifier is trained on it with few or many labels: on attacked images (robust head) or
on clean ones (plain head). The paper's surprise: on BYORL's representation the plain head is nearly as robust.

    python byorl.py --quick --eps 0.5 --norm l2     # digits: BYOL and BYORL, under two minutes on two CPU cores
    python byorl.py --eps 0.5 --norm l2             # CIFAR-10, 1000 epochs, PreAct-ResNet-34 x2, heads for 1% to 100% of the labels
    python byorl.py                                 # the same at 128/255 = 0.502, as the paper writes it
    python byorl.py --norm linf --eps 8/255         # Table 3, row x2
    python byorl.py --method uat-ft                 # the baseline: unsupervised adversarial training with fixed targets
    python byorl.py --init runs/X/byorl.pt --dataset stl10 --label-fractions 0.01,0.1,1   # transfer (Table 1)
    torchrun --nproc-per-node=8 byorl.py --eps 0.5 --norm l2

The paper: CIFAR-10 alone, linf 8/255, robust head on all labels, clean / robust: x1 78.02 / 41.30, x2 80.80 / 43.24, x4
81.32 / 43.19.

Differs from the paper, whose code is not public, or is our choice where it is silent:
- eq. 6 prints ascent on the cosine; eqs. 5 and 7 and the text need descent;
- the attack sees batch statistics in BatchNorm and leaves the running ones alone; the target network uses those of its
  own batch;
- an epoch is as many images as the data set's training part has (CIFAR-10: 50,000), whatever --label-fractions, also
  with --extra-data (else 1,000 epochs would take eleven times as long);
- the attack through the target network, and through the online one for the clean view too (section 3.3), are not
  implemented: the paper gives no numbers;
- AutoPGD halves its step where its paper, not its code, says so, and starts on the ball's surface;
- the suite's MultiTargeted has 20 starts in all, the targets in turn; PGD-20 goes first;
- LARS as in BYOL's code, without weight decay on biases and BatchNorm; the MLPs' last layers have no bias, as there;
- views as in SimCLR: colour jitter 0.8, 0.8, 0.8, 0.2 times "strength 0.5" (BYOL has 0.4, 0.4, 0.2, 0.1);
- PGD's steps are 2/255 (linf), or 2 eps / steps where that is more, and in l2;
- the target network starts as a copy of the online one (in BYOL's code from weights of its own, which made no
  difference);
- features have 512 * width dimensions (basic blocks); the "2048" of the text fits x4 only; the first convolution is
  3 x 3 with stride 1; images are normalised inside the network; views are enlarged by bicubic interpolation;
- --eps 0 is BYOL, its heads trained and judged at l2 128/255 or linf 8/255;
- heads are trained with pre-training's batch size, crop and flip, robust ones with PGD-10; the best epoch is chosen on
  1,024 held-out images, by robust accuracy (robust heads) or clean accuracy (plain heads), so "100%" are the 48,976
  labels left of CIFAR-10, and "1%" 500; pre-training sees all images;
- the shares 2 and 50% of the labels, and Figure 1's attack, gallery and radius, are ours;
- UAT-FT: 200 epochs of SGD, rate 0.2, one epoch of warm-up, a cosine, PGD-10; teacher and student make the same number
  of steps.
"""
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    STATS, Epoch, Images, Network, OldRun as Run, UserError, apgd, batches, batchnorm_mode, build_model,
    ce_per_image, check_args, check_batches, old_cli as cli, count_batches, distribute, draw, eps_name,
    old_evaluate as evaluate, join, learning_rate, load_checkpoint, load_data, load_extra, load_trunk,
    load_weights, map_images, old_numbers as numbers, overruled, pgd, place_model, print_table,
    random_crop_flip, rebuild, robust_accuracy, save_image_grid, seed_step, simclr_augment, split_train,
    old_start_run as start_run, sync_batchnorm, sync_buffers, world, write_results,
)  # fmt: skip


Arch = Literal["preact18", "preact34", "resnet18", "resnet34", "resnet50", "vit_b16", "vit_s16", "vit_ti16", "vit_s4", "vit_ti4", "vit_mini4"]


@dataclass
class Args:
    # run
    stage: Literal["all", "pretrain", "probe", "evaluate"] = "all"  # all: encoders, heads, evaluation; pretrain: stop after the encoders (or UAT-FT); probe: train heads on --init and stop; evaluate: judge the heads that --init names
    init: str = ""  # the encoder to put heads on, e.g. runs/X/byorl.pt; network and pre-training flags are then the checkpoint's, --method is not used. With --stage evaluate: a head, or a folder of heads
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/<script>[-quick]-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest in runs/ with the same arguments), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in under two minutes on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    extra_data: str = ""  # FILE.npz or .npy with more images, uint8 (N, size, size, 3), without labels (paper: 500,000)
    flip: bool = True  # mirror images at random in training
    arch: Arch = "preact34"  # encoder (paper: preact34; ImageNet: resnet50)
    width: float = 2.0  # multiplies the number of channels (paper: 2 on CIFAR-10, 4 with extra data and on ImageNet)
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer. cifar: 3x3; imagenet: 7x7 with stride 2 and max-pooling, for large images
    # optimiser (LARS)
    epochs: int = 1000  # epochs of pre-training; an epoch is as many images as the training set has, also with --extra-data
    warmup_epochs: int = 10  # epochs in which the learning rate rises from 0; then half a cosine back to 0
    batch_size: int = 512  # images per step over all GPUs, also for heads and UAT-FT
    lr: float = 2.0  # highest learning rate (ImageNet: 1.2)
    weight_decay: float = 5e-4  # weight decay of LARS, not on biases and BatchNorm; of UAT-FT's SGD, on all weights
    # attack (--norm and --eps: in pre-training, in training heads, and in the evaluation)
    norm: Literal["linf", "l2"] = "l2"  # norm of the ball that the attack stays in
    eps: float = 128 / 255  # radius of that ball, in [0, 1] pixel units (paper: l2 128/255, linf 8/255); 0: BYOL, with heads and evaluation at the paper's radius
    attack: Literal["apgd", "pgd"] = "apgd"  # AutoPGD, or PGD (Table 4)
    attack_steps: int = 40  # steps in pre-training (paper: 40; Table 4: 5 to 60)
    step_size: float = 0.0  # length of a step of PGD in pre-training; 0: linf 2/255 (or more if eps is large), l2 2 eps / steps
    # method
    method: Literal["byorl", "uat-ft"] = "byorl"  # uat-ft: the baseline, adversarial training with fixed targets (a teacher's labels), a network per share of labels
    tau: float = 0.996  # tau: share of the old target network that a step keeps, at the start; rises to 1 (ImageNet: 0.999)
    hidden: int = 4096  # hidden units of projector and predictor
    projection: int = 256  # outputs of projector and predictor
    jitter_strength: float = 0.5  # strength of the colour jitter (Figure 5: 0.1 to 0.5)
    blur: float = 0.0  # probability of blur in a view (for ImageNet)
    crop: float = 0.08  # smallest share of an image's area that a view shows
    plain: bool = False  # also pre-train without attack (BYOL), for comparison
    # heads
    label_fractions: str = "0.01,0.02,0.05,0.1,0.2,0.5,1"  # shares of the training labels; heads (or a UAT-FT network) for each
    heads: Literal["both", "robust", "plain"] = "both"  # robust: trained on attacked images; plain: on clean ones
    probe_epochs: int = 50  # epochs of training a head; the learning rate is divided by 10 after half of them
    probe_lr: float = 2e-3  # learning rate of Adam for heads
    probe_steps: int = 10  # PGD steps when training a robust head, and in UAT-FT
    uat_epochs: int = 200  # UAT-FT: SGD with momentum 0.9, one epoch of warm-up, then half a cosine to 0
    uat_lr: float = 0.2  # highest learning rate of UAT-FT
    # evaluation
    val_images: int = 1024  # training images held out to choose the epoch of each head
    eval_attack: Literal["pgd20", "suite", "suite-fast", "standard"] = "suite"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it; standard: AutoAttack without FAB
    eval_steps: int = 20  # PGD steps in evaluation
    eval_examples: int = 0  # test images to evaluate on, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    # Digits at their own 8 x 8 pixels, on which an l2 ball of radius 0.5 is large (at 32 x 32 it would be small); hence mild views.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.25, epochs=20, warmup_epochs=2, batch_size=64, lr=1.0,
        attack_steps=3, tau=0.97, hidden=256, projection=64, jitter_strength=0.2, crop=0.7, plain=True, label_fractions="0.1,1", heads="both",
        probe_epochs=6, probe_lr=0.05, probe_steps=4, val_images=200, eval_attack="pgd20",
    )  # fmt: skip


# ---- the method ----------------------------------------------------------------------------------------------------


def mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """Projector and predictor: (B, n_in) -> (B, n_out)."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_out, bias=False))


class Online(nn.Module):
    """Encoder, projector and predictor; images are (B, 3, H, W) in [0, 1]."""

    def __init__(self, encoder: Network, hidden: int, n_out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.trunk.dim, hidden, n_out)
        self.predictor = mlp(n_out, hidden, n_out)

    def project(self, x: Tensor) -> Tensor:
        """g(e(x)), what the target network puts out: (B, n_out)."""
        return self.projector(self.encoder.features(x))

    def predict(self, x: Tensor) -> Tensor:
        """q(g(e(x))): (B, n_out)."""
        return self.predictor(self.project(x))

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        """Both predictions in one call, as DistributedDataParallel wants; each view has BatchNorm statistics of its own."""
        return self.predict(v1), self.predict(v2)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss per image, 2 - 2 cos (eqs. 4 and 7): (B,), in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def attack_view(online: Online, v: Tensor, z_other: Tensor, args: Args) -> Tensor:
    """eq. 5: the view v + delta whose prediction is farthest from z', the target network's projection of the other view."""
    generator = torch.Generator(v.device).manual_seed(torch.randint(2**31, ()).item())  # else it starts from the same point each time

    def loss(u: Tensor) -> Tensor:
        return distance(online.predict(u), z_other)

    with batchnorm_mode(online, "train"):  # the batch's statistics, as in the update; the running ones stay as they are
        if args.attack == "pgd":
            return pgd(loss, v, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)
        return apgd(loss, v, norm=args.norm, eps=args.eps, steps=args.attack_steps, generator=generator)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as in BYOL's code: weight decay inside the trust ratio; the rate multiplies
    the momentum buffer and is not accumulated in it. Biases and BatchNorm (vectors) get neither decay nor trust ratio: plain SGD with momentum."""

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


def target_rate(start: float, step: int, steps: int) -> float:
    """tau: 1 - (1 - tau_0) (1 + cos(pi k / K)) / 2, from `start` to 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / steps)) / 2


# Added to an epoch's number, so that no two kinds of training draw the same random numbers.
FIRST_ID = {"byol": 0, "byorl": 100_000, "classifier": 300_000, "teacher": 400_000}


# ---- pre-training --------------------------------------------------------------------------------------------------


def pretrain(name: str, run: Run, args: Args, images: Images, epoch_size: int) -> dict:
    """Train one encoder ('byol': without attack, 'byorl') and return its checkpoint. An epoch is `epoch_size` images."""
    if (done := run.load(f"{name}.pt")) is not None:
        return done  # before the run was resumed
    torch.manual_seed(args.seed)
    mean, std = STATS[args.dataset]
    encoder = build_model(args.arch, {}, width=args.width, stem=args.stem, mean=mean, std=std)
    place_model(encoder, run.device, args.amp, args.compile)
    online = Online(encoder, args.hidden, args.projection).to(run.device)
    target = copy.deepcopy(online).requires_grad_(False)  # its predictor is not used, but keeps the parameters in step
    opt = LARS(online.parameters(), args.lr, args.weight_decay)
    state = run.resume(name, online, opt)
    if "target" in state:
        load_weights(target, state["target"], run.folder / "last.pt")
    history, began = state["history"], time.perf_counter() - state["seconds"]
    if args.sync_bn:
        sync_batchnorm(target)  # it too normalises by the batch of all GPUs
    ddp = distribute(online, args.sync_bn)
    steps = count_batches(epoch_size, args.batch_size)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": encoder.spec, "model": online.state_dict(), "target": target.state_dict(), "optimizer": opt.state_dict(),
            "args": vars(args), "name": name, "epoch": epoch, "step": step, "sums": sums or {}, "history": history,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], args.epochs):
        epoch_id = FIRST_ID[name] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        subset = draw(images, epoch_size, args.seed * 1_000_003 + epoch_id)  # in random order; all, if there is no --extra-data
        stream = batches(subset, args.batch_size, run.device, skip=skip, workers=args.workers)
        online.train(), target.train()
        with Epoch(epoch, epoch_size, steps, run.device, skip, sums) as log:
            for x, _ in stream:  # (B, 3, S, S); the labels are not used
                seed_step(args.seed, epoch_id, log.step)
                step = epoch * steps + log.step
                v1, v2 = (simclr_augment(x, args.jitter_strength, args.blur, args.crop, args.flip) for _ in range(2))
                with torch.no_grad():  # z' of the clean views, (B, n_out)
                    z1, z2 = target.project(v1), target.project(v2)
                if name == "byorl":
                    v1, v2 = attack_view(online, v1, z2, args), attack_view(online, v2, z1, args)
                p1, p2 = ddp(v1, v2)
                loss = (distance(p1, z2) + distance(p2, z1)).mean()  # eq. 7, both directions
                for group in opt.param_groups:
                    group["lr"] = learning_rate(args.lr, step, args.warmup_epochs * steps, args.epochs * steps)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                tau = target_rate(args.tau, step, args.epochs * steps)
                with torch.no_grad():
                    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                        xi.lerp_(theta, 1 - tau)  # xi <- tau xi + (1 - tau) theta
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


# ---- with labels: linear heads on a frozen encoder, and UAT-FT -------------------------------------------------------

PAPER_EPS = {"l2": 128 / 255, "linf": 8 / 255}


def head_eps(args: Args) -> float:
    """Radius at which heads are trained and judged: --eps, or the paper's for the norm if that is 0 (BYOL)."""
    return args.eps or PAPER_EPS[args.norm]


def train_classifier(
    name: str, run: Run, args: Args, *, encoder: dict | None, images: Images, epoch_size: int, val_set: Images, robust: bool, about: dict
) -> dict:
    """Train a classifier and return its checkpoint, that of the best epoch on `val_set` (early stopping, appendix A).

    encoder: a checkpoint; a linear head is trained on it and it stays as it is. None: the whole network is trained (UAT-FT).
    robust: adversarially (Madry et al. 2018). An epoch is `epoch_size` of the images. about: what else the checkpoint tells.
    """
    file = f"{name.replace(' ', '-')}.pt"
    if (done := run.load(file)) is not None:
        return done  # before the run was resumed
    frozen = encoder is not None
    torch.manual_seed(args.seed)
    heads = {"class": len(val_set.classes)}
    if frozen:  # a head on another data set keeps the normalisation that its encoder was trained with
        model = build_model(**encoder["network"] | {"heads": heads})
        load_trunk(model.trunk, encoder, name)
        model.trunk.requires_grad_(False)
        opt, epochs = torch.optim.Adam(model.heads.parameters(), args.probe_lr), args.probe_epochs
    else:
        mean, std = STATS[args.dataset]
        model = build_model(args.arch, heads, width=args.width, stem=args.stem, mean=mean, std=std)
        opt = torch.optim.SGD(model.parameters(), args.uat_lr, momentum=0.9, weight_decay=args.weight_decay)
        epochs = args.uat_epochs
    place_model(model, run.device, args.amp, args.compile)
    trained = model.heads if frozen else model  # what last.pt holds
    state = run.resume(name, trained, opt)
    best = state.get("best", {"accuracy": -1.0, "model": {}, "epoch": 0})
    history, began = state["history"], time.perf_counter() - state["seconds"]
    ddp = distribute(model, args.sync_bn and not frozen)
    eps = head_eps(args)
    attack = partial(pgd, norm=args.norm, eps=eps, steps=args.probe_steps)
    steps = count_batches(epoch_size, args.batch_size)

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        with batchnorm_mode(model, "eval"):
            return attack(lambda z: ce_per_image(model(z), y), x)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": model.spec, "model": trained.state_dict(), "optimizer": opt.state_dict(), "args": vars(args), "name": name,
            "epoch": epoch, "step": step, "sums": sums or {}, "history": history, "best": best, "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        epoch_id = FIRST_ID["classifier" if frozen or robust else "teacher"] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        subset = draw(images, epoch_size, args.seed * 1_000_003 + epoch_id)
        stream = batches(subset, args.batch_size, run.device, skip=skip, workers=args.workers)
        model.train(not frozen)  # a frozen encoder normalises by its running statistics
        with Epoch(epoch, epoch_size, steps, run.device, skip, sums) as log:
            for x, y in stream:  # (B, 3, S, S), (B,)
                sync_buffers(model)
                seed_step(args.seed, epoch_id, log.step)
                step = epoch * steps + log.step
                for group in opt.param_groups:
                    if frozen:
                        group["lr"] = args.probe_lr * (0.1 if epoch >= epochs / 2 else 1.0)
                    else:
                        group["lr"] = learning_rate(args.uat_lr, step, steps, epochs * steps)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                x_adv = perturb(x, y) if robust else x
                loss = F.cross_entropy(ddp(x_adv), y)
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
        seed_step(args.seed, epoch_id, log.step)
        held_out = batches(val_set, args.batch_size, run.device, workers=args.workers)
        accuracy = robust_accuracy(model, held_out, perturb if robust else None)
        if accuracy > best["accuracy"]:
            best = {"accuracy": accuracy, "epoch": epoch + 1, "model": {k: v.clone() for k, v in trained.state_dict().items()}}
        if not frozen:  # heads are many and short: no line per epoch
            run.log(
                history, name, epoch + 1, epochs, lr=opt.param_groups[0]["lr"], **log.means(),
                **{"val_robust" if robust else "val_clean": accuracy}, seconds=round(time.perf_counter() - began, 1),
            )  # fmt: skip
        save(epoch + 1)
    trained.load_state_dict(best["model"])
    run.save(file, {
        "network": model.spec, "model": model.state_dict(), "args": vars(args) | {"eps": eps}, "name": name, "epoch": best["epoch"],
        "stage": "train" if robust else "plain", **about,
    })  # fmt: skip
    return run.load(file)


def train_heads(run: Run, args: Args, encoders: dict[str, dict], train_set: Images, fractions: list[float]) -> list[dict]:
    """Linear heads on every encoder for every share of the labels; returns their checkpoints."""
    checkpoints = []
    for encoder_name, encoder in encoders.items():
        for fraction in fractions:  # nested: a larger share holds the smaller ones, drawn uniformly, not per class
            labelled, val_set = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
            for head in ("robust", "plain") if args.heads == "both" else (args.heads,):
                about = {
                    "encoder": encoder_name, "head": head, "label_fraction": fraction, "encoder_args": encoder.get("args", {}),
                    "encoder_fraction": encoder.get("label_fraction", 1.0), "extra_images": encoder.get("extra_images", 0),
                }  # fmt: skip
                checkpoints.append(train_classifier(
                    f"{encoder_name} {head} {100 * fraction:g}%", run, args, encoder=encoder, images=labelled, epoch_size=len(labelled),
                    val_set=val_set, robust=head == "robust", about=about,
                ))  # fmt: skip
    return checkpoints


def uat_ft(run: Run, args: Args, images: Images, train_set: Images, fractions: list[float]) -> list[dict]:
    """UAT-FT (Uesato et al. 2019; section 4.1, Baseline): for every share of the labels, a plain network learns from the labelled
    images and labels the others; then a network of the same kind is trained adversarially on all. Returns the checkpoints.

    images: those of `train_set`, then the --extra-data. With all labels and no extra data it is adversarial training.
    """
    checkpoints = []
    for fraction in fractions:
        name = f"uat-ft {100 * fraction:g}%"
        labelled, val_set = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
        unlabelled = torch.ones(len(images), dtype=torch.bool)  # train_set comes first in images: its rows are the same there
        unlabelled[labelled.index] = unlabelled[val_set.index] = False
        labelled, unlabelled = replace(images, index=labelled.index), images.subset(unlabelled.nonzero().squeeze(1))
        same = dict(encoder=None, epoch_size=len(train_set), val_set=val_set)
        both = labelled
        if len(unlabelled) and run.load(f"{name.replace(' ', '-')}.pt") is None:  # a finished student needs no teacher any more
            teacher = train_classifier(f"{name} teacher", run, args, images=labelled, robust=False, about={}, **same)
            both = pseudo_label(run, args, teacher, labelled, unlabelled)
        about = {
            "encoder": "uat-ft", "head": "", "label_fraction": fraction, "encoder_args": vars(args), "encoder_fraction": fraction,
            "extra_images": len(images) - len(train_set),
        }  # fmt: skip
        checkpoints.append(train_classifier(name, run, args, images=both, robust=True, about=about, **same))
    return checkpoints


def pseudo_label(run: Run, args: Args, teacher: dict, labelled: Images, unlabelled: Images) -> Images:
    """The images of both, which are subsets of one set; the unlabelled ones get the teacher's most likely class as their label."""
    model = place_model(rebuild(teacher, teacher["name"]), run.device, "off").eval()
    labels = unlabelled.labels.clone()
    labels[unlabelled.index] = map_images(lambda x: model(x).argmax(1), unlabelled, run, args.batch_size).cpu()
    return replace(unlabelled, labels=labels, index=torch.cat([labelled.index, unlabelled.index]))


# ---- evaluation ----------------------------------------------------------------------------------------------------


def retrieve(run: Run, args: Args, encoders: dict[str, dict], test_set: Images, queries: int = 50, nearest: int = 8) -> None:
    """Figure 1: the test images whose representations have the largest cosines with that of a query, clean and attacked.

    The attack (AutoPGD-40 in the run's ball) moves the query's representation towards that of an image of another class.
    Writes retrieval.png for one query and prints, for `queries` of them, the share of neighbours that are of the query's class.
    """
    test_set = draw(test_set, len(test_set), seed=0)  # folders are sorted by class
    labels = test_set.labels[test_set.index]
    n = min(queries, len(test_set))
    y = labels[:n]
    if (y == y[0]).all():
        return  # no image of another class to steer towards
    others = (y[:, None] != y[None]).float().argmax(1)  # for each query the first of another class
    shown = int((y == y.min()).float().argmax())  # of the first class: CIFAR-10's is the airplane, as in the paper
    x = map_images(lambda x: x, test_set.subset(torch.arange(n)), run, args.batch_size)
    pictures = {}
    for name, state in encoders.items():
        model = place_model(rebuild(state, name), run.device, args.amp).eval()
        gallery = F.normalize(map_images(model.features, test_set, run, args.batch_size))  # (N, dim)
        x_adv = apgd(
            lambda z: F.cosine_similarity(model.features(z), gallery[others]), x, eps=head_eps(args), norm=args.norm,
            generator=torch.Generator(x.device).manual_seed(args.seed), steps=40,
        )  # fmt: skip
        for how, query in ("clean", x), ("attacked", x_adv):
            with torch.no_grad():
                cosines = F.normalize(model.features(query)) @ gallery.T  # (n, N)
            steered = cosines.cpu()[range(n), others].mean()
            cosines[range(n), range(n)] = -1  # not the query itself
            found = cosines.topk(min(nearest, len(test_set) - 1)).indices.cpu()
            neighbours = map_images(lambda x: x, test_set.subset(found[shown]), run, args.batch_size)
            pictures[f"{name}, {how}"] = torch.cat([query[shown : shown + 1], neighbours])
            share = 100 * (labels[found] == y[:, None]).float().mean()
            run.say(
                f"{name}, queries {how}: {share:.0f}% of the {found.shape[1]} nearest images are of the query's class, "
                f"cosine with the image of another class {steered:.2f}"
            )
    if world()[0] == 0:
        save_image_grid(run.folder / "retrieval.png", pictures)


def judge(run: Run, args: Args, classifiers: list[dict], test_set: Images) -> list[dict]:
    """Two rows of results.json per classifier: clean accuracy, and accuracy under --eval-attack."""
    rows = run.rows("judged.json")  # written one by one, so that a resumed run judges none twice
    for state in classifiers:
        name, eps = state["name"], head_eps(args)
        if any(row["name"] == name for row in rows):
            continue
        about = {k: state[k] for k in ("label_fraction", "head", "encoder", "encoder_fraction", "extra_images")}
        about["pretrained"] = {k: state["encoder_args"].get(k) for k in ("dataset", "norm", "eps", "batch_size", "weight_decay", "seed")}
        judged = evaluate(run, name, state, test_set, [0, eps], look_at=0.0 if state["head"] == "plain" else eps)
        rows += [row | {"paper": number} | about for row, number in zip(judged, paper_numbers(state, args), strict=True)]
        run.keep("judged.json", rows)
        run.say(f"{name}: clean {rows[-2]['accuracy']}, robust {rows[-1]['accuracy']}")
    return rows


# The paper's numbers. Tables 1, 2 and 6 are of x4 and extra images, as they and the text show, though the captions say CIFAR-10.
# norm, width, extra images, attack, judged on, encoder, head, share of its labels: clean, robust
PAPER = """
l2   2 0      apgd-40 cifar10  byorl  robust 0.01      - 65.43   section 4.2
l2   4 500000 apgd-40 cifar10  byorl  robust 0.01      - 75.50
l2   4 500000 apgd-40 cifar10  byorl  robust 1     93.01 77.61   Table 2
l2   4 500000 apgd-40 cifar10  byorl  plain  1     93.19 77.09
l2   4 500000 -       cifar10  byol   robust 1     91.23  0.05
l2   4 500000 -       cifar10  byol   plain  1     94.76  0.00
l2   4 500000 apgd-40 stl10    byorl  robust 1     76.49 57.88
l2   4 500000 apgd-40 stl10    byorl  plain  1     77.54 57.66
l2   4 500000 apgd-40 cifar100 byorl  robust 1     48.34 28.24
l2   4 500000 apgd-40 cifar100 byorl  plain  1     49.20 27.17
linf 4 500000 apgd-40 cifar10  byorl  robust 1     84.96 52.75   Table 6
linf 4 500000 apgd-40 cifar10  byorl  plain  1     86.57 50.94
linf 4 500000 apgd-40 stl10    byorl  robust 1     65.40 37.79   37.28 in Table 1, which has 37.79 for UAT-FT: exchanged?
linf 4 500000 apgd-40 stl10    byorl  plain  1     65.75 36.51
linf 4 500000 apgd-40 cifar100 byorl  robust 1     37.80 14.82
linf 4 500000 apgd-40 cifar100 byorl  plain  1     39.51 12.21
l2   4 500000 apgd-40 stl10    byorl  robust 0.01      - 33.85   Table 1, where all labels are those of Tables 2 and 6
l2   4 500000 apgd-40 stl10    byorl  robust 0.1       - 53.23
l2   4 500000 apgd-40 cifar100 byorl  robust 0.01      - 10.09
l2   4 500000 apgd-40 cifar100 byorl  robust 0.1       - 22.51
linf 4 500000 apgd-40 stl10    byorl  robust 0.01      - 24.18
linf 4 500000 apgd-40 stl10    byorl  robust 0.1       - 36.30
linf 4 500000 apgd-40 cifar100 byorl  robust 0.01      -  5.28
linf 4 500000 apgd-40 cifar100 byorl  robust 0.1       - 10.12
l2   4 500000 -       stl10    uat-ft robust 0.01      - 37.71
l2   4 500000 -       stl10    uat-ft robust 0.1       - 42.16
l2   4 500000 -       stl10    uat-ft robust 1         - 53.23
l2   4 500000 -       cifar100 uat-ft robust 0.01      -  3.68
l2   4 500000 -       cifar100 uat-ft robust 0.1       - 10.80
l2   4 500000 -       cifar100 uat-ft robust 1         - 14.43
linf 4 500000 -       stl10    uat-ft robust 0.01      - 23.47
linf 4 500000 -       stl10    uat-ft robust 0.1       - 36.52
linf 4 500000 -       stl10    uat-ft robust 1         - 37.79
linf 4 500000 -       cifar100 uat-ft robust 0.01      -  2.18
linf 4 500000 -       cifar100 uat-ft robust 0.1       -  4.88
linf 4 500000 -       cifar100 uat-ft robust 1         -  7.21
linf 1 0      apgd-40 cifar10  byorl  robust 1     78.02 41.30   Table 3
linf 2 0      apgd-40 cifar10  byorl  robust 1     80.80 43.24   (80.47 43.64 in Table 4)
linf 4 0      apgd-40 cifar10  byorl  robust 1     81.32 43.19
linf 2 0      pgd-5   cifar10  byorl  robust 1     85.26  1.05   Table 4
linf 2 0      pgd-10  cifar10  byorl  robust 1     81.44 37.88
linf 2 0      pgd-20  cifar10  byorl  robust 1     80.29 42.58
linf 2 0      pgd-40  cifar10  byorl  robust 1     79.60 43.41
linf 2 0      apgd-10 cifar10  byorl  robust 1     80.49 40.59
linf 2 0      apgd-20 cifar10  byorl  robust 1     80.53 43.27
linf 2 0      apgd-60 cifar10  byorl  robust 1     80.69 43.64
"""
# Flags of pre-training alone, which are those of --init's checkpoint where there is one.
PRETRAINING = (
    "epochs", "warmup_epochs", "lr", "attack", "attack_steps", "step_size", "tau", "hidden", "projection",
    "jitter_strength", "blur", "crop",
)  # fmt: skip


def paper_numbers(state: dict, args: Args) -> tuple[float | None, float | None]:
    """The paper's (clean, robust) accuracy for this classifier, judged with `args`; (None, None) if the setting is another."""
    usual, its_args = vars(Args()), state["encoder_args"]
    training = {"dataset", "image_size", "flip", "arch", "stem", "batch_size", "weight_decay"}
    training |= {"uat_epochs", "uat_lr", "probe_steps"} if state["encoder"] == "uat-ft" else {*PRETRAINING} - {"attack", "attack_steps"}
    heads = {"image_size", "flip", "batch_size", "val_images", "probe_epochs", "probe_lr", "probe_steps"}
    judging = ("eval_attack", "eval_examples", "eval_amp")
    radius = PAPER_EPS[args.norm]
    radii = its_args.get("eps") or radius, state["args"]["eps"], head_eps(args)
    same_training = all(its_args.get(k) == usual[k] for k in training) and (state["encoder"] != "uat-ft" or state["encoder_fraction"] == 1)
    same_judging = all(state["args"].get(k) == usual[k] for k in heads) and all(getattr(args, k) == usual[k] for k in judging)
    same_ball = its_args.get("norm") == args.norm and all(abs(eps / radius - 1) < 0.01 for eps in radii)  # 0.5 is how one writes 128/255
    if same_training and same_judging and same_ball:
        attack = f"{its_args['attack']}-{its_args['attack_steps']}" if state["encoder"] == "byorl" else "-"
        key = (args.norm, its_args["width"], state["extra_images"], attack, args.dataset, state["encoder"], state["head"], state["label_fraction"])
        for line in PAPER.strip().splitlines():
            norm, width, extra, *names, share, clean, robust = line.split()[:10]
            if (norm, float(width), int(extra), *names, float(share)) == key:
                return None if clean == "-" else float(clean), float(robust)
    return None, None


def show(results: dict, folder: Path) -> None:
    """Print a line per classifier: clean and robust accuracy, and the paper's where the setting is its own."""
    args, rows = results["args"], results["rows"]
    eps = max(row["eps"] for row in rows)
    attack = next(row["attack"] for row in rows if row["eps"] == eps)
    print(
        f"\n{args['dataset']}, {args['arch']} x{args['width']:g}; accuracy (%) on {rows[0]['examples']:,} test images, clean "
        f"and under {attack.upper()} ({args['norm']} eps {eps_name(eps)}). {results['seconds']:.0f} s in all.\n"
    )
    table, radius = [], eps_name(PAPER_EPS[args["norm"]])
    paper = "  the paper" + (f" (eps {radius})" if eps_name(eps) != radius else "")
    for name in dict.fromkeys(row["name"] for row in rows):
        clean, robust = [row for row in rows if row["name"] == name]
        table.append([name, f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}"])
        if robust["paper"] is not None:
            table.append([paper, "" if clean["paper"] is None else f"{clean['paper']:.2f}", f"{robust['paper']:.2f}"])
    print_table(["encoder, head, share of labels", "clean", "robust"], table)
    print(f"\nresults.json and the checkpoints are in {folder}", flush=True)


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Pre-train, train the heads, evaluate them, print the table; returns what results.json holds ({} if --stage is not that far)."""
    check(args)
    given = read_init(args)
    if given:  # network and pre-training are those of the checkpoint, for the record
        network = given[0]["network"]
        its_args = given[0].get("encoder_args") or given[0].get("args", {})
        its = {k: network[k] for k in ("arch", "width", "stem")} | {k: its_args[k] for k in PRETRAINING if k in its_args}
        unused, args = overruled(args, its), replace(args, **its)
    run = start_run(args)
    if given and unused:
        run.say(f"note: {', '.join(unused)}: not used, since --init was made otherwise.")
    results = run.finished() or train_and_evaluate(run, args, given)
    if results and world()[0] == 0:
        show(results, run.folder)
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    fractions = numbers(args.label_fractions, "label-fractions", "0.01,0.1,1")
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise UserError(f"--label-fractions {args.label_fractions}: give shares such as 0.01,0.1,1.")
    if args.crop < 0.001:
        raise UserError(f"--crop {args.crop:g} must be between 0.001 and 1.")
    if args.stage in ("probe", "evaluate") and not args.init:
        raise UserError(f"--stage {args.stage} needs --init (probe: an encoder such as runs/X/byorl.pt; evaluate: a head or a folder of heads).")
    if args.stage == "pretrain" and args.init:
        raise UserError("--stage pretrain takes no --init; to put heads on an encoder use --stage probe.")


def read_init(args: Args) -> list[dict]:
    """The checkpoints that --init names: one encoder, or with --stage evaluate a classifier or all in a folder."""
    if not args.init:
        return []
    path, evaluating = Path(args.init), args.stage == "evaluate"
    # Not the teachers, uat-ft-1%-teacher.pt.
    files = sorted(path.glob("*%.pt")) if evaluating and path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no heads (files such as byorl-plain-1%.pt).")
    given = [load_checkpoint(file) for file in files]
    for file, state in zip(files, given, strict=True):
        if evaluating and not {"label_fraction", "head", "encoder", "encoder_args", "name"} <= state.keys():
            raise UserError(f"{file} is no head of byorl.py; to train some on an encoder, use --stage probe --init {file}.")
        if (arch := state["network"].get("arch")) not in get_args(Arch):
            raise UserError(f"{file} is a network '{arch}', which byorl.py does not take; it takes {', '.join(get_args(Arch))}.")
        if not any(k.startswith("trunk.") for k in state["model"]):
            raise UserError(f"{file} holds no encoder; take a file such as byorl.pt or best.pt.")
    return given


def train_and_evaluate(run: Run, args: Args, given: list[dict]) -> dict:
    """All stages that --stage asks for."""
    fractions = numbers(args.label_fractions, "label-fractions")
    train_set, test_set = load_data(
        args.dataset, args.data_dir, run.device, image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers
    )
    images = join(train_set, load_extra(args.extra_data, args.image_size, run.device)) if args.extra_data else train_set
    if args.eval_examples:
        test_set = draw(test_set, min(args.eval_examples, len(test_set)), seed=0)
    check_batches(len(train_set), args.batch_size)
    check_labels(run, args, train_set, fractions)
    for state in given:
        check_given(run, args, state, test_set)
    run.begin()
    if args.stage == "evaluate":
        classifiers = given
    elif args.method == "uat-ft" and not given:
        classifiers = uat_ft(run, args, images, train_set, fractions)
    else:
        if given:
            encoders = {given[0].get("name", "init").split()[0]: given[0]}  # "uat-ft 100%" -> "uat-ft"
        else:
            names = (["byol"] if args.plain or args.eps == 0 else []) + (["byorl"] if args.eps > 0 else [])
            encoders = {name: pretrain(name, run, args, images, len(train_set)) for name in names}
        retrieve(run, args, encoders, test_set)
        classifiers = train_heads(run, args, encoders, train_set, fractions) if args.stage != "pretrain" else []
    if args.stage in ("pretrain", "probe"):
        stage, what = "evaluate", run.folder
        if args.stage == "pretrain" and args.method == "byorl":
            stage, what = "probe", run.folder / f"{list(encoders)[-1]}.pt"
        run.say(f"The checkpoints are in {run.folder}; go on with: {run.next_command(stage=stage, init=what)}")
        return {}
    began = time.perf_counter()
    rows = judge(run, args, classifiers, test_set)
    return write_results(run, rows, began)


def check_labels(run: Run, args: Args, train_set: Images, fractions: list[float]) -> None:
    """Tell which shares of the labels lack a class. Raises UserError if a share is nothing."""
    for fraction in fractions:
        labelled, _ = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
        absent = set(range(len(train_set.classes))) - set(train_set.labels[labelled.index].tolist())
        if absent:
            run.say(
                f"note: among {100 * fraction:g}% of the labels is no '{train_set.classes[min(absent)]}' ({len(absent)} of "
                f"{len(train_set.classes)} classes are missing); the paper does not balance classes either."
            )


def check_given(run: Run, args: Args, state: dict, test_set: Images) -> None:
    """Tell where --init was trained otherwise than it is used. Raises UserError if its classes are others."""
    its_args = state.get("args", {})
    differs = [k for k in ("norm", "eps", "dataset", "image_size") if its_args.get(k) != getattr(args, k)]
    if differs:
        run.say(f"note: --init was trained with another --{', --'.join(differs)}: {[its_args.get(k) for k in differs]}.")
    classes = state["network"]["heads"].get("class", 0)
    if args.stage == "evaluate" and classes != len(test_set.classes):
        raise UserError(f"{state['name']} knows {classes} classes, {args.dataset} has {len(test_set.classes)}.")


if __name__ == "__main__":
    cli(main, Args)
