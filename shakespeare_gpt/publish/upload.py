"""A staged Space sent to Hugging Face."""

from __future__ import annotations

import re
from os import PathLike

from huggingface_hub import HfApi, errors

from shakespeare_gpt.publish.space import SPACE_FILES, ExportError, list_folder

LOG_IN = "make a token that may write at https://huggingface.co/settings/tokens, then: hf auth login"
NO_ROOM = "without a paid plan an account of 30 days may have two such Spaces: delete one, or run app.py here"
REMEDIES = {401: LOG_IN, 402: NO_ROOM, 403: LOG_IN}  # by the status of Hugging Face's answer


def check_name(name: str) -> None:
    """Raise ExportError for what cannot be a Space's name: letters and digits with single . or - between."""
    if not re.fullmatch(r"\w+([.-]\w+)*/\w+([.-]\w+)*", name):
        raise ExportError(f"{name!r} is no name of a Space: it reads USER/NAME, such as ada/my-space.")


def push(folder: str | PathLike, name: str, *, private: bool = False, dry_run: bool = False) -> str:
    """Upload what ``list_folder`` lists to the Space ``USER/NAME``, made if it is new. Returns its address.

    With ``dry_run`` nothing is sent and no network is needed. A ``private`` upload to a public Space is
    refused before anything is sent. Raises ExportError.
    """
    check_name(name)
    files, url = list_folder(folder), f"https://huggingface.co/spaces/{name}"
    if missing := {*SPACE_FILES, "model.safetensors", "text.txt"} - set(files):
        raise ExportError(f"{folder} is no staged Space ({min(missing)} is missing): stage one first.")
    if dry_run:
        return url
    api = HfApi()
    try:
        _find_or_create(api, name, private)
        api.upload_folder(folder_path=folder, repo_id=name, repo_type="space", allow_patterns=list(files))
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # the HTTP client's, hf_xet's
        status = getattr(getattr(error, "response", None), "status_code", "no answer")
        remedy = REMEDIES.get(status, "try again, or upload by hand (notebook 5)")
        said = " ".join((getattr(error, "server_message", None) or str(error)).split())
        raise ExportError(f"Hugging Face did not take {name} ({status}: {said}): {remedy}") from None
    return url


def _find_or_create(api: HfApi, name: str, private: bool) -> None:
    """Make the Space if it is new, on a plain CPU or else on ZeroGPU. ExportError if it should be private.

    Since July 2026 a free account gets status 402 for a Gradio Space on a CPU, but may have two on ZeroGPU
    (https://huggingface.co/docs/hub/spaces-zerogpu), whose CPU is enough for us.
    """
    if api.repo_exists(name, repo_type="space"):
        if private and not api.space_info(name).private:
            raise ExportError(f"{name} is public: make it private there, or choose another name.")
        return
    options = {"repo_type": "space", "space_sdk": "gradio", "private": private}
    try:
        api.create_repo(name, **options)
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 402:
            raise
        api.create_repo(name, **options, space_hardware="zero-a10g")
