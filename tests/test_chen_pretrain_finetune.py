"""chen_pretrain_finetune.py against Chen et al.: the tasks, eq. 3 and 4, what is inherited and frozen,
transfer and averages, which cells a command runs, resuming, the paper's numbers."""
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags, replace, same_state

import chen_pretrain_finetune as chen
import common
from chen_pretrain_finetune import (
    Args, Average, Objective, Pretext, Selfie, cells, inherit, log_det, main, make_view, task_loss, transfer,
)  # fmt: skip
from common import (
    Images, Network, Run, UserError, batches, build_model, ce_per_image, jigsaw_permutations, load_checkpoint,
    load_data, paper_numbers, robust_accuracy, save_checkpoint,
)  # fmt: skip

# A run of a few seconds: 160 digits of 16 pixels (see `few_digits`).
TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="resnet26v2", width=1 / 16, epochs=1, batch_size=64,
    lr=0.05, warmup_steps=2, pretrain_epochs=1, eps=0.1, attack_steps=2, num_permutations=5, eval_steps=2,
    eval_examples=60, amp="off", device="cpu",
)  # fmt: skip
CPU = torch.device("cpu")


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    """The first 160 training images; other numbers: few_digits[0] = ..."""
    load_data, number = Run.load_data, [160]

    def few(run):
        train, test = load_data(run)
        return train.subset(torch.arange(number[0])), test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_data", few)
        yield number


def pretext(tasks=chen.TASKS, **changes) -> Network:
    torch.manual_seed(0)
    return Network(Pretext(tasks, tiny(**changes)), {}, (0.5,) * 3, (0.5,) * 3)


def some_views(x):
    return {task: make_view(task, x, jigsaw_permutations(4, 5)) for task in chen.TASKS}


@pytest.fixture
def permutations():
    return jigsaw_permutations(4, 5)


# ---- the tasks ----


def test_selfie_patches_are_a_partition_and_chance_is_the_loss_of_equal_patches(permutations):
    torch.manual_seed(0)
    _, order = make_view("selfie", torch.rand(4, 3, 16, 16), permutations)
    assert sorted(order.tolist()) == list(range(16)) and Selfie(64, 4).masked == 4
    grey, model = torch.full((16, 3, 16, 16), 0.5), pretext(("selfie",)).train()
    for double_softmax in (True, False):
        loss = task_loss(model, "selfie", grey, order, double_softmax)
        assert torch.allclose(loss, torch.full((16,), 4 * math.log(4)), atol=1e-3)


def test_selfies_layers_start_independently_as_in_the_code():
    """Not as copies of one layer, after which the pooled outputs of different images would be alike."""
    torch.manual_seed(0)
    head = Selfie(256, 4).eval()
    assert len(head.encoder) == 13
    for (name, first), other in itertools.product(head.encoder[0].named_parameters(), head.encoder[1:]):
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(first, other.get_parameter(name)), name
    for layer in head.encoder:
        qkv = layer.self_attn.in_proj_weight
        assert qkv.std().item() == pytest.approx(math.sqrt(2 / (256 + 64)), rel=0.01)
        assert isinstance(layer.dropout, torch.nn.Identity)  # between the feed-forward layers
        assert layer.self_attn.dropout == layer.dropout1.p == layer.dropout2.p == 0.1
    pooled = []
    head.encoder.register_forward_hook(lambda module, inputs, out: pooled.append(out[:, 0]))
    with torch.no_grad():
        head(torch.randn(32, 16, 256), torch.randperm(16))
    z = F.normalize(pooled[0], dim=1)
    assert ((z @ z.T).sum() - 32) / (32 * 31) < 0.2


@pytest.mark.parametrize("width", [0.2, 0.33, 0.7, 1.0])
def test_selfie_of_any_width(width):
    """The heads of its attention divide its channels; 16 of them at full width, as in the code."""
    with torch.device("meta"):
        selfie = Pretext(("selfie",), Args(width=width)).branches["selfie"]
    heads = selfie.encoder[0].self_attn.num_heads
    assert heads == 16 if width == 1 else heads >= 1


def test_rotation_is_balanced_and_jigsaw_prefers_the_whole(permutations):
    torch.manual_seed(0)
    x = torch.rand(40, 3, 16, 16)
    turned, k = make_view("rotation", x, permutations)
    assert torch.bincount(k).tolist() == [10] * 4
    assert all(torch.equal(turned[i], x[i].rot90(int(k[i]), (1, 2))) for i in range(40))
    _, k = make_view("jigsaw", torch.zeros(20_000, 1, 4, 4), permutations)
    share = torch.bincount(k, minlength=6) / 20_000
    assert abs(share[0] - (0.1 + 0.9 / 6)) < 0.015 and (share[1:] - 0.9 / 6).abs().max() < 0.015


# ---- the ensemble ----


def test_log_det_of_orthogonal_and_equal_gradients():
    """0 (up to the ridge) and ln of the ridge: 3 equal columns leave (3 + r) r^2."""
    e = torch.diag(torch.tensor([2.0, 7.0, 0.1])).view(3, 1, 3, 1, 1).expand(3, 5, 3, 1, 1)
    assert torch.allclose(log_det(list(e)), torch.full((5,), 3 * math.log(1 + 1e-5)), atol=1e-5)
    same = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    want = torch.full((5,), math.log((3 + 1e-5) * 1e-10), dtype=torch.float64)
    assert torch.allclose(log_det([same, 3 * same, same]), want, atol=1e-4)
    g = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    columns = np.stack([(v[2] / v[2].norm()).flatten().numpy() for v in g], 1)
    assert log_det(g)[2].item() == pytest.approx(np.linalg.slogdet(columns.T @ columns + 1e-5 * np.eye(3))[1])


def slow_layer(layer: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    """A layer of the published attention pooling, head by head, without dropout: z (1, n, dim)."""
    attention, heads = layer.self_attn, []
    q, k, v = F.linear(z, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    for part in torch.arange(z.shape[2]).chunk(attention.num_heads):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / len(part) ** 0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    z = layer.norm1(z + attention.out_proj(torch.cat(heads, -1)))
    return layer.norm2(z + layer.linear2(F.gelu(layer.linear1(z))))


def slow_eq_3(model: Network, views: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over images and tasks of the losses, sum of eq. 4), image by image, by the authors' formulas."""
    trunk, losses, h = model.trunk, torch.zeros(()), torch.zeros(())
    for b in range(len(views["rotation"][0])):
        columns = []
        for task, (images, target) in views.items():
            x = (images[b : b + 1] - 0.5) / 0.5
            if task == "selfie":
                patches = [x[:, :, r : r + 4, c : c + 4] for r in range(0, 16, 4) for c in range(0, 16, 4)]
                vectors = [trunk.resnet.shared(patch).mean((2, 3)) for patch in patches]
                masked, visible = target[:4].tolist(), target[4:].tolist()
                head = trunk.branches["selfie"]
                sequence = torch.stack([head.first[0], *(vectors[i] for i in visible)], 1)
                for layer in head.encoder:
                    sequence = slow_layer(layer, sequence)
                loss = torch.zeros(())
                for i, place in enumerate(masked):
                    query = sequence[0, 0] + head.row[place // 4] + head.col[place % 4]
                    scores = torch.stack([query @ vectors[j][0] for j in masked])
                    p = scores.exp() / scores.exp().sum()
                    loss = loss - (p[i].exp() / p.exp().sum()).log()  # the second softmax
            else:
                logits = trunk.branches[task](trunk.resnet.shared(x))[0]
                loss = -(logits[target[b]].exp() / logits.exp().sum()).log()
            losses = losses + loss
            g = torch.autograd.grad(loss, images, create_graph=True)[0][b].flatten()
            columns.append(g / (g.norm() + 1e-10))
        gram = torch.stack([torch.stack([u @ v for v in columns]) for u in columns]) + 1e-5 * torch.eye(3)
        (a, d, e), (_, f, k), (_, _, m) = gram  # symmetric
        h = h + (a * (f * m - k * k) - d * (d * m - k * e) + e * (d * k - f * e)).log()
    return losses, h


def close(got, want) -> None:
    """To 1e-6 of the largest value."""
    scale = max(w.abs().max().item() for w in want)
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=0, atol=1e-6 * scale), (g - w).abs().max().item() / scale


def test_eq_3_and_its_gradients_against_the_authors_formulas():
    """In float32: the loss, the gradient that the attack follows, and that of the weights."""
    model, x = pretext(width=1 / 8).eval(), torch.rand(3, 3, 16, 16)
    objective, clean = Objective(model, tiny()), some_views(x)
    attacked = some_views(x + 0.1 * torch.rand_like(x))
    images = [v.requires_grad_() for v, _ in attacked.values()]
    losses, h = slow_eq_3(model, attacked)
    want_images = torch.autograd.grad(losses + 0.1 * h, images, retain_graph=True)
    total, eq_4 = objective.adversarial(attacked, True)
    close([total.sum(), eq_4.sum()], [losses, h])
    close(torch.autograd.grad((total + 0.1 * eq_4).sum(), images), want_images)

    for v, _ in clean.values():
        v.requires_grad_()
    want = (slow_eq_3(model, clean)[0] + losses) / (2 * 3 * 3) + 0.1 * h / 3  # 2 kinds, 3 tasks, 3 images
    want_weights = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    got = objective(clean, attacked, True)
    close([got], [want])
    got_weights = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)
    used = [(a, b) for a, b in zip(got_weights, want_weights, strict=True) if b is not None]
    assert len(used) > 200
    close(*zip(*used, strict=True))


def test_the_ensembles_attack_keeps_every_ball_and_raises_eq_3():
    """One attack on three images in the channels: each stays in its own ball. With lambda 0 a task's
    perturbation is the one that it would get alone."""
    model, x = pretext().eval(), torch.rand(4, 3, 16, 16)
    views = some_views(x)
    for lam in (0.1, 0.0):
        torch.manual_seed(0)
        objective = Objective(model, tiny(eps=0.05, attack_steps=5, attack_bn="eval", dpe_lambda=lam))
        found = objective.attack(views, lam > 0)
        for task, (v, target) in found.items():
            assert (v - views[task][0]).abs().max() <= 0.05 + 1e-6 and v.min() >= 0 and v.max() <= 1
            assert target is views[task][1]
        before, after = (objective.adversarial(v, False)[0] for v in (views, found))
        assert (after > before).all()
    noise = torch.rand(4, 9, 16, 16, generator=torch.Generator().manual_seed(0))  # what pgd draws
    v, k = views["rotation"]
    want = (v + (2 * noise[:, 3:6] - 1) * 0.05).clamp(0, 1)
    for _ in range(5):
        want = want.detach().requires_grad_()
        loss = F.cross_entropy(model.features(want, "rotation", k), k, reduction="sum")
        step = want + 0.02 * torch.autograd.grad(loss, want)[0].sign()
        want = torch.clamp(step, v - 0.05, v + 0.05).clamp(0, 1)
    assert torch.allclose(found["rotation"][0], want, atol=1e-6)


def test_second_derivatives_do_not_compute_in_float16(tmp_path, capsys, few_digits):
    """The constant gradient scale of float16 would be taken off them once too often."""
    few_digits[0] = 24
    main(tiny(task="ensemble", amp="fp16", finetune="none", batch_size=16, attack_steps=1, out=str(tmp_path)))
    few_digits[0] = 160
    assert "this pre-training computes in float32" in capsys.readouterr().out


# ---- inheritance and frozen parts ----


def test_exactly_the_trunk_is_inherited():
    with torch.device("meta"):
        model = build_model("resnet50v2", {"class": 10})
        source = Pretext(("rotation",), Args())
    count = sum(p.numel() for n, p in model.trunk.named_parameters() if not n.startswith("layer4."))
    assert count == 8_533_696 == sum(p.numel() for p in source.resnet.parameters())  # stem and stages 1-3
    source, model = pretext(("rotation",)), build_model("resnet26v2", {"class": 10}, width=1 / 16)
    before = copy.deepcopy(model.state_dict())
    inherit(model, {"model": source.state_dict()}, "x.pt")
    for k, v in model.state_dict().items():
        taken = k.startswith("trunk.") and not k.startswith("trunk.layer4")
        want = source.state_dict()[k.replace("trunk.", "trunk.resnet.")] if taken else before[k]
        assert torch.equal(v, want), k
    with pytest.raises(UserError, match="x.pt is damaged, or not a file of the kind"):
        inherit(model, {"model": model.state_dict()}, "x.pt")  # the published code keeps random weights


@pytest.fixture(scope="module")
def rotation(tmp_path_factory):
    """A finished run: P3 on rotation, then F1 to F4, and what main returned."""
    folder = tmp_path_factory.mktemp("rotation")
    return folder, main(tiny(finetune="all", out=str(folder)))


@pytest.mark.parametrize("pair", ["P3F1", "P3F2", "P3F3", "P3F4"])
def test_f1_and_f2_leave_the_trunk_bit_identical(rotation, pair):
    start = load_checkpoint(rotation[0] / "pretrain-P3-rotation.pt")["model"]
    state = load_checkpoint(rotation[0] / f"rotation-{pair}.ra.pt")["model"]
    shared = {k.replace("resnet.", ""): v for k, v in start.items() if k.startswith("trunk.resnet.")}
    same = [torch.equal(state[k], v) for k, v in shared.items()]  # weights, and BatchNorm's buffers
    assert all(same) if pair[2:] in ("F1", "F2") else not any(same[:5])
    torch.manual_seed(0)
    untrained = build_model("resnet26v2", {"class": 10}, width=1 / 16).state_dict()
    assert not any(torch.equal(state[k], untrained[k]) for k in state if "layer4" in k and "conv" in k)


def test_a_network_resists_after_f4_not_after_f3(tmp_path, few_digits):
    """The paper's main finding on a thousand digits: without adversarial fine-tuning no robustness."""
    few_digits[0] = 1000
    args = tiny(pretrain_epochs=2, epochs=5, lr_steps=(3,), val_fraction=0.05, eval_examples=100)
    rows = main(replace(args, out=str(tmp_path / "f4")))["rows"]
    init = str(tmp_path / "f4" / "pretrain-P3-rotation.pt")
    rows += main(replace(args, finetune="F3", init=init, out=str(tmp_path / "f3")))["rows"]
    few_digits[0] = 160
    rows = {(r["pair"], r["eps"] > 0): r["accuracy"] for r in rows if r["pick"] == "ta"}
    assert rows["P3F4", True] > rows["P3F3", True] + 15 and rows["P3F3", False] > 80


# ---- several models ----


@pytest.fixture(scope="module")
def three():
    """Three small networks trained briefly on digits, and test images."""
    train, test = load_data("digits", "", CPU, image_size=16)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = build_model("resnet26v2", {"class": 10}, width=1 / 8).train()
        opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for x, y in itertools.chain(*(batches(train, 64, CPU, shuffle=seed + 9 * i) for i in (0, 1))):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        models.append(model.eval())
    return models, list(batches(test.subset(torch.arange(100)), 50, CPU))


def test_average_of_one_is_the_model_and_of_more_the_mean_of_probabilities(three):
    models, data = three
    x, y = data[0]
    with torch.no_grad():
        assert torch.allclose(Average(models[:1])(x), F.log_softmax(models[0](x), 1), atol=1e-5)
        mean = sum(m(x).softmax(1) for m in models) / 3
        assert torch.allclose(Average(models)(x).exp(), mean, atol=1e-5)
        nll = -mean[range(len(y)), y].log().mean().item()
        assert F.cross_entropy(Average(models)(x), y).item() == pytest.approx(nll, rel=1e-4)


def test_transfer_by_hand(three):
    """Of two networks and their average."""
    models, data = [*three[0][:2], Average(three[0][:2])], three[1]

    def attack(loss, x):  # one step, without chance
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            return (x + 0.03 * torch.autograd.grad(loss(z).sum(), z)[0].sign()).clamp(0, 1)

    joint = transfer(models, data, attack)
    fooled = torch.zeros(3, 3, 100, dtype=torch.bool)
    for s, t in itertools.product(range(3), repeat=2):
        hits = []
        for x, y in data:
            z = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(models[s](z), y, reduction="sum"), z)
            with torch.no_grad():
                hits.append(models[t]((x + 0.03 * g.sign()).clamp(0, 1)).argmax(1) != y)
                if s == t:  # errors without attack count
                    hits[-1] |= models[t](x).argmax(1) != y
        fooled[s, t] = torch.cat(hits)
    for s, t, u in itertools.product(range(3), repeat=3):
        both = 100 * (fooled[s, t] & fooled[s, u]).float().mean().item()
        assert joint[s, t, u].item() == pytest.approx(both, abs=1e-4)
    for s, model in enumerate(models):  # ASR on the diagonal is 100 - RA
        ra = robust_accuracy(model, data, lambda x, y: attack(lambda z: ce_per_image(model(z), y), x))
        assert joint[s, s, s].item() == pytest.approx(100 - ra, abs=1e-3)


def test_compare_gives_tables_4_and_6_and_figure_5(tmp_path, rotation, capsys):
    folder, results = rotation
    files = ("rotation-P3F4.ta.pt", "rotation-P3F3.ta.pt", "rotation-P3F2.ra.pt")
    rows = main(tiny(models=tuple(str(folder / f) for f in files), out=str(tmp_path / "c")))["rows"]
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in ("transfer", "venn", "average")}
    assert [len(v) for v in kinds.values()] == [7 * 7, 3, 2 * 7] and len(rows) == 49 + 3 + 14
    rate = {(r["source"], r["target"]): 100 - r["accuracy"] for r in kinds["transfer"]}
    for r in kinds["venn"]:  # no more fall for it together than apart
        alone = [rate[r["source"], r[other]] for other in ("target", "other")]
        assert 100 - r["accuracy"] <= min(alone) + 0.01
    names = [f"{folder.name}/{f.removesuffix('.pt')}" for f in files]
    ta = {r["name"]: r["accuracy"] for r in kinds["average"] if r["attack"] == "none"}
    assert list(ta)[:3] == names and list(ta)[-1] == " + ".join(names)
    assert ta[names[0]] == results["rows"][-4]["accuracy"]
    out = capsys.readouterr().out
    assert f"1: {names[0]}" in out and "for 1+2+3" in out and "the paper" not in out
    assert f"attacked for 2, {100 - kinds['venn'][1]['accuracy']:.2f}% fool 1 and 3" in out


# ---- commands ----


def test_cells():
    assert len(cells(Args(table3=True))) == 2 + 3 * 6
    assert cells(Args()) == [("rotation", "P3F4")]
    assert cells(Args(pretrain="P1", task="selfie")) == [("", "P1F4")]
    assert cells(Args(finetune="all")) == [("rotation", f"P3F{i}") for i in (1, 2, 3, 4)]
    assert cells(Args(pretrain="all")) == [("", "P1F4"), ("rotation", "P2F4"), ("rotation", "P3F4")]
    table8 = cells(Args(pretrain="RS", finetune="all", task="all"))
    assert table8 == [(t, p) for t in chen.TASKS for p in ("RSF2", "RSF4")]
    assert cells(Args(pretrain="RS", finetune="F1")) == [("rotation", "RSF1")]
    assert cells(Args(task="ensemble", pretrain="all", finetune="all")) == [("ensemble", "P3F4")]
    assert cells(Args(task="ensemble", pretrain="P2", finetune="all")) == [("ensemble", "P2F4")]
    assert [p for _, p in cells(Args(pretrain="all", finetune="all"))] == list(chen.PAIRS[:8])
    assert {t for t, _ in cells(Args(task="all", pretrain="all", finetune="none"))} == {"", *chen.TASKS}


def test_each_checkpoint_is_of_its_best_epoch(tmp_path, monkeypatch):
    """Of equal RA that of better TA; `best_epoch` is that of best TA after F3, of best RA after F4."""
    scores = {"F3": [(40, 0), (98, 0), (90, 0)], "F4": [(50, 20), (70, 30), (80, 30)]}
    for fine, values in scores.items():
        left = iter([v for pair in values for v in pair])
        monkeypatch.setattr(chen, "robust_accuracy", lambda *a, left=left: next(left))
        rows = main(tiny(pretrain="P1", finetune=fine, epochs=3, out=str(tmp_path / fine)))["rows"]
        picked = {r["pick"]: r["epoch"] for r in rows}
        assert picked == ({"ta": 2, "ra": 2} if fine == "F3" else {"ta": 3, "ra": 3})
        assert rows[0]["best_epoch"] == picked["ta" if fine == "F3" else "ra"]
    left = iter([50, 40, 70, 30])  # TA rises, RA falls
    monkeypatch.setattr(chen, "robust_accuracy", lambda *a: next(left))
    rows = main(tiny(pretrain="P1", epochs=2, out=str(tmp_path / "both")))["rows"]
    assert [r["epoch"] for r in rows] == [2, 2, 1, 1] and {r["best_epoch"] for r in rows} == {1}


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    """In pre-training, in fine-tuning and in evaluation; finished cells are not evaluated again."""
    args = tiny(pretrain="all", finetune="F4", epochs=2, pretrain_epochs=2)
    whole = main(replace(args, out=str(tmp_path / "whole")))["rows"]
    log, evaluate, calls = Run.log, chen.evaluate, {"log": 0, "evaluate": 0}

    def counted(kind, real, stops):
        def call(*a, **k):
            calls[kind] += 1
            if calls[kind] in stops:
                raise KeyboardInterrupt
            return real(*a, **k)

        return call

    monkeypatch.setattr(Run, "log", counted("log", log, (5, 12, 25)))
    monkeypatch.setattr(chen, "evaluate", counted("evaluate", evaluate, (3,)))
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            main(replace(args, out=str(tmp_path / "run"), resume=True))
    assert main(replace(args, out=str(tmp_path / "run"), resume=True))["rows"] == whole
    assert calls["evaluate"] == 1 + len({(r["name"], r["epoch"]) for r in whole})
    for file in (tmp_path / "whole").glob("*.pt"):
        a, b = (load_checkpoint(tmp_path / name / file.name)["model"] for name in ("whole", "run"))
        assert same_state(a, b), file


def test_pre_training_alone_then_init_equals_one_run(tmp_path, rotation):
    assert main(tiny(finetune="none", out=str(tmp_path / "pre"))) == {}
    init = str(tmp_path / "pre" / "pretrain-P3-rotation.pt")  # says the task, too
    rows = main(tiny(task="jigsaw", init=init, out=str(tmp_path / "fine")))["rows"]
    one_run = [r["accuracy"] for r in rotation[1]["rows"] if r["pair"] == "P3F4"]
    assert [(r["task"], r["accuracy"]) for r in rows] == [("rotation", v) for v in one_run]


def test_ensemble_noise_and_other_images(tmp_path, few_digits):
    few_digits[0] = 24
    np.save(tmp_path / "extra.npy", np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8))
    small = dict(batch_size=16, attack_steps=1, extra_data=str(tmp_path / "extra.npy"), extra_only=True)
    ensemble, noise = dict(task="ensemble"), dict(task="all", pretrain="RS", finetune="F2")
    for i, changes in enumerate((ensemble, ensemble | dict(dpe_lambda=0.0), noise)):
        rows = main(tiny(pretrain_images=20, out=str(tmp_path / f"{i}"), **small, **changes))["rows"]
        assert {r["images"] for r in rows} == {20}
        assert {r["pair"] for r in rows} == {"RSF2" if i == 2 else "P3F4"}
        log = (tmp_path / f"{i}" / "metrics.jsonl").read_text()
        assert all(f"val_{task}" in log for task in chen.TASKS)
    few_digits[0] = 160


# ---- the paper's numbers ----

PAPER = [  # (flags, row, the paper's numbers)
    (dict(task="selfie"), "selfie-P3F4", "86.02 51.05 50"),
    (dict(task="selfie", pretrain="P1", dpe_lambda=0.0), "P1F4", "84.72 47.22 99"),
    (dict(table3=True, seed=3, amp="off"), "jigsaw-P3F4", "84.50 49.61 48"),
    (dict(task="all", pretrain="RS", finetune="F2"), "jigsaw-RSF2", "74.66 33.84 68"),
    (dict(task="ensemble"), "ensemble-P3F4", "83.00 52.22 56"),
    (dict(task="ensemble", dpe_lambda=0.0), "ensemble-P3F4", "84.44 49.53 47"),
    (dict(pretrain_images=30_000, extra_data="x.npy", extra_only=True), "rotation-P3F4", "85.29 49.64 42"),
    (dict(table3=True), "rotation-P3F4 -> selfie-P3F4", "37.75"),
    (dict(models=("x.pt",)), "jigsaw-P3F4 + rotation-P3F4 + selfie-P3F4", "86.04 54.64"),
]


def test_the_papers_numbers():
    for changes, name, want in PAPER:
        assert " ".join(paper_numbers("chen_pretrain_finetune", Args(**changes), name)) == want, name
    others = dict(epochs=50), dict(eps=4 / 255), dict(weight_decay=0.0), dict(grid=3), dict(pretrain_images=9)
    for change in others:
        assert paper_numbers("chen_pretrain_finetune", Args(**change), "rotation-P3F4") == [], change
    assert paper_numbers("chen_pretrain_finetune", Args(dpe_lambda=7.0), "ensemble-P3F4") == []


def test_the_papers_tables_agree_with_each_other():
    """Table 4's diagonal is 100 - RA of Tables 3 and 5; headline gains of the abstract and of section 4.6."""

    def number(name, column=0, **changes):
        return float(paper_numbers("chen_pretrain_finetune", Args(**changes), name)[column])

    for task, other in (("selfie", ""), ("rotation", ""), ("jigsaw", " of Table 5")):
        assert number(f"{task}-P3F4 -> itself") == pytest.approx(100 - number(f"{task}-P3F4{other}", 1))
    selfie = number("selfie-P3F4", 1)
    assert number("jigsaw-P3F4 + rotation-P3F4 + selfie-P3F4", 1) - selfie == pytest.approx(3.59)
    assert selfie - number("P1F4", 1) == pytest.approx(3.83)
    sizes = [number("rotation-P3F4", 1, pretrain_images=n, extra_only=True) for n in (150_000, 30_000)]
    assert sizes[0] - sizes[1] == pytest.approx(0.97)


def cell(name, ta, ra, epoch=9):
    about = {"norm": "linf", "examples": 10_000, "name": name, "pair": name[-4:], "best_epoch": epoch}
    both = {"attack": "none", "eps": 0, "accuracy": ta}, {"attack": "pgd-20", "eps": 8 / 255, "accuracy": ra}
    return [about | row for row in both] * 2


def test_a_runs_rows_stand_above_the_papers_if_its_flags_are_the_papers():
    rows = cell("P1F4", 80, 40) + cell("selfie-P3F4", 81, 41, 8)
    for args, printed in (Args(table3=True), True), (Args(table3=True, epochs=50), False):
        text = chen.table({"script": "chen_pretrain_finetune", "rows": rows, "seconds": 1}, args)
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert "P1F4 80.00 40.00 80.00 40.00 9" in lines and "selfie-P3F4 81.00 41.00 81.00 41.00 8" in lines
        assert ("the paper 84.72 47.22 99" in lines) == ("the paper 86.02 51.05 50" in lines) == printed
    assert "the paper" not in chen.table({"rows": cell("init-selfie-P3F4", 81, 41), "seconds": 1}, Args())


def test_compared_networks_stand_above_the_papers_if_their_flags_are_the_papers(tmp_path):
    """Untrained here: it is about the labels."""
    model = build_model("resnet26v2", {"class": 10}, width=1 / 16)
    run = Run(tmp_path, CPU, "chen_pretrain_finetune", Args(device="cpu"))
    pixels = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.arange(4), [*"0123456789"], torch.arange(4))

    def printed(*networks, pick="ta", compared=None, **changes) -> list[str]:
        its = {"network": model.spec, "model": model.state_dict(), "args": vars(Args(**changes))}
        states = {f"{i}/{name}.{pick}": its | {"stage": name} for i, name in enumerate(networks)}
        args = compared or Args(device="cpu", models=("x.pt",))
        text = chen.table({"rows": chen.compare(run, args, states, images), "seconds": 1}, args)
        return [" ".join(line.split()[2:]) for line in text.splitlines() if line.startswith("  the paper")]

    three = ("selfie-P3F4", "rotation-P3F4", "jigsaw-P3F4")
    lines = printed(*three)
    assert lines[0] == "86.02 51.05 48.95 37.75 36.65" and lines[2] == "84.50 49.61 38.96 39.56 51.17"
    assert lines[3:] == ["86.51 53.83", "85.64 53.32", "85.36 53.08", "86.04 54.64"]
    assert printed("selfie-P3F4", "selfie-P3F4") == ["86.02 51.05 48.95"] * 2  # two networks of one task
    assert printed(*three, pick="ra") == printed(*three, epochs=99) == printed("init-selfie-P3F4") == []
    assert printed(*three, compared=Args(models=("x.pt",), eval_steps=10)) == []
    table7 = dict(pretrain_images=30_000, extra_only=True)
    assert printed("rotation-P3F4", **table7) == printed("ensemble-P3F4", dpe_lambda=0.0) == []
    assert printed("ensemble-P3F4") == ["83.00 52.22"]


# ---- users' mistakes ----


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"norm": "l2", "eps": 0.5, "task": "ensemble"}, "take linf"), ({"eps": 0.0}, "leaves no attack"),
        ({"task": "jigsaw", "image_size": 18}, "divide --image-size"), ({"stem": "imagenet"}, "too small"),
        ({"task": "selfie", "image_size": 8}, "take 16"), ({"task": "selfie", "grid": 2}, "at least 3"),
        ({"norm": "l2", "eps": 8 / 255}, "a radius of its own"), ({"val_fraction": 0.0}, "--val-fraction"),
        ({"pretrain_images": 1}, "at least 2 images"), ({"pretrain_images": 5000}, "there are only 144"),
        ({"extra_only": True}, "needs --extra-data"), ({"extra_data": "x.npy"}, "there is no x.npy"),
        ({"init": "x.pt"}, "there is no x.pt"), ({"lr_steps": "a,b"}, "--lr-steps"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    assert match in one_sentence(chen, *flags(TINY | changes | {"out": tmp_path / "run"}))
    assert not list(tmp_path.glob("run/*.pt"))


def test_wrong_checkpoints(one_sentence, tmp_path, rotation):
    argv = flags(TINY | {"out": tmp_path / "r"})
    good = rotation[0] / "rotation-P3F4.ta.pt"
    seven = build_model("resnet26v2", {"class": 7}, width=1 / 16)
    save_checkpoint(tmp_path / "seven.pt", {"network": seven.spec, "model": seven.state_dict()})
    assert "ta.pt is damaged, or not a file of the kind" in one_sentence(chen, "--init", good, *argv)
    assert "is not for the classes of digits at 16" in one_sentence(chen, tmp_path / "seven.pt", *argv)
    assert "is not for the classes of digits at 20" in one_sentence(chen, good, *argv, "--image-size", "20")
    assert "no finished classifier" in one_sentence(chen, rotation[0] / "pretrain-P3-rotation.pt", *argv)
    assert "two of the checkpoints have the same name" in one_sentence(chen, good, good, *argv)
    assert not (tmp_path / "r" / "results.json").exists() and common.world() == (0, 1)
