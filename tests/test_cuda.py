"""What only a GPU can tell: the same runs there, and attacks in mixed precision as strong as in float32."""
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, flags, results, run_ranks, run_script
from test_ranks import check_batchnorm

import adv_mae
import byorl
import mtl_reverse
from common import (
    Images, Run, batches, batchnorm_mode, build_model, ce_per_image, cuda_graph, full_precision,
    image_uniform, load_checkpoint, load_data, pgd, place_model, project, robust_accuracy, suite_accuracy,
    suite_attacks,
)  # fmt: skip
from rotation_at import Args, main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("variant", ["T0", "T3"])
def test_a_run(tmp_path, amp, variant):
    args = TINY | dict(
        device="cuda", amp=amp, variant=variant, width=0.25, epochs=6, val_fraction=0.15, eval_examples=0
    )
    results = main(Args(**args, out=str(tmp_path)))
    assert results["rows"][0]["accuracy"] > 50  # chance: 10
    assert load_checkpoint(tmp_path / "last.pt")["model"]["trunk.conv1.weight"].device.type == "cpu"
    main(Args(**args, out=str(tmp_path), resume=True))  # finished: only shows the table


def test_the_peak_of_memory_is_that_of_the_epoch(tmp_path):
    """Not of the whole process: an epoch of much memory leaves nothing in the line of the next."""
    device = torch.device("cuda", 0)
    model = place_model(build_model("resnet18", {"class": 2}, width=1 / 16), device, "off")
    pixels = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device)
    data = Images(pixels, torch.zeros(8, dtype=torch.int64), ["a", "b"], torch.arange(8))
    run = Run(tmp_path, device, "rotation_at", Args(device="cuda"))
    for epoch in run.epochs("train", 2, model, torch.optim.SGD(model.parameters(), 0.1)):
        if epoch == 0:
            torch.empty(2 * 2**30, dtype=torch.uint8, device=device)
            if torch.cuda.max_memory_allocated() < 2 * 2**30:
                pytest.skip("this device does not count its memory")
        for x, _ in run.batches(data, 4):
            run.log(loss=x.mean())
    assert run.history[0]["peak_gb"] >= 2 > run.history[1]["peak_gb"] > 0


def test_what_waits_for_data_is_counted(tmp_path):
    """A device that has nothing to do while a batch is read; one that still computes hides the reading."""
    device = torch.device("cuda", 0)

    class Slow(torch.utils.data.Dataset):
        def __getitem__(self, i):
            time.sleep(0.05)
            return torch.zeros(3, 2, 2, dtype=torch.uint8), 0, ""

    model = place_model(build_model("resnet18", {"class": 2}, width=1 / 16), device, "off")
    run = Run(tmp_path, device, "rotation_at", Args(device="cuda", workers=0))
    data = Images(Slow(), torch.zeros(8, dtype=torch.int64), ["a", "b"], torch.arange(8))
    for _ in run.epochs("train", 1, model, torch.optim.SGD(model.parameters(), 0.1)):
        for x, _ in run.batches(data, 4):
            run.log(loss=x.mean())
    assert run.history[0]["waiting"] > 0.5


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_attacks_in_mixed_precision_are_attacks(amp):
    """PGD-20 in mixed precision and in float32, evaluated in float32: at most two of 360 images apart."""
    device = torch.device("cuda")
    train, test = load_data("digits", "", device)
    torch.manual_seed(0)
    model = place_model(build_model("resnet18", {"class": 10}, width=0.25, stem="imagenet"), device, amp)
    opt = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def attack(x, y, steps):
        loss = lambda z: F.cross_entropy(model(z), y, reduction="none")  # noqa: E731
        torch.manual_seed(0)
        return pgd(loss, x, eps=0.1, steps=steps, step_size=0.02)

    model.train()
    for epoch in range(10):
        for x, y in batches(train, 64, device, shuffle=epoch):
            with batchnorm_mode(model, "eval"):
                x_adv = attack(x, y, 5)
            opt.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            opt.step()
    model.eval()
    mixed = [(attack(x, y, 20), y) for x, y in batches(test, 360, device)]
    with full_precision(model):
        exact = [(attack(x, y, 20), y) for x, y in batches(test, 360, device)]
        a, b = robust_accuracy(model, mixed), robust_accuracy(model, exact)
    assert 20 < b < 90 and abs(a - b) < 0.6


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_a_recorded_attack_is_the_attack(norm, eps):
    """A CUDA graph of PGD draws the same start, uses the weights of the moment, and changes nothing else."""
    torch.manual_seed(0)
    model = place_model(build_model("resnet18", {"class": 10}, width=0.25), torch.device("cuda"), "off")
    x, y = torch.rand(32, 3, 32, 32, device="cuda"), torch.randint(0, 10, (32,), device="cuda")

    def attack(x, y):
        return pgd(lambda z: ce_per_image(model(z), y), x, eps=eps, norm=norm, steps=3)

    model.eval()
    recorded = cuda_graph(attack)
    for step in range(4):  # run as usual, recorded, replayed twice
        torch.manual_seed(step)
        with torch.no_grad():
            model.heads["class"].weight.normal_()
        state = torch.cuda.get_rng_state()
        expected = attack(x, y)
        torch.cuda.set_rng_state(state)
        difference = (recorded(x, y) - expected).abs()
        assert (difference < 1e-4).float().mean() > 0.99
        # linf: a sign may turn where the gradient is zero but for rounding
        assert norm == "linf" or difference.max() < 1e-3
        x = x.roll(1, 0)


def test_the_suite_is_that_of_a_cpu():
    """The same attacks on the same network: random starts differ, accuracies by 2 of 100 images at most."""
    train, test = load_data("digits", "", torch.device("cpu"), image_size=8)
    torch.manual_seed(0)
    model = place_model(build_model("resnet18", {"class": 10}, width=0.125), torch.device("cpu"), "off")
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(4):
        for x, y in batches(train, 64, torch.device("cpu"), shuffle=epoch):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    model.eval()
    x, y = next(batches(test, 360, torch.device("cpu")))
    x, y = x[:100], y[:100]
    attacks = [(name, min(n, 2), attack) for name, n, attack in suite_attacks("suite-fast", "l2", 0.3)]
    on_cpu = suite_accuracy(model, [(x, y)], attacks)
    model.to("cuda")
    on_gpu = suite_accuracy(model, [(x.cuda(), y.cuda())], attacks)
    assert on_cpu["none"] == on_gpu["none"] > 80 and on_cpu["square"] < on_cpu["none"] - 5
    assert all(abs(on_cpu[name] - on_gpu[name]) <= 2 for name in on_cpu), (on_cpu, on_gpu)
    for _, _, attack in attacks:
        x_adv = attack(model, x.cuda(), y.cuda(), 0)
        assert (project(x_adv, x.cuda(), 0.3, "l2") - x_adv).abs().max() < 1e-5


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_a_run_of_byorl(tmp_path, amp):
    args = byorl.Args.QUICK | dict(device="cuda", amp=amp, plain=False, epochs=6, out=str(tmp_path))
    rows = byorl.main(byorl.Args(**args, quick=True))["rows"]
    assert max(row["accuracy"] for row in rows) > 50  # chance: 10


def test_masks_are_those_of_a_cpu():
    seeds = adv_mae.image_seeds(3, torch.arange(50))
    assert torch.equal(image_uniform(seeds.cuda(), 196).cpu(), image_uniform(seeds, 196))


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_a_run_of_adv_mae(tmp_path, amp):
    args = adv_mae.Args.QUICK | dict(
        device="cuda", amp=amp, accumulate=2, plain=False, eval_eps=(0.25,), out=str(tmp_path)
    )
    rows = adv_mae.main(adv_mae.Args(**args))["rows"]
    assert rows[0]["accuracy"] > 60  # chance: 10; on a CPU 91


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_reversal(tmp_path, amp):
    """The quick run in less: losses of attacked images fall; attackers who go through it stay inside."""
    less = dict(epochs=4, branch_epochs=6, attacks=("pgd", "bpda", "unrolled"), adaptive_steps=2)
    quick = mtl_reverse.Args.QUICK | less | dict(device="cuda", amp=amp)
    results = mtl_reverse.main(mtl_reverse.Args(**quick, quick=True, out=str(tmp_path)))
    rows = [row for row in results["rows"] if row.get("kind") == "losses" and row["name"] == "mtl"]
    mean = {(row["task"], row["images"]): row["mean"] for row in rows}
    assert sum(mean[t, "reversed"] < mean[t, "attacked"] for t in mtl_reverse.TASKS) >= 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    check_batchnorm(tmp_path, "cuda")
    args = TINY | dict(device="cuda", width=0.25, epochs=6, val_fraction=0.15, out=tmp_path / "run")
    assert run_ranks(2, run_script, "rotation_at", flags(args)) == [0, 0]
    assert results(tmp_path / "run")[0][-1] > 50  # clean accuracy; chance: 10
