"""The page on which visitors talk to the model, and its API. Start it with: python app.py

Beside this file lie model.safetensors, text.txt and the package shakespeare_gpt; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not (HERE / "shakespeare_gpt").is_dir():  # not a staged Space: the package is one folder up
    sys.path.insert(1, str(HERE.parent))

try:  # on Hugging Face only; it must come before PyTorch, see `gpu` at the end
    import spaces
except ImportError:
    spaces = None
import gradio as gr  # noqa: E402
import render  # noqa: E402
from model_server import MAX_LENGTH, MAX_RECITATION, MAX_TEMPERATURE, MAX_TOP_K, ModelServer  # noqa: E402
from theme import Folio  # noqa: E402

from shakespeare_gpt import ShakespeareGPTError  # noqa: E402

CONCURRENT = 2  # answers written at the same time, taking turns; one alone would leave gaps
MAX_WAITING = 16  # requests in the queue; whoever comes after them is told that it is full
MODEL = {"concurrency_id": "model", "concurrency_limit": CONCURRENT}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOOK = {"theme": Folio(), "css_paths": HERE / "style.css", "footer_links": ["api"], "run_history": False}


def build(folder: str | os.PathLike = HERE) -> gr.Blocks:
    """The app of a staged folder. Without good weights it is a page that says what is missing."""
    server, problem = None, ""
    try:
        server = ModelServer.load(Path(folder))
    except (ShakespeareGPTError, ValueError) as error:
        problem = f"The model could not be loaded. {error}".replace(str(Path(folder)) + os.sep, "")
    with gr.Blocks(title="Shakespeare GPT", analytics_enabled=False) as demo:
        gr.HTML(render.masthead(server))
        if server is None:
            remedy = "To make a complete Space, run: python -m shakespeare_gpt export --stage build/space"
            gr.HTML(render.notice(problem, "bad") + render.notice(remedy), elem_id="problem")
        else:
            with gr.Tab("Continue a text", id="continue"):
                generate_tab(server)
            with gr.Tab("Recite from memory", id="recite"):
                recite_tab(server)
        endpoints(server, problem)
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=CONCURRENT, api_open=False)
    return demo


@dataclass
class TabState:
    """A visitor's tab, one for each browser session."""

    newest: int = 0  # the number of its newest request; older ones end


def begin(tab: TabState) -> tuple:
    """A request begins, or waits in the queue: an older one ends, and Stop can be pressed."""
    tab.newest += 1
    return tab.newest, "", gr.Button(interactive=True)


def stop(tab: TabState) -> tuple:
    """Gradio cancels the request; this also ends one that it has lost sight of."""
    tab.newest += 1
    return render.notice("Stopped."), gr.Button(interactive=False)


def grow(tab: TabState, request: int, answers: Iterator, show: Callable) -> Iterator[tuple]:
    """What changes on the page while a text grows: (page, figures, note, Stop button).

    ``show`` turns an answer into page and figures. Gradio closes this generator, and so the model's, when the
    request is cancelled or the visitor leaves.
    """
    note = gr.skip()
    yield (note,) * 4  # a request that ends without any change would empty the page
    with contextlib.closing(answers):
        try:
            for answer in answers if request == tab.newest else ():
                if request != tab.newest:
                    return
                yield *show(answer), gr.skip(), gr.skip()
        except ValueError as error:
            note = render.notice(str(error), "bad")
        except Exception:
            traceback.print_exc()
            note = render.notice("Something went wrong on the server. Try again.", "bad")
    if request == tab.newest:
        yield gr.skip(), gr.skip(), note, gr.Button(interactive=False)


def connect(starts: list, answer: Callable, show: Callable, inputs: list, outputs: list) -> None:
    """Let an answer follow each of ``starts``, and the Stop button cancel it."""
    tab, (_, _, note, halt) = inputs[0], outputs

    def write(tab, request, *parameters):
        yield from grow(tab, request, answer(*parameters), show)

    options = {"trigger_mode": "multiple", "api_visibility": "private", **MODEL}
    options |= {"show_progress": "minimal", "show_progress_on": note}  # the place in the queue
    runs = [start.then(write, inputs, outputs, **options) for start in starts]
    for run in runs:  # the queue was full
        run.failure(lambda: gr.Button(interactive=False), None, halt, **AT_ONCE)
    halt.click(stop, tab, [note, halt], cancels=runs, **AT_ONCE)


def spread(items: list, count: int) -> list:
    """At most ``count`` of the items, evenly spaced."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def generate_tab(server: ModelServer) -> None:
    long = [speech for speech in server.speeches() if len(speech[2].split()) > 5] or server.speeches()
    beginnings = [
        (f"{speaker}:\n" if speaker else "") + " ".join(words.split()[:5])
        for speaker, _, words in spread(long, 5)
    ]
    labels = [text.replace("\n", " ") + " …" for text in beginnings]
    hint = "A speaker's name, a line, half a line"
    empty = "The continuation appears here, word by word."
    tab, request = gr.State(TabState()), gr.Number(0, visible="hidden")
    with gr.Row():
        with gr.Column(scale=7, min_width=320):
            options = {"lines": 3, "max_lines": 8, "placeholder": hint, "elem_id": "prompt"}
            prompt = gr.Textbox(beginnings[0], label="Your beginning", **options)
            options = {"label": "From the text", "example_labels": labels, "api_visibility": "private"}
            gr.Examples([[text] for text in beginnings], prompt, **options)
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
                halt = gr.Button("Stop", interactive=False, elem_id="stop", scale=1, min_width=80)
            note = gr.HTML(elem_id="note", elem_classes="note")
            page = gr.HTML(f'<div class="leaf empty">{empty}</div>', elem_id="page")
            figures = gr.HTML(elem_id="figures", elem_classes="numbers")
        with gr.Column(scale=4, min_width=280):
            with gr.Group():
                info = "in tokens, each about ¾ of a word"
                length = gr.Slider(1, MAX_LENGTH, 160, step=1, label="Length", info=info)
                info = "0: always the most probable token"
                temperature = gr.Slider(0, MAX_TEMPERATURE, 0.8, step=0.05, label="Temperature", info=info)
                info = "only the k most probable tokens; 0: all"
                top_k = gr.Slider(0, MAX_TOP_K, 0, step=1, label="Top-k", info=info)
                info = "only the most probable tokens that sum to p; 1: all"
                top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p", info=info)
                info, hint = "the same seed gives the same text", "a new one each time"
                seed = gr.Textbox(label="Seed", info=info, placeholder=hint, max_lines=1, elem_id="seed")
            gr.HTML(render.about(server), elem_id="about")

    def show(answer):
        return render.render_answer(server, answer), render.answer_figures(server, answer)

    start = gr.on([go.click, prompt.submit], begin, tab, [request, note, halt], **AT_ONCE)
    inputs = [tab, request, prompt, length, temperature, top_k, top_p, seed]
    connect([start], server.answer, show, inputs, [page, figures, note, halt])


def recite_tab(server: ModelServer) -> None:
    def choice(speaker: str, line: int, words: str) -> tuple[str, int]:
        words = words if len(words) <= 60 else words[:60].rpartition(" ")[0] + " …"
        return f"{speaker + ', ' if speaker else ''}line {line:,}: {words}", line

    speeches = server.speeches()
    choices = [choice(*speech) for speech in spread(speeches, 24)]
    empty = "The model reads a few words of the text, then recites. The original is shown beside it."
    tab, request = gr.State(TabState()), gr.Number(0, visible="hidden")
    with gr.Row(equal_height=True):
        line = gr.Dropdown(choices, label="Continue after", elem_id="line", scale=5, min_width=280)
        tokens = gr.Slider(10, MAX_RECITATION, 80, step=5, label="Length", info="in tokens", scale=3)
    with gr.Row():
        go = gr.Button("Recite", variant="primary", elem_id="recite", scale=3, min_width=90)
        draw = gr.Button("Random line", elem_id="random", scale=2, min_width=100)
        halt = gr.Button("Stop", interactive=False, elem_id="stop-reciting", scale=1, min_width=60)
    note = gr.HTML(elem_id="recitation-note", elem_classes="note")
    figures = gr.HTML(elem_id="recitation-figures", elem_classes="numbers")
    page = gr.HTML(f'<div class="leaf empty">{empty}</div>', elem_id="recitation")

    def begin_at_random(present: int, tab: TabState) -> tuple:
        others = [speech for speech in speeches if speech[1] != present] or speeches
        drawn = choice(*random.SystemRandom().choice(others))
        listed = sorted({*choices, drawn}, key=lambda entry: entry[1])
        return gr.Dropdown(listed, value=drawn[1]), *begin(tab)

    def show(recitation):
        return render.render_recitation(recitation), render.recitation_figures(recitation)

    begun = [request, note, halt]
    starts = [go.click(begin, tab, begun, **AT_ONCE)]
    starts += [draw.click(begin_at_random, [line, tab], [line, *begun], **AT_ONCE)]
    connect(starts, server.recite, show, [tab, request, line, tokens], [page, figures, note, halt])


def endpoints(server: ModelServer | None, problem: str) -> None:
    """What ``gradio_client`` calls: plain values in, plain values out, streamed as they grow."""

    def stream(answer: Callable[[], Iterator], describe: Callable[..., dict]) -> Iterator[dict]:
        if server is None:
            raise gr.Error(problem, print_exception=False)
        with contextlib.closing(answer()) as answers:
            try:
                yield from map(describe, answers)
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None

    def api_generate(
        prompt: str = "",
        length: int = 160,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> dict:
        """Continue a prompt. Each value holds the text so far, the last one all of it.

        A number outside its range (see the sliders of the page) counts as the nearest one inside.

        Keys: text, seed, done, tokens, tokens_per_second, acceptance_rate (of drafted tokens), quoted (a
        share), and quotations: of each, start and end in the text, how many words, and the speaker and line
        where it stands in what the model learnt.
        """
        parameters = prompt, length, temperature, top_k, top_p, seed
        yield from stream(lambda: server.answer(*parameters), lambda a: render.describe_answer(server, a))

    def api_recite(line: int = 1, tokens: int = 80) -> dict:
        """Recite what follows a line of the text, greedily, and compare. The last value is complete.

        A number out of range counts as the nearest in range; "line" says which.

        Keys: line, prompt, original, recited, matching (tokens before the first difference), of (all tokens),
        first_difference (a token's index or null), done, tokens_per_second.
        """
        yield from stream(lambda: server.recite(line, tokens), render.describe_recitation)

    gr.api(api_generate, api_name="generate", **MODEL)
    gr.api(api_recite, api_name="recite", **MODEL)


if spaces is not None:

    @spaces.GPU
    def gpu() -> None:
        """Never called, but ZeroGPU, a free account's only kind of Space, starts no program without it.

        The model is small enough for the CPU there, so no visitor's share of GPU time is spent.
        """


demo = build()

if __name__ == "__main__":
    demo.launch(**LOOK, ssr_mode=False)
