"""The text: what input.txt promises, how texts are read, cut, ordered and fetched, and what fails."""

import hashlib
import http.server
import re
import shutil
import socket
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_run import one_line

from shakespeare_gpt import data, notebook
from shakespeare_gpt.data import SHIPPED, TextError, WindowOrder, load_text, tiny_shakespeare, windows
from shakespeare_gpt.presets import TEXT_VARIABLE, get_preset
from shakespeare_gpt.tokenizer import decode, encode

INPUT_TXT = SHIPPED / "input.txt"
INPUT = INPUT_TXT.read_text(encoding="utf-8")
GOOD = b"First Citizen:\nWe are the right bytes.\n" * 4000  # stands for Tiny Shakespeare below


# --- input.txt --------------------------------------------------------------------------------------


def test_input_is_long_enough():
    """A short text is learnt too easily, and the numbers in the README would no longer hold."""
    assert len(INPUT.encode("utf-8")) >= 60_000
    assert len(encode(INPUT)) >= 16_000


def test_input_has_tiny_shakespeares_layout():
    """``NAME:`` on a line, the speech under it, one empty line between: who speaks is read from it."""
    assert INPUT.endswith("\n") and not INPUT.endswith("\n\n")
    assert "\r" not in INPUT and "\t" not in INPUT and "\n\n\n" not in INPUT
    assert all(line == line.strip() for line in INPUT.split("\n"))
    speakers = Counter()
    for speech in INPUT.rstrip("\n").split("\n\n"):
        head, *lines = speech.split("\n")
        assert re.fullmatch(r"[A-Z][A-Za-z' ]*:", head), head
        assert lines, f"{head} says nothing"
        speakers[head] += 1
    assert len(speakers) >= 8 and min(n for _, n in speakers.most_common(8)) >= 10


def test_input_does_not_repeat_itself():
    """A passage copied to make length is learnt for nothing: no 12 tokens occur twice outside a refrain.

    A refrain is a line that comes again whole. The text is cut at such lines, and nothing that is left may
    repeat; and since a copied passage would consist of such lines alone, they may make up very little.
    """
    lines = INPUT.split("\n")
    spoken = Counter(line for line in lines if line and not line.endswith(":"))
    again = {line for line, n in spoken.items() if n > 1}
    share = sum(len(line) * spoken[line] for line in again) / len(INPUT)
    assert share < 0.02
    pieces = [[]]
    for line in lines:
        if line in again:
            pieces.append([])
        else:
            pieces[-1].append(line)
    runs = Counter()
    for piece in pieces:
        ids = encode("\n".join(piece))
        runs.update(tuple(ids[i : i + 12]) for i in range(len(ids) - 11))
    assert [decode(run) for run, n in runs.items() if n > 1] == []


def test_input_is_as_dense_as_shakespeare(tiny_shakespeare_path):
    """Templates and filler compress better than verse; within a tenth of Tiny Shakespeare is verse."""
    ours = INPUT.encode("utf-8")
    theirs = tiny_shakespeare_path.read_bytes()[: len(ours)]
    assert len(zlib.compress(ours, 9)) > 0.9 * len(zlib.compress(theirs, 9))


# --- reading ----------------------------------------------------------------------------------------


def test_load_input():
    """A Text whose ids, text and fingerprint disagree would let weights claim the wrong text."""
    text = load_text("input")
    assert text.name == "input"
    assert text.text == INPUT
    assert text.ids.dtype == torch.int64 and text.ids.device.type == "cpu"
    assert text.ids.tolist() == encode(INPUT)
    assert text.sha256 == hashlib.sha256(INPUT_TXT.read_bytes()).hexdigest()


def test_a_page_is_the_beginning_of_the_play():
    """Cut in the middle of a word, the text and its ids would differ."""
    text = load_text("input-page")
    assert INPUT.startswith(text.text) and text.text.endswith("\n") and text.name == "input-page"
    assert text.ids.tolist() == encode(text.text) and 300 < len(text.ids) < 1000


def test_own_file_with_bom_and_windows_line_ends(tmp_path):
    """Notepad's byte-order mark and line ends would become tokens of their own."""
    path = tmp_path / "märchen.txt"
    path.write_bytes(2 * b"\xef\xbb\xbf" + b"Es war einmal.\r\nUnd dann?\r\n" * 40)
    text = load_text(path, context=32)
    assert text.name == "märchen"
    assert text.text == "Es war einmal.\nUnd dann?\n" * 40
    # Converted twice, and read again from what was written out: one more change would be another text.
    path.write_bytes(b"Es war einmal.\r\r\nUnd dann?\r\r\n" * 40)
    assert load_text(path, context=32).text == text.text


def test_own_file_from_the_home_folder(tmp_path, monkeypatch):
    """A path with ~ in quotes reaches us as it is; the shell did not expand it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "poem.txt").write_text("A line of the poem.\n" * 80, encoding="utf-8")
    assert load_text("~/poem.txt", context=32).name == "poem"


BAD_FILES = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\n\t\n", "is empty"),
    "latin1": ("Fünf Äpfel\n".encode("latin-1") * 99, "not UTF-8"),
    "utf16": ("Five apples\n".encode("utf-16") * 99, "not UTF-8"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "not UTF-8"),
    "endless": (b"a word" + 2_000_000 * b" " + b"x", "blanks in a row"),
    "short": (b"Too short to learn.\n", "give a page or more"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_unusable_files_say_what_to_do(tmp_path, kind):
    """A traceback, or training on nothing, where a reader named the wrong file."""
    content, expected = BAD_FILES[kind]
    path = tmp_path / f"{kind}.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError) as error:
        load_text(path)
    message = one_line(error)
    assert expected in message and path.name in message


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(TextError) as error:
        load_text(tmp_path)
    assert "cannot be read" in one_line(error)


def test_shortest_text_that_fits(tmp_path):
    """Off by one at the limit: context + 1 tokens are one window, context tokens are none."""
    path = tmp_path / "a.txt"
    path.write_text(" a" * 33, encoding="utf-8")
    assert len(load_text(path, context=32).ids) == 33
    with pytest.raises(TextError, match="33"):
        load_text(path, context=33)


# --- windows ----------------------------------------------------------------------------------------


@given(st.integers(1, 70).flatmap(lambda c: st.tuples(st.just(c), st.integers(c + 1, 400))))
def test_windows_meet_each_target_once(sizes):
    """A target lost or counted twice makes the whole-text mean the mean of something else."""
    context, n = sizes
    ids = torch.arange(n) * 3 + 1  # no id equals its own place
    starts, x, y, mask = windows(ids, context)
    assert x.shape == y.shape == mask.shape == (len(starts), context)
    assert torch.equal(y[:, :-1], x[:, 1:])
    assert torch.equal(x[:, 0], ids[starts])
    assert sorted(y[mask].tolist()) == ids[1:].tolist()
    assert mask[:-1].all()
    assert int(starts.min()) == 0 and int(starts.max()) + context + 1 == n
    assert len(starts) == -(-(n - 1) // context)  # no more windows than needed


def test_windows_of_too_short_a_text():
    """A negative start would wrap around and train on the text's end."""
    with pytest.raises(TextError, match="8 tokens"):
        windows(torch.arange(8), 8)


# --- the order of the windows -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed", "sequential"])
@pytest.mark.parametrize("size", [1, 4, 7, 19])
def test_each_window_once_an_epoch(kind, size):
    """A window left out of an epoch is the place where the recitation breaks."""
    order = WindowOrder(300, 16, kind, seed=3)
    assert len(order.starts) == 19
    places = torch.cat([order.batch(step, size) for step in range(8 * 19)]).split(19)
    for number, starts in enumerate(places[: size * 8]):
        assert sorted(starts.tolist()) == sorted(order.starts.tolist()), number
    orders = {tuple(starts.tolist()) for starts in places[:8]}
    assert len(orders) == (1 if kind == "sequential" else 8)
    if kind == "sequential":
        assert places[0].tolist() == order.starts.tolist()


@pytest.mark.parametrize("kind", ["fixed", "moving", "sequential"])
def test_order_is_a_function_of_the_step(kind):
    """An order that depends on what was asked before makes a resumed run differ."""
    forward = WindowOrder(300, 16, kind, seed=3)
    batches = [forward.batch(step, 4) for step in range(60)]
    for step in (59, 0, 30, 29, 28, 5, 4, 10, 9):
        fresh = WindowOrder(300, 16, kind, seed=3)
        assert torch.equal(fresh.batch(step, 4), batches[step])
        assert torch.equal(forward.batch(step, 4), batches[step])
        if step:  # going back after a jump
            assert torch.equal(fresh.batch(step - 1, 4), batches[step - 1])
    if kind != "sequential":
        other = WindowOrder(300, 16, kind, seed=4)
        assert not torch.equal(torch.cat([other.batch(s, 4) for s in range(9)]), torch.cat(batches[:9]))


def test_moving_windows_stand_elsewhere_in_each_epoch_and_leave_little_out():
    """Cut at the same places in every epoch, moving windows would be fixed ones; with gaps, lose tokens."""
    order = WindowOrder(1000, 16, "moving", seed=3)
    assert len(order.starts) == 1000 // 16
    offsets, seen = set(), torch.zeros(1000, dtype=torch.int64)
    for number in range(40):
        starts = order.epoch(number)
        assert torch.equal(starts, torch.cat([order.batch(number * 62 + i, 1) for i in range(62)]))
        targets = (starts[:, None] + torch.arange(1, 17)).flatten() % 1000
        # Only where two stretches of eight windows meet may a token be left out or come twice.
        assert len(set(targets.tolist())) > 0.85 * 1000
        seen[targets] += 1
        offsets |= set((starts % 16).tolist())
    assert offsets == set(range(16))
    assert seen.min() > 20


@pytest.mark.parametrize("tokens, length", [(2000, 64), (19_753, 48)])
def test_moving_windows_meet_nearly_every_token_once_an_epoch(tokens, length):
    """Starts drawn one by one leave out a third of the text, and read another third twice or more."""
    order = WindowOrder(tokens, length, "moving", seed=3)
    total = torch.zeros(tokens, dtype=torch.int64)
    for number in range(20):
        places = order.epoch(number)[:, None] + torch.arange(1, length + 1)
        counts = torch.bincount(places.flatten() % tokens, minlength=tokens)
        assert counts.sum() == tokens // length * length and counts.max() <= 2
        assert (counts == 1).double().mean() > 0.85
        total += counts
        # Each stretch of eight is moved by itself: otherwise a window always has the same neighbours.
        apart = order.epoch(number).sort().values.diff()
        assert (apart == length).sum() >= len(apart) * 7 // 8 - 1 and len(apart.unique()) > 2
    assert total.min() >= 12 and total.max() <= 28  # what one epoch leaves out another meets


@given(st.integers(1, 40), st.integers(1, 1000), st.integers(1, 30), st.sampled_from([0, 2**63 - 1]))
def test_a_batch_may_span_epochs(length, more, size, seed):
    """A short text: a batch holds the end of one epoch and the beginning of the next."""
    order = WindowOrder(length + more, length, "moving", seed)
    n = (length + more) // length
    row = torch.cat([order.epoch(number) for number in range(3 * size // n + 1)])
    assert len(order.epoch(2)) == n
    for number in range(3):
        assert torch.equal(order.batch(number, size), row[number * size :][:size])


# --- Tiny Shakespeare: from a server, a file, the cache ------------------------------------------------


class Server:
    """A local stand-in for the public address; ``replies`` is what it sends, ``asked`` how often."""

    def __init__(self):
        server = self
        self.asked = 0
        self.status, self.body, self.length, self.raw = 200, GOOD, None, None
        self.silent = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked += 1
                if server.silent.is_set():
                    while server.silent.is_set():
                        time.sleep(0.01)
                    return
                if server.raw is not None:
                    self.wfile.write(server.raw)
                    return
                self.send_response(server.status)
                length = len(server.body) if server.length is None else server.length
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(server.body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/input.txt"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    monkeypatch.setattr(data, "TINY_SHAKESPEARE_URL", server.url)
    monkeypatch.setattr(data, "TINY_SHAKESPEARE_SHA256", hashlib.sha256(GOOD).hexdigest())
    yield server
    server.silent.clear()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache" / "hub" / "shakespeare_gpt"


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*")) if folder.exists() else []


def test_download_is_kept_and_used_again(server, cache):
    """Fetching at every start is slow, and fails on the train."""
    text = load_text("tinyshakespeare")
    assert text.name == "tinyshakespeare" and text.text.encode() == GOOD
    assert files_in(cache) == ["tinyshakespeare.txt"]
    load_text("tinyshakespeare")
    assert server.asked == 1


def test_damaged_cache_is_fetched_anew(server, cache):
    """A file in the cache that something else damaged must not be learnt."""
    cache.mkdir(parents=True)
    (cache / "tinyshakespeare.txt").write_bytes(GOOD[:-1])
    assert tiny_shakespeare().read_bytes() == GOOD
    assert files_in(cache) == ["tinyshakespeare.txt"]


FAILURES = {
    "wrong bytes": ({"body": b"<html>Log in to the hotel's network</html>"}, "invalid hash"),
    "truncated": ({"body": GOOD[:70_000], "length": len(GOOD)}, "nothing was kept"),
    "404": ({"status": 404}, "Not Found"),
    "500": ({"status": 500}, "Internal Server Error"),
    "not http": ({"raw": b"220 mail.example ESMTP\r\n"}, "could not be downloaded"),
    "closed": ({"raw": b""}, "could not be downloaded"),
    "chunk cut short": (
        {"raw": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nFirst"},
        "nothing was kept",
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_download_leaves_nothing(server, cache, kind):
    """Half a file in the cache would be learnt by the next run; a traceback says nothing to a reader."""
    reply, expected = FAILURES[kind]
    for name, value in reply.items():
        setattr(server, name, value)
    with pytest.raises(TextError) as error:
        tiny_shakespeare()
    message = one_line(error)
    assert expected in message and data.TINY_SHAKESPEARE_URL in message
    assert files_in(cache) == []


def test_refused_connection(cache, monkeypatch):
    """No network at all is the usual case on a train: say so, and what can be done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TINY_SHAKESPEARE_URL", f"http://127.0.0.1:{port}/input.txt")
    with pytest.raises(TextError) as error:
        tiny_shakespeare()
    assert "refused" in one_line(error)
    assert files_in(cache) == []


@pytest.mark.parametrize("url", ["nonsense://x", "http://", "http://127.0.0.1:port/a b"])
def test_nonsense_address(cache, monkeypatch, url):
    """A mistyped address raises half a dozen kinds of error inside the library."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "TINY_SHAKESPEARE_URL", url)
    with pytest.raises(TextError) as error:
        tiny_shakespeare()
    one_line(error)
    assert files_in(cache) == []


def test_interrupted_download_leaves_nothing(server, cache, monkeypatch):
    """Ctrl-C during the download must not leave its temporary file."""

    class Interrupted(torch.hub.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_shakespeare()
    assert files_in(cache) == []


def test_a_server_that_falls_silent_is_given_up(server, cache, monkeypatch):
    """An unattended run waited for a network that let connections hang."""
    server.silent.set()
    monkeypatch.setattr(data, "TIMEOUT", 0.2)
    before = socket.getdefaulttimeout()
    with pytest.raises(TextError, match="timed out") as error:
        tiny_shakespeare()
    one_line(error)
    assert socket.getdefaulttimeout() == before and files_in(cache) == []


def test_a_file_saved_by_hand_is_taken(server, cache):
    """A machine behind a wall: the message says where to save the text, and there it must be found."""
    server.status = 404
    with pytest.raises(TextError) as error:
        tiny_shakespeare()
    path = Path(re.search(r" as (\S+tinyshakespeare\.txt) yourself", one_line(error))[1])
    path.write_bytes(GOOD)
    server.asked = 0
    assert tiny_shakespeare() == path and server.asked == 0


@pytest.mark.parametrize("where", ["", "below"])
def test_cache_that_cannot_be_written(server, monkeypatch, tmp_path, where):
    """A read-only home must be told apart from a network that fails."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file" / where))
    with pytest.raises(TextError) as error:
        tiny_shakespeare()
    assert "TORCH_HOME" in one_line(error)
    assert server.asked == 0


def test_the_copy_at_hand_is_the_known_text(tiny_shakespeare_path, cache):
    """The fingerprint in the code must be that of the text everybody means."""
    path = cache / "tinyshakespeare.txt"
    path.parent.mkdir(parents=True)
    shutil.copyfile(tiny_shakespeare_path, path)
    text = load_text("tinyshakespeare")
    assert len(text.text) == 1_115_394 and len(text.ids) == 338_025
    assert text.sha256 == data.TINY_SHAKESPEARE_SHA256


# --- what a preset makes of it ----------------------------------------------------------------------


def test_a_failed_download_is_an_error(server, monkeypatch, capsys):
    """An unattended run of ``gpt2`` silently learnt another text."""
    server.status = 404
    with pytest.raises(TextError, match="could not be downloaded"):
        get_preset("gpt2").load_text()
    assert capsys.readouterr().out == ""


def test_only_a_notebook_falls_back_and_says_so(server, monkeypatch, tmp_path, capsys):
    """In a notebook somebody reads the line; but whoever names a text must get that text or an error."""
    server.status = 404
    preset = get_preset("gpt2")
    assert notebook.load_text(preset).name == "input"
    said = capsys.readouterr().out
    assert "could not be downloaded" in said and "Using input.txt" in said
    monkeypatch.setenv(TEXT_VARIABLE, str(tmp_path / "missing.txt"))
    with pytest.raises(TextError, match=r"missing\.txt"):
        notebook.load_text(preset)
    server.status = 200
    monkeypatch.delenv(TEXT_VARIABLE)
    assert notebook.load_text(preset).name == "tinyshakespeare"


def test_preset_takes_the_text_of_the_variable(monkeypatch, tmp_path):
    """A page meant for the preset's own test must not cut the reader's text."""
    path = tmp_path / "mine.txt"
    path.write_text("A line of my own.\n" * 500, encoding="utf-8")
    monkeypatch.setenv(TEXT_VARIABLE, str(path))
    text = get_preset("smoke").load_text()
    assert text.name == "mine" and text.text.count("\n") == 500
    assert get_preset("smoke").load_text("input").name == "input"
