"""What the documents show is run, what they link to exists, and what the command line can do is in them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
import torch
from torch.sparse._semi_structured_conversions import _sparse_semi_structured_tile

from tsenor_cli import errors, solve_mask
from tsenor_cli.cli import cli

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))

import generate_docs  # noqa: E402 not a package

DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)")
NEEDS_CUDA = "# needs a CUDA card\n"


def commands(group=cli, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@cache
def anchors(page):
    """The #anchors of a page's headings, as code hosts make them."""
    found: list[str] = []
    for heading in HEADING.findall(FENCED.sub("", page.read_text())):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).strip().replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def run_examples(page, names):
    """Run the Python of a page from top to bottom; what needs a card is only compiled. Returns how many were run."""
    examples = PYTHON.findall((ROOT / page).read_text())
    code = [(compile(example, page, "exec"), example.startswith(NEEDS_CUDA)) for example in examples]
    runnable = [one for one, needs_cuda in code if not needs_cuda]
    for one in runnable:
        exec(one, names)
    return len(runnable)


def test_the_examples_of_solving_masks_run(capsys):
    assert run_examples("docs/solving-masks.md", {}) == 4
    assert "stopped at the largest number of iterations" in capsys.readouterr().out


def test_the_example_of_the_readme_runs():
    assert run_examples("README.md", {"weight": torch.randn(64, 64)}) == 1


def test_the_examples_of_integrations_run(tsenor, llama):
    assert tsenor("prune", llama, "--nm", "2:4", "--save-masks", "-o", "llama-2of4-transposable").code == 0
    names = {}
    assert run_examples("docs/integrations.md", names) == 3
    assert names["masks"].keys() == names["sparse"]
    assert len(names["sparse"]) == 14  # seven in each of two layers


def test_torch_leaves_a_transposable_matrix_as_it_is_if_it_looks_at_absolute_values():
    """The table in docs/integrations.md. Torch's reference of its kernel sorts by what it is given, and zeroes that."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    sparse = [
        torch.where(solve_mask(weight, "2:4", absolute=True, transposable=kind).mask, weight, 0)
        for kind in (True, False)
    ]
    rows = {"largest_abs_values_greedy": torch.abs, "the default": torch.clone}
    for name, order in rows.items():
        lost = [
            int((one != 0).sum() - (_sparse_semi_structured_tile(order(one)) != 0).logical_and(one != 0).sum())
            for one in sparse
        ]
        assert re.search(
            rf"^\| `?{name}`? \| {lost[0]} \| {lost[1]} \|$", (DOCS / "integrations.md").read_text(), re.MULTILINE
        )


def test_figures_that_pages_repeat_are_those_that_were_measured():
    measured = (DOCS / "measured.md").read_text().splitlines()
    pages = (DOCS / "choosing.md").read_text() + (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?:magnitude|wanda|sparsegpt|alps) \|.*\d.*$", pages, re.MULTILINE)
    assert len(rows) == 8
    assert [row for row in rows if row not in measured] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text())):
        path = (page.parent / target) if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=str)
def test_every_command_and_option_is_explained(path, command):
    readme = (ROOT / "README.md").read_text()
    assert f"tsenor {' '.join(path)}" in readme
    assert command.help
    if not isinstance(command, click.Group):
        assert "Example: tsenor " in command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name


@pytest.mark.parametrize(("path", "command"), list(commands()), ids=str)
def test_every_option_is_in_the_reference(path, command):
    page = (DOCS / "commands.md").read_text()
    section = page.partition(f"## `tsenor {' '.join(path)}`\n")[2].partition("\n## ")[0]
    for option in command.params:
        for name in [*option.opts, *option.secondary_opts] if isinstance(option, click.Option) else []:
            assert re.search(rf"^\| [^|]*`{name}[` ][^|]* \| .*\w.* \|$", section, re.MULTILINE), name


def test_every_exit_code_is_in_the_reference():
    table = (DOCS / "commands.md").read_text().partition("## Exit codes\n")[2]
    documented = {int(code) for code in re.findall(r"^\| `(\d+)` \|.*\| .+ \|$", table, re.MULTILINE)}
    kinds = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert documented == kinds | {0, 130, 143}


def test_what_is_generated_is_up_to_date():
    command = [sys.executable, ROOT / "scripts/generate_docs.py", "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command", [click.Command("mute"), click.Command("half", help="A.", params=[click.Option(["--b"])])]
)
def test_what_has_no_help_is_not_documented_in_silence(command):
    with pytest.raises(ValueError, match="has no help"):
        generate_docs.commands_page(command)


class _Resources(HTMLParser):
    """What a browser fetches for a page without being asked."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        names = {"src", "srcset", "data", "poster"} | ({"href"} if tag == "link" else set())
        self.found += [value for name, value in attrs if name in names and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, made the way scripts/docs makes it."""
    place = tmp_path_factory.mktemp("docs")
    options = ["--quiet", "--fail-on-warning", "--doctree-dir", place / "doctrees", "--conf-dir", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ".", place / "site"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return place / "site"


def test_the_site_has_every_page(site):
    pages = [*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    assert [page for page in pages if not (site / page.relative_to(ROOT)).with_suffix(".html").exists()] == []
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_the_site_asks_no_other_server_for_anything(site):
    resources = {page: _Resources(page).found for page in site.rglob("*.html")}
    assert len(resources) > len(list(DOCS.rglob("*.md")))
    assert {page for page, found in resources.items() if not any("furo.css" in one for one in found)} <= {
        site / "index.html"
    }
    elsewhere = re.compile(r"(https?:)?//")
    assert [(page, one) for page, found in resources.items() for one in found if elsewhere.match(one)] == []
    imports = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
    assert [sheet for sheet in site.rglob("*.css") if imports.search(sheet.read_text())] == []
