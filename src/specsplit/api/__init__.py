"""The Python interface. Import it as `specsplit`, which has these names: load, connect, Pair, Model, GeneratedText."""
