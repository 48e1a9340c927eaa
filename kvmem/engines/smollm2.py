"""Turns a quantised GGUF into a bf16 checkpoint that vLLM and transformers load.

A program of its own (`python -m kvmem.engines.smollm2 GGUF FOLDER`), so that whoever wants the
model needs neither torch nor transformers in its process. It prints one line per stage.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["convert"]

STAGES = ("import transformers", "read and dequantise the weights", "write the checkpoint")


def convert(gguf: Path, folder: Path, tell: Callable[[str], None]) -> None:
    """Leaves in `folder` (which exists, empty) config, weights in bf16, tokenizer, chat template.

    Args:
        gguf: the quantised model.
        folder: where the checkpoint goes; about 2 bytes a parameter.
        tell: is called with the name of each stage as it begins.
    """
    tell(STAGES[0])
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tell(STAGES[1])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tell(STAGES[2])
    # The weights are plain now; a quantisation entry would make every loader look for the GGUF.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=convert.__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network, and nothing may use it
    convert(args.gguf, args.folder, lambda stage: print(stage, flush=True))


if __name__ == "__main__":
    main()
