"""The Dockerfile: what it runs while an image is built, and what a container runs then, is run here without either."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastclstm.engines import disk_cache
from fastclstm.engines.cpu import compilation

ROOT = Path(__file__).parents[1]
KERNELS = "/opt/kernels"
"""Where images keep them."""

FIRST_CALL = """
import os
os.getuid = lambda: 10001  # whom the list of accounts does not know
import numpy as np
from numba.core import event
import fastclstm
layer = fastclstm.ConvLSTM2D(1, 8, 3, num_layers=2)
with event.install_recorder("numba:compile") as compiled:
    assert np.isfinite(layer(np.random.default_rng(0).random((1, 3, 32, 32, 1)))).all()
print(len(compiled.buffer))
"""


def instructions(name):
    """What follows each instruction of a name."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [rest for word, _, rest in (line.partition(" ") for line in lines) if word == name]


def without_rights_of_root():
    """Have what this process runs next ask for permissions as every user must, also as root."""
    drop_from_bounding_set, override_permissions = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, override_permissions, 0, 0, 0)


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="permissions as Linux has them")
def test_a_user_without_a_home_compiles_nothing_and_writes_nothing(tmp_path):
    """The folder of everyday runs saves the compilation: that warm-ups leave out nothing, test_cpu_warmup tells."""
    kernels = tmp_path / "kernels"
    if everyday := compilation.cache_folder():
        shutil.copytree(everyday, kernels / everyday.parent.name / everyday.name)
    assert any(f"{disk_cache.CACHE_VARIABLE}={KERNELS}" in pairs.split() for pairs in instructions("ENV"))
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "PYTHONDONTWRITEBYTECODE": "1", disk_cache.CACHE_VARIABLE: str(kernels)}  # fmt: skip

    def run(*command, **options):
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=900, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    commands = [line for line in instructions("RUN") if "fastclstm warmup" in line or KERNELS in line]
    assert len(commands) == 2
    for command in commands:
        run("sh", "-c", command.replace(KERNELS, str(kernels)))
    before = files_below(kernels)
    assert int(run(sys.executable, "-c", FIRST_CALL, preexec_fn=without_rights_of_root)) == 0

    entry, default = (json.loads(instructions(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    told = run(*entry, *default, preexec_fn=without_rights_of_root)
    ours = sum(path.stem.endswith(compilation.processor()) for path in kernels.rglob("*.pickle"))
    assert f"{ours} kernels for this processor" in told or not everyday
    assert files_below(kernels) == before
    with pytest.raises(AssertionError, match=f"cannot be kept in {kernels}"):  # and it would have been refused
        run(*entry, "warmup", preexec_fn=without_rights_of_root)
    kernels.chmod(0o755)


def test_what_the_image_is_built_from_is_what_the_package_is_made_of():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
              *wheel["packages"], *wheel["force-include"]}  # fmt: skip
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == needed
    assert "COPY . /src" in (ROOT / "Dockerfile").read_text()


def test_containers_run_as_nobody_in_particular():
    (user,) = instructions("USER")
    assert user.split(":")[0].isdigit()  # which Kubernetes can tell from root
    assert int(user.split(":")[0]) > 0
