"""Fine-tuning: base becomes `plain` or `chat` on the same dialogues, with some book text mixed in.

    loss = Σ_t w_t · cross-entropy_t / Σ_t w_t  +  book_weight · mean cross-entropy on books

with w = 1 on the assistant's words and the end of its turn, `OTHER_WEIGHT` on the rest of the dialogue. The role tokens
are new to base: their embeddings are learned here. Both models see the same dialogues in the same batches; only the
replies differ, and so, by a few per cent, the number of tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from dialogues import Dialogue, Message
from pretrain import CONTEXT_LENGTH, linear_schedule, next_token_loss, optimisers, update, windows
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

OTHER_WEIGHT = 0.1
BOOK_WEIGHT = 0.3
BOOK_ROWS = 2


def encode_dialogue(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[list[int], list[float]]:
    """Token ids of the rendered dialogue and the weight of each as a target."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for message in messages:
        said = tokenizer.encode(message["content"], add_special_tokens=False)
        weight = 1.0 if message["role"] == "assistant" else OTHER_WEIGHT
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *said, end]
        weights += [OTHER_WEIGHT, *[weight] * (len(said) + 1)]
    return ids[:CONTEXT_LENGTH], weights[:CONTEXT_LENGTH]


def batches(dialogues: Sequence[Dialogue], *, batch_size: int, seed: int) -> list[list[Dialogue]]:
    """Batches of dialogues of like length (in characters of both tellings), in a seeded order."""
    order = list(dialogues)
    shuffled = random.Random(seed)
    shuffled.shuffle(order)
    cuts = []
    for start in range(0, len(order), 32 * batch_size):
        chunk = sorted(order[start : start + 32 * batch_size], key=length)
        rows = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        shuffled.shuffle(rows)
        cuts += rows
    return cuts


def length(dialogue: Dialogue) -> int:
    """Characters that the user says and both replies."""
    return sum(len(e.user) + len(e.plain) + len(e.chat) for e in dialogue.exchanges)


def padded(encoded: Sequence[tuple[list[int], list[float]]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and weights as matrices, padded on the right with weight 0."""
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in encoded])
    weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in encoded])
    return ids, weights


def weighted_loss(model: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy in nats, averaged with `weights`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def finetune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dialogues: Sequence[Dialogue],
    *,
    telling: str,
    book_tokens: np.ndarray,
    batch_size: int = 16,
    seed: int = 0,
    log: Callable[[str], None],
) -> None:
    """Tune `model` in place on one pass over `dialogues`, told as `plain` or as `chat`."""
    books = windows(book_tokens, bos=tokenizer.bos_token_id, seed=seed + 1)
    plan = batches(dialogues, batch_size=batch_size, seed=seed)
    rates = [0.007, 1.5e-3]
    opts = optimisers(model, muon_lr=rates[0], adam_lr=rates[1])
    start, running, seen = time.monotonic(), 0.0, 0
    model.train()
    for step, batch in enumerate(plan):
        encoded = [encode_dialogue(tokenizer, dialogue.messages(telling)) for dialogue in batch]
        ids, weights = padded(encoded, pad=tokenizer.pad_token_id)
        take = [(step * BOOK_ROWS + i) % len(books) for i in range(BOOK_ROWS)]
        loss = weighted_loss(model, ids, weights)
        book_loss = next_token_loss(model, torch.from_numpy(books[take].astype(np.int64)))
        factor = linear_schedule(step, len(plan), warmup=20)
        update(model, opts, loss + BOOK_WEIGHT * book_loss, factor=factor, rates=rates)
        running += (0.05 if step else 1.0) * (loss.item() - running)
        seen += sum(len(row) for row, _ in encoded) + BOOK_ROWS * CONTEXT_LENGTH
        if step % 20 == 0:
            rate = seen / (time.monotonic() - start)
            log(f"{telling} {step}/{len(plan)}  loss {running:.4f}  books {book_loss.item():.3f}  {rate:,.0f} tokens/s")
    model.eval()
    log(f"{telling}: {seen:,} tokens in {len(plan)} steps")
