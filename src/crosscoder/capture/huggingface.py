"""The Hugging Face types that annotations name, without paying for their import.

Importing transformers takes seconds and configs must load in milliseconds, so only type checkers see the real classes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    PreTrainedModel = Any
    Tokenizer = Any

__all__ = ["PreTrainedModel", "Tokenizer"]
