"""What the scripts share, in five sections:

1. Run      flags, devices and ranks, the run's folder, checkpoints, logging
2. Data     digits, CIFAR, STL-10 and image folders; splits, batches, augmentation, self-supervised tasks
3. Models   ResNets and Vision Transformers with normalisation and mixed precision inside
4. Attacks  PGD, AutoPGD, MultiTargeted and Square in the linf and l2 ball, robust accuracy
5. Results  evaluation of a checkpoint, tables, pictures

Conventions: images are (B, 3, H, W) floats in [0, 1]; a network normalises them itself and returns logits;
`eps` and step sizes are in the same [0, 1] units; accuracies are in percent. Importing this file only defines
things. To use PGD elsewhere, copy `pgd` with `l2_norm`, `project` and `check_attack`: they need only torch
and two imports of the standard library.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
except KeyboardInterrupt:  # importing torch takes seconds
    sys.exit(130)

# ======================================================================================================
# 1. Run: flags, devices and ranks, the run's folder, checkpoints, logging
# ======================================================================================================


class UserError(Exception):
    """A mistake that the user can mend, explained in one sentence. `cli` prints it without a traceback."""


# ---- flags -------------------------------------------------------------------------------------------


class WrongValue(argparse.ArgumentTypeError, ValueError):
    """A flag's value that is refused; argparse prints the message."""


def number(text: str) -> float:
    """Read 0.5, 1e-4, 8/255 or 1.25/255. Raises ValueError for anything else and for negative numbers."""
    top, _, bottom = text.partition("/")
    value = float(top) / (float(bottom or 1) or math.nan)  # x/0 becomes NaN, which is refused
    if not 0 <= value < math.inf:
        raise WrongValue(f"'{text}' is no number such as 0, 0.5 or 8/255")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers such as 0,4/255,8/255. Raises ValueError."""
    return tuple(number(word) for word in text.split(",") if word.strip())


def whole_number(text: str) -> int:
    """Read 0, 1, 2, ..., 2^31 - 1. Raises ValueError for anything else."""
    if not 0 <= int(text) < 2**31:
        raise WrongValue(f"'{text}' is no whole number from 0 to 2^31 - 1")
    return int(text)


def positive(text: str) -> int:
    """Read 1, 2, 3, ... Raises ValueError for anything else."""
    if int(text) < 1:
        raise WrongValue(f"'{text}' is no whole number from 1")
    return int(text)


def share(text: str) -> float:
    """Read a number from 0 to 1. Raises ValueError for anything else."""
    if number(text) > 1:
        raise WrongValue(f"'{text}' is no number from 0 to 1")
    return number(text)


def shares(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers from 0 to 1 such as 0.01,0.1,1. Raises ValueError for anything else."""
    return tuple(share(word) for word in text.split(","))


Positive = Annotated[int, positive]
Share = Annotated[float, share]
Shares = Annotated[tuple, shares]
Suite = Literal["pgd20", "apgd", "suite", "suite-fast", "standard"]


@dataclass
class CommonArgs:
    """Flags that say where and how to compute, the same in every script; each script's Args adds its own."""

    # run
    seed: int = 0  # seed of the split, the weights, the order of images, the task and the attacks
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of training and its attacks
    compile: bool = False  # torch.compile the trunk: faster steps after one or two minutes
    workers: int = 2  # processes per GPU that read images (--dataset folder)
    out: str = ""  # folder of the run; empty: runs/ and script, variant, norm, radius and seed
    resume: bool = False  # continue the run in its folder, with the same flags, or start it
    quick: bool = False  # a miniature on the bundled digits, a minute or two on two CPU cores
    # data
    dataset: Literal["digits", "cifar10", "cifar100", "stl10", "folder"] = "cifar10"  # images and labels
    data_dir: str = "data"  # data folder; with --dataset folder it holds train/ and test/ or val/
    data_mirror: str = ""  # URL of a folder with the official archive, if the official host is slow
    image_size: Positive = 32  # side in pixels; other images are resized
    # evaluation
    eval_attack: Suite = "pgd20"  # attack of the reported accuracy, see results/evaluation.md
    eval_steps: Positive = 20  # steps of pgd20 (the other attacks have steps of their own)
    eval_examples: int = 0  # random test images to evaluate on, the same in every run; 0: all
    eval_amp: bool = False  # evaluate in mixed precision instead of float32


# Flags that a resumed run may change: they say where to compute, not what.
FREE_ON_RESUME = {
    "resume", "out", "device", "data_dir", "data_mirror", "download", "workers", "compile", "eval_batch_size",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def given_flags(cls: type, argv: list[str] | None = None) -> dict[str, Any]:
    """Read the command line for a dataclass, one flag per field. Returns {field: value} of the flags given.

    A field's type says how its flag is read, its trailing comment is the help, and a comment on a line of its
    own is a heading. A field of type tuple[str, ...] takes the words without a flag. Exits for a wrong flag.
    """
    readers = {int: whole_number, float: number, str: str, tuple[float, ...]: numbers}
    words = "".join(f"[{f.name.upper()} ...] " for f in fields(cls) if f.type == tuple[str, ...])
    parser = _Parser(
        description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
        usage=f"python {_script_of(cls)}.py {words}[--flag value ...]",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=110),
    )  # fmt: skip
    group, groups, quick = parser, {}, getattr(cls, "QUICK", {})
    field = {f.name: f for f in fields(cls)}
    source = "".join(inspect.getsource(c) for c in cls.__mro__[:-1])
    for heading, name, note in re.findall(r"^    (?:# (.*)|(\w+): .*?(?:  # (.*))?)$", source, re.M):
        if heading:
            group = groups[heading] = groups.get(heading) or parser.add_argument_group(heading)
        if name not in field:
            continue
        f = field.pop(name)
        values = [("default", f.default)] + ([("--quick", quick[name])] if name in quick else [])
        told = "; ".join(f"{of}: {_shown(v)}" for of, v in values if v not in ("", ()))
        text = (f"{note} ({told})" if told else note).replace("%", "%%")
        more: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if f.type == tuple[str, ...]:
            group.add_argument(name, nargs="*", metavar=name.upper(), **more)
            continue
        if f.type is bool:
            more["action"] = argparse.BooleanOptionalAction
        elif get_origin(f.type) is Literal:
            more["choices"] = get_args(f.type)
        else:
            more["type"] = get_args(f.type)[1] if get_origin(f.type) is Annotated else readers[f.type]
            more["metavar"] = "LIST" if isinstance(f.default, tuple) else "TEXT" if f.type is str else "N"
        group.add_argument("--" + name.replace("_", "-"), **more)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return ",".join(map(_shown, value))
    return eps_name(value) if isinstance(value, float) else str(value)


def eps_name(eps: float) -> str:
    """A radius as papers write it: 8/255 -> '8/255', 0.5 -> '0.5'."""
    k, short = eps * 255, f"{eps:g}"  # 0.0313725 is 8/255, but 0.2 stays 0.2 and is not 51/255
    return f"{round(k)}/255" if len(short) > 5 and abs(k - round(k)) < 1e-6 else short


def parse_args(cls: type, argv: list[str] | None = None) -> Any:
    """An instance of the dataclass `cls`: flags win over `cls.QUICK` (if --quick), that over defaults."""
    given = given_flags(cls, argv)
    return cls(**((cls.QUICK if given.get("quick") else {}) | given))


def _script_of(cls: type) -> str:
    """'byorl' for the Args of byorl.py, whether that was started or imported."""
    return Path(getattr(sys.modules[cls.__module__], "__file__", cls.__module__)).stem


SUCH_AS = {"linf": "8/255", "l2": "0.5"}


def check_radii(args: Any) -> None:
    """Raise UserError for a radius or step too long for images, and for the default of the other norm."""
    usual = vars(type(args)()) | (type(args).QUICK if args.quick else {})
    for name, value in vars(args).items():
        if name in ("eps", "step_size") or name.endswith("_eps"):
            norm = getattr(args, name.removesuffix("eps") + "norm", args.norm)  # --eval-eps: --eval-norm
            longest = 1.0 if norm == "linf" else 3**0.5 * (args.image_size or 224)
            radii = value if isinstance(value, tuple) else (value,)
            if max(radii, default=0) > longest:
                flag = f"--{name.replace('_', '-')} {max(radii):g}"
                wanted = f"{norm} radii such as {SUCH_AS.get(norm, 0.5)}"
                raise UserError(f"{flag}: images are in [0, 1], so take {wanted}.")
    if args.norm != usual["norm"] and usual["eps"] and args.eps == usual["eps"]:
        other = f"--eps {eps_name(args.eps)} is the default for {usual['norm']}"
        wanted = f"a radius of its own, such as --eps {SUCH_AS[args.norm]}"
        raise UserError(f"--norm {args.norm} needs {wanted}: {other}.")


READER_DIED = "a process that reads images died (--workers 0 needs none)"


@contextlib.contextmanager
def errors_in_one_sentence() -> Iterator[None]:
    """Exit with one line for what a user can mend. Any other exception is a bug and keeps its traceback."""
    try:
        yield
    except BrokenPipeError:  # `| head`: nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except (UserError, FloatingPointError, OSError, MemoryError) as e:
        sys.exit(f"error: {str(e) or 'out of memory'}")
    except RuntimeError as e:
        known = {
            r"DataLoader worker \(pid": READER_DIED,
            "DefaultCPUAllocator|out of memory": "out of memory; take smaller batches, or a smaller --width",
            "inline_container|PytorchStreamWriter": "a checkpoint could not be written (is the disk full?)",
            "Connection (closed|reset) by|remote process exited": "another rank ended; see its message",
        }
        advice = next((text for pattern, text in known.items() if re.search(pattern, str(e))), None)
        if advice is None:
            raise
        sys.exit(f"error: {advice}. ({' '.join(str(e).split())[:200]})")


def cli(main: Callable, args_class: type) -> None:
    """Run a script: `main(parse_args(args_class))`.

    Exit codes: 0 done, 1 a mistake that the user can mend, told in one line, 2 a wrong flag, 130 Ctrl-C, 141
    nobody reads the output. A traceback means a bug.
    """
    with errors_in_one_sentence():
        try:
            main(parse_args(args_class))
        except KeyboardInterrupt:
            if world()[0] == 0:
                print("\ninterrupted: continue after the last epoch with --resume", file=sys.stderr)
            sys.exit(130)
        finally:
            # All is written. While Python ends, Ctrl-C would print a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves while another still works would be taken for dead
            dist.destroy_process_group()


# ---- devices, ranks, seeds ---------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU. Under torchrun each rank takes its own GPU.

    Raises UserError if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.index is not None and ranks > 1):
            raise RuntimeError("use auto, cpu or cuda, and on one rank cuda:N.")
        if device.type == "cuda":
            local_rank = int(os.environ["LOCAL_RANK"]) if ranks > 1 else 0
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None
    return device


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Seed torch for one step, differently for each step and rank, so no random state has to be saved."""
    # One number from four: the factors are primes larger than what is added.
    torch.manual_seed((((seed * 1_000_003 + epoch) * 1_000_003 + step) * 1_009 + world()[0]) % 2**63)


def learning_rate(highest: float, step: int, warmup: int, steps: int, lowest: float = 0.0) -> float:
    """Linear from 0 to `highest` in `warmup` steps, then half a cosine to `lowest` at `steps`."""
    if step < warmup:
        return highest * step / warmup
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def distribute(model: nn.Module) -> nn.Module:
    """Wrap `model` for the weight update on several ranks (attack the bare `model`); on one rank return it.

    BatchNorm in train mode uses the statistics of all ranks' images. Ranks draw different random numbers.
    """
    if world()[1] == 1:
        return model
    sync_batchnorm(model)
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # older torch
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, **{flag: False})


def sync_batchnorm(model: nn.Module) -> None:
    """Let BatchNorm in `model` use the images of all ranks when in train mode; on one rank do nothing."""
    for m in model.modules() if world()[1] > 1 else []:
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__class__ = _SyncBatchNorm  # the same weights and buffers, another forward


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _SumOverRanks.apply(g)  # each rank's loss depends on x


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' x, of one shape, with derivatives of any order."""
    return _SumOverRanks.apply(x.contiguous())


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the images of all ranks, on CPUs and GPUs.

    nn.SyncBatchNorm works on GPUs only, has no second derivative, makes the CPU wait three times per layer
    and pass, and refuses bfloat16 when running statistics are off, as under an attack in train mode.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, self.weight, self.bias, False, 0.0, self.eps)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        z = x.float()  # (B, C, ...)
        n = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        total = sum_over_ranks(torch.cat([z.sum(dims), n]))
        n = total[-1].detach()
        mean = total[:-1] / n  # (C,)
        z = z - mean.view(shape)
        var = sum_over_ranks((z * z).sum(dims)) / n
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
                self.num_batches_tracked += 1
        z = z * ((var + self.eps).rsqrt() * self.weight).view(shape) + self.bias.view(shape)
        return z.to(x.dtype)


def of_all_ranks(value: Any) -> list:
    """The values (plain Python) of all ranks, on every rank."""
    values = [value] * world()[1]
    if world()[1] > 1:
        dist.all_gather_object(values, value)
    return values


def all_ranks_fine(problem: str = "") -> None:
    """Raise UserError on every rank if one of them has a problem; else the others would wait for it."""
    if problems := [p for p in of_all_ranks(problem) if p]:
        raise UserError(problems[0])


# ---- the run -----------------------------------------------------------------------------------------

ADVICE_ON_NAN = "take a smaller learning rate (--lr or the like), or --amp off"


class Run:
    """A run: its folder, device, flags and training state. Only rank 0 writes files and prints.

        for epoch in run.epochs("train", args.epochs, model, opt):
            for x, y in run.batches(train_set, args.batch_size):
                ...
                run.log(loss=loss)
            run.keep_best("best.pt", model, score=..., val_clean=...)
    """

    def __init__(self, folder: Path, device: torch.device, script: str, args: Any, lock: Any = None):
        self.folder, self.device, self.script, self.args, self.lock = folder, device, script, args, lock
        self.history: list[dict] = []  # a line for each finished epoch, as in metrics.jsonl
        self.last: dict | None = None  # last.pt of a resumed run
        self.began = time.perf_counter()
        if (folder / "last.pt").exists():
            with reading(folder / "last.pt"):
                self.last = self.load("last.pt")
                self.history += self.last["history"]
                self.began -= sum(line["seconds"] for line in self.history)
                if any(self.last[key] != self.history[-1][key] for key in ("stage", "epoch")):
                    raise ValueError("its history does not end with its epoch")
            self.write_history()  # a kill may have come between last.pt and metrics.jsonl

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if world()[0] == 0:
            print(text, flush=True)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run atomically."""
        if world()[0] == 0:
            write_atomically(self.folder / name, lambda f: f.write(text.encode()))

    def write_history(self) -> None:
        """Write metrics.jsonl: a line for each finished epoch."""
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def save(self, name: str, state: dict) -> None:
        """Write a checkpoint. Raises UserError, and keeps the old file, if weights are NaN or infinite."""
        check_finite(name, state)
        if world()[0] == 0:
            save_checkpoint(self.folder / name, state | {"script": self.script, "args": asdict(self.args)})
        if world()[1] > 1:
            dist.barrier()  # else another rank could read the old file

    def load(self, name: str, **expected: Any) -> dict:
        """A checkpoint that this run has written, on the CPU.

        Raises UserError if it is missing, damaged, of another run, or has other entries than `expected`.
        """
        path = self.folder / name
        state = load_checkpoint(path)
        with reading(path):
            check_same_run(path, state, self.script, self.args)
            for key, value in expected.items():
                if state[key] != value:
                    raise UserError(f"{path} has the {key} {state[key]}, not {value}: is it another file?")
        return state

    def remember(self, key: str, value: str) -> None:
        """Keep `value` in config.json. Raises UserError if the run was started with another one."""
        path = self.folder / "config.json"
        with reading(path):
            config = json.loads(path.read_text())
            if config.get(key, value) != value:
                raise UserError(f"the {key} are not those that the run in {self.folder} was started with.")
        self.write("config.json", json.dumps(config | {key: value}, indent=1))

    def remember_files(self, key: str, paths: Iterable[str]) -> None:
        """`remember` what these files hold. Raises UserError also if one cannot be read."""
        digests = []
        for path in paths:
            with reading(path):
                digests.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())
        self.remember(key, " ".join(digests))

    def load_data(self, stream: bool = False, image_size: int = 0) -> tuple["Images", "Images"]:
        """(training images, test images) of --dataset, the latter cut to --eval-examples. stream: read the
        images of a folder as they are needed, however few they are. image_size: 0 is --image-size.

        Raises UserError if they cannot be had, or if the run was started with other file names or labels.
        """
        args = self.args
        train, test = load_data(
            args.dataset, args.data_dir, self.device, image_size=image_size or args.image_size,
            data_mirror=args.data_mirror, workers=args.workers, stream=stream,
        )  # fmt: skip
        self.remember("images", train.digest + test.digest)
        return train, draw(test, min(args.eval_examples, len(test)), seed=0) if args.eval_examples else test

    def epochs(
        self, stage: str, epochs: int, model: nn.Module, opt: torch.optim.Optimizer, *,
        seed_offset: int = 0, **more: nn.Module,
    ) -> Iterator[int]:  # fmt: skip
        """The epochs of the training `stage` that are left: 0, 1, ..., epochs - 1, fewer in a resumed run.

        After each, last.pt is written and a line is logged. seed_offset: added to the epoch in random seeds;
        every stage has its own. more: further modules to save and resume. Raises UserError for NaN losses or
        weights, and if last.pt is of another network.
        """
        self.stage, self.best, modules = stage, {}, {"model": model} | more
        if self.last is not None and self.last["stage"] == stage:
            with reading(self.folder / "last.pt"):
                if self.last["network"] != model.spec:
                    raise ValueError("it is of another network")
                self.best = {name: float(score) for name, score in self.last["best"].items()}
                opt.load_state_dict(self.last["optimizer"])
                for key, module in modules.items():
                    module.load_state_dict(self.last[key])
            self.last = None
        for epoch in range(sum(line["stage"] == stage for line in self.history), epochs):
            began = time.perf_counter()
            self.epoch, self.seed_epoch, self.sums, self.notes = epoch, seed_offset + epoch, {}, {}
            self.epoch_seed = self.args.seed * 1_000_003 + self.seed_epoch
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            yield epoch
            seconds = time.perf_counter() - began
            highest = max(group["lr"] for group in opt.param_groups)
            line = {"stage": stage, "epoch": epoch + 1, "lr": highest}
            self.history.append(line | self.means() | self.notes | {"seconds": round(seconds, 1)})
            self.save("last.pt", {
                "stage": stage, "epoch": epoch + 1, "network": model.spec, "optimizer": opt.state_dict(),
                "best": self.best, "history": self.history,
            } | {key: module.state_dict() for key, module in modules.items()})  # fmt: skip
            self.write_history()
            left = seconds * (epochs - epoch - 1) / 60
            shown = {k: v for k, v in self.history[-1].items() if k not in ("stage", "epoch")}
            shown = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            self.say(f"{stage} {epoch + 1}/{epochs}  {shown}" + f"  ({left:.0f} min left)" * (left > 1))

    def batches(
        self, data: "Images", batch_size: int, epoch_size: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """This epoch's batches in random order, see the function `batches`. Before each, and after the last,
        torch is seeded anew, so that a resumed run on as many ranks draws what an uninterrupted one would.
        epoch_size: images of an epoch, drawn anew for each (0: all, once). Raises UserError for a damaged
        image, and if a rank would get a single image."""
        data = draw(data, epoch_size or len(data), seed=self.epoch_seed)
        check_batches(len(data), batch_size)
        stream = batches(data, batch_size, self.device, workers=self.args.workers)
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        began = asked = time.perf_counter()
        waited, step = 0.0, -1
        # Only here are batches of one size. Under attack in evaluation each would be tuned for anew.
        torch.backends.cudnn.benchmark = True
        for step, (x, y) in enumerate(progress(stream, len(data), f"{self.stage} {self.epoch + 1}")):
            if done is None or done.query():  # the device is idle, so this time was lost to data
                waited += time.perf_counter() - asked
            seed_step(self.args.seed, self.seed_epoch, step)
            self.step, self.count = step, len(y)
            yield x, y
            asked = time.perf_counter()
            if done is not None:
                done.record()
        torch.backends.cudnn.benchmark = False
        seed_step(self.args.seed, self.seed_epoch, step + 1)
        seconds = time.perf_counter() - began
        self.notes |= {"images_per_s": round(len(data) / seconds, 1), "waiting": round(waited / seconds, 3)}

    def log(self, **losses: Tensor) -> None:
        """Add a step's losses, means over this rank's images, to the epoch's: the same names in every step.
        Raises UserError if they are NaN (looked at in every step on CPUs, in every 50th on GPUs)."""
        for key, value in (losses | {"images": torch.ones((), device=self.device)}).items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().float() * self.count
        if self.device.type == "cpu" or self.step % 50 == 49:  # reading a number makes the CPU wait for a GPU
            self.means(every_rank=False)

    def means(self, every_rank: bool = True) -> dict[str, float]:
        """Mean losses over the epoch's images so far, of all ranks, and on GPUs the peak of memory (GiB)."""
        total = torch.stack(list(self.sums.values()))
        if every_rank and world()[1] > 1:
            dist.all_reduce(total)
        sums = dict(zip(self.sums, total.tolist(), strict=True))
        if not all(map(math.isfinite, sums.values())):
            where = f"epoch {self.epoch + 1}, at or before step {self.step + 1}"
            raise UserError(f"the loss became NaN or infinite in {where}; {ADVICE_ON_NAN}.")
        images = sums.pop("images")
        means = {key: value / images for key, value in sums.items()}
        if self.device.type == "cuda":
            means["peak_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return means

    def keep_best(self, name: str, model: nn.Module, score: float, **metrics: float) -> None:
        """Log the epoch's `metrics`. Write the checkpoint `name` if `score`, the same on all ranks, is higher
        than that of this file in all epochs before: of equal epochs the earlier one is kept."""
        self.notes |= metrics
        if score > self.best.get(name, -math.inf):
            self.best[name] = score
            about = {"stage": self.stage, "epoch": self.epoch + 1, "network": model.spec}
            self.save(name, about | {"model": model.state_dict()} | metrics)

    def rows(self) -> list[dict]:
        """The rows that this run, before it was resumed, had written by `keep_rows`."""
        path = self.folder / "rows.json"
        with reading(path):
            return json.loads(path.read_text()) if path.exists() else []

    def keep_rows(self, rows: list[dict]) -> None:
        """Write rows.json: the rows measured so far, which a resumed run does not measure again."""
        self.write("rows.json", json.dumps(rows))

    def finish(self, rows: list[dict]) -> dict:
        """Write results.json: what was run, where, and a row per accuracy (percent). Returns what it holds.
        Its seconds are those of all finished epochs and the time since then in this process."""
        results = {
            "script": self.script, "args": asdict(self.args), "device": device_name(self.device),
            "torch": torch.__version__, "seconds": round(time.perf_counter() - self.began, 1), "rows": rows,
        }  # fmt: skip
        self.write("results.json", json.dumps(results, indent=1))
        return results

    def finished(self, table: Callable[[dict, Any], str]) -> dict | None:
        """What results.json holds if this run has finished, else None.

        table: makes a text of it and the flags. Raises UserError if that fails: then the file is damaged.
        """
        path = self.folder / "results.json"
        if not path.exists():
            return None
        with reading(path):
            results = json.loads(path.read_text())
            check_same_run(path, results, self.script, self.args)
            table(results, self.args)
        return results


def check_finite(name: str, state: dict) -> None:
    """Raise UserError, naming the file to be written, if dicts of weights in `state` hold NaN or infinity."""
    weights = [v for part in state.values() if isinstance(part, dict) for v in part.values()]
    finite = [v.isfinite().all() for v in weights if isinstance(v, Tensor) and v.is_floating_point()]
    if finite and not torch.stack(finite).all():  # asked once: each answer makes the CPU wait for a GPU
        raise UserError(f"the weights became NaN or infinite, so {name} was not written; {ADVICE_ON_NAN}.")


def start_run(args: Any, name: str = "") -> Run:
    """Join the other ranks if torchrun started us, choose the device, open the run's folder.

    The folder is --out, or runs/<script>[-<name>][-quick]-<norm>-<eps>-s<seed>. A folder that holds a run is
    continued with --resume and the same flags, and refused otherwise. Raises UserError.
    """
    ball = []
    if hasattr(args, "norm"):
        check_radii(args)
        ball = [args.norm, eps_name(args.eps).replace("/", "_")]
    patch = VITS.get(getattr(args, "arch", ""), (1,))[0]
    if patch > 1 and args.image_size % patch:
        side = f"{patch}, the side of a patch of {args.arch}"
        raise UserError(f"--image-size {args.image_size} is no multiple of {side}.")
    device, script = choose_device(args.device), _script_of(type(args))
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # The time limit is for downloads, while the other ranks wait. torchrun notices a dead rank at once.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    parts = [script, name, "quick" * args.quick, *ball, f"s{args.seed}"]
    folder = Path(args.out) if args.out else Path("runs") / "-".join(filter(None, parts))
    lock, problem = None, ""
    if world()[0] == 0:
        try:
            lock = _open_run(folder, script, args)
        except (UserError, OSError) as e:
            problem = str(e)
    all_ranks_fine(problem)
    try:
        config = (folder / "config.json").read_text()
    except OSError:
        config = ""
    if len(set(of_all_ranks(config))) > 1:  # a machine may have a folder of its own there
        raise UserError(f"not every machine sees {folder}: --out must be on a shared disk.")
    run = Run(folder, device, script, args, lock)
    run.say(f"{script}: {folder}, {device_name(device)}, {world()[1]} rank(s), torch {torch.__version__}")
    if 0 < getattr(args, "step_size", 0) * getattr(args, "attack_steps", 0) < args.eps:
        reach = f"{args.attack_steps} steps of {args.step_size:g} cannot reach the surface of the ball"
        run.say(f"warning: {reach} from its centre (--step-size, --eps).")
    return run


def _open_run(folder: Path, script: str, args: Any) -> Any:
    """Make the run's folder with config.json, or check that this run may go on there. Returns its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, path = lock_folder(folder), folder / "config.json"
    with reading(path):
        saved = json.loads(path.read_text()) if path.exists() else None
        if saved is not None:
            saved["script"]  # raises if this is another program's config.json
    if not any(f.suffix in (".pt", ".json") and f.name != "config.json" for f in folder.iterdir()):
        text = json.dumps({"script": script, "args": asdict(args), "started": time.time_ns()}, indent=1)
        write_atomically(path, lambda f: f.write(text.encode()))
    elif not args.resume:
        how = "continue it with --resume and the same flags, or choose another --out"
        raise UserError(f"{folder} already holds a run: {how}.")
    elif saved is None:
        raise UserError(f"there is no {path}, so nothing can be continued there: choose another --out.")
    else:
        with reading(path):
            check_same_run(path, saved, script, args)
    return lock


def lock_folder(folder: Path) -> Any:
    """Keep other processes from running in this folder as long as the returned file is open and this process
    lives. Raises UserError if another process runs there."""
    lock = open(folder / ".lock", "w")
    try:
        import fcntl

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is running in {folder}: wait, or choose another --out.") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return lock


def check_same_run(path: Path, saved: dict, script: str, args: Any) -> None:
    """Raise UserError unless `saved`, read from `path`, is of this script and a run with the same flags."""
    if saved["script"] != script:
        raise UserError(f"{path} was written by {saved['script']}.py, not by {script}.py.")
    was = asdict(type(args)()) | saved["args"]  # a flag that is newer than the run had its default
    was, now = (json.loads(json.dumps(flags)) for flags in (was, asdict(args)))  # tuples as lists
    for flag in sorted(now.keys() - FREE_ON_RESUME):
        if was[flag] != now[flag]:
            flag, a, b = flag.replace("_", "-"), _shown(was[flag]), _shown(now[flag])
            advice = "give the same flags, or another --out"
            raise UserError(f"{path} is of a run with --{flag} {a}, not {b}: {advice}.")


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' or 'CPU (AMD EPYC, 2 threads)', for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return f"CPU ({found[1] + ', ' if found else ''}{torch.get_num_threads()} threads)"


def progress(stream: Iterable, total: int, label: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches (x, y), with a bar that counts images: with tqdm, on a terminal, on rank 0."""
    bar = None
    if world()[0] == 0 and sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, desc=label, unit="img", leave=False, dynamic_ncols=True)
    for x, y in stream:
        yield x, y
        if bar is not None:
            bar.update(len(y) * world()[1])
    if bar is not None:
        bar.close()


# ---- checkpoints -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise UserError, naming the file, for every exception raised inside."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {path}.") from None
    except Exception as e:  # torch.load and json raise a dozen kinds
        refused = re.search(r"GLOBAL (\S+)", str(e))  # torch names it after a page of advice
        reason = " ".join(str(e).split())[:200]
        reason = f"it holds {refused[1]}, which may run code; save the weights alone" if refused else reason
        what = "is damaged, or not a file of the kind that is expected"
        raise UserError(f"{path} {what} ({type(e).__name__}: {reason}).") from None


def write_atomically(path: Path, write: Callable) -> None:
    """Write to a temporary file by `write(file)` and move it to `path`: a kill leaves the old file intact."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors and plain Python only, see `load_checkpoint`) atomically."""
    write_atomically(Path(path), lambda f: torch.save(state, f))


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of any script onto the CPU, without executing anything in it.

    It holds at least `network` (the arguments of `build_model`) and `model` (its state dict). Raises
    UserError if the file is missing, damaged or of some other program.
    """
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state["network"], dict) or not isinstance(state["model"], dict):
            raise TypeError("'network' or 'model' is no dict")
    return state


def load_foreign(path: str | Path) -> Any:
    """What a checkpoint of any program holds, on the CPU, without executing anything in it: tensors,
    containers, numbers and text, and argparse.Namespace, which MAE puts beside its weights.

    Raises UserError if the file is missing or damaged, or if it holds something else, which is named.
    """
    with reading(path), torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(module: nn.Module, weights: dict, source: str | Path) -> None:
    """module.load_state_dict(weights). Raises UserError, naming `source`, unless keys and shapes match."""
    with reading(source):
        module.load_state_dict(weights)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The classifier of any script's checkpoint, in eval mode and full precision.

    Returns a module that maps images in [0, 1], (B, 3, H, W), to class logits, (B, classes).
    Raises UserError for a file that is missing, damaged, foreign or no finished classifier.
    """
    state = load_checkpoint(path)
    check_classifier(state, path)
    return rebuild(state, path).to(device).eval()


def check_classifier(state: dict, source: str | Path) -> None:
    """Raise UserError unless a checkpoint is a trained classifier: neither pre-training's nor a last.pt."""
    heads = state["network"].get("heads", {})
    if state.get("stage") == "pretrain" or "optimizer" in state or not heads.get("class"):
        raise UserError(f"{source} is no trained classifier: use best.pt, not an encoder or last.pt.")


def rebuild(state: dict, source: str | Path) -> "Network":
    """The network that the checkpoint `state` describes, with its weights. Raises UserError."""
    with reading(source):
        model = build_model(**state["network"])
    load_weights(model, state["model"], source)
    return model


# ======================================================================================================
# 2. Data: digits, CIFAR, STL-10 and image folders; splits, batches, augmentation, self-supervised tasks
# ======================================================================================================

# Mean and standard deviation per channel. They sit inside the network and are stored with it.
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS = {
    "digits": ((0.3, 0.3, 0.3), (0.35, 0.35, 0.35)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),  # as in MadryLab's robustness library
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "folder": IMAGENET_STATS,
}
# A data set whose decoded pixels (uint8) take no more than this is kept on the device; a larger one is
# streamed.
IN_MEMORY_BYTES = 4 * 2**30


@dataclass
class Images:
    """A labelled set of images, or a subset of one (`index`).

    pixels: uint8 (N, 3, H, W) on the device, or a torch Dataset giving (uint8 (3, H, W), label, problem)
    labels: int64 (N,) on the CPU;  index: int64 (n,) on the CPU, the rows that belong to this set
    digest: changes with the names, the number and the labels of the images
    """

    pixels: Tensor | torch.utils.data.Dataset
    labels: Tensor
    classes: list[str]
    index: Tensor
    digest: str = ""

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, rows: Tensor) -> "Images":
        """The images at positions `rows` of this set; the pixels are shared, not copied."""
        return replace(self, index=self.index[rows])


def load_data(
    dataset: str, data_dir: str, device: torch.device, *,
    image_size: int = 32, data_mirror: str = "", workers: int = 2, stream: bool = False,
) -> tuple[Images, Images]:  # fmt: skip
    """(training set, test set) of digits, cifar10, cifar100, stl10 or folder, as image_size x image_size RGB.

    CIFAR and STL-10 are read from `data_dir` if they are there and downloaded into it if not, from the
    official host or from `data_mirror`; their official MD5 sums are checked each time. 'folder' is
    data_dir/{train, test or val}/<class>/*.jpg|png; if it is large, or with `stream`, it is read as it is
    needed. Raises UserError if the data are missing, damaged or cannot be downloaded.
    """
    if dataset == "digits":
        return _load_digits(device, image_size)
    if dataset == "folder":
        return _load_folder(Path(data_dir), device, image_size, workers, stream)
    # The first rank downloads, then one rank per machine (the disk may not be shared), then the rest find the
    # files.
    turn = 0 if world()[0] == 0 else 1 if int(os.environ["LOCAL_RANK"]) == 0 else 2
    for i in range(3 if world()[1] > 1 else 1):
        if i == turn:
            sets = _load_torchvision(dataset, data_dir, device, image_size, data_mirror)
        if world()[1] > 1:
            dist.barrier()
    return sets


def _to_images(
    pixels: Tensor, labels: Iterable[int], classes: list[str], device: torch.device, size: int
) -> Images:
    if (needed := len(pixels) * 3 * size * size) > IN_MEMORY_BYTES:
        needed = f"{len(pixels):,} images of {size} pixels take {needed / 2**30:.0f} GiB, too much to keep"
        raise UserError(f"{needed}: unpack them into a folder (--dataset folder), which is streamed.")
    if pixels.shape[-2:] != (size, size):
        from torchvision.transforms.v2.functional import resize

        pixels = torch.cat([resize(part, [size, size], antialias=True) for part in pixels.split(1024)])
    labels = torch.as_tensor(labels, dtype=torch.int64)
    digest = hashlib.sha256(repr(classes).encode() + labels.numpy().tobytes()).hexdigest()[:16]
    return Images(pixels.contiguous().to(device), labels, list(classes), torch.arange(len(labels)), digest)


def _load_digits(device: torch.device, size: int) -> tuple[Images, Images]:
    path = Path(__file__).resolve().parent / "assets" / "digits.npz"
    with reading(path), np.load(path, allow_pickle=False) as z:
        pixels, labels = torch.from_numpy(z["images"]), torch.from_numpy(z["labels"].astype(np.int64))
    grey = F.interpolate(pixels[:, None] * (255 / 16), size=(size, size), mode="bilinear")  # (N, 1, S, S)
    rgb = grey.round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
    classes = [str(i) for i in range(10)]
    train, test = slice(1437), slice(1437, None)
    return tuple(_to_images(rgb[s], labels[s], classes, device, size) for s in (train, test))


def _load_torchvision(
    dataset: str, data_dir: str, device: torch.device, size: int, mirror: str
) -> tuple[Images, Images]:
    from torchvision import datasets

    base = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[dataset]
    kind = type(base.__name__, (base,), {"url": f"{mirror.rstrip('/')}/{base.filename}"}) if mirror else base
    splits = [{"split": s} if dataset == "stl10" else {"train": s == "train"} for s in ("train", "test")]
    timeout, sets = socket.getdefaulttimeout(), []
    socket.setdefaulttimeout(60)  # seconds without data; urllib's own default is to wait for ever
    try:
        for split in splits:
            try:
                sets.append(base(data_dir, download=False, **split))  # files on disk: no network
            except RuntimeError:
                with contextlib.redirect_stdout(sys.stderr):
                    sets.append(kind(data_dir, download=True, **split))
    except (OSError, http.client.HTTPException, RuntimeError, EOFError, ValueError) as e:
        where = f"{Path(data_dir) / base.base_folder} and {Path(data_dir) / base.filename}"
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"no intact {dataset}: looked for {where}, then could not fetch {kind.url} ({reason}); put the "
            "files there, name their folder with --data-dir, another host with --data-mirror, or try --quick."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)

    def pack(d: Any) -> Images:
        pixels = d.data if dataset == "stl10" else d.data.transpose(0, 3, 1, 2)  # CIFAR: (N, H, W, 3)
        labels = d.labels if dataset == "stl10" else d.targets
        return _to_images(torch.from_numpy(np.ascontiguousarray(pixels)), labels, d.classes, device, size)

    return pack(sets[0]), pack(sets[1])


def read_image(path: str) -> Any:
    """The Pillow image in a file, as RGB with 8 bits. EXIF orientation and transparency are ignored, as by
    torchvision. Raises Pillow's errors, and ValueError for 32-bit pixels."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode.startswith("I;16"):  # 16-bit grey: Pillow would clip it to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("32-bit pixels have no defined white: save it with 8 or 16 bits")
        return image.convert("RGB")


class Folder(torch.utils.data.Dataset):
    """The images root/<class>/**/*.jpg|png, decoded to uint8 (3, size, size): shorter side resized to `size`,
    centre cropped. Hidden files and folders are skipped.

    Gives (image, label, problem). `problem` names a file that cannot be read: an exception would come out of
    a worker process wrapped in a traceback. Rank 0 lists the files for all ranks. Names and labels are
    arrays: a process that reads would, bit by bit, copy a list. Raises UserError if a class has no images, or
    there is no class.
    """

    def __init__(self, root: Path, size: int, flag: str):
        from torchvision import transforms as T

        if len(set(of_all_ranks(root.parts[-2:]))) > 1:  # such as test/ here and val/ there
            raise UserError(f"another machine reads another folder than {root}: see {flag}.")
        found, problem = [None], ""
        try:
            next(root.iterdir(), None)  # every machine must see it
            if world()[0] == 0:
                found = [_list_images(root)]
        except (OSError, ValueError) as e:
            reason = " ".join(str(e).split())[:120]
            where = f"{root} on {socket.gethostname()}" if world()[1] > 1 else root
            problem = f"no images in {where} ({reason}); expected <class>/*.jpg|png there: see {flag}."
        all_ranks_fine(problem)
        if world()[1] > 1:
            dist.broadcast_object_list(found)
        self.classes, self.names, self.labels, self.digest = found[0]
        self.root, self.size = root, size
        self.transform = T.Compose([T.Resize(size), T.CenterCrop(size), T.PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """The file of image i."""
        return f"{self.root}{os.fsdecode(self.names[i])}"

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        from PIL import Image

        path, label = self.path(i), int(self.labels[i])
        try:
            image = read_image(path)
        except Exception as e:  # Pillow raises many kinds for damaged, huge and odd files
            problem = f"cannot read the image {path} ({type(e).__name__}: {e}); remove it or get it again."
            return self.transform(Image.new("RGB", (self.size, self.size))), label, problem
        return self.transform(image), label, ""


class _Transformed(torch.utils.data.Dataset):
    """The images of a `Folder` or a tensor, each changed by `transform`; gives what `Folder` gives."""

    def __init__(self, source: Folder | Tensor, transform: Callable, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        from torchvision.transforms.functional import to_pil_image

        with torch.random.fork_rng(devices=[]):  # the factor is a prime larger than the number of images
            torch.default_generator.manual_seed((self.seed * 16_777_259 + i) % 2**63)
            if isinstance(self.source, Tensor):
                return self.transform(to_pil_image(self.source[i])), -1, ""
            folder = copy.copy(self.source)
            folder.transform = self.transform
            return folder[i]


def transformed(data: "Images", transform: Callable, seed: int = 0) -> "Images":
    """The same images, each changed by `transform` (a Pillow image, as large as it is stored, to a uint8
    tensor) in the processes that read them. What it draws from torch's generator depends on `seed` and the
    image alone: not on the number of processes or ranks, nor on the order."""
    pixels = data.pixels.cpu() if isinstance(data.pixels, Tensor) else data.pixels
    return replace(data, pixels=_Transformed(pixels, transform, seed))


def _class_folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(root: Path) -> tuple[list[str], np.ndarray, np.ndarray, str]:
    """(classes, the names of their images after `root`, as bytes, labels, a digest of the names)."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def is_image(path: str) -> bool:
        return path.lower().endswith(IMG_EXTENSIONS) and os.sep + "." not in path[len(str(root)) :]

    classes = _class_folders(root)
    if not classes:
        raise ValueError("no folder")
    label_of = {name: i for i, name in enumerate(classes)}
    samples = make_dataset(str(root), label_of, is_valid_file=is_image)
    names = [os.fsencode(path[len(str(root)) :]) for path, _ in samples]
    digest = hashlib.sha256(b"\n".join(names)).hexdigest()[:16]
    return classes, np.array(names), np.array([label for _, label in samples]), digest


def open_folder(root: Path, size: int, flag: str = "--data-dir, or try --quick") -> Images:
    """The images root/<class>/*.jpg|png, not yet read. Raises UserError, naming `flag`, if there are none."""
    files = Folder(root, size, flag)
    labels = torch.from_numpy(files.labels)
    return Images(files, labels, files.classes, torch.arange(len(labels)), files.digest)


def _load_folder(
    root: Path, device: torch.device, size: int, workers: int, stream: bool
) -> tuple[Images, Images]:
    # Kaggle's test/ holds images without classes: then val/ is meant.
    has_classes = [name for name in ("test", "val") if (root / name).is_dir() and _class_folders(root / name)]
    test = has_classes[0] if has_classes else "val"
    sets = [open_folder(root / name, size) for name in ("train", test)]
    if sets[0].classes != sets[1].classes:
        odd = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise UserError(f"{root}: train/ and {test}/ have different class folders (such as '{odd[0]}').")
    if len(sets[0].classes) < 2:
        raise UserError(f"{root / 'train'} has one class folder; a classifier needs two or more.")
    if not stream and sum(map(len, sets)) * 3 * size * size <= IN_MEMORY_BYTES:
        for s in sets:
            s.pixels = _read_all(s.pixels, device, workers)
    return sets[0], sets[1]


def _read_all(files: Folder, device: torch.device, workers: int) -> Tensor:
    """All images, uint8 (N, 3, S, S), on every rank; each reads a part. UserError for a damaged one."""
    (rank, ranks), problem = world(), ""
    pixels = torch.empty(len(files), 3, files.size, files.size, dtype=torch.uint8, device=device)
    parts, mine = pixels.tensor_split(ranks), torch.arange(len(files)).tensor_split(ranks)[rank]
    try:
        done = 0
        for x, _ in _read(files, mine.split(512), workers):
            parts[rank][done : done + len(x)] = x
            done += len(x)
    except UserError as e:
        problem = str(e)
    all_ranks_fine(problem)
    for source, part in enumerate(parts) if ranks > 1 else ():
        dist.broadcast(part, src=source)
    return pixels


def _read(
    files: torch.utils.data.Dataset, rows: Iterable[Tensor], workers: int, pin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (uint8 (b, 3, H, W), labels (b,)) of the files `rows`. Raises UserError for a damaged image."""
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=(r.tolist() for r in rows if len(r)), num_workers=workers, pin_memory=pin,
        worker_init_fn=_worker_signals, generator=torch.Generator(),
    )  # fmt: skip
    try:
        for x, y, problems in loader:
            if any(problems):
                raise UserError(next(p for p in problems if p))
            yield x, y
    except (OSError, EOFError) as e:  # its connection may break before its death is noticed
        time.sleep(1)  # then torch's handler of SIGCHLD raises
        raise UserError(f"{READER_DIED}. ({e})") from None


def _worker_signals(worker: int) -> None:
    """Workers ignore Ctrl-C, which the main process handles, and end on SIGTERM. What ends them is told by
    the main process, so their threads print no traceback."""
    sys.excepthook = lambda *error: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def split_train(
    train: Images, *, val_fraction: float | int, seed: int, label_fraction: float = 1.0
) -> tuple[Images, Images]:
    """(training part, validation part), drawn at random by `seed` alone: the same on every rank and machine.

    val_fraction: share of the images held out (a float), or their number (an int). label_fraction: share of
    all the images that is kept for training, at most those not held out, drawn uniformly and not balanced
    over classes: 0.01 of CIFAR-10 is 500 images (Gowal et al., section 4.2). Larger shares contain the
    smaller ones. Raises UserError if nothing would be left.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = val_fraction if isinstance(val_fraction, int) else round(val_fraction * len(train))
    kept = min(round(label_fraction * len(train)), len(train) - held)
    if kept < world()[1]:
        left = f"{max(kept, 0)} training images are left of {len(train)}"
        raise UserError(f"{left} ({held} held out, label fraction {label_fraction:g}), too few.")
    return train.subset(order[held : held + kept]), train.subset(order[:held])


def load_extra(path: str | Path, size: int, device: torch.device) -> Images:
    """Images without labels (all -1) from FILE.npy, uint8 (N, size, size, 3) or (N, 3, size, size), or from
    FILE.npz, which holds such an array by the name of `image`, `images` or `data`, or nothing else.

    Up to IN_MEMORY_BYTES they are put on the device; a larger .npy stays on the disk, a larger .npz in the
    host's memory. Raises UserError if the file is missing, damaged, or holds something else.
    """
    with reading(path):
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            names = [k for k in ("image", "images", "data") if k in array.files][:1] or array.files
            if len(names) != 1:
                raise ValueError("which are the images? Name them 'images'")
            array = array[names[0]]
        array = array.transpose(0, 3, 1, 2) if array.shape[3] == 3 else array
        if array.dtype != np.uint8 or not len(array) or array.shape[1:] != (3, size, size):
            raise ValueError(f"{array.dtype} {array.shape}, not uint8 images (N, {size}, {size}, 3)")
        pixels = torch.from_numpy(array)
    pixels = pixels.contiguous().to(device) if pixels.nbytes <= IN_MEMORY_BYTES else pixels
    return Images(pixels, torch.full((len(array),), -1), [], torch.arange(len(array)), str(array.shape))


def join(a: Images, b: Images) -> Images:
    """The images of both, with the classes of `a`: on the device if they fit, else in the host's memory.
    Raises UserError if they are streamed from files."""
    if not isinstance(a.pixels, Tensor) or not isinstance(b.pixels, Tensor):
        raise UserError("--extra-data cannot be added to a folder that is too large to be kept in memory.")
    device = a.pixels.device if a.pixels.nbytes + b.pixels.nbytes <= IN_MEMORY_BYTES else "cpu"
    pixels = torch.cat([a.pixels.to(device), b.pixels.to(device)])
    labels, index = torch.cat([a.labels, b.labels]), torch.cat([a.index, b.index + len(a.pixels)])
    return Images(pixels, labels, a.classes, index, a.digest + b.digest)


def draw(data: Images, n: int, seed: int) -> Images:
    """n of the images at random by `seed`: how often each is drawn differs by at most one."""
    generator = torch.Generator().manual_seed(seed)
    times = range(math.ceil(n / len(data)))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in times])
    return data.subset(order[:n])


def batches(
    data: Images, batch_size: int, device: torch.device, *,
    shuffle: int | None = None, workers: int = 2,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """This rank's share of each global batch: x float (b, 3, H, W) in [0, 1] and y int64 (b,), on the device.

    Every image is given exactly once, to exactly one rank. The images are cut into ceil(n / batch_size)
    batches whose sizes differ by at most one, and a batch into shares that do too: with 42,500 images and
    batch size 128, 333 batches of 127 or 128, where the usual cut leaves a last batch of 4, too few for
    BatchNorm.
    shuffle: seed of the order (None: as stored).
    """
    n = len(data)
    generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    shares = [data.index[order[positions]] for positions in split_epoch(n, batch_size)]
    shares = [rows for rows in shares if len(rows)]
    # Labels and order are copied once: small copies, batch by batch, would make the CPU wait for a GPU.
    labels = data.labels.to(device)
    rows_there = torch.cat([order[:0], *shares]).to(device).split([len(rows) for rows in shares])
    if isinstance(data.pixels, Tensor):
        where = shares if data.pixels.device.type == "cpu" else rows_there
        pixels = (data.pixels[rows].to(device) for rows in where)
    else:
        pixels = (x for x, _ in _read(data.pixels, shares, workers, pin=device.type == "cuda"))
    for rows, x in zip(rows_there, pixels, strict=True):
        x = x.to(device, non_blocking=True)  # images that were read are in pinned memory
        yield x.float().div_(255), labels[rows]


def split_epoch(n: int, batch_size: int) -> list[Tensor]:
    """For each batch of an epoch over n images, the positions, in the epoch's order, that this rank gets."""
    rank, ranks = world()
    cuts = torch.arange(n).tensor_split(count_batches(n, batch_size))
    return [cut.tensor_split(ranks)[rank] for cut in cuts]


def count_batches(n: int, batch_size: int) -> int:
    """Number of batches in an epoch over n images: if possible, each has an image for every rank."""
    return max(1, min(math.ceil(n / batch_size), n // world()[1]))


def check_batches(n: int, batch_size: int) -> None:
    """Raise UserError if a training step on n images would leave a rank with one image."""
    if n // (count_batches(n, batch_size) * world()[1]) < 2:
        raise UserError("a training step needs at least 2 images per rank: take larger batches.")


def image_uniform(seeds: Tensor, n: int) -> Tensor:
    """n uniform numbers in (0, 1) for each of the seeds, int64 (B,): float (B, n), row i from seeds[i] alone.

    The same on every device, in whatever batches and on whatever ranks the images are (SplitMix64; Steele et
    al. 2014). Seeds that are counted up must be multiplied by a large odd number first, else their rows are
    the same sequence from different places.
    """

    def shifted(z: Tensor, k: int) -> Tensor:
        return (z >> k) & ((1 << (64 - k)) - 1)  # as if z had no sign, which int64 keeps when shifted

    z = seeds[:, None] + (0x9E3779B97F4A7C15 - 2**64) * torch.arange(1, n + 1, device=seeds.device)
    z = (z ^ shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return (shifted(z ^ shifted(z, 31), 41).float() + 0.5) / 2**23


def random_crop_flip(x: Tensor, pad: int, flip: bool = True, mode: str = "constant") -> Tensor:
    """Pad by `pad` (with zeros; mode "reflect": with the mirrored image), crop back to size at a random
    place, mirror with probability 1/2: drawn per image.

    x: (B, C, H, W), on any device. All of it is one gather, so a GPU does it without waiting for the CPU.
    """
    b, _, h, w = x.shape
    corner = torch.randint(0, 2 * pad + 1, (2, b, 1), device=x.device)
    rows = corner[0] + torch.arange(h, device=x.device)  # (B, H)
    cols = corner[1] + torch.arange(w, device=x.device)  # (B, W)
    if flip:
        cols = torch.where(torch.rand(b, 1, device=x.device) < 0.5, cols.flip(1), cols)
    image = torch.arange(b, device=x.device)[:, None, None]
    padded = F.pad(x, (pad, pad, pad, pad), mode).permute(0, 2, 3, 1)  # (B, H + 2 pad, W + 2 pad, C)
    return padded[image, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # channels_last in memory


@torch.no_grad()
def map_images(
    f: Callable[..., Tensor], images: Images, run: "Run", batch_size: int, indexed: bool = False
) -> Tensor:
    """f of every image, in the set's order: (n, ...), on every rank. Each rank computes its share.

    f takes images (b, 3, H, W) and, if `indexed`, their positions in the set, int64 (b,); it gives (b, ...).
    """
    position = torch.zeros_like(images.labels)  # in place of the label: it tells which images a batch has
    position[images.index] = torch.arange(len(images))
    out = None
    stream = batches(replace(images, labels=position), batch_size, run.device, workers=run.args.workers)
    for x, i in progress(stream, len(images), "images"):
        values = f(x, i) if indexed else f(x)
        out = values.new_zeros(len(images), *values.shape[1:]) if out is None else out
        out[i] = values
    if out is None:  # fewer images than ranks, and none for this one
        size = run.args.image_size
        x, i = torch.zeros(0, 3, size, size, device=run.device), position[:0].to(run.device)
        values = f(x, i) if indexed else f(x)
        out = values.new_zeros(len(images), *values.shape[1:])
    if world()[1] > 1:
        dist.all_reduce(out)
    return out


# ---- augmentations for contrastive learning, drawn per image (torchvision's draw once per batch) ----


def random_resized_crop(
    x: Tensor, scale: tuple[float, float] = (0.08, 1.0), rand: Callable = torch.rand
) -> Tensor:
    """Cut a random box out of each image of x (B, C, H, W) in [0, 1] and enlarge it to full size, bicubic.

    The box: `scale` is its share of the area; width over height is log-uniform in [3/4, 4/3]. The first of 10
    draws that fits into the image is taken, else the whole image. As torchvision's, but at the box's border
    it reads pixels beyond the box.
    """
    b, _, h, w = x.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * rand(*shape, device=x.device)

    area = h * w * uniform(*scale, b, 10)
    aspect = uniform(math.log(3 / 4), math.log(4 / 3), b, 10).exp()
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (B, 10)
    fits = (width >= 1) & (width <= w) & (height >= 1) & (height <= h)
    first = fits.float().argmax(1, keepdim=True)
    found = fits.any(1)
    width = torch.where(found, width.gather(1, first).squeeze(1), w)  # (B,)
    height = torch.where(found, height.gather(1, first).squeeze(1), h)
    left = (uniform(0, 1, b) * (w - width + 1)).floor()
    top = (uniform(0, 1, b) * (h - height + 1)).floor()
    return crop_resize(x, torch.stack([left, top, width, height], 1))


def crop_resize(x: Tensor, boxes: Tensor) -> Tensor:
    """The box (left, top, width, height), in pixels, of each image, resized to the image's size, bicubic,
    clipped to [0, 1]. x: (B, C, H, W); boxes: (B, 4)."""
    _, _, h, w = x.shape
    left, top, width, height = boxes.to(x.dtype)[:, :, None].unbind(1)  # (B, 1)
    across = (torch.arange(w, device=x.device) + 0.5) / w * width + left  # (B, W), where to look
    down = (torch.arange(h, device=x.device) + 0.5) / h * height + top  # (B, H)
    return (_bicubic(down, h)[:, None] @ x @ _bicubic(across, w)[:, None].mT).clamp(0, 1)


def _bicubic(at: Tensor, size: int) -> Tensor:
    """Weights of a line's pixels in its values at `at` (B, n), in pixels from its border: (B, n, size). As in
    F.grid_sample (a = -0.75), but as a matrix, so that it can be differentiated twice."""
    first = (at - 0.5).floor()
    pixel = first[:, :, None] + torch.arange(-1, 3, device=at.device)  # (B, n, 4), the nearest four
    d = (at[:, :, None] - 0.5 - pixel).abs()
    weight = torch.where(d <= 1, (1.25 * d - 2.25) * d**2 + 1, -0.75 * (((d - 5) * d + 8) * d - 4))
    nearest = pixel.clamp(0, size - 1).long()  # beyond the border its own pixel counts
    return torch.zeros(*at.shape, size, dtype=at.dtype, device=at.device).scatter_add_(2, nearest, weight)


def random_flip(x: Tensor, rand: Callable = torch.rand) -> Tensor:
    """Mirror each image with probability 1/2."""
    return torch.where(rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def to_grey(x: Tensor) -> Tensor:
    """Luminance (B, 1, H, W) of RGB images (B, 3, H, W)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of x (B, 3, H, W) in [0, 1] by `shift` (B, 1, 1, 1) turns: 0.5 is the opposite colour."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    span = high - low
    safe = span.clamp(min=1e-8)
    hue = torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(high == r, (g - b) / safe, hue) / 6
    hue = (hue[:, None] + shift) % 1  # (B, 1, H, W)
    k = (hue * 6 + 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) % 6
    return high[:, None] - span[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(
    x: Tensor, brightness: float, contrast: float, saturation: float, hue: float, p: float = 0.8,
    rand: Callable = torch.rand,
) -> Tensor:  # fmt: skip
    """With probability p, change brightness, contrast, saturation and hue of an image, in random order.

    x (B, 3, H, W) in [0, 1], clipped after each change. As torchvision's ColorJitter: factors are uniform in
    1 - v ... 1 + v, the shift of the hue in -v ... v turns.
    """
    b = len(x)

    def factor(v: float) -> Tensor:
        return 1 + v * (2 * rand(b, 1, 1, 1, device=x.device) - 1)

    f_brightness, f_contrast, f_saturation = factor(brightness), factor(contrast), factor(saturation)
    f_hue = factor(hue) - 1
    order = rand(b, 4, device=x.device).argsort(1)
    out = x
    for place in range(4):
        now = order[:, place].view(b, 1, 1, 1)  # which of the four each image gets here
        grey = to_grey(out)
        mean = grey.mean((2, 3), keepdim=True)
        changed = torch.where(now == 0, out * f_brightness, mean + (out - mean) * f_contrast)
        changed = torch.where(now == 2, grey + (out - grey) * f_saturation, changed)
        out = torch.where(now == 3, adjust_hue(out, f_hue), changed).clamp(0, 1)
    return torch.where(rand(b, 1, 1, 1, device=x.device) < p, out, x)


def random_blur(x: Tensor, p: float, rand: Callable = torch.rand) -> Tensor:
    """With probability p, smooth each image of x (B, C, H, W) in [0, 1] by a Gaussian with a sigma of its own
    in [0.1, 2]; the kernel is a tenth of the side (SimCLR)."""
    b, c, h, w = x.shape
    radius = max(h // 20, 1)
    s = 0.1 + 1.9 * rand(b, 1, device=x.device)
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / s) ** 2)
    line = (line / line.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # (B * C, 1, 2 radius + 1)
    out = F.pad(x, (radius,) * 4, mode="reflect").reshape(1, b * c, h + 2 * radius, w + 2 * radius)
    out = F.conv2d(out, line[:, :, None, :], groups=b * c)
    out = F.conv2d(out, line[:, :, :, None], groups=b * c).view(b, c, h, w).clamp(0, 1)  # rounding can pass 1
    return torch.where(rand(b, 1, 1, 1, device=x.device) < p, out, x)


def simclr_augment(
    x: Tensor, strength: float = 0.5, blur: float = 0.0, crop: float = 0.08, flip: bool = True,
    jitter: float = 0.8, rand: Callable = torch.rand,
) -> Tensor:  # fmt: skip
    """One view of each image as in SimCLR (Chen et al. 2020) and BYOL: a crop of at least the share `crop` of
    the area (0: no crop), flip, colour jitter with probability `jitter` (brightness, contrast and saturation
    0.8, hue 0.2, all times `strength`), grey with probability 0.2, and blur with probability `blur`, for
    large images.

    rand: here and above a replacement for torch.rand, such as numbers fixed per image (mtl_reverse.py).
    """
    x = random_resized_crop(x, (crop, 1.0), rand=rand) if crop else x
    x = random_flip(x, rand) if flip else x
    x = color_jitter(x, 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, jitter, rand)
    x = torch.where(rand(len(x), 1, 1, 1, device=x.device) < 0.2, to_grey(x), x)
    return random_blur(x, blur, rand=rand) if blur else x


# ---- self-supervised tasks: pixels are moved, not changed, so norms and the attacks' balls are kept ----


def rotate(x: Tensor, k: Tensor) -> Tensor:
    """Turn image i of x (B, C, S, S) by k[i] * 90 degrees counter-clockwise; k (B,) in {0, 1, 2, 3}. (Gidaris
    et al. 2018)"""
    turned = torch.stack([x.rot90(i, (2, 3)) for i in range(4)])  # (4, B, C, S, S)
    return turned[k, torch.arange(len(x), device=x.device)]


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) to their patches, row by row: (B, N, C, patch, patch). Raises ValueError if they do
    not fit."""
    h, w = x.shape[2:]
    if h % patch or w % patch:
        raise ValueError(f"images of {h} x {w} pixels cannot be cut into patches of {patch}")
    return x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `patchify` for square images: (B, N, C, p, p) -> (B, C, H, W)."""
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def jigsaw(x: Tensor, order: Tensor) -> Tensor:
    """Cut each image into n x n tiles; tile j of the result is tile order[i, j] of image i. (Noroozi and
    Favaro 2016)

    x: (B, C, S, S); order: int64 (B, n * n), tiles counted row by row.
    jigsaw(jigsaw(x, order), order.argsort(1)) is x. Raises ValueError if n does not divide S.
    """
    n = math.isqrt(order.shape[1])
    if n * n != order.shape[1] or x.shape[2] % n or x.shape[3] % n:
        raise ValueError(f"{order.shape[1]} tiles do not make a grid on images of {x.shape[2]} pixels")
    tiles = patchify(x, x.shape[2] // n)  # (B, n * n, C, S/n, S/n)
    return unpatchify(tiles[torch.arange(len(x), device=x.device)[:, None], order])


def jigsaw_permutations(n: int, count: int, seed: int = 0) -> Tensor:
    """The identity and `count` other permutations of n * n tiles, all different, drawn uniformly: int64
    (count + 1, n * n). Raises UserError if there are not that many."""
    tiles, generator = n * n, torch.Generator().manual_seed(seed)
    if count >= math.factorial(tiles):
        others = math.factorial(tiles) - 1
        raise UserError(f"a grid of {n} x {n} has {others} permutations besides the identity, not {count}.")
    if math.factorial(tiles) <= 50_000:  # n = 2
        pool = torch.tensor(list(itertools.permutations(range(tiles))))
        pool = pool[torch.randperm(len(pool), generator=generator)]
    else:
        pool = torch.rand(max(50_000, 2 * count), tiles, generator=generator).argsort(1)
    identity = tuple(range(tiles))
    each_once = dict.fromkeys([identity, *map(tuple, pool.tolist())])
    return torch.tensor(list(each_once)[: count + 1])


# ======================================================================================================
# 3. Models: ResNets and Vision Transformers with normalisation and mixed precision inside
# ======================================================================================================


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution. On a map of one pixel a stride does not matter, and is left out: on CPUs oneDNN's
    bfloat16 gradient for the weights is uninitialised memory there."""

    def forward(self, x: Tensor) -> Tensor:
        stride = 1 if max(x.shape[2:]) == 1 else self.stride
        return F.conv2d(x, self.weight, None, stride, self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2), post-activation."""

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = Conv3x3(c_in, c, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.shortcut = _shortcut(c_in, c, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut (He et al. 2016, figure 5)."""

    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = Conv3x3(c, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.shortcut = _shortcut(c_in, 4 * c, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, and a shortcut (He et al. 2016b); where the shape changes,
    the shortcut is a 1x1 convolution of the activated input (as in the networks of Rice et al. 2020)."""

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = Conv3x3(c_in, c, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, 1, 1, bias=False)
        self.shortcut = _shortcut(c_in, c, stride, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PreActBottleneck(nn.Module):
    """BatchNorm, ReLU and convolution, three times (1x1, 3x3 with the stride, 1x1), and a shortcut; where the
    shape changes, it is a 1x1 convolution of the activated input, and BatchNorm (as in Chen et al.'s
    published models)."""

    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv2 = Conv3x3(c, c, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, 4 * c, 1, bias=False)
        self.shortcut = _shortcut(c_in, 4 * c, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return self.conv3(F.relu(self.bn3(out))) + shortcut


class Subsample(nn.Module):
    """Every stride-th pixel: before a 1x1 convolution the same as a stride in it.

    On CPUs oneDNN (issue 6035) writes past its buffer in the weight gradient of strided 1x1 convolutions in
    channels_last layout with fewer than 16 input channels.
    """

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


def _shortcut(c_in: int, c_out: int, stride: int, norm: bool = True) -> nn.Module:
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    layers = [Subsample(stride), nn.Conv2d(c_in, c_out, 1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(c_out)) if norm else nn.Sequential(*layers)


class ResNet(nn.Module):
    """ResNet trunk: images (B, 3, H, W) -> pooled features (B, dim). Weights initialised as PyTorch does.

    depths: blocks per stage; each stage but the first halves the sides and doubles the channels. channels: of
    the first stage. stem 'cifar': a 3x3 convolution, no pooling, as in the robustness library (Kucer et al.,
    footnote 5); 'imagenet': 7x7 with stride 2, then 3x3 max-pooling with stride 2. stem_channels: of that
    convolution (0: as the first stage). bn_first, bn_last: BatchNorm and ReLU after it, and before the
    pooling of the features.
    """

    def __init__(
        self, block: type, depths: tuple[int, ...], channels: int, stem: str = "cifar", *,
        stem_channels: int = 0, bn_first: bool = True, bn_last: bool = False,
    ):  # fmt: skip
        super().__init__()
        n = stem_channels or channels
        self.conv1 = nn.Conv2d(3, n, *((3, 1, 1) if stem == "cifar" else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(n) if bn_first else None
        self.pool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        self.stages = len(depths)
        for i, depth in enumerate(depths):
            stage = []
            for j in range(depth):
                stage.append(block(n, channels * 2**i, stride=2 if i > 0 and j == 0 else 1))
                n = channels * 2**i * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(n) if bn_last else None
        self.dim, self.shared_dim = n, n // 2

    def shared(self, x: Tensor) -> Tensor:
        """All but the last stage, which is what Chen et al. inherit from pre-training: (B, 3, H, W) ->
        (B, dim / 2, H / 4, W / 4); with the imagenet stem H / 16, W / 16."""
        x = self.conv1(x)
        x = self.pool(F.relu(self.bn1(x)) if self.bn1 is not None else x)
        for i in range(1, self.stages):
            x = getattr(self, f"layer{i}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, f"layer{self.stages}")(self.shared(x))  # (B, dim, h, w)
        return (F.relu(self.bn(x)) if self.bn is not None else x).mean((2, 3))


# ---- Vision Transformers ------------------------------------------------------------------------------


def sincos_positions(dim: int, rows: int, cols: int) -> Tensor:
    """Fixed positions of a grid of patches, row by row: (rows * cols, dim). The first half of the numbers
    encodes the column, the second the row, each as the sines, then the cosines, of position / 10000^(i / n),
    i = 0 ... n - 1, n = dim / 4 (MAE)."""
    rate = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    places = [torch.arange(n, dtype=torch.float64, device="cpu")[:, None] for n in (cols, rows)]
    col, row = (place * rate for place in places)  # (n, dim / 4)
    col, row = (torch.cat([t.sin(), t.cos()], 1) for t in (col, row))  # (n, dim / 2)
    return torch.cat([col.repeat(rows, 1), row.repeat_interleave(cols, 0)], 1).float()


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): (B, N, dim) -> (B, N, dim)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3, heads, d) -> three of (B, heads, N, d)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, a branch's output x (B, N, dim) is left out for an image with probability `rate` and else
    divided by 1 - rate, which keeps its expectation (stochastic depth, Huang et al. 2016)."""
    if rate == 0 or not training:
        return x
    return x * ((torch.rand(len(x), 1, 1, device=x.device) >= rate) / (1 - rate)).to(x)


class Block(nn.Module):
    """Transformer block with LayerNorm first (Dosovitskiy et al. 2021, eq. 2, 3). `drop_path` is a rate."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.drop_path = 0.0
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop_path(self.attn(self.norm1(x)), self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


def init_transformer(module: nn.Module) -> None:
    """MAE's initial weights: Xavier for linear layers and convolutions, 0 for biases of linear layers."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(m.weight.view(len(m.weight), -1))
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)


class ViT(nn.Module):
    """Vision Transformer trunk: (B, 3, H, W) -> (B, dim), the mean of the final patch tokens, then LayerNorm.
    The class token takes part in the attention only (as in MAE's fine-tuning; Rebuffi et al., appendix C).

    dim is a multiple of 4 and of `heads`, H and W of `patch`. The positions are fixed (`sincos_positions`),
    so one network takes images of any size; or, with `learned` > 0, parameters for that many patches, a
    square number, which start from those (published checkpoints that have been fine-tuned). Raises ValueError
    for other sizes.
    """

    def __init__(self, patch: int, dim: int, depth: int, heads: int, learned: int = 0):
        super().__init__()
        if dim % 4 or dim % heads or math.isqrt(learned) ** 2 != learned:
            sizes = f"dim {dim} must be a multiple of 4 and of the {heads} heads"
            raise ValueError(f"{sizes}, learned {learned} a square")
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.dim = dim
        self.grid = (0, 0)  # of the table of fixed positions, which is no part of checkpoints
        self.register_buffer("table", torch.zeros(0, dim), persistent=False)
        self.pos_embed = None
        if learned:
            start = sincos_positions(dim, math.isqrt(learned), math.isqrt(learned))
            start = torch.cat([torch.zeros(1, dim), start])[None]  # (1, 1 + N, dim), the class token's first
            self.pos_embed = nn.Parameter(start)
        init_transformer(self)

    def positions(self, rows: int, cols: int) -> Tensor:
        """(rows * cols, dim). Raises ValueError if they are learned, for another number of patches."""
        if self.pos_embed is None:
            if self.grid != (rows, cols):  # the first images, or images of another size
                self.grid, self.table = (rows, cols), sincos_positions(self.dim, rows, cols).to(self.table)
            return self.table
        if rows * cols != self.pos_embed.shape[1] - 1:
            learned = self.pos_embed.shape[1] - 1
            raise ValueError(f"{rows * cols} patches, but learned positions for {learned}")
        return self.pos_embed[0, 1:]

    def embed(self, x: Tensor) -> Tensor:
        """Patches with their positions, row by row: (B, 3, H, W) -> (B, N, dim). Raises ValueError if H or W
        does not fit."""
        patch = self.patch_embed.stride[0]
        if x.shape[2] % patch or x.shape[3] % patch:
            raise ValueError(f"images of {tuple(x.shape[2:])} pixels cannot be cut into patches of {patch}")
        x = self.patch_embed(x)  # (B, dim, H / patch, W / patch)
        # Positions are float32, so in mixed precision what the blocks add to is float32, too.
        return x.flatten(2).transpose(1, 2) + self.positions(*x.shape[2:])

    def encode(self, tokens: Tensor) -> Tensor:
        """The class token, then the tokens (B, n, dim) of all patches or some, after all blocks."""
        first = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        return self.blocks(torch.cat([first.expand(len(tokens), -1, -1), tokens], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_norm(self.encode(self.embed(x))[:, 1:].mean(1))


# ---- networks by name, with heads --------------------------------------------------------------------

# (block, blocks per stage)
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet26v2": (PreActBottleneck, (2, 2, 2, 2)),
    "resnet50v2": (PreActBottleneck, (3, 4, 6, 3)), "preact18": (PreActBlock, (2, 2, 2, 2)),
    "preact34": (PreActBlock, (3, 4, 6, 3)),
}  # fmt: skip
# (patch, depth, heads); 64 channels per head. vit_*4 are for images of 32 pixels, vit_mini4 for the digits of
# --quick.
VITS = {
    "vit_b16": (16, 12, 12), "vit_s16": (16, 12, 6), "vit_ti16": (16, 12, 3),
    "vit_s4": (4, 12, 6), "vit_ti4": (4, 12, 3), "vit_mini4": (4, 4, 2),
}  # fmt: skip


def build_trunk(arch: str, width: float = 1.0, stem: str = "cifar", positions: int = 0) -> nn.Module:
    """A network without head by name: images (B, 3, H, W) -> (B, dim). width multiplies the channels; stem:
    see `ResNet`; positions: how many a ViT learns (0: none). Raises UserError for an unknown name."""
    if arch in VITS:
        patch, depth, heads = VITS[arch]
        heads = max(1, round(heads * width))
        return ViT(patch, 64 * heads, depth, heads, positions)
    preact = {"bn_first": False, "bn_last": True}
    if arch in RESNETS:
        block, depths = RESNETS[arch]
        more = preact if block is PreActBlock else {}
        return ResNet(block, depths, max(1, round(64 * width)), stem, **more)
    wide = re.fullmatch(r"wrn(\d+)_10", arch)  # Zagoruyko and Komodakis 2016, such as wrn28_10
    if wide and int(wide[1]) % 6 == 4:  # 6 n + 4 layers of 160, 320 and 640 channels
        n = (int(wide[1]) - 4) // 6
        return ResNet(PreActBlock, (n, n, n), max(1, round(160 * width)), stem, stem_channels=16, **preact)
    raise UserError(f"unknown architecture '{arch}'.")


class Network(nn.Module):
    """Normalisation, a trunk, and one linear layer per head on its pooled features.

        logits = net(x)                                    # the first head, (B, classes)
        logits, ss_logits = net(x, "class", "rotation")    # several heads on one pass through the trunk

    x is in [0, 1], so attacks see pixels. With `amp` set to a dtype the trunk computes in it, in
    channels_last layout (weights stay float32); what is returned is float32. Float16 would lose small
    gradients: they are multiplied by FP16_SCALE where they enter the trunk and divided by it where they
    leave it.
    """

    FP16_SCALE = 1024.0

    def __init__(self, trunk: nn.Module, heads: dict[str, int], mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({name: nn.Linear(trunk.dim, n) for name, n in heads.items()})
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1))
        self.amp: torch.dtype | None = None
        # The scale is constant: an overflow shows as a NaN loss and stops the run (a GradScaler would skip
        # the step).
        for p in self.trunk.parameters():
            p.register_hook(lambda g: g / self.FP16_SCALE if self.amp == torch.float16 else g)

    def features(self, x: Tensor, *more: Any) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the trunk's output for the normalised images, (B, dim) of a classifier,
        in float32. `more`: further arguments of the trunk."""
        if torch.is_grad_enabled() and x.requires_grad and x.is_contiguous():
            x = x.view_as(x)  # its gradient gets the layout of the images
            x.register_hook(Tensor.contiguous)
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.amp is None:
            return self.trunk(x, *more)
        scale = self.FP16_SCALE if self.amp == torch.float16 else 1.0
        x = _ScaleGradient.apply(x, 1 / scale) if scale != 1 else x
        with torch.autocast(x.device.type, self.amp):
            h = self.trunk(x, *more).float()
        return _ScaleGradient.apply(h, scale) if scale != 1 else h

    def forward(self, x: Tensor, *heads: str) -> Tensor | tuple[Tensor, ...]:
        """Logits (B, n) of the head named, by default the first; a tuple of them if several are named."""
        h = self.features(x)
        out = tuple(self.heads[name](h) for name in heads or list(self.heads)[:1])
        return out if len(heads) > 1 else out[0]


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.scale, None


def build_model(
    arch: str, heads: dict[str, int], *, width: float = 1.0, stem: str = "cifar",
    mean: Iterable[float] = IMAGENET_STATS[0], std: Iterable[float] = IMAGENET_STATS[1], positions: int = 0,
) -> Network:  # fmt: skip
    """A network by name, e.g. build_model("resnet18", {"class": 10, "rotation": 4}).

    `model.spec` keeps the arguments: it goes into checkpoints as `network`, from which `load_model` rebuilds
    it.
    """
    spec = {"arch": arch, "heads": dict(heads), "width": width, "stem": stem}
    spec |= {"mean": list(mean), "std": list(std)}
    spec |= {"positions": positions} if positions else {}
    model = Network(build_trunk(arch, width, stem, positions), heads, mean, std)
    model.spec = spec
    return model


def load_trunk(trunk: nn.Module, state: dict, source: str | Path) -> None:
    """Copy the trunk's weights from a checkpoint, and nothing else. Raises UserError if they do not fit."""
    weights = {k.removeprefix("trunk."): v for k, v in state["model"].items() if k.startswith("trunk.")}
    load_weights(trunk, weights, source)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for --amp. 'auto': bf16 where the hardware has it, else fp16 on CUDA and float32 on CPUs."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":
        amp = "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def place_model(model: Network, device: torch.device, amp: str = "auto", compile: bool = False) -> Network:
    """Move to the device in channels_last layout, set mixed precision, perhaps compile the trunk in place."""
    model.to(device, memory_format=torch.channels_last)
    model.amp = amp_dtype(amp, device)
    if compile:
        # In place: neither the checkpoint's keys nor the mode handling change. Batches have few sizes; each
        # gets its own kernels.
        model.trunk.compile(dynamic=False)
    return model


@contextlib.contextmanager
def full_precision(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Compute in true float32 for reported numbers: no mixed precision, no TF32 in convolutions or matrix
    products. Restored on leaving. Not `enabled`: nothing happens."""
    if not enabled:
        yield
        return
    amps = {m: m.amp for m in model.modules() if isinstance(m, Network)}
    tf32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        for m in amps:
            m.amp = None
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32[0]
        torch.set_float32_matmul_precision(tf32[1])
        for m, amp in amps.items():
            m.amp = amp
# ======================================================================================================
# 4. Attacks: PGD, AutoPGD, MultiTargeted and Square in the linf and l2 ball, robust accuracy
# ======================================================================================================


def l2_norm(v: Tensor) -> Tensor:
    """l2 norm of each image: (B, ...) -> (B, 1, ..., 1)."""
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)


def project(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Project z onto the eps-ball around x, then clamp to [0, 1], where x is: that stays in the ball."""
    if norm == "linf":
        return torch.clamp(z, (x - eps).clamp(min=0), (x + eps).clamp(max=1))
    delta = z - x
    return (x + delta * (eps / l2_norm(delta).clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)


def check_attack(x: Tensor, eps: float, norm: str) -> None:
    """Raise ValueError for a wrong norm or radius, images outside [0, 1], and `torch.inference_mode`."""
    if norm not in ("linf", "l2") or not 0 <= eps <= {"linf": 1, "l2": math.inf}[norm]:
        raise ValueError(f"norm must be 'linf' (with 0 <= eps <= 1) or 'l2' (0 <= eps), got {norm!r}, {eps}")
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks need gradients: use torch.no_grad() in place of torch.inference_mode()")
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()  # see cuda_graph
    if not recording and not ((x >= 0) & (x <= 1)).all():  # waits for the GPU, once per attack
        raise ValueError("images must be in [0, 1]; normalise inside the network")


def pgd(
    loss: Callable[[Tensor], Tensor], x: Tensor, *, eps: float, norm: str = "linf", steps: int = 10,
    step_size: float = 0.0, start: Tensor | None = None, keep_best: bool = False,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent on `loss` in the eps-ball around x and in [0, 1] (Madry et al. 2018).

        with batchnorm_mode(model, "eval"):
            x_adv = pgd(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=8 / 255)

    loss: images (B, C, H, W) -> one value per image (B,), to be maximised. Weights and .grad stay the same.
    x: (B, C, H, W) in [0, 1]. norm 'linf': |delta_i| <= eps for each value; 'l2': ||delta||_2 <= eps.
    step_size: 0 is for linf the larger of 2/255 (Kucer et al., section 4.2) and 2 eps / steps, for l2
        2 eps / steps (Salman et al. 2020).
    start: images to begin with; by default random, for linf uniform in the ball, for l2 on its surface.
    keep_best: return each image's iterate of highest loss, not its last (costs one more pass).
    Returns the adversarial images, detached. Raises ValueError for wrong arguments.
    """
    check_attack(x, eps, norm)
    x = x.detach()
    if eps == 0:
        return x.clone()
    step_size = step_size or max(2 * eps / max(steps, 1), 2 / 255 if norm == "linf" else 0)
    if start is not None:
        x_adv = project(start.detach(), x, eps, norm)
    elif norm == "linf":  # not rand_like: its numbers would depend on the memory layout of x
        noise = 2 * torch.rand(x.shape, device=x.device, dtype=x.dtype) - 1
        x_adv = project(x + noise * eps, x, eps, norm)
    else:
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype)
        x_adv = (x + noise * (eps / l2_norm(noise))).clamp(0, 1)
    best, best_loss = x_adv, torch.full((len(x),), -math.inf, device=x.device)
    for step in range(steps + keep_best):
        with torch.enable_grad():
            z = x_adv.detach().requires_grad_()
            values = loss(z)  # (B,)
            if values.shape != (len(x),):
                raise ValueError(f"loss must return one value per image, not {tuple(values.shape)}")
            # The gradient for the images only. The sum, not the mean, keeps them independent of each other.
            (grad,) = torch.autograd.grad(values.sum(), z)
        if keep_best:
            better = (values.detach() > best_loss).view(-1, *[1] * (x.dim() - 1))
            best, best_loss = torch.where(better, x_adv, best), best_loss.fmax(values.detach())
        if step < steps:
            if norm == "linf":
                direction = grad.sign().where(grad == grad, grad)  # the sign of NaN would be 0
            else:
                direction = grad / (l2_norm(grad) + 1e-12)
            x_adv = project(x_adv + step_size * direction, x, eps, norm)
    return best if keep_best else x_adv


def ce_per_image(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy: logits (B, classes), y (B,) -> (B,), as attacks want it. F.cross_entropy is its mean."""
    return F.cross_entropy(logits, y.long(), reduction="none")


@contextlib.contextmanager
def batchnorm_mode(model: Callable, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """The mode in which a network is attacked; every module's own mode is restored on leaving.

    'eval': running statistics, so that an image's attack does not depend on the rest of its batch.
    'train': the statistics of the batch (and active dropout), without changing the running ones.
    Weights need no gradient meanwhile: a compiled network would compute it along with that of the images.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []  # a function has no mode
    weights = [p for m in modules for p in m.parameters(recurse=False) if p.requires_grad]
    modes = [(m, m.training) for m in modules]
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    try:
        if modules:
            model.train(mode == "train")
        for p in weights:
            p.requires_grad_(False)
        for m in norms:
            m.track_running_stats = mode == "eval"
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p in weights:
            p.requires_grad_(True)
        for m in norms:
            m.track_running_stats = True


def cuda_graph(attack: Callable[..., Any]) -> Callable[..., Any]:
    """The attack of a training step, replayed as one CUDA graph; it must return tensors.

        perturb = cuda_graph(lambda x, y: pgd(lambda z: ce_per_image(model(z), y), x, eps=8 / 255))
        x_adv = perturb(x, y)

    PGD is thousands of small kernels; a CPU launches them more slowly than a GPU runs small batches. A graph
    launches all at once, with the weights of the moment. It is recorded for each shape of the inputs, in the
    second call with it; the first runs as usual, which tunes the kernels. Numbers, branches and modes inside
    `attack` are fixed by then: pass what changes as a tensor, and read no tensor's value. On a CPU, and on
    several GPUs, where BatchNorm may exchange statistics, the attack is just called.
    """
    recorded: dict[tuple, Any] = {}
    memory = None  # that all recordings share

    def perturb(*inputs: Tensor) -> Any:
        nonlocal memory
        if not inputs[0].is_cuda or world()[1] > 1:
            return attack(*inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in recorded:
            recorded[shapes] = None
            return attack(*inputs)
        if recorded[shapes] is None:
            try:
                graph = torch.cuda.CUDAGraph()
            except RuntimeError:  # a device without graphs
                return attack(*inputs)
            its_inputs = [x.clone() for x in inputs]
            # thread_local: another thread may be pinning the next images in memory meanwhile
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                outputs = attack(*its_inputs)
            memory, recorded[shapes] = graph.pool(), (graph, its_inputs, outputs)
        graph, its_inputs, outputs = recorded[shapes]
        for its, x in zip(its_inputs, inputs, strict=True):
            its.copy_(x)
        graph.replay()  # writes to the same outputs every time
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)

    return perturb


def robust_accuracy(
    model: Callable, data: Iterable[tuple[Tensor, Tensor]], attack: Callable | None = None,
    heads: tuple[str, ...] = (),
) -> float:  # fmt: skip
    """Accuracy (%) of `model` on the batches (x, y) under attack(x, y) -> x_adv; without one, clean accuracy.

    An image that is misclassified before the attack counts as not robust and is not attacked. A module is in
    eval mode meanwhile and is left as it was; a function is called as it is. heads: names the head of a
    `Network` to evaluate. On several ranks all call it, each with its share of the images. Raises ValueError
    for wrong images, labels or logits and if there are no images, FloatingPointError for NaN logits.
    """
    correct = seen = 0
    with batchnorm_mode(model, "eval"), torch.no_grad():
        for x, y, right in classified(model, data, heads):
            seen += len(y)
            x, y = x[right], y[right]
            if attack is not None and len(y):
                with torch.enable_grad():
                    x_adv = attack(x, y)
                y = y[is_correct(model(x_adv, *heads), y)]
            correct += len(y)
    return percent_of_all_ranks([correct], seen)[0]


def classified(
    model: Callable, data: Iterable[tuple[Tensor, Tensor]], heads: tuple[str, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches (x, y) of `data` on the network's device, and whether each image is correct."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    device = next((p.device for p in parameters), None)
    for x, y in data:
        x, y = x.to(device), y.to(device).long()
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError("images must be in [0, 1]; normalise inside the network")
        if len(y):
            yield x, y, is_correct(model(x, *heads), y)


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) bool: is the highest of the logits (B, classes) that of the label y (B,)?

    Raises ValueError for other shapes and for a single logit, FloatingPointError for NaN or infinite logits.
    """
    if logits.dim() != 2 or logits.shape[1] < 2 or y.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(y.shape)}"
        raise ValueError(f"logits must be (B, 2 classes or more) and labels (B,), not {shapes}")
    if not logits.isfinite().all():
        raise FloatingPointError("the network returns NaN or infinite logits: it has no accuracy.")
    return logits.argmax(1) == y


def percent_of_all_ranks(counts: list[int], seen: int) -> list[float]:
    """Counts of images, summed over ranks, in percent of the images seen. ValueError if none was seen."""
    seen, *counts = map(sum, zip(*of_all_ranks([seen, *counts]), strict=True))
    if not seen:
        raise ValueError("there are no images: was `data` a generator that had been used before?")
    return [100 * n / seen for n in counts]


# ---- stronger attacks --------------------------------------------------------------------------------
# The loss(x) of `apgd` returns (B,) as for `pgd`, or a pair ((B,), fooled (B,) bool): then an image that
# fooled the network is returned as the last point that did, any other as the point of highest loss.


class _Best:
    """For each image, the point of highest loss so far and the last point that fooled the network."""

    def __init__(self, x: Tensor, values: Tensor, fooled: Tensor):
        self.x, self.values, self.fooling, self.fooled = x, values, x, fooled

    def add(self, x: Tensor, values: Tensor, fooled: Tensor) -> Tensor:
        """Take the points into account. Returns where the loss is higher than ever before, (B,)."""
        better = values > self.values
        self.x = torch.where(_per_image(better, x), x, self.x)
        self.values = values.maximum(self.values)  # stays NaN if it was NaN once
        self.fooling = torch.where(_per_image(fooled, x), x, self.fooling)
        self.fooled = self.fooled | fooled
        return better

    def result(self) -> Tensor:
        """The images. Those whose loss was NaN are NaN, so that an evaluation of them stops."""
        x = torch.where(_per_image(self.fooled, self.x), self.fooling, self.x)
        return torch.where(_per_image(self.values.isnan(), x), math.nan, x)


def _per_image(v: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as x."""
    return v.view(-1, *[1] * (x.dim() - 1))


def _values(loss: Callable, z: Tensor, need_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (B,), fooled (B,), gradient for the images; without need_grad zeros)."""
    z = z.detach().requires_grad_(need_grad)
    with torch.set_grad_enabled(need_grad):
        out = loss(z)
        values, fooled = out if isinstance(out, tuple) else (out, torch.zeros_like(out, dtype=torch.bool))
        if values.shape != z.shape[:1]:
            raise ValueError(f"loss must return one value per image ({len(z)},), not {tuple(values.shape)}")
        grad = torch.autograd.grad(values.sum(), z)[0] if need_grad else torch.zeros_like(z)
    return values.detach(), fooled.detach(), grad


def apgd_checkpoints(steps: int) -> list[int]:
    """Steps after which AutoPGD may halve its step size (Croce and Hein 2020, section 3.1): 22 41 57 70 ...

    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), w_j = ceil(p_j steps); in hundredths, to be exact.
    """
    p, last, points = 22, 0, []
    while p <= 100:
        points.append(-(-p * steps // 100))
        p, last = p + max(p - last - 3, 6), p
    return sorted(set(points))


def apgd(
    loss: Callable, x: Tensor, *, eps: float, norm: str = "linf", steps: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoPGD (Croce and Hein 2020, Algorithm 1): ascent with momentum. The step size is 2 eps at first and
    is halved for each image separately. One random start.

        x_adv = apgd(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, eps=8 / 255)

    loss, x, eps, norm: as for `pgd`. If loss returns (values, fooled), an image that fooled the network is
    returned in place of that of highest loss. generator: source of the random start; None is torch's.
    Returns images like x, detached.
    """
    check_attack(x, eps, norm)
    x = x.detach()
    if eps == 0:
        return x.clone()
    if norm == "linf":  # the start is on the surface of the ball, as in the authors' code
        u = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
        u = u / _per_image(u.flatten(1).abs().amax(1), x)
    else:
        u = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        u = u / l2_norm(u)
    z = before = (x + eps * u).clamp(0, 1)
    values, fooled, grad = _values(loss, z, need_grad=steps > 0)
    best, best_grad = _Best(z, values, fooled), grad
    step_size = torch.full((len(x),), 2.0 * eps, device=x.device, dtype=x.dtype)
    risen = torch.zeros_like(step_size)  # number of steps since the last checkpoint that raised the loss
    halved = torch.zeros_like(fooled)  # whether the last checkpoint halved the step size
    checkpoints, last, best_at_last = apgd_checkpoints(steps), 0, best.values
    for k in range(1, steps + 1):
        a = 0.75 if k > 1 else 1.0  # momentum
        direction = grad.sign() if norm == "linf" else grad / (l2_norm(grad) + 1e-12)
        ahead = project(z + _per_image(step_size, x) * direction, x, eps, norm)
        z, before = project(z + a * (ahead - z) + (1 - a) * (z - before), x, eps, norm), z
        previous = values
        values, fooled, grad = _values(loss, z, need_grad=k < steps)
        risen += values > previous
        better = best.add(z, values, fooled)
        best_grad = torch.where(_per_image(better, x), grad, best_grad)
        if k in checkpoints:
            halve = risen < 0.75 * (k - last)  # condition 1: too few steps raised the loss
            halve |= ~halved & (best.values <= best_at_last)  # condition 2: no progress with this step size
            step_size = torch.where(halve, step_size / 2, step_size)
            z = torch.where(_per_image(halve, x), best.x, z)  # continue from the best point
            grad = torch.where(_per_image(halve, x), best_grad, grad)
            values = torch.where(halve, best.values, values)
            risen, halved, last, best_at_last = torch.zeros_like(risen), halve, k, best.values
    return best.result()


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - max of the others, (B,): negative if and only if the image is misclassified (0 is a tie)."""
    y = y.long()[:, None]
    return logits.gather(1, y).squeeze(1) - logits.scatter(1, y, -math.inf).amax(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6), (B,), to be maximised. Positive if and only if
    misclassified. Scaling the logits does not change it. With two classes: -margin."""
    if logits.shape[1] < 3:
        return -margin(logits, y)
    top = logits.topk(3, 1).values
    return -margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def target_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, (B,)."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y.long()[:, None])).squeeze(1)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The loss towards a target class (Croce and Hein 2020, eq. 7), (B,), to be maximised. With fewer than
    four classes: z_t - z_y."""
    if logits.shape[1] < 4:
        return target_margin(logits, y, target)
    top = logits.topk(4, 1).values
    return target_margin(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def nth_target(logits: Tensor, y: Tensor, n: int) -> Tensor:
    """(B,): the wrong class of highest logit for n = 0, the second for 1, ... (then again the first)."""
    wrong = logits.scatter(1, y.long()[:, None], -math.inf).argsort(1, descending=True)[:, :-1]
    return wrong[:, n % wrong.shape[1]]


def multi_targeted(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, norm: str = "linf",
    steps: int = 200, restart: int = 0, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """One restart of MultiTargeted (Gowal et al. 2019): ascent on z_t - z_y with a target t of its own, see
    `nth_target`. Other arguments as for `apgd`.

    linf: Adam with learning rate 0.1, from half of the steps on 0.01, from three quarters on 0.001 (ours).
    l2: steps of 5 eps times that rate along the normalised gradient. Adam would make all components nearly
    equal, which is a bad direction for this ball.
    """
    check_attack(x, eps, norm)
    x = x.detach()
    with torch.no_grad():
        target = nth_target(model(x), y, restart)

    def loss(z: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(z)
        return target_margin(logits, y, target), logits.argmax(1) != y

    noise = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
    z = project(x + eps * noise, x, eps, norm)
    first, second, best = torch.zeros_like(x), torch.zeros_like(x), None
    for k in range(steps + 1):
        values, fooled, grad = _values(loss, z, need_grad=k < steps)
        if best is None:
            best = _Best(z, values, fooled)
        best.add(z, values, fooled)
        if k == steps:
            break
        if norm == "linf":
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            move = first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
        else:
            move = 5 * eps * grad / (l2_norm(grad) + 1e-12)
        rate = 0.1 if k < steps / 2 else 0.01 if k < 3 * steps / 4 else 0.001
        z = project(z + rate * move, x, eps, norm)
    return best.result()


@torch.no_grad()
def square(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, norm: str = "linf",
    queries: int = 5000, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Square attack (Andriushchenko et al. 2020): random search for the smallest `margin`, without gradients.

    p is 0.8 at first and follows the schedule for 10,000 queries whatever `queries` is, as in AutoAttack.
    Positions (from the generator's seed) and signs are the same for all images, so no image depends on its
    batch. All images are queried to the end: leave out those that are misclassified already. Other arguments
    as for `apgd`.
    """
    check_attack(x, eps, norm)
    x = x.detach()
    seed = generator.initial_seed() if generator else int(torch.randint(2**31, ()))
    places = torch.Generator().manual_seed(seed)  # on the CPU: reading a position must not wait for a GPU
    _, c, h, w = x.shape

    def signs(*shape: int) -> Tensor:
        u = torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
        return torch.where(u < 0.5, -1.0, 1.0).to(x.dtype)

    def window(side: int) -> tuple[slice, slice]:  # never at the last row or column, as in the authors' code
        top, left = (int(torch.randint(max(n - side, 1), (), generator=places)) for n in (h, w))
        return slice(top, top + side), slice(left, left + side)

    @functools.cache
    def hill(height: int, width: int) -> Tensor:
        """(height, width) of norm 1: 1 at the centre, plus 1/4 on 3 x 3 pixels, plus 1/9 on 5 x 5, ..."""
        rows, cols = (torch.arange(n, device=x.device).sub(n // 2).abs() for n in (height, width))
        terms = 1 / torch.arange(1, max(height, width) // 2 + 2, device=x.device, dtype=x.dtype) ** 2
        out = terms.flip(0).cumsum(0).flip(0)[torch.maximum(rows[:, None], cols)]
        return out / out.norm()

    def bump(side: int) -> Tensor:
        """A hill beside a valley, the paper's eta, (1, C, side, side), turned and signed at random."""
        both = torch.cat([hill(side // 2, side), -hill(side - side // 2, side)])
        both = both.T if int(torch.randint(2, (), generator=places)) else both
        return both / both.norm() * signs(1, c, 1, 1)

    def per_channel(v: Tensor) -> Tensor:
        return v.flatten(2).norm(dim=2)[:, :, None, None]

    if norm == "linf":
        delta = eps * signs(1, c, 1, w)  # vertical stripes
    else:
        delta, side = torch.zeros_like(x[:1]), max(min(h, w) // 5, 1)
        for top in range(max((h - 5 * side) // 2, 0), h - side + 1, side):
            for left in range(max((w - 5 * side) // 2, 0), w - side + 1, side):
                delta[:, :, top : top + side, left : left + side] = bump(side)
        delta = eps * delta / l2_norm(delta)
    best = (x + delta).clamp(0, 1)
    lowest = margin(model(best), y)  # (B,)
    for query in range(1, queries):
        halvings = sum(query > limit for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = min(max(round(math.sqrt(0.8 / 2**halvings * h * w)), 1), h, w)
        if norm == "linf":
            z, (rows, cols) = best.clone(), window(side)
            z[:, :, rows, cols] += 2 * eps * signs(1, c, 1, 1)
            z = project(z, x, eps, norm)
        else:
            side = min(max(side, 3), h, w)
            if side % 2 == 0:  # odd
                side += 1 if side < min(h, w) else -1
            (rows, cols), (rows2, cols2) = window(side), window(side)
            delta = best - x
            in_windows = torch.zeros_like(delta[:1])
            in_windows[:, :, rows, cols] = in_windows[:, :, rows2, cols2] = 1
            # The first window gets the norm of both, and what is missing to the radius, channel by channel.
            missing = (eps**2 - l2_norm(delta) ** 2).clamp(min=0) / c
            budget = missing + per_channel(delta * in_windows) ** 2  # (B, C, 1, 1)
            old = delta[:, :, rows, cols]
            new = bump(side) + old / (1e-12 + per_channel(old))
            new = new / (1e-12 + per_channel(new)) * budget.sqrt()
            delta[:, :, rows2, cols2] = 0
            delta[:, :, rows, cols] = new
            z = (x + eps * delta / l2_norm(delta).clamp(min=1e-12)).clamp(0, 1)
        found = margin(model(z), y)
        better = (found < lowest) & (lowest >= 0)  # images that fool the network stay as they are
        best = torch.where(_per_image(better, x), z, best)
        lowest = torch.where(better | found.isnan(), found, lowest)  # stays NaN if it was NaN once
    return torch.where(_per_image(lowest.isnan(), x), math.nan, best)


def suite_attacks(kind: str, norm: str, eps: float, seed: int = 0) -> list[tuple[str, int, Callable]]:
    """The attacks of an evaluation in order: (name, restarts, attack(model, x, y, restart) -> x_adv).

    'suite': the one of Gowal et al. 2021, after PGD-20, which is cheap and leaves fewer images to the others.
    Their "MultiTargeted with 20 restarts" is read as 20 in all, the targets in turn (it may also mean 20 for
    each target, 9 times the cost on CIFAR-10). 'suite-fast': a tenth of 'suite'. 'apgd': the AutoPGD of
    'suite', as on their ImageNet. 'standard': AutoAttack (Croce and Hein 2020) without FAB. 'pgd20': PGD.
    seed: of the random numbers, the same for each batch. Raises ValueError for another kind.
    """
    suites = {  # name: (restarts, steps or queries of each)
        "pgd20": {"pgd-20": (1, 20)},
        "apgd": {"apgd-ce": (5, 100), "apgd-dlr": (5, 100)},
        "suite": {
            "pgd-20": (1, 20), "apgd-ce": (5, 100), "apgd-dlr": (5, 100), "multi-targeted": (20, 200),
            "square": (1, 5000),
        },
        "suite-fast": {
            "pgd-20": (1, 20), "apgd-ce": (1, 50), "apgd-dlr": (1, 50), "multi-targeted": (9, 50),
            "square": (1, 500),
        },
        "standard": {"apgd-ce": (1, 100), "apgd-t": (9, 100), "square": (1, 5000)},
    }  # fmt: skip
    if kind not in suites:
        raise ValueError(f"kind must be one of {', '.join(suites)}, not {kind!r}")

    def attack(name: str, steps: int, model: Callable, x: Tensor, y: Tensor, restart: int) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(seed * 1_000 + restart)
        ball = {"eps": eps, "norm": norm, "generator": generator}
        if name == "square":
            return square(model, x, y, queries=steps, **ball)
        if name == "multi-targeted":
            return multi_targeted(model, x, y, steps=steps, restart=restart, **ball)
        if name == "pgd-20":
            with torch.random.fork_rng([x.device] if x.is_cuda else []):
                torch.manual_seed(seed * 1_000 + restart)
                return pgd(lambda z: ce_per_image(model(z), y), x, eps=eps, norm=norm, steps=steps)
        if name == "apgd-t":
            with torch.no_grad():
                per_image = functools.partial(targeted_dlr, target=nth_target(model(x), y, restart))
        else:
            per_image = {"apgd-ce": ce_per_image, "apgd-dlr": dlr}[name]

        def loss(z: Tensor) -> tuple[Tensor, Tensor]:
            logits = model(z)
            return per_image(logits, y), logits.argmax(1) != y

        return apgd(loss, x, steps=steps, **ball)

    return [(name, n, functools.partial(attack, name, steps)) for name, (n, steps) in suites[kind].items()]


def suite_accuracy(
    model: Callable, data: Iterable[tuple[Tensor, Tensor]], attacks: list[tuple[str, int, Callable]], *,
    batch_size: int = 500, heads: tuple[str, ...] = (),
) -> dict[str, float]:  # fmt: skip
    """{'none': clean accuracy, name: accuracy after that attack and those before it} in percent.

    attacks: see `suite_attacks`. An image counts as robust only if no restart of any attack fools the model.
    Images are held in memory, and those that are still robust are attacked in batches of `batch_size`. Warns
    of signs that the attacks fail (`doubts`). Otherwise as `robust_accuracy`.
    """

    def classify(x: Tensor) -> Tensor:
        return model(x, *heads)

    seen, kept, remaining, signs = 0, [], {}, []
    with batchnorm_mode(model, "eval"), torch.no_grad():
        for x, y, right in classified(model, data, heads):
            seen += len(y)
            kept.append((x[right], y[right]))
        x, y = map(torch.cat, zip(*kept, strict=True)) if kept else (torch.empty(0), torch.empty(0))
        if len(y):
            signs = doubts(classify, x[:100], y[:100], eps=0)
        remaining["none"] = len(y)
        for name, restarts, attack in attacks:
            before = len(y)
            for restart in range(restarts):
                if not len(y):
                    break
                right = []
                for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
                    with torch.enable_grad():
                        part_adv = attack(classify, part, labels, restart)
                    right.append(is_correct(classify(part_adv), labels))
                x, y = x[torch.cat(right)], y[torch.cat(right)]
            remaining[name] = len(y)
            if name == "square" and len(remaining) > 2 and before - len(y) > max(3, 0.002 * seen):
                signs.append(f"Square, without gradients, fools {before - len(y)} more images.")
    for sign in signs:
        warnings.warn(sign, stacklevel=2)
    return dict(zip(remaining, percent_of_all_ranks(list(remaining.values()), seen), strict=True))


def doubts(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, eps: float, norm: str = "linf"
) -> list[str]:
    """Warnings of gradient masking, one sentence each: signs that attacks fail rather than that the network
    is robust (Athalye et al. 2018; Carlini et al. 2019).

    model: images to logits, in eval mode; x, y: 50 test images or more. Costs about 100 passes with gradient
    and 200 without; with eps 0 only the signs that need no attack are looked for.
    """
    found, half = [], (len(x) + 1) // 2
    with torch.no_grad():
        logits, again, alone = model(x), model(x), model(x[:half])
    if logits.shape[1] < 2:
        return ["the network has a single logit, so the highest is always right: it needs one per class."]
    size = logits.abs().amax()
    if (logits - again).abs().amax() > 1e-3 * size:
        found.append("the outputs for one image differ: average over the randomness in the attack.")
    elif (logits[:half] - alone).abs().amax() > 1e-2 * size:
        found.append("outputs for an image depend on the rest of its batch: attacks need independent ones.")
    if logits.amin() >= 0 and ((logits.sum(1) - 1).abs() < 1e-3).all():
        found.append("the network seems to return probabilities: the attacks need logits, without a softmax.")
    right = logits.argmax(1) == y
    x, y = x[right], y[right]
    if not len(x):
        return found

    def loss(z: Tensor) -> Tensor:
        return ce_per_image(model(z), y)

    has_gradient = _values(loss, x)[2].flatten(1).abs().amax(1) > 1e-10  # neither zero nor NaN
    flat = 100 * (~has_gradient).float().mean().item()
    if flat > 5:
        found.append(f"the gradient for the image is zero for {flat:.0f}% of the images: attacks are blind.")
    if len(x) < 20 or eps == 0:
        return found

    def accuracy(x_adv: Tensor) -> float:
        with torch.no_grad():
            return 100 * (model(x_adv).argmax(1) == y).float().mean().item()

    def under_pgd(eps: float, steps: int) -> float:
        return accuracy(pgd(loss, x, eps=eps, norm=norm, steps=steps))

    tolerance = 3 * 100 / len(x)  # three images
    by_pgd, longer = under_pgd(eps, 20), under_pgd(eps, 60)
    larger = under_pgd(min(2 * eps, 1.0) if norm == "linf" else 2 * eps, 20)
    by_square = accuracy(square(model, x, y, eps=eps, norm=norm, queries=200))
    if longer > by_pgd + tolerance:
        found.append(f"PGD with 60 steps leaves more accuracy ({longer:.0f}%) than with 20 ({by_pgd:.0f}%).")
    if larger > by_pgd + tolerance:
        found.append(f"PGD with twice the radius leaves more accuracy ({larger:.0f}%, {by_pgd:.0f}%).")
    if by_square < by_pgd - tolerance:
        found.append(f"Square leaves less accuracy ({by_square:.0f}%) than PGD ({by_pgd:.0f}%).")
    return found


# ======================================================================================================
# 5. Results: evaluation of a checkpoint, tables, pictures
# ======================================================================================================


def evaluate(
    run: Run, name: str, state: dict, test_set: Images, radii: Iterable[float], *,
    norm: str = "", batch_size: int = 0, picture_eps: float = 0.0,
) -> list[dict]:  # fmt: skip
    """Accuracy of the checkpoint `state` under attack on the class loss. Returns a row of results.json per
    radius: name, attack ("none" at radius 0), norm, eps, examples, accuracy (%), epoch, and of a suite
    `after`, the accuracy after each of its attacks.

    Attack and precision are those of the flags, also norm and batch_size if not given. picture_eps: radius
    at which adversarial.png is written and signs of gradient masking (`doubts`) are printed; 0: neither. All
    ranks must call it. Raises FloatingPointError if the network returns NaN.
    """
    args, rows = run.args, []
    norm, batch_size = norm or args.norm, batch_size or args.batch_size
    model = place_model(rebuild(state, name), run.device, args.amp).eval()

    def attack_at(eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        torch.manual_seed(args.seed + world()[0])  # of the random starts
        attack = functools.partial(pgd, eps=eps, norm=norm, steps=args.eval_steps)
        return lambda x, y: attack(lambda z: ce_per_image(model(z, "class"), y), x)

    for eps in radii:
        stream = batches(test_set, batch_size, run.device, workers=args.workers)
        stream = progress(stream, len(test_set), f"{name} at {eps_name(eps)}")
        row = {"name": name, "attack": "none", "norm": norm, "eps": eps, "examples": len(test_set)}
        with full_precision(model, not args.eval_amp):
            if eps == 0:
                accuracy = robust_accuracy(model, stream, heads=("class",))
            elif args.eval_attack == "pgd20":
                row["attack"] = f"pgd-{args.eval_steps}"
                accuracy = robust_accuracy(model, stream, attack_at(eps), heads=("class",))
            else:
                row["attack"] = args.eval_attack
                attacks = suite_attacks(args.eval_attack, norm, eps, args.seed)
                size = max(1, batch_size // world()[1])
                row["after"] = suite_accuracy(model, stream, attacks, batch_size=size, heads=("class",))
                accuracy = list(row["after"].values())[-1]
        rows.append(row | {"accuracy": round(accuracy, 2), "epoch": state["epoch"]})
    if picture_eps and world()[0] == 0:
        some = test_set.subset(torch.arange(min(100 * world()[1], len(test_set))))  # this rank gets its share
        x, y = next(batches(some, len(some), run.device, workers=0))
        with full_precision(model, not args.eval_amp):
            shown = attack_at(picture_eps)(x[:10], y[:10])
            save_attack_picture(run.folder / "adversarial.png", x[:10], shown)
            for doubt in doubts(model, x, y, eps=picture_eps, norm=norm):
                run.say(f"warning: {name}: {doubt}")
    return rows


def train_digits(run: Run) -> Path:
    """Train two small networks, without and with attack, by rotation_at.py in another process. Returns the
    folder of plain.pt and best.pt. Raises UserError."""
    folder, problem = run.folder / "digits", ""
    if world()[0] == 0:
        run.say("training two small networks on digits (rotation_at.py --quick --variant T0) ...")
        command = [sys.executable, str(Path(__file__).resolve().with_name("rotation_at.py")), "--quick"]
        command += ["--variant", "T0", "--resume", "--out", str(folder), "--device", run.args.device]
        alone = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}  # one rank
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        if done.returncode:
            problem = f"training on digits failed ({done.stderr.strip()[-300:]}); name a checkpoint."
    all_ranks_fine(problem)  # the other ranks wait here
    return folder


def results_table(results: dict, args: Any, reported: str = "") -> str:
    """What results.json holds as text: a line per network, a column per attack and radius, and below a
    network the paper's row if one matches. reported: how the epoch was chosen. Raises KeyError for
    incomplete rows."""
    rows, table = results["rows"], []
    columns = list(dict.fromkeys((row["attack"], row["norm"], row["eps"]) for row in rows))
    for name, epoch in dict.fromkeys((row["name"], row["epoch"]) for row in rows):
        mine = {(r["attack"], r["norm"], r["eps"]): r["accuracy"] for r in rows if r["name"] == name}
        table.append([f"{name}, epoch {epoch}", *(f"{mine[c]:.2f}" if c in mine else "" for c in columns)])
        known = paper_numbers(results["script"], args, name)
        if len(known) == len(columns):
            table.append(["  the paper", *known])
    attacks = [attack for attack in dict.fromkeys(attack for attack, _, _ in columns) if attack != "none"]
    norms = list(dict.fromkeys(norm for _, norm, _ in columns))
    header = []
    for attack, norm, eps in columns:  # what all columns share stands above the table
        shown = [attack] * (len(attacks) > 1) + [norm] * (len(norms) > 1) + [eps_name(eps)]
        header.append(" ".join(shown))
    plain = " (plain: without attack)" if "plain" in dict.fromkeys(row["name"] for row in rows) else ""
    about = (
        f"{args.dataset}, {args.arch} x{args.width:g}, trained with {args.norm} eps {eps_name(args.eps)}"
        f"{plain}; accuracy (%) on {rows[0]['examples']:,} test images\n"
        f"under {', '.join(attacks) or 'no attack'}, {'mixed precision' if args.eval_amp else 'float32'}. "
        f"Epoch reported: {reported}. {results['seconds']:.0f} s of training and evaluation."
    )
    return f"\n{about}\n\n" + text_table([f"{', '.join(norms)} eps", *header], table)


def paper_numbers(script: str, args: Any, name: str) -> list[str]:
    """The paper's accuracies of the row `name` of a run with these flags in the order of its columns, or [].

    results/paper.txt has a line per row of a table: script | flags that differ from the defaults | name |
    accuracies. `flag=a,b` accepts two values, `flag=*` any. Flags that say where to compute or which rows
    there are do not matter, nor do --seed, --amp and --init.
    """
    path = Path(__file__).resolve().parent / "results" / "paper.txt"
    free = FREE_ON_RESUME | {"seed", "amp", "init", "plain", "label_fractions", "heads"}
    usual, given = asdict(type(args)()), {k: v for k, v in asdict(args).items() if k not in free}
    changed = {k for k, v in given.items() if v != usual[k]}
    for line in path.read_text().splitlines() if path.exists() else []:
        of, flags, row, accuracies = line.split("|") if line.count("|") == 3 else ("", "", "", "")
        if (of.strip(), row.strip()) != (script, name):
            continue
        wanted = dict(flag.split("=") for flag in flags.split())
        same = (v == "*" or _shown(given.get(k)) in v.split(",") for k, v in wanted.items())
        if changed <= wanted.keys() and all(same):
            return ["" if v == "-" else v for v in accuracies.split()]
    return []


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned on the right, the first on the left, as text."""
    width = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * w for w in width], *rows]:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, width, strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def grouped_bars(
    ax: Any, groups: list[str], heights: dict[str, list[float]], errors: dict[str, list[float]] | None = None
) -> None:
    """Draw a bar per group and name on matplotlib axes, a colour per name. heights and errors (the lengths of
    error bars): {name: one per group}; NaN draws none."""
    width = 0.8 / len(heights)
    for i, (name, values) in enumerate(heights.items()):
        at = [group + (i - (len(heights) - 1) / 2) * width for group in range(len(groups))]
        ax.bar(at, values, width, label=name, color=f"C{i % 10}", yerr=errors[name] if errors else None)
    ax.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups], rotation=45, ha="right")
    ax.grid(axis="y", alpha=0.3)


def save_attack_picture(path: Path, x: Tensor, x_adv: Tensor) -> None:
    """Write a PNG: images, their adversarial versions and the magnified difference (grey is none)."""
    gain = 0.5 / max((x_adv - x).abs().max().item(), 1e-6)
    difference = {f"difference x {gain:.3g}": 0.5 + gain * (x_adv - x)}
    save_image_grid(path, {"clean": x, "adversarial": x_adv} | difference)


def save_image_grid(path: Path, rows: dict[str, Tensor]) -> None:
    """Write a PNG with one captioned row of images per entry of `rows`, each (N, 3, H, W) in [0, 1]."""
    from PIL import Image, ImageDraw
    from torchvision.utils import make_grid

    scale = max(1, 64 // next(iter(rows.values())).shape[-1])
    tiles = torch.cat([v.detach().float().cpu() for v in rows.values()])
    tiles = tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(tiles, nrow=len(next(iter(rows.values()))), padding=2, pad_value=1.0)  # (3, H, W)
    pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    margin = 8 + 7 * max(map(len, rows))
    picture = Image.new("RGB", (margin + pixels.shape[1], pixels.shape[0]), "white")
    picture.paste(Image.fromarray(pixels), (margin, 0))
    for i, caption in enumerate(rows):
        ImageDraw.Draw(picture).text((4, (i + 0.5) * pixels.shape[0] / len(rows) - 6), caption, fill="black")
    write_atomically(path, lambda f: picture.save(f, format="PNG"))
