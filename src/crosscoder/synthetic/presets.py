"""Worlds of the literature, and two of our own. Where a source leaves a number open, the default says what we took.

feb25_toy          Anthropic, Insights on Crosscoder Model Diffing (February 2025), synthetic experiment
dedicated_toy      Jiralerspong & Bricken 2026 (arXiv 2602.11729), toy model
narrow_exclusive   common against narrow exclusive concepts, after the latent-scaling toy of pulsatrix
null_world         two sources that do not differ, in three senses of the word
layer_world        concepts that begin, drift in direction and end along the layers of one model
"""

from __future__ import annotations

from typing import Literal

from crosscoder.synthetic.description import (
    ConceptGroup,
    Constant,
    Correlation,
    Decaying,
    Frequency,
    LinearMap,
    LogUniform,
    Magnitude,
    Rotation,
    Same,
    Turned,
    Uniform,
    View,
    WorldConfig,
    WorldSource,
)

SITE = "layers.0.resid_post"
BASE, CHAT = f"base/{SITE}", f"chat/{SITE}"
FEB25_COUNTS = {"overcomplete": (300, 75), "tight": (500, 100)}
"""Shared concepts, and exclusive ones per model; the paper trains 4,096 latents on the one and 1,024 on the other."""


def feb25_toy(kind: Literal["overcomplete", "tight"], *, width: int = 64, degrees: float = 0.0) -> WorldConfig:
    """300 shared + 75 exclusive concepts per model (450 in all), or 500 + 100 (700 in all); same directions, or turned.

    Open in the paper and chosen here: the width; frequencies, log-uniform from 0.2 to 2 % for both kinds; values from
    0.5 to 1.5; noise 0.01. About 3 (5) concepts fire on a row of one model.
    """
    shared, exclusive = FEB25_COUNTS[kind]
    view: View = Turned(degrees=degrees) if degrees else Same()
    return _pair(
        shared,
        exclusive,
        frequency=LogUniform(low=0.002, high=0.02),
        magnitude=Uniform(low=0.5, high=1.5),
        widths=(width, width),
        view=view,
    )


def dedicated_toy(
    num_concepts: int = 2048, *, widths: tuple[int, int] = (256, 256), exclusive_share: float = 0.05
) -> WorldConfig:
    """Shared and exclusive concepts that the second model sees through a linear map; correlated firing.

    `exclusive_share` of the concepts are exclusive, half to each model. Frequencies fall with a random rank from the
    first to the last by `exp(−2.048)`, whatever the number of concepts (0.001 per rank at 2,048), with mean 1 % and
    floor 0.01 %; values are uniform on (0, 1); noise 0.01. "N(0, 0.25)" is read as a variance, "0.5/√r" as a standard
    deviation. The paper puts the floor under each row's probability; here it is under the frequency, which stays exact.
    """
    exclusive = max(1, round(num_concepts * exclusive_share / 2))
    return _pair(
        num_concepts - 2 * exclusive,
        exclusive,
        frequency=Decaying(mean=0.01, rate=2.048 / num_concepts),
        magnitude=Uniform(),
        widths=widths,
        view=LinearMap(),
        correlation=Correlation(rank=10, scale=0.5),
    )


def narrow_exclusive(kind: Literal["narrow", "common"], *, width: int = 64) -> WorldConfig:
    """16 shared concepts on 8 % of the rows and 4 exclusive ones per model, on 0.5 % (narrow) or 8 % (common).

    Open in the source and chosen here: the width; directions at random; values from 0.5 to 1.5; noise 0.01.
    """
    rate = {"narrow": 0.005, "common": 0.08}[kind]
    return _pair(
        16,
        4,
        frequency=Constant(value=0.08),
        exclusive_frequency=Constant(value=rate),
        magnitude=Uniform(low=0.5, high=1.5),
        widths=(width, width),
        view=Same(),
    )


def null_world(
    kind: Literal["same", "noise", "rotation"], *, num_concepts: int = 300, width: int = 64, noise: float = 0.05
) -> WorldConfig:
    """Shared concepts only, so that every exclusive latent is false.

    `same`: the two sources are equal to the last bit. `noise`: each has noise of its own, of standard deviation
    `noise` per column. `rotation`: the second is the first turned by one orthogonal matrix, noise of its own.
    """
    views: dict[str, View] = {"same": Same(), "noise": Same(), "rotation": Rotation()}
    world = _pair(
        num_concepts,
        0,
        frequency=LogUniform(low=0.005, high=0.05),
        magnitude=Uniform(low=0.5, high=1.5),
        widths=(width, width),
        view=views[kind],
    )
    return world.model_copy(update={"noise": noise, "noise_across": "shared" if kind == "same" else "independent"})


def layer_world(
    num_layers: int = 8, *, num_concepts: int = 128, width: int = 64, degrees: float = 10.0, min_span: int = 2
) -> WorldConfig:
    """Concepts of one model, each on a random stretch of layers, its direction turning `degrees` from layer to layer.

    Each turn is in a random plane, so that over n layers a direction drifts by about √n · `degrees`. Half as many
    concepts again live at all layers.
    """
    keys = [f"base/layers.{layer}.resid_post" for layer in range(num_layers)]
    turn: View = Turned(degrees=degrees) if degrees else Same()
    frequency, magnitude = LogUniform(low=0.01, high=0.05), Uniform(low=0.5, high=1.5)
    return WorldConfig(
        sources=tuple(WorldSource(key=k, width=width, view=turn if i else Same()) for i, k in enumerate(keys)),
        concepts=(
            ConceptGroup(
                name="spans", num_concepts=num_concepts, frequency=frequency, magnitude=magnitude, min_span=min_span
            ),
            ConceptGroup(
                name="throughout", num_concepts=max(1, num_concepts // 2), frequency=frequency, magnitude=magnitude
            ),
        ),
    )


def _pair(
    shared: int,
    exclusive: int,
    *,
    frequency: Frequency,
    magnitude: Magnitude,
    widths: tuple[int, int],
    view: View,
    exclusive_frequency: Frequency | None = None,
    correlation: Correlation | None = None,
) -> WorldConfig:
    groups = [ConceptGroup(name="shared", num_concepts=shared, frequency=frequency, magnitude=magnitude)]
    for key in (BASE, CHAT) if exclusive else ():
        groups.append(
            ConceptGroup(
                name=key.split("/")[0],
                num_concepts=exclusive,
                frequency=exclusive_frequency or frequency,
                magnitude=magnitude,
                sources=(key,),
            )
        )
    return WorldConfig(
        sources=(WorldSource(key=BASE, width=widths[0]), WorldSource(key=CHAT, width=widths[1], view=view)),
        concepts=tuple(groups),
        correlation=correlation,
    )
