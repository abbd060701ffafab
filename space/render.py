"""Answers and recitations as HTML, where all that people type and all that the model writes is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from model_server import TITLES, Answer, ModelServer, Recitation, cpu_cores

from shakespeare_gpt.publish.quotations import quoted_html, quoted_share, speech_html
from shakespeare_gpt.sample import GenerationStats
from shakespeare_gpt.tokenizer import decode


def render_answer(server: ModelServer, answer: Answer) -> str:
    """The prompt and its continuation, with quotations marked and their places below."""
    return quoted_html(server.quotations, answer.text, answer.prompt, title=server.title, done=answer.done)


def render_recitation(recitation: Recitation) -> str:
    """The original and the recitation side by side, with the first difference marked in both."""
    n = recitation.matching
    # A line that begins before the prompt does is no speaker's name, so something stands before it.
    heard = "…\n" * recitation.mid_line + recitation.prompt

    def side(ids: list[int], heading: str, kind: str) -> str:
        agreed, rest = decode(ids[:n]), ids[n:]
        text = speech_html(heard + agreed, len(heard + agreed) - len(agreed.lstrip("\n")))
        if recitation.first_difference is not None and rest:
            word, rest = decode(rest[:1]), rest[1:]
            # White space alone would be an invisible mark.
            shown = word if word.strip() else word.replace("\n", "↵\n").replace(" ", "␣")
            text += f'<mark class="wrong">{escape(shown)}</mark>'
        text += f'<span class="after">{escape(decode(rest))}</span>'
        return f'<section class="{kind}"><h3>{heading}</h3><div class="leaf">{text}</div></section>'

    prompt = "…" * recitation.mid_line + speech_html(heard, 2 * recitation.mid_line)
    return (
        f'<p class="places-head">The model reads the text up to line {recitation.line:,}</p>'
        f'<div class="leaf heard"><span class="given">{prompt}</span></div><div class="versus">'
        + side(recitation.original, "The original", "original")
        + side(recitation.recited, "The model, from memory", "recitation")
        + "</div>"
    )


def figures(stats: GenerationStats, *entries: tuple[str, str]) -> str:
    """Numbers in a row, each with what it is, and the speed at their end."""
    entries += ((f"{stats.tokens_per_second:.0f}", "tokens/s"),)
    if stats.proposed:
        entries += ((f"{stats.acceptance_rate:.0%}", "of drafted tokens accepted"),)
    spans = (f"<span><b>{escape(value)}</b> {escape(what)}</span>" for value, what in entries)
    return f'<div class="figures">{"".join(spans)}</div>'


def answer_figures(server: ModelServer, answer: Answer) -> str:
    tokens = (f"{answer.stats.tokens}", "token" if answer.stats.tokens == 1 else "tokens")
    quoted = (f"{quoted_share(server.quotations, answer.text):.0%}", "quoted")
    return figures(answer.stats, tokens, (f"{answer.seed}", "seed"), quoted)


def recitation_figures(recitation: Recitation) -> str:
    n = recitation.matching
    entries = [(f"{n} of {len(recitation.original)}", "tokens word for word")]
    if recitation.first_difference is not None:
        entries.append((f"token {n + 1}", "is the first that differs"))
    return figures(recitation.stats, *entries)


def notice(text: str, kind: str = "") -> str:
    return f'<p class="notice {kind}" role="status">{escape(text)}</p>'


def masthead(server: ModelServer | None) -> str:
    line = "A GPT-2 that has learnt a play by heart."
    if server is not None:
        what = TITLES.get(server.text.sha256, ("", ""))[1]
        line = f"A GPT-2 that has learnt {escape(server.title)}{f', {what},' if what else ''} by heart. "
        line += "Give it a beginning. <mark>What it quotes is marked</mark>, what it invents is not."
    return f'<header class="masthead"><h1>Shakespeare GPT</h1><p>{line}</p></header>'


def about(server: ModelServer) -> str:
    """What this model is, from the metadata of its weights."""
    meta, config, cores = server.meta, server.model.config, cpu_cores()

    def number(name: str, form: str, scale: float = 1) -> str:
        value = meta.get(name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        return form.format(value if scale == 1 else value * scale) if known else ""

    sizes = f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels"
    forms = {"steps": "{:,} steps", "tokens": "{:,} tokens", "epochs": "{:.1f} epochs"}
    rows = {
        "Text": f"{server.title}: {len(server.text.ids):,} tokens",
        "Parameters": number("parameters", "{:.1f} million", 1e-6),
        "Architecture": f"GPT-2, {sizes}, a context of {config.n_positions} tokens",
        "Trained for": ", ".join(filter(None, (number(name, form) for name, form in forms.items()))),
        "Loss": number("loss", "{:.4f} nats per token, over the whole text"),
        "Trained on": meta.get("device") if isinstance(meta.get("device"), str) else "",
        "Note": "Exported before its training was finished." if meta.get("finished") is False else "",
        "Running on": f"{cores} CPU core{'s' * (cores != 1)}. {server.weights}",
    }
    items = (f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
    return f'<div class="about"><h2>About this model</h2><dl>{"".join(items)}</dl></div>'


def describe_answer(server: ModelServer, answer: Answer) -> dict[str, Any]:
    """An Answer in plain values."""
    stats = answer.stats
    return {
        "text": answer.text,
        "seed": answer.seed,
        "done": answer.done,
        "tokens": stats.tokens,
        "tokens_per_second": round(stats.tokens_per_second, 1),
        "acceptance_rate": round(stats.acceptance_rate, 3),
        "quoted": round(quoted_share(server.quotations, answer.text), 3),
        "quotations": [
            {"start": q.start, "end": q.end, "speaker": q.speaker, "line": q.line, "words": q.words}
            for q in server.quotations.find(answer.text)
        ],
    }


def describe_recitation(recitation: Recitation) -> dict[str, Any]:
    """A Recitation in plain values."""
    return {
        "line": recitation.line,
        "prompt": recitation.prompt,
        "original": decode(recitation.original),
        "recited": decode(recitation.recited),
        "matching": recitation.matching,
        "of": len(recitation.original),
        "first_difference": recitation.first_difference,
        "done": recitation.done,
        "tokens_per_second": round(recitation.stats.tokens_per_second, 1),
    }
