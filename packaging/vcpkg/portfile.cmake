# Filled in at a release: REPO, where it is published, and SHA512, of the tag's archive. With SHA512 0 vcpkg prints the
# right one and stops.
vcpkg_from_github(
  OUT_SOURCE_PATH SOURCE_PATH
  REPO OWNER/sinkcache
  REF "v${VERSION}"
  SHA512 0
  HEAD_REF main)

# Headers alone: there is nothing to build for debugging.
set(VCPKG_BUILD_TYPE release)
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DSINKCACHE_BUILD_TESTS=OFF -DSINKCACHE_BUILD_EXAMPLES=OFF -DSINKCACHE_BUILD_BENCHMARKS=OFF)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/sinkcache)
vcpkg_fixup_pkgconfig()

file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/lib" "${CURRENT_PACKAGES_DIR}/share/doc")
file(INSTALL "${CMAKE_CURRENT_LIST_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
