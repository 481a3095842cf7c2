"""byorl.py: the attack on views, LARS, schedules, the target network, label fractions, heads, UAT-FT."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_BYORL, same_state

import byorl
import common
from byorl import LARS, Args, ByolNetwork, attack_view, distance, encoder_name, learning_rate, main, tau_at
from common import Run, UserError, build_model, l2_norm, load_checkpoint, split_train

CPU = torch.device("cpu")
# A run of two seconds on 240 digits of 8 pixels (see `digits`), of which 60 are held out.
TINY = TINY_BYORL | dict(
    dataset="digits", arch="preact18", width=1 / 16, epochs=1, batch_size=64, lr=0.5,
    label_fractions=(0.2, 1.0), probe_epochs=1, val_images=60, eval_examples=60,
)  # fmt: skip


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


@pytest.fixture(autouse=True, scope="module")
def digits():
    """240 training images, for all runs."""
    load = Run.load_data

    def few(run, **more):
        train, test = load(run, **more)
        return train.subset(torch.arange(240)), test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "load_data", few)
        yield common.load_data("digits", "", CPU, image_size=8)[0].subset(torch.arange(240))


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.5), ("linf", 8 / 255)])
@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_the_attack_raises_the_loss_and_leaves_the_networks_alone(norm, eps, attack):
    """The distance of the unit vectors; running statistics stay; with --eps 0 views stay as they are."""
    torch.manual_seed(0)
    online = ByolNetwork(tiny(width=1 / 8, hidden=32, projection=16), CPU).train()
    v, other, target = torch.rand(12, 3, 16, 16), torch.rand(12, 3, 16, 16), copy.deepcopy(online)
    with torch.no_grad():
        z = target.project(other)
    before = {k: t.clone() for k, t in online.state_dict().items()}
    v_adv = attack_view(online, v, z, tiny(norm=norm, eps=eps, attack=attack, attack_steps=8))
    assert same_state(online.state_dict(), before) and online.training
    assert all(p.grad is None for p in online.parameters())
    delta = v_adv - v
    assert (l2_norm(delta).max() if norm == "l2" else delta.abs().max()) <= eps * (1 + 1e-5)
    assert v_adv.min() >= 0 and v_adv.max() <= 1
    far, near = (F.normalize(copy.deepcopy(online).predict(u), dim=1) for u in (v_adv, v))  # batch statistics
    rises = (far - F.normalize(z, dim=1)).square().sum(1) - (near - F.normalize(z, dim=1)).square().sum(1)
    assert rises.mean() > 0.05 and (rises > 0).float().mean() > 0.9
    assert torch.allclose(distance(far, z) - distance(near, z), rises, atol=1e-5)
    assert torch.equal(attack_view(online, v, z, tiny(eps=0.0)), v)


def test_lars_against_a_hand_calculation():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))
    opt = LARS([w, b], lr=2.0, weight_decay=0.1, momentum=0.9)
    nw, nb = w.detach().numpy().astype(np.float64), b.detach().numpy().astype(np.float64)
    mw, mb, rng = np.zeros_like(nw), np.zeros_like(nb), np.random.default_rng(0)
    for step in range(3):
        gw, gb = rng.normal(size=(3, 4)), rng.normal(size=3)
        w.grad, b.grad = torch.tensor(gw, dtype=torch.float32), torch.tensor(gb, dtype=torch.float32)
        opt.param_groups[0]["lr"] = lr = 2.0 / (step + 1)
        opt.step()
        g = gw + 0.1 * nw  # decay inside the trust ratio
        mw = 0.9 * mw + 1e-3 * np.linalg.norm(nw) / np.linalg.norm(g) * g
        mb = 0.9 * mb + gb  # a vector: no decay, no trust ratio
        nw, nb = nw - lr * mw, nb - lr * mb  # the rate outside the momentum
        assert np.allclose(w.detach(), nw, atol=1e-5) and np.allclose(b.detach(), nb, atol=1e-5)


def test_schedules():
    """The rate rises linearly, then half a cosine to 0; tau goes from its start to 1."""
    rate = [learning_rate(2.0, k, 970, 97_000) for k in range(97_001)]
    assert rate[0] == 0 and rate[485] == pytest.approx(1.0) and rate[970] == max(rate) == 2.0
    assert rate[(970 + 97_000) // 2] == pytest.approx(1.0) and rate[-1] == pytest.approx(0, abs=1e-9)
    assert [tau_at(0.996, k, 100) for k in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_a_step_of_training(tmp_path, monkeypatch, tau):
    """A view is attacked away from, and predicts, the other's target; xi <- tau xi + (1 - tau) theta."""
    attacked, compared = [], []
    monkeypatch.setattr(byorl, "two_views", lambda x, args: (x, 1 - x))
    monkeypatch.setattr(byorl, "attack_view", lambda online, v, z, args: attacked.append((v, z)) or v)
    monkeypatch.setattr(byorl, "distance", lambda p, z: compared.append((p.detach(), z)) or distance(p, z))
    main(tiny(tau=tau, heads="none", batch_size=240, out=str(tmp_path)))
    torch.manual_seed(0)
    start = ByolNetwork(tiny(), CPU).train()
    for (v, z), (p, other) in zip(attacked, compared, strict=True):
        torch.testing.assert_close((z, other, p), (start.project(1 - v), z, start.predict(v)))
    state = load_checkpoint(tmp_path / "last.pt")
    online, target, before = state["model"], state["target"], start.state_dict()
    for key in (k for k in before if k.endswith("weight")):
        assert torch.allclose(target[key], online[key] if tau == 0 else before[key], atol=1e-7), key
    assert len(attacked) == 2 and not torch.equal(online["projector.0.weight"], before["projector.0.weight"])


def test_all_stages_then_heads_alone(tmp_path):
    """Heads on --init are those of the whole run, whatever --arch says; their encoder is frozen."""
    rows = main(tiny(plain=True, out=str(tmp_path / "all")))["rows"]
    kinds = [(f, h, eps) for f in (0.2, 1.0) for h in ("robust", "plain") for eps in (0, 0.5)]
    names = [(r["encoder"], r["label_fraction"], r["head"], r["eps"]) for r in rows]
    assert names == [(encoder, *kind) for encoder in ("byol", "byorl") for kind in kinds]
    init = str(tmp_path / "all" / "byorl.pt")
    alone = main(tiny(init=init, arch="resnet18", width=1.0, epochs=7, out=str(tmp_path / "heads")))
    assert alone["rows"] == [r for r in rows if r["encoder"] == "byorl"]
    files = [f"{name}.pt" for name in ("byorl", "byorl-plain-100%", "byol")]
    encoder, head, byol = (load_checkpoint(tmp_path / "all" / file)["model"] for file in files)
    assert all(torch.equal(head[k], v) for k, v in encoder.items() if k.startswith("trunk."))
    assert not same_state(encoder, byol)


def test_pseudo_labels_only_where_labels_are_missing(tmp_path, digits):
    """Known labels stay, even where the teacher, who says 3 to all, errs. No image held out is used."""
    args, teacher = tiny(out=str(tmp_path)), build_model("preact18", {"class": 10}, width=1 / 16)
    with torch.no_grad():
        teacher.heads["class"].weight.zero_()
        teacher.heads["class"].bias.copy_(torch.arange(10) == 3)
    known, held_out = split_train(digits, val_fraction=60, seed=0, label_fraction=0.1)
    used = torch.cat([known.index, held_out.index])
    rest = digits.subset(torch.tensor([i for i in range(240) if i not in used]))
    state = {"network": teacher.spec, "model": teacher.state_dict(), "stage": "t"}
    union = byorl.pseudo_label(byorl.start_run(args), args, state, known, rest)
    assert torch.equal(union.index, torch.cat([known.index, rest.index]))
    assert torch.equal(union.labels[known.index], digits.labels[known.index])
    assert (union.labels[rest.index] == 3).all() and len(digits.labels[rest.index].unique()) == 10


def test_uat_ft_is_a_plain_teacher_where_labels_are_missing_then_a_robust_student(tmp_path, monkeypatch):
    seen, train = [], byorl.train_classifier

    def spy(name, *given, images, robust, encoder, **more):
        seen.append((name, len(images), robust, encoder))
        return train(name, *given, images=images, robust=robust, encoder=encoder, **more)

    monkeypatch.setattr(byorl, "train_classifier", spy)
    rows = main(tiny(method="uat-ft", uat_epochs=1, out=str(tmp_path)))["rows"]
    teacher, student = ("uat-ft 20% teacher", 48, False, None), ("uat-ft 20%", 180, True, None)
    assert seen == [teacher, student, ("uat-ft 100%", 180, True, None)]
    assert [(r["name"], r["eps"]) for r in rows] == [(f"uat-ft {p}%", e) for p in (20, 100) for e in (0, 0.5)]


def test_extra_images_are_learned_from_and_named_in_the_row(tmp_path):
    extra = str(tmp_path / "extra.npy")
    np.save(extra, np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8))
    for name, file in ("without", ""), ("with", extra):
        main(tiny(heads="none", extra_data=file, out=str(tmp_path / name)))
    a, b = (load_checkpoint(tmp_path / name / "byorl.pt") for name in ("without", "with"))
    assert not same_state(a["model"], b["model"]) and (a["extra_images"], b["extra_images"]) == (0, 300)
    uat = dict(method="uat-ft", uat_epochs=1, label_fractions=(1.0,))
    rows = main(tiny(**uat, extra_data=extra, out=str(tmp_path / "uat")))["rows"]
    assert (tmp_path / "uat" / "uat-ft-100%-teacher.pt").exists() and rows[0]["name"] == "uat-ft 100% +300"


def test_the_name_of_a_row_says_how_its_encoder_was_trained():
    its = vars(Args())
    ours = {"script": "byorl", "stage": "byorl", "args": its}
    assert encoder_name(ours, Args()) == encoder_name(ours, Args(eps=0.5)) == "byorl"  # 128/255, rounded
    assert encoder_name(ours | {"extra_images": 7}, Args(dataset="stl10")) == "cifar10 byorl +7"
    assert encoder_name(ours | {"stage": "byol", "args": its | {"eps": 0.0}}, Args()) == "byol"
    for change in ({"batch_size": 64}, {"flip": False}, {"image_size": 64}, {"norm": "linf"}, {"eps": 0.25}):
        assert encoder_name(ours | {"args": its | change}, Args()) == "init byorl"
    uat = ours | {"stage": "uat-ft 100%", "args": its | {"probe_steps": 1}}
    assert encoder_name(uat, Args()) == "init uat-ft 100%"
    assert encoder_name(ours | {"script": "rotation_at", "stage": "train"}, Args()) == "init train"


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 9, 8, 8), (4, 16, 16, 3), (0, 8, 8, 3)])
def test_extra_images_of_another_shape_or_type_are_refused(tmp_path, shape):
    for array in np.zeros(shape, np.uint8), np.zeros((4, 8, 8, 3), np.float32):
        np.save(tmp_path / "extra.npy", array)
        with pytest.raises(UserError, match="extra.npy is damaged, or not a file of the kind"):
            common.load_extra(tmp_path / "extra.npy", 8, CPU)
