#!/usr/bin/env python3
"""The demo on a causal language model: SmolLM2, of 135 million parameters, separates good film reviews from bad ones.

It predicts as it is, and by its kernel of 16 examples a class. The film reviews, splits and runs are those of
`demo.py`; `fetch_demo_assets.py --causal` fetches the model, a GGUF file of four-bit weights. The first run converts it
once to float32, into `converted-models` beside the k-shot splits, where half a gigabyte stays for the next time.

A causal model reads from left to right, so the template ends with the word that it predicts, after "It was". Test
prompts come 25 at a time, which bounds the kernel's memory and makes progress visible.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import demo

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "*sent_0*_It_was*mask*"
DEMO = demo.Demo(
    name="demo-causal",
    purpose="Separate good film reviews from bad ones by a causal language model, as it is and by its kernel.",
    model="smollm2-135m",
    tasks=("film-reviews",),
    methods=tuple(method for method in demo.DEMO.methods if method.name in ("zero-shot", "kernel-sgd")),
    seeds=(42,),
    flags=f"--gguf_file {GGUF_FILE} --template {TEMPLATE} --per_device_eval_batch_size 25",
    alone=True,
)

if __name__ == "__main__":
    sys.exit(demo.main(DEMO))
