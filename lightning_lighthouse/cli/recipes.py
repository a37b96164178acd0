"""`lighthouse recipes`: the recipes that ship, listed, or one of them written out to be changed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.cli.parser import Parser
from lightning_lighthouse.cli.recipe import UsageError, asks_help, nearest, split

DESCRIPTION = "List the recipes that ship, or write one out: lighthouse recipes NAME > my.yaml."
SUFFIX = ".yaml"
# what fit, validate and test are about
SUBJECTS = {"fit": "train", "check": "look at", "plan": "plan", "validate": "evaluate", "test": "evaluate"}


def shipped() -> dict[str, str]:
    """The text of each recipe by its name, sorted."""
    paths = [path for path in _folder().iterdir() if path.name.endswith(SUFFIX)]
    return {path.name.removesuffix(SUFFIX): path.read_text(encoding="utf-8") for path in sorted(paths, key=_name)}


def require_recipe(command: str, arguments: Sequence[str]) -> None:
    """Refuse a command that was given no recipe: the defaults are a toy's, which nobody means to train.

    Args:
        command: "fit", "validate" or "test".
        arguments: What follows it.

    Raises:
        UsageError: There is no `-c`, and neither help nor the printed settings are asked for.
    """
    is_question = asks_help(arguments) or any(argument.startswith("--print_config") for argument in arguments)
    if not is_question and not split(arguments)[0]:
        raise UsageError(
            f"{command} needs a recipe that says what to {SUBJECTS[command]}: -c RECIPE.yaml; those that ship are "
            f"{', '.join(shipped())}, and lighthouse recipes NAME > my.yaml writes one"
        )


def main(argv: Sequence[str]) -> int:
    """Run `lighthouse recipes`; returns the exit status."""
    parser = Parser(prog="lighthouse recipes", description=DESCRIPTION)
    parser.add_argument("name", nargs="?", help="recipe to print (default: list them all)")
    name = parser.parse_args(argv).name
    recipes = shipped()
    if name is None:
        width = max(map(len, recipes))
        print("\n".join(f"{recipe:<{width}}  {_first_comment(text)}" for recipe, text in recipes.items()))
        return 0
    if name.removesuffix(SUFFIX) not in recipes:
        parser.error(f"{quoted(name)} is no recipe; allowed: {', '.join(recipes)}{nearest(name, list(recipes))}")
    print(recipes[name.removesuffix(SUFFIX)], end="")
    return 0


def _folder() -> Traversable:
    """Inside the package in a wheel; beside it in a checkout, also where that is installed as editable."""
    package = files("lightning_lighthouse")
    inside = package / "recipes"
    return inside if inside.is_dir() else package / ".." / "recipes"


def _first_comment(text: str) -> str:
    return text.partition("\n")[0].removeprefix("#").strip()


def _name(path: Traversable) -> str:
    return path.name
