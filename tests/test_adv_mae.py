"""adv_mae.py: masks, targets, the attack on visible patches, fine-tuning with layer-wise decay, ImageNet's variants, published checkpoints."""
import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags, same_state
from PIL import Image
from torch import nn

import adv_mae
import byorl
from common import old_parse_args as parse_args
from adv_mae import (
    load_vit, transformed,
    CONFLICT, PAPER, ChooseAmong, Args, Recipe, filters, groups_of, image_seeds, layer_of, main, masked_autoencoder, masked_task, mix, open_variants,
    paper_number, parameter_groups, patchify, perturb, real_labels, recipe_of, rotation_task, target_of, unpatchify,
)  # fmt: skip
from common import (
    IMAGENET_STATS, Images, UserError, batches, build_model, build_trunk, drop_path, image_uniform, l2_norm, load_checkpoint, load_data, load_model,
    open_folder, rotate, sincos_positions, split_epoch,
)  # fmt: skip

CPU = torch.device("cpu")
PLAIN = dict(epochs=1, batch_size=1, lr=0, warmup=0, weight_decay=0, betas=None)
TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, workers=0, amp="off", device="cpu", pretrain_epochs=1,
    pretrain_batch_size=240, pretrain_lr=1e-3, crop=0.6, decoder_width=16, decoder_depth=1, decoder_heads=2, epochs=1, batch_size=240, lr=2e-3, steps=7,
    layer_decay="0.75", mixup=0.0, cutmix=0.0, rand_augment=False, erase=0.0, ema=0.0, eval_crop=1.0, eval_eps="0.5", eval_steps=2, eval_examples=60,
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def mae():
    """(network, images, seeds) of a small MAE whose weights are large enough for its output to depend on its input."""
    torch.manual_seed(0)
    model = masked_autoencoder(build_model("vit_mini4", {}, width=0.5), tiny())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    return model.eval(), 0.2 + 0.6 * torch.rand(6, 3, 16, 16), image_seeds(0, torch.arange(6))


def visible_pixels(x, seeds, args):
    """(B, H, W) bool, from the order alone."""
    n = (args.image_size // 4) ** 2
    order = image_uniform(seeds, n).argsort(1)
    mask = torch.zeros(len(x), n, dtype=torch.bool).scatter(1, order[:, : n - round(args.mask_ratio * n)], True)
    side = args.image_size // 4
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


@pytest.mark.parametrize(("size", "patch", "ratio", "visible"), [(224, 16, 0.75, 49), (32, 4, 0.75, 16), (16, 4, 0.5, 8), (16, 4, 0.9, 2)])
def test_the_share_of_hidden_patches_is_exact(size, patch, ratio, visible):
    assert adv_mae.count_visible((size // patch) ** 2, ratio) == visible


def test_masks_are_per_image_and_uniform():
    order = image_uniform(image_seeds(7, torch.arange(4000)), 16).argsort(1)
    assert (order.sort(1).values == torch.arange(16)).all()
    seen = torch.zeros(16).index_add(0, order[:, :4].flatten(), torch.ones(16_000))
    assert (seen / 4000 - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 4000)  # four standard errors
    pairs = torch.stack([(order[:, :4] == 0).any(1), (order[:, :4] == 1).any(1)]).all(0).float().mean()
    assert abs(pairs - 0.25 * 3 / 15) < 4 * math.sqrt(0.05 * 0.95 / 4000)  # without replacement
    other = image_uniform(image_seeds(8, torch.arange(4000)), 16).argsort(1)
    assert (order == other).float().mean() < 0.1  # the next epoch has other masks


def test_the_decoder_does_not_see_hidden_pixels(mae):
    model, x, seeds = mae
    hidden = ~visible_pixels(x, seeds, tiny())[:, None].expand_as(x)
    x2 = torch.where(hidden, torch.rand_like(x), x)
    outputs = []
    for image in (x, x2):
        z, loss = masked_task(image, seeds, model, tiny())
        spy = lambda v, order: outputs.append(model(v, order)) or outputs[-1]  # noqa: E731
        outputs.append(loss(spy, z).detach())
    (first, loss1), (second, loss2) = outputs[:2], outputs[2:]
    assert torch.equal(first, second) and not torch.allclose(loss1, loss2, rtol=1e-2)  # the same painting, another target
    z3, _ = masked_task(torch.where(hidden, x, 1 - x), seeds, model, tiny())
    assert not torch.allclose(model(z3.flatten(0, 1), image_uniform(seeds, 16).argsort(1)), first, rtol=1e-2)  # what is visible matters


def test_targets_by_hand(mae):
    model, x, seeds = mae
    patches = patchify(x, 4)[:, 3:5]
    out = target_of(patches, model, tiny()).detach()
    mean, std = (s.flatten().numpy() for s in (model.mean, model.std))
    for b in range(6):
        for m in range(2):
            p = ((patches[b, m].double().numpy() - mean[:, None, None]) / std[:, None, None]).reshape(-1)
            want = (p - p.mean()) / np.sqrt(p.var(ddof=1) + 1e-6)
            assert np.allclose(out[b, m].numpy(), want, atol=1e-4)
            assert np.allclose(target_of(patches, model, tiny(target="pixels"))[b, m].numpy(), p, atol=1e-5)


def test_mae_by_another_way(mae):
    """As He et al. write it: mask tokens behind the visible ones, put into the image's order, positions added, decoded, the hidden ones picked."""
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
    target = target_of(patchify(x, 4), model, tiny())
    want = (((out - target) ** 2).mean(2) * mask).sum(1) / mask.sum(1)
    assert torch.allclose(loss(model, z), want, rtol=1e-4)


def test_sincos_positions_in_float64():
    table, dim = sincos_positions(64, 3, 5).double(), 64
    for row in range(3):
        for col in range(5):
            for j in range(dim):
                place, i = (col if j < dim / 2 else row), j % (dim // 2)
                f = math.sin if i < dim / 4 else math.cos
                want = f(place / 10_000 ** ((i % (dim // 4)) / (dim / 4)))
                assert abs(table[row * 5 + col, j].item() - want) < 1e-7


# ---- the attack ----


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.3)])
def test_delta_is_zero_where_hidden_and_reaches_eps_where_visible(mae, norm, eps):
    model, x, seeds = mae
    args = tiny(norm=norm, eps=eps)
    z, loss = masked_task(x, seeds, model, args)
    assert z.shape == (6, 4, 3, 4, 4) and torch.equal(canvas(z, x, seeds), x)  # what is attacked is the visible patches, and only they
    z_adv = perturb(z, loss, seeds, model, args)
    delta = canvas(z_adv, x, seeds) - x
    seen = visible_pixels(x, seeds, args)[:, None].expand_as(x)
    assert (delta[~seen] == 0).all()
    if norm == "linf":
        size = delta.abs()
        assert size.max() <= eps * (1 + 1e-4)
        assert (size[seen] > eps * 0.99).float().mean() > 0.2  # 2 steps of 5/8 eps do not take every pixel from a random start to the border
    else:
        assert torch.allclose(l2_norm(delta).flatten(), torch.full((6,), eps), rtol=1e-3)
    assert (loss(model, z_adv) > loss(model, z)).all()
    assert all(p.grad is None for p in model.parameters())


def test_the_ablations(mae):
    model, x, seeds = mae
    z, loss = masked_task(x, seeds, model, tiny())
    net = lambda v, order: torch.zeros(6, 12, 48)  # noqa: E731
    other = (z + 0.1 * torch.rand_like(z)).clamp(0, 1)
    assert torch.equal(loss(net, z), loss(net, other))  # the clean target does not depend on delta
    assert loss(net, z).mean() == pytest.approx(47 / 48, abs=1e-3)  # a normalised patch's mean square: unbiased variance
    args = tiny(attacked="all", eps=0.3)
    z, loss = masked_task(x, seeds, model, args)
    assert z.shape == (6, 16, 3, 4, 4)
    z_adv = perturb(z, loss, seeds, model, args)
    moved = (z_adv - z).flatten(2).norm(dim=2)
    assert (moved > 0).all() and torch.allclose(l2_norm(z_adv - z).flatten(), torch.full((6,), 0.3), rtol=1e-3)
    z, loss = masked_task(x, seeds, model, tiny(attacked="all", target="pixels"))
    moved = z.clone()
    moved[:, 4:] = 1 - moved[:, 4:]
    assert not torch.allclose(loss(net, z), loss(net, moved), rtol=1e-3)  # the target is attacked, too


def test_rotations_are_drawn_once_per_image_and_attacked_after_turning():
    torch.manual_seed(0)
    model = build_model("vit_mini4", {"rotation": 4}, width=0.5).eval()
    nn.init.normal_(model.heads["rotation"].weight)
    x, seeds = torch.rand(400, 3, 16, 16), image_seeds(1, torch.arange(400))
    z, loss = rotation_task(x, seeds, Recipe(**PLAIN))
    turns = torch.stack([(z == rotate(x, torch.full((400,), k))).flatten(1).all(1) for k in range(4)], 1)
    assert (turns.sum(1) == 1).all() and (turns.float().mean(0) - 0.25).abs().max() < 0.09
    assert torch.allclose(loss(model, z), F.cross_entropy(model(z), turns.float().argmax(1), reduction="none"))


# ---- numbers of one's own for each image ----


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
    assert abs(((many[:-1] - 0.5) * (many[1:] - 0.5)).mean()) < 4 / 12 / math.sqrt(many.numel())  # neighbours are independent
    assert torch.erfinv(2 * torch.tensor([0.5 / 2**23, 1 - 0.5 / 2**23]) - 1).isfinite().all()


def test_split_epoch_says_which_images_a_batch_has(ranks):
    data = Images(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(), torch.arange(50), ["a"], torch.arange(50))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    for rank in range(3):
        ranks(rank, 3)
        for places, (_, y) in zip(split_epoch(50, 16), batches(data, 16, CPU, shuffle=3), strict=True):
            assert torch.equal(order[places], y)


def test_augmentation_depends_on_image_and_seed_alone(tmp_path):
    train, _ = load_data("digits", "", CPU, image_size=16)
    crop = adv_mae.augmentation(Recipe(**PLAIN, crop=0.3, rand_augment=True, erase=0.5), tiny(flip=True))
    x = {}
    for workers, batch in ((0, 7), (2, 20)):
        data = transformed(train, crop, seed=5).subset(torch.arange(40))
        state = torch.get_rng_state()
        parts = [x for x, _ in batches(data, batch, CPU, workers=workers)]
        assert torch.equal(torch.get_rng_state(), state)
        x[workers] = torch.cat(parts)
    assert torch.equal(x[0], x[2])
    again = torch.cat([x for x, _ in batches(transformed(train, crop, seed=6).subset(torch.arange(40)), 20, CPU, workers=0)])
    assert ((again - x[0]).flatten(1).abs().amax(1) > 0).float().mean() > 0.9
    assert x[0].amin() >= 0 and x[0].amax() <= 1 and x[0].shape == (40, 3, 16, 16)


def test_streamed_folder_is_cropped_from_the_original(tmp_path):
    """Small crops of a large image show detail that an image reduced beforehand has lost."""
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, np.arange(640) % 8 < 4] = 255
    for split, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(stripes).save(tmp_path / split / name / "x.png")
    train, _ = load_data("folder", str(tmp_path), CPU, image_size=64, stream=True)
    crop = adv_mae.augmentation(Recipe(**PLAIN, crop=0.01), tiny(dataset="folder", image_size=64))
    contrast = [next(batches(transformed(train, crop, seed=s), 1, CPU, workers=0))[0].std().item() for s in range(60)]
    reduced = next(batches(train, 1, CPU, workers=0))[0].std().item()
    assert reduced < 0.05 and max(contrast) > 0.3


def test_the_evaluated_crop(tmp_path):
    (tmp_path / "a").mkdir()
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :, 0] = np.arange(200)  # red tells the column
    Image.fromarray(image).save(tmp_path / "a" / "x.png")
    data = open_folder(tmp_path, 64)

    def columns(**changes):
        x, _ = next(batches(transformed(data, adv_mae.central_crop(tiny(dataset="folder", image_size=64, **changes))), 1, CPU, workers=0))
        return x.shape[-1], x[0, 0, 32, 0].item() * 255, x[0, 0, 32, -1].item() * 255

    # 0.875 of the height of 100, from the middle of 200 columns: 56.25 to 143.75; all of the height: 50 to 150; squeezed: 0 to 200
    for changes, low, high in (({"eval_crop": 0.875}, 56, 144), ({"eval_crop": 1.0}, 50, 150), ({"recipe": "sgd"}, 0, 200)):
        width, first, last = columns(**changes)
        assert width == 64 and abs(first - low) < 3 and abs(last - high) < 3


def test_random_erasing():
    torch.manual_seed(0)
    x = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    mean, std = IMAGENET_STATS
    changed = [(adv_mae.random_erase(x, 0.25, mean, std) != x).any(0) for _ in range(400)]
    hit = [c.float().mean().item() for c in changed if c.any()]
    assert abs(len(hit) / 400 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert 0.015 < min(hit) and max(hit) < 0.35
    big = max(changed, key=lambda c: c.sum())
    rows, cols = big.any(1).nonzero(), big.any(0).nonzero()
    assert big[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1].float().mean() > 0.95  # a rectangle


# ---- training ----


def test_recipes_are_the_papers():
    """He et al. 2022, tables of their appendix; Rebuffi et al., appendices C and E."""
    args = Args()
    r = recipe_of("mae", args)
    assert (r.batch_size, r.lr, r.weight_decay, r.betas, r.epochs, r.epochs * r.warmup) == (4096, pytest.approx(2.4e-3), 0.05, (0.9, 0.95), 800, 40)
    assert (r.crop, r.rand_augment, r.smoothing, r.drop_path, r.mixup, r.ema) == (0.2, False, 0, 0, 0, 0)
    r = recipe_of("supervised", args)
    assert (r.lr, r.weight_decay, r.betas, r.epochs, r.epochs * r.warmup) == (pytest.approx(1.6e-3), 0.3, (0.9, 0.95), 300, pytest.approx(20))
    assert (r.rand_augment, r.smoothing, r.mixup, r.cutmix, r.drop_path, r.ema) == (True, 0.1, 0.8, 1.0, 0.1, 0.9999)
    assert recipe_of("rotnet", args) == replace(r, mixup=0.0, cutmix=0.0)
    r = recipe_of("imagenet", args)
    assert (r.batch_size, r.lr, r.weight_decay, r.betas, r.epochs, r.epochs * r.warmup, r.lowest) == (512, 5e-4, 0.05, (0.9, 0.999), 100, 5, 1e-6)
    assert (r.rand_augment, r.smoothing, r.mixup, r.cutmix, r.drop_path, r.erase) == (True, 0.1, 0.8, 1.0, 0.1, 0.25)
    r = recipe_of("sgd", args)
    assert (r.batch_size, r.lr, r.weight_decay, r.betas, args.steps * r.warmup, r.clip) == (512, 0.01, 0, None, 500, 1)
    assert (r.smoothing, r.drop_path, r.steps) == (0, 0, 2500)
    for kind in ("sgd", "adamw"):
        r = recipe_of(kind, args)
        assert (r.crop, r.rand_augment, r.mixup, r.cutmix, r.erase) == (0, False, 0, 0, 0)
    assert (r.smoothing, r.drop_path, r.weight_decay, r.betas) == (0.1, 0.1, 0.05, (0.9, 0.999))
    assert recipe_of("mae", Args(pretrain_batch_size=512)).lr == pytest.approx(3e-4)
    assert args.attack_steps == 2 and (args.eps, args.norm) == (0.5, "l2")


def test_layer_wise_decay_has_14_levels():
    with torch.device("meta"):
        model = build_model("vit_b16", {"class": 1000})
    gamma = 0.65
    groups = parameter_groups(model, 0.05, gamma)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        k = 13 if "patch_embed" in name or "cls" in name else 0 if "fc_norm" in name or "heads" in name else 12 - int(name.split(".")[2])
        assert scale[id(p)] == pytest.approx(gamma**k), name
    levels = sorted(set(scale.values()))
    assert len(levels) == 14 and levels[-1] == 1 and levels[0] == pytest.approx(0.0037, abs=5e-5)
    for g, first in ((0.75, 0.024), (0.85, 0.12), (0.95, 0.51)):
        assert g**13 == pytest.approx(first, rel=0.02)
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in free) == (p.dim() == 1 or name == "trunk.cls_token"), name
    assert {g["scale"] for g in parameter_groups(model, 0.05, None)} == {1.0}
    assert layer_of("trunk.pos_embed", 12) == 0


def test_mixed_targets_sum_to_one_and_tell_the_share():
    torch.manual_seed(0)
    y = torch.arange(8)
    x = (y.float() / 8).view(8, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()  # an image's value tells its class
    kinds = set()
    for _ in range(40):
        mixed, target = mix(x, y, Recipe(**PLAIN, mixup=0.8, cutmix=1.0), 8)
        assert torch.allclose(target.sum(1), torch.ones(8)) and (target >= 0).all() and (target > 0).sum(1).max() <= 2
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ (y.float() / 8), atol=1e-5)  # pixels and targets are mixed alike
        kinds.add("cut" if len(mixed[1].unique()) > 1 else "up")
    assert kinds == {"cut", "up"}
    same, target = mix(x, y, Recipe(**PLAIN), 8)
    assert torch.equal(same, x) and torch.equal(target, torch.eye(8))


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    out = drop_path(x, 0.3, training=True)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out.flatten(1) == out[:, 0, :1]).all()  # all of an image's branch or nothing
    assert abs(out.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / 20_000)
    assert drop_path(x, 0.3, training=False) is x and drop_path(x, 0.0, training=True) is x
    model = adv_mae.start_model("supervised", tiny(arch="vit_ti4"), Recipe(**PLAIN, drop_path=0.1), None, 10)
    assert [b.drop_path for b in model.trunk.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a short adversarial pre-training."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert main(tiny(stage="pretrain", plain=True, out=str(out))) == {}
    return out


def test_gamma_0_keeps_the_encoder(pretrained, tmp_path):
    main(tiny(stage="finetune", init=str(pretrained / "a-mae.pt"), layer_decay="0,1", smoothing=0.1, out=str(tmp_path / "run")))
    before = load_checkpoint(pretrained / "a-mae.pt")["model"]
    for gamma, kept in (("0", True), ("1", False)):
        after = load_checkpoint(tmp_path / "run" / f"a-mae-{gamma}.pt")["model"]
        encoder = [k for k in before if k.startswith("trunk.") and "fc_norm" not in k]
        assert all(torch.equal(before[k], after[k]) for k in encoder) == kept
        assert not torch.equal(after["heads.class.weight"], torch.zeros_like(after["heads.class.weight"]))


def test_pretraining_learns_and_its_results(pretrained):
    a = load_checkpoint(pretrained / "a-mae.pt")
    assert a["pretrained"]["eps"] == 0.5 and load_checkpoint(pretrained / "mae.pt")["pretrained"]["eps"] == 0
    assert not same_state(a["model"], load_checkpoint(pretrained / "mae.pt")["model"])
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in rows] == ["mae", "a-mae"] and all(0 <= r["waiting"] <= 1 for r in rows)
    assert {"reconstruction.png", "filters.png"} <= {p.name for p in pretrained.iterdir()}
    assert torch.equal(a["model"]["trunk.fc_norm.weight"], torch.ones(64))  # MAE does not use it
    main_args = tiny(stage="pretrain", pretrain_epochs=8, eps=0.0, out=str(pretrained.parent / "longer"))
    main(main_args)
    losses = [json.loads(line)["loss"] for line in (pretrained.parent / "longer" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_changes_nothing(tmp_path):
    """Five steps in float32, whole and in parts, also where parts are not equal."""
    args = dict(stage="pretrain", pretrain_epochs=1, pretrain_batch_size=288, norm="l2", eps=0.3)
    losses, weights = [], []
    for parts in (1, 3, 5):
        main(tiny(**args, accumulate=parts, out=str(tmp_path / str(parts))))
        losses.append(json.loads((tmp_path / str(parts) / "metrics.jsonl").read_text())["loss"])
        weights.append(load_checkpoint(tmp_path / str(parts) / "a-mae.pt")["model"]["trunk.blocks.0.mlp.fc1.weight"])
        assert torch.allclose(weights[0], weights[-1], atol=2e-5)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


STEPS = """
import json, sys
sys.path.insert(0, {root!r})
import common, adv_mae
losses = []
update = common.Epoch.update
def keep(self, count, **values):
    losses.append(float(values["loss"]) * count)
    update(self, count, **values)
common.Epoch.update = keep
common.old_cli(adv_mae.main, adv_mae.Args)
"""


@pytest.mark.parametrize("method", ["mae", "rotnet"])
def test_two_ranks_are_one(tmp_path, method):
    """torchrun with two processes: the same five losses, to 1e-5, as one process with the same global batch. An odd batch is shared unequally."""
    args = TINY | dict(method=method, stage="pretrain", pretrain_batch_size=288, norm="l2", eps=0.3, smoothing=0.1, drop_path=0.0)
    code = STEPS.format(root=str(ROOT)) + """
import torch.distributed as dist
from pathlib import Path
Path(f"losses-{common.world()[0]}.json").write_text(json.dumps(losses))
"""
    code = code.replace("common.old_cli(adv_mae.main, adv_mae.Args)", "args = common.old_parse_args(adv_mae.Args)\nadv_mae.main(args)")
    script = tmp_path / "steps.py"
    script.write_text(code)
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *flags(args), "--out", "two"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    ranks = [json.loads((tmp_path / f"losses-{r}.json").read_text()) for r in range(2)]
    one = subprocess.run([sys.executable, str(script), *flags(args), "--out", "one"], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    alone = json.loads((tmp_path / "losses-0.json").read_text())
    assert len(alone) == 5
    assert [a + b for a, b in zip(*ranks, strict=True)] == pytest.approx(alone, rel=1e-5)
    name = {"mae": "a-mae.pt", "rotnet": "a-rotnet.pt"}[method]
    weights = [load_checkpoint(tmp_path / run / name)["model"] for run in ("one", "two")]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-4) for k in weights[0])


def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    """Stopped in the middle of an epoch of A-MAE and of fine-tuning, with EMA in a supervised pre-training, too."""
    import common

    for changes in (dict(plain=False, pretrain_epochs=2, epochs=2), dict(method="supervised", stage="pretrain", ema=0.9, mixup=0.5, drop_path=0.2)):
        whole, parts = tmp_path / f"whole{len(changes)}", tmp_path / f"parts{len(changes)}"
        main(tiny(**changes, out=str(whole)))
        count, update = [0], common.Epoch.update
        for stop in (4, 10) if "epochs" in changes else (3,):

            def interrupt(self, *a, stop=stop, **k):
                update(self, *a, **k)
                count[0] += 1
                common._Signals.received = 15 if count[0] == stop else 0

            monkeypatch.setattr(common.Epoch, "update", interrupt)
            with pytest.raises(KeyboardInterrupt):
                main(tiny(**changes, out=str(parts), resume=True))
            common._Signals.received = 0
        monkeypatch.setattr(common.Epoch, "update", update)
        main(tiny(**changes, out=str(parts), resume=True))
        files = sorted(p.name for p in whole.glob("*.pt") if p.name != "last.pt")
        assert files == sorted(p.name for p in parts.glob("*.pt") if p.name != "last.pt")
        for file in files:
            assert same_state(load_checkpoint(whole / file)["model"], load_checkpoint(parts / file)["model"]), file


@pytest.mark.parametrize("method", ["rotnet", "supervised"])
def test_other_methods_are_fine_tuned_too(method, tmp_path):
    results = main(tiny(method=method, recipe="sgd", mixup=0.8, ema=0.9, out=str(tmp_path / "run")))
    names = {row["name"] for row in results["rows"]}
    assert names == {f"a-{method}-sgd"}
    assert load_checkpoint(tmp_path / "run" / f"a-{method}-sgd.pt")["pretrained"]["method"] == method
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(r["stage"].endswith("sgd") for r in log) == 2  # 7 steps are an epoch of 6 and one more
    if method == "supervised":  # training from scratch, judged as it is
        scores = main(tiny(stage="evaluate", init=str(tmp_path / "run" / "a-supervised.pt"), out=str(tmp_path / "again")))
        assert scores["rows"][0]["name"] == "a-supervised" and scores["rows"][0]["examples"] == 360


def test_fine_tuning_takes_an_encoder_of_byorl(tmp_path):
    byorl.main(byorl.Args(
        dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, epochs=1, warmup_epochs=0, batch_size=240, hidden=16, projection=8, attack="pgd",
        attack_steps=2, step_size=0.3, heads="none", val_images=200, amp="off", device="cpu", out=str(tmp_path / "byorl"),
    ))  # fmt: skip
    results = main(tiny(stage="finetune", init=str(tmp_path / "byorl" / "byorl.pt"), out=str(tmp_path / "run")))
    assert {row["name"] for row in results["rows"]} == {"byorl-0.75"}
    assert results["rows"][0]["pretrained"]["method"] == "byol" and results["rows"][0]["pretrained"]["eps"] == 128 / 255
    # the accuracy is that of the checkpoint, by load_model alone
    _, test = load_data("digits", "", CPU, image_size=16)
    model = load_model(tmp_path / "run" / "byorl-0.75.pt")
    right = (model(test.pixels / 255).argmax(1) == test.labels).float().mean().item() * 100
    assert results["rows"][0]["accuracy"] == pytest.approx(right, abs=0.01)
    again = main(tiny(stage="evaluate", init=str(tmp_path / "run"), out=str(tmp_path / "again")))
    assert [r["accuracy"] for r in again["rows"]] == [r["accuracy"] for r in results["rows"]]


def test_a_step_on_large_images_of_a_folder(tmp_path):
    """224 pixels, patches of 16, from JPEG files of other sizes, decoded by two processes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 255, (180 + 40 * i, 260, 3), np.uint8)).save(tmp_path / split / name / f"{i}.jpg")
    args = dict(
        dataset="folder", data_dir=str(tmp_path), image_size=224, arch="vit_ti16", width=1 / 3, workers=2, pretrain_batch_size=6, decoder_width=32,
        batch_size=6, flip=True, crop=0.0, rand_augment=True, erase=0.25, mixup=0.8, cutmix=1.0, eval_crop=0.875, eval_examples=4,
    )  # fmt: skip
    results = main(tiny(**args, out=str(tmp_path / "run")))
    assert results["rows"][0]["examples"] == 6 and {r["set"] for r in results["rows"]} == {"test"}


def test_the_average_of_a_short_run_is_not_its_start(tmp_path):
    main(tiny(method="rotnet", stage="pretrain", eps=0.0, ema=0.9999, pretrain_epochs=3, out=str(tmp_path)))
    torch.manual_seed(0)
    start = adv_mae.start_model("rotnet", tiny(), Recipe(**PLAIN), None, 10).state_dict()
    average, last = (load_checkpoint(tmp_path / f"{name}.pt")["model"] for name in ("rotnet", "last"))
    key = "trunk.blocks.1.mlp.fc1.weight"
    moved = (last[key] - start[key]).norm()
    assert moved > 0.1 and (average[key] - start[key]).norm() > 0.5 * moved and not torch.equal(average[key], last[key])


def test_sgd_interrupted_in_its_last_step_is_done(tmp_path, monkeypatch, pretrained):
    """7 steps of which the last begins a second epoch: the resumed run has none left."""
    import common

    args = dict(stage="finetune", init=str(pretrained / "a-mae.pt"), recipe="sgd", eval_eps="")
    main(tiny(**args, out=str(tmp_path / "whole")))
    count, update = [0], common.Epoch.update

    def interrupt(self, *a, **k):
        update(self, *a, **k)
        count[0] += 1
        common._Signals.received = 15 if count[0] == 7 else 0

    monkeypatch.setattr(common.Epoch, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(**args, out=str(tmp_path / "parts")))
    common._Signals.received = 0
    main(tiny(**args, out=str(tmp_path / "parts"), resume=True))
    assert count[0] == 7
    assert same_state(*(load_checkpoint(tmp_path / run / "a-mae-sgd.pt")["model"] for run in ("whole", "parts")))


def test_waiting_is_the_share_of_the_time_that_data_take(monkeypatch):
    """By a clock that data advance by 1 and a step by 3."""
    import common

    clock = [0.0]
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def stream():
        for _ in range(5):
            clock[0] += 1
            yield torch.zeros(2)

    with common.Epoch(0, 10, 5, CPU) as log:
        for x in log.watch(stream()):
            clock[0] += 3
            log.update(len(x), loss=torch.tensor(1.0))
    assert log.means()["waiting"] == 0.25 and log.means()["images_per_s"] == 0.5
    with common.Epoch(0, 10, 5, CPU) as log:  # not watched: not told
        log.update(2, loss=torch.tensor(1.0))
    clock[0] += 1
    assert "waiting" not in log.means()


# ---- evaluation ----


def test_evaluation_remembers_recipe_and_file(pretrained, tmp_path):
    args = dict(init=str(pretrained / "a-mae.pt"), recipe="adamw", eval_crop=0.4, eval_eps="")
    first = main(tiny(stage="finetune", **args, out=str(tmp_path / "run")))["rows"][0]
    file = tmp_path / "run" / "a-mae-0.75.pt"
    again = main(tiny(stage="evaluate", recipe="adamw", eval_crop=0.4, eval_eps="", init=str(file), out=str(tmp_path / "again")))["rows"][0]
    assert first["accuracy"] == again["accuracy"] and first["checkpoint"] == again["checkpoint"] == str(file)
    with pytest.raises(UserError, match="was fine-tuned with --recipe adamw"):
        main(tiny(stage="evaluate", init=str(file), out=str(tmp_path / "third")))


def test_all_classifiers_of_a_folder_are_judged(pretrained, tmp_path):
    """Two of the same name, one per seed, too."""
    (tmp_path / "many").mkdir()
    for seed in (0, 1):
        main(tiny(stage="finetune", init=str(pretrained / "a-mae.pt"), seed=seed, eval_eps="", out=str(tmp_path / f"{seed}")))
        shutil.copy(tmp_path / f"{seed}" / "a-mae-0.75.pt", tmp_path / "many" / f"seed{seed}.pt")
    shutil.copy(pretrained / "a-mae.pt", tmp_path / "many")  # no classifier: left out
    rows = main(tiny(stage="evaluate", init=str(tmp_path / "many"), eval_eps="", out=str(tmp_path / "all")))["rows"]
    assert [row["name"] for row in rows] == ["seed0", "seed1"]
    assert rows[0]["accuracy"] == json.loads((tmp_path / "0" / "results.json").read_text())["rows"][0]["accuracy"]
    assert rows[1]["accuracy"] == json.loads((tmp_path / "1" / "results.json").read_text())["rows"][0]["accuracy"]


def test_an_encoder_keeps_its_own_attack_on_record(tmp_path):
    main(tiny(stage="pretrain", norm="linf", eps=2 / 255, out=str(tmp_path / "run")))
    results = main(tiny(stage="finetune", init=str(tmp_path / "run" / "a-mae.pt"), eval_eps="", out=str(tmp_path / "tuned")))
    assert (results["args"]["norm"], results["args"]["eps"]) == ("linf", 2 / 255)
    twice = tmp_path / "tuned" / "a-mae-0.75.pt"
    main(tiny(stage="finetune", init=str(twice), eval_eps="", out=str(tmp_path / "twice")))
    assert load_checkpoint(tmp_path / "twice" / "a-mae-0.75-0.75.pt")["pretrained"]["as_paper"] is False


def test_two_test_sets_of_one_name_are_refused(tmp_path):
    for folder in ("x/val", "y/val", "x/test"):
        write_images(tmp_path / folder, ["a/0.png"])
    for folders in ("x/val,y/val", "x/test"):
        with pytest.raises(UserError, match="names two test sets"):
            open_variants(tiny(eval_data=",".join(str(tmp_path / f) for f in folders.split(","))), ["a"])


def write_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 80, np.uint8)).save(folder / name)


def test_groups_of_classes():
    classes = [f"n{i:08d}" for i in range(1000)]
    some = [classes[7], classes[3]]
    logits = torch.randn(5, 1000)
    net = lambda x: logits  # noqa: E731
    module = nn.Module()
    module.forward = net
    out = ChooseAmong(module, groups_of(some, classes, "IN-R"))(None)  # masked: only the two count
    assert torch.equal(out.argmax(1), logits[:, [7, 3]].argmax(1))
    names = sorted(map(str, range(1000)))  # as folders are sorted: 0, 1, 10, 100, ...
    out = ChooseAmong(module, groups_of(names, classes, "IN-V2"))(None)
    assert [int(names[i]) for i in out.argmax(1)] == logits.argmax(1).tolist()
    groups = groups_of(sorted(CONFLICT), classes, "Conflict")
    assert groups.shape == (16, 1000) and torch.allclose(groups.sum(1), torch.ones(16)) and ((groups > 0).sum(0) <= 1).all()
    # counts of Geirhos et al.'s classes: 1 airplane, 4 bears, 2, 49 birds, 5, 7, 3, 6 cats, 4, 3, 109 dogs, 2, 2, 1, 1, 8 trucks
    assert (groups > 0).sum(1).tolist() == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    probabilities = logits.softmax(1)
    want = torch.stack([probabilities[:, row > 0].mean(1) for row in groups], 1).argmax(1)
    assert torch.equal(ChooseAmong(module, groups)(None).argmax(1), want)
    with pytest.raises(UserError, match="'zebra' is none of"):
        groups_of(["zebra"], classes, "x")
    with pytest.raises(UserError, match="'10' is none of"):
        groups_of(["0", "10", "7"], classes[:10], "x")
    with pytest.raises(UserError, match="'cat' is none of"):
        groups_of(["cat", "dog"], classes[:10], "x")


def test_conflict_stimuli_without_conflict_are_left_out(tmp_path, monkeypatch):
    write_images(tmp_path / "conflict", ["cat/cat1-dog3.png", "cat/cat1-cat2.png", "dog/dog4-bear1.png"])
    classes = [f"n{i:08d}" for i in range(1000)]
    images, groups = open_variants(tiny(eval_data=str(tmp_path / "conflict")), classes)["conflict"]
    assert len(images) == 2 and images.labels[images.index].tolist() == [0, 1] and groups.shape == (2, 1000)


def test_variants_and_real_labels_are_scored(tmp_path):
    """On digits by their names, and with several right answers."""
    rng = np.random.default_rng(0)
    files = [f"{c}/ILSVRC2012_val_{3 * i + j + 1:08d}.png" for i, c in enumerate("012") for j in range(3)]
    for split, names in (("train", files), ("test", files), ("other", [f for f in files if f[0] != "1"])):
        for name in names:
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / split / name)
    real = [[0], [0, 1], [2], [], [1], [1], [0, 1, 2], [2], [2]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    args = tiny(
        dataset="folder", data_dir=str(tmp_path), eval_data=str(tmp_path / "other"), real=str(tmp_path / "real.json"), pretrain_batch_size=9,
        batch_size=9, eps=0.0, eval_eps="", eval_examples=0, out=str(tmp_path / "run"),
    )  # fmt: skip
    rows = {row["set"]: row for row in main(args)["rows"]}
    assert {k: r["examples"] for k, r in rows.items()} == {"test": 9, "other": 6, "real": 8}
    model = load_model(tmp_path / "run" / "mae-0.75.pt")

    def logits(split, names):
        x = [torch.from_numpy(np.array(Image.open(tmp_path / split / name))).permute(2, 0, 1) / 255 for name in names]
        return model(torch.stack(x))

    out = logits("test", files)
    assert rows["test"]["accuracy"] == pytest.approx(100 * (out.argmax(1) == torch.arange(9) // 3).float().mean().item(), abs=0.01)
    right = [k in labels for k, labels in zip(out.argmax(1).tolist(), real, strict=True) if labels]
    assert rows["real"]["accuracy"] == pytest.approx(100 * sum(right) / 8, abs=0.01)
    masked = logits("other", [f for f in files if f[0] != "1"])[:, [0, 2]].argmax(1)
    assert rows["other"]["accuracy"] == pytest.approx(100 * (masked == torch.arange(6) // 3).float().mean().item(), abs=0.01)
    _, test = load_data("folder", str(tmp_path), CPU, image_size=16, stream=True)
    for bad in ("[[1]]", "[[], [], [], [], [], [], [], [], []]"):
        (tmp_path / "real.json").write_text(bad)
        with pytest.raises(UserError, match="do not fit"):
            real_labels(args, test)


def test_filters_are_principal_components():
    torch.manual_seed(0)
    w = torch.randn(96, 3, 4, 4) * torch.linspace(0.1, 2, 48).view(3, 4, 4)
    w += torch.randn(96, 1, 1, 1) * torch.rand(3, 4, 4)
    out = filters({"model": {"trunk.patch_embed.weight": w}}, 5)
    flat = w.flatten(1).double().numpy()
    flat = (flat - flat.mean(0)) / flat.std(0, ddof=1)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    for i in range(5):
        v = vectors[:, -1 - i]
        scaled = [(s - s.min()) / (s.max() - s.min()) for s in (v, -v)]
        assert min(np.abs(out[i].numpy().reshape(-1) - s).max() for s in scaled) < 1e-3
    assert filters({"model": {"trunk.patch_embed.weight": w}}).shape == (28, 3, 4, 4)


def state_of(method, eps, norm="l2", **changes):
    about = {"method": method, "eps": eps, "norm": norm, "classes": 1000, "dataset": "folder", "as_paper": True}
    return {"pretrained": about | changes}


def test_paper_numbers():
    """Table 1's averages over the five data sets, printed in its last rows."""
    averages = {
        ("supervised", "sgd"): (87.24, 86.94, 87.78), ("rotnet", "sgd"): (78.30, 80.94, 81.65), ("mae", "sgd"): (82.97, 84.37, 85.11), ("byol", "sgd"): (85.09, 86.49, 86.53),
        ("supervised", "adamw"): (87.73, 87.31, 88.01), ("rotnet", "adamw"): (81.73, 83.10, 83.68), ("mae", "adamw"): (87.10, 87.49, 87.96), ("byol", "adamw"): (86.36, 86.85, 86.83),
    }  # fmt: skip
    for (method, recipe), want in averages.items():
        rows = [v for (m, _, r), v in PAPER.items() if (m, r) == (method, recipe)]
        assert np.allclose(np.mean(rows, 0), want, atol=0.011) and len(rows) == 5, (method, recipe)
    args = Args(dataset="cifar10", recipe="adamw", stage="finetune")
    assert paper_number(state_of("mae", 0.5), args) == 98.46 and paper_number(state_of("mae", 1 / 255, "linf"), args) == 98.30
    assert paper_number(state_of("mae", 0.0), args) == 98.03
    assert paper_number(state_of("rotnet", 4.0), replace(args, dataset="folder", data_dir="x/SUN397", recipe="sgd")) == 63.95
    nothing = [
        (state_of("mae", 1.0), args), (state_of("mae", 0.5, "linf"), args), (state_of("rotnet", 4 / 255), args), (state_of("mae", 0.5), replace(args, recipe="imagenet")), (state_of("mae", 0.5, classes=10), args),
        (state_of("mae", 0.5, as_paper=False), args), (state_of("mae", 0.5), replace(args, batch_size=256)), (state_of("mae", 0.5), replace(args, stage="all")),
    ]  # fmt: skip
    assert [paper_number(*pair) for pair in nothing] == [None] * 8


def test_paper_numbers_of_byol(tmp_path):
    """An encoder of byorl.py trained as the README says counts as the paper's."""
    command = "--heads none --dataset folder --data-dir imagenet --image-size 224 --arch vit_b16 --width 1 --epochs 300 --batch-size 1024 --lr 1.2 --tau 0.999 --blur 0.5 --attack pgd --attack-steps 2 --step-size 1.25 --eps 2"
    assert command in (ROOT / "README.md").read_text()
    its_args = vars(parse_args(byorl.Args, command.split()))
    encoder = build_model("vit_ti16", {}, width=1 / 3)
    for changes, want in (({}, 98.67), ({"epochs": 100}, None), ({"step_size": 0.0}, None), ({"eps": 1.0}, None), ({"data_dir": "cats"}, None)):
        torch.save({"network": encoder.spec, "model": encoder.state_dict(), "script": "byorl", "stage": "byorl", "args": its_args | changes}, tmp_path / "byorl.pt")
        args = Args(dataset="cifar10", recipe="adamw", stage="finetune", init=str(tmp_path / "byorl.pt"))
        assert paper_number(adv_mae.read_init(args)[0], args) == want, changes


# ---- published checkpoints ----


def published(dim=384, depth=12, patch=16, side=14, decoder=True, head=0, learned=False) -> dict:
    """A state dict with the names of facebookresearch/mae."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + side * side, dim), "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, out, inn in (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", 4 * dim, dim), ("mlp.fc2", dim, 4 * dim)):
            shapes |= {f"blocks.{i}.{name}.weight": (out, inn), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    last = "fc_norm" if head else "norm"
    shapes |= {f"{last}.weight": (dim,), f"{last}.bias": (dim,)}
    shapes |= {"head.weight": (head, dim), "head.bias": (head,)} if head else {}
    if decoder:
        shapes |= {"mask_token": (1, 1, 64), "decoder_pos_embed": (1, 5, 64), "decoder_embed.weight": (64, dim), "decoder_blocks.0.norm1.weight": (64,), "decoder_pred.bias": (9,)}
    torch.manual_seed(0)
    weights = {k: 0.02 * torch.randn(s) for k, s in shapes.items()}
    if not learned:
        weights["pos_embed"] = torch.cat([torch.zeros(1, dim), sincos_positions(dim, side, side)])[None]
    return weights


def test_published_checkpoints(tmp_path):
    weights = published()
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0), "epoch": 3}, tmp_path / "mae.pth")  # as MAE's training script writes it
    state = load_vit(tmp_path / "mae.pth")
    assert state["network"]["arch"] == "vit_s16" and state["network"]["heads"] == {} and state["stage"] == "pretrain"
    trunk = build_model(**state["network"]).trunk
    own = {k for k in trunk.state_dict() if not k.startswith("fc_norm")}
    theirs = {k.replace("patch_embed.proj", "patch_embed") for k in weights if not k.startswith(("decoder_", "mask_token", "norm.", "pos_embed"))}
    assert own == theirs  # one to one
    assert torch.equal(state["model"]["trunk.blocks.3.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"])

    fine = published(decoder=False, head=7, learned=True)
    torch.save(fine, tmp_path / "tuned.pth")
    state = load_vit(tmp_path / "tuned.pth")
    assert state["network"] | {"mean": 0, "std": 0} == {"arch": "vit_s16", "heads": {"class": 7}, "width": 1.0, "stem": "cifar", "positions": 196, "mean": 0, "std": 0}
    model = build_model(**state["network"])
    model.load_state_dict(state["model"])
    model.eval()
    # against a forward pass with PyTorch's own encoder layer
    x = torch.rand(2, 3, 224, 224)
    z = (x - model.mean) / model.std
    h = F.conv2d(z, fine["patch_embed.proj.weight"], fine["patch_embed.proj.bias"], stride=16).flatten(2).transpose(1, 2)
    h = torch.cat([fine["cls_token"].expand(2, -1, -1), h], 1) + fine["pos_embed"]
    layer = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    with torch.no_grad():
        for i in range(12):
            layer.load_state_dict({a + kind: fine[f"blocks.{i}.{b}{kind}"] for a, b in names.items() for kind in ("weight", "bias")})
            h = layer(h)
        h = F.layer_norm(h[:, 1:].mean(1), (384,), fine["fc_norm.weight"], fine["fc_norm.bias"], 1e-6)
        want = F.linear(h, fine["head.weight"], fine["head.bias"])
        assert torch.allclose(model(x), want, atol=1e-4)
    with pytest.raises(ValueError, match="learned positions for 196"):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(UserError, match="has learned positions for 196 patches, --image-size 32 makes 4"):
        main(tiny(stage="finetune", init=str(tmp_path / "tuned.pth"), image_size=32, out=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w | {"blocks.3.ls1.gamma": torch.ones(384)}, "blocks.3.ls1.gamma"), (lambda w: w | {"dist_token": torch.ones(1, 1, 384)}, "dist_token"),
        (lambda w: {k: v for k, v in w.items() if k != "blocks.5.mlp.fc2.bias"}, "blocks.5.mlp.fc2.bias"),
        (lambda w: w | {"blocks.0.attn.qkv.bias": torch.ones(7)}, "blocks.0.attn.qkv.bias: copying a param with shape"), (lambda w: {k: v for k, v in w.items() if k != "cls_token"}, "no Vision Transformer"),
        (lambda w: published(dim=1024, depth=2, decoder=False), "none of vit_b16"), (lambda w: {"a": 1}, "no Vision Transformer"), (lambda w: [1], "no Vision Transformer"),
    ],
)  # fmt: skip
def test_foreign_checkpoints_are_refused_by_name(one_sentence, tmp_path, change, match):
    torch.save(change(published()), tmp_path / "x.pth")
    args = {"stage": "finetune", "init": tmp_path / "x.pth", "out": tmp_path / "run"}
    assert match in one_sentence(adv_mae, *flags(TINY | args))


def test_fine_tuning_a_published_checkpoint(tmp_path):
    torch.save({"model": published(dim=192)}, tmp_path / "vit.pth")
    rows = main(tiny(stage="finetune", init=str(tmp_path / "vit.pth"), recipe="adamw", image_size=32, eval_eps="", batch_size=1437, out=str(tmp_path / "run")))["rows"]
    assert rows[0]["name"] == "vit-0.75" and load_checkpoint(tmp_path / "run" / "vit-0.75.pt")["network"]["arch"] == "vit_ti16"


# ---- what users get wrong ----


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stage": "finetune"}, "needs --init"), ({"stage": "evaluate"}, "needs --init"), ({"init": "x.pt"}, "takes no --init"), ({"layer_decay": "0.5,2"}, "from 0 to 1"),
        ({"layer_decay": "x"}, "not a list"), ({"layer_decay": "0.75,0.75"}, "same gamma twice"), ({"norm": "linf"}, "radius of its own"), ({"mask_ratio": 0.99}, "none visible"), ({"mask_ratio": 0.0}, "none to paint"),
        ({"accumulate": 1000}, "cannot be cut"), ({"decoder_heads": 3}, "multiple of 4"), ({"image_size": 18}, "no multiple of 4"), ({"stage": "finetune", "init": "no.pt"}, "there is no no.pt"),
        ({"eval_data": "nowhere"}, "no images in nowhere"), ({"eval_norm": "linf", "eval_eps": Args.eval_eps}, "radii of its own"), ({"real": "nowhere.json"}, "cannot read nowhere.json"), ({"eval_crop": 0.0}, "must be between"), ({"smoothing": 1.0}, "must be between"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    assert match in one_sentence(adv_mae, *flags(TINY | changes | {"out": tmp_path / "run"}))


def test_wrong_checkpoints(one_sentence, pretrained, tmp_path):
    shutil.copy(pretrained / "a-mae.pt", tmp_path / "a-mae.pt")
    resnet = build_model("resnet18", {"class": 10}, width=1 / 16)
    torch.save({"network": resnet.spec, "model": resnet.state_dict()}, tmp_path / "resnet.pt")
    (tmp_path / "empty").mkdir(), (tmp_path / "others").mkdir()
    torch.save({"network": {}, "model": {}}, tmp_path / "others" / "P1F4.done.pt")  # as in a run of chen_pretrain_finetune.py
    for changes, match in (
        ({"stage": "evaluate", "init": tmp_path / "others"}, "holds no classifiers"),
        ({"stage": "finetune", "init": tmp_path / "resnet.pt"}, "no Vision Transformer"),
        ({"stage": "evaluate", "init": tmp_path / "a-mae.pt"}, "no classifier"),
        ({"stage": "evaluate", "init": tmp_path / "empty"}, "holds no classifiers"),
        ({"stage": "finetune", "init": tmp_path / "empty"}, "is a folder; name the encoder"),
        ({"stage": "finetune", "init": pretrained / "last.pt"}, "is the state of a run"),
    ):
        assert match in one_sentence(adv_mae, *flags(TINY | changes | {"out": tmp_path / "run"})), changes


def test_nan_ends_in_one_sentence(one_sentence, tmp_path):
    assert "became NaN" in one_sentence(adv_mae, *flags(TINY | {"pretrain_lr": 1e30, "pretrain_batch_size": 100, "eps": 0.0, "out": tmp_path / "run"}))


def test_the_trunk_is_built_by_width():
    assert build_trunk("vit_mini4", 0.5, "cifar").dim == 64
    assert parse_args(Args, ["--quick"]).arch == "vit_mini4"
