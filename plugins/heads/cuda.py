"""The CUDA path of the heads operator. Import this module only where triton is installed."""

from plugins.heads.launch import normed_heads
from plugins.library import LIBRARY

LIBRARY.impl("normed_heads", normed_heads, "CUDA")
