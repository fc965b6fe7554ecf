"""Puts the library's headers, which lie outside of this folder, into the package and its sdist."""

import pathlib
import shutil

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


class BuildPy(build_py):
    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)  # what an earlier build left
        super().run()
        if not self.editable_mode:  # which finds the repository's
            copy_headers(pathlib.Path(self.build_lib) / inside)


class Sdist(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        copy_headers(pathlib.Path(base_dir) / inside)


setuptools.setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
