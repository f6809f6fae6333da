"""The Triton Inference Server side: request parsing, response building, the server class, and starting a server.

`model.py`, `response.py` and `exported_metrics.py` import only inside the Python backend of a server, the rest anywhere.
"""
