"""Several ranks and machines: the same rows as one rank, whatever dies, whoever goes on."""
import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, TINY_BYORL, flags, metrics, run_ranks, run_script

import common
import rotation_at
from common import load_checkpoint

# {script: (flags of a run of a second on `pictures`, the event at which a process is killed)}. Attacks in the
# l2 ball follow the gradient; its signs could flip where it is zero but for rounding.
TINY_AT = TINY | dict(norm="l2", eps=0.5, step_size=0.5, eval_eps=(0.0, 0.5), eval_examples=0)
TINY_AT |= dict(val_fraction=0.2)
RUNS = {
    "rotation_at": (TINY_AT, ("step", 3)), "jigsaw_at": (TINY_AT, ("step", 3)),
    "byorl": (TINY_BYORL | dict(lr=0.01, eval_examples=0), ("step", 5)),
    "chen_pretrain_finetune": (dict(
        flip=False, arch="resnet26v2", width=1 / 16, epochs=1, lr=0.01, warmup_steps=0, pretrain_epochs=1,
        norm="l2", eps=0.5, attack_steps=1, eval_steps=1, val_fraction=0.2, amp="off", device="cpu",
    ), ("step", 4)),
    "adv_mae": (dict(
        flip=False, arch="vit_mini4", width=0.5, amp="off", device="cpu", pretrain_epochs=1,
        pretrain_batch_size=16, decoder_width=16, decoder_depth=1, decoder_heads=2, recipe="adamw", epochs=1,
        layer_decay=(0.75,), regularise=False, eval_eps=(0.25,), eval_steps=1,
    ), ("step", 4)),
    "mtl_reverse": (dict(
        flip=False, arch="preact18", width=1 / 16, epochs=1, lr=0.01, norm="l2", eps=0.5, attack_steps=1,
        eval_steps=1, branch_epochs=1, branch_batch_size=16, branch_lr=0.01, head_batch_size=18,
        branch_width=1 / 16, reverse_steps=2, views=2, bank=8, attacks="pgd", eval_batch_size=16,
        amp="off", device="cpu",
    ), ("step", 4)),
    "eval_cifar10c": (dict(
        generate=True, severities="1,5", corruptions="contrast", eval_steps=2, device="cpu",
    ), ("rows.json", 2)),
    "eval_unforeseen": (dict(unforeseen="l2,fog", unforeseen_steps=2, device="cpu"), ("rows.json", 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_ranks_computes_the_same(tmp_path, pictures, name):
    """One rank in one go (A-MAE with --accumulate 3); two, of which one is killed; four that go on. Without
    random draws losses differ by rounding (one CPU's BatchNorm is exact to 1e-5, which grows), accuracies by
    one image."""
    args, event = RUNS[name]
    argv = [*flags(args | pictures), "--resume"]
    if "eval" in name:
        rotation_at.main(rotation_at.Args(**TINY_AT | pictures, out=str(tmp_path / "network")))
        argv.append(tmp_path / "network" / "best.pt")

    def run(ranks, out, *more, event=()):
        return run_ranks(ranks, run_script, name, [*argv, *more, "--out", tmp_path / out], False, *event)

    assert run(1, "whole", *(["--accumulate", 3] if name == "adv_mae" else [])) == [0]
    began = time.monotonic()
    assert sorted(run(2, "run", event=event)) == [-signal.SIGKILL, 1] and time.monotonic() - began < 60
    assert run(4, "run") == [0, 0, 0, 0]
    whole, again = ([*metrics(tmp_path / out), *rows(tmp_path / out)] for out in ("whole", "run"))
    for one, four in zip(whole, again, strict=True):
        for key in one.keys() - {"checkpoint", "correct", "values"}:
            is_loss = "loss" in key or one.get("kind") == "losses"  # else an accuracy, of 8 or 40 images
            noise = dict(rel=0.005) if is_loss else dict(abs=101 / (8 if "val" in key else 40))
            want = pytest.approx(one[key], **noise) if isinstance(one[key], float) else one[key]
            assert four[key] == want, (key, one, four)


def rows(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def two_machines(folders, argv, event=()):
    """What two torchruns of rotation_at.py, one in each folder, print to stderr. They must fail."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from conftest import run_script; "
    code += f"run_script('rotation_at', {argv!r}, True, *{event!r})"
    started = []
    for folder in folders:
        (folder / "run.py").write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", "run.py"]
        started.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=60)[1] for process in started]
    assert all(process.returncode for process in started)
    return told


def test_two_machines(tmp_path):
    """A disk that both see is needed. If one process dies, both torchruns end within a minute."""
    a, b = (tmp_path / name for name in "ab")
    a.mkdir(), b.mkdir()
    argv = flags(TINY | dict(variant="T0", out="run"))
    for told in two_machines([a, b], argv):
        assert "error: not every machine sees run: --out must be on a shared disk." in told
    two_machines([a, a], [*argv, "--resume"], ("step", 6))
    assert load_checkpoint(a / "run" / "last.pt")["epoch"] == 1


def derivatives(folder, ranks, kind):
    """Save what this rank finds with its share of 14 images, for a loss with second derivatives."""
    device = common.choose_device(kind)
    if ranks > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, x, y = common.world()[0], torch.arange(14 * 192) % 97 / 97, torch.arange(14) % 10
    x, y = (v.tensor_split(ranks)[rank].to(device) for v in (x.view(14, 3, 8, 8), y))
    torch.manual_seed(0)
    model = common.build_model("resnet18", {"class": 10}, width=1 / 16).to(device).train()
    x.requires_grad_()
    common.sync_batchnorm(model)
    loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    loss = (loss + gradient.square().flatten(1).sum(1)).mean() / ranks
    loss.backward()
    summed = {k: p.grad for k, p in model.named_parameters()} | {"loss": loss.detach()}
    with common.batchnorm_mode(model, "train"), torch.no_grad():
        joined = {"images": x.grad, "output": model(x)}  # as under attack
    torch.save((summed, joined, dict(model.named_buffers())), folder / f"{rank} of {ranks}")


def check_batchnorm(folder, device):
    """Output, loss, derivatives and running statistics on two ranks are those on one with the whole batch."""
    assert run_ranks(2, derivatives, folder, 2, device) == [0, 0]
    derivatives(folder, 1, device)
    options = dict(weights_only=True, map_location="cpu")
    a, b, one = (torch.load(folder / name, **options) for name in ("0 of 2", "1 of 2", "0 of 1"))
    found = {k: a[0][k] + b[0][k] for k in a[0]} | {k: torch.cat([a[1][k], b[1][k]]) for k in a[1]} | a[2]
    for name, want in (one[0] | one[1] | one[2]).items():
        assert (found[name] - want).float().norm() <= 1e-3 * want.float().norm(), name


def test_batchnorm_sees_the_images_of_all_ranks(tmp_path):
    check_batchnorm(tmp_path, "cpu")
