"""The manifests of `deploy/kubernetes` and of the pages, against the schemas of the Kubernetes API and against Postern.

No cluster runs here. The schemas come with the package `kubernetes-validate`, for the oldest and the newest version
that the manifests are for. What a schema cannot say, such as which names belong together, is tested too.
"""

import base64
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

from support import pb
from support.environment import own_environment

DEPLOY = pb.REPOSITORY / "deploy" / "kubernetes"
# The oldest is the first in which a pause before the end of a container needs no shell. The last is the newest known.
VERSIONS = ("1.30", "1.37")
DRAIN_SECONDS = 30
SERVER, MIGRATION = "server", "migration"
# Kustomize's own files are not sent to the API.
KUSTOMIZE = "kustomize.config.k8s.io"
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
SECRETS = {"url": "postgres://postern:secret@db.example.com/postern", "master-key": MASTER_KEY, "password": "secret"}


def resources(*parts: str) -> list[dict]:
    """The documents of the files below a directory of `deploy/kubernetes`."""
    files = sorted(DEPLOY.joinpath(*parts).rglob("*.yaml"))
    documents = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    return [document for document in documents if not document["apiVersion"].startswith(KUSTOMIZE)]


def of_the_pages() -> list[dict]:
    """The manifests that the pages show."""
    found = []
    for page in sorted((pb.REPOSITORY / "docs").glob("*.md")):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            if re.search(r"^apiVersion: (v1|apps/v1|batch/v1)$", block, re.MULTILINE):
                found += yaml.safe_load_all(block)
    return found


def one(kind: str, *parts: str) -> dict:
    (found,) = (resource for resource in resources(*parts) if resource["kind"] == kind)
    return found


def pod_of(part: str) -> dict:
    """The specification of the pods of the Deployment or the Job."""
    return one("Job" if part == MIGRATION else "Deployment", part)["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid(version):
    manifests = resources() + of_the_pages()
    assert {"Deployment", "Service", "Job", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"} <= {
        manifest["kind"] for manifest in manifests
    }
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pod: pod.update(terminationGracePeriodSecond=45), id="a misspelt field"),
        pytest.param(lambda pod: pod.update(terminationGracePeriodSeconds="45s"), id="a value of another type"),
        pytest.param(lambda pod: pod["containers"][0].pop("name"), id="a field that is missing"),
        pytest.param(lambda pod: pod["containers"][0]["readinessProbe"].update(http={}), id="a probe of no kind"),
    ],
)
def test_the_schemas_refuse_what_is_wrong(change):
    deployment = one("Deployment", SERVER)
    change(deployment["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_kustomize_names_every_file():
    for part in (SERVER, MIGRATION):
        kustomization = yaml.safe_load((DEPLOY / part / "kustomization.yaml").read_text())
        files = {file.name for file in (DEPLOY / part).glob("*.yaml")} - {"kustomization.yaml"}
        assert set(kustomization["resources"]) == files
        assert kustomization["components"] == ["../image"], "the place where the image is pinned"
        assert pod_of(part)["containers"][0]["image"] == "postern", "the name that Kustomize replaces"


def test_selectors_and_names_belong_together():
    deployment = one("Deployment", SERVER)
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    pod = pod_of(SERVER)
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    services = [resource for resource in resources(SERVER) if resource["kind"] == "Service"]
    budget = one("PodDisruptionBudget", SERVER)["spec"]["selector"]["matchLabels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], budget, *(it["spec"]["selector"] for it in services)]
    assert all(selector == labels for selector in selectors)
    assert {port["targetPort"] for service in services for port in service["spec"]["ports"]} == {"grpc", "http"}
    policy = one("NetworkPolicy", SERVER)["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    job = one("Job", MIGRATION)["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= job.items(), "the migration reaches the database too"
    assert not budget.items() <= job.items(), "and is no replica"
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports.keys()
    target = one("HorizontalPodAutoscaler", SERVER)["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    for part in (SERVER, MIGRATION):
        volumes = {volume["name"] for volume in pod_of(part)["volumes"]}
        assert {mount["name"] for mount in pod_of(part)["containers"][0]["volumeMounts"]} == volumes
    # The ports of the image.
    exposed = re.search(r"^EXPOSE (.*)$", (pb.REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert sorted(ports.values()) == sorted(map(int, exposed.split()))
    assert {resource["metadata"].get("namespace", "postern") for resource in resources()} == {"postern"}


@pytest.mark.parametrize("part", [SERVER, MIGRATION])
def test_pods_have_no_rights_that_they_do_not_need(part):
    pod = pod_of(part)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    # Nobody but the group may read the secrets, and Postern is in it (fsGroup).
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"] == 10001
    assert {volume["secret"]["defaultMode"] for volume in pod["volumes"]} == {0o440}
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    secrets = {volume["secret"]["secretName"] for volume in pod["volumes"]}
    if part == MIGRATION:
        assert secrets == {"postern-database"}, "it needs no other secret"


def test_the_grace_is_longer_than_an_end_takes():
    pod = pod_of(SERVER)
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    page = (pb.REPOSITORY / "docs" / "configuration.md").read_text()
    lame_duck = int(re.search(r"`POSTERN_LAME_DUCK` \| `(\d+)s`", page)[1])
    assert pod["terminationGracePeriodSeconds"] > pause + lame_duck + DRAIN_SECONDS


def test_an_outage_of_the_database_restarts_nothing():
    """Liveness and start ask whether the process answers. Only readiness asks for the database."""
    (container,) = pod_of(SERVER)["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["grpc"]["port"] == 50051


def test_postern_takes_the_settings_of_the_deployment(binary, tmp_path):
    (container,) = pod_of(SERVER)["containers"]
    settings = dict(one("ConfigMap", SERVER)["data"])
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for variable in container["env"]:
        path = variable["value"]
        assert path.rpartition("/")[0] in mounts
        secret = tmp_path / path.rpartition("/")[2]
        secret.write_text(SECRETS[secret.name])
        settings[variable["name"]] = str(secret)
    settings = {name.removeprefix("POSTERN_").lower(): value for name, value in settings.items()}
    command = [binary, "config", "check"]
    checked = subprocess.run(command, env=own_environment(**settings), capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
