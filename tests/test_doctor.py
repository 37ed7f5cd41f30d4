import json
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

import recsys.versions
from recsys import doctor
from recsys.doctor import Check
from recsys.versions import VersionError, versions


def test_this_machine_is_well():
    run = subprocess.run([sys.executable, "-m", "recsys.doctor", "--json"], capture_output=True, text=True, timeout=180)
    found = json.loads(run.stdout)
    assert run.returncode == 0, found
    assert found["ok"]
    assert found["versions"] == versions()
    assert {check["name"] for check in found["checks"]} >= {"versions", "fbgemm operators", "all-to-all"}


def test_a_failure_is_reported_with_its_way_out(monkeypatch, capsys):
    remedy = "pip install " + "a-rather-long-name " * 20
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("good", "fine"), lambda: Check("bad", "broken", remedy)))
    assert doctor._examine(as_json=False) == 1
    assert f"bad: {remedy}".strip() in capsys.readouterr().out
    assert doctor._examine(as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert [check["ok"] for check in found["checks"]] == [True, False]


def test_mismatch_becomes_problem_and_remedy(monkeypatch):
    def mismatch():
        raise VersionError("they differ.", "Mend it with:\n  pip install x")

    monkeypatch.setattr(doctor, "check_versions", mismatch)
    assert doctor.check_trio() == Check("versions", "they differ.", "pip install x")


def test_a_driver_that_is_missing_fails_the_versions(monkeypatch):
    found = {"torch": "2.13.0+cu130", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}
    monkeypatch.setattr(recsys.versions, "_version", found.get)
    monkeypatch.setattr(recsys.versions, "_has_nvml", lambda: False)
    check = doctor.check_trio()
    assert not check.ok
    assert check.detail.endswith("libnvidia-ml.so.1 is not here.") and "--gpus all" in check.remedy


@pytest.mark.parametrize(("check", "least"), [(doctor.check_disk, doctor.MIN_DISK), (doctor.check_shm, doctor.MIN_SHM)])
def test_too_little_room_fails(monkeypatch, check, least):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=least))
    assert check().ok
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=least - 1))
    assert not check().ok


def test_a_name_that_does_not_resolve_fails(monkeypatch):
    assert doctor.check_name().ok
    monkeypatch.setattr(socket, "getfqdn", lambda: "host.invalid")
    check = doctor.check_name()
    assert not check.ok
    assert "host.invalid does not resolve" in check.detail
    assert "/etc/hosts" in check.remedy


@pytest.mark.slow
def test_exchange_reports_a_rank_that_fails(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    check = doctor.check_exchange()
    assert not check.ok
    assert "rank 0" in check.detail
    assert "GLOO_SOCKET_IFNAME" in check.remedy
