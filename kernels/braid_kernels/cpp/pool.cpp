// A small thread pool that yields the machine when idle.
//
// Not OpenMP: a cell runs several processes on the same cores, and libgomp's workers spin for
// milliseconds after every region, on the very core that the next process of the step needs. Here a
// worker spins for a bounded time (set_spin_us) and then sleeps; a caller never waits for a worker that
// has not started; two Python threads that call at once do not multiply the workers (the second runs
// alone); and a fork leaves the child with a fresh pool.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <cstdlib>
#include <pthread.h>
#include <sched.h>

#include "common.h"

namespace braid {
namespace {

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

struct Pool {
    std::mutex caller;                 // one parallel region at a time
    std::atomic<int> workers{0};       // started so far
    std::atomic<uint64_t> round{0};    // bumped per region; workers wait for it to change
    std::atomic<bool> open{false};     // a region is accepting workers
    std::atomic<int> inside{0};        // workers that may be touching the region
    std::atomic<int64_t> next{0};
    std::atomic<int> sleepers{0};
    std::mutex sleep_mutex;
    std::condition_variable wake;
    int64_t count = 0;
    void (*task)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int width = 1;                     // threads that may join the current region
};

std::atomic<int> thread_limit{1};
std::atomic<int> spin_us{50};
std::atomic<double> shared_work{150e3};  // multiply-adds of a region worth sharing, about 20 us on one core
std::atomic<Pool*> current{nullptr};

void take_tasks(Pool* pool) {
    for (;;) {
        int64_t i = pool->next.fetch_add(1, std::memory_order_relaxed);
        if (i >= pool->count) return;
        pool->task(pool->context, i);
    }
}

uint64_t wait_for_round(Pool* pool, uint64_t seen) {
    int64_t deadline = now_us() + spin_us.load(std::memory_order_relaxed);
    for (int i = 1;; i++) {
        uint64_t round = pool->round.load(std::memory_order_acquire);
        if (round != seen) return round;
        relax();
        if (i % 64 == 0 && now_us() > deadline) break;
    }
    std::unique_lock<std::mutex> lock(pool->sleep_mutex);
    pool->sleepers.fetch_add(1);
    pool->wake.wait(lock, [&] { return pool->round.load() != seen; });
    pool->sleepers.fetch_sub(1);
    return pool->round.load();
}

void worker(Pool* pool, int index, uint64_t seen) {
    for (;;) {
        seen = wait_for_round(pool, seen);
        // Announce first, then look: the caller closes the region first and then waits for `inside`.
        pool->inside.fetch_add(1);
        if (pool->open.load() && index < pool->width) take_tasks(pool);
        pool->inside.fetch_sub(1);
    }
}

void start_workers(Pool* pool, int wanted) {
    while (pool->workers.load() < wanted - 1) {
        int index = pool->workers.load() + 1;
        try {
            std::thread(worker, pool, index, pool->round.load()).detach();
        } catch (const std::exception&) {
            thread_limit.store(index);  // no more threads to be had: work with those that exist
            return;
        }
        pool->workers.store(index);
    }
}

void after_fork() { current.store(new Pool); }  // the parent's workers do not exist here

Pool* pool() {
    Pool* p = current.load();
    if (p) return p;
    Pool* fresh = new Pool;  // never destroyed: workers may outlive static destructors
    if (current.compare_exchange_strong(p, fresh)) {
        pthread_atfork(nullptr, nullptr, after_fork);
        return fresh;
    }
    delete fresh;
    return p;
}

void run_region(Pool* p, int width) {
    p->width = width;
    p->next.store(0);
    p->open.store(true);
    p->round.fetch_add(1);
    if (p->sleepers.load() > 0) {
        { std::lock_guard<std::mutex> lock(p->sleep_mutex); }  // a worker between its check and its wait
        p->wake.notify_all();
    }
    take_tasks(p);
    p->open.store(false);
    for (int i = 0; p->inside.load() > 0; i++) {
        if (i < 2000) relax();
        else sched_yield();
    }
}

}  // namespace

void parallel_for(int64_t count, double work, void (*task)(void*, int64_t), void* context) {
    int width = thread_limit.load(std::memory_order_relaxed);
    if (width > count) width = (int)count;
    Pool* p = nullptr;
    if (width > 1 && work >= shared_work.load(std::memory_order_relaxed)) p = pool();
    if (!p || !p->caller.try_lock()) {
        for (int64_t i = 0; i < count; i++) task(context, i);
        return;
    }
    std::lock_guard<std::mutex> release(p->caller, std::adopt_lock);
    start_workers(p, width);
    p->count = count;
    p->task = task;
    p->context = context;
    run_region(p, width);
}

float* scratch(size_t floats) {
    struct Block {
        float* data = nullptr;
        size_t size = 0;
        ~Block() { std::free(data); }
    };
    static thread_local Block block;
    if (block.size < floats) {
        std::free(block.data);
        block.data = nullptr;
        block.size = 0;
        size_t bytes = (floats * sizeof(float) + 4095) / 64 * 64;
        void* fresh = std::aligned_alloc(64, bytes);
        if (!fresh) throw std::bad_alloc();
        block.data = static_cast<float*>(fresh);
        block.size = bytes / sizeof(float);
    }
    return block.data;
}

}  // namespace braid

extern "C" {
void braid_set_threads(int32_t n) { braid::thread_limit.store(n < 1 ? 1 : n); }
int32_t braid_get_threads() { return braid::thread_limit.load(); }
void braid_set_spin_us(int32_t us) { braid::spin_us.store(us < 0 ? 0 : us); }
void braid_set_shared_work(double work) { braid::shared_work.store(work); }
int32_t braid_vector_lanes() { return braid::VL; }
}
