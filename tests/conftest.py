import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# A run of rotation_at.py of a few seconds: 187 digits, a network of 4 to 32 channels, float32.
TINY = dict(
    dataset="digits", flip=False, stem="imagenet", width=1 / 16, val_fraction=0.87, epochs=2, batch_size=64,
    lr=0.02, eps=0.1, step_size=0.1, attack_steps=1, eval_steps=2, eval_eps=(0.0, 0.1), eval_examples=50,
    amp="off", device="cpu",
)  # fmt: skip


# A run of byorl.py of a second, on `pictures`.
TINY_BYORL = dict(
    image_size=8, flip=False, arch="vit_mini4", width=0.5, epochs=2, warmup_epochs=0, eps=0.5, attack_steps=1,
    hidden=16, projection=8, label_fractions=(1.0,), probe_epochs=2, probe_steps=1, val_images=8,
    eval_attack="pgd20", eval_steps=1, eval_examples=31, amp="off", device="cpu",
)  # fmt: skip


def flags(args: dict) -> list[str]:
    """{'eval_eps': (0, 0.1), 'flip': False} -> ['--eval-eps', '0,0.1', '--no-flip']"""
    out = []
    for k, v in args.items():
        name = k.replace("_", "-")
        v = ",".join(map(str, v)) if isinstance(v, tuple) else v
        out += [f"--{name}" if v else f"--no-{name}"] if isinstance(v, bool) else [f"--{name}", str(v)]
    return out


@pytest.fixture
def pictures(tmp_path):
    """Flags for a folder of 20 images in each of two classes."""
    rng = np.random.default_rng(0)
    for split, c, i in itertools.product(("train", "test"), ("cat", "dog"), range(20)):
        (tmp_path / split / c).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(tmp_path / split / c / f"{i}.png")
    return dict(dataset="folder", data_dir=str(tmp_path), image_size=16, batch_size=16, workers=0)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(script module, *flags) runs it as the shell would and returns (exit code, stdout, stderr)."""

    def run(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        code = 0
        try:
            script.cli(script.main, script.Args)
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):  # Python prints it to stderr and exits with 1
                print(code, file=sys.stderr)
                code = 1
        out, err = capsys.readouterr()
        return code or 0, out, err

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def one_sentence(command):
    """one_sentence(script, *flags) asserts that the command fails with one clear line, and returns it."""

    def run(script, *argv):
        code, _, err = command(script, *argv)
        lines = [line for line in err.strip().splitlines() if line]
        assert code in (1, 2), f"exit code {code}: {err}"
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return run


@pytest.fixture
def ranks(monkeypatch):
    """ranks(r, n) makes common believe that it is rank r of n."""
    import common

    return lambda r, n: monkeypatch.setattr(common, "world", lambda: (r, n))


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def replace(args, **changes):
    return dataclasses.replace(args, **changes)


def results(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [(r["name"], r["attack"], r["norm"], r["eps"], r["examples"], r["accuracy"]) for r in rows]


def metrics(folder):
    """metrics.jsonl without what depends on the clock."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    clock = ("seconds", "images_per_s", "waiting")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


# Processes are forked from one that has imported torch already: a tenth of a second each instead of five.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed", "torchvision.transforms.v2"])


def run_script(name, argv, chance=True, at="", count=0, sig=signal.SIGKILL):
    """What a process does: a script. It gets a signal when it writes the file `at` for the count-th time, or
    at="step", if it is the last rank, in its count-th step. Without `chance` all random draws are constants,
    so that any number of ranks computes the same."""
    import common

    calls, log, move, script = itertools.count(1), common.Run.log, os.replace, importlib.import_module(name)

    def perhaps(where):
        if where == at and next(calls) == count:
            os.kill(os.getpid(), sig)

    def log_step(run, **losses):
        log(run, **losses)
        if common.world()[0] == common.world()[1] - 1:
            perhaps("step")

    common.Run.log = log_step
    os.replace = lambda source, target: (perhaps(Path(target).name), move(source, target))
    if not chance:
        without_chance(common, script)
    sys.argv = [f"{name}.py", *map(str, argv)]
    common.cli(script.main, script.Args)


def without_chance(*modules):
    """Random draws become constants, but those from a generator, which all ranks seed alike. Not undone."""
    names, rand = ("rand", "randn", "randn_like", "randint", "randperm"), torch.rand
    real = {name: getattr(torch, name) for name in names}

    def constant(name, *args, **more):
        drawn = real[name](*args, **more)
        if more.get("generator") is not None:
            return drawn
        return drawn.sort()[0] if name == "randperm" else drawn.fill_(0.25 if name == "rand" else 1)

    for name in real:
        setattr(torch, name, functools.partial(constant, name))
    things = [thing for module in modules for thing in vars(module).values()]
    things += [f for thing in things if inspect.isclass(thing) for f in vars(thing).values()]
    for f in filter(inspect.isfunction, things):  # random_flip(x, rand=torch.rand) keeps the old one
        f.__defaults__ = tuple(torch.rand if v is rand else v for v in f.__defaults__ or ())


def as_torchrun(rank, ranks, port, target, *args):
    here = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    about = here | {"RANK": rank, "WORLD_SIZE": ranks, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({key: str(value) for key, value in about.items()})
    torch.set_num_threads(1)  # as torchrun does
    target(*args)


def run_ranks(ranks, target, *args):
    """Run target(*args) on so many ranks; their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [SERVER.Process(target=as_torchrun, args=(r, ranks, port, target, *args)) for r in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in started]
