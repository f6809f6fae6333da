"""The Triton Inference Server side: request parsing, response building, the server class, and starting a server.

`request.py` and `launch.py` import anywhere; `response.py` and `model.py` only inside the Python backend of a server.
"""
