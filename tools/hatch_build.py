"""Builds a wheel: what lies beside the package in a clone lies inside it in a wheel."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedFiles(BuildHookInterface):
    """An editable installation gets no copies: it finds the clone's own files."""

    def initialize(self, version, build_data):
        if version == "standard":
            for name in ("input.txt", "space"):
                build_data["force_include"][name] = f"shakespeare_gpt/{name}"
