// One file for the compiler, of those that include PyTorch's headers: these take most of its time.
#include "attend.cpp"
#include "layer.cpp"
