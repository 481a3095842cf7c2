"""byorl.py: the attack on views, LARS, schedules, the target network, label fractions, heads, UAT-FT."""
import copy
import json
import math
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags, same_state
from PIL import Image

import byorl
import common
from byorl import LARS, Args, ByolNetwork, attack_view, distance, learning_rate, main, tau_at
from common import Run, UserError, build_model, l2_norm, load_checkpoint, load_model, paper_numbers, split_train

CPU = torch.device("cpu")
TINY = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=2, warmup_epochs=1,
    batch_size=128, lr=0.5, eps=0.5, attack_steps=2, hidden=16, projection=8, label_fractions=(0.2, 1.0),
    probe_epochs=2, probe_steps=1, val_images=400, eval_attack="pgd20", eval_steps=2, eval_examples=60,
    amp="off", device="cpu",
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def online():
    torch.manual_seed(0)
    return ByolNetwork(tiny(width=1 / 8, hidden=32, projection=16), CPU).train()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    main(tiny(heads="none", epochs=1, out=str(folder)))
    return folder / "byorl.pt"


@pytest.fixture(scope="module")
def digits():
    return common.load_data("digits", "", CPU, image_size=8)


def interrupt(monkeypatch, *steps):
    """Ctrl-C in the steps of these numbers, counted from now on."""
    log, calls = Run.log, []

    def spy(self, **losses):
        log(self, **losses)
        calls.append(1)
        if len(calls) in steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", spy)


# ---- the attack ----


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8 / 255)])
@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_the_attack_raises_the_loss_and_leaves_the_networks_alone(online, norm, eps, attack):
    v, other = torch.rand(12, 3, 16, 16), torch.rand(12, 3, 16, 16)
    target = copy.deepcopy(online)
    with torch.no_grad():
        z = target.project(other)
    before = {k: t.clone() for k, t in online.state_dict().items()}, {k: t.clone() for k, t in target.state_dict().items()}, z.clone()
    v_adv = attack_view(online, v, z, tiny(norm=norm, eps=eps, attack=attack, attack_steps=8))
    assert same_state(online.state_dict(), before[0])  # running statistics included
    assert same_state(target.state_dict(), before[1]) and torch.equal(z, before[2])
    assert all(p.grad is None for p in [*online.parameters(), *target.parameters()]) and online.training
    delta = v_adv - v
    assert (l2_norm(delta).max() if norm == "l2" else delta.abs().max()) <= eps * (1 + 1e-5)
    assert v_adv.min() >= 0 and v_adv.max() <= 1
    rises = distance(copy.deepcopy(online).predict(v_adv), z) - distance(copy.deepcopy(online).predict(v), z)  # batch statistics in both
    assert rises.mean() > 0.05 and (rises > 0).float().mean() > 0.9
    assert torch.equal(attack_view(online, v, z, tiny(eps=0.0)), v)  # BYOL


def test_distance_is_that_of_unit_vectors():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    want = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1)
    assert torch.allclose(distance(a, b), want, atol=1e-6)


def test_views_have_their_own_statistics(online):
    """The two views are not one batch for BatchNorm."""
    v1, v2 = torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16) * 0.3
    a, b = copy.deepcopy(online), copy.deepcopy(online)
    p1, p2 = a(v1, v2)
    assert torch.equal(p1, b.predict(v1)) and torch.equal(p2, b.predict(v2))
    assert not torch.allclose(copy.deepcopy(online).predict(torch.cat([v1, v2]))[:8], p1, atol=1e-3)


# ---- optimiser and schedules ----


def test_lars_against_a_hand_calculation():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    opt = LARS([w, b], lr=2.0, weight_decay=0.1, momentum=0.9)
    nw, nb = w.detach().numpy().astype(np.float64), b.detach().numpy().astype(np.float64)
    mw, mb = np.zeros_like(nw), np.zeros_like(nb)
    for step in range(3):
        gw, gb = np.random.default_rng(step).normal(size=(3, 4)), np.random.default_rng(step + 9).normal(size=3)
        w.grad, b.grad = torch.tensor(gw, dtype=torch.float32), torch.tensor(gb, dtype=torch.float32)
        opt.param_groups[0]["lr"] = lr = 2.0 / (step + 1)
        opt.step()
        g = gw + 0.1 * nw  # decay inside the trust ratio
        mw = 0.9 * mw + 1e-3 * np.linalg.norm(nw) / np.linalg.norm(g) * g
        mb = 0.9 * mb + gb  # a vector: no decay, no trust ratio
        nw, nb = nw - lr * mw, nb - lr * mb  # the rate outside the momentum
        assert np.allclose(w.detach(), nw, atol=1e-5) and np.allclose(b.detach(), nb, atol=1e-5)
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=1.0, weight_decay=0.0).step()
    assert torch.equal(zero.detach(), -torch.ones(2, 2))  # a ratio of 1 where a norm is 0


def test_schedules():
    args = Args()
    assert (args.epochs, args.warmup_epochs, args.lr, args.tau) == (1000, 10, 2.0, 0.996)
    rate = [learning_rate(2.0, k, 970, 97_000) for k in range(97_001)]
    assert rate[0] == 0 and rate[485] == pytest.approx(1.0) and rate[970] == max(rate) == 2.0
    assert rate[-1] == pytest.approx(0, abs=1e-9) and rate[970 + (97_000 - 970) // 2] == pytest.approx(1.0, abs=1e-3)
    assert tau_at(0.996, 0, 100) == pytest.approx(0.996) and tau_at(0.996, 100, 100) == 1
    assert tau_at(0.996, 50, 100) == pytest.approx(0.998)
    rates = [tau_at(0.996, k, 100) for k in range(101)]
    assert rates == sorted(rates)


def test_the_target_follows_the_online_network(tmp_path):
    """tau = 1 keeps it at its start; after a first step with tau = 0 it is the online network."""
    main(tiny(tau=1.0, heads="none", epochs=1, out=str(tmp_path / "one")))
    state = load_checkpoint(tmp_path / "one" / "last.pt")
    torch.manual_seed(0)
    start = ByolNetwork(tiny(), CPU).state_dict()
    weights = [k for k in start if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(state["target"][k], start[k]) for k in weights)
    assert any(not torch.equal(state["model"][k], start[k]) for k in weights)
    one_step = dict(tau=0.0, batch_size=1437, warmup_epochs=0, epochs=1)
    main(tiny(**one_step, heads="none", out=str(tmp_path / "zero")))
    state = load_checkpoint(tmp_path / "zero" / "last.pt")
    assert all(torch.allclose(state["target"][k], state["model"][k], atol=1e-7) for k in weights)
    assert any(not torch.equal(state["model"][k], start[k]) for k in weights)


# ---- heads ----


def test_label_fractions_are_nested_and_not_balanced(digits):
    train, _ = digits
    parts = [split_train(train, val_fraction=200, seed=3, label_fraction=f) for f in (0.01, 0.1, 1.0)]
    sets = [set(part.index.tolist()) for part, _ in parts]
    assert sets[0] < sets[1] < sets[2] and [len(s) for s in sets] == [14, 144, 1237]
    assert all(torch.equal(val.index, parts[0][1].index) and len(val) == 200 for _, val in parts)  # the same images held out
    counts = torch.bincount(train.labels[parts[1][0].index], minlength=10)
    assert counts.max() > counts.min() + 2


def test_all_stages_and_heads_alone(tmp_path, capsys, monkeypatch):
    results = main(tiny(plain=True, out=str(tmp_path / "all")))
    names = [(r["encoder"], r["head"], r["label_fraction"], r["eps"]) for r in results["rows"]]
    assert names == [(e, h, f, eps) for e in ("byol", "byorl") for f in (0.2, 1.0) for h in ("robust", "plain") for eps in (0, 0.5)]
    assert "byorl plain 100%, epoch" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines[:6]] == ["byol"] * 2 + ["byorl"] * 2 + ["byol robust 20%"] * 2
    # Heads alone give the same rows; a resumed run does not evaluate them again.
    heads = dict(init=str(tmp_path / "all" / "byorl.pt"), out=str(tmp_path / "heads"))
    again = main(tiny(**heads))
    assert again["rows"] == [r for r in results["rows"] if r["encoder"] == "byorl"] and len(again["rows"]) == 8
    (tmp_path / "heads" / "results.json").unlink()
    monkeypatch.setattr(byorl, "evaluate", None)
    assert main(tiny(**heads, resume=True))["rows"] == again["rows"]
    # Encoders stay as they are, heads are classifiers that any script can load.
    encoder, head = (load_checkpoint(tmp_path / "all" / name)["model"] for name in ("byorl.pt", "byorl-plain-100%.pt"))
    assert all(torch.equal(head[k], v) for k, v in encoder.items() if k.startswith("trunk."))
    assert load_model(tmp_path / "all" / "byorl-robust-20%.pt")(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_a_plain_head_reaches_the_optimum_of_logistic_regression(tmp_path, monkeypatch, digits):
    """On frozen features the problem is convex: the head's training loss is near that of a long run of L-BFGS."""
    args = tiny(probe_epochs=80, probe_lr=0.1, heads="plain", label_fractions=(1.0,), epochs=1)
    monkeypatch.setattr(byorl, "random_crop_flip", lambda x, **k: x)
    scores = iter(range(10**6))
    monkeypatch.setattr(byorl, "robust_accuracy", lambda *a: next(scores))  # keep the last epoch
    main(tiny(**vars(args) | {"out": str(tmp_path)}))
    model = load_model(tmp_path / "byorl-plain-100%.pt")
    train, _ = digits
    some, _ = split_train(train, val_fraction=400, seed=0)
    x, y = some.pixels[some.index] / 255, some.labels[some.index]
    with torch.no_grad():
        features = model.features(x).double()
    ours = F.cross_entropy(model.heads["class"].double()(features), y).item()
    w = torch.zeros(features.shape[1] + 1, 10, dtype=torch.float64, requires_grad=True)
    ones = torch.cat([features, torch.ones(len(x), 1)], 1)
    opt = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(ones @ w, y)
        loss.backward()
        return loss

    opt.step(closure)
    best = closure().item()
    assert best <= ours < best + 0.15 * (math.log(10) - best)


def test_fewer_images_than_ranks(ranks, tmp_path, monkeypatch, digits):
    """A rank without images joins in the sum."""
    run, (train, _) = byorl.start_run(tiny(out=str(tmp_path))), digits
    ranks(1, 3)
    monkeypatch.setattr("common.dist.all_reduce", lambda t: None)
    assert byorl.map_images(lambda x: x.mean((2, 3)), train.subset(torch.tensor([5])), run, 64).shape == (1, 3)


def test_init_brings_its_architecture(encoder, tmp_path):
    """So that a transfer needs no --arch and --width; another data set has a head of its own."""
    results = main(tiny(
        init=str(encoder), arch="resnet18", width=1.0, epochs=7, heads="plain", label_fractions=(1.0,), probe_epochs=1,
        out=str(tmp_path),
    ))  # fmt: skip
    assert [results["args"][k] for k in ("arch", "width", "epochs")] == ["preact18", 1 / 16, 1]
    assert load_checkpoint(tmp_path / "byorl-plain-100%.pt")["network"]["width"] == 1 / 16


def test_a_vision_transformer_as_encoder(tmp_path):
    head = dict(heads="plain", label_fractions=(1.0,), probe_epochs=1)
    results = main(tiny(arch="vit_ti4", width=1 / 3, epochs=1, **head, out=str(tmp_path)))
    assert results["rows"][0]["examples"] == 60
    assert load_model(tmp_path / "byorl-plain-100%.pt")(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_retrieval_against_numpy(encoder, tmp_path, capsys, digits):
    """The share of neighbours of the query's class, and the cosine with the image that the attack steers towards."""
    args, (_, test) = tiny(out=str(tmp_path)), digits
    run = byorl.start_run(args)
    byorl.retrieve(run, args, {"byorl": load_checkpoint(encoder)}, test, queries=40, nearest=5)
    said = capsys.readouterr().out
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0))
    x, y = test.pixels[test.index[order]] / 255, test.labels[test.index[order]].numpy()
    state = load_checkpoint(encoder)
    model = build_model(**state["network"]).eval()
    model.load_state_dict(state["model"])
    with torch.no_grad():
        h = model.features(x).double().numpy()
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    cosines = h[:40] @ h.T
    np.fill_diagonal(cosines, -2)
    clean = 100 * (y[np.argsort(-cosines, 1)[:, :5]] == y[:40, None]).mean()
    shares = [int(line.split(": ")[1].split("%")[0]) for line in said.splitlines() if "nearest images" in line]
    assert abs(shares[0] - clean) <= 1
    others = [next(j for j in range(40) if y[j] != y[i]) for i in range(40)]
    steered = [float(line.split("another class ")[1]) for line in said.splitlines() if "nearest images" in line]
    assert abs(steered[0] - cosines[range(40), others].mean()) < 0.01 and steered[1] > steered[0] + 0.03  # the attack does what it should
    assert (tmp_path / "retrieval.png").exists()


# ---- the baseline and more images ----


def test_pseudo_labels_only_where_labels_are_missing(tmp_path, digits):
    """Known labels stay, even where the teacher errs; others are the teacher's; images held out are in neither part."""
    args, (train, _) = tiny(out=str(tmp_path)), digits
    run = byorl.start_run(args)
    teacher = build_model("preact18", {"class": 10}, width=1 / 16)
    with torch.no_grad():
        teacher.heads["class"].weight.zero_()
        teacher.heads["class"].bias.copy_(torch.arange(10) == 3)  # says 3 to all
    known, held_out = split_train(train, val_fraction=200, seed=0, label_fraction=0.1)
    rest = train.subset(torch.tensor(sorted(set(range(1437)) - set(known.index.tolist()) - set(held_out.index.tolist()))))
    state = {"network": teacher.spec, "model": teacher.state_dict(), "stage": "t"}
    union = byorl.pseudo_label(run, args, state, known, rest)
    assert sorted(union.index.tolist()) == sorted(known.index.tolist() + rest.index.tolist()) and len(union) == 1437 - 200
    assert torch.equal(union.labels[known.index], train.labels[known.index]) and (union.labels[rest.index] == 3).all()
    assert train.labels[rest.index].unique().numel() == 10  # the set itself is as before


def test_uat_ft(tmp_path, monkeypatch):
    """With part of the labels a plain teacher, then a robust student of the same kind; with all labels no teacher. Killed and
    resumed it ends in the same numbers."""
    seen = []
    real = byorl.train_classifier

    def spy(name, run, args, **more):
        seen.append((name, len(more["images"]), more["robust"], more["encoder"]))
        return real(name, run, args, **more)

    monkeypatch.setattr(byorl, "train_classifier", spy)
    uat = dict(method="uat-ft", uat_epochs=3, uat_lr=0.05, eval_examples=0)
    whole = main(tiny(**uat, out=str(tmp_path / "whole")))
    assert seen == [
        ("uat-ft 20% teacher", 287, False, None), ("uat-ft 20%", 1437 - 400, True, None), ("uat-ft 100%", 1437 - 400, True, None)
    ]  # fmt: skip
    assert [(r["name"], r["eps"]) for r in whole["rows"]] == [(f"uat-ft {p}%", e) for p in (20, 100) for e in (0, 0.5)]
    clean, robust = [r["accuracy"] for r in whole["rows"][2:]]
    assert clean > robust > 20  # chance is 10
    interrupt(monkeypatch, 20, 40, 90)  # 36 steps each: in the teacher's, the student's and the next student's training
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            main(tiny(**uat, out=str(tmp_path / "cut"), resume=True))
    assert main(tiny(**uat, out=str(tmp_path / "cut"), resume=True))["rows"] == whole["rows"]
    assert load_checkpoint(tmp_path / "cut" / "uat-ft-20%-teacher.pt")["epoch"] == load_checkpoint(
        tmp_path / "whole" / "uat-ft-20%-teacher.pt"
    )["epoch"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3] * 3


def test_extra_images_are_learned_from(tmp_path):
    """They change the encoder; an epoch is as long as without; it does not matter whether they are streamed."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "extra.npy", rng.integers(0, 256, (300, 8, 8, 3), dtype=np.uint8))
    weights, steps = [], []
    for name, extra in ("without", ""), ("with", str(tmp_path / "extra.npy")):
        main(tiny(heads="none", epochs=1, extra_data=extra, out=str(tmp_path / name)))
        state = load_checkpoint(tmp_path / name / "byorl.pt")
        weights.append(state["model"])
        steps.append(load_checkpoint(tmp_path / name / "last.pt")["history"][0]["epoch"])
        assert state["extra_images"] == (300 if extra else 0)
    assert not same_state(*weights) and steps == [1, 1]
    more = dict(extra_data=str(tmp_path / "extra.npy"), label_fractions=(1.0,), eval_steps=1)
    uat = main(tiny(method="uat-ft", uat_epochs=1, **more, out=str(tmp_path / "uat")))
    assert (tmp_path / "uat" / "uat-ft-100%-teacher.pt").exists() and uat["rows"][0]["name"] == "uat-ft 100% +300"
    for folder, file in ("with", "byorl"), ("uat", "uat-ft-100%"):
        state = load_checkpoint(tmp_path / folder / f"{file}.pt")
        assert byorl.encoder_name(state, tiny()) == file.replace("-100", " 100") + " +300"


# ---- views of stored images ----


@pytest.mark.parametrize("n", [1, 2])
def test_crops_are_cut_from_the_whole_stored_image(tmp_path, n):
    """Images of 24 x 8 pixels, red at the left, green at the right: a centre crop would be all blue."""
    for name in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            picture = np.zeros((8, 24, 3), np.uint8)
            picture[:, :8, 0] = picture[:, 8:16, 2] = picture[:, 16:, 1] = 255
            for i in range(20):
                Image.fromarray(picture).save(tmp_path / name / label / f"{i}.png")
    images, _ = common.load_data("folder", str(tmp_path), CPU, image_size=8, stream=True)
    args = tiny(dataset="folder")

    def read(seed):
        return next(common.batches(byorl.crop_stored_images(images, args, seed, n), 40, CPU, workers=0))[0]

    x = read(0)
    assert x.shape == (40, 3 * n, 8, 8)
    for crop in x.split(3, 1):
        red, green = ((crop[:, c] > 0.9).flatten(1).any(1).float().mean() for c in (0, 1))
        assert red > 0.3 and green > 0.3
    assert torch.equal(x, read(0)) and not torch.equal(x, read(1))
    if n == 2:
        assert not torch.equal(x[:, :3], x[:, 3:])
        torch.manual_seed(0)
        v1, v2 = byorl.two_views(x, tiny(jitter_strength=0.0, crop=0.3))
        coloured = (v1 - v1.mean(1, keepdim=True)).abs().amax((1, 2, 3)) > 0.01  # not made grey
        assert torch.allclose(v1[coloured], x[coloured, :3], atol=0.02) and 20 < coloured.sum() < 40
        assert v2.shape == v1.shape


def test_a_folder_is_learned_from(tmp_path):
    rng = np.random.default_rng(0)
    for name, each in ("train", 12), ("test", 5):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (9, 15, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / label / f"{i}.png")
    small = dict(dataset="folder", data_dir=str(tmp_path), workers=0, batch_size=8, val_images=6, eval_examples=0)
    results = main(tiny(**small, epochs=1, flip=True, label_fractions=(1.0,), out=str(tmp_path / "run")))
    assert {row["examples"] for row in results["rows"]} == {10}


# ---- several devices, compilation ----


def test_the_target_network_is_compiled_too(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    main(tiny(heads="none", epochs=1, compile=True, out=str(tmp_path)))
    online, target = compiled[:2]
    assert online is not target and type(online) is type(target)


# ---- the paper's numbers ----


def test_the_papers_numbers_stand_beside_their_own_setting_only():
    def ask(name, **changed):
        return [float(v) if v else None for v in paper_numbers("byorl", Args(**changed), name)]

    linf, x4 = dict(norm="linf", eps=8 / 255), dict(width=4.0, extra_data="extra.npz")
    assert ask("byorl robust 100%", **linf) == [80.80, 43.24]  # Table 3
    assert ask("byorl robust 100%", width=4.0, **linf) == [81.32, 43.19]
    assert ask("byorl robust 100%", **linf, attack="pgd", attack_steps=5) == [85.26, 1.05]  # Table 4
    assert ask("byorl +500000 robust 100%", **x4) == [93.01, 77.61]  # Table 2
    assert ask("byorl +500000 plain 100%", **x4, eps=0.5) == [93.19, 77.09]  # 0.5 is 128/255, rounded
    assert ask("byol +500000 plain 100%", **x4, plain=True) == ask("byol +500000 plain 100%", **x4, eps=0.0) == [94.76, 0.00]
    to = dict(width=4.0, init="byorl.pt")
    assert ask("cifar10 byorl +500000 robust 10%", **to, dataset="stl10") == [None, 53.23]  # Table 1
    assert ask("cifar10 uat-ft 100% +500000 robust 1%", **to, **linf, dataset="cifar100") == [None, 2.18]
    assert ask("cifar10 byorl +500000 robust 100%", **to, **linf, dataset="stl10") == [65.40, 37.79]  # Table 6
    assert ask("byorl robust 1%") == ask("byorl robust 1%", label_fractions=(0.01,), heads="robust", seed=5) == [None, 65.43]
    for name, changed in (
        ("byorl robust 100%", dict(norm="linf", eps=7 / 255)), ("byorl robust 100%", linf | dict(lr=1.0)),
        ("byorl robust 100%", linf | dict(probe_steps=5)), ("byorl robust 100%", linf | dict(eval_attack="pgd20")),
        ("byorl robust 100%", linf | dict(eval_examples=100)), ("byorl robust 100%", linf | dict(dataset="cifar100")),
        ("byorl robust 1%", dict(eps=0.49)), ("byorl robust 1%", dict(width=1.0)), ("init byorl robust 1%", {}),
        ("byorl +1000 robust 100%", x4), ("byorl robust 100%", dict(width=4.0)),
    ):  # fmt: skip
        assert ask(name, **changed) == [], (name, changed)
    lines = (common.Path(common.__file__).parent / "results" / "paper.txt").read_text().splitlines()
    assert sum(line.startswith("byorl |") for line in lines) == 16 + 20 + 10


def test_the_name_of_a_row_says_how_its_encoder_was_trained():
    args = Args(dataset="stl10")
    its = vars(Args())
    ours = {"script": "byorl", "stage": "byorl", "args": its}
    assert byorl.encoder_name(ours, Args()) == "byorl"
    assert byorl.encoder_name(ours | {"extra_images": 7}, args) == "cifar10 byorl +7"
    assert byorl.encoder_name(ours | {"args": its | {"eps": 0.25}}, args) == "cifar10 init byorl"
    assert byorl.encoder_name(ours | {"stage": "byol", "args": its | {"eps": 0.0}}, Args()) == "byol"
    assert byorl.encoder_name(ours, Args(eps=0.5)) == "byorl"  # 128/255, rounded
    for flag, value in (("batch_size", 64), ("flip", False), ("image_size", 64), ("norm", "linf")):
        assert byorl.encoder_name(ours | {"args": its | {flag: value}}, Args()) == "init byorl"
    uat = ours | {"stage": "uat-ft 100%", "args": its | {"probe_steps": 1}}
    assert byorl.encoder_name(uat, Args()) == "init uat-ft 100%"
    assert byorl.encoder_name({"script": "rotation_at", "stage": "train", "args": its}, Args()) == "init train"
    assert byorl.encoder_name({}, Args()) == "init"


# ---- what users get wrong ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label_fractions": "2"}, "--label-fractions"), ({"label_fractions": ""}, "--label-fractions"),
        ({"label_fractions": (0.0001,)}, "too few"), ({"tau": 2.0}, "--tau"), ({"crop": 5.0}, "--crop"),
        ({"init": "x.pt"}, "there is no x.pt"), ({"arch": "vit_s16"}, "no multiple of 16"),
        ({"batch_size": 2}, "at least 2 images"), ({"extra_data": "nowhere.npy"}, "there is no nowhere.npy"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, told):
    assert told in one_sentence(byorl, *flags(TINY | changes | {"out": tmp_path / "run"}))


def test_wrong_checkpoints(one_sentence, encoder, tmp_path):
    state = load_checkpoint(encoder)
    weights = {
        "none": {k: v for k, v in state["model"].items() if not k.startswith("trunk.")},
        "part": {k: v for k, v in state["model"].items() if "layer1" not in k},
    }
    for name, model in weights.items():
        torch.save(state | {"model": model}, tmp_path / f"{name}.pt")
    torch.save(state | {"network": state["network"] | {"arch": "nonsense"}}, tmp_path / "arch.pt")
    for name in (*weights, "arch"):
        told = one_sentence(byorl, *flags(TINY | {"init": tmp_path / f"{name}.pt", "out": tmp_path / "run"}))
        assert ("unknown architecture" if name == "arch" else f"{name}.pt is damaged, or not a file") in told


@pytest.mark.parametrize("array", [
    np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 9, 8, 8), np.uint8),
    np.zeros((4, 16, 16, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8), np.array([{"a": 1}]),
])  # fmt: skip
def test_wrong_extra_data(tmp_path, array):
    np.save(tmp_path / "extra.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match="extra.npy is damaged, or not a file of the kind"):
        common.load_extra(tmp_path / "extra.npy", 8, CPU)


def test_damaged_extra_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "extra.npz", images=images)
    whole = (tmp_path / "extra.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    files = {"cut.npz": whole[: len(whole) // 2], "text.npy": b"hello", "empty.npz": b"", "flipped.npz": flipped}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "texts.npz", "w") as z:
        z.writestr("images.txt", "hello")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    for name in (*files, "texts.npz", "two.npz"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            common.load_extra(tmp_path / name, 8, CPU)
