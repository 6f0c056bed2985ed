"""Who may call a worker, and how a client shows that it may."""

from __future__ import annotations

from pathlib import Path

from specsplit.settings.base import Settings, setting


class AccessSettings(Settings):
    """Certificates and tokens, of a worker or of its client."""

    token_file: Path | None = setting(
        None,
        "File with the bearer token that workers ask for; a worker takes any of several, one a line. Null: "
        "SPECSPLIT_TOKEN, or none.",
        example="secrets/token",
        note="that workers ask for; null = SPECSPLIT_TOKEN, or none",
        heading="Of workers on other machines: docs/security.md. Files, relative to the working directory.",
        operates=True,
    )
    tls_ca: Path | None = setting(
        None,
        "PEM file with the authority that the other side's certificate must be from; null trusts those of the system. "
        "A worker with it asks its clients for a certificate.",
        example="secrets/ca.pem",
        note="authority of their certificates, at addresses as grpcs://gpu-1:50052",
        operates=True,
    )
    tls_cert: Path | None = setting(
        None,
        "PEM file with our own certificate and those between it and the authority, for workers that ask for one "
        "(mutual TLS); with `tls_key`.",
        example="secrets/client.pem",
        note="ours, for workers that ask for one",
        operates=True,
    )
    tls_key: Path | None = setting(
        None, "PEM file with the key of that certificate, unencrypted.", example="secrets/client.key", operates=True
    )
    insecure: bool = setting(
        False,
        "Allow another address than loopback without TLS or without asking who calls, or a token to one without TLS: "
        "on a network that is trusted.",
        example=True,
        note="true = send the token to other machines without TLS",
        operates=True,
    )
