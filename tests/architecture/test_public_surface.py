"""What `import crosscoder` gives, and what it costs."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel

import crosscoder
from crosscoder.training.config import RunConfig
from crosscoder.training.runfile import keys

HEAVY = ("torch", "transformers", "datasets", "numpy", "pydantic", "wandb", "tensorboard", "typer", "rich")


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_names_are_sorted_and_few() -> None:
    assert crosscoder.__all__ == sorted(crosscoder.__all__)
    assert len(crosscoder.__all__) <= 28
    assert set(crosscoder.__all__) == set(crosscoder._HOMES) | set(crosscoder._ROOMS)


@pytest.mark.parametrize("name", crosscoder.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(crosscoder, name) is getattr(crosscoder, name)
    assert name in dir(crosscoder)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Crosscoderr'"):
        _ = crosscoder.Crosscoderr


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert crosscoder.__version__ == version("crosscoder")


def test_importing_is_light() -> None:
    assert not modules_after("import crosscoder") & set(HEAVY)


def test_describing_needs_no_torch() -> None:
    statement = "import crosscoder as xc; xc.wiring.sae(xc.Source('base', 'embed', 4), num_latents=8)"
    assert not modules_after(statement) & {"torch", "transformers", "datasets", "wandb"}


def test_the_command_line_waits_with_its_imports() -> None:
    assert not modules_after("import crosscoder.cli.app") & {"torch", "transformers", "datasets", "pydantic", "numpy"}


def models_in(schema: type[BaseModel]) -> set[type[BaseModel]]:
    from crosscoder.training.runfile import _models_in

    found = {schema}
    for field in schema.model_fields.values():
        for model in _models_in(field.annotation):
            found |= models_in(model)
    return found


@pytest.mark.parametrize("model", sorted(models_in(RunConfig), key=lambda model: model.__name__))
def test_settings_are_frozen_closed_and_described(model: Any) -> None:
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_keys_of_a_run_file_are_all_listed_once() -> None:
    """A key that means different things in different kinds of a block comes once for each."""
    listed = keys(RunConfig)
    assert len(listed) == len(set(listed))
    places = [(key.path, kind) for key in listed if not key.path.endswith("kind") for kind in key.kinds or ("",)]
    assert len(places) == len(set(places))
