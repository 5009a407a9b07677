"""Interop: crosscoders of other tools as ours, with every assumption said, and ours in the layouts of other tools.

`convert` reads, `export` writes. Both keep codes and reconstructions; what a layout cannot say is an error.
"""

from crosscoder.interop.conversion import Conversion, convert
from crosscoder.interop.export import Export, export
from crosscoder.interop.layouts import LAYOUTS, Layout

__all__ = ["LAYOUTS", "Conversion", "Export", "Layout", "convert", "export"]
