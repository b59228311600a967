// The mean over devices of what each of them has, computed by all of them at once.
//
// Compiled and called by mean.py, which says what the arguments are. In XLA's own all-reduce whoever comes first sleeps
// until it is woken, which takes longer than the mean of a small network's gradients. Here it looks out for the others,
// for a while: the thread may be one that another device needs. Then it goes, those who come later finish the call for
// it, and its device continues on a thread of XLA's pool.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr auto kPatience = std::chrono::microseconds(500);
constexpr int64_t kChunk = 4096;  // numbers that one thread takes at a time

// One mean: what each device brought to it, and how far it is.
struct Meeting {
  struct Place {
    std::vector<const float*> from;
    std::vector<float*> to;
  };
  explicit Meeting(int64_t devices) : places(devices) {}

  // Changed under the table's mutex, and no more once it has begun.
  std::vector<Place> places;
  std::vector<int64_t> sizes;
  int64_t chunks = 1, arrived = 0;
  std::vector<ffi::Promise> gone;  // to those that did not wait

  std::atomic<bool> begun{false};
  std::atomic<int64_t> next{0}, done{0};  // chunks
};

struct Table {
  std::mutex mutex;
  std::map<std::pair<int64_t, int64_t>, std::shared_ptr<Meeting>> meetings;  // by run and site, until they begin
};

Table& TheTable() {
  static Table* const table = new Table;  // never destroyed: threads may outlive what is
  return *table;
}

// Return once `ready`, or after so long; tell which.
template <typename F>
bool WaitFor(F ready, std::chrono::steady_clock::duration patience) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      Pause();
    }
    std::this_thread::yield();  // there may be fewer cores than devices
  } while (std::chrono::steady_clock::now() - start < patience);
  return false;
}

// (x_0 + ... + x_{n-1}) / n of the numbers from begin to end, all arrays taken as one, for every device.
void MeanOf(const Meeting& meeting, int64_t begin, int64_t end) {
  const auto& places = meeting.places;
  const Vec count = Spread(static_cast<float>(places.size()));
  int64_t start = 0;
  for (size_t leaf = 0; leaf < meeting.sizes.size(); start += meeting.sizes[leaf++]) {
    const int64_t low = std::max<int64_t>(begin - start, 0), high = std::min(end - start, meeting.sizes[leaf]);
    if (low >= high) continue;
    ForEach(high - low, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
      Vec sum = load(places[0].from[leaf] + low + i);
      for (size_t device = 1; device < places.size(); ++device) sum += load(places[device].from[leaf] + low + i);
      for (const auto& place : places) store(place.to[leaf] + low + i, sum / count);
    });
  }
}

// rank [], arrays -> arrays
ffi::Future Mean(ffi::RunId run, ffi::ThreadPool pool, int64_t site, int64_t devices, ffi::Buffer<ffi::S32> rank,
                 ffi::RemainingArgs arrays, ffi::RemainingRets means) {
  Meeting::Place place;
  std::vector<int64_t> sizes;
  int64_t size = 0;
  for (size_t leaf = 0; leaf < arrays.size(); ++leaf) {
    const auto array = *arrays.get<ffi::Buffer<ffi::F32>>(leaf);
    place.from.push_back(array.typed_data());
    place.to.push_back((*means.get<ffi::Buffer<ffi::F32>>(leaf))->typed_data());
    sizes.push_back(array.element_count());
    size += sizes.back();
  }

  ffi::Promise promise;
  ffi::Future future(promise);
  Table& table = TheTable();
  std::shared_ptr<Meeting> meeting;
  {
    const std::lock_guard<std::mutex> lock(table.mutex);
    const auto key = std::make_pair(run.run_id, site);
    auto& found = table.meetings[key];
    if (!found) found = std::make_shared<Meeting>(devices);
    meeting = found;
    meeting->places[rank.typed_data()[0]] = std::move(place);
    meeting->sizes = std::move(sizes);
    meeting->chunks = std::max<int64_t>((size + kChunk - 1) / kChunk, 1);
    if (++meeting->arrived == devices) {
      table.meetings.erase(key);  // who comes again comes to the next one
      meeting->begun.store(true, std::memory_order_release);
    }
  }
  const auto begun = [&] { return meeting->begun.load(std::memory_order_acquire); };
  if (!WaitFor(begun, kPatience)) {
    const std::lock_guard<std::mutex> lock(table.mutex);
    if (!begun()) {
      meeting->gone.push_back(promise);
      return future;
    }
  }

  for (int64_t chunk; (chunk = meeting->next.fetch_add(1)) < meeting->chunks;) {
    MeanOf(*meeting, chunk * kChunk, std::min((chunk + 1) * kChunk, size));
    if (meeting->done.fetch_add(1) + 1 == meeting->chunks)
      for (ffi::Promise& other : meeting->gone) pool.Schedule([other]() mutable { other.SetAvailable(); });
  }
  // Others are at the last chunks, and wait for nobody.
  while (!WaitFor([&] { return meeting->done.load() == meeting->chunks; }, kPatience)) {
  }
  promise.SetAvailable();
  return future;
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jrl_mean, Mean,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("site")
                                  .Attr<int64_t>("devices")
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
