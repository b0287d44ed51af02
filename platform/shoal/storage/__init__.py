"""What is on disk: committed directories, small JSON files, journals, locks and fences.

One implementation of the commit protocol serves checkpoints and models alike; `docs/storage.md` tells its
failure paths. Nothing here loads torch or ray.
"""

from shoal.storage.commit import (
    MANIFEST,
    FileEntry,
    Manifest,
    collect_orphans,
    commit,
    copy_committed,
    discard,
    newest_verified,
    verify,
)
from shoal.storage.disk import Disk, is_full, make_directories, open_plain
from shoal.storage.fence import NO_TOKEN, Fence, Succession, Token
from shoal.storage.files import create_json, read_json, write_json
from shoal.storage.identity import claim, differences
from shoal.storage.journal import MAX_LINE_BYTES, append_line, read_lines
from shoal.storage.layout import MIN_FREE_BYTES, Storage, check_name, is_name
from shoal.storage.lock import FileLock
from shoal.storage.objects import pull, push, pushed
from shoal.storage.reading import discard_unread, reading
from shoal.storage.stop import StopMark
from shoal.storage.store import DiskStore, Store, open_store

__all__ = [
    "MANIFEST",
    "MAX_LINE_BYTES",
    "MIN_FREE_BYTES",
    "NO_TOKEN",
    "Disk",
    "DiskStore",
    "Fence",
    "FileEntry",
    "FileLock",
    "Manifest",
    "StopMark",
    "Storage",
    "Store",
    "Succession",
    "Token",
    "append_line",
    "check_name",
    "claim",
    "collect_orphans",
    "commit",
    "copy_committed",
    "create_json",
    "differences",
    "discard",
    "discard_unread",
    "is_full",
    "is_name",
    "make_directories",
    "newest_verified",
    "open_plain",
    "open_store",
    "pull",
    "push",
    "pushed",
    "read_json",
    "read_lines",
    "reading",
    "verify",
    "write_json",
]
