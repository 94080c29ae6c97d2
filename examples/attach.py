"""A transformers model whose attention runs in two other processes.

python examples/attach.py [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from braid_orchestrator.attach import attach
from braid_wire.layers import Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"


def main(directory: str) -> None:
    """Generate before and after, and compare."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = ["def read_lines(path):", "class Node:\n    def __init__(self"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    before = model.generate(**batch, **how)
    with attach(model) as attachment:
        print(
            f"full attention in process {attachment.pid(Kind.FULL)}, linear in {attachment.pid(Kind.LINEAR)}"
        )
        after = model.generate(**batch, **how)
        beams = model.generate(**batch, **how, num_beams=3)
    print("the same tokens" if torch.equal(before, after) else "other tokens")
    for text in tokenizer.batch_decode(beams, skip_special_tokens=True):
        print("-" * 40, text, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(TINY))
