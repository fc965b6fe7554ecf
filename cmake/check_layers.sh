#!/bin/sh
# A header includes only headers from above it in this order, Eigen's core only from matrix.hpp on, and is read in
# one sitting: 350 lines at most, the hot kernel 250.
set -eu
cd "$(dirname -- "$0")/../include/sinkcache"

order='detail/macros_off detail/macros_on version detail/decimal status policy matrix detail/simd detail/halves format rope rope_keys softmax
       source detail/scratch detail/tile_rows detail/tile detail/tile_dots detail/tile_softmax detail/tile_values
       detail/rotated_keys detail/reader detail/hadamard detail/quantized_tile detail/quantized_pairs detail/quantized_dots detail/quantized_values quantized
       with_formats detail/part_rules not_finite detail/panel_sums detail/absorb workspace thread_pool storage cache_config any_kv_cache
       detail/erased tiered_storage detail/policy_cache detail/plain_cache detail/tiered_cache kv_cache layer_caches ggml_formats kv_memory kv_view
       joined attention_params detail/absorb_unrotated detail/query_block detail/schedule detail/call_bytes detail/learning attention
       host_threads openmp eviction scorer detail/choice detail/kept_rows detail/kept_tiers detail/query_log
       detail/scored_config detail/scored_state detail/eviction_event detail/learner
       detail/scored_cache scored_kv_cache policies key_policies redundancy_policies named_policies named_caches fmt sinkcache'

# shellcheck disable=SC2016 # awk's own variables
find . -name '*.hpp' | sort | xargs awk -v order="$order" '
  function fault(text) { print "include/sinkcache/" header ".hpp:" FNR ": " text; faults = 1 }
  BEGIN {
    n = split(order, names, " ")
    for (i = 1; i <= n; i++) layer[names[i]] = i
  }
  FNR == 1 {
    header = FILENAME
    gsub(/^\.\/|\.hpp$/, "", header)
    if (!(header in layer)) fault("has no place in the order that cmake/check_layers.sh lists")
  }
  FNR == (header == "detail/absorb" ? 251 : 351) { fault("is too long for one sitting") }
  /^[ \t]*#[ \t]*include/ {
    path = $0
    gsub(/^[^<"]*[<"]|[>"].*$/, "", path)
    if (path ~ /^(unsupported\/)?Eigen\// && (path != "Eigen/Core" || layer[header] < layer["matrix"]))
      fault("may not include <" path ">")
    if (sub(/^sinkcache\//, "", path) || $0 ~ /"/) {
      # The quoted form is relative to the header.
      if ($0 ~ /"/ && header ~ /^detail\// && !sub(/^\.\.\//, "", path)) path = "detail/" path
      sub(/\.hpp$/, "", path)
      if (!(path in layer)) fault("includes an unknown header, " path ".hpp")
      else if (layer[path] >= layer[header]) fault("may not include " path ".hpp, which is not above it")
    }
  }
  END { exit faults }'

# A host's macros are out of the way of every header that declares something.
faults=$(for header in *.hpp detail/*.hpp; do
  if [ "$header" = version.hpp ] || ! grep -q '^namespace' "$header"; then continue; fi
  grep -q 'macros_off.hpp"$' "$header" || echo "include/sinkcache/$header: does not include detail/macros_off.hpp"
  tail -n 1 "$header" | grep -q 'macros_on.hpp"$' || echo "include/sinkcache/$header: does not end with detail/macros_on.hpp"
done)
if [ -n "$faults" ]; then
  echo "$faults"
  exit 1
fi
