"""Images per second and peak memory of one step of the diversity-promoting ensemble (chen_pretrain_finetune.py --task ensemble: Selfie,
rotation and jigsaw on one ResNet-50v2, PGD-10 with second derivatives, eq. 2-4).

    python benchmarks/dpe_step.py                       # batch 4 on a CPU; 32 and 128 on a GPU
    python benchmarks/dpe_step.py --json dpe_step.json

(a) plain: the loop as one would first write it, in float32, NCHW: one task after the other, each gradient by its own backward pass, with
           loss.backward() (which also makes the gradients of all weights) in the attack;
(b) ours:  the step of chen_pretrain_finetune.py: one attack on the three images, gradients for the images only, mixed precision, channels_last.

In turns, on the same batch; the median counts.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from at_step import add_work, count_flops, in_turns, print_rows, write_json  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from chen_pretrain_finetune import TASKS, Args, Objective, Pretext, fast_second_derivatives, input_gradients_only, log_det, make_view, task_loss  # noqa: E402
from common import (  # noqa: E402
    IMAGENET_STATS, Network, batchnorm_mode, choose_device,
    jigsaw_permutations, pgd, place_model,
)  # fmt: skip

EPS, ALPHA = 8 / 255, 2 / 255


def make(args: Args, device: torch.device, amp: str | None):
    """(network, optimiser); amp None: float32 NCHW."""
    torch.manual_seed(0)
    model = Network(Pretext(TASKS, args), {}, *IMAGENET_STATS).to(device)
    if amp is None:
        model.features = lambda x, *more: model.trunk((x - model.mean) / model.std, *more)  # without its channels_last line
    else:
        place_model(model, device, amp)
        fast_second_derivatives(model)
    return model.train(), torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)


def plain_step(model, opt, x, permutations, args: Args) -> None:
    views = {task: make_view(task, x, permutations, args.whole) for task in TASKS}
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
    objective = Objective(model, permutations, args)
    views = {task: make_view(task, x, permutations, args.whole) for task in TASKS}

    def split(z):
        return {task: (x, target) for x, (task, (_, target)) in zip(z.split(3, 1), views.items(), strict=True)}

    def loss(z):
        if args.low_memory:
            return (z * objective.image_gradient(split(z))).flatten(1).sum(1)
        total, h = objective.adversarial(split(z), True)
        return total + args.dpe_lambda * h

    with batchnorm_mode(model, "train"), input_gradients_only(model):
        z = pgd(loss, torch.cat([v for v, _ in views.values()], 1), eps=EPS, steps=args.attack_steps, step_size=ALPHA)
    opt.zero_grad(set_to_none=True)
    if args.low_memory:
        objective.backward(views, split(z))
    else:
        objective(views, split(z), True).backward()
    opt.step()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, nargs="*", help="default: 4 on a CPU, 32 and 128 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default: 2 on a CPU, 5 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of our step")
    p.add_argument("--json", default="", help="write the rows to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    on_cpu = device.type == "cpu"
    args = Args(task="ensemble")
    permutations = jigsaw_permutations(args.grid, args.num_permutations).to(device)
    rows = []
    for batch in flags.batch_size or ([4] if on_cpu else [32, 128]):
        x = torch.rand(batch, 3, 32, 32, device=device)
        plain, ours = make(args, device, None), make(args, device, flags.amp)
        steps = {
            "plain": lambda: plain_step(*plain, x, permutations, args),  # noqa: B023
            "ours": lambda: our_step(*ours, x, permutations, args),  # noqa: B023
            "ours, --low-memory": lambda: our_step(*ours, x, permutations, replace(args, low_memory=True)),  # noqa: B023
        }
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            named = {f"DPE {name}, batch {batch}": step for name, step in steps.items()}
            rows += in_turns(named, batch, device, flags.rounds or (2 if on_cpu else 5), 1)
            for row in rows[-2:]:
                add_work(row, count_flops(named[row["name"]]) / batch, device, flags.amp)
    print_rows(rows, device, flags.amp)
    write_json(flags.json, device, "dpe_step.py", rows)


if __name__ == "__main__":
    main()
