"""A recipe: which pattern and method for which tensors, as a YAML file.

nm: 2:4                        # these three are for tensors that no rule fits, and for what a rule leaves open;
kind: transposable             # without `nm`, tensors that no rule fits are left alone
method: sparsegpt
rules:                         # the first rule that fits a tensor decides
  - match: "*.mlp.*"           # a glob over the name, or re:REGEX; one, or a list
    nm: 16:32
  - match: ["*.k_proj", "*.v_proj"]
    skip: true
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsenor_cli.errors import UsageError
from tsenor_cli.specs import METHODS, Choice, NMPattern, Rule

MAX_BYTES = 1_000_000
_KINDS = ("transposable", "standard")
_DEFAULTS = {"nm", "kind", "method"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe comes to: ready for PruneSpec."""

    rules: tuple[Rule, ...]
    default: Choice | None


class _BadRecipe(UsageError):
    """It is not a recipe."""

    code = "bad-recipe"


def load_recipe(path: Path, nm: str | None = None, kind: str | None = None, method: str | None = None) -> Recipe:
    """Read a recipe; `nm`, `kind` and `method` that are given take the place of what it says, in every rule.

    Raises:
        UsageError: it is not a recipe; the message names the rule and the field.
    """
    content = _read(path)
    _check_fields(content, _DEFAULTS | {"rules"}, str(path))
    rules = content.get("rules", [])
    if not isinstance(rules, list):
        raise _BadRecipe(f"{path}: rules is not a list", "begin each rule with a dash")
    given = {key: value for key, value in {"nm": nm, "kind": kind, "method": method}.items() if value is not None}
    defaults = {key: value for key, value in content.items() if key in _DEFAULTS}
    found = tuple(_rule(rule, f"{path}, rule {i}", defaults, given) for i, rule in enumerate(rules, 1))
    has_default = "nm" in (defaults | given)
    return Recipe(found, _choice(defaults | given, str(path)) if has_default else None)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.BaseLoader):  # type: ignore[misc]  # it has no types
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            if len(found) < len(node.value):  # yaml would keep the last of several
                raise yaml.constructor.ConstructorError(None, None, "a key stands twice", node.start_mark)
            return found

    try:
        if path.stat().st_size > MAX_BYTES:
            raise _BadRecipe(f"{path} is larger than {MAX_BYTES:,} bytes", "no recipe needs that")
        # Every scalar stays text: YAML would read an unquoted 2:4 as the number 124, to the base of 60.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506  (builds text only)
    except OSError as error:
        raise _BadRecipe(f"{path}: {error.strerror}", "give --recipe a YAML file that can be read") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise _BadRecipe(f"{path} is not YAML ({reason})", "see the example in the documentation") from error
    if not isinstance(content, dict):
        raise _BadRecipe(f"{path} is not a recipe", "it has the fields nm, kind, method and rules")
    return content


def _rule(rule: Any, where: str, defaults: dict[str, Any], given: dict[str, str]) -> Rule:  # noqa: ANN401
    if not isinstance(rule, dict):
        raise _BadRecipe(f"{where} is not a mapping", "give it match, and nm, kind, method or skip")
    _check_fields(rule, _DEFAULTS | {"match", "skip"}, where)
    match = rule.get("match")
    patterns = [match] if isinstance(match, str) else match
    if not isinstance(patterns, list) or not patterns or not all(isinstance(item, str) and item for item in patterns):
        raise _BadRecipe(f"{where} has no match", "give a glob such as '*.mlp.*', or a list of them")
    skip = rule.get("skip", "false")
    if skip not in ("true", "false"):
        raise _BadRecipe(f"{where}: skip is {skip!r}", "give true or false")
    if skip == "true":
        if extra := sorted(set(rule) & _DEFAULTS):
            raise _BadRecipe(f"{where} is skipped, and has {extra[0]}", "leave one of them out")
        return Rule(tuple(patterns), None)
    return Rule(tuple(patterns), _choice(defaults | rule | given, where))


def _choice(fields: dict[str, Any], where: str) -> Choice:
    nm, kind, method = fields.get("nm"), fields.get("kind", "transposable"), fields.get("method", "magnitude")
    if not isinstance(nm, str):
        raise _BadRecipe(f"{where} has no nm", "give it one, or one for all at the top, or --nm")
    if kind not in _KINDS:
        raise _BadRecipe(f"{where}: kind is {kind!r}", f"give {' or '.join(_KINDS)}")
    if method not in METHODS:
        raise _BadRecipe(f"{where}: unknown method {method!r}", f"known: {', '.join(METHODS)}")
    try:
        return Choice(NMPattern.parse(nm, transposable=kind == "transposable"), method)
    except UsageError as error:
        raise _BadRecipe(f"{where}: {error.message}", error.remedy) from error


def _check_fields(fields: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(map(str, set(fields) - known)):
        raise _BadRecipe(f"{where}: unknown field {unknown[0]!r}", f"known: {', '.join(sorted(known))}")
