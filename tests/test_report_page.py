"""The page of a run: its sentence, its sections, its figures, and what it must not load."""

from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sample_reports
from sample_reports import write_checkpoint

from autoround_modifier.cli.main import main
from autoround_modifier.readable import bytes_text, duration_text, figures_text, unbroken
from autoround_modifier.report.layer_table import expert_tokens, grid_of, scheme_grid
from autoround_modifier.report.page import render_page
from autoround_modifier.report.plots import shade_edges
from autoround_modifier.report.rounding_method import rounding_method
from autoround_modifier.report.schema import Generation, QuantizationReport, TokenDivergence
from autoround_modifier.report.summary import summary
from autoround_modifier.report.words import model_name, scheme_text
from autoround_modifier.scheme_catalogue import written_scheme
from autoround_modifier.scheme_names import SCHEMES

EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects elements, ids and texts; fails where tags are not nested."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def tags(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str | None]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    dense = sample_reports.report(
        layers=sample_reports.layers(blocks=4), blocks=sample_reports.block_records(4)
    )
    return {
        "dense": render_page(dense, sample_reports.evaluation()),
        "auto_scheme": render_page(sample_reports.auto_scheme_report(blocks=4), None),
        "mixture": render_page(sample_reports.mixture_report(blocks=4), None),
        "least": render_page(
            sample_reports.report(
                layers=[], blocks=[], phases=[], size=None, data=None, command=None, unquantized=[]
            ),
            None,
        ),
    }


def sections(page: str) -> list[str | None]:
    return [section["id"] for section in Page(page).tags("section")]


def test_a_section_is_there_if_it_has_data(pages: dict[str, str]) -> None:
    assert sections(pages["dense"]) == [
        "loss",
        "tasks",
        "bits",
        "error",
        "generations",
        "tokens",
        "cost",
        "again",
    ]
    assert sections(pages["auto_scheme"]) == ["loss", "schemes", "bits", "error", "cost", "again"]
    assert sections(pages["mixture"]) == ["loss", "bits", "error", "experts", "cost", "again"]
    assert sections(pages["least"]) == ["again"]
    assert not Page(pages["least"]).tags("svg")


@pytest.mark.parametrize("kind", ["dense", "auto_scheme", "mixture", "least"])
def test_the_page_is_sound_html_and_loads_nothing(pages: dict[str, str], kind: str) -> None:
    page = Page(pages[kind])
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "img", "image")
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        target = attributes.get("href") or ""
        assert target == "data:," or target.removeprefix("#") in page.ids or not target
    for name in re.findall(r"url\(([^)]*)\)", pages[kind]):
        assert name.removeprefix("#") in page.ids
    assert "@import" not in pages[kind]
    # of namespaces, which are names
    assert set(re.findall(r"https?://[^\"' <]*", pages[kind])) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("kind", ["dense", "auto_scheme", "mixture"])
def test_figures_say_what_they_show_and_take_font_and_colours_of_the_page(
    pages: dict[str, str], kind: str
) -> None:
    page = Page(pages[kind])
    figures = page.tags("svg")
    assert len(figures) == len(page.tags("figure")) >= 6
    assert pages[kind].count("<style") == 1
    for figure in figures:
        assert figure["role"] == "img"
        assert figure["aria-labelledby"] in page.ids
        assert "width" not in figure
    drawings = re.findall(r"<svg.*?</svg>", pages[kind], re.DOTALL)
    for drawing in drawings:
        assert re.search(r"<title id=[^>]*>[^<]{20,}</title>", drawing)
        assert "font-family" not in drawing
        assert "#abc0" not in drawing.lower()
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing)) <= {
            "none",
            *(f"var(--{x})" for x in ("ink", "muted", "line", "page", "first", "second")),
            *(f"var(--step{x})" for x in range(6)),
        }


def test_both_colour_schemes_define_the_same_variables(pages: dict[str, str]) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", pages["least"], re.DOTALL)
    names = r"--[a-z0-9]+"
    assert sorted(re.findall(names, light)) == sorted(re.findall(names, dark))
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", pages["dense"])) <= set(re.findall(names, light))


def test_losses_and_errors_that_are_not_known_are_left_out() -> None:
    unknown = {"error": None, "initial_error": None}
    made = [x.model_copy(update=unknown) for x in sample_reports.layers(blocks=2)]
    blocks = sample_reports.block_records(2)
    blocks[1] = blocks[1].model_copy(update={"initial_loss": None, "best_loss": None})
    page = render_page(sample_reports.report(layers=made, blocks=blocks, phases=[]), None)
    assert "nan" not in page.lower()
    assert "Error of the output of each layer." not in page


def test_a_cell_of_a_heat_map_names_its_layer(pages: dict[str, str]) -> None:
    assert re.search(r"<title>block 3, down_proj: 0\.\d+</title>", pages["dense"])
    assert "<title>block 0, q_proj: W8A16 G64</title>" in pages["auto_scheme"]


def test_text_of_models_is_escaped() -> None:
    evil = "</p><script>alert(1)</script>\"'&"
    page = render_page(
        sample_reports.report(
            layers=[], blocks=[], phases=[], device=evil, recipe_name=evil, command=[evil]
        ),
        sample_reports.evaluation(
            generations=[Generation(prompt=evil, original=evil, quantized=evil)],
            tokens=[TokenDivergence(text=evil, kl=1.0, same_top1=False)],
            tasks=[],
        ),
    )
    parsed = Page(page)
    assert not parsed.tags("script")
    assert "".join(parsed.texts).count(evil) >= 6


def test_an_empty_generation_is_named() -> None:
    page = render_page(
        sample_reports.report(layers=[], blocks=[], phases=[], size=None),
        sample_reports.evaluation(
            generations=[Generation(prompt="Why?", original="Because.", quantized=" \n")], tokens=[]
        ),
    )
    assert "nothing" in Page(page).texts


def test_names_in_figures_are_escaped_and_are_no_formulas() -> None:
    made = [x.model_copy(update={"kind": "<b>$x_1$"}) for x in sample_reports.layers(blocks=2)]
    page = render_page(sample_reports.report(layers=made, blocks=[], phases=[]), None)
    assert not Page(page).tags("b")
    assert "<b>$x_1$" in Page(page).texts


def test_tokens_are_told_apart_by_colour_title_and_line(pages: dict[str, str]) -> None:
    tokens = [x for x in Page(pages["dense"]).tags("span") if "title" in x]
    expected = sample_reports.token_divergences()
    assert len(tokens) == len(expected)
    for token, made in zip(tokens, expected, strict=True):
        assert ("other" in str(token["class"]).split()) == (not made.same_top1)
        assert figures_text(made.kl) in str(token["title"])
    assert {str(x["class"]).split()[0] for x in tokens} == {f"t{i}" for i in range(6)}


def test_the_sentence() -> None:
    report, evaluation = sample_reports.report(), sample_reports.evaluation()
    assert summary(report, evaluation) == (
        "SmolLM2-135M was quantized to 2.25 bits per weight (W2A16 symmetric, groups of 64) by "
        "SignRound in 200 iterations per block on 128 samples of 2048 tokens; the checkpoint has "
        "86.6 MB instead of 269 MB (KL divergence 1.148, same top token 44.8 %)."
    )
    assert summary(sample_reports.auto_scheme_report(), None) == (
        "SmolLM2-135M was quantized to 3.04 bits per weight (W2A16, W4A16 and W8A16 symmetric, "
        "groups of 64) by SignRound in 50 iterations per block on 128 samples of 2048 tokens, with "
        "schemes chosen by AutoScheme, and its scales were then trained end to end; the checkpoint "
        "has 97.1 MB instead of 269 MB."
    )


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ("{preset: rtn}", "rounding to nearest"),
        ("{preset: opt_rtn}", "rounding to nearest with searched scales"),
        ("{preset: rtn, iters: 12}", "SignRound in 12 iterations per block"),
        ("{}", "SignRound in 200 iterations per block"),
    ],
)
def test_the_method_is_that_of_the_recipe(fields: str, method: str) -> None:
    recipe = f"a_stage:\n  b_modifiers:\n    AutoRoundModifier: {fields}\n"
    assert rounding_method(recipe).text == method


def test_the_method_of_other_modifiers_is_their_names() -> None:
    recipe = "a_stage:\n  b_modifiers:\n    AWQModifier: {}\n    GPTQModifier: {}\n"
    assert rounding_method(recipe).text == "AWQModifier and GPTQModifier"


def test_words() -> None:
    assert [bytes_text(x) for x in (12, 999_499, 999_500, 86_620_000)] == [
        "12 bytes",
        "999 kB",
        "1.00 MB",
        "86.6 MB",
    ]
    assert [duration_text(x) for x in (0.42, 45.2, 212, 1290, 12_010)] == [
        "0.4 s",
        "45 s",
        "3 min 32 s",
        "22 min",
        "3 h 20 min",
    ]
    assert [figures_text(x) for x in (0.0, 0.05, 2.4e-5, 1234.5, 3.2e7)] == [
        "0.00",
        "0.0500",
        "2.40e-5",
        "1234",
        "3.20e7",
    ]
    assert scheme_text("W4A16 asym G128") == "W4A16 asymmetric, groups of 128"
    assert scheme_text("W8A8 channel static") == (
        "W8A8 symmetric, one scale for each channel, static activations"
    )
    assert scheme_text("FP8 block 128x128") == "FP8, blocks of 128 x 128"
    assert scheme_text("NVFP4A16") == "NVFP4A16"
    assert scheme_text("one of its own") == "one of its own"
    assert model_name("/home/me/cache/models--a--b-c/snapshots/0123") == "b-c"
    assert model_name("owner/name") == model_name("/folder/name/") == "name"
    assert unbroken("87 MB, 68 % less") == "87\u00a0MB, 68\u00a0% less"


@pytest.mark.parametrize("name", SCHEMES)
def test_the_labels_of_all_schemes_are_put_into_words(name: str) -> None:
    label = written_scheme(SCHEMES[name]).label
    name, _, details = label.partition(" ")
    assert scheme_text(label) == name if not details else ", " in scheme_text(label)


def test_layers_are_summed_up_by_kind_and_block() -> None:
    made = sample_reports.mixture_report().layers
    grid = grid_of(made, lambda x: x.weights)
    assert grid.kinds == ["q_proj", "k_proj", "v_proj", "o_proj", *EXPERTS]
    assert grid.blocks == list(range(16))
    assert grid.values[6] == [1024 * 512] * 16
    tokens = expert_tokens(made)
    assert [x.block for x in tokens] == list(range(16))
    assert {x.experts for x in tokens} == {32}
    assert sum(x.without for x in tokens) == sum(
        x.tokens == 0 and x.name.endswith("up_proj") for x in made
    )
    mixed = sample_reports.auto_scheme_report().layers
    assert scheme_grid(mixed).values[0] == [2, *[0] * 28, 1]


def test_shades_span_the_values() -> None:
    assert shade_edges([3.0, 3.0]) == [3.0, 3.0]
    assert shade_edges([1.0, 7.0]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    edges = shade_edges([1.0, 1e6])
    assert edges[0] == 1.0
    assert edges[-1] == 1e6
    assert edges[1:-1] == pytest.approx([10.0, 100.0, 1e3, 1e4, 1e5])


def small() -> QuantizationReport:
    """Without figures."""
    return sample_reports.report(layers=[], blocks=[], phases=[], size=None)


def test_the_command_writes_the_page_beside_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "model", small())
    path = folder / "quantization_report.html"
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert "SmolLM2-135M was quantized" in path.read_text()
    assert main(["report", str(folder)]) == 0  # its own page may be written again
    other = tmp_path / "other" / "page.html"
    assert main(["report", str(folder), "--output", str(other)]) == 0
    assert other.read_text() == path.read_text()


def test_a_file_of_somebody_else_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path, small())
    page = folder / "quantization_report.html"
    page.write_text("mine")
    assert main(["report", str(folder)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main(["report", str(folder), "--overwrite"]) == 0
    assert page.read_text() != "mine"


def test_a_folder_without_a_report_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "quantization_report.json is not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **others: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **others)

    folder = write_checkpoint(tmp_path, small())
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", str(folder)]) == 1
    assert "pip install 'autoround-modifier[plot]'" in capsys.readouterr().err


def test_open_shows_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("typer.launch", shown.append)
    folder = write_checkpoint(tmp_path, small())
    assert main(["report", str(folder), "--open"]) == 0
    assert shown == [(folder / "quantization_report.html").as_uri()]
