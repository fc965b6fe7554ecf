# What `hook` has llama.cpp's src/CMakeLists.txt include: the memory and attention of this library, C++20 of its own.
find_package(Eigen3 3.4 REQUIRED NO_MODULE)
set(SINKCACHE_FLAGS "-march=native" CACHE STRING "Instruction set that sinkcache is compiled for")
add_library(llama-sinkcache OBJECT "${CMAKE_CURRENT_LIST_DIR}/sinkcache_llama.cpp"
            "${CMAKE_CURRENT_LIST_DIR}/sinkcache_cells.cpp")
target_compile_features(llama-sinkcache PRIVATE cxx_std_20)
target_include_directories(llama-sinkcache PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_include_directories(llama-sinkcache SYSTEM PRIVATE "${CMAKE_CURRENT_LIST_DIR}/../../../include")
target_compile_options(llama-sinkcache PRIVATE ${SINKCACHE_FLAGS})
target_link_libraries(llama-sinkcache PRIVATE ggml Eigen3::Eigen)
set_target_properties(llama-sinkcache PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_include_directories(llama-sinkcache PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/../include")
target_include_directories(llama PRIVATE "${CMAKE_CURRENT_LIST_DIR}")
target_sources(llama PRIVATE $<TARGET_OBJECTS:llama-sinkcache>)
