# Flags of every target. Contraction is off so that the same source gives the same bits with every
# compiler: kernels call fma explicitly where they mean it.
function(attend_compile_options target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -ffp-contract=off
    $<$<BOOL:${ATTEND_WERROR}>:-Werror>
    # GCC 12 reports false positives inside its own avx512 headers.
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
endfunction()

# attend_optimise_less(TARGET): for programs and tests, which spend their time in the library: their
# own code compiles in two thirds of the time.
function(attend_optimise_less target)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
endfunction()

# attend_sources(FILES...): adds files of the current folder to the library.
function(attend_sources)
  set(files ${ARGN})
  list(TRANSFORM files PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/")
  target_sources(attend PRIVATE ${files})
endfunction()

# attend_together(TARGET FILES...): compiles files of the current folder as a few, which spares reading
# the same headers again and again. Names of their unnamed namespaces must not collide.
function(attend_together target)
  if(NOT ATTEND_UNITY_BUILD OR NOT ARGN)
    return()
  endif()
  list(GET ARGN 0 first)
  string(MAKE_C_IDENTIFIER "${first}" name)
  set(number 0)
  foreach(file IN LISTS ARGN)
    math(EXPR group "${number} / 8")
    math(EXPR number "${number} + 1")
    cmake_path(ABSOLUTE_PATH file)
    set_source_files_properties("${file}" TARGET_DIRECTORY ${target} PROPERTIES UNITY_GROUP
                                "${name}_${group}")
  endforeach()
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
endfunction()

# attend_sources_together(FILES...): both of the above.
function(attend_sources_together)
  attend_sources(${ARGN})
  attend_together(attend ${ARGN})
endfunction()

# attend_component(LIST <list> NAME <name> SOURCES ...): one component = one folder.
function(attend_component)
  cmake_parse_arguments(A "" "NAME;LIST" "SOURCES" ${ARGN})
  attend_sources(${A_SOURCES})
  set_property(GLOBAL APPEND PROPERTY attend_${A_LIST} ${A_NAME})
endfunction()

# attend_add_components(<list> <MACRO> <dir>): adds every subfolder of <dir> that has a CMakeLists.txt
# and writes generated/<list>.inc with one line <MACRO>(name) a component. Adding one = adding a folder.
function(attend_add_components LIST MACRO DIR)
  file(GLOB kids CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/${DIR}/*/CMakeLists.txt")
  list(SORT kids)
  foreach(kid IN LISTS kids)
    get_filename_component(folder "${kid}" DIRECTORY)
    add_subdirectory("${folder}")
  endforeach()
  get_property(names GLOBAL PROPERTY attend_${LIST})
  attend_write_list(${LIST} ${MACRO} ${names})
endfunction()

# attend_write_list(<list> <MACRO> names...): writes generated/<list>.inc.
function(attend_write_list LIST MACRO)
  set(names ${ARGN})
  list(SORT names)
  list(TRANSFORM names REPLACE "(.+)" "${MACRO}(\\1)")
  list(JOIN names "\n" text)
  file(CONFIGURE OUTPUT "${PROJECT_BINARY_DIR}/generated/${LIST}.inc" CONTENT "${text}\n" @ONLY)
endfunction()

# attend_tests(<area> LIBS ... SOURCES ... ALONE ...): one test program attend_<area>_tests, one ctest
# entry. SOURCES are compiled together, those of ALONE are not.
function(attend_tests AREA)
  cmake_parse_arguments(A "" "" "SOURCES;LIBS;ALONE" ${ARGN})
  set(target attend_${AREA}_tests)
  add_executable(${target} ${A_SOURCES} ${A_ALONE})
  attend_together(${target} ${A_SOURCES})
  target_link_libraries(${target} PRIVATE attend ${A_LIBS} GTest::gmock GTest::gtest_main
                                          $<BUILD_INTERFACE:fmt::fmt-header-only>)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/tests
                                               ${PROJECT_BINARY_DIR}/generated)
  attend_compile_options(${target})
  attend_optimise_less(${target})
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  add_test(NAME ${AREA} COMMAND ${target})
endfunction()
