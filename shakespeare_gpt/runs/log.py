"""The log of a run: a head that says what ran, then every tenth step, as a file that a reader can trace."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from shakespeare_gpt.data import PACKAGE
from shakespeare_gpt.memorization import report
from shakespeare_gpt.train import Step, TrainingError


def logged(
    steps: Iterator[Step], path: Path, head: dict[str, Any], checkpoint: Path, ids: Tensor
) -> Iterator[Step]:
    """Pass the steps on and write them to the log ``path``, as ``step | loss | best | lr | tokens/s``.

    A resumed run writes on where the log stopped; one that starts over keeps the earlier log as ``.old.log``.
    A run that cannot go on says why in its last line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened before the first step: a log that cannot be written must not cost a step or a checkpoint.
    with closing(steps), open(path, "a", encoding="utf-8", buffering=1) as file:
        try:
            for count, step in enumerate(steps):
                if step.state is not None:  # else the run had ended before, and this is no log of it
                    if step.step == 1 and file.tell():
                        shutil.copyfile(path, path.with_suffix(".old.log"))
                        file.truncate(0)
                    if count == 0:
                        about = {**head, "precision": step.state.precision}
                        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
                        start = "step | loss | best | lr | tokens/s"
                        file.write(f"{start}\n" if step.step == 1 else f"# resumed at step {step.step}\n")
                    _write(file, step, checkpoint, ids)
                yield step
        except TrainingError as error:
            file.write(f"# {error}\n")
            raise


def _write(file, step: Step, checkpoint: Path, ids: Tensor) -> None:
    history = step.history
    if step.step % 10 == 0 or step.done:
        numbers = f"{step.loss:.6f} | {step.best:.6f} | {step.lr:.3e} | {step.tokens_per_second:.0f}"
        file.write(f"{step.step} | {numbers}\n")
    if step.step == history.first_batch:
        file.write(f"# step {step.step}: the first batch under the target ({step.loss:.6f})\n")
    if step.text_loss is not None:
        file.write(f"# step {step.step}: mean over the whole text {step.text_loss:.6f}\n")
    if step.done:
        file.write(f"# {history.tokens} tokens, {history.seconds:.1f} s\n")
        file.write(f"{end_line(step)}\nSaved checkpoint to {checkpoint.as_posix()}\n")
        file.writelines(f"# {what}: {result}\n" for what, result in report(step.state.model, ids))


def end_line(step: Step) -> str:
    """What the last step of a run reached."""
    return f"Target loss {step.target:g} reached at step {step.step}"


def commit() -> str:
    """The commit of the code that runs, with a + where files differ from it; "unknown" outside git."""
    options = {"cwd": PACKAGE, "capture_output": True, "text": True, "check": True, "timeout": 10}
    try:
        # Not the commit of another repository in which this package happens to be installed.
        subprocess.run(["git", "ls-files", "--error-unmatch", "train.py"], **options)
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **options).stdout
        return name + ("+" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
