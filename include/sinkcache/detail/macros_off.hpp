// Hosts' macros by names that the library uses: gone from here on, back after macros_on.hpp. Every header that declares
// something includes the two, so they have no include guard. Both list the same names.

#pragma push_macro("check")    // Unreal Engine, Apple's AssertMacros.h
#pragma push_macro("require")  // Apple's AssertMacros.h
#pragma push_macro("min")      // windows.h
#pragma push_macro("max")
#pragma push_macro("I")  // complex.h
#pragma push_macro("always_inline")
#pragma push_macro("noinline")
#pragma push_macro("cold")
#undef check
#undef require
#undef min
#undef max
#undef I
#undef always_inline
#undef noinline
#undef cold

// What g++ says of correct code: of every array whose bound a template's int gives, and of casts from positions to
// sizes, which are one type here and two on a Mac. clang checks conversions of signs.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wuseless-cast"
#endif
