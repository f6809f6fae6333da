"""What is read from a server's log."""

import pytest

from backend.triton_server.server_log import LogNews, failure_reason

LOADING = "2026-11-28 20:05:12,456 backend.engine: "


def test_news_are_told_once_and_when_they_are_whole(tmp_path):
    path = tmp_path / "server.log"
    path.touch()
    news = LogNews(path)
    assert news.next() == []
    with path.open("ab", buffering=0) as log:
        log.write(b'I1128 20:04:34.898014 1 model_lifecycle.cc:472] "loading: diffusiongemma:1"\nweights: 1.5 of 51.6 GB, ')
        assert news.next() == []
        log.write(b"0.30 GB/s\n\xff\n")
        assert news.next() == ["weights: 1.5 of 51.6 GB, 0.30 GB/s"]
        log.write(f"{LOADING}memory  0.50 GB = …\n{LOADING}fits    sequences: 16\n{LOADING}other\n".encode())
        assert news.next() == ["memory  0.50 GB = …", "fits    sequences: 16"]
    assert news.next() == [] and not news.tells_of_errors
    path.unlink()
    assert news.next() == []


def test_deaths_are_news_and_an_internal_error_is_none(tmp_path):
    path = tmp_path / "server.log"
    died = "engine worker: ended by SIGKILL; see the server's log"
    gave_up = f"model diffusiongemma: {died}; workers died 3 times in a row, and no other is started; unloading the model"
    path.write_text(f'2026-11-28 20:05:12,456 engine worker: started\n{died}\nE1128 20:05:13.8 7 model.py:119] "{gave_up}"\n')
    news = LogNews(path)
    assert news.next() == [died, gave_up] and news.tells_of_errors

    path.write_text('E1128 20:05:13.8 7 model.py:278] "Traceback (most recent call last):\\n  File …"\n')
    news = LogNews(path)
    assert news.next() == [] and news.tells_of_errors


@pytest.mark.parametrize(
    ("there", "expected"),
    [("", "but Triton finds no GPU here; leave it out"), (" 0 1", "expected some of 0, 1, which Triton can use here")],
)
def test_a_gpu_that_is_not_there(there, expected):
    """The lines of release 24.10."""
    said = (
        "Invalid argument: instance group diffusiongemma_0 of model diffusiongemma specifies invalid or unsupported gpu id 7. "
        f"GPUs with at least the minimum required CUDA compute compatibility of 6.000000 are: {there}"
    )
    log = f'E1128 20:04:34.8 1 model_repository_manager.cc:1460] "failed to load: {said}"\nerror: creating server: {said}\n'
    assert failure_reason(log) == f"--gpus: got 7, {expected}"
    assert failure_reason(f"error: creating server: {said}\n") == f"--gpus: got 7, {expected}"
    alone = "--gpus: got 3, expected a GPU that Triton can use here; pass others, or leave it out"
    assert failure_reason(log, [3]) == alone
    assert failure_reason(log, [3, 4]).startswith("--gpus: got 3+4, expected a GPU")


def test_a_load_that_failed_in_place_of_a_model_that_is_there_is_no_reason():
    failed = "E1128 20:05:13.8 7 lifecycle.cc:642] \"failed to load 'diffusiongemma' version 1: Internal: ValueError: got 0\"\n"
    assert failure_reason(failed) == "got 0"
    loaded = "I1128 20:04:34.8 1 model_lifecycle.cc:839] \"successfully loaded 'diffusiongemma'\"\n"
    assert failure_reason(f"{loaded}{failed}the last line\n") == "the last line"


def test_a_log_without_a_known_reason():
    assert failure_reason("a\nb\n") == "b"
    assert failure_reason("") == "its log is empty"


def test_what_every_server_without_a_gpu_says_is_no_reason():
    usual = 'E1130 14:11:03.0 1 server.cc:241] "CudaDriverHelper has not been initialized."\n'
    assert failure_reason(f"{usual}[err] socketpair: Too many open files\n") == "[err] socketpair: Too many open files"
    assert failure_reason(f'{usual}E1130 14:11:04.0 1 server.cc:1] "no room"\n') == "no room"
