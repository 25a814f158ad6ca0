// What decoding of several steps without the host needs beside `sample.cu`: numbers for all draws, and from one step to the next.
// Defines: none.
#include "ptx.cuh"

typedef unsigned long long u64;

// ---- BLAKE2b (RFC 7693) of three integers, 8 bytes long, as runtime/sample_random.py has it
struct Counter {
  long long seed, index, position;
};

__constant__ u64 kInitial[8] = {0x6a09e667f3bcc908ull, 0xbb67ae8584caa73bull, 0x3c6ef372fe94f82bull, 0xa54ff53a5f1d36f1ull,
                                0x510e527fade682d1ull, 0x9b05688c2b3e6c1full, 0x1f83d9abfb41bd6bull, 0x5be0cd19137e2179ull};
__constant__ unsigned char kWords[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

DEVICE u64 rotated(u64 v, int n) { return v >> n | v << (64 - n); }

DEVICE void mix(u64& a, u64& b, u64& c, u64& d, u64 x, u64 y) {
  a += b + x;
  d = rotated(d ^ a, 32);
  c += d;
  b = rotated(b ^ c, 24);
  a += b + y;
  d = rotated(d ^ a, 16);
  c += d;
  b = rotated(b ^ c, 63);
}

// numbers[step * n + i] = the number in [0, 1) for counters[i] at position + step: a grid of ceil(n * n_steps / 128) blocks.
extern "C" __global__ void __launch_bounds__(128) draw_numbers(const Counter* counters, int n, int n_steps, double* numbers) {
  const int at = blockIdx.x * 128 + threadIdx.x;
  wait_for_previous();
  if (at >= n * n_steps) return;
  const Counter counter = counters[at % n];
  u64 words[16] = {static_cast<u64>(counter.seed), static_cast<u64>(counter.index), static_cast<u64>(counter.position + at / n)};
  u64 v[16];
  for (int i = 0; i < 8; i++) v[i] = v[i + 8] = kInitial[i];
  v[0] ^= 0x01010008ull;  // a digest of 8 bytes, no key
  const u64 first = v[0];
  v[12] ^= 24;  // bytes hashed
  v[14] = ~v[14];  // the last block
  for (int round = 0; round < 12; round++) {
    const unsigned char* m = kWords[round % 10];
    for (int i = 0; i < 4; i++) mix(v[i], v[4 + i], v[8 + i], v[12 + i], words[m[2 * i]], words[m[2 * i + 1]]);
    for (int i = 0; i < 4; i++)
      mix(v[i], v[4 + (i + 1) % 4], v[8 + (i + 2) % 4], v[12 + (i + 3) % 4], words[m[8 + 2 * i]], words[m[9 + 2 * i]]);
  }
  numbers[at] = static_cast<double>((first ^ v[0] ^ v[8]) >> 11) * 1.1102230246251565e-16;  // 2^-53
}

// Between two steps of decoding: what was sampled becomes the input at the next position of its sequence, and goes to the slot
// that each group's page table has for it. slots [n_groups, slot_stride], page_tables [n_groups, table_size] in rows of
// table_stride pages.
extern "C" __global__ void __launch_bounds__(128) advance_step(
    const int* tokens, int n, int* token_ids, int* positions, int* slots, const int* page_tables, int n_groups, int slot_stride,
    int table_size, int table_stride, int block_size) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  wait_for_previous();
  if (i >= n) return;
  const int position = positions[i] + 1;
  token_ids[i] = max(tokens[i], 0);  // after logits that are not finite the host drops what follows
  positions[i] = position;
  for (int g = 0; g < n_groups; g++) {
    const int page = page_tables[static_cast<long long>(g) * table_size + i * table_stride + position / block_size];
    slots[static_cast<long long>(g) * slot_stride + i] = page * block_size + position % block_size;
  }
}

// Before a step that was asked for while the one before it ran: id -2 - i stands for token i of that one.
extern "C" __global__ void __launch_bounds__(128) name_tokens(const int* tokens, int n, int* token_ids) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  wait_for_previous();
  if (i >= n || token_ids[i] > -2) return;
  token_ids[i] = max(tokens[-2 - token_ids[i]], 0);  // after logits that are not finite the host drops what follows
}
