#pragma once

// What every test file would compile for itself, once.

#include <engine/kernels.hpp>
#include <sinkcache/sinkcache.hpp>

#include "catch.hpp"
#include "oracle.hpp"
