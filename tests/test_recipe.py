"""Recipes: what they come to, and what is wrong with those that are wrong."""

from __future__ import annotations

import pytest

from tsenor_cli.errors import UsageError
from tsenor_cli.recipe import load_recipe
from tsenor_cli.specs import Choice, NMPattern, PruneSpec, Rule

FULL = """\
nm: 2:4
kind: standard
method: wanda
rules:
  - match: "*.mlp.*"
    nm: 16:32
    kind: transposable
  - match: ["*.k_proj", "re:v_proj"]
    skip: true
  - match: '*.o_proj'
    method: magnitude
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def standard(n, m):
    return NMPattern(n, m, transposable=False)


def test_fields_of_a_rule_come_before_those_of_all(tmp_path):
    """An unquoted 2:4 is text here, and not the number 124 as YAML 1.1 has it."""
    recipe = load_recipe(write(tmp_path, FULL))
    assert recipe.default == Choice(standard(2, 4), "wanda")
    assert recipe.rules == (
        Rule(("*.mlp.*",), Choice(NMPattern(16, 32), "wanda")),
        Rule(("*.k_proj", "re:v_proj"), None),
        Rule(("*.o_proj",), Choice(standard(2, 4), "magnitude")),
    )


def test_what_is_given_overrides_every_rule(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL), nm="1:4", kind="transposable", method="alps")
    assert recipe.default == Choice(NMPattern(1, 4), "alps")
    assert {rule.choice for rule in recipe.rules} == {Choice(NMPattern(1, 4), "alps"), None}


def test_without_a_default_the_rest_is_left_alone(tmp_path):
    recipe = load_recipe(write(tmp_path, "rules:\n- {match: '*.mlp.*', nm: '2:4'}\n"))
    assert recipe.default is None
    assert recipe.rules == (Rule(("*.mlp.*",), Choice(NMPattern(2, 4), "magnitude")),)


def test_the_first_rule_that_fits_decides(tmp_path):
    recipe = load_recipe(write(tmp_path, FULL))
    spec = PruneSpec("m", tmp_path, recipe.default.pattern, recipe.default.method, recipe.rules)
    assert spec.choice("a.mlp.o_proj.weight") == Choice(NMPattern(16, 32), "wanda")
    assert spec.choice("a.attn.o_proj.weight") == Choice(standard(2, 4), "magnitude")
    assert spec.choice("a.attn.v_proj.weight") is None
    assert spec.choice("a.attn.q_proj.weight") == Choice(standard(2, 4), "wanda")
    assert spec.methods == {"wanda", "magnitude"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("nm: [", "is not YAML"),
        ("nm: &a [*a]\n", "is not YAML"),
        ("nm: 2:4\nnm: 1:4\n", "is not YAML .a key stands twice"),
        ("rules: [{match: a, nm: 2:4, match: b}]\n", "is not YAML .a key stands twice"),
        ("nm: 2:4\nmethods: wanda\n", "unknown field 'methods'"),
        ("nm: 5:4\n", "not possible"),
        ("nm: two\n", "not of the form"),
        ("nm: 2:4\nrules: [{match: a}, {match: b, nm: two}]\n", "rule 2: .*not of the form"),
        ("nm: 2:4\nkind: diagonal\n", "kind is 'diagonal'"),
        ("nm: 2:4\nmethod: obs\n", "unknown method 'obs'"),
        ("nm: 2:4\nrules: all\n", "rules is not a list"),
        ("nm: 2:4\nrules: [all]\n", "rule 1 is not a mapping"),
        ("nm: 2:4\nrules: [{skip: true}]\n", "rule 1 has no match"),
        ("nm: 2:4\nrules: [{match: []}]\n", "rule 1 has no match"),
        ("nm: 2:4\nrules: [{match: a, skip: maybe}]\n", "skip is 'maybe'"),
        ("nm: 2:4\nrules: [{match: a, skip: true, nm: '2:4'}]\n", "is skipped, and has nm"),
        ("rules: [{match: a}]\n", "rule 1 has no nm"),
        ("nm: 2:4\nrules: [{match: a, n_m: 2:4}]\n", "unknown field 'n_m'"),
        ("a" * 1_000_001, "larger than"),
        ("!!python/object/apply:os.system [exit]\n", "is not a recipe"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load_recipe(write(tmp_path, text))


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
