"""Images per second, peak memory and share of the device's peak of one step of BYORL (PreAct-ResNet-18, AutoPGD-10, l2 128/255).

    python benchmarks/byorl_step.py                      # batch 32 on a CPU; 512 on a GPU
    python benchmarks/byorl_step.py --json byorl_step.json

(a) plain: the loop as one would first write it, in float32, NCHW: AutoPGD from its paper, with loss.backward() (which also makes the
           gradients of all weights) and a pass of its own to see whether the loss rose;
(b) ours:  the step of byorl.py: common.apgd (K + 1 passes, gradient for the image only), channels_last, mixed precision.

Both have the same augmentation and LARS, and run in turns on the same batch; the median counts. The share of the peak is: FLOPs of (b)
(those of a pass by PyTorch's counter), times images per second, over the FLOPs per second of a large matrix product in the same precision. At last the
augmentation alone: ours for a whole batch, and torchvision's, image by image.
"""
import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from at_step import add_work, in_turns, print_rows, timed, write_json  # noqa: E402

from byorl import LARS, Args, ByolNetwork, attack_view, distance  # noqa: E402
from common import apgd_checkpoints, choose_device, simclr_augment  # noqa: E402


def make(args: Args, device: torch.device):
    """(online network, target network, optimiser) of byorl.py."""
    torch.manual_seed(0)
    online, target = ByolNetwork(args, device).train(), ByolNetwork(args, device).train().requires_grad_(False)
    target.load_state_dict(online.state_dict())
    return online, target, LARS(online.parameters(), args.lr, args.weight_decay)


def make_plain(args: Args, device: torch.device):
    """The same as PyTorch makes them: float32, NCHW."""
    online, target, opt = make(replace(args, amp="off", compile=False), device)
    for network in online, target:
        encoder = network.encoder.to(memory_format=torch.contiguous_format)
        encoder.features = lambda x, encoder=encoder: encoder.trunk((x - encoder.mean) / encoder.std)  # without its channels_last line
    return online, target, opt


def plain_apgd(loss_of, x, eps: float, steps: int):
    """Croce and Hein 2020, Algorithm 1, l2, written down line by line; loss_of(x) -> (B,)."""

    def length(v):
        return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def project(z):
        delta = z - x
        return (x + delta * (eps / length(delta)).clamp(max=1)).clamp(0, 1)

    def gradient(z):
        z = z.clone().requires_grad_(True)
        loss_of(z).sum().backward()
        return z.grad

    def loss_at(z):
        with torch.no_grad():
            return loss_of(z)

    noise = torch.randn_like(x)
    x0 = (x + eps * noise / length(noise)).clamp(0, 1)
    step = torch.full((len(x), 1, 1, 1), 2 * eps, device=x.device)
    g = gradient(x0)
    x1 = project(x0 + step * g / length(g))
    f0, f1 = loss_at(x0), loss_at(x1)
    best, f_best = torch.where((f1 > f0).view(-1, 1, 1, 1), x1, x0), torch.maximum(f0, f1)
    before, now, f_now, rises = x0, x1, f1, (f1 > f0).float()
    halved, f_then, then = torch.zeros_like(f0, dtype=torch.bool), f0, 0
    points = apgd_checkpoints(steps)
    for k in range(1, steps):
        g = gradient(now)
        z = project(now + step * g / length(g))
        before, now = now, project(now + 0.75 * (z - now) + 0.25 * (now - before))
        f_new = loss_at(now)
        rises += f_new > f_now
        best = torch.where((f_new > f_best).view(-1, 1, 1, 1), now, best)
        f_best, f_now = torch.maximum(f_best, f_new), f_new
        if k + 1 in points:
            halve = (rises < 0.75 * (k + 1 - then)) | (~halved & (f_best <= f_then))
            step = torch.where(halve.view(-1, 1, 1, 1), step / 2, step)
            now = torch.where(halve.view(-1, 1, 1, 1), best, now)
            f_now = torch.where(halve, f_best, f_now)
            rises, halved, f_then, then = torch.zeros_like(rises), halve, f_best, k + 1
    return best


def update(online, target, opt, v1, v2, z1, z2, tau: float) -> None:
    loss = (distance(online.predict(v1), z2) + distance(online.predict(v2), z1)).mean()
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - tau)


def plain_step(online, target, opt, x, args: Args) -> None:
    v1, v2 = simclr_augment(x), simclr_augment(x)
    with torch.no_grad():
        z1, z2 = target.project(v1), target.project(v2)
    buffers = copy.deepcopy([b for b in online.buffers()])
    adv1 = plain_apgd(lambda z: 2 - 2 * F.cosine_similarity(online.predict(z), z2), v1, args.eps, args.attack_steps)
    adv2 = plain_apgd(lambda z: 2 - 2 * F.cosine_similarity(online.predict(z), z1), v2, args.eps, args.attack_steps)
    for b, old in zip(online.buffers(), buffers, strict=True):
        b.copy_(old)
    update(online, target, opt, adv1, adv2, z1, z2, args.tau)


def our_step(online, target, opt, x, args: Args) -> None:
    v1, v2 = simclr_augment(x), simclr_augment(x)
    with torch.no_grad():
        z1, z2 = target.project(v1), target.project(v2)
    adv1, adv2 = attack_view(online, v1, z2, args), attack_view(online, v2, z1, args)
    update(online, target, opt, adv1, adv2, z1, z2, args.tau)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, default=0, help="default: 32 on a CPU, 512 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default: 3 on a CPU, 10 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of our step")
    p.add_argument("--compile", action="store_true", help="torch.compile our encoder")
    p.add_argument("--json", default="", help="write the rows to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    on_cpu = device.type == "cpu"
    batch, rounds = flags.batch_size or (32 if on_cpu else 512), flags.rounds or (3 if on_cpu else 10)
    args = Args(arch="preact18", width=1.0, attack_steps=10, amp=flags.amp, compile=flags.compile)
    x = torch.rand(batch, 3, 32, 32, device=device)
    plain, ours = make_plain(args, device), make(args, device)
    steps = {"plain": lambda: plain_step(*plain, x, args), "ours": lambda: our_step(*ours, x, args)}
    rows = in_turns({f"BYORL {name}, batch {batch}": step for name, step in steps.items()}, batch, device, rounds, 1 if on_cpu else 5)
    online, small = make(args, device)[0], x[:8]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        online.predict(small)
    forward = counter.get_total_flops() / len(small)
    # Per view: one pass of the target, K + 1 passes with the gradient for the image (as dear as the pass), and the update (twice that).
    flops = 2 * (1 + 2 * (args.attack_steps + 1) + 3) * forward
    add_work(rows[1], flops, device, flags.amp)
    augment = v2.Compose([
        v2.RandomResizedCrop(32, (0.08, 1), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
    ])  # fmt: skip
    for name, f in ("ours, one batch", lambda: simclr_augment(x)), ("torchvision, image by image", lambda: [augment(i) for i in x.cpu()]):
        f()
        rows.append({"name": f"views: {name}", "images_per_s": round(batch / min(timed(f, device)[0] for _ in range(3)), 1), "peak_mb": 0})
    rows[3]["ratio"], rows[2]["ratio"] = 1.0, round(rows[2]["images_per_s"] / rows[3]["images_per_s"], 2)
    print_rows(rows, device, flags.amp)
    write_json(flags.json, device, "byorl_step.py", rows)


if __name__ == "__main__":
    main()
