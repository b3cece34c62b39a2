"""The recipes of the package: files of settings by name."""

from __future__ import annotations

from importlib import resources

from fasttr.errors import FasttrError, did_you_mean

SUFFIX = ".yaml"


def recipe_names() -> list[str]:
    """Names of all recipes, in order."""
    files = resources.files("fasttr").joinpath("recipes").iterdir()
    return sorted(one.name.removesuffix(SUFFIX) for one in files if one.name.endswith(SUFFIX))


def recipe_text(name: str) -> str:
    """The file of a recipe, its comments included. FasttrError for a name that there is not."""
    names = recipe_names()
    name = name.removesuffix(SUFFIX)
    if name not in names:
        near = did_you_mean(name, names)
        raise FasttrError(f"recipe: got {name!r}{near}; fasttr recipes lists all {len(names)}")
    return resources.files("fasttr").joinpath("recipes", name + SUFFIX).read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """The first line of its comment."""
    return recipe_text(name).splitlines()[0].removeprefix("#").strip()


def recipe_command(name: str) -> str:
    """The word of `fasttr` that runs it."""
    import yaml

    keys = yaml.safe_load(recipe_text(name))
    if "arms" in keys:
        return "ocrm"
    return keys["loss_type"] if keys["loss_type"] in ("sft", "kto") else "dpo"
