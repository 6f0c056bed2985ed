"""The state of a git checkout, and its uncommitted changes."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from specsplit.io import sha256_file
from specsplit.launch.host import run_tool
from specsplit.provenance.redaction import redact_text

LARGEST_DIFF = 5_000_000  # characters
LARGEST_NEW_FILE = 256 * 1024  # bytes
# New files whose content stays out of the diff, since such files often hold keys and passwords.
PRIVATE = (".env", ".env.*", "*.pem", "*.key", "id_*", ".netrc", "*credential*", "*secret*", "*token*.txt", "*.p12")


def capture_git(root: Path) -> dict[str, Any]:
    """{commit, branch, dirty, remote, reason} of the checkout at `root`; nulls and the reason when there is none.

    branch is null on a detached head, remote without a remote `origin`. dirty counts new files that git does not
    ignore. Never raises.
    """
    unknown = {"commit": None, "branch": None, "dirty": None, "remote": None}
    tracked, reason = _git(root, "ls-files", "--", ".")
    if tracked is None:
        return {**unknown, "reason": reason}
    if not tracked:
        # An unpacked archive inside someone's own repository: that repository's commit says nothing about it.
        return {**unknown, "reason": f"git: no file under {root.name} is tracked"}
    commit, reason = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {**unknown, "reason": reason}
    status, reason = _git(root, "status", "--porcelain")
    branch, _ = _git(root, "symbolic-ref", "--quiet", "--short", "HEAD")
    remote, _ = _git(root, "config", "--get", "remote.origin.url")
    reasons = [reason, None if branch else "git: detached head", None if remote else "git: no remote origin"]
    return {
        "commit": commit,
        "branch": branch,
        "dirty": None if status is None else bool(status),
        "remote": remote and redact_text(remote),
        "reason": "; ".join(filter(None, reasons)) or None,
    }


def capture_diff(root: Path) -> dict[str, Any]:
    """{diff, sha256, redacted, new_files, reason}: what `git apply` on the commit needs to get the files as they are.

    new_files: those that git neither tracks nor ignores, as {path, bytes, sha256, in_diff}; large ones and those that
    may hold passwords are in the list alone. redacted: a secret was taken out, so that the diff may not apply.
    Empty text when nothing was changed. Never raises.
    """
    nothing: dict[str, Any] = {"diff": None, "sha256": None, "redacted": False, "new_files": []}
    if _git(root, "ls-files", "--", ".")[0] in (None, ""):
        return {**nothing, "reason": capture_git(root)["reason"]}
    options = ["--binary", "--full-index", "--no-color", "--no-ext-diff", "--no-textconv"]
    diff, reason = _git(root, "diff", *options, "HEAD", "--", ".", strip=False)
    names, reason_new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", ".")
    if diff is None or names is None:
        return {**nothing, "reason": reason or reason_new}
    new_files = []
    for name in filter(None, names.split("\0")):
        path = root / name
        if not path.is_file():  # a broken link, a folder with a checkout of its own
            continue
        size = path.stat().st_size
        private = any(fnmatch(path.name.lower(), pattern) for pattern in PRIVATE)
        addition = None
        if size <= LARGEST_NEW_FILE and not private:
            # Differs, so exit status 1.
            command = ["diff", *options, "--no-index", "--", "/dev/null", name]
            addition, _ = _git(root, *command, strip=False, status=1)
        new_files.append({"path": name, "bytes": size, "sha256": sha256_file(path), "in_diff": addition is not None})
        diff += addition or ""
    reason = None
    if len(diff) > LARGEST_DIFF:
        reason = f"the diff has {len(diff)} characters, over {LARGEST_DIFF}"
    elif "\ufffd" in diff:
        reason = "the diff has text that is not UTF-8"
    if reason:
        return {**nothing, "new_files": new_files, "reason": reason}
    clean = redact_text(diff)
    digest = hashlib.sha256(clean.encode()).hexdigest()
    return {"diff": clean, "sha256": digest, "redacted": clean != diff, "new_files": new_files, "reason": None}


def _git(root: Path, *arguments: str, strip: bool = True, status: int = 0) -> tuple[str | None, str | None]:
    # Without optional locks `git status` writes nothing into the checkout.
    text, reason = run_tool(["git", "--no-optional-locks", "-C", str(root), *arguments], 30.0, status)
    return (text.strip() if text is not None and strip else text), reason
