"""The state of a git checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specsplit.provenance.capture import run_tool


def capture_git(root: Path) -> dict[str, Any]:
    """{commit, branch, dirty, reason} of the checkout at `root`; nulls and the reason when there is none.

    branch is null on a detached head. dirty counts new files that git does not ignore. Never raises.
    """
    unknown = {"commit": None, "branch": None, "dirty": None}
    tracked, reason = _git(root, "ls-files", "--", ".")
    if tracked is None:
        return {**unknown, "reason": reason}
    if not tracked:
        # An unpacked archive inside someone's own repository: that repository's commit says nothing about it.
        return {**unknown, "reason": f"git: no file under {root} is tracked"}
    commit, reason = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {**unknown, "reason": reason}
    status, reason = _git(root, "status", "--porcelain")
    branch, _ = _git(root, "symbolic-ref", "--quiet", "--short", "HEAD")
    dirty = None if status is None else bool(status)
    return {"commit": commit, "branch": branch, "dirty": dirty, "reason": reason}


def _git(root: Path, *arguments: str) -> tuple[str | None, str | None]:
    # Without optional locks `git status` writes nothing into the checkout.
    text, reason = run_tool(["git", "--no-optional-locks", "-C", str(root), *arguments], 30.0)
    return (None if text is None else text.strip()), reason
