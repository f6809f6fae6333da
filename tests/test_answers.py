"""The whole product: held-out questions through Triton Inference Server's gRPC, with transformers as the judge of the steps."""

import itertools
import json
import queue

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from oracles import Oracle
from small_checkpoints import TINY
from tiny_tasks import questions

from backend.generation_defaults import GenerationDefaults
from backend.triton_server.launch import TritonServer

NUM_QUESTIONS = 200
MAX_TOKENS = 160
MIN_RIGHT = 0.98


def tensor(name: str, values: list, datatype: str, dtype) -> grpcclient.InferInput:
    array = np.array(values, dtype=dtype)
    each = grpcclient.InferInput(name, list(array.shape), datatype)
    each.set_data_from_numpy(array)
    return each


@pytest.fixture(scope="module")
def asked(engine_dir, render):
    """(question, prompt, answer, output ids, denoising steps) of every question; question i has seed i."""
    selected = list(itertools.islice(questions(2026, held_out=True), NUM_QUESTIONS))
    assert len({question.key or question.messages[-1]["content"] for question in selected}) > NUM_QUESTIONS // 2
    prompts = [render(question) for question in selected]
    arrived: queue.Queue = queue.Queue()
    sampling = json.dumps({"max_tokens": MAX_TOKENS, "skip_special_tokens": False}).encode()
    server = TritonServer(engine_dir=engine_dir, grpc_port=0, http_port=0, metrics_port=0)
    with server, grpcclient.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: arrived.put((result, error)))
        for seed, prompt in enumerate(prompts):
            inputs = [
                tensor("text_input", [prompt.encode()], "BYTES", object),
                tensor("sampling_parameters", [sampling], "BYTES", object),
                tensor("seed", [seed], "UINT64", np.uint64),
            ]
            client.async_stream_infer("diffusiongemma", inputs, request_id=str(seed))
        answers = {}
        while len(answers) < NUM_QUESTIONS:
            result, error = arrived.get(timeout=300)
            assert error is None, error
            answers[int(result.get_response().id)] = result
        client.stop_stream()
    return [
        (
            question,
            prompt,
            answers[seed].as_numpy("text_output")[0].decode(),
            answers[seed].as_numpy("output_ids").tolist(),
            int(answers[seed].as_numpy("num_steps")[0]),
        )
        for seed, (question, prompt) in enumerate(zip(selected, prompts, strict=True))
    ]


def test_answers_are_right(asked):
    wrong = [
        (question.messages[-1]["content"], question.answer, text) for question, _, text, *_ in asked if text != question.answer
    ]
    print(f"{NUM_QUESTIONS - len(wrong)} of {NUM_QUESTIONS} held-out questions answered exactly")
    assert len(wrong) <= (1 - MIN_RIGHT) * NUM_QUESTIONS, wrong


def test_tokens_and_steps_are_those_of_transformers(asked, chat_tokenizer):
    """Question by question, so the mean steps a canvas is the same too."""
    oracle = Oracle(TINY)
    canvases = steps = 0
    ends = set(GenerationDefaults.from_json(TINY / "generation_config.json").eos_token_ids)
    for seed, (_, prompt, _, output_ids, num_steps) in enumerate(asked):
        prompt_ids = chat_tokenizer(prompt, add_special_tokens=False).input_ids
        expected = oracle.generate(prompt_ids, seed=seed, max_new_tokens=MAX_TOKENS, pad_token_id=None)
        assert output_ids == expected.token_ids(max_tokens=MAX_TOKENS, ends=ends)
        assert num_steps == sum(expected.num_steps)
        canvases, steps = canvases + len(expected.num_steps), steps + num_steps
    print(f"{steps / canvases:.3f} denoising steps a canvas, as transformers takes, over {canvases} canvases")
