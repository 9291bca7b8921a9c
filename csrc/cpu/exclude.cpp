#include <algorithm>

#include "napo_loss.h"

namespace napo::cpu {

void index_excluded(const IndexExcludedArgs& args, int) {
  const int64_t *triples = args.triples, count = args.count, users = args.users, owners = args.owners, n = args.n;
  int64_t* bounds = args.bounds;
  int32_t* place = args.place;
  NAPO_CHECK(owners * n <= INT32_MAX, "exclude: expected B' * N below 2^31, got %lld",
             static_cast<long long>(owners * n));
  const int64_t limits[3] = {users, owners, n};
  const char* names[3] = {"user", "owner", "negative"};
  const auto padding = [&](int64_t i) {
    return triples[3 * i] < 0 || triples[3 * i + 1] < 0 || triples[3 * i + 2] < 0;
  };
  // A counting sort by user: bounds[2u + 1] counts, then is where the next triple of u goes.
  std::fill(bounds, bounds + 2 * users, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (padding(i)) continue;
    for (int part = 0; part < 3; ++part) {
      NAPO_CHECK(triples[3 * i + part] < limits[part], "exclude: expected %s indices below %lld, got %lld in row %lld",
                 names[part], static_cast<long long>(limits[part]), static_cast<long long>(triples[3 * i + part]),
                 static_cast<long long>(i));
    }
    ++bounds[2 * triples[3 * i] + 1];
  }
  for (int64_t u = 0, next = 0; u < users; ++u) {
    const int64_t size = bounds[2 * u + 1];
    bounds[2 * u] = bounds[2 * u + 1] = next;
    next += size;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (padding(i)) continue;
    place[bounds[2 * triples[3 * i] + 1]++] = static_cast<int32_t>(triples[3 * i + 1] * n + triples[3 * i + 2]);
  }
  for (int64_t u = 0; u < users; ++u) {
    int32_t *begin = place + bounds[2 * u], *end = place + bounds[2 * u + 1];
    if (!std::is_sorted(begin, end)) std::sort(begin, end);
    bounds[2 * u + 1] = std::unique(begin, end) - place;
  }
}

}  // namespace napo::cpu
