import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, load
from conan.tools.layout import basic_layout
from conan.tools.scm import Version

required_conan_version = ">=2.0"


class SinkcacheConan(ConanFile):
    name = "sinkcache"
    description = "Sink-aware KV caches for LLM inference, and the attention that reads them"
    license = "MIT"
    topics = ("llm", "kv-cache", "attention", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    no_copy_source = True

    @property
    def _root(self):  # of the sources, from where this file lies
        return os.path.join(self.recipe_folder, os.pardir, os.pardir)

    def set_version(self):
        header = load(self, os.path.join(self._root, "include", "sinkcache", "version.hpp"))
        self.version = ".".join(re.findall(r"#define SINKCACHE_VERSION_\w+ (\d+)", header))

    def export_sources(self):
        for pattern in ("include/*", "LICENSE"):
            copy(self, pattern, src=self._root, dst=self.export_sources_folder)

    def layout(self):
        basic_layout(self, src_folder=".")

    def requirements(self):
        self.requires("eigen/[>=3.4 <6]")

    def package_id(self):
        self.info.clear()

    def validate(self):
        if self.settings.get_safe("compiler.cppstd"):
            check_min_cppstd(self, 20)
        least = {"gcc": "12", "clang": "14", "apple-clang": "15"}
        compiler = str(self.settings.compiler)
        if compiler not in least:
            raise ConanInvalidConfiguration(f"{self.ref} needs g++ or clang, not {compiler}")
        if Version(self.settings.compiler.version) < least[compiler]:
            raise ConanInvalidConfiguration(f"{self.ref} needs {compiler} {least[compiler]} or newer")

    def package(self):
        copy(self, "LICENSE", src=self.source_folder, dst=os.path.join(self.package_folder, "licenses"))
        copy(self, "*", src=os.path.join(self.source_folder, "include"),
             dst=os.path.join(self.package_folder, "include"))

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_file_name", "sinkcache")
        self.cpp_info.set_property("cmake_target_name", "sinkcache::sinkcache")
        self.cpp_info.set_property("pkg_config_name", "sinkcache")
        self.cpp_info.requires = ["eigen::eigen"]
