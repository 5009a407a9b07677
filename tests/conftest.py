"""What every room's tests share: shape checks switched on, no network, and a toy language model built here."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("crosscoder", "typechecks.checked")

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

torch.set_num_threads(1)

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = (
    "the old house stood at the end of a long lane and nobody had opened its door for many years",
    "a small brown dog ran over the hill to find the water and came back with a stick in its mouth",
    "she said that the letter had come in the morning and that her brother would read it in the evening",
    "how do I mend a clock, asked the child, and the keeper of the tower laughed and showed the wheels",
    "when the rain came down on the town the lamps went out one after the other and the streets were still",
)


def toy_texts(num_documents: int = 60) -> list[str]:
    """Short English documents, all different, the same in every process."""
    return [
        f"Chapter {number}. " + " ".join(WORDS[(number * 3 + turn * 7) % len(WORDS)] for turn in range(2 + number % 3))
        for number in range(num_documents)
    ]


def build_toy_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with the role tokens and a chat template; `<|bos|>` opens every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(toy_texts(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", SPECIAL_TOKENS.index("<|bos|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_toy_model(seed: int = 0, *, num_layers: int = 2, width: int = 32) -> LlamaForCausalLM:
    """A random Llama in eval mode; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """The toy tokenizer; do not change it."""
    return build_toy_tokenizer()


@pytest.fixture(scope="session")
def toy_model() -> PreTrainedModel:
    """A two-layer Llama, 32 wide; do not change it."""
    return build_toy_model(seed=0)


@pytest.fixture(scope="session")
def toy_partner() -> PreTrainedModel:
    """`toy_model` with every matrix moved by a little noise: a stand-in for a fine-tune of it."""
    model = build_toy_model(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def toy_model_directory(
    tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerFast
) -> Callable[[PreTrainedModel, str], Path]:
    """`directory(model, name)` saves a model with the toy tokenizer as a Hugging Face directory, once per name."""
    root = tmp_path_factory.mktemp("models")

    def directory(model: PreTrainedModel, name: str) -> Path:
        path = root / name
        if not path.exists():
            model.save_pretrained(path)
            toy_tokenizer.save_pretrained(path)
        return path

    return directory


@pytest.fixture(scope="session")
def toy_base_path(toy_model_directory: Callable[[PreTrainedModel, str], Path], toy_model: PreTrainedModel) -> Path:
    """The Hugging Face directory of `toy_model`."""
    return toy_model_directory(toy_model, "base")


@pytest.fixture(scope="session")
def toy_chat_path(toy_model_directory: Callable[[PreTrainedModel, str], Path], toy_partner: PreTrainedModel) -> Path:
    """The Hugging Face directory of `toy_partner`."""
    return toy_model_directory(toy_partner, "chat")


@pytest.fixture(scope="session")
def toy_text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 60 short documents, column `text`."""
    import json

    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in toy_texts()), encoding="utf-8")
    return path
