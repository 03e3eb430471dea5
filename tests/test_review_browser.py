"""The review page in a real browser: keys, mouse, touch, hostile names, two tabs, speed."""

import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labelled
from labelled import CLASSES, make_embeddings, make_manifest, make_oof
from octofold.clean import cleaning
from octofold.clean.desk import Desk
from octofold.clean.review import Server
from octofold.data import journal
from octofold.data.journal import Entry, Journal
from octofold.data.manifest import Manifest

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium leaves sockets to the collector
]
WRONG = {4: 2, 9: 1, 20: 0}
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1366,800"
)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for the module."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    profile = tempfile.mkdtemp()
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield browser
    browser.quit()
    shutil.rmtree(profile, ignore_errors=True)


class Page:
    """The page of one manifest, its server running in this process."""

    def __init__(self, browser: Any, folder: Path, more_classes: tuple[str, ...] = ()) -> None:
        self.manifest, self.truth = make_manifest(folder, WRONG)
        oof, vectors = [make_oof(self.manifest, self.truth)], make_embeddings(self.manifest, self.truth)
        self.manifest = dataclasses.replace(self.manifest, classes=(*self.manifest.classes, *more_classes))
        self.queue = cleaning.rank(self.manifest, oof, vectors)
        self.journal = Journal(folder / "decisions.jsonl")
        self.desk = Desk(self.queue, self.manifest, self.journal, "anna")
        self.server = Server(self.desk)
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()
        self.browser = browser
        self.open()

    def open(self) -> None:
        self.browser.get(self.server.url)
        self.wait("return Boolean(window.octofold && octofold.current)")

    def wait(self, script: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 120, 0.02).until(lambda browser: browser.execute_script(script))

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.browser).send_keys(key).perform()

    def click(self, css: str) -> None:
        self.browser.find_element("css selector", css).click()

    def choose(self, which: str, wait: bool = True) -> None:
        """Pick a filter; with `wait`, go on when its queue has come."""
        self.click(f"#filter option[value='{which}']")
        if wait:
            self.settle()

    def text(self, css: str) -> str:
        return str(self.browser.find_element("css selector", css).text)

    @property
    def current(self) -> str:
        return str(self.wait("return octofold.current?.id"))

    def settle(self) -> list[Entry]:
        """Wait until all is written and pictures stand; return the journal, read from the disk."""
        self.wait("return octofold.idle && [...document.images].every(image => image.complete)")
        return journal.read(self.journal.path).entries if self.journal.path.exists() else []

    def errors(self) -> list[str]:
        return [line["message"] for line in self.browser.get_log("browser") if line["level"] == "SEVERE"]


@contextmanager
def _opened(browser: Any, folder: Path, more_classes: tuple[str, ...] = ()) -> Iterator[Page]:
    opened = Page(browser, folder, more_classes)
    yield opened
    browser.get("about:blank")
    opened.server.stop()
    opened.thread.join(60)


@pytest.fixture
def page(chromium: Any, tmp_path: Path) -> Iterator[Page]:
    with _opened(chromium, tmp_path) as opened:
        yield opened


def did(entries: list[Entry]) -> list[tuple[str, str]]:
    return [(entry.sample_id, entry.action) for entry in entries]


def test_keys(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    ids = [item.sample_id for item in page.queue.items]
    guess = page.queue.items[0].guesses[0][0]
    assert page.current == ids[0], "the most suspicious one first"
    assert page.text("#label") == page.queue.items[0].label
    page.choose("")  # not the flagged ones alone
    page.keys("1", Keys.SPACE, "d", "s")
    entries = page.settle()
    assert did(entries) == [(ids[0], "relabel"), (ids[1], "keep"), (ids[2], "drop"), (ids[3], "skip")]
    assert entries[0].target == guess
    page.keys("z", "z")
    entries = page.settle()
    assert did(entries)[4:] == [(ids[3], "undo"), (ids[2], "undo")]
    assert page.current == ids[2], "undo goes back to the image"
    page.keys("r")
    page.keys("лим", Keys.ENTER)
    entries = page.settle()
    assert (entries[-1].sample_id, entries[-1].target) in {(ids[2], CLASSES[2]), (ids[2], "")}, "by typing"
    assert page.errors() == []


def test_undo_goes_on_after_a_reload(page: Page) -> None:
    first = page.current
    page.keys("d")
    page.settle()
    page.open()
    assert page.current != first, "a decided image is not asked again"
    page.keys("z")
    assert did(page.settle())[-1] == (first, "undo")
    assert page.current == first


def test_mouse(page: Page) -> None:
    first = page.current
    page.click("[data-do=keep]")
    assert did(page.settle()) == [(first, "keep")]
    second = page.current
    page.click(".guess:nth-child(2)")
    assert page.settle()[-1].sample_id == second
    page.click("#neighbours .neighbour")
    assert page.wait("return document.querySelector('#peek').open")
    page.keys("\ue00c")  # Escape
    page.click("#stage")
    assert "scale(2.5)" in page.wait("return document.querySelector('#frame img').style.transform"), "click zooms"
    assert len(page.settle()) == 2, "looking decides nothing"


def test_touch_on_a_phone(page: Page) -> None:
    browser = page.browser
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        page.open()
        page.settle()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        for button in browser.find_elements("css selector", "footer button"):
            assert button.size["height"] >= 44, "a thumb can hit it"
        ids = [page.current]
        for x, y in ((150, 0), (-150, 0), (0, 150)):
            _swipe(browser, 190, 250, x, y)
            ids.append(page.current)
        assert did(page.settle()) == [(ids[0], "keep"), (ids[1], "drop"), (ids[2], "skip")]
        _swipe(browser, 190, 250, 0, -150)
        assert page.wait("return document.querySelector('#chooser').open"), "up opens the classes"
        page.click("#classes li")
        assert page.settle()[-1].sample_id == ids[3]
        _swipe(browser, 190, 250, 20, 5)
        assert len(page.settle()) == 4, "a short slip decides nothing"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def _swipe(browser: Any, left: int, top: int, x: int, y: int) -> None:
    def touch(kind: str, points: list[dict[str, int]]) -> None:
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", [{"x": left, "y": top}])
    for step in (0.3, 0.7, 1):
        touch("touchMove", [{"x": round(left + x * step), "y": round(top + y * step)}])
    touch("touchEnd", [])


def test_several_at_once(page: Page) -> None:
    page.choose("")
    for _ in WRONG:
        page.keys("1")
    page.keys("g")
    tiles = page.wait("return document.querySelectorAll('.tile').length")
    assert tiles > 5
    page.click(".tile:nth-child(2)")
    before = len(page.settle())
    page.keys("k")
    entries = page.settle()[before:]
    assert len(entries) == tiles - 1, "the one taken out stays undecided"
    assert {entry.action for entry in entries} == {"keep"}
    page.wait("return document.querySelectorAll('.tile').length")
    page.keys("z")
    assert [entry.action for entry in page.settle()[before + tiles - 1 :]] == ["undo"] * (tiles - 1), "one undo, all"


def test_names_and_labels_are_text(page: Page) -> None:
    """A file is called `<img onerror…>`, a class `<b>kiwi</b>`."""
    hostile = page.manifest.table["path"][1]
    page.choose("")
    for _ in range(len(page.queue.items)):
        if page.current == page.manifest.sample_ids[1]:
            break
        page.keys("n")
    assert page.text("#name") == hostile
    assert page.text("#label") == CLASSES[1]
    page.settle()
    assert page.wait("return document.title") == "world · review", "the name ran no script"
    assert page.browser.find_elements("css selector", "aside b, aside img[src=x]") == []


def test_two_reviewers(page: Page) -> None:
    """Another reviewer is faster: the second act is refused, shown, and nothing is lost."""
    first = page.current
    other = Journal(page.journal.path)
    other.append([Entry(first, "drop", label=page.queue.items[0].label, reviewer="boris")])
    page.keys("k")
    page.wait("return octofold.idle && !document.querySelector('#toast').hidden")
    assert "boris was faster: dropped" in page.text("#toast")
    assert did(page.settle()) == [(first, "drop")]
    assert page.current == first
    assert "dropped by boris" in page.text("#stamp")
    page.keys("k")
    assert did(page.settle()) == [(first, "drop"), (first, "keep")], "now it was seen, now it counts"


def _slow_answers(page: Page, monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """From now on the desk does `name` only once the event returned is set."""
    done, late = getattr(page.desk, name), threading.Event()

    def slow(*arguments: Any) -> Any:
        late.wait(60)
        return done(*arguments)

    monkeypatch.setattr(page.desk, name, slow)
    return late


def _beaten(page: Page) -> str:
    """Another reviewer drops the image on the screen, and the page does not know yet."""
    item = next(item for item in page.queue.items if item.sample_id == page.current)
    Journal(page.journal.path).append([Entry(item.sample_id, "drop", label=item.label, reviewer="boris")])
    return item.sample_id


def test_a_class_goes_to_the_image_it_was_typed_for(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image before comes back, refused, while the classes are open: it waits until they are closed."""
    from selenium.webdriver.common.keys import Keys

    page.choose("")
    beaten, late = _beaten(page), _slow_answers(page, monkeypatch, "act")
    page.keys("k")
    typed_for = page.current
    assert typed_for != beaten
    target = next(name for name in CLASSES[1:] if name != page.desk.label[typed_for])
    page.keys("r")
    late.set()
    page.wait("return octofold.idle && !document.querySelector('#toast').hidden")
    assert page.wait("return document.querySelector('#chooser').open")
    assert page.current == typed_for
    page.keys(target[:3], Keys.ENTER)
    entry = page.settle()[-1]
    assert (entry.sample_id, entry.action, entry.target) == (typed_for, "relabel", target)
    page.wait(f"return octofold.current?.id === '{beaten}'")


def test_a_refusal_outside_the_filter_ends_no_selection(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.choose("")
    beaten, late = _beaten(page), _slow_answers(page, monkeypatch, "act")
    page.keys("k")
    other = next(name for name in (CLASSES[0], CLASSES[2]) if name != page.desk.label[beaten])
    page.choose(f"label:{other}", wait=False)
    page.wait(f"return document.querySelector('#label').textContent === '{other}'")
    shown = page.current
    late.set()
    page.wait("return octofold.idle && !document.querySelector('#toast').hidden")
    assert "boris was faster" in page.text("#toast")
    assert page.current == shown
    assert page.wait("return document.querySelector('#end').hidden")


def test_a_second_key_does_not_answer_for_the_same_tiles(
    chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the next tiles are fetched, the last ones are still on the screen."""
    monkeypatch.setattr(labelled, "EACH", 50)
    with _opened(chromium, tmp_path) as page:
        page.choose("")
        page.keys("k", "k", "k", "g")
        page.wait("return document.querySelectorAll('.tile').length === 12")
        before, late = len(page.settle()), _slow_answers(page, monkeypatch, "describe")
        page.keys("k")
        assert not page.browser.execute_script("return octofold.idle"), "the next tiles are not here yet"
        page.click(".tile:nth-child(2)")
        page.keys("d", "1", "r")
        late.set()
        entries = page.settle()[before:]
        assert [entry.action for entry in entries] == ["keep"] * 12
        page.keys("d")
        dropped = page.settle()[before + 12 :]
        assert {entry.action for entry in dropped} == {"drop"}
        assert not {entry.sample_id for entry in dropped} & {entry.sample_id for entry in entries}


def test_only_guesses_on_the_screen_have_keys(chromium: Any, tmp_path: Path) -> None:
    with _opened(chromium, tmp_path, ("pear", "plum", "fig")) as page:
        page.choose("")
        shown = page.wait("return document.querySelectorAll('#guesses .guess').length")
        item = page.queue.items[0]
        assert shown < len(item.guesses) == 5
        page.keys("5", "9")
        assert page.settle() == []
        page.keys("g")
        page.wait("return document.querySelectorAll('.tile').length")
        page.keys("2")
        assert page.settle() == [], "no other guess than the first stands above the tiles"
        page.keys("1")
        assert {entry.target for entry in page.settle()} == {item.guesses[0][0]}


def test_a_skip_changes_nothing_that_was_decided(page: Page) -> None:
    page.choose("")
    first = page.current
    page.keys("d")
    page.settle()
    decided = "return document.querySelectorAll('#numbers b')[1].textContent"
    assert page.wait(decided) == "1"
    page.keys("p", "s", "p")
    assert did(page.settle())[-1] == (first, "skip")
    assert page.current == first
    assert "dropped by anna" in page.text("#stamp")
    assert page.wait(decided) == "1"
    page.open()
    page.settle()
    assert page.wait(decided) == "1", "the same after a reload"


def test_a_zoomed_image_comes_back_where_it_was(page: Page) -> None:
    from selenium.webdriver import ActionChains

    page.choose("")
    page.settle()
    stage, first = page.browser.find_element("css selector", "#stage"), page.current
    page.click("#stage")
    ActionChains(page.browser).move_to_element(stage).click_and_hold().move_by_offset(90, 40).release().perform()
    assert page.wait("return document.querySelector('#frame img').style.translate")
    page.keys("n")
    assert page.current != first
    page.keys("p")
    assert page.current == first
    page.settle()
    script = "const style = document.querySelector('#frame img').style; return [style.translate, style.transform]"
    assert page.wait(script) == ["", ""]


def test_an_image_that_is_gone(page: Page) -> None:
    page.manifest.paths[page.manifest.sample_ids.tolist().index(page.queue.items[5].sample_id)].unlink()
    page.choose("")
    for _ in range(5):
        page.keys("n")
    page.wait("return !document.querySelector('#gone').hidden && octofold.idle")
    assert page.queue.items[5].path in page.text("#gone")
    assert "no such file" in page.text("#gone")
    page.keys("d")
    assert did(page.settle()) == [(page.queue.items[5].sample_id, "drop")]


def test_the_last_filter_counts(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of the first choice comes after the second's: it is not shown."""
    desk, late = page.desk, threading.Event()
    chosen = desk.chosen

    def slow(label: str, kind: str) -> list[int]:
        found = chosen(label, kind)
        if kind == "flagged":
            late.wait(60)
        return found

    monkeypatch.setattr(desk, "chosen", slow)
    page.choose("")
    page.choose("flagged", wait=False)
    assert not page.browser.execute_script("return octofold.idle"), "a queue is on its way"
    page.choose(f"label:{CLASSES[0]}", wait=False)
    page.wait(f"return document.querySelector('#label').textContent === {CLASSES[0]!r}")
    shown = page.current
    late.set()
    page.settle()
    assert page.current == shown, "the first choice's answer came too late to count"
    page.keys("n")
    assert page.text("#label") == CLASSES[0]


def test_to_the_end_and_finish(page: Page) -> None:
    page.choose("")
    for _ in page.queue.items:
        page.keys("k")
    assert len(page.settle()) == len(page.queue.items)
    assert "All images are decided" in page.text("#end")
    page.click("#end button")
    page.wait("return document.querySelector('#end h2').textContent === 'Done'")
    page.thread.join(60)
    assert not page.thread.is_alive(), "the command ends"


def test_sixty_a_minute_and_a_picture_within_reach(page: Page, record_property: Callable[[str, object], None]) -> None:
    """Each key is answered by the next picture; how long it takes is recorded (docs/cleaning.md has numbers)."""
    page.choose("")
    for number in range(25):
        page.keys("k")
        page.wait(f"return octofold.speed.length > {number}")
    took = np.array(page.wait("return octofold.speed"))
    record_property("ms_from_key_to_picture_median", float(np.median(took)))
    assert len(page.settle()) == 25
    assert len(took) == 25, "every key was answered by a picture"
    assert (took > 0).all()


def test_the_manifest_is_not_touched(page: Page) -> None:
    before: Manifest = page.manifest
    assert before.file is not None
    kept = before.file.read_bytes()
    page.keys("d", "1", "k")
    page.settle()
    assert before.file.read_bytes() == kept
