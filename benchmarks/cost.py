"""What the papers' main commands cost, computed: FLOPs, memory and GPU hours.

    python benchmarks/cost.py                      # a minute
    python benchmarks/cost.py byorl --batch-size 64    # those with this word in their names, another batch
    python benchmarks/cost.py --check              # compute real steps of 2 and 4 images, too (ten minutes)
    python benchmarks/cost.py --json FILE          # also write the table

The script itself runs two steps at the paper's batch size, in bfloat16, on fake tensors, which have a shape
but no values. PyTorch's registry has the FLOPs (a multiplication and an addition are two) of convolutions,
matrix products and attention in the first; `memory` is the largest sum of all tensors that exist at a time in
the second: `weights` (parameters and buffers), `optimiser` (its state, gradients) and else activations.
cuDNN's own memory, fragmentation and the images of the data set (CIFAR-10: 0.1 GB) come on top. GB are 2^30.

GPU hours are of all GPUs together, for all epochs, without evaluation: `at 40%` of an H100's 989 TFLOP/s, and
`as CPU`: at the share of its peak that a CPU reached in the nearest step of speed.py (speed-cpu.json).
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adv_mae  # noqa: E402
import byorl  # noqa: E402
import chen_pretrain_finetune as chen  # noqa: E402
import common  # noqa: E402
import jigsaw_at  # noqa: E402
import mtl_reverse  # noqa: E402
import rotation_at  # noqa: E402
import speed  # noqa: E402
from common import Images, Run, text_table  # noqa: E402

H100 = 989e12  # FLOP/s in bfloat16 without sparsity, NVIDIA's data sheet
IMAGENET = 1_281_167


class Command(NamedTuple):
    """A stage of a script's training."""

    script: Any
    flags: dict
    stage: str
    images: int  # of an epoch
    epochs: int
    batch: int  # on one GPU
    nearest: str  # step of speed.py


# Supervised pre-training by the recipe of fine-tuning is the same step, without a checkpoint to start from.
# Without regularise: mixing images looks at values.
FINE_TUNING = dict(method="supervised", eps=0.0, regularise=False, pretrain_epochs=100)
RECIPES = adv_mae.RECIPES | {"supervised": adv_mae.RECIPES["imagenet"]}
COMMANDS = {
    "rotation_at.py --variant T0": Command(rotation_at, dict(variant="T0"), "train", 42_500, 100, 128, "at"),
    "rotation_at.py": Command(rotation_at, {}, "train", 42_500, 100, 128, "at"),
    "jigsaw_at.py": Command(jigsaw_at, {}, "train", 42_500, 100, 128, "at"),
    "chen_pretrain_finetune.py, P3": Command(chen, {}, "pretrain-P3-rotation", 45_000, 100, 256, "at"),
    "chen_pretrain_finetune.py, F4": Command(chen, dict(pretrain="P1"), "P1F4", 45_000, 100, 256, "at"),
    "chen_pretrain_finetune.py --task ensemble, P3": Command(
        chen, dict(task="ensemble"), "pretrain-P3-ensemble", 45_000, 150, 256, "at"),
    "byorl.py": Command(byorl, {}, "byorl", 48_976, 1000, 512, "byorl"),
    "byorl.py --arch preact18 --width 1": Command(
        byorl, dict(arch="preact18", width=1.0), "byorl", 48_976, 1000, 512, "byorl"),
    "adv_mae.py, A-MAE, 8 GPUs": Command(adv_mae, {}, "a-mae", IMAGENET, 800, 512, "mae"),
    "adv_mae.py, fine-tuning, 8 GPUs": Command(
        adv_mae, FINE_TUNING, "supervised", IMAGENET, 100, 64, "mae"),
    "mtl_reverse.py, one reversal": Command(mtl_reverse, {}, "reverse", 10_000, 1, 128, "reverse"),
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Counts the FLOPs of all operations and the bytes of the tensors that exist."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self.storages = WeakIdKeyDictionary()  # several tensors may share one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += flops_of(func.overloadpacket, args, kwargs, out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> int:
        """Its bytes, or 0 if they were counted already."""
        storage = tensor.untyped_storage()
        if storage in self.storages:
            return 0
        self.storages[storage] = size = storage.nbytes()
        weakref.finalize(storage, self.free, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return size

    def free(self, size: int) -> None:
        self.bytes -= size


def flops_of(op: Any, args: tuple, kwargs: dict, out: Any) -> int:
    aten = torch.ops.aten  # the registry has attention on GPUs, not on CPUs
    if op is aten._scaled_dot_product_flash_attention_for_cpu:
        return flop_registry[aten._scaled_dot_product_flash_attention](*args[:3], out_val=out)
    if op is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return flop_registry[aten._scaled_dot_product_flash_attention_backward](*args[:4], out_val=out)
    return flop_registry[op](*args, **kwargs, out_val=out) if op in flop_registry else 0


class Measured(Exception):
    """Its arguments are the result; nothing else of the script is needed."""


def measure(command: Command, batch: int, fake: bool = True) -> tuple[float, int, int, int]:
    """(FLOPs per image, bytes of weights, of the optimiser, of all at most) of a step on `batch` images."""
    meter, modules, optimizers = Meter(), [], []
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        patch(common, "check_attack", lambda *a: None)  # it looks at values
        patch(adv_mae, "RECIPES", RECIPES)
        if fake:
            # The weights are made as fake tensors on the CPU; moving them would fail.
            patch(torch.nn.Module, "to", lambda module, *a, **k: module)
            stack.enter_context(FakeTensorMode())
        if command.script is mtl_reverse:
            return measure_reversal(meter, batch)

        def random_images(*a: Any, image_size: int = 32, **k: Any) -> tuple[Images, Images]:
            n = 2 * batch if command.script is adv_mae else 2_000  # others hold some out
            pixels = torch.zeros(n, 3, image_size, image_size, dtype=torch.uint8)
            images = Images(pixels, torch.zeros(n, dtype=torch.int64), list("0123456789"), torch.arange(n))
            return images, images

        def epochs(run: Run, stage: str, n: int, model: Any, opt: Any, **more: Any) -> Iterator[int]:
            assert stage == command.stage, f"{stage} comes before {command.stage}"
            run.epoch_seed = 0
            modules.extend([model, *(m for m in more.values() if isinstance(m, torch.nn.Module))])
            optimizers.append(opt)
            yield 0

        def batches(run: Run, *a: Any) -> Iterator[tuple[Tensor, Tensor]]:
            size = run.args.image_size
            x, y = torch.full((batch, 3, size, size), 0.5), torch.arange(batch) % 10
            weights = sum(meter.add(t) for m in modules for t in (*m.parameters(), *m.buffers()))
            meter.add(x)
            with meter:
                yield x, y
                flops, meter.peak = meter.flops / batch, meter.bytes
                yield x, y
            values = [v for state in optimizers[0].state.values() for v in state.values()]
            values += [p.grad for p in modules[0].parameters()]
            optimiser = sum(v.nbytes for v in values if isinstance(v, Tensor))
            raise Measured(flops, weights, optimiser, meter.peak)

        patch(common, "load_data", random_images)
        patch(Run, "epochs", epochs)
        patch(Run, "batches", batches)
        patch(Run, "log", lambda *a, **k: None)
        if hasattr(command.script, "jigsaw_permutations"):  # it looks at values
            same = lambda n, count, seed: torch.arange(n * n).expand(count + 1, -1)  # noqa: E731
            patch(command.script, "jigsaw_permutations", same)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        size = "pretrain_batch_size" if command.script is adv_mae else "batch_size"
        flags = {size: batch, "device": "cpu", "amp": "bf16", "out": folder} | command.flags
        try:
            command.script.main(command.script.Args(**flags))
        except Measured as result:
            return result.args


def measure_reversal(meter: Meter, batch: int) -> tuple[float, int, int, int]:
    """As `measure`: two of the iterations, for all of them."""
    args = mtl_reverse.Args()
    defence = speed.make_defence(args, torch.device("cpu"), "bf16")
    modules = [defence.classifier, *defence.branches.values()]
    weights = sum(meter.add(t) for m in modules for t in (*m.parameters(), *m.buffers()))
    x, seeds = torch.full((batch, 3, 32, 32), 0.5), torch.arange(batch)
    meter.add(x)
    with meter:
        for k in (1, 2):
            mtl_reverse.reverse_step(x, x, k, defence, seeds)
    return meter.flops / batch * args.reverse_steps / 2, weights, 0, meter.peak


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("word", nargs="?", default="", help="only the commands that hold this word")
    add("--batch-size", type=int, default=0, help="images per step on one GPU; 0: the paper's")
    add("--check", action="store_true", help="compare with real steps of 2 and 4 images")
    add("--json", default="", help="write the table to this file")
    flags = parser.parse_args()
    measured = Path(__file__).resolve().parents[1] / "results" / "speed-cpu.json"
    rows = [row for row in json.loads(measured.read_text())["rows"] if row["name"].endswith("ours")]
    share = {row["name"].split()[0]: row["share_of_matmul_peak"] for row in rows}
    header = ["command", "batch", "GFLOP/image", "weights", "optimiser", "memory", "images × epochs"]
    header += ["GPU hours at 40%", "as CPU"] + ["check"] * flags.check
    lines = []
    for name, command in COMMANDS.items():
        if flags.word not in name:
            continue
        batch = flags.batch_size or command.batch
        flops, weights, optimiser, peak = measure(command, batch)
        total = flops * command.images * command.epochs / H100 / 3600
        lines.append([name, str(batch), f"{flops / 1e9:,.4g}"])
        lines[-1] += [f"{v / 2**30:.2f} GB" for v in (weights, optimiser)]
        lines[-1] += [f"{peak / 2**30:.1f} GB", f"{command.images:,} × {command.epochs}"]
        lines[-1] += [f"{float(f'{total / part:.2g}'):g}" for part in (0.4, share[command.nearest])]
        if flags.check and "ensemble" in name:  # real second derivatives take half an hour
            lines[-1].append("")
        elif flags.check:
            off = []
            for few in (2, 4):
                guess, real = measure(command, few), measure(command, few, fake=False)
                off += [abs(a / b - 1) for a, b in zip(guess, real, strict=True) if a != b]
            lines[-1].append(f"{max(off, default=0):.1%}")
        print(f"{name}: {lines[-1][2]} GFLOP per image, {lines[-1][5]}", file=sys.stderr, flush=True)
    print(text_table(header, lines))
    if flags.json:
        about = {"what": "computed by benchmarks/cost.py", "torch": torch.__version__}
        Path(flags.json).write_text(json.dumps(about | {"table": [header, *lines]}, indent=1))


if __name__ == "__main__":
    main()
