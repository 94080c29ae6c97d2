// Doorbells: monotonic counters in shared memory, one writer each, for handing work from process to
// process without a message.
//
// A bell is one cache line. A cell has more processes than a small machine has cores, and only one or
// two of them have something to do at a time. So a waiter looks for a moment, and then sleeps on a futex
// until the ring is announced: the ringer says that it will ring soon, a body segment ahead, and the
// waiter wakes up while that segment runs. From then on it spins, because the ring is mostly a few
// microseconds away; while it spins it yields its core to whoever needs it, and if that happens it
// sleeps again. The ringer makes a system call only where somebody sleeps.

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// The layout is shared between processes that may be built apart; `braid_bell_size` is checked.
struct alignas(64) Bell {
    std::atomic<uint64_t> value;     // grows only; written by one process
    std::atomic<uint64_t> announced; // the value that it will have soon; written by the same process
    std::atomic<uint32_t> sleepers;  // 1 while the waiter sleeps or is about to
    std::atomic<uint32_t> wakes;     // the futex word: bumped by every ring that finds a sleeper
    unsigned char unused[40];
};
static_assert(sizeof(Bell) == 64, "a bell is one cache line");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "bells need lock-free 64-bit atomics");

enum Status : int32_t { kRung = 0, kTimeout = 1, kRefused = 2, kFailed = 3 };

// Set in the value of a bell whose writer has given up.
constexpr uint64_t kGivenUp = uint64_t(1) << 63;

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

// A yield that took this long, and in which the core was switched to another thread, shows that somebody
// computes on this core. Without a switch it was an interrupt, or the host of a virtual machine; in less
// time it was a process of the same cell that planned, or woke up.
constexpr int64_t kContendedNs = 250000;
// A yield on a busy core costs a whole time slice, where a sleeper is woken at once. So when that happens
// again and again, some waits of the process sleep without spinning before one tries again: twice as many
// each time that the core is still busy then.
constexpr int kMostAvoided = 64;
std::atomic<int> avoided{0}, avoid_next{0};
// Polls between two looks at the clock.
constexpr int kPolls = 64;

// How long a waiter looks for a ring that nobody has announced: an announcement may be on its way.
constexpr int64_t kUnannouncedNs = 20000;

// Times that this thread had to leave its core to another.
long switches() {
    rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
}

void avoid_spinning() {
    const int next = avoid_next.load(std::memory_order_relaxed);
    avoided.store(next, std::memory_order_relaxed);
    avoid_next.store(next == 0 ? 1 : next < kMostAvoided ? 2 * next : next, std::memory_order_relaxed);
}

bool rung(const Bell& bell, uint64_t target) {
    return bell.value.load(std::memory_order_acquire) >= target;
}

bool announced(const Bell& bell, uint64_t target) {
    return bell.announced.load(std::memory_order_seq_cst) >= target;
}

int32_t outcome(const Bell& bell) {
    return bell.value.load(std::memory_order_acquire) & kGivenUp ? kFailed : kRung;
}

void wake(Bell& bell) {
    if (bell.sleepers.load(std::memory_order_seq_cst) == 0) return;
    bell.wakes.fetch_add(1, std::memory_order_seq_cst);
    // Not private: the waiter is in another process.
    syscall(SYS_futex, &bell.wakes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// True once rung; false where the budget is used up, or the core is wanted by somebody else. The budget
// counts from the announcement.
bool spin(const Bell& bell, uint64_t target, int64_t spin_ns, bool expected) {
    int64_t began = now_ns(), last = began;
    int64_t budget = expected || spin_ns < kUnannouncedNs ? spin_ns : kUnannouncedNs;
    const long switched = switches();
    while (true) {
        for (int i = 0; i < kPolls; ++i) {
            if (rung(bell, target)) {
                avoid_next.store(0, std::memory_order_relaxed);
                return true;
            }
            relax();
        }
        sched_yield();
        const int64_t now = now_ns();
        if (!expected && announced(bell, target)) {
            expected = true;
            began = now;
            budget = spin_ns;
        }
        if (now - last >= kContendedNs && switches() != switched) {
            avoid_spinning();
            return rung(bell, target);
        }
        if (now - began >= budget) return rung(bell, target);
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
    wake(bell);
}

// Say that the counter will be `value` soon, and wake the waiter so that it is awake by then.
void braid_bell_announce(void* where, uint64_t value) {
    Bell& bell = *static_cast<Bell*>(where);
    bell.announced.store(value, std::memory_order_seq_cst);
    wake(bell);
}

// Wait until the counter is at least `target`: 0 rung, 1 not within `timeout_ns`, 2 the kernel
// refused, 3 the writer has given up.
// Where `expected` is set the ring counts as announced.
int32_t braid_bell_wait(void* where, uint64_t target, int32_t expected, int64_t spin_ns, int64_t timeout_ns) {
    Bell& bell = *static_cast<Bell*>(where);
    if (rung(bell, target)) return outcome(bell);
    const int64_t began = now_ns();
    if (avoided.load(std::memory_order_relaxed) > 0) {
        avoided.fetch_sub(1, std::memory_order_relaxed);
        spin_ns = 0;
    }
    bool soon = expected != 0 || announced(bell, target);
    if (spin_ns > 0 && spin(bell, target, spin_ns, soon)) return outcome(bell);
    int32_t status = kTimeout;
    bell.sleepers.store(1, std::memory_order_seq_cst);
    while (true) {
        const uint32_t seen = bell.wakes.load(std::memory_order_seq_cst);
        if (bell.value.load(std::memory_order_seq_cst) >= target) {
            status = outcome(bell);
            break;
        }
        if (!soon && announced(bell, target)) {
            soon = true;
            bell.sleepers.store(0, std::memory_order_seq_cst);
            if (spin_ns > 0 && spin(bell, target, spin_ns, true)) return outcome(bell);
            bell.sleepers.store(1, std::memory_order_seq_cst);
            continue;
        }
        const int64_t left = began + timeout_ns - now_ns();
        if (left <= 0) break;
        const timespec limit{time_t(left / 1000000000), long(left % 1000000000)};
        // Returns at once where `wakes` has moved on since it was read: no ring is lost between.
        if (syscall(SYS_futex, &bell.wakes, FUTEX_WAIT, seen, &limit, nullptr, 0) == 0) {
            soon = false; // somebody woke this waiter: an announcement, made again or for the first time
        } else if (errno != EAGAIN && errno != EINTR && errno != ETIMEDOUT) {
            status = kRefused;
            break;
        }
    }
    bell.sleepers.store(0, std::memory_order_seq_cst);
    return status;
}

} // extern "C"
