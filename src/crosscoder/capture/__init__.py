"""Capture: language models that can be read and replaced at sites, text, and the live stream of activations."""

from crosscoder.capture.analysis_set import AnalysisSet, Located
from crosscoder.capture.ancestry import Ancestry, measure_ancestry
from crosscoder.capture.chat import Rendered, render
from crosscoder.capture.contexts import Context, DocumentId
from crosscoder.capture.corpus import ContextStream, Corpus
from crosscoder.capture.models import ModelConfig, StudiedModel
from crosscoder.capture.stream import ActivationStream
from crosscoder.capture.text import DatasetConfig, Document, HeldOutConfig, Message, TextConfig, document_hash

__all__ = [
    "ActivationStream",
    "AnalysisSet",
    "Ancestry",
    "Context",
    "ContextStream",
    "Corpus",
    "DatasetConfig",
    "Document",
    "DocumentId",
    "HeldOutConfig",
    "Located",
    "Message",
    "ModelConfig",
    "Rendered",
    "StudiedModel",
    "TextConfig",
    "document_hash",
    "measure_ancestry",
    "render",
]
