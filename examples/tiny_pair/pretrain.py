"""The base model: a small Llama trained from nothing on the training books.

Muon for the hidden matrices, AdamW for the tied embedding and the norms; linear decay to zero.
Every window starts with the beginning-of-text token, as the contexts of the demo do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_LENGTH = 256


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama of 6 layers, 256 wide, 5.9 M parameters with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config)


def windows(tokens: np.ndarray, *, bos: int, seed: int) -> np.ndarray:
    """All windows of the corpus, each with the beginning token in front, in a seeded order."""
    body = CONTEXT_LENGTH - 1
    count = len(tokens) // body
    cut = tokens[: count * body].reshape(count, body)
    with_bos = np.concatenate([np.full((count, 1), bos, dtype=tokens.dtype), cut], axis=1)
    return with_bos[np.random.default_rng(seed).permutation(count)]


def optimisers(model: LlamaForCausalLM, *, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the blocks, AdamW on all else."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    ids = {id(p) for p in hidden}
    other = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(hidden, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def linear_schedule(step: int, num_steps: int, *, warmup: int) -> float:
    """Factor on the learning rate: up over `warmup` steps, then straight down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup))


def next_token_loss(model: nn.Module, ids: Tensor, *, targets: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats; positions whose target is -100 are left out."""
    targets = ids if targets is None else targets
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits
    logits = logits[:, :-1].flatten(0, 1).float()
    return nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100)


def update(
    model: nn.Module, opts: list[torch.optim.Optimizer], loss: Tensor, *, factor: float, rates: list[float]
) -> None:
    """One optimiser step at `factor` times the base rates, with the gradient clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt, rate in zip(opts, rates, strict=True):
        opt.param_groups[0]["lr"] = rate * factor
        opt.step()
        opt.zero_grad(set_to_none=True)


def pretrain(
    model: LlamaForCausalLM,
    tokens: np.ndarray,
    *,
    num_tokens: int,
    batch_size: int = 32,
    seed: int = 0,
    log: Callable[[str], None],
    snapshot: tuple[Path, int] | None = None,
) -> None:
    """Train `model` in place on `num_tokens` tokens; `snapshot` = (folder, every n steps)."""
    data = windows(tokens, bos=model.config.bos_token_id, seed=seed)
    num_steps = max(1, num_tokens // (batch_size * CONTEXT_LENGTH))
    rates = [0.02, 3e-3]
    opts = optimisers(model, muon_lr=rates[0], adam_lr=rates[1])
    start, running = time.monotonic(), math.nan
    model.train()
    for step in range(num_steps):
        take = [(step * batch_size + i) % len(data) for i in range(batch_size)]
        ids = torch.from_numpy(data[take].astype(np.int64))
        loss = next_token_loss(model, ids)
        update(model, opts, loss, factor=linear_schedule(step, num_steps, warmup=50), rates=rates)
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            rate = (step + 1) * ids.numel() / (time.monotonic() - start)
            log(f"step {step}/{num_steps}  loss {running:.4f}  {rate:,.0f} tokens/s")
        if snapshot and step and step % snapshot[1] == 0:
            model.save_pretrained(snapshot[0])
    model.eval()


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, tokens: np.ndarray, *, num_bytes: int) -> float:
    """Held-out bits per byte of UTF-8 text: the summed cross-entropy over all windows, in bits, by the bytes coded."""
    data = windows(tokens, bos=model.config.bos_token_id, seed=0)
    total = 0.0
    for i in range(0, len(data), 32):
        ids = torch.from_numpy(data[i : i + 32].astype(np.int64))
        total += next_token_loss(model, ids).item() * ids[:, 1:].numel()
    coded = len(data) * (CONTEXT_LENGTH - 1)
    return total / math.log(2) / (num_bytes * coded / len(tokens))
