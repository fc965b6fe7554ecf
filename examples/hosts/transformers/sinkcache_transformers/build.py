"""Compiles the operators against the installed PyTorch, by PyTorch's own extension builder, once for each machine."""

import contextlib
import ctypes
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import torch

_here = pathlib.Path(__file__).resolve().parent


def operators():
    """The compiled library. Makes it where there is none for this source, PyTorch, compiler and processor."""
    sources = [_here / "csrc" / name for name in ("library.cpp", "extension.cpp")]  # side by side
    # Where the package was installed, or of the repository.
    above = _here.parents[3:4]
    include = next(p / "include" for p in (_here, *above) if (p / "include/sinkcache").is_dir())
    compiler = os.environ.get("CXX", "c++")
    flags = _flags(compiler)
    key = hashlib.sha256("\n".join([torch.__version__, compiler, *flags, _processor()]).encode())
    for file in [*sorted((_here / "csrc").iterdir()), *sorted(include.rglob("*.hpp"))]:
        key.update(file.read_bytes())

    from torch.utils import cpp_extension

    name = "sinkcache_torch"
    root = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / f"{name}_{key.hexdigest()[:16]}"
    library = folder / (name + cpp_extension.LIB_EXT)
    unsaid = folder / "unsaid"
    if library.exists():
        if unsaid.exists():
            _say(f"was compiled for this processor by pip: {compiler} {shlex.join(flags)}, into {folder}")
            with contextlib.suppress(OSError):
                unsaid.unlink()
        return library

    root.mkdir(parents=True, exist_ok=True)
    threads = "" if "-fopenmp" in flags else "; it will run on one thread, for PyTorch has not this compiler's OpenMP"
    _say(f"compiling for this processor, once: {compiler} {shlex.join(flags)}, into {folder}{threads}")
    began = time.monotonic()
    # Made elsewhere and moved when it is whole, so that a process that is ended, or two at once, do no harm.
    work = tempfile.mkdtemp(prefix=name, dir=root)
    os.environ["PATH"], path = os.environ["PATH"] + os.pathsep + os.path.dirname(sys.executable), os.environ["PATH"]
    try:
        cpp_extension.load(name, [str(s) for s in sources], extra_cflags=flags, build_directory=work,
                           extra_include_paths=[str(include), _eigen()], is_python_module=False, with_cuda=False)
        for leftover in pathlib.Path(work).glob("*.o"):
            leftover.unlink()
        try:
            os.rename(work, folder)
        except OSError:  # another process was faster
            if not library.exists():
                raise
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"sinkcache_transformers could not be compiled; it needs g++ 12, clang 14 or newer as c++, "
                           f"or as what the environment variable CXX names. {error}") from error
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(work, ignore_errors=True)
    _say(f"compiled in {time.monotonic() - began:.0f} s")
    return library


def _say(words):
    print(f"sinkcache_transformers: {words}", file=sys.stderr, flush=True)


def _takes(compiler, flag):
    return subprocess.run([*shlex.split(compiler), flag, "-x", "c++", "-E", os.devnull], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL).returncode == 0


def _flags(compiler):
    """For this processor: generic code is several times slower."""
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise RuntimeError(f"sinkcache_transformers found no C++ compiler {compiler}; Debian: apt-get install g++")
    flags = ["-O2", *next(([f] for f in ("-march=native", "-mcpu=native") if _takes(compiler, f)), [])]
    if "OpenMP" in torch.__config__.parallel_info() and _has_openmp_of(compiler):
        flags.append("-fopenmp")  # PyTorch's threads, by its own library: nothing more is linked
    return flags


def _has_openmp_of(compiler):
    """Whether PyTorch brings what this compiler makes of OpenMP: g++ and clang call different libraries, and with two
    of them threads would be counted by one and run by the other."""
    program = "void f(); void all() {\n#pragma omp parallel\n  f(); }"
    made = subprocess.run([*shlex.split(compiler), "-fopenmp", "-S", "-o", "-", "-x", "c++", "-"], input=program,
                          capture_output=True, text=True).stdout
    called = next((name for name in ("GOMP_parallel", "__kmpc_fork_call") if name in made), None)
    return called is not None and hasattr(ctypes.CDLL(torch._C.__file__), called)


def _processor():
    """What -march=native depends on: a home folder may be shared by several machines."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


def _eigen():
    """The folder that has Eigen/Core."""
    places = [os.environ.get("EIGEN3_INCLUDE_DIR"), *_pkg_config(), "/usr/include/eigen3", "/usr/local/include/eigen3",
              "/opt/homebrew/include/eigen3", os.path.join(sys.prefix, "include/eigen3")]
    places = [p for p in places if p]
    for place in places:
        if os.path.exists(os.path.join(place, "Eigen/Core")):
            return place
    raise RuntimeError("sinkcache_transformers found no Eigen/Core; Debian: apt-get install libeigen3-dev, Fedora: dnf "
                       "install eigen3-devel, Homebrew: brew install eigen, conda: conda install eigen. It looked in "
                       f"{', '.join(places)}; the environment variable EIGEN3_INCLUDE_DIR names another folder.")


def _pkg_config():
    try:
        flags = subprocess.run(["pkg-config", "--cflags-only-I", "eigen3"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [flag[2:] for flag in shlex.split(flags)]


if __name__ == "__main__":  # run by pip, which shows nothing of it: the first import says it
    (operators().parent / "unsaid").touch()
