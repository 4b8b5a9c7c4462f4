// Teams of blocks of GPU threads on the host, for the tests: each thread is a coroutine that runs until it comes to an
// exchange with its warp, its block or its team. Warps run one after the other as far as they can, first to last and
// then last to first, so that a missing sync() shows; shared memory starts undefined.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

namespace cit::gpu {

template <int kBlockThreads>
class HostTeams {
 public:
  class Team {
   public:
    static constexpr int kThreads = kBlockThreads;
    Team(HostTeams* all, int rank, int thread) : all_(all), rank_(rank), thread_(thread) {}

    int thread() const { return thread_; }
    int rank() const { return rank_; }
    int size() const { return all_->blocks_; }
    std::int64_t block() const { return all_->team_ * all_->blocks_ + rank_; }
    void sync() { wait(kBlock); }
    void team_sync() { wait(kTeam); }
    template <class Value>
    Value shuffle_xor(Value x, int mask) {
      // Two buffers in turn: nobody writes to one that another thread may still have to read.
      double* const buffer = all_->exchange_[turn_ ^= 1].data();
      std::memcpy(&buffer[index()], &x, sizeof x);
      wait(kWarp);
      Value other;
      std::memcpy(&other, &buffer[index() ^ mask], sizeof other);
      return other;
    }
    template <class Value>
    Value* peer(Value* mine, int rank) {
      auto* const bytes = reinterpret_cast<unsigned char*>(mine);
      return reinterpret_cast<Value*>(bytes - shared() + all_->shared_of(rank));
    }
    unsigned char* shared() { return all_->shared_of(rank_); }
    std::uint32_t take(std::uint32_t* next) { return (*next)++; }

   private:
    int index() const { return rank_ * kThreads + thread_; }
    void wait(int what) {
      all_->waits_[index()] = what;
      swapcontext(&all_->contexts_[index()], &all_->scheduler_);
    }

    HostTeams* all_;
    int rank_, thread_, turn_ = 0;
  };

  // Runs `teams` teams of `blocks` blocks, one after the other.
  void run(int blocks, int teams, std::size_t shared_bytes, const std::function<void(Team&)>& body) {
    blocks_ = blocks;
    body_ = &body;
    const int threads = blocks * kBlockThreads;
    contexts_.resize(threads);
    stacks_.resize(threads, std::vector<char>(kStack));
    for (auto& buffer : exchange_) buffer.resize(threads);
    for (team_ = 0; team_ < teams; ++team_) {
      shared_.assign(blocks, std::vector<double>(shared_bytes / sizeof(double) + 1));
      for (auto& each : shared_) std::memset(static_cast<void*>(each.data()), 0xa5, shared_bytes);
      run_team(threads);
    }
  }

 private:
  enum { kNothing, kWarp, kBlock, kTeam, kEnd };
  static constexpr std::size_t kStack = 64 * 1024;
  static constexpr int kWarpThreads = 32, kWarps = kBlockThreads / kWarpThreads;

  void run_team(int threads) {
    waits_.assign(threads, kNothing);
    for (int index = 0; index < threads; ++index) {
      ucontext_t& context = contexts_[index];
      getcontext(&context);
      context.uc_stack.ss_sp = stacks_[index].data();
      context.uc_stack.ss_size = kStack;
      context.uc_link = &scheduler_;
      const auto self = reinterpret_cast<std::uintptr_t>(this);
      makecontext(&context, reinterpret_cast<void (*)()>(&HostTeams::start), 3, static_cast<unsigned>(self),
                  static_cast<unsigned>(static_cast<std::uint64_t>(self) >> 32), index);
    }
    const int warps = threads / kWarpThreads;
    for (int round = 0;; ++round) {
      for (int i = 0; i < warps; ++i) {
        const int warp = round % 2 == 0 ? i : warps - 1 - i;
        while (waits_[warp * kWarpThreads] <= kWarp) run_warp(warp * kWarpThreads);
      }
      bool released = false;
      for (int block = 0; block < blocks_; ++block) {
        released |= release(block * kBlockThreads, (block + 1) * kBlockThreads, kBlock);
      }
      released |= release(0, threads, kTeam);
      if (released) continue;
      if (std::all_of(waits_.begin(), waits_.end(), [](int each) { return each == kEnd; })) return;
      throw std::logic_error("some threads of a team did not come to an exchange");
    }
  }

  void run_warp(int first) {
    for (int index = first; index < first + kWarpThreads; ++index) swapcontext(&scheduler_, &contexts_[index]);
    for (int index = first; index < first + kWarpThreads; ++index) {
      if (waits_[index] != waits_[first]) throw std::logic_error("the threads of a warp went different ways");
    }
  }

  // Lets the threads go on if all of them wait for this.
  bool release(int begin, int end, int what) {
    const auto first = waits_.begin() + begin, last = waits_.begin() + end;
    if (!std::all_of(first, last, [what](int each) { return each == what; })) return false;
    std::fill(first, last, kNothing);
    return true;
  }

  static void start(unsigned low, unsigned high, int index) {
    auto* all = reinterpret_cast<HostTeams*>(static_cast<std::uintptr_t>(low | static_cast<std::uint64_t>(high) << 32));
    Team team(all, index / kBlockThreads, index % kBlockThreads);
    (*all->body_)(team);
    all->waits_[index] = kEnd;
  }

  unsigned char* shared_of(int rank) { return reinterpret_cast<unsigned char*>(shared_[rank].data()); }

  int blocks_ = 0;
  std::int64_t team_ = 0;
  std::vector<std::vector<char>> stacks_;
  std::vector<std::vector<double>> shared_;
  std::vector<ucontext_t> contexts_;
  std::vector<int> waits_;
  std::vector<double> exchange_[2];
  ucontext_t scheduler_;
  const std::function<void(Team&)>* body_ = nullptr;
};

}  // namespace cit::gpu
