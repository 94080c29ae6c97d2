"""Train the tiny hybrid model from nothing: data, tokenizer, curriculum, weights, evaluation.

The data are the sources of the Python standard library that runs this script and key-value recall
written as Python (``recall.py``); nothing is downloaded.

    python models/tiny/train.py --out /tmp/x --minutes 80
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from chunk_rule import chunk_rule
from recall import TRAIN_SEED_LIMIT, chat_snippet, key_words, make_cases, predictions, snippet
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3NextConfig
from transformers import Qwen3NextForCausalLM as Model
from transformers.models.qwen3_next import modeling_qwen3_next as stock

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
SPLIT = r" ?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
SIDE_FOLDERS = frozenset({"test", "tests", "idlelib", "turtledemo", "lib2to3", "distutils"})
LIBRARY_SHARE = 0.65
HELD_OUT_EVERY = 50
LONG_ROWS_FROM = 0.5
FRAME_WEIGHT = 0.1
CHECKPOINT = "checkpoint.pt"
PAIR_STEPS = (2, 3, 4, 5, 6, 8, 10, 12, 16)


@dataclass
class Options:
    """What the command line sets."""

    out: Path
    minutes: float
    tokens: int
    seed: int
    batch: int
    length: int
    lr: float
    text_share: float
    late_text_share: float
    answer_weight: float
    late_answer_weight: float
    save_minutes: float
    compile: bool
    resume: bool
    threads: int


@dataclass
class Progress:
    """What a checkpoint remembers besides weights and optimiser states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


# --------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Sources:
    """Texts of the library's own modules, of its tests and side packages, and the held-out modules."""

    library: list[str]
    side: list[str]
    held_out: list[str]


def read_sources() -> Sources:
    """The standard library's Python files in a fixed order; every fiftieth module is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    groups: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        parts = set(path.relative_to(root).parts)
        if not parts & SKIPPED_FOLDERS and 200 < path.stat().st_size < 500_000:
            text = path.read_text(encoding="utf-8", errors="ignore")
            groups[bool(parts & SIDE_FOLDERS)].append(text)
    picked = HELD_OUT_EVERY // 2
    kept = [text for index, text in enumerate(groups[False]) if index % HELD_OUT_EVERY != picked]
    return Sources(kept, groups[True], groups[False][picked::HELD_OUT_EVERY])


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every two-digit number is one token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    numbers = " ".join(f"{number:02d}" for number in range(100))
    core.train_from_iterator([*texts, *[numbers] * 5_000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[3],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One stream of tokens with a separator between the files."""
    separator = tokenizer.bos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([token for row in rows for token in [*row, separator]], dtype=np.int64)


@dataclass(frozen=True)
class Streams:
    """The sources as tokens."""

    library: np.ndarray
    side: np.ndarray
    held_out: np.ndarray

    def __str__(self) -> str:
        """The sizes."""
        return f"tokens: {len(self.library)} library, {len(self.side)} side, {len(self.held_out)} held out"


class RecallStream:
    """Rows of recall snippets, with the positions of their answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: np.ndarray, seed: int) -> None:
        """Draw from a training seed; ``text`` is the library source that goes between."""
        self.tokenizer, self.text = tokenizer, text
        self.words = key_words(tokenizer)
        self.rng = random.Random(seed % TRAIN_SEED_LIMIT)

    def row(self, length: int, most_pairs: int, spread: bool) -> tuple[list[int], list[bool]]:
        """One row: snippets one after another, now and then after some library source.

        ``spread`` now and then also puts library source between the pairs and the questions.
        """
        ids: list[int] = []
        answers: list[bool] = []
        if self.rng.random() < 0.2:
            start, size = self.rng.randrange(len(self.text) - length), self.rng.randrange(length // 2)
            ids, answers = self.text[start : start + size].tolist(), [False] * size
        while len(ids) < length:
            between = self._lines(length // 2) if spread and self.rng.random() < 0.25 else ""
            self._append(ids, answers, most_pairs, between)
        return ids[:length], answers[:length]

    def _lines(self, most: int) -> str:
        """Some whole lines of the library, at most so many tokens."""
        start = self.rng.randrange(len(self.text) - most)
        window = self.text[start : start + self.rng.randint(most // 8, most)]
        lines = self.tokenizer.decode(window, skip_special_tokens=True).split("\n")
        return "".join(line + "\n" for line in lines[1:-1])

    def _append(self, ids: list[int], answers: list[bool], most_pairs: int, between: str) -> None:
        """Add one snippet with a number of pairs that leans towards the most."""
        pairs = max(self.rng.randint(2, most_pairs), self.rng.randint(2, most_pairs))
        if self.rng.random() < 0.12:
            segments = list(chat_snippet(self.rng, self.words, pairs))
        else:
            segments = list(snippet(self.rng, self.words, pairs, self.rng.randint(1, 2 * pairs), between))
        for segment in segments:
            tokens = self.tokenizer.backend_tokenizer.encode(segment.text, add_special_tokens=False).ids
            ids.extend(tokens)
            answers.extend([segment.is_answer] * len(tokens))


class Batches:
    """Mixed batches: rows of library source, then rows of recall."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, data: Streams, options: Options, start: int
    ) -> None:
        """Draw from seeds that depend on the step at which this run starts."""
        self.data, self.options = data, options
        self.rng = np.random.default_rng([options.seed, start])
        self.recall = RecallStream(tokenizer, data.library, options.seed + start)

    def next(
        self, most_pairs: int, text_share: float, stretch: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens, the mask of answer tokens and the number of rows of library source.

        ``stretch`` makes rows so many times longer and so many times fewer.
        """
        length, batch = self.options.length * stretch + 1, self.options.batch // stretch
        text_rows = round(batch * text_share)
        rows = [self._text_row(length) for _ in range(text_rows)]
        masks = [np.zeros(length, dtype=bool)] * text_rows
        for _ in range(batch - text_rows):
            ids, answers = self.recall.row(length, most_pairs, spread=most_pairs == PAIR_STEPS[-1])
            rows.append(np.array(ids))
            masks.append(np.array(answers))
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(masks)), text_rows

    def _text_row(self, length: int) -> np.ndarray:
        """A window of the library, or now and then of its tests."""
        stream = self.data.library if self.rng.random() < LIBRARY_SHARE else self.data.side
        start = self.rng.integers(0, len(stream) - length)
        return stream[start : start + length]


# -------------------------------------------------------------------------------------------- model


def model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3NextConfig:
    """Eight layers, every fourth with full attention, dense MLPs, tied embeddings."""
    layers = 8
    return Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        linear_conv_kernel_dim=4,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=0,
        num_experts_per_tok=0,
        mlp_only_layers=list(range(layers)),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Model:
    """A fresh model whose linear layers start with long memories."""
    torch.manual_seed(seed)
    model = Model(model_config(tokenizer))
    for module in model.modules():
        if isinstance(module, stock.Qwen3NextGatedDeltaNet):
            steps = torch.exp(torch.empty(module.num_v_heads).uniform_(math.log(1e-3), math.log(1e-1)))
            module.dt_bias.data.copy_(steps + torch.log(-torch.expm1(-steps)))
            module.A_log.data.uniform_(1.0, 16.0).log_()
    return model


@contextmanager
def quick_rule() -> Iterator[None]:
    """Train with the quick delta rule; outside of this, transformers runs its own."""
    kept = stock.torch_chunk_gated_delta_rule
    stock.torch_chunk_gated_delta_rule = chunk_rule
    try:
        yield
    finally:
        stock.torch_chunk_gated_delta_rule = kept


def compile_layers(model: Model) -> None:
    """Compile each layer by itself; the weights and their names stay as they are."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def optimisers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name and "in_proj_ba" not in name:
            matrices.append(parameter)
        else:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-10),
    ]


def losses(
    model: Model, tokens: torch.Tensor, answers: torch.Tensor, text_rows: int
) -> dict[str, torch.Tensor]:
    """Mean loss of the source rows, of the answers and of what surrounds them; share of right answers."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    targets, mask = tokens[:, 1:], answers[:, 1:]
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    is_recall = torch.zeros_like(mask)
    is_recall[text_rows:] = True
    right = logits.detach()[mask].argmax(-1) == targets[mask]
    return {
        "text": each[:text_rows].mean(),
        "answer": each[mask].mean(),
        "frame": each[is_recall & ~mask].mean(),
        "right": right.float().mean(),
    }


# ----------------------------------------------------------------------------------------- training


def schedule(done: float) -> float:
    """Warm up over 2 %, hold, then fall to almost nothing over the last 40 %."""
    if done < 0.02:
        return 0.05 + 0.95 * done / 0.02
    return 1.0 if done < 0.6 else max(0.01, (1.0 - done) / 0.4)


def share_done(progress: Progress, options: Options) -> float:
    """How much of the budget, in tokens or in minutes, is spent."""
    by_tokens = progress.tokens / options.tokens if options.tokens else 0.0
    by_time = progress.seconds / (60 * options.minutes) if options.minutes else 0.0
    return max(by_tokens, by_time)


class Trainer:
    """The model in training, with everything a checkpoint keeps."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerFast, data: Streams) -> None:
        """Build the model, or load it from the checkpoint of an earlier run."""
        self.options, self.tokenizer, self.data = options, tokenizer, data
        self.model, self.progress = build_model(tokenizer, options.seed), Progress()
        self.optims = optimisers(self.model, options.lr)
        if options.resume:
            self._load()
        if options.compile:
            compile_layers(self.model)
        self.batches = Batches(tokenizer, data, options, self.progress.step)
        self.recent: deque[float] = deque(maxlen=30)

    @property
    def mastered(self) -> bool:
        """Whether the curriculum is over."""
        return self.progress.level == len(PAIR_STEPS) - 1

    def run(self) -> None:
        """Train until the budget is spent, saving now and then and at the end."""
        last_save = self.progress.seconds
        while (done := share_done(self.progress, self.options)) < 1.0:
            self._step(done)
            if self.progress.seconds - last_save > 60 * self.options.save_minutes:
                self.save()
                last_save = self.progress.seconds
        self.save()

    def save(self) -> None:
        """Write the model and the checkpoint, and a quick measurement to the log."""
        state = {"model": self.model.state_dict(), "progress": vars(self.progress)}
        state["optims"] = [optimiser.state_dict() for optimiser in self.optims]
        torch.save(state, self.options.out / CHECKPOINT)
        save_model(self.model, self.tokenizer, self.options.out)
        print(json.dumps(evaluate(self.options.out, self.data.held_out, 40)), flush=True)

    def _load(self) -> None:
        state = torch.load(self.options.out / CHECKPOINT, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.progress = Progress(**state["progress"])
        for optimiser, saved in zip(self.optims, state["optims"], strict=True):
            optimiser.load_state_dict(saved)

    def _step(self, done: float) -> None:
        """One batch, one update; more pairs come as soon as the present number is mastered."""
        began = time.monotonic()
        share, weight = self.options.text_share, self.options.answer_weight
        if self.mastered:
            share, weight = self.options.late_text_share, self.options.late_answer_weight
        stretch = 2 if done > LONG_ROWS_FROM and self.progress.step % 2 else 1
        tokens, answers, text_rows = self.batches.next(PAIR_STEPS[self.progress.level], share, stretch)
        self.model.train()
        with quick_rule():
            parts = losses(self.model, tokens, answers, text_rows)
            loss = parts["text"] + weight * parts["answer"] + FRAME_WEIGHT * parts["frame"]
            loss.backward()
        norm = self._update(self.options.lr * schedule(done))
        self._advance(parts["right"].item())
        self.progress.step += 1
        self.progress.tokens += tokens[:, 1:].numel()
        self.progress.seconds += time.monotonic() - began
        if self.progress.step % 20 == 0:
            report(self.progress, parts, done, norm)

    def _update(self, rate: float) -> float:
        """Apply the gradients at this learning rate; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optims:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return norm.item()

    def _advance(self, right: float) -> None:
        """Go to the next number of pairs once 93 % of the recent answers were right."""
        self.recent.append(right)
        if len(self.recent) == self.recent.maxlen and np.mean(self.recent) > 0.93 and not self.mastered:
            self.progress.level += 1
            self.recent.clear()


def report(progress: Progress, parts: dict[str, torch.Tensor], done: float, norm: float) -> None:
    """Print one line and remember it."""
    line = {name: round(value.item(), 4) for name, value in parts.items()}
    line |= {"step": progress.step, "tokens": progress.tokens, "pairs": PAIR_STEPS[progress.level]}
    line |= {"done": round(done, 3), "norm": round(norm, 2), "seconds": round(progress.seconds)}
    progress.history.append(line)
    print(json.dumps(line), flush=True)


# --------------------------------------------------------------------------------------- evaluation


def held_out_loss(model: Model, stream: np.ndarray, length: int = 256, rows: int = 192) -> float:
    """Mean loss per token of the held-out files."""
    rows = min(rows, (len(stream) - 1) // length)
    starts = np.linspace(0, len(stream) - length - 1, rows).astype(int)
    tokens = torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]))
    total = 0.0
    with torch.inference_mode():
        for part in tokens.split(16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / tokens[:, 1:].numel()


def evaluate(folder: Path, stream: np.ndarray, count: int) -> dict[str, float]:
    """Reload the saved bf16 weights as float32 and measure them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = {"held_out_loss": held_out_loss(model, stream)}
    for pairs in (2, 4, 6, 8, 12, 16):
        result[f"recall_{pairs}"] = float(np.mean(predictions(model, make_cases(tokenizer, pairs, count))))
    return result


def save_model(model: Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights as bf16 beside the tokenizer and the generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Model(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny hybrid model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model and of the checkpoint")
    parser.add_argument("--minutes", type=float, default=80.0, help="time budget, 0 for none")
    parser.add_argument("--tokens", type=int, default=0, help="token budget, 0 for none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument(
        "--text-share", type=float, default=0.5, help="share of the rows that is library source"
    )
    parser.add_argument(
        "--late-text-share", type=float, default=0.75, help="the same once all pairs are mastered"
    )
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--late-answer-weight", type=float, default=0.3)
    parser.add_argument("--save-minutes", type=float, default=6.0)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="train without torch.compile"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Make the data, train, save and measure."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    sources = read_sources()
    if options.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    else:
        tokenizer = train_tokenizer(sources.library, 2048)
    data = Streams(*(encode_texts(tokenizer, texts) for texts in vars(sources).values()))
    trainer = Trainer(options, tokenizer, data)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{size} parameters; {data}", flush=True)
    trainer.run()
    progress = trainer.progress
    result = evaluate(options.out, data.held_out, 400)
    result |= {"tokens": progress.tokens, "seconds": progress.seconds, "parameters": size}
    (options.out / "training.json").write_text(json.dumps({"result": result, "history": progress.history}))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
