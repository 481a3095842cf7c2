"""Adversarial training with rotation prediction (Kucer, Oyen, Kenyon: On visual self-supervision and its effect on model
robustness, 2021, arXiv:2112.04367).

One trunk carries two linear heads: F for the class y, F_SS for the self-supervised (SS) label y_SS. A transformed copy
(X_SS, y_SS) = T(X) of each batch, here every image rotated by 0, 90, 180 or 270 degrees, trains the second:

    minimise  CE(F(X_adv), y) + lambda1 * CE(F_SS(X_SS), y_SS)                                        (eq. 8, 9)

    --variant  X_SS in the loss   the attack (Algorithm 1) maximises
    T0         none (baseline)    CE(F(X), y)
    T1         clean              CE(F(X), y)
    T2         adversarial        CE(F(X), y) + CE(F(X_SS), y)
    T3         adversarial        CE(F(X), y) + lambda2 * CE(F_SS(X_SS), y_SS)
    replace    adversarial        CE(F(X_SS), y): X is dropped, F too is trained on X_SS              (eq. 7)

X and X_SS are perturbed separately; --ss-attack has two other readings of T2 and T3.

`--pretrain l2|linf` first trains the trunk on (X_SS, y_SS) alone, adversarially (P1, P2; section 3.3).

    python rotation_at.py --quick                               # digits, a minute on two CPU cores
    python rotation_at.py --variant T3                          # a row of Table 2: CIFAR-10, linf 8/255, 100 epochs
    python rotation_at.py --variant T3 --norm l2 --eps 0.5      # a row of Table 1
    python rotation_at.py --variant T0 --pretrain l2            # a row of Table 4 (P1 T0)
    torchrun --nproc-per-node=4 rotation_at.py --variant T3     # the same run on four GPUs

The paper: ResNet-18, clean / PGD-20 at 8/255: T0 85.46 / 44.69, T1 86.59 / 44.51, T2 86.24 / 45.77, T3 84.61 / 48.11.

Differs from the paper, which released no code, or is our choice where it is silent:
- the l2 step is 2 eps / steps: section 4.2 prints eps^2 / steps, but Salman et al. (2020), whom it cites, use 2 eps /
  steps, and steps that add up to eps^2 cannot cross a ball of radius below 1;
- Algorithm 1 prints the update after its loop and one uniform start for both norms; the update belongs inside, and an
  l2 start is a direction of length eps, as in MadryLab's `robustness`, the library on which the paper builds;
- lambda1 and lambda2 are not given: 0.5 (Hendrycks et al. 2019). How X and X_SS share the attack is not given:
  --ss-attack. T2 attacks X_SS through the class head with the label y: with perturbations of their own, the only
  reading that changes X_SS. The attack sums losses over images where eq. 10 averages: the steps are the same;
- eq. 7 (replace): the attack is not given; ours is on the class loss;
- the library's defaults where the paper is silent: batch size 128, weight decay 5e-4, BatchNorm in eval mode under
  attack (--attack-bn). Not taken over: its colour jitter and rotation by 2 degrees (ours: crop and flip), and its
  choice of the best iterate (Algorithm 1 returns the last);
- X and X_SS share one forward pass in the update, so BatchNorm sees both, and the images of all GPUs (--no-sync-bn:
  each GPU's own, as the library's DataParallel);
- section 3.2 tried the SS loss alone in the attack ("much worse"): --ss-attack shared --lambda2 1e6 --amp off
  comes to the same;
- the reported attack has one random start;
- pre-training (the paper does not say): the same task, radius 0.5 (l2) or 8/255 (linf), the schedule of training, last
  epoch; only the trunk is kept;
- training (not the reported evaluation) runs in bfloat16 on hardware that has it. Rounding is then a visible part of an
  l2 perturbation of 0.1 (Figure 1): use --amp off there.
"""
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    STATS, Epoch, Images, Run, UserError, batches, batchnorm_mode, build_model, build_trunk, ce_per_image, check_args, cli,
    count_batches, distribute, evaluate, load_checkpoint, load_splits, load_trunk, numbers, pgd_attack, place_model,
    print_results, random_crop_flip, robust_accuracy, seed_step, start_run, sync_buffers, world, write_results,
    rotate,
)  # fmt: skip


@dataclass
class Args:
    # run
    init: str = ""  # take the trunk from this checkpoint, e.g. another run's pretrain.pt
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/<script>-<variant>[-quick]-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest in runs/ with the same arguments), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in about a minute on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    label_fraction: float = 1.0  # share of the training images that is used, in pre-training too, at most those not held out for validation
    flip: bool = True  # mirror images at random in training
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet26v2", "resnet50v2"] = "resnet18"  # trunk (paper: resnet18, resnet34; Chen et al. 2020: resnet50v2)
    width: float = 1.0  # multiplies the number of channels
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer. cifar: 3x3; imagenet: 7x7 with stride 2 and max-pooling, for large images
    # optimiser (section 4.2; batch size and weight decay: MadryLab's robustness)
    epochs: int = 100  # epochs of training
    batch_size: int = 128  # images per step over all GPUs, not counting X_SS
    lr: float = 0.1  # initial learning rate of SGD with momentum 0.9
    lr_step: int = 0  # epochs between divisions of the rate by 10; 0: 40% of the epochs (paper: 40 of 100)
    weight_decay: float = 5e-4  # weight decay, on all weights
    # attack in training (section 4.2)
    norm: Literal["linf", "l2"] = "linf"  # norm of the ball that the attack stays in
    eps: float = 8 / 255  # radius of that ball, in [0, 1] pixel units (paper: linf 8/255; l2 0.5, and 0.1 and 1.0 in figures)
    attack_steps: int = 10  # PGD steps in training (paper: 10)
    step_size: float = 0.0  # length of a step in training (not in pre-training); 0: linf 2/255 (or more if eps is large), l2 2 eps / steps
    attack_bn: Literal["eval", "train"] = "eval"  # BatchNorm mode under attack in training (eval: as in MadryLab's robustness)
    # method (section 3)
    variant: Literal["T0", "T1", "T2", "T3", "replace"] = "T3"  # which images are attacked by which loss, see above
    ss_attack: Literal["separate", "shared", "both"] = "separate"  # T2, T3: X_SS gets a perturbation of its own (separate), that of X before T (shared), or its own against both losses (both)
    lambda1: float = 0.5  # lambda1: weight of the SS loss in training (the paper gives no value)
    lambda2: float = 0.5  # lambda2: weight of the SS loss in the attack of T3 (the paper gives no value); with --ss-attack separate all values above 0 are the same; 0 is T2
    pretrain: Literal["none", "l2", "linf"] = "none"  # adversarial SS pre-training first: none P0, l2 P1, linf P2
    pretrain_eps: float = 0.0  # radius of the pre-training attack; 0: l2 0.5, linf 8/255
    pretrain_epochs: int = 100  # epochs of pre-training
    plain: bool = False  # also train a network without attack, for comparison
    # evaluation
    val_fraction: float = 0.15  # share of the training images held out to select the model (paper: 15%)
    select: Literal["clean", "robust", "last"] = "clean"  # epoch to report: that of best clean or of best robust validation accuracy, or the last
    eval_attack: Literal["pgd20", "suite", "suite-fast"] = "pgd20"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it
    eval_steps: int = 20  # PGD steps in evaluation (paper: 20)
    eval_eps: str = ""  # comma-separated radii; empty: those of the paper's tables (--quick: quarters of --eps)
    eval_examples: int = 0  # test images to evaluate on, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    # Digits are few and coarse: a wider ball, a smaller rate, and a stem that takes the enlarged images back to 8x8 pixels, their own size.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", flip=False, width=0.25, stem="imagenet", epochs=12, batch_size=64, lr=0.02, eps=0.1, attack_steps=5,
        plain=True, pretrain_epochs=4,
    )  # fmt: skip


TASK = "rotation"  # the name of F_SS among the network's heads


# ---- the method: Algorithm 1 and eq. 7-9 -------------------------------------------------------------------------


def adversaries(
    model: nn.Module, x: Tensor, y: Tensor, T: Callable, k: Tensor, args: Args, attack: Callable
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: (X_adv, X_SS_adv) for `args.variant`, each (B, 3, S, S); k (B,) are the SS labels of X_SS = T(x, k).

    The paper's F(x) is model(x, "class"), its F_SS(x) is model(x, TASK). `attack(loss, x)` maximises a loss per image.
    Alg. 1 leaves open how X and X_SS share the attack (--ss-attack):
    - separate: two perturbations, one summed loss, as printed. CE(F(X), y) does not depend on X_SS nor the SS loss on X,
      and a step's length does not depend on the gradient's, so (BatchNorm in eval mode) X_adv is T0's, and every
      lambda2 > 0 gives the same attack. T2, and lambda2 = 0, attack X_SS through the class head with the label y.
    - shared: one perturbation, X_SS^k = T(X^k) at every step; lambda2 matters.
    - both: two perturbations, that of X_SS maximises both losses; lambda2 matters. For T2 the same as separate.
    """

    def class_loss(z: Tensor) -> Tensor:
        return ce_per_image(model(z, "class"), y)  # Alg. 1, line 6

    x_ss = T(x, k)  # eq. 1
    if args.variant in ("T0", "T1") or not uses_ss(args):
        return attack(class_loss, x), x_ss
    if args.variant == "replace":  # eq. 7 has only X_SS
        return x, attack(class_loss, x_ss)

    b = len(x)
    lambda2 = args.lambda2 if args.variant == "T3" else 0.0  # T2 skips line 8

    def shared_loss(z: Tensor) -> Tensor:  # z = X^k, (B, C, S, S)
        logits, ss_logits = model(torch.cat([z, T(z, k)]), "class", TASK)
        return ce_per_image(logits[:b], y) + lambda2 * ce_per_image(ss_logits[b:], k)  # lines 6 and 8

    def two_losses(z: Tensor) -> Tensor:  # z = [X^k; X_SS^k], (2B, C, S, S): two perturbations, one forward pass
        logits, ss_logits = model(z, "class", TASK)
        on_x = ce_per_image(logits[:b], y)  # line 6
        on_x_ss = lambda2 * ce_per_image(ss_logits[b:], k)  # line 8
        if args.ss_attack == "both" or lambda2 == 0:
            on_x_ss = on_x_ss + ce_per_image(logits[b:], y)
        return torch.cat([on_x, on_x_ss])

    if args.ss_attack == "shared":
        x_adv = attack(shared_loss if lambda2 > 0 else class_loss, x)
        return x_adv, T(x_adv, k)
    x_adv, x_ss_adv = attack(two_losses, torch.cat([x, x_ss])).split(b)
    return x_adv, x_ss_adv


def training_loss(
    ddp: nn.Module, x_adv: Tensor, y: Tensor, x_ss: Tensor, k: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Eq. 7-9: (the loss to minimise, its SS part), averaged over the batch. Weight decay is the optimiser's.
    `ddp` is the network, wrapped in DistributedDataParallel if there are several ranks.

    X and X_SS go through the trunk as one batch, so they share BatchNorm statistics (the paper does not say).
    """
    if args.variant == "replace":
        logits, ss_logits = ddp(x_ss, "class", TASK)
        ss_loss = F.cross_entropy(ss_logits, k)
        return F.cross_entropy(logits, y) + args.lambda1 * ss_loss, ss_loss  # eq. 7
    if not uses_ss(args):
        loss = F.cross_entropy(ddp(x_adv, "class"), y)
        return loss, torch.zeros_like(loss)
    b = len(x_adv)
    logits, ss_logits = ddp(torch.cat([x_adv, x_ss]), "class", TASK)
    ss_loss = F.cross_entropy(ss_logits[b:], k)
    return F.cross_entropy(logits[:b], y) + args.lambda1 * ss_loss, ss_loss  # eq. 8, 9


def uses_ss(args: Args) -> bool:
    """lambda1 = 0 is the baseline (Figure 3): then X_SS must not even touch the BatchNorm statistics."""
    return args.variant == "replace" or (args.variant != "T0" and args.lambda1 > 0)


# ---- training ------------------------------------------------------------------------------------------------------


# Added to an epoch's number, so that no two stages, which come in this order, draw the same random numbers.
FIRST_ID = {"plain": 0, "pretrain": 100_000, "train": 200_000}


def train(stage: str, run: Run, args: Args, start: dict | None, train_set: Images, val_set: Images) -> str:
    """Train one network and return the name of its checkpoint in the run's folder.

    stage 'train' is the method; 'pretrain' is P1 / P2, adversarial training on (X_SS, y_SS) alone (section 3.3);
    'plain' trains without attack. The trunk of the checkpoint `start`, if given, is where training starts from.
    """
    checkpoint = "best.pt" if stage == "train" else f"{stage}.pt"
    state = run.load("last.pt", "name")
    if state is not None and FIRST_ID.get(state["name"], -1) > FIRST_ID[stage]:
        return checkpoint  # done before the run was resumed
    epochs = args.pretrain_epochs if stage == "pretrain" else args.epochs
    norm, eps = (args.pretrain, pretrain_eps(args)) if stage == "pretrain" else (args.norm, args.eps)
    lr_step = args.lr_step or max(1, round(0.4 * epochs))
    T, ss_classes = rotate, 4  # eq. 1: X_SS = T(X, y_SS), image i turned by y_SS[i] * 90 degrees

    torch.manual_seed(args.seed)  # every stage and variant starts from the same weights
    mean, std = STATS[args.dataset]
    heads = {"class": len(train_set.classes), TASK: ss_classes}
    model = build_model(args.arch, heads, width=args.width, stem=args.stem, mean=mean, std=std)
    if start is not None:
        load_trunk(model.trunk, start, args.init or "pretrain.pt")  # the heads start afresh (the paper does not say)
    place_model(model, run.device, args.amp, args.compile)
    if stage == "pretrain":
        model.heads["class"].requires_grad_(False)
    if stage == "plain" or (stage == "train" and not uses_ss(args)):
        model.heads[TASK].requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)

    state = {"best": -1.0} | run.resume(stage, model, opt)
    history, best, began = state["history"], state["best"], time.perf_counter() - state["seconds"]
    ddp = distribute(model, args.sync_bn)  # for the update, where ranks average gradients; the attack uses the bare `model`
    steps = count_batches(len(train_set), args.batch_size)
    step_size = 0.0 if stage == "pretrain" else args.step_size  # pre-training has a ball of its own
    attack = pgd_attack(norm, eps, args.attack_steps, step_size=step_size)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": model.spec, "model": model.state_dict(), "optimizer": opt.state_dict(), "args": vars(args),
            "name": stage, "epoch": epoch, "step": step, "sums": sums or {}, "best": best, "history": history,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], epochs):
        for group in opt.param_groups:
            group["lr"] = args.lr * 0.1 ** (epoch // lr_step)
        epoch_id = FIRST_ID[stage] + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        stream = batches(
            train_set, args.batch_size, run.device, shuffle=args.seed * 1_000_003 + epoch_id, skip=skip, workers=args.workers
        )
        model.train()
        with Epoch(epoch, len(train_set), steps, run.device, skip, sums) as log:
            for x, y in stream:  # (B, 3, S, S), (B,)
                sync_buffers(model)
                seed_step(args.seed, epoch_id, log.step)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                k = torch.randint(0, ss_classes, y.shape, device=y.device)  # one transformation per image

                if stage == "plain":
                    loss, ss_loss = F.cross_entropy(ddp(x, "class"), y), torch.zeros((), device=x.device)
                elif stage == "pretrain":
                    with batchnorm_mode(model, args.attack_bn):
                        x_ss = attack(lambda z: ce_per_image(model(z, TASK), k), T(x, k))
                    loss = ss_loss = F.cross_entropy(ddp(x_ss, TASK), k)
                else:
                    with batchnorm_mode(model, args.attack_bn):
                        x_adv, x_ss_adv = adversaries(model, x, y, T, k, args, attack)
                    loss, ss_loss = training_loss(ddp, x_adv, y, x_ss_adv, k, args)

                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                log.update(len(y), loss=loss, ss_loss=ss_loss)
                if log.interrupted():
                    break
        sync_buffers(model)
        save(epoch, log.step, log.shared_sums())  # before validation too: it can be long
        if log.interrupted():
            raise KeyboardInterrupt(f"saved epoch {epoch + 1}, step {log.step}")
        seed_step(args.seed, epoch_id, log.step)
        clean, robust = validate(stage, run, args, model, val_set, attack, T, ss_classes)
        run.log(
            history, stage, epoch + 1, epochs, lr=opt.param_groups[0]["lr"], **log.means(),
            val_clean=clean, val_robust=robust, seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
        score = robust if args.select == "robust" and stage != "plain" else clean
        # Best by validation accuracy (section 4.2), ties to the earlier epoch; of pre-training, the last epoch.
        if score > best or args.select == "last" or stage == "pretrain":
            best = max(best, score)
            run.save(checkpoint, {
                "network": model.spec, "model": model.state_dict(), "args": vars(args), "stage": stage, "epoch": epoch + 1,
                "val_clean": clean, "val_robust": robust,
            })  # fmt: skip
        save(epoch + 1)
    return checkpoint


def pretrain_eps(args: Args) -> float:
    """Radius of pre-training in pixel units (the paper does not say)."""
    return args.pretrain_eps or PAPER_EPS.get(args.pretrain, 0.0)


def validate(
    stage: str, run: Run, args: Args, model: nn.Module, val_set: Images, attack: Callable, T: Callable, ss_classes: int
) -> tuple[float, float]:
    """(clean, robust) validation accuracy in percent, of the SS head in pre-training; robust under the training attack.

    Robust accuracy is measured on 500 images, enough for the log, unless it selects the model.
    """
    if not len(val_set):
        return 0.0, 0.0
    head = TASK if stage == "pretrain" else "class"

    def stream(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in batches(images, args.batch_size, run.device, workers=args.workers):
            if stage == "pretrain":
                y = torch.randint(0, ss_classes, y.shape, device=y.device)
                x = T(x, y)
            yield x, y

    def maximise_loss(x: Tensor, y: Tensor) -> Tensor:
        return attack(lambda z: ce_per_image(model(z, head), y), x)

    attacked = val_set if args.select == "robust" else val_set.subset(torch.arange(min(500, len(val_set))))
    clean = robust_accuracy(model, stream(val_set), heads=(head,))
    return clean, robust_accuracy(model, stream(attacked), maximise_loss, heads=(head,))


# ---- evaluation ----------------------------------------------------------------------------------------------------

# The paper's radii and accuracies (ResNet-18, CIFAR-10): Tables 1, 2 and 4. Table 4 repeats P0 T0 of Table 2 with another
# run: 85.29 71.90 66.63 60.96 55.42 49.52 44.01 39.28 34.41. Differences of that size are noise.
PAPER_EPS = {"linf": 8 / 255, "l2": 0.5}  # of training
TABLE_EPS = {  # of evaluation
    "l2": [0, 0.01, 0.03, 0.05, 0.07, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0],
    "linf": [0, 3 / 255, 4 / 255, 5 / 255, 6 / 255, 7 / 255, 8 / 255, 9 / 255, 10 / 255],
}
PAPER = {  # (norm, pretrain, variant)
    ("l2", "none", "T0"): [88.98, 88.63, 87.87, 87.08, 86.48, 85.49, 78.52, 64.46, 48.15, 34.05, 8.13, 2.15],
    ("l2", "none", "T1"): [90.57, 90.20, 89.48, 88.69, 87.76, 86.68, 78.78, 62.17, 44.65, 28.80, 4.09, 0.48],
    ("l2", "none", "T2"): [90.20, 89.94, 89.30, 88.54, 87.94, 87.02, 80.31, 66.18, 50.28, 34.91, 6.28, 1.77],
    ("l2", "none", "T3"): [89.07, 88.75, 88.14, 87.48, 86.85, 85.73, 79.77, 66.15, 50.87, 36.55, 7.50, 2.09],
    ("linf", "none", "T0"): [85.46, 72.09, 66.98, 61.29, 55.83, 50.19, 44.69, 39.38, 34.60],
    ("linf", "none", "T1"): [86.59, 73.69, 68.71, 62.86, 56.88, 50.52, 44.51, 38.90, 33.89],
    ("linf", "none", "T2"): [86.24, 74.06, 68.96, 63.29, 57.63, 51.50, 45.77, 40.51, 35.54],
    ("linf", "none", "T3"): [84.61, 73.33, 68.61, 64.01, 59.09, 53.73, 48.11, 43.42, 38.76],
    ("linf", "none", "replace"): [74.9, None, None, None, None, None, 36.60, None, None],  # section 3.2
    ("linf", "l2", "T0"): [84.67, 72.67, 67.91, 62.61, 56.91, 51.46, 45.91, 40.27, 35.88],
    ("linf", "linf", "T0"): [85.37, 72.01, 66.69, 61.05, 55.52, 49.61, 43.70, 38.17, 33.66],
    ("linf", "l2", "T3"): [83.78, 72.75, 68.20, 63.32, 58.25, 52.85, 47.37, 42.24, 37.93],
    ("linf", "linf", "T3"): [84.08, 72.65, 68.08, 62.94, 58.01, 52.77, 47.16, 41.67, 36.58],
}
# What makes a run the paper's: the settings it states. What it leaves open may vary.
PAPER_DATA_AND_MODEL = dict(
    dataset="cifar10", image_size=32, label_fraction=1.0, arch="resnet18", width=1.0, stem="cifar", val_fraction=0.15,
)  # fmt: skip
PAPER_RUN = PAPER_DATA_AND_MODEL | dict(
    quick=False, epochs=100, lr=0.1, attack_steps=10, step_size=0.0, select="clean", eval_attack="pgd20", eval_steps=20,
    eval_examples=0, eval_amp=False,
)  # fmt: skip


def paper_row(args: Args, pretrained: str, pretrain_args: dict) -> dict[float, float]:
    """{radius: the paper's accuracy} if this run, and the pre-training it starts from, is one of the paper's; else {}."""
    wanted = PAPER_RUN | {"eps": PAPER_EPS[args.norm]}
    same = all(getattr(args, k) == v for k, v in wanted.items()) and args.lr_step in (0, 40)
    # lambda1 = 0 makes T1 to T3 the baseline and `replace` mere augmentation, lambda2 = 0 makes T3 T2: rows of other names
    same = same and (args.variant == "T0" or args.lambda1 > 0) and (args.variant != "T3" or args.lambda2 > 0)
    same = same and TASK == "rotation"  # another task, in a copy of this file, has other numbers
    if pretrained != "none":
        wanted = PAPER_DATA_AND_MODEL | dict(quick=False, lr=0.1, attack_steps=10, pretrain_epochs=100, pretrain_eps=0.0)
        same = same and all(pretrain_args.get(k) == v for k, v in wanted.items())
    row = PAPER.get((args.norm, pretrained, args.variant)) if same else None
    return dict(zip(TABLE_EPS[args.norm], row, strict=True)) if row else {}


# ---- the run -------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Train (all stages), evaluate, print the table; returns what results.json holds."""
    check(args)
    run = start_run(args)
    results = run.finished() or train_and_evaluate(run, args)
    if world()[0] == 0:
        print_results(results, run.folder)
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    check_args(args)
    numbers(args.eval_eps, "eval-eps")  # raises for a list that cannot be read
    if args.pretrain != "none" and args.init:
        raise UserError("--pretrain and --init both set the trunk's initial weights; give one of them.")


def train_and_evaluate(run: Run, args: Args) -> dict:
    """All stages one after the other, then the table's rows."""
    start = None
    if args.init:
        start = load_checkpoint(args.init)
        load_trunk(build_trunk(args.arch, args.width, args.stem), start, args.init)  # does it fit? Ask before the work begins
    train_set, val_set, test_set = load_splits(args, run.device)
    if args.variant == "T3" and args.ss_attack == "separate" and args.lambda2 not in (0, Args.lambda2):
        run.say("note: with --ss-attack separate every --lambda2 > 0 gives the same attack.")
    run.begin()

    models = {}
    if args.plain:
        models["plain"] = run.require(train("plain", run, args, None, train_set, val_set))
    if args.pretrain != "none":
        start = run.require(train("pretrain", run, args, None, train_set, val_set))
    pretrained, its_args = "none", {}
    if start is not None:
        its_args = start.get("args", {})
        ours = start.get("stage") == "pretrain" and TASK in start["network"]["heads"]
        pretrained = its_args.get("pretrain", "init") if ours else "init"
        if any(its_args.get(k) != getattr(args, k) for k in ("dataset", "seed", "val_fraction", "label_fraction")):
            run.say("note: --init was trained on another split, so some validation images may have been seen in pre-training.")
    name = {"none": "", "l2": "P1 ", "linf": "P2 "}.get(pretrained, "init ") + args.variant
    models[name] = run.require(train("train", run, args, start, train_set, val_set))

    began, rows = time.perf_counter(), []
    quarters = [args.eps * i / 4 for i in range(5)]
    eval_eps = numbers(args.eval_eps, "eval-eps") or (quarters if args.quick else TABLE_EPS[args.norm])
    for name, state in models.items():
        paper = paper_row(args, pretrained, its_args) if state["stage"] == "train" else {}
        rows += evaluate(run, name, state, test_set, eval_eps, paper=paper, look_at=args.eps if state["stage"] == "train" else 0.0)
    return write_results(run, rows, began)


if __name__ == "__main__":
    cli(main, Args)
