"""The demo: a whole run on the two small language models that ship with the package."""
