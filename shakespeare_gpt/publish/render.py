"""A generated text as HTML, its quotations marked: one renderer for the notebook and for the Space."""

from html import escape

from shakespeare_gpt.publish.quotations import QuotationIndex, speaker_names

# For a notebook, which has no stylesheet of ours. Where styles are removed, as on GitHub, <mark> still shows.
STYLE = """<style>
.leaf { font: 15px/1.6 Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; padding: 6px 8px }
.leaf .given { opacity: .6 } .leaf .who { letter-spacing: .04em } .leaf sup { line-height: 0 }
.leaf mark { background: #f6e6b8; color: #2b2521; border-bottom: 2px solid #c79a33; border-radius: 2px }
.places, .places-head { font-size: 12px; line-height: 1.5; opacity: .8; margin: 4px 8px }
</style>"""


def speech_html(text: str, start: int = 0, end: int | None = None) -> str:
    """``text[start:end]``, escaped, with speakers' names in ``<b class="who">``.

    What stands around it in ``text`` decides what is a name: one begins a text or follows a blank line.
    """
    end, body, at = len(text) if end is None else end, "", start
    for first, last in speaker_names(text):
        first, last = max(first, at), min(last, end)
        if first < last:
            body += f'{escape(text[at:first])}<b class="who">{escape(text[first:last])}</b>'
            at = last
    return body + escape(text[at:end])


def quoted_html(
    index: QuotationIndex, generated: str, prompt: str = "", *, title: str = "the text", done: bool = True
) -> str:
    """A prompt and its continuation, with what is quoted in ``<mark>``, numbered, and its places below.

    ``title`` names the learnt text. While a text grows (``done=False``) a caret follows it, and nothing is
    said yet about a lack of quotations. Everything is escaped. The classes are: ``leaf`` for the text, in it
    ``given`` (the prompt), ``who`` and ``caret``; below it ``places-head`` and ``places``.
    """
    whole, at, notes, title = prompt + generated, len(prompt), [], escape(title)
    body = f'<span class="given">{speech_html(whole, 0, at)}</span>'
    for piece, quotation in index.segments(generated):
        inner = speech_html(whole, at, at + len(piece))
        at += len(piece)
        if quotation:
            place = escape(quotation.place)
            notes.append(f"<li><b>{place}</b> <span>· {quotation.words} words</span></li>")
            inner = f'<mark title="{place}">{inner}</mark><sup>{len(notes)}</sup>'
        body += inner
    if notes:
        below = f'<p class="places-head">Word for word in {title}</p><ol class="places">{"".join(notes)}</ol>'
    else:
        none = f"Nothing here is quoted: no run of {index.min_words} words stands in {title}."
        below = f'<p class="places none">{none}</p>' if done else ""
    caret = "" if done else '<span class="caret"></span>'
    return f'<div class="leaf">{body}{caret}</div>{below}'
