"""What an OpenAI-compatible server is run with. Environment: SPECSPLIT_SERVE_*."""

from __future__ import annotations

from pathlib import Path

from specsplit.settings.base import Settings, setting


class ServeSettings(Settings):
    """Where it listens, who may call it, and how much it takes at once."""

    prefix = "SPECSPLIT_SERVE_"

    @classmethod
    def operating(cls) -> set[str]:
        return set(cls.model_fields)  # none changes a text

    host: str = setting("127.0.0.1", "Interface to listen on.", example="0.0.0.0", min_length=1)
    port: int = setting(8000, "Port to listen on; 0 is any that is free.", ge=0, le=65535)
    served_model_name: str | None = setting(
        None, "Name that requests give as `model`; null is that of the target worker's model.", min_length=1
    )
    api_key_file: Path | None = setting(
        None, "File with the keys that clients may show as a bearer token, one a line; null asks for none."
    )
    certificate: Path | None = setting(None, "PEM file with the certificate for TLS, with `certificate_key`.")
    certificate_key: Path | None = setting(None, "PEM file with the key of that certificate, unencrypted.")
    max_running: int = setting(8, "Texts written at once; as many sessions as the workers keep.", ge=1, le=1024)
    max_waiting: int = setting(
        64, "Requests that wait for a place beyond those; one more is answered with status 429.", ge=0
    )
    stop_timeout_s: float = setting(30.0, "Seconds that running texts get to end after SIGTERM.", ge=0)
