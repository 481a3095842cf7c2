"""Adversarial self-supervised pre-training, then fine-tuning (Chen, Liu, Chang, Cheng, Amini, Wang:
Adversarial robustness: from self-supervised pre-training to fine-tuning, CVPR 2020).

Pre-training teaches a trunk theta_p (the stem and first three stages of a ResNet-50v2) a task without labels.
Fine-tuning puts a new last stage and a linear layer, theta_f, on it and learns the classes. Either may be
adversarial (eq. 1: minimise E max over delta of the loss):

    P1  none                                F1  theta_f only, theta_p frozen, clean images
    P2  the task on clean images            F2  theta_f only, attacked images
    P3  the task, adversarially             F3  everything, clean images
    RS  the task on noisy images (Table 8)  F4  everything, attacked images

Tasks: rotation (which of 4 turns), jigsaw (which of 31 permutations of 4 x 4 tiles), Selfie (which of the
masked patches belongs here), and the ensemble of all three (eq. 2-4), each on its own perturbed image:

    minimise over theta, maximise over delta:   sum_i loss_i(x + delta_i) + lambda log det(G^T G)

The columns of G are the normalised input gradients of the tasks. Where they are orthogonal, the log det has
its maximum, 0: the attack looks for diverse directions, and the weights are trained against them. (Pang et
al., whom the paper follows, let the weights maximise it.) AP+DPE differentiates gradients and is slow.

    python chen_pretrain_finetune.py --quick                     # digits, rotation, the pairs of Table 3
    python chen_pretrain_finetune.py --task selfie               # one network of Table 3: P3F4
    python chen_pretrain_finetune.py --table3                    # all its 20 networks, then Tables 4 and 6
    python chen_pretrain_finetune.py --task ensemble             # Table 5, AP+DPE
    python chen_pretrain_finetune.py --task ensemble --dpe-lambda 0 --out runs/ap-se     # Table 5, AP+SE
    python chen_pretrain_finetune.py runs/X/*P3F4.ta.pt          # Tables 4 and 6 of any classifiers
    torchrun --nproc-per-node=8 chen_pretrain_finetune.py --table3

The paper: CIFAR-10, linf 8/255, clean / PGD-20 accuracy
    P1F4 84.72 / 47.22, P3F4 of Selfie 86.02 / 51.05, the average of three networks 86.04 / 54.64

Differs from the paper. Where it is silent, we follow its published code:
- Eq. 1 prints an l2 ball and attacked images only. As in the code, the ball is linf, and pre-training
  averages the loss over clean and attacked images.
- Section 4.2 is missing in our copy of the paper. From memory: batch size, learning rates, and that the
  epoch of best clean accuracy is reported. The code's fine-tuning: --batch-size 128 --lr-steps 60,80.
- Pre-training hands on its last epoch (code: the best on held-out images, for jigsaw on the test set).
- Attacks in training use the batch's BatchNorm statistics (code), but leave the running ones unchanged (in
  the code they change). Frozen parts stay in eval mode (the code has F4 only).
- Table 7: its images are withdrawn (ours: --extra-data), its task is not named. RS: sigma is not given.
The rest: results/chen.md.
"""
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from common import (
    IMAGENET_STATS, CommonArgs, Images, Network, Positive, Run, Share, UserError, batches, batchnorm_mode,
    build_model, build_trunk, ce_per_image, check_classifier, cli, count_batches, distribute, draw, eps_name,
    evaluate, full_precision, jigsaw, jigsaw_permutations, join, learning_rate, load_checkpoint, load_extra,
    load_weights, paper_numbers, patchify, percent_of_all_ranks, pgd, place_model, progress, random_crop_flip,
    reading, rebuild, robust_accuracy, rotate, split_train, start_run, text_table, world,
)  # fmt: skip

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SCRIPT = "chen_pretrain_finetune"
TASKS = ("selfie", "rotation", "jigsaw")
PAIRS = ("P1F3", "P1F4", "P2F3", "P2F4", "P3F1", "P3F2", "P3F3", "P3F4", "RSF2", "RSF4")  # Tables 3 and 8
Task = Literal["selfie", "rotation", "jigsaw", "ensemble", "all"]
Views = dict[str, tuple[Tensor, Tensor]]  # {task: see `make_view`}


@dataclass
class Args(CommonArgs):
    models: tuple[str, ...] = ()  # checkpoints of classifiers: compare them, train nothing
    # data and model
    init: str = ""  # pretrain-*.pt of a run to fine-tune; sets --task and --pretrain
    extra_data: str = ""  # more images for pre-training: .npz or .npy, uint8, (N, size, size, 3)
    extra_only: bool = False  # pre-train on the images of --extra-data alone (paper: Table 7)
    pretrain_images: int = 0  # number of images to pre-train on, drawn at random (paper: Table 7); 0: all
    flip: bool = True  # mirror training images at random, but not in Selfie's pre-training (code)
    arch: Literal["resnet26v2", "resnet50v2"] = "resnet50v2"  # the trunk (paper: resnet50v2)
    width: float = 1.0  # multiplies the number of channels (paper: 1)
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer: 3x3, or 7x7 with stride 2 and max-pooling
    # optimiser: SGD with momentum 0.9 (pre-training: RECIPE in the code)
    epochs: Positive = 100  # epochs of fine-tuning (paper: 100)
    batch_size: Positive = 256  # images per step over all GPUs (paper: 256; restricted ImageNet 64)
    lr: float = 0.1  # initial learning rate of fine-tuning (paper: 0.1)
    lr_steps: tuple[float, ...] = (30, 50)  # epochs at which --lr is divided by 10 (paper: 30,50)
    weight_decay: float = 3e-4  # weight decay (code: 0.0003); a third of it in pre-training Selfie, ensemble
    warmup_steps: int = 200  # warm-up steps (code: 200; in pre-training Selfie, ensemble: none)
    pretrain_epochs: int = 0  # epochs of pre-training; 0: the code's, 100 to 200
    # attack in training
    norm: Literal["linf", "l2"] = "linf"  # norm of the attacks (paper: linf)
    eps: float = 8 / 255  # radius of the attack; images are in [0, 1] (paper: 8/255)
    attack_steps: Positive = 10  # steps of PGD in training (paper: 10)
    attack_bn: Literal["eval", "train"] = "train"  # mode of BatchNorm under attack in training (code: train)
    # method
    task: Task = "rotation"  # pre-training task; all: the first three, one after the other
    pretrain: Literal["P1", "P2", "P3", "RS", "all"] = "P3"  # none, or on clean, attacked, noisy images
    finetune: Literal["F1", "F2", "F3", "F4", "none", "all"] = "F4"  # see table above; none: only pre-train
    table3: bool = False  # train the 20 networks of Table 3; ignores --task, --pretrain, --finetune
    grid: Positive = 4  # tiles of jigsaw and patches of Selfie along each side (code: 4)
    num_permutations: int = 30  # orders of jigsaw's tiles besides the identity (code: 30)
    double_softmax: bool = True  # Selfie: apply softmax twice, as the code does
    dpe_lambda: float = 0.1  # lambda of eq. 3, the weight of the log det (code: 0.1); 0: AP+SE
    sigma: float = 0.25  # standard deviation of the noise of RS (paper: not given)
    # evaluation
    val_fraction: Share = 0.1  # share of the training images held out to select the epochs (paper: 0.1)

    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=12, grid=3, flip=False, arch="resnet26v2", width=0.125, pretrain="all",
        finetune="all", epochs=7, batch_size=128, lr_steps=(4, 6), warmup_steps=10, pretrain_epochs=5,
        eps=0.1, attack_steps=5, num_permutations=10, val_fraction=0.06, eval_steps=10, eval_examples=240,
    )  # fmt: skip


# ---- the tasks ---------------------------------------------------------------------------------------


class Selfie(nn.Module):
    """Attention pooling (Trinh et al. 2019): from the visible patches, predict which masked patch belongs at
    a place."""

    def __init__(self, dim: int, grid: int, layers: int = 13):
        super().__init__()
        self.grid, self.masked = grid, grid * grid // 4  # a quarter
        self.first = nn.Parameter(torch.zeros(1, 1, dim))  # its output stands for all visible patches
        heads = max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)  # width 1: of 64 channels
        self.encoder = nn.Sequential()  # nn.TransformerEncoder would start with 13 equal layers
        for _ in range(layers):
            layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, activation=F.gelu, batch_first=True)
            layer.dropout = nn.Identity()  # none inside the feed-forward part (code); elsewhere 0.1
            # Queries, keys, values: variance 2 / (inputs + outputs of a head), 2 / (1024 + 64) in the code
            nn.init.normal_(layer.self_attn.in_proj_weight, std=math.sqrt(2 / (dim + dim // heads)))
            self.encoder.append(layer)
        self.row = nn.Parameter(torch.randn(grid, dim))  # code: columns start at 0, rows do not
        self.col = nn.Parameter(torch.zeros(grid, dim))

    def forward(self, patches: Tensor, order: Tensor) -> Tensor:
        """patches (B, N, dim), row by row, of which the first quarter of `order` (N,) is masked, to scores
        (B, masked, masked): row i says how well each masked patch fits the place of the i-th."""
        masked, visible = order[: self.masked], order[self.masked :]
        first = self.first.expand(len(patches), -1, -1).to(patches)
        seen = torch.cat([first, patches[:, visible]], 1)  # without their places (code)
        pooled = self.encoder(seen)[:, :1]  # (B, 1, dim)
        query = pooled + self.row[masked // self.grid] + self.col[masked % self.grid]  # (B, masked, dim)
        return query @ patches[:, masked].transpose(1, 2)


class Pretext(nn.Module):
    """theta_p and a branch per task (Figure 2): the trunk of a `Network`, which normalises the images."""

    def __init__(self, tasks: tuple[str, ...], args: Args):
        super().__init__()
        self.resnet = build_trunk(args.arch, args.width, args.stem)
        # A last stage for rotation and one for jigsaw
        last_stages = [self.resnet.layer4, build_trunk(args.arch, args.width, args.stem).layer4]
        del self.resnet.layer4  # the rest is theta_p
        self.grid, self.branches = args.grid, nn.ModuleDict()
        for task in tasks:
            if task == "selfie":
                self.branches[task] = Selfie(self.resnet.shared_dim, args.grid)
            else:
                classes = 4 if task == "rotation" else args.num_permutations + 1
                pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
                self.branches[task] = nn.Sequential(
                    last_stages.pop(), *pool, nn.Linear(self.resnet.dim, classes)
                )

    def forward(self, x: Tensor, task: str, target: Tensor) -> Tensor:
        """Logits (B, classes) of rotation and jigsaw, scores (B, masked, masked) of Selfie."""
        if task != "selfie":
            return self.branches[task](self.resnet.shared(x))
        pieces = patchify(x, x.shape[2] // self.grid)  # (B, N, 3, S/n, S/n)
        maps = self.resnet.shared(pieces.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        return self.branches[task](maps.mean((2, 3)).unflatten(0, pieces.shape[:2]), target)


def make_view(task: str, x: Tensor, permutations: Tensor) -> tuple[Tensor, Tensor]:
    """(images (B, 3, S, S) that the task shows, target): the labels (B,) of rotation and jigsaw; of Selfie
    the order of patches (N,), one for the whole batch."""
    b, device = len(x), x.device
    if task == "rotation":
        k = (torch.arange(b, device=device) % 4)[torch.randperm(b, device=device)]  # as many of each (code)
        return rotate(x, k), k
    if task == "jigsaw":
        k = torch.randint(len(permutations), (b,), device=device)
        k = torch.where(torch.rand(b, device=device) < 0.1, 0, k)  # more images are left whole (code)
        return jigsaw(x, permutations[k]), k
    return x, torch.randperm(permutations.shape[1], device=device)


def task_loss(model: Network, task: str, x: Tensor, target: Tensor, double_softmax: bool) -> Tensor:
    """Cross-entropy per image (B,), of Selfie the sum over the masked places."""
    out = model.features(x, task, target)
    if task != "selfie":
        return ce_per_image(out, target)
    out = out.softmax(2) if double_softmax else out
    right = torch.arange(out.shape[1], device=x.device).repeat(len(x))  # the i-th place wants the i-th patch
    return ce_per_image(out.flatten(0, 1), right).view(len(x), -1).sum(1)


def log_det(gradients: list[Tensor]) -> Tensor:
    """Eq. 4: log det(G^T G) per image (B,). The columns of G are the M gradients (B, 3, S, S), each of length
    1. A ridge of 1e-5 (code) keeps it above (M - 1) ln 1e-5 where they are equal."""
    g = torch.stack([v.flatten(1) for v in gradients], 2)  # (B, D, M)
    g = g / (g.square().sum(1, keepdim=True) + 1e-20).sqrt()
    gram = g.transpose(1, 2) @ g + 1e-5 * torch.eye(g.shape[2], device=g.device)
    return torch.linalg.slogdet(gram).logabsdet


class Objective(nn.Module):
    """The loss of eq. 3, as a module for DistributedDataParallel."""

    def __init__(self, model: Network, args: Args):
        super().__init__()
        self.model, self.args = model, args

    def loss_terms(self, views: Views, diverse: bool) -> tuple[Tensor, Tensor]:
        """Per image: (sum of the tasks' losses (B,), eq. 4 (B,), or zeros if not `diverse`)."""
        # Fused attention has no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if diverse else contextlib.nullcontext():
            soft = self.args.double_softmax
            total = sum(task_loss(self.model, t, x, target, soft) for t, (x, target) in views.items())
        if not diverse:
            return total, torch.zeros_like(total)
        # A task's loss depends on that task's images only, so one call gives all gradients.
        gradients = torch.autograd.grad(total.sum(), [x for x, _ in views.values()], create_graph=True)
        return total, log_det(list(gradients))

    def forward(self, clean: Views, attacked: Views | None, diverse: bool) -> Tensor:
        """The training loss: mean over images and tasks, and over clean and attacked images, plus lambda
        times eq. 4. The weights lower what the attack raises."""
        loss = self.loss_terms(clean, False)[0].mean() / len(clean)
        if attacked is None:
            return loss
        if diverse:
            attacked = {t: (x.detach().requires_grad_(), target) for t, (x, target) in attacked.items()}
        total, h = self.loss_terms(attacked, diverse)
        return 0.5 * (loss + total.mean() / len(clean)) + self.args.dpe_lambda * h.mean()

    def attack(self, views: Views, diverse: bool) -> Views:
        """Images that maximise eq. 3, each with a perturbation of its own. All tasks' images are stacked as
        channels and attacked at once."""
        args = self.args

        def split(z: Tensor) -> Views:  # (B, 3 * tasks, S, S)
            return {task: (x, views[task][1]) for task, x in zip(views, z.split(3, 1), strict=True)}

        def loss(z: Tensor) -> Tensor:  # (B,)
            total, h = self.loss_terms(split(z), diverse)
            return total + args.dpe_lambda * h

        x = torch.cat([x for x, _ in views.values()], 1)
        with batchnorm_mode(self.model, args.attack_bn):
            return split(pgd(loss, x, eps=args.eps, norm=args.norm, steps=args.attack_steps))


# ---- pre-training ------------------------------------------------------------------------------------

# {task: (epochs, highest and lowest learning rate, whether it warms up, divisor of --weight-decay)}; epochs,
# warm-up and decay: code. RS was not published: that it has as many epochs as P3 is our choice.
RECIPE = {
    "rotation": (100, 0.1, 1e-6, True, 1), "rotation-P2": (200, 0.1, 1e-6, True, 1),
    "jigsaw": (100, 0.1, 1e-6, True, 1), "jigsaw-P2": (200, 0.1, 1e-6, True, 1),
    "selfie": (200, 0.025, 1e-6, False, 3), "ensemble": (150, 0.001, 1e-8, False, 3),
}  # fmt: skip


def warmup(step: int, steps: int) -> float:
    """Factor of the learning rate: from 0.1 to 1 in the first `steps` steps of a training (code)."""
    return min(1.0, 0.1 + 0.9 * step / steps) if steps else 1.0


def pretrain(task: str, kind: str, run: Run, args: Args, images: Images, val_set: Images) -> dict:
    """P2, P3 or RS on one task, or on the ensemble of all. Returns the checkpoint of the last epoch."""
    stage, tasks = f"pretrain-{kind}-{task}", TASKS if task == "ensemble" else (task,)
    epochs, high, low, warm, decay = RECIPE.get(f"{task}-{kind}", RECIPE[task])
    epochs = args.pretrain_epochs or epochs
    diverse = task == "ensemble" and kind == "P3" and args.dpe_lambda > 0
    torch.manual_seed(args.seed)
    model = Network(Pretext(tasks, args), {}, *IMAGENET_STATS)
    model.spec = {"arch": args.arch, "width": args.width, "stem": args.stem}
    place_model(model, run.device, args.amp, args.compile and not diverse)  # compiled: no second derivative
    if diverse and model.amp == torch.float16:  # its gradient scale would be divided out once too often
        run.say("note: second derivatives do not work in float16; this pre-training computes in float32.")
        model.amp = None
    permutations = jigsaw_permutations(args.grid, args.num_permutations, args.seed).to(run.device)
    objective = Objective(model, args)
    opt = torch.optim.SGD(model.parameters(), high, momentum=0.9, weight_decay=args.weight_decay / decay)
    ddp = distribute(objective)
    steps_per_epoch = count_batches(len(images), args.batch_size)
    val_batches = partial(batches, val_set, args.batch_size, run.device, workers=args.workers)
    # Selfie crops less and does not mirror (code).
    pad, flip = (args.image_size // 16, False) if task == "selfie" else (args.image_size // 8, args.flip)

    for epoch in run.epochs(stage, epochs, model, opt):
        model.train()
        for i, (x, _) in enumerate(run.batches(images, args.batch_size)):  # (B, 3, S, S); no labels
            step = epoch * steps_per_epoch + i
            rate = learning_rate(high, step, 0, epochs * steps_per_epoch, low)  # half a cosine
            opt.param_groups[0]["lr"] = rate * (warmup(step, args.warmup_steps) if warm else 1)
            x = random_crop_flip(x, pad=pad, flip=flip)
            clean = {task: make_view(task, x, permutations) for task in tasks}
            if kind == "RS":  # the noisy images alone, not clipped (our choice)
                clean = {t: (v + args.sigma * torch.randn_like(v), k) for t, (v, k) in clean.items()}
            attacked = objective.attack(clean, diverse) if kind == "P3" else None
            loss = ddp(clean, attacked, diverse)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss)
        accuracy = {f"val_{t}": task_accuracy(model, t, val_batches(), permutations) for t in tasks}
        run.keep_best(f"{stage}.pt", model, float(epoch), **accuracy)  # the last epoch
    return run.load(f"{stage}.pt", stage=stage, network=model.spec)


def task_accuracy(model: Network, task: str, data: Iterable, permutations: Tensor) -> float:
    """Accuracy (%) on clean images; of Selfie the share of places that get the right patch."""
    hits = seen = 0
    with batchnorm_mode(model, "eval"), torch.no_grad():
        for x, _ in data:
            x, target = make_view(task, x, permutations)
            answer = model.features(x, task, target).argmax(-1)  # (B,), of Selfie (B, masked)
            right = torch.arange(answer.shape[1], device=x.device) if task == "selfie" else target
            hits += (answer == right).sum().item()
            seen += answer.numel()
    return percent_of_all_ranks([hits], seen)[0]


# ---- fine-tuning -------------------------------------------------------------------------------------


def inherit(model: Network, start: dict, source: str) -> None:
    """Give the classifier theta_p of a pre-training checkpoint, all of it and nothing else (8,533,696
    parameters of ResNet-50v2). Raises UserError if they do not fit: the published code goes on with random
    weights then."""
    own_stage = {k: v for k, v in model.trunk.state_dict().items() if k.startswith("layer4.")}
    weights = {k.removeprefix("trunk.resnet."): v for k, v in start["model"].items() if ".resnet." in k}
    load_weights(model.trunk, weights | own_stage, source)


def finetune(
    name: str, run: Run, args: Args, start: dict | None, train_set: Images, val_set: Images
) -> dict[str, dict]:
    """F1 to F4, as `name` ends, from the pre-training checkpoint `start` (None: P1). Returns the checkpoints
    {'ta': ..., 'ra': ...} of the epochs of best clean and of best robust accuracy on `val_set`."""
    frozen, robust = name.endswith(("F1", "F2")), name.endswith(("F2", "F4"))
    torch.manual_seed(args.seed)
    model = build_model(args.arch, {"class": len(train_set.classes)}, width=args.width, stem=args.stem)
    if start is not None:
        inherit(model, start, args.init or f"the pre-training of {name}")
    place_model(model, run.device, args.amp, args.compile)
    theta_p = nn.ModuleList(part for key, part in model.trunk.named_children() if frozen and key != "layer4")
    theta_p.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    ddp = distribute(model)
    steps_per_epoch = count_batches(len(train_set), args.batch_size)
    val_batches = partial(batches, val_set, args.batch_size, run.device, workers=args.workers)

    def attack(x: Tensor, y: Tensor, steps: int = args.eval_steps) -> Tensor:
        return pgd(lambda z: ce_per_image(model(z), y), x, eps=args.eps, norm=args.norm, steps=steps)

    # One seed_offset for all pairs: they see the same images in the same order.
    for epoch in run.epochs(name, args.epochs, model, opt, seed_offset=100_000):
        drops = sum(epoch >= at for at in args.lr_steps)
        model.train()
        theta_p.eval()  # its BatchNorm, too, stays as pre-training left it
        for i, (x, y) in enumerate(run.batches(train_set, args.batch_size)):  # (B, 3, S, S), (B,)
            step = epoch * steps_per_epoch + i
            opt.param_groups[0]["lr"] = args.lr * 0.1**drops * warmup(step, args.warmup_steps)
            x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
            if robust:
                with batchnorm_mode(model, args.attack_bn):
                    theta_p.eval()  # batchnorm_mode set it to --attack-bn
                    x = attack(x, y, args.attack_steps)
            loss = F.cross_entropy(ddp(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss)
        ta, ra = robust_accuracy(model, val_batches()), robust_accuracy(model, val_batches(), attack)
        for pick, score in {"ta": ta, "ra": ra + 1e-6 * ta}.items():  # of equal RA the better TA
            run.keep_best(f"{name}.{pick}.pt", model, score, val_clean=ta, val_robust=ra)
    return {pick: run.load(f"{name}.{pick}.pt", stage=name, network=model.spec) for pick in ("ta", "ra")}


# ---- several networks: transfer of attacks, averaged predictions -------------------------------------


class Average(nn.Module):
    """The logarithm of the mean of the networks' probabilities (Table 6): its cross-entropy is -log of the
    mean probability of a class. (Probabilities taken for logits would nearly hide the gradient.)"""

    def __init__(self, models: list[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        logs = torch.stack([F.log_softmax(m(x), 1) for m in self.models])  # (models, B, classes)
        return logs.logsumexp(0) - math.log(len(self.models))


def transfer(networks: Iterable[nn.Module], data: Iterable, attack: Callable) -> Tensor:
    """joint[s, t, u]: share (%) of the images whose adversarial version, made for network s, both t and u get
    wrong. joint[s, t, t] is the attack success rate of Table 4 (of all images, footnote 2). s itself is also
    fooled by what it gets wrong without attack, so that joint[s, s, s] = 100 - RA of s."""
    models = nn.ModuleList(networks)
    device, n = next(models.parameters()).device, len(models)
    joint, seen = torch.zeros(n, n, n, device=device), torch.zeros((), device=device)
    with batchnorm_mode(models, "eval"):
        for x, y in data:
            seen += len(y)
            with torch.no_grad():
                wrong = torch.stack([model(x).argmax(1) != y for model in models])  # (n, B), without attack
            for s, source in enumerate(models):
                x_adv = attack(lambda z: ce_per_image(source(z), y), x)
                with torch.no_grad():
                    fooled = torch.stack([model(x_adv).argmax(1) != y for model in models])
                fooled[s] |= wrong[s]
                joint[s] += fooled.float() @ fooled.float().T
    if world()[1] > 1:
        dist.all_reduce(joint)
        dist.all_reduce(seen)
    return 100 * joint / seen


def compare(run: Run, args: Args, states: dict[str, dict], test_set: Images) -> list[dict]:
    """Rows of results.json for Tables 4 and 6 and Figure 5, of the classifiers {name: checkpoint} and of the
    averages of all subsets (of more than four networks: of all)."""
    models = {name: place_model(rebuild(state, name), run.device, args.amp) for name, state in states.items()}
    sizes = range(1, len(models) + 1) if len(models) <= 4 else (1, len(models))
    subsets = [names for k in sizes for names in itertools.combinations(models, k)]
    networks = {" + ".join(names): Average([models[name] for name in names]) for names in subsets}
    attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.eval_steps)
    data = partial(batches, test_set, args.batch_size, run.device, workers=args.workers)
    with full_precision(nn.ModuleList(models.values()), not args.eval_amp):
        clean = [robust_accuracy(network, data()) for network in networks.values()]
        torch.manual_seed(args.seed + world()[0])  # of the random starts
        joint = transfer(networks.values(), progress(data(), len(test_set), "transfer"), attack).tolist()
    in_paper = {name: name_in_paper(state, name, args) for name, state in states.items()}
    rows, columns = [], {"attack": f"pgd-{args.eval_steps}", "norm": args.norm, "eps": args.eps}

    def add(kind: str, name: str, accuracy: float, **extra: str | list[str] | int) -> None:
        row = {"kind": kind, "name": name, "examples": len(test_set), "accuracy": round(accuracy, 2)}
        rows.append(columns | row | extra)

    for (s, a), (t, b) in itertools.product(enumerate(networks), repeat=2):
        add("transfer", f"{a} -> {b}", 100 - joint[s][t][t], source=a, target=b)
    for (s, a), (t, b), (u, c) in itertools.product(enumerate(models), repeat=3):
        if t < u and s not in (t, u):
            add("venn", f"{a} -> {b} and {c}", 100 - joint[s][t][u], source=a, target=b, other=c)
    for s, (name, names) in enumerate(zip(networks, subsets, strict=True)):
        extra = {"models": list(names), "in_paper": " + ".join(sorted(in_paper[n] for n in names))}
        add("average", name, clean[s], attack="none", eps=0, **extra)
        add("average", name, 100 - joint[s][s][s], **extra)
    return rows


# ---- the run -----------------------------------------------------------------------------------------


def cells(args: Args) -> list[tuple[str, str]]:
    """The requested [(task, pair)], such as ("rotation", "P3F4"); P1 has no task."""
    tasks = TASKS if args.table3 or args.task == "all" else (args.task,)
    pretraining, finetuning = ("all", "all") if args.table3 else (args.pretrain, args.finetune)
    if tasks == ("ensemble",):  # Table 5
        pretraining = "P3" if pretraining == "all" else pretraining
        finetuning = "F4" if finetuning == "all" else finetuning
    kinds = ("P1", "P2", "P3") if pretraining == "all" else (pretraining,)
    ends = ("F1", "F2", "F3", "F4") if finetuning == "all" else (finetuning,)
    pairs = [kind + end for kind in kinds for end in ends]
    if "all" in (pretraining, finetuning) and finetuning != "none":
        pairs = [pair for pair in pairs if pair in PAIRS]
    return list(dict.fromkeys(("" if pair[:2] == "P1" else task, pair) for task in tasks for pair in pairs))


def main(args: Args) -> dict:
    """Pre-train, fine-tune, evaluate, print the tables; returns what results.json holds ({} if nothing was
    fine-tuned). Raises UserError."""
    check(args)
    start = f"init-{Path(args.init).stem}" if args.init else f"{args.task}-{args.pretrain}"
    cell = f"{start}-{args.finetune}"
    run = start_run(args, "compare" if args.models else "table3" if args.table3 else cell)
    run.remember_files("checkpoints", args.models or filter(None, [args.init]))
    results = run.finished(table) or train_and_evaluate(run, args)
    shown = table(results, args) if results else "\nFine-tune a checkpoint pretrain-*.pt with --init."
    run.say(f"{shown}\n\nThe checkpoints are in {run.folder}.")
    return results


def check(args: Args) -> None:
    """Raise UserError for flags that would give no or wrong numbers."""
    tasks = {task for task, _ in cells(args)}
    if args.norm == "l2" and "ensemble" in tasks:
        raise UserError("--task ensemble needs --norm linf: an l2 ball would hold its three images together.")
    if not args.eps and not args.models:
        raise UserError("--eps must be above 0; for clean images take --pretrain P2 --finetune F3.")
    if args.models and args.eval_attack != "pgd20":
        raise UserError("networks are compared under PGD (--eval-steps): leave out --eval-attack.")
    if args.extra_only and not args.extra_data:
        raise UserError("--extra-only needs --extra-data.")
    if tasks - {"", "rotation"} and (args.grid < 3 or args.image_size % args.grid):
        raise UserError(f"--grid {args.grid} must be at least 3 and divide --image-size {args.image_size}.")
    # On single pixels bfloat16 sometimes gave NaN (3x3 convolution with stride 2, CPU).
    smallest = (16 if args.stem == "imagenet" else 4) * (args.grid if tasks & {"selfie", "ensemble"} else 2)
    if args.image_size < smallest:
        raise UserError(f"--image-size {args.image_size} is too small for the trunk: take {smallest}.")


def train_and_evaluate(run: Run, args: Args) -> dict:
    """All requested cells, each pre-training once, or the comparison of MODELS; returns what results.json
    holds. A resumed run does not repeat what is finished."""
    requested, start = cells(args), None
    if args.init:
        start = load_checkpoint(args.init)
        with reading(args.init):
            _, kind, task = start["stage"].split("-")
        requested = cells(replace(args, task=task, pretrain=kind, table3=False))
    train_set, test_set = run.load_data()
    if args.models:
        return run.finish(compare(run, args, load_classifiers(args, test_set), test_set))
    train_set, val_set = split_train(train_set, val_fraction=args.val_fraction, seed=args.seed)
    if not len(val_set):
        raise UserError("no images to select the epochs by: raise --val-fraction.")
    images = train_set
    if args.extra_data:
        extra = load_extra(args.extra_data, args.image_size, run.device)
        images = extra if args.extra_only else join(train_set, extra)
    if args.pretrain_images > len(images):
        raise UserError(f"--pretrain-images {args.pretrain_images}: there are only {len(images)}.")
    images = draw(images, args.pretrain_images, seed=args.seed) if args.pretrain_images else images

    rows, finals = run.rows(), {}
    for task, pair in requested:
        if task and not args.init:
            start = pretrain(task, pair[:2], run, args, images, val_set)
        if args.finetune == "none":
            continue
        name = "-".join(filter(None, ("init" if args.init else "", task, pair)))
        picks = finetune(name, run, args, start if task else None, train_set, val_set)
        if pair == "P3F4":
            finals[f"{name}.ta"] = picks["ta"]
        if any(row["name"] == name for row in rows):
            continue
        columns = {"task": task, "pair": pair, "images": len(images) if task and not args.init else None}
        columns["best_epoch"] = picks["ta" if pair[2:] in ("F1", "F3") else "ra"]["epoch"]
        for pick, state in picks.items():
            if pick == "ta" or state["epoch"] != picks["ta"]["epoch"]:  # else it is the same network
                picture_eps = args.eps if pick == "ta" and pair[2:] in ("F2", "F4") else 0.0
                measured = evaluate(run, name, state, test_set, [0, args.eps], picture_eps=picture_eps)
            rows += [row | columns | {"pick": pick} for row in measured]
        run.keep_rows(rows)
    if len(finals) > 1:
        rows = rows + compare(run, args, finals, test_set)
    return run.finish(rows) if rows else {}


def load_classifiers(args: Args, test_set: Images) -> dict[str, dict]:
    """The checkpoints MODELS by name, folder/file. Raises UserError unless they fit the test images."""
    states = {}
    for path in map(Path, args.models):
        state = load_checkpoint(path)
        check_classifier(state, path)
        saved = {"dataset": args.dataset, "image_size": args.image_size} | state.get("args", {})
        fits = state["network"]["heads"]["class"] == len(test_set.classes)
        same_data = saved["dataset"] == args.dataset or "folder" in (saved["dataset"], args.dataset)
        if not (fits and same_data and saved["image_size"] == args.image_size):
            given = f"--dataset {args.dataset} --image-size {args.image_size}"
            raise UserError(f"{path} does not fit {given}: give those of its training.")
        states[f"{path.resolve().parent.name}/{path.stem}"] = state
    if len(states) < len(args.models):
        raise UserError("two of the checkpoints have the same name in folders of the same name; rename one.")
    return states


# ---- the tables --------------------------------------------------------------------------------------


def name_in_paper(state: dict, name: str, args: Args) -> str:
    """'selfie-P3F4' if `name` is that network of best TA and all flags are the paper's; '' for others."""
    stage, saved = state.get("stage", ""), state.get("args", {})
    if saved.keys() != asdict(args).keys() or Path(name).name != f"{stage}.ta":
        return ""
    known = paper_numbers(SCRIPT, args, stage)
    return stage if known and paper_numbers(SCRIPT, Args(**saved), stage) == known else ""


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: a line per pair of Tables 3, 5, 7 and 8, then `compared_table`. If
    the flags are the paper's, its numbers follow each line."""
    rows, lines = results["rows"], []
    attack = next(row["attack"] for row in rows if row["attack"] != "none").upper()
    attack += f" ({args.norm} eps {eps_name(args.eps)}), {'mixed precision' if args.eval_amp else 'float32'}"
    text = f"\n{args.dataset}, {rows[0]['examples']:,} test images. TA: clean accuracy (%); RA: {attack}."
    for name in dict.fromkeys(row["name"] for row in rows if "pair" in row):
        of_name = [row for row in rows if row["name"] == name]
        lines.append([name, *(f"{row['accuracy']:.2f}" for row in of_name), str(of_name[0]["best_epoch"])])
        if known := paper_numbers(SCRIPT, args, name):
            lines.append(["  the paper", *known[:2], "", "", known[2]])
    if lines:
        text += f"\n{args.arch} x{args.width:g}, the epochs of best TA and of best RA on held-out images;\n"
        text += f"epoch: of best TA for F1 and F3, of best RA for F2 and F4. {results['seconds']:.0f} s.\n\n"
        text += text_table(["", "best TA: TA", "RA", "best RA: TA", "RA", "epoch"], lines)
    return text + (compared_table(rows, args) if any("kind" in row for row in rows) else "")


def compared_table(rows: list[dict], args: Args) -> str:
    """Tables 4 and 6 with a line per network or average, and the numbers of Figure 5. (The paper's jigsaw
    network of Table 4 is that of Table 5, with RA 48.83, not that of Table 3.)"""
    fooled = {(r["source"], r["target"]): 100 - r["accuracy"] for r in rows if r.get("kind") == "transfer"}
    clean = {r["name"]: r for r in rows if r.get("kind") == "average" and r["attack"] == "none"}
    single = [name for name, row in clean.items() if len(row["models"]) == 1]
    short = {name: "+".join(str(single.index(m) + 1) for m in r["models"]) for name, r in clean.items()}
    lines = []
    for name, row in clean.items():
        numbers = [row["accuracy"], 100 - fooled[name, name], *(fooled[source, name] for source in clean)]
        label = f"{short[name]}: {name}" if name in single else short[name]
        lines.append([label, *(f"{v:.2f}" for v in numbers)])
        known = paper_numbers(SCRIPT, args, row["in_paper"])[:2] or ["", ""]
        for other in clean.values():
            target = "itself" if other is row else row["in_paper"]
            known.append("".join(paper_numbers(SCRIPT, args, f"{other['in_paper']} -> {target}")))
        if any(known):
            lines.append(["  the paper", *known])
    attack = next(row["attack"] for row in rows if row.get("kind") == "transfer").upper()
    text = f"\n\nTables 4 and 6, {attack}: networks and averages of their probabilities; last columns:"
    text += " success rate\n(%) of the attack made for the network named above on that of the line.\n\n"
    text += text_table(["", "TA", "RA", *(f"for {label}" for label in short.values())], lines)
    for row in (r for r in rows if r.get("kind") == "venn"):
        both, others = 100 - row["accuracy"], (row["target"], row["other"])
        alone = (f"{fooled[row['source'], name] - both:.2f}% {short[name]} alone" for name in others)
        text += f"\nFigure 5: attacked for {short[row['source']]}, {both:.2f}% fool "
        text += f"{' and '.join(short[name] for name in others)}, {', '.join(alone)}"
    return text


if __name__ == "__main__":
    cli(main, Args)
