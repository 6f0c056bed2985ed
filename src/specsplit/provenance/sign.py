"""Signatures of seals, made and checked by `ssh-keygen -Y`: whoever recomputes every hash has no signature for them.

What is signed is one list of hashes (`Experiment.seal`), which vouches for all other files. The signature is a file
beside it, or beside archive.zip. Keys are those that people have for ssh and git; nothing else need be installed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from specsplit.errors import UserError, why
from specsplit.io import replace_file
from specsplit.provenance.folder import ARCHIVE, Experiment, open_experiment
from specsplit.provenance.verify import verify

NAMESPACE = "specsplit"  # so that a signature of something else cannot be taken for one of these
SIGNER = "signer"
PUBLIC_KEY = re.compile(r"(?:ssh-|ecdsa-|sk-)\S+ [A-Za-z0-9+/=]+(?: .*)?")


def sign(experiment: Experiment, key: Path) -> Path:
    """Sign the seal with a private SSH key, or a public one whose private key an agent holds; returns the signature.

    ssh-keygen asks for the passphrase. Raises UserError when something is not as sealed, or the key cannot sign.
    """
    if not key.is_file():
        raise UserError(f"--key {key}: no such file; `ssh-keygen -t ed25519` makes a key")
    if differing := verify(experiment).differing:
        name, problem = next(iter(sorted(differing.items())))
        raise UserError(f"{experiment.shown}: {len(differing)} not as sealed, nothing was signed: {name}: {problem}")
    # By standard input: ssh-keygen would write beside the file, which is in a temporary folder for an archive.
    done = _ssh_keygen(["sign", "-f", str(key), "-n", NAMESPACE], experiment.at(experiment.seal), capture=False)
    if done.returncode:
        raise UserError(f"--key {key}: ssh-keygen could not sign with it (exit status {done.returncode})")
    replace_file(experiment.signature, done.stdout)
    return experiment.signature


def check_signature(experiment: Experiment, signer: Path | None) -> tuple[str, str]:
    """(problem, note) of the signature; both are empty where there is none and nobody asked for one.

    signer: a file of public keys, one a line, one of which must have signed. Without it only is looked at whether the
    signature that is there is of this seal. Raises UserError for a file that holds no public key.
    """
    signature, seal = experiment.signature, experiment.at(experiment.seal)
    keys = _public_keys(signer) if signer is not None else []
    if signature.exists() and not signature.is_file():
        return "is no plain file", ""
    if not signature.exists():
        return ("missing: the results are not signed" if keys else "", "")
    if not seal.is_file():
        return f"{experiment.seal}, of which it is, is missing", ""
    with TemporaryDirectory(prefix="specsplit-") as scratch:
        allowed = Path(scratch, "allowed_signers")
        allowed.write_text("".join(f"{SIGNER} {key}\n" for key in keys))
        how = ["verify", "-f", str(allowed), "-I", SIGNER] if keys else ["check-novalidate"]
        try:
            done = _ssh_keygen([*how, "-n", NAMESPACE, "-s", str(signature)], seal)
        except UserError as error:
            return (str(error), "") if keys else ("", f"{error}: the signature was not looked at")
    said = " ".join((done.stdout + done.stderr).decode(errors="replace").split())[:200]
    if done.returncode:
        whose = f"a key of {signer}" if keys else "its key"
        return f"is no signature of {experiment.seal} by {whose}: {said}", ""
    return "", said if keys else f"{said}; --signer tells whether that is the key you trust"


def check_signatures(experiment: Experiment, signer: Path | None) -> Iterator[tuple[Path, str, str]]:
    """(signature, problem, note) of `check_signature`, and of the archive among the results where that is signed."""
    yield experiment.signature, *check_signature(experiment, signer)
    archive = experiment.at(ARCHIVE)
    beside = archive.with_name(f"{archive.name}.sig")
    if not experiment.archived and archive.is_file() and beside.exists():
        with suppress(UserError), open_experiment(archive) as packed:  # no archive: verify says so
            yield beside, *check_signature(packed, signer)


def _public_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--signer {path}: cannot be read: {why(error)}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys or not all(PUBLIC_KEY.fullmatch(key) for key in keys):
        raise UserError(f"--signer {path}: wanted public SSH keys, one a line, as in a .pub file")
    return keys


def _ssh_keygen(arguments: Sequence[str], file: Path, capture: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen -Y on `file`. capture: False leaves standard error, and so questions, to the user."""
    command = ["ssh-keygen", "-Y", *arguments]
    errors = subprocess.PIPE if capture else None
    try:
        with file.open("rb") as content:
            return subprocess.run(command, stdin=content, stdout=subprocess.PIPE, stderr=errors, check=False)
    except FileNotFoundError:
        raise UserError("ssh-keygen: command not found; it comes with OpenSSH 8.2 and later") from None
