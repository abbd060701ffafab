"""The Space: staged, started as a program, used in a browser and through its API.

    python tests/test_space.py FOLDER [OUT]

starts the Space staged in FOLDER and takes screenshots, at the width of a desktop and of a phone, light and
dark, into OUT (default: build/shots). figures/hf_space.png is a copy of OUT/desktop-light-write.png.
"""

import contextlib
import importlib
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

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shakespeare_gpt.data import TINY_SHAKESPEARE_SHA256, Text, load_text
from shakespeare_gpt.publish.export import SPACE_FILES, stage_space
from shakespeare_gpt.tokenizer import encode

SPACE = Path(__file__).resolve().parent.parent / "space"

# ---------------------------------------------------------------------------- a server and a browser


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def program(folder: Path):
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


def wait_until(condition, what, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def page_text(driver) -> str:
    return driver.execute_script("return document.body.innerText")


def text_of(driver, css: str) -> str:
    return driver.execute_script(
        "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", css
    )


def visible_text(driver, css: str) -> str:
    """As ``text_of``, but nothing for an element that is hidden."""
    return driver.execute_script(
        "const e = document.querySelector(arguments[0]);"
        "const how = {visibilityProperty: true, opacityProperty: true};"
        "return e && e.checkVisibility(how) ? e.innerText.trim() : ''",
        css,
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
    wait_for(driver, lambda d: d.find_elements("css selector", "#generate, #problem"), "the page")


def type_prompt(driver, text):
    """Type into the prompt, in place of what stands there."""
    box = wait_for(driver, lambda d: d.find_element("css selector", "#prompt textarea"), "the prompt")
    box.clear()
    box.send_keys(text)
    return box


def set_number(driver, label, value):
    """Set a slider by the field beside it."""
    driver.execute_script(
        "const e = [...document.querySelectorAll('input[type=number]')]"
        ".find(e => e.ariaLabel && e.ariaLabel.includes(arguments[0])); e.value = arguments[1];"
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true}))",
        label,
        value,
    )


def lightness(driver, css, property="color"):
    """Of a colour on the page, from 0 for black to 765 for white."""
    color = driver.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", css, property
    )
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3])


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
    driver.execute_script("document.activeElement.blur()")
    height = driver.execute_script("return document.querySelector('.gradio-container').scrollHeight")
    set_width(driver, width, max(700, height + 24))
    time.sleep(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(path))


def screenshots(folder: Path, out: Path):
    with program(folder) as url, browser() as driver:
        for width, kind in ((900, "desktop"), (390, "phone")):
            for theme in ("light", "dark"):
                set_width(driver, width, 900)
                open_page(driver, url, theme)
                seed = driver.find_element("css selector", "#seed input")
                seed.send_keys("7")
                set_number(driver, "Length", 70)
                time.sleep(0.5)
                click(driver, "#generate")
                wait_for(driver, lambda d: d.find_elements("css selector", "#figures .figures"), "an answer")
                wait_for(driver, lambda d: finished(d, "#stop"), "the end of the answer")
                whole_page(driver, out / f"{kind}-{theme}-write.png", width)
                set_width(driver, width, 900)
                open_tab(driver, "Recite")
                click(driver, "#recite")
                wait_for(
                    driver,
                    lambda d: d.find_elements("css selector", "#recitation-figures .figures"),
                    "a recitation",
                )
                wait_for(driver, lambda d: finished(d, "#stop-reciting"), "the end of the recitation")
                whole_page(driver, out / f"{kind}-{theme}-recite.png", width)


# ---------------------------------------------------------------------------- the parts


@pytest.fixture(scope="module")
def staged(tiny, tmp_path_factory):
    """A Space with a tiny model that knows a page of the play."""
    folder = tmp_path_factory.mktemp("space") / "staged"
    stage_space(folder, tiny.checkpoint, tiny.source)
    return folder


@pytest.fixture(scope="module")
def modules(staged):
    """The staged modules app, model_server and render."""
    names = [Path(name).stem for name in SPACE_FILES if name.endswith(".py")]
    sys.path.insert(0, str(staged))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(staged))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def app(modules):
    return modules["app"]


@pytest.fixture(scope="module")
def model_server(modules):
    return modules["model_server"]


@pytest.fixture(scope="module")
def render(modules):
    return modules["render"]


@pytest.fixture(scope="module")
def server(model_server, staged):
    return model_server.ModelServer.load(staged)


def last(iterator):
    for value in iterator:  # noqa: B007
        pass
    return value


def answer(server, prompt, length=12, temperature=0.8, top_k=0, top_p=1.0, seed=1):
    return last(server.answer(prompt, length, temperature, top_k, top_p, seed))


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
def test_any_prompt_gets_an_answer_and_no_markup(server, render, prompt):
    result = answer(server, prompt)
    assert result.done
    assert result.stats.tokens == 12
    html = render.render_answer(server, result)
    html.encode("utf-8")
    page = Page(html)
    assert set(page.tags) <= {"div", "span", "b", "mark", "sup", "ol", "li", "p"}
    assert set(page.attributes) <= {"class", "title"}
    assert result.prompt in page.text
    json.dumps(render.describe_answer(server, result)).encode("utf-8")


def test_what_the_model_writes_and_the_metadata_are_escaped(server, model_server, render):
    evil = "<script>alert(1)</script>"
    assert "<script" not in render.render_answer(server, model_server.Answer("", 1, text=evil, done=True))
    told = encode(evil)
    recitation = model_server.Recitation(1, evil, told, False, [*told[:-2], 0], done=True)
    meta = {"text_name": evil, "device": evil, "loss": evil, "steps": evil, "finished": evil}
    bad = model_server.ModelServer(server.model, evil, server.text, meta)
    notice = render.notice(evil)
    for page in (render.render_recitation(recitation), render.about(bad), render.masthead(bad), notice):
        assert "<script" not in page
        assert "&lt;script" in page


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("x" * 100_000, "100,000 characters; the limit is 2,000"), (["a"], "must be text"), (7, "must be text")],
    ids=["long", "list", "number"],
)
def test_other_prompts_get_a_message(server, prompt, message):
    with pytest.raises(ValueError, match=message):
        answer(server, prompt)


@pytest.mark.parametrize("value", [None, "x", [], float("nan"), {"a": 1}])
def test_a_setting_that_is_no_number_is_the_default(model_server, value):
    assert model_server.clamp(value, 0, 2, 0.8) == 0.8


def test_settings_are_clamped_on_the_server(server, model_server):
    assert answer(server, "Ennor:", length=-5).stats.tokens == 1
    assert answer(server, "Ennor:", length=1e300, temperature=0).stats.tokens <= model_server.MAX_LENGTH
    answer(server, "Ennor:", temperature=float("inf"), top_k=-3, top_p=float("nan"))
    assert model_server.clamp("1e999", 0, 2, 0.8) == 2


@pytest.mark.parametrize("seed", ["x", -1, 1.5, True, 2**63, "9" * 30, [1]])
def test_a_seed_that_is_none_gets_a_message(server, seed):
    with pytest.raises(ValueError, match="whole number"):
        answer(server, "Ennor:", seed=seed)


def test_a_seed_gives_the_same_text_twice_and_none_a_new_one(server):
    results = [answer(server, "Ennor:", length=40, temperature=1.5, seed=s) for s in (5, "5", " 5 ", 5.0)]
    assert len({result.text for result in results}) == 1
    assert {result.seed for result in results} == {5}
    assert len({answer(server, "", length=1, seed=None).seed for _ in range(4)}) > 1
    drawn = answer(server, "Ennor:", length=40, temperature=1.5, seed="")
    again = answer(server, "Ennor:", length=40, temperature=1.5, seed=drawn.seed)
    assert again.text == drawn.text


def test_quotations_are_marked_with_their_place(server, render):
    result = answer(server, "First Fisher:\nHaul", length=16, temperature=0)
    assert result.text.startswith(" softly there. The thing is not a spar.")
    page = render.render_answer(server, result)
    assert "<mark" in page
    assert "First Fisher, line 2" in Page(page).text
    described = render.describe_answer(server, result)
    assert described["quoted"] > 0.9
    assert described["acceptance_rate"] > 0.5
    quotation = described["quotations"][0]
    assert (quotation["line"], quotation["speaker"]) == (2, "First Fisher")


def test_the_quotations_are_searched_once_in_each_update(server, model_server, render):
    """The page and its figures both need them; they were searched twice."""
    growing = model_server.Answer("", 1, text="Haul softly there. The thing is not a spar, I think.")
    before = server.quotations.find.cache_info().misses
    assert "<mark" in render.render_answer(server, growing)
    render.answer_figures(server, growing)
    render.describe_answer(server, growing)
    assert server.quotations.find.cache_info().misses == before + 1


def test_invented_words_are_not_marked(server, model_server, render):
    invented = model_server.Answer("Ennor:", 1, text=" the moon is a wheel of cheese tonight", done=True)
    page = render.render_answer(server, invented)
    assert "<mark" not in page
    assert "Nothing here is quoted" in page


class Endless:
    """A model that writes "word 1, word 2, ..." slowly and for ever; it says what was computed and closed."""

    def __init__(self):
        self.words, self.closed, self.closers = {}, {}, set()

    def __call__(self, model, prompt, *, stats=None, **options):
        """In place of both ``stream_text`` and ``generate``, which is given ids and not a text."""
        if stats is None:
            return  # the first call, when the app starts
        key = prompt if isinstance(prompt, str) else "ids"
        self.words[key], self.closed[key] = 0, threading.Event()
        try:
            while True:
                time.sleep(0.01)
                self.words[key] += 1
                stats.tokens += 1
                yield f"word {self.words[key]} " if isinstance(prompt, str) else self.words[key]
        finally:
            self.closers.add(threading.current_thread().name)
            self.closed[key].set()


@pytest.fixture
def endless(model_server, monkeypatch):
    endless = Endless()
    monkeypatch.setattr(model_server, "stream_text", endless)
    monkeypatch.setattr(model_server, "generate", endless)
    return endless


def test_closing_an_answer_stops_the_model_after_the_token_in_hand(server, endless):
    """Gradio closes the generator when a request is cancelled: nothing may go on computing."""
    answers = server.answer("Ennor:", 400, 1.5, 0, 1.0, 1)
    next(answers)
    assert not endless.closed["Ennor:"].is_set()
    answers.close()
    assert endless.closed["Ennor:"].wait(60)
    assert endless.words["Ennor:"] <= 2
    assert [name[:5] for name in endless.closers] == [
        "model"
    ]  # whoever closes it does not wait for the model


def test_a_new_request_in_a_tab_ends_the_older(app):
    """Its last update leaves the page and the Stop button to the newer one. The other tab goes on."""

    def request(tab):
        number, _, halt = app.begin(tab)
        assert halt.interactive
        updates = app.grow(tab, number, (text for text in itertools.repeat("a")), lambda text: (text, ""))
        assert next(updates) == (gr.skip(),) * 4  # one that ends without any update would empty the page
        return updates

    write, recite = app.TabState(), app.TabState()
    first, other = request(write), request(recite)
    assert next(first)[0] == next(other)[0] == "a"
    second = request(write)
    assert list(first) == []
    assert next(second)[0] == "a"
    waiting = request(write)
    app.stop(write)
    assert list(second) == list(waiting) == []
    assert next(other)[0] == "a"


@pytest.mark.parametrize(
    ("error", "said", "traced"),
    [(ValueError("a line"), "a line", False), (RuntimeError("CUDA"), "went wrong on the server", True)],
)
def test_a_text_that_fails_leaves_the_page_usable(app, capsys, error, said, traced):
    """Without the last update Stop would stay on and the caret would blink for ever."""

    def answers():
        yield "a"
        raise error

    tab = app.TabState()
    number, *_ = app.begin(tab)
    *_, note, halt = list(app.grow(tab, number, answers(), lambda text: (text, "")))[-1]
    assert said in note
    assert halt.interactive is False
    assert ("Traceback" in capsys.readouterr().err) is traced


def test_titles_go_by_the_text_not_by_the_name_of_its_file(server, model_server):
    """Tiny Shakespeare is often saved as input.txt, and so is anybody's own text."""
    assert model_server.TITLES[load_text("input").sha256][0] == "The Warden of Skerrow"
    assert model_server.TITLES[TINY_SHAKESPEARE_SHA256][0] == "Tiny Shakespeare"
    assert model_server.ModelServer(server.model, "", server.text, {"text_name": "input"}).title == "input"


def test_texts_of_clients_are_not_mixed(server):
    jobs = [(prompt, seed) for seed in range(4) for prompt in ("Ennor:", "First Fisher:\n", "")]

    def run(job):
        return answer(server, job[0], length=50, temperature=1.2, seed=job[1]).text

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, jobs)) == alone


def test_reciting_compares_token_by_token(server, render):
    recitation = last(server.recite(2, 10))
    assert recitation.prompt.endswith("not a spar.")
    assert recitation.recited == recitation.original
    assert recitation.first_difference is None
    assert recitation.matching == 10
    assert "wrong" not in render.render_recitation(recitation)
    assert "10 of 10" in Page(render.recitation_figures(recitation)).text
    recitation.recited[4] = 0
    assert recitation.matching == recitation.first_difference == 4
    assert render.render_recitation(recitation).count('<mark class="wrong">') == 2
    assert "token 5" in Page(render.recitation_figures(recitation)).text
    assert render.describe_recitation(recitation)["first_difference"] == 4


@pytest.mark.parametrize("line", [-3, 0, 1, 3, 10**9, None, "x"])
def test_any_line_can_be_asked_for(server, model_server, render, line):
    recitation = last(server.recite(line, 1e9))
    assert 1 <= len(recitation.recited) <= model_server.MAX_RECITATION
    assert len(encode(recitation.prompt)) <= model_server.PROMPT_TOKENS
    render.render_recitation(recitation).encode("utf-8")


def test_a_prompt_that_begins_inside_a_line_says_so(server, model_server, render):
    """What is left of its first line is no speaker's name, whatever it ends in."""
    for recitation in (last(server.recite(line, 1)) for line in range(1, len(server.lines))):
        before = server.text.text[: server.text.text.rindex(recitation.prompt)]
        assert recitation.mid_line == (before != "" and not before.endswith("\n"))
    for mid_line in (True, False):
        recitation = model_server.Recitation(3, "with three:\nOne.", encode(" Two."), mid_line)
        page = render.render_recitation(recitation)
        assert ("…with three:" in Page(page).text, "who" in page) == (mid_line, not mid_line)


def test_lines_to_choose_are_spread_over_the_text(app, server):
    speeches = server.speeches()
    assert len(speeches) > 5
    for speaker, line, words in speeches:
        assert server.lines[line - 1].strip() == words
        assert server.lines[line - 2] == f"{speaker}:"
    assert app.spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert app.spread([1, 2], 4) == [1, 2]


def test_a_text_without_speakers_has_lines_too(server, model_server):
    words = "One day.\n\nAnother day came, and went.\nThen a third.\n\n\n"
    text = Text("prose", words, torch.tensor(encode(words)))
    prose = model_server.ModelServer(server.model, "", text, {})
    assert prose.speeches()[0] == ("", 1, "One day.")
    assert last(prose.recite(3, 5)).original == encode("\nThen a third.")[:5]


def test_cores_are_those_of_the_container(model_server, monkeypatch):
    monkeypatch.setenv("CPU_CORES", "3")
    assert model_server.cpu_cores() == 3
    monkeypatch.setenv("CPU_CORES", "many")
    assert 1 <= model_server.cpu_cores() <= os.cpu_count()


def test_no_comma_in_the_brackets_of_a_selector():
    """Gradio cuts selectors at every comma, those within :not(...) and :has(...) too."""
    css = re.sub(r"/[*].*?[*]/", "", (SPACE / "style.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    selectors = [s.strip() for s in re.findall(r"[^{}]+(?=[{])", css)]
    assert len(selectors) > 20
    assert not [s for s in selectors if not s.startswith("@") and re.search(r"[(][^()]*,", s)]


def test_the_front_matter_says_what_hugging_face_asks_for():
    import yaml  # a requirement of huggingface_hub

    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "mit")
    assert len(front["tags"]) > 2
    assert re.match("https://.*[.]png$", front["thumbnail"])
    assert len(front["short_description"]) <= 60  # the Hub refuses more
    pins = (SPACE.parent / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={front['sdk_version']}\n" in pins
    # ZeroGPU runs only some versions of PyTorch: no range may choose another.
    torch_pin = re.search(r"^torch==[\d.]+", (SPACE / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert f"{torch_pin[0]}\n" in pins


# ---------------------------------------------------------------------------- bad weights


def config_text(demo) -> str:
    return json.dumps([c.get("props", {}).get("value") for c in demo.config["components"]])


def test_without_weights_the_page_says_so(app, tmp_path):
    page = config_text(app.build(tmp_path))
    assert "could not be loaded" in page
    assert "There are no weights at model.safetensors" in page
    assert "export --stage" in page


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pickle", "is no readable GPT"),
        ("cut", "is no readable GPT"),
        ("header", "lacks this project"),
        ("text", "not the text that these weights learnt"),
        ("no text", "text.txt cannot be read"),
    ],
)
def test_wrong_weights_are_refused(app, staged, tmp_path, damage, message):
    folder = tmp_path / "space"
    folder.mkdir()
    for name in ("model.safetensors", "text.txt"):
        shutil.copy(staged / name, folder)
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
    page = config_text(app.build(folder))
    assert "could not be loaded" in page
    assert message in page
    assert str(folder) not in page


def test_the_api_says_what_is_missing(app, tmp_path):
    demo = app.build(tmp_path)
    for name in ("generate", "recite"):
        endpoint = next(f for f in demo.fns.values() if f.api_name == name)
        with pytest.raises(gr.Error, match="no weights"):
            next(endpoint.fn())


def test_nothing_goes_round_the_queue(app):
    named = [f for f in app.demo.fns.values() if f.concurrency_id == "model"]
    assert len(named) == 5  # two endpoints, Generate, Recite, Random line
    assert all(f.concurrency_limit == app.CONCURRENT for f in named)
    assert all(f.queue is not False for f in named)
    assert app.demo.api_open is False


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
        [sys.executable, "-c", "import app; print(config := len(app.demo.fns) > 5)"],
        cwd=staged, capture_output=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "for the GPU: gpu" in result.stdout and "True" in result.stdout


def test_runs_from_the_repository_too(tmp_path):
    """Where the package is not installed it is found one folder up."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "import app, shakespeare_gpt; print(shakespeare_gpt.__file__)"]
    result = subprocess.run(command, cwd=SPACE, capture_output=True, encoding="utf-8", env=env)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent.parent == SPACE.parent


# ---------------------------------------------------------------------------- as a program


@contextlib.contextmanager
def launched(app, folder):
    """The app inside this process, so that a test can replace its model: its address."""
    demo = app.build(folder)
    options = {"prevent_thread_lock": True, "quiet": True, "ssr_mode": False}
    demo.launch(server_port=free_port(), **options, **app.LOOK)
    try:
        yield demo.local_url.rstrip("/")
    finally:
        demo.close(verbose=False)


@pytest.fixture(scope="module")
def address(staged):
    with program(staged) as url:
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
        assert len(stream) > 1  # it came piece by piece
        assert all(b["text"].startswith(a["text"]) for a, b in itertools.pairwise(stream))
        recitation = client.predict(2, 10, api_name="/recite")
        assert recitation["original"] == recitation["recited"]
        assert recitation["first_difference"] is None
        with pytest.raises(Exception, match="100,000 characters"):
            client.predict("x" * 100_000, api_name="/generate")
        assert client.predict("<script>", 3, api_name="/generate")["tokens"] == 3
    finally:
        client.close()


def test_a_client_that_cancels_stops_the_model_and_a_full_queue_says_so(app, staged, endless, monkeypatch):
    from gradio_client import Client

    monkeypatch.setattr(app, "MAX_WAITING", 1)
    with launched(app, staged) as url, contextlib.ExitStack() as stack:
        clients, jobs = [Client(url, verbose=False) for _ in "ABCD"], {}
        for client in clients:
            stack.callback(client.close)
        for client, name in zip(clients, "AB", strict=False):
            jobs[name] = client.submit(name, api_name="/generate")
            wait_until(lambda name=name: endless.words.get(name, 0) > 3, "words")
        jobs["C"] = clients[2].submit("C", api_name="/generate")
        wait_until(lambda: jobs["C"].status().queue_size, "a place in the queue")
        with pytest.raises(Exception, match=r"[Qq]ueue is full"):
            clients[3].predict("D", api_name="/generate")
        jobs["A"].cancel()
        assert endless.closed["A"].wait(60)
        computed = endless.words["A"]
        wait_until(lambda: endless.words.get("C"), "the turn of whoever waited")
        assert not endless.closed["B"].is_set()
        for name in "BC":
            jobs[name].cancel()
            assert endless.closed[name].wait(60)
        assert endless.words["A"] == computed
        assert "D" not in endless.words


@needs_browser
def test_in_a_browser(address):
    """Type, generate, see quotations, the second tab, a prompt full of markup, a phone, the dark."""
    with browser() as driver:
        open_page(driver, address)
        driver.execute_script("window.intruder = 0; window.alert = () => { window.intruder += 1 }")
        type_prompt(driver, "First Fisher:\nHaul")
        set_number(driver, "Length", 20)
        set_number(driver, "Temperature", 0)
        click(driver, "#generate")
        wait_for(driver, lambda d: "not a spar." in text_of(d, "#page"), "the continuation")
        wait_for(driver, lambda d: "line 2" in text_of(d, "#page .places"), "where the quotation stands")
        assert "Haul softly there." in text_of(driver, "#page .leaf")
        assert driver.find_elements("css selector", "#page mark")
        wait_for(driver, lambda d: "20 tokens" in text_of(d, "#figures"), "the figures")
        wait_for(driver, lambda d: finished(d, "#stop"), "the end")

        type_prompt(driver, "</div><img src=x onerror=alert(1)><script>alert(2)</script>${alert(3)}{{7*7}}")
        click(driver, "#generate")
        wait_for(driver, lambda d: "<img src=x" in text_of(d, "#page .given"), "the prompt as it was typed")
        wait_for(driver, lambda d: finished(d, "#stop"), "the end")
        assert "${alert(3)}{{7*7}}" in text_of(driver, "#page .given")
        assert not driver.find_elements("css selector", "#page img, #page script")
        assert driver.execute_script("return window.intruder") == 0

        open_tab(driver, "Recite")
        click(driver, "#recite")
        wait_for(driver, lambda d: "word for word" in text_of(d, "#recitation-figures"), "the recitation")
        wait_for(driver, lambda d: finished(d, "#stop-reciting"), "the end of the recitation")
        assert text_of(driver, "#recitation .original .leaf").split()[:2] == ["Second", "Fisher:"]
        assert text_of(driver, "#recitation .recitation .leaf").split()[:2] == ["Second", "Fisher:"]
        before = text_of(driver, "#recitation")
        click(driver, "#random")
        wait_for(driver, lambda d: text_of(d, "#recitation") != before, "another line")
        wait_for(driver, lambda d: finished(d, "#stop-reciting"), "the end of that")
        number = re.search(r"up to line ([\d,]+)", text_of(driver, "#recitation"))[1]
        chosen = driver.find_element("css selector", "#line input").get_attribute("value")
        assert f"line {number}:" in chosen  # it can be repeated, and lengthened
        before, speed = text_of(driver, "#recitation"), text_of(driver, "#recitation-figures")
        click(driver, "#recite")
        # So small a model may be done between two looks; then its speed has changed.
        wait_for(
            driver,
            lambda d: not finished(d, "#stop-reciting") or text_of(d, "#recitation-figures") != speed,
            "that it recites again",
        )
        wait_for(driver, lambda d: finished(d, "#stop-reciting"), "the end of that")
        assert not text_of(driver, "#recitation-note").strip()
        assert text_of(driver, "#recitation") == before

        for width, theme in ((390, "dark"), (360, "light")):
            set_width(driver, width, 800)
            open_page(driver, address, theme)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert ("dark" in driver.execute_script("return document.body.className")) == (theme == "dark")
            sheet = lightness(driver, ".leaf", "backgroundColor")
            assert (sheet < 400) == (theme == "dark")
            assert (lightness(driver, ".leaf") > sheet) == (theme == "dark")
            assert (lightness(driver, "h1") > sheet) == (theme == "dark")
            open_tab(driver, "Recite")  # at 360 points the second tab had gone


@needs_browser
def test_stop_and_start_again_in_a_browser(app, staged, endless, monkeypatch):
    """Stop, or a new text, ends what the same tab writes. A wait in the queue can be cancelled."""
    from gradio_client import Client

    def waiting(driver):
        return visible_text(driver, "#note .progress-text")

    def writes(driver, prompt):
        return text_of(driver, "#page").startswith(f"{prompt}word") and endless.words[prompt] > 5

    monkeypatch.setattr(app, "MAX_WAITING", 1)
    with launched(app, staged) as url, browser() as driver:
        open_page(driver, url)
        type_prompt(driver, "A")
        click(driver, "#generate")
        wait_for(driver, lambda d: writes(d, "A"), "words")
        assert driver.find_element("css selector", "#page .caret").is_displayed()
        click(driver, "#stop")
        assert endless.closed["A"].wait(60)
        wait_for(driver, lambda d: "Stopped." in text_of(d, "#note"), "that it has stopped")
        wait_for(driver, lambda d: finished(d, "#stop"), "the Stop button to be off")
        assert not driver.find_element("css selector", "#page .caret").is_displayed()

        for prompt in "BC":
            type_prompt(driver, prompt)
            click(driver, "#generate")
            wait_for(driver, lambda d, prompt=prompt: writes(d, prompt), "words")
        assert endless.closed["B"].wait(60)
        assert not finished(driver, "#stop") and not text_of(driver, "#note").strip()
        open_tab(driver, "Recite")
        click(driver, "#recite")
        wait_for(driver, lambda d: endless.words.get("ids", 0) > 5, "that it recites")
        assert not endless.closed["C"].is_set()
        open_tab(driver, "Continue")
        click(driver, "#stop")
        assert endless.closed["C"].wait(60)
        wait_for(driver, lambda d: "Stopped." in text_of(d, "#note"), "that it has stopped")
        assert not endless.closed["ids"].is_set()

        first, second = (Client(url, verbose=False) for _ in range(2))
        try:
            job = first.submit("D", api_name="/generate")  # beside the recitation: all places are taken
            wait_until(lambda: endless.words.get("D"), "words")
            type_prompt(driver, "E")
            click(driver, "#generate")
            wait_for(driver, lambda d: "queue: 1/1" in waiting(d), "the queue")
            click(driver, "#stop")
            wait_for(driver, lambda d: "Stopped." in text_of(d, "#note"), "that the wait is over")
            wait_for(driver, lambda d: not waiting(d), "that the place in the queue is gone")
            for _ in range(10):  # Gradio takes the cancelled wait for an error, a moment later
                assert visible_text(driver, "#note") == "Stopped."
                time.sleep(0.2)

            other = second.submit("F", api_name="/generate")
            wait_until(lambda: other.status().queue_size, "a full queue")
            click(driver, "#generate")
            wait_for(driver, lambda d: "currently busy" in page_text(d), "that the queue is full")
            wait_for(driver, lambda d: finished(d, "#stop"), "the Stop button to be off")
            job.cancel()
            wait_until(lambda: endless.words.get("F"), "the turn of whoever waited")
            type_prompt(driver, "G")
            click(driver, "#generate")
            wait_for(driver, lambda d: "queue: 1/1" in waiting(d), "the queue")
            other.cancel()
            wait_for(driver, lambda d: writes(d, "G"), "its turn")
            assert "E" not in endless.words
        finally:
            first.close()
            second.close()
        driver.get("about:blank")  # whoever leaves the page stops the model too
        assert endless.closed["G"].wait(60) and endless.closed["ids"].wait(60)


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if sys.argv[2:] else "build/shots"))
