"""adv_mae.py: masks, targets, attacks on visible patches, fine-tuning, test sets, published ViTs."""
import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags, same_state
from PIL import Image
from torch import nn

import adv_mae
import byorl
from adv_mae import (
    CONFLICT, RECIPES, Args, MaskedAutoencoder, Recipe, augmentation, central_crop, choose_among,
    count_visible, filters, groups_of, image_seeds, labelled_task, load_vit, main, masked_task, mix,
    open_variants, parameter_groups, perturb, random_erase, real_labels, recipe_of, standardise, start_model,
)  # fmt: skip
from common import (
    IMAGENET_STATS, Images, Run, UserError, batches, build_model, check_radii, drop_path, image_uniform,
    l2_norm, load_checkpoint, load_data, load_model, open_folder, parse_args, patchify, rotate,
    sincos_positions, split_epoch, transformed, unpatchify,
)  # fmt: skip

CPU = torch.device("cpu")
PLAIN = dict(epochs=1, batch_size=1, lr=0, warmup=0, weight_decay=0)
TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, workers=0, amp="off",
    device="cpu", pretrain_epochs=1, pretrain_batch_size=240, pretrain_lr=1e-3, crop=0.6, decoder_width=16,
    decoder_depth=1, decoder_heads=2, recipe="adamw", epochs=1, batch_size=240, lr=2e-3, steps=7,
    layer_decay=(0.75,), regularise=False, eval_eps=(0.5,), eval_steps=2, attack_examples=60,
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def mae():
    """(network, images, seeds) of a small MAE with large weights, so that its output depends on its input."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_model("vit_mini4", {}, width=0.5), tiny())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    return model.eval(), 0.2 + 0.6 * torch.rand(6, 3, 16, 16), image_seeds(0, torch.arange(6))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a short pre-training, with and without attack."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert main(tiny(recipe="none", plain=True, out=str(out)))["rows"] == []
    return out


def visible_pixels(x, seeds, args):
    """(B, H, W) bool, from the order alone."""
    side = args.image_size // 4
    order = image_uniform(seeds, side**2).argsort(1)
    mask = torch.zeros(len(x), side**2, dtype=torch.bool).scatter(1, order[:, : side**2 // 4], True)
    return mask.view(-1, side, side).repeat_interleave(4, 1).repeat_interleave(4, 2)


def canvas(z, x, seeds):
    """Put attacked visible patches back into the images."""
    patches = patchify(x, 4)
    order = image_uniform(seeds, patches.shape[1]).argsort(1)[:, : z.shape[1]]
    patches[torch.arange(len(x))[:, None], order] = z
    return unpatchify(patches)


# ---- patches and masks ----


def test_patches_by_hand():
    x = torch.rand(2, 3, 12, 12)
    patches = patchify(x, 4)
    assert patches.shape == (2, 9, 3, 4, 4)
    assert torch.equal(patches[1, 5], x[1, :, 4:8, 8:12])  # row 1, column 2
    assert torch.equal(unpatchify(patches), x)
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(x, 5)


def test_the_number_of_visible_patches_is_that_of_maes_code():
    """The visible ones are cut to a whole number: 64 patches at 0.6 leave 25."""
    for patches, ratio, visible in ((196, 0.75, 49), (64, 0.75, 16), (64, 0.6, 25), (16, 0.5, 8)):
        assert count_visible(patches, ratio) == visible
    for ratio in (0.0, 0.99):
        with pytest.raises(UserError, match="of 16 patches visible"):
            count_visible(16, ratio)


def test_masks_are_per_image_and_uniform():
    order = image_uniform(image_seeds(7, torch.arange(4000)), 16).argsort(1)
    assert (order.sort(1).values == torch.arange(16)).all()
    seen = torch.zeros(16).index_add(0, order[:, :4].flatten(), torch.ones(16_000))
    assert (seen / 4000 - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 4000)  # four standard errors
    pairs = torch.stack([(order[:, :4] == k).any(1) for k in (0, 1)]).all(0).float().mean()
    assert abs(pairs - 0.25 * 3 / 15) < 4 * math.sqrt(0.05 * 0.95 / 4000)  # without replacement
    other = image_uniform(image_seeds(8, torch.arange(4000)), 16).argsort(1)
    assert (order == other).float().mean() < 0.1  # the next epoch has other masks


def test_the_decoder_does_not_see_hidden_pixels(mae):
    model, x, seeds = mae
    hidden = ~visible_pixels(x, seeds, tiny())[:, None].expand_as(x)
    outputs, losses = [], []
    for image in (x, torch.where(hidden, torch.rand_like(x), x), torch.where(hidden, x, 1 - x)):
        z, loss = masked_task(image, seeds, model, tiny())
        spy = lambda v, order: outputs.append(model(v, order)) or outputs[-1]  # noqa: E731
        losses.append(loss(spy, z).detach())
    assert torch.equal(outputs[0], outputs[1])  # the same reconstruction of another target
    assert not torch.allclose(losses[0], losses[1], rtol=1e-2)
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-2)  # visible pixels matter


def test_targets_by_hand(mae):
    model, x, _ = mae
    patches = patchify(x, 4)[:, 3:5]
    out, mu, sigma = standardise(patches, model)
    mean, std = (s.flatten().numpy() for s in (model.mean, model.std))
    for b, m in itertools.product(range(6), range(2)):
        p = patches[b, m].double().numpy() - mean[:, None, None]
        p = (p / std[:, None, None]).reshape(-1)
        want = (p - p.mean()) / np.sqrt(p.var(ddof=1) + 1e-6)
        assert np.allclose(out[b, m].numpy(), want, atol=1e-4)
        assert np.allclose((out * sigma + mu)[b, m].numpy(), p, atol=1e-4)


def test_mae_by_another_way(mae):
    """As He et al. write it: mask tokens behind the visible ones, put into the image's order, positions
    added, decoded, the hidden ones selected."""
    model, x, seeds = mae
    net = model.trunk
    order = image_uniform(seeds, 16).argsort(1)
    z, loss = masked_task(x, seeds, model, tiny())
    keep, restore = order[:, :4], order.argsort(1)
    h = net.encoder.embed((x - model.mean) / model.std)  # all patches, with a convolution
    h = torch.gather(h, 1, keep[:, :, None].expand(-1, -1, h.shape[2]))
    h = torch.cat([net.encoder.cls_token.expand(6, -1, -1), h], 1)
    for block in net.encoder.blocks:
        h = block(h)
    h = net.embed(net.norm(h))
    h_ = torch.cat([h[:, 1:], net.mask_token.expand(6, 12, -1)], 1)
    h_ = torch.gather(h_, 1, restore[:, :, None].expand(-1, -1, 16)) + sincos_positions(16, 4, 4)
    h = torch.cat([h[:, :1], h_], 1)
    for block in net.decoder:
        h = block(h)
    out = net.predict(net.decoder_norm(h))[:, 1:]  # (B, 16, 48), in the image's order
    mask = torch.ones(6, 16).scatter(1, keep, 0)
    target, _, _ = standardise(patchify(x, 4), model)
    want = (((out - target) ** 2).mean(2) * mask).sum(1) / mask.sum(1)
    assert torch.allclose(loss(model, z), want, rtol=1e-4)


def test_sincos_positions_in_float64():
    table, dim = sincos_positions(64, 3, 5).double(), 64
    for row, col, j in itertools.product(range(3), range(5), range(dim)):
        place, i = (col if j < dim / 2 else row), j % (dim // 2)
        f = math.sin if i < dim / 4 else math.cos
        want = f(place / 10_000 ** ((i % (dim // 4)) / (dim / 4)))
        assert abs(table[row * 5 + col, j].item() - want) < 1e-7


def test_positions_are_those_of_the_images_size():
    """Also after images of another size; the table is no part of checkpoints."""
    trunk = build_model("vit_mini4", {}).trunk
    for rows, cols in ((4, 4), (2, 3), (4, 4)):
        assert torch.equal(trunk.positions(rows, cols), sincos_positions(128, rows, cols))
    assert "table" not in trunk.state_dict()


# ---- the attack ----


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.3)])
def test_delta_is_zero_where_hidden_and_reaches_eps_where_visible(mae, norm, eps):
    model, x, seeds = mae
    args = tiny(norm=norm, eps=eps)
    z, loss = masked_task(x, seeds, model, args)
    assert z.shape == (6, 4, 3, 4, 4) and torch.equal(canvas(z, x, seeds), x)  # only the visible patches
    z_adv = perturb(z, loss, seeds, model, args)
    delta = canvas(z_adv, x, seeds) - x
    seen = visible_pixels(x, seeds, args)[:, None].expand_as(x)
    assert (delta[~seen] == 0).all()
    if norm == "linf":
        assert delta.abs().max() <= eps * (1 + 1e-4)
        # 2 steps of 5/8 eps from a random start do not take every pixel to the border
        assert (delta.abs()[seen] > eps * 0.99).float().mean() > 0.2
    else:
        assert torch.allclose(l2_norm(delta).flatten(), torch.full((6,), eps), rtol=1e-3)
    assert (loss(model, z_adv) > loss(model, z)).all()
    assert all(p.grad is None for p in model.parameters())


def test_the_random_start_is_independent_of_the_mask(mae, monkeypatch):
    """The same numbers for both would start the visible patches where they are small."""
    seen = []
    monkeypatch.setattr(adv_mae, "pgd", lambda loss, z, start, **k: seen.append((start - z) / k["eps"]) or z)
    model, _, _ = mae
    seeds = image_seeds(0, torch.arange(500))
    perturb(torch.zeros(500, 16), lambda net, z: z.sum(1), seeds, model, tiny(norm="linf", eps=0.1))
    together = torch.stack([seen[0].flatten(), image_uniform(seeds, 16).flatten()])
    assert torch.corrcoef(together)[0, 1].abs() < 4 / math.sqrt(8000)


def test_the_target_is_the_clean_image(mae):
    model, x, seeds = mae
    z, loss = masked_task(x, seeds, model, tiny())
    zero = lambda v, order: torch.zeros(6, 12, 48)  # noqa: E731
    assert torch.equal(loss(zero, z), loss(zero, (z + 0.1 * torch.rand_like(z)).clamp(0, 1)))
    # a normalised patch's mean square, with the unbiased variance
    assert loss(zero, z).mean() == pytest.approx(47 / 48, abs=1e-3)


def test_rotations_are_drawn_once_per_image_and_attacked_after_turning(tmp_path, monkeypatch):
    turns, attacked = [], []
    spy = lambda x, k: turns.append((x, k)) or rotate(x, k)  # noqa: E731
    monkeypatch.setattr(adv_mae, "rotate", spy)
    labelled = lambda x, y, r: attacked.append((x, y)) or labelled_task(x, y, r)  # noqa: E731
    monkeypatch.setattr(adv_mae, "labelled_task", labelled)
    main(tiny(method="rotnet", recipe="none", out=str(tmp_path / "run")))
    for (x, k), (z, y) in zip(turns, attacked, strict=True):
        assert torch.equal(z, rotate(x, k)) and torch.equal(y, k)
    share = torch.cat([k for _, k in turns]).bincount(minlength=4) / 1437
    assert (share - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 1437) and len(share) == 4


def test_label_smoothing_is_part_of_the_attacked_loss():
    logits = torch.randn(5, 3)
    _, loss = labelled_task(torch.rand(5, 2), torch.eye(3)[[0, 1, 2, 0, 1]], Recipe(**PLAIN, smoothing=0.3))
    soft = 0.7 * torch.eye(3)[[0, 1, 2, 0, 1]] + 0.1
    assert torch.allclose(loss(lambda z: logits, None), -(soft * logits.log_softmax(1)).sum(1))


# ---- random numbers of each image ----


def test_image_uniform_is_splitmix():
    """Against the published algorithm, in Python's integers."""

    def splitmix(seed, n):
        out = []
        for _ in range(n):
            seed = (seed + 0x9E3779B97F4A7C15) % 2**64
            z = seed
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            out.append(((z ^ (z >> 31)) >> 41) / 2**23)
        return out

    seeds = torch.tensor([0, 1, -5, 2**62 + 12345])
    out = image_uniform(seeds, 50)
    for seed, row in zip(seeds.tolist(), out, strict=True):
        assert row.tolist() == pytest.approx([v + 0.5 / 2**23 for v in splitmix(seed % 2**64, 50)], abs=1e-7)
    assert torch.equal(image_uniform(seeds[2:], 50), out[2:])
    many = image_uniform(image_seeds(3, torch.arange(1000)), 500)
    assert 0 < many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * many.numel()) and abs(many.var() - 1 / 12) < 1e-3
    neighbours = ((many[:-1] - 0.5) * (many[1:] - 0.5)).mean()
    assert abs(neighbours) < 4 / 12 / math.sqrt(many.numel())  # independent
    assert torch.erfinv(2 * torch.tensor([0.5 / 2**23, 1 - 0.5 / 2**23]) - 1).isfinite().all()


def test_split_epoch_says_which_images_a_batch_has(ranks):
    pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    data = Images(pixels, torch.arange(50), ["a"], torch.arange(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    for rank in range(3):
        ranks(rank, 3)
        for places, (_, y) in zip(split_epoch(50, 16), batches(data, 16, CPU, shuffle=3), strict=True):
            assert torch.equal(order[places], y)


# ---- augmentation ----


def test_augmentation_depends_on_image_and_seed_alone(tmp_path):
    train, _ = load_data("digits", "", CPU, image_size=16)
    crop = augmentation(Recipe(**PLAIN, crop=0.3, rand_augment=True, erase=0.5), tiny(flip=True))

    def augmented(seed, batch, workers):
        data = transformed(train, crop, seed=seed).subset(torch.arange(40))
        return torch.cat([x for x, _ in batches(data, batch, CPU, workers=workers)])

    state = torch.get_rng_state()
    x = augmented(5, 7, 0)
    assert torch.equal(x, augmented(5, 20, 2)) and torch.equal(torch.get_rng_state(), state)
    changed = (augmented(6, 20, 0) - x).flatten(1).abs().amax(1) > 0
    assert changed.float().mean() > 0.9
    assert x.amin() >= 0 and x.amax() <= 1 and x.shape == (40, 3, 16, 16)


def test_streamed_folder_is_cropped_from_the_original(tmp_path):
    """Small crops of a large image show detail that an image reduced beforehand has lost."""
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, np.arange(640) % 8 < 4] = 255
    for split, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(stripes).save(tmp_path / split / name / "x.png")
    train, _ = load_data("folder", str(tmp_path), CPU, image_size=64, stream=True)
    crop = augmentation(Recipe(**PLAIN, crop=0.01), tiny(dataset="folder", image_size=64))

    def contrast(data):
        return next(batches(data, 1, CPU, workers=0))[0].std().item()

    assert contrast(train) < 0.05 and max(contrast(transformed(train, crop, seed=s)) for s in range(60)) > 0.3


def test_the_evaluated_crop(tmp_path):
    (tmp_path / "a").mkdir()
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :, 0] = np.arange(200)  # red tells the column
    Image.fromarray(image).save(tmp_path / "a" / "x.png")
    data = open_folder(tmp_path, 64)
    # 0.875 of the height of 100, from the middle of 200 columns: 56.25 to 143.75; all of the height: 50 to
    # 150; squeezed: 0 to 200
    cases = ("imagenet", 0.875, 56, 144), ("imagenet", 1.0, 50, 150), ("sgd", 1.0, 0, 200)
    for recipe, share, low, high in cases:
        crop = central_crop(recipe, tiny(dataset="folder", image_size=64, eval_crop=share))
        x, _ = next(batches(transformed(data, crop), 1, CPU, workers=0))
        assert x.shape[-1] == 64
        assert abs(x[0, 0, 32, 0] * 255 - low) < 3 and abs(x[0, 0, 32, -1] * 255 - high) < 3


def test_random_erasing():
    torch.manual_seed(0)
    x = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    changed = [(random_erase(x, 0.25, *IMAGENET_STATS) != x).any(0) for _ in range(400)]
    hit = [c.float().mean().item() for c in changed if c.any()]
    assert abs(len(hit) / 400 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert 0.015 < min(hit) and max(hit) < 0.35
    big = max(changed, key=lambda c: c.sum())
    rows, cols = big.any(1).nonzero(), big.any(0).nonzero()
    inside = big[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    assert inside.float().mean() > 0.95  # a rectangle


def test_mixed_targets_sum_to_one_and_tell_the_share():
    torch.manual_seed(0)
    y = torch.arange(8)
    x = (y.float() / 8).view(8, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()  # its value tells the class
    kinds = set()
    for _ in range(40):
        mixed, target = mix(x, y, Recipe(**PLAIN, mixup=0.8, cutmix=1.0), 8)
        assert torch.allclose(target.sum(1), torch.ones(8)) and (target >= 0).all()
        assert (target > 0).sum(1).max() <= 2
        # pixels and targets are mixed alike
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ (y.float() / 8), atol=1e-5)
        kinds.add("cut" if len(mixed[1].unique()) > 1 else "up")
    assert kinds == {"cut", "up"}
    same, target = mix(x, y, Recipe(**PLAIN), 8)
    assert torch.equal(same, x) and torch.equal(target, torch.eye(8))


# ---- training ----


def test_recipes_are_the_papers():
    """He et al. 2022, tables of their appendix; Rebuffi et al., appendices C and E."""
    args = Args()
    common = ("batch_size", "lr", "lowest", "warmup", "weight_decay", "betas", "clip", "ema")
    images = ("crop", "rand_augment", "erase", "mixup", "cutmix", "smoothing", "drop_path")
    adam, fine = (0.9, 0.95), (0.9, 0.999)
    scratch = (4096, 1.6e-3, 0, 20 / 300, 0.3, adam, 0, 0.9999)
    assert (args.epochs, args.steps) == (100, 2500)
    for kind, length, want, want_images in (
        ("mae", 800, (4096, 2.4e-3, 0, 40 / 800, 0.05, adam, 0, 0), (0.2, 0, 0, 0, 0, 0, 0)),
        ("supervised", 300, scratch, (0.08, 1, 0, 0.8, 1.0, 0.1, 0.1)),
        ("rotnet", 300, scratch, (0.08, 1, 0, 0, 0, 0.1, 0.1)),
        ("imagenet", 100, (512, 5e-4, 1e-6, 0.05, 0.05, fine, 0, 0), (0.08, 1, 0.25, 0.8, 1.0, 0.1, 0.1)),
        ("adamw", 100, (512, 5e-4, 1e-6, 0.05, 0.05, fine, 0, 0), (0, 0, 0, 0, 0, 0.1, 0.1)),
        ("sgd", 2500, (512, 0.01, 0, 0.2, 0, None, 1, 0), (0, 0, 0, 0, 0, 0, 0)),
    ):
        recipe = recipe_of(kind, args)
        assert (recipe.steps or recipe.epochs) == length
        for name, value in zip(common + images, want + want_images, strict=True):
            assert getattr(recipe, name) == (pytest.approx(value) if name == "lr" else value), (kind, name)
    assert recipe_of("mae", Args(pretrain_batch_size=512)).lr == pytest.approx(3e-4)
    assert args.attack_steps == 2 and (args.eps, args.norm) == (0.5, "l2")
    for kind in RECIPES:  # --no-regularise keeps the rest
        recipe = recipe_of(kind, Args(regularise=False, crop=0.5))
        assert not any(getattr(recipe, name) for name in images[1:])
        assert recipe.crop == (0.5 if RECIPES[kind].crop else 0) and recipe.lr == recipe_of(kind, args).lr


def test_layer_wise_decay_has_14_levels():
    with torch.device("meta"):
        model = build_model("vit_b16", {"class": 1000})
    gamma = 0.65
    groups = parameter_groups(model, 0.05, gamma)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        k = 12 - int(name.split(".")[2]) if "blocks" in name else 13
        k = 0 if "fc_norm" in name or "heads" in name else k
        assert scale[id(p)] == pytest.approx(gamma**k), name
    levels = sorted(set(scale.values()))
    assert len(levels) == 14 and levels[-1] == 1 and levels[0] == pytest.approx(0.0037, abs=5e-5)
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in free) == (p.dim() == 1 or name == "trunk.cls_token"), name
    assert {g["scale"] for g in parameter_groups(model, 0.05, None)} == {1.0}


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    out = drop_path(x, 0.3, training=True)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out.flatten(1) == out[:, 0, :1]).all()  # all of an image's branch or nothing
    assert abs(out.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / 20_000)
    assert drop_path(x, 0.3, training=False) is x and drop_path(x, 0.0, training=True) is x
    model = start_model("supervised", tiny(arch="vit_ti4"), Recipe(**PLAIN, drop_path=0.1), None, 10)
    assert [b.drop_path for b in model.trunk.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_gamma_0_keeps_the_encoder(pretrained, tmp_path):
    init = str(pretrained / "a-mae.pt")
    main(tiny(init=init, layer_decay=(0.0, 1.0), eval_eps=(), out=str(tmp_path / "run")))
    before = load_checkpoint(pretrained / "a-mae.pt")["model"]
    encoder = [k for k in before if k.startswith("trunk.") and "fc_norm" not in k]
    for gamma, kept in (("0", True), ("1", False)):
        after = load_checkpoint(tmp_path / "run" / f"a-mae-{gamma}.pt")["model"]
        assert all(torch.equal(before[k], after[k]) for k in encoder) == kept
        assert after["heads.class.weight"].any()
    frozen, full = (line["lr"] for line in metrics(tmp_path / "run"))
    assert frozen == full > 0  # the head's, not gamma^13 of it


def test_pretraining_learns_and_its_results(pretrained):
    a, plain = (load_checkpoint(pretrained / f"{name}.pt") for name in ("a-mae", "mae"))
    assert a["pretrained"]["eps"] == 0.5 and plain["pretrained"]["eps"] == 0
    assert not same_state(a["model"], plain["model"])
    assert [line["stage"] for line in metrics(pretrained)] == ["mae", "a-mae"]
    assert {"reconstruction.png", "filters.png"} <= {p.name for p in pretrained.iterdir()}
    assert torch.equal(a["model"]["trunk.fc_norm.weight"], torch.ones(64))  # MAE does not use it
    longer = pretrained.parent / "longer"
    main(tiny(recipe="none", pretrain_epochs=8, eps=0.0, out=str(longer)))
    losses = [line["loss"] for line in metrics(longer)]
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_changes_nothing(tmp_path):
    """Five steps in float32, whole and in parts, also where parts are not equal."""
    losses, weights = [], []
    for parts in (1, 3, 5):
        out = tmp_path / str(parts)
        main(tiny(recipe="none", pretrain_batch_size=288, eps=0.3, accumulate=parts, out=str(out)))
        losses.append(metrics(out)[0]["loss"])
        weights.append(load_checkpoint(out / "a-mae.pt")["model"]["trunk.blocks.0.mlp.fc1.weight"])
        assert torch.allclose(weights[0], weights[-1], atol=2e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


STEPS = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import common, adv_mae
losses, log = [], common.Run.log
def spy(self, **values):
    losses.append(float(values["loss"]) * self.count)
    log(self, **values)
common.Run.log = spy
common.cli(adv_mae.main, adv_mae.Args)
Path(f"losses-{{sys.argv[-1]}}-{{common.os.environ.get('RANK', 0)}}.json").write_text(json.dumps(losses))
"""


def test_two_ranks_are_one(tmp_path):
    """torchrun with two processes: the same five losses, to 1e-5, as one process with the same global batch.
    An odd batch is shared unequally."""
    args = TINY | dict(recipe="none", pretrain_batch_size=288, eps=0.3)
    (tmp_path / "steps.py").write_text(STEPS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, start in (("two", torchrun), ("one", [])):
        done = subprocess.run(
            [sys.executable, *start, "steps.py", *flags(args), "--out", out],
            capture_output=True, text=True, timeout=240, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    files = (tmp_path / f"losses-{name}.json" for name in ("one-0", "two-0", "two-1"))
    alone, *both = (json.loads(file.read_text()) for file in files)
    assert len(alone) == 5
    assert [a + b for a, b in zip(*both, strict=True)] == pytest.approx(alone, rel=1e-5)
    one, two = (load_checkpoint(tmp_path / run / "a-mae.pt")["model"] for run in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def interrupted(args: dict, out: Path, monkeypatch, *stops: int) -> None:
    """Run main with Ctrl-C in the steps of these numbers, counted over all, and resume after each."""
    log, count = Run.log, [0]
    for stop in stops:

        def spy(self, stop=stop, **losses):
            log(self, **losses)
            count[0] += 1
            if count[0] == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(Run, "log", spy)
        with pytest.raises(KeyboardInterrupt):
            main(tiny(**args, out=str(out), resume=True))
    monkeypatch.setattr(Run, "log", log)
    main(tiny(**args, out=str(out), resume=True))


@pytest.mark.parametrize(("changes", "stops"), [
    (dict(pretrain_epochs=2, epochs=2), (8, 22)),  # in the second epoch of A-MAE and of fine-tuning
    (dict(method="supervised", recipe="none", regularise=True, pretrain_epochs=2), (8,)),  # moving average
    (dict(recipe="sgd"), (13,)),  # the last of 7 steps, in the second epoch
])  # fmt: skip
def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch, changes, stops):
    main(tiny(**changes, out=str(tmp_path / "whole")))
    interrupted(changes, tmp_path / "parts", monkeypatch, *stops)
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.pt"))
    assert files == sorted(p.name for p in (tmp_path / "parts").glob("*.pt"))
    for file in files:
        states = [load_checkpoint(tmp_path / run / file)["model"] for run in ("whole", "parts")]
        assert same_state(*states), file


@pytest.mark.parametrize("method", ["rotnet", "supervised"])
def test_other_methods_are_fine_tuned_too(method, tmp_path):
    results = main(tiny(method=method, recipe="sgd", regularise=True, out=str(tmp_path / "run")))
    assert {row["name"] for row in results["rows"]} == {f"a-{method}-sgd"}
    assert load_checkpoint(tmp_path / "run" / f"a-{method}-sgd.pt")["pretrained"]["method"] == method
    # 7 steps are an epoch of 6 and one more
    assert [line["stage"] for line in metrics(tmp_path / "run")].count(f"a-{method}-sgd") == 2
    if method == "supervised":  # training from scratch, evaluated as it is
        init = str(tmp_path / "run" / "a-supervised.pt")
        rows = main(tiny(recipe="none", init=init, out=str(tmp_path / "again")))["rows"]
        assert rows[0]["name"] == "a-supervised" and rows[0]["examples"] == 360


def test_fine_tuning_takes_an_encoder_of_byorl(tmp_path):
    byorl.main(byorl.Args(
        dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, epochs=1, warmup_epochs=0,
        batch_size=240, hidden=16, projection=8, attack="pgd", attack_steps=2, step_size=0.3, heads="none",
        val_images=200, amp="off", device="cpu", out=str(tmp_path / "byorl"),
    ))  # fmt: skip
    rows = main(tiny(init=str(tmp_path / "byorl" / "byorl.pt"), out=str(tmp_path / "run")))["rows"]
    assert {row["name"] for row in rows} == {"byorl-0.75"}
    assert rows[0]["pretrained"]["method"] == "byol" and rows[0]["pretrained"]["eps"] == 128 / 255
    # the accuracy is that of the checkpoint, by load_model alone
    _, test = load_data("digits", "", CPU, image_size=16)
    file = tmp_path / "run" / "byorl-0.75.pt"
    correct = load_model(file)(test.pixels / 255).argmax(1) == test.labels
    assert rows[0]["accuracy"] == pytest.approx(100 * correct.float().mean().item(), abs=0.01)
    again = main(tiny(recipe="none", init=str(file), out=str(tmp_path / "again")))["rows"]
    assert [r["accuracy"] for r in again] == [r["accuracy"] for r in rows]
    assert again[0]["checkpoint"] == rows[0]["checkpoint"] == str(file)


def test_a_step_on_large_images_of_a_folder(tmp_path):
    """224 pixels, patches of 16, from JPEG files of other sizes, decoded by two processes."""
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (180 + 40 * i, 260, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    results = main(tiny(
        dataset="folder", data_dir=str(tmp_path), image_size=224, arch="vit_ti16", width=1 / 3, workers=2,
        pretrain_batch_size=6, decoder_width=32, batch_size=6, flip=True, crop=0.0, recipe="imagenet",
        regularise=True, attack_examples=4, out=str(tmp_path / "run"),
    ))  # fmt: skip
    rows = [(r["set"], r["eps"], r["examples"]) for r in results["rows"]]
    assert rows == [("test", 0, 6), ("test", 0.5, 4)]


def test_the_average_of_a_short_run_is_not_its_start(tmp_path):
    args = tiny(method="rotnet", recipe="none", eps=0.0, pretrain_epochs=3)
    main(replace(args, out=str(tmp_path)))
    torch.manual_seed(0)
    start = start_model("rotnet", args, Recipe(**PLAIN), None, 10).state_dict()
    average, last = (load_checkpoint(tmp_path / f"{name}.pt")["model"] for name in ("rotnet", "last"))
    key = "trunk.blocks.1.mlp.fc1.weight"
    moved = (last[key] - start[key]).norm()
    assert moved > 0.1 and (average[key] - start[key]).norm() > 0.5 * moved
    assert not torch.equal(average[key], last[key])


# ---- evaluation ----


def test_an_encoder_keeps_its_own_attack_on_record(tmp_path):
    main(tiny(recipe="none", norm="linf", eps=2 / 255, out=str(tmp_path / "run")))
    results = main(tiny(init=str(tmp_path / "run" / "a-mae.pt"), eval_eps=(), out=str(tmp_path / "tuned")))
    assert (results["args"]["norm"], results["args"]["eps"]) == ("linf", 2 / 255)


def write_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 80, np.uint8)).save(folder / name)


def test_two_test_sets_of_one_name_are_refused(tmp_path):
    for folder in ("x/val", "y/val", "x/test"):
        write_images(tmp_path / folder, ["a/0.png"])
    for folders in (("x/val", "y/val"), ("x/test",)):
        with pytest.raises(UserError, match="names two test sets"):
            open_variants(tiny(eval_data=",".join(str(tmp_path / f) for f in folders)), ["a"])


def test_groups_of_classes():
    classes = [f"n{i:08d}" for i in range(1000)]
    logits = torch.randn(5, 1000)

    def chosen(groups, logits=logits):
        return choose_among(logits, groups).argmax(1)

    some = groups_of([classes[7], classes[3]], classes, "IN-R")  # masked: only the two count
    assert torch.equal(chosen(some), logits[:, [7, 3]].argmax(1))
    names = sorted(map(str, range(1000)))  # as folders are sorted: 0, 1, 10, 100, ...
    assert [int(names[i]) for i in chosen(groups_of(names, classes, "IN-V2"))] == logits.argmax(1).tolist()
    groups = groups_of(sorted(CONFLICT), classes, "Conflict")
    assert groups.shape == (16, 1000) and torch.allclose(groups.sum(1), torch.ones(16))
    assert ((groups > 0).sum(0) <= 1).all()
    # counts of Geirhos et al.: 1 airplane, 4 bears, 2, 49 birds, 5, 7, 3, 6 cats, 4, 3, 109 dogs, ...
    assert (groups > 0).sum(1).tolist() == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    probabilities = logits.softmax(1)
    want = torch.stack([probabilities[:, row > 0].mean(1) for row in groups], 1).argmax(1)
    assert torch.equal(chosen(groups), want)
    far = torch.zeros(1, 1000)
    far[0, 5], far[0, 3] = 300, 1  # probabilities of 3 and 7 are 0 in float32
    assert chosen(some, far).tolist() == [1]
    for names, known in ((["zebra"], classes), (["5"], classes[:10]), (["cat"], ["a", "b"])):
        with pytest.raises(UserError, match=f"'{names[-1]}' is none of"):
            groups_of(names, known, "x")


def test_conflict_stimuli_without_conflict_are_left_out(tmp_path):
    write_images(tmp_path / "conflict", ["cat/cat1-dog3.png", "cat/cat1-cat2.png", "dog/dog4-bear1.png"])
    classes = [f"n{i:08d}" for i in range(1000)]
    images, groups = open_variants(tiny(eval_data=str(tmp_path / "conflict")), classes)["conflict"]
    assert images.labels[images.index].tolist() == [0, 1] and groups.shape == (2, 1000)


def test_variants_and_real_labels_are_evaluated(tmp_path):
    """On images by their names, and with several right answers."""
    rng = np.random.default_rng(0)
    files = [f"{c}/ILSVRC2012_val_{3 * i + j + 1:08d}.png" for i, c in enumerate("012") for j in range(3)]
    some = [f for f in files if f[0] != "1"]
    for split, names in (("train", files), ("test", files), ("other", some)):
        for name in names:
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / split / name)
    real = [[0], [0, 1], [2], [], [1], [1], [0, 1, 2], [2], [2]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    args = tiny(
        dataset="folder", data_dir=str(tmp_path), eval_data=str(tmp_path / "other"), eps=0.0, eval_eps=(),
        real=str(tmp_path / "real.json"), pretrain_batch_size=9, batch_size=9, out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = {row["set"]: row for row in main(args)["rows"]}
    assert {k: r["examples"] for k, r in rows.items()} == {"test": 9, "other": 6, "real": 8}
    model = load_model(tmp_path / "run" / "mae-0.75.pt")

    def logits(split, names):
        x = [torch.from_numpy(np.array(Image.open(tmp_path / split / name))) for name in names]
        return model(torch.stack(x).permute(0, 3, 1, 2) / 255)

    def accuracy(predicted, labels):
        return pytest.approx(100 * (predicted == labels).float().mean().item(), abs=0.01)

    out = logits("test", files).argmax(1)
    assert rows["test"]["accuracy"] == accuracy(out, torch.arange(9) // 3)
    correct = [k in labels for k, labels in zip(out.tolist(), real, strict=True) if labels]
    assert rows["real"]["accuracy"] == pytest.approx(100 * sum(correct) / 8, abs=0.01)
    masked = logits("other", some)[:, [0, 2]].argmax(1)
    assert rows["other"]["accuracy"] == accuracy(masked, torch.arange(6) // 3)
    _, test = load_data("folder", str(tmp_path), CPU, image_size=16, stream=True)
    for bad, match in (
        (real[:1], "KeyError"), (real[:8] + [[3]], "more than the 3 classes"), ([[]] * 9, "no label for any"),
    ):  # fmt: skip
        (tmp_path / "real.json").write_text(json.dumps(bad))
        with pytest.raises(UserError, match=match):
            real_labels(args, test)


def test_filters_are_principal_components():
    torch.manual_seed(0)
    w = torch.randn(96, 3, 4, 4) * torch.linspace(0.1, 2, 48).view(3, 4, 4)
    w += torch.randn(96, 1, 1, 1) * torch.rand(3, 4, 4)
    out = filters({"model": {"trunk.patch_embed.weight": w}}, 5)
    flat = w.flatten(1).double().numpy()
    flat = (flat - flat.mean(0)) / flat.std(0, ddof=1)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    for i in range(5):
        v = vectors[:, -1 - i]
        scaled = [(s - s.min()) / (s.max() - s.min()) for s in (v, -v)]
        assert min(np.abs(out[i].numpy().reshape(-1) - s).max() for s in scaled) < 1e-3
    assert filters({"model": {"trunk.patch_embed.weight": w}}).shape == (28, 3, 4, 4)


def test_the_papers_numbers():
    """The averages over five data sets are those in Table 1's last rows."""
    lines = [line.split("|") for line in (ROOT / "results" / "paper.txt").read_text().splitlines()]
    lines = [fields for fields in lines if fields[0].strip() == "adv_mae"]
    table = {tuple(f[2].rsplit(maxsplit=2)): [*map(float, f[3].split())] for f in lines}
    averages = {
        "sgd": {
            "supervised": (87.24, 86.94, 87.78), "rotnet": (78.30, 80.94, 81.65),
            "mae": (82.97, 84.37, 85.11), "byol": (85.09, 86.49, 86.53),
        },
        "adamw": {
            "supervised": (87.73, 87.31, 88.01), "rotnet": (81.73, 83.10, 83.68),
            "mae": (87.10, 87.49, 87.96), "byol": (86.36, 86.85, 86.83),
        },
    }  # fmt: skip
    for recipe, method in itertools.product(averages, averages["sgd"]):
        rows = [v for (_, r, m), v in table.items() if (r, m) == (recipe, method)]
        assert np.allclose(np.mean(rows, 0), averages[recipe][method], atol=0.011) and len(rows) == 5


# ---- published checkpoints ----


def published(dim=384, depth=12, decoder=True, head=0, learned=False) -> dict:
    """A state dict with the names of MAE's code."""
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, 197, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
    }  # fmt: skip
    block = {
        "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
        "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
    }  # fmt: skip
    for i, (name, shape) in itertools.product(range(depth), block.items()):
        shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    last = "fc_norm" if head else "norm"
    shapes |= {f"{last}.weight": (dim,), f"{last}.bias": (dim,)}
    shapes |= {"head.weight": (head, dim), "head.bias": (head,)} if head else {}
    if decoder:
        shapes |= {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 5, 64), "decoder_pred.bias": (9,)}
    torch.manual_seed(0)
    weights = {k: 0.02 * torch.randn(s) for k, s in shapes.items()}
    if not learned:
        weights["pos_embed"] = torch.cat([torch.zeros(1, dim), sincos_positions(dim, 14, 14)])[None]
    return weights


def test_a_pretrained_mae_maps_one_to_one(tmp_path):
    """As MAE's training script writes it, and with the prefixes of compiled and parallel modules."""
    weights = published()
    want = {k for k in weights if not k.startswith(("decoder_", "mask_token", "norm.", "pos_embed"))}
    args = Args(arch="vit_s16")
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        file = {"model": {prefix + k: v for k, v in weights.items()}, "args": argparse.Namespace(lr=1.0)}
        torch.save(file, tmp_path / "mae.pth")
        state = load_vit(str(tmp_path / "mae.pth"), args)
        assert state["network"]["heads"] == {} and "positions" not in state["network"]
        trunk = build_model(**state["network"]).trunk
        theirs = {k.replace("patch_embed.proj", "patch_embed") for k in want}
        assert {k for k in trunk.state_dict() if not k.startswith("fc_norm")} == theirs
        key = "blocks.3.attn.qkv.weight"
        assert torch.equal(state["model"]["trunk." + key], weights[key])
        assert torch.equal(state["model"]["trunk.fc_norm.weight"], torch.ones(384))


def test_a_published_classifier_computes_the_same(tmp_path):
    """Against a forward pass with PyTorch's own encoder layer."""
    fine = published(decoder=False, head=7, learned=True)
    torch.save(fine, tmp_path / "tuned.pth")
    state = load_vit(str(tmp_path / "tuned.pth"), Args(arch="vit_s16"))
    assert state["network"]["heads"] == {"class": 7} and state["network"]["positions"] == 196
    model = build_model(**state["network"])
    model.load_state_dict(state["model"])
    model.eval()
    x = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in IMAGENET_STATS)
    h = F.conv2d((x - mean) / std, fine["patch_embed.proj.weight"], fine["patch_embed.proj.bias"], stride=16)
    h = torch.cat([fine["cls_token"].expand(2, -1, -1), h.flatten(2).transpose(1, 2)], 1) + fine["pos_embed"]
    more = dict(batch_first=True, norm_first=True)
    layer = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", 1e-6, **more).eval()
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
        "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    with torch.no_grad():
        for i in range(12):
            pairs = itertools.product(names.items(), ("weight", "bias"))
            layer.load_state_dict({a + kind: fine[f"blocks.{i}.{b}{kind}"] for (a, b), kind in pairs})
            h = layer(h)
        h = F.layer_norm(h[:, 1:].mean(1), (384,), fine["fc_norm.weight"], fine["fc_norm.bias"], 1e-6)
        assert torch.allclose(model(x), F.linear(h, fine["head.weight"], fine["head.bias"]), atol=1e-4)
    with pytest.raises(ValueError, match="learned positions for 196"):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(UserError, match="positions for 196 patches, --image-size makes 4"):
        main(tiny(init=str(tmp_path / "tuned.pth"), arch="vit_s16", image_size=32, out=str(tmp_path / "run")))


@pytest.mark.parametrize(("change", "match"), [
    (lambda w: w | {"blocks.3.ls1.gamma": torch.ones(384)}, "blocks.3.ls1.gamma"),
    (lambda w: w | {"dist_token": torch.ones(1, 1, 384)}, "dist_token"),
    (lambda w: {k: v for k, v in w.items() if k != "blocks.5.mlp.fc2.bias"}, "blocks.5.mlp.fc2.bias"),
    (lambda w: w | {"blocks.0.attn.qkv.bias": torch.ones(7)}, "blocks.0.attn.qkv.bias"),
    (lambda w: {k: v for k, v in w.items() if k != "pos_embed"}, "pos_embed"),
    (lambda w: published(dim=192), "read as --arch vit_s16"),  # other heads than the flag says
    (lambda w: {"a": 1}, "pos_embed"), (lambda w: [1], "AttributeError"),
    (lambda w: w | {"lr": np.float64(1.0)}, "numpy._core.multiarray.scalar"),
    (lambda w: w | {"file": Path("x")}, "pathlib"),
])  # fmt: skip
def test_foreign_checkpoints_are_refused_by_name(one_sentence, tmp_path, change, match):
    torch.save(change(published()), tmp_path / "x.pth")
    args = {"init": tmp_path / "x.pth", "arch": "vit_s16", "image_size": 224, "out": tmp_path / "run"}
    assert match in one_sentence(adv_mae, *flags(TINY | args))


def test_fine_tuning_a_published_checkpoint(tmp_path):
    weights = published(dim=192)
    weights["pos_embed"] = torch.cat([torch.zeros(1, 192), sincos_positions(192, 2, 2)])[None]
    torch.save({"model": weights}, tmp_path / "vit.pth")
    args = dict(arch="vit_ti16", width=1.0, image_size=32, eval_eps=(), batch_size=1437)
    rows = main(tiny(init=str(tmp_path / "vit.pth"), **args, out=str(tmp_path / "run")))["rows"]
    assert rows[0]["name"] == "vit-0.75" and rows[0]["pretrained"]["method"] == "vit"
    assert load_model(tmp_path / "run" / "vit-0.75.pt").spec["arch"] == "vit_ti16"


# ---- what users get wrong ----


@pytest.mark.parametrize(("changes", "match"), [
    ({"layer_decay": "0.5,2"}, "--layer-decay"), ({"mask_ratio": 0.99}, "0 of 16 patches visible"),
    ({"norm": "linf"}, "radius of its own"), ({"decoder_heads": 3}, "multiple of 4"),
    ({"image_size": 18}, "no multiple of 4"), ({"init": "no.pt"}, "there is no no.pt"),
    ({"eval_data": "nowhere"}, "no images in nowhere"),
    ({"eval_norm": "linf", "eval_eps": Args.eval_eps}, "linf radii such as 8/255"),
    ({"real": ROOT / "README.md"}, "--real needs --dataset folder"), ({"batch_size": 1}, "at least 2 images"),
    ({"pretrain_lr": 1e30, "pretrain_batch_size": 100, "eps": 0.0}, "became NaN"),
])  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    assert match in one_sentence(adv_mae, *flags(TINY | changes | {"out": tmp_path / "run"}))
    assert not list(tmp_path.glob("run/*.pt"))  # before any training


def test_another_file_of_init_is_refused_on_resume(one_sentence, pretrained, tmp_path):
    shutil.copy(pretrained / "a-mae.pt", tmp_path / "init.pt")
    args = TINY | {"init": tmp_path / "init.pt", "eval_eps": (), "out": tmp_path / "run"}
    main(Args(**args | {"init": str(args["init"]), "out": str(args["out"])}))
    torch.save(load_checkpoint(tmp_path / "init.pt") | {"epoch": 99}, tmp_path / "init.pt")
    assert "not those that the run" in one_sentence(adv_mae, *flags(args), "--resume")


def test_the_attack_in_evaluation_has_its_own_norm():
    """Pre-training with linf 1/255 is evaluated at l2 2."""
    args = parse_args(Args, ["--norm", "linf", "--eps", "1/255"])
    check_radii(args)
    with pytest.raises(UserError, match="--eval-eps 2"):
        check_radii(replace(args, eval_norm="linf"))


def test_wrong_checkpoints(one_sentence, pretrained, tmp_path):
    resnet = build_model("resnet18", {"class": 10}, width=1 / 16)
    torch.save({"network": resnet.spec, "model": resnet.state_dict(), "stage": "x"}, tmp_path / "resnet.pt")
    five = build_model("vit_mini4", {"class": 5}, width=0.5)
    torch.save({"network": five.spec, "model": five.state_dict(), "stage": "x"}, tmp_path / "five.pt")
    ten = build_model("vit_mini4", {"class": 10}, width=0.5)
    state = {"network": ten.spec, "model": ten.state_dict(), "stage": "x", "classes": list("abcdefghij")}
    torch.save(state, tmp_path / "named.pt")
    for init, changes, match in (
        (tmp_path / "resnet.pt", {}, "no finished ViT"), (pretrained / "last.pt", {}, "no finished ViT"),
        (pretrained / "a-mae.pt", {"recipe": "none"}, "no finished classifier"),
        (tmp_path / "five.pt", {"recipe": "none"}, "other classes"), (tmp_path, {}, "Is a directory"),
        (tmp_path / "named.pt", {"recipe": "none"}, "other classes"),
    ):  # fmt: skip
        args = TINY | changes | {"init": init, "out": tmp_path / "run"}
        assert match in one_sentence(adv_mae, *flags(args))
