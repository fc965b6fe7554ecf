// What a small KV cache costs a trained language model, policy by policy. The model is run by examples/engine as a host
// engine would run it; sinkcache does the caches and the attention.

#include "compare/program.hpp"

int main(int argc, char** argv) { return compare::compare_policies(argc, argv); }
