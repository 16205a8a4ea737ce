// Decode attention at the speed of memory: every byte of the cache is read once for each tile of query rows, by copies
// that are always under way, and the tensor cores answer all rows of a tile at once.
//
// Adds over paged_attention_mma: each warp has a ring of chunks of 16 or 32 tokens in shared memory that copies fill while
// earlier ones are used, across the borders of sequences and pieces; a thread block lives as long as the kernel and
// takes pieces of the work from a queue (decode_plan.cuh). Where a sequence is cut into parts, the last of them to be
// done merges their results, in their order: the same plan gives the same bits. On Hopper a call starts while the kernel
// before it ends, and fetches keys that it will read first into the L2 cache (launch_overlap.cuh).
//
// Weights are rounded to the storage type before they meet the values, as in FlashAttention; sums are float32.
//
// Measured: 95 to 98 % of the read ceiling of an H100 above 200 MB, 75 % on 34 MB, where 4 us are spent besides reading
// (experiments/results/h100-80gb-hbm3/decode.csv); what it took and what did not help: kernels_cu/TUNING.md.
//
// Grid:  as many blocks as the plan was made for; any number up to max_pieces is right, if not as fast.    Block: (WARPS * 32).
// Dynamic shared memory: WARPS * STAGES * sizeof(Chunk) at least; more keeps blocks of the next call out (cupaged/ops/plan.py).
//
// Defines
//   STORAGE       __half or __nv_bfloat16
//   HEAD_DIM      32 to 256, a multiple of 16
//   BLOCK_SIZE    tokens per KV block, 1 to 256
//   ROWS          query rows in a tile, 8, 16 or 32; a row is a query head of a query token
//   WARPS         warps in a block
//   STAGES        chunks in a warp's ring
//   CHUNK_TOKENS  tokens in a chunk, 16 or 32; the plan's
//   and those of variants.cuh, shared_prefix.cuh and launch_overlap.cuh
#include "async_copy.cuh"
#include "attention_tile.cuh"
#include "decode_plan.cuh"
#include "launch_overlap.cuh"
#include "paged_kv.cuh"
#include "running_attention.cuh"
#include "shared_prefix.cuh"
#include "variants.cuh"

constexpr int THREADS = WARPS * kWarpSize;
constexpr int VEC = kValuesPer16Bytes<STORAGE>;
constexpr int VECTORS = HEAD_DIM / VEC;        // 16-byte vectors in a token's row
constexpr int COPIES = CHUNK * VECTORS / kWarpSize;   // of a key's vector and a value's, that a lane makes of a chunk
constexpr int COPIES_AT_ONCE = HEAD_DIM > 128 ? 4 : COPIES;   // of more the registers do not hold the addresses
constexpr int LINE = 64;                       // values in 128 bytes
constexpr int LINES = (HEAD_DIM + LINE - 1) / LINE;   // in a row
constexpr int FETCHES = (CHUNK * LINES + kWarpSize - 1) / kWarpSize;   // of a line of a chunk's keys, by a lane
constexpr int QUADS = HEAD_DIM / 4;            // groups of 4 dimensions: what a thread merges at once
constexpr int LOOKAHEAD = 6 * WARPS;           // chunks before its end at which a block asks for the next piece
constexpr int MERGED_AT_ONCE = 16;             // parts of a tile that a thread reads side by side
constexpr bool ALIGNED = BLOCK_SIZE % CHUNK == 0;   // a chunk lies in one KV block

using Tile = AttentionTile<STORAGE, HEAD_DIM, ROWS>;
using Strides = KvStrides<HEAD_DIM>;

struct __align__(128) Chunk {   // whole lines, so that no sector is torn apart
  STORAGE key[CHUNK * HEAD_DIM], value[CHUNK * HEAD_DIM];

  // Once used, its memory takes 16 rows of a warp's result.
  __device__ __forceinline__ float* as_result() { return reinterpret_cast<float*>(key); }
};

// Chunks whose keys a block fetches into L2 at most while the kernel before ends: 256 KiB an SM and less.
constexpr int CHUNKS_AHEAD = WARPS * 64 * 1024 / sizeof(Chunk);

using Part = RunningAttention<4>;   // attention over some of the context, of 4 neighbouring dimensions of a query row

// The query rows of a head tile.
struct Rows {
  int seq, kv_head, first, count;   // first row within the KV head's, and how many
  int num_kv_heads, group;
  SharedPrefix prefix;

  __device__ __forceinline__ int token(int row) const { return QUERY_TOKENS ? (first + row) / group : 0; }
  __device__ __forceinline__ int head(int row) const { return kv_head * group + (first + row - token(row) * group); }
  __device__ __forceinline__ long long index(const Variants& variants, int row) const {   // in [seqs, tokens, heads]
    const long long query_row = QUERY_TOKENS ? static_cast<long long>(seq) * variants.query_tokens + token(row) : seq;
    return query_row * num_kv_heads * group + head(row);
  }
  // Write 4 dimensions of a row's attention over the whole context.
  __device__ __forceinline__ void write(STORAGE* out, float* lse, const Variants& variants, int row, int dim, Part all) const {
    const long long at = index(variants, row);
    if (SHARED_PREFIX == PREFIX_ALONE) return prefix.store(all, at, HEAD_DIM, dim);
    if (SHARED_PREFIX == PREFIX_BEFORE) prefix.add_to(all, at, HEAD_DIM, dim);
    const float factor = variants.add_sink(all.softmax, head(row)) * all.softmax.normaliser();
    Vector<STORAGE, 4> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.value[i] = from_float<STORAGE>(all.sum[i] * factor);
    *reinterpret_cast<Vector<STORAGE, 4>*>(out + at * HEAD_DIM + dim) = result;
    if (dim == 0 && lse != nullptr) lse[at] = all.softmax.log_sum_exp();
  }
};

// A launch's arguments that are the same for every thread.
struct Call {
  const STORAGE* query;      // [num_seqs, query_tokens, num_heads, HEAD_DIM]
  const int* block_tables;   // [num_seqs, max_blocks], -1 = unmapped
  const int* seq_lens;       // [num_seqs]
  int max_blocks, num_blocks;                       // columns of the table, blocks of the cache
  int num_kv_heads, group, rows_of_head, row_tiles;   // query rows and head tiles of a KV head
  const STORAGE *key_cache, *value_cache;
  Strides key_strides, value_strides;
  Variants variants;
  SharedPrefix prefix;

  __device__ __forceinline__ Rows rows_of(int seq, int tile) const {
    const int first = tile % row_tiles * ROWS;
    return {seq, tile / row_tiles, first, min(ROWS, rows_of_head - first), num_kv_heads, group, prefix};
  }
};

// What the warps of a block tell each other.
struct Exchange {
  float max[WARPS][ROWS], sum[WARPS][ROWS];
  unsigned int mapped[WARPS][STAGES];   // of each chunk in a ring: bit t says whether token t is there
  int used_stage[WARPS];                // whose memory holds a warp's result
  unsigned int taken;                   // number of the next piece
  unsigned int before_ended;            // whether the kernel before has ended
  bool last;                            // whether all other parts of a tile are there
};

// A block's first piece, as the plan says while the kernel before may still be at work. Neither the plan nor the table may be
// written yet, so they are asked for no more than addresses, and those are held to the arrays.
struct Guess {
  Piece piece = {};   // the same for all lanes of a warp
  bool usable = false;

  Guess() = default;
  __device__ __forceinline__ Guess(const Call& call, const Piece* queue) {
    const int4 fields = peek(reinterpret_cast<const int4*>(queue + blockIdx.x));
    const auto first_lanes = [](int field) { return __shfl_sync(kAllLanes, field, 0); };   // lanes may have seen different ones
    piece = {first_lanes(fields.x), first_lanes(fields.y), first_lanes(fields.z), first_lanes(fields.w)};
    usable = in_range(piece.seq, call.prefix.table_rows()) && in_range(piece.tile, call.num_kv_heads * call.row_tiles) &&
             in_range(piece.begin, call.max_blocks * BLOCK_SIZE / CHUNK + 1);
  }
  // Whether the piece, as it is now, reads the same tokens.
  __device__ __forceinline__ bool is_right(const Piece& now) const {
    return usable && piece.seq == now.seq && piece.tile == now.tile && piece.begin == now.begin && piece.end == now.end;
  }
  // Fetch what is read besides keys and values.
  __device__ __forceinline__ void fetch_queries(const Call& call, const int* summary) const {
    const Rows rows = call.rows_of(piece.seq, piece.tile);
    for (int line = threadIdx.x % kWarpSize; line < rows.count * LINES; line += kWarpSize)
      fetch_line(call.query + rows.index(call.variants, line / LINES) * HEAD_DIM + line % LINES * LINE);
    fetch_line(call.seq_lens + piece.seq);
    fetch_line(summary);
  }
  // The table's entry for token l % CHUNK of the piece's n-th chunk, by lane l.
  __device__ __forceinline__ int entry_of(const Call& call, int n) const {
    const int chunk = piece.begin + n, index = static_cast<unsigned>(chunk * CHUNK + threadIdx.x % CHUNK) / BLOCK_SIZE;
    if (chunk >= piece.end || !in_range(index, call.max_blocks)) return kUnmapped;
    return BlockTable(call.block_tables, piece.seq, call.max_blocks).peek_block(index);
  }
  // Fetch that chunk's keys, and wait until they are there. Its entries are these. Not marked to be let go of first, as keys
  // are that are copied to be used: they would be gone before that.
  __device__ __forceinline__ void fetch_keys(const Call& call, int n, int entry, Chunk& scratch) const {
    const int kv_head = piece.tile / call.row_tiles;
#pragma unroll
    for (int i = 0; i < FETCHES; ++i) {
      const int line = i * kWarpSize + threadIdx.x % kWarpSize, row = line / LINES % CHUNK, dim = line % LINES * LINE;
      const int block_id = __shfl_sync(kAllLanes, entry, row);
      const int slot = static_cast<unsigned>((piece.begin + n) * CHUNK + row) % BLOCK_SIZE;
      if (in_range(block_id, call.num_blocks))
        start_fetch_line(scratch.key + line * VEC, call.key_cache + call.key_strides.offset(block_id, kv_head, slot, dim));
    }
    wait_for_fetches();
  }
};

// Wait until the kernel before has ended; every thread must, for itself. The last warp does so at once and tells the others,
// which until then fetch keys that the block will read first into L2: each a chunk's at a time, as whoever is still at work in
// that kernel is not to wait for many of them. The values come from the memory behind L2 when the keys come from L2: both are
// at work then. Returns what was guessed, to be held against what is.
__device__ __forceinline__ Guess fetch_until_kernel_before_ends(const Call& call, const int* summary, const Piece* queue,
                                                                Exchange& exchange, Chunk* ring) {
  constexpr int FETCHING_WARPS = WARPS - 1;
  const int warp = threadIdx.x / kWarpSize;
  const Guess guess(call, queue);
  if (threadIdx.x == 0) exchange.before_ended = 0;
  __syncthreads();   // nobody asks before
  if (warp == WARPS - 1) {
    if (guess.usable) guess.fetch_queries(call, summary);
    wait_for_kernel_before();
    atomicExch(&exchange.before_ended, 1);   // atomic, as no barrier stands between it and those who read it
    return guess;
  }
  if (guess.usable) {
    Chunk& scratch = ring[warp * STAGES];
    int entry = guess.entry_of(call, warp);
    for (int n = warp; n < CHUNKS_AHEAD; n += FETCHING_WARPS) {
      const int next_entry = guess.entry_of(call, n + FETCHING_WARPS);
      guess.fetch_keys(call, n, entry, scratch);
      entry = next_entry;
      if (__any_sync(kAllLanes, atomicOr(&exchange.before_ended, 0) != 0)) break;
    }
    __syncwarp();   // all lanes are done with the ring
  }
  wait_for_kernel_before();
  return guess;
}

// Where a warp copies from next: a chunk of a piece. Lane l looks after the table entry of token l % CHUNK.
struct Cursor {
  int seq, kv_head, chunk, end;   // chunks of the sequence
  int from_token, to_token;       // that some query of the sequence sees
  int entry;

  __device__ __forceinline__ bool valid() const { return chunk < end; }
  __device__ __forceinline__ void start(const Call& call, const Piece& piece) {
    seq = piece.seq, kv_head = piece.tile / call.row_tiles, chunk = piece.begin, end = piece.end;
    to_token = call.prefix.end_token(call.seq_lens, seq);
    from_token = max(call.variants.first_token(call.variants.context_of(to_token, 0)), call.prefix.first_token());
    advance(call, threadIdx.x / kWarpSize);
  }
  __device__ __forceinline__ void advance(const Call& call, int chunks) {
    chunk += chunks;
    if (!valid()) return;
    const int index = static_cast<unsigned>(chunk * CHUNK + threadIdx.x % CHUNK) / BLOCK_SIZE;
    entry = kUnmapped;
    if (in_range(index, call.max_blocks))
      entry = BlockTable(call.block_tables, seq, call.max_blocks).block(index);
  }

  // Start the copies. Rows of tokens that are not there become zeros: what lies in their slots may be NaN. Returns which
  // tokens are there, a bit each.
  __device__ __forceinline__ unsigned copy(const Call& call, Chunk& to) const {
    const int lane = threadIdx.x % kWarpSize, first_token = chunk * CHUNK;
    const auto block_if_seen = [&](int token) { return from_token <= token && token < to_token ? entry : kUnmapped; };
    const int block_of_lane = block_if_seen(first_token + lane % CHUNK);
#pragma unroll COPIES_AT_ONCE
    for (int i = 0; i < COPIES; ++i) {
      const int index = i * kWarpSize + lane, row = index / VECTORS, vector = index % VECTORS;
      const int found = ALIGNED ? block_if_seen(first_token + row) : __shfl_sync(kAllLanes, block_of_lane, row);
      const int slot = static_cast<unsigned>(first_token + row) % BLOCK_SIZE;
      const bool there = found != kUnmapped;
      const int block_id = there ? found : 0, place = Tile::place_of(row, vector);
      start_copy_16_once(to.key + place,
                         call.key_cache + call.key_strides.offset(block_id, kv_head, slot, vector * VEC), there);
      start_copy_16_once(to.value + place,
                         call.value_cache + call.value_strides.offset(block_id, kv_head, slot, vector * VEC), there);
    }
    return __ballot_sync(kAllLanes, block_of_lane != kUnmapped);
  }
};

// Wait until the copies of all chunks but the latest `left` have arrived.
template <int Most = STAGES - 1>
__device__ __forceinline__ void wait_for_all_but(int left) {
  if constexpr (Most > 0) {
    if (left < Most) return wait_for_all_but<Most - 1>(left);
  }
  wait_for_copies<Most>();
}

// Merge the parts of a tile, in their order. Where there are few rows, neighbouring lanes share the parts of one.
__device__ __forceinline__ void merge_parts(STORAGE* out, float* lse, const Variants& variants, const Rows& rows, int parts,
                                            const float* partial_out,       // [parts, ROWS, HEAD_DIM]
                                            const float* partial_state) {   // [parts, ROWS, 2]
  const int items = rows.count * QUADS;
  int lanes = 1;
  while (lanes < 8 && 2 * lanes * items <= THREADS) lanes *= 2;
  const int share = threadIdx.x % lanes;
  for (int first_item = 0; first_item < items; first_item += THREADS / lanes) {   // as often for every lane of a warp
    const int item = min(first_item + static_cast<int>(threadIdx.x) / lanes, items - 1);
    const int row = item / QUADS, dim = item % QUADS * 4;
    Part all;
    for (int first = share; first < parts; first += lanes * MERGED_AT_ONCE) {
      SoftmaxState softmax[MERGED_AT_ONCE];   // of nothing, past the last part
      float sum[MERGED_AT_ONCE][4] = {};
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; ++i)
        if (const int part = first + i * lanes; part < parts) {
          const int at = part * ROWS + row;
          const float2 state = __ldcg(reinterpret_cast<const float2*>(partial_state) + at);
          const float4 value = __ldcg(reinterpret_cast<const float4*>(partial_out + at * HEAD_DIM + dim));
          softmax[i].max = state.x, softmax[i].sum = state.y;
          sum[i][0] = value.x, sum[i][1] = value.y, sum[i][2] = value.z, sum[i][3] = value.w;
        }
      all.merge(softmax, sum);
    }
    for (int distance = 1; distance < lanes; distance *= 2) {
      SoftmaxState softmax;
      float sum[4];
      softmax.max = __shfl_xor_sync(kAllLanes, all.softmax.max, distance);
      softmax.sum = __shfl_xor_sync(kAllLanes, all.softmax.sum, distance);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = __shfl_xor_sync(kAllLanes, all.sum[i], distance);
      all.merge(softmax, sum);
    }
    if (share == 0 && first_item + static_cast<int>(threadIdx.x) / lanes < items)
      rows.write(out, lse, variants, row, dim, all);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) paged_attention_persistent(
    STORAGE* __restrict__ out,                // [num_seqs, query_tokens, num_heads, HEAD_DIM]
    float* __restrict__ lse,                  // [num_seqs, query_tokens, num_heads], or null
    float* partial_out,                       // [max_slots, ROWS, HEAD_DIM], work space
    float* partial_state,                     // [max_slots, ROWS, 2], work space: maximum and sum
    unsigned int* arrivals,                   // [1 + max_slots], zeros before and after; [0] is the queue
    const STORAGE* query,                     // [num_seqs, query_tokens, num_heads, HEAD_DIM]
    const STORAGE* __restrict__ key_cache,    // by the strides below
    const STORAGE* __restrict__ value_cache,  // likewise
    const int* block_tables,                  // [num_seqs, max_blocks], -1 = unmapped
    const int* seq_lens,                      // [num_seqs], the plan's; shorter ones without a window
    const int* summary,                       // [2], the plan's: how many pieces, and the chunks of the largest
    const int* pieces,                        // [max_pieces, 8], the plan's Pieces
    const float scale, const int num_kv_heads, const int group, const int max_blocks, const int num_blocks,
    const int key_block_stride, const long long key_head_stride, const int key_slot_stride,
    const int value_block_stride, const long long value_head_stride, const int value_slot_stride,
    const int query_tokens, const int window, const float softcap,
    const float* alibi_slopes,                // [num_heads], read if ALIBI
    const float* sinks,                       // [num_heads], read if SINKS
    float* prefix_out, float* prefix_state,   // SharedPrefix's; null without SHARED_PREFIX
    const int prefix_tokens, const int num_seqs) {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  __shared__ Exchange exchange;
  Chunk* const chunks = reinterpret_cast<Chunk*>(dynamic_shared);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const Variants variants{query_tokens, window, softcap, alibi_slopes, sinks};
  const SharedPrefix prefix{prefix_tokens, num_seqs, prefix_out, prefix_state};
  const int rows_of_head = prefix.query_tokens(variants) * group, row_tiles = (rows_of_head + ROWS - 1) / ROWS;
  const Call call{query, block_tables, seq_lens, max_blocks, num_blocks,
                  num_kv_heads, group, rows_of_head, row_tiles, key_cache, value_cache,
                  Strides{key_block_stride, key_head_stride, key_slot_stride, 0},
                  Strides{value_block_stride, value_head_stride, value_slot_stride, 0}, variants, prefix};
  const Piece* const queue = reinterpret_cast<const Piece*>(pieces);
  Guess guess;
  if constexpr (LAUNCH_OVERLAP) guess = fetch_until_kernel_before_ends(call, summary, queue, exchange, chunks);
  start_kernel_after();   // whose blocks find room as blocks of this one leave
  const int count = load_global(summary), largest = load_global(summary + 1);
  int number = blockIdx.x;   // of the piece
  Piece piece = load_global(queue + number), next = {};
  Cursor load;
  if (guess.usable) load.start(call, guess.piece);   // while the piece is on its way
  if (number >= count) return;
  // Pieces too short to hide a question behind are dealt out in turns.
  const bool queued = count > static_cast<int>(gridDim.x) && largest > LOOKAHEAD;

  // The warp's ring: copies of `issued` chunks have been started, `used` of them used.
  if (!guess.is_right(piece)) load.start(call, piece);
  int issued = 0, used = 0;
  bool in_next = false;   // whether the cursor is in the next piece by now
  const auto fill_ring = [&](int chunks_in_flight) {
    for (; issued - used < chunks_in_flight && load.valid(); ++issued) {
      const unsigned mapped = load.copy(call, chunks[warp * STAGES + issued % STAGES]);
      close_copy_group();
      if (lane == 0) exchange.mapped[warp][issued % STAGES] = mapped;
      load.advance(call, WARPS);
      if (!load.valid() && !in_next && next.chunks() > 0) load.start(call, next), in_next = true;
    }
  };
  fill_ring(STAGES - 1);

  Tile tile;
  while (piece.chunks() > 0) {
    const Rows rows = call.rows_of(piece.seq, piece.tile);
    tile.start(query, rows.count, [&](int row) { return rows.index(variants, row) * HEAD_DIM; });
    int context[Tile::HALVES];   // tokens that a row sees, those before its window too
    float slope[Tile::HALVES];
#pragma unroll
    for (int half = 0; half < Tile::HALVES; ++half) {
      const int row = min(Tile::row_of(half), rows.count - 1);
      context[half] = prefix.context_of(variants, seq_lens, piece.seq, rows.token(row));
      slope[half] = variants.slope_of(rows.head(row));
    }

    // What the next piece is must be asked early, heard in time for its copies to follow on, and not before it need be.
    const int ask_at = max(piece.begin, piece.end - LOOKAHEAD), hear_at = min(ask_at + 2 * WARPS, piece.end - 1);
    unsigned int taken = 0;
    if (!queued) {
      number += gridDim.x;
      next = load_global_if(number < count, queue + number);
    }
    int use = piece.begin + warp;   // chunk that this warp uses next
    for (int stop = queued ? 0 : 2; stop < 3; ++stop) {
      if (!load.valid() && !in_next && next.chunks() > 0) load.start(call, next), in_next = true;
      const int until = stop == 0 ? ask_at : stop == 1 ? hear_at : piece.end;
      for (; use < until; use += WARPS) {
        if (issued == used) fill_ring(1);
        wait_for_all_but(issued - used - 1);
        __syncwarp();   // every lane's copies have arrived, and the chunk before is no longer read
        fill_ring(STAGES);
        const int stage = used % STAGES;
        const Chunk& chunk = chunks[warp * STAGES + stage];
        const unsigned mapped = exchange.mapped[warp][stage];
        const int first_token = use * CHUNK;
        tile.add(chunk.key, chunk.value, [&](float product, int half, int token) {
          bool seen = (mapped >> token & 1) != 0;
          if (QUERY_TOKENS) seen = seen && first_token + token < context[half];
          if (WINDOW) seen = seen && first_token + token >= variants.first_token(context[half]);
          const float logit = variants.logit(product * (scale * kLog2E), first_token + token, context[half], slope[half]);
          return seen ? logit : minus_infinity();
        });
        ++used;
      }
      if (stop == 0 && threadIdx.x == 0) taken = gridDim.x + atomicInc(arrivals, count - 1);
      if (stop == 1) {
        if (threadIdx.x == 0) exchange.taken = taken;
        __syncthreads();
        next = load_global_if(exchange.taken < static_cast<unsigned>(count), queue + exchange.taken);
      }
    }

    // Add the warps up. The only part of this tile: write the result. Else leave it, and merge all if they are there.
    tile.finish();
    const int used_stage = (used + STAGES - 1) % STAGES;   // not yet asked to take another chunk
#pragma unroll
    for (int half = 0; half < Tile::HALVES; ++half)
      if (lane % 4 == 0) {
        exchange.max[warp][Tile::row_of(half)] = tile.softmax[half].max;
        exchange.sum[warp][Tile::row_of(half)] = tile.softmax[half].sum;
      }
    if (lane == 0) exchange.used_stage[warp] = used_stage;
#pragma unroll
    for (int operand = 0; operand < Tile::OPERANDS; ++operand) {
      __syncwarp();
      tile.store(chunks[warp * STAGES + used_stage].as_result(), operand);
      __syncthreads();
      const int rows_here = min(16, rows.count - 16 * operand);
      for (int item = threadIdx.x; item < rows_here * QUADS; item += THREADS) {
        const int row = 16 * operand + item / QUADS, dim = item % QUADS * 4;
        SoftmaxState softmax[WARPS];
        Vector<float, 4> sum[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
          const float* result = chunks[w * STAGES + exchange.used_stage[w]].as_result();
          sum[w] = *reinterpret_cast<const Vector<float, 4>*>(result + row % 16 * Tile::FLOAT_PITCH + dim);
          softmax[w].max = exchange.max[w][row], softmax[w].sum = exchange.sum[w][row];
        }
        Part all;
        all.merge(softmax, sum);
        if (piece.parts == 1) {
          rows.write(out, lse, variants, row, dim, all);
        } else {
          const long long at = static_cast<long long>(piece.slot + piece.part) * ROWS + row;
          __stcg(reinterpret_cast<float4*>(partial_out + at * HEAD_DIM + dim),
                 make_float4(all.sum[0], all.sum[1], all.sum[2], all.sum[3]));
          if (dim == 0)
            __stcg(reinterpret_cast<float2*>(partial_state) + at, make_float2(all.softmax.max, all.softmax.sum));
        }
      }
      __syncthreads();   // the result is written; its memory may be written again
    }
    if (piece.parts > 1) {
      if (threadIdx.x == 0) {   // its fences stand for the whole block: others need not wait for their copies
        const unsigned others = static_cast<unsigned>(piece.parts - 1);
        fence_device();
        exchange.last = atomicInc(arrivals + 1 + piece.slot, others) == others;   // back to 0 for the next launch
        fence_device();
      }
      __syncthreads();
      const long long first_slot = static_cast<long long>(piece.slot) * ROWS;
      if (exchange.last)
        merge_parts(out, lse, variants, rows, piece.parts, partial_out + first_slot * HEAD_DIM,
                    partial_state + first_slot * 2);
    }
    piece = next;
    next = {};
    in_next = false;
  }
}
