"""Three-layer toy models in double precision, studied, and crosscoders of them with random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conftest import build_toy_model
from crosscoder.capture.models import StudiedModel


def studied(alias: str, tokenizer: PreTrainedTokenizerFast, *, noise: float = 0.0) -> StudiedModel:
    """The toy model, with every matrix moved by a little noise."""
    model = build_toy_model(seed=0, num_layers=3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    model.generation_config.eos_token_id = None
    return StudiedModel(alias, model, tokenizer)


@pytest.fixture(scope="session")
def pair(toy_tokenizer: PreTrainedTokenizerFast) -> dict[str, StudiedModel]:
    """`base` and a partner of it."""
    return {"base": studied("base", toy_tokenizer), "chat": studied("chat", toy_tokenizer, noise=0.02)}
