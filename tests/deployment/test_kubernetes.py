"""The manifests of docker/kubernetes: valid, whole in themselves, locked down, of one mind with server and compose."""

import base64
import copy
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import Manifest, render

from server.settings import ENV_PREFIX, FILE_SUFFIX, Settings, SettingsError, is_sealing_key, load_settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
OURS = ("proxy", "api", "reaper", "worker")
OLDEST, NEWEST = "1.29", "1.37"
# KEDA's object, as its reference tells of it; `behavior` is Kubernetes' own, and checked as that.
SCALED_OBJECT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["scaleTargetRef", "triggers"],
            "properties": {
                "scaleTargetRef": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["name"],
                    "properties": {
                        name: {"type": "string"} for name in ("apiVersion", "kind", "name", "envSourceContainerName")
                    },
                },
                **{
                    name: {"type": "integer", "minimum": 0}
                    for name in ("pollingInterval", "cooldownPeriod", "initialCooldownPeriod", "idleReplicaCount")
                },
                **{name: {"type": "integer", "minimum": 0} for name in ("minReplicaCount", "maxReplicaCount")},
                "fallback": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["failureThreshold", "replicas"],
                    "properties": {
                        "failureThreshold": {"type": "integer", "minimum": 0},
                        "replicas": {"type": "integer", "minimum": 0},
                        "behavior": {"enum": ["static", "currentReplicas"]},
                    },
                },
                "advanced": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "restoreToOriginalReplicaCount": {"type": "boolean"},
                        "horizontalPodAutoscalerConfig": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"name": {"type": "string"}, "behavior": {"type": "object"}},
                        },
                    },
                },
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["type", "metadata"],
                        "properties": {
                            "type": {"const": "prometheus"},
                            "name": {"type": "string"},
                            "metricType": {"enum": ["AverageValue", "Value"]},
                            "useCachedMetrics": {"type": "boolean"},
                            "metadata": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["serverAddress", "query", "threshold"],
                                "properties": {
                                    "serverAddress": {"type": "string", "pattern": "^https?://"},
                                    "query": {"type": "string"},
                                    "threshold": {"type": "string", "pattern": r"^[0-9.]+$"},
                                    "activationThreshold": {"type": "string", "pattern": r"^[0-9.]+$"},
                                    "namespace": {"type": "string"},
                                    "ignoreNullValues": {"enum": ["true", "false"]},
                                    "unsafeSsl": {"enum": ["true", "false"]},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}


class Cluster:
    """What a folder of manifests asks Kubernetes for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = render(folder)
        self.pods = {
            one["metadata"]["name"]: one["spec"]["template"]
            for one in self.objects
            if one["kind"] in ("Deployment", "StatefulSet")
        }

    def all(self, kind: str) -> dict[str, Manifest]:
        """The objects of a kind, by name."""
        return {one["metadata"]["name"]: one for one in self.objects if one["kind"] == kind}

    def container(self, pod: str) -> dict[str, Any]:
        """The only container of a workload's pods."""
        (container,) = self.pods[pod]["spec"]["containers"]
        return dict(container)

    def matching(self, labels: dict[str, str]) -> set[str]:
        """Workloads whose pods have these labels."""
        return {name for name, pod in self.pods.items() if labels.items() <= pod["metadata"]["labels"].items()}

    def environment(self, pod: str) -> dict[str, str]:
        """Variables that a pod's container is given."""
        container = self.container(pod)
        settings = self.all("ConfigMap")["settings"]["data"]
        from_maps = settings if container.get("envFrom") == [{"configMapRef": {"name": "settings"}}] else {}
        return {**from_maps, **{one["name"]: one["value"] for one in container.get("env", [])}}


def configure(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a copy's configure.sh."""
    command = ["sh", str(folder / "docker" / "kubernetes" / "configure.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


def copied(folder: Path) -> Path:
    """A copy of what the manifests are made of."""
    for name in ("kubernetes", "redis", "prometheus"):
        ignored = shutil.ignore_patterns("site")
        shutil.copytree(ROOT / "docker" / name, folder / "docker" / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """All that can be asked for, with GPUs, images of a registry, and a key of the bucket."""
    folder = copied(tmp_path_factory.mktemp("gpu"))
    images = {"IMAGE_PREFIX": "registry.example.org/medsora-", "IMAGE_TAG": "7"}
    made = configure(folder, "gpu", "clips.example.org", "s3://videos/medsora", **images)
    assert made.returncode == 0, made.stderr
    site = folder / "docker" / "kubernetes" / "site"
    for name, commented in (("kustomization.yaml", "  # - "), ("settings.env", "#MEDSORA_S3_")):
        text = (site / name).read_text()
        assert commented in text
        (site / name).write_text(text.replace(commented, commented.replace("# ", "").replace("#", "")))
    text = (site / "settings.env").read_text()
    (site / "settings.env").write_text(text.replace("ACCESS_KEY_ID=\n", "ACCESS_KEY_ID=medsora\n"))
    (site / "secrets" / "s3_secret_access_key").write_text("a-secret-of-the-bucket")
    return Cluster(site)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Without GPUs, as configure.sh makes it."""
    folder = copied(tmp_path_factory.mktemp("cpu"))
    made = configure(folder, "cpu", "clips.example.org", "s3://videos")
    assert made.returncode == 0, made.stderr
    return Cluster(folder / "docker" / "kubernetes" / "site")


@pytest.fixture(params=["full", "plain"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each of them."""
    found: Cluster = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """They are megabytes, and the library reads them for every object."""
    with pytest.MonkeyPatch.context() as patch:
        utils = kubernetes_validate.utils
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def validate(one: Manifest, version: str) -> None:
    """Check an object against the schema of its kind; what the schema does not know is refused.

    Raises:
        kubernetes_validate.ValidationError, jsonschema.ValidationError: It does not fit.
    """
    if one["kind"] != "ScaledObject":
        kubernetes_validate.validate(one, version, strict=True)
        return
    jsonschema.validate(one, SCALED_OBJECT)
    spec = one["spec"]
    as_autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "spec": {
            "scaleTargetRef": {"kind": "Deployment", **spec["scaleTargetRef"]},
            "maxReplicas": spec["maxReplicaCount"],
            "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        },
    }
    kubernetes_validate.validate(as_autoscaler, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_fits_the_schema_of_its_kind(full: Cluster, plain: Cluster, version: str) -> None:
    for one in [*full.objects, plain.all("Deployment")["worker"]]:
        validate(one, version)


def test_what_does_not_fit_is_found(full: Cluster) -> None:
    wrong = (
        (
            "Deployment",
            ("spec", "template", "spec", "containers", 0, "securityContext"),
            {"readOnlyRootFilesytem": True},
        ),
        ("Deployment", ("spec",), {"replicas": "two"}),
        ("NetworkPolicy", ("spec",), {"podSelektor": {}}),
        ("ScaledObject", ("spec",), {"maxReplicas": 4}),
        ("ScaledObject", ("spec", "triggers", 0, "metadata"), {"threshold": 192}),
        ("ScaledObject", ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior"), {"scaleSideways": {}}),
    )
    for kind, way, change in wrong:
        one = copy.deepcopy(next(iter(full.all(kind).values())))
        place: Any = one
        for name in way:
            place = place[name]
        place |= change
        with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
            validate(one, NEWEST)


def test_objects_are_in_their_namespace_and_named_once(cluster: Cluster) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in cluster.objects]
    assert len(set(names)) == len(names)
    namespaces = {one["metadata"].get("namespace") for one in cluster.objects if one["kind"] != "Namespace"}
    assert namespaces == set(cluster.all("Namespace")) == {"medsora"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kubectl_makes_the_same(cluster: Cluster) -> None:
    command = ["kubectl", "kustomize", str(cluster.folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("settings", "redis", "prometheus", "postgres", "sealing", "tls", "s3"):
        text = re.sub(rf"\bname: {name}-[0-9a-z]{{10}}$", f"name: {name}", text, flags=re.MULTILINE)
    theirs = [one for one in yaml.safe_load_all(text) if one]
    for one in theirs:
        one["data"] = {key: "".join(value.split()) for key, value in one.get("data", {}).items()}
    ours = copy.deepcopy(cluster.objects)
    for one in ours:
        one["data"] = {key: "".join(value.split()) for key, value in one.get("data", {}).items()}

    def by_name(objects: list[Manifest]) -> dict[tuple[str, str], Manifest]:
        return {(one["kind"], one["metadata"]["name"]): one for one in objects}

    assert by_name(theirs) == by_name(ours)


def test_pods_are_locked_down(cluster: Cluster) -> None:
    assert (
        cluster.all("Namespace")["medsora"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    for name, pod in cluster.pods.items():
        spec, container = pod["spec"], cluster.container(name)
        user = spec["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] > 0
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "projected", "configMap", "persistentVolumeClaim"}
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume), name


def test_whatever_is_named_is_there(cluster: Cluster) -> None:
    for name, pod in cluster.pods.items():
        spec, container = pod["spec"], cluster.container(name)
        workload = {**cluster.all("Deployment"), **cluster.all("StatefulSet")}[name]
        assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        if workload["kind"] == "StatefulSet":
            assert workload["spec"]["serviceName"] in cluster.all("Service")
        assert spec.get("serviceAccountName", "default") in {"default", *cluster.all("ServiceAccount")}
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in cluster.all("ConfigMap")
        volumes = {volume["name"] for volume in spec["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes, name
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in cluster.all("ConfigMap")
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in cluster.all("PersistentVolumeClaim")
            for source in volume.get("projected", {}).get("sources", []):
                secret = cluster.all("Secret").get(source["secret"]["name"])
                if secret is None:
                    assert source["secret"].get("optional"), source
                else:
                    assert {item["key"] for item in source["secret"]["items"]} <= set(secret["data"])
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in ports
    for service in cluster.all("Service").values():
        (pod_name,) = cluster.matching(service["spec"]["selector"])
        ports = {port["name"] for port in cluster.container(pod_name)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in cluster.all("PodDisruptionBudget").values():
        assert cluster.matching(budget["spec"]["selector"]["matchLabels"]) == {budget["metadata"]["name"]}
    assert set(cluster.all("PodDisruptionBudget")) == set(OURS)


def test_services_of_one_port_without_an_address_have_the_port_of_the_pod(cluster: Cluster) -> None:
    """Nobody translates it there."""
    for name, service in cluster.all("Service").items():
        if service["spec"].get("clusterIP") == "None":
            numbers = {port["name"]: port["containerPort"] for port in cluster.container(name)["ports"]}
            assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == numbers


def test_how_many_there_are_is_said_by_one(cluster: Cluster) -> None:
    """A number in a deployment would set back what an autoscaler has found."""
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in cluster.all("HorizontalPodAutoscaler").values()}
    scaled |= {one["spec"]["scaleTargetRef"]["name"] for one in cluster.all("ScaledObject").values()}
    assert scaled == ({"api", "worker"} if cluster.all("ScaledObject") else {"api"})
    for name, deployment in cluster.all("Deployment").items():
        assert ("replicas" in deployment["spec"]) is (name not in scaled), name


def test_networks_let_through_what_they_must_and_no_more(cluster: Cluster) -> None:
    policies = cluster.all("NetworkPolicy")
    assert policies["nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    into: dict[str, set[str]] = {name: set() for name in cluster.pods}
    out_to_the_world: dict[str, set[Any]] = {name: set() for name in cluster.pods}
    for policy in policies.values():
        meant = cluster.matching(policy["spec"]["podSelector"].get("matchLabels", {}))
        assert meant or policy["metadata"]["name"] == "keda-asks-prometheus"
        for rule in policy["spec"].get("ingress", []):
            for name in meant:
                assert {port["port"] for port in rule["ports"]} <= {
                    one["name"] for one in cluster.container(name)["ports"]
                }
                for peer in rule.get("from", [{}]):
                    into[name] |= peers(cluster, peer)
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                if peer == {"ipBlock": {"cidr": "169.254.20.10/32"}}:
                    assert {port["port"] for port in rule["ports"]} == {53}
                elif "ipBlock" in peer:
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]
                    ports = [port["port"] for port in rule.get("ports", [])] or ["any"]
                    for name in meant:
                        out_to_the_world[name] |= set(ports)
                elif "podSelector" in peer:
                    (to,) = cluster.matching(peer["podSelector"]["matchLabels"])
                    assert {port["port"] for port in rule["ports"]} <= {
                        one["name"] for one in cluster.container(to)["ports"]
                    }
    using = {"api", "reaper", "worker"}
    assert into["proxy"] == {"everybody"}
    assert into["api"] == {"proxy", "prometheus", "namespace monitoring"}
    assert into["redis"] == into["postgres"] == using
    assert into["worker"] == into["reaper"] == set()
    assert {name for name, ports in out_to_the_world.items() if ports} == using
    assert out_to_the_world["api"] == out_to_the_world["worker"] == {443, 5432}
    assert "any" in out_to_the_world["reaper"]  # webhooks


def peers(cluster: Cluster, peer: dict[str, Any]) -> set[str]:
    """Who is meant by a peer of a policy."""
    if "namespaceSelector" in peer:
        return {f"namespace {name}" for name in peer["namespaceSelector"]["matchLabels"].values()}
    return cluster.matching(peer["podSelector"]["matchLabels"]) if "podSelector" in peer else {"everybody"}


def test_nothing_but_the_proxy_is_published(cluster: Cluster) -> None:
    assert [name for name, one in cluster.all("Service").items() if one["spec"].get("clusterIP") != "None"] == ["proxy"]
    assert not cluster.all("Ingress")


def test_variables_make_settings(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """API, reaper and workers start with them: names, values and the files that they name."""
    for variable in [one for one in os.environ if one.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(variable)
    for name in ("api", "reaper", "worker"):
        secrets = tmp_path / name
        secrets.mkdir()
        (volume,) = (one for one in cluster.pods[name]["spec"]["volumes"] if one["name"] == "secrets")
        for source in volume["projected"]["sources"]:
            data = cluster.all("Secret").get(source["secret"]["name"], {"data": {}})["data"]
            for item in source["secret"]["items"]:
                if item["key"] in data:
                    (secrets / item["path"]).write_bytes(base64.b64decode(data[item["key"]]))
        (mount,) = (one["mountPath"] for one in cluster.container(name)["volumeMounts"] if one["name"] == "secrets")
        with monkeypatch.context() as patch:
            for variable, value in cluster.environment(name).items():
                in_file = variable.endswith(FILE_SUFFIX)
                assert not in_file or value.startswith(f"{mount}/")
                patch.setenv(variable, value.replace(mount, str(secrets)) if in_file else value)
            settings = load_settings()
        assert settings.storage_url is not None
        assert len(settings.secrets_keys) == 1
        assert (settings.s3_secret_access_key is not None) is ("s3" in cluster.all("Secret"))
        assert re.fullmatch(r"postgresql\+psycopg://medsora:\w{40}@postgres:5432/medsora", settings.database_address)
        assert re.fullmatch(r"redis://medsora:\w{40}@redis:6379/0", settings.broker_address())


def test_without_a_bucket_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSORA_STORAGE_URL", settings_of_base()["MEDSORA_STORAGE_URL"])
    with pytest.raises(SettingsError, match="MEDSORA_STORAGE_URL"):
        load_settings()


def settings_of_base() -> dict[str, str]:
    """Variables of base/settings.env."""
    lines = (ROOT / "docker/kubernetes/base/settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_images_are_those_of_compose(full: Cluster, plain: Cluster) -> None:
    def default(image: str) -> str:
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", image)

    same = {name: name for name in ("proxy", "api", "reaper", "redis", "postgres", "prometheus")}
    for cluster, ours in ((full, "worker-gpu-0"), (plain, "worker-cpu")):
        for pod, service in {**same, "worker": ours}.items():
            image = default(COMPOSE[service]["image"])
            if cluster is full and image.startswith("medsora-"):
                image = f"registry.example.org/{image.removesuffix(':local')}:7"
            assert cluster.container(pod)["image"] == image


@pytest.mark.parametrize("name", ["proxy", "api", "reaper", "redis", "postgres", "prometheus"])
def test_parts_are_run_as_in_compose(full: Cluster, name: str) -> None:
    pod, container, service = full.pods[name]["spec"], full.container(name), COMPOSE[name]
    user, _, group = service["user"].partition(":")
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (int(user), int(group))
    assert container.get("command") == service.get("entrypoint")
    given = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service.get("command", [])]
    assert set(given) <= set(container.get("args", []))
    if name == "postgres":
        assert full.environment(name) == service["environment"]
    mounts = [re.sub(r"\$\{[^}]*\}", "", place) for place in service.get("volumes", [])]
    places = {place.split(":")[1] for place in mounts} | {place.split(":")[0] for place in service.get("tmpfs", [])}
    # certificates come in another way
    assert places - {"/var/www/acme"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


def test_workers_have_a_gpu_each(full: Cluster, plain: Cluster) -> None:
    assert full.container("worker")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert full.environment("worker")["MEDSORA_DEVICE"] == "cuda"
    assert "nvidia.com/gpu" not in plain.container("worker")["resources"]["limits"]
    assert plain.environment("worker")["MEDSORA_DEVICE"] == "cpu"


def test_all_have_longer_to_stop_than_they_take(cluster: Cluster) -> None:
    defaults = Settings(redis_url="redis://none")  # type: ignore[arg-type]
    grace_s = {name: pod["spec"]["terminationGracePeriodSeconds"] for name, pod in cluster.pods.items()}
    assert grace_s["worker"] >= defaults.drain_s + 60
    pause_s = {
        name: int(cluster.container(name)["lifecycle"]["preStop"]["exec"]["command"][1]) for name in ("api", "proxy")
    }
    assert grace_s["api"] >= pause_s["api"] + max(5, defaults.drain_s) + 10
    assert grace_s["proxy"] >= pause_s["proxy"] + 30
    assert grace_s["reaper"] >= defaults.drain_s + 10
    # the proxy asks the name server again every five seconds
    valid_s = re.search(r"resolver \S+ valid=(\d+)s", (ROOT / "docker/proxy/nginx.conf").read_text())
    assert valid_s is not None
    assert pause_s["api"] > int(valid_s[1])
    workers = cluster.all("Deployment")["worker"]["spec"]
    assert workers["progressDeadlineSeconds"] > defaults.worker_start_limit_s


def test_an_outage_of_the_database_restarts_nothing(cluster: Cluster) -> None:
    for name in OURS:
        for probe in ("startupProbe", "livenessProbe"):
            said = str(cluster.container(name).get(probe, ""))
            assert "health/ready" not in said
            assert "medsora-server" not in said
    api = cluster.container("api")
    assert api["readinessProbe"]["httpGet"]["path"] == "/health/live"
    migration_s = api["startupProbe"]["periodSeconds"] * api["startupProbe"]["failureThreshold"]
    assert migration_s >= 3600, "the schema is brought up to date before an API answers"


def test_connections_fit_the_database(full: Cluster) -> None:
    (most,) = (int(word.split("=")[1]) for word in full.container("postgres")["args"] if "max_connections" in word)
    apis = full.all("HorizontalPodAutoscaler")["api"]["spec"]["maxReplicas"] + 1  # one more in an update
    reapers = 2 * full.all("Deployment")["reaper"]["spec"]["replicas"]
    workers = full.all("ScaledObject")["worker"]["spec"]["maxReplicaCount"]
    assert most >= 25 * apis + 20 * reapers // 2 + 5 * workers + 10  # docs/postgresql.md, Size


def test_the_queue_can_ask_for_every_worker(full: Cluster) -> None:
    spec = full.all("ScaledObject")["worker"]["spec"]
    assert spec["minReplicaCount"] <= spec["maxReplicaCount"]
    jobs = float(spec["triggers"][0]["metadata"]["threshold"])
    assert jobs * spec["maxReplicaCount"] <= int(full.environment("api")["MEDSORA_MAX_QUEUED_JOBS"])


def test_names_that_are_asked_for_are_those_of_services(full: Cluster) -> None:
    def address(name: str) -> str:
        (port,) = (one["port"] for one in full.all("Service")[name]["spec"]["ports"])
        return f"{name}.medsora.svc.cluster.local:{port}"

    assert full.environment("proxy")["PROXY_API"] == address("api")
    assert "${PROXY_API:-" in (ROOT / "docker/proxy/start.sh").read_text()
    prefix = next(word.split("=")[1] for word in full.container("prometheus")["args"] if "route-prefix" in word)
    for trigger in full.all("ScaledObject")["worker"]["spec"]["triggers"]:
        assert trigger["metadata"]["serverAddress"] == f"http://{address('prometheus')}{prefix}"
    scraped = yaml.safe_load(full.all("ConfigMap")["prometheus"]["data"]["prometheus.yml"])["scrape_configs"]
    assert scraped[0]["static_configs"] == [{"targets": [address("api").replace(".medsora.svc.cluster.local", "")]}]


def test_configure_makes_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    assert configure(folder).returncode == 2
    assert configure(folder, "tpu", "clips.example.org", "s3://videos").returncode == 2
    assert configure(folder, "gpu", "clips.example.org", "videos").returncode == 2
    site = folder / "docker" / "kubernetes" / "site"
    assert not site.exists()
    assert configure(folder, "gpu", "clips.example.org", "s3://videos").returncode == 0
    made = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    secrets = {path.name: value.decode() for path, value in made.items() if path.parent.name == "secrets"}
    assert is_sealing_key(secrets["secrets_keys"])
    assert re.fullmatch(r"\w{40}", secrets["redis_password"])
    assert re.fullmatch(r"\w{40}", secrets["postgres_password"])
    assert secrets["redis_password"] != secrets["postgres_password"]
    assert (site / "secrets").stat().st_mode & 0o077 == 0
    again = configure(folder, "cpu", "other.example.org", "s3://others")
    assert (again.returncode, again.stdout) == (0, "")
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == made
    for ignored in (".gitignore", ".dockerignore"):
        assert re.search(r"^/?docker/kubernetes(/site/)?$", (ROOT / ignored).read_text(), re.MULTILINE)
