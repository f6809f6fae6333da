"""Questions about an image, through OpenAI's client and through Triton's gRPC.

    make serve
    python examples/image_client.py
    python examples/image_client.py holiday.jpg --question "What is in the picture?"

Without an image a red circle is drawn, about which the tiny checkpoint knows the answer. Needs `openai`, `tritonclient[grpc]`
and `pillow`.
"""

import argparse
import base64
import io
import json
import mimetypes
import queue

import numpy as np
import tritonclient.grpc as grpcclient
from openai import OpenAI
from openai_client import errors_in_one_line
from PIL import Image, ImageDraw
from tritonclient.utils import InferenceServerException

MODEL = "diffusiongemma"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", type=argparse.FileType("rb"), help="a PNG, JPEG, WebP or GIF file")
    parser.add_argument("--question", default="What is the color of the figure?")
    parser.add_argument("--base-url", default="http://127.0.0.1:9000/v1")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC service")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args()
    image = base64.b64encode(options.image.read() if options.image else drawn()).decode()
    kind = mimetypes.guess_type(options.image.name if options.image else "drawn.png")[0]
    print(f"OpenAI  {ask_openai(options.base_url, options.api_key, f'data:{kind};base64,{image}', options.question)}")
    print(f"Triton  {ask_triton(options.url, image, options.question)}")


def drawn() -> bytes:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 80, 80), fill=(220, 30, 30))
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def ask_openai(base_url: str, api_key: str, url: str, question: str) -> str:
    """The image goes within the message, as a data URL."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        completion = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    return completion.choices[0].message.content


def ask_triton(url: str, image: str, question: str) -> str:
    """The image goes beside the messages, which have a place for it."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    inputs = [tensor("messages", json.dumps([{"role": "user", "content": content}])), tensor("image", image)]
    responses: queue.Queue = queue.Queue()
    with grpcclient.InferenceServerClient(url) as client:
        if not client.is_model_ready(MODEL):
            raise SystemExit(f"error: the server at {url} has no model {MODEL} that is ready")
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer(MODEL, inputs)
        result, error = responses.get()
        client.stop_stream()
    if error is not None:
        raise SystemExit(f"error: {error.message()}")
    return result.as_numpy("text_output")[0].decode()


def tensor(name: str, value: str) -> grpcclient.InferInput:
    return grpcclient.InferInput(name, [1], "BYTES").set_data_from_numpy(np.array([value.encode()], np.object_))


if __name__ == "__main__":
    try:
        with errors_in_one_line():
            main()
    except InferenceServerException as error:  # Triton's server cannot be reached
        raise SystemExit(f"error: {error.message()}") from None
