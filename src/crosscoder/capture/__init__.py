"""Capture: language models that can be read and replaced at sites, text, and the live stream of activations."""

from crosscoder.capture.loading import ModelConfig
from crosscoder.capture.models import StudiedModel

__all__ = ["ModelConfig", "StudiedModel"]
