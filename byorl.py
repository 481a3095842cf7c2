"""Bootstrap Your Own Robust Latents, BYORL (Gowal, Huang, van den Oord, Mann, Kohli: Self-supervised
adversarial robustness for the low-label, high-data regime, ICLR 2021).

BYORL is BYOL on attacked views. No labels are used. An online network (encoder e, projector g, predictor q;
weights theta) predicts the output of a target network (e, g; weights xi) for another view of the same image:

    v, v' = two random augmentations of x;  z' = g_xi(e_xi(v')), without gradient
    delta = argmin over the eps-ball of cos(q(g(e(v + delta))), z')                             (eq. 5)
    minimise 2 - 2 cos(q(g(e(v + delta))), z'), plus the same with v and v' exchanged           (eq. 7)
    xi <- tau xi + (1 - tau) theta

Then a linear head is trained on the frozen encoder with few or many labels: a robust head on attacked images,
a plain head on clean ones. In the paper (Tables 2 and 6) a plain head on BYORL's encoder is nearly as robust.

    python byorl.py --quick --eps 0.5 --norm l2     # digits: BYOL and BYORL, two minutes on two CPU cores
    python byorl.py --eps 0.5 --norm l2             # CIFAR-10: PreAct-ResNet-34 x2, 1000 epochs, then heads
    python byorl.py                                 # the same at 128/255 = 0.502, as the paper has it
    python byorl.py --norm linf --eps 8/255         # Table 3, x2
    python byorl.py --method uat-ft                 # the baseline: pseudo-labels and adversarial training
    python byorl.py --init runs/X/byorl.pt --dataset stl10 --label-fractions 0.01,0.1,1    # Table 1: transfer
    torchrun --nproc-per-node=8 byorl.py --eps 0.5 --norm l2

The paper, CIFAR-10 alone, linf 8/255, robust head on all labels, clean / robust: x1 78.02 / 41.30,
x2 80.80 / 43.24, x4 81.32 / 43.19.

Differs from the paper, whose code is not public:
- Eq. 6 prints ascent on the cosine. Eq. 5 and 7 and the text need descent.
- Under attack BatchNorm uses the statistics of the batch and does not change the running ones.
- An epoch has as many images as the labelled training set, also with --extra-data.
- The encoder's features have 512 * width dimensions; the "2048" of the text fits x4 only.
- LARS (BYOL's code) has no weight decay and no trust ratio for biases and BatchNorm.
- MultiTargeted's 20 restarts are 20 in all (see `suite_attacks`).
- Heads and UAT-FT are trained by PGD-10. The best epoch is selected on 1,024 held-out labelled images. So
  100% of the labels are 48,976.
- The settings of UAT-FT are ours; the paper gives none.
The rest: results/gowal.md.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from common import (
    STATS, CommonArgs, Images, Positive, Run, Share, Shares, Suite, apgd, batches, batchnorm_mode,
    build_model, ce_per_image, cli, count_batches, cuda_graph, distribute, draw, evaluate, join,
    learning_rate, load_checkpoint, load_extra, load_trunk, map_images, pgd, place_model, random_crop_flip,
    random_flip, reading, rebuild, results_table, robust_accuracy, save_image_grid, simclr_augment,
    split_train, start_run, sync_batchnorm, transformed, world,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arch = Literal[
    "preact18", "preact34", "resnet18", "resnet34", "resnet50",
    "vit_b16", "vit_s16", "vit_ti16", "vit_s4", "vit_ti4", "vit_mini4",
]  # fmt: skip


@dataclass
class Args(CommonArgs):
    # data and model
    extra_data: str = ""  # .npz or .npy of more unlabelled images (paper: 500,000), uint8 (N, size, size, 3)
    flip: bool = True  # mirror images at random
    arch: Arch = "preact34"  # encoder (paper: preact34; ImageNet: resnet50)
    width: float = 2.0  # factor on the encoder's channels (paper: 2; with extra images, on ImageNet: 4)
    stem: Literal["cifar", "imagenet"] = "cifar"  # first layer: 3x3; imagenet: 7x7, stride 2, max-pooling
    init: str = ""  # checkpoint of an encoder to train heads on, e.g. runs/X/byorl.pt (no pre-training)
    # pre-training (section 4.1)
    method: Literal["byorl", "uat-ft"] = "byorl"  # byorl, or the baseline (pseudo-labels)
    epochs: Positive = 1000  # epochs of pre-training (paper: 1000; ImageNet: 300)
    warmup_epochs: int = 10  # epochs in which the learning rate rises, before a cosine to 0 (paper: 10)
    batch_size: Positive = 512  # images per step over all GPUs, also for heads (paper: 512; ImageNet: 1024)
    lr: float = 2.0  # highest learning rate of LARS (paper: 2; ImageNet: 1.2)
    weight_decay: float = 5e-4  # weight decay of LARS and of UAT-FT's SGD (paper: 5e-4)
    tau: Share = 0.996  # initial decay of the target's average; rises to 1 (paper: 0.996; ImageNet: 0.999)
    hidden: Positive = 4096  # hidden units of projector and predictor (paper: 4096)
    projection: Positive = 256  # outputs of projector and predictor (paper: 256)
    plain: bool = False  # also pre-train without attack (BYOL), for comparison
    # views
    jitter_strength: float = 0.5  # strength of the colour jitter (paper: 0.5; Figure 5: 0.1 to 0.5)
    blur: Share = 0.0  # probability of blurring a view (paper: 0; ImageNet: not given)
    crop: Share = 0.08  # smallest fraction of an image's area that a view shows (BYOL: 0.08)
    # attack (norm and eps also for classifiers)
    norm: Literal["linf", "l2"] = "l2"  # norm of the attack (paper: both)
    eps: float = 128 / 255  # radius of the attack; images are in [0, 1] (paper: 128/255; linf 8/255); 0: BYOL
    attack: Literal["apgd", "pgd"] = "apgd"  # attack in pre-training: AutoPGD (paper), or PGD (Table 4)
    attack_steps: Positive = 40  # steps of the attack in pre-training (paper: 40; Table 4: 5 to 60)
    step_size: float = 0.0  # step size of PGD in pre-training; 0: 2 eps / steps, for linf at least 2/255
    # heads and UAT-FT
    label_fractions: Shares = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # fractions of the labels to use
    heads: Literal["both", "robust", "plain", "none"] = "both"  # heads to train; none: the encoder only
    probe_epochs: Positive = 50  # epochs per head; halfway the learning rate is divided by 10 (paper: 50)
    probe_lr: float = 2e-3  # learning rate of Adam for heads (paper: 0.002)
    probe_steps: Positive = 10  # steps of PGD in training robust heads and UAT-FT (paper: not given)
    uat_epochs: Positive = 200  # epochs of UAT-FT by SGD, one of warm-up, then a cosine (paper: not given)
    uat_lr: float = 0.2  # highest learning rate of UAT-FT (paper: not given)
    # evaluation
    val_images: Positive = 1024  # training images held out to select each classifier's epoch (paper: 1024)
    eval_attack: Suite = "suite"  # reported attack (paper: suite); suite-fast: a tenth; standard: AutoAttack

    QUICK: ClassVar[dict] = dict(
        # Digits stay 8 x 8: an l2 ball of radius 0.5 is large there. Hence mild augmentation.
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.25, epochs=20, warmup_epochs=2,
        batch_size=64, lr=1.0, attack_steps=3, tau=0.97, hidden=256, projection=64, jitter_strength=0.2,
        crop=0.7, plain=True, label_fractions=(0.1, 1.0), probe_epochs=6, probe_lr=0.05, probe_steps=4,
        val_images=200, eval_attack="pgd20",
    )  # fmt: skip


# ---- the method --------------------------------------------------------------------------------------


def mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """Projector or predictor: (B, n_in) -> (B, n_out)."""
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_out, bias=False)
    )  # fmt: skip


class ByolNetwork(nn.Module):
    """Encoder e, projector g and predictor q; images are (B, 3, S, S) in [0, 1]. The target network has the
    same class; its predictor is unused."""

    def __init__(self, args: Args, device: torch.device):
        super().__init__()
        mean, std = STATS[args.dataset]
        self.encoder = build_model(args.arch, {}, width=args.width, stem=args.stem, mean=mean, std=std)
        place_model(self.encoder, device, args.amp, args.compile)
        self.projector = mlp(self.encoder.trunk.dim, args.hidden, args.projection)
        self.predictor = mlp(args.projection, args.hidden, args.projection)
        self.spec = self.encoder.spec  # for checkpoints
        self.to(device)

    def project(self, x: Tensor) -> Tensor:
        """g(e(x)), the output of the target network: (B, projection)."""
        return self.projector(self.encoder.features(x))

    def predict(self, x: Tensor) -> Tensor:
        """q(g(e(x))): (B, projection)."""
        return self.predictor(self.project(x))

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        """Both predictions in one call, as DistributedDataParallel needs; each view has its own BatchNorm
        statistics."""
        return self.predict(v1), self.predict(v2)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """BYOL's loss per image, 2 - 2 cos (eq. 4 and 7): (B,), in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def attack_view(online: ByolNetwork, v: Tensor, z_other: Tensor, args: Args) -> Tensor:
    """Eq. 5: the view v + delta whose prediction is farthest from z', the target of the other view."""

    def loss(u: Tensor) -> Tensor:
        return distance(online.predict(u), z_other)

    ball = {"norm": args.norm, "eps": args.eps, "steps": args.attack_steps}
    with batchnorm_mode(online, "train"):  # statistics of the batch, as in the update; running ones stay
        if args.attack == "pgd":
            return pgd(loss, v, step_size=args.step_size, **ball)
        return apgd(loss, v, **ball)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as in BYOL's code: weight decay is part of the trust ratio,
    and the learning rate multiplies the momentum instead of being accumulated in it. Biases and BatchNorm
    (vectors) have neither weight decay nor trust ratio: SGD with momentum."""

    def __init__(self, params: Iterator, lr: float, weight_decay: float, momentum: float = 0.9):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=1e-3))

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters. torch._foreach_* takes lists: a few kernels instead of hundreds."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.dim() > 1]  # and the kernels of convolutions
            vectors = [p for p in group["params"] if p.dim() <= 1]
            decayed = torch._foreach_mul(matrices, group["weight_decay"])
            torch._foreach_add_(decayed, [p.grad for p in matrices])
            p_norm, g_norm = (torch.stack(torch._foreach_norm(v)) for v in (matrices, decayed))
            ratio = torch.where((p_norm > 0) & (g_norm > 0), group["trust"] * p_norm / g_norm, 1.0)

            params = [*matrices, *vectors]
            grads = [*torch._foreach_mul(decayed, ratio.unbind()), *(p.grad for p in vectors)]
            if not self.state:  # the first step
                self.state.update({p: {"momentum": torch.zeros_like(p)} for p in params})
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, grads)
            torch._foreach_sub_(params, torch._foreach_mul(momenta, group["lr"]))


def tau_at(start: float, step: int, steps: int) -> float:
    """tau_k = 1 - (1 - tau) (1 + cos(pi k / K)) / 2: from `start` to 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- views -------------------------------------------------------------------------------------------


def crop_stored_images(images: Images, args: Args, seed: int, n: int) -> Images:
    """For a folder: the reading processes make n random crops per image, stacked as (3 n, S, S); an image
    that an epoch has twice gets the same crops. Images in memory are cropped later, on the device."""
    if isinstance(images.pixels, Tensor):
        return images
    from torchvision.transforms import InterpolationMode, v2

    size, cubic = args.image_size, InterpolationMode.BICUBIC
    # Tensors are resized several times faster than Pillow's images
    crop = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(size, (args.crop, 1.0), interpolation=cubic)])
    return transformed(images, partial(_crops, crop, n), seed)


def _crops(crop: nn.Module, n: int, image: Any) -> Tensor:
    return torch.cat([crop(image) for _ in range(n)])


def two_views(x: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Two random augmentations of each image, (B, 3, S, S). x: images, or two crops of each (B, 6, S, S)."""
    cropped = x.shape[1] == 6  # by `crop_stored_images`
    v1, v2 = x.split(3, 1) if cropped else (x, x)
    options = {"strength": args.jitter_strength, "blur": args.blur, "flip": args.flip}
    augment = partial(simclr_augment, crop=0.0 if cropped else args.crop, **options)
    return augment(v1), augment(v2)


# ---- pre-training ------------------------------------------------------------------------------------

# Added to the epoch in random seeds. All classifiers share one, so they see the same batches.
SEED_OFFSET = {"byol": 0, "byorl": 100_000, "classifier": 300_000, "teacher": 400_000}


def pretrain(name: str, run: Run, args: Args, images: Images, epoch_size: int) -> dict:
    """Train an encoder, 'byorl' or without attack 'byol', and return its checkpoint.

    images: the training set and --extra-data; an epoch has `epoch_size` of them. The labels are not used.
    """
    torch.manual_seed(args.seed)
    online, target = ByolNetwork(args, run.device), ByolNetwork(args, run.device).requires_grad_(False)
    target.load_state_dict(online.state_dict())
    opt = LARS(online.parameters(), args.lr, args.weight_decay)
    sync_batchnorm(target)
    perturb = cuda_graph(lambda v, z_other: attack_view(online, v, z_other, args))
    ddp = distribute(online)  # for the update; the attack uses the bare `online`
    theta, xi = list(online.parameters()), list(target.parameters())
    steps_per_epoch = count_batches(epoch_size, args.batch_size)
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch

    for epoch in run.epochs(name, args.epochs, online, opt, seed_offset=SEED_OFFSET[name], target=target):
        crops = crop_stored_images(images, args, run.epoch_seed, n=2)
        first_step = epoch * steps_per_epoch
        for step, (x, _) in enumerate(run.batches(crops, args.batch_size, epoch_size), first_step):
            v1, v2 = two_views(x, args)  # (B, 3, S, S)
            with torch.no_grad():
                z1, z2 = target.project(v1), target.project(v2)  # z', of clean views: (B, projection)
            if name == "byorl":
                v1, v2 = perturb(v1, z2), perturb(v2, z1)  # eq. 5
            p1, p2 = ddp(v1, v2)
            loss = (distance(p1, z2) + distance(p2, z1)).mean()  # eq. 7, the sum of both directions

            opt.param_groups[0]["lr"] = learning_rate(args.lr, step, warmup, total)
            opt.zero_grad()
            loss.backward()
            opt.step()
            tau = tau_at(args.tau, step, total)
            with torch.no_grad():
                torch._foreach_lerp_(xi, theta, 1 - tau)  # xi <- tau xi + (1 - tau) theta
            run.log(loss=loss)

        if epoch + 1 == args.epochs:  # not after the loop: a resumed run may skip it
            state = {"network": online.spec, "model": online.encoder.state_dict(), "stage": name}
            run.save(f"{name}.pt", state | {"epoch": args.epochs, "extra_images": len(images) - epoch_size})
    return run.load(f"{name}.pt", stage=name, network=online.spec)


# ---- with labels: linear heads on a frozen encoder, and UAT-FT ---------------------------------------

PAPER_EPS = {"l2": 128 / 255, "linf": 8 / 255}


def classifier_eps(args: Args) -> float:
    """Radius at which classifiers are trained and evaluated: --eps, or for BYOL (--eps 0) the paper's."""
    return args.eps or PAPER_EPS[args.norm]


def train_classifier(
    name: str, run: Run, args: Args, *,
    encoder: dict | None, images: Images, epoch_size: int, val_set: Images, robust: bool,
) -> dict:  # fmt: skip
    """Train a classifier and return its checkpoint: the epoch of best accuracy on `val_set` (appendix A).

    encoder: checkpoint of a frozen encoder that gets a new linear head; None: train the whole network
    (UAT-FT). robust: train on adversarial images (Madry et al. 2018), and select the epoch under attack. An
    epoch has `epoch_size` of the images.
    """
    file = f"{name.replace(' ', '-')}.pt"
    torch.manual_seed(args.seed)
    heads = {"class": len(val_set.classes)}
    if encoder:  # keeps its mean and standard deviation, also on another data set
        model = build_model(**encoder["network"] | {"heads": heads})
        load_trunk(model.trunk, encoder, args.init or "the encoder")
        model.trunk.requires_grad_(False)
        opt, epochs = torch.optim.Adam(model.heads.parameters(), args.probe_lr), args.probe_epochs
    else:
        mean, std = STATS[args.dataset]
        model = build_model(args.arch, heads, width=args.width, stem=args.stem, mean=mean, std=std)
        sgd = {"momentum": 0.9, "weight_decay": args.weight_decay}
        opt, epochs = torch.optim.SGD(model.parameters(), args.uat_lr, **sgd), args.uat_epochs
    place_model(model, run.device, args.amp, args.compile)
    ddp = distribute(model)
    steps_per_epoch = count_batches(epoch_size, args.batch_size)
    attack = partial(pgd, norm=args.norm, eps=classifier_eps(args), steps=args.probe_steps)

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        with batchnorm_mode(model, "eval"):  # running statistics, as in evaluation
            return attack(lambda z: ce_per_image(model(z), y), x)

    seed_offset = SEED_OFFSET["classifier" if encoder or robust else "teacher"]
    for epoch in run.epochs(name, epochs, model, opt, seed_offset=seed_offset):
        model.train(not encoder)  # a frozen encoder normalises by its running statistics
        crops = crop_stored_images(images, args, run.epoch_seed, n=1)
        first_step = epoch * steps_per_epoch
        for step, (x, y) in enumerate(run.batches(crops, args.batch_size, epoch_size), first_step):
            if isinstance(images.pixels, Tensor):
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
            elif args.flip:
                x = random_flip(x)
            loss = F.cross_entropy(ddp(perturb(x, y) if robust else x), y)

            if encoder:
                opt.param_groups[0]["lr"] = args.probe_lr * (0.1 if epoch >= epochs / 2 else 1.0)
            else:
                total = epochs * steps_per_epoch
                opt.param_groups[0]["lr"] = learning_rate(args.uat_lr, step, steps_per_epoch, total)
            opt.zero_grad()
            loss.backward()
            opt.step()
            run.log(loss=loss)

        held_out = batches(val_set, args.batch_size, run.device, workers=args.workers)
        accuracy = robust_accuracy(model, held_out, perturb if robust else None)
        metric = "val_robust" if robust else "val_clean"
        run.keep_best(file, model, accuracy, **{metric: accuracy})
    return run.load(file, stage=name, network=model.spec)


def uat_ft(
    name: str, run: Run, args: Args, images: Images, labelled: Images, val_set: Images, epoch_size: int
) -> dict:
    """UAT-FT (Uesato et al. 2019; section 4.1, Baseline): a teacher is trained without attack on the labelled
    images and labels all others; then a network of the same kind is trained adversarially on all images.

    images: the training set, then --extra-data. With all labels and no extra images this is adversarial
    training. Returns the checkpoint.
    """
    options = {"encoder": None, "epoch_size": epoch_size, "val_set": val_set}
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[torch.cat([labelled.index, val_set.index])] = False
    unlabelled = images.subset(rest.nonzero()[:, 0])
    labelled = replace(images, index=labelled.index)  # now a subset of all images
    if len(unlabelled):
        teacher = train_classifier(f"{name} teacher", run, args, images=labelled, robust=False, **options)
        labelled = pseudo_label(run, args, teacher, labelled, unlabelled)
    state = train_classifier(name, run, args, images=labelled, robust=True, **options)
    state["extra_images"] = len(images) - epoch_size  # for `encoder_name`
    run.save(f"{name.replace(' ', '-')}.pt", state)
    return state


def pseudo_label(run: Run, args: Args, teacher: dict, labelled: Images, unlabelled: Images) -> Images:
    """The images of both, subsets of one set; the unlabelled ones get the teacher's most likely class."""
    model = place_model(rebuild(teacher, teacher["stage"]), run.device, "off").eval()
    labels = unlabelled.labels.clone()
    predicted = map_images(lambda x: model(x).argmax(1), unlabelled, run, args.batch_size)
    labels[unlabelled.index] = predicted.cpu()
    return replace(unlabelled, labels=labels, index=torch.cat([labelled.index, unlabelled.index]))


# ---- Figure 1 ----------------------------------------------------------------------------------------


def retrieve(
    run: Run, args: Args, encoders: dict[str, dict], test_set: Images, queries: int = 50, nearest: int = 8
) -> None:
    """Figure 1: the test images whose features have the largest cosines with those of a query, before and
    after an attack (AutoPGD-40) that moves the query's features towards an image of another class.

    Writes retrieval.png for one query; prints how many neighbours of `queries` queries have their class.
    """
    test_set = draw(test_set, len(test_set), seed=0)  # folders are sorted by class
    labels, n = test_set.labels[test_set.index], min(queries, len(test_set))
    y = labels[:n]
    others = (y[:, None] != y[None]).float().argmax(1)  # for each query the first image of another class
    shown = int((y == y.min()).float().argmax())  # CIFAR-10's first class is the airplane, as in the paper
    x = map_images(lambda x: x, test_set.subset(torch.arange(n)), run, args.batch_size)
    pictures = {}
    for name, state in encoders.items():
        model = place_model(rebuild(state, name), run.device, args.amp).eval()
        gallery = F.normalize(map_images(model.features, test_set, run, args.batch_size))  # (N, dim)
        towards, generator = gallery[others], torch.Generator(x.device).manual_seed(args.seed)
        x_adv = apgd(
            lambda z: F.cosine_similarity(model.features(z), towards), x,
            norm=args.norm, eps=classifier_eps(args), steps=40, generator=generator,
        )  # fmt: skip
        for how, query in ("clean", x), ("attacked", x_adv):
            with torch.no_grad():
                cosines = (F.normalize(model.features(query)) @ gallery.T).cpu()  # (n, N)
            steered = cosines[range(n), others].mean()
            cosines[range(n), range(n)] = -1  # not the query itself
            ranked = cosines.topk(min(nearest, len(test_set) - 1)).indices
            neighbours = map_images(lambda x: x, test_set.subset(ranked[shown]), run, args.batch_size)
            pictures[f"{name}, {how}"] = torch.cat([query[shown : shown + 1], neighbours])
            correct = 100 * (labels[ranked] == y[:, None]).float().mean()
            run.say(
                f"{name}, {how} queries: {correct:.0f}% of the {ranked.shape[1]} nearest images have the "
                f"query's class, cosine with the image of another class {steered:.2f}"
            )
    if world()[0] == 0:
        save_image_grid(run.folder / "retrieval.png", pictures)


# ---- the run -----------------------------------------------------------------------------------------

# With --init these flags are the checkpoint's: they tell how its encoder was trained.
PRETRAINING = (
    "epochs", "warmup_epochs", "lr", "weight_decay", "tau", "hidden", "projection", "attack", "attack_steps",
    "step_size", "jitter_strength", "blur", "crop", "uat_epochs", "uat_lr",
)  # fmt: skip


def main(args: Args) -> dict:
    """Pre-train, train the heads, evaluate them, print the table; returns what results.json holds."""
    start = None
    if args.init:
        start = load_checkpoint(args.init)
        with reading(args.init):
            # Raises UserError if the checkpoint has no encoder
            load_trunk(build_model(**start["network"] | {"heads": {}}).trunk, start, args.init)
            saved = start.get("args", {})
            flags = {flag: start["network"][flag] for flag in ("arch", "width", "stem")}
            args = replace(args, **flags | {flag: saved[flag] for flag in PRETRAINING if flag in saved})
    run = start_run(args, f"init-{args.dataset}" if start else "" if args.method == "byorl" else args.method)
    if start:
        how = f"{saved.get('dataset')} with {saved.get('norm')} eps {saved.get('eps')}"
        run.say(f"{args.init}: trained on {how}")
    results = run.finished(table) or train_and_evaluate(run, args, start)
    run.say(table(results, args) + f"\n\nThe checkpoints are in {run.folder}.")
    return results


def train_and_evaluate(run: Run, args: Args, start: dict | None) -> dict:
    """Train the encoders (or take the checkpoint `start`), then train and evaluate the classifiers; returns
    what results.json holds."""
    train_set, test_set = run.load_data(stream=not args.extra_data)
    images = train_set
    if args.extra_data:
        images = join(train_set, load_extra(args.extra_data, args.image_size, run.device))
    split = partial(split_train, train_set, val_fraction=args.val_images, seed=args.seed)
    # {label fraction: (labelled images, validation images)}; larger fractions contain the smaller ones
    splits = {fraction: split(label_fraction=fraction) for fraction in args.label_fractions}

    encoders = {}
    if start:
        encoders[encoder_name(start, args)] = start
    elif args.method == "byorl":
        names = ["byol"] if args.plain or args.eps == 0 else []
        names += ["byorl"] if args.eps > 0 else []
        for name in names:
            state = pretrain(name, run, args, images, len(train_set))
            encoders[encoder_name(state, args)] = state
    if encoders:
        retrieve(run, args, encoders, test_set)

    rows, eps = run.rows(), classifier_eps(args)

    def evaluate_once(name: str, state: dict, **columns: Any) -> None:
        if all(row["name"] != name for row in rows):  # else a resumed run has them already
            picture_eps = 0.0 if columns["head"] == "plain" else eps
            new_rows = evaluate(run, name, state, test_set, [0, eps], picture_eps=picture_eps)
            rows.extend(row | columns for row in new_rows)
            run.keep_rows(rows)

    heads = {"both": ("robust", "plain"), "robust": ("robust",), "plain": ("plain",), "none": ()}[args.heads]
    if not encoders:  # --method uat-ft
        for fraction, (labelled, val_set) in splits.items():
            name = f"uat-ft {100 * fraction:g}%"
            state = uat_ft(name, run, args, images, labelled, val_set, len(train_set))
            columns = {"encoder": "uat-ft", "head": "", "label_fraction": fraction}
            evaluate_once(encoder_name(state, args), state, **columns)
    for encoder, state in encoders.items():
        for fraction, (labelled, val_set) in splits.items():
            data = {"images": labelled, "epoch_size": len(labelled), "val_set": val_set}
            for head in heads:
                name = f"{encoder} {head} {100 * fraction:g}%"
                best = train_classifier(name, run, args, encoder=state, robust=head == "robust", **data)
                evaluate_once(name, best, encoder=encoder, head=head, label_fraction=fraction)
    return run.finish(rows)


def encoder_name(state: dict, args: Args) -> str:
    """The encoder's name in the table, such as 'cifar10 byorl +500000': [data set, if another] [init, if of
    other flags or another script] stage ('byorl', 'byol', 'uat-ft 100%') [+extra images]."""
    saved, stage = state.get("args", {}), str(state.get("stage", ""))
    flags = ["batch_size", "flip", "image_size"]
    if stage.startswith("uat-ft"):
        flags += ["probe_steps", "val_images"]
    same = state.get("script") == "byorl" and all(saved.get(flag) == getattr(args, flag) for flag in flags)
    if same and stage != "byol":  # 0.5 passes for 128/255
        same = saved.get("norm") == args.norm and math.isclose(saved.get("eps", 0), args.eps, rel_tol=0.01)
    name = stage if same else f"init {stage}".strip()
    name = f"{saved['dataset']} {name}" if saved.get("dataset", args.dataset) != args.dataset else name
    return f"{name} +{state['extra_images']}" if state.get("extra_images") else name


def table(results: dict, args: Args) -> str:
    """What results.json holds as text: clean and robust accuracy of each classifier ('' if there is none)."""
    reported = "best validation accuracy (robust heads: under attack)"
    return results_table(results, args, reported) if results["rows"] else ""


if __name__ == "__main__":
    cli(main, Args)
