"""An OpenAI-compatible HTTP server over a pair of models."""
