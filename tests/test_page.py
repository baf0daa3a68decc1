"""report.html: what it says, and that it fits a phone and a desk: by its structure, and (slow) in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import eval as eval_script
from data import load_dataset
from evaluation.report import page_title

VOID = {"meta", "img", "br"}
NAME = "a-folder-with-a-long-name-" + "x" * 120


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page of an evaluation with all that it can have: warnings, a baseline, curves, examples, long names."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("nets.py").write_text(
            "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        )
        x, y = load_dataset("digits", "").train.pixels()
        means = torch.stack([x[y == k].flatten(1).mean(0) for k in range(10)])  # the nearest one's class
        for name, scale in ((NAME, 1.0), ("other", 0.9)):
            Path(name).mkdir()
            state = {"1.weight": means, "1.bias": -scale * means.square().sum(1) / 2}
            torch.save({"state_dict": state}, f"{name}/ep_3.pth")
        flags = ["--dataset=digits", "--n_ex=40", "--n_iter=4", "--attacks=fast", "--l_eps=8/255 0.5 2", "--device=cpu"]
        other = eval_script.main(["--model_name=nets.py:make@other/ep_3.pth", *flags])
        flags += ["--curve=Linf:0.01,0.02,0.3 L1:1,2.5", f"--baseline={other}/eval.json"]
        yield eval_script.main([f"--model_name=nets.py:make@{NAME}/ep_3.pth", *flags]).resolve() / "report.html"


class Structure(HTMLParser):
    """The elements of a page with their ancestors, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs), [str(each.get("class")) for _, each in self.open]))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for tag, _ in self.open:
            self.texts[tag][-1] += data


def test_its_structure_fits_any_width(page: Path) -> None:
    text = page.read_text()
    structure = Structure(text)
    assert structure.open == []
    metas = [attributes for tag, attributes, _ in structure.found if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    inside = {tag: [ancestors for each, _, ancestors in structure.found if each == tag] for tag in ("table", "img")}
    assert len(inside["table"]) == 4
    assert all("table" in ancestors for ancestors in inside["table"])
    assert len(inside["img"]) == 1 + 2 + 1  # classes, curves of two norms, examples
    [style] = structure.texts["style"]
    for rule in (".table { overflow-x: auto; }", "img { max-width: 100%; height: auto; }", "overflow-wrap: anywhere"):
        assert rule in style


def test_it_names_network_radii_and_baseline(page: Path) -> None:
    structure, content = Structure(page.read_text()), json.loads((page.parent / "eval.json").read_text())
    assert structure.texts["title"] == structure.texts["h1"] == ["nets.py:make (ep_3.pth) on digits: robust accuracy"]
    assert structure.texts["th"][:5] == ["", "radius", "accuracy", "95 % interval", "difference to baseline"]
    cells = [" ".join(cell.split()) for cell in structure.texts["td"]]
    rows = [cells[start : start + 6] for start in range(0, 36, 6)]  # six rows, six columns
    assert [row[1] for row in rows] == ["", "8/255", "0.5", "2", "", ""]
    differences = content["difference_to_baseline"]
    for row, name in zip(rows, ("clean", "Linf", "L2", "L1", "average", "union"), strict=True):
        assert row[:1] + row[2:3] == [name, f"{content['accuracy'][name]['accuracy']:.2f} %"]
        change = differences.get(name, {})  # the average is no outcome of an image
        said = change and f"{change['difference']:+.2f} ({change['low']:+.1f} to {change['high']:+.1f})"
        assert row[4] == (said or "") + " of upper bounds" * (name in ("Linf", "L2", "L1", "union"))
        assert row[5] == ("" if name == "clean" else "upper bound")
    assert content["baseline"]["model_name"] == "nets.py:make@other/ep_3.pth"
    assert "Baseline: nets.py:make@other/ep_3.pth, fast attacks" in " ".join(" ".join(structure.texts["p"]).split())
    assert f"nets.py:make@{NAME}/ep_3.pth" in structure.texts["code"]


@pytest.mark.parametrize(
    ("name", "spec", "title"),
    [
        ("runs/RUN/ep_80.pth", {"arch": "wide-resnet-28-10"}, "wide-resnet-28-10 (ep_80.pth)"),
        ("RB_Wong2020Fast", {"arch": "robustbench", "model_id": "Wong2020Fast"}, "RB_Wong2020Fast"),
        ("a/b/nets.py:make", {"arch": "function", "function": "a/b/nets.py:make"}, "nets.py:make"),
        ("a/nets.py:make@runs/RUN/ep_3.pth", {"arch": "function", "function": "a/nets.py:make"}, "nets.py:make (ep_3.pth)"),
        ("https://host/a/net.pth#sha256=" + "0" * 64, {"arch": "preact-resnet18"}, "preact-resnet18 (net.pth)"),
        ("pretr_Linf.pth", {}, "pretr_Linf.pth"),
    ],
)  # fmt: skip
def test_the_title_is_short(name: str, spec: dict[str, Any], title: str) -> None:
    content = {"settings": {"model_name": name, "dataset": "cifar10"}, "network": spec}
    assert page_title(content) == f"{title} on cifar10: robust accuracy"


SMALL = """() => {
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const size = parseFloat(getComputedStyle(walk.currentNode.parentElement).fontSize);
    if (walk.currentNode.data.trim() && size < 10) found.push([size, walk.currentNode.data]);
  }
  return found;
}"""
WIDER = """() => [...document.querySelectorAll("body *")].filter(e => !e.closest(".table table")
  && e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_cut_off_or_tiny(width: int, page: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:  # playwright's own browser where the system has none
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser starts: {str(error).splitlines()[0]}")
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.goto(page.as_uri())
        for details in shown.locator("summary").all():
            details.click()
        shown.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        assert shown.evaluate("innerWidth") == width
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        assert shown.evaluate(WIDER) == []
        assert shown.evaluate(SMALL) == []
        for image in shown.locator("img").all():
            box = image.bounding_box()
            natural = image.evaluate("e => e.naturalHeight / e.naturalWidth")
            assert box["height"] / box["width"] == pytest.approx(natural, rel=0.02)  # it scales, and is not stretched
        browser.close()
