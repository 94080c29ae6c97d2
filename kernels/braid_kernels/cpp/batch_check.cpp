// Whether a batch obeys the rules of the contract, in a microsecond.
//
// The rules, and the errors that name what is wrong, are `braid_wire.batch.check`; this only says that a
// batch is right. A batch that it does not pass is looked at by the rules themselves.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Modes of `MODE_CODES`.
constexpr uint8_t kDecode = 1, kLastMode = 2;
constexpr int64_t kMixed = -1;

template <class T> bool distinct(std::vector<T>& values) {
    std::sort(values.begin(), values.end());
    return std::adjacent_find(values.begin(), values.end()) == values.end();
}

} // namespace

extern "C" {

// Pages are checked where `page_table` is given, states where `state_in` is. Arrays are contiguous.
struct BraidBatch {
    int64_t tokens, sequences;
    const int32_t* cu_seqlens;   // [sequences + 1]
    const int32_t* context_lens; // [sequences]
    const uint8_t* modes;        // [sequences]
    const int64_t* sequence_ids; // [sequences]
    const int32_t* page_table;   // [sequences, columns]
    const int64_t* page_generations;
    int64_t columns, page_size, pages;
    const int64_t* page_generation; // [pages]
    const int32_t* state_in;        // [sequences]
    const int64_t* state_in_generations;
    const int32_t* state_out; // [tokens]
    const int64_t* state_out_generations;
    int64_t slots;
    const int64_t* slot_generation; // [slots]
    // Out, where every rule holds.
    int64_t keys; // contexts and tokens
    int64_t mode; // of all sequences, kMixed where they differ
};

static bool spans_hold(const BraidBatch& b) {
    if (b.sequences < 1 || b.tokens < 1) return false;
    if (b.cu_seqlens[0] != 0 || b.cu_seqlens[b.sequences] != b.tokens) return false;
    for (int64_t i = 0; i < b.sequences; ++i) {
        const int64_t length = int64_t(b.cu_seqlens[i + 1]) - b.cu_seqlens[i];
        if (length < 0 || b.context_lens[i] < 0 || b.modes[i] > kLastMode) return false;
        if (b.modes[i] == kDecode && length != 1) return false;
    }
    std::vector<int64_t> names(b.sequence_ids, b.sequence_ids + b.sequences);
    return distinct(names);
}

static bool pages_hold(const BraidBatch& b) {
    std::vector<int32_t> written;
    for (int64_t i = 0; i < b.sequences; ++i) {
        const int64_t context = b.context_lens[i], length = int64_t(b.cu_seqlens[i + 1]) - b.cu_seqlens[i];
        const int64_t used = (context + length + b.page_size - 1) / b.page_size;
        if (used > b.columns) return false;
        const int32_t* row = b.page_table + i * b.columns;
        const int64_t* named = b.page_generations + i * b.columns;
        for (int64_t p = 0; p < used; ++p) {
            if (row[p] < 0 || row[p] >= b.pages || b.page_generation[row[p]] != named[p]) return false;
        }
        if (length > 0) written.insert(written.end(), row + context / b.page_size, row + used);
    }
    return distinct(written);
}

static bool states_hold(const BraidBatch& b) {
    std::vector<int32_t> written, read;
    for (int64_t i = 0; i < b.sequences; ++i) {
        const int32_t slot = b.state_in[i];
        if (slot < -1 || slot >= b.slots || (slot == -1) != (b.context_lens[i] == 0)) return false;
        if (slot < 0) continue;
        if (b.slot_generation[slot] != b.state_in_generations[i]) return false;
        read.push_back(slot);
    }
    for (int64_t t = 0; t < b.tokens; ++t) {
        const int32_t slot = b.state_out[t];
        if (slot < -1 || slot >= b.slots) return false;
        if (slot < 0) continue;
        if (b.slot_generation[slot] != b.state_out_generations[t]) return false;
        written.push_back(slot);
    }
    if (!distinct(written)) return false;
    return std::none_of(read.begin(), read.end(), [&](int32_t slot) {
        return std::binary_search(written.begin(), written.end(), slot);
    });
}

struct BraidCopy {
    void* to;
    const void* from;
    int64_t bytes;
};

// Copy arrays that lie apart.
void braid_copy_arrays(const BraidCopy* copies, int64_t count) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(copies[i].to, copies[i].from, size_t(copies[i].bytes));
}

// Whether every rule holds.
int32_t braid_batch_holds(BraidBatch* batch) {
    const BraidBatch& b = *batch;
    if (!spans_hold(b) || (b.page_table != nullptr && !pages_hold(b)) ||
        (b.state_in != nullptr && !states_hold(b))) {
        return 0;
    }
    batch->keys = b.tokens;
    batch->mode = b.modes[0];
    for (int64_t i = 0; i < b.sequences; ++i) {
        batch->keys += b.context_lens[i];
        if (b.modes[i] != b.modes[0]) batch->mode = kMixed;
    }
    return 1;
}

} // extern "C"
