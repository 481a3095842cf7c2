"""Images per second and peak memory of reversal (mtl_reverse.py: WideResNet-28-10, 4 views, NiN, inpainting at 128 pixels, K 40).

    python benchmarks/reverse_step.py                       # batch 8 on a CPU; 256 on a GPU
    python benchmarks/reverse_step.py --json reverse_step.json

(a) plain: the loop as one would first write it, in float32, NCHW: in each iteration the three networks one after the other, and
           loss.backward() for the two tasks whose turn it is (which also makes the gradients of all weights);
(b) ours:  reverse_step of mtl_reverse.py: gradients for the image only, no graph for the third task, channels_last, mixed precision.

Two iterations, an odd and an even one, in turns on the same batch; the median counts, images/s are for 40 iterations. Then the
memory of 2 and of 8 iterations, and how close a step in mixed precision is to that in float32.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from at_step import add_work, count_flops, in_turns, print_rows, timed, write_json  # noqa: E402

from common import Network, build_model, choose_device, full_precision, place_model  # noqa: E402
from mtl_reverse import TASKS, Args, Defence, build_branches, mix_seeds, reverse, reverse_step, tasks_in_turn  # noqa: E402


class Plain(nn.Module):
    """A Network without its channels_last line, in float32."""

    def __init__(self, net: Network):
        super().__init__()
        self.net, self.trunk, self.mean, self.std = net, net.trunk, net.mean, net.std

    def features(self, x: Tensor) -> Tensor:
        return self.trunk((x - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.net.heads.values()))(self.features(x))


def make(args: Args, device: torch.device, amp: str | None, compile: bool = False) -> Defence:
    """The three tasks with random weights; amp None: plain networks whose weights have gradients."""
    torch.manual_seed(0)
    classifier = build_model("wrn28_10", {"class": 10}, mean=[0, 0, 0], std=[1, 1, 1]).to(device).eval()
    branches = build_branches(args, classifier)
    if amp is None:
        branches["contrastive"].features = Plain(classifier).features
    else:
        place_model(classifier.requires_grad_(False), device, amp)
    for branch in branches.values():
        branch.to(device).eval()
        for name, net in list(branch.named_children()):
            if isinstance(net, Network) and amp is None:
                setattr(branch, name, Plain(net).to(device))
            elif isinstance(net, Network):
                place_model(net, device, amp, compile)
        if amp is not None:
            branch.requires_grad_(False)
    bank = F.normalize(torch.randn(args.bank * args.views, 16), dim=1).to(device)
    return Defence("mtl", classifier, branches, args, bank)


def plain_iteration(z: Tensor, x: Tensor, k: int, defence: Defence, seeds: Tensor) -> Tensor:
    args, losses, move = defence.args, {}, 0
    for task in TASKS:
        at = z.clone().requires_grad_(True)
        losses[task] = at, defence.loss(task, at, mix_seeds(seeds, k))
    total = sum(loss for _, loss in losses.values()).detach()
    for task in tasks_in_turn(TASKS, k):
        at, loss = losses[task]
        loss.sum().backward()
        move = move + (loss.detach() / total).view(-1, 1, 1, 1) * at.grad / at.grad.abs().amax((1, 2, 3), keepdim=True)
    for net in (*defence.branches.values(), defence.classifier):
        net.zero_grad()
    return torch.clamp(z - args.reverse_step_size * move, x - args.reverse_eps, x + args.reverse_eps).clamp(0, 1)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, default=0, help="default: 8 on a CPU, 256 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed pairs of iterations of each kind (default: 3 on a CPU, 10 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of ours")
    p.add_argument("--compile", action="store_true", help="torch.compile our networks, but for the classifier")
    p.add_argument("--json", default="", help="write the rows to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    on_cpu = device.type == "cpu"
    batch, args = flags.batch_size or (8 if on_cpu else 256), Args()
    x, seeds = torch.rand(batch, 3, 32, 32, device=device), mix_seeds(torch.arange(batch, device=device), 0)
    plain, ours = make(args, device, None), make(args, device, flags.amp, flags.compile)

    def two(step, defence: Defence):
        return lambda: step(step(x, x, 1, defence, seeds), x, 2, defence, seeds)

    steps = {f"reversal plain, batch {batch}": two(plain_iteration, plain), f"reversal ours, batch {batch}": two(reverse_step, ours)}
    rows = in_turns(steps, 2 * batch / args.reverse_steps, device, flags.rounds or (3 if on_cpu else 10), 1 if on_cpu else 5)
    add_work(rows[1], count_flops(steps[f"reversal ours, batch {batch}"]) / batch * args.reverse_steps / 2, device, flags.amp)
    print_rows(rows, device, flags.amp)
    memory = {k: timed(lambda: reverse(x, replace(ours, args=replace(args, reverse_steps=k)), seeds), device)[1] for k in (2, 8)}
    print(f"\nPeak memory of ours with 2 iterations: {memory[2]:.0f} MB, with 8: {memory[8]:.0f} MB.")
    some, its_seeds = torch.rand(8, 3, 32, 32, device=device), mix_seeds(torch.arange(8, device=device), 1)
    mixed = reverse_step(some, some, 2, ours, its_seeds) - some
    nets = [m for b in ours.branches.values() for m in b.modules() if isinstance(m, Network)]
    with full_precision(nn.ModuleList([*nets, ours.classifier])):
        exact = reverse_step(some, some, 2, ours, its_seeds) - some
    same = F.cosine_similarity(mixed.flatten(1), exact.flatten(1)).mean().item()
    print(f"Cosine of the first even step in mixed precision with that in float32: {same:.3f} (mean over 8 images).")
    rows.append({"name": "memory", "peak_mb_of_iterations": memory, "cosine": same})
    write_json(flags.json, device, "reverse_step.py", rows)


if __name__ == "__main__":
    main()
