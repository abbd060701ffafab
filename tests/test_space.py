"""The Space: staged, started as a program, used in a browser and through its API.

    python tests/test_space.py FOLDER [OUT]

starts the Space staged in FOLDER and takes the screenshots, at desktop and phone width, by day and by night,
into OUT (default: build/shots). figures/hf_space.png is a copy of OUT/desktop-light-write.png.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from shakespeare_gpt import export  # noqa: E402
from shakespeare_gpt.checkpoint import save_checkpoint  # noqa: E402
from shakespeare_gpt.data import load_text  # noqa: E402
from shakespeare_gpt.generate import GenerationStats  # noqa: E402
from shakespeare_gpt.model import GPT, GPTConfig  # noqa: E402

# ---------------------------------------------------------------------------- a server and a browser


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(folder: Path):
    """The staged app as a program of its own, as on Hugging Face: its address, while it runs."""
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GRADIO_SERVER_NAME")}
    env |= {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log = folder.parent / f"app-{port}.log"
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/config", timeout=5):
                break
            time.sleep(0.2)
        else:
            process.kill()
        if process.poll() is not None:
            raise AssertionError("the app did not start:\n" + log.read_text(encoding="utf-8"))
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser here: Debian's chromium and chromium-driver"
)


@contextlib.contextmanager
def browser(width=1280, height=1000):
    """Headless Chromium with a profile of its own; no graphics card, no network but the app's."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
        ):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        driver.set_script_timeout(60)
        driver.set_page_load_timeout(120)
        try:
            yield driver
        finally:
            driver.quit()


def set_width(driver, width, height):
    """A phone's width: the window itself may not get so narrow."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600},
    )


def wait_for(driver, condition, what, seconds=90):
    """The first true value of ``condition(driver)``; elements that are redrawn meanwhile do not matter."""
    from selenium.common.exceptions import WebDriverException

    end, value = time.monotonic() + seconds, None
    while time.monotonic() < end:
        with contextlib.suppress(WebDriverException):
            value = condition(driver)
            if value:
                return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}; the page says:\n" + page_text(driver))


def page_text(driver) -> str:
    return driver.execute_script("return document.body.innerText")


def text_of(driver, css: str) -> str:
    return driver.execute_script(
        "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", css
    )


def click(driver, css: str):
    wait_for(
        driver,
        lambda d: d.execute_script(
            "const e = document.querySelector(arguments[0]); if (!e || e.disabled) return false; e.click(); "
            "return true",
            css,
        ),
        f"a click on {css}",
    )


def open_page(driver, url, theme="light"):
    driver.get(f"{url}/?__theme={theme}")
    wait_for(driver, lambda d: d.find_elements("css selector", "#generate, #trouble"), "the page")


def type_prompt(driver, text):
    """Type into the prompt, in place of what stands there."""
    box = wait_for(
        driver, lambda d: d.find_element("css selector", "#prompt textarea"), "the prompt"
    )
    box.clear()
    box.send_keys(text)
    return box


def finished(driver, button) -> bool:
    """Whether nothing is being written: the Stop button is off."""
    return driver.execute_script("return document.querySelector(arguments[0]).disabled", button)


def open_tab(driver, name):
    wait_for(
        driver,
        lambda d: d.execute_script(
            "const t = [...document.querySelectorAll('button[role=tab]')]"
            ".find(t => t.innerText.includes(arguments[0])); if (!t) return false; t.click(); return true",
            name,
        ),
        f"the tab {name}",
    )


def whole_page(driver, path: Path, width: int):
    """A screenshot of all of the page, however long."""
    height = driver.execute_script(
        "return document.querySelector('.gradio-container').scrollHeight"
    )
    set_width(driver, width, max(700, height + 24))
    time.sleep(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))


def screenshots(folder: Path, out: Path):
    with server(folder) as url, browser() as driver:
        for width, kind in ((1200, "desktop"), (390, "phone")):
            for theme in ("light", "dark"):
                set_width(driver, width, 900)
                open_page(driver, url, theme)
                seed = driver.find_element("css selector", "#seed input")
                seed.send_keys("7")
                time.sleep(0.5)
                click(driver, "#generate")
                wait_for(
                    driver,
                    lambda d: d.find_elements("css selector", "#figures .figures"),
                    "an answer",
                )
                wait_for(driver, lambda d: finished(d, "#stop"), "the end of the answer")
                whole_page(driver, out / f"{kind}-{theme}-write.png", width)
                set_width(driver, width, 900)
                open_tab(driver, "How well")
                click(driver, "#recite")
                wait_for(
                    driver,
                    lambda d: d.find_elements("css selector", "#recital-figures .figures"),
                    "a recital",
                )
                wait_for(driver, lambda d: finished(d, "#stop-recital"), "the end of the recital")
                whole_page(driver, out / f"{kind}-{theme}-recite.png", width)


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if sys.argv[2:] else "build/shots"))
