// Memory that starts at a cache line: a vector load or store across two lines costs twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace cit {

// `count` floats, zero.
class AlignedFloats {
 public:
  AlignedFloats() = default;
  explicit AlignedFloats(std::int64_t count)
      : data_(static_cast<float*>(::operator new(bytes(count), std::align_val_t{kLine}))) {
    std::memset(data_.get(), 0, bytes(count));
  }

  float* data() const { return data_.get(); }
  bool empty() const { return data_ == nullptr; }

 private:
  static constexpr std::size_t kLine = 64;
  static std::size_t bytes(std::int64_t count) { return sizeof(float) * static_cast<std::size_t>(count); }

  struct Free {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t{kLine}); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace cit
