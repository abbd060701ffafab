"""How fast the model writes on a CPU: this package's ways beside transformers' generate.

    python -m benchmarks.sampling --weights checkpoints/mini-input-0eacf58f.pt
    python -m benchmarks.sampling                # random weights: speed only; --quick: less than two minutes

All ways have the same weights and take turns in one run. The best turn counts, so that other work on the
machine disturbs little. Memory sets a bound: a token takes at least the time to read all weights once.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from shakespeare_gpt import ShakespeareGPTError
from shakespeare_gpt.memorization import exact_recall
from shakespeare_gpt.model import GPT
from shakespeare_gpt.presets import get_preset
from shakespeare_gpt.publish.export import learnt_text
from shakespeare_gpt.runs.weights import load_model, to_openai
from shakespeare_gpt.sample import CachedReader, GenerationStats, generate, window_start
from shakespeare_gpt.speed.devices import best_precision, device_name
from shakespeare_gpt.speed.ngram_draft import NgramDraft
from shakespeare_gpt.speed.sampling_weights import for_sampling

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
PROMPT_TOKENS = 32
PASSAGES = 3  # are written in each turn


@dataclass
class Way:
    """One way of generating. ``run(prompt)`` returns tokens, seconds and seconds to the first token."""

    name: str
    run: Callable[[list[int]], tuple[int, float, float]]
    kind: str
    stats: GenerationStats | None = None
    speeds: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)

    def turn(self, prompts: list[list[int]]) -> None:
        tokens, seconds, firsts = zip(*(self.run(prompt) for prompt in prompts), strict=True)
        self.speeds.append(sum(tokens) / sum(seconds))
        self.firsts.append(max(firsts))


def uncached(model: GPT, prompt: list[int], count: int) -> tuple[int, float, float]:
    """The plainest loop: all tokens through the model again for each new one."""
    ids, times = list(prompt), [time.perf_counter()]
    with torch.inference_mode():
        for _ in range(count):
            window = ids[window_start(len(ids), model.config.n_positions) :]
            ids.append(int(model(torch.tensor([window]))[0, -1].argmax()))
            times.append(time.perf_counter())
    return count, times[-1] - times[0], times[1] - times[0]


def cached(model: GPT, prompt, count: int, draft=None, stats=None) -> tuple[int, float, float]:
    """This package's ``generate``, greedy."""
    stats = stats or GenerationStats()
    before = stats.seconds
    options = {"max_new_tokens": count, "temperature": 0, "draft": draft, "stats": stats}
    tokens = generate(model, prompt, **options)
    next(tokens)
    first = stats.seconds - before
    return 1 + sum(1 for _ in tokens), stats.seconds - before, first


def transformers_model(model: GPT, dtype: torch.dtype):
    """The same weights as transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    ends = {"bos_token_id": c.vocab_size - 1, "eos_token_id": None, "pad_token_id": c.vocab_size - 1}
    theirs = GPT2LMHeadModel(GPT2Config(**asdict(c), **ends))
    theirs.load_state_dict(to_openai(model.state_dict()) | {"lm_head.weight": model.wte.weight})
    return theirs.to(dtype).eval()


def transformers_generate(model, prompt: list[int], count: int) -> tuple[int, float, float]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True}
    times = [time.perf_counter()]
    with torch.inference_mode():
        for n in (1, count):
            out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, **options)
            times.append(time.perf_counter())
    return out.shape[1] - len(prompt), times[2] - times[1], times[1] - times[0]


def ways(model: GPT, kinds: list[str], count: int, draft: NgramDraft, compare: bool) -> list[Way]:
    """All ways to be compared; prints what this machine cannot do."""
    found = [Way("uncached, fp32", lambda prompt: uncached(model, prompt, min(16, count)), "fp32")]
    copies = {}
    for kind in kinds:
        try:
            copies[kind] = for_sampling(model, kind)[0]
        except (RuntimeError, AttributeError):
            if kind != "fp16":
                raise
            say(f"this PyTorch has no {kind} weights for this CPU")
    for kind, copy in copies.items():
        found.append(Way(f"cached, {kind}", lambda prompt, m=copy: cached(m, prompt, count), kind))
    for kind, copy in copies.items():
        stats = GenerationStats()
        run = lambda prompt, m=copy, s=stats: cached(m, prompt, count, draft, s)  # noqa: E731
        found.append(Way(f"cached with a draft, {kind}", run, kind, stats))
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if compare and kind in copies:
            theirs = transformers_model(model, dtype)
            run = lambda prompt, m=theirs: transformers_generate(m, prompt, count)  # noqa: E731
            found.append(Way(f"transformers' generate, {kind}", run, kind))
    return found


def known_passages(model: GPT, meta: dict, ids: torch.Tensor, count: int) -> tuple[list[list[int]], str]:
    """Prompts whose continuation the model knows by heart, and a sentence that says which.

    Of up to 40 places, spread over the text, those from which it recites without a slip. Weights that always
    met the text in the same windows are asked from the windows' starts.
    """
    asked, places = PROMPT_TOKENS + count, 40
    if asked > len(ids):
        raise ValueError(f"the text has {len(ids)} tokens, too few for {asked}: ask for fewer tokens")
    starts = torch.arange(len(ids) - asked + 1)
    if meta.get("windows") != "moving":
        starts = starts[:: model.config.n_positions]
    starts = starts[torch.linspace(0, len(starts) - 1, min(places, len(starts))).long()]
    options = {"prompt_tokens": PROMPT_TOKENS, "continuation": count, "starts": starts.tolist()}
    known = starts[exact_recall(model, ids, **options).matched == count].tolist()
    if not known:
        raise ValueError(f"the weights recite {count} tokens from none of {len(starts)} places")
    passages = f"{min(PASSAGES, len(known))} of the {len(known)} places (of {len(starts)})"
    return [ids[at : at + PROMPT_TOKENS].tolist() for at in known], f"{passages} where it makes no slip"


def compare_greedy(model: GPT, prompts: list[list[int]], draft: NgramDraft, count: int) -> str:
    """Greedy with the draft against greedy without, token for token, on many prompts."""
    same, margins = 0, []
    options = {"max_new_tokens": count, "temperature": 0}
    for prompt in prompts:
        plain = list(generate(model, prompt, **options))
        drafted = list(generate(model, prompt, **options, draft=draft))
        if drafted == plain:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b)
        with torch.inference_mode():
            ids = torch.tensor([prompt + plain[:at]])
            best = CachedReader(model).read(ids)[0, -1].float().topk(2).values
        margins.append((best[0] - best[1]).item())
    text = f"{same} of {len(prompts)} prompts give the same {count} tokens with the draft and without"
    if same < len(prompts):
        text += f"; at the others the two best logits were at most {max(margins):.2g} apart"
    return text


def read_bandwidth(megabytes: int = 512, turns: int = 5) -> float:
    """Bytes a second that all threads together read from memory: the best of some sums over a large array."""
    array = torch.ones(megabytes * 2**18)
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - began)
    return array.nbytes / min(seconds)


def print_table(found: list[Way], parameters: int, bandwidth: float) -> None:
    """What was measured so far."""
    if not (measured := [way for way in found if way.speeds]):
        return
    base = next((max(w.speeds) for w in measured if w.name == "transformers' generate, fp32"), None)
    print("| way | tokens/s | × transformers fp32 | first token, s | bound of memory, tokens/s | drafted |")
    print("|---|---:|---:|---:|---:|---|")
    for way in measured:
        speed, bound = max(way.speeds), f"{bandwidth / (parameters * BYTES[way.kind]):.0f}"
        cells = [way.name, f"{speed:.1f}", f"{speed / base:.1f}" if base else "", f"{min(way.firsts):.3f}"]
        cells += ["", f"{way.stats.acceptance_rate:.0%} accepted"] if way.stats else [bound, ""]
        print("| " + " | ".join(cells) + " |", flush=True)


def say(line: str) -> None:
    """What goes on, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="a .pt or .safetensors file; random weights without it")
    parser.add_argument("--text", help="the text that the weights learnt (default: the one they name)")
    parser.add_argument("--preset", default="gpt2", help="of the random weights (default: gpt2)")
    parser.add_argument("--tokens", type=int, default=128, help="in each generation (default: 128)")
    parser.add_argument("--turns", type=int, default=3, help="how often each is measured (default: 3)")
    parser.add_argument("--prompts", type=int, default=0, help="compare greedy with and without a draft")
    fast = ["fp32", "fp16"] + ["bf16"] * (best_precision(torch.device("cpu"))[0] == "bf16")
    parser.add_argument("--kinds", nargs="+", choices=BYTES, default=fast, help="of weights")
    parser.add_argument("--no-transformers", action="store_true", help="without transformers")
    parser.add_argument("--quick", action="store_true", help="one turn of 32 tokens: less than two minutes")
    args = parser.parse_args(argv)
    if args.quick:
        args.tokens, args.turns = 32, 1
    try:
        report(args)
    except (ShakespeareGPTError, ValueError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def report(args: argparse.Namespace) -> None:
    count = args.tokens
    if args.weights:
        say("looking for passages that the weights know")
        model, meta = load_model(args.weights)
        ids = learnt_text(meta, args.text).ids
        label = f"{args.weights} (loss {meta.get('loss')})"
        prompts, passages = known_passages(model, meta, ids, count)
    else:
        say("drawing random weights")
        model, random = GPT(get_preset(args.preset).model).eval(), torch.Generator().manual_seed(0)
        shape = (max(args.prompts, 1), PROMPT_TOKENS)
        prompts = torch.randint(0, model.config.vocab_size, shape, generator=random).tolist()
        # What a model of random weights would know by heart is what it says anyway.
        options = {"max_new_tokens": count, "temperature": 0}
        ids = torch.tensor([token for p in prompts for token in (*p, *generate(model, p, **options))])
        label, passages = f"{args.preset}, random", "one passage of its own greedy text"
    draft, versions = NgramDraft(ids), f"torch {torch.__version__}"
    if not args.no_transformers:
        if PROMPT_TOKENS + count > model.config.n_positions:  # it has no sliding window
            raise ValueError(f"transformers writes at most {model.config.n_positions} tokens: ask for fewer")
        import transformers

        transformers.logging.set_verbosity_error()
        versions += f", transformers {transformers.__version__}"
    parameters, bandwidth = model.num_parameters(), read_bandwidth()
    print(
        f"Machine: {device_name(model.device)}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{platform.system()}; {versions}\n"
        f"Weights: {label}; {parameters:,} parameters. {count} tokens after a prompt of {PROMPT_TOKENS}, "
        f"greedy, at {passages}; best of {args.turns} turns.\n"
        f"Memory: {bandwidth / 1e9:.1f} GB/s read, which bounds a token-by-token loop.\n",
        flush=True,
    )
    found = ways(model, args.kinds, count, draft, not args.no_transformers)
    try:
        for way in found:  # once to warm up
            say(f"warming up: {way.name}")
            way.run(prompts[0])
        for turn in range(args.turns):
            for way in found:
                way.turn(prompts[:PASSAGES])
                say(f"turn {turn + 1} of {args.turns}: {way.name}, {way.speeds[-1]:.1f} tokens/s")
    finally:
        print_table(found, parameters, bandwidth)
    print(f"\n{for_sampling(model)[1]}")
    if args.prompts:
        # At any place of the text, where guesses are wrong as often as right.
        places = torch.randperm(len(ids) - PROMPT_TOKENS, generator=torch.Generator().manual_seed(0))
        anywhere = [ids[p : p + PROMPT_TOKENS].tolist() for p in places[: args.prompts].tolist()]
        for kind in dict.fromkeys(way.kind for way in found):
            copy = for_sampling(model, kind)[0]
            print(f"{kind}: {compare_greedy(copy, anywhere, draft, min(50, count))}.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
