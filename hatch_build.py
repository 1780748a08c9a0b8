"""The build's own step: the packages lie in folders at the top of the repository, not below ``src/staindiffuser``.

A wheel takes the folders from where they lie. An editable install reaches them through the links in
``src/staindiffuser``. Either way a missing folder fails the build, which would otherwise succeed without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


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
