#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_64 = attention_entry<64>();
}
