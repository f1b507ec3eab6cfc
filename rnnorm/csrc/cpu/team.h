// The threads of one call, which run the whole time loop and synchronize by a barrier.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

namespace rnnorm {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The part of `count` items that belongs to thread `id` of `threads`.
inline Range part_of(int64_t count, int id, int threads) {
  return {count * id / threads, count * (id + 1) / threads};
}

// The barrier spins briefly, since a step takes microseconds and a system call would take longer than the wait; then it sleeps,
// so that another thread can have the core.
class Team {
 public:
  int size() const { return size_; }

  // Throws if a thread has failed, before or meanwhile: what the others wait for was not made.
  void wait() {
    const int generation = generation_.load(std::memory_order_acquire);
    check();  // after the load: a thread that fails from here on raises another generation than this
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      pass(generation + 1);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins >= most_spins) generation_.wait(generation, std::memory_order_acquire);
      else pause();
    }
    check();
  }

  // Wait until another thread has raised `count` to `least`.
  void wait_for(const std::atomic<int>& count, int least) const {
    for (int spins = 0; count.load(std::memory_order_acquire) < least; ++spins) {
      check();
      if (spins >= most_spins) std::this_thread::yield();
      else pause();
    }
  }

  // Run `work(id, team)` on up to `threads` threads; rethrows the first exception of any of them.
  template <typename Work>
  static void run(int threads, const Work& work) {
    Team team;
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.size_ = omp_get_num_threads();
      try {
        work(omp_get_thread_num(), team);
      } catch (...) {
        bool expected = false;
        if (team.failed_.compare_exchange_strong(expected, true)) failure = std::current_exception();
        team.pass(team.generation_.load() + 1);  // so that those who wait see it
      }
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  static constexpr int most_spins = 2000;  // tens of microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void check() const {
    if (failed_.load(std::memory_order_relaxed)) throw std::runtime_error("rnnorm: another thread failed");
  }

  void pass(int generation) {
    generation_.store(generation, std::memory_order_release);
    generation_.notify_all();
  }

  int size_ = 1;
  std::atomic<int> arrived_{0}, generation_{0};
  std::atomic<bool> failed_{false};
};

// For sums over all threads' units: each thread writes its partial values and, after a barrier, reads those of all.
// Two buffers alternate, since a thread may still read one while another writes the next.
template <typename T>
class Exchange {
 public:
  Exchange(int threads, int64_t values) : values_(values), buffer_(2 * threads * values) {}
  T* mine(int id, int turn) { return buffer_.data() + (static_cast<int64_t>(turn & 1) * (buffer_.size() / 2)) + id * values_; }

 private:
  int64_t values_;
  std::vector<T> buffer_;
};

}  // namespace rnnorm
