import dataclasses
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# A run of rotation_at.py of a few seconds: 187 digits, a network of 4 to 32 channels, float32.
TINY = dict(
    dataset="digits", flip=False, stem="imagenet", width=1 / 16, val_fraction=0.87, epochs=2, batch_size=64,
    lr=0.02, eps=0.1, step_size=0.1, attack_steps=1, eval_steps=2, eval_eps=(0.0, 0.1), eval_examples=50,
    amp="off", device="cpu",
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
