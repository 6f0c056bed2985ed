"""SpecSplit: disaggregated speculative decoding, measured by a reproducible workflow."""

__version__ = "0.1.0"
