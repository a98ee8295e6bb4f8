"""What a session gets when it asks for little, for much, and for more than there is."""

import json

import pytest

from beaker_sessions import wire
from beaker_sessions.errors import Error
from beaker_sessions.executor import plan
from beaker_sessions.model import Claim, Identity, Request, Resources, Session
from beaker_sessions.sandbox import LABEL, Image

NODE = Resources(gpus=4, cpus=32.0, memory=256 << 30)
ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada"})


def test_one_gpu_and_its_share_by_default():
    got = plan.defaults(Request(), NODE, "base")
    assert (got.gpus, got.cpus, got.memory, got.image) == (1, 8.0, 64 << 30, "base")


def test_the_share_grows_with_the_gpus():
    got = plan.defaults(Request(gpus=3, image="mine"), NODE, "base")
    assert (got.cpus, got.memory, got.image) == (24.0, 192 << 30, "mine")


def test_all_shares_together_are_no_more_than_there_is():
    small = Resources(3, 2.0, 1 << 30)
    assert 3 * plan.defaults(Request(), small, "base").cpus <= 2.0


def test_no_gpu_reserves_nothing():
    assert plan.amount(plan.defaults(Request(gpus=0), NODE, "base")) == Resources()


def test_a_node_without_gpus_gives_none_by_default():
    assert plan.defaults(Request(), Resources(0, 8.0, 1 << 30), "base").gpus == 0


def test_what_was_asked_for_is_kept():
    got = plan.defaults(Request(gpus=2, cpus=0.5, memory=8 << 20), NODE, "base")
    assert plan.amount(got) == Resources(2, 0.5, 8 << 20)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(gpus=99), "--gpus 99: this node has 4"),
        (Request(gpus=0, cpus=33.0), "--cpus 33: this node has 32"),
        (Request(memory=1024), "--memory 1024 bytes: no session runs with less than 6MiB"),
        (Request(shared_memory=1 << 50), "--shared-memory 1PiB: this node has 256GiB"),
        (Request(gpus=0, memory=1 << 40), "--memory 1024.0GiB: this node has 256.0GiB for sessions"),
    ],
)
def test_what_this_node_cannot_give_is_an_error_at_once(request_, says):
    with pytest.raises(Error) as refused:
        plan.defaults(request_, NODE, "base")
    assert (refused.value.code, refused.value.message) == ("invalid", says)


def spec(request, claim):
    request = plan.defaults(request, NODE, "base")
    session = Session("01HW8DZJFR6QEAFAABCTCR2BY2", "ada", "n1", request)
    return plan.spec(
        session.id, request, claim, ADA, Image("sha256:1", "base"), (), capacity=NODE,
        node={"id": "n1", "hostname": "gpu-1.lab"}, owner="/var/lib/beaker", job=wire.job(session),
    )  # fmt: skip


def test_a_session_that_reserved_nothing_yields_first():
    idle, claimed = spec(Request(gpus=0), Claim()), spec(Request(gpus=4), Claim(("a", "b", "c", "d"), 32.0, 256 << 30))
    assert (idle.cpu_weight, claimed.cpu_weight) == (1, 10000)
    assert idle.oom_score_adj > claimed.oom_score_adj > 0
    assert claimed.memory == 256 << 30


def test_the_label_brings_the_session_back_without_its_environment():
    made = spec(Request(gpus=0, env=(("TOKEN", "s3cret"),), command=("train",)), Claim())
    assert made.labels[LABEL] == made.id
    assert "s3cret" not in str(made.labels)
    assert wire.session(json.loads(made.labels[plan.LABEL_JOB])).request.command == ("train",)
    assert made.env["TOKEN"] == "s3cret"


def test_it_starts_at_home_unless_told_otherwise():
    assert spec(Request(), Claim()).workdir == "/home/ada"
    assert spec(Request(bare=True), Claim()).workdir == "/"
    assert spec(Request(workdir="/net/data"), Claim()).workdir == "/net/data"


@pytest.mark.parametrize(
    "path", ["/proc/x", "/./proc/x", "/home/ada/x", "/home/./ada/x", "/net//x", "/net/x", "/x/", "//x", "/"]
)
def test_a_secrets_file_is_the_sessions_own(path: str):
    with pytest.raises(Error, match="--secret-mount"):
        plan.check_mounts(Request(secret_mounts=(("KEY", path),)), ADA, ["/net"])


@pytest.mark.parametrize("path", ["/", "net", "", "/net/", "/net/../x", "/proc", "/run/beaker/x"])
def test_what_every_session_sees_is_a_directory_of_its_own(path: str):
    with pytest.raises(Error, match="mountPaths"):
        plan.check_places(["/net", path])
    plan.check_places(["/net", "/run/data"])
