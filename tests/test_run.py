"""Section 1 of common.py: flags, folders, kills, several ranks, users' mistakes; seen through the scripts."""
import ast
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, flags, replace, same_state
from PIL import Image

import adv_mae
import byorl
import chen_pretrain_finetune
import common
import eval_cifar10c
import eval_unforeseen
import jigsaw_at
import mtl_reverse
import rotation_at
from common import (
    Images, Positive, Run, Share, UserError, batchnorm_mode, build_model, eps_name, load_checkpoint, load_model, number, numbers,
    parse_args, save_checkpoint,
)  # fmt: skip
from rotation_at import Args, main

CPU = torch.device("cpu")
TRAINING = [rotation_at, jigsaw_at, byorl, chen_pretrain_finetune, adv_mae, mtl_reverse]
SCRIPTS = [*TRAINING, eval_cifar10c, eval_unforeseen]
# A run of byorl.py of a few seconds.
TINY_BYORL = dict(
    dataset="digits", image_size=8, flip=False, arch="preact18", width=1 / 16, epochs=2, warmup_epochs=0, eps=0.5, attack_steps=1,
    hidden=16, projection=8, label_fractions=(1.0,), probe_epochs=1, probe_steps=1, eval_attack="pgd20", eval_steps=1, eval_examples=60,
    amp="off",
)  # fmt: skip


@dataclass
class Demo:
    # ball
    eps: float = 8 / 255  # radius
    norm: Literal["linf", "l2"] = "linf"  # 100% the ball
    radii: tuple[float, ...] = ()  # more radii
    # run
    steps: Positive = 10  # steps
    share: Share = 0.5  # share
    seed: int = 0  # seed
    flip: bool = True  # mirror
    quick: bool = False  # miniature
    QUICK: ClassVar[dict] = dict(eps=0.1, steps=3)


def tiny(**changes) -> Args:
    return Args(**(TINY | changes))


def accuracies(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [(r["name"], r["attack"], r["eps"], r["accuracy"]) for r in rows]


def metrics(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s", "waiting")} for line in lines]


# ---- flags ----


def test_numbers():
    assert number("8/255") == 8 / 255 and number("0.5") == 0.5 and number("1e-4") == 1e-4
    assert number("1.25/255") == 1.25 / 255 and number("0.5/2.5") == 0.2
    for text in ("abc", "1/0", "1/2/3", "", "nan", "inf", "-1", "__import__('os')"):
        with pytest.raises(ValueError):
            number(text)
    assert numbers("0, 4/255,8/255") == (0, 4 / 255, 8 / 255) and numbers("") == ()
    assert [eps_name(e) for e in (8 / 255, 0.5, 0, 1, 0.1, 0.2, 128 / 255)] == ["8/255", "0.5", "0", "1", "0.1", "0.2", "128/255"]


def test_flags_follow_the_dataclass(capsys):
    assert parse_args(Demo, []) == Demo()
    assert parse_args(Demo, ["--eps", "4/255", "--norm", "l2", "--no-flip"]) == Demo(eps=4 / 255, norm="l2", flip=False)
    assert parse_args(Demo, ["--quick"]) == Demo(eps=0.1, steps=3, quick=True)
    assert parse_args(Demo, ["--steps", "5", "--quick", "--radii", "0,1/2"]) == Demo(eps=0.1, steps=5, quick=True, radii=(0, 0.5))
    for wrong in ("--eps -1", "--steps 0", "--steps 1.5", "--share 1.5", "--seed -1", "--norm l1", "--radii 0,x", "--ste 3", "--epochs 3"):
        with pytest.raises(SystemExit) as stop:
            parse_args(Demo, wrong.split())
        told = capsys.readouterr().err
        assert stop.value.code == 2 and told.count("\n") == 1 and wrong.split()[0] in told


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_page_one_can_read(command, script):
    """Below the docstring every flag, with words, its default and what --quick makes of it, under the headings of Args."""
    code, out, _ = command(script, "--help")
    assert code == 0 and script.__doc__.splitlines()[0] in out and max(map(len, out.splitlines())) < 150
    page = out[out.index("\noptions:") :]
    told = dict(re.findall(r"^  --([a-z0-9-]+)\b(.*?)(?=^  -|^\S|\Z)", page, re.M | re.S))
    for f in fields(script.Args):
        if f.type == tuple[str, ...]:
            continue
        words = " ".join(told[f.name.replace("_", "-")].split())
        assert len(re.sub(r"\(default.*|\{.*?\}|--no-\S+", "", words).split()) >= 2, f.name
        assert f.default in ("", ()) or f"default: {common._shown(f.default)}" in words, (f.name, words)
        assert f.name not in script.Args.QUICK or "--quick: " in words
    headings = re.findall(r"^(\S.*):$", page, re.M)
    assert headings[0] == "options" and {"run", "evaluation"} <= set(headings) and len(set(headings)) == len(headings)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_is_read(script):
    """By the script or, for those that all scripts have, by common.py."""
    trees = [ast.parse((ROOT / f"{name}.py").read_text()) for name in (script.__name__, "common")]
    read = {ast.unparse(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    read = {text.split(".")[-1] for text in read if re.fullmatch(r"(\w+\.)*args\.\w+", text)}
    assert {f.name for f in fields(script.Args)} <= read


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(SCRIPTS, 2)))
def test_the_same_flag_is_of_one_type_everywhere(a, b):
    one, other = ({f.name: f.type for f in fields(script.Args)} for script in (a, b))
    choices = {"arch", "norm", "stage", "method", "pretrain", "select", "eval_attack"}  # each paper's own
    for name in (one.keys() & other.keys()) - choices - {"eval_eps"}:
        kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in (one[name], other[name])]
        assert kinds[0] == kinds[1], name


WRONG = [  # (scripts, flags, what is told)
    (SCRIPTS[:7], "--eps abc", "--eps.*abc"),
    (SCRIPTS[:7], "--eps -1", "--eps"),
    (SCRIPTS[:6], "--norm linf --eps 8", r"--eps 8: .* such as 8/255"),
    (SCRIPTS[:4], "--norm l2 --eps 128", r"--eps 128: .* such as 0\.5"),
    (SCRIPTS[:2], "--step-size 2", r"--step-size 2: .* such as 8/255"),
    (SCRIPTS[:7], "--norm l1", "--norm.*l1.*linf"),
    (SCRIPTS[:6], "--device gpu", "--device gpu cannot be used"),
    (SCRIPTS, "--epoch 3", "unrecognized.*--epoch"),
    (SCRIPTS[:6], "--epochs 0", "--epochs"),
    (SCRIPTS[:6], "--dataset folder --data-dir nowhere", "nowhere"),
    (SCRIPTS[:2], "--eval-eps 0,4,8", r"--eval-eps 8: .* 8/255"),
    (SCRIPTS[:2], "--norm l2 --quick", r"--norm l2 needs a radius of its own.*--eps 0\.5"),
    (SCRIPTS[:2], "--eval-eps 0,x", "--eval-eps.*0,x"),
    (SCRIPTS[:2], "--variant T4", "T4"),
    (SCRIPTS[:2], "--dataset digits --val-fraction 0", "--select last"),
    (SCRIPTS[:2], "--pretrain l2 --init x.pt", "give one"),
    (SCRIPTS[:2], "--init nowhere.pt", "there is no nowhere.pt"),
    (SCRIPTS[:2], "--dataset digits --val-fraction 1.0", "too few"),
    (SCRIPTS[:2], "--quick --batch-size 1", "at least 2 images per rank"),
]


@pytest.mark.parametrize(("scripts", "argv", "told"), WRONG, ids=[argv for _, argv, _ in WRONG])
def test_wrong_flags(one_sentence, tmp_path, monkeypatch, scripts, argv, told):
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        assert re.search(told, one_sentence(script, *argv.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_in_vain(one_sentence, tmp_path):
    assert "--device cuda cannot be used" in one_sentence(rotation_at, "--device", "cuda", "--out", tmp_path / "r")


# ---- folders ----


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A finished run that nothing disturbed: (folder, what main returned)."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    return folder, main(tiny(out=str(folder)))


def test_a_run_leaves_what_the_readme_says(reference):
    folder, results = reference
    names = {p.name for p in folder.iterdir()}
    assert names == {".lock", "config.json", "metrics.jsonl", "last.pt", "best.pt", "results.json", "adversarial.png"}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"script", "args", "device", "torch", "seconds", "rows"} == results.keys()
    for row in results["rows"]:
        assert {"name", "attack", "norm", "eps", "examples", "accuracy", "epoch"} <= row.keys()
        assert 0 <= row["accuracy"] <= 100 and row["examples"] == 50
    assert [r["attack"] for r in results["rows"]] == ["none", "pgd-2"]
    assert [(line["stage"], line["epoch"]) for line in metrics(folder)] == [("train", 1), ("train", 2)]
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(folder / name)
        assert (state["script"], state["stage"], state["network"]["arch"], state["args"]["lr"]) == ("rotation_at", "train", "resnet18", 0.02)


def test_the_folder_names_the_run(tmp_path, monkeypatch, one_sentence):
    monkeypatch.chdir(tmp_path)
    main(tiny(epochs=1))
    main(tiny(epochs=1, variant="T1", seed=3, eps=8 / 255, val_fraction=0.9))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["rotation_at-T1-linf-8_255-s3", "rotation_at-T3-linf-0.1-s0"]
    assert "runs/rotation_at-T3-linf-0.1-s0 already holds a run" in one_sentence(rotation_at, *flags(TINY | {"lr": 0.5}))


def test_a_run_is_not_overwritten(one_sentence, command, reference):
    folder, _ = reference
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    args = flags(TINY | {"out": folder})
    assert "already holds a run: continue it with --resume" in one_sentence(rotation_at, *args)
    assert "run with --lr 0.02, not 0.5" in one_sentence(rotation_at, *args, "--lr", "0.5", "--resume")
    assert "was written by rotation_at.py, not by jigsaw_at.py" in one_sentence(jigsaw_at, *args, "--resume")
    code, out, _ = command(rotation_at, *args, "--resume", "--workers", "1")  # finished: shows its table again
    assert code == 0 and "linf eps" in out
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_kill_before_the_last_line_of_the_log_loses_nothing(tmp_path):
    """last.pt is written, metrics.jsonl not yet: resuming writes it, even if no epoch is left."""
    main(tiny(epochs=2, out=str(tmp_path)))
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole.splitlines()[0] + "\n")
    (tmp_path / "results.json").unlink()
    main(tiny(epochs=2, out=str(tmp_path), resume=True))
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_results_without_a_run_are_left_alone(one_sentence, tmp_path, reference):
    text = (reference[0] / "results.json").read_text()
    (tmp_path / "results.json").write_text(text)
    assert "already holds a run" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path}))
    assert "there is no" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path}), "--resume")
    assert (tmp_path / "results.json").read_text() == text


def test_data_that_cannot_be_had_block_no_folder(one_sentence, tmp_path):
    """The same command works when the data are there."""
    argv = flags(TINY | {"out": tmp_path / "run", "epochs": 1})
    assert "no images" in one_sentence(rotation_at, *argv, "--dataset", "folder", "--data-dir", tmp_path / "nowhere")
    assert main(tiny(out=str(tmp_path / "run"), epochs=1))["rows"]


def test_output_that_cannot_be_written(one_sentence, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path / "file" / "run"}))


def test_a_full_disk_loses_nothing(one_sentence, tmp_path):
    """A limit on file sizes stands in for the full disk: writing fails in the same place, half-way."""
    save_checkpoint(tmp_path / "last.pt", {"network": {}, "model": {"w": torch.ones(3)}})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(tmp_path / "last.pt", {"network": {}, "model": {"w": torch.ones(100_000)}})
        assert "written" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path / "run", "epochs": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert torch.equal(load_checkpoint(tmp_path / "last.pt")["model"]["w"], torch.ones(3))
    assert list(tmp_path.rglob("*.tmp")) == [] and not (tmp_path / "run" / "results.json").exists()


def test_two_runs_in_one_folder(one_sentence, tmp_path):
    """The second is refused while the first lives, also after kill -9 nothing has to be cleaned up."""
    code = f"import sys, pathlib, time; sys.path.insert(0, {str(ROOT)!r}); import common\n"
    code += f"lock = common.lock_folder(pathlib.Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        for script, args in ((rotation_at, TINY), (byorl, TINY_BYORL)):
            for more in ([], ["--resume"]):
                assert "another process is running in" in one_sentence(script, *flags(args | {"out": tmp_path}), *more)
    finally:
        other.kill()
        other.wait()
    assert main(tiny(epochs=1, out=str(tmp_path)))["rows"]


# ---- checkpoints and results that will not do ----


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
        return one_sentence(rotation_at, *flags(TINY | {"init": path, "out": tmp_path / "r"} | more))

    for name in ("truncated", "empty", "text", "evil", "foreign", "headless"):
        assert re.search(rf"{name}\.pt is damaged, or not a file of the kind that is expected", init(tmp_path / f"{name}.pt"))
    assert not os.path.exists("/tmp/rotation_at_was_here")
    assert "best.pt is damaged, or not" in init(folder / "best.pt", width=1 / 8) and "Is a directory" in init(folder)
    assert not list((tmp_path / "r").glob("*.pt"))  # the folder is free for the same command with another --init
    for script, *given in ((mtl_reverse, "--victim"), (chen_pretrain_finetune,), (eval_cifar10c, "--generate")):
        told = one_sentence(script, "--dataset", "digits", *given, folder / "last.pt", "--out", tmp_path / "other")
        assert "no finished classifier" in told


def test_a_changed_byte_is_refused_or_without_effect(tmp_path, reference):
    """Flipped bits anywhere, and a zeroed block: never other weights than those that were saved."""
    whole = (reference[0] / "best.pt").read_bytes()
    want = load_model(reference[0] / "best.pt").state_dict()
    rng, refused = random.Random(0), 0
    damages = [(rng.randrange(len(whole)), None) for _ in range(60)] + [(len(whole) // 2, 4096), (len(whole) // 3, 512)]
    for at, zeros in damages:
        changed = bytearray(whole)
        changed[at : at + (zeros or 1)] = bytes(zeros) if zeros else bytes([whole[at] ^ (1 << rng.randrange(8))])
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            assert same_state(load_model(tmp_path / "changed.pt").state_dict(), want)
        except UserError:
            refused += 1
    assert refused > 50


def test_the_files_of_another_run_are_refused(one_sentence, tmp_path, reference):
    """best.pt and last.pt of another script, of other flags, of another stage, and last.pt as best.pt."""
    args = dict(epochs=1, pretrain="l2")
    run = tmp_path / "run"
    main(tiny(out=str(run), **args))
    main(tiny(out=str(tmp_path / "seed"), seed=1, **args))
    jigsaw_at.main(jigsaw_at.Args(**TINY | args | {"out": str(tmp_path / "jigsaw")}))
    (run / "results.json").unlink()
    argv = [*flags(TINY | {"out": run} | args), "--resume"]
    for name, other, told in (
        ("best.pt", tmp_path / "jigsaw" / "best.pt", "was written by jigsaw_at.py"), ("best.pt", tmp_path / "seed" / "best.pt", "--seed 1, not 0"),
        ("best.pt", run / "pretrain.pt", "has the stage pretrain, not train"), ("last.pt", tmp_path / "jigsaw" / "last.pt", "was written by jigsaw_at.py"),
        ("last.pt", tmp_path / "seed" / "last.pt", "--seed 1, not 0"), ("last.pt", run / "best.pt", "last.pt is damaged, or not"),
    ):  # fmt: skip
        own = (run / name).read_bytes()
        (run / name).write_bytes(other.read_bytes())
        assert told in one_sentence(rotation_at, *argv), (name, other)
        assert (run / name).read_bytes() == other.read_bytes() and not (run / "results.json").exists()  # nothing was lost
        (run / name).write_bytes(own)
    (run / "best.pt").rename(run / "away")
    assert "there is no" in one_sentence(rotation_at, *argv)


@pytest.mark.parametrize("entry", ["history", "optimizer", "best", "stage", "epoch", "model", "script", "args", "network"])
def test_damaged_entries_of_last_pt(one_sentence, tmp_path, reference, entry):
    """Taken away, or of another kind: one sentence that names the file."""
    argv = [*flags(TINY | {"out": tmp_path, "epochs": 3}), "--resume"]
    args = vars(tiny(out=str(tmp_path), epochs=3, resume=True))
    (tmp_path / "config.json").write_text(json.dumps({"script": "rotation_at", "args": args}))
    good = load_checkpoint(reference[0] / "last.pt") | {"args": args}
    for odd in (None, 7, "x", [], {}, [1]):
        bad = {k: v for k, v in good.items() if k != entry} if odd is None else good | {entry: odd}
        if (entry, odd) != ("best", {}):  # which could be
            torch.save(bad, tmp_path / "last.pt")
            assert "last.pt" in one_sentence(rotation_at, *argv), odd


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"rows": 3}', '{"rows": []}', '{"rows": [{}]}'])
def test_damaged_results(one_sentence, tmp_path, reference, text):
    args = vars(tiny(out=str(tmp_path), resume=True))
    (tmp_path / "config.json").write_text(json.dumps({"script": "rotation_at", "args": args}))
    good = json.loads((reference[0] / "results.json").read_text())
    text = json.dumps(good | json.loads(text)) if "rows" in text else text
    (tmp_path / "results.json").write_text(text)
    assert "results.json is damaged" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path}), "--resume")


def picture_folder(root):
    rng = np.random.default_rng(0)
    for split, c, i in itertools.product(("train", "test"), ("cat", "dog"), range(20)):
        (root / split / c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / split / c / f"{i}.png")
    return dict(dataset="folder", data_dir=str(root), image_size=16, batch_size=8, val_fraction=0.25)


def test_other_images_are_refused_on_resume(one_sentence, tmp_path):
    args = TINY | picture_folder(tmp_path / "images") | dict(epochs=1, out=str(tmp_path / "run"))
    main(Args(**args))
    (tmp_path / "run" / "results.json").unlink()
    argv = [*flags(args), "--resume"]
    (tmp_path / "images" / "train" / "cat" / "3.png").rename(tmp_path / "3.png")
    assert "the images are not those" in one_sentence(rotation_at, *argv)
    (tmp_path / "3.png").rename(tmp_path / "images" / "train" / "cat" / "3.png")
    for split in ("train", "test"):
        (tmp_path / "images" / split / "dog").rename(tmp_path / "images" / split / "ant")  # labels would change places
    assert "the images are not those" in one_sentence(rotation_at, *argv)
    for split in ("train", "test"):
        (tmp_path / "images" / split / "ant").rename(tmp_path / "images" / split / "dog")
    assert main(Args(**args | {"resume": True}))["rows"]


# ---- the log ----


def test_the_log_is_the_mean_over_images(tmp_path):
    """11 images in batches of 4, 4 and 3 with losses 1, 2, 6; half of the time is spent waiting for the batches."""

    class Slow(torch.utils.data.Dataset):
        def __getitem__(self, i):
            time.sleep(0.01)
            return torch.zeros(3, 2, 2, dtype=torch.uint8), 0, ""

    data = Images(Slow(), torch.zeros(11, dtype=torch.int64), ["a", "b"], torch.arange(11))
    model = build_model("resnet18", {"class": 2}, width=1 / 16)
    opt = torch.optim.SGD(model.parameters(), 0.5)
    run = Run(tmp_path, CPU, "rotation_at", tiny(workers=0))
    for _ in run.epochs("train", 1, model, opt):
        for (x, _y), loss in zip(run.batches(data, 4), (1.0, 2.0, 6.0), strict=True):
            time.sleep(0.01 * len(x))
            run.log(loss=torch.tensor(loss))
        run.keep_best("best.pt", model, 1.0, val_clean=50.0)
    (line,) = run.history
    assert line["loss"] == pytest.approx((4 * 1 + 4 * 2 + 3 * 6) / 11) and (line["lr"], line["val_clean"]) == (0.5, 50.0)
    assert 0.3 < line["waiting"] < 0.7


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(one_sentence, tmp_path):
    message = one_sentence(rotation_at, *flags(TINY | {"lr": 1e12, "epochs": 3, "out": tmp_path}))
    assert "NaN or infinite in epoch 1" in message and "step" in message
    assert not (tmp_path / "results.json").exists()


def test_nan_weights_are_never_saved(tmp_path):
    run = Run(tmp_path, CPU, "rotation_at", tiny())
    run.save("last.pt", {"network": {}, "model": {"w": torch.ones(2), "n": torch.tensor(3)}})
    with pytest.raises(UserError, match="last.pt was not written"):
        run.save("last.pt", {"network": {}, "model": {"w": torch.tensor([1.0, float("nan")])}})
    assert torch.equal(run.load("last.pt")["model"]["w"], torch.ones(2))


# ---- kills, dead readers, closed pipes ----

HEAD = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import os, signal, multiprocessing, torch, common, rotation_at\n"
RUN = "\ncommon.cli(rotation_at.main, rotation_at.Args)"
AT_STEP = """
count, log = 0, common.Run.log
def patched(self, **k):
    global count
    log(self, **k)
    count += 1
    if count == %d:
        %s
common.Run.log = patched
"""


def start(code, argv, **more):
    return subprocess.Popen([sys.executable, *code, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)


@pytest.mark.parametrize(("script", "args"), [
    (byorl, TINY_BYORL),  # several stages, a target network, rows kept
], ids=["byorl"])  # fmt: skip
def test_killed_at_random_and_resumed_is_uninterrupted(tmp_path, script, args):
    """SIGKILL three times and Ctrl-C once, wherever they strike: rows, log and weights are those of a run in one go."""
    script.main(script.Args(**args | {"out": str(tmp_path / "whole")}))
    code, argv = [str(ROOT / f"{script.__name__}.py")], [*flags(args | {"out": tmp_path / "run"}), "--resume"]
    rng = random.Random(script.__name__)
    for kill in (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
        before = (tmp_path / "run" / "last.pt").stat().st_mtime_ns if (tmp_path / "run" / "last.pt").exists() else 0
        process = start(code, argv)
        while process.poll() is None and not (tmp_path / "run" / ".lock").exists():
            time.sleep(0.05)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # at least one epoch further, so that it ends
            file = tmp_path / "run" / "last.pt"
            if file.exists() and file.stat().st_mtime_ns != before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(kill)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 130, 0) and "Traceback" not in err
    script.main(script.Args(**args | {"out": str(tmp_path / "run"), "resume": True}))
    assert accuracies(tmp_path / "run") == accuracies(tmp_path / "whole") and metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.pt"):
        assert same_state(*(load_checkpoint(tmp_path / name / file.name)["model"] for name in ("whole", "run"))), file


@pytest.mark.parametrize(("what", "told"), [
    ("os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)", "error: a process that reads images died"),
    ("raise RuntimeError('such as a CUDA error')", "RuntimeError: such as a CUDA error"),
])  # fmt: skip
def test_a_dead_reader_or_a_bug_ends_the_run(tmp_path, what, told):
    """Within seconds, while processes that read images live; and the run can be resumed."""
    args = TINY | picture_folder(tmp_path / "images") | dict(batch_size=4, workers=2, epochs=3, out=str(tmp_path / "run"))
    code = HEAD + "common.IN_MEMORY_BYTES = 0" + AT_STEP % (9, what) + RUN  # the first of 8 steps of epoch 2: most are still to be read
    begin = time.monotonic()
    process = start(["-c", code], flags(args))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and told in err and time.monotonic() - begin < 40, err
    assert ("Traceback" in err) == ("RuntimeError" in told)
    assert main(Args(**args | {"resume": True}))["rows"]


def test_a_closed_pipe_ends_quietly(tmp_path):
    """As `| head -1`: no word, and the checkpoint is kept."""
    args = TINY | dict(epochs=3, out=str(tmp_path / "run"))
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / "rotation_at.py", *flags(args)], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    while os.read(read, 1) != b"\n":  # the first line
        pass
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141 and err == "" and load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert main(Args(**args | {"resume": True}))["rows"]


def test_ctrl_c_while_torch_is_imported(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt")
    for script in (rotation_at, jigsaw_at):
        process = start([ROOT / f"{script.__name__}.py"], ["--help"], env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 130


def test_out_of_memory_on_a_cpu(one_sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(rotation_at, "train", lambda *a, **k: torch.empty(2**50))
    assert "out of memory; take smaller batches" in one_sentence(rotation_at, *flags(TINY | {"out": tmp_path}))


@pytest.mark.parametrize("value", ["", "4"])
def test_a_stray_world_size_is_not_torchrun(tmp_path, monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert main(tiny(epochs=1, out=str(tmp_path)))["rows"]


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
    args = TINY | dict(variant="T0", eps=0.0, eval_eps=(0.0,), val_fraction=1309 / 1437, epochs=1, eval_examples=0)
    two = torchrun(*flags(args), "--out", "run", code=HEAD + same + RUN, cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("test images") == 1  # only rank 0 speaks
    main(Args(**args | {"out": str(tmp_path / "one")}))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    (a,), (b,) = metrics(tmp_path / "run"), metrics(tmp_path / "one")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_two_ranks_evaluate_every_image_once_and_resume(tmp_path):
    """The same checkpoint is evaluated to the same clean accuracy by any number of ranks; three epochs are one and two."""
    args = TINY | dict(eval_examples=0, attack_bn="train", out="run")
    assert torchrun(*flags(args | {"epochs": 3}), code=HEAD + AT_STEP % (4, "os._exit(9)") + RUN, cwd=tmp_path).returncode != 0
    done = torchrun(*flags(args | {"epochs": 3}), "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torchrun(*flags(args | {"epochs": 3, "out": "whole"}), cwd=tmp_path).returncode == 0
    assert accuracies(tmp_path / "run") == accuracies(tmp_path / "whole")
    assert same_state(*(load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "whole")))
    two = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    one = main(Args(**args | {"epochs": 3, "resume": True, "out": str(tmp_path / "run")}))  # the evaluation alone
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
assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
delta = x[dist.get_rank()].clone().requires_grad_()
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(ddp(delta), y[dist.get_rank()])
    loss.backward()
with common.batchnorm_mode(model, "train"), torch.no_grad():
    in_train_mode = model(delta)  # must leave the running statistics alone
    model.amp = torch.bfloat16
    in_bfloat16 = model(delta)
grads = {k: p.grad for k, p in model.named_parameters()}
torch.save([loss.detach(), delta.grad, grads, model.state_dict(), in_train_mode, in_bfloat16], f"{dist.get_rank()}.pt")
"""


def test_batchnorm_sees_the_images_of_all_ranks(tmp_path):
    """Loss, gradients (of weights and images) and running statistics of two ranks are those of one with the whole batch; so is the
    output in train mode without running statistics, as under attack, in float32 and nearly in bfloat16."""
    out = torchrun(code=HEAD + BATCHNORM, cwd=tmp_path)
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
    assert (torch.cat([r[5] for r in ranks]) - whole).norm() < 0.1 * whole.norm()
    for _, _, its_grads, state, *_ in ranks:
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
    return chen.Objective(model, args)
x, order, k, j = torch.rand(12, 3, 16, 16), torch.randperm(16), torch.arange(12) % 4, torch.arange(12) % 6
def views(part):
    views = {"selfie": (x[part], order), "rotation": (common.rotate(x, k)[part], k[part])}
    return views | {"jigsaw": (common.jigsaw(x, common.jigsaw_permutations(4, 5)[j])[part], j[part])}
def gradients(one, ddp, part):
    attacked = {task: (x.requires_grad_(), target) for task, (x, target) in views(part).items()}
    with common.batchnorm_mode(one.model, "train"):  # what the attack follows
        total, h = one.adversarial(attacked, True)
        images = torch.autograd.grad((total + 0.1 * h).sum(), [x for x, _ in attacked.values()])
    loss = ddp(views(part), views(part), True)
    loss.backward()
    found = {"images": torch.cat(images, 1), "loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad for n, p in one.named_parameters()}
    return found | {n: b for n, b in one.named_buffers() if "running" in n}
"""
ENSEMBLE_RANKS = """
dist.init_process_group("gloo")
rank = dist.get_rank()
one = objective()
torch.save(gradients(one, common.distribute(one), slice(6 * rank, 6 * rank + 6)), f"{rank}.pt")
"""


def test_two_ranks_of_the_ensemble_agree_with_one(tmp_path):
    """Second derivatives pass through BatchNorm over both ranks (chen_pretrain_finetune.py)."""
    head = HEAD + "torch.manual_seed(1)\n" + ENSEMBLE
    out = torchrun(code=head + ENSEMBLE_RANKS, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    names: dict = {}
    exec(head + "one = objective(); whole = gradients(one, one, slice(12))", names)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    want = names["whole"]
    assert torch.allclose(torch.cat([r["images"] for r in ranks]), want["images"], rtol=1e-3, atol=1e-3 * want["images"].abs().max().item())
    largest = max(v.abs().max().item() for key, v in want.items() if key.startswith("gradient"))
    for key in want.keys() - {"images", "loss"}:  # some gradients are 0, as BatchNorm undoes a scale or shift
        assert all(torch.allclose(r[key], want[key], rtol=2e-3, atol=2e-4 * largest) for r in ranks), key
    assert sum(r["loss"] for r in ranks).item() / 2 == pytest.approx(want["loss"].item(), rel=1e-4)


def test_two_ranks_run_every_script(tmp_path):
    """Pre-training with a target network and heads (byorl.py), and an evaluation of a head (eval_cifar10c.py)."""
    argv = TINY_BYORL | dict(epochs=1, out="run")
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import %s as s; s.cli(s.main, s.Args)"
    done = torchrun(*flags(argv), code=run % "byorl", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("byorl plain 100%, epoch") == 1, done.stderr
    argv = ["--generate", "--dataset", "digits", "--corruptions", "contrast", "--severities", "1", "--eval-steps", "1", "--eval-examples", "51"]
    done = torchrun("run/byorl-plain-100%.pt", *argv, "--out", "eval", code=run % "eval_cifar10c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    assert [r["examples"] for r in rows[:2]] == [360, 51]


def test_a_dead_rank_ends_the_run(tmp_path):
    code = HEAD + "if os.environ['RANK'] == '1':\n    " + (AT_STEP % (4, "os.kill(os.getpid(), signal.SIGKILL)")).strip().replace("\n", "\n    ")
    begin = time.monotonic()
    dead = torchrun(*flags(TINY | {"out": "run", "epochs": 500}), code=code + RUN, cwd=tmp_path)
    assert dead.returncode != 0 and time.monotonic() - begin < 90
    assert not (tmp_path / "run" / "results.json").exists()


# ---- housekeeping ----


def test_nothing_happens_at_import(tmp_path):
    code = "import signal; before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]\n" + HEAD
    code += "print(torch.cuda.is_initialized(), before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert out.stdout.strip() == "False True" and list(tmp_path.iterdir()) == []


def test_scripts_run_without_the_optional_packages(tmp_path, reference):
    block = "import sys\nfor m in ('tqdm', 'matplotlib', 'sklearn'): sys.modules[m] = None\n"
    argv = [sys.executable, "-c", block + HEAD + RUN, *flags(TINY | {"out": tmp_path / "bare"})]
    assert subprocess.run(argv, capture_output=True, timeout=120).returncode == 0
    assert accuracies(tmp_path / "bare") == accuracies(reference[0])


def test_main_can_be_called_from_python(tmp_path):
    """From a notebook: no flags, a plain exception for a mistake, and the handlers of signals left alone."""
    before = signal.getsignal(signal.SIGINT)
    assert main(tiny(epochs=1, out=str(tmp_path / "run")))["rows"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(UserError, match="--eps 8"):
        main(replace(tiny(), eps=8.0))
