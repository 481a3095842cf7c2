"""adv_mae.py: masks, targets, attacks on visible patches, recipes, runs, test sets, published ViTs."""
import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import flags, metrics
from PIL import Image
from torch import nn

import adv_mae
from adv_mae import (
    CONFLICT, Args, MaskedAutoencoder, choose_among, count_visible, groups_of, image_seeds,
    labelled_task, load_vit, main, masked_task, parameter_groups, perturb, recipe_of, start_model,
)  # fmt: skip
from common import (
    IMAGENET_STATS, Run, build_model, image_uniform, l2_norm, load_checkpoint,
    load_data, load_model, patchify, rotate, save_checkpoint, sincos_positions, unpatchify,
)  # fmt: skip

# A run of a second or two: 235 digits of 16 pixels (see `few_digits`), three steps per epoch.
TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="vit_mini4", width=0.5, workers=0, amp="off",
    device="cpu", pretrain_epochs=1, pretrain_batch_size=80, pretrain_lr=1e-3, crop=0.6, decoder_width=16,
    decoder_depth=1, decoder_heads=2, recipe="adamw", epochs=1, batch_size=80, lr=2e-3, steps=4,
    layer_decay=(0.75,), regularise=False, eval_eps=(), attack_examples=60,
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    load = Run.load_data

    def few(run, **more):
        train, test = load(run, **more)
        return train.subset(torch.arange(min(len(train), 235))), test

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, results) of a run: pre-training with and without attack, each fine-tuned with two gammas."""
    out = tmp_path_factory.mktemp("adv_mae") / "run"
    more = dict(pretrain_epochs=2, epochs=2, layer_decay=(0.0, 1.0), eval_eps=(0.5,), eval_steps=2)
    return out, main(tiny(plain=True, **more, out=str(out)))


def test_masks_are_uniform_and_new_in_each_epoch():
    """As many patches stay visible as in MAE's code, rounded down: 25 of 64 at 0.6."""
    assert [count_visible(n, ratio) for n, ratio in ((196, 0.75), (64, 0.75), (64, 0.6))] == [49, 16, 25]
    order, other = (image_uniform(image_seeds(n, torch.arange(4000)), 16).argsort(1) for n in (7, 8))
    seen = order[:, :4].flatten().bincount() / 4000
    assert (seen - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 4000)  # four standard errors
    assert (order == other).float().mean() < 0.1 and (order[1:] == order[:-1]).float().mean() < 0.1


def test_eq_4_as_he_et_al_write_it(mae):
    """All patches are embedded, hidden ones removed, mask tokens added; the target is the clean image."""
    model, x, seeds = mae
    net = model.trunk
    order = image_uniform(seeds, 16).argsort(1)
    keep, restore = order[:, :4], order.argsort(1)
    z, loss = masked_task(x, seeds, model, tiny())
    image, patches = torch.arange(6)[:, None], patchify(x, 4)
    assert torch.equal(z, patches[image, keep])  # hidden ones are not attacked
    patches[image, keep] = z_adv = (z + 0.1 * torch.randn_like(z)).clamp(0, 1)
    h = net.encoder.embed((unpatchify(patches) - model.mean) / model.std)  # with a convolution
    h = torch.gather(h, 1, keep[:, :, None].expand(-1, -1, h.shape[2]))
    h = net.embed(net.norm(net.encoder.encode(h)))
    h_ = torch.cat([h[:, 1:], net.mask_token.expand(6, 12, -1)], 1)
    h_ = torch.gather(h_, 1, restore[:, :, None].expand(-1, -1, 16)) + sincos_positions(16, 4, 4)
    h = net.decoder(torch.cat([h[:, :1], h_], 1))
    out = net.predict(net.decoder_norm(h))[:, 1:]  # (B, 16, 48), in the image's order
    p = patchify((x - model.mean) / model.std, 4).flatten(2).double()
    mean = p.mean(2, keepdim=True)
    variance = (p - mean).square().sum(2, keepdim=True) / 47  # unbiased
    target = (p - mean) / (variance + 1e-6).sqrt()
    want = (out - target).square().mean(2).gather(1, order[:, 4:]).mean(1)  # of the hidden ones
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


def test_learning_rates_are_the_papers():
    """He et al.'s base rate times batch size / 256 in pre-training; fine-tuning's are given as they are."""
    rates = [recipe_of(kind, Args()).lr for kind in adv_mae.RECIPES]
    assert rates == pytest.approx([2.4e-3, 1.6e-3, 1.6e-3, 5e-4, 5e-4, 0.01])
    assert recipe_of("mae", Args(pretrain_batch_size=512)).lr == pytest.approx(3e-4)


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


def test_gamma_0_keeps_the_encoder_and_rows_are_those_of_the_checkpoints(whole, tmp_path):
    """Accuracies are those of load_model alone; a checkpoint evaluated alone gives the rows of its run."""
    folder, results = whole
    a, plain = (load_checkpoint(folder / f"{name}.pt") for name in ("a-mae", "mae"))
    encoder = [k for k in a["model"] if k.startswith("trunk.") and "fc_norm" not in k]
    assert not all(torch.equal(a["model"][k], plain["model"][k]) for k in encoder)
    _, test = load_data("digits", "", torch.device("cpu"), image_size=16)
    for gamma in (0, 1):
        file = folder / f"a-mae-{gamma}.pt"
        after = load_checkpoint(file)["model"]
        assert all(torch.equal(a["model"][k], after[k]) for k in encoder) == (gamma == 0)
        rows = [r for r in results["rows"] if r["name"] == file.stem]
        assert [(r["eps"], r["examples"]) for r in rows] == [(0, 360), (0.5, 60)]
        correct = load_model(file)(test.pixels / 255).argmax(1) == test.labels
        assert rows[0]["accuracy"] == pytest.approx(100 * correct.float().mean().item(), abs=0.01)
    again = dict(init=str(file), recipe="none", eps=9.0, eval_eps=(0.5,), eval_steps=2)
    again = main(tiny(**again, out=str(tmp_path / "again")))
    assert [r["accuracy"] for r in again["rows"]] == [r["accuracy"] for r in rows]
    assert again["args"]["eps"] == 0.5  # the encoder's own attack stays on record
    first, second, *_ = metrics(folder)
    assert second["loss"] < 0.98 * first["loss"]  # pre-training learns


def test_rotnet_turns_each_image_once_and_averages_the_weights(tmp_path, monkeypatch):
    """The turned image is attacked; the average, also of a resumed run, is that of a plain loop."""
    turned, attacked, models, weights = [], [], [], []
    monkeypatch.setattr(adv_mae, "rotate", lambda x, k: turned.append((rotate(x, k), k)) or turned[-1][0])
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
    args = tiny(**more, out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        main(args)
    main(args)
    for (x, k), (z, y, _) in zip(turned, attacked, strict=True):
        assert torch.equal(x, z) and torch.equal(k, y)
    torch.manual_seed(0)
    average = start_model("rotnet", args, recipe_of("rotnet", args), None, 10).state_dict()[key]
    for step, w in enumerate(weights[:3] + weights[5:]):
        decay = min(0.9999, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * w
    found = load_checkpoint(tmp_path / "run" / "rotnet.pt")["model"][key]
    assert len(weights) == 11 and torch.allclose(found, average, atol=1e-6)


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


def test_variants_and_real_labels_are_evaluated(tmp_path):
    """A folder of some classes is evaluated among these; ReaL's images have several right labels, or none."""
    files = [f"{c}/ILSVRC2012_val_{3 * i + j + 1:08d}.png" for i, c in enumerate("012") for j in range(3)]
    rng = np.random.default_rng(0)
    for name in files:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "train" / name)
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    shutil.copytree(tmp_path / "test", tmp_path / "other", ignore=shutil.ignore_patterns("1"))
    real = [[0], [0, 1], [2], [], [1], [1], [0, 1, 2], [2], [2]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    rows = main(tiny(
        dataset="folder", data_dir=str(tmp_path), eval_data=str(tmp_path / "other"), eps=0.0, recipe="sgd",
        real=str(tmp_path / "real.json"), pretrain_batch_size=9, batch_size=5, out=str(tmp_path / "run"),
    ))["rows"]  # fmt: skip
    x = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "test" / name))) for name in files])
    logits = load_model(tmp_path / "run" / "mae-sgd.pt")(x.permute(0, 3, 1, 2) / 255)
    y, out, among = torch.arange(9) // 3, logits.argmax(1), 2 * logits[:, [0, 2]].argmax(1)
    correct = {"test": out == y, "other": (among == y)[y != 1]}
    correct["real"] = torch.tensor([k in some for k, some in zip(out.tolist(), real, strict=True) if some])
    assert {row["set"]: row["examples"] for row in rows} == {"test": 9, "other": 6, "real": 8}
    for row in rows:
        assert row["accuracy"] == pytest.approx(100 * correct[row["set"]].float().mean().item(), abs=0.01)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_published_vit_computes_the_same(tmp_path, tuned):
    """A pre-trained MAE with fixed positions, and a classifier with learned ones."""
    torch.manual_seed(0)
    ours, path = build_model("vit_ti16", {"class": 7} if tuned else {}).eval(), tmp_path / "vit.pth"
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1) if tuned or p.dim() > 1 else None
    theirs = {k.removeprefix("trunk."): v for k, v in ours.state_dict().items() if k not in ("mean", "std")}
    theirs = {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in theirs.items()}
    theirs = {k.replace("heads.class.", "head."): v for k, v in theirs.items()}
    theirs["pos_embed"] = torch.cat([torch.zeros(1, 192), sincos_positions(192, 14, 14)])[None]
    if tuned:
        theirs["pos_embed"][:, 0] = shift = torch.randn(192)  # of the class token
        theirs["cls_token"] = theirs["cls_token"] - shift
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


def test_wrong_checkpoints(one_sentence, whole, tmp_path):
    """Unfinished, no classifier, of other classes, or not the one that the run was started with."""
    folder, _ = whole
    classifier, init = load_checkpoint(folder / "a-mae-1.pt"), tmp_path / "init.pt"
    save_checkpoint(tmp_path / "named.pt", classifier | {"classes": list("abcdefghij")})
    save_checkpoint(init, classifier)
    main(tiny(recipe="none", init=str(init), out=str(tmp_path / "run")))
    save_checkpoint(init, classifier | {"epoch": 99})
    for file, recipe, match in (
        (folder / "last.pt", "adamw", "ViT"), (tmp_path / "named.pt", "none", "other classes"),
        (folder / "a-mae.pt", "none", "classifier"), (init, "none", "not those that the run"),
    ):  # fmt: skip
        out = tmp_path / ("run" if file == init else "other")
        argv = flags(TINY | {"recipe": recipe, "init": file, "out": out})
        assert match in one_sentence(adv_mae, *argv, "--resume")
