"""Short hashes that tell whether two models, vocabularies or texts are the same."""

from __future__ import annotations

import json

import torch
from torch import nn
from xxhash import xxh3_128

from crosscoder.capture.huggingface import Tokenizer

_VALUES_PER_TENSOR = 65_536


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """A hash of every token and its id: equal exactly when two tokenizers give the ids the same meaning."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return xxh3_128(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """A hash of all names, shapes and dtypes, and of up to 65,536 evenly spaced values of every tensor."""
    digest = xxh3_128()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        stride = 1 + weight.numel() // _VALUES_PER_TENSOR
        values = weight.detach().reshape(-1)[::stride].to("cpu", torch.float32).contiguous()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
