"""The tutorial as a program, a notebook and a page (docs/development.md has the command that creates the page)."""

import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra `docs`")
ROOT = Path(__file__).parents[2]
PROGRAM, PAGE = ROOT / "examples" / "tutorial.py", ROOT / "docs" / "tutorial.md"


def accuracies(text):
    """Return the percentages that a run prints, and the numbers of steps before and after resuming."""
    return [float(number) for number in re.findall(r"([\d.]+)%$", text, flags=re.MULTILINE)], re.findall(
        r"steps: (\d+) and then up to (\d+)", text
    )


def check(text):
    (plain, fgr, ahead, *by_rho, resumed), steps = accuracies(text)
    assert fgr > plain + 3
    assert ahead > plain + 3
    assert resumed > plain + 3
    assert len(by_rho) == 4
    assert max(by_rho) == by_rho[2]  # the text continues with rho = 2.0
    assert by_rho[3] < 50  # the next one is too large
    assert steps == [("240", "480")]


def test_page_contains_the_cells_of_the_program():
    page = PAGE.read_text(encoding="utf-8")
    cells = [cell.source for cell in jupytext.read(PROGRAM).cells if cell.source]
    positions = [page.find(cell) for cell in cells]
    assert len(cells) > 12
    assert -1 not in positions
    assert "site-packages" not in page  # no warnings with local paths
    assert positions == sorted(positions)


def test_output_on_the_page_agrees_with_the_text():
    check(PAGE.read_text(encoding="utf-8"))


@pytest.mark.launch
def test_notebook_runs(tmp_path):
    """The notebook runs in a kernel, cell by cell."""
    execute = pytest.importorskip("nbconvert.preprocessors").ExecutePreprocessor
    pytest.importorskip("ipykernel")
    notebook = jupytext.read(PROGRAM)
    execute(timeout=250, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    check("".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"))
    assert any("image/png" in output.get("data", {}) for output in outputs)
