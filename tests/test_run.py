"""Section 1 of common.py: flags, folders, kills, several ranks, users' mistakes; seen through the scripts."""
import ast
import json
import os
import re
import signal

import pytest
import torch
from conftest import ROOT, TINY, flags, metrics, results, run_ranks, run_script, same_state
from test_ranks import RUNS

import adv_mae
import byorl
import chen_pretrain_finetune
import common
import eval_cifar10c
import eval_unforeseen
import jigsaw_at
import mtl_reverse
import rotation_at
from common import load_checkpoint, number, numbers, parse_args
from rotation_at import Args, main

SCRIPTS = [rotation_at, jigsaw_at, byorl, chen_pretrain_finetune, adv_mae, mtl_reverse]
SCRIPTS += [eval_cifar10c, eval_unforeseen]

# {script: (flags beside those of test_ranks.py, where it is stopped, in turn)}
STOPS = {
    byorl: ({}, [
        ("step", 3, signal.SIGINT), ("step", 5), ("metrics.jsonl", 2), ("byorl-robust-100%.pt", 1),
        ("step", 3), ("last.pt", 2), ("rows.json", 1),  # in a head's second epoch, later, at the end
    ]),
    chen_pretrain_finetune: (dict(pretrain_epochs=2, epochs=2), 3 * [("step", 3)]),
    adv_mae: (
        dict(pretrain_epochs=2, epochs=2, layer_decay=(0.0, 1.0)),
        [("step", 5), ("step", 8), ("rows.json", 2)],  # in A-MAE, in a classifier, in the evaluation
    ),
    mtl_reverse: (
        dict(attacks=mtl_reverse.ATTACKS[:4], lambdas=(1.0,), adaptive_steps=1, eot=1, eval_examples=16),
        [("step", 3), ("step", 6), ("rows.json", 3)],  # in the classifier, in a task, in the evaluation
    ),
}  # fmt: skip


def contents(folder):
    """The rows, the log and the weights in the folder of a run."""
    rows = json.loads((folder / "results.json").read_text().replace(str(folder), ""))["rows"]
    return rows, metrics(folder), {f.name: load_checkpoint(f)["model"] for f in folder.glob("*.pt")}


def test_flags_are_read():
    """Numbers as papers write them; flags win over --quick, and that over the defaults."""
    assert number("8/255") == 8 / 255 and number("1e-4") == 1e-4 and numbers("0, 4/255,1") == (0, 4 / 255, 1)
    wrong = [(number, text) for text in ("abc", "1/0", "1/2/3", "", "nan", "inf", "-1")]
    for read, text in [*wrong, (common.positive, "0"), (common.share, "1.5"), (common.whole_number, "-1")]:
        with pytest.raises(ValueError):
            read(text)
    argv = "--eps 4/255 --norm l2 --no-flip --eval-eps 0,1/2".split()
    assert parse_args(Args, argv) == Args(eps=4 / 255, norm="l2", flip=False, eval_eps=(0, 0.5))
    assert parse_args(Args, ["--epochs", "5", "--quick"]) == Args(**Args.QUICK | {"epochs": 5, "quick": True})


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_help_and_read(command, script):
    """No flag is accepted and then ignored, by the script or, if all scripts have it, by common.py."""
    code, page, _ = command(script, "--help")
    names = vars(script.Args()).keys()
    assert code == 0 and all(f"--{n.replace('_', '-')}" in page or n.upper() in page for n in names)
    trees = [ast.parse((ROOT / f"{name}.py").read_text()) for name in (script.__name__, "common")]
    read = {ast.unparse(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert names <= {text.split(".")[-1] for text in read if re.fullmatch(r"(\w+\.)*args\.\w+", text)}


@pytest.mark.parametrize(("scripts", "argv", "told"), [
    (SCRIPTS, "--epoch 3", "--epoch"),
    (SCRIPTS[:4], "--norm l2 --eps 128", "--eps 128"),
    ([rotation_at], "--eval-eps 0,4,8", "--eval-eps 8"),
    ([rotation_at], "--norm l2 --quick", "--norm l2 needs a radius of its own"),
    ([mtl_reverse], "--device gpu", "--device gpu"),
    (SCRIPTS[:5], "--dataset folder --data-dir nowhere", "nowhere"),
    ([rotation_at], "--dataset digits --val-fraction 0", "--select last"),
    ([jigsaw_at], "--init nowhere.pt", "nowhere.pt"),
    ([jigsaw_at], "--quick --batch-size 1", "at least 2 images"),
    ([rotation_at], "--quick --out /dev/null/run", "Not a directory"),
])  # fmt: skip
def test_a_mistake_ends_in_one_sentence(one_sentence, tmp_path, monkeypatch, scripts, argv, told):
    monkeypatch.chdir(tmp_path)
    for script in scripts:
        assert told in one_sentence(script, *argv.split())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a finished run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    main(Args(**TINY, out=str(folder)))
    return folder


def test_a_run_is_kept_and_not_overwritten(one_sentence, command, reference):
    """The files are those the README lists; the same script with the same flags shows its results again."""
    before = {p.name: p.read_bytes() for p in reference.iterdir()}
    names = {".lock", "config.json", "metrics.jsonl", "last.pt", "best.pt", "results.json", "adversarial.png"}
    assert before.keys() == names and {"script", "args", "torch"} < json.loads(before["results.json"]).keys()
    rows = [("T3", "none", "linf", 0.0, 50), ("T3", "pgd-2", "linf", 0.1, 50)]
    assert [row[:-1] for row in results(reference)] == rows
    argv = flags(TINY | {"out": reference})
    assert "already holds a run: continue it with --resume" in one_sentence(rotation_at, *argv)
    assert "run with --lr 0.02, not 0.5" in one_sentence(rotation_at, *argv, "--lr", "0.5", "--resume")
    assert "was written by rotation_at.py, not by jigsaw_at.py" in one_sentence(jigsaw_at, *argv, "--resume")
    code, out, _ = command(rotation_at, *argv, "--resume", "--workers", "1")
    assert code == 0 and "linf eps" in out
    assert before == {p.name: p.read_bytes() for p in reference.iterdir()}
    config = json.loads(before["config.json"])
    del config["args"]["lambda2"]  # a run made before there was this flag: it had the default
    (reference / "config.json").write_text(json.dumps(config))
    assert command(rotation_at, *argv, "--resume")[0] == 0
    argv += ["--resume", "--lambda2", "0.7"]
    assert "run with --lambda2 0.5, not 0.7" in one_sentence(rotation_at, *argv)
    (reference / "config.json").write_bytes(before["config.json"])


def test_checkpoints_that_will_not_do(one_sentence, tmp_path, reference):
    """The damaged, the foreign, the unfinished, and those that would run code are refused by name."""
    whole, state = (reference / "best.pt").read_bytes(), load_checkpoint(reference / "best.pt")
    middle = len(whole) // 2  # in the weights, where one bit makes another number
    (tmp_path / "truncated").write_bytes(whole[:middle])
    (tmp_path / "changed").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "foreign")
    torch.save(state | {"model": {"w": torch.ones(1)}}, tmp_path / "headless")
    torch.save(state | {"code": os.getcwd}, tmp_path / "code")
    for name in ("changed", "truncated", "foreign", "headless", "code"):
        argv = flags(TINY | {"init": tmp_path / name, "out": tmp_path / "r"})
        assert f"{name} is damaged, or not a file of the kind" in one_sentence(rotation_at, *argv)
    torch.save(state | {"stage": "pretrain"}, tmp_path / "pretrain")
    for path in (reference / "last.pt", tmp_path / "pretrain"):
        argv = [path, "--dataset", "digits", "--eval-examples", 8, "--out", tmp_path / "other"]
        for script, *flag in ([eval_unforeseen], [mtl_reverse, "--victim"], [chen_pretrain_finetune]):
            assert re.search(f"{path.name}.*classifier", one_sentence(script, *flag, *argv))


def test_files_that_are_not_those_of_the_run_are_refused(one_sentence, tmp_path, pictures, reference):
    """On resume: other images; files of other flags or stages. Nothing is lost."""
    run, args = tmp_path / "run", TINY | pictures | dict(epochs=1, pretrain="l2", val_fraction=0.5)
    argv = [*flags(args | {"out": run}), "--resume"]
    want = main(Args(**args, out=str(run)))
    (run / "results.json").unlink()
    for name, other, told in [
        ("best.pt", reference / "best.pt", "of a run with --batch-size 64, not 16"),
        ("best.pt", run / "pretrain.pt", "has the stage pretrain, not train"),
        ("last.pt", reference / "last.pt", "of a run with --batch-size 64, not 16"),
    ]:
        own = (run / name).read_bytes()
        (run / name).write_bytes(other.read_bytes())
        assert told in one_sentence(rotation_at, *argv), (name, other)
        (run / name).write_bytes(own)
    (tmp_path / "train" / "cat" / "3.png").rename(tmp_path / "train" / "dog" / "33.png")
    assert "the images are not those" in one_sentence(rotation_at, *argv)
    (tmp_path / "train" / "dog" / "33.png").rename(tmp_path / "train" / "cat" / "3.png")
    assert main(Args(**args, out=str(run), resume=True))["rows"] == want["rows"]


@pytest.mark.parametrize(("changes", "told"), [
    (dict(batch_size=64), "the loss became NaN or infinite in epoch 1, at or before step 2"),
    (dict(batch_size=512), "NaN or infinite logits"),
    (dict(batch_size=2048, val_fraction=0.0, select="last"), "best.pt was not written"),
])  # fmt: skip
def test_nan_stops_the_run_and_is_never_saved(one_sentence, tmp_path, changes, told):
    """In a loss; after an epoch of a single step, in validation or in the weights."""
    args = TINY | changes | dict(lr=1e30, weight_decay=1e12, out=tmp_path)
    assert told in one_sentence(rotation_at, *flags(args))
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "config.json"}


@pytest.mark.parametrize("script", STOPS)
def test_killed_and_resumed_is_uninterrupted(tmp_path, pictures, script):
    """Stopped by Ctrl-C, killed in a step and before files are written: to the bit the run in one go."""
    name, (more, stops) = script.__name__, STOPS[script]
    argv = [*flags(RUNS[name][0] | pictures | more), "--resume", "--out"]
    for stop in stops:
        code = run_ranks(1, run_script, name, [*argv, tmp_path / "run"], True, *stop)
        assert code in ([130], [-signal.SIGKILL]), stop
    for out in ("run", "whole"):
        assert run_ranks(1, run_script, name, [*argv, tmp_path / out]) == [0]
    (*want, weights), (*got, again) = (contents(tmp_path / out) for out in ("whole", "run"))
    assert got == want and again.keys() == weights.keys()
    assert all(same_state(again[file], weights[file]) for file in weights)


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first lives."""
    args = TINY | dict(out=str(tmp_path), epochs=1)
    first = common.start_run(Args(**args))
    assert run_ranks(1, run_script, "rotation_at", flags(args)) == [1] and not (tmp_path / "last.pt").exists()
    first.lock.close()
    assert run_ranks(1, run_script, "rotation_at", flags(args)) == [0] and (tmp_path / "last.pt").exists()


def test_compiled_is_the_same(tmp_path, monkeypatch):
    """--compile changes no number, in training and under attack, whose weights are frozen."""
    compile_module, compiled = torch.nn.Module.compile, []

    def trace(module, **more):  # without generating code, which takes minutes
        compiled.append(module)
        compile_module(module, backend="aot_eager", **more)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    args, runs = TINY | dict(epochs=1, val_fraction=0.9), []
    for compile in (False, True):
        main(Args(**args, compile=compile, out=str(tmp_path / str(compile))))
        runs.append(metrics(tmp_path / str(compile)))
    assert runs[1][0]["loss"] == pytest.approx(runs[0][0]["loss"], rel=1e-4)
    assert compiled and results(tmp_path / "True") == results(tmp_path / "False")
