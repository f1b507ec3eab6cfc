// Memory blocks, reused by later calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <mutex>
#include <vector>

namespace rnnorm {

// malloc returns large blocks to the system, so the next call pays page faults and zeroing for the same memory: an eighth of
// a GRU's training call. The pool keeps blocks, whose sizes are powers of two; one is free when only the pool refers to
// it. Untouched pages of a block take no memory.
class Pool {
 public:
  static at::Storage take(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    return fresh(bytes);  // a block larger than requested would hide an overrun
#endif
    if (bytes < least || bytes > most) return fresh(bytes);
    static Pool& pool = *new Pool;  // never destroyed: tensors may outlive static objects
    return pool.find(std::bit_ceil(bytes));
  }

 private:
  static constexpr size_t least = size_t{128} << 10, most = size_t{256} << 20;  // malloc itself reuses smaller blocks

  static at::Storage fresh(size_t bytes) {
    return at::Storage(at::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/false);
  }

  at::Storage find(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const at::Storage& block : blocks_)
      if (block.nbytes() == bytes && idle(block)) return block;
    // Make room: drop free blocks of other sizes.
    for (size_t k = 0; k < blocks_.size() && held_ + bytes > most;) {
      if (idle(blocks_[k])) {
        held_ -= blocks_[k].nbytes();
        blocks_.erase(blocks_.begin() + k);
      } else {
        ++k;
      }
    }
    at::Storage block = fresh(bytes);
    if (held_ + bytes <= most) {
      held_ += bytes;
      blocks_.push_back(block);
    }
    return block;
  }

  static bool idle(const at::Storage& block) {
    if (block.use_count() != 1) return false;
    std::atomic_thread_fence(std::memory_order_acquire);  // synchronizes with the last user's release
    return true;
  }

  std::mutex mutex_;
  std::vector<at::Storage> blocks_;
  size_t held_ = 0;
};

// An uninitialized tensor in the pool's memory, for temporaries of a call and for kept tensors.
inline at::Tensor pooled(at::IntArrayRef shape, at::ScalarType dtype) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      Pool::take(count * c10::elementSize(dtype)), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  return tensor;
}

// An uninitialized array in the pool's memory.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count) : storage_(Pool::take(count * sizeof(T))) {}
  T* data() const { return static_cast<T*>(storage_.mutable_data()); }

 private:
  at::Storage storage_;
};

}  // namespace rnnorm
