"""The cards of model_cards/ and the figures of README and paper index are what benchmarks/report.py writes now."""

import importlib.util

import pytest

from hf_maskformer.hub.preset_card import NOT_MEASURED, NOTES, preset_card
from hf_maskformer.presets import list_presets, preset
from hub.card_rules import card_problems


@pytest.fixture(scope="module")
def report(request):
    folder = request.config.rootpath / "benchmarks"
    spec = importlib.util.spec_from_file_location("report", folder / "report.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list_presets())
def test_the_card_is_the_generated_one(report, project_root, name):
    card = report.card(name)
    again = "write it again with `python benchmarks/report.py`"
    assert (project_root / "model_cards" / f"{name}.md").read_text() == card, again
    assert card_problems(card) == []
    assert (NOT_MEASURED in card) == all(of != name for of, _ in report.training_figures())


def test_the_pages_show_the_results(report, project_root):
    for page, text in report.pages().items():
        assert (project_root / page).read_text() == text, f"write {page} again with `python benchmarks/report.py`"


def test_figures_come_from_the_results(report, monkeypatch):
    read = report.read
    monkeypatch.setattr(report, "read", lambda name: {**read(name), "pq": 0.125} if "quick" in name else read(name))
    assert " | 0.125 | " in report.card("maskformer-light-anchored")


def test_every_note_has_its_preset():
    assert set(NOTES) <= set(list_presets())


def test_a_preset_without_a_note_is_described_by_its_configuration():
    card = str(preset_card("new", preset("maskformer-light"), summary="a new one", paper="A paper", figures=["| 1 |"]))
    assert "# new\n" in card
    assert "## Source\n\nA paper. See docs/paper_index.md.\n" in card
    assert "## Intended use\n\nA new one.\n" in card
    assert "\n| 1 |\n" in card
    assert NOT_MEASURED not in card
