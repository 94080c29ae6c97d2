// A program: what a segment of a model computes on each of its tokens, as a list of steps that one call runs.
//
// A slot is memory of so many rows, one row a token: a whole buffer that others read, or a temporary that
// holds one chunk of the rows. Steps are products (gemm.h), look-ups of rows in a table, and groups of
// elementwise operations and row reductions. All of it is done chunk by chunk of the rows, so that
// temporaries stay in cache, and nothing that is done for a row depends on the other rows or their number.
//
// Every struct is mirrored field by field in native/program.py. Strides and offsets count elements.
#pragma once

#include <vector>

#include "common.h"

namespace braid {

enum Element : int32_t { ELEMENT_F32 = F32, ELEMENT_BF16 = BF16, ELEMENT_I64 = 2 };

struct Slot {
    void* base;         // may be bound later
    int32_t chunked;    // holds one chunk of the rows; otherwise all rows
    int32_t spare;
};

// The rows of a matrix: row r of the step begins at offset + r * row, and has `per_row` matrix rows, stride apart.
struct Rows {
    int32_t slot, spare;
    int64_t offset, row, stride;
};

struct Part {
    Rows out;
    Rows addend;          // slot -1: none
    const void* bias;     // or null
    int64_t first, columns;
};

struct Product {
    Rows x;
    const void* packed;
    int64_t n, k, per_row;
    int32_t dtype, gated, first_part, parts;
};

struct Lookup {
    Rows ids;             // int64, one a row
    Rows out;
    const void* table;    // null: table_rows is a slot instead of memory that never changes
    int64_t table_slot, table_stride, table_rows;  // table_rows -1: as many as the caller says
    int64_t columns;
    int32_t dtype, spare;
};

enum ChoiceKind : int32_t { TOP = 0, GATHER = 1, SCATTER = 2 };

// Elements of rows by index. TOP: values and ids are the `chosen` largest of `count` elements of x.
// GATHER: values are those elements of x whose ids are given. SCATTER: these elements of values become `value`.
struct Choice {
    Rows x, ids, values;
    int64_t count, chosen, per_row;
    int32_t kind, dtype;
    float value;
    int32_t spare;
};

enum Activation : int32_t { SILU_OF = 0, GELU_OF = 1, SQUARED_RELU_OF = 2 };

// A mixture of experts: each row through the experts that were chosen for it, weighed and added.
// Weights are packed one by one: up[e] is [inner, width], or [2 inner, width] where `gated` (the gate first;
// pack_gated where it is silu's), down[e] is [width, inner].
struct Mixture {
    Rows x, ids, scores, out;     // ids int64 and scores [chosen] a row
    const void* const* up;
    const void* const* down;
    int64_t experts, chosen, width, inner;
    int32_t dtype, scores_dtype, activation, gated;
};

constexpr int MAX_LOOPS = 3;

// Where an operand of a group lies: element (row, loops, middle, inner) of its space.
struct View {
    int32_t slot, dtype;
    int64_t offset, row, loop[MAX_LOOPS], middle, inner;
};

enum OperandKind : int32_t { NONE = 0, REGISTER = 1, COLUMN = 2, VIEW = 3, CONSTANT = 4 };

struct Operand {
    int32_t kind, index;  // of a register, a column or a view
    float value;          // of a constant
    int32_t spare;
};

enum OpCode : int32_t {
    COPY, STORE_COLUMN, NEG, ABS, SQRT, RSQRT, EXP, LOG, SIGMOID, SILU, GELU, GELU_TANH, TANH, SOFTPLUS, COS, SIN, RELU, RECIPROCAL,
    ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM, POW, LESS, LESS_EQUAL, EQUAL, KEEP,
    SUM, DOT, LARGEST,
    OP_CODES
};

// dst = code(a, b). Comparisons give 1 or 0; KEEP gives a where b is not 0, and 0 elsewhere. Operands of elementwise operations are registers, columns, constants, and fp32 views with
// an inner stride of 1 or 0; COPY alone takes and gives any view. A reduction over the inner dimension
// writes a column, one value for each (row, middle); STORE_COLUMN writes a column to a view. An operation
// on nothing but columns and constants writes a column.
struct Op {
    int32_t code, spare;
    Operand dst, a, b;
};

// Elementwise operations over [rows, loops…, middle, inner], tile by tile in registers of a tile each.
struct Group {
    int32_t first_op, ops, registers, columns;
    int32_t reduces, loops;         // whether the inner dimension must stay whole; loops used
    int64_t loop[MAX_LOOPS], middle, inner;
};

enum StepKind : int32_t { PRODUCT = 0, LOOKUP = 1, GROUP = 2, CHOICE = 3, MIXTURE = 4 };

struct Step {
    int32_t kind, index;
};

struct ProgramDesc {
    int64_t chunk;        // rows that temporaries hold
    int64_t slots, products, parts, lookups, choices, mixtures, groups, ops, views, steps;
    const Slot* slot;
    const Product* product;
    const Part* part;
    const Lookup* lookup;
    const Choice* choice;
    const Mixture* mixture;
    const Group* group;
    const Op* op;
    const View* view;
    const Step* step;
};

// ---- mixture.cpp ----
struct MixtureRows {
    const void* x;
    const void* ids;
    const void* scores;
    void* out;
    int64_t rows;
};
// Runs a mixture on some rows; -1, or the first row that names an expert which does not exist.
int64_t mix(const Mixture& m, const MixtureRows& given, std::vector<char>& workspace);

}  // namespace braid
