#!/usr/bin/env python3
"""Measure the memory of one training step or one generation step, byte by byte, without a GPU.

A Hugging Face model is built from its configuration on *fake* CUDA tensors: shapes, dtypes, views
and lifetimes are real, data and GPU are not. Every storage is counted from its creation to its
release, so a figure is what `torch.cuda.memory_allocated` would report. Not counted: the CUDA
context, cuBLAS workspaces, rounding to 512 B, caching and fragmentation, and temporaries inside
kernels except the two that `kernel_workspace` knows by rule.

Needs CPU builds of torch and transformers (and peft for LoRA) and a C++ compiler: a CPU build has
no CUDA device guard, without which autograd refuses CUDA tensors, so a stub is compiled once.

    python measure_trace.py config.json --batch 2 --seq 1024 --dtype bf16
    python measure_trace.py config.json --mode lora --lora-targets all-linear --ops ops.txt
    python measure_trace.py config.json --inference --logits-to-keep 1
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
    sys.exit(f"error: without {' and '.join(missing)}\n\nhint: pip install -e '.[trace]'")

from benchmarks.tracing.adapters import MODES
from benchmarks.tracing.fake_cuda import faked, install_fake_cuda
from benchmarks.tracing.freezing import OWN_WEIGHTS
from benchmarks.tracing.generation import measure_inference
from benchmarks.tracing.models import DTYPES, Settings, set_layers
from benchmarks.tracing.optimizers import OPTIMIZERS
from benchmarks.tracing.quantized import BASES
from benchmarks.tracing.tracker import Tracker
from benchmarks.tracing.training import measure_training

NOT_TOLD = ("config", "layers", "ops", "inference")
"""Options that say where things are and which measurement is meant."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("config", type=Path, help="config.json with Hugging Face field names")
    p.add_argument("--inference", action="store_true")
    p.add_argument("--logits-to-keep", type=int, default=0)
    p.add_argument("--mode", choices=MODES, default="full")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    p.add_argument("--autocast", choices=["none", "bf16", "fp16"], default="none")
    p.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa")
    p.add_argument("--checkpoint", action="store_true")
    p.add_argument("--every", type=int, default=1, help="checkpoint every so manieth layer only")
    p.add_argument("--selective", action="store_true", help="keep some results, as torchtitan does")
    p.add_argument("--offloaded", action="store_true", help="keep checkpoints in host memory")
    p.add_argument("--padded", action="store_true")
    p.add_argument("--keep-outputs", action="store_true")
    p.add_argument("--grad-accum", type=int, default=1)
    p.add_argument("--lora-r", type=int, default=16)
    p.add_argument("--lora-targets", default="all-linear", help="or `qv`, or names by commas")
    p.add_argument("--lora-dropout", type=float, default=0.0)
    p.add_argument("--lora-bias", choices=["none", "all", "lora_only"], default="none")
    p.add_argument("--adapter-dtype", choices=["", "weight"], default="", help="peft's is fp32")
    p.add_argument("--frozen-layers", type=int, default=0)
    p.add_argument("--modules-to-save", nargs="*", default=[], help="trained whole, as copies")
    p.add_argument("--virtual-tokens", type=int, default=20)
    p.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw_fused")
    p.add_argument("--master", action="store_true", help="fp32 copies of the weights for AdamW")
    p.add_argument("--main-gradients", action="store_true", help="summed in fp32 buffers")
    p.add_argument("--base", choices=["", *BASES], default="", help="quantized by bitsandbytes")
    p.add_argument("--upcast", action="store_true", help="keep the rest in fp32 beside such a base")
    p.add_argument("--layers", type=int, help="override the number of layers")
    p.add_argument("--ops", type=Path, help="write the log of all ops to this file")
    return p


def settings_of(options: dict[str, Any]) -> Settings:
    """The settings that the options of the command line name."""
    try:
        config = json.loads(options["config"].read_text())
    except (OSError, ValueError) as failure:
        sys.exit(f"error: cannot read `{options['config']}`: {failure}\n\nhint: give a config.json")
    if options["layers"] is not None:
        set_layers(config, options["layers"])
    told = {k: v for k, v in options.items() if k in Settings.__dataclass_fields__}
    return Settings(**told | {"config": config}, log_ops=options["ops"] is not None)


def write(figures: dict[str, Any], options: dict[str, Any], tracker: Tracker) -> None:
    """Print what was asked and what was found as JSON, and write the log of all ops."""
    told = {k: v for k, v in options.items() if k not in figures and k not in NOT_TOLD}
    json.dump(told | figures, sys.stdout, indent=1)
    print()
    if options["ops"] is not None:
        options["ops"].write_text(tracker.log_text())


def main(arguments: list[str] | None = None) -> int:
    """Measure one case and print it as JSON."""
    options = vars(parser().parse_args(arguments))
    settings = settings_of(options)
    measured = measure_inference if options["inference"] else measure_training
    install_fake_cuda()
    with faked(padded=settings.padded, adapted=settings.mode not in OWN_WEIGHTS):
        figures, tracker = measured(settings)
    write(figures, options, tracker)
    return 0


if __name__ == "__main__":
    sys.exit(main())
