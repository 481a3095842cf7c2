"""Images per second of the clean pass of eval_cifar10c.py over a set of CIFAR-10-C's format, with and without the network.

    python benchmarks/corruptions.py                    # ResNet-18, one type of 50,000 random images (154 MB, temporary)
    python benchmarks/corruptions.py --width 0.25 --json corruptions.json

If reading is many times faster than reading and classifying, the pass is bounded by the network.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (  # noqa: E402
    batches, build_model, choose_device, device_name, full_precision, place_model, robust_accuracy, text_table,
)
from eval_cifar10c import open_arrays  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="images in the set, a multiple of 5 (default: 50000)")
    parser.add_argument("--width", type=float, default=1.0, help="of ResNet-18 (default: 1)")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--network-rows", type=int, default=0, help="images to classify; 0: all on a GPU, 2000 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", default="", help="write the table to this file, too")
    args = parser.parse_args()
    device = choose_device(args.device)
    limit = args.network_rows or (args.rows if device.type == "cuda" else 2000)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        np.save(Path(folder) / "labels.npy", np.tile(np.arange(args.rows // 5) % 10, 5))
        np.save(Path(folder) / "fog.npy", rng.integers(0, 256, (args.rows, 32, 32, 3), dtype=np.uint8))

        def read(rows: int):
            for severity in range(1, 6):
                images = open_arrays(Path(folder), "fog", severity, 10)
                yield from batches(images.subset(torch.arange(min(len(images), rows // 5))), args.batch_size, device)

        table = []
        for name, amp in (("reading alone", None), ("with ResNet-18, float32", "off"), ("with ResNet-18, --eval-amp", "auto")):
            rows = args.rows if amp is None else limit
            if amp is not None:
                model = place_model(build_model("resnet18", {"class": 10}, width=args.width), device, amp).eval()
            for _ in range(2):  # the first time warms up: the disk's cache, cuDNN's choice of algorithms
                begin = time.perf_counter()
                if amp is None:
                    seen = sum(len(y) for _, y in read(rows))
                elif amp == "off":
                    with full_precision(model):
                        robust_accuracy(model, read(rows))
                else:
                    robust_accuracy(model, read(rows))
                wait()
                seconds = time.perf_counter() - begin
            table.append({"name": name, "images_per_s": round((seen if amp is None else rows) / seconds, 1), "peak_mb": None, "ratio": None})
        for row in table:
            row["ratio"] = round(row["images_per_s"] / table[0]["images_per_s"], 4)
    print(f"{device_name(device)}, torch {torch.__version__}, ResNet-18 x{args.width:g}, batch {args.batch_size}\n")
    print(text_table(["clean pass over one type of CIFAR-10-C", "images/s", "of reading alone"], [
        [row["name"], f"{row['images_per_s']:,.0f}", f"{100 * row['ratio']:.2f}%"] for row in table
    ]))  # fmt: skip
    if args.json:
        results = {"benchmark": "corruptions.py", "device": device_name(device), "torch": torch.__version__, "rows": table}
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
