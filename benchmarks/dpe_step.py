"""Images per second and peak memory of one step of the ensemble's pre-training (chen_pretrain_finetune.py --task
ensemble: Selfie, rotation and jigsaw on one ResNet-50v2, PGD-10, eq. 2-4).

    python benchmarks/dpe_step.py                       # batch 4 on a CPU; 32 and 128 on a GPU
    python benchmarks/dpe_step.py --json dpe_step.json

(a) plain: AP+DPE as one would first write it, in float32, NCHW: one task after the other, each gradient by its own
           backward pass, with loss.backward() (which also makes the gradients of all weights) in the attack;
(b) ours:  AP+DPE as in chen_pretrain_finetune.py: one attack on the three images, gradients for the images only, mixed
           precision, channels_last;
(c) ours, AP+SE: the same without the log det (--dpe-lambda 0), so without second derivatives.

In turns, on the same batch; the median counts. --steps runs only those named, so that the peak is theirs.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from at_step import add_work, count_flops, in_turns, print_rows, write_json  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from chen_pretrain_finetune import TASKS, Args, Objective, Pretext, log_det, make_view, task_loss  # noqa: E402
from common import IMAGENET_STATS, Network, choose_device, jigsaw_permutations, place_model  # noqa: E402

EPS, ALPHA = 8 / 255, 2 / 255


def make(args: Args, device: torch.device, amp: str | None):
    """(network, optimiser); amp None: float32 NCHW."""
    torch.manual_seed(0)
    model = Network(Pretext(TASKS, args), {}, *IMAGENET_STATS).to(device)
    if amp is None:
        model.features = lambda x, *more: model.trunk((x - model.mean) / model.std, *more)  # without its channels_last line
    else:
        place_model(model, device, amp)
    return model.train(), torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)


def plain_step(model, opt, x, permutations, args: Args) -> None:
    views = {task: make_view(task, x, permutations) for task in TASKS}
    adv = {task: (v + (2 * torch.rand_like(v) - 1) * EPS).clamp(0, 1) for task, (v, _) in views.items()}

    def losses_and_h(images):
        losses, gradients = [], []
        for task in TASKS:
            loss = task_loss(model, task, images[task], views[task][1], True).mean()
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, images[task], create_graph=True)[0])
        return sum(losses), log_det(gradients).mean()

    for _ in range(args.attack_steps):
        images = {task: v.detach().requires_grad_(True) for task, v in adv.items()}
        loss, h = losses_and_h(images)
        opt.zero_grad()
        (loss + args.dpe_lambda * h).backward()
        for task in TASKS:
            v = views[task][0]
            adv[task] = torch.clamp(images[task].detach() + ALPHA * images[task].grad.sign(), v - EPS, v + EPS).clamp(0, 1)
    clean = sum(task_loss(model, task, v, target, True).mean() for task, (v, target) in views.items())
    loss, h = losses_and_h({task: v.detach().requires_grad_(True) for task, v in adv.items()})
    opt.zero_grad()
    ((clean + loss) / 6 + args.dpe_lambda * h).backward()
    opt.step()


def our_step(model, opt, x, permutations, args: Args) -> None:
    objective, diverse = Objective(model, args), args.dpe_lambda > 0
    views = {task: make_view(task, x, permutations) for task in TASKS}
    attacked = objective.attack(views, diverse)
    opt.zero_grad()
    objective(views, attacked, diverse).backward()
    opt.step()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, nargs="*", help="default: 4 on a CPU, 32 and 128 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default: 2 on a CPU, 5 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of our step")
    p.add_argument("--steps", nargs="*", default=["plain", "ours", "ours, AP+SE"], help="plain, ours, 'ours, AP+SE'")
    p.add_argument("--json", default="", help="write the rows to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    on_cpu = device.type == "cpu"
    permutations = jigsaw_permutations(4, 30).to(device)
    rows = []
    for batch in flags.batch_size or ([4] if on_cpu else [32, 128]):
        x = torch.rand(batch, 3, 32, 32, device=device)
        lambdas = {"plain": 0.1, "ours": 0.1, "ours, AP+SE": 0.0}
        named = {}
        for name in flags.steps:
            args = Args(task="ensemble", dpe_lambda=lambdas[name])
            network, step = make(args, device, None if name == "plain" else flags.amp), plain_step if name == "plain" else our_step
            named[f"DPE {name}, batch {batch}"] = lambda a=args, n=network, s=step: s(*n, x, permutations, a)  # noqa: B023
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            found = in_turns(named, batch, device, flags.rounds or (2 if on_cpu else 5), 1)
            for row in found:
                if "plain" not in row["name"]:
                    add_work(row, count_flops(named[row["name"]]) / batch, device, flags.amp)
        rows += found
    print_rows(rows, device, flags.amp)
    write_json(flags.json, device, "dpe_step.py", rows)


if __name__ == "__main__":
    main()
