"""Peers from the package index, through their own trainers: sparsify and sae-lens on the sources side by side.

A TopK autoencoder of the concatenated sources is a TopK crosscoder. Each starts with our trained weights, mapped so
that it computes the same pre-activations, on rows that are normalised beforehand, which favours them a little. Both use
Adam at one step size. Their AuxK is their own: all dead latents, all rows, `k_aux = D/2`.

sparsify       `Trainer.fit` in a thread, stopped at every batch by the data set that it reads; Triton is off by its own
               switch, so that it runs as on any CPU
sae-lens       `SAETrainer.step`; the sparse variant cannot rescale by decoder norms on a CPU, so there that is off

Nothing here is imported before a peer takes part; the package itself never needs them.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from typing import Any, Literal

import torch
from step_data import Start
from step_dense import AUX_COEFFICIENT, LEARNING_RATE, LONG_AGO
from torch import Tensor, nn

PACKAGES = {"sparsify": "eai-sparsify", "sae-lens": "sae-lens"}
MANY = 1 << 40


def missing() -> set[str]:
    """The peers' packages that are not installed."""
    return {package for package in PACKAGES.values() if version(package) is None}


def version(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers say a lot, on both streams."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def load(name: str) -> None:
    """Import what a contender of this name needs, so that it does not count as its memory."""
    peer = name.split()[0]
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    if peer in PACKAGES:
        warnings.simplefilter("ignore")
        with quiet():
            import_module("sparsify" if peer == "sparsify" else "sae_lens")


class _Rows(nn.Module):
    """A language model to sparsify: one layer, which gives the rows of the present batch as one context."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.rows = rows
        self.device = rows.device

    @property
    def base_model(self) -> _Rows:
        """Itself."""
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """What it is asked for its widths with."""
        return {"input_ids": torch.zeros(1, len(self.rows), dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Tensor:
        """The rows, whatever the tokens are."""
        return self.layer(self.rows[None])


class _Gate:
    """A data set of one context after another, whose reader waits at each until the next step is asked for."""

    def __init__(self, num_rows: int) -> None:
        self._context = {"input_ids": torch.zeros(num_rows, dtype=torch.int64)}
        self.asked: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.waiting: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        self.waiting.put(None)
        self.asked.get()
        return self._context


class Sparsify:
    """sparsify's own loop, one batch at a time."""

    def __init__(self, start: Start) -> None:
        sparsify: Any = import_module("sparsify")
        size = start.size
        self._normalised, self._gate = start.normaliser(), _Gate(size.batch_size)
        self._model = _Rows(torch.zeros(size.batch_size, size.total_width))
        config = sparsify.TrainConfig(
            sparsify.SaeConfig(num_latents=size.num_latents, k=size.k),
            batch_size=1,  # contexts; a context is a batch of rows
            optimizer="adam",
            lr=LEARNING_RATE,
            auxk_alpha=AUX_COEFFICIENT,
            hookpoints=["layer"],
            save_every=MANY,
            log_to_wandb=False,
            finetune="trained weights",  # keeps the decoder's bias
        )
        with quiet():
            self._trainer = sparsify.Trainer(config, self._gate, self._model)
        self._set_weights(start)
        threading.Thread(target=self._fit, daemon=True).start()
        self._wait()

    def step(self, x: Tensor) -> None:
        """One batch through `Trainer.fit`."""
        self._model.rows = self._normalised(x)
        self._gate.asked.put(None)
        self._wait()

    @torch.no_grad()
    def _set_weights(self, start: Start) -> None:
        """Unit decoders, their norms in the encoder; it subtracts the decoder's bias from the rows."""
        sae, own = self._trainer.saes["layer"], start.tensors
        norms = own["decoder"].norm(dim=1)
        bias = own["encoder_bias"] + own["encoder"] @ own["bias"]
        sae.W_dec.copy_(own["decoder"] / norms[:, None])
        sae.b_dec.copy_(own["bias"])
        sae.encoder.weight.copy_(own["encoder"] * norms[:, None])
        sae.encoder.bias.copy_(bias * norms)
        self._trainer.num_tokens_since_fired["layer"][start.dead] = LONG_AGO

    def _fit(self) -> None:
        try:
            with quiet():
                self._trainer.fit()
        except BaseException as error:
            self._gate.waiting.put(error)
            raise

    def _wait(self) -> None:
        error = self._gate.waiting.get()
        if error is not None:
            raise RuntimeError("sparsify's loop has ended") from error


class SaeLens:
    """sae-lens' own step."""

    def __init__(self, start: Start, *, kind: Literal["topk", "topk-sparse", "batchtopk"]) -> None:
        sae_lens: Any = import_module("sae_lens")
        config: Any = import_module("sae_lens.config")
        trainers: Any = import_module("sae_lens.training.sae_trainer")
        prefix, size, sparse = "BatchTopK" if kind == "batchtopk" else "TopK", start.size, kind == "topk-sparse"
        settings = getattr(sae_lens, f"{prefix}TrainingSAEConfig")(
            d_in=size.total_width,
            d_sae=size.num_latents,
            k=size.k,
            apply_b_dec_to_input=False,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
            aux_loss_coefficient=AUX_COEFFICIENT,
        )
        self._normalised, self._sae = start.normaliser(), getattr(sae_lens, f"{prefix}TrainingSAE")(settings)
        training = config.SAETrainerConfig(
            total_training_samples=MANY,
            train_batch_size_samples=size.batch_size,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
        )
        self._trainer = trainers.SAETrainer(training, self._sae, data_provider=iter(()))
        self._set_weights(start)

    def step(self, x: Tensor) -> None:
        """One step of its trainer."""
        self._trainer.step(self._normalised(x))
        self._trainer.n_training_steps += 1

    @torch.no_grad()
    def _set_weights(self, start: Start) -> None:
        own = start.tensors
        self._sae.W_enc.copy_(own["encoder"].T)
        self._sae.W_dec.copy_(own["decoder"])
        self._sae.b_enc.copy_(own["encoder_bias"])
        self._sae.b_dec.copy_(own["bias"])
        self._trainer.n_forward_passes_since_fired[start.dead] = 1e6
