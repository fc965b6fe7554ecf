// The end of what macros_off.hpp began.

#pragma pop_macro("check")
#pragma pop_macro("require")
#pragma pop_macro("min")
#pragma pop_macro("max")
#pragma pop_macro("I")
#pragma pop_macro("always_inline")
#pragma pop_macro("noinline")
#pragma pop_macro("cold")

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
