"""Take the README's pictures of the MLflow UI with a real browser.

make ui                                             # in another terminal
.venv/bin/python docs/screenshots.py grocery15      # writes docs/images/mlflow-*.png
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

SERVER = "http://127.0.0.1:5000"
IMAGES = Path(__file__).parent / "images"
QUIET = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync", "window-size=1500,900", "hide-scrollbars")  # fmt: skip


@contextmanager
def browser() -> Iterator[WebDriver]:
    """Open Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*QUIET, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options)
        try:
            yield driver
        finally:
            driver.quit()


def pages(competition: str) -> dict[str, tuple[str, str]]:
    """Name, address and a word that says the page is there, for each picture."""
    client = mlflow.MlflowClient(SERVER)
    experiment = client.get_experiment_by_name(competition)
    assert experiment is not None, f"no experiment '{competition}' at {SERVER}"
    base = f"{SERVER}/#/experiments/{experiment.experiment_id}"
    slots = client.search_model_versions(f"name LIKE '{competition}.%.f0.s0'")
    slot = sorted(slots, key=lambda version: version.name)[0]
    (blend,) = client.search_runs([experiment.experiment_id], "tags.entry = 'blend'", max_results=1)
    (trained,) = client.search_runs([experiment.experiment_id], "tags.fold = '0'", max_results=1)
    return {
        "runs": (f"{base}/runs", "Run Name"),
        "registry": (f"{SERVER}/#/models", slot.name),
        "slot": (f"{SERVER}/#/models/{slot.name}/versions/{slot.version}", "Version"),
        "curves": (f"{base}/runs/{trained.info.run_id}/artifacts/curves.png", "curves.png"),
        "blend": (f"{base}/runs/{blend.info.run_id}/artifacts/weights.png", "weights.png"),
    }


def close_assistant(driver: WebDriver) -> None:
    """Close the panel that MLflow opens beside a page, and let the page settle."""
    for button in driver.find_elements(By.CSS_SELECTOR, "button[aria-label*=lose]"):
        button.click()
    driver.execute_async_script("setTimeout(arguments[0], 2500)")


def main(competition: str) -> None:
    """Write one PNG a page."""
    IMAGES.mkdir(exist_ok=True)
    with browser() as driver:
        for name, (address, word) in pages(competition).items():
            driver.get("about:blank")
            driver.get(address)
            WebDriverWait(driver, 60).until(lambda page, word=word: word in page.find_element(By.TAG_NAME, "body").text)
            close_assistant(driver)
            path = IMAGES / f"mlflow-{name}.png"
            driver.save_screenshot(str(path))
            print(path)


if __name__ == "__main__":
    main(sys.argv[1])
