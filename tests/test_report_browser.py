"""The report in a real browser: no width it does not fit, no scheme in which it cannot be read."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from octofold.data.manifest import Manifest
from octofold.metrics import METRICS
from octofold.predictions import Predictions
from octofold.reports import advice, chronicle, page, report
from octofold.reports.scores import Score

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves sockets to the collector
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
CLASSES = tuple(f"a_class_with_a_rather_long_name_{number:02d}" for number in range(15))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for the module."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tempfile.mkdtemp()
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with long names everywhere."""
    folder = tmp_path_factory.mktemp("report")
    rng, begun = np.random.default_rng(0), datetime(2026, 1, 1, tzinfo=UTC)
    target = rng.integers(0, 15, 300)
    table = pd.DataFrame(
        {"sample_id": [f"s{row}" for row in range(300)], "path": "x", "fold": np.arange(300) % 5}
    ).assign(label=np.array(CLASSES)[target], group="")
    manifest = Manifest(table, "classify", CLASSES, "c" * 60, folder, file=folder / "manifest.csv")
    members = []
    for number in range(8):
        values = 0.5 * np.eye(15)[target] + 0.5 * rng.dirichlet(np.ones(15) / 4, 300)
        name = f"member_with_a_name_of_exactly_sixty_letters_{number}".ljust(60, "x")
        oof = Predictions(manifest.sample_ids, values, CLASSES, manifest.hash, name, "s", "none", manifest.fold)
        members.append(chronicle.Member(name, [], "production", oof, "", begun + timedelta(hours=number)))
    names = [member.name for member in members]
    mean = np.mean([member.oof.values for member in members if member.oof is not None], axis=0)
    numbers = {"oof/accuracy": 0.9, "oof/accuracy_low": 0.8, "oof/accuracy_high": 0.95, "estimate/accuracy": 0.8}
    numbers |= {"estimate/low": 0.7, "estimate/high": 0.88}
    blended = chronicle.Blended("r", begun + timedelta(days=1), "equal", "geo8", manifest.hash, numbers, {}, {})
    boards = [Score(f"a_submission_with_a_long_name_{k}.csv", 0.9 + k / 99, 0.88 - k / 99) for k in range(4)]
    facts = page.Facts(
        "c" * 60, manifest, "accuracy", METRICS["accuracy"], members, [blended], [], [], boards, blended, mean,
        dict.fromkeys(names, 0.125), "The folds flatter: cross-validation says 0.900, but expect 0.800.\n" * 3,
        {member.name: member.oof.values for member in members if member.oof is not None},
    )  # fmt: skip
    shown = page.analyse(facts)
    file = folder / "report.html"
    file.write_text(report.render(shown | {"advice": advice.next_steps(shown, facts)}), encoding="utf-8")
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 768, 1366, 2560])
def test_it_fits_and_can_be_read(width: int, scheme: str, chromium: Any, crowded: Path) -> None:
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    chromium.get(crowded.as_uri())
    wide = chromium.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width
    torn = chromium.execute_script(
        """return [...document.querySelectorAll('section, .row, .name, .number, h1, li')].filter(box =>
           box.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(box => box.outerHTML)"""
    )
    assert torn == []
    for ink in ("--ink", "--quiet", "--one", "--two", "--three"):
        assert contrast(chromium, ink, "--card") >= 4.5, ink
    assert contrast(chromium, "--warn", "--warn-paper") >= 4.5
    assert chromium.get_log("browser") == []


def contrast(browser: Any, ink: str, paper: str) -> float:
    """WCAG 2 contrast ratio of two colours of the page, 1..21."""

    def luminance(name: str) -> float:
        text = browser.execute_script(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", name
        )
        channels = [int(pair, 16) / 255 for pair in re.findall("[0-9a-f]{2}", text.strip())]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)
