"""Adversarial training with rotation prediction (Kucer, Oyen, Kenyon: On visual self-supervision and its
effect on model robustness, 2021, arXiv:2112.04367).

One trunk carries two linear heads: F for the class y, F_SS for the self-supervised (SS) label y_SS. A
transformed copy (X_SS, y_SS) = T(X) of each batch trains the second. Here T turns each image by 0, 90, 180 or
270 degrees.

    minimise  CE(F(X_adv), y) + lambda1 * CE(F_SS(X_SS), y_SS)                                      (eq. 8, 9)

    --variant  X_SS in the loss   the attack (Algorithm 1) maximises
    T0         none (baseline)    CE(F(X), y)
    T1         clean              CE(F(X), y)
    T2         adversarial        CE(F(X), y) + CE(F(X_SS), y)
    T3         adversarial        CE(F(X), y) + lambda2 * CE(F_SS(X_SS), y_SS)
    replace    adversarial        CE(F(X_SS), y); X is not used, both heads train on X_SS           (eq. 7)

X and X_SS have a perturbation each; other readings of the paper: --ss-attack shared (T2, T3), both (T3).
--pretrain l2 (P1, radius 0.5) or linf (P2, 8/255) first trains the trunk on attacked (X_SS, y_SS) alone.

    python rotation_at.py --quick                             # digits, a minute on two CPU cores
    python rotation_at.py --variant T3                        # a row of Table 2: linf 8/255, 100 epochs
    python rotation_at.py --variant T3 --norm l2 --eps 0.5    # a row of Table 1
    python rotation_at.py --variant T0 --pretrain l2          # a row of Table 4 (P1 T0)
    torchrun --nproc-per-node=4 rotation_at.py --variant T3   # the same on four GPUs

The paper: CIFAR-10, ResNet-18, clean / PGD-20 at linf 8/255:
    T0 85.46 / 44.69, T1 86.59 / 44.51, T2 86.24 / 45.77, T3 84.61 / 48.11

Differs from the paper, which released no code:
- lambda1 and lambda2 are not given: 0.5. As printed, Algorithm 1 gives the same attack for every lambda2 > 0
  (see `adversaries`); the text suggests that the losses share a perturbation: --ss-attack shared, both.
- T2 attacks "by the supervised loss". That it attacks X_SS with the label y is our reading.
- We update X in every step, Algorithm 1 only after its loop. Our l2 step is 2 eps / steps along the
  normalised gradient, from the surface of the ball; the paper prints eps^2 / steps and the sign.
- From MadryLab's `robustness`, which the paper uses: batch size, weight decay, BatchNorm in eval mode under
  attack. Not taken from it: colour jitter, small rotations, the best iterate (Algorithm 1 returns the last).
The rest: results/kucer.md.
"""
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from common import (
    STATS, CommonArgs, Images, Positive, Run, Share, UserError, batches, batchnorm_mode, build_model,
    build_trunk, ce_per_image, cli, cuda_graph, distribute, evaluate, load_checkpoint, load_trunk, pgd,
    place_model, random_crop_flip, results_table, robust_accuracy, split_train, start_run,
    rotate,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Args(CommonArgs):
    # model
    arch: Literal["resnet18", "resnet34", "resnet50", "resnet26v2", "resnet50v2"] = "resnet18"  # the trunk
    width: float = 1.0  # multiplies the number of channels (paper: 1)
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer: 3x3, or 7x7 with stride 2 and max-pooling
    init: str = ""  # checkpoint whose trunk to start from, e.g. runs/X/pretrain.pt; empty: random weights
    # optimiser: SGD with momentum 0.9 (section 4.2; MadryLab's robustness)
    epochs: Positive = 100  # epochs of training, and as many of pre-training (paper: 100)
    batch_size: Positive = 128  # images per step over all GPUs; X_SS adds as many (paper: not given)
    lr: float = 0.1  # learning rate, divided by 10 after 40% and 80% of the epochs (paper: 0.1)
    weight_decay: float = 5e-4  # weight decay on all weights (paper: not given)
    flip: bool = True  # mirror training images at random
    # attack in training (section 4.2)
    norm: Literal["linf", "l2"] = "linf"  # norm of the attacks, in training and evaluation
    eps: float = 8 / 255  # radius of the attack; images are in [0, 1] (paper: 8/255; l2 0.1, 0.5, 1)
    attack_steps: Positive = 10  # steps of PGD in training (paper: 10)
    step_size: float = 0.0  # PGD step in training (not in --pretrain); 0: 2 eps / steps, linf at least 2/255
    attack_bn: Literal["eval", "train"] = "eval"  # mode of BatchNorm under attack in training
    # method (section 3)
    variant: Literal["T0", "T1", "T2", "T3", "replace"] = "T3"  # what the attack maximises (table above)
    ss_attack: Literal["separate", "shared", "both"] = "separate"  # perturbation of X_SS in T2, T3
    lambda1: float = 0.5  # weight of the SS loss in training (paper: not given); 0: T0
    lambda2: float = 0.5  # weight of the SS loss in T3's attack (paper: not given); see --ss-attack
    pretrain: Literal["none", "l2", "linf"] = "none"  # adversarial pre-training (P0, P1, P2)
    plain: bool = False  # also train a network without attack, from random weights, for comparison
    # evaluation
    val_fraction: Share = 0.15  # share of the training images held out to select the epoch (paper: 0.15)
    select: Literal["clean", "robust", "last"] = "clean"  # epoch reported: best on held-out images, or last
    eval_eps: tuple[float, ...] = ()  # radii in evaluation; empty: the paper's (--quick: quarters of --eps)

    QUICK: ClassVar[dict] = dict(
        # Digits are 8 x 8, enlarged to 32 x 32: a larger radius, a smaller rate, a stem that divides by 4
        dataset="digits", flip=False, width=0.25, stem="imagenet", epochs=12, batch_size=64, lr=0.02, eps=0.1,
        attack_steps=5, plain=True,
    )  # fmt: skip


# ---- the method: Algorithm 1 and eq. 1, 4, 7-10 ------------------------------------------------------

# The paper's F(x) is model(x, "class"), its F_SS(x) is model(x, TASK).
TASK = "rotation"


def ss_task(args: Args, device: torch.device) -> tuple[Callable, int]:
    """Eq. 1: (T, number of SS labels). T(x, k) turns image i of x (B, 3, S, S) by k[i] * 90 degrees."""
    return rotate, 4


def uses_ss(args: Args) -> bool:
    """Whether the SS loss is used. lambda1 = 0 is the baseline (Figure 3, section 4.3): then X_SS must not
    reach BatchNorm either."""
    return args.variant == "replace" or (args.variant != "T0" and args.lambda1 > 0)


def adversaries(
    model: nn.Module, x: Tensor, y: Tensor, T: Callable, k: Tensor, args: Args, attack: Callable
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: (X_adv, X_SS_adv), each (B, 3, S, S); k (B,) are the SS labels of X_SS = T(x, k).

    `attack(loss, x)` maximises a loss per image. Algorithm 1 leaves open how X and X_SS are attacked:
    - separate: two perturbations, one summed loss, as printed. The class loss depends on X only, the SS loss
      on X_SS only, and a step's length does not depend on lambda2. So X_adv is the same as in T0, and every
      lambda2 > 0 gives the same X_SS_adv (with BatchNorm in eval mode). T2, and lambda2 = 0, attack X_SS
      through the class head with the label y: otherwise no loss would depend on its perturbation.
    - shared: one perturbation, X_SS^k = T(X^k) at every step; lambda2 matters.
    - both: two perturbations, that of X_SS maximises both losses; lambda2 matters. T2: as separate.
    """

    def class_loss(z: Tensor) -> Tensor:
        return ce_per_image(model(z, "class"), y)  # Alg. 1, line 6

    x_ss = T(x, k)  # eq. 1
    if args.variant == "T1" or not uses_ss(args):  # X_SS is clean, or not used
        return attack(class_loss, x), x_ss
    if args.variant == "replace":  # eq. 7 has only X_SS
        return x, attack(class_loss, x_ss)

    b = len(x)
    lambda2 = args.lambda2 if args.variant == "T3" else 0.0  # T2 skips line 8

    def shared_loss(z: Tensor) -> Tensor:  # z = X^k, (B, C, S, S)
        logits, ss_logits = model(torch.cat([z, T(z, k)]), "class", TASK)
        return ce_per_image(logits[:b], y) + lambda2 * ce_per_image(ss_logits[b:], k)  # lines 6 and 8

    def two_losses(z: Tensor) -> Tensor:  # z = [X^k; X_SS^k], (2B, C, S, S): one forward pass for both
        logits, ss_logits = model(z, "class", TASK)
        on_x = ce_per_image(logits[:b], y)  # line 6
        on_x_ss = lambda2 * ce_per_image(ss_logits[b:], k)  # line 8
        if args.ss_attack == "both" or lambda2 == 0:
            on_x_ss = on_x_ss + ce_per_image(logits[b:], y)  # line 6 with X_SS
        return torch.cat([on_x, on_x_ss])

    if args.ss_attack == "shared":
        x_adv = attack(shared_loss if lambda2 > 0 else class_loss, x)
        return x_adv, T(x_adv, k)
    x_adv, x_ss_adv = attack(two_losses, torch.cat([x, x_ss])).split(b)
    return x_adv, x_ss_adv


def training_loss(
    ddp: nn.Module, x_adv: Tensor, y: Tensor, x_ss: Tensor, k: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """Eq. 4 (T0), 7-9: (the loss to minimise, its SS part), means over the batch (eq. 10). The
    optimiser adds the weight decay (footnote 2).

    `ddp` is the network, wrapped in DistributedDataParallel if there are several ranks. X and X_SS go through
    the trunk as one batch, so they share BatchNorm statistics (the paper does not say).
    """
    if args.variant == "replace":
        logits, ss_logits = ddp(x_ss, "class", TASK)
        ss_loss = F.cross_entropy(ss_logits, k)
        return F.cross_entropy(logits, y) + args.lambda1 * ss_loss, ss_loss  # eq. 7
    if not uses_ss(args):
        loss = F.cross_entropy(ddp(x_adv, "class"), y)  # eq. 4
        return loss, torch.zeros_like(loss)
    b = len(x_adv)
    logits, ss_logits = ddp(torch.cat([x_adv, x_ss]), "class", TASK)
    ss_loss = F.cross_entropy(ss_logits[b:], k)
    return F.cross_entropy(logits[:b], y) + args.lambda1 * ss_loss, ss_loss  # eq. 8, 9


# ---- training ----------------------------------------------------------------------------------------

STAGES = ("plain", "pretrain", "train")


def train(
    stage: str, run: Run, args: Args, train_set: Images, val_set: Images, start: dict | None = None
) -> dict:
    """Train one network and return its checkpoint, on the CPU. start: a checkpoint from whose trunk to start.

    stage 'plain' is training without attack, 'pretrain' P1 or P2: adversarial training on (X_SS, y_SS) alone
    (section 3.3), 'train' the method.
    """
    file = "best.pt" if stage == "train" else f"{stage}.pt"
    norm, eps, step_size = args.norm, args.eps, args.step_size
    if stage == "pretrain":
        norm, eps, step_size = args.pretrain, 0.5 if args.pretrain == "l2" else 8 / 255, 0.0
    attack = functools.partial(pgd, eps=eps, norm=norm, steps=args.attack_steps, step_size=step_size)
    T, ss_classes = ss_task(args, run.device)

    torch.manual_seed(args.seed)  # every stage and variant starts from the same weights, but for `start`
    mean, std = STATS[args.dataset]
    heads = {"class": len(train_set.classes), TASK: ss_classes}
    model = build_model(args.arch, heads, width=args.width, stem=args.stem, mean=mean, std=std)
    if start is not None:
        load_trunk(model.trunk, start, args.init or "pretrain.pt")  # the heads start afresh
    place_model(model, run.device, args.amp, args.compile)
    if stage == "pretrain":
        model.heads["class"].requires_grad_(False)
    if stage == "plain" or (stage == "train" and not uses_ss(args)):
        model.heads[TASK].requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    # Algorithm 1; on a GPU as a CUDA graph
    perturb = cuda_graph(lambda x, y, k: adversaries(model, x, y, T, k, args, attack))
    ddp = distribute(model)  # for the update, where ranks average gradients; the attack uses the bare `model`

    for epoch in run.epochs(stage, args.epochs, model, opt, seed_offset=100_000 * STAGES.index(stage)):
        drops = epoch // max(1, round(0.4 * args.epochs))  # section 4.2: after 40 and 80 of 100 epochs
        opt.param_groups[0]["lr"] = args.lr * 0.1**drops
        model.train()
        for x, y in run.batches(train_set, args.batch_size):  # (B, 3, S, S), (B,)
            x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
            k = torch.randint(0, ss_classes, y.shape, device=y.device)  # one per image (section 4.2)

            if stage == "plain":
                loss, ss_loss = F.cross_entropy(ddp(x, "class"), y), torch.zeros((), device=x.device)
            elif stage == "pretrain":  # section 3.3
                with batchnorm_mode(model, args.attack_bn):
                    x_ss = attack(lambda z: ce_per_image(model(z, TASK), k), T(x, k))
                loss = ss_loss = F.cross_entropy(ddp(x_ss, TASK), k)
            else:
                with batchnorm_mode(model, args.attack_bn):
                    x_adv, x_ss_adv = perturb(x, y, k)
                loss, ss_loss = training_loss(ddp, x_adv, y, x_ss_adv, k, args)

            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss, ss_loss=ss_loss)

        val = validate(stage, run, args, model, val_set, attack, T, ss_classes) if len(val_set) else {}
        if args.select == "last" or stage == "pretrain":
            score = float(epoch)
        else:  # section 4.2: best clean validation accuracy
            score = val["val_robust" if args.select == "robust" and stage == "train" else "val_clean"]
        run.keep_best(file, model, score, **val)
    return run.load(file, stage=stage, network=model.spec)


def validate(
    stage: str, run: Run, args: Args, model: nn.Module, val_set: Images,
    attack: Callable, T: Callable, ss_classes: int,
) -> dict[str, float]:  # fmt: skip
    """{val_clean, val_robust}: accuracy (%) on the held-out images, in pre-training of the SS head. Plain
    networks get the same attack. Robust accuracy: of 500 images, or of all with --select robust."""
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
    robust = robust_accuracy(model, stream(attacked), maximise_loss, heads=(head,))
    return {"val_clean": clean, "val_robust": robust}


# ---- the run -----------------------------------------------------------------------------------------

TABLE_EPS = {  # radii of Table 1 (l2) and Tables 2 to 4 (linf)
    "l2": (0, 0.01, 0.03, 0.05, 0.07, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0),
    "linf": (0, *(k / 255 for k in range(3, 11))),
}


def main(args: Args) -> dict:
    """Train all stages, evaluate, print the table; returns what results.json holds. Raises UserError."""
    if args.pretrain != "none" and args.init:
        raise UserError("--pretrain and --init both set the trunk's initial weights; give one of them.")
    prefix = {"none": "init" if args.init else "", "l2": "P1", "linf": "P2"}[args.pretrain]
    suffix = args.ss_attack if args.variant in ("T2", "T3") and args.ss_attack != "separate" else ""
    run = start_run(args, "-".join(filter(None, (prefix, args.variant, suffix))))
    results = run.finished(results_table) or train_and_evaluate(run, args)
    plain = " (plain: clean)" * (args.plain and args.select == "robust")
    reported = "the last" if args.select == "last" else f"best {args.select} validation accuracy{plain}"
    run.say(results_table(results, args, reported) + f"\n\nThe checkpoints are in {run.folder}.")
    return results


def train_and_evaluate(run: Run, args: Args) -> dict:
    """Train all stages, one after the other, and evaluate them; returns what results.json holds."""
    start, name = None, {"none": "", "l2": "P1 ", "linf": "P2 "}[args.pretrain] + args.variant
    if args.init:
        start = load_checkpoint(args.init)
        load_trunk(build_trunk(args.arch, args.width, args.stem), start, args.init)  # does it fit?
        name = f"{initialised_by(start, run, args)} {args.variant}"
        run.remember("initial weights", name)
    train_set, test_set = run.load_data()
    train_set, val_set = split_train(train_set, val_fraction=args.val_fraction, seed=args.seed)
    if not len(val_set) and args.select != "last":
        raise UserError("no images to select the epoch by: raise --val-fraction, or --select last.")

    models = {}
    if args.plain:
        models["plain"] = train("plain", run, args, train_set, val_set)
    if args.pretrain != "none":
        start = train("pretrain", run, args, train_set, val_set)
    models[name] = train("train", run, args, train_set, val_set, start)

    quarters = [args.eps * i / 4 for i in range(5)]
    radii = list(dict.fromkeys(args.eval_eps or (quarters if args.quick else TABLE_EPS[args.norm])))
    rows = []
    for name, state in models.items():
        picture_eps = args.eps if state["stage"] == "train" else 0.0
        rows += evaluate(run, name, state, test_set, radii, picture_eps=picture_eps)
    return run.finish(rows)


def initialised_by(start: dict, run: Run, args: Args) -> str:
    """'P1' or 'P2' if the checkpoint of --init is that pre-training with this run's flags, else 'init'."""
    same = ("seed", "dataset", "image_size", "arch", "width", "stem", "epochs", "batch_size", "lr", "flip",
            "weight_decay", "attack_steps", "attack_bn", "val_fraction")  # fmt: skip
    saved = start.get("args", {})
    finished = start.get("epoch") == args.epochs and "optimizer" not in start
    ours = (start.get("script"), start.get("stage")) == (run.script, "pretrain")
    if not (finished and ours) or any(saved.get(flag) != getattr(args, flag) for flag in same):
        return "init"
    return {"l2": "P1", "linf": "P2"}[saved["pretrain"]]


if __name__ == "__main__":
    cli(main, Args)
