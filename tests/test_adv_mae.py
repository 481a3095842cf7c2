"""adv_mae.py: masks, targets, attacks on visible patches, recipes, runs, test sets, published ViTs."""
import argparse
import itertools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, same_state
from PIL import Image
from torch import nn

import adv_mae
import byorl
from adv_mae import (
    CONFLICT, Args, MaskedAutoencoder, Recipe, central_crop, choose_among,
    count_visible, groups_of, image_seeds, labelled_task, load_vit, main, masked_task, parameter_groups, perturb, recipe_of, start_model,
)  # fmt: skip
from common import (
    IMAGENET_STATS, Run, UserError, batches, build_model, drop_path, image_uniform, l2_norm, load_checkpoint,
    load_data, load_model, open_folder, patchify, rotate, save_checkpoint, sincos_positions, transformed,
    unpatchify,
)  # fmt: skip

CPU = torch.device("cpu")
PLAIN = dict(epochs=1, batch_size=1, lr=0, warmup=0, weight_decay=0)
# A run of a second or two: 235 digits of 16 pixels (see `few_digits`), three steps per epoch.
TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, workers=0, amp="off",
    device="cpu", pretrain_epochs=1, pretrain_batch_size=80, pretrain_lr=1e-3, crop=0.6, decoder_width=16,
    decoder_depth=1, decoder_heads=2, recipe="adamw", epochs=1, batch_size=80, lr=2e-3, steps=4,
    layer_decay=(0.75,), regularise=False, eval_eps=(), attack_examples=60,
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOAD_DATA = Run.load_data


def few(run, **more):
    train, test = LOAD_DATA(run, **more)
    return train.subset(torch.arange(min(len(train), 235))), test


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_data", few)
        yield


@pytest.fixture
def mae():
    """(network, images, seeds) of a small MAE with large weights, so that its output depends on its input."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_model("vit_mini4", {}, width=0.5), tiny())
    for p in model.parameters():
        nn.init.normal_(p, std=0.1) if p.dim() > 1 else None
    return model.eval(), 0.2 + 0.6 * torch.rand(6, 3, 16, 16), image_seeds(0, torch.arange(6))


WHOLE = dict(plain=True, pretrain_epochs=2, epochs=2, layer_decay=(0.0, 1.0), eval_eps=(0.5,), eval_steps=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, results) of a run: pre-training with and without attack, each fine-tuned with two gammas."""
    out = tmp_path_factory.mktemp("adv_mae") / "run"
    return out, main(tiny(**WHOLE, out=str(out)))


def canvas(z, x, seeds):
    """Put attacked visible patches back into the images."""
    patches = patchify(x, 4)
    order = image_uniform(seeds, patches.shape[1]).argsort(1)[:, : z.shape[1]]
    patches[torch.arange(len(x))[:, None], order] = z
    return unpatchify(patches)


def test_masks_are_uniform_and_new_in_each_epoch():
    """As many patches stay visible as in MAE's code, rounded down: 25 of 64 at 0.6."""
    assert [count_visible(n, ratio) for n, ratio in ((196, 0.75), (64, 0.75), (64, 0.6))] == [49, 16, 25]
    order, other = (image_uniform(image_seeds(n, torch.arange(4000)), 16).argsort(1) for n in (7, 8))
    seen = order[:, :4].flatten().bincount() / 4000
    assert (seen - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 4000)  # four standard errors
    assert (order == other).float().mean() < 0.1


def test_eq_4_as_he_et_al_write_it(mae):
    """All patches are embedded, hidden ones removed, mask tokens added; the target is the clean image."""
    model, x, seeds = mae
    net = model.trunk
    order = image_uniform(seeds, 16).argsort(1)
    keep, restore = order[:, :4], order.argsort(1)
    z, loss = masked_task(x, seeds, model, tiny())
    assert torch.equal(canvas(z, x, seeds), x)
    z_adv = (z + 0.1 * torch.randn_like(z)).clamp(0, 1)
    h = net.encoder.embed((canvas(z_adv, x, seeds) - model.mean) / model.std)  # with a convolution
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
    p = patchify((x - model.mean) / model.std, 4).flatten(2).double()
    mean = p.mean(2, keepdim=True)
    variance = (p - mean).square().sum(2, keepdim=True) / 47  # unbiased
    target = (p - mean) / (variance + 1e-6).sqrt()
    mask = torch.ones(6, 16).scatter(1, keep, 0)
    want = ((out - target).square().mean(2) * mask).sum(1) / mask.sum(1)
    assert torch.allclose(loss(model, z_adv), want.float(), rtol=1e-4)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2 / 255), ("l2", 0.3)])
def test_the_attack_moves_the_visible_patches_by_eps_and_raises_the_loss(mae, norm, eps):
    model, x, seeds = mae
    z, loss = masked_task(x, seeds, model, tiny())
    z_adv = perturb(z, loss, seeds, model, tiny(norm=norm, eps=eps))
    delta = z_adv - z
    if norm == "linf":
        assert delta.abs().max() <= eps * (1 + 1e-4)
        # 2 steps of 5/8 eps from a random start do not take every pixel to the border
        assert (delta.abs() > eps * 0.99).float().mean() > 0.2
    else:
        assert torch.allclose(l2_norm(delta).flatten(), torch.full((6,), eps), rtol=1e-3)
    assert (loss(model, z_adv) > loss(model, z)).all()
    assert all(p.grad is None for p in model.parameters())


def test_the_random_start_is_independent_of_the_mask(mae, monkeypatch):
    """The same numbers for both would start the visible patches where they are small."""
    seen = []
    monkeypatch.setattr(adv_mae, "pgd", lambda loss, z, start, **k: seen.append((start - z) / k["eps"]) or z)
    seeds = image_seeds(0, torch.arange(500))
    perturb(torch.zeros(500, 16), lambda net, z: z.sum(1), seeds, mae[0], tiny(norm="linf", eps=0.1))
    together = torch.stack([seen[0].flatten(), image_uniform(seeds, 16).flatten()])
    assert torch.corrcoef(together)[0, 1].abs() < 4 / math.sqrt(8000)


def test_image_uniform_is_splitmix():
    """The published algorithm, in Python's integers."""

    def splitmix(seed, n):
        for _ in range(n):
            seed = (seed + 0x9E3779B97F4A7C15) % 2**64
            z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            yield (((z ^ (z >> 31)) >> 41) + 0.5) / 2**23

    seeds = torch.tensor([0, 1, -5, 2**62 + 12345])
    for seed, row in zip(seeds.tolist(), image_uniform(seeds, 50), strict=True):
        assert row.tolist() == pytest.approx([*splitmix(seed % 2**64, 50)], abs=1e-7)


def test_label_smoothing_is_part_of_the_attacked_loss():
    logits, y = torch.randn(5, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    _, loss = labelled_task(torch.rand(5, 2), y, Recipe(**PLAIN, smoothing=0.3))
    assert torch.allclose(loss(lambda z: logits, None), -((0.7 * y + 0.1) * logits.log_softmax(1)).sum(1))


def test_the_evaluated_crop(tmp_path):
    """It is cut from the original image: 0.875 of its height, or all, or (Table 1) squeezed to a square."""
    (tmp_path / "a").mkdir()
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :, 0] = np.arange(200)  # red tells the column
    Image.fromarray(image).save(tmp_path / "a" / "x.png")
    wanted = ("imagenet", 0.875, 56, 144), ("imagenet", 1.0, 50, 150), ("sgd", 1.0, 0, 200)
    for recipe, share, low, high in wanted:
        crop = central_crop(recipe, tiny(dataset="folder", image_size=64, eval_crop=share))
        x, _ = next(batches(transformed(open_folder(tmp_path, 64), crop), 1, CPU, workers=0))
        assert x.shape[-1] == 64
        assert abs(x[0, 0, 32, 0] * 255 - low) < 3 and abs(x[0, 0, 32, -1] * 255 - high) < 3


def test_recipes_are_the_papers():
    """He et al. 2022, tables of their appendix; Rebuffi et al., appendices C and E."""
    names = ("batch_size", "lr", "lowest", "warmup", "weight_decay", "betas", "clip", "ema")
    images = ("crop", "rand_augment", "erase", "mixup", "cutmix", "smoothing", "drop_path")
    adam, fine = (0.9, 0.95), (0.9, 0.999)
    scratch = (4096, 1.6e-3, 0, 20 / 300, 0.3, adam, 0, 0.9999)
    for kind, length, want, want_images in (
        ("mae", 800, (4096, 2.4e-3, 0, 40 / 800, 0.05, adam, 0, 0), (0.2, 0, 0, 0, 0, 0, 0)),
        ("supervised", 300, scratch, (0.08, 1, 0, 0.8, 1.0, 0.1, 0.1)),
        ("rotnet", 300, scratch, (0.08, 1, 0, 0, 0, 0.1, 0.1)),
        ("imagenet", 100, (512, 5e-4, 1e-6, 0.05, 0.05, fine, 0, 0), (0.08, 1, 0.25, 0.8, 1.0, 0.1, 0.1)),
        ("adamw", 100, (512, 5e-4, 1e-6, 0.05, 0.05, fine, 0, 0), (0, 0, 0, 0, 0, 0.1, 0.1)),
        ("sgd", 2500, (512, 0.01, 0, 0.2, 0, None, 1, 0), (0, 0, 0, 0, 0, 0, 0)),
    ):
        recipe = recipe_of(kind, Args())
        assert (recipe.steps or recipe.epochs) == length
        for name, value in zip(names + images, want + want_images, strict=True):
            assert getattr(recipe, name) == (pytest.approx(value) if name == "lr" else value), (kind, name)
        assert not any(getattr(recipe_of(kind, Args(regularise=False)), name) for name in images[1:])
    assert recipe_of("mae", Args(pretrain_batch_size=512)).lr == pytest.approx(3e-4)
    assert (Args.attack_steps, Args.eps, Args.norm) == (2, 0.5, "l2")


def test_layer_wise_decay_has_14_levels():
    """gamma^k for layer k below the head; vectors and the class token have no weight decay."""
    with torch.device("meta"):
        model = build_model("vit_b16", {"class": 1000})
    gamma = 0.65
    groups = parameter_groups(model, 0.05, gamma)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        k = 12 - int(name.split(".")[2]) if "blocks" in name else 13
        k = 0 if "fc_norm" in name or "heads" in name else k
        assert scale[id(p)] == pytest.approx(gamma**k), name
        assert (id(p) in free) == (p.dim() == 1 or name == "trunk.cls_token"), name
    levels = sorted(set(scale.values()))
    assert len(levels) == 14 and levels[-1] == 1 and levels[0] == pytest.approx(0.0037, abs=5e-5)
    assert {g["scale"] for g in parameter_groups(model, 0.05, None)} == {1.0}


def test_drop_path_keeps_the_expectation():
    """An image's branch is kept as a whole or not at all; the rate rises from 0 in the first layer."""
    torch.manual_seed(0)
    out = drop_path(torch.ones(20_000, 2, 3), 0.3, training=True)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out.flatten(1) == out[:, 0, :1]).all()
    assert abs(out.mean() - 1) < 4 * math.sqrt(0.3 / 0.7 / 20_000)
    model = start_model("supervised", tiny(arch="vit_ti4"), Recipe(**PLAIN, drop_path=0.1), None, 10)
    assert [b.drop_path for b in model.trunk.blocks] == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_gamma_0_keeps_the_encoder_and_rows_are_those_of_the_checkpoints(whole, tmp_path):
    """Accuracies are those of load_model alone; a checkpoint evaluated alone gives the rows of its run."""
    folder, results = whole
    a, plain = (load_checkpoint(folder / f"{name}.pt") for name in ("a-mae", "mae"))
    assert (a["pretrained"]["eps"], plain["pretrained"]["eps"]) == (0.5, 0)
    encoder = [k for k in a["model"] if k.startswith("trunk.") and "fc_norm" not in k]
    assert not all(torch.equal(a["model"][k], plain["model"][k]) for k in encoder)
    _, test = load_data("digits", "", CPU, image_size=16)
    for gamma in (0, 1):
        file = folder / f"a-mae-{gamma}.pt"
        after = load_checkpoint(file)["model"]
        assert all(torch.equal(a["model"][k], after[k]) for k in encoder) == (gamma == 0)
        rows = [r for r in results["rows"] if r["name"] == file.stem]
        assert [(r["eps"], r["examples"], r["checkpoint"]) for r in rows] == [
            (0, 360, str(file)), (0.5, 60, str(file)),
        ]  # fmt: skip
        correct = load_model(file)(test.pixels / 255).argmax(1) == test.labels
        assert rows[0]["accuracy"] == pytest.approx(100 * correct.float().mean().item(), abs=0.01)
    again = dict(init=str(file), recipe="none", eps=9.0, eval_eps=(0.5,), eval_steps=2)
    again = main(tiny(**again, out=str(tmp_path / "again")))
    assert [r["accuracy"] for r in again["rows"]] == [r["accuracy"] for r in rows]
    assert again["args"]["eps"] == 0.5  # the encoder's own attack stays on record
    first, second = (line["loss"] for line in metrics(folder) if line["stage"] == "mae")
    assert second < 0.98 * first  # pre-training learns


def test_killed_and_resumed_is_uninterrupted(whole, tmp_path, monkeypatch):
    """Stopped in the second epochs of A-MAE and of a fine-tuning, a run has the same weights and rows."""
    folder, results = whole
    log, steps = Run.log, itertools.count(1)

    def stop(run, **losses):
        log(run, **losses)
        if next(steps) in (11, 29):
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", stop)
    args = tiny(**WHOLE, out=str(tmp_path / "parts"), resume=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            main(args)
    rows = [row | {"checkpoint": 0} for row in main(args)["rows"]]
    assert rows == [row | {"checkpoint": 0} for row in results["rows"]]
    for file in folder.glob("*.pt"):
        states = [load_checkpoint(f)["model"] for f in (file, tmp_path / "parts" / file.name)]
        assert same_state(*states), file


def test_rotnet_turns_each_image_once_and_averages_the_weights(tmp_path, monkeypatch):
    """The turned image is attacked; the average, also of a resumed run, is that of a plain loop."""
    turns, attacked, models, weights = [], [], [], []
    monkeypatch.setattr(adv_mae, "rotate", lambda x, k: turns.append((x, k)) or rotate(x, k))
    monkeypatch.setattr(adv_mae, "labelled_task", lambda *a: attacked.append(a) or labelled_task(*a))
    monkeypatch.setattr(adv_mae, "start_model", lambda *a: models.append(start_model(*a)) or models[-1])
    log, key = Run.log, "trunk.blocks.1.mlp.fc1.weight"

    def spy(run, **losses):
        weights.append(models[-1].state_dict()[key].clone())
        log(run, **losses)
        if len(weights) == 5:  # the second step of the second epoch of three
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", spy)
    more = dict(method="rotnet", recipe="none", eps=0.0, pretrain_epochs=3, resume=True)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(**more, out=str(tmp_path / "run")))
    main(tiny(**more, out=str(tmp_path / "run")))
    for (x, k), (z, y, _) in zip(turns, attacked, strict=True):
        assert torch.equal(z, rotate(x, k)) and torch.equal(y, k)
    share = torch.cat([k for _, k in turns]).bincount(minlength=4) / 235 / 11 * 3
    assert (share - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 705) and len(share) == 4
    torch.manual_seed(0)
    average = start_model("rotnet", tiny(), Recipe(**PLAIN), None, 10).state_dict()[key]
    for step, w in enumerate(weights[:3] + weights[5:]):
        decay = min(0.9999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    found = load_checkpoint(tmp_path / "run" / "rotnet.pt")["model"][key]
    assert len(weights) == 11 and torch.allclose(found, average, atol=1e-6)
    assert not torch.allclose(found, weights[-1], atol=1e-4)


def test_two_ranks_are_one_that_accumulates(tmp_path, monkeypatch):
    """Odd batches, shared unequally, give the loss to 1e-5 of one process in five unequal parts."""
    monkeypatch.setattr(Run, "load_data", LOAD_DATA)
    args = TINY | dict(recipe="none", pretrain_batch_size=479, eps=0.3)
    done = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node=2".split(),
         ROOT / "adv_mae.py", *flags(args), "--out", "two"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    main(Args(**args, accumulate=5, out=str(tmp_path / "one")))
    one, two = (metrics(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)  # the mean of three steps
    one, two = (load_checkpoint(tmp_path / name / "a-mae.pt")["model"] for name in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def test_byorls_encoder_is_fine_tuned_by_sgd(tmp_path):
    """Its attack is on record; four steps end within the second epoch of three steps."""
    byorl.main(byorl.Args(
        dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, epochs=1, warmup_epochs=0,
        batch_size=100, hidden=16, projection=8, attack="pgd", attack_steps=1, step_size=0.3, heads="none",
        val_images=30, amp="off", device="cpu", out=str(tmp_path / "byorl"),
    ))  # fmt: skip
    args = dict(init=str(tmp_path / "byorl" / "byorl.pt"), recipe="sgd", regularise=True)
    (row,) = main(tiny(**args, out=str(tmp_path / "run")))["rows"]
    assert row["name"] == "byorl-sgd" and len(metrics(tmp_path / "run")) == 2
    assert row["pretrained"]["method"] == "byol" and row["pretrained"]["eps"] == 128 / 255


def test_groups_of_classes():
    """ImageNet-A and -R: among their classes; V2: by number; Conflict Stimuli: by mean probability."""
    classes = [f"n{i:08d}" for i in range(1000)]
    logits = torch.randn(5, 1000)

    def chosen(groups, logits=logits):
        return choose_among(logits, groups).argmax(1)

    some = groups_of([classes[7], classes[3]], classes, "IN-R")
    assert torch.equal(chosen(some), logits[:, [7, 3]].argmax(1))
    names = sorted(map(str, range(1000)))  # as folders are sorted: 0, 1, 10, 100, ...
    assert [int(names[i]) for i in chosen(groups_of(names, classes, "IN-V2"))] == logits.argmax(1).tolist()
    groups = groups_of(sorted(CONFLICT), classes, "Conflict")
    # counts of Geirhos et al.: 1 airplane, 4 bears, 2, 49 birds, 5, 7, 3, 6 cats, 4, 3, 109 dogs, ...
    assert (groups > 0).sum(1).tolist() == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    probabilities = logits.softmax(1)
    want = torch.stack([probabilities[:, row > 0].mean(1) for row in groups], 1).argmax(1)
    assert torch.equal(chosen(groups), want)
    far = torch.zeros(1, 1000)
    far[0, 5], far[0, 3] = 300, 1  # probabilities of 3 and 7 are 0 in float32
    assert chosen(some, far).tolist() == [1]
    for name, known in (("zebra", classes), ("5", classes[:10]), ("cat", ["a", "b"])):
        with pytest.raises(UserError, match=f"'{name}' is none of"):
            groups_of([name], known, "x")


def write_images(folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / name)


def test_variants_and_real_labels_are_evaluated(tmp_path):
    """A folder of some classes is evaluated among these; ReaL's images have several right labels, or none."""
    files = [f"{c}/ILSVRC2012_val_{3 * i + j + 1:08d}.png" for i, c in enumerate("012") for j in range(3)]
    write_images(tmp_path / "train", files)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    shutil.copytree(tmp_path / "test", tmp_path / "other", ignore=shutil.ignore_patterns("1"))
    real = [[0], [0, 1], [2], [], [1], [1], [0, 1, 2], [2], [2]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    rows = main(tiny(
        dataset="folder", data_dir=str(tmp_path), eval_data=str(tmp_path / "other"), eps=0.0,
        real=str(tmp_path / "real.json"), pretrain_batch_size=9, batch_size=9, out=str(tmp_path / "run"),
    ))["rows"]  # fmt: skip
    x = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "test" / name))) for name in files])
    logits = load_model(tmp_path / "run" / "mae-0.75.pt")(x.permute(0, 3, 1, 2) / 255)
    y, out, among = torch.arange(9) // 3, logits.argmax(1), 2 * logits[:, [0, 2]].argmax(1)
    correct = {"test": out == y, "other": (among == y)[y != 1]}
    correct["real"] = torch.tensor([k in some for k, some in zip(out.tolist(), real, strict=True) if some])
    assert {row["set"]: row["examples"] for row in rows} == {"test": 9, "other": 6, "real": 8}
    for row in rows:
        assert row["accuracy"] == pytest.approx(100 * correct[row["set"]].float().mean().item(), abs=0.01)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_published_vit_computes_the_same(tmp_path, tuned):
    """A pre-trained MAE has fixed positions, new ones of no mean norm; a classifier of MAE's or timm's has its own."""
    torch.manual_seed(0)
    ours, path = build_model("vit_ti16", {"class": 7} if tuned else {}).eval(), tmp_path / "vit.pth"
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1) if tuned or p.dim() > 1 else None
    theirs = {k.removeprefix("trunk."): v for k, v in ours.state_dict().items() if k not in ("mean", "std")}
    theirs = {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in theirs.items()}
    theirs = {k.replace("heads.class.", "head."): v for k, v in theirs.items()}
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 192), sincos_positions(192, 14, 14)])[None]
    if tuned:
        theirs["pos_embed"][:, 0] += 0.5  # of the class token
        theirs["cls_token"] = theirs["cls_token"] - 0.5
    else:
        theirs = {k.replace("fc_norm", "norm"): v for k, v in theirs.items()}
        theirs |= {"mask_token": torch.rand(1, 1, 64), "decoder_pred.bias": torch.rand(9)}
        theirs = {"model": {"module._orig_mod." + k: v for k, v in theirs.items()}}
        theirs["args"] = argparse.Namespace(lr=1.0)
    torch.save(theirs, path)
    state = load_vit(str(path), Args(arch="vit_ti16"))
    model = build_model(**state["network"])
    model.load_state_dict(state["model"])
    x = torch.rand(2, 3, 224, 224)
    ours.mean, ours.std = (torch.tensor(s).view(1, 3, 1, 1) for s in IMAGENET_STATS)
    a, b = ((m(x) if tuned else m.features(x)) for m in (ours, model.eval()))
    assert torch.allclose(a, b, atol=1e-4) and a.std() > 0.1
    if tuned:
        with pytest.raises(UserError, match="positions for 196 patches, --image-size makes 4"):
            main(tiny(init=str(path), arch="vit_ti16", image_size=32, out=str(tmp_path / "run")))
    else:
        theirs["model"]["blocks.3.ls1.gamma"] = torch.ones(192)
        torch.save(theirs, path)
        with pytest.raises(UserError, match="blocks.3.ls1.gamma"):
            load_vit(str(path), Args(arch="vit_ti16"))


@pytest.mark.parametrize(("changes", "match"), [
    ({"mask_ratio": 0.99}, "0 of 16 patches visible"), ({"eval_data": "other/test"}, "names two test sets"),
    ({"batch_size": 1}, "at least 2 images"), ({"real": ROOT / "README.md"}, "--real needs --dataset folder"),
])  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    """They are told before any training."""
    assert match in one_sentence(adv_mae, *flags(TINY | changes | {"out": tmp_path / "run"}))
    assert not list(tmp_path.glob("run/*.pt"))


def test_wrong_checkpoints(one_sentence, whole, tmp_path):
    """Unfinished, no classifier, of other classes, or not the one that the run was started with."""
    folder, _ = whole
    classifier, init = load_checkpoint(folder / "a-mae-1.pt"), tmp_path / "init.pt"
    save_checkpoint(tmp_path / "named.pt", classifier | {"classes": list("abcdefghij")})
    save_checkpoint(init, classifier)
    main(tiny(recipe="none", init=str(init), out=str(tmp_path / "run")))
    save_checkpoint(init, classifier | {"epoch": 99})
    for file, recipe, match in (
        (folder / "last.pt", "adamw", "no finished ViT"), (tmp_path / "named.pt", "none", "other classes"),
        (folder / "a-mae.pt", "none", "no finished classifier"), (init, "none", "not those that the run"),
    ):  # fmt: skip
        out = tmp_path / ("run" if file == init else f"{file.stem}-run")
        argv = flags(TINY | {"recipe": recipe, "init": file, "out": out})
        assert match in one_sentence(adv_mae, *argv, "--resume")
