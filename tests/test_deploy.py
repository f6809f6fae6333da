"""The files of deploy/ agree with the code, with each other, and with what is in the repository; nothing is started."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from backend.__main__ import app
from backend.openai_server.settings import OpenAISettings
from backend.triton_server.launch import TritonServer
from backend.triton_server.settings import Settings
from backend.triton_server.staging import MODEL_NAME

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
NGC = "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
START = (DEPLOY / "start.sh").read_text()
PORTS = {name: inspect.signature(TritonServer).parameters[f"{name}_port"].default for name in ("http", "grpc", "metrics")} | {
    "openai": OpenAISettings().port
}
EXIT_TIMEOUT_S = int(re.search(r"--exit-timeout-secs=(\d+)", START)[1])


@pytest.fixture
def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture
def objects() -> dict[tuple[str, str], dict]:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


@pytest.fixture
def pod(objects) -> dict:
    return objects["Deployment", "diffusiongemma"]["spec"]["template"]["spec"]


@pytest.fixture
def containers(pod) -> dict[str, dict]:
    return {each["name"]: each for each in pod["initContainers"] + pod["containers"]}


def instructions(name: str) -> list[str]:
    text = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def assigned(version_of: str) -> str:
    return re.search(rf'{version_of}==([\w.]+)"', PYPROJECT)[1]


def test_every_image_has_a_fixed_version(compose, containers):
    assert instructions("FROM") == [NGC]
    assert re.fullmatch(r"TRITON_RELEASE=\d\d\.\d\d", instructions("ARG")[0])
    ours = "diffusiongemma:" + re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
    services = {name: each["image"] for name, each in compose["services"].items()}
    assert {services.pop(name) for name in ("triton", "openai", "builder")} == {ours}
    assert {each["image"] for each in containers.values()} == {ours}
    assert sorted(services) == ["grafana", "prometheus"]
    assert all(re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", image) for image in services.values())


def test_registries_are_named_in_one_place_only():
    hosts = r"\b[\w-]+(?:\.[\w-]+)+/[\w/-]+:(?=[\w$])"
    found = [match for path in DEPLOY.rglob("*") if path.is_file() for match in re.findall(hosts, path.read_text())]
    assert found == ["nvcr.io/nvidia/tritonserver:"]


def test_the_image_has_the_pinned_torch_and_no_extras():
    assert f"torch=={assigned('torch')} " in DOCKERFILE
    assert "--editable . " in DOCKERFILE and "[dev]" not in DOCKERFILE


def test_what_is_copied_exists_and_is_all_that_is_sent():
    copied = [path for line in instructions("COPY") for path in line.split()[:-1]]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    sent = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sent) == sorted(copied)
    (packages,) = re.findall(r"^include = \[(.*?)\]", PYPROJECT, re.MULTILINE)
    assert {"backend", "builder"} <= set(re.findall(r'"(\w+)\*"', packages)) <= set(copied)
    assert not [path for folder in copied for path in (ROOT / folder).rglob("*.safetensors")]


def test_the_image_starts_the_script_as_nobody_in_particular(pod):
    (command,) = instructions("CMD")
    (script,) = shlex.split(command.strip("[]"))
    assert (ROOT / script.removeprefix("/app/")).stat().st_mode & 0o111
    assert instructions("WORKDIR") == ["/app"]
    (user,) = instructions("USER")
    context = pod["securityContext"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}" and context["runAsNonRoot"]
    assert f"--uid {context['runAsUser']} " in DOCKERFILE


def test_ports_are_the_defaults(compose, objects, containers):
    assert sorted(map(int, instructions("EXPOSE")[0].split())) == sorted(PORTS.values())
    assert not re.search(r"-port=", START)
    published = {name: sorted(each.get("ports", [])) for name, each in compose["services"].items()}
    triton = [PORTS[name] for name in ("http", "grpc", "metrics")]
    assert published["triton"] == [f"127.0.0.1:{port}:{port}" for port in triton]
    assert published["openai"] == [f"127.0.0.1:{PORTS['openai']}:{PORTS['openai']}"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    named = {port["name"]: port["containerPort"] for each in containers.values() for port in each["ports"]}
    assert named == PORTS
    served = [port for (kind, _), each in objects.items() if kind == "Service" for port in each["spec"]["ports"]]
    assert {port["name"] for port in served} == {"openai", "http", "grpc"}
    assert all(port["port"] == PORTS[port["targetPort"]] for port in served)


def test_services_select_the_pods(objects):
    labels = objects["Deployment", "diffusiongemma"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment", "diffusiongemma"]["spec"]["selector"]["matchLabels"] == labels
    assert [each["spec"]["selector"] for (kind, _), each in objects.items() if kind == "Service"] == [labels, labels]
    assert objects["PodDisruptionBudget", "diffusiongemma"]["spec"]["selector"]["matchLabels"] == labels


def test_probes(objects, containers, compose):
    probes = {name: containers["triton"][f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} == {f"/v2/models/{MODEL_NAME}/ready"}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    loading_s = Settings().load_timeout_s
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] > loading_s
    assert objects["Deployment", "diffusiongemma"]["spec"]["progressDeadlineSeconds"] > loading_s + EXIT_TIMEOUT_S
    assert containers["openai"]["readinessProbe"]["httpGet"] == {"path": "/health", "port": "openai"}
    health = compose["services"]["triton"]["healthcheck"]
    assert health["test"][-1] == f"http://localhost:{PORTS['http']}/v2/models/{MODEL_NAME}/ready"
    assert int(health["start_period"].removesuffix("s")) >= loading_s


def test_a_stop_leaves_time_for_answers_under_way(pod, containers, compose):
    *_, delay_s = containers["triton"]["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(delay_s) + EXIT_TIMEOUT_S + 5
    assert int(compose["services"]["triton"]["stop_grace_period"].removesuffix("s")) > EXIT_TIMEOUT_S
    # A container of this kind stops after the others.
    assert [each["restartPolicy"] for each in pod["initContainers"]] == ["Always"]


def test_containers_may_do_little(pod, containers, compose):
    for each in containers.values():
        context = each["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    for name in ("triton", "openai", "builder"):
        service = compose["services"][name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]


def test_a_replica_has_one_gpu(containers, compose):
    gpus = {name: each["resources"]["limits"].get("nvidia.com/gpu", 0) for name, each in containers.items()}
    assert gpus == {"triton": 1, "openai": 0}
    (device,) = compose["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


def test_the_engine_is_mounted_where_the_model_looks_for_it_and_cannot_be_written(pod, containers, compose):
    engine = Path("/app/model_repository/diffusiongemma", Settings().engine_dir)
    parent = str(Path("/app", *engine.parts[-2:-1]))
    assert engine.parts[-4:] == ("..", "..", "engines", "diffusiongemma") and parent == "/app/engines"
    mounts = {mount["mountPath"]: mount for mount in containers["triton"]["volumeMounts"]}
    assert mounts[parent]["readOnly"] and mounts["/app/checkpoint"]["readOnly"]
    claims = [each["persistentVolumeClaim"] for each in pod["volumes"] if "persistentVolumeClaim" in each]
    assert len(claims) == 2 and all(claim["readOnly"] for claim in claims)
    *volumes, kernels = compose["services"]["triton"]["volumes"]
    assert [volume.split(":")[-2:] for volume in volumes] == [[parent, "ro"], ["/app/checkpoint", "ro"]]
    assert kernels == f"kernels:{compose['services']['triton']['environment']['TRITON_CACHE_DIR']}"
    assert "kernels" in compose["volumes"]
    assert compose["services"]["builder"]["command"][-2:] == ["/app/checkpoint", f"{parent}/diffusiongemma"]


def test_every_mounted_volume_is_declared(pod, containers):
    declared = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for each in containers.values() for mount in each["volumeMounts"]} == declared


def test_the_front_end_is_started_with_options_that_it_has(containers, compose):
    options = {name for parameter in get_command(app).commands["openai"].params for name in parameter.opts}
    for command in (compose["services"]["openai"]["command"], containers["openai"]["args"]):
        assert command[:4] == ["python3", "-m", "backend", "openai"]
        assert {word.partition("=")[0] for word in command[4:] if word.startswith("--")} <= options
        line = " ".join(command).replace("=", " ")
        assert re.search(rf"--triton \w+:{PORTS['grpc']} --triton-metrics http://\w+:{PORTS['metrics']}/metrics", line)


def test_monitoring_finds_the_server_and_the_dashboard(compose):
    services = compose["services"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target == f"triton:{PORTS['metrics']}" and "triton" in services
    mounts = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"] + services["grafana"]["volumes"])
    files = {source: place for source, place in mounts.items() if source.startswith("./")}
    assert [source for source in files if not (DEPLOY / source).exists()] == []
    assert files["./prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["type"] == "prometheus" and source["url"].startswith("http://prometheus:")
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "diffusiongemma.yml").read_text())["providers"]
    assert files["./grafana/diffusiongemma.json"] == provider["options"]["path"] + "/diffusiongemma.json"
    for folder in ("datasources", "dashboards"):
        assert files[f"./grafana/provisioning/{folder}"] == f"/etc/grafana/provisioning/{folder}"


def test_the_model_is_under_explicit_control():
    assert {"--model-control-mode=explicit", "--load-model=diffusiongemma"} <= set(shlex.split(START, comments=True))
    for option in ("http-restricted-api", "grpc-restricted-protocol"):
        assert f'--{option}="$closed:closed=$key"' in START


def test_the_documentation_names_files_and_claims_that_exist(pod):
    text = (ROOT / "docs" / "deploy.md").read_text()
    paths = set(re.findall(r"(?:deploy|docs|tests)/[\w./-]+\w", text)) - {"deploy/.env"}  # which the reader writes
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    names = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    names |= {each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each}
    assert [name for name in names if name not in text] == []
