"""Train a small decoder like the embedded one, from nothing but the running Python's standard library.

    python examples/train_demo_decoder.py --out my-decoder              # 2700 steps: long without a GPU
    python examples/train_demo_decoder.py --out my-decoder --steps 200  # a first look

A byte-level BPE and a Llama-type decoder of the embedded one's shape are trained on the library's source, files with
md5(path) % 20 == 0 held out. The folder gets half-precision safetensors, the tokenizer and a card that says what was
done. The embedded decoder itself was trained in the same way but for its optimiser (see its card).
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sedac_hf.assets import demo_path
from sedac_hf.evaluation.texts import stdlib_documents

END = "<|endoftext|>"
CONTEXT = 256


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2700, help="optimiser steps (default: 1.6 epochs at batch 32)")
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {CONTEXT} tokens per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the byte-level BPE")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=192, help="hidden size; the FFN is four times as wide")
    parser.add_argument("--files", type=int, default=None, help="use only so many files of each part")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one row of token ids, int64 [n], each ended by token 0."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, 0]])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 50 steps, constant, linear decay to zero over the last 60%."""
    return peak * min((step + 1) / min(50, steps), 1.0, (steps - step) / (0.6 * steps))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor, max_rows: int = 400) -> float:
    """Nats per token over rows of CONTEXT tokens that do not overlap."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:max_rows]
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.to(model.device).split(4)]
    return sum(losses) / len(rows)


def train(model: PreTrainedModel, ids: torch.Tensor, args: argparse.Namespace) -> float:
    """Next-token training on random rows; gives the last step's loss in nats per token."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    loss = torch.tensor(math.nan)
    model.train()
    for step in range(args.steps):
        starts = torch.randint(len(ids) - CONTEXT, (args.batch,))
        batch = torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()]).to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f} nats per token", flush=True)
    model.eval()
    return loss.item()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    train_texts, heldout_texts = (
        [d.text for d in stdlib_documents(part)[: args.files]] for part in ("train", "heldout")
    )
    tokenizer = train_tokenizer(train_texts, args.vocab)
    ids, heldout_ids = encode(tokenizer, train_texts), encode(tokenizer, heldout_texts)
    shape = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "head_dim": args.hidden // 4}
    config = AutoConfig.from_pretrained(demo_path(), vocab_size=len(tokenizer), num_hidden_layers=args.layers, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    parameters = model.num_parameters()
    print(f"{parameters / 1e6:.2f}M parameters on {device}; {len(ids):,} tokens of training text", flush=True)
    last_loss = train(model, ids, args)
    heldout_loss = mean_loss(model, heldout_ids)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    seen = args.steps * args.batch * CONTEXT
    card = f"""# demo decoder
{config.model_type} decoder, {parameters / 1e6:.2f}M parameters, float16, byte-level BPE of {len(tokenizer)}.
Trained on the source of the standard library of Python {platform.python_version()}: {len(train_texts)} files,
{len(ids):,} tokens; {seen:,} tokens seen ({seen / len(ids):.2f} epochs), contexts of {CONTEXT}, token 0 after each.
Held out, never trained on: files with `int(md5(relative posix path)) % 20 == 0` ({len(heldout_texts)} files).
AdamW, learning rate {args.lr:g}, batch {args.batch} x {CONTEXT}, {args.steps} steps, seed {args.seed}.
Loss in nats per token: {last_loss:.3f} at the last step, {heldout_loss:.3f} on held-out text.
"""
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"held-out loss {heldout_loss:.3f} nats per token; written to {args.out}")


if __name__ == "__main__":
    main()
