// Doorbells: monotonic counters in shared memory, one writer each, for handing work from process to
// process without a message.
//
// A bell is one cache line. The waiter first spins, because the answer is mostly a few microseconds
// away; while it spins it yields its core to whoever needs it, and if that happens it stops spinning
// and sleeps on a futex. The ringer makes a system call only where somebody sleeps.

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// The layout is shared between processes that may be built apart; `braid_bell_size` is checked.
struct alignas(64) Bell {
    std::atomic<uint64_t> value;    // grows only; written by one process
    std::atomic<uint32_t> sleepers; // 1 while the waiter sleeps or is about to
    std::atomic<uint32_t> wakes;    // the futex word: bumped by every ring that finds a sleeper
    unsigned char unused[48];
};
static_assert(sizeof(Bell) == 64, "a bell is one cache line");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "bells need lock-free 64-bit atomics");

enum Status : int32_t { kRung = 0, kTimeout = 1, kRefused = 2 };

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A yield that took this long gave the core to somebody: it is wanted elsewhere.
constexpr int64_t kContendedNs = 30000;
// Polls between two looks at the clock.
constexpr int kPolls = 64;

bool rung(const Bell& bell, uint64_t target) {
    return bell.value.load(std::memory_order_acquire) >= target;
}

// True once rung; false where the budget is used up, or the core is wanted by somebody else.
bool spin(const Bell& bell, uint64_t target, int64_t began, int64_t spin_ns) {
    int64_t last = began;
    while (true) {
        for (int i = 0; i < kPolls; ++i) {
            if (rung(bell, target)) return true;
            relax();
        }
        sched_yield();
        const int64_t now = now_ns();
        if (now - began >= spin_ns || now - last >= kContendedNs) return rung(bell, target);
        last = now;
    }
}

} // namespace

extern "C" {

int64_t braid_bell_size() { return sizeof(Bell); }

uint64_t braid_bell_value(const void* where) {
    return static_cast<const Bell*>(where)->value.load(std::memory_order_acquire);
}

// Set the counter to `value` and wake the waiter. Everything written before is visible to it.
void braid_bell_ring(void* where, uint64_t value) {
    Bell& bell = *static_cast<Bell*>(where);
    // Sequentially consistent against the waiter's store to `sleepers`: either it sees the value, or
    // this sees the sleeper.
    bell.value.store(value, std::memory_order_seq_cst);
    if (bell.sleepers.load(std::memory_order_seq_cst) != 0) {
        bell.wakes.fetch_add(1, std::memory_order_seq_cst);
        // Not private: the waiter is in another process.
        syscall(SYS_futex, &bell.wakes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
}

// Wait until the counter is at least `target`: 0 rung, 1 not within `timeout_ns`, 2 the kernel refused.
int32_t braid_bell_wait(void* where, uint64_t target, int64_t spin_ns, int64_t timeout_ns) {
    Bell& bell = *static_cast<Bell*>(where);
    if (rung(bell, target)) return kRung;
    const int64_t began = now_ns();
    if (spin_ns > 0 && spin(bell, target, began, spin_ns < timeout_ns ? spin_ns : timeout_ns)) return kRung;
    int32_t status = kTimeout;
    bell.sleepers.store(1, std::memory_order_seq_cst);
    while (true) {
        const uint32_t seen = bell.wakes.load(std::memory_order_seq_cst);
        if (bell.value.load(std::memory_order_seq_cst) >= target) {
            status = kRung;
            break;
        }
        const int64_t left = began + timeout_ns - now_ns();
        if (left <= 0) break;
        const timespec limit{time_t(left / 1000000000), long(left % 1000000000)};
        // Returns at once where `wakes` has moved on since it was read: no ring is lost between.
        if (syscall(SYS_futex, &bell.wakes, FUTEX_WAIT, seen, &limit, nullptr, 0) == -1 && errno != EAGAIN &&
            errno != EINTR && errno != ETIMEDOUT) {
            status = kRefused;
            break;
        }
    }
    bell.sleepers.store(0, std::memory_order_seq_cst);
    return status;
}

} // extern "C"
