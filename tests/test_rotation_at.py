"""rotation_at.py against Kucer et al.: the task, Algorithm 1, eq. 7-9, pre-training, selection, rows."""
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, metrics, replace, same_state

import jigsaw_at
import rotation_at
from common import Run, build_model, ce_per_image, load_checkpoint, pgd, rotate
from rotation_at import TASK, Args, adversaries, initialised_by, main, training_loss

FEW = TINY | dict(epochs=1, val_fraction=0.96, eval_steps=1, eval_examples=30)  # 57 digits


def tiny(**changes) -> Args:
    return Args(**(FEW | changes))


def network():
    """As every training starts."""
    torch.manual_seed(0)
    return build_model("resnet18", {"class": 10, TASK: 4}, width=1 / 16, stem="imagenet")


@pytest.fixture
def batch():
    """A float64 network in eval mode and a batch (x, y, x_ss, k)."""
    model = network().double().eval()
    x, y, k = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.arange(6), torch.tensor([0, 1, 2, 3, 1, 2])
    return model, x, y, rotate(x, k), k


def attacked(batch, steps: int = 3, **args):
    model, x, y, x_ss, k = batch
    args = tiny(attack_steps=steps, **args)
    torch.manual_seed(1)
    attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)
    return adversaries(model, x, y, rotate, k, args, attack)


def test_rotation_against_numpy():
    x, k = torch.rand(9, 3, 8, 8), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    turned = rotate(x, k)
    for i in range(9):
        assert np.array_equal(turned[i].numpy(), np.rot90(x[i].numpy(), k[i].item(), axes=(1, 2)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_t3_separate_attacks_x_as_t0_does(batch, norm):
    """Two perturbations and one summed loss: the SS loss does not reach X, and lambda2 has no effect."""
    model, x, y, x_ss, k = batch
    t0, untouched = attacked(batch, norm=norm, variant="T0")
    assert torch.equal(untouched, x_ss) and not torch.equal(t0, x)
    results = [attacked(batch, norm=norm, variant="T3", lambda2=value) for value in (0.01, 0.5, 100.0)]
    for x_adv, x_ss_adv in results:
        assert torch.allclose(x_adv, t0, atol=1e-9) and torch.allclose(x_ss_adv, results[0][1], atol=1e-9)
    for variant in ("T1", "T2"):
        assert torch.allclose(attacked(batch, norm=norm, variant=variant)[0], t0, atol=1e-9)
    assert torch.equal(attacked(batch, norm=norm, variant="T1")[1], x_ss)  # clean
    # lambda1 = 0 is the baseline in every variant and reading
    assert torch.equal(attacked(batch, norm=norm, variant="T3", ss_attack="shared", lambda1=0.0)[0], t0)


@pytest.mark.parametrize(("variant", "head"), [("T3", TASK), ("T2", "class"), ("replace", "class")])
def test_x_ss_is_attacked_as_pgd_on_its_loss_alone_would(batch, variant, head):
    """CE(F_SS(X_SS), k) for T3, CE(F(X_SS), y) for T2 and eq. 7, which leaves X alone; PGD by hand."""
    model, x, y, x_ss, k = batch
    x_adv, got = attacked(batch, variant=variant, eps=0.02, step_size=0.01, steps=8)
    assert torch.equal(x_adv, x) == (variant == "replace")
    losses = lambda z: ce_per_image(model(z, head), k if head == TASK else y)  # noqa: E731
    torch.manual_seed(1)
    both = x_ss if variant == "replace" else torch.cat([x, x_ss])
    want = pgd(losses, both, eps=0.02, step_size=0.01, steps=0)[-6:]  # the same start
    for _ in range(8):
        z = want.clone().requires_grad_()
        (g,) = torch.autograd.grad(losses(z).sum(), z)
        want = (x_ss + (want + 0.01 * g.sign() - x_ss).clamp(-0.02, 0.02)).clamp(0, 1)
    assert torch.allclose(got, want, atol=1e-9) and (losses(got) > losses(x_ss)).all()


def test_shared_is_one_perturbation_and_both_attacks_x_ss_with_both_losses(batch):
    """The limits of `both` are the class head alone (T2) and the SS head alone (T3 separate)."""
    model, x, y, x_ss, k = batch
    t0, _ = attacked(batch, variant="T0")
    x_adv, x_ss_adv = attacked(batch, variant="T2", ss_attack="shared")
    assert torch.allclose(x_adv, t0, atol=1e-9) and torch.equal(x_ss_adv, rotate(x_adv, k))
    x_adv, x_ss_adv = attacked(batch, variant="T3", ss_attack="shared", lambda2=5.0)
    assert torch.equal(x_ss_adv, rotate(x_adv, k)) and not torch.allclose(x_adv, t0, atol=1e-3)
    ss_loss = lambda z: F.cross_entropy(model(rotate(z, k), TASK), k)  # noqa: E731
    assert ss_loss(x_adv) > ss_loss(t0)  # lambda2 matters
    x_adv, small = attacked(batch, variant="T3", ss_attack="both", lambda2=1e-6)
    _, big = attacked(batch, variant="T3", ss_attack="both", lambda2=1e6)
    assert torch.allclose(x_adv, t0, atol=1e-9) and (small - big).abs().mean() > 1e-2
    assert (small - attacked(batch, variant="T2")[1]).abs().mean() < 1e-3
    assert (big - attacked(batch, variant="T3")[1]).abs().mean() < 1e-3


def test_training_losses_against_the_equations(batch):
    model, x, y, x_ss, k = batch  # in eval mode, so one concatenated pass and two separate ones agree
    class_ce = lambda z: F.cross_entropy(model(z), y)  # noqa: E731
    ss_ce = F.cross_entropy(model(x_ss, TASK), k)
    both, eq_7 = class_ce(x) + 0.3 * ss_ce, class_ce(x_ss) + 0.3 * ss_ce
    for variant, want in dict(T0=class_ce(x), T1=both, T2=both, T3=both, replace=eq_7).items():
        loss, ss_loss = training_loss(model, x, y, x_ss, k, tiny(variant=variant, lambda1=0.3))
        assert loss.item() == pytest.approx(want.item(), rel=1e-9)
        assert ss_loss.item() == pytest.approx(0 if variant == "T0" else ss_ce.item(), rel=1e-9)
    # Without its loss T1 is T0: X_SS does not reach the trunk.
    assert training_loss(model, x, y, None, k, tiny(variant="T1", lambda1=0.0))[0] == class_ce(x)


@pytest.fixture(scope="module")
def p2_t3(tmp_path_factory):
    """The folder of a finished run, P2 T3."""
    folder = tmp_path_factory.mktemp("p2-t3")
    main(tiny(pretrain="linf", attack_bn="train", out=str(folder)))
    return folder


def test_pretraining_hands_on_its_trunk_and_nothing_else(p2_t3, tmp_path):
    """--init with its checkpoint gives the same network; at learning rate 0 its trunk and new heads."""
    start, trained = (load_checkpoint(p2_t3 / f"{name}.pt")["model"] for name in ("pretrain", "best"))
    fresh, init = network().state_dict(), dict(init=str(p2_t3 / "pretrain.pt"), attack_bn="train")
    assert torch.equal(start["heads.class.weight"], fresh["heads.class.weight"])
    for key in (f"heads.{TASK}.weight", "trunk.conv1.weight"):
        assert not torch.equal(start[key], fresh[key]) and not torch.equal(trained[key], fresh[key])
    assert {r["name"] for r in main(tiny(**init, out=str(tmp_path / "again")))["rows"]} == {"P2 T3"}
    assert same_state(trained, load_checkpoint(tmp_path / "again" / "best.pt")["model"])
    main(tiny(**init, lr=0.0, out=str(tmp_path / "still")))
    still = load_checkpoint(tmp_path / "still" / "best.pt")["model"]
    for key in (k for k in still if k.endswith(("weight", "bias"))):
        assert torch.equal(still[key], start[key] if key.startswith("trunk.") else fresh[key]), key


def test_pretraining_learns_the_task_under_its_own_attack(tmp_path, monkeypatch):
    """P1 attacks at l2 0.5, whatever --norm and --eps are."""
    radii = set()
    spy = lambda *a, **kw: radii.add((kw["norm"], kw["eps"])) or pgd(*a, **kw)  # noqa: E731
    monkeypatch.setattr(rotation_at, "pgd", spy)
    main(tiny(pretrain="l2", variant="T0", epochs=4, val_fraction=0.5, lr=0.05, out=str(tmp_path)))
    lines = metrics(tmp_path)
    assert [line["stage"] for line in lines] == ["pretrain"] * 4 + ["train"] * 4
    assert lines[3]["val_clean"] > 40 and radii == {("l2", 0.5), ("linf", 0.1)}  # chance: 25%


@pytest.mark.parametrize(("script", "select", "chosen"), [
    (rotation_at, "clean", 2), (rotation_at, "robust", 3), (jigsaw_at, "last", 5),
])  # fmt: skip
def test_rate_drops_after_40_and_80_percent_and_selection(tmp_path, monkeypatch, script, select, chosen):
    """Of equal epochs the earlier one is kept."""
    scores = iter([(10.0, 5.0), (30.0, 2.0), (30.0, 9.0), (20.0, 9.0), (10.0, 0.0)])  # clean, robust
    keys = ("val_clean", "val_robust")
    monkeypatch.setattr(script, "validate", lambda *a: dict(zip(keys, next(scores), strict=True)))
    script.main(script.Args(**FEW | dict(epochs=5, lr=0.1, select=select, out=str(tmp_path))))
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == chosen
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_only_finished_pretraining_with_the_flags_of_this_run_is_p2(p2_t3, tmp_path):
    args = tiny(attack_bn="train")
    run = Run(tmp_path, torch.device("cpu"), "rotation_at", args)
    state = load_checkpoint(p2_t3 / "pretrain.pt")
    assert initialised_by(state, run, args) == "P2"
    assert initialised_by(state | {"args": state["args"] | {"pretrain": "l2"}}, run, args) == "P1"
    for change in (dict(epochs=2), dict(seed=1), dict(lr=0.1), dict(width=1 / 8), dict(attack_bn="eval")):
        assert initialised_by(state, run, replace(args, **change)) == "init", change
    for other in (dict(stage="plain"), dict(script="jigsaw_at"), dict(epoch=0), dict(optimizer={})):
        assert initialised_by(state | other, run, args) == "init", other
