"""Section 1 of common.py, seen through rotation_at.py: flags, folders, kills, signals, several ranks, user mistakes."""
import ast
import inspect
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_origin

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, flags, replace, same_state

import adv_mae
import byorl
import chen_pretrain_finetune
import eval_cifar10c
import jigsaw_at
import mtl_reverse
import rotation_at
from common import UserError, batchnorm_mode, build_model, eps_name, load_checkpoint, number, overruled, parse_args, save_checkpoint, start_run
from rotation_at import Args, main


@dataclass
class Demo:
    eps: float = 8 / 255  # radius
    norm: Literal["linf", "l2"] = "linf"  # 100% the ball
    steps: int = 10  # steps
    flip: bool = True  # mirror
    out: str = ""  # folder
    resume: bool = False  # go on
    quick: bool = False  # miniature
    QUICK: ClassVar[dict] = dict(eps=0.1, steps=3)


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


def accuracies(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [(r["name"], r["eps"], r["accuracy"]) for r in rows]


def metrics(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]


# ---- arguments ----


def test_numbers():
    assert number("8/255") == 8 / 255 and number("0.5") == 0.5 and number("1e-4") == 1e-4
    for text in ("abc", "1/0", "", "nan", "inf", "__import__('os')"):
        with pytest.raises(ValueError):
            number(text)
    assert [eps_name(e) for e in (8 / 255, 0.5, 0, 1, 0.1, 0.2, 128 / 255)] == ["8/255", "0.5", "0", "1", "0.1", "0.2", "128/255"]


def test_flags_follow_the_dataclass():
    assert parse_args(Demo, []) == Demo()
    assert parse_args(Demo, ["--eps", "4/255", "--norm", "l2", "--no-flip"]) == Demo(eps=4 / 255, norm="l2", flip=False)
    assert parse_args(Demo, ["--quick"]) == Demo(eps=0.1, steps=3, quick=True)
    assert parse_args(Demo, ["--steps", "5", "--quick"]) == Demo(eps=0.1, steps=5, quick=True)  # explicit flags win


def test_resume_takes_the_saved_arguments(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"args": vars(Demo(steps=7, quick=True))}))
    given = ["--resume", "--out", str(tmp_path)]
    assert parse_args(Demo, given) == Demo(steps=7, quick=True, resume=True, out=str(tmp_path))
    assert parse_args(Demo, [*given, "--steps", "8"]).steps == 8  # start_run then refuses it


SCRIPTS = [rotation_at, jigsaw_at, byorl, chen_pretrain_finetune, adv_mae, mtl_reverse, eval_cifar10c]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_page_one_can_read(command, script):
    """Below the docstring every flag, with words, its default and what --quick makes of it, under the headings of Args."""
    code, out, _ = command(script, "--help")
    assert code == 0 and script.__doc__.splitlines()[0] in out and max(map(len, out.splitlines())) < 150
    page = out[out.index("\noptions:") :]
    told = dict(re.findall(r"^  --([a-z0-9-]+)\b(.*?)(?=^  -|^\S|\Z)", page, re.M | re.S))
    for f in fields(script.Args):
        if get_origin(f.type) is tuple:
            continue
        words = " ".join(told[f.name.replace("_", "-")].split())
        assert len(re.sub(r"\(default.*|\{.*?\}|--no-\S+", "", words).split()) >= 3, f.name
        shown = ("off", "on")[f.default] if f.type is bool else eps_name(f.default) if f.type is float else f.default
        assert shown == "" or f"default: {shown}" in words, (f.name, words)
        assert f.name not in script.Args.QUICK or "--quick: " in words
    headings = re.findall(r"^(\S.*):$", page, re.M)
    assert headings[0] == "options" and headings[1] == "run" and "evaluation" in headings and headings[2].startswith("data")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_read(script):
    """By the script or, for those that all scripts have, by common.py."""
    trees = [ast.parse((ROOT / f"{name}.py").read_text()) for name in (script.__name__, "common")]
    read = {ast.unparse(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    read = {text.split(".")[-1] for text in read if re.fullmatch(r"(\w+\.)*args\.\w+", text)}
    assert {f.name for f in fields(script.Args)} <= read | {"quick"}  # which parse_args reads


def flags_of(script):
    """{flag: (heading, type, comment)}, in order."""
    heading, found = "", {}
    for title, name, kind, comment in re.findall(r"^    (?:# (.*)|(\w+): (.*?) = .*?  # (.*))$", inspect.getsource(script.Args), re.M):
        heading = title or heading
        if name:
            found[name] = heading, kind, comment
    return found


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(SCRIPTS, 2)))
def test_the_same_flag_is_the_same_everywhere(a, b):
    """Flags of two scripts: of one type, with one meaning, and in one order below a heading."""
    one, other = flags_of(a), flags_of(b)
    assert one.keys() == {f.name for f in fields(a.Args)}  # each has a comment
    shared = [name for name in one if name in other]
    papers_own = {"arch", "norm", "stage", "method", "pretrain", "select", "eval_attack"}  # which choices there are
    for name in shared:
        if name not in papers_own:
            assert one[name][1] == other[name][1], name
    # What all runs have in common reads the same to the word, but for what is added after it.
    for name in ("device", "sync_bn", "resume", "data_mirror", "flip", "stem", "norm", "eps", "eval_attack", "eval_amp"):
        if name in shared:
            first, second = (re.split(r"[;(,]| in place| and in views| cell by", flags[name][2])[0].strip() for flags in (one, other))
            assert first == second, name
    for group in ("run", "data", "attack", "evaluation"):
        names = [[n for n in flags if n in shared and one[n][0].startswith(group) and other[n][0].startswith(group)] for flags in (one, other)]
        assert names[0] == names[1], group


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--eps", "abc"], "--eps.*abc"),
        (["--eps", "-1"], "--eps -1 must be at least 0"),
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--epochs", "1.5"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--label-fraction", "2"], "between"),
        (["--norm", "l1"], "--norm.*l1.*linf"),
        (["--variant", "T4"], "T4"),
        (["--epoch", "3"], "unrecognized.*--epoch"),
        (["--eval-eps", "0,x"], "list of numbers"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--pretrain", "l2", "--init", "x.pt"], "give one"),
        (["--norm", "l2"], "--eps 0.5"),
        (["--norm", "l2", "--quick"], "--eps"),
        (["--quick", "--batch-size", "2"], "at least 2 images per process"),
        (["--device", "meta"], "not supported"),
        (["--sync-bn", "--dataset", "folder", "--data-dir", "nowhere"], "nowhere.*--data-dir"),
        (["--init", "nowhere.pt"], "no checkpoint nowhere.pt"),
    ],
)  # fmt: skip
def test_wrong_flags(one_sentence, tmp_path, monkeypatch, argv, match):
    monkeypatch.chdir(tmp_path)
    assert re.search(match, one_sentence(rotation_at, *argv))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_in_vain(one_sentence, tmp_path):
    assert "no usable CUDA" in one_sentence(rotation_at, "--device", "cuda", "--out", tmp_path / "r")


def test_what_is_gone_or_foreign_is_told(one_sentence, reference, tmp_path):
    folder, _ = reference
    argv = flags(TINY | {"out": str(tmp_path / "run"), "epochs": 1})
    main(tiny(out=str(tmp_path / "run"), epochs=1))
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "best.pt").unlink()
    assert "best.pt, which this run had written, is gone" in one_sentence(rotation_at, *argv, "--resume")
    (tmp_path / "run" / "config.json").unlink()  # whose last.pt is it?
    assert "no config.json" in one_sentence(rotation_at, *argv, "--resume")
    assert "--eval-eps '0 8/255' is not a list" in one_sentence(rotation_at, "--eval-eps", "0 8/255")
    # A run's last state, and pre-training, are no classifiers.
    for script, *given in ((mtl_reverse, "--victim"), (chen_pretrain_finetune, "--stage", "compare"), (eval_cifar10c, "--generate")):
        assert "no finished classifier" in one_sentence(script, "--dataset", "digits", *given, folder / "last.pt", "--out", tmp_path / "other")
    assert "must lie beside this file" in one_sentence(eval_cifar10c, "--quick", "--dataset", "folder", "--data-dir", tmp_path)


def test_the_next_command_is_this_run_with_changes(tmp_path, monkeypatch):
    """It parses back to the same arguments, --quick included, in a folder whose name has a space."""
    monkeypatch.chdir(tmp_path)
    for args in (byorl.Args(eps=8 / 255, norm="linf", plain=True, width=1 / 3), byorl.Args(**byorl.Args.QUICK | {"quick": True, "plain": False, "lr": 0.1})):
        run = start_run(replace(args, out="my runs/a"))
        words = shlex.split(run.next_command(stage="probe", init=run.folder / "byorl.pt"))
        assert words[:2] == ["python", "byorl.py"] and "--out" not in words
        assert parse_args(byorl.Args, words[2:]) == replace(args, stage="probe", init="my runs/a/byorl.pt")
        assert run.next_command(stage="all").count("--stage") == 0  # the default


def test_what_a_checkpoint_overrules():
    args = byorl.Args(width=3.0, arch="resnet18", tau=0.9)
    assert overruled(args, {"width": 4.0, "arch": "resnet18", "tau": 0.996, "stem": "imagenet"}) == ["--width 3.0", "--tau 0.9"]


# ---- folders ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run that nothing disturbed: (folder, what main returned)."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, main(tiny(out=str(folder)))


def test_a_run_leaves_what_the_design_says(reference):
    folder, results = reference
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "results.json", "adversarial.png"}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"script", "args", "device", "torch", "seconds", "rows"} == results.keys()
    for row in results["rows"]:
        assert {"name", "attack", "norm", "eps", "examples", "accuracy", "paper"} <= row.keys()
        assert 0 <= row["accuracy"] <= 100 and row["examples"] == 50 and row["paper"] is None
    assert [r["attack"] for r in results["rows"]] == ["none", "pgd-2"]
    assert len(metrics(folder)) == 2
    load_checkpoint(folder / "last.pt"), load_checkpoint(folder / "best.pt")


def test_names_are_never_reused(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        main(tiny(epochs=1))
    names = ["rotation_at-T3-linf-0.1-s0", "rotation_at-T3-linf-0.1-s0-2", "rotation_at-T3-linf-0.1-s0-3"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == names
    # --resume without --out: the newest run with the same arguments, or a new one
    main(tiny(epochs=1, resume=True))
    assert len(list((tmp_path / "runs").iterdir())) == 3
    main(tiny(epochs=1, resume=True, variant="T1"))
    assert (tmp_path / "runs" / "rotation_at-T1-linf-0.1-s0").exists()


def test_a_run_is_not_overwritten(one_sentence, command, reference):
    folder, _ = reference
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    args = flags(TINY | {"out": folder})
    assert "already holds a run" in one_sentence(rotation_at, *args)
    assert "--lr 0.5 (the run has 0.02)" in one_sentence(rotation_at, *flags(TINY | {"out": folder, "lr": 0.5}), "--resume")
    assert "--variant T1 (the run has T3)" in one_sentence(rotation_at, "--resume", "--out", folder, "--variant", "T1")
    code, out, _ = command(rotation_at, "--resume", "--out", folder)  # finished: shows its table again
    assert code == 0 and "linf eps" in out
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_of_something_else_is_left_alone(one_sentence, tmp_path, reference):
    """Another script's run, and results without a run."""
    folder, _ = reference
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "is a run of rotation_at.py, not of jigsaw_at.py" in one_sentence(jigsaw_at, "--resume", "--out", folder)
    assert "is a run of rotation_at.py" in one_sentence(jigsaw_at, *flags(TINY | {"out": folder}))
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "results.json").write_bytes(before["results.json"])
    for more in ([], ["--resume"]):
        assert "holds results but no config.json" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path}), *more)


def test_names_with_brackets_are_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        start_run(tiny(resume=True), name="run[1]").begin()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run[1]"]


def test_output_that_cannot_be_written(one_sentence, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot make the run's folder" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path / "file" / "run"}))
    if os.path.isdir("/proc/self"):  # read-only even for root
        assert "cannot make the run's folder" in one_sentence(rotation_at, *flags(TINY | {"out": "/proc/self/run"}))


def test_a_full_disk_loses_nothing(one_sentence, tmp_path):
    """A limit on file sizes stands in for the full disk: writing fails in the same place, half-way."""
    save_checkpoint(tmp_path / "last.pt", {"network": {}, "model": {"w": torch.ones(3)}})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises(UserError, match="could not write .*last.pt.*intact"):
            save_checkpoint(tmp_path / "last.pt", {"network": {}, "model": {"w": torch.ones(100_000)}})
        assert "could not write" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path / "run", "epochs": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.glob("*.tmp")] == [] and not (tmp_path / "run" / "results.json").exists()


# ---- checkpoints that will not do ----


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/rotation_at_was_here",))


def test_bad_checkpoints(one_sentence, tmp_path, reference):
    folder, _ = reference
    whole = (folder / "best.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "foreign.pt")
    torch.save({"network": {}, "model": {}, "x": Evil()}, tmp_path / "evil.pt")
    state = load_checkpoint(folder / "best.pt")
    torch.save(state | {"model": {"w": torch.ones(1)}}, tmp_path / "headless.pt")

    def init(path, **more):
        return one_sentence(rotation_at, *flags(TINY | {"init": path, "out": tmp_path / "r", "resume": True} | more))

    for name in ("truncated", "empty", "text", "evil"):
        assert "truncated, or no checkpoint that loads safely" in init(tmp_path / f"{name}.pt")
    assert not os.path.exists("/tmp/rotation_at_was_here")
    assert "some other program" in init(tmp_path / "foreign.pt")
    assert "is a folder" in init(folder)
    assert "another architecture" in init(tmp_path / "headless.pt")
    assert not (tmp_path / "r").exists()  # a run that could not begin leaves no folder
    assert "another architecture" in init(folder / "best.pt", width=1 / 8)
    weights, network = state["model"], state["network"]
    for odd in ({"args": "x"}, {"network": network | {"heads": "class"}}, {"network": network | {"heads": {"class": "ten"}}}, {"model": weights | {"mean": [0.5]}}):
        torch.save(state | odd, tmp_path / "odd.pt")
        assert "not what these scripts write" in init(tmp_path / "odd.pt")
    nan = {k: v * math.nan if k == "trunk.conv1.weight" else v for k, v in weights.items()}
    torch.save(state | {"model": nan}, tmp_path / "nan.pt")
    assert "weights that are NaN" in init(tmp_path / "nan.pt")
    # The run's own last.pt, damaged or from elsewhere
    run = tmp_path / "run"
    main(tiny(out=str(run), epochs=1))
    (run / "results.json").unlink()
    for content in (whole[:1000], whole):
        (run / "last.pt").write_bytes(content)
        assert "last.pt" in one_sentence(rotation_at, "--resume", "--out", run)


# ---- NaN ----


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(one_sentence, tmp_path):
    message = one_sentence(rotation_at, *flags(TINY | {"lr": 1e12, "epochs": 3, "out": tmp_path}))
    assert "NaN or infinite in epoch 1" in message and "step" in message
    assert not (tmp_path / "results.json").exists()


def test_nan_weights_are_never_saved(tmp_path):
    run = start_run(tiny(out=str(tmp_path)))
    good = {"network": {}, "model": {"w": torch.ones(2), "n": torch.tensor(3)}}
    run.save("last.pt", good)
    with pytest.raises(UserError, match="last.pt was not written"):
        run.save("last.pt", {"network": {}, "model": {"w": torch.tensor([1.0, float("nan")])}})
    assert torch.equal(run.load("last.pt")["model"]["w"], torch.ones(2))
    with pytest.raises(UserError, match="no 'optimizer' entry"):
        run.load("last.pt", "optimizer")


# ---- kills and signals ----

ATTACK = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, signal, torch, common, rotation_at\n"
AT_STEP = """
count, update = 0, common.Epoch.update
def patched(self, *a, **k):
    global count
    update(self, *a, **k)
    count += 1
    if count == %d:
        os.kill(os.getpid(), signal.%s)
common.Epoch.update = patched
"""
IN_WRITE = """
count, save = 0, torch.save
def patched(state, f):
    global count
    count += 1
    if count == %d:
        import io
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, f)
torch.save = patched
"""


def disturbed(folder, patch: str, **changes) -> subprocess.CompletedProcess:
    code = ATTACK + patch + "\ncommon.cli(rotation_at.main, rotation_at.Args)"
    return subprocess.run(
        [sys.executable, "-c", code, *flags(TINY | {"out": folder} | changes)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "patch",
    [AT_STEP % (2, "SIGKILL"), AT_STEP % (5, "SIGKILL"), IN_WRITE % 2, IN_WRITE % 3],
    ids=["in epoch 1", "in epoch 2", "writing last.pt", "writing the second checkpoint"],
)
def test_killed_and_resumed_is_uninterrupted(tmp_path, reference, patch):
    folder, _ = reference
    killed = disturbed(tmp_path, patch)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "results.json").exists()
    main(tiny(out=str(tmp_path), resume=True))
    assert accuracies(tmp_path) == accuracies(folder) and metrics(tmp_path) == metrics(folder)
    for name in ("last.pt", "best.pt"):
        assert same_state(load_checkpoint(tmp_path / name)["model"], load_checkpoint(folder / name)["model"])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "code", "step"), [("SIGINT", 130, 5), ("SIGTERM", 143, 5), ("SIGINT", 130, 3)]
)  # 3 steps an epoch: in epoch 2, and after the last step of epoch 1
def test_signals_save_and_say_how_to_resume(tmp_path, reference, name, code, step):
    folder, _ = reference
    stopped = disturbed(tmp_path, AT_STEP % (step, name))
    assert stopped.returncode == code and "Traceback" not in stopped.stderr
    assert f"python rotation_at.py --resume --out {tmp_path}" in stopped.stderr and "interrupted (saved epoch" in stopped.stderr
    state = load_checkpoint(tmp_path / "last.pt")
    assert (state["epoch"], state["step"]) == ((1, 2) if step == 5 else (0, 3))  # in mid-epoch
    main(parse_args(Args, ["--resume", "--out", str(tmp_path)]))
    assert accuracies(tmp_path) == accuracies(folder) and metrics(tmp_path) == metrics(folder)
    assert same_state(load_checkpoint(tmp_path / "last.pt")["model"], load_checkpoint(folder / "last.pt")["model"])


def test_stages_resume_too(tmp_path):
    more = dict(pretrain="l2", pretrain_epochs=1, plain=True, epochs=1, variant="T0")
    main(tiny(out=str(tmp_path / "a"), **more))
    for step in (2, 5, 8):  # in plain, in pretrain, in train: 3 steps an epoch
        folder = tmp_path / str(step)
        assert disturbed(folder, AT_STEP % (step, "SIGKILL"), **more).returncode == -signal.SIGKILL
        main(tiny(out=str(folder), resume=True, **more))
        assert accuracies(folder) == accuracies(tmp_path / "a") and metrics(folder) == metrics(tmp_path / "a")
        a, b = (load_checkpoint(f / "best.pt")["model"] for f in (folder, tmp_path / "a"))
        assert same_state(a, b)


def test_interrupted_before_it_began_leaves_nothing(tmp_path):
    """During loading there is nothing to resume: no hint that would start another run, no empty folder."""
    patch = "common.load_data = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)"
    stopped = disturbed(tmp_path / "run", patch)
    assert stopped.returncode == 130 and "--resume" not in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "run").exists()


# ---- several ranks ----


def torchrun(*argv, code: str | None = None, cwd) -> subprocess.CompletedProcess:
    script = str(ROOT / "rotation_at.py")
    if code is not None:
        script = str(cwd / "patched.py")
        (cwd / "patched.py").write_text(code)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *map(str, argv)],
        capture_output=True, text=True, timeout=240, cwd=cwd,
    )  # fmt: skip


def test_two_ranks_agree_with_one(tmp_path, monkeypatch):
    """Two updates on the same images without random draws: the same mean loss. (Training is chaotic: after ten steps a change
    of the weights by a millionth has become one of the loss by a tenth, so more steps could not be compared closely.)"""
    same = "\nrotation_at.random_crop_flip = lambda x, **k: x"
    monkeypatch.setattr(rotation_at, "random_crop_flip", lambda x, **k: x)
    args = TINY | dict(variant="T0", eps=0.0, eval_eps="0", label_fraction=128 / 1437, epochs=1, eval_examples=0)
    two = torchrun(*flags(args), "--out", "run", code=ATTACK + same + "\ncommon.cli(rotation_at.main, rotation_at.Args)", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("test images under") == 1  # only rank 0 speaks
    main(Args(**args | {"out": str(tmp_path / "one")}))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    (a,), (b,) = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_two_ranks_evaluate_every_image_once(tmp_path):
    """The same checkpoint is evaluated to the same clean accuracy by any number of ranks."""
    assert torchrun(*flags(TINY | dict(epochs=1, eval_examples=0, out="run")), cwd=tmp_path).returncode == 0
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    one = main(parse_args(Args, ["--resume", "--out", str(tmp_path / "run")]))  # the evaluation alone
    assert one["rows"][0]["accuracy"] == two["rows"][0]["accuracy"]
    for row in two["rows"]:
        hits = row["accuracy"] * 3.6  # a whole number of 360 (rounded to 0.01%)
        assert row["examples"] == 360 and abs(hits - round(hits)) < 0.02


BATCHNORM = """
import torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
model = common.build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet").train()
x, y = torch.rand(2, 7, 3, 32, 32), torch.arange(14).view(2, 7) % 10
ddp = common.distribute(model)
delta = x[dist.get_rank()].clone().requires_grad_()
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(ddp(delta), y[dist.get_rank()])
    loss.backward()
with common.batchnorm_mode(model, "train"), torch.no_grad():
    in_train_mode = model(delta)  # must leave the running statistics alone
grads = {k: p.grad for k, p in model.named_parameters()}
torch.save([loss.detach(), delta.grad, grads, model.state_dict(), in_train_mode], f"{dist.get_rank()}.pt")
"""


def test_batchnorm_sees_the_images_of_all_ranks(tmp_path):
    """Loss, gradients (of weights and images) and running statistics of two ranks are those of one with the whole batch."""
    out = torchrun(code=ATTACK + BATCHNORM, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    torch.manual_seed(0)
    model = build_model("resnet18", {"class": 10}, width=1 / 16, stem="imagenet").train()
    x, y = torch.rand(2, 7, 3, 32, 32).flatten(0, 1).requires_grad_(), torch.arange(14) % 10
    for _ in range(2):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    close = dict(rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss.detach(), **close)
    # Each rank minimises the mean over its half, so the gradient for an image is twice that of the mean over the batch.
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / 2, x.grad, **close)
    with torch.no_grad(), batchnorm_mode(model, "train"):
        whole = model(x)
    torch.testing.assert_close(torch.cat([r[4] for r in ranks]), whole, **close)
    for _, _, its_grads, state, _ in ranks:
        torch.testing.assert_close(its_grads, grads, **close)
        torch.testing.assert_close(state, dict(model.state_dict()), **close)


ENSEMBLE = """
import torch.distributed as dist
import chen_pretrain_finetune as chen
def objective():
    torch.manual_seed(0)
    args = chen.Args(task="ensemble", arch="resnet26v2", width=1 / 32, num_permutations=5)
    model = common.Network(chen.Pretext(chen.TASKS, args), {}, (0.5,) * 3, (0.5,) * 3).train()
    for m in model.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.MultiheadAttention)):
            m.p = m.dropout = 0.0
    common.fast_second_derivatives(model)
    return chen.Objective(model, common.jigsaw_permutations(4, 5), args)
x, order, k, j = torch.rand(12, 3, 16, 16), torch.randperm(16), torch.arange(12) % 4, torch.arange(12) % 6
def views(part):
    views = {"selfie": (x[part], order), "rotation": (common.rotate(x, k)[part], k[part])}
    return views | {"jigsaw": (common.jigsaw(x, common.jigsaw_permutations(4, 5)[j])[part], j[part])}
def gradients(one, ddp, part):
    with common.batchnorm_mode(one.model, "train"), common.input_gradients_only(one.model):
        found = {"images": one.image_gradient(views(part))}
    loss = ddp(views(part), views(part), True)
    loss.backward()
    found |= {"loss": loss.detach()} | {f"joint {n}": p.grad.clone() for n, p in one.named_parameters()}
    one.zero_grad()
    found |= {"low": one.backward(views(part), views(part))} | {f"low {n}": p.grad for n, p in one.named_parameters()}
    return found | {n: b for n, b in one.named_buffers() if "running" in n}
"""
ENSEMBLE_RANKS = """
dist.init_process_group("gloo")
rank = dist.get_rank()
one = objective()
torch.save(gradients(one, common.distribute(one), slice(6 * rank, 6 * rank + 6)), f"{rank}.pt")
"""


def test_two_ranks_of_the_ensemble_agree_with_one(tmp_path):
    """Second derivatives pass through BatchNorm over both ranks, jointly and one task at a time (chen_pretrain_finetune.py)."""
    head = ATTACK + "torch.manual_seed(1)\n" + ENSEMBLE
    out = torchrun(code=head + ENSEMBLE_RANKS, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    names: dict = {}
    exec(head + "one = objective(); whole = gradients(one, one, slice(12))", names)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    want = names["whole"]
    assert torch.allclose(torch.cat([r["images"] for r in ranks]), want["images"], rtol=1e-3, atol=1e-3 * want["images"].abs().max().item())
    largest = max(v.abs().max().item() for key, v in want.items() if key.startswith("joint"))
    for key in want.keys() - {"images", "loss", "low"}:  # some gradients are 0, as BatchNorm undoes a scale or shift
        assert all(torch.allclose(r[key], want[key], rtol=2e-3, atol=2e-4 * largest) for r in ranks), key
    for key in ("loss", "low"):
        assert sum(r[key] for r in ranks).item() / 2 == pytest.approx(want[key].item(), rel=1e-4)
    assert want["low"].item() == pytest.approx(want["loss"].item(), rel=1e-4)


def test_two_ranks_run_every_script(tmp_path):
    """Pre-training with a target network and heads (byorl.py), and an evaluation of a head (eval_cifar10c.py)."""
    argv = dict(
        dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=1, warmup_epochs=0, eps=0.5, attack_steps=1,
        hidden=16, projection=8, label_fractions="1", probe_epochs=1, probe_steps=1, eval_attack="pgd20", eval_steps=1, eval_examples=60,
        amp="off", out="run",
    )  # fmt: skip
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, %s as s; common.cli(s.main, s.Args)"
    done = torchrun(*flags(argv), code=run % "byorl", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("encoder, head") == 1, done.stderr
    argv = ["--generate", "--dataset", "digits", "--corruptions", "fog", "--severities", "1", "--eval-steps", "1", "--eval-examples", "51"]
    done = torchrun("run/byorl-plain-100%.pt", *argv, "--out", "eval", code=run % "eval_cifar10c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    assert [r["examples"] for r in rows[:2]] == [360, 51]


def test_two_ranks_stop_together_and_resume_exactly(tmp_path):
    """SIGTERM on one rank only: both stop after the same step, rank 0 saves, and the run ends as if nothing had happened."""
    whole = ATTACK + "common.cli(rotation_at.main, rotation_at.Args)"
    code = ATTACK + "if os.environ['RANK'] == '1':\n    " + (AT_STEP % (12, "SIGTERM")).strip().replace("\n", "\n    ")
    code += "\ncommon.cli(rotation_at.main, rotation_at.Args)"
    more = flags(TINY | dict(label_fraction=610 / 1437, epochs=3))
    stopped = torchrun(*more, "--out", "run", code=code, cwd=tmp_path)
    assert stopped.returncode != 0 and "saved epoch 2, step 10" in stopped.stderr
    assert "go on with: torchrun --nproc-per-node=2 rotation_at.py --resume --out run" in stopped.stderr
    assert torchrun(*more, "--out", "run", "--resume", code=whole, cwd=tmp_path).returncode == 0
    assert torchrun(*more, "--out", "undisturbed", code=whole, cwd=tmp_path).returncode == 0
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "undisturbed"))
    assert same_state(a, b)
    assert accuracies(tmp_path / "run") == accuracies(tmp_path / "undisturbed")
    for got, want in zip(metrics(tmp_path / "run"), metrics(tmp_path / "undisturbed"), strict=True):
        assert got == pytest.approx(want)  # the means of the epoch: up to the order of summation


def test_a_dead_rank_ends_the_run(tmp_path):
    code = ATTACK + "if os.environ['RANK'] == '1':\n    " + (AT_STEP % (4, "SIGKILL")).strip().replace("\n", "\n    ")
    begin = time.monotonic()
    dead = torchrun(*flags(TINY | {"out": "run", "epochs": 500}), code=code + "\ncommon.cli(rotation_at.main, rotation_at.Args)", cwd=tmp_path)
    assert dead.returncode != 0 and time.monotonic() - begin < 90
    assert not (tmp_path / "run" / "results.json").exists()


# ---- housekeeping ----


def test_nothing_happens_at_import(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common, rotation_at, torch; print(torch.cuda.is_initialized())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert out.stdout.strip() == "False" and list(tmp_path.iterdir()) == []


def test_scripts_run_without_the_optional_packages(tmp_path):
    block = "import sys\nfor m in ('tqdm', 'matplotlib', 'sklearn'): sys.modules[m] = None\n"
    out = disturbed(tmp_path / "run", "", epochs=1)
    assert out.returncode == 0
    code = block + ATTACK + "common.cli(rotation_at.main, rotation_at.Args)"
    argv = [sys.executable, "-c", code, *flags(TINY | {"out": tmp_path / "bare", "epochs": 1})]
    assert subprocess.run(argv, capture_output=True, timeout=120).returncode == 0
    assert accuracies(tmp_path / "bare") == accuracies(tmp_path / "run")


def test_main_can_be_called_from_python(tmp_path):
    """From a notebook: no flags, a plain exception for a mistake, and the handlers of signals left alone."""
    before = signal.getsignal(signal.SIGINT)
    assert main(tiny(epochs=1, out=str(tmp_path / "run")))["rows"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError, match="--epochs"):
        main(replace(tiny(), epochs=0))
