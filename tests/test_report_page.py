"""The page of an evaluation: what it names, and how it looks on a telephone."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from shutil import which

import pytest

import eval as eval_script
import train
from evaluation.report import short_name

BROWSER = next(filter(None, map(which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything that a page can have."""
    place = tmp_path_factory.mktemp("page")
    run = train.main(["--dataset=digits", "--width=4", "--epochs=2", "--device=cpu", f"--save_dir={place}"])
    flags = [f"--model_name={run}/ep_2.pth", "--n_ex=30", "--attacks=fast", "--n_iter=8", "--device=cpu"]
    before = eval_script.main([*flags, f"--save_dir={place}/before"])
    return eval_script.main([*flags, f"--baseline={before}/eval.json", "--curve", f"--save_dir={place}/after"])


class Outline(HTMLParser):
    """Texts by tag, and the tags around every table and picture."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.around: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("table", "img"):
            self.around.append(self.open[-1])
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1][0], []).append(data.strip())


def test_what_it_says(page: Path) -> None:
    outline = Outline()
    outline.feed((page / "report.html").read_text())
    assert outline.open == []
    assert outline.texts["title"] == outline.texts["h1"] == ["Robust accuracy on digits: ep_2"]
    network = json.loads((page / "eval.json").read_text())["settings"]["model_name"]
    assert outline.texts["code"][:2] == [network, network]  # its own, and the baseline's
    for radius in ("0.1", "0.4", "2"):
        assert radius in outline.texts["td"]
    assert set(outline.around) == {("div", "wide")}
    assert len(outline.around) == 4 + 3


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("runs/RUN/ep_80.pth", "ep_80"),
        ("hf:USER/REPO/model.safetensors", "model.safetensors"),
        ("https://host/net.pth#sha256=00", "net"),
        ("nets.py:make@runs/a/ep_3.pth", "ep_3"),
        ("RB_Wong2020Fast", "RB_Wong2020Fast"),
        ("timm:resnet18", "timm:resnet18"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


LOOK = """() => {
  const texts = [...document.querySelectorAll('p, td, th, h1, h2, summary, code')];
  return {
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    smallest: Math.min(...texts.map(each => parseFloat(getComputedStyle(each).fontSize))),
    pictures: [...document.images].map(each => each.getBoundingClientRect().width / each.naturalWidth),
  };
}"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width: int, page: Path) -> None:
    """The page itself does not scroll sideways, and no text is too small, those of the pictures (15 pixels and more) among them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": 844})
        tab.goto((page / "report.html").as_uri())
        seen = tab.evaluate(LOOK)
        tab.screenshot(path=page / f"page_{width}.png", full_page=True)
        browser.close()
    assert seen["overflow"] <= 0
    assert seen["smallest"] >= 12
    assert len(seen["pictures"]) == 3
    assert min(seen["pictures"]) > 0.7
