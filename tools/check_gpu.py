#!/usr/bin/env python3
"""Check the kernel engines on one CUDA card: are they exact there, and how fast; tools/check_gpu.sh starts this.

Sections: every engine against float64 autograd on tiny models; RoBERTa-base's shape with the published method and the
engines, in float32 and with TF32; a Llama of 1.2 billion parameters. All weights and prompts are random, and nothing is
downloaded. A section that has no time left samples less, and one that fails leaves a row that says why.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

STARTED = time.monotonic()
NEEDED = ("numpy", "pandas", "scipy", "sklearn", "threadpoolctl", "torch", "tqdm", "transformers")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}: set PYTHON to an interpreter that has them")

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import torch

from benchmarks.gpu_sections import FLOAT32, MANY, PRECISIONS, SECTIONS, TRAIN_SIZES, Row, Settings
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import Bounds, UsageError, check_numbers
from lmntk.storage.atomic import write_atomically
from lmntk.storage.tables import format_table
from lmntk.storage.wording import quantity

DEFAULT_MINUTES = 9
RESERVE_SECONDS = 15  # of all, for starting and for the table
GRACE_SECONDS = 5  # after which a section that does not end is killed


def make_parser() -> Parser:
    """Return the flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=DEFAULT_MINUTES, help="all of it ends by then (default 9)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("check_gpu.json"), help="results go there too"
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU: a test of the check itself")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few examples: about a minute")
    return parser


def check(given: argparse.Namespace, start: float) -> int:
    """Run the sections, print a table, write JSON; return 1 if an engine is not exact.

    Args:
        given: The command line.
        start: When the minutes began, by `time.monotonic`.
    """
    check_numbers([Bounds("minutes", 0.5)], vars(given))
    if not given.json.resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {given.json.resolve().parent}")
    device = choose_device(given.cpu)
    end = start + 60 * given.minutes - RESERVE_SECONDS
    rows: list[Row] = []
    for number, name in enumerate(SECTIONS):
        later = list(SECTIONS)[number:]
        share = SECTIONS[name][1] / sum(SECTIONS[section][1] for section in later)
        seconds = share * (end - time.monotonic())
        print(f"{number + 1} of {len(SECTIONS)}: {name}, at most {seconds:.0f} s", file=sys.stderr, flush=True)
        rows += run_section(name, Settings(device, given.tiny, seconds - GRACE_SECONDS))
        report = {"seconds": time.monotonic() - start, "tiny": given.tiny, "rows": rows}
        text = json.dumps(report, indent=2) + "\n"
        write_atomically(given.json, lambda file, text=text: file.write(text.encode()))
    print_results(rows, given.json)
    return 0 if all(row.get("exact", True) for row in rows) else 1


def choose_device(on_cpu: bool) -> str:
    """Return the name of the device.

    Raises:
        UsageError: There is no CUDA device.
    """
    if on_cpu:
        return "cpu"
    if not torch.cuda.is_available():
        raise UsageError(
            f"torch {torch.__version__} of {sys.executable} finds no CUDA device: set PYTHON to an interpreter whose "
            "torch is built for CUDA, or try the check itself with --cpu --tiny"
        )
    return "cuda:0"


def run_section(name: str, settings: Settings) -> list[Row]:
    """Return the rows of a section, which runs in its own process and is killed when its time is over."""
    rows: list[Row] = []
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, settings, sender), daemon=True)
    end = time.monotonic() + settings.seconds + GRACE_SECONDS
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            rows.append(receiver.recv())
            print(f"    {_progress(rows[-1])}", file=sys.stderr, flush=True)
        rows.append({"section": name, "note": "stopped: its time was over"})
    except EOFError:
        process.join(GRACE_SECONDS)
        if process.exitcode:
            rows.append({"section": name, "note": f"its process ended with {process.exitcode}"})
    finally:
        process.kill()
        process.join()
        receiver.close()
    return rows


def _work(name: str, settings: Settings, sender: Connection) -> None:
    """Run a section in this process."""
    start = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    gc.freeze()  # what was imported stays: later collections need not look at it
    section, _ = SECTIONS[name]
    section(Settings(settings.device, settings.tiny, settings.seconds - (time.monotonic() - start)), sender.send)
    sender.close()


def _progress(row: Row) -> str:
    words = [str(row[key]) for key in ("model", "engine", "formula", "precision", "n_train", "note") if key in row]
    return " ".join([*words, f"{row.get('measuring_seconds', 0):.1f} s"])


def print_results(rows: list[Row], file: Path) -> None:
    """Print the table, and the number that matters most."""
    shown = [row for row in rows if row.keys() & {"seconds", "relative_error", "note", "device"}]
    words = ["section", "model", "engine", "formula", "note"]
    print(format_table(map(table_row, shown), "markdown", words=words))
    for row in rows:
        wanted = {"engine": "factored", "precision": FLOAT32, "n_train": TRAIN_SIZES[MANY]}
        if all(row.get(key) == value for key, value in wanted.items()) and "seconds" in row:
            speedup = row.get("speedup_over_published")
            times = "" if speedup is None else f", {speedup:.0f} times as fast as the published method"
            print(f"512-shot {row['section']}, train × test: {row['seconds']:.0f} s{times}")
    print(f"The same as JSON: {file}")


def table_row(row: Row) -> dict[str, str]:
    """Return a line of the table."""

    def number(key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    notes = [f"{name} {seconds:.2f} s" for name, seconds in row.get("seconds_by_stage", {}).items()]
    if "device" in row:
        rates = [f"{precision} {row[f'{precision}_gflops'] / 1e3:.1f} TFLOP/s" for precision in PRECISIONS]
        notes = [row["device"], f"torch {row['torch']}", *rates]
    if row.get("fallback_parameters"):
        notes = [f"jacobian for {quantity(len(row['fallback_parameters']), 'parameter')}"]
    if not row.get("exact", True):
        notes = ["NOT EXACT"]
    return {
        "section": row["section"],
        "model": row.get("model", ""),
        "engine": row.get("engine", ""),
        "formula": row.get("formula", ""),
        "N × X": f"{row['n_train']} × {row['n_x']}" if "n_train" in row else "",
        "precision": row.get("precision", ""),
        "seconds": number("seconds", ".2f") + (" (sampled)" if row.get("sampled") else ""),
        "× published": number("speedup_over_published", ".1f"),
        "error": number("relative_error", ".1e"),
        "peak GB": number("peak_memory_gb", ".2f"),
        "share of rate": number("roofline_fraction", ".2f"),
        "note": row.get("note", ", ".join(notes)),
    }


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run one command line, whose minutes may have begun already; return the exit status."""
    start = time.monotonic() if started is None else started
    return run_tool(make_parser(), lambda given: check(given, start), argv)


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
