"""What goes wrong in a download, in one sentence for whoever asked for it."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from src.utils import PerceptError

# The HTTP library under the hub's client has changed its name; its errors are found through the
# hub's own.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

# what it raises for an address that is none, such as a server may redirect to
INVALID_URL: tuple[type[Exception], ...] = (
    sys.modules[HTTP_ERROR.__module__.partition(".")[0]].InvalidURL,
    UnicodeError,
)


def list_s3_errors() -> tuple[type[Exception], ...]:
    """The errors of S3's client; none as long as that optional package has not been imported."""
    if "botocore" not in sys.modules:
        return ()
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return (BotoCoreError, ClientError, ResponseParserError)


def list_transfer_errors() -> tuple[type[Exception], ...]:
    """What may be raised while something is listed, fetched or written."""
    return (HTTP_ERROR, OSError, *list_s3_errors())


def _list_explained_errors() -> tuple[type[Exception], ...]:
    """The errors that `explain_errors` has sentences for."""
    return (*list_transfer_errors(), HFValidationError, *INVALID_URL)


@contextmanager
def explain_errors(subject: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence about `subject`."""
    try:
        yield
    except _list_explained_errors() as error:
        raise PerceptError(_describe_error(error, subject)) from error


def read_status(error: BaseException) -> int:
    """Status of the HTTP answer that an error is about, 0 where there was none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # S3's
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return int(getattr(response, "status_code", 0) or 0)


def is_temporary(error: BaseException) -> bool:
    """Whether an error may pass: lost connections, busy servers, a range that the server does not
    have yet; a full disk does not.
    """
    status = read_status(error)
    if status:
        return status in (408, 416, 429) or status >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, (HTTP_ERROR, ConnectionError, TimeoutError, *list_s3_errors()))


def _describe_error(error: BaseException, subject: str) -> str:
    """One sentence: what is wrong with `subject`, and what to do."""
    return (
        _describe_disk_error(error, subject)
        or _describe_refusal(error, subject)
        or _describe_server_error(error, subject)
    )


def _describe_disk_error(error: BaseException, subject: str) -> str:
    """The sentence for an error of a file or a disk, "" for another error."""
    is_network_error = isinstance(error, (HTTP_ERROR, ConnectionError, TimeoutError))
    if not isinstance(error, OSError) or isinstance(error, OfflineModeIsEnabled):
        return ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk filled up while {subject} was fetched: free some space and run this again,"
            " it goes on where it stopped."
        )
    if is_network_error or read_status(error) or isinstance(error, EntryNotFoundError):
        return ""
    return (
        f"{subject} could not be read or written ({error}): correct the path or its permissions, or"
        " choose another."
    )


def _describe_refusal(error: BaseException, subject: str) -> str:
    """The sentence for what the server does not let one have, "" for another error."""
    status = read_status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, so that {subject} cannot be asked for: unset it, or give a"
            " folder as mirror."
        )
    if isinstance(error, GatedRepoError) or status == 403:
        return (
            f"Access to {subject} is refused ({status}): ask for access on its page, and log in"
            " with `hf auth login` where it is the hub's."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return (
            f"The server does not show {subject} ({status}): it is gated, private, or no longer"
            " under this id, which the hub does not tell apart; ask for access on its page and log"
            " in (`hf auth login`), or look where it has moved."
        )
    return ""


def _describe_server_error(error: BaseException, subject: str) -> str:
    """The sentence for all other errors: what the server answered, or that it did not."""
    status = read_status(error)
    if isinstance(error, RevisionNotFoundError):
        return (
            f"There is no such revision, {subject}: name a branch, tag or commit that the"
            " repository has."
        )
    if status == 404 or isinstance(error, EntryNotFoundError):
        return (
            f"There is no {subject} on the server (404): it was moved or removed, or the mirror"
            " does not have it."
        )
    if isinstance(error, HFValidationError):
        return f"The hub can have no {subject}: write its id as owner/name."
    if isinstance(error, INVALID_URL):
        return f"The server redirects {subject} to what is no address: take another mirror."
    if status:
        return f"The server answered {status} for {subject}: try again later."
    return (
        f"The server could not be reached for {subject} ({type(error).__name__}): check the"
        " network, or give --mirror (an address or a folder)."
    )
