"""A staged Space sent to Hugging Face."""

from __future__ import annotations

import contextlib
import glob
from os import PathLike

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import get_token, validate_repo_id

from shakespeare_gpt.publish.space import SPACE_FILES, ExportError, list_folder

LOG_IN = "make one that may write at https://huggingface.co/settings/tokens, then: hf auth login"
REMEDIES = {  # by the status of Hugging Face's answer
    401: f"it does not take the token; {LOG_IN}",
    402: "without a paid plan an account older than 30 days may have two Gradio Spaces, on ZeroGPU; delete "
    "one, or show yours from here: python app.py",
    403: f"it does not take the token; {LOG_IN}",
}
UNREACHABLE = (errors.HTTPError, ConnectionError, TimeoutError)  # the HTTP client's, hf_xet's


def check_name(name: str) -> None:
    """Raise ExportError for what cannot be a Space's name, by Hugging Face's own rules."""
    with contextlib.suppress(errors.HFValidationError):
        validate_repo_id(name)
        if "/" in name:
            return
    raise ExportError(f"{name!r} is no name of a Space: it reads USER/NAME, such as ada/my-space.")


def push(folder: str | PathLike, name: str, *, private: bool = False, dry_run: bool = False) -> str:
    """Upload what ``list_folder`` lists to the Space ``USER/NAME``, made if it is new. Returns its address.

    With ``dry_run`` nothing is sent and no network is needed. A ``private`` upload to a public Space is
    refused before anything is sent. Raises ExportError.
    """
    check_name(name)
    files, url = list_folder(folder), f"https://huggingface.co/spaces/{name}"
    for file in (*SPACE_FILES, "model.safetensors", "text.txt"):
        if file not in files:
            raise ExportError(f"{folder} is no staged Space ({file} is missing): stage one first.")
    if dry_run:
        return url
    token = get_token()
    if not token:
        raise ExportError(f"There is no Hugging Face token: {LOG_IN}")
    api = HfApi(token=token)
    try:
        _find_or_create(api, name, private)
        listed = [glob.escape(file) for file in files]
        api.upload_folder(folder_path=folder, repo_id=name, repo_type="space", allow_patterns=listed)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or "no reason given").split())
        remedy = REMEDIES.get(status, "try again, or upload by hand (notebook 5)")
        raise ExportError(f"Hugging Face refused {name} ({status}: {said}): {remedy}") from None
    except UNREACHABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ExportError(f"Hugging Face could not be reached ({reason}): try again.") from None
    return url


def _find_or_create(api: HfApi, name: str, private: bool) -> None:
    """Make the Space if it is new, on a plain CPU or else on ZeroGPU. ExportError if it should be private.

    Since July 2026 a free account gets status 402 for a Gradio Space on a CPU, but may have two on ZeroGPU
    (https://huggingface.co/docs/hub/spaces-zerogpu), whose CPU is enough for us.
    """
    try:
        public = not api.space_info(name).private
    except errors.RepositoryNotFoundError:
        options = {"repo_type": "space", "space_sdk": "gradio", "private": private}
        try:
            api.create_repo(name, **options)
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 402:
                raise
            api.create_repo(name, **options, space_hardware="zero-a10g")
    else:
        if private and public:
            raise ExportError(f"{name} is public: make it private there, or choose another name.")
