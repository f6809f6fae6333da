"""What Triton Inference Server loads: a name for the server class in `backend/triton_server/model.py`.

`backend` is the installed package; where it is not installed, the one of the checkout that this file lies in.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

from backend.triton_server.model import DiffusionGemmaModel


class TritonPythonModel(DiffusionGemmaModel):
    """`initialize`, `execute` and `finalize` are inherited; the server looks for this very class name."""
