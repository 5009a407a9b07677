"""A crosscoder on disk and on the Hub: `config.json`, `model.safetensors` and a model card; never corpus text.

`config.json` holds the sources, the expanded groups, the nonlinearity and what made it. Tensors are
`groups.<name>.{encoder, decoder, encoder_bias, gate, threshold}`, under JumpReLU `log_threshold` and where there is an
affine path `skip` (written columns, read columns), and `sources.<key>.{bias, mean, scale}`. A tied decoder is kept
once, (latents, width); all others are (latents, Σ written widths).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from crosscoder import files
from crosscoder.errors import FileFormatError
from crosscoder.nonlinearities import KINDS, Nonlinearity, active_per_row
from crosscoder.sources import Source, SourceSet
from crosscoder.wiring import LatentGroup, Wiring

if TYPE_CHECKING:
    from crosscoder.crosscoder import Crosscoder

THING = "crosscoder"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Strict):
    """One source as saved."""

    model: str = Field(description="alias of the model under study")
    site: str = Field(description="site within it")
    width: int = Field(description="width of its activations")
    difference: tuple[str, str] | None = Field(
        default=None, description="the two sources whose difference a derived source is"
    )


class GroupConfig(_Strict):
    """One latent group as saved, every default written out."""

    name: str = Field(description="name of the group, part of its tensors' names")
    num_latents: int = Field(description="latents in the group")
    reads: tuple[str, ...] = Field(description="keys of the sources it reads")
    writes: tuple[str, ...] = Field(description="keys of the sources it writes")
    tied: Literal["decoder", "norm"] | None = Field(description="what is shared across written sources")
    penalty: float = Field(description="multiplier of the sparsity coefficient")
    k: int | None = Field(description="active latents per row of this group alone")
    skip: tuple[str, ...] | bool = Field(description="written sources that get an affine map of the reads")


class NonlinearityConfig(_Strict):
    """The nonlinearity as saved."""

    kind: Literal["relu", "jump_relu", "topk", "batch_topk"] = Field(description="which nonlinearity")
    k: int | None = Field(default=None, description="active latents per row")
    code_norm: Literal["sum", "concat", "max", "none"] | None = Field(
        default=None, description="the norm of decoders that scores are multiplied with"
    )
    bandwidth: float | None = Field(default=None, description="window of the gradient of JumpReLU's thresholds")
    initial_threshold: float | None = Field(default=None, description="where JumpReLU's thresholds started")


class CrosscoderConfig(_Strict):
    """All of a crosscoder but its tensors."""

    format: str = Field(description="crosscoder.crosscoder/1")
    package_version: str = Field(description="version of the package that wrote it")
    sources: tuple[SourceConfig, ...] = Field(description="sources in the order of packed rows")
    groups: tuple[GroupConfig, ...] = Field(description="latent groups in the order of latent ids")
    nonlinearity: NonlinearityConfig = Field(description="which latents stay on")
    folded_normaliser: bool = Field(description="whether weights take raw activations as they are")
    provenance: dict[str, Any] = Field(description="models, revisions, tokenizer, text and run that made it")


def save(crosscoder: Crosscoder, path: Path) -> Path:
    """Write all files into the directory `path`, whole or not at all; gives the path."""
    _refuse_strangers(path)
    with files.replacing(path) as draft:
        draft.mkdir(parents=True)
        files.write_json(draft / CONFIG, config_of(crosscoder).model_dump(mode="json"))
        files.write_tensors(draft / WEIGHTS, tensors_of(crosscoder), thing=THING)
        (draft / CARD).write_text(model_card(crosscoder), encoding="utf-8")
    return path


def _refuse_strangers(path: Path) -> None:
    """Raises FileFormatError when `path` holds anything but a crosscoder, which would be lost."""
    others = sorted(p.name for p in path.iterdir() if p.name not in (CONFIG, WEIGHTS, CARD)) if path.is_dir() else []
    if path.is_file() or others:
        raise FileFormatError(
            f"{path} is not a crosscoder's directory, and saving there would replace it.",
            details=others[:8],
            hint="Give a directory of its own, such as crosscoder.save('results/crosscoder').",
        )


def load(path: str | Path, *, revision: str | None, device: str) -> Crosscoder:
    """The crosscoder in a directory or Hub repository, in eval mode."""
    from crosscoder.crosscoder import Crosscoder

    folder = local_folder(path, revision=revision)
    config = _read_config(folder / CONFIG)
    sources = SourceSet(Source(s.model, s.site, s.width, s.difference) for s in config.sources)
    wiring = Wiring(sources, [LatentGroup(**group.model_dump()) for group in config.groups])
    crosscoder = Crosscoder(wiring, _nonlinearity(config.nonlinearity), seed=None)
    crosscoder.folded_normaliser = config.folded_normaliser
    crosscoder.provenance = config.provenance
    set_tensors(crosscoder, files.read_tensors(folder / WEIGHTS, thing=THING), origin=str(folder / WEIGHTS))
    return crosscoder.to(device).eval()


def push(crosscoder: Crosscoder, repo_id: str, *, private: bool) -> str:
    """Upload the saved files to the Hub; gives the commit's address."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    public = copy(crosscoder)
    public.provenance = without_local_paths(crosscoder.provenance)
    with TemporaryDirectory() as folder:
        save(public, Path(folder) / "crosscoder")
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "crosscoder")
    return str(commit.commit_url)


def without_local_paths(content: Any) -> Any:
    """JSON content in which an absolute path is only its last part: what may be published."""
    if isinstance(content, dict):
        return {key: without_local_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_local_paths(value) for value in content]
    return Path(content).name if isinstance(content, str) and Path(content).is_absolute() else content


def local_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """A directory with a crosscoder's files: `path` itself, or a download of the Hub repository of that name."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise FileFormatError(
            f"expected a directory with a crosscoder, or a Hub id owner/name; got {str(path)!r}.",
            hint="Check the path; a run keeps its crosscoder in <run>/crosscoder.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [CONFIG, WEIGHTS, CARD]
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileFormatError(
            f"{str(path)!r} is neither a directory here nor to be had from the Hub: {type(error).__name__}.",
            hint="Check the name, your access to it, and the network.",
        ) from error


def config_of(crosscoder: Crosscoder) -> CrosscoderConfig:
    """What `config.json` will say."""
    from crosscoder import __version__

    names = GroupConfig.model_fields
    groups = [GroupConfig(**{name: getattr(group, name) for name in names}) for group in crosscoder.wiring]
    kind = crosscoder.nonlinearity
    return CrosscoderConfig(
        format=f"crosscoder.{THING}/1",
        package_version=__version__,
        sources=tuple(
            SourceConfig(model=s.model, site=s.site, width=s.width, difference=s.difference) for s in crosscoder.sources
        ),
        groups=tuple(groups),
        nonlinearity=NonlinearityConfig(kind=kind.kind, **{f.name: getattr(kind, f.name) for f in fields(kind)}),
        folded_normaliser=crosscoder.folded_normaliser,
        provenance=crosscoder.provenance,
    )


def tensors_of(crosscoder: Crosscoder) -> dict[str, Tensor]:
    """All tensors under their names in the file."""
    tensors: dict[str, Tensor] = {}
    for group, weights in zip(crosscoder.wiring, crosscoder.weights, strict=True):
        for name in ("encoder", "decoder", "encoder_bias", "gate", "threshold", "log_threshold", "skip"):
            if getattr(weights, name) is not None:
                tensors[f"groups.{group.name}.{name}"] = getattr(weights, name)
    for i, (key, columns) in enumerate(crosscoder.sources.slices.items()):
        tensors[f"sources.{key}.mean"] = crosscoder.mean[columns]
        tensors[f"sources.{key}.scale"] = crosscoder.scale[i]
    for key, columns in crosscoder.writes.slices.items():
        tensors[f"sources.{key}.bias"] = crosscoder.bias[columns]
    return tensors


@torch.no_grad()
def set_tensors(crosscoder: Crosscoder, tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """Copy named tensors into the crosscoder; raises FileFormatError unless names and shapes are exactly right."""
    mine = tensors_of(crosscoder)
    wrong = [f"missing  {name}" for name in mine if name not in tensors]
    wrong += [f"unknown  {name}" for name in tensors if name not in mine]
    wrong += [
        f"shape    {name}: expected {tuple(mine[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in mine
        if name in tensors and mine[name].shape != tensors[name].shape
    ]
    if wrong:
        raise FileFormatError(
            f"the tensors of {origin} do not fit its configuration.",
            details=wrong[:12],
            hint="The two files belong to different crosscoders, or are of another program.",
        )
    for name, tensor in tensors.items():
        mine[name].copy_(tensor)


def model_card(crosscoder: Crosscoder) -> str:
    """The README of a published crosscoder: what it reads, what it is, how to load it; no text of the corpus."""
    from huggingface_hub import ModelCardData

    models = crosscoder.provenance.get("models", {})
    paths = sorted(
        {str(m["path"]) for m in models.values() if m.get("path") and not Path(str(m["path"])).is_absolute()}
    )
    data = ModelCardData(base_model=paths or None, library_name="crosscoder", tags=["crosscoder", "interpretability"])
    rows = "\n".join(f"| `{s.key}` | {s.width} |" for s in crosscoder.sources)
    groups = "\n".join(
        f"| {g.name} | {g.num_latents:,} | {', '.join(g.reads)} | {', '.join(g.writes)} |" for g in crosscoder.wiring
    )
    k = active_per_row(crosscoder.nonlinearity)
    null = crosscoder.provenance.get("null_pair")
    return _CARD.format(
        control="" if null is None else f"\n**A control, not of two models.** One source is made up: {null}.\n",
        header=data.to_yaml(),
        num_latents=f"{crosscoder.num_latents:,}",
        nonlinearity=crosscoder.nonlinearity.kind + (f" (k = {k})" if k else ""),
        sources=rows,
        groups=groups,
        space="raw" if crosscoder.folded_normaliser else "normalised; the normaliser is stored with the weights",
    )


def _read_config(path: Path) -> CrosscoderConfig:
    content = files.read_json(path, thing=THING)
    try:
        return CrosscoderConfig.model_validate(content)
    except ValidationError as error:
        details = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise FileFormatError(f"{path} does not describe a crosscoder.", details=details[:12]) from error


def _nonlinearity(config: NonlinearityConfig) -> Nonlinearity:
    kind = KINDS[config.kind]
    given = {name: value for name, value in config.model_dump(exclude={"kind"}).items() if value is not None}
    known = {field.name for field in fields(kind)}
    if not given.keys() <= known or ("k" in known and "k" not in given):
        raise FileFormatError(
            f"the nonlinearity {config.kind} is saved with {given}; the file was changed.",
            details=[f"expected  {', '.join(sorted(known)) or 'nothing'}"],
        )
    return kind(**given)


_CARD = """---
{header}
---

# Crosscoder
{control}
{num_latents} latents, nonlinearity {nonlinearity}. Weights are in space: {space}.

| source | width |
|---|---|
{sources}

| latent group | latents | reads | writes |
|---|---|---|---|
{groups}

```python
import crosscoder as xc

cc = xc.Crosscoder.load("owner/name")
code = cc.encode(cc.reads.pack(activations))      # {{"model/site": (rows, width)}}
```

What made it (models, revisions, tokenizer, text, run) is in `config.json` under `provenance`.
"""
