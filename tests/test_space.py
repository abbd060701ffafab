"""The Space: staged, started as a program, used in a browser and through its API.

    python tests/test_space.py FOLDER [OUT]

starts the Space staged in FOLDER and takes the screenshots, at desktop and phone width, by day and by night,
into OUT (default: build/shots). figures/hf_space.png is a copy of OUT/desktop-light-write.png.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import gradio as gr
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tiny_play import tiny_checkpoint  # noqa: E402

from shakespeare_gpt import export  # noqa: E402
from shakespeare_gpt.data import TINY_SHAKESPEARE_SHA256, Text, load_text  # noqa: E402
from shakespeare_gpt.recite import Span  # noqa: E402
from shakespeare_gpt.tokenizer import decode, encode  # noqa: E402

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
                open_tab(driver, "Recite")
                click(driver, "#recite")
                wait_for(
                    driver,
                    lambda d: d.find_elements("css selector", "#recital-figures .figures"),
                    "a recital",
                )
                wait_for(driver, lambda d: finished(d, "#stop-recital"), "the end of the recital")
                whole_page(driver, out / f"{kind}-{theme}-recite.png", width)


# ---------------------------------------------------------------------------- the app's functions


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A Space with a tiny model that knows a page of the play."""
    base = tmp_path_factory.mktemp("space")
    checkpoint, source, _ = tiny_checkpoint(base)
    export.stage_space(base / "staged", checkpoint, source)
    return base / "staged"


@pytest.fixture(scope="module")
def app(staged):
    """The module app.py of the staged folder; its model is loaded."""
    spec = importlib.util.spec_from_file_location("staged_app", staged / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["staged_app"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def play(app, staged):
    return app.Play.load(staged)


def last(iterator):
    for value in iterator:  # noqa: B007
        pass
    return value


def answer(app, play, prompt, length=12, temperature=0.8, top_k=0, top_p=1.0, seed=1, **options):
    return last(
        app.continue_prompt(play, prompt, length, temperature, top_k, top_p, seed, **options)
    )


class Page(HTMLParser):
    """The tags of some HTML and its text."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


NASTY = [
    "",
    " ",
    "🎭🌊 naïve \u202eevil",
    "<|endoftext|>",
    "<script>alert(1)</script>",
    "</div><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "${alert(1)} {{7*7}} {% raw %}",
    "\ud83d half a character",
    "\0\r\n\t",
    "Ennor:\n" * 200,
]


@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
def test_any_prompt_gets_an_answer_and_no_markup(app, play, prompt):
    result = answer(app, play, prompt)
    assert result.done
    assert result.stats.tokens == 12
    page = Page(app.leaf(play, result))
    assert set(page.tags) <= {"div", "span", "b", "mark", "sup", "ol", "li", "p"}
    assert set(page.attributes) <= {"class", "title"}
    assert result.prompt in page.text
    json.dumps(app.describe_answer(play, result)).encode("utf-8")
    app.leaf(play, result).encode("utf-8")


def test_what_the_model_writes_and_the_metadata_are_escaped(app, play):
    evil = "<script>alert(1)</script>"
    assert "<script" not in app.leaf(play, app.Answer("", 1, text=evil, done=True))
    bad = app.Play(play.model, play.text, {"text_name": evil, "device": evil, "loss": evil}, evil)
    for page in (app.about(bad), app._masthead(bad), app.notice(evil), app.figures((evil, evil))):
        assert "<script" not in page
        assert "&lt;script" in page


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 100_000, "100,000 characters; the limit is 2,000"),
        (["a"], "must be text"),
        (7, "must be text"),
    ],
    ids=["long", "list", "number"],
)
def test_other_prompts_get_a_message(app, play, prompt, message):
    with pytest.raises(ValueError, match=message):
        answer(app, play, prompt)


@pytest.mark.parametrize("value", [None, "x", [], float("nan"), {"a": 1}])
def test_a_setting_that_is_no_number_is_the_default(app, value):
    assert app.number(value, 0, 2, 0.8) == 0.8


def test_settings_are_clamped_on_the_server(app, play):
    assert answer(app, play, "Ennor:", length=-5).stats.tokens == 1
    assert answer(app, play, "Ennor:", length=1e300, temperature=0).stats.tokens <= app.MAX_LENGTH
    answer(app, play, "Ennor:", temperature=float("inf"), top_k=-3, top_p=float("nan"))
    assert app.number("1e999", 0, 2, 0.8) == 2


@pytest.mark.parametrize("seed", ["x", -1, 1.5, True, 2**63, "9" * 30, [1]])
def test_a_seed_that_is_none_gets_a_message(app, play, seed):
    with pytest.raises(ValueError, match="whole number"):
        answer(app, play, "Ennor:", seed=seed)


def test_a_seed_gives_the_same_text_twice_and_none_a_new_one(app, play):
    one, two = (answer(app, play, "Ennor:", length=40, temperature=1.5, seed=s) for s in (5, "5"))
    assert one.text == two.text
    assert one.seed == two.seed == 5
    seeds = {answer(app, play, "", length=1, seed=None).seed for _ in range(4)}
    assert len(seeds) > 1
    drawn = answer(app, play, "Ennor:", length=40, temperature=1.5, seed="")
    assert (
        answer(app, play, "Ennor:", length=40, temperature=1.5, seed=drawn.seed).text == drawn.text
    )


def test_quotations_are_marked_with_their_place(app, play):
    result = answer(app, play, "First Fisher:\nHaul", length=16, temperature=0)
    assert result.text.startswith(" softly there. The thing is not a spar.")
    page = app.leaf(play, result)
    assert "<mark" in page
    assert "First Fisher, line 2" in Page(page).text
    assert app.quoted_share(play.source, result.text) > 0.9
    told = app.describe_answer(play, result)
    assert told["quotations"][0]["line"] == 2
    assert told["quotations"][0]["speaker"] == "First Fisher"
    assert told["acceptance_rate"] > 0.5


def test_invented_words_are_not_marked(app, play):
    page = app.leaf(
        play, app.Answer("Ennor:", 1, text=" the moon is a wheel of cheese tonight", done=True)
    )
    assert "<mark" not in page
    assert "Nothing here is quoted" in page


def test_stopping_ends_after_the_token_in_hand(app, play):
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) == 3

    result = answer(app, play, "Ennor:", length=200, temperature=1.5, stopped=stopped)
    assert result.done
    assert result.stats.tokens <= 4


def test_stop_ends_the_text_of_its_own_tab(app):
    """With one slot for a browser, Stop under the text that one writes ended the recital in the other tab."""
    visitor, asked = gr.Request(session_hash="ada"), {}

    def job(tab, name):
        def answers(stopped):
            asked[name] = stopped
            yield from itertools.repeat(name)

        return app._job(visitor, tab, answers, lambda answer: (answer, ""))

    jobs = {name: job(tab, name) for tab, name in (("write", "a"), ("recite", "b"))}
    for name, updates in jobs.items():
        assert next(updates)[3]["interactive"]  # Stop may be pressed
        assert next(updates)[0] == name
    app._stopper("write")(visitor)
    assert asked["a"]() and not asked["b"]()
    # A second text in the same tab ends the first, which then leaves the page and Stop alone.
    second = job("recite", "c")
    next(second)
    assert asked["b"]() and next(second)[0] == "c" and not asked["c"]()
    for updates in (*jobs.values(), second):
        updates.close()
    app._stopper("write")(visitor)  # nothing runs any more
    assert not app.running


def test_titles_go_by_the_text_not_by_the_name_of_its_file(app, play):
    """Tiny Shakespeare is often saved as input.txt, and so is anybody's own text."""
    assert app.TITLES[load_text("input").sha256][0] == "The Warden of Skerrow"
    assert app.TITLES[TINY_SHAKESPEARE_SHA256][0] == "Tiny Shakespeare"
    other = app.Play(play.model, play.text, {"text_name": "input"}, "")
    assert other.title == "input"


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("a line"), "a line"), (RuntimeError("CUDA"), "could not go on")]
)
def test_a_text_that_fails_leaves_the_page_usable(app, capsys, error, said):
    """Without the last update Stop would stay on and the caret would blink for ever."""

    def answers(stopped):
        yield "a"
        raise error

    updates = list(
        app._job(gr.Request(session_hash="ada"), "write", answers, lambda answer: (answer, ""))
    )
    assert said in updates[-1][2] and updates[-1][3]["interactive"] is False
    assert not app.running


def test_closing_the_page_closes_the_model(app, play, monkeypatch):
    """Gradio closes the generator when a request is cancelled: nothing may go on computing."""
    closed = threading.Event()

    def endless(*args, **options):
        try:
            while True:
                time.sleep(0.01)
                yield "a "
        finally:
            closed.set()

    monkeypatch.setattr(app, "stream_text", endless)
    running = app.continue_prompt(play, "Ennor:", 400, 1.5, 0, 1.0, 1)
    next(running)
    assert not closed.is_set()
    running.close()
    assert closed.wait(5)


def test_texts_of_clients_are_not_mixed(app, play):
    jobs = [(prompt, seed) for seed in range(4) for prompt in ("Ennor:", "First Fisher:\n", "")]

    def run(job):
        return answer(app, play, job[0], length=50, temperature=1.2, seed=job[1]).text

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, jobs)) == alone


def test_reciting_compares_token_by_token(app, play):
    recital = last(app.recite_line(play, 2, 10))
    assert recital.given.endswith("not a spar.")
    assert recital.told == recital.truth
    assert recital.difference is None
    assert recital.matching == 10
    assert "wrong" not in app.versus(play, recital)
    assert "10 of 10" in app.recital_figures(recital)
    recital.told[4] = 0
    assert recital.matching == recital.difference == 4
    assert app.versus(play, recital).count('<mark class="wrong">') == 2
    assert "token 5" in app.recital_figures(recital)


@pytest.mark.parametrize("line", [-3, 0, 1, 3, 10**9, None, "x"])
def test_any_line_can_be_asked_for(app, play, line):
    recital = last(app.recite_line(play, line, 1e9))
    assert 1 <= len(recital.told) <= app.MAX_RECITAL
    app.versus(play, recital).encode("utf-8")


def test_the_last_window_is_asked_from_where_it_was_learnt(app, play):
    """The last window is moved back to be whole, and is known from its own start only."""
    fixed = app.Play(play.model, play.text, {"windows": "fixed"}, "")
    ids, n = play.text.ids.tolist(), play.model.config.n_positions
    line = len(fixed.lines) - 2
    recital, end = last(app.recite_line(fixed, line, 5)), fixed.after(line)
    assert (end - 1) // n * n > len(ids) - 1 - n  # in what the others leave over
    assert recital.given == decode(ids[len(ids) - 1 - n : end])
    assert recital.cut != recital.given.startswith("\n") and recital.truth == ids[end : end + 5]
    first = last(app.recite_line(fixed, 2, 5))
    assert not first.cut and ">… " not in app.versus(fixed, first)
    first.cut = True
    assert ">… " in app.versus(fixed, first)


def test_a_line_of_verse_with_a_colon_is_no_speaker(app, play):
    """Twenty-six lines of the play were shown as names."""

    def names(text, before=""):
        return re.findall('<b class="who">(.*?)</b>', app._lines(play, text, before))

    assert names("Nobody:\nI come\nwith three:\nOne.\n\nA stranger:\nFirst Fisher:\n") == [
        "Nobody:", "A stranger:", "First Fisher:",
    ]  # fmt: skip
    assert names("three:", "I come with ") == names("with three:", "I come\n") == []
    assert names("A stranger:", "I come.\n\n") == ["A stranger:"]
    assert names("Ennor:", "I come.\n") == ["Ennor:"]


def test_what_one_quotation_leaves_of_the_next_gets_no_note(app, play, monkeypatch):
    """A list of quotations of one word each looked like an error."""
    spans = [Span(0, 20, 0, "Ennor", 1), Span(20, 24, 9, "", 7), Span(30, 40, 9, "", 8)]
    monkeypatch.setattr(play.source, "spans", lambda generated: spans)
    page = app.leaf(play, app.Answer("", 1, text="word " * 10, done=True))
    assert page.count("<mark") == 3 and page.count("<sup>") == page.count("<li>") == 2
    assert "line 7" in page and "<li><b>line 7" not in page


def test_lines_to_choose_are_spread_over_the_text(app, play):
    speeches = play.speeches()
    assert len(speeches) > 5
    for who, line, words in speeches:
        assert play.lines[line - 1].strip() == words
        assert play.lines[line - 2] == f"{who}:"
    assert app.spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert app.spread([1, 2], 4) == [1, 2]


def test_a_text_without_speakers_has_lines_too(app, play):
    words = "One day.\n\nAnother day came, and went.\nThen a third.\n\n\n"
    text = Text("prose", words, torch.tensor(encode(words)))
    prose = app.Play(play.model, text, {}, "")
    assert prose.speeches()[0] == ("", 1, "One day.")
    assert last(app.recite_line(prose, 3, 5)).truth


def test_cores_are_those_of_the_container(app, monkeypatch):
    monkeypatch.setenv("CPU_CORES", "3")
    assert app.cores() == 3
    monkeypatch.setenv("CPU_CORES", "many")
    assert 1 <= app.cores() <= os.cpu_count()


# ---------------------------------------------------------------------------- bad weights


def config_text(demo) -> str:
    return json.dumps([c.get("props", {}).get("value") for c in demo.config["components"]])


def test_without_weights_the_page_says_so(app, tmp_path):
    page = config_text(app.build(tmp_path))
    assert "cannot speak yet" in page
    assert "There are no weights at model.safetensors" in page
    assert "shakespeare_gpt.export --stage" in page


@pytest.mark.parametrize("damage", ["pickle", "cut", "text", "no text", "header"])
def test_wrong_weights_are_refused(app, staged, tmp_path, damage):
    folder = tmp_path / "space"
    shutil.copytree(staged, folder)
    weights = folder / "model.safetensors"
    if damage == "pickle":
        torch.save({"a": torch.zeros(1)}, weights)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "text":
        (folder / "text.txt").write_text("Another text altogether.\n" * 50, encoding="utf-8")
    elif damage == "no text":
        (folder / "text.txt").unlink()
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, weights)
    demo = app.build(folder)
    assert "cannot speak yet" in config_text(demo)


def test_the_api_says_what_is_missing(app, tmp_path):
    demo = app.build(tmp_path)
    endpoint = next(f for f in demo.fns.values() if f.api_name == "generate")
    with pytest.raises(gr.Error, match="no weights"):
        next(endpoint.fn("Ennor:"))


def test_the_queue_is_bounded_and_nothing_goes_round_it(app):
    assert app.demo._queue.max_size == app.WAITING
    named = [f for f in app.demo.fns.values() if f.concurrency_id == "model"]
    assert len(named) == 5  # two endpoints, Generate, Recite, Surprise me
    assert all(f.concurrency_limit == app.AT_ONCE for f in named)
    assert all(f.queue is not False for f in named) and app.demo.api_open is False


def test_starts_on_zerogpu(staged, tmp_path):
    """A free account's Space runs there: the module must come before PyTorch and be given a function."""
    (tmp_path / "spaces.py").write_text(
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "def GPU(task):\n"
        "    print('for the GPU:', task.__name__)\n"
        "    return task\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, "-c", "import app; print(app.demo is not None, app.Play.load(app.HERE).title)"],
        cwd=staged, capture_output=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "for the GPU: gpu" in result.stdout and "True" in result.stdout


# ---------------------------------------------------------------------------- as a program


@pytest.fixture(scope="module")
def address(staged):
    with server(staged) as url:
        yield url


def test_gradio_client(address):
    from gradio_client import Client

    client = Client(address, verbose=False)
    try:
        result = client.predict("First Fisher:\nHaul", 16, 0.0, api_name="/generate")
        assert result["text"].startswith(" softly there.")
        assert result["done"]
        assert result["quotations"][0]["speaker"] == "First Fisher"
        stream = list(client.submit("Ennor:", 300, 1.5, seed=3, api_name="/generate"))
        assert len(stream) > 2  # it came piece by piece
        assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(stream))
        recital = client.predict(2, 10, api_name="/recite")
        assert recital["original"] == recital["recited"]
        assert recital["first_difference"] is None
        with pytest.raises(Exception, match="100,000 characters"):
            client.predict("x" * 100_000, api_name="/generate")
        assert client.predict("<script>", 3, api_name="/generate")["tokens"] == 3
    finally:
        client.close()


@needs_browser
def test_in_a_browser(address):
    """Type, generate, see quotations, stop, the second tab, a prompt full of markup, a phone."""
    with browser() as driver:
        open_page(driver, address)
        driver.execute_script("window.intruder = 0; window.alert = () => { window.intruder += 1 }")
        type_prompt(driver, "First Fisher:\nHaul")
        driver.execute_script(
            "const [length, heat] = ['#length', '#temperature'].map(e => "
            "document.querySelector(e + ' input[type=number]'));"
            "for (const [e, v] of [[length, 20], [heat, 0]]) { e.value = v; "
            "e.dispatchEvent(new Event('input', {bubbles: true})); "
            "e.dispatchEvent(new Event('change', {bubbles: true})); }"
        )
        click(driver, "#generate")
        wait_for(driver, lambda d: "not a spar." in text_of(d, "#page"), "the continuation")
        wait_for(
            driver, lambda d: "line 2" in text_of(d, "#page .places"), "where the quotation stands"
        )
        assert "Haul softly there." in text_of(driver, "#page .leaf")
        assert driver.find_elements("css selector", "#page mark")
        wait_for(driver, lambda d: "20 tokens" in text_of(d, "#figures"), "the figures")

        driver.execute_script(
            "for (const [e, v] of [['#length', 400], ['#temperature', 1.5]]) { "
            "const box = document.querySelector(e + ' input[type=number]'); box.value = v; "
            "box.dispatchEvent(new Event('input', {bubbles: true})); "
            "box.dispatchEvent(new Event('change', {bubbles: true})); }"
        )
        click(driver, "#generate")
        # The page itself presses Stop at the first words: a driver would be too slow for so small a model.
        driver.execute_async_script(
            "const done = arguments[0]; const timer = setInterval(() => { "
            "const b = document.querySelector('#stop'), t = document.querySelector('#figures'); "
            "if (!b.disabled && t.innerText.includes('tokens') && !t.innerText.includes('20 tokens')) "
            "{ b.click(); clearInterval(timer); done() } }, 5)"
        )
        wait_for(driver, lambda d: "Stopped." in text_of(d, "#note"), "that it has stopped")
        wait_for(driver, lambda d: finished(d, "#stop"), "the Stop button to be off again")
        stopped = text_of(driver, "#page")
        time.sleep(0.7)
        assert text_of(driver, "#page") == stopped
        assert "400 tokens" not in text_of(driver, "#figures")

        type_prompt(
            driver, "</div><img src=x onerror=alert(1)><script>alert(2)</script>${alert(3)}{{7*7}}"
        )
        click(driver, "#generate")
        wait_for(
            driver,
            lambda d: "<img src=x" in text_of(d, "#page .given"),
            "the prompt as it was typed",
        )
        wait_for(driver, lambda d: finished(d, "#stop"), "the end")
        assert "${alert(3)}{{7*7}}" in text_of(driver, "#page .given")
        assert not driver.find_elements("css selector", "#page img, #page script")
        assert driver.execute_script("return window.intruder") == 0

        open_tab(driver, "Recite")
        click(driver, "#recite")
        wait_for(driver, lambda d: "word for word" in text_of(d, "#recital-figures"), "the recital")
        wait_for(driver, lambda d: finished(d, "#stop-recital"), "the end of the recital")
        assert text_of(driver, "#recital .original .leaf").split()[:2] == ["Second", "Fisher:"]
        assert text_of(driver, "#recital .recital .leaf").split()[:2] == ["Second", "Fisher:"]
        before = text_of(driver, "#recital")
        click(driver, "#surprise")
        wait_for(driver, lambda d: text_of(d, "#recital") != before, "another line")
        wait_for(driver, lambda d: finished(d, "#stop-recital"), "the end of the surprise")
        number = re.search(r"including line ([\d,]+)", text_of(driver, "#recital"))[1]
        chosen = driver.find_element("css selector", "#line input").get_attribute("value")
        assert f"line {number}:" in chosen  # the surprise can be repeated, and lengthened
        before, speed = text_of(driver, "#recital"), text_of(driver, "#recital-figures")
        click(driver, "#recite")
        # So small a model may be done between two looks; then its speed has changed.
        wait_for(
            driver,
            lambda d: not finished(d, "#stop-recital") or text_of(d, "#recital-figures") != speed,
            "that it recites again",
        )
        wait_for(driver, lambda d: finished(d, "#stop-recital"), "the end of that")
        assert not text_of(driver, "#recital-note").strip()
        assert text_of(driver, "#recital") == before

        set_width(driver, 390, 844)
        open_page(driver, address, "dark")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        assert "dark" in driver.execute_script("return document.body.className")
        open_tab(driver, "Recite")
        set_width(driver, 360, 780)  # where the second tab had gone
        open_page(driver, address)
        open_tab(driver, "Recite")


@needs_browser
def test_whoever_waits_sees_the_queue(app, monkeypatch):
    """With all places taken, a click shows how many stand before it; then the text comes, and the note goes."""
    from gradio_client import Client

    free, held, answers = threading.Event(), [], app.continue_prompt

    def late(*arguments, **options):
        held.append(arguments)
        free.wait(60)
        yield from answers(*arguments, **options)

    def waiting(driver):
        return driver.execute_script(
            "const e = document.querySelector('#note .progress-text');"
            "return e && e.checkVisibility({visibilityProperty: true, opacityProperty: true}) ? e.innerText : ''"
        )

    monkeypatch.setattr(app, "continue_prompt", late)
    demo = app.build()
    demo.launch(prevent_thread_lock=True, quiet=True, server_port=free_port(), **app.LOOK)
    client = Client(demo.local_url, verbose=False)
    try:
        jobs = [client.submit("Ennor:", 3, api_name="/generate") for _ in range(app.AT_ONCE)]
        with browser() as driver:
            open_page(driver, demo.local_url.rstrip("/"))
            wait_for(driver, lambda d: len(held) == app.AT_ONCE, "that all places are taken")
            click(driver, "#generate")
            wait_for(driver, lambda d: "queue: 1/1" in waiting(d), "the queue")
            free.set()
            wait_for(driver, lambda d: "tokens" in text_of(d, "#figures"), "the text")
            wait_for(driver, lambda d: not waiting(d), "that the note is gone")
        assert all(job.result(60)["done"] for job in jobs)
    finally:
        free.set()
        client.close()
        demo.close(verbose=False)


def test_no_comma_in_the_brackets_of_a_selector(app):
    """Gradio cuts selectors at every comma, those within :not(...) and :has(...) too."""
    css = re.sub(r"/[*].*?[*]/", "", app.CSS, flags=re.DOTALL)
    selectors = re.findall(r"[^{}]+(?=[{])", css)
    assert not [
        s for s in selectors if not s.strip().startswith("@") and re.search(r"[(][^()]*,", s)
    ]


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if sys.argv[2:] else "build/shots"))
