#include "../attention/entry.cuh"

namespace diffusion_fast {
extern const AttentionEntry attention_128 = attention_entry<128>();
}
