"""`StudiedModel`: the one door to a language model. Read its activations at named sites, or replace them.

Which tensor a site names is settled in `architectures` and proved on loading in `selfcheck`. Everything goes through
plain forward hooks; a read stops the forward at the deepest site asked for and never runs the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosscoder.capture.architectures import architecture_of
from crosscoder.capture.fingerprints import vocabulary_hash, weights_hash
from crosscoder.capture.huggingface import PreTrainedModel, Tokenizer
from crosscoder.capture.loading import ModelConfig, load_model, load_tokenizer
from crosscoder.capture.positions import PositionTracker, padded_positions
from crosscoder.capture.selfcheck import check_sites, check_unembedding, sees_no_later_token
from crosscoder.capture.taps import rewrite, watch
from crosscoder.errors import SourceMismatch, UnsupportedSite
from crosscoder.sources import Source, canonical_site

Replacement = Callable[[Tensor, Tensor], Tensor]
"""`fn(x (batch, positions, width), position_ids (batch, positions)) -> x'` of the same shape."""


@dataclass(frozen=True)
class Forward:
    """What a forward pass is about to run on: new tokens, the mask of all tokens seen, and the cache, if any."""

    input_ids: Int[Tensor, "batch positions"]
    attention_mask: Int[Tensor, "batch positions_seen"] | None
    cached: bool
    num_cached: int
    """How many tokens of every text the cache holds already."""


class _Done(Exception):
    """Every site asked for has been seen; the rest of the forward is not needed."""


class StudiedModel:
    """A language model under study: its sites can be read and replaced.

    The model is put in eval mode and frozen. Loading proves every site (see `selfcheck`) or raises UnsupportedModel.

    >>> studied = StudiedModel("base", model, tokenizer)                        # doctest: +SKIP
    >>> studied.read(["layers.3.resid_post"], input_ids)["layers.3.resid_post"]  # doctest: +SKIP
    """

    def __init__(self, alias: str, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.alias = alias
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.architecture = architecture_of(model)
        self.config: ModelConfig | None = None
        self._body: nn.Module = model.base_model
        self._parameters = frozenset(inspect.signature(self._body.forward).parameters)
        check_sites(model, self.architecture)
        if self._unembeds:
            check_unembedding(model, self.architecture, self._project)

    @classmethod
    def load(cls, alias: str, config: ModelConfig) -> StudiedModel:
        """The model that `config` names: a Hugging Face directory or Hub id, in safetensors, without remote code."""
        studied = cls(alias, load_model(config), load_tokenizer(config))
        studied.config = config
        return studied

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the activations."""
        return self.model.dtype

    @property
    def num_layers(self) -> int:
        """The number of blocks."""
        return self.architecture.num_layers

    @property
    def max_positions(self) -> int | None:
        """The longest context the model was made for, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def sites(self) -> tuple[str, ...]:
        """Every site the model has, in the order of the forward pass."""
        return self.architecture.sites()

    def width(self, site: str) -> int:
        """The width of `site`; raises UnsupportedSite when the model lacks it."""
        self.architecture.tap(site)
        return int(self.model.config.get_text_config().hidden_size)

    def source(self, site: str) -> Source:
        """`site` of this model as a source, with its width."""
        return Source(self.alias, site, self.width(site))

    @cached_property
    def is_causal(self) -> bool:
        """Whether no position sees a later one, proved to the last bit; padding on the right then needs no mask."""
        deepest = self.sites()[-1]
        return sees_no_later_token(self.model, lambda ids: self.read([deepest], ids)[deepest])

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """What made this model: where it came from, how it is held, hashes of its weights and vocabulary."""
        config = self.config or ModelConfig(path=self.model.name_or_path or "")
        return {
            "path": config.path,
            "revision": config.revision,
            "commit": getattr(self.model.config, "_commit_hash", None),
            "adapter": config.adapter,
            "architecture": type(self.model).__name__,
            "attention": self.model.config._attn_implementation,  # pyright: ignore[reportPrivateUsage]
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": weights_hash(self.model),
            "tokenizer": vocabulary_hash(self.tokenizer),
        }

    @torch.no_grad()
    def read(
        self,
        sites: Iterable[str],
        input_ids: Int[Tensor, "batch positions"],
        *,
        attention_mask: Int[Tensor, "batch positions_seen"] | None = None,
        past_key_values: Any = None,
    ) -> dict[str, Float[Tensor, "batch positions _"]]:
        """Activations at `sites`, under the names asked for; what `replace` puts in force is seen.

        The forward stops after the deepest site. With a cache it runs through all blocks, so that the cache stays
        whole.
        """
        wanted = {site: canonical_site(site) for site in sites}
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for site in dict.fromkeys(wanted.values()):
                see = _recorder(seen, site, set(wanted.values()) if past_key_values is None else set())
                stack.callback(watch(self.architecture.tap(site), see).remove)
            stack.enter_context(suppress(_Done))
            self._body(**self._inputs(input_ids, attention_mask, past_key_values))
        return {site: seen[canonical] for site, canonical in wanted.items()}

    @contextmanager
    def replace(self, site: str, fn: Replacement) -> Iterator[None]:
        """While the block runs, every forward has `fn(x, position_ids)` at `site` in place of `x`.

        `position_ids` are absolute: right too when `generate` feeds one token at a time to a key-value cache, and with
        left padding (a text's first token is at 0). At `resid_mid` both the MLP and the residual branch get the new
        value.
        """
        tracker = PositionTracker(self.architecture.stem)

        def _replaced(x: Tensor) -> Tensor:
            return _same_shape(site, x, fn(x, tracker.positions(x)))

        tap = self.architecture.tap(site)
        with tracker, ExitStack() as stack:
            stack.callback(rewrite(tap, _replaced).remove)
            yield

    @contextmanager
    def before_forward(self, fn: Callable[[Forward], None]) -> Iterator[None]:
        """While the block runs, `fn` is told of every forward pass before it starts, ahead of all other hooks.

        It may run this model itself: `replace` in force outside is not disturbed.
        """
        signature = inspect.signature(self._body.forward)

        def _told(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signature.bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
            cache = given.get("past_key_values")
            seen = 0 if cache is None else int(cache.get_seq_length())
            fn(Forward(given["input_ids"], _by_token(given.get("attention_mask")), cache is not None, seen))

        handle = self._body.register_forward_pre_hook(_told, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def new_cache(self) -> Any:
        """An empty key-value cache for `read`."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def logits(
        self,
        input_ids: Int[Tensor, "batch positions"],
        *,
        attention_mask: Int[Tensor, "batch positions"] | None = None,
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """The model's logits; honours `replace`, and lets gradients through what it put in."""
        if not self._has_head:
            raise self._headless("logits")
        return self.model(**self._inputs(input_ids, attention_mask, None)).logits

    def unembed(self, resid: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        """What the model would predict from residual stream `resid`: final norm, then head (the logit lens)."""
        if not self._unembeds:
            raise self._headless("unembed")
        return self._project(resid)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch positions"],
        *,
        max_new_tokens: int,
        attention_mask: Int[Tensor, "batch positions"] | None = None,
        temperature: float | None = None,
        stop: Sequence[int] = (),
        use_cache: bool = True,
    ) -> Int[Tensor, "batch _"]:
        """`input_ids` with their continuation: greedy, or sampled at `temperature`; honours `replace`.

        The model's own generation settings (penalties, top-p) are not used, only its end token; a text ends at any
        token in `stop` too.
        """
        from transformers import GenerationConfig

        if not self._has_head:
            raise self._headless("generate")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sampling = {"do_sample": False, "top_k": 50} if temperature is None else {"do_sample": True, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=self._ends(stop),
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0,
            **sampling,
        )
        return cast(Any, self.model).generate(
            input_ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings
        )

    def _ends(self, stop: Sequence[int]) -> list[int] | None:
        """The model's own end tokens and those in `stop`; None leaves its own to transformers."""
        settings = self.model.generation_config
        own = None if settings is None else settings.eos_token_id
        owned = [] if own is None else [own] if isinstance(own, int) else list(own)
        return [*dict.fromkeys([*owned, *stop])] if stop else None

    @property
    def _has_head(self) -> bool:
        return self.model.get_output_embeddings() is not None

    @property
    def _unembeds(self) -> bool:
        return self._has_head and self.architecture.final_norm is not None and not self.architecture.family.encoder

    def _headless(self, verb: str) -> UnsupportedSite:
        return UnsupportedSite(
            f"{verb} needs a final norm and a language-model head that are known; {self.alias!r} "
            f"({type(self.model).__name__}) has none.",
            hint="Use a causal language model of a known architecture; read and replace work here all the same.",
        )

    def _project(self, resid: Tensor) -> Tensor:
        assert self.architecture.final_norm is not None
        head = cast(nn.Module, self.model.get_output_embeddings())
        logits = head(self.architecture.final_norm(resid.to(self.device, self.dtype)))
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor | None, past_key_values: Any) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": _sent(input_ids, self.device)}
        if attention_mask is not None:
            given["attention_mask"] = _sent(attention_mask, self.device)
            if "position_ids" in self._parameters and not self.architecture.family.encoder:
                given["position_ids"] = padded_positions(given["attention_mask"])[:, -input_ids.shape[1] :]
        if "use_cache" in self._parameters:
            given["use_cache"] = past_key_values is not None
        return given if past_key_values is None else {**given, "past_key_values": past_key_values}


def _by_token(mask: Any) -> Tensor | None:
    """The attention mask, where it says of each token that it is one, and not of each pair who sees whom."""
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        return mask
    raise SourceMismatch(
        "expected an attention mask with one entry for every token; got one of another form.",
        hint="Give a mask (batch, positions), and let the model extend it.",
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the CPU does not wait where it lies in pinned memory."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def _recorder(seen: dict[str, Tensor], site: str, stop_after: set[str]) -> Callable[[Tensor], None]:
    def _see(x: Tensor) -> None:
        seen[site] = x
        if seen.keys() == stop_after:
            raise _Done

    return _see


def _same_shape(site: str, x: Tensor, new: Tensor) -> Tensor:
    if new.shape == x.shape:
        return new.to(x.device, x.dtype)
    raise SourceMismatch(
        f"the replacement at {site} must keep the shape {tuple(x.shape)}; it gave {tuple(new.shape)}.",
        hint="Return one vector for every position that came in.",
    )
