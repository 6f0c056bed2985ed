"""The columns that say which configuration a row of a table is of."""

# Name of the column -> its value in a plain sweep over gamma.
PLAIN = {
    "mode": "sync",
    "tree": "chain",
    "draft": "draft",
    "sampling": "coupled",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "rtt_ms": 0.0,
    "jitter_ms": 0.0,
}
CONFIGURATION = ("gamma", *PLAIN)
