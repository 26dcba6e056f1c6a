"""What `deploy/` says is what runs: Docker cannot, in CI, so its commands are taken from the files and run here."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from onestill.cli.app import make_app
from onestill.serve.run import CONNECTIONS, DRAIN_S, GRACE_S

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
STAGES = ("cpu", "cuda")


def instructions() -> dict[str, list[tuple[str, str]]]:
    """Stage -> its (instruction, rest), those it is built from first; "" is what comes before the first."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            source, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stages[name] = list(stages.get(source, [("FROM", source)]))
        else:
            stages[name].append((word, rest))
    return stages


def of(stage: str, word: str) -> list[str]:
    return [rest for name, rest in instructions()[stage] if name == word]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What the command line means to the command's own parser."""
    group: Any = typer.main.get_command(make_app())
    root = group.make_context("onestill", list(arguments), resilient_parsing=False)
    name, command, rest = group.resolve_command(root, root._protected_args + root.args)
    with command.make_context(name, rest, parent=root) as context:
        return dict(context.params) | {"command": name}


@pytest.mark.parametrize("stage", STAGES)
def test_the_image_serves_as_somebody_else_than_root(stage: str) -> None:
    assert json.loads(of(stage, "ENTRYPOINT")[-1]) == ["onestill"]
    options = parsed(json.loads(of(stage, "CMD")[-1]))
    assert (options["command"], options["host"], options["gallery"]) == ("serve", "0.0.0.0", False)
    assert str(options["port"]) == of(stage, "EXPOSE")[-1]
    assert (options["engine"], options["device"]) == ((None, None) if stage == "cpu" else ("torch", "cuda"))
    assert of(stage, "USER")[-1] not in ("0", "root")
    user = of(stage, "USER")[-1]
    assert any(f"--uid {user} " in run and "chown onestill /data" in run for run in of(stage, "RUN"))


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    stages = instructions()
    copied = set()
    for stage in stages:
        for rest in of(stage, "COPY"):
            *sources, _ = [part for part in rest.split() if not part.startswith("--")]
            if match := re.search(r"--from=(\S+)", rest):
                assert match[1] in stages
                assert any(sources[0] in run for run in of(match[1], "RUN"))  # its install makes that folder
            else:
                copied.update(sources)
    assert {source for source in copied if (ROOT / source).exists()} == copied == allowed


def test_what_is_installed_is_what_ci_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'sh deploy/install "$python" "$scratch/base"' in ci
    for stage in ("built-cpu", "built-cuda"):
        (run,) = of(stage, "RUN")
        *command, extra = shlex.split(run)
        assert command == ["sh", "deploy/install", "python3", "/opt/onestill"]
        asked = set(extra.strip("[]").split(","))
        assert asked <= set(extras)
        tested = set(re.findall(r"onestill\[([a-z0-9,]+)\]", " ".join(extras["test"]))[0].split(","))
        assert asked <= tested | {"torch"}  # which `train` brings
        assert ("torch" in asked) == (stage == "built-cuda")
    # The container's Python is the one that CI takes.
    version = of("base", "FROM")[0].partition(":")[2].removesuffix("-slim")
    assert f"${{PYTHON:-python{version}}}" in ci
    assert sys.version_info[:2] >= tuple(map(int, version.split(".")))


def test_the_script_that_installs_makes_an_environment_without_pip(tmp_path: Path) -> None:
    """As the Dockerfile calls it, on a project of one file that needs nothing from elsewhere."""
    (tmp_path / "backend.py").write_text(
        "import zipfile\n"
        "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        "    with zipfile.ZipFile(f'{folder}/tiny-1-py3-none-any.whl', 'w') as file:\n"
        "        file.writestr('tiny.py', '')\n"
        "        file.writestr('tiny-1.dist-info/METADATA', 'Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n'\n"
        "            'Provides-Extra: more\\n')\n"
        "        file.writestr('tiny-1.dist-info/WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n'\n"
        "            'Tag: py3-none-any\\n')\n"
        "        file.writestr('tiny-1.dist-info/RECORD', '')\n"
        "    return 'tiny-1-py3-none-any.whl'\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "tiny"\n'
    )
    done = subprocess.run(
        ["sh", DEPLOY / "install", sys._base_executable, tmp_path / "made", "[more]"],
        cwd=tmp_path,
        env=os.environ | {"PIP_NO_INDEX": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {path.name for path in (tmp_path / "made").rglob("site-packages/*")}
    assert "tiny.py" in found
    assert not {"pip", "setuptools"} & found


def test_the_health_check_tells_a_server_from_none(tmp_path: Path) -> None:
    """The image's command and its check, but for the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    interval, _, command = of("cpu", "HEALTHCHECK")[-1].partition(" CMD ")
    assert "--start-period" in interval
    check = [sys.executable, *json.loads(command)[1:]]
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "ONESTILL_SERVE_PORT": port}
    assert subprocess.run(check, env=environment, capture_output=True).returncode != 0
    serve = [*json.loads(of("cpu", "ENTRYPOINT")[-1]), *json.loads(of("cpu", "CMD")[-1])]
    server = subprocess.Popen([sys.executable, "-m", *serve], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        assert f":{port}/" in server.stdout.readline()
        assert subprocess.run(check, env=environment, capture_output=True).returncode == 0
    finally:
        server.terminate()
        assert server.wait(30) == 0
        server.stdout.close()


def test_compose_starts_servers_that_the_command_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    services = COMPOSE["services"]
    servers = {name: one for name, one in services.items() if one.get("image") == "onestill"}
    assert set(servers) == {"one", "two"}
    for one in servers.values():
        build = one["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        assert build["target"] in instructions()
        environment = {name: filled(value) for name, value in one["environment"].items()}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        options = parsed([filled(argument) for argument in one["command"]])
        assert options["database"] == environment["ONESTILL_DATABASE"]
        assert (options["trial_limit"], options["gallery"]) == ("200/day", True)
        assert options["metrics_port"] not in (None, options["port"])
        proxy = services["proxy"]["networks"]["default"]["ipv4_address"]
        assert options["trust_proxy"] == proxy
        assert one["read_only"] is True
        assert one["restart"] == "unless-stopped"
        assert one["volumes"][0].endswith(":" + of("cpu", "VOLUME")[-1])
        assert set(one["depends_on"]) <= set(services)
    database = services["postgres"]["environment"]
    assert "postgresql://{POSTGRES_USER}:".format(**database) in servers["one"]["environment"]["ONESTILL_DATABASE"]


def test_compose_gives_the_proxy_all_that_its_template_wants() -> None:
    proxy = COMPOSE["services"]["proxy"]
    source, target, _ = proxy["volumes"][0].split(":")
    template = (DEPLOY / source).read_text()
    assert target == "/etc/nginx/templates/default.conf.template"
    assert set(re.findall(r"\$\{(\w+)\}", template)) == set(proxy["environment"])
    port = of("cpu", "EXPOSE")[-1]
    assert (proxy["environment"]["ONESTILL_ONE"], proxy["environment"]["ONESTILL_TWO"]) == (
        f"one:{port}",
        f"two:{port}",
    )
    assert all(one["condition"] == "service_healthy" for one in proxy["depends_on"].values())


def test_compose_gives_the_address_of_the_proxy_to_nobody_else() -> None:
    """Docker hands out the first that is free of the range, and the proxy starts last."""
    (pool,) = COMPOSE["networks"]["default"]["ipam"]["config"]
    subnet, others = ip_network(pool["subnet"]), ip_network(pool["ip_range"])
    proxy = ip_address(COMPOSE["services"]["proxy"]["networks"]["default"]["ipv4_address"])
    assert others.subnet_of(subnet)  # type: ignore[arg-type]
    assert proxy in subnet
    assert proxy not in others


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read(DEPLOY / "onestill.service")
    return found


def test_the_unit_of_systemd_starts_a_command_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    service = unit()["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program == "/opt/onestill/bin/onestill"  # where the script that installs puts it
    options = parsed(arguments)
    assert (options["command"], options["host"], options["log_format"]) == ("serve", "127.0.0.1", "json")
    assert (service["Restart"], service["DynamicUser"]) == ("on-failure", "yes")
    assert float(service["TimeoutStopSec"]) > DRAIN_S + GRACE_S
    assert int(service["LimitNOFILE"]) >= CONNECTIONS + 200
    assert {"XDG_DATA_HOME=%S", "XDG_CACHE_HOME=%C"} <= set(service["Environment"].split())
    assert "MemoryDenyWriteExecute" not in service  # an engine writes machine code
    monkeypatch.setenv("ONESTILL_SERVE_PORT", "8123")  # as from EnvironmentFile
    assert parsed(arguments)["port"] == 8123


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    text = (DEPLOY / "onestill.service").read_text().replace("/opt/onestill/bin/onestill", sys.executable)
    (tmp_path / "onestill.service").write_text(text)
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run([analyze, *command, tmp_path / "onestill.service"], capture_output=True, text=True)
        if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:  # of an older systemd
            continue
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def filled(text: str) -> str:
    """Compose's own variables: the default, or a word where one must be chosen."""
    return re.sub(r"\$\{\w+:([-?])([^}]*)\}", lambda found: found[2] if found[1] == "-" else "secret", text)
