"""Build steps that pyproject.toml cannot express: the C data plane (cffi) and the static guest agent."""

import runpy

from setuptools import Command, setup
from setuptools.command.build import build


class BuildAgent(Command):
    """Compile the guest agent next to its sources, where package data is collected from."""

    description = "compile the guest agent"
    user_options = ()

    def initialize_options(self):
        """No options."""

    def finalize_options(self):
        """No options."""

    def run(self):
        # Not an import: the package is not importable before it is built.
        runpy.run_path("src/kvmlite/guest/build_agent.py")["build"]()


class BuildWithAgent(build):
    """The agent first: build_py copies it as package data."""

    sub_commands = [("build_agent", None), *build.sub_commands]


setup(
    cffi_modules=["src/kvmlite/_native/build.py:ffibuilder"],
    cmdclass={"build": BuildWithAgent, "build_agent": BuildAgent},
)
