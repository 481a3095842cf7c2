"""Images per second, peak memory and share of the device's peak of one step of A-MAE (ViT-B/16, 224 pixels, PGD-2, l2 0.5).

    python benchmarks/mae_step.py                      # batch 8 on a CPU; 256 on a GPU
    python benchmarks/mae_step.py --json mae_step.json

(a) plain: the loop as one would first write it, in float32: the encoder works on all patches, of which the hidden ones are blanked; delta is
           an image, multiplied by the mask after each step; loss.backward() in the attack, which also makes the gradients of all weights;
(b) ours:  the step of adv_mae.py: only visible patches exist in encoder and attack, gradient for them only, mixed precision.

In turns, on the same batch; the median counts. The share of the peak is: FLOPs of (b) (those of a pass by PyTorch's counter), times images per
second, over the FLOPs per second of a large matrix product in the same precision. At last what feeds it: JPEG files of 500 x 375 pixels
decoded, cropped, turned and put on the device by --workers processes, alone.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from at_step import add_work, in_turns, print_rows, timed, write_json  # noqa: E402

from adv_mae import (  # noqa: E402
    Args, MaskedAutoencoder, augmentation, image_seeds, masked_task, parameter_groups, perturb, recipe_of, standardise,
)  # fmt: skip
from common import (  # noqa: E402
    batches, build_model, choose_device, image_uniform, l2_norm, open_folder, patchify, place_model, transformed,
)  # fmt: skip


def make(args: Args, device: torch.device, amp: str | None, compile: bool = False):
    """(network, optimiser); amp None: float32."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_model(args.arch, {}), args)
    place_model(model, device, amp or "off", compile)
    recipe = recipe_of("mae", args)
    return model.train(), torch.optim.AdamW(parameter_groups(model, recipe.weight_decay, None), 1e-4, betas=recipe.betas)


def plain_loss(model, x, order, n: int, target):
    """The MAE loss with an encoder that sees all patches, the hidden ones grey."""
    net, b = model.trunk, torch.arange(len(x), device=x.device)[:, None]
    hidden = torch.zeros(len(x), order.shape[1], 1, device=x.device)
    hidden[b, order[:, n:]] = 1
    tokens = net.encoder.embed((x - model.mean) / model.std)
    tokens = net.embed(net.norm(net.encoder.encode(tokens * (1 - hidden))))
    patches = tokens[:, 1:] * (1 - hidden) + net.mask_token * hidden
    patches = patches + net.positions
    out = net.predict(net.decoder_norm(net.decoder(torch.cat([tokens[:, :1], patches], 1))))[:, 1:]
    return ((out[b, order[:, n:]] - target) ** 2).mean()


def plain_step(model, opt, x, seeds, args: Args) -> None:
    patches = patchify(x, 16)
    order = image_uniform(seeds, 196).argsort(1)
    n, b = 49, torch.arange(len(x), device=x.device)[:, None]
    target, _, _ = standardise(patches[b, order[:, n:]], model)
    mask = torch.zeros(len(x), 196, device=x.device)
    mask[b, order[:, :n]] = 1
    mask = mask.view(-1, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3)
    delta = torch.randn_like(x) * mask
    delta = args.eps * delta / l2_norm(delta)
    for _ in range(args.attack_steps):
        delta.requires_grad_(True)
        opt.zero_grad()
        plain_loss(model, (x + delta).clamp(0, 1), order, n, target).backward()
        with torch.no_grad():
            g = delta.grad * mask
            delta = delta + 5 / 8 * args.eps * g / l2_norm(g)
            delta = delta * (args.eps / l2_norm(delta)).clamp(max=1)
    opt.zero_grad()
    plain_loss(model, (x + delta).clamp(0, 1), order, n, target).backward()
    opt.step()


def our_step(model, opt, x, seeds, args: Args) -> None:
    z, loss = masked_task(x, seeds, model, args)
    z = perturb(z, loss, seeds, model, args)
    opt.zero_grad(set_to_none=True)
    loss(model, z).mean().backward()
    opt.step()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto")
    p.add_argument("--batch-size", type=int, default=0, help="default: 8 on a CPU, 256 on a GPU")
    p.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default: 3 on a CPU, 10 on a GPU)")
    p.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"], help="precision of our step")
    p.add_argument("--compile", action="store_true", help="torch.compile our network")
    p.add_argument("--workers", type=int, default=0, help="processes that decode (default: 2 on a CPU, 16 on a GPU)")
    p.add_argument("--json", default="", help="write the rows to this file")
    flags = p.parse_args()
    device = choose_device(flags.device)
    on_cpu = device.type == "cpu"
    batch, rounds = flags.batch_size or (8 if on_cpu else 256), flags.rounds or (3 if on_cpu else 10)
    args = Args()
    x, seeds = torch.rand(batch, 3, 224, 224, device=device), image_seeds(0, torch.arange(batch)).to(device)
    plain, ours = make(args, device, None), make(args, device, flags.amp, flags.compile)
    steps = {"plain": lambda: plain_step(*plain, x, seeds, args), "ours": lambda: our_step(*ours, x, seeds, args)}
    rows = in_turns({f"A-MAE {name}, batch {batch}": step for name, step in steps.items()}, batch, device, rounds, 1 if on_cpu else 5)
    z, loss = masked_task(x[:2], seeds[:2], plain[0], args)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # which the counter knows on CPUs, too
        loss(plain[0], z)
    # PGD-2: 2 passes with the gradient for the patches (as dear as the pass), and the update (twice that).
    flops = (2 * args.attack_steps + 3) * counter.get_total_flops() / 2
    add_work(rows[1], flops, device, flags.amp)
    workers = flags.workers or (2 if on_cpu else 16)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a").mkdir()
        rng, count = np.random.default_rng(0), 64 * workers
        coarse = torch.from_numpy(rng.integers(0, 255, (3, 48, 64)).astype(np.float32))[None]  # smooth, so that a file is as large as a photograph's
        smooth = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        for i in range(count):
            Image.fromarray(np.roll(smooth, i, 1)).save(Path(folder) / "a" / f"{i}.jpg", quality=95)
        files = transformed(open_folder(Path(folder), 224), augmentation(recipe_of("mae", args), args))
        s, _ = timed(lambda: [images for images, _ in batches(files, 32, device, workers=workers)], device)
    rows.append({"name": f"decode and crop, {workers} processes", "images_per_s": round(count / s, 1), "peak_mb": 0, "ratio": 1.0})
    print_rows(rows, device, flags.amp)
    write_json(flags.json, device, "mae_step.py", rows)


if __name__ == "__main__":
    main()
