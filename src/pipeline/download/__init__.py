"""Downloads: what a recipe needs from the hub and from NSD's bucket is listed with its sizes first,
then fetched, resumed and checked.

- What a recipe needs is collected by walking its stages (`src.pipeline.needs`). `bundles` says what
  there is, `patterns` which files that are. Files are
  found by listing the repository, so that no count is written down here.
- A file is written as <name>.part, which a later call continues, and gets its name when its size
  and its checksum are right: the hub gives the SHA-256 of large files and git's SHA-1 of small
  ones; S3 gives the MD5 of what was uploaded in one part, and nothing of the rest, where only the
  size is checked.
- A mirror is an address that speaks the protocol of the original (hub or S3), or a folder that
  holds the files under the same paths.
- Frozen models go into the hub's own cache, in its layout, where `from_pretrained` finds them, with
  or without a network.
- The code was tested against local servers that speak both protocols; names and layout of the
  public repositories are as their users report them.
"""

from src.pipeline.download.bundles import (
    BUNDLES,
    MOVED_REPOS,
    RECIPE_EXTRAS,
    find_bundle,
    find_moved_repo,
)
from src.pipeline.download.files import Bundle, FilePattern, RemoteFile
from src.pipeline.download.listing import FilesNotFound, list_files
from src.pipeline.download.plan import (
    PlannedDownload,
    fetch,
    fetch_planned,
    format_downloads,
    plan_downloads,
)
from src.pipeline.download.transfer import fetch_files

__all__ = [
    "BUNDLES",
    "MOVED_REPOS",
    "RECIPE_EXTRAS",
    "Bundle",
    "FilePattern",
    "FilesNotFound",
    "PlannedDownload",
    "RemoteFile",
    "fetch",
    "fetch_files",
    "fetch_planned",
    "find_bundle",
    "find_moved_repo",
    "format_downloads",
    "list_files",
    "plan_downloads",
]
