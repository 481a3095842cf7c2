"""byorl.py: the attack on views, LARS, schedules, the target network, label fractions, stages."""
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import flags, same_state

import byorl
from byorl import LARS, Args, BothViews, Online, attack_view, distance, learning_rate, main, target_rate
from common import build_model, l2_norm, load_checkpoint, load_model, split_train

TINY = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=2, warmup_epochs=1, batch_size=128, lr=0.5, eps=0.5,
    attack_steps=2, hidden=16, projection=8, label_fractions="0.2,1", probe_epochs=2, probe_steps=1, val_images=400, eval_attack="pgd20",
    eval_steps=2, eval_examples=60, amp="off", device="cpu",
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def online():
    torch.manual_seed(0)
    encoder = build_model("preact18", {}, width=1 / 8)
    return Online(encoder, 32, 16).train()


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
    rises = distance(copy.deepcopy(online)(v_adv), z) - distance(copy.deepcopy(online)(v), z)  # batch statistics in both
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
    p1, p2 = BothViews(a)(v1, v2)
    assert torch.equal(p1, b(v1)) and torch.equal(p2, b(v2))
    assert not torch.allclose(copy.deepcopy(online)(torch.cat([v1, v2]))[:8], p1, atol=1e-3)


# ---- optimiser and schedules ----


def test_lars_against_a_hand_calculation():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    opt = LARS([w, b], lr=2.0, weight_decay=0.1, momentum=0.9, trust=1e-3)
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
    args = Args()  # 1000 epochs, 10 of warm-up, lr 2, tau 0.996
    assert learning_rate(args, 0, 97) == 0 and learning_rate(args, 485, 97) == pytest.approx(1.0)
    assert learning_rate(args, 970, 97) == pytest.approx(2.0) and learning_rate(args, 97_000, 97) == pytest.approx(0, abs=1e-9)
    assert learning_rate(args, 970 + (97_000 - 970) // 2, 97) == pytest.approx(1.0, abs=1e-3)
    assert target_rate(args, 0, 100) == pytest.approx(0.996) and target_rate(args, 100, 100) == 1
    assert target_rate(args, 50, 100) == pytest.approx(0.998)
    rates = [target_rate(args, k, 100) for k in range(101)]
    assert rates == sorted(rates)


def test_the_target_follows_the_online_network(tmp_path):
    """tau = 1 keeps it at its start; after a first step with tau = 0 it is the online network."""
    main(tiny(tau=1.0, stage="pretrain", epochs=1, out=str(tmp_path / "one")))
    state = load_checkpoint(tmp_path / "one" / "last.pt")
    torch.manual_seed(0)
    args = tiny()
    mean, std = byorl.STATS["digits"]
    start = Online(build_model("preact18", {}, width=1 / 16, mean=mean, std=std), args.hidden, args.projection).state_dict()
    weights = [k for k in start if "running" not in k and "num_batches" not in k]
    assert all(torch.equal(state["target"][k], start[k]) for k in weights)
    assert any(not torch.equal(state["model"][k], start[k]) for k in weights)
    one_step = dict(tau=0.0, batch_size=1437, warmup_epochs=0, epochs=1)
    main(tiny(**one_step, stage="pretrain", out=str(tmp_path / "zero")))
    state = load_checkpoint(tmp_path / "zero" / "last.pt")
    assert all(torch.allclose(state["target"][k], state["model"][k], atol=1e-7) for k in weights)
    assert any(not torch.equal(state["model"][k], start[k]) for k in weights)


# ---- heads ----


def test_label_fractions_are_nested_and_not_balanced():
    train, _ = byorl.load_data("digits", "", torch.device("cpu"), image_size=8)
    parts = [split_train(train, val_fraction=200, seed=3, label_fraction=f) for f in (0.01, 0.1, 1.0)]
    sets = [set(part.index.tolist()) for part, _ in parts]
    assert sets[0] < sets[1] < sets[2] and [len(s) for s in sets] == [12, 124, 1237]
    assert all(torch.equal(val.index, parts[0][1].index) and len(val) == 200 for _, val in parts)  # the same images held out
    counts = torch.bincount(train.labels[parts[1][0].index], minlength=10)
    assert counts.max() > counts.min() + 2


def test_all_stages_and_probe_alone(tmp_path, capsys, monkeypatch):
    results = main(tiny(plain=True, out=str(tmp_path / "all")))
    names = [(r["encoder"], r["head"], r["label_fraction"], r["eps"]) for r in results["rows"]]
    assert names == [(e, h, f, eps) for e in ("byol", "byorl") for f in (0.2, 1.0) for h in ("robust", "plain") for eps in (0, 0.5)]
    assert "encoder, head, share of labels" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["byol"] * 2 + ["byorl"] * 2
    again = main(tiny(stage="probe", init=str(tmp_path / "all" / "byorl.pt"), label_fractions="1", out=str(tmp_path / "probe")))
    assert [r["accuracy"] for r in again["rows"]] == [r["accuracy"] for r in results["rows"][-4:]]
    # Resumed after some heads were judged: those are not judged again.
    for name in ("results.json", "probe"):
        (tmp_path / "probe" / name).unlink(missing_ok=True)
    monkeypatch.setattr(byorl, "evaluate", None)
    assert main(tiny(**again["args"] | {"resume": True}))["rows"] == again["rows"]
    # Encoders stay as they are, heads are classifiers that any script can load.
    encoder, head = (load_checkpoint(tmp_path / "all" / name)["model"] for name in ("byorl.pt", "byorl-plain-100%.pt"))
    assert all(torch.equal(head[k], v) for k, v in encoder.items() if k.startswith("trunk."))
    assert load_model(tmp_path / "all" / "byorl-robust-20%.pt")(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_a_plain_head_reaches_the_optimum_of_logistic_regression(tmp_path, monkeypatch):
    """On frozen features the problem is convex: the head's training loss is near that of a long run of L-BFGS."""
    args = tiny(probe_epochs=80, probe_lr=0.1, heads="plain", label_fractions="1", epochs=1)
    monkeypatch.setattr(byorl, "random_crop_flip", lambda x, **k: x)
    scores = iter(range(10**6))
    monkeypatch.setattr(byorl, "robust_accuracy", lambda *a: next(scores))  # keep the last epoch
    main(tiny(**vars(args) | {"out": str(tmp_path)}))
    model = load_model(tmp_path / "byorl-plain-100%.pt")
    train, _ = byorl.load_data("digits", "", torch.device("cpu"), image_size=8)
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


def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    whole = main(tiny(out=str(tmp_path / "whole")))
    real, calls = byorl.Epoch.update, []

    def interrupt(self, *a, **k):
        real(self, *a, **k)
        calls.append(1)
        if len(calls) == 15:  # in the second epoch: 12 steps each
            raise KeyboardInterrupt

    monkeypatch.setattr(byorl.Epoch, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(out=str(tmp_path / "cut")))
    monkeypatch.setattr(byorl.Epoch, "update", real)
    resumed = main(tiny(out=str(tmp_path / "cut"), resume=True))
    assert [r["accuracy"] for r in resumed["rows"]] == [r["accuracy"] for r in whole["rows"]]
    a, b = (load_checkpoint(tmp_path / f / "byorl.pt")["model"] for f in ("whole", "cut"))
    assert same_state(a, b)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label_fractions": "0,1"}, "shares such as"), ({"label_fractions": "2"}, "shares such as"), ({"stage": "probe"}, "needs an encoder"),
        ({"init": "x.pt"}, "needs an encoder"), ({"label_fractions": "0.0001"}, "too few"), ({"tau": 2.0}, "--tau 2 must be"), ({"stage": "probe", "init": "nowhere.pt"}, "no checkpoint"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, changes, match):
    assert match in one_sentence(byorl, *flags(TINY | changes | {"out": tmp_path / "run"}))


def test_a_probe_needs_an_encoder_of_the_same_shape(one_sentence, tmp_path):
    main(tiny(stage="pretrain", epochs=1, out=str(tmp_path / "a")))
    message = one_sentence(byorl, *flags(TINY | {"stage": "probe", "width": 1 / 8, "init": tmp_path / "a" / "byorl.pt", "out": tmp_path / "b"}))
    assert "another architecture" in message
