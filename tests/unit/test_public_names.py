"""``from staindiffuser import …``: every public name resolves, and loading the package loads nothing heavy."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["staindiffuser", "staindiffuser.client"])
def test_every_public_name_resolves(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, staindiffuser.client; sys.exit(bool({'numpy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
