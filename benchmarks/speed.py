"""Images per second, peak memory and share of the device's peak of a training step, beside the plain loop.

    python benchmarks/speed.py                        # all four
    python benchmarks/speed.py at --batch-size 128    # one of: at byorl mae reverse
    python benchmarks/speed.py --json speed.json      # also write the rows to a file

at       adversarial training of rotation_at.py (T0): ResNet-18, 32 pixels, PGD-10, linf 8/255
byorl    BYORL of byorl.py: PreAct-ResNet-18, 32 pixels, AutoPGD-40 on both views, l2 128/255
mae      A-MAE of adv_mae.py: ViT-B/16, 224 pixels, PGD-2, l2 0.5
reverse  an iteration of mtl_reverse.py: WideResNet-28-10, 4 views, rotation, inpainting at 128 pixels

`plain` is the loop as one would first write it: float32 in NCHW, with loss.backward() inside the attack,
which also makes gradients for all weights. `library` (at) makes gradients for the images only, as attack
libraries do. `ours` is the script's own step in mixed precision. On a GPU, `graph` replays the attack as one
CUDA graph: what it gains is the time that the GPU waits for launches. All run in turns on one batch; the
median counts.

PyTorch counts the FLOPs of a step; the share of the peak is FLOPs per second over those of a large matrix
product in the same precision. folder.py times the reading of images.
"""
import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adv_mae  # noqa: E402
import byorl  # noqa: E402
import mtl_reverse  # noqa: E402
from common import (  # noqa: E402
    STATS, Network, amp_dtype, apgd_checkpoints, batchnorm_mode, build_model, ce_per_image,
    choose_device, cuda_graph, device_name, image_uniform, l2_norm, patchify, pgd, place_model,
    simclr_augment, text_table,
)  # fmt: skip

Steps = dict[str, Callable[[], Any]]


class Plain(nn.Module):
    """A Network as one would first write it: float32, NCHW."""

    def __init__(self, net: Network):
        super().__init__()
        self.net, self.trunk, self.mean, self.std = net, net.trunk, net.mean, net.std

    def features(self, x: Tensor) -> Tensor:
        return self.trunk((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.net.heads.values()))(self.features(x))


def update(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


# ---- adversarial training ----------------------------------------------------------------------------


def at(batch: int, device: torch.device, amp: str, compile: bool) -> tuple[Steps, float]:
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    eps, alpha, steps = 8 / 255, 2 / 255, 10

    def make(plain: bool, amp: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = build_model("resnet18", {"class": 10}, mean=STATS["cifar10"][0], std=STATS["cifar10"][1])
        model = Plain(net.to(device)) if plain else place_model(net, device, amp, compile)
        return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    def plain(model: nn.Module, opt: torch.optim.Optimizer, weights_too: bool) -> None:
        model.eval()
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = F.cross_entropy(model(x_adv), y)
            if weights_too:
                loss.backward()
                grad = x_adv.grad
            else:
                (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + alpha * grad.sign()
            x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)
        model.train()
        update(opt, F.cross_entropy(model(x_adv), y))

    def ours(model: nn.Module, opt: torch.optim.Optimizer, perturb: Callable) -> None:
        model.train()
        with batchnorm_mode(model, "eval"):
            x_adv = perturb(x, y)
        update(opt, F.cross_entropy(model(x_adv), y))

    def attack(model: nn.Module, record: bool) -> Callable:
        ball = dict(eps=eps, steps=steps, step_size=alpha)
        eager = lambda x, y: pgd(lambda z: ce_per_image(model(z), y), x, **ball)  # noqa: E731
        return cuda_graph(eager) if record else eager

    first, mixed, exact = make(True, "off"), make(False, amp), make(False, "off")
    eager, graph, slow = attack(mixed[0], False), attack(mixed[0], True), attack(exact[0], False)
    return {
        "plain": lambda: plain(*first, True), "library": lambda: plain(*first, False),
        "ours": lambda: ours(*mixed, eager), "ours, float32": lambda: ours(*exact, slow),
        "ours, graph": lambda: ours(*mixed, graph),
    }, batch  # fmt: skip


# ---- BYORL -------------------------------------------------------------------------------------------


def plain_apgd(loss_of: Callable, x: Tensor, eps: float, steps: int) -> Tensor:
    """Croce and Hein 2020, Algorithm 1, l2, line by line; a pass of its own shows whether the loss rose."""

    def project(z: Tensor) -> Tensor:
        delta = z - x
        return (x + delta * (eps / l2_norm(delta)).clamp(max=1)).clamp(0, 1)

    def climb(z: Tensor) -> Tensor:
        at = z.clone().requires_grad_(True)
        loss_of(at).sum().backward()
        return project(z + step * at.grad / l2_norm(at.grad))

    def loss_at(z: Tensor) -> Tensor:
        with torch.no_grad():
            return loss_of(z)

    def wide(mask: Tensor) -> Tensor:
        return mask.view(-1, 1, 1, 1)

    noise = torch.randn_like(x)
    step = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    before = (x + eps * noise / l2_norm(noise)).clamp(0, 1)
    now = climb(before)
    f_before, f_now = loss_at(before), loss_at(now)
    best, f_best = torch.where(wide(f_now > f_before), now, before), torch.maximum(f_before, f_now)
    rises, halved = (f_now > f_before).float(), torch.zeros_like(f_now, dtype=torch.bool)
    f_then, then = f_before, 0
    for k in range(1, steps):
        z = climb(now)
        before, now = now, project(now + 0.75 * (z - now) + 0.25 * (now - before))
        f_new = loss_at(now)
        rises += f_new > f_now
        best = torch.where(wide(f_new > f_best), now, best)
        f_best, f_now = torch.maximum(f_best, f_new), f_new
        if k + 1 in apgd_checkpoints(steps):
            halve = (rises < 0.75 * (k + 1 - then)) | (~halved & (f_best <= f_then))
            step, now = torch.where(wide(halve), step / 2, step), torch.where(wide(halve), best, now)
            f_now = torch.where(halve, f_best, f_now)
            rises, halved, f_then, then = torch.zeros_like(rises), halve, f_best, k + 1
    return best


def byorl_step(batch: int, device: torch.device, amp: str, compile: bool) -> tuple[Steps, float]:
    x = torch.rand(batch, 3, 32, 32, device=device)

    def make(amp: str) -> tuple:
        args = byorl.Args(arch="preact18", width=1.0, amp=amp, compile=compile)
        torch.manual_seed(0)
        online, target = byorl.ByolNetwork(args, device).train(), byorl.ByolNetwork(args, device).train()
        target.requires_grad_(False).load_state_dict(online.state_dict())
        return online, target, byorl.LARS(online.parameters(), args.lr, args.weight_decay), args

    def step(online: nn.Module, target: nn.Module, opt: Any, args: Any, attack: Callable) -> None:
        v1, v2 = simclr_augment(x), simclr_augment(x)
        with torch.no_grad():
            z1, z2 = target.project(v1), target.project(v2)
        adv1, adv2 = attack(v1, z2), attack(v2, z1)
        loss = byorl.distance(online.predict(adv1), z2) + byorl.distance(online.predict(adv2), z1)
        update(opt, loss.mean())
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - args.tau)

    first, mixed = make("off"), make(amp)
    for network in first[:2]:
        encoder = network.encoder.to(memory_format=torch.contiguous_format)
        encoder.features = Plain(encoder).features

    def plain_attack(v: Tensor, z_other: Tensor) -> Tensor:
        args, kept = first[3], [b.clone() for b in first[0].buffers()]
        loss = lambda u: byorl.distance(first[0].predict(u), z_other)  # noqa: E731
        v = plain_apgd(loss, v, args.eps, args.attack_steps)
        for buffer, old in zip(first[0].buffers(), kept, strict=True):  # BatchNorm's, changed by the attack
            buffer.copy_(old)
        return v

    def eager(v: Tensor, z_other: Tensor) -> Tensor:
        return byorl.attack_view(mixed[0], v, z_other, mixed[3])

    graph = cuda_graph(eager)
    return {
        "plain": lambda: step(*first, plain_attack), "ours": lambda: step(*mixed, eager),
        "ours, graph": lambda: step(*mixed, graph),
    }, batch  # fmt: skip


# ---- A-MAE -------------------------------------------------------------------------------------------


def mae(batch: int, device: torch.device, amp: str, compile: bool) -> tuple[Steps, float]:
    args = adv_mae.Args()
    x = torch.rand(batch, 3, 224, 224, device=device)
    seeds = adv_mae.image_seeds(0, torch.arange(batch)).to(device)

    def make(amp: str, compile: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = place_model(adv_mae.MaskedAutoencoder(build_model(args.arch, {}), args), device, amp, compile)
        recipe = adv_mae.recipe_of("mae", args)
        groups = adv_mae.parameter_groups(model, recipe.weight_decay, None)
        return model.train(), torch.optim.AdamW(groups, 1e-4, betas=recipe.betas)

    def plain_loss(model: nn.Module, x: Tensor, order: Tensor, n: int, target: Tensor) -> Tensor:
        """The MAE loss with an encoder that works on all patches; the hidden ones are blanked."""
        net, b = model.trunk, torch.arange(len(x), device=x.device)[:, None]
        hidden = torch.zeros(len(x), order.shape[1], 1, device=x.device)
        hidden[b, order[:, n:]] = 1
        tokens = net.encoder.embed((x - model.mean) / model.std)
        tokens = net.embed(net.norm(net.encoder.encode(tokens * (1 - hidden))))
        patches = tokens[:, 1:] * (1 - hidden) + net.mask_token * hidden + net.positions
        out = net.predict(net.decoder_norm(net.decoder(torch.cat([tokens[:, :1], patches], 1))))[:, 1:]
        return ((out[b, order[:, n:]] - target) ** 2).mean()

    def plain(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        patches, order = patchify(x, 16), image_uniform(seeds, 196).argsort(1)
        n, b = 49, torch.arange(len(x), device=x.device)[:, None]
        target, _, _ = adv_mae.standardise(patches[b, order[:, n:]], model)
        mask = torch.zeros(len(x), 196, device=x.device)
        mask[b, order[:, :n]] = 1
        mask = mask.view(-1, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
        delta = torch.randn_like(x) * mask
        delta = args.eps * delta / l2_norm(delta)
        for _ in range(args.attack_steps):
            delta.requires_grad_(True)
            plain_loss(model, (x + delta).clamp(0, 1), order, n, target).backward()
            g = delta.grad * mask
            delta = delta.detach() + 5 / 8 * args.eps * g / l2_norm(g)
            delta = delta * (args.eps / l2_norm(delta)).clamp(max=1)
        update(opt, plain_loss(model, (x + delta).clamp(0, 1), order, n, target))

    def ours(model: nn.Module, opt: torch.optim.Optimizer) -> None:
        z, loss = adv_mae.masked_task(x, seeds, model, args)
        z = adv_mae.perturb(z, loss, seeds, model, args)
        update(opt, loss(model, z).mean())

    first, mixed = make("off", False), make(amp, compile)
    return {"plain": lambda: plain(*first), "ours": lambda: ours(*mixed)}, batch


# ---- reversal ----------------------------------------------------------------------------------------


def make_defence(
    args: mtl_reverse.Args, device: torch.device, amp: str, compile: bool = False, plain: bool = False
) -> mtl_reverse.Defence:  # fmt: skip
    """All three tasks, random weights, with the paper's classifier."""
    torch.manual_seed(0)
    classifier = build_model("wrn28_10", {"class": 10}, mean=[0, 0, 0], std=[1, 1, 1]).to(device).eval()
    branches = mtl_reverse.build_branches(args, classifier)
    if plain:
        branches["contrastive"].features = Plain(classifier).features
    else:
        place_model(classifier.requires_grad_(False), device, amp)
    for branch in branches.values():
        branch.to(device).eval().requires_grad_(plain)
        for name, net in list(branch.named_children()):
            if isinstance(net, Network) and plain:
                setattr(branch, name, Plain(net).to(device))
            elif isinstance(net, Network):
                place_model(net, device, amp, compile)
    bank = F.normalize(torch.randn(args.bank * args.views, 16), dim=1).to(device)
    return mtl_reverse.Defence("mtl", classifier, branches, args, bank)


def reverse(batch: int, device: torch.device, amp: str, compile: bool) -> tuple[Steps, float]:
    """Two iterations, an odd and an even one; images per second are for all iterations (K = 40)."""
    args = mtl_reverse.Args()
    mix = mtl_reverse.mix_seeds
    x, seeds = torch.rand(batch, 3, 32, 32, device=device), mix(torch.arange(batch, device=device), 0)

    def plain_step(z: Tensor, x: Tensor, k: int, defence: Any, seeds: Tensor) -> Tensor:
        losses, move = {}, 0
        for task in mtl_reverse.TASKS:
            z_of = z.clone().requires_grad_(True)
            losses[task] = z_of, defence.loss(task, z_of, mix(seeds, k))
        total = sum(loss for _, loss in losses.values()).detach()
        for task in mtl_reverse.active_tasks(mtl_reverse.TASKS, k):
            z_of, loss = losses[task]
            loss.sum().backward()
            sizes = z_of.grad.abs().amax((1, 2, 3), keepdim=True)
            move = move + (loss.detach() / total).view(-1, 1, 1, 1) * z_of.grad / sizes
        z = z - args.reverse_step_size * move
        return torch.clamp(z, x - args.reverse_eps, x + args.reverse_eps).clamp(0, 1)

    def two(step: Callable, defence: Any) -> Callable:
        return lambda: step(step(x, x, 1, defence, seeds), x, 2, defence, seeds)

    first, mixed = make_defence(args, device, amp, plain=True), make_defence(args, device, amp, compile)
    steps = {"plain": two(plain_step, first), "ours": two(mtl_reverse.reverse_step, mixed)}
    return steps, 2 * batch / args.reverse_steps


# ---- measuring ---------------------------------------------------------------------------------------


def timed(step: Callable, device: torch.device) -> tuple[float, float]:
    """(seconds, peak MB of PyTorch's memory on a GPU; nan on a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step()
    if device.type != "cuda":
        return time.perf_counter() - begin, float("nan")
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**20


def count_flops(step: Callable) -> int:
    """FLOPs of the convolutions, matrix products and attention in step(), backward passes included."""
    total = 0

    class Count(TorchDispatchMode):  # FlopCounterMode's own hooks do not bear gradients for images alone
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            return out

    with Count(), sdpa_kernel(SDPBackend.MATH):  # fused attention on CPUs is unknown to the registry
        step()
    return total


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of ten large matrix products."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


def measure(
    name: str, make: Callable, batch: int, device: torch.device, flags: argparse.Namespace
) -> list[dict]:  # fmt: skip
    """A row per kind of step of one workload."""
    steps, images = make(batch, device, flags.amp, flags.compile)
    if device.type == "cpu":
        steps.pop("ours, graph", None)
    seconds, memory = {kind: [] for kind in steps}, dict.fromkeys(steps, 0.0)
    for i in range(-2, flags.rounds):  # two to warm up; a graph is recorded in the second
        for kind, step in steps.items():
            s, mb = timed(step, device)
            memory[kind] = max(memory[kind], mb)
            seconds[kind] += [s] * (i >= 0)
    flops = count_flops(make(batch, device, flags.amp, False)[0]["ours"]) / images
    rows = []
    for kind, times in seconds.items():
        s = statistics.median(times)
        row = {"name": f"{name} {kind}", "batch": batch, "images_per_s": float(f"{images / s:.3g}")}
        row |= {"seconds": s, "ratio": round(statistics.median(seconds["plain"]) / s, 2)}
        if device.type == "cuda":
            row["peak_mb"] = round(memory[kind])  # of all networks of the workload
        if kind in ("ours", "ours, graph"):
            row["gflops_per_image"] = float(f"{flops / 1e9:.3g}")
            peak = matmul_peak(device, amp_dtype(flags.amp, device) or torch.float32)
            row["share_of_matmul_peak"] = round(flops * images / s / peak, 3)
            row["matmul_tflops_per_s"] = float(f"{peak / 1e12:.3g}")
        rows.append(row)
    return rows


WORKLOADS = {  # name: (function, batch size on a CPU, on a GPU)
    "at": (at, 64, 512), "byorl": (byorl_step, 32, 512), "mae": (mae, 8, 256), "reverse": (reverse, 8, 256),
}  # fmt: skip


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", help="at, byorl, mae, reverse; default: all")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=int, default=0, help="default: 512 or 256 on a GPU, 8 to 64 on a CPU")
    add("--rounds", type=int, default=5, help="timed steps of each kind")
    add("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of ours")
    add("--compile", action="store_true", help="torch.compile our networks")
    add("--json", default="", help="write the rows to this file")
    flags = parser.parse_args()
    if unknown := set(flags.workloads) - set(WORKLOADS):
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    device = choose_device(flags.device)
    rows = []
    for name in flags.workloads or WORKLOADS:
        make, on_cpu, on_gpu = WORKLOADS[name]
        batch = flags.batch_size or (on_cpu if device.type == "cpu" else on_gpu)
        rows += measure(name, make, batch, device, flags)
    info = {"benchmark": "speed.py", "device": device_name(device), "torch": torch.__version__}
    info |= {"mixed precision": str(amp_dtype(flags.amp, device)), "compile": flags.compile}
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    columns = ["batch", "images_per_s", "ratio", "peak_mb", "gflops_per_image", "share_of_matmul_peak"]
    print(text_table(["step", *columns], [[r["name"], *(str(r.get(c, "")) for c in columns)] for r in rows]))
    if flags.json:
        Path(flags.json).write_text(json.dumps(info | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
