"""Images per second and peak memory of one step of adversarial training (T0, ResNet-18, PGD-10, linf 8/255).

    python benchmarks/at_step.py                    # batch 64 on a CPU; 128 and 512 on a GPU
    python benchmarks/at_step.py --json at_step.json

(a) plain:   the loop as one would first write it, in float32, NCHW, with loss.backward() inside the attack;
(b) library: what a user of an attack library runs: float32, NCHW, gradients for the images only;
(c) ours:    the step of rotation_at.py: common.pgd, channels_last, in mixed precision and in float32.

All run in one process, in turns, on the same batch, after a warm-up; the median step counts. Ratios are to (a);
the last line gives those to (b). Then one small network is trained on the bundled digits and its robust accuracy
is measured under PGD-20 in mixed precision and in float32: a fast attack must still be an attack. The share of
the peak is the FLOPs of a step, by PyTorch's counter, times steps per second, over the FLOPs per second of a
large matrix product in the same precision.
"""
import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (  # noqa: E402
    STATS, amp_dtype, batches, batchnorm_mode, build_model, choose_device, device_name, full_precision, load_data, pgd,
    place_model, robust_accuracy, text_table,
)  # fmt: skip

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10


def make(device: torch.device, amp: str | None, compile: bool = False):
    """(network, optimiser); amp None: as PyTorch makes it, float32 NCHW."""
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, mean=STATS["cifar10"][0], std=STATS["cifar10"][1])
    model = model.to(device) if amp is None else place_model(model, device, amp, compile)
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)


class PlainNetwork(torch.nn.Module):
    """The same network without its channels_last line."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        m = self.model
        return m.heads["class"](m.trunk((x - m.mean) / m.std))


def plain_step(model, opt, x, y) -> None:
    model.eval()
    delta = (torch.rand_like(x) * 2 - 1) * EPS
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(STEPS):
        delta.requires_grad_(True)
        loss = F.cross_entropy(model(x + delta), y)
        opt.zero_grad()
        loss.backward()
        delta = (delta + ALPHA * delta.grad.sign()).detach().clamp(-EPS, EPS)
        delta = (x + delta).clamp(0, 1) - x
    model.train()
    loss = F.cross_entropy(model(x + delta), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def library_step(model, opt, x, y) -> None:
    """The attack as libraries write it: the loss is a mean, the perturbation is clamped, then the image."""
    model.eval()
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1).detach()
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + ALPHA * grad.sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1).detach()
    model.train()
    loss = F.cross_entropy(model(x_adv), y)
    opt.zero_grad()
    loss.backward()
    opt.step()


def our_step(model, opt, x, y) -> None:
    model.train()
    with batchnorm_mode(model, "eval"):
        x_adv = pgd(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=EPS, steps=STEPS, step_size=ALPHA)
    loss = F.cross_entropy(model(x_adv), y)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()


def timed(step, device: torch.device) -> tuple[float, float]:
    """(seconds, peak MB): of PyTorch's allocations on a GPU; of the process on a CPU (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # start a new peak
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    with contextlib.suppress(OSError):
        return seconds, int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    return seconds, 0.0


def in_turns(steps: dict[str, Callable], images: int, device: torch.device, rounds: int, warm_up: int) -> list[dict]:
    """A row per step: images per second by the median of `rounds`, peak memory, and how many times faster than the first it is."""
    seconds, peak = {name: [] for name in steps}, dict.fromkeys(steps, 0.0)
    for i in range(-warm_up, rounds):
        for name, step in steps.items():
            s, mb = timed(step, device)
            if i >= 0:
                seconds[name].append(s)
                peak[name] = max(peak[name], mb)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    first = next(iter(median.values()))
    return [
        {"name": name, "images_per_s": float(f"{images / s:.3g}"), "seconds": s, "peak_mb": round(peak[name]), "ratio": round(first / s, 2)}
        for name, s in median.items()
    ]  # fmt: skip


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of ten large matrix products."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ b, device)[0] for _ in range(10))


def count_flops(step: Callable) -> int:
    """FLOPs of convolutions, matrix products and attention (unless in a fused kernel on a CPU) in step(), backward passes included."""
    total = 0

    class Count(TorchDispatchMode):  # FlopCounterMode's own hooks do not bear gradients for images alone
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal total
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            return out

    with Count():
        step()
    return total


def add_work(row: dict, flops_per_image: float, device: torch.device, amp: str) -> None:
    """Put into a row of `in_turns` what an image costs, and the share of the device's speed in matrix products that is reached."""
    fastest = matmul_peak(device, amp_dtype(amp, device) or torch.float32)
    row["gflops_per_image"] = float(f"{flops_per_image / 1e9:.3g}")
    row["matmul_tflops_per_s"] = float(f"{fastest / 1e12:.3g}")
    row["share_of_matmul_peak"] = round(flops_per_image * row["images_per_s"] / fastest, 3)


def write_json(path: str, device: torch.device, command: str, rows: list[dict]) -> None:
    """The rows, with device and version, in a file, if it has a name."""
    if path:
        Path(path).write_text(json.dumps({"benchmark": command, "device": device_name(device), "torch": torch.__version__, "rows": rows}, indent=1))


def print_rows(rows: list[dict], device: torch.device, amp: str) -> None:
    """The table of `in_turns`."""
    print(f"{device_name(device)}, torch {torch.__version__}, mixed precision {amp_dtype(amp, device) or 'off'}")
    print(text_table(
        ["step", "images/s", "peak MB", "ratio", "GFLOP/image", "of matmul peak"],
        [
            [r["name"], f"{r['images_per_s']}", f"{r['peak_mb'] or '-'}", f"{r['ratio']:.2f}", f"{r.get('gflops_per_image', '')}",
             f"{100 * r['share_of_matmul_peak']:.0f}%" if "share_of_matmul_peak" in r else ""]
            for r in rows
        ],
    ))


def compare(batch: int, device: torch.device, rounds: int, amp: str, compile: bool) -> list[dict]:
    """Rows for each kind of step at one batch size. Memory counts all networks, which is the same for each."""
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    plain, plain_opt = make(device, None)
    net = PlainNetwork(plain)
    steps = {"plain": lambda: plain_step(net, plain_opt, x, y), "library": lambda: library_step(net, plain_opt, x, y)}
    precisions = {f"ours, {amp_dtype(p, device) or torch.float32}".replace("torch.", ""): p for p in (amp, "off")}
    for name, precision in precisions.items():
        steps[name] = partial(our_step, *make(device, precision, compile), x, y)
    rows = in_turns({f"AT {name}, batch {batch}": step for name, step in steps.items()}, batch, device, rounds, 2 if device.type == "cpu" else 10)
    for row, (name, precision) in zip(rows[2:], precisions.items(), strict=True):
        add_work(row, count_flops(steps[name]) / batch, device, precision)
        row["ratio_to_library"] = round(rows[1]["seconds"] / row["seconds"], 2)
    return rows


def attack_strength(device: torch.device) -> list[dict]:
    """Robust accuracy of one adversarially trained network under PGD-20 in mixed precision and in float32."""
    train, test = load_data("digits", "", device)
    torch.manual_seed(0)
    model = place_model(build_model("resnet18", {"class": 10}, width=0.25, stem="imagenet"), device, "auto")
    opt = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def attack(x, y, steps):
        torch.manual_seed(0)
        loss = lambda z: F.cross_entropy(model(z), y, reduction="none")  # noqa: E731
        return pgd(loss, x, eps=0.1, steps=steps, step_size=0.025)

    model.train()
    for epoch in range(8):
        for x, y in batches(train, 64, device, shuffle=epoch):
            with batchnorm_mode(model, "eval"):
                x_adv = attack(x, y, 5)
            loss = F.cross_entropy(model(x_adv), y)
            opt.zero_grad()
            loss.backward()
            opt.step()

    rows = []
    model.eval()
    for name, precision in ("mixed precision", contextlib.nullcontext()), ("float32", full_precision(model)):
        with precision:
            x_adv = [(attack(x, y, 20), y) for x, y in batches(test, 360, device)]
        with full_precision(model):  # both sets of images are evaluated by the same network
            rows.append({"name": f"robust accuracy, images from {name} PGD-20", "accuracy": robust_accuracy(model, x_adv)})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, nargs="*", help="default: 64 on a CPU, 128 and 512 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default: 5 on a CPU, 30 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of our step")
    p.add_argument("--compile", action="store_true", help="torch.compile our network")
    p.add_argument("--json", default="", help="write the rows to this file")
    args = p.parse_args()
    device = choose_device(args.device)
    on_cpu = device.type == "cpu"
    rows = []
    for batch in args.batch_size or ([64] if on_cpu else [128, 512]):
        rows += compare(batch, device, args.rounds or (5 if on_cpu else 30), args.amp, args.compile)
    print_rows(rows, device, args.amp)
    print("ratio to the library: " + "; ".join(f"{r['name']} {r['ratio_to_library']}" for r in rows if "ratio_to_library" in r))
    strength = attack_strength(device)
    print()
    print(text_table(["attack", "accuracy %"], [[r["name"], f"{r['accuracy']:.2f}"] for r in strength]))
    write_json(args.json, device, "at_step.py", rows + strength)


if __name__ == "__main__":
    main()
