// Threads are torch's own pool. Python hands over the addresses of libtorch's C functions at load
// (fasttune/ops/_cpp.py), so that nothing of torch is needed to build and no second thread pool exists.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fasttune {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

void set_thread_pool(void* torch_parallel_for, void* torch_get_num_threads);
int num_threads();
// Calls body on disjoint ranges that cover [0, n). Serial until set_thread_pool was called. Bodies must not
// throw.
void parallel_for_raw(int64_t n, int64_t grain, ParallelBody body, void* context);

// body(begin, end) over [0, n), in ranges of at least `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_for_raw(
      n, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Uninitialised scratch memory, aligned to a cache line. Throws std::bad_alloc.
template <class T>
class Scratch {
 public:
  explicit Scratch(size_t count)
      : data_(static_cast<T*>(::operator new(count * sizeof(T) + 1, std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
};

// body(task) for every task in [0, n), handed out one by one: for tasks of unequal cost. Which thread runs a
// task is arbitrary, so a task writes only what belongs to it and results do not depend on the schedule.
template <class Body>
void parallel_tasks(int64_t n, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = n < num_threads() ? n : num_threads();
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(task);
  });
}

// The same, with `floats` of uninitialised scratch memory that belong to the calling thread:
// body(task, scratch).
template <class Body>
void parallel_tasks(int64_t n, int64_t floats, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = n < num_threads() ? n : num_threads();
  const int64_t stride = (floats + 15) / 16 * 16;
  const Scratch<float> scratch(static_cast<size_t>(workers * stride));
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;)
        body(task, scratch.get() + worker * stride);
  });
}

}  // namespace fasttune
