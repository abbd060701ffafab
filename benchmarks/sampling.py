"""How fast the model writes: this package's ways beside transformers' generate, on the same weights.

    python -m benchmarks.sampling --weights checkpoints/final.pt
    python -m benchmarks.sampling                       # random weights of the 124M: speed only

Everything is measured in one run, in turns, and the best of the turns counts: on a machine that does other
work too, only such numbers can be compared. Prints a Markdown table, the machine, and the bound that the
memory sets: a token cannot take less time than reading all weights once.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shakespeare_gpt.checkpoint import CheckpointError, load_model, to_openai
from shakespeare_gpt.data import TextError
from shakespeare_gpt.export import ExportError, learnt_text
from shakespeare_gpt.generate import (
    KINDS,
    CachedReader,
    Draft,
    GenerationStats,
    fast_copy,
    generate,
    window_start,
)
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.recite import exact_recall, score, window_starts
from shakespeare_gpt.train import device_name

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
PROMPT_TOKENS = 32
PASSAGES = 3  # are written in each turn


def read_bandwidth(megabytes: int = 512, turns: int = 5) -> float:
    """Bytes a second that all threads together read from memory: the best of some sums over a large array."""
    array = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - began)
    return array.nbytes / min(seconds)


@dataclass
class Row:
    """One way of generating: ``run(prompt)`` gives (tokens, seconds, seconds to the first token)."""

    name: str
    run: Callable[[list[int]], tuple[int, float, float]]
    kind: str
    note: Callable[[], str] = lambda: ""
    speeds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)

    def turn(self, prompts: list[list[int]]) -> None:
        tokens, seconds, firsts = zip(*(self.run(prompt) for prompt in prompts), strict=True)
        self.speeds.append(sum(tokens) / sum(seconds))
        self.firsts.append(max(firsts))


def to_transformers(model: GPT, dtype: torch.dtype):
    """The same model as transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.n_positions,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            bos_token_id=c.vocab_size - 1,
            eos_token_id=None,
            pad_token_id=c.vocab_size - 1,
        )
    )
    theirs.load_state_dict(to_openai(model.state_dict()) | {"lm_head.weight": model.wte.weight})
    return theirs.to(dtype).eval()


def run_uncached(model: GPT, prompt: list[int], count: int):
    """The plainest loop: all tokens through the model again for each new one."""
    ids, first = list(prompt), None
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(count):
            window = ids[window_start(len(ids), model.config.n_positions) :]
            ids.append(int(model(torch.tensor([window]))[0, -1].argmax()))
            first = first or time.perf_counter() - began
    return count, time.perf_counter() - began, first


def run_ours(model: GPT, prompt: list[int], count: int, draft=None, stats=None):
    one = GenerationStats()
    tokens = list(
        generate(model, prompt, max_new_tokens=count, temperature=0, draft=draft, stats=one)
    )
    if stats is not None:
        stats.passes += one.passes
        stats.proposed += one.proposed
        stats.accepted += one.accepted
    return len(tokens), one.seconds, one.first_token_seconds


def run_theirs(model, prompt: list[int], count: int):
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True}
    with torch.inference_mode():
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=1, **options)
        first = time.perf_counter() - began
        began = time.perf_counter()
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        seconds = time.perf_counter() - began
    return out.shape[1] - len(prompt), seconds, first


def compare_greedy(model: GPT, prompts: list[list[int]], draft: Draft, count: int) -> str:
    """Greedy with the draft against greedy without, token for token, on many prompts."""
    same, margins = 0, []
    for prompt in prompts:
        options = {"max_new_tokens": count, "temperature": 0}
        plain = list(generate(model, prompt, **options))
        fast = list(generate(model, prompt, **options, draft=draft))
        if fast == plain:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(plain, fast, strict=True)) if a != b)
        with torch.inference_mode():
            ids = torch.tensor([prompt + plain[:at]])
            best = CachedReader(model).read(ids)[0, -1].float().topk(2).values
        margins.append((best[0] - best[1]).item())
    text = f"{same} of {len(prompts)} prompts give the same {count} tokens"
    if margins:
        text += f"; at the others the two best logits were at most {max(margins):.2g} apart"
    return text


def known_passages(model: GPT, meta: dict, ids: torch.Tensor, count: int):
    """Prompts whose continuation the model knows by heart, and a sentence that says which.

    Of up to 40 places, spread over the text, the first few from which it recites without a slip. Weights
    that always met the text in the same windows are asked from the windows' starts.
    """
    asked, places = PROMPT_TOKENS + count, 40
    if asked > len(ids):
        raise ValueError(
            f"the text has {len(ids)} tokens, too few for {asked}: ask for fewer tokens"
        )
    if meta.get("windows") == "shifted":
        starts = torch.linspace(0, len(ids) - asked, min(places, len(ids) - asked + 1)).long()
    else:
        starts = window_starts(len(ids), model.config.n_positions, asked, places)
    recall = exact_recall(
        model, ids, prompt_tokens=PROMPT_TOKENS, continuation=count, starts=starts.tolist()
    )
    known = starts[recall.matched == count].tolist()
    if not known:
        raise ValueError(f"the weights recite {count} tokens from none of {len(starts)} places")
    prompts = [ids[at : at + PROMPT_TOKENS].tolist() for at in known]
    return prompts, (
        f"{min(PASSAGES, len(known))} of the {len(known)} (of {len(starts)}) places from which it recites "
        "so much without a slip"
    )


def quality(model: GPT, ids: torch.Tensor, tokens: int) -> str:
    part = ids[: tokens or len(ids)]
    scores, recall = score(model, part), exact_recall(model, ids)
    return f"loss {scores.loss:.5f}, accuracy {scores.accuracy:.4%}; {recall}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--weights", help="a checkpoint or .safetensors file; random weights without it"
    )
    parser.add_argument(
        "--text", help="the text that the weights learnt (default: the one they name)"
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="threads (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens in each generation (default 128)"
    )
    parser.add_argument(
        "--turns", type=int, default=3, help="how often each is measured (default 3)"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=0,
        help="compare greedy with and without a draft on so many prompts",
    )
    parser.add_argument(
        "--quality", action="store_true", help="loss and recall of each kind of weights"
    )
    parser.add_argument(
        "--quality-tokens", type=int, default=0, help="on the first so many tokens (0: all)"
    )
    parser.add_argument(
        "--layers", type=int, default=12, help="layers of the model of random weights"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=KINDS,
        help="kinds of weights to measure (default: all; without its instructions bf16 takes hours on a CPU)",
    )
    parser.add_argument(
        "--no-transformers", action="store_true", help="without the rows of transformers"
    )
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        report(args)
    except (CheckpointError, ExportError, TextError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def report(args: argparse.Namespace) -> None:
    count = args.tokens
    if args.weights:
        model, meta = load_model(args.weights)
        ids = learnt_text(meta, args.text).ids
        label = f"{args.weights} (loss {meta.get('loss')})"
        prompts, passages = known_passages(model, meta, ids, count)
    else:
        model = GPT(GPTConfig(n_layer=args.layers)).eval()
        random = torch.Generator().manual_seed(0)
        prompts = torch.randint(
            0, model.config.vocab_size, (max(args.prompts, 1), PROMPT_TOKENS), generator=random
        ).tolist()
        # What a model of random weights would know by heart is what it says anyway.
        ids = torch.tensor(
            [
                t
                for p in prompts
                for t in (*p, *generate(model, p, max_new_tokens=count, temperature=0))
            ]
        )
        label, passages = "random: speed only", "one passage of its own greedy text"
    draft = Draft(ids)

    copies, rows = (
        {},
        [Row("uncached, fp32", lambda prompt: run_uncached(model, prompt, min(16, count)), "fp32")],
    )
    for kind in args.kinds:
        try:
            copies[kind] = fast_copy(model, kind)[0]
        except ValueError as error:
            print(error, file=sys.stderr)
    for kind, copy in copies.items():
        rows.append(
            Row(f"cached, {kind}", lambda prompt, copy=copy: run_ours(copy, prompt, count), kind)
        )
    for kind, copy in copies.items():
        stats = GenerationStats()
        rows.append(
            Row(
                f"speculative, {kind}",
                lambda prompt, copy=copy, stats=stats: run_ours(copy, prompt, count, draft, stats),
                kind,
                lambda stats=stats: f"{stats.acceptance_rate:.0%} accepted",
            )
        )
    versions = f"torch {torch.__version__}"
    if not args.no_transformers:
        import transformers

        transformers.logging.set_verbosity_error()
        versions += f", transformers {transformers.__version__}"
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            if kind not in args.kinds:
                continue
            theirs = to_transformers(model, dtype)
            rows.append(
                Row(
                    f"transformers generate, {kind}",
                    lambda prompt, theirs=theirs: run_theirs(theirs, prompt, count),
                    kind,
                )
            )

    bandwidth = 0.0
    for turn in range(args.turns + 1):  # the first turn only warms up
        bandwidth = max(bandwidth, read_bandwidth())
        for row in rows:
            row.turn(prompts[:PASSAGES])
            print(f"turn {turn}: {row.name}, {row.speeds[-1]:.1f} tokens/s", file=sys.stderr)
            if turn == 0:
                row.speeds.clear()
                row.firsts.clear()

    base = next((max(r.speeds) for r in rows if r.name == "transformers generate, fp32"), None)
    parameters = model.num_parameters()
    print(
        f"Machine: {device_name(model.device)}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{platform.system()}; {versions}\n"
        f"Weights: {label}; {parameters:,} parameters. {count} tokens after a prompt of {PROMPT_TOKENS}, "
        f"greedy, at {passages}; best of {args.turns} turns.\n"
        f"Memory: {bandwidth / 1e9:.1f} GB/s read, which bounds a token-by-token loop.\n"
    )
    print(
        "| way | tokens/s | × transformers fp32 | first token, s | bound of the memory, tokens/s | |"
    )
    print("|---|---:|---:|---:|---:|---|")
    for row in rows:
        speed, bound = max(row.speeds), bandwidth / (parameters * BYTES[row.kind])
        ratio = f"{speed / base:.1f}" if base else ""
        bound = "one pass, many tokens" if row.name.startswith("spec") else f"{bound:.0f}"
        print(
            f"| {row.name} | {speed:.1f} | {ratio} | {min(row.firsts):.3f} | {bound} | {row.note()} |"
        )

    began = time.perf_counter()
    reason = fast_copy(model)[1]
    print(f"\n`fast_copy` ({time.perf_counter() - began:.1f} s): {reason}")
    if args.prompts:
        # At any place of the text, where guesses are wrong as often as right.
        places = torch.randperm(
            len(ids) - PROMPT_TOKENS, generator=torch.Generator().manual_seed(0)
        )
        some_prompts = [
            ids[p : p + PROMPT_TOKENS].tolist() for p in places[: args.prompts].tolist()
        ]
        for kind, copy in copies.items():
            print(
                f"Greedy, {kind}: {compare_greedy(copy, some_prompts, draft, min(50, count))}.",
                flush=True,
            )
    if args.quality:
        for kind, copy in copies.items():
            print(f"Quality, {kind}: {quality(copy, ids, args.quality_tokens)}")


if __name__ == "__main__":
    sys.exit(main())
