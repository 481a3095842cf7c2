"""Bootstrap Your Own Robust Latents (BYORL; Gowal, Huang, van den Oord, Mann, Kohli: Self-supervised adversarial robustness for the
low-label, high-data regime, ICLR 2021).

BYOL without labels, on views that are attacked. An online network (encoder e, projector g, predictor q; weights theta) predicts
what a slowly moving copy of itself (e, g; weights xi) makes of another, clean view of the same image:

    v, v' = two random augmentations of x;   z' = g_xi(e_xi(v')), no gradient
    delta = argmin over the eps-ball of cos(q(g(e(v + delta))), z')                      (eq. 5; the attack, by AutoPGD)
    minimise 2 - 2 cos(q(g(e(v + delta))), z'), and the same with v and v' exchanged      (eq. 7)
    xi <- tau xi + (1 - tau) theta

Then e is frozen and a linear classifier is trained on it with few or many labels: on attacked images (robust head) or on clean
ones (plain head). The paper's surprise: on BYORL's representation the plain head is nearly as robust.

    python byorl.py --quick --eps 0.5 --norm l2     # digits: BYOL and BYORL, about a minute on two CPU cores
    python byorl.py --eps 0.5 --norm l2             # CIFAR-10, 1000 epochs, PreAct-ResNet-34 x2, heads for 1% to 100% of the labels
                                                    # (the paper's radius is 128/255, the default)
    python byorl.py --norm linf --eps 8/255         # Table 3, row x2
    python byorl.py --stage probe --init runs/X/byorl.pt --label-fractions 0.01
    torchrun --nproc-per-node=8 byorl.py --eps 0.5 --norm l2

The paper: CIFAR-10 alone, linf 8/255, robust head on all labels, clean / robust: x1 78.02 / 41.30, x2 80.80 / 43.24, x4 81.32 / 43.19.

Differs from the paper, whose code is not public, or is our choice where it is silent:
- eq. 6 prints ascent on the cosine; eqs. 5 and 7 and the text need descent;
- the attack sees batch statistics in BatchNorm and leaves the running ones alone; the target network uses those of its own batch;
- LARS and the views as in BYOL's code, but SimCLR's colour jitter (0.4, 0.4, 0.4, 0.1), of which "strength 0.5" is the vocabulary;
- features have 512 * width dimensions (basic blocks); the "2048" of the text fits x4 only;
- --eps 0 is BYOL, its heads trained and judged at l2 128/255 or linf 8/255. Heads: shares are of the labels that are left
  when those for validation are held out (1%: 490 images, not 500), batch size that of pre-training, crop and flip,
  robust ones with PGD-10, best epoch on the 1,024 held-out images by robust (robust head) or clean accuracy (plain head).
"""
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    STATS, Epoch, Images, Network, Run, UserError, apgd, batches, batchnorm_mode, build_model, build_trunk, ce_per_image, cli,
    count_batches, distribute, eps_name, evaluate, load_checkpoint, load_data, load_trunk, load_weights, pgd_attack, place_model,
    print_table, radii, random_crop_flip, robust_accuracy, seed_step, simclr_augment, split_train, start_run,
    sync_batchnorm, world, write_results,
)  # fmt: skip


@dataclass
class Args:
    # run
    stage: Literal["all", "pretrain", "probe"] = "all"  # pretrain: the encoder; probe: heads on it and their evaluation
    seed: int = 0  # seed of the split, the weights, the order of images and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk
    sync_bn: bool = True  # BatchNorm over the images of all GPUs; off: over each GPU's own, as DataParallel has it
    workers: int = 2  # processes that decode images (folder)
    out: str = ""  # folder of the run; empty: runs/<script>-<norm>-<eps>-s<seed>
    resume: bool = False  # go on with the run in --out (or the newest such run), or start it
    quick: bool = False  # a miniature on the bundled digits: every stage in about a minute on two CPU cores
    # data and model
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # folder: --data-dir holds train/ and test/ or val/
    data_dir: str = "data"  # where the data are, or are downloaded to
    data_mirror: str = ""  # URL of a folder that holds the official archive, in place of the slow official host
    image_size: int = 32  # side in pixels; other images are resized
    flip: bool = True  # mirror images at random in training
    arch: Literal["preact18", "preact34", "resnet18", "resnet34", "resnet50"] = "preact34"  # encoder (paper: preact34; ImageNet: resnet50)
    width: float = 2.0  # multiplies the number of channels (paper: 2 on CIFAR-10, 4 with extra data and on ImageNet)
    stem: Literal["cifar", "imagenet"] = "cifar"  # imagenet: 7x7 stride 2 and max-pooling, for large images
    # optimiser (LARS)
    epochs: int = 1000  # epochs of pre-training
    warmup_epochs: int = 10  # epochs in which the learning rate rises from 0; then half a cosine back to 0
    batch_size: int = 512  # images per step over all GPUs
    lr: float = 2.0  # highest learning rate (ImageNet: 1.2)
    weight_decay: float = 5e-4  # not on biases and BatchNorm
    # attack in pre-training
    norm: Literal["linf", "l2"] = "l2"  # norm of the ball that the attack stays in
    eps: float = 128 / 255  # radius of that ball, in [0, 1] pixel units (paper: l2 128/255, linf 8/255); 0: BYOL
    attack: Literal["apgd", "pgd"] = "apgd"  # AutoPGD, or PGD (Table 4)
    attack_steps: int = 40  # of it
    apgd_checkpoints: Literal["paper", "code"] = "paper"  # where AutoPGD may halve its step, see common.apgd_checkpoints
    # method
    tau: float = 0.996  # of the target network at the start; 1 at the end (ImageNet: 0.999)
    hidden: int = 4096  # hidden units of projector and predictor
    projection: int = 256  # their outputs
    jitter_strength: float = 0.5  # of the colour jitter (Figure 5)
    blur: float = 0.0  # probability of blur in a view (for ImageNet)
    crop: float = 0.08  # smallest share of the area that a view shows
    plain: bool = False  # also pre-train without attack (BYOL), for comparison
    init: str = ""  # with --stage probe: the encoder to take, e.g. another run's byorl.pt
    # heads
    label_fractions: str = "0.01,0.02,0.05,0.1,0.2,0.5,1"  # shares of the training labels, a head for each
    heads: Literal["both", "robust", "plain"] = "both"  # robust: trained on attacked images
    probe_epochs: int = 50  # Adam; the learning rate is divided by 10 after half of them
    probe_lr: float = 2e-3  # of Adam
    probe_steps: int = 10  # PGD steps when training a robust head
    # evaluation
    val_images: int = 1024  # training images held out to choose the epoch of each head
    eval_attack: Literal["pgd20", "suite", "suite-fast"] = "suite"  # pgd20: PGD with --eval-steps; suite: AutoPGD, MultiTargeted and Square in turn on what still stands; suite-fast: a tenth of it
    eval_steps: int = 20  # PGD steps
    eval_examples: int = 0  # test images to attack, drawn once and for all; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32

    # Digits of 8 x 8 pixels, as many as they have: the ball of radius 0.5 is large on them.
    QUICK: ClassVar[dict] = dict(
        dataset="digits", image_size=8, flip=False, arch="preact18", width=0.25, epochs=12, warmup_epochs=2, batch_size=64, lr=1.0,
        attack_steps=4, tau=0.97, hidden=256, projection=64, crop=0.5, plain=True, label_fractions="0.1,1", heads="both",
        probe_epochs=20, probe_lr=0.05, probe_steps=4, val_images=200, eval_attack="pgd20",
    )  # fmt: skip


# Table 3: (clean, robust) by width; CIFAR-10 alone, linf 8/255, robust head on all labels.
PAPER = {1.0: (78.02, 41.30), 2.0: (80.80, 43.24), 4.0: (81.32, 43.19)}


# ---- the method ----------------------------------------------------------------------------------------------------


def mlp(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    """Projector and predictor: (B, n_in) -> (B, n_out)."""
    return nn.Sequential(nn.Linear(n_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, n_out, bias=False))


class Online(nn.Module):
    """Encoder, projector and predictor; images (B, 3, H, W) in [0, 1] -> predictions (B, n_out)."""

    def __init__(self, encoder: Network, hidden: int, n_out: int):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.trunk.dim, hidden, n_out)
        self.predictor = mlp(n_out, hidden, n_out)

    def project(self, x: Tensor) -> Tensor:
        """The target network's output: (B, n_out)."""
        return self.projector(self.encoder.features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.predictor(self.project(x))


class BothViews(nn.Module):
    """The two views one after the other, each with its own BatchNorm statistics, in one call (as DistributedDataParallel wants)."""

    def __init__(self, online: Online):
        super().__init__()
        self.online = online

    def forward(self, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
        return self.online(v1), self.online(v2)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos, (B,), in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1)


def attack_view(online: Online, v: Tensor, target: Tensor, args: Args) -> Tensor:
    """eq. 5: the view v + delta whose prediction is farthest from `target`, the other view's projection."""
    if args.eps == 0:
        return v
    generator = torch.Generator(v.device).manual_seed(torch.randint(2**31, ()).item())

    def loss(z: Tensor) -> Tensor:
        return distance(online(z), target)

    with batchnorm_mode(online, "train"):  # batch statistics; the running ones stay as they are
        if args.attack == "pgd":
            return pgd_attack(args.norm, args.eps, args.attack_steps, generator=generator)(loss, v)
        return apgd(
            loss, v, eps=args.eps, norm=args.norm, steps=args.attack_steps, checkpoints=args.apgd_checkpoints, generator=generator
        )


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al. 2017) as in BYOL's code: weight decay inside the trust ratio, the rate outside the
    momentum. Biases and BatchNorm (vectors) get neither decay nor trust ratio: plain SGD with momentum."""

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


def learning_rate(args: Args, step: int, steps_per_epoch: int) -> float:
    """Linear from 0 to --lr during the warm-up, then half a cosine to 0."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * step / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def target_rate(args: Args, step: int, steps: int) -> float:
    """tau: 1 - (1 - tau_0) (1 + cos(pi k / K)) / 2, from --tau to 1."""
    return 1 - (1 - args.tau) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- pre-training --------------------------------------------------------------------------------------------------


def pretrain(name: str, run: Run, args: Args, train_set: Images) -> str:
    """Train one encoder ('byol': without attack, 'byorl') and return the name of its checkpoint in the run's folder."""
    stage_index = ["byol", "byorl"].index(name)
    checkpoint = f"{name}.pt"
    state = run.load("last.pt", "optimizer", "stage_index", "history", "target")
    if state is not None and state["stage_index"] > stage_index:
        return checkpoint  # done before the run was resumed
    torch.manual_seed(args.seed)
    mean, std = STATS[args.dataset]
    encoder = build_model(args.arch, {}, width=args.width, stem=args.stem, mean=mean, std=std)
    place_model(encoder, run.device, args.amp, args.compile)
    online = Online(encoder, args.hidden, args.projection).to(run.device)
    target = copy.deepcopy(online).requires_grad_(False)  # its predictor is not used
    opt = LARS(online.parameters(), args.lr, args.weight_decay)
    if state is None or state["stage_index"] < stage_index:  # the stage begins
        before = state or {"history": [], "seconds": 0.0}
        state = {"epoch": 0, "step": 0, "sums": {}} | {k: before[k] for k in ("history", "seconds")}
    else:
        load_weights(online, state["model"], run.folder / "last.pt")
        load_weights(target, state["target"], run.folder / "last.pt")
        opt.load_state_dict(state["optimizer"])
    history, began = state["history"], time.perf_counter() - state["seconds"]
    if args.sync_bn:
        sync_batchnorm(target)
    ddp = distribute(BothViews(online), args.sync_bn)
    steps = count_batches(len(train_set), args.batch_size)

    def save(epoch: int, step: int = 0, sums: dict | None = None) -> None:
        run.save("last.pt", {
            "network": encoder.spec, "model": online.state_dict(), "target": target.state_dict(), "optimizer": opt.state_dict(),
            "args": vars(args), "stage_index": stage_index, "epoch": epoch, "step": step, "sums": sums or {}, "history": history,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip

    for epoch in range(state["epoch"], args.epochs):
        epoch_id = stage_index * 100_000 + epoch
        skip, sums = (state["step"], state["sums"]) if epoch == state["epoch"] else (0, {})
        stream = batches(
            train_set, args.batch_size, run.device, shuffle=args.seed * 1_000_003 + epoch_id, skip=skip, workers=args.workers
        )
        online.train(), target.train()
        with Epoch(epoch, len(train_set), steps, run.device, skip, sums) as log:
            for x, _ in stream:  # (B, 3, S, S); the labels are not used
                seed_step(args.seed, epoch_id, log.step)
                k = epoch * steps + log.step
                v1, v2 = (simclr_augment(x, args.jitter_strength, args.blur, args.crop, args.flip) for _ in range(2))
                with torch.no_grad():  # clean views, fixed during the attack
                    z1, z2 = target.project(v1), target.project(v2)
                if name == "byorl":
                    v1, v2 = attack_view(online, v1, z2, args), attack_view(online, v2, z1, args)
                p1, p2 = ddp(v1, v2)
                loss = (distance(p1, z2) + distance(p2, z1)).mean()  # eq. 7, both directions
                for group in opt.param_groups:
                    group["lr"] = learning_rate(args, k, steps)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                tau = target_rate(args, k, args.epochs * steps)
                with torch.no_grad():
                    for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                        xi.lerp_(theta, 1 - tau)
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
        if epoch + 1 == args.epochs:
            run.save(checkpoint, {
                "network": encoder.spec, "model": encoder.state_dict(), "args": vars(args), "stage": "pretrain", "epoch": epoch + 1,
            })  # fmt: skip
        save(epoch + 1)
    return checkpoint


# ---- heads ---------------------------------------------------------------------------------------------------------


def head_eps(args: Args) -> float:
    """Radius at which heads are trained and judged: --eps, or the paper's for the norm if that is 0 (BYOL)."""
    return args.eps or {"l2": 128 / 255, "linf": 8 / 255}[args.norm]


def probe(name: str, run: Run, args: Args, encoder: dict, train_set: Images, val_set: Images, robust: bool) -> str:
    """Train a linear classifier on the frozen encoder; returns the name of its checkpoint, that of the best epoch."""
    checkpoint = f"{name.replace(' ', '-')}.pt"
    if run.load(checkpoint) is not None:
        return checkpoint  # done before the run was resumed
    torch.manual_seed(args.seed)
    spec = encoder["network"] | {"heads": {"class": len(train_set.classes)}}
    model = build_model(**spec)
    load_trunk(model.trunk, encoder, name)
    place_model(model, run.device, args.amp).eval()  # running statistics, also in training the head
    model.trunk.requires_grad_(False)
    opt = torch.optim.Adam(model.heads.parameters(), args.probe_lr)
    ddp = distribute(model, sync_bn=False)
    eps = head_eps(args)
    attack = pgd_attack(args.norm, eps, args.probe_steps)
    steps = count_batches(len(train_set), args.batch_size)
    best, best_state = -1.0, None
    for epoch in range(args.probe_epochs):
        for group in opt.param_groups:
            group["lr"] = args.probe_lr * (0.1 if epoch >= args.probe_epochs / 2 else 1.0)
        stream = batches(train_set, args.batch_size, run.device, shuffle=args.seed * 1_000_003 + epoch, workers=args.workers)
        with Epoch(epoch, len(train_set), steps, run.device) as log:
            for x, y in stream:
                seed_step(args.seed, 300_000 + epoch, log.step)
                x = random_crop_flip(x, pad=args.image_size // 8, flip=args.flip)
                if robust:
                    x = attack(lambda z: ce_per_image(model(z), y), x)
                loss = F.cross_entropy(ddp(x), y)
                opt.zero_grad(set_to_none=True)
                loss.backward()
                opt.step()
                log.update(len(y), loss=loss)
                if log.interrupted():
                    raise KeyboardInterrupt("this head begins again")
        score = robust_accuracy(
            model, batches(val_set, args.batch_size, run.device, workers=args.workers),
            (lambda x, y: attack(lambda z: ce_per_image(model(z), y), x)) if robust else None,
        )  # fmt: skip
        if score > best:
            best = score
            best_state = {k: v.clone() for k, v in model.state_dict().items()}, epoch + 1
    run.save(checkpoint, {
        "network": model.spec, "model": best_state[0], "args": vars(args) | {"eps": eps}, "stage": "train", "epoch": best_state[1],
    })  # fmt: skip
    return checkpoint


# ---- the run -------------------------------------------------------------------------------------------------------


def show(results: dict, folder: str) -> None:
    """Print a line per head: clean and robust accuracy, and the paper's where the setting is its own."""
    args, rows = results["args"], results["rows"]
    eps = max(row["eps"] for row in rows)
    attack = next(row["attack"] for row in rows if row["eps"] == eps)
    print(
        f"\n{args['dataset']}, {args['arch']} x{args['width']:g}; linear heads, accuracy (%) on {rows[0]['examples']:,} test images, clean "
        f"and under {attack.upper()} ({args['norm']} eps {eps_name(eps)}). {results['seconds']:.0f} s in all.\n"
    )
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        clean, robust = [row for row in rows if row["name"] == name]
        table.append([name, f"{clean['accuracy']:.2f}", f"{robust['accuracy']:.2f}"])
        if clean["paper"] is not None:
            table.append(["  the paper", f"{clean['paper']:.2f}", f"{robust['paper']:.2f}"])
    print_table(["encoder, head, share of labels", "clean", "robust"], table)
    print(f"\nresults.json and the checkpoints are in {folder}", flush=True)


def main(args: Args) -> dict:
    """Pre-train, train the heads, evaluate them, print the table; returns what results.json holds."""
    run = start_run(args, "byorl")
    fractions = radii(args.label_fractions)
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise UserError(f"--label-fractions {args.label_fractions}: give shares such as 0.01,0.1,1.")
    if (args.stage == "probe") != bool(args.init):
        raise UserError("--stage probe needs an encoder (--init runs/.../byorl.pt), and --init is for --stage probe only.")
    results = run.finished() or train_and_evaluate(run, args, fractions)
    if results and world()[0] == 0:
        show(results, str(run.folder))
    return results


def train_and_evaluate(run: Run, args: Args, fractions: list[float]) -> dict:
    """All stages that --stage asks for."""
    encoders = {}
    if args.init:
        encoders["init"] = load_checkpoint(args.init)
        load_trunk(build_trunk(args.arch, args.width, args.stem), encoders["init"], args.init)  # does it fit?
    train_set, test_set = load_data(
        args.dataset, args.data_dir, run.device, image_size=args.image_size, data_mirror=args.data_mirror, workers=args.workers
    )
    if args.eval_examples:
        order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))
        test_set = test_set.subset(order[: args.eval_examples])
    for fraction in fractions:
        split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)  # raises if nothing is left
    for encoder in encoders.values():
        differs = [k for k in ("norm", "eps", "dataset", "image_size") if encoder.get("args", {}).get(k) != getattr(args, k)]
        if differs:
            run.say(f"note: --init was pre-trained with another --{', --'.join(differs)}: {[encoder.get('args', {}).get(k) for k in differs]}.")
    run.begin()
    if not args.init:
        for name in ["byol"] * (args.plain or args.eps == 0) + ["byorl"] * (args.eps > 0):
            encoders[name] = run.load(pretrain(name, run, args, train_set))
    if args.stage == "pretrain":
        run.say(f"encoders: {', '.join(str(run.folder / f'{name}.pt') for name in encoders)}; heads: --stage probe --init ...")
        return {}
    done = run.read("heads.json") or {"rows": [], "seconds": 0.0}  # heads are judged one by one: none is judged twice
    began, rows = time.perf_counter() - done["seconds"], done["rows"]
    for name, encoder in encoders.items():
        for fraction in fractions:  # nested: a larger share holds the smaller ones, drawn uniformly, not per class
            some, val_set = split_train(train_set, val_fraction=args.val_images, seed=args.seed, label_fraction=fraction)
            for head in ("robust", "plain") if args.heads == "both" else (args.heads,):
                label = f"{name} {head} {100 * fraction:g}%"
                if any(row["name"] == label for row in rows):
                    continue
                state = run.load(probe(label, run, args, encoder, some, val_set, head == "robust"))
                eps = state["args"]["eps"]
                known = PAPER.get(args.width, (None, None)) if is_papers(args, name, head, fraction) else (None, None)
                judged = evaluate(run, label, state, test_set, [0, eps], {}, train_eps=eps)
                for row, paper in zip(judged, known, strict=True):
                    rows.append(row | {"paper": paper, "label_fraction": fraction, "head": head, "encoder": name})
                seconds = time.perf_counter() - began
                run.write("heads.json", json.dumps({"script": "byorl", "rows": rows, "seconds": seconds}, indent=1))
                run.say(f"{label}: clean {rows[-2]['accuracy']}, robust {rows[-1]['accuracy']}")
    trained = run.load("last.pt")
    seconds = (trained["seconds"] if trained else 0) + time.perf_counter() - began
    return write_results(run, rows, seconds)


def is_papers(args: Args, encoder: str, head: str, fraction: float) -> bool:
    """Is this head one of Table 3?"""
    wanted = dict(
        dataset="cifar10", image_size=32, arch="preact34", stem="cifar", epochs=1000, batch_size=512, lr=2.0, norm="linf", eps=8 / 255,
        attack="apgd", attack_steps=40, apgd_checkpoints="paper", weight_decay=5e-4, warmup_epochs=10, tau=0.996, hidden=4096,
        projection=256, jitter_strength=0.5, blur=0.0, crop=0.08, flip=True, val_images=1024, probe_epochs=50, probe_lr=2e-3,
        eval_attack="suite", eval_examples=0, eval_amp=False,
    )  # fmt: skip
    return (encoder, head, fraction) == ("byorl", "robust", 1) and all(getattr(args, k) == v for k, v in wanted.items())


if __name__ == "__main__":
    cli(main, Args)
