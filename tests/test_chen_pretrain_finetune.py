"""chen_pretrain_finetune.py against Chen et al.: tasks, eq. 3, 4, what is inherited, frozen and attacked."""
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import flags, run_ranks, same_state
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chen_pretrain_finetune as chen
from chen_pretrain_finetune import Args, Objective, Pretext, cells, inherit, main, make_view, task_loss
from common import (
    Network, Run, UserError, build_model, distribute, jigsaw_permutations, load_checkpoint, load_data,
    rotate, save_checkpoint, world,
)  # fmt: skip

TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="resnet26v2", width=1 / 16, epochs=1, batch_size=64,
    lr=0.05, warmup_steps=2, pretrain_epochs=1, eps=0.1, attack_steps=2, num_permutations=5, eval_steps=3,
    eval_examples=60, amp="off", device="cpu",
)  # fmt: skip
CPU = torch.device("cpu")
PERMUTATIONS = jigsaw_permutations(4, 5)


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture(autouse=True, scope="module")
def few_digits():
    """The first 160 training images."""
    load = Run.load_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_data", lambda run: (load(run)[0].subset(torch.arange(160)), load(run)[1]))
        yield


def pretext(tasks=chen.TASKS, **changes) -> Network:
    torch.manual_seed(0)
    return Network(Pretext(tasks, tiny(**changes)), {}, (0.5,) * 3, (0.5,) * 3)


def some_views(x):
    return {task: make_view(task, x, PERMUTATIONS) for task in chen.TASKS}


def test_rotations_are_balanced_and_jigsaw_leaves_more_images_whole():
    torch.manual_seed(0)
    x = torch.rand(40, 3, 16, 16)
    turned, k = make_view("rotation", x, PERMUTATIONS)
    assert torch.bincount(k).tolist() == [10] * 4 and torch.equal(turned, rotate(x, k))
    _, k = make_view("jigsaw", torch.zeros(20_000, 1, 4, 4), PERMUTATIONS)
    share = torch.bincount(k, minlength=6) / 20_000
    assert abs(share[0] - (0.1 + 0.9 / 6)) < 0.015 and (share[1:] - 0.9 / 6).abs().max() < 0.015


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def slow_eq_3(model: Network, views: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over images and tasks of the losses, sum of eq. 4), image by image, by the authors' formulas."""
    trunk, losses, h = model.trunk, torch.zeros(()), torch.zeros(())
    for b in range(len(views["rotation"][0])):
        columns = []
        for task, (images, target) in views.items():
            x, head = (images[b : b + 1] - 0.5) / 0.5, trunk.branches[task]
            if task == "selfie":
                patches = [x[:, :, r : r + 4, c : c + 4] for r in range(0, 16, 4) for c in range(0, 16, 4)]
                vectors = [trunk.resnet.shared(patch).mean((2, 3)) for patch in patches]
                masked, visible = target[:4].tolist(), target[4:].tolist()
                pooled = head.encoder(torch.stack([head.first[0], *(vectors[i] for i in visible)], 1))[0, 0]
                loss = torch.zeros(())
                for i, place in enumerate(masked):
                    query = pooled + head.row[place // 4] + head.col[place % 4]
                    scores = torch.stack([query @ vectors[j][0] for j in masked])
                    p = scores.exp() / scores.exp().sum()
                    loss = loss - (p[i].exp() / p.exp().sum()).log()  # the second softmax
            else:
                logits = head(trunk.resnet.shared(x))[0]
                loss = -(logits[target[b]].exp() / logits.exp().sum()).log()
            losses = losses + loss
            g = torch.autograd.grad(loss, images, create_graph=True)[0][b].flatten()
            columns.append(g / g.norm())
        gram = torch.stack([torch.stack([u @ v for v in columns]) for u in columns])
        h = h + (gram + 1e-5 * torch.eye(3)).det().log()
    return losses, h


def test_eq_3_and_its_gradients_against_the_authors_formulas():
    """The loss, the gradient that the attack follows, and that of the weights."""
    model, x = pretext(width=1 / 8).double().eval(), torch.rand(3, 3, 16, 16).double()
    objective, clean = Objective(model, tiny()), some_views(x)
    attacked, weights = some_views(x + 0.1 * torch.rand_like(x)), list(model.parameters())
    images = [v.requires_grad_() for v, _ in attacked.values()]
    for v, _ in clean.values():
        v.requires_grad_()
    losses, h = slow_eq_3(model, attacked)
    want_images = torch.autograd.grad(losses + 0.1 * h, images, retain_graph=True)
    want = (slow_eq_3(model, clean)[0] + losses) / (2 * 3 * 3) + 0.1 * h / 3  # kinds, tasks, images
    want_weights = torch.autograd.grad(want, weights, materialize_grads=True, allow_unused=True)
    total, eq_4 = objective.loss_terms(attacked, True)
    torch.testing.assert_close((total.sum(), eq_4.sum()), (losses, h))
    torch.testing.assert_close(torch.autograd.grad((total + 0.1 * eq_4).sum(), images), want_images)
    got = objective(clean, attacked, True)
    torch.testing.assert_close(got, want)
    got_weights = torch.autograd.grad(got, weights, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(got_weights, want_weights)
    assert sum(w.abs().max() > 0 for w in want_weights) > 200


def test_the_ensembles_attack_keeps_every_ball_and_raises_each_loss():
    """One attack on three images, which lie in the channels: each stays in its own ball."""
    model, views = pretext().eval(), some_views(torch.rand(4, 3, 16, 16))
    found = Objective(model, tiny(eps=0.05, attack_steps=5, attack_bn="eval")).attack(views, True)
    for task, (v, target) in views.items():
        v_adv, its = found[task]
        assert (v_adv - v).abs().max() <= 0.05 + 1e-6 and v_adv.min() >= 0 and v_adv.max() <= 1
        assert its is target
        assert (task_loss(model, task, v_adv, its, True) > task_loss(model, task, v, its, True)).all()


def ensemble_gradient(folder, ranks):
    """Save the weights' gradient in an ensemble step on this rank's share of 8 images."""
    if ranks > 1:
        dist.init_process_group("gloo")
    x, k = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
    x, turned, k = (v.tensor_split(ranks)[world()[0]] for v in (x, rotate(x, k), k))
    views = {"rotation": (turned, k), "jigsaw": (x, k + 1)}
    objective = Objective(pretext(("rotation", "jigsaw")).train(), tiny())
    ddp = distribute(objective)
    ddp(views, views, True).backward()
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    torch.save(torch.cat(gradients), folder / f"{world()[0]} of {ranks}")


def test_two_ranks_of_the_ensemble_agree_with_one(tmp_path):
    """DistributedDataParallel with second derivatives."""
    assert run_ranks(2, ensemble_gradient, tmp_path, 2) == [0, 0]
    ensemble_gradient(tmp_path, 1)
    want, *both = (torch.load(tmp_path / f, weights_only=True) for f in ("0 of 1", "0 of 2", "1 of 2"))
    assert all((got - want).norm() < 5e-3 * want.norm() for got in both)


def test_exactly_the_trunk_is_inherited():
    """theta_p has 8,533,696 parameters: the stem and stages 1 to 3 of a ResNet-50v2."""
    with torch.device("meta"):
        assert sum(p.numel() for p in Pretext(("rotation",), Args()).resnet.parameters()) == 8_533_696
    source, model = pretext(("rotation",)), build_model("resnet26v2", {"class": 10}, width=1 / 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inherit(model, {"model": source.state_dict()}, "x.pt")
    for k, v in model.state_dict().items():
        if k.startswith("trunk.") and not k.startswith("trunk.layer4"):
            before[k] = source.state_dict()[k.replace("trunk.", "trunk.resnet.")]
        assert torch.equal(v, before[k]), k
    with pytest.raises(UserError, match="x.pt is damaged, or not a file of the kind"):
        inherit(model, {"model": model.state_dict()}, "x.pt")  # the published code keeps random weights


@pytest.fixture(scope="module")
def rotation(tmp_path_factory):
    """A finished run: P3 on rotation, then F1 to F4, and what main returned."""
    folder = tmp_path_factory.mktemp("rotation")
    return folder, main(tiny(finetune="all", out=str(folder)))


def weights(folder, name):
    return load_checkpoint(folder / f"{name}.pt")["model"]


@pytest.mark.parametrize("pair", ["P3F1", "P3F2", "P3F3", "P3F4"])
def test_f1_and_f2_leave_the_trunk_bit_identical(rotation, pair):
    """Weights and BatchNorm's buffers."""
    start, state = (weights(rotation[0], name) for name in ("pretrain-P3-rotation", f"rotation-{pair}.ra"))
    shared = {k.replace("resnet.", ""): v for k, v in start.items() if k.startswith("trunk.resnet.")}
    same = [torch.equal(state[k], v) for k, v in shared.items()]
    assert all(same) if pair[2:] in ("F1", "F2") else not any(same[:5])


def test_p3_f2_and_f4_alone_are_adversarial(rotation, tmp_path, monkeypatch):
    """Where attacks change nothing F4 is F3, F2 is F1, and P3 with clean images twice is P2."""
    monkeypatch.setattr(chen, "pgd", lambda loss, x, **kw: x)
    main(tiny(pretrain="all", finetune="all", out=str(tmp_path)))
    for robust, clean in ("F4", "F3"), ("F2", "F1"):
        names = f"rotation-P3{robust}.ta", f"rotation-P3{clean}.ta"
        assert same_state(*(weights(tmp_path, name) for name in names))
        assert not same_state(*(weights(rotation[0], name) for name in names))
    p2, p3 = (weights(tmp_path, f"pretrain-{kind}-rotation") for kind in ("P2", "P3"))
    assert torch.allclose(p2["trunk.resnet.conv1.weight"], p3["trunk.resnet.conv1.weight"], atol=1e-4)
    assert not same_state(p3, weights(rotation[0], "pretrain-P3-rotation"))


def test_pre_training_alone_then_init_equals_one_run(tmp_path, rotation):
    assert main(tiny(finetune="none", out=str(tmp_path / "pre"))) == {}
    init = str(tmp_path / "pre" / "pretrain-P3-rotation.pt")  # says the task, too
    rows = main(tiny(task="jigsaw", init=init, out=str(tmp_path / "fine")))["rows"]
    one_run = [r["accuracy"] for r in rotation[1]["rows"] if r["pair"] == "P3F4"]
    assert [(r["task"], r["accuracy"]) for r in rows] == [("rotation", v) for v in one_run]


def test_ensemble_noise_and_other_images(tmp_path, capsys):
    """Second derivatives compute in float32: float16's constant gradient scale would be taken off twice."""
    np.save(tmp_path / "extra.npy", np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8))
    more = dict(attack_steps=1, extra_data=str(tmp_path / "extra.npy"), extra_only=True, pretrain_images=20)
    for changes in dict(task="ensemble", amp="fp16"), dict(task="jigsaw", pretrain="RS", finetune="F2"):
        rows = main(tiny(out=str(tmp_path / changes["task"]), **more, **changes))["rows"]
        pair = "P3F4" if changes["task"] == "ensemble" else "RSF2"
        assert {(r["images"], r["pair"]) for r in rows} == {(20, pair)}
    assert "this pre-training computes in float32" in capsys.readouterr().out


@pytest.mark.parametrize(("finetune", "scores", "ta", "ra"), [
    ("F3", [(40, 0), (98, 0), (90, 0)], 2, 2), ("F4", [(50, 40), (70, 30), (70, 40)], 2, 3),
])  # fmt: skip
def test_each_checkpoint_is_of_its_best_epoch(tmp_path, monkeypatch, finetune, scores, ta, ra):
    """Of equal RA that of better TA; `best_epoch` is that of best TA after F3, of best RA after F4."""
    left = iter([v for pair in scores for v in pair])
    monkeypatch.setattr(chen, "robust_accuracy", lambda *a: next(left))
    rows = main(tiny(pretrain="P1", finetune=finetune, epochs=3, out=str(tmp_path)))["rows"]
    assert {r["pick"]: r["epoch"] for r in rows} == {"ta": ta, "ra": ra}
    assert {r["best_epoch"] for r in rows} == {ta if finetune == "F3" else ra}


def test_cells():
    """Table 3 has 20 networks, Table 8 two for a task, Table 5 one."""
    assert len(set(cells(Args(table3=True)))) == len(cells(Args(table3=True))) == 20
    assert cells(Args()) == [("rotation", "P3F4")] and cells(Args(pretrain="P1")) == [("", "P1F4")]
    assert [pair for _, pair in cells(Args(pretrain="RS", finetune="all"))] == ["RSF2", "RSF4"]
    assert cells(Args(task="ensemble", pretrain="all", finetune="all")) == [("ensemble", "P3F4")]


def test_tables_4_and_6_and_figure_5_by_hand(tmp_path, monkeypatch):
    """Of three linear networks and averages of their probabilities."""

    def step(loss, x, **more):  # without random numbers; mirrored, so that it mends errors, too
        with torch.enable_grad():
            z = x.clone().requires_grad_()
            return (x + 0.02 * torch.autograd.grad(loss(z).sum(), z)[0].sign().flip(3)).clamp(0, 1)

    def accuracy(wrong):
        return pytest.approx(100 * (~wrong).float().mean().item(), abs=0.01)

    args, (_, test) = tiny(batch_size=60), load_data("digits", "", CPU, image_size=16)
    test, networks = test.subset(torch.arange(100)), {}
    x, y = test.pixels[test.index] / 255, test.labels[test.index]
    for name in "abc":  # the least squares fit to other 40 images
        part, linear = torch.randperm(100)[:40], nn.Linear(768, 10, bias=False)
        fit = torch.linalg.lstsq(x[part].flatten(1), 9 * F.one_hot(y[part]).float(), driver="gelsd")
        linear.weight = nn.Parameter(fit.solution.T)
        networks[name] = nn.Sequential(nn.Flatten(), linear)
    monkeypatch.setattr(chen, "pgd", step)
    monkeypatch.setattr(chen, "rebuild", lambda state, name: networks[name])
    run = Run(tmp_path, CPU, "chen_pretrain_finetune", args)
    rows = chen.compare(run, args, {name: {} for name in networks}, test)
    found = {(r["kind"], r["name"], r["attack"]): r["accuracy"] for r in rows}
    assert len(found) == len(rows) == 7 * 7 + 3 + 2 * 7
    networks["a + b + c"] = lambda x: sum(networks[name](x).softmax(1) for name in "abc").log()
    for s, source in networks.items():
        x_adv = step(lambda z: F.cross_entropy(source(z), y, reduction="none"), x)
        fooled = {t: network(x_adv).argmax(1) != y for t, network in networks.items()}
        fooled[s] |= source(x).argmax(1) != y  # errors without attack count
        assert found["average", s, "none"] == accuracy(source(x).argmax(1) != y)
        assert found["average", s, "pgd-3"] == accuracy(fooled[s])
        for t in networks:
            assert found["transfer", f"{s} -> {t}", "pgd-3"] == accuracy(fooled[t])
        for t, u in (name for name in itertools.combinations("abc", 2) if s in "abc" and s not in name):
            assert found["venn", f"{s} -> {t} and {u}", "pgd-3"] == accuracy(fooled[t] & fooled[u])


def test_mistakes_are_told(one_sentence, tmp_path, rotation):
    """Among them networks of other classes or of images of another size."""
    argv, good = flags(TINY | {"out": tmp_path / "run"}), rotation[0] / "rotation-P3F4.ta.pt"
    seven = build_model("resnet26v2", {"class": 7}, width=1 / 16)
    save_checkpoint(tmp_path / "seven.pt", {"network": seven.spec, "model": seven.state_dict()})
    for more, told in (
        (["--task", "ensemble", "--norm", "l2", "--eps", 0.5], "--norm linf"), (["--eps", 0], "--eps"),
        (["--task", "jigsaw", "--image-size", 18], "--grid 4"), (["--stem", "imagenet"], "--image-size 16"),
        ([tmp_path / "seven.pt"], "--image-size 16"), ([good, "--image-size", 20], "--image-size 20"),
        ([rotation[0] / "pretrain-P3-rotation.pt"], "pretrain-P3-rotation.pt"),
    ):  # fmt: skip
        assert told in one_sentence(chen, *argv, *more), told
