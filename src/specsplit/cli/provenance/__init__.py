"""specsplit provenance record | seal | sign | archive | verify | diff | reproduce"""

from __future__ import annotations

WHERE = "a results folder, the project's folder, an unpacked archive or an archive.zip"
