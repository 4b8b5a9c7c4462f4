// Blocks of GPU threads on the host, for the tests: each thread is a coroutine that runs until it comes to an exchange
// with the others. Blocks run one after the other in any order that the caller gives. Between two sync() each warp runs
// as far as it can before the next one starts, first to last and then last to first, so that a missing sync() shows.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cuda/balance_ema/balance_ema_blocks.cuh"

namespace cit::gpu {

class HostBlocks {
 public:
  class Block {
   public:
    Block(HostBlocks* all, int thread, std::int64_t index) : all_(all), thread_(thread), index_(index) {}

    int thread() const { return thread_; }
    std::int64_t index() const { return index_; }
    void sync() {
      all_->at_sync_[thread_] = true;
      all_->wait(thread_);
    }
    template <class Value>
    Value shuffle_down(const Value& x, int offset, int lanes) {
      // Two buffers in turn: nobody writes to one that another thread may still have to read.
      auto& buffer = all_->exchange_[turn_ ^= 1];
      static_assert(sizeof x <= sizeof buffer[0]);
      std::memcpy(&buffer[thread_], &x, sizeof x);
      all_->wait(thread_);
      Value other;
      std::memcpy(&other, &buffer[thread_ % lanes + offset < lanes ? thread_ + offset : thread_], sizeof other);
      return other;
    }
    Scratch& scratch() { return all_->scratch_; }
    void fence() {}
    std::uint32_t add(std::uint32_t* counter) { return (*counter)++; }
    Partial fresh(const Slot& slot) { return slot.sum; }

   private:
    HostBlocks* all_;
    int thread_;
    std::int64_t index_;
    int turn_ = 0;
  };

  HostBlocks() : stacks_(kThreads, std::vector<char>(kStack)), contexts_(kThreads), at_sync_(kThreads) {}

  void run(const std::vector<std::int64_t>& order, const std::function<void(Block&)>& body) {
    for (const std::int64_t index : order) run_block(index, body);
  }

 private:
  static constexpr std::size_t kStack = 64 * 1024;
  struct Buffer {
    double values[3];
  };

  void run_block(std::int64_t index, const std::function<void(Block&)>& body) {
    body_ = &body;
    index_ = index;
    finished_ = 0;
    std::memset(static_cast<void*>(&scratch_), 0xa5, sizeof scratch_);  // as undefined as shared memory
    for (int thread = 0; thread < kThreads; ++thread) {
      ucontext_t& context = contexts_[thread];
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_[thread].data();
      context.uc_stack.ss_size = kStack;
      context.uc_link = &scheduler_;
      const auto self = reinterpret_cast<std::uintptr_t>(this);
      makecontext(&context, reinterpret_cast<void (*)()>(&HostBlocks::start), 3, static_cast<unsigned>(self),
                  static_cast<unsigned>(static_cast<std::uint64_t>(self) >> 32), thread);
    }
    for (int round = 0; finished_ == 0; ++round) {
      std::fill(at_sync_.begin(), at_sync_.end(), false);
      for (int warp = 0; warp < kWarps; ++warp) run_warp(round % 2 == 0 ? warp : kWarps - 1 - warp);
    }
    if (finished_ != kThreads) throw std::logic_error("some threads of a block did not come to an exchange");
  }

  // Until all its threads are at a sync() or at the end.
  void run_warp(int warp) {
    const int first = warp * kWarp;
    const int finished = finished_;
    do {
      for (int thread = first; thread < first + kWarp; ++thread) swapcontext(&scheduler_, &contexts_[thread]);
      const auto waiting = std::count(at_sync_.begin() + first, at_sync_.begin() + first + kWarp, true);
      if (waiting == kWarp || finished_ == finished + kWarp) return;
      if (waiting == 0 && finished_ == finished) continue;
      throw std::logic_error("the threads of a warp went different ways");
    } while (true);
  }

  static void start(unsigned low, unsigned high, int thread) {
    auto* all =
        reinterpret_cast<HostBlocks*>(static_cast<std::uintptr_t>(low | static_cast<std::uint64_t>(high) << 32));
    Block block(all, thread, all->index_);
    (*all->body_)(block);
    ++all->finished_;
  }

  void wait(int thread) { swapcontext(&contexts_[thread], &scheduler_); }

  std::vector<std::vector<char>> stacks_;
  std::vector<ucontext_t> contexts_;
  ucontext_t scheduler_;
  const std::function<void(Block&)>* body_ = nullptr;
  std::int64_t index_ = 0;
  int finished_ = 0;
  std::vector<char> at_sync_;
  Scratch scratch_;
  Buffer exchange_[2][kThreads];
};

}  // namespace cit::gpu
