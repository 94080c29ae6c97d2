"""Train the draft of the tiny model: one multi-token-prediction layer on frozen weights.

The draft reads the target's final hidden state of a token and the embedding of the token after it, and
predicts the token after that. Run on its own hidden states it drafts on, so it is trained on several
steps of that. It learns the target's own distributions, on the data that the target was trained on.

    python models/tiny/mtp.py --model models/tiny --tokens 3000000
    python models/tiny/mtp.py --model models/tiny --measure     # the saved draft, on held-out text
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from train import (
    PAIR_STEPS,
    Batches,
    Streams,
    encode_texts,
    optimisers,
    quick_rule,
    read_sources,
    schedule,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3NextConfig
from transformers import Qwen3NextForCausalLM as Model
from transformers.models.qwen3_next import modeling_qwen3_next as stock

PREFIX = "mtp."
STEP_WEIGHTS = (1.0, 0.8, 0.6)
"""Of the losses of the first drafted token, the second, …"""


@dataclass
class Options:
    """What the command line sets; `Batches` reads the first four."""

    batch: int
    length: int
    seed: int
    text_share: float
    model: Path
    tokens: int
    lr: float
    threads: int
    measure: bool


@dataclass(frozen=True)
class Rows:
    """Keys and values [batch, heads, rows, width] of every row in one step of drafting."""

    keys: torch.Tensor
    values: torch.Tensor

    def shifted(self, by: int) -> Rows:
        """Row t becomes that of row t - by; the first rows are zero."""
        return Rows(*(F.pad(part, (0, 0, by, 0))[:, :, : part.shape[2]] for part in (self.keys, self.values)))


class Draft(nn.Module):
    """fc([norm(embedding of the next token), norm(hidden)]), a layer of full attention, a norm."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        """Fresh weights from torch's seed."""
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        width, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = stock.Qwen3NextRMSNorm(width, eps=eps)
        self.pre_fc_norm_hidden = stock.Qwen3NextRMSNorm(width, eps=eps)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([stock.Qwen3NextDecoderLayer(config, 0)])
        self.norm = stock.Qwen3NextRMSNorm(width, eps=eps)
        self.rotary = stock.Qwen3NextRotaryEmbedding(config)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=config.initializer_range)

    def forward(
        self, embedded: torch.Tensor, hidden: torch.Tensor, earlier: Sequence[Rows]
    ) -> tuple[torch.Tensor, Rows]:
        """One step of drafting for every row at once: [batch, rows, width] → the same, and its rows.

        `earlier` are the rows of the steps before. A row in step s stands behind s - 1 rows that were
        drafted like itself, one in each step, and behind those rows of the first step that came before.
        """
        parts = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        fused = self.fc(torch.cat(parts, -1))
        layer = self.layers[0]
        found, rows = self._attend(layer.self_attn, layer.input_layernorm(fused), earlier)
        fused = fused + found
        fused = fused + layer.mlp(layer.post_attention_layernorm(fused))
        return self.norm(fused), rows

    def _attend(
        self, attention: stock.Qwen3NextAttention, hidden: torch.Tensor, earlier: Sequence[Rows]
    ) -> tuple[torch.Tensor, Rows]:
        batch, length = hidden.shape[:2]
        heads = (batch, length, -1, attention.head_dim)
        query, gate = attention.q_proj(hidden).view(*heads[:3], 2 * attention.head_dim).chunk(2, -1)
        query = attention.q_norm(query).transpose(1, 2)
        key = attention.k_norm(attention.k_proj(hidden).view(heads)).transpose(1, 2)
        value = attention.v_proj(hidden).view(heads).transpose(1, 2)
        cos, sin = self.rotary(value, torch.arange(length)[None])
        query, key = stock.apply_rotary_pos_emb(query, key, cos, sin)
        rows = Rows(key, value)
        found = _mixed(query * attention.scaling, [*earlier, rows]).transpose(1, 2)
        found = found.reshape(batch, length, -1) * torch.sigmoid(gate.reshape(batch, length, -1))
        return attention.o_proj(found), rows


def _mixed(query: torch.Tensor, steps: Sequence[Rows]) -> torch.Tensor:
    """Attention over the first step's rows, and over one row of every later step; queries are scaled."""
    times = query.shape[1] // steps[0].keys.shape[1]
    steps = [
        Rows(step.keys.repeat_interleave(times, 1), step.values.repeat_interleave(times, 1)) for step in steps
    ]
    first, last = steps[0], len(steps) - 1
    length = query.shape[2]
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1 - last)
    scores = [(query @ first.keys.transpose(-1, -2)).float().masked_fill(ahead, float("-inf"))]
    drafted = [step.shifted(last - index) for index, step in enumerate(steps) if index]
    scores += [(query * step.keys).sum(-1, keepdim=True).float() for step in drafted]
    weights = torch.cat(scores, -1).softmax(-1).to(query.dtype)
    found = weights[..., :length] @ first.values
    for index, step in enumerate(drafted):
        found = found + weights[..., length + index, None] * step.values
    return found


@dataclass(frozen=True)
class Guesses:
    """What the target and a step of the draft say of the same tokens: logits [n, V]."""

    target: torch.Tensor
    draft: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Mean cross entropy against the target's distribution."""
        return F.cross_entropy(self.draft.float(), self.target.float().softmax(-1))

    @property
    def agreement(self) -> torch.Tensor:
        """Share of tokens whose likeliest guesses are the same: bool [n]."""
        return self.draft.argmax(-1) == self.target.argmax(-1)

    @property
    def overlap(self) -> torch.Tensor:
        """Mass that both distributions share, [n]: the chance to accept a token sampled at temperature 1."""
        return torch.minimum(self.draft.float().softmax(-1), self.target.float().softmax(-1)).sum(-1)


def guesses(model: Model, draft: Draft, tokens: torch.Tensor) -> list[Guesses]:
    """Of each step of drafting, over all tokens [batch, L + 1] that it can guess."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad(), quick_rule():
            whole = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            wanted = model.lm_head(whole[:, 1:])
            embedded = model.model.embed_tokens(tokens[:, 1:-1])
        hidden, rows, found = whole[:, :-1], [], []
        for step in range(len(STEP_WEIGHTS)):
            drafted, new = draft(embedded, hidden, rows)
            rows.append(new)
            # Before row `step` there is nothing to draft on from.
            target = wanted[:, step:].flatten(0, 1)
            found.append(Guesses(target, model.lm_head(drafted[:, step:]).flatten(0, 1)))
            hidden = F.pad(drafted, (0, 0, 1, 0))[:, :-1]
    return found


def train(model: Model, tokenizer: PreTrainedTokenizerFast, data: Streams, options: Options) -> Draft:
    """A draft after `options.tokens` tokens."""
    torch.manual_seed(options.seed)
    draft = Draft(model.config)
    optims = optimisers(draft, options.lr)
    batches = Batches(tokenizer, data, options, 0)
    began, step, seen = time.process_time(), 0, 0
    while (done := seen / options.tokens) < 1.0:
        tokens, _, _ = batches.next(PAIR_STEPS[-1], options.text_share, 2 if step % 4 == 3 else 1)
        found = guesses(model, draft, tokens)
        loss = sum(weight * part.loss for weight, part in zip(STEP_WEIGHTS, found, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for optimiser in optims:
            for group in optimiser.param_groups:
                group["lr"] = options.lr * schedule(done)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + tokens[:, 1:].numel()
        if step % 20 == 0:
            line = {"step": step, "tokens": seen, "seconds": round(time.process_time() - began)}
            line |= {"loss": [round(part.loss.item(), 3) for part in found]}
            line |= {"agreement": [round(part.agreement.float().mean().item(), 3) for part in found]}
            print(json.dumps(line), flush=True)
    return draft


@torch.inference_mode()
def evaluate(model: Model, draft: Draft, stream: np.ndarray, length: int = 256) -> dict[str, list[float]]:
    """Of each step on held-out text, behind the text's own tokens: how often the likeliest token is the
    target's, and the mass that the distributions share."""
    starts = np.linspace(0, len(stream) - length - 1, 128).astype(int)
    tokens = torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]))
    sums = [np.zeros(2) for _ in STEP_WEIGHTS]
    count = 0
    for part in tokens.split(16):
        found = guesses(model, draft, part)
        for total, one in zip(sums, found, strict=True):
            total += [one.agreement.float().mean().item(), one.overlap.mean().item()]
        count += 1
    return {
        "agreement": [round(float(total[0]) / count, 3) for total in sums],
        "overlap": [round(float(total[1]) / count, 3) for total in sums],
    }


def save(draft: Draft, folder: Path) -> None:
    """Put the weights, in bf16, beside the target's, which stay as they are, and declare the layer."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(PREFIX)}
    own = {
        PREFIX + name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in draft.state_dict().items()
        if not name.startswith("rotary.")
    }
    save_file({**kept, **own}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def load(folder: Path, config: Qwen3NextConfig) -> Draft:
    """The draft of a checkpoint, as float32."""
    draft = Draft(config)
    weights = load_file(folder / "model.safetensors")
    own = {name.removeprefix(PREFIX): t.float() for name, t in weights.items() if name.startswith(PREFIX)}
    draft.load_state_dict(own, strict=True)
    return draft


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the draft of the tiny model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="token budget")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--text-share", type=float, default=0.75, help="share of rows that is library source")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="train nothing, measure what is saved")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Make the data, train, save and measure."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.requires_grad_(False)
    data = Streams(*(encode_texts(tokenizer, texts) for texts in vars(read_sources()).values()))
    if not options.measure:
        save(train(model, tokenizer, data, options), options.model)
    print(json.dumps(evaluate(model, load(options.model, model.config), data.held_out)))


if __name__ == "__main__":
    main()
