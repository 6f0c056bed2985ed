"""SpecSplit: disaggregated speculative decoding, measured by a reproducible workflow.

    with specsplit.load(target="path-or-hub-id", draft="path-or-hub-id", gamma=4) as pair:
        print(pair.generate("Why is the sky blue?", max_new_tokens=64))

`load` runs both models in this process, `connect` uses workers over gRPC. The types of what is here stand in
__init__.pyi; no module of the package is imported before it is used, so that `import specsplit` takes little time.
"""

import importlib
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__version__ = "0.1.0"

# Before grpc is imported, which reads both. A message between processes takes two thirds of the time with the pollers
# that gRPC 1.85 still has beside its new ones, as fewer threads pass it on; a version without them complains.
with suppress(PackageNotFoundError):
    if version("grpcio").startswith("1.85."):
        os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its notes of closed connections look like errors of ours

_WHERE = {
    **dict.fromkeys(("Pair", "connect", "load"), "specsplit.api.pair"),
    **dict.fromkeys(("GeneratedStream", "GeneratedText"), "specsplit.api.generated"),
    "Model": "specsplit.api.named_models",
    **dict.fromkeys(("ModelError", "OptionError", "PromptError", "UserError", "WorkerError"), "specsplit.errors"),
}
__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
