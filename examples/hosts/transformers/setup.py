"""Puts the library's headers, which lie outside of this folder, into the package and its sdist, and compiles the
operators."""

import os
import pathlib
import shutil
import subprocess
import sys

import setuptools
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

here = pathlib.Path(__file__).resolve().parent
inside = pathlib.Path("sinkcache_transformers/include")
# Of an unpacked sdist, or of the repository.
above = [folder / "include" for folder in here.parents[2:3]]  # where pip unpacks an sdist there is none
headers = next(p for p in (here / inside, *above) if (p / "sinkcache").is_dir())


def copy_headers(to):
    if pathlib.Path(to).resolve() != headers.resolve():
        shutil.copytree(headers, to, dirs_exist_ok=True)


def compile_operators():
    """Now, while pip is waited for anyway, where the Python that it installs into has PyTorch: the environment that pip
    makes to build in hides it. Else the first import compiles them, or says what is missing."""
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hiding}
    done = subprocess.run([sys.executable, here / "sinkcache_transformers/build.py"], env=environment,
                          capture_output=True, text=True)
    why_not = "".join(done.stderr.strip().splitlines()[-1:])
    print(done.stderr if done.returncode == 0 else f"not compiled now, but by the first import: {why_not}")


class BuildPy(build_py):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left
        super().run()
        if not self.editable_mode:  # which finds the repository's
            copy_headers(pathlib.Path(self.build_lib) / inside)
        compile_operators()


class Sdist(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        copy_headers(pathlib.Path(base_dir) / inside)


setuptools.setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
