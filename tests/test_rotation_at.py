"""rotation_at.py against Kucer et al.: the transformation, the attacks of Algorithm 1, eq. 7-9, schedule, selection."""
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, replace, same_state

import common
import jigsaw_at
import rotation_at
from common import (
    UserError, build_model, l2_norm, load_checkpoint, load_model, paper_numbers, pgd, rotate, save_checkpoint,
)
from rotation_at import TABLE_EPS, TASK, Args, adversaries, main, training_loss

torch.set_default_dtype(torch.float32)


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture
def batch():
    """A float64 network in eval mode and a batch (x, y, x_ss, k)."""
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10, TASK: 4}, width=1 / 16, stem="imagenet").double().eval()
    x, y, k = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.arange(6), torch.tensor([0, 1, 2, 3, 1, 2])
    return model, x, y, rotate(x, k), k


def attacked(batch, seed: int = 1, steps: int = 3, **args):
    model, x, y, x_ss, k = batch
    args = tiny(attack_steps=steps, **args)
    torch.manual_seed(seed)
    attack = partial(pgd, norm=args.norm, eps=args.eps, steps=args.attack_steps, step_size=args.step_size)
    return adversaries(model, x, y, rotate, k, args, attack)


# ---- T(.) ----


def test_rotation():
    x, k = torch.rand(9, 3, 8, 8), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    turned = rotate(x, k)
    for i in range(9):
        assert np.array_equal(turned[i].numpy(), np.rot90(x[i].numpy(), k[i].item(), axes=(1, 2)))
    once = torch.ones(9, dtype=torch.int64)
    assert torch.equal(rotate(rotate(rotate(rotate(x, once), once), once), once), x)  # four times is the identity
    assert torch.equal(rotate(rotate(x, k), (4 - k) % 4), x)
    assert torch.allclose(l2_norm(turned), l2_norm(x)) and torch.equal(turned.amax((1, 2, 3)), x.amax((1, 2, 3)))


# ---- Algorithm 1 ----


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_t3_separate_attacks_x_as_t0_does(batch, norm):
    """Two perturbations and one summed loss: the SS loss does not reach X, and lambda2 has no effect at all."""
    model, x, y, x_ss, k = batch
    t0, untouched = attacked(batch, norm=norm, variant="T0")
    assert torch.equal(untouched, x_ss) and not torch.equal(t0, x)
    results = [attacked(batch, norm=norm, variant="T3", lambda2=value) for value in (0.01, 0.5, 100.0)]
    # The start of X is the same: torch fills X before X_SS. l2 starts are normalised per image, so that holds too.
    for x_adv, x_ss_adv in results:
        assert torch.allclose(x_adv, t0, atol=1e-9)
        assert torch.allclose(x_ss_adv, results[0][1], atol=1e-9)
    for variant in ("T1", "T2"):
        assert torch.allclose(attacked(batch, norm=norm, variant=variant)[0], t0, atol=1e-9)
    # lambda1 = 0 is the baseline in every variant and reading
    assert torch.equal(attacked(batch, norm=norm, variant="T3", ss_attack="shared", lambda1=0.0)[0], t0)


def test_t3_separate_attacks_x_ss_through_its_own_head(batch):
    """X_SS_adv is what PGD on CE(F_SS(X_SS), k) alone would find; for T2 what PGD on CE(F(X_SS), y) would."""
    model, x, y, x_ss, k = batch
    for variant, head, labels in (("T3", TASK, k), ("T2", "class", y)):
        _, got = attacked(batch, variant=variant, eps=0.02, step_size=0.01, steps=8)
        losses = lambda z: F.cross_entropy(model(z, head), labels, reduction="none")  # noqa: B023, E731
        torch.manual_seed(1)
        want = pgd(losses, torch.cat([x, x_ss]), eps=0.02, step_size=0.01, steps=0)[6:]  # the same start
        for _ in range(8):
            z = want.clone().requires_grad_()
            (g,) = torch.autograd.grad(losses(z).sum(), z)
            want = (x_ss + (want + 0.01 * g.sign() - x_ss).clamp(-0.02, 0.02)).clamp(0, 1)
        assert torch.allclose(got, want, atol=1e-9)
        assert (losses(got) > losses(x_ss)).all()


def test_shared_is_one_perturbation(batch):
    model, x, y, x_ss, k = batch
    t0, _ = attacked(batch, variant="T0")
    x_adv, x_ss_adv = attacked(batch, variant="T2", ss_attack="shared")
    assert torch.allclose(x_adv, t0, atol=1e-9) and torch.equal(x_ss_adv, rotate(x_adv, k))  # the rotated T0 image
    x_adv, x_ss_adv = attacked(batch, variant="T3", ss_attack="shared", lambda2=5.0)
    assert torch.equal(x_ss_adv, rotate(x_adv, k))
    assert not torch.allclose(x_adv, t0, atol=1e-3)  # lambda2 matters
    ss_loss = lambda z: F.cross_entropy(model(rotate(z, k), TASK), k)  # noqa: E731
    assert ss_loss(x_adv) > ss_loss(t0)


def test_both_attacks_x_ss_with_both_losses(batch):
    model, x, y, x_ss, k = batch
    x_adv, small = attacked(batch, variant="T3", ss_attack="both", lambda2=1e-6)
    _, big = attacked(batch, variant="T3", ss_attack="both", lambda2=1e6)
    assert torch.allclose(x_adv, attacked(batch, variant="T0")[0], atol=1e-9)
    # Its limits are the class head alone (T2) and the SS head alone (T3 separate).
    assert (small - attacked(batch, variant="T2")[1]).abs().mean() < 1e-3
    assert (big - attacked(batch, variant="T3")[1]).abs().mean() < 1e-3
    assert (small - big).abs().mean() > 1e-2


# ---- eq. 7-9 ----


def test_training_losses_against_the_equations(batch):
    model, x, y, x_ss, k = batch  # in eval mode, so one concatenated pass and two separate ones agree
    class_ce = lambda z: F.cross_entropy(model(z), y)  # noqa: E731
    ss_ce = lambda z: F.cross_entropy(model(z, TASK), k)  # noqa: E731
    for variant, want in {
        "T0": class_ce(x), "T1": class_ce(x) + 0.3 * ss_ce(x_ss), "T2": class_ce(x) + 0.3 * ss_ce(x_ss),
        "T3": class_ce(x) + 0.3 * ss_ce(x_ss), "replace": class_ce(x_ss) + 0.3 * ss_ce(x_ss),
    }.items():  # fmt: skip
        loss, ss_loss = training_loss(model, x, y, x_ss, k, tiny(variant=variant, lambda1=0.3))
        assert loss.item() == pytest.approx(want.item(), rel=1e-9)
        assert ss_loss.item() == pytest.approx(0 if variant == "T0" else ss_ce(x_ss).item(), rel=1e-9)


def test_replace_attacks_only_x_ss(batch):
    model, x, y, x_ss, k = batch
    same, x_ss_adv = attacked(batch, variant="replace")
    assert torch.equal(same, x) and (x_ss_adv - x_ss).abs().max() > 0.05


def test_t1_without_its_loss_is_t0(tmp_path):
    runs = [main(tiny(variant=v, lambda1=w, out=str(tmp_path / v))) for v, w in (("T0", 0.5), ("T1", 0.0))]
    a, b = (load_checkpoint(tmp_path / v / "best.pt")["model"] for v in ("T0", "T1"))
    assert same_state(a, b)
    assert [r["accuracy"] for r in runs[0]["rows"]] == [r["accuracy"] for r in runs[1]["rows"]]


@pytest.mark.parametrize("variant", ["T1", "T2", "T3", "replace"])
def test_every_variant_trains_both_heads(tmp_path, variant):
    for ss_attack in ("separate", "shared", "both") if variant in ("T2", "T3") else ("separate",):
        for norm in ("linf", "l2"):
            out = tmp_path / f"{ss_attack}-{norm}"
            main(tiny(variant=variant, ss_attack=ss_attack, norm=norm, epochs=1, out=str(out)))
            torch.manual_seed(0)
            fresh = build_model("resnet18", {"class": 10, TASK: 4}, width=1 / 16, stem="imagenet").state_dict()
            trained = load_checkpoint(out / "best.pt")["model"]
            for key in ("heads.class.weight", f"heads.{TASK}.weight", "trunk.conv1.weight"):
                assert not torch.equal(fresh[key], trained[key])


# ---- pre-training ----


def test_init_takes_the_trunk_and_nothing_else(tmp_path):
    torch.manual_seed(99)
    other = build_model("resnet18", {"class": 7, "other": 3}, width=1 / 16, stem="imagenet")
    save_checkpoint(tmp_path / "other.pt", {"network": other.spec, "model": other.state_dict()})
    main(tiny(init=str(tmp_path / "other.pt"), lr=0.0, epochs=1, out=str(tmp_path / "run")))  # lr 0: weights stay
    got, want = load_checkpoint(tmp_path / "run" / "best.pt")["model"], other.state_dict()
    torch.manual_seed(0)
    fresh = build_model("resnet18", {"class": 10, TASK: 4}, width=1 / 16, stem="imagenet").state_dict()
    for key, value in got.items():
        if key in ("mean", "std") or "running" in key or "num_batches" in key:
            continue  # the statistics of BatchNorm move even at lr 0
        assert torch.equal(value, want[key] if key.startswith("trunk.") else fresh[key]), key
    assert not torch.equal(fresh["trunk.conv1.weight"], want["trunk.conv1.weight"])


def test_pretraining_trains_the_ss_head_and_hands_on_its_trunk(tmp_path):
    args = dict(pretrain="l2", val_fraction=0.15, epochs=6, variant="T0")
    main(tiny(out=str(tmp_path / "a"), **args))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["pretrain"] * 6 + ["train"] * 6
    assert lines[5]["val_clean"] > 40  # rotations are recognised (chance: 25%)
    # The same as --init with the checkpoint it leaves.
    b = main(tiny(out=str(tmp_path / "b"), init=str(tmp_path / "a" / "pretrain.pt"), **args | {"pretrain": "none"}))
    assert same_state(*(load_checkpoint(tmp_path / r / "best.pt")["model"] for r in "ab"))
    assert b["rows"][0]["name"] == "P1 T0"


# ---- schedule, selection, table ----


def test_learning_rates(tmp_path):
    main(tiny(variant="T0", epochs=5, lr=0.1, val_fraction=0.95, out=str(tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # 40% of the epochs between drops, as 40 of 100 in the paper: 0-1, 2-3, 4
    assert [line["lr"] for line in lines] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("select", ["clean", "robust", "last"])
def test_selection_by_validation_accuracy(tmp_path, select):
    main(tiny(variant="T0", epochs=5, select=select, out=str(tmp_path)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    chosen = load_checkpoint(tmp_path / "best.pt")["epoch"]
    scores = [line[f"val_{select}"] for line in lines] if select != "last" else list(range(5))
    assert chosen == 1 + scores.index(max(scores))


def test_ties_go_to_the_earlier_epoch(tmp_path, monkeypatch):
    scores = iter([(10.0, 5.0), (30.0, 2.0), (30.0, 9.0), (20.0, 9.0)])  # (clean, robust) after each epoch
    monkeypatch.setattr(rotation_at, "validate", lambda *a: dict(zip(("val_clean", "val_robust"), next(scores), strict=True)))
    main(tiny(variant="T0", epochs=4, out=str(tmp_path)))
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2


def test_the_reported_accuracy_is_that_of_the_checkpoint(tmp_path):
    """A second evaluation, by hand: load_model and a few lines of torch on the same test images."""
    results = main(tiny(epochs=4, val_fraction=0.15, eval_examples=0, out=str(tmp_path)))
    model = load_model(tmp_path / "best.pt")
    _, test = common.load_data("digits", "", torch.device("cpu"))
    with torch.no_grad():
        right = (model(test.pixels / 255).argmax(1) == test.labels).float().mean().item() * 100
    assert results["rows"][0]["accuracy"] == pytest.approx(right, abs=0.3)  # one image


def test_the_papers_numbers_stand_beside_its_own_setting_only():
    assert len(TABLE_EPS["l2"]) == 12 and len(TABLE_EPS["linf"]) == 9

    def known(name, **changed):
        return paper_numbers("rotation_at", Args(**changed), name)

    assert (known("T3")[0], known("T3")[6]) == ("84.61", "48.11")
    assert known("T1", variant="T1", norm="l2", eps=0.5)[7] == "62.17" and len(known("T1", variant="T1", norm="l2", eps=0.5)) == 12
    assert known("P1 T0", variant="T0", pretrain="l2")[6] == known("P1 T0", variant="T0", init="runs/p1/pretrain.pt")[6] == "45.91"
    assert known("replace", variant="replace")[:7] == ["74.9", *[""] * 5, "36.60"]
    # What says where to compute may vary, and so may what the paper leaves open.
    assert known("T3", seed=3, out="x", workers=0, plain=True, ss_attack="both") == known("T3")
    for changed in (dict(width=0.5), dict(eps=4 / 255), dict(epochs=50), dict(dataset="cifar100"), dict(eval_examples=100), dict(norm="l2"),
                    dict(select="robust"), dict(quick=True), dict(lambda1=0.0), dict(step_size=0.01), dict(eval_eps=(0.0,)), dict(lr=0.05),
                    dict(eval_attack="suite"), dict(norm="l2", eps=1.0), dict(variant="T2")):  # fmt: skip
        assert known("T3", **changed) == []
    assert known("init T0", variant="T0") == known("plain") == paper_numbers("byorl", Args(), "T3") == []
    assert paper_numbers("jigsaw_at", jigsaw_at.Args(), "T3")[6] == "47.57"


def test_the_printed_table():
    """Ours above the paper's, column by column, where the setting is the paper's."""
    rows = [dict(name="T3", attack="pgd-20" if e else "none", norm="linf", eps=e, examples=10_000, accuracy=50 - 100 * e, epoch=90) for e in TABLE_EPS["linf"]]
    results = {"script": "rotation_at", "rows": rows, "seconds": 1.0}
    ours, papers = common.results_table(results, Args(), "last epoch").splitlines()[-2:]
    assert ours.split() == ["T3,", "epoch", "90", *(f"{row['accuracy']:.2f}" for row in rows)]
    assert papers.split() == "the paper 84.61 73.33 68.61 64.01 59.09 53.73 48.11 43.42 38.76".split()
    ends = [[word.end() for word in re.finditer(r"\S+", line)][-9:] for line in (ours, papers)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("pretraining", "name"), [({}, "P2 T3"), ({"epochs": 2}, "init T3"), ({"seed": 1}, "init T3"), ({"pretrain": "none", "plain": True}, "init T3")])
def test_table_4_by_init(tmp_path, pretraining, name):
    """The trunk of a P2 run makes P2 T3 if it was trained by the flags of this run."""
    main(tiny(out=str(tmp_path / "first"), **{"epochs": 1, "variant": "T0", "pretrain": "linf"} | pretraining))
    start = tmp_path / "first" / ("plain.pt" if "plain" in pretraining else "pretrain.pt")
    rows = main(tiny(out=str(tmp_path / "second"), epochs=1, init=str(start)))["rows"]
    assert {row["name"] for row in rows} == {name}


def test_pretraining_that_is_not_finished_is_no_row_of_table_4(tmp_path):
    main(tiny(out=str(tmp_path / "first"), epochs=1, variant="T0", pretrain="linf"))
    state = load_checkpoint(tmp_path / "first" / "pretrain.pt")
    state["args"]["epochs"] = 2
    save_checkpoint(tmp_path / "half.pt", state)
    args = tiny(out=str(tmp_path / "second"), epochs=2, init=str(tmp_path / "half.pt"))
    assert {row["name"] for row in main(args)["rows"]} == {"init T3"}
    # Nor does it become one when the run is resumed after the pre-training has ended.
    save_checkpoint(tmp_path / "half.pt", state | {"epoch": 2})
    (tmp_path / "second" / "results.json").unlink()
    with pytest.raises(UserError, match="the initial weights are not those"):
        main(replace(args, resume=True))


def test_steps_that_are_too_short_are_told(tmp_path, capsys):
    """The paper's eps^2 / steps: ten of them are shorter than the radius."""
    main(tiny(norm="l2", eps=0.5, step_size=0.025, attack_steps=10, epochs=1, out=str(tmp_path)))
    assert "10 steps of 0.025 cannot reach the surface" in capsys.readouterr().out


def test_without_validation_images_only_the_last_epoch_can_be_chosen(tmp_path):
    with pytest.raises(UserError, match="--select last"):
        main(tiny(val_fraction=0.0, out=str(tmp_path / "a")))
    main(tiny(val_fraction=0.0, select="last", out=str(tmp_path / "b")))
    assert load_checkpoint(tmp_path / "b" / "best.pt")["epoch"] == 2
