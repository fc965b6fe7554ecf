// What do StreamingLLM's positions cost, when the query is rotated, when the keys are rotated on in place, and when the
// cache is copied and rotated anew as its authors' program does? Method and reading: README.md.

#include <cstring>

#include "suite.hpp"

namespace {

using namespace measure;
using sinkcache::rope;

// Rows of one layer, head by head, without a ring: what an engine keeps that turns its keys.
template <class F>
class rows {
 public:
  explicit rows(const shape& of, index_t visible) : of_(of), visible_(visible), k_(bytes()), v_(bytes()) {
    const matrix k = normal(visible, of.num_kv_heads * of.head_dim, 1), v = normal(visible, k.cols(), 2);
    for (index_t head = 0; head < of.num_kv_heads; ++head)
      for (index_t i = 0; i < visible; ++i) {
        F::encode(k.row(i).data() + head * of.head_dim, of.head_dim, key(head, i));
        F::encode(v.row(i).data() + head * of.head_dim, of.head_dim, v_.data() + offset(head, i));
      }
  }

  std::byte* key(index_t head, index_t i) { return k_.data() + offset(head, i); }

  // Rotated as they are; attention then has nothing to turn.
  sinkcache::kv_view<F> view() const {
    const index_t token = F::block_bytes(of_.head_dim) / F::element_bytes;
    const sinkcache::kv_strides strides{.head = visible_ * token, .token = token};
    return {{.num_kv_heads = of_.num_kv_heads,
             .head_dim = of_.head_dim,
             .window = 0,
             .positions = sinkcache::positions::absolute,
             .inputs = sinkcache::inputs::rotated},
            {strides, strides},
            sinkcache::kv_piece{.tokens = visible_, .k = k_.data(), .v = v_.data()},
            visible_};
  }

  // Without the key at `num_sink_tokens`, the oldest that is not pinned.
  void copy_and_evict(const rows& from) {
    const auto pinned = static_cast<std::size_t>(offset(0, num_sink_tokens));
    const auto newer = static_cast<std::size_t>(offset(0, visible_ - num_sink_tokens - 1));
    for (index_t head = 0; head < of_.num_kv_heads; ++head)
      for (auto [to, all] : {std::pair(&k_, &from.k_), std::pair(&v_, &from.v_)}) {
        std::memcpy(to->data() + offset(head, 0), all->data() + offset(head, 0), pinned);
        std::memcpy(to->data() + offset(head, num_sink_tokens), all->data() + offset(head, num_sink_tokens + 1), newer);
      }
  }

  // Keys from `first` on, rotated into `to`.
  template <class Angles>
  void rotate(const rope& rope, const Angles& angles_at, index_t first, rows& to) {
    std::vector<float> floats(static_cast<std::size_t>(of_.head_dim));
    for (index_t i = first; i < visible_; ++i)
      for (index_t head = 0; head < of_.num_kv_heads; ++head) {
        F::decode(key(head, i), 0, of_.head_dim, floats.data());
        rope.rotate(angles_at(i), floats.data(), of_.head_dim, floats.data());
        F::encode(floats.data(), of_.head_dim, to.key(head, i));
      }
  }

 private:
  index_t offset(index_t head, index_t i) const { return (head * visible_ + i) * F::block_bytes(of_.head_dim); }
  std::size_t bytes() const { return static_cast<std::size_t>(offset(of_.num_kv_heads, 0)); }

  shape of_;
  index_t visible_;
  std::vector<std::byte> k_, v_;
};

enum class against { absolute, rotating_keys, copying };

template <class F>
void positions(benchmark::State& state, const effort& effort, const shape& of, against other) {
  const index_t visible = short_visible(of);
  auto config = config_of(of, visible);
  layers<F> ours(config, visible + visible / 3);
  const matrix q = queries(of, 1);
  matrix out(1, q.cols()), other_out = out;
  const sinkcache::attention attention(params_of(of));
  sinkcache::workspace workspace;
  const double flops = 4. * static_cast<double>(of.num_qo_heads * of.head_dim * visible);

  config.positions = sinkcache::positions::absolute;
  layers<F> absolute(config, other == against::absolute ? visible + visible / 3 : 1);
  const rope rope(inv_freq(of.head_dim));
  rope::angles one_less;
  rope.angles_at(-1, false, one_less);
  std::vector<rope::angles> table(static_cast<std::size_t>(visible));  // made once, as the reference does
  for (index_t i = 0; i < visible; ++i) rope.angles_at(i, true, table[static_cast<std::size_t>(i)]);
  rows<F> keys(of, visible), copy(of, visible), rotated(of, visible);
  const auto rotating_keys = [&](std::size_t) {
    keys.rotate(
        rope, [&](index_t) -> auto& { return one_less; }, num_sink_tokens, keys);
    attention.decode(q, keys.view(), other_out, workspace);
  };
  // Two copies a token, one to evict and one to append, then all keys are rotated to their places.
  const auto copying = [&](std::size_t) {
    copy.copy_and_evict(keys);
    keys.copy_and_evict(copy);
    keys.rotate(
        rope, [&](index_t i) -> auto& { return table[static_cast<std::size_t>(i)]; }, 0, rotated);
    attention.decode(q, rotated.view(), other_out, workspace);
  };
  const auto absolutely = [&](std::size_t) { attention.decode(q, absolute.cache(0), other_out, workspace); };
  const rounds rounds({
                          [&](std::size_t) { multiply_add(flops); },
                          [&](std::size_t round) { ours.read(round); },
                          other == against::absolute        ? rounds::contender(absolutely)
                          : other == against::rotating_keys ? rounds::contender(rotating_keys)
                                                            : rounds::contender(copying),
                          [&](std::size_t) { attention.decode(q, ours.cache(0), out, workspace); },
                      },
                      effort);
  suite::row row(state, rounds, 3);
  row.ratio("other_over_ours", rounds.ratio(2, 3));
  row.limits(0, 1, 3);
  row.number("error", error_of(ours.cache(0), attention.params(), q.data(), out.data()));
}

}  // namespace

int main(int argc, char** argv) {
  suite::program program(argc, argv);
  suite::for_each_format<sinkcache::f32, sinkcache::f16>([&](auto format, const std::string& name) {
    using F = decltype(format);
    for (const shape& of : {shapes[0], shapes[1], shapes[2]})
      for (const auto& [other, against_what] :
           {std::pair(against::absolute, "absolute"), std::pair(against::rotating_keys, "rotating_keys"),
            std::pair(against::copying, "copying")})
        program.add("positions/" + name + "/" + of.name + "/" + against_what,
                    [of, other = other](auto& state, const effort& effort) { positions<F>(state, effort, of, other); });
  });
  return program.main();
}
