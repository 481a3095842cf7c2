"""chen_pretrain_finetune.py: the three tasks, the diversity term, inheritance, frozen parts, transfer, ensembles, cells."""
import copy
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags, replace, same_state

import chen_pretrain_finetune as chen
from common import old_start_run as start_run
from chen_pretrain_finetune import (
    fast_second_derivatives,
    Args, Average, Objective, Pretext, Selfie, cells, finetune, inherit, log_det, main, make_view, pretrain, task_loss, to_upright, transfer,
)  # fmt: skip
from common import (
    Network, UserError, batches, batchnorm_mode, build_model, jigsaw_permutations, load_checkpoint, load_model, load_splits, pgd,
    robust_accuracy,
)  # fmt: skip

TINY = dict(
    dataset="digits", image_size=16, flip=False, arch="resnet26v2", width=1 / 16, epochs=1, batch_size=64, lr=0.05, warmup_steps=2, pretrain_epochs=1,
    pretrain_lr=0.05, eps=0.1, attack_steps=2, num_permutations=5, eval_steps=2, eval_examples=60, label_fraction=128 / 1437, amp="off", device="cpu",
)  # fmt: skip
CPU = torch.device("cpu")


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def permutations():
    return jigsaw_permutations(4, 5)


# ---- the tasks ----


def test_selfie_patches_are_a_partition_and_chance_is_the_loss_at_the_start(permutations):
    torch.manual_seed(0)
    _, order = make_view("selfie", torch.rand(4, 3, 16, 16), permutations, 0.1)
    assert sorted(order.tolist()) == list(range(16))
    head = Selfie(64, 4)
    assert head.masked == 4
    patches = torch.randn(32, 16, 64) * 0.01  # all alike: nothing to tell them apart by
    scores = head.eval()(patches, order)
    assert scores.shape == (32, 4, 4)
    model = Network(Pretext(("selfie",), tiny()), {}, (0.5,) * 3, (0.5,) * 3).train()
    loss = task_loss(model, "selfie", torch.full((16, 3, 16, 16), 0.5), order, True)  # a grey image: all patches are equal
    assert loss.shape == (16,) and torch.allclose(loss, torch.full((16,), 4 * math.log(4)), atol=1e-3)
    assert torch.allclose(task_loss(model, "selfie", torch.full((16, 3, 16, 16), 0.5), order, False), torch.full((16,), 4 * math.log(4)), atol=1e-3)


def test_the_double_softmax_stays_within_its_bounds(monkeypatch):
    """A softmax of a softmax lies between ln(1 + 3/e) = 0.744 and ln(e + 3) = 1.744 per place, of the code."""
    for right in (True, False):
        scores = (torch.eye(4) if right else torch.eye(4).roll(1, 1)) * 1000
        model = type("M", (), {"features": lambda self, *a, s=scores: s.expand(3, 4, 4)})()
        loss = task_loss(model, "selfie", torch.zeros(3, 3, 8, 8), None, True)
        assert torch.allclose(loss, torch.full((3,), 4 * (0.7437 if right else 1.7437)), atol=1e-3)
        once = task_loss(model, "selfie", torch.zeros(3, 3, 8, 8), None, False)
        assert torch.allclose(once, torch.full((3,), 0.0 if right else 4000.0))


def test_the_right_patch_wins_when_the_query_asks_for_it():
    """Query i is pooled + row + column of place i. With these telling the place, and patches that are their own place, row i is best at i."""
    head = Selfie(64, 4, layers=1).eval()
    torch.manual_seed(0)
    codes = F.normalize(torch.randn(16, 64), dim=1)
    with torch.no_grad():
        head.row.zero_(), head.col.zero_()
        for p in head.encoder.parameters():
            p.zero_()  # the pooled vector is then 0 (LayerNorm's weight too)
        head.row.copy_(codes.view(4, 4, 64)[:, 0])  # a place is told by row only: take targets from different rows, first column
    order = torch.tensor([0, 4, 8, 12] + [i for i in range(16) if i % 4])
    scores = head(codes[None].repeat(2, 1, 1), order)
    assert (scores.argmax(2) == torch.arange(4)).all()


def test_only_visible_patches_are_pooled():
    head = Selfie(64, 4, layers=2).eval()
    patches = torch.randn(2, 16, 64)
    order = torch.randperm(16)
    changed = patches.clone()
    changed[:, order[0]] += 1  # a masked one: only its own column of scores moves
    a, b = head(patches, order), head(changed, order)
    assert torch.allclose(a[:, :, 1:], b[:, :, 1:]) and not torch.allclose(a[:, :, 0], b[:, :, 0])
    seen = patches.clone()
    seen[:, order[7]] += 1
    assert not torch.allclose(a, head(seen, order))


def test_patches_of_the_trunk_are_those_of_the_image():
    """Row by row; each goes through the trunk by itself."""
    torch.manual_seed(0)
    model = Pretext(("selfie",), tiny()).eval()
    x = torch.rand(2, 3, 16, 16)
    seen = {}
    model.branches["selfie"].forward = lambda patches, order: seen.setdefault("patches", patches)
    model(x, "selfie", torch.arange(16))
    for i in range(16):
        patch = x[:, :, 4 * (i // 4) : 4 * (i // 4) + 4, 4 * (i % 4) : 4 * (i % 4) + 4]
        assert torch.allclose(seen["patches"][:, i], model.resnet.shared(patch).mean((2, 3)), atol=1e-5)


def test_rotation_is_balanced_and_jigsaw_prefers_the_whole(permutations):
    torch.manual_seed(0)
    x = torch.rand(40, 3, 16, 16)
    turned, k = make_view("rotation", x, permutations, 0.1)
    assert torch.bincount(k).tolist() == [10] * 4
    assert all(torch.equal(turned[i], x[i].rot90(int(k[i]), (1, 2))) for i in range(40))
    _, k = make_view("jigsaw", torch.zeros(20_000, 1, 4, 4), permutations, 0.1)
    share = torch.bincount(k, minlength=6) / 20_000
    assert abs(share[0] - (0.1 + 0.9 / 6)) < 0.015 and (share[1:] - 0.9 / 6).abs().max() < 0.015
    for task in ("rotation", "jigsaw"):
        view, target = make_view(task, x, permutations, 0.1)
        assert torch.equal(to_upright(task, view, target, permutations), x)


# ---- the ensemble ----


def test_log_det_of_orthogonal_and_equal_gradients():
    """0 (up to the ridge) and ln of the ridge: 3 equal columns leave (3 + r) r^2."""
    e = torch.eye(3).view(3, 1, 3, 1, 1).expand(3, 5, 3, 1, 1) * torch.tensor([2.0, 7.0, 0.1]).view(3, 1, 1, 1, 1)
    assert torch.allclose(log_det(list(e)), torch.full((5,), 3 * math.log(1 + 1e-5)), atol=1e-5)
    same = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    assert torch.allclose(log_det([same, 3 * same, same]), torch.full((5,), math.log((3 + 1e-5) * 1e-10), dtype=torch.float64), atol=1e-4)
    g = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    columns = np.stack([(v[2] / v[2].norm()).flatten().numpy() for v in g], 1)
    assert log_det(g)[2].item() == pytest.approx(np.linalg.slogdet(columns.T @ columns + 1e-5 * np.eye(3))[1])
    assert (log_det(g) <= 3e-5).all()


@pytest.mark.parametrize("frames", ["own", "aligned"])
def test_the_gradient_of_the_diversity_term_against_finite_differences(permutations, frames, monkeypatch):
    monkeypatch.setattr(F, "relu", F.softplus)  # input gradients of ReLU networks jump, and finite differences with them
    torch.manual_seed(0)
    args = tiny(frames=frames, width=1 / 32)
    model = Network(Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).double().eval()
    objective = Objective(model, permutations, args)
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    views = {task: make_view(task, x, permutations, 0.1) for task in chen.TASKS}
    weight = model.trunk.resnet.conv1.weight

    def h():
        ready = {t: (v.detach().clone().requires_grad_(), target) for t, (v, target) in views.items()}
        return objective.adversarial(ready, True)[1].sum()

    (grad,) = torch.autograd.grad(h(), weight)
    direction = torch.randn_like(weight)
    steps = []
    for s in (1e-6, -1e-6):
        with torch.no_grad():
            weight += s * direction
        steps.append(h().item())
        with torch.no_grad():
            weight -= s * direction
    assert (steps[0] - steps[1]) / 2e-6 == pytest.approx((grad * direction).sum().item(), rel=1e-3)


def test_the_ensembles_attack_keeps_every_ball_and_raises_eq_3(permutations):
    """One attack on three images in the channels: each stays in its own ball, and the sum of losses grows; without --dpe-lambda each
    task's perturbation is the one that it would get alone."""
    torch.manual_seed(0)
    args = tiny()
    model = Network(Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).eval()
    objective = Objective(model, permutations, args)
    x = torch.rand(4, 3, 16, 16)
    views = {task: make_view(task, x, permutations, 0.1) for task in chen.TASKS}
    targets = [target for _, target in views.values()]

    def as_views(z):
        return dict(zip(views, zip(z.split(3, 1), targets, strict=True), strict=True))

    z = torch.cat([v for v, _ in views.values()], 1)
    for diverse in (True, False):
        torch.manual_seed(0)
        z_adv = pgd(lambda z: sum(objective.adversarial(as_views(z), diverse)), z, eps=0.05, steps=5)  # noqa: B023
        assert (z_adv - z).abs().max() <= 0.05 + 1e-6 and z_adv.min() >= 0 and z_adv.max() <= 1
        before, after = (objective.adversarial(as_views(v), False)[0] for v in (z, z_adv))
        assert (after > before).all()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(z.shape, generator=generator)  # what pgd draws

    x_rot, k = views["rotation"]
    start = (x_rot + (2 * noise[:, 3:6] - 1) * 0.05).clamp(x_rot - 0.05, x_rot + 0.05).clamp(0, 1)
    lower, upper = (x_rot - 0.05).clamp(min=0), (x_rot + 0.05).clamp(max=1)
    for _ in range(5):
        start = start.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model.features(start, "rotation", k), k, reduction="sum"), start)
        start = torch.clamp(start + max(2 / 255, 0.02) * g.sign(), lower, upper)
    assert torch.allclose(z_adv[:, 3:6], start, atol=1e-6)


@pytest.mark.parametrize(("frames", "mode"), [("own", "train"), ("aligned", "train"), ("own", "eval")])
def test_one_task_at_a_time_gives_the_same_gradients(permutations, frames, mode):
    """--low-memory against the joint graph, for the images and for all weights, and the same running statistics of BatchNorm."""
    torch.manual_seed(0)
    args = tiny(frames=frames, width=1 / 32)
    models = [Network(Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).double().train(mode == "train")]
    for m in models[0].modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.MultiheadAttention)):
            m.p = m.dropout = 0.0  # the two draw other masks
    models.append(copy.deepcopy(models[0]))
    joint, one = (Objective(model, permutations, args) for model in models)
    fast_second_derivatives(one)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    clean, attacked = ({task: make_view(task, x, permutations, 0.1) for task in chen.TASKS} for _ in range(2))
    ready = {task: (v.clone().requires_grad_(), target) for task, (v, target) in attacked.items()}
    with batchnorm_mode(models[0], mode), batchnorm_mode(models[1], mode):
        total, h = joint.adversarial(ready, True)
        want = torch.cat(torch.autograd.grad((total + args.dpe_lambda * h).sum(), [v for v, _ in ready.values()]), 1)
        assert torch.allclose(one.image_gradient(attacked), want, rtol=1e-6, atol=1e-9)
    loss = joint(clean, attacked, True)
    loss.backward()
    assert one.backward(clean, attacked).item() == pytest.approx(loss.item(), rel=1e-6)  # which is kept in float32
    for (name, a), b in zip(joint.named_parameters(), one.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-8), name
    for (name, a), b in zip(joint.named_buffers(), one.buffers(), strict=True):
        assert torch.allclose(a, b), name


def test_ap_se_one_task_at_a_time(permutations):
    """Without the diversity term too the gradients are those of the sum."""
    torch.manual_seed(0)
    args = tiny(width=1 / 32, dpe_lambda=0.0)
    objective = Objective(Network(Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).double().eval(), permutations, args)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    clean, attacked = ({task: make_view(task, x, permutations, 0.1) for task in chen.TASKS} for _ in range(2))
    loss = objective(clean, attacked, False)
    loss.backward()
    want = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    assert objective.backward(clean, attacked).item() == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.allclose(p.grad, g, rtol=1e-6, atol=1e-9) for p, g in zip(objective.parameters(), want, strict=True))


@pytest.mark.parametrize("width", [0.2, 0.33, 0.7, 1.0])
def test_selfie_of_any_width(width):
    """The heads of its attention divide its channels; 16 of them at full width, as in the code."""
    with torch.device("meta"):
        selfie = Pretext(("selfie",), Args(width=width)).branches["selfie"]
    heads = selfie.encoder.layers[0].self_attn.num_heads
    assert heads == 16 if width == 1 else heads >= 1


def test_second_derivatives_do_not_compute_in_float16(tmp_path, capsys):
    """The constant gradient scale of float16 would be taken off them once too often."""
    main(tiny(task="ensemble", amp="fp16", stage="pretrain", batch_size=16, label_fraction=32 / 1437, attack_steps=1, out=str(tmp_path)))
    assert "this pre-training computes in float32" in capsys.readouterr().out


def test_the_two_passes_of_a_task_drop_the_same(permutations):
    """Else the weights v = dh/dg of --low-memory would be of another network than the gradients g that they multiply. As h does not depend
    on the length of g, <v, g> = 0 if both are of the same (Euler)."""
    torch.manual_seed(0)
    args = tiny(width=1 / 32)
    objective = Objective(Network(Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).double().train(), permutations, args)
    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    _, passes = objective.one_by_one({task: make_view(task, x, permutations, 0.1) for task in ("selfie",)} | {"rotation": (x, torch.arange(4))})
    for _, _, term in passes:
        assert term.abs().max() < 1e-9


def test_p3_with_eps_0_is_p2(tmp_path):
    states = []
    for kind, eps in ("P2", 0.1), ("P3", 0.0):
        args = tiny(eps=eps, pretrain=kind, stage="pretrain", out=str(tmp_path / kind))
        main(args)
        states.append(load_checkpoint(tmp_path / kind / f"pretrain-{kind}-rotation.pt")["model"])
    assert same_state(*states)
    main(tiny(stage="pretrain", out=str(tmp_path / "attacked")))
    assert not same_state(states[0], load_checkpoint(tmp_path / "attacked" / "pretrain-P3-rotation.pt")["model"])


# ---- inheritance and frozen parts ----


def test_exactly_the_trunk_is_inherited():
    with torch.device("meta"):
        model = build_model("resnet50v2", {"class": 10})
        pretext = Pretext(("rotation",), Args())
    count = sum(p.numel() for n, p in model.trunk.named_parameters() if not n.startswith("layer4."))
    assert count == 8_533_696  # the published models' (stem and stages 1-3)
    assert sum(p.numel() for p in pretext.resnet.parameters()) == count
    args = tiny()
    torch.manual_seed(1)
    small, source = build_model(args.arch, {"class": 10}, width=args.width), Network(Pretext(("rotation",), args), {}, (0.5,) * 3, (0.5,) * 3)
    before = copy.deepcopy(small.state_dict())
    inherit(small, {"model": source.state_dict()}, "x.pt")
    for k, v in small.state_dict().items():
        taken = k.startswith("trunk.") and not k.startswith("trunk.layer4")
        want = source.state_dict()[k.replace("trunk.", "trunk.resnet.")] if taken else before[k]
        assert torch.equal(v, want), k
    with pytest.raises(UserError, match="holds no pre-trained trunk"):
        inherit(small, {"model": small.state_dict()}, "x.pt")  # the published code would go on with random weights
    with pytest.raises(UserError, match="size mismatch"):
        inherit(build_model(args.arch, {"class": 10}, width=1 / 8), {"model": source.state_dict()}, "x.pt")


@pytest.mark.parametrize("pair", ["P3F1", "P3F2", "P3F3", "P3F4"])
def test_f1_and_f2_leave_the_trunk_bit_identical(tmp_path, pair):
    args = tiny(pretrain="P3", finetune=pair[2:], out=str(tmp_path))
    run = start_run(args)
    train, val, _ = load_splits(args, CPU)
    run.begin()
    start = pretrain("rotation", "P3", run, args, train, val)
    state = finetune(f"rotation-{pair}", pair, run, args, start, train, val)["ra"]
    shared = {k.replace("trunk.resnet.", "trunk."): v for k, v in start["model"].items() if k.startswith("trunk.resnet.")}
    same = [torch.equal(state["model"][k], v) for k, v in shared.items()]  # weights, and BatchNorm's buffers
    assert all(same) if pair[2:] in ("F1", "F2") else not any(same[:5])
    assert any(not torch.equal(v, build(args).state_dict()[k]) for k, v in state["model"].items() if k.startswith("trunk.layer4"))


def build(args):
    torch.manual_seed(args.seed)
    return build_model(args.arch, {"class": 10}, width=args.width, stem=args.stem)


# ---- several models ----


@pytest.fixture(scope="module")
def three():
    """Three small networks trained briefly on digits, and test images."""
    args = tiny()
    train, _, test = load_splits(tiny(label_fraction=1.0, eval_examples=100), CPU)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = build_model(args.arch, {"class": 10}, width=1 / 8).train()
        opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for x, y in itertools.chain(batches(train, 64, CPU, shuffle=seed), batches(train, 64, CPU, shuffle=9 + seed)):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        models.append(model.eval())
    return models, list(batches(test, 50, CPU))


def test_average_of_one_is_the_model_and_of_more_the_mean_of_probabilities(three):
    models, data = three
    x, y = data[0]
    with torch.no_grad():
        assert torch.allclose(Average(models[:1])(x), F.log_softmax(models[0](x), 1), atol=1e-5)
        mean = sum(m(x).softmax(1) for m in models) / 3
        assert torch.allclose(Average(models)(x).exp(), mean, atol=1e-5)
        assert F.cross_entropy(Average(models)(x), y).item() == pytest.approx(-mean[range(len(y)), y].log().mean().item(), rel=1e-4)


def test_the_attack_on_the_average_is_stronger_than_what_transfers(three):
    models, data = three
    average = Average(models)

    def robust(attacked):
        torch.manual_seed(0)
        attack = partial(pgd, eps=0.05, steps=20)
        return robust_accuracy(average, data, lambda x, y: attack(lambda z: F.cross_entropy(attacked(z), y, reduction="none"), x))

    assert robust_accuracy(average, data) > 50
    assert robust(average) <= min(robust(m) for m in models)


def test_transfer_matrix_by_hand(three):
    models, data = three

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
        assert joint[s, t, u].item() == pytest.approx(100 * (fooled[s, t] & fooled[s, u]).float().mean().item(), abs=1e-4)
    for s in range(3):  # ASR on the diagonal is 100 - RA
        ra = robust_accuracy(models[s], data, lambda x, y: attack(lambda z: F.cross_entropy(models[s](z), y, reduction="none"), x))  # noqa: B023
        assert joint[s, s, s].item() == pytest.approx(100 - ra, abs=1e-3)


# ---- cells and runs ----


def test_cells():
    assert len(cells(Args(table3=True))) == 2 + 3 * 6
    assert cells(Args()) == [("rotation", "P3F4")] and cells(Args(pretrain="P1", task="selfie")) == [("", "P1F4")]
    assert cells(Args(finetune="all")) == [("rotation", f"P3F{i}") for i in (1, 2, 3, 4)]
    assert cells(Args(pretrain="all")) == [("", "P1F4"), ("rotation", "P2F4"), ("rotation", "P3F4")]
    assert cells(Args(pretrain="RS", finetune="all", task="all")) == [(t, p) for t in chen.TASKS for p in ("RSF2", "RSF4")]  # Table 8
    assert cells(Args(task="ensemble", pretrain="all", finetune="all")) == [("ensemble", "P3F4")]
    assert cells(Args(task="ensemble", pretrain="P2", finetune="all")) == [("ensemble", "P2F4")]
    assert cells(Args(task="ensemble", pretrain="all", finetune="F2")) == [("ensemble", "P3F2")]
    assert [p for _, p in cells(Args(pretrain="all", finetune="all"))] == list(chen.PAIRS)


def test_all_cells_of_a_task_then_compare_and_resume(tmp_path, capsys, monkeypatch):
    results = main(tiny(pretrain="all", finetune="all", out=str(tmp_path / "a")))
    rows = [r for r in results["rows"] if r["pick"] == "ta"]
    assert [(r["pair"], r["eps"]) for r in rows] == [(p, e) for p in chen.PAIRS for e in (0, 0.1)]
    assert "rotation RA" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "a").glob("pretrain-*.pt")) == ["pretrain-P2-rotation.pt", "pretrain-P3-rotation.pt"]
    for row in results["rows"]:
        assert row["paper"] is None
    again = main(tiny(pretrain="all", finetune="all", out=str(tmp_path / "a"), resume=True))
    assert again["rows"] == results["rows"]
    # Interrupted in the middle of a cell and between cells.
    update, calls = chen.Epoch.update, []

    def interrupt(self, *a, **k):
        update(self, *a, **k)
        calls.append(1)
        if len(calls) in (3, 8, 14):
            raise KeyboardInterrupt

    monkeypatch.setattr(chen.Epoch, "update", interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            main(tiny(pretrain="all", finetune="all", out=str(tmp_path / "b"), resume=True))
    resumed = main(tiny(pretrain="all", finetune="all", out=str(tmp_path / "b"), resume=True))
    assert resumed["rows"] == results["rows"]
    for file in ("pretrain-P2-rotation.pt", "P1F4.ra.pt", "rotation-P2F3.ra.pt", "rotation-P3F4.ra.pt"):
        a, b = (load_checkpoint(tmp_path / f / file)["model"] for f in ("a", "b"))
        assert same_state(a, b), file
    assert load_model(tmp_path / "a" / "P1F4.ta.pt")(torch.rand(2, 3, 16, 16)).shape == (2, 10)


@pytest.fixture(scope="module")
def cell_runs(tmp_path_factory):
    """Two tiny runs of one cell each."""
    folder = tmp_path_factory.mktemp("cells")
    main(tiny(out=str(folder / "a"))), main(tiny(pretrain="P1", out=str(folder / "b")))
    return folder


def test_compare_gives_tables_4_and_6_and_figure_5(tmp_path, cell_runs, capsys):
    models = tuple(str(cell_runs / f) for f in ("a/rotation-P3F4.ta.pt", "b/P1F4.ta.pt", "b/P1F4.ra.pt"))
    args = tiny(stage="compare", models=models, out=str(tmp_path / "c"))
    rows = main(args)["rows"]
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in ("transfer", "venn", "average")}
    assert [len(v) for v in kinds.values()] == [9, 3, 2 * 7] and sum(map(len, kinds.values())) == len(rows)
    assert all(r["paper"] is None and r["examples"] == 60 for r in rows)
    rate = {(r["source"], r["target"]): 100 - r["accuracy"] for r in kinds["transfer"]}
    for r in kinds["venn"]:  # no more fall for it together than apart
        assert 100 - r["accuracy"] <= min(rate[r["source"], r["target"]], rate[r["source"], r["other"]]) + 0.01
    alone = {r["name"]: r["accuracy"] for r in kinds["average"] if len(r["models"]) == 1 and r["attack"] != "none"}
    assert all(abs(100 - rate[name, name] - alone[name]) < 4 for name in alone)  # two random starts, 60 images
    out = capsys.readouterr().out
    assert "Table 4" in out and "Table 6" in out and "Figure 5, made for P1F4.ta: fools" in out
    assert not any("the paper" in line for line in out.splitlines())


def test_a_runs_own_tables_are_printed_beside_the_papers(capsys):
    """As with the paper's settings; the numbers are made up."""

    def cell(task, pair, ta, ra, epoch, **more):
        about = {"name": chen.label(task, pair), "norm": "linf", "examples": 10_000, "task": task, "pair": pair, "pick": "ta", "best_epoch": epoch, "images": 45_000}
        known = chen.paper_numbers(task, pair, Args())
        return [about | {"attack": "none", "eps": 0, "accuracy": ta, "paper": known[0]}, about | {"attack": "pgd-20", "eps": 8 / 255, "accuracy": ra, "paper": known[1]}]

    rows = [*cell("", "P1F4", 80, 40, 9), *cell("selfie", "P3F4", 81, 41, 8), *cell("jigsaw", "P3F4", 82, 42, 7), *cell("ensemble", "P3F4", 83, 43, 6)]
    rows += [{"kind": "transfer", "name": "a -> b", "source": s, "target": t, "accuracy": 60, "paper": 100 - 38.96 if s != t else None} for s in "ab" for t in "ab"]
    chen.show({"args": vars(Args()), "rows": rows, "seconds": 1}, "runs/x")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "P1F4 80.00 40.00 9 80.00 40.00 9 80.00 40.00 9" in lines and "the paper 84.72 47.22 99 84.72 47.22 99 84.72 47.22 99" in lines
    assert "P3F4 81.00 41.00 8 82.00 42.00 7 83.00 43.00 6" in lines and "the paper 86.02 51.05 50 84.50 49.61 48 83.00 52.22 56" in lines
    assert "jigsaw 82.00 42.00 7 83.74 48.83 48" in lines and "AP + DPE 83.00 43.00 6 83.00 52.22 56" in lines  # Table 5
    assert "AP + SE 84.44 49.53 47" in lines and "rotation 85.66 50.40 46" in lines
    assert "the paper 38.96" in lines and "b 40.00 40.00" in lines
    chen.show({"args": vars(Args(pretrain_images=30_000)), "rows": cell("rotation", "P3F2", 70, 30, 5), "seconds": 1}, "runs/x")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "45,000 rotation P3F2 70.00 30.00 5" in lines and "the paper, 150,000 P3F4 85.18 50.61 55" in lines


def test_compared_networks_stand_beside_the_papers_where_they_are_its_own(tmp_path):
    """Three networks of three tasks with the paper's settings do, two of one task do not (untrained here: it is about the labels)."""
    from common import Images

    model = build_model("resnet26v2", {"class": 10}, width=1 / 16)
    run = start_run(Args(device="cpu", out=str(tmp_path)))
    images = Images(torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4), list("0123456789"), torch.arange(4))

    def rows(*tasks, pick="ta", **changes):
        about = {"network": model.spec, "model": model.state_dict(), "args": vars(Args(**changes)), "pick": pick}
        states = {f"{i}": about | {"name": f"{task}-P3F4"} for i, task in enumerate(tasks)}
        return [r["paper"] for r in chen.compare(run, Args(device="cpu", out=str(tmp_path)), states, images) if r["kind"] != "venn"]

    paper = rows("selfie", "rotation", "jigsaw")
    assert paper[:3] == [51.05, 61.08, 61.04] and paper[-2:] == [86.04, 54.64] and paper[9:15] == [None] * 6
    assert set(rows("selfie", "selfie", "rotation")) == {None} == set(rows("selfie", "rotation", epochs=99))
    assert set(rows("selfie", "rotation", "jigsaw", pick="ra")) == {None}  # the paper's are picked by clean accuracy
    assert chen.paper_numbers("rotation", "P3F4", Args()) == (85.66, 50.40) and chen.paper_numbers("rotation", "P3F4", Args(select="robust")) == (None, None)


def test_a_finished_cell_whose_file_is_gone_is_told(tmp_path):
    run = start_run(Args(device="cpu", out=str(tmp_path / "r")))
    run.save("P1F4.done.pt", {"network": {}, "model": {}})
    with pytest.raises(UserError, match=r"P1F4.ta.pt, which this run had written, is gone"):
        chen.finetune("P1F4", "P1F4", run, run.args, None, None, None)


def test_the_papers_tables_4_to_7_agree_with_each_other():
    """Table 4's diagonal is 100 - RA of Tables 3 and 5; headline gains of the abstract."""
    for task in chen.TASKS:
        ra = chen.PAPER_TABLE5_JIGSAW[1] if task == "jigsaw" else chen.PAPER[task, "P3F4"][1]
        assert chen.PAPER_TABLE4[task, task] == pytest.approx(100 - ra)
    best = chen.PAPER_TABLE6[frozenset(chen.TASKS)][1]
    assert best - chen.PAPER["selfie", "P3F4"][1] == pytest.approx(3.59) and chen.PAPER["selfie", "P3F4"][1] - chen.PAPER["", "P1F4"][1] == pytest.approx(3.83)
    assert chen.PAPER_TABLE7[150_000, "P3F4"][1] - chen.PAPER_TABLE7[30_000, "P3F4"][1] == pytest.approx(0.97)


def test_stage_by_stage_equals_one_run(tmp_path):
    one = main(tiny(out=str(tmp_path / "one")))
    assert main(tiny(stage="pretrain", out=str(tmp_path / "pre"))) == {}
    two = main(tiny(init=str(tmp_path / "pre" / "pretrain-P3-rotation.pt"), out=str(tmp_path / "fine")))
    assert [r["accuracy"] for r in one["rows"]] == [r["accuracy"] for r in two["rows"]]


@pytest.mark.parametrize(("low", "dpe_lambda"), [(False, 0.1), (True, 0.1), (True, 0.0)])
def test_ensemble_and_subsets(tmp_path, low, dpe_lambda):
    ensemble = tiny(task="ensemble", dpe_lambda=dpe_lambda, batch_size=16, low_memory=low, label_fraction=32 / 1437, attack_steps=1, pretrain_images=20, out=str(tmp_path / "e"))
    results = main(ensemble)
    assert {r["task"] for r in results["rows"]} == {"ensemble"}
    assert load_checkpoint(tmp_path / "e" / "pretrain-P3-ensemble.pt")["images"] == 20
    line = json.loads((tmp_path / "e" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"val_selfie", "val_rotation", "val_jigsaw"} <= line.keys() and math.isfinite(line["loss"])


def test_noise_in_place_of_the_attack(tmp_path):
    noisy = main(tiny(task="jigsaw", pretrain="RS", finetune="F2", out=str(tmp_path / "n")))
    assert noisy["rows"][0]["pair"] == "RSF2"


def test_a_network_learns_rotation_and_resists_after_f4_not_after_f3(tmp_path):
    """The paper's main finding on a few hundred digits: without adversarial fine-tuning no robustness."""
    args = tiny(width=1 / 16, pretrain_epochs=2, epochs=5, lr_steps="3", label_fraction=1.0, eval_examples=200, out=str(tmp_path / "f4"))
    rows = main(args)["rows"] + main(replace(args, finetune="F3", init=str(tmp_path / "f4" / "pretrain-P3-rotation.pt"), out=str(tmp_path / "f3")))["rows"]
    rows = {(r["pair"], r["eps"] > 0): r["accuracy"] for r in rows if r["pick"] == "ta"}
    assert rows["P3F4", True] > rows["P3F3", True] + 15 and rows["P3F3", False] > 80


def test_the_papers_numbers():
    assert chen.paper_numbers("selfie", "P3F4", Args()) == (86.02, 51.05) and chen.paper_numbers("", "P1F4", Args()) == (84.72, 47.22)
    assert chen.paper_numbers("ensemble", "P3F4", Args()) == (83.00, 52.22) and chen.paper_numbers("ensemble", "P3F4", Args(dpe_lambda=0.0)) == (84.44, 49.53)
    assert chen.paper_numbers("jigsaw", "RSF2", Args()) == (74.66, 33.84)
    assert chen.paper_numbers("selfie", "P3F4", Args(epochs=50)) == chen.paper_numbers("selfie", "P3F4", Args(eps=4 / 255)) == (None, None)
    assert len(chen.PAPER) == 2 + 18 + 2 + 6
    for change in (dict(step_size=0.01), dict(pretrain_epochs=1), dict(weight_decay=0.0), dict(grid=2), dict(whole=1.0), dict(eval_steps=5)):
        assert chen.paper_numbers("jigsaw", "P3F4", Args(**change)) == (None, None), change
    assert chen.paper_numbers("ensemble", "P3F4", Args(dpe_lambda=7.0)) == (None, None)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"stage": "compare"}, "wants checkpoints"), ({"norm": "l2", "task": "ensemble"}, "use linf"), ({"task": "jigsaw", "image_size": 18}, "no multiple"), ({"task": "selfie", "image_size": 8}, "smaller than 4 pixels"),
        ({"table3": True, "init": "x.pt"}, "is for one cell"), ({"grid": 0, "task": "jigsaw"}, "--grid 0 must be"), ({"norm": "l2", "eps": 8 / 255}, "a radius of its own"),
        ({"table3": True, "task": "selfie"}, "leave out --task"), ({"stage": "pretrain", "pretrain": "P1"}, "nothing to do"), ({"task": "selfie", "grid": 2}, "a single masked patch"),
        ({"stem": "imagenet"}, "one pixel would be left"), ({"pretrain_images": 1}, "at least 2 images"), ({"val_fraction": 0.0}, "raise --val-fraction."),
        ({"task": "jigsaw", "grid": 2, "num_permutations": 30}, "has 23 permutations"), ({"init": "x.pt"}, "there is no x.pt"), ({"pretrain_images": 5000}, "there are"),
        ({"lr_steps": "a,b"}, "not a list of numbers"), ({"whole": 2.0}, "--whole 2 must be"), ({"extra_data": "nowhere.npy"}, "there is no nowhere.npy"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    assert match in one_sentence(chen, *flags(TINY | changes | {"out": tmp_path / "run"}))
    assert not (tmp_path / "run").exists()


def test_wrong_checkpoints(one_sentence, tmp_path):
    model = build_model("resnet26v2", {"class": 10}, width=1 / 16)
    torch.save({"network": model.spec, "model": model.state_dict()}, tmp_path / "classifier.pt")
    other = build_model("resnet26v2", {"class": 7}, width=1 / 16)
    torch.save({"network": other.spec, "model": other.state_dict()}, tmp_path / "seven.pt")
    assert "holds no pre-trained trunk" in one_sentence(chen, *flags(TINY | {"init": tmp_path / "classifier.pt", "out": tmp_path / "r"}))
    compare = flags(TINY | {"stage": "compare", "out": tmp_path / "r"})
    assert "no classifier of the 10 classes" in one_sentence(chen, str(tmp_path / "seven.pt"), *compare)
    pretext = Network(Pretext(("rotation",), tiny()), {}, (0.5,) * 3, (0.5,) * 3)
    torch.save({"network": {}, "model": pretext.state_dict(), "task": "rotation", "kind": "P2"}, tmp_path / "pre.pt")
    assert "is P2 on rotation: say --task rotation --pretrain P2" in one_sentence(chen, *flags(TINY | {"init": tmp_path / "pre.pt", "out": tmp_path / "r"}))
    for folder in ("x/f", "y/f"):
        (tmp_path / folder).mkdir(parents=True)
        torch.save({"network": model.spec, "model": model.state_dict()}, tmp_path / folder / "best.pt")
    assert "--init is for fine-tuning" in one_sentence(chen, str(tmp_path / "classifier.pt"), *compare, "--init", tmp_path / "pre.pt")
    assert "leave out --eval-attack" in one_sentence(chen, str(tmp_path / "classifier.pt"), *compare, "--eval-attack", "suite")
    same = "two of the checkpoints have the same name"
    assert same in one_sentence(chen, str(tmp_path / "x/f/best.pt"), str(tmp_path / "y/f/best.pt"), *compare)
    assert "are for --stage compare" in one_sentence(chen, str(tmp_path / "classifier.pt"), *flags(TINY | {"out": tmp_path / "r"}))
