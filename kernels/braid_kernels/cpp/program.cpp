#include "program.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <new>
#include <vector>

#include "elementary.h"
#include "gemm.h"

using namespace braid;

namespace {

constexpr int64_t TILE = 2048;        // floats of a register
constexpr int64_t WIDEST = 1 << 20;   // floats of a register whose inner dimension must stay whole

int64_t bytes_of(int32_t dtype) { return dtype == ELEMENT_I64 ? 8 : dtype == BF16 ? 2 : 4; }

// ---- rows of at most a tile ----

// The first n lanes; the others read as zero and are not written.
BRAID_INLINE vf load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vf x{};
    std::memcpy(&x, p, n * sizeof(float));
    return x;
#endif
}
BRAID_INLINE void store_first(float* p, vf x, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
#else
    std::memcpy(p, &x, n * sizeof(float));
#endif
}

struct Shape {
    int64_t rows, middle, inner;
};
// An operand of one tile: a row of it begins at p + row * between_rows + middle * between_middle.
struct Arg {
    float* p;
    int64_t row, middle;
    float* at(int64_t r, int64_t m) const { return p + r * row + m * middle; }
};
using Kernel = void (*)(const Shape&, Arg, Arg, Arg);

template <class F> void unary(const Shape& s, Arg d, Arg x, Arg) {
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t m = 0; m < s.middle; m++) {
            float* to = d.at(r, m);
            const float* from = x.at(r, m);
            int64_t i = 0;
            for (; i + VL <= s.inner; i += VL) store(to + i, F::of(load(from + i)));
            if (i < s.inner) store_first(to + i, F::of(load_first(from + i, s.inner - i)), s.inner - i);
        }
}

// ONE_X: x is one value a row.
template <class F, bool ONE_X, bool ONE_Y> void binary(const Shape& s, Arg d, Arg x, Arg y) {
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t m = 0; m < s.middle; m++) {
            float* to = d.at(r, m);
            const float *px = x.at(r, m), *py = y.at(r, m);
            const vf one_x = ONE_X ? splat(*px) : vf{}, one_y = ONE_Y ? splat(*py) : vf{};
            int64_t i = 0;
            for (; i + VL <= s.inner; i += VL)
                store(to + i, F::of(ONE_X ? one_x : load(px + i), ONE_Y ? one_y : load(py + i)));
            if (const int64_t rest = s.inner - i; rest > 0)
                store_first(to + i, F::of(ONE_X ? one_x : load_first(px + i, rest), ONE_Y ? one_y : load_first(py + i, rest)), rest);
        }
}

// One value for each row, in an order that depends on the row's length alone.
template <class F> void reduction(const Shape& s, Arg d, Arg x, Arg y) {
    for (int64_t r = 0; r < s.rows; r++)
        for (int64_t m = 0; m < s.middle; m++) {
            const float *px = x.at(r, m), *py = y.at(r, m);
            vf sum[4] = {splat(F::EMPTY), splat(F::EMPTY), splat(F::EMPTY), splat(F::EMPTY)};
            int64_t i = 0;
            for (; i + 4 * VL <= s.inner; i += 4 * VL)
                for (int j = 0; j < 4; j++) sum[j] = F::add(sum[j], px, py, i + j * VL);
            for (; i + VL <= s.inner; i += VL) sum[0] = F::add(sum[0], px, py, i);
            if (i < s.inner) sum[1] = F::add_first(sum[1], px, py, i, s.inner - i);
            *d.at(r, m) = F::close(F::merge(F::merge(sum[0], sum[1]), F::merge(sum[2], sum[3])));
        }
}

BRAID_INLINE vf truth(vi mask) { return (vf)(mask & (vi)splat(1.0f)); }

#define UNARY(NAME, EXPRESSION) \
    struct NAME { static BRAID_INLINE_MEMBER vf of(vf x) { return EXPRESSION; } }
#define BINARY(NAME, EXPRESSION) \
    struct NAME { static BRAID_INLINE_MEMBER vf of(vf x, vf y) { return EXPRESSION; } }
#define BRAID_INLINE_MEMBER inline __attribute__((always_inline))

UNARY(Neg, -x);
UNARY(Abs, vabs(x));
UNARY(Sqrt, vsqrt(x));
UNARY(Rsqrt, 1.0f / vsqrt(x));
UNARY(Exp, vexp(x));
UNARY(Log, each<std::log>(x));
UNARY(Sigmoid, vsigmoid(x));
UNARY(Silu, vsilu(x));
UNARY(Gelu, vgelu(x));
UNARY(GeluTanh, vgelu_tanh(x));
UNARY(Tanh, vtanh(x));
UNARY(Softplus, vsoftplus(x));
UNARY(Cos, each<std::cos>(x));
UNARY(Sin, each<std::sin>(x));
UNARY(Relu, select((x > 0.0f) | (x != x), x, vf{}));
UNARY(Reciprocal, 1.0f / x);
BINARY(Add, x + y);
BINARY(Sub, x - y);
BINARY(Mul, x* y);
BINARY(Div, x / y);
BINARY(Minimum, select((x < y) | (x != x), x, y));  // NaN where either is
BINARY(Maximum, select((x > y) | (x != x), x, y));
BINARY(Less, truth(x < y));
BINARY(LessEqual, truth(x <= y));
BINARY(Equal, truth(x == y));
BINARY(Keep, select(y != 0.0f, x, vf{}));
struct Pow {
    static BRAID_INLINE_MEMBER vf of(vf x, vf y) {
        for (int i = 0; i < VL; i++) x[i] = std::pow(x[i], y[i]);
        return x;
    }
};

struct Sum {
    static constexpr float EMPTY = 0.0f;
    static BRAID_INLINE_MEMBER vf add(vf sum, const float* x, const float*, int64_t i) { return sum + load(x + i); }
    static BRAID_INLINE_MEMBER vf add_first(vf sum, const float* x, const float*, int64_t i, int64_t n) { return sum + load_first(x + i, n); }
    static BRAID_INLINE_MEMBER vf merge(vf a, vf b) { return a + b; }
    static BRAID_INLINE_MEMBER float close(vf sum) { return hsum(sum); }
};
struct Dot : Sum {
    static BRAID_INLINE_MEMBER vf add(vf sum, const float* x, const float* y, int64_t i) { return fmadd(load(x + i), load(y + i), sum); }
    static BRAID_INLINE_MEMBER vf add_first(vf sum, const float* x, const float* y, int64_t i, int64_t n) {
        return fmadd(load_first(x + i, n), load_first(y + i, n), sum);
    }
};
struct Largest {
    static constexpr float EMPTY = -INFINITY;
    static BRAID_INLINE_MEMBER vf add(vf most, const float* x, const float*, int64_t i) { return Maximum::of(most, load(x + i)); }
    static BRAID_INLINE_MEMBER vf add_first(vf most, const float* x, const float*, int64_t i, int64_t n) {
        float lanes[VL];
        store(lanes, splat(EMPTY));
        std::memcpy(lanes, x + i, n * sizeof(float));
        return Maximum::of(most, load(lanes));
    }
    static BRAID_INLINE_MEMBER vf merge(vf a, vf b) { return Maximum::of(a, b); }
    static BRAID_INLINE_MEMBER float close(vf most) {
        float found = most[0];
        for (int i = 1; i < VL; i++)
            if (most[i] > found || most[i] != most[i]) found = most[i];
        return found;
    }
};

Kernel unary_kernel(int32_t code) {
    switch (code) {
        case NEG: return unary<Neg>;
        case ABS: return unary<Abs>;
        case SQRT: return unary<Sqrt>;
        case RSQRT: return unary<Rsqrt>;
        case EXP: return unary<Exp>;
        case LOG: return unary<Log>;
        case SIGMOID: return unary<Sigmoid>;
        case SILU: return unary<Silu>;
        case GELU: return unary<Gelu>;
        case GELU_TANH: return unary<GeluTanh>;
        case TANH: return unary<Tanh>;
        case SOFTPLUS: return unary<Softplus>;
        case COS: return unary<Cos>;
        case SIN: return unary<Sin>;
        case RELU: return unary<Relu>;
        case RECIPROCAL: return unary<Reciprocal>;
        case SUM: return reduction<Sum>;
        case LARGEST: return reduction<Largest>;
        default: return nullptr;
    }
}
template <class F> Kernel binary_kernel_of(bool one_x, bool one_y) {
    if (one_x) return one_y ? nullptr : binary<F, true, false>;
    return one_y ? binary<F, false, true> : binary<F, false, false>;
}
Kernel binary_kernel(int32_t code, bool one_x, bool one_y) {
    switch (code) {
        case ADD: return binary_kernel_of<Add>(one_x, one_y);
        case SUB: return binary_kernel_of<Sub>(one_x, one_y);
        case MUL: return binary_kernel_of<Mul>(one_x, one_y);
        case DIV: return binary_kernel_of<Div>(one_x, one_y);
        case MINIMUM: return binary_kernel_of<Minimum>(one_x, one_y);
        case MAXIMUM: return binary_kernel_of<Maximum>(one_x, one_y);
        case POW: return binary_kernel_of<Pow>(one_x, one_y);
        case LESS: return binary_kernel_of<Less>(one_x, one_y);
        case LESS_EQUAL: return binary_kernel_of<LessEqual>(one_x, one_y);
        case EQUAL: return binary_kernel_of<Equal>(one_x, one_y);
        case KEEP: return binary_kernel_of<Keep>(one_x, one_y);
        case DOT: return one_x || one_y ? nullptr : reduction<Dot>;
        default: return nullptr;
    }
}

// ---- copies: any element type and stride ----
float element_at(const void* p, int32_t dtype, int64_t at) {
    return dtype == ELEMENT_I64 ? (float)((const int64_t*)p)[at] : element(p, dtype, at);
}
void read_row(const void* p, int32_t dtype, int64_t at, int64_t stride, float* to, int64_t n) {
    if (stride == 1 && dtype == F32) std::memcpy(to, (const float*)p + at, n * sizeof(float));
    else if (stride == 1 && dtype == BF16) {
        const bf16* from = (const bf16*)p + at;
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store(to + i, load_as(from + i));
        for (; i < n; i++) to[i] = to_float(from[i]);
    } else
        for (int64_t i = 0; i < n; i++) to[i] = element_at(p, dtype, at + i * stride);
}
void write_row(const float* from, void* p, int32_t dtype, int64_t at, int64_t stride, int64_t n) {
    if (stride == 1) {
        if (dtype == F32) std::memcpy((float*)p + at, from, n * sizeof(float));
        else narrow_row(from, (bf16*)p + at, (int)n);
    } else
        for (int64_t i = 0; i < n; i++) {
            if (dtype == F32) ((float*)p)[at + i * stride] = from[i];
            else from_float(from[i], (bf16*)p + at + i * stride);
        }
}

// ---- a program ----
struct BoundOp {
    Op op;
    Kernel kernel;      // null: COPY or STORE_COLUMN
    bool column;        // over columns
    bool flat_middle;   // with a whole inner dimension, (middle, inner) is one row of every operand
    bool flat_rows;     // and with a whole middle one, so is (row, middle, inner)
};

struct Program {
    int64_t chunk;
    std::vector<Slot> slots;
    std::vector<Product> products;
    std::vector<Part> parts;
    std::vector<Lookup> lookups;
    std::vector<Choice> choices;
    std::vector<Mixture> mixtures;
    std::vector<Group> groups;
    std::vector<BoundOp> ops;
    std::vector<View> views;
    std::vector<Step> steps;
    std::vector<GemmPart> gemm_parts;  // as long as the most parts of a product
    std::vector<char> workspace;       // of mixtures
    bool measured = false;
    int64_t matmul_ns = 0, matmuls = 0;
};

enum Invalid : int64_t { BAD_SLOT = 16, BAD_STEP = 17, BAD_OP = 18, BAD_VIEW = 19, BAD_ROWS = 20, BAD_ID = 21 };
int64_t invalid(Invalid what, int64_t index) { return (int64_t)what << 32 | (index & 0xffffffff); }

bool is_one(const std::vector<View>& views, const Operand& o) {
    return o.kind == COLUMN || o.kind == CONSTANT || (o.kind == VIEW && views[o.index].inner == 0);
}
// Whether an elementwise kernel may take it (or, written, give it).
bool is_plain(const std::vector<View>& views, const Operand& o, bool written) {
    if (o.kind == CONSTANT) return !written;
    if (o.kind != VIEW) return o.kind == REGISTER || o.kind == COLUMN;
    const View& v = views[o.index];
    return v.dtype == F32 && (v.inner == 1 || (v.inner == 0 && !written));
}
bool in_range(const Operand& o, const Group& g, size_t views) {
    switch (o.kind) {
        case NONE:
        case CONSTANT: return true;
        case REGISTER: return o.index >= 0 && o.index < g.registers;
        case COLUMN: return o.index >= 0 && o.index < g.columns;
        case VIEW: return o.index >= 0 && (size_t)o.index < views;
        default: return false;
    }
}
bool flat_middle(const std::vector<View>& views, const Operand& o, const Group& g) {
    if (o.kind == VIEW) return views[o.index].inner == 1 && views[o.index].middle == g.inner;
    return o.kind != COLUMN;
}
bool flat_rows(const std::vector<View>& views, const Operand& o, const Group& g) {
    return o.kind != VIEW || views[o.index].row == g.middle * g.inner;
}

// Chooses the kernel of an operation; false where its operands do not fit it.
bool bind_op(const Program& p, const Group& g, BoundOp& b) {
    const Op& op = b.op;
    for (const Operand* o : {&op.dst, &op.a, &op.b})
        if (!in_range(*o, g, p.views.size())) return false;
    b.kernel = nullptr;
    b.column = false;
    b.flat_middle = b.flat_rows = true;
    for (const Operand* o : {&op.dst, &op.a, &op.b})
        if (o->kind != NONE) {
            b.flat_middle = b.flat_middle && flat_middle(p.views, *o, g);
            b.flat_rows = b.flat_rows && flat_rows(p.views, *o, g);
        }
    if (op.code == COPY) return op.a.kind != NONE && op.dst.kind != NONE && op.dst.kind != CONSTANT && (op.dst.kind != COLUMN || op.a.kind == VIEW);
    if (op.code == STORE_COLUMN) return op.a.kind == COLUMN && op.dst.kind == VIEW;
    if (!is_plain(p.views, op.dst, true) || !is_plain(p.views, op.a, false)) return false;
    const bool two = op.b.kind != NONE;
    if (two && !is_plain(p.views, op.b, false)) return false;
    const bool reduces = op.code == SUM || op.code == DOT || op.code == LARGEST;
    if (reduces) {
        if (op.dst.kind != COLUMN || is_one(p.views, op.a) || (two && is_one(p.views, op.b)) || !g.reduces) return false;
        b.flat_middle = b.flat_rows = false;
    } else if (op.dst.kind == COLUMN) {
        b.column = true;
        for (const Operand* o : {&op.a, &op.b})
            if (o->kind != NONE && o->kind != COLUMN && o->kind != CONSTANT) return false;
    } else if (!two && is_one(p.views, op.a)) {
        return false;
    }
    const bool one_a = b.column ? op.a.kind == CONSTANT : is_one(p.views, op.a);
    const bool one_b = two && (b.column ? op.b.kind == CONSTANT : is_one(p.views, op.b));
    b.kernel = two ? binary_kernel(op.code, one_a, one_b) : unary_kernel(op.code);
    return b.kernel != nullptr;
}

// One tile of a group: where it begins, how large it is, and the registers of the thread that runs it.
struct Tile {
    Shape shape;
    int64_t row, middle, inner, loop[MAX_LOOPS];  // its first element; row within the chunk
    int64_t first;                                // the chunk's first row
    float *registers, *columns;
    int64_t register_size, column_size;
};

struct Address {
    char* p;
    int64_t row, middle;
};
Address address(const Program& p, const View& v, const Tile& t) {
    const Slot& slot = p.slots[v.slot];
    const int64_t row = slot.chunked ? t.row : t.first + t.row;
    int64_t at = v.offset + row * v.row + t.middle * v.middle + t.inner * v.inner;
    for (int i = 0; i < MAX_LOOPS; i++) at += t.loop[i] * v.loop[i];
    return {(char*)slot.base + at * bytes_of(v.dtype), v.row, v.middle};
}
Arg resolve(const Program& p, const Operand& o, const Tile& t) {
    switch (o.kind) {
        case REGISTER: return {t.registers + o.index * t.register_size, t.shape.middle * t.shape.inner, t.shape.inner};
        case COLUMN: return {t.columns + o.index * t.column_size, t.shape.middle, 1};
        case VIEW: {
            const Address a = address(p, p.views[o.index], t);
            return {(float*)a.p, a.row, a.middle};
        }
        case CONSTANT: return {const_cast<float*>(&o.value), 0, 0};
        default: return {nullptr, 0, 0};
    }
}

void copy(const Program& p, const Op& op, const Tile& t) {
    const View* from = op.a.kind == VIEW ? &p.views[op.a.index] : nullptr;
    const View* to = op.dst.kind == VIEW ? &p.views[op.dst.index] : nullptr;
    const Arg x = resolve(p, op.a, t), d = resolve(p, op.dst, t);
    const int64_t from_bytes = from ? bytes_of(from->dtype) : 4, to_bytes = to ? bytes_of(to->dtype) : 4;
    const bool spread = op.a.kind == COLUMN || op.a.kind == CONSTANT;
    constexpr int64_t PIECE = 512;
    float piece[PIECE];
    for (int64_t r = 0; r < t.shape.rows; r++)
        for (int64_t m = 0; m < t.shape.middle; m++) {
            const char* source = (const char*)x.p + (r * x.row + m * x.middle) * from_bytes;
            char* sink = (char*)d.p + (r * d.row + m * d.middle) * to_bytes;
            if (op.dst.kind == COLUMN) {
                *(float*)sink = element_at(source, from->dtype, 0);
                continue;
            }
            for (int64_t i = 0; i < t.shape.inner; i += PIECE) {
                const int64_t n = t.shape.inner - i < PIECE ? t.shape.inner - i : PIECE;
                float* between = to ? piece : (float*)sink + i;
                if (spread) for (int64_t j = 0; j < n; j++) between[j] = *(const float*)source;
                else if (from) read_row(source, from->dtype, i * from->inner, from->inner, between, n);
                else if (to) between = (float*)source + i;
                else std::memcpy(between, (const float*)source + i, n * sizeof(float));
                if (to) write_row(between, sink, to->dtype, i * to->inner, to->inner, n);
            }
        }
}
void store_column(const Program& p, const Op& op, const Tile& t) {
    const View& v = p.views[op.dst.index];
    const Address to = address(p, v, t);
    const Arg x = resolve(p, op.a, t);
    for (int64_t r = 0; r < t.shape.rows; r++)
        for (int64_t m = 0; m < t.shape.middle; m++) write_row(x.at(r, m), to.p, v.dtype, r * to.row + m * to.middle, 1, 1);
}

void run_op(const Program& p, const Group& g, const BoundOp& b, const Tile& t) {
    if (!b.kernel) return b.op.code == COPY ? copy(p, b.op, t) : store_column(p, b.op, t);
    Shape s = t.shape;
    if (b.column) {
        s = {1, 1, s.rows * s.middle};
    } else if (s.middle == 1 || (b.flat_middle && s.inner == g.inner)) {
        const bool whole = s.middle == g.middle && s.inner == g.inner;
        if (s.rows == 1) s = {1, 1, s.middle * s.inner};
        else if (b.flat_rows && b.flat_middle && whole) s = {1, 1, s.rows * s.middle * s.inner};
        else if (b.flat_middle) s = {s.rows, 1, s.middle * s.inner};
    }
    b.kernel(s, resolve(p, b.op.dst, t), resolve(p, b.op.a, t), resolve(p, b.op.b, t));
}

int64_t tiles(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void run_group(const Program& p, const Group& g, int64_t first, int64_t rows) {
    Shape most{1, 1, g.inner};
    if (!g.reduces && g.inner > TILE) most.inner = TILE;
    else {
        most.middle = least(g.middle, g.inner < TILE ? TILE / g.inner : 1);
        if (most.middle == g.middle && g.middle * g.inner < TILE) most.rows = least(rows, TILE / (g.middle * g.inner));
    }
    const int64_t row_tiles = tiles(rows, most.rows), middle_tiles = tiles(g.middle, most.middle), inner_tiles = tiles(g.inner, most.inner);
    int64_t loops = 1;
    for (int i = 0; i < g.loops; i++) loops *= g.loop[i];
    const int64_t count = row_tiles * loops * middle_tiles * inner_tiles;
    const double work = (double)rows * loops * g.middle * g.inner * g.ops;
    parallel(count, work, [&](int64_t index) {
        Tile t{};
        t.first = first;
        t.inner = index % inner_tiles * most.inner;
        index /= inner_tiles;
        t.middle = index % middle_tiles * most.middle;
        index /= middle_tiles;
        for (int i = g.loops - 1; i >= 0; i--) {
            t.loop[i] = index % g.loop[i];
            index /= g.loop[i];
        }
        t.row = index * most.rows;
        t.shape = {least(most.rows, rows - t.row), least(most.middle, g.middle - t.middle), least(most.inner, g.inner - t.inner)};
        t.register_size = round_up((int)(most.rows * most.middle * most.inner), VL);
        t.column_size = round_up((int)(most.rows * most.middle), VL);
        t.registers = scratch(g.registers * t.register_size + g.columns * t.column_size);
        t.columns = t.registers + g.registers * t.register_size;
        for (int64_t i = g.first_op; i < g.first_op + g.ops; i++) run_op(p, g, p.ops[i], t);
    });
}

char* rows_at(const Program& p, const Rows& r, int64_t first, int64_t bytes) {
    const Slot& slot = p.slots[r.slot];
    return (char*)slot.base + (r.offset + (slot.chunked ? 0 : first * r.row)) * bytes;
}

int64_t run_lookup(const Program& p, const Lookup& l, int64_t first, int64_t rows, int64_t limit) {
    const int64_t* ids = (const int64_t*)rows_at(p, l.ids, first, 8);
    const int64_t bytes = bytes_of(l.dtype), known = l.table_rows < 0 ? limit : l.table_rows;
    const char* table = (const char*)(l.table ? l.table : p.slots[l.table_slot].base);
    char* out = rows_at(p, l.out, first, bytes);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t id = ids[r * l.ids.row];
        if (id < 0 || id >= known) return invalid(BAD_ID, first + r);
        std::memcpy(out + r * l.out.row * bytes, table + id * l.table_stride * bytes, l.columns * bytes);
    }
    return OK;
}

// The `chosen` largest of each row, largest first, the earlier of equals first; a NaN is larger than all.
void top(const Choice& c, const char* x, int64_t* ids, char* values) {
    const int64_t bytes = bytes_of(c.dtype);
    for (int64_t j = 0; j < c.chosen; j++) ids[j] = -1;
    for (int64_t i = 0; i < c.count; i++) {
        const float found = element(x, c.dtype, i);
        int64_t place = c.chosen;
        for (; place > 0; place--) {
            if (ids[place - 1] < 0) continue;
            const float other = element(x, c.dtype, ids[place - 1]);
            if (!(found > other || (found != found && other == other))) break;
        }
        for (int64_t j = c.chosen - 1; j > place; j--) ids[j] = ids[j - 1];
        if (place < c.chosen) ids[place] = i;
    }
    for (int64_t j = 0; j < c.chosen; j++) std::memcpy(values + j * bytes, x + ids[j] * bytes, bytes);
}

int64_t run_choice(const Program& p, const Choice& c, int64_t first, int64_t rows) {
    const int64_t bytes = bytes_of(c.dtype);
    const char* x = c.kind == SCATTER ? nullptr : rows_at(p, c.x, first, bytes);
    char *ids = rows_at(p, c.ids, first, 8), *values = rows_at(p, c.values, first, bytes);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t m = 0; m < c.per_row; m++) {
            const char* from = x + (r * c.x.row + m * c.x.stride) * bytes;
            int64_t* own = (int64_t*)ids + r * c.ids.row + m * c.ids.stride;
            char* to = values + (r * c.values.row + m * c.values.stride) * bytes;
            if (c.kind == TOP) {
                top(c, from, own, to);
                continue;
            }
            for (int64_t j = 0; j < c.chosen; j++) {
                if (own[j] < 0 || own[j] >= c.count) return invalid(BAD_ID, first + r);
                if (c.kind == GATHER) std::memcpy(to + j * bytes, from + own[j] * bytes, bytes);
                else if (c.dtype == F32) ((float*)to)[own[j]] = c.value;
                else from_float(c.value, (bf16*)to + own[j]);
            }
        }
    return OK;
}

int64_t run_mixture(Program& p, const Mixture& x, int64_t first, int64_t rows) {
    const int64_t bytes = bytes_of(x.dtype);
    const MixtureRows given{rows_at(p, x.x, first, bytes), rows_at(p, x.ids, first, 8), rows_at(p, x.scores, first, bytes_of(x.scores_dtype)),
                            rows_at(p, x.out, first, bytes), rows};
    const int64_t failed = mix(x, given, p.workspace);
    return failed < 0 ? OK : invalid(BAD_ID, first + failed);
}

int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

void run_product(Program& p, const Product& g, int64_t first, int64_t rows) {
    const int64_t began = p.measured ? now_ns() : 0, bytes = bytes_of(g.dtype);
    for (int32_t i = 0; i < g.parts; i++) {
        const Part& from = p.parts[g.first_part + i];
        GemmPart& to = p.gemm_parts[i];
        to = GemmPart{rows_at(p, from.out, first, bytes), from.out.stride, from.first, from.columns, from.bias};
        if (from.addend.slot >= 0) {
            to.addend = rows_at(p, from.addend, first, bytes);
            to.addend_stride = from.addend.stride;
        }
    }
    const void* x = rows_at(p, g.x, first, bytes);
    const auto product = g.gated ? gemm_gated : static_cast<decltype(&gemm_gated)>(gemm);
    product(x, g.x.stride, rows * g.per_row, g.packed, g.n, g.k, g.dtype, p.gemm_parts.data(), g.parts);
    if (p.measured) {
        p.matmul_ns += now_ns() - began;
        p.matmuls++;
    }
}

// Steps that can meet an id that does not exist.
int64_t run_other(Program& p, const Step& step, int64_t first, int64_t rows, int64_t limit) {
    if (step.kind == LOOKUP) return run_lookup(p, p.lookups[step.index], first, rows, limit);
    if (step.kind == CHOICE) return run_choice(p, p.choices[step.index], first, rows);
    const int64_t began = p.measured ? now_ns() : 0;
    const int64_t failed = run_mixture(p, p.mixtures[step.index], first, rows);
    if (p.measured) {
        p.matmul_ns += now_ns() - began;
        p.matmuls++;
    }
    return failed;
}

int64_t run_chunk(Program& p, int64_t first, int64_t rows, int64_t limit) {
    for (const Step& step : p.steps) {
        if (step.kind == PRODUCT) run_product(p, p.products[step.index], first, rows);
        else if (step.kind == GROUP) run_group(p, p.groups[step.index], first, rows);
        else if (const int64_t failed = run_other(p, step, first, rows, limit)) return failed;
    }
    return OK;
}

// ---- what is checked once, so that running needs no checks ----
bool is_slot(const Program& p, int64_t slot) { return slot >= 0 && slot < (int64_t)p.slots.size(); }

int64_t check_products(Program& p) {
    for (size_t i = 0; i < p.products.size(); i++) {
        const Product& g = p.products[i];
        if (!is_slot(p, g.x.slot) || g.per_row < 1 || g.n < 1 || g.k < 1 || !g.packed) return invalid(BAD_STEP, i);
        if (g.first_part < 0 || g.parts < 1 || g.first_part + g.parts > (int64_t)p.parts.size()) return invalid(BAD_STEP, i);
        if (p.gemm_parts.size() < (size_t)g.parts) p.gemm_parts.resize(g.parts);
    }
    for (size_t i = 0; i < p.parts.size(); i++) {
        const Part& part = p.parts[i];
        if (!is_slot(p, part.out.slot) || (part.addend.slot != -1 && !is_slot(p, part.addend.slot))) return invalid(BAD_SLOT, i);
    }
    return OK;
}
int64_t check_groups(Program& p, const ProgramDesc& d) {
    for (size_t i = 0; i < p.views.size(); i++)
        if (!is_slot(p, p.views[i].slot) || p.views[i].dtype < 0 || p.views[i].dtype > ELEMENT_I64) return invalid(BAD_VIEW, i);
    for (size_t i = 0; i < p.groups.size(); i++) {
        const Group& g = p.groups[i];
        const bool whole = g.reduces || g.inner <= TILE;
        if (g.inner < 1 || g.middle < 1 || (whole && g.inner > WIDEST) || g.registers < 0 || g.columns < 0) return invalid(BAD_STEP, i);
        if (g.loops < 0 || g.loops > MAX_LOOPS || g.first_op < 0 || g.ops < 1 || g.first_op + g.ops > d.ops) return invalid(BAD_STEP, i);
        for (int64_t o = g.first_op; o < g.first_op + g.ops; o++) {
            p.ops[o].op = d.op[o];
            if (!bind_op(p, g, p.ops[o])) return invalid(BAD_OP, o);
        }
    }
    return OK;
}
int64_t check_choices(const Program& p) {
    for (size_t i = 0; i < p.choices.size(); i++) {
        const Choice& c = p.choices[i];
        const bool known = is_slot(p, c.ids.slot) && is_slot(p, c.values.slot) && (c.kind == SCATTER || is_slot(p, c.x.slot));
        if (!known || c.chosen < 1 || c.count < 1 || c.per_row < 1 || (c.kind == TOP && c.chosen > c.count)) return invalid(BAD_STEP, i);
        if (c.kind < TOP || c.kind > SCATTER) return invalid(BAD_STEP, i);
    }
    for (size_t i = 0; i < p.mixtures.size(); i++) {
        const Mixture& m = p.mixtures[i];
        for (const Rows* rows : {&m.x, &m.ids, &m.scores, &m.out})
            if (!is_slot(p, rows->slot)) return invalid(BAD_SLOT, i);
        if (m.experts < 1 || m.chosen < 1 || m.width < 1 || m.inner < 1 || !m.up || !m.down) return invalid(BAD_STEP, i);
    }
    return OK;
}
size_t steps_of(const Program& p, int32_t kind) {
    switch (kind) {
        case PRODUCT: return p.products.size();
        case LOOKUP: return p.lookups.size();
        case GROUP: return p.groups.size();
        case CHOICE: return p.choices.size();
        case MIXTURE: return p.mixtures.size();
        default: return 0;
    }
}
int64_t check_steps(const Program& p) {
    for (const Lookup& l : p.lookups)
        if (!is_slot(p, l.ids.slot) || !is_slot(p, l.out.slot) || (!l.table && !is_slot(p, l.table_slot))) return invalid(BAD_SLOT, &l - p.lookups.data());
    for (size_t i = 0; i < p.steps.size(); i++) {
        const Step& s = p.steps[i];
        if (s.index < 0 || (size_t)s.index >= steps_of(p, s.kind)) return invalid(BAD_STEP, i);
    }
    return OK;
}

int64_t create(const ProgramDesc& d, Program& p) {
    p.chunk = d.chunk;
    p.slots.assign(d.slot, d.slot + d.slots);
    p.products.assign(d.product, d.product + d.products);
    p.parts.assign(d.part, d.part + d.parts);
    p.lookups.assign(d.lookup, d.lookup + d.lookups);
    p.choices.assign(d.choice, d.choice + d.choices);
    p.mixtures.assign(d.mixture, d.mixture + d.mixtures);
    p.groups.assign(d.group, d.group + d.groups);
    p.views.assign(d.view, d.view + d.views);
    p.steps.assign(d.step, d.step + d.steps);
    p.ops.resize(d.ops);
    if (p.chunk < 1) return invalid(BAD_ROWS, p.chunk);
    if (const int64_t failed = check_products(p)) return failed;
    if (const int64_t failed = check_groups(p, d)) return failed;
    if (const int64_t failed = check_choices(p)) return failed;
    return check_steps(p);
}

}  // namespace

extern "C" {

int64_t braid_program_sizes(int64_t* sizes) {  // of the structs, in the order of native/program.py
    const int64_t found[] = {sizeof(Slot), sizeof(Rows), sizeof(Part), sizeof(Product), sizeof(Lookup), sizeof(Choice), sizeof(Mixture), sizeof(View),
                             sizeof(Operand), sizeof(Op), sizeof(Group), sizeof(Step), sizeof(ProgramDesc)};
    std::memcpy(sizes, found, sizeof found);
    return sizeof found / sizeof found[0];
}

int64_t braid_program_create(const ProgramDesc* desc, void** program) {
    *program = nullptr;
    try {
        Program* fresh = new Program;
        const int64_t failed = create(*desc, *fresh);
        if (failed) delete fresh;
        else *program = fresh;
        return failed;
    } catch (const std::bad_alloc&) {
        return failure(MEMORY, 0);
    }
}
void braid_program_destroy(void* program) { delete static_cast<Program*>(program); }

int64_t braid_program_bind(void* program, int64_t slot, void* base) {
    Program* p = static_cast<Program*>(program);
    if (!is_slot(*p, slot)) return invalid(BAD_SLOT, slot);
    p->slots[slot].base = base;
    return OK;
}

// limit: rows of the tables whose number of rows is the caller's to say.
int64_t braid_program_run(void* program, int64_t rows, int64_t limit) {
    Program* p = static_cast<Program*>(program);
    for (size_t i = 0; i < p->slots.size(); i++)
        if (!p->slots[i].base) return invalid(BAD_SLOT, i);
    try {
        const int64_t pieces = tiles(rows, p->chunk), size = tiles(rows, pieces < 1 ? 1 : pieces);
        for (int64_t first = 0; first < rows; first += size)
            if (const int64_t failed = run_chunk(*p, first, least(size, rows - first), limit)) return failed;
    } catch (const std::bad_alloc&) {
        return failure(MEMORY, 0);
    }
    return OK;
}

void braid_program_measure(void* program, int32_t on) { static_cast<Program*>(program)->measured = on != 0; }
void braid_program_matmul(const void* program, int64_t* ns, int64_t* count) {
    const Program* p = static_cast<const Program*>(program);
    *ns = p->matmul_ns;
    *count = p->matmuls;
}

}  // extern "C"
