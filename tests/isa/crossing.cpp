// A matrix that crosses between files compiled for different instruction sets. By itself it makes the linker refuse
// (-DBY_NAME); inside of a struct, of which the linker knows nothing, its memory is freed as it was allocated.

#include <sinkcache/matrix.hpp>

struct holder {
  sinkcache::matrix m;
};
holder made(int rows);
void resize(holder& h);
float sum(const sinkcache::matrix& m);

#if defined(ELSEWHERE)
holder made(int rows) { return {sinkcache::matrix::Ones(rows, 7)}; }
void resize(holder& h) { h.m.setConstant(5, 777, 3.f); }
float sum(const sinkcache::matrix& m) { return m.sum(); }
#else
int main() {
  for (int i = 1; i < 100; ++i) {
    holder h = made(i), filled{sinkcache::matrix::Zero(1, i)};
    resize(filled);
    if (h.m.sum() != static_cast<float>(7 * i) || filled.m(4, 776) != 3.f) return 1;
  }
#if defined(BY_NAME)
  return sum(sinkcache::matrix::Zero(1, 1)) == 0.f ? 0 : 1;
#endif
}
#endif
