#!/usr/bin/env python3
"""The figure "linearised training approaches the kernel's solution", from two runs of the same task, data and seed.

The first is linearised training with the squared error and plain gradient descent, all examples in a batch, and a
snapshot of some steps; the second predicts with the kernel from f₀:

    python run.py … --trainer linearised --l2_loss --optimizer sgd --lr_scheduler_type constant --max_grad_norm 0
        --kernel_steps 0,1,2,5,10,20,50,100,200,500,last --output_dir TRAINING
    python run.py … --trainer kernel --adjust_for_init --output_dir KERNEL
    python examples/linearised_training.py TRAINING KERNEL mr figure.png

It draws ‖f_t − f_K‖ / ‖f₀ − f_K‖ over the train and test examples. Along an eigenvector of K with eigenvalue μ the
distance on train falls by |1 − 2 η μ / N C| a step: small eigenvalues take long.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
from matplotlib.figure import Figure

from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import find_snapshots, read_snapshot


def predictions(path: Path) -> np.ndarray:
    """Return the logits in a table of predictions, [X, C]."""
    with path.open(encoding="utf-8", newline="") as file:
        return np.array(
            [[float(row[name]) for name in row if name.startswith("logit")] for row in csv.DictReader(file)]
        )


def distances(training: RunPaths, kernel: RunPaths) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps of a linearised training, and its distances from the kernel's solution, for each split."""
    found = [read_snapshot(path) for path in find_snapshots(training)]
    if not found or found[0].step != 0:
        raise SystemExit(f"error: {training.folder} holds no snapshot of step 0: train with --kernel_steps 0,…,last")
    curves = {}
    for split, start in found[0].splits.items():
        if split == "train":
            # λ = 0: the solver fits the targets, one-hot or ±1.
            classes = start.logits.shape[1]
            wanted = np.eye(classes)[start.labels] if classes > 1 else 2.0 * start.labels[:, None] - 1
        else:
            wanted = predictions(kernel.predictions(split))
        size = float(np.linalg.norm(start.logits - wanted))
        steps = [snapshot.step for snapshot in found]
        curves[split] = (steps, [float(np.linalg.norm(each.splits[split].logits - wanted)) / size for each in found])
    return curves


def main(argv: list[str]) -> int:
    """Draw the figure."""
    if len(argv) != 4:
        print("usage: linearised_training.py TRAINING KERNEL TASK FIGURE", file=sys.stderr)
        return 2
    training, kernel, task, picture = argv
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for split, (steps, values) in distances(RunPaths(training, task), RunPaths(kernel, task)).items():
        axes.plot(np.array(steps) + 1, values, marker="o", label=split)
        print(split, *(f"{step}: {value:.3g}" for step, value in zip(steps, values, strict=True)))
    axes.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="distance from the kernel's solution, of that of f₀")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)
    print(f"the figure is in {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
