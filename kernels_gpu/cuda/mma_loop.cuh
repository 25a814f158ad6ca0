// The loop of a product on the tensor cores: chunks of weights and stages of x travel ahead through their rings of shared memory
// while those before are multiplied. Who calls says where they come from and what happens at a chunk's end.
// Defines: those of mma_tile.cuh.
#pragma once
#include "mma_tile.cuh"

// sums += n_chunks chunks, one after another, all of which lie in `shared` in turn.
//   chunk               number of the one that is multiplied, as the row of weights counts them; `end_of_chunk` moves it on
//   ask_weights(to)     asks for the next chunk into this slot
//   ask_x(to, step)     asks for the next stage of x, which is stage `step` of its chunk
//   end_of_chunk(last)  once a chunk's products are in `sums`
template <class AskWeights, class AskX, class End>
DEVICE void multiply_chunks(float (&sums)[MT][kGroups][4], uint8_t* shared, int n_chunks, const int& chunk,
                            AskWeights&& ask_weights, AskX&& ask_x, End&& end_of_chunk) {
  uint8_t *w_ring = shared, *x_ring = shared + W_STAGES * kWStage;
  const int n_stages = n_chunks * kSteps;
  // weights depend on nobody: they may travel while the kernel before this one ends
#pragma unroll
  for (int i = 0; i < W_STAGES - 1; i++) {
    if (i < n_chunks) ask_weights(w_ring + i * kWStage);
  }
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < X_STAGES - 1; i++) {
    if (i < n_stages) ask_x(x_ring + i * kXStage, i % kSteps);
    cp_async_commit();
  }
  int w_slot = 0, x_slot = 0;
  for (int stage = 0, i = 0; i < n_chunks; i++) {
#pragma unroll
    for (int step = 0; step < kSteps; step++, stage++) {
      cp_async_wait<X_STAGES - 2>();
      __syncthreads();
      if (step == 0 && i + W_STAGES - 1 < n_chunks)
        ask_weights(w_ring + (w_slot == 0 ? W_STAGES - 1 : w_slot - 1) * kWStage);
      if (stage + X_STAGES - 1 < n_stages)
        ask_x(x_ring + (x_slot == 0 ? X_STAGES - 1 : x_slot - 1) * kXStage, (step + X_STAGES - 1) % kSteps);
      cp_async_commit();
      multiply(sums, w_ring + w_slot * kWStage, x_ring + x_slot * kXStage, chunk, step);
      x_slot = x_slot == X_STAGES - 1 ? 0 : x_slot + 1;
    }
    w_slot = w_slot == W_STAGES - 1 ? 0 : w_slot + 1;
    end_of_chunk(i == n_chunks - 1);
  }
}
