"""A streaming gRPC client: prints each canvas of the answer as it arrives.

    python examples/triton_client.py --chat "What is 17 + 25?"

The prompt goes to the model as it is; with --chat, as a user's turn of a chat. Needs `tritonclient[grpc]`.
"""

import argparse
import json
import queue

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException


def tensor(name: str, values: list, dtype: str) -> grpcclient.InferInput:
    array = np.array(
        values, np.object_ if dtype == "BYTES" else {"BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64}[dtype]
    )
    result = grpcclient.InferInput(name, list(array.shape), dtype)
    result.set_data_from_numpy(array)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC service")
    parser.add_argument("--chat", action="store_true", help="let the server apply the chat template")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 1 <= options.max_tokens < 1 << 31:
        parser.error(f"--max-tokens: got {options.max_tokens}, expected 1 to 2147483647")
    if not 0 <= options.seed < 1 << 64:
        parser.error(f"--seed: got {options.seed}, expected 0 to 18446744073709551615")

    if options.chat:
        prompt = tensor("messages", [json.dumps([{"role": "user", "content": options.prompt}]).encode()], "BYTES")
    else:
        prompt = tensor("text_input", [options.prompt.encode()], "BYTES")
    inputs = [
        prompt,
        tensor("stream", [True], "BOOL"),
        tensor("max_tokens", [options.max_tokens], "INT32"),
        tensor("seed", [options.seed], "UINT64"),
    ]

    # The client calls back from a thread of its own, once a canvas; a queue brings the responses here.
    responses: queue.Queue = queue.Queue()
    with grpcclient.InferenceServerClient(options.url) as client:
        if not client.is_model_ready("diffusiongemma"):
            raise SystemExit(f"error: the server at {options.url} has no model diffusiongemma that is ready")
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("diffusiongemma", inputs)
        while True:
            result, error = responses.get()
            if error is not None:
                raise SystemExit(f"error: {error.message()}")
            print(result.as_numpy("text_output")[0].decode(), end="", flush=True)
            finish_reason = result.as_numpy("finish_reason")[0].decode()
            if finish_reason:
                break
        client.stop_stream()
    print(f"\n[{finish_reason}]")


if __name__ == "__main__":
    try:
        main()
    except InferenceServerException as error:  # the server cannot be reached
        raise SystemExit(f"error: {error.message()}") from None
